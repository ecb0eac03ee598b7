"""The ring that brings weights to the device: order, bytes, limits and faults, with ordinary memory for pinned."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flux import device as device_module
from flux import transfer
from flux.transfer import Ring, Source
from tests.interrupts import CancelledError, interrupted_at

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int64, torch.uint8)
BUFFER_BYTES = 64


def tensors(shapes: list[tuple[int, ...]], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, 100, shape, generator=generator).to(DTYPES[i % len(DTYPES)]) for i, shape in enumerate(shapes)
    ]


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(flat(a), flat(b))


def flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@pytest.fixture(scope="module")
def ring() -> Ring:
    return Ring(CPU, buffers=3, buffer_bytes=BUFFER_BYTES, threads=2)


shapes = st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), max_size=12)


@settings(deadline=None, max_examples=60)
@given(shapes=shapes, targets=st.integers(0, 2**12))
def test_what_arrives_is_what_was_sent_in_order(ring: Ring, shapes: list[tuple[int, ...]], targets: int) -> None:
    """Tensors of any size beside the buffers', empty ones and numbers too, into new memory and into given."""
    sources = tensors(shapes)
    into = [torch.empty_like(one) if targets >> i & 1 else None for i, one in enumerate(sources)]
    before = ring.bytes_sent
    arrived = list(ring.stream(zip(sources, into, strict=True)))
    assert len(arrived) == len(sources)
    for one, source, target in zip(arrived, sources, into, strict=True):
        assert same_bytes(one, source)
        assert one is target if target is not None else one.data_ptr() != source.data_ptr() or not one.nbytes
    assert ring.bytes_sent - before == sum(one.nbytes for one in sources)


def test_a_slow_consumer_holds_no_more_than_the_buffers(ring: Ring) -> None:
    """What is read ahead of the consumer is bounded, however slow it is."""
    sources = tensors([(BUFFER_BYTES // 2,)] * 40)
    asked = 0

    def counted() -> Iterator[Source]:
        nonlocal asked
        for one in sources:
            asked += 1
            yield one, None

    most = 0
    for i, one in enumerate(ring.stream(counted())):
        assert same_bytes(one, sources[i])
        most = max(most, sum(source.nbytes for source in sources[i:asked]))
    largest = max(one.nbytes for one in sources)
    assert most <= 3 * BUFFER_BYTES + 2 * largest


@settings(deadline=None, max_examples=60)
@given(line=st.integers(1, 400), shapes=shapes)
def test_a_cancel_at_any_line_leaves_the_ring_as_good_as_new(
    ring: Ring, line: int, shapes: list[tuple[int, ...]]
) -> None:
    first = [(one, None) for one in tensors([*shapes, (30,), (50, 3)], seed=1)]
    try:
        with interrupted_at(line, (transfer, device_module)):
            for _ in ring.stream(first):
                pass
    except CancelledError:
        pass
    sources = tensors(shapes, seed=2)
    arrived = list(ring.stream((one, torch.empty_like(one)) for one in sources))
    assert all(same_bytes(one, source) for one, source in zip(arrived, sources, strict=True))


def test_a_stream_that_is_left_halfway_disturbs_no_later_one(ring: Ring) -> None:
    for _ in range(20):
        left = ring.stream((one, None) for one in tensors([(40,)] * 9, seed=3))
        next(left)
        sources = tensors([(33,), (200,), (7, 7)], seed=4)
        arrived = list(ring.stream((one, None) for one in sources))
        assert all(same_bytes(one, source) for one, source in zip(arrived, sources, strict=True))


class LateCopies:
    """In place of `CopyStream`: a device that makes the copies it is asked for when somebody waits for them."""

    def __init__(self, _: torch.device) -> None:
        self.pending: dict[int, list[Callable[[], object]]] = defaultdict(list)

    @contextmanager
    def queue(self, slot: int) -> Iterator[None]:
        with _Deferred(self.pending[slot]):
            yield

    def wait_for_copies(self, slot: int) -> None:
        for copy in self.pending.pop(slot, []):
            copy()

    def wait_for_current_work(self) -> None: ...

    def let_current_work_wait(self, slot: int) -> None: ...

    def used_by_current_work(self, tensor: Tensor) -> None: ...


class _Deferred(TorchDispatchMode):
    def __init__(self, copies: list[Callable[[], object]]) -> None:
        super().__init__()
        self.copies = copies

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.copies.append(partial(func, *args, **(kwargs or {})))
            return args[0]
        return func(*args, **(kwargs or {}))


@settings(deadline=None, max_examples=60)
@given(shapes=shapes, left_after=st.integers(0, 5))
def test_no_buffer_is_filled_again_before_its_copies_are_made(shapes: list[tuple[int, ...]], left_after: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "CopyStream", LateCopies)
        ring = Ring(CPU, buffers=3, buffer_bytes=BUFFER_BYTES, threads=1)
    for seed, stop in ((5, left_after), (6, None)):
        sources = tensors([*shapes, (30,), (50, 3)], seed)
        arrived = list(islice(ring.stream((one, None) for one in sources), stop))
        for slot in range(3):
            ring._copies.wait_for_copies(slot)
        assert all(same_bytes(one, source) for one, source in zip(arrived, sources, strict=False))


def test_an_error_while_filling_reaches_the_consumer_once(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [(one, None) for one in tensors([(40,)] * 9)]
    with monkeypatch.context() as broken:
        broken.setattr(transfer.np, "copyto", raise_os_error)
        with pytest.raises(OSError, match="unreadable"):
            list(ring.stream(sources))
    assert len(list(ring.stream(sources))) == 9


def raise_os_error(*_: object) -> None:
    raise OSError("unreadable")


def test_a_target_of_another_dtype_is_refused(ring: Ring) -> None:
    with pytest.raises(ValueError, match="dtype"):
        list(ring.stream([(torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16))]))


def test_a_mapped_file_that_is_deleted_stays_readable(ring: Ring, tmp_path: Path) -> None:
    value = torch.arange(100.0)
    save_file({"a": value}, tmp_path / "a.safetensors")
    mapped = safe_open(tmp_path / "a.safetensors", "pt").get_tensor("a")
    (tmp_path / "a.safetensors").unlink()
    assert torch.equal(next(ring.stream([(mapped, None)])), value)


def test_a_ring_that_is_gone_leaves_no_thread() -> None:
    before = threading.active_count()
    ring = Ring(CPU, buffers=2, buffer_bytes=BUFFER_BYTES, threads=1)
    list(ring.stream([(torch.zeros(3), None)]))
    del ring
    deadline = time.monotonic() + 60
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
