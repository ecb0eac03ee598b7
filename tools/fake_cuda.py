"""CUDA tensors without a GPU: shapes, strides, dtypes and devices by CUDA's own rules, no numbers.

torch's FakeTensorMode knows those rules in a CPU build as well. What such a build lacks is the device guard that
indexing, moving and a few other calls ask for: those go by operators that need none here.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from flux.transfer import Source

CUDA = torch.device("cuda:0")


@dataclass
class Ledger:
    """What crossed from host memory to the device."""

    bytes: int = 0
    casts: int = 0  # copies that changed the dtype on their way, which CUDA does on the CPU, blocking

    def note(self, source: Tensor, dtype: torch.dtype) -> None:
        self.bytes += source.numel() * dtype.itemsize
        self.casts += source.dtype != dtype

    def stream(self, sources: Iterable[Source]) -> Iterator[Tensor]:
        """In place of the ring, which copies bytes that fake tensors have not."""
        for source, target in sources:
            arrived = torch.empty(source.shape, dtype=source.dtype, device=CUDA) if target is None else target
            if (arrived.dtype, arrived.shape) != (source.dtype, source.shape):
                raise AssertionError(f"{source.dtype} {source.shape} into {arrived.dtype} {arrived.shape}")
            self.note(source, source.dtype)
            yield arrived


@contextmanager
def fake_cuda() -> Iterator[Ledger]:
    """Within, device "cuda" can be computed with."""
    ledger = Ledger()
    clock = (mock.patch("torch.cuda.Event", _Event), mock.patch("torch.cuda.synchronize"))
    with clock[0], clock[1], FakeTensorMode(allow_non_fake_inputs=True), _Guardless(ledger), torch.no_grad():
        yield ledger


class _Event:
    def __init__(self, **_: object) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, _: object) -> float:
        return 0.0


class _Guardless(TorchFunctionMode):
    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = None
        if func is Tensor.__getitem__:
            result = _indexed(*args)
        elif func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            result = self._moved(func, args, kwargs)
        elif func is Tensor.contiguous and args[0].device.type == "cuda":
            result = args[0] if args[0].is_contiguous() else args[0].clone(memory_format=torch.contiguous_format)
        elif func is Tensor.copy_ and "cuda" in (args[0].device.type, args[1].device.type):
            result = self._copied(*args[:2])
        elif (out := kwargs.get("out")) is not None:
            made = func(*args, **{name: value for name, value in kwargs.items() if name != "out"})
            if (made.dtype, made.shape, made.device) != (out.dtype, out.shape, out.device):
                raise AssertionError(f"{func.__name__} gives {made.dtype} {made.shape}, not that of out")
            result = out
        return func(*args, **kwargs) if result is None else result

    def _moved(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        tensor: Tensor = args[0]
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        for one in args[1:]:
            if isinstance(one, str | torch.device):
                device = torch.device(one)
            elif isinstance(one, torch.dtype):
                dtype = one
            elif isinstance(one, Tensor):
                device, dtype = one.device, one.dtype
        if func is Tensor.cpu:
            device = torch.device("cpu")
        if device is None and tensor.device.type != "cuda":
            return None
        device, dtype = torch.device(device or tensor.device), dtype or tensor.dtype
        if (tensor.device.type, tensor.dtype) == (device.type, dtype) and not kwargs.get("copy"):
            return tensor
        if tensor.device.type == "cpu" and device.type == "cuda":
            self.ledger.note(tensor, dtype)
        result: Tensor = torch.ops.aten._to_copy.default(tensor, dtype=dtype, device=device)
        return result

    def _copied(self, target: Tensor, source: Tensor) -> Tensor:
        torch.broadcast_shapes(target.shape, source.shape)  # type: ignore[no-untyped-call]
        if source.device.type == "cpu" and target.device.type == "cuda":
            self.ledger.note(source, target.dtype)
        return target


def _indexed(tensor: Tensor, index: Any) -> Tensor | None:
    """By slicing and selecting; None for what needs more."""
    index = index if isinstance(index, tuple) else (index,)
    if not all(one is None or one is Ellipsis or isinstance(one, int | slice) for one in index):
        return None
    named = sum(one is not None and one is not Ellipsis for one in index)
    result, dim = tensor, 0
    for one in index:
        if one is Ellipsis:
            dim += tensor.dim() - named
        elif one is None:
            result, dim = result.unsqueeze(dim), dim + 1
        elif isinstance(one, slice):
            if one != slice(None):
                result = torch.ops.aten.slice.Tensor(result, dim, one.start, one.stop, one.step or 1)
            dim += 1
        else:
            result = result.select(dim, one)
    return result
