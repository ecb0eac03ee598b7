"""A safetensors file, header first: what it holds, then its tensors as memory of their own.

The format is a length, a JSON header of dtypes, shapes and places, and the bytes (github.com/huggingface/safetensors).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_references import LoraError

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
WHOLE_NUMBERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
DTYPES = FLOATS | WHOLE_NUMBERS

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """A tensor as the header has it."""

    dtype: str
    shape: Shape
    start: int  # of its bytes, from the end of the header
    stop: int


@dataclass(frozen=True)
class Header:
    """Of every tensor what and where it is, and the metadata."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    size: int  # bytes, its length included


def read_header(path: Path, name: str) -> Header:
    """Raises `LoraError` unless `path` is a whole safetensors file; safetensors itself checks that."""
    try:
        with safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            values = json.loads(file.read(length))
        metadata = values.pop("__metadata__", None) or {}
        entries = {key: Entry(one["dtype"], tuple(one["shape"]), *one["data_offsets"]) for key, one in values.items()}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise LoraError(f"{name} cannot be read as a safetensors file ({error}).") from None
    return Header(entries, metadata, 8 + length)


def read_tensors(path: Path, header: Header, name: str) -> dict[str, Tensor]:
    """All tensors of a file whose dtypes are among `DTYPES`. They share one block of memory and none with the file."""
    try:
        with path.open("rb") as file:
            data = torch.empty(max(0, path.stat().st_size - header.size), dtype=torch.uint8)
            file.seek(header.size)
            if file.readinto(data.numpy()) != len(data):  # type: ignore[attr-defined] # it is a buffer
                raise OSError("it changed while it was read")
        return {key: _view(data[one.start : one.stop], one) for key, one in header.entries.items()}
    except (OSError, RuntimeError) as error:
        raise LoraError(f"{name} cannot be read ({error}).") from None


def _view(data: Tensor, entry: Entry) -> Tensor:
    dtype = DTYPES[entry.dtype]
    aligned = data if data.storage_offset() % dtype.itemsize == 0 else data.clone()
    return aligned.view(dtype).view(entry.shape)


def is_finite(tensor: Tensor) -> bool:
    """Whether there is neither an infinity nor a NaN in it."""
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    return tensor.numel() == 0 or all(math.isfinite(float(extreme)) for extreme in tensor.aminmax())
