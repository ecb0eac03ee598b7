"""The tensors of a safetensors file, as memory of their own."""

from pathlib import Path

import torch
from torch import Tensor

from lora.errors import LoraError
from lora.header import Entry, Header

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
DTYPES = FLOATS | INTEGERS

BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def read_tensors(path: Path, header: Header, name: str) -> dict[str, Tensor]:
    """All tensors of a file whose dtypes are among `DTYPES`. They share one block of memory and none with the file.

    Raises `LoraError`, and `FileNotFoundError` when there is no file.
    """
    try:
        with path.open("rb") as file:
            data = torch.empty(max(0, path.stat().st_size - header.size), dtype=torch.uint8)
            file.seek(header.size)
            if file.readinto(data.numpy().data) != len(data):
                raise OSError("it changed while it was read")
        return {key: _view(data[one.start : one.stop], one) for key, one in header.entries.items()}
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError) as error:
        raise LoraError(f"{name} cannot be read ({error}).") from None


def _view(data: Tensor, entry: Entry) -> Tensor:
    dtype = DTYPES[entry.dtype]
    aligned = data if data.storage_offset() % dtype.itemsize == 0 else data.clone()
    return aligned.view(dtype).view(entry.shape)


def largest(tensor: Tensor) -> float:
    """The largest magnitude in it, an infinity or NaN where one is in it.

    The bits say so, which numpy reads at memory's speed and in this thread; torch would start a team of threads for
    each of a thousand tensors.
    """
    bits = tensor.reshape(-1).view(BITS[tensor.dtype.itemsize]).numpy()
    if bits.size == 0:
        return 0.0
    sign = 1 << (8 * bits.itemsize - 1)
    magnitude = max(0, int(bits.max()), int(bits.view(f"u{bits.itemsize}").max()) & (sign - 1))
    return float(torch.tensor([magnitude], dtype=BITS[bits.itemsize]).view(tensor.dtype))
