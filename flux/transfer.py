"""The one way of weights from host memory to the device: a ring of buffers.

A thread fills the buffers from the mapped files, in the files' order; from there a GPU copies them on a stream of its
own while the next buffer is filled and what has arrived is used. A GPU copies pinned memory at the bus's speed, and
mapped files at a fraction of it. No copy changes the dtype: what is to become another dtype does so on the device.

On a CPU a ring works the same way, with ordinary memory; a CPU that reads its mapped files directly needs none.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event, Thread
from weakref import finalize

import numpy as np
import torch
from torch import Tensor

from flux.device import CopyStream, pinned_bytes

BUFFERS = 4
BUFFER_BYTES = 64 * 2**20  # large beside what starting a copy costs, small beside a device's memory
THREADS = 4  # that fill one buffer
PIECE_BYTES = 8 * 2**20  # what one of them copies at a time
POLL_SECONDS = 0.05  # Cog's cancelling is heard between two waits

Source = tuple[Tensor, Tensor | None]  # a tensor in host memory, and where it goes: None is a new tensor
Stream = Callable[[Iterable[Source]], Iterator[Tensor]]


def views(sources: Iterable[Source]) -> Iterator[Tensor]:
    """The tensors themselves, for a device that reads host memory: nothing moves."""
    return (tensor for tensor, _ in sources)


@dataclass
class _Piece:
    """Some bytes of one source, all of which lie in one buffer."""

    source: Tensor  # the whole of it
    target: Tensor | None
    start: int  # the first byte
    stop: int  # one past the last
    at: int  # the place in the buffer


@dataclass
class _Fill:
    """Work for the thread: copy the bytes of each pair, and say so."""

    pairs: Sequence[tuple[np.ndarray, np.ndarray]]
    done: Event = field(default_factory=Event)
    error: BaseException | None = None

    def wait(self) -> None:
        while not self.done.wait(POLL_SECONDS):
            pass
        if self.error is not None:
            raise self.error


class Ring:
    """`buffers` buffers of `buffer_bytes` each, made once, for one stream at a time.

    A stream that is left at any line holds no buffer: its fills, and its copies to targets that nobody relies on, are
    done before those of the next stream.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        buffers: int = BUFFERS,
        buffer_bytes: int = BUFFER_BYTES,
        threads: int = THREADS,
    ) -> None:
        self.device = device
        self.bytes_sent = 0  # since the start
        self._buffer_bytes = buffer_bytes
        self._buffers = [pinned_bytes(buffer_bytes, device) for _ in range(buffers)]
        self._copies = CopyStream(device)
        self._fills: SimpleQueue[_Fill | None] = SimpleQueue()
        Thread(target=_fill_forever, args=(self._fills, threads), name="ring", daemon=True).start()
        finalize(self, self._fills.put, None).atexit = False  # when the interpreter ends, so do its threads

    def stream(self, sources: Iterable[Source]) -> Iterator[Tensor]:
        """Yield each source on the device, in order: its target, or a new tensor of its dtype and shape.

        What is yielded may be used by whatever is queued on the device's current stream from then on. A target must
        not be in use by work that is queued later than the first step of this iterator. Ends with the exception of the
        first copy that fails; a cancel may end it at any line.
        """
        self._copies.wait_for_current_work()
        batches = enumerate(_batches(sources, self._buffer_bytes))
        filling: deque[tuple[int, list[_Piece], _Fill]] = deque()

        def fill_next() -> None:
            number, batch = next(batches, (0, None))
            if batch is not None:
                slot = number % len(self._buffers)
                self._copies.wait_for_copies(slot)  # those of the batch that was there before
                fill = _Fill([_bytes_of(piece, self._buffers[slot]) for piece in batch])
                filling.append((slot, batch, fill))
                self._fills.put(fill)

        for _ in self._buffers[1:]:
            fill_next()
        begun: list[Tensor] = []  # the target of a source whose last bytes are in a later batch
        while filling:
            slot, batch, fill = filling.popleft()
            fill.wait()
            arrived = self._send(slot, batch, begun)
            fill_next()
            self._copies.let_current_work_wait(slot)
            for tensor in arrived:
                self._copies.used_by_current_work(tensor)
                yield tensor

    def _send(self, slot: int, batch: list[_Piece], begun: list[Tensor]) -> list[Tensor]:
        """Queue the copies of a batch from its buffer to the device. Returns the tensors that are complete with it."""
        buffer, arrived = self._buffers[slot], []
        with self._copies.queue(slot):
            for piece in batch:
                if piece.start == 0:
                    new = torch.empty_like(piece.source, device=self.device) if piece.target is None else piece.target
                    begun.append(new)
                size = piece.stop - piece.start
                if size:
                    place = begun[-1].view(-1).view(torch.uint8)[piece.start : piece.stop]
                    place.copy_(buffer[piece.at : piece.at + size], non_blocking=True)
                    self.bytes_sent += size
                if piece.stop == piece.source.nbytes:
                    arrived.append(begun.pop())
        return arrived


def _batches(sources: Iterable[Source], buffer_bytes: int) -> Iterator[list[_Piece]]:
    """The sources' bytes in order, as many in a batch as fit in a buffer."""
    batch: list[_Piece] = []
    at = 0
    for source, target in sources:
        if target is not None and (target.dtype, target.shape) != (source.dtype, source.shape):
            raise ValueError("a target is of its source's dtype and shape")
        start = stop = 0
        while stop < source.nbytes or start == stop == 0:  # an empty tensor is one piece too
            if at == buffer_bytes:
                yield batch
                batch, at = [], 0
            start, stop = stop, min(source.nbytes, stop + buffer_bytes - at)
            batch.append(_Piece(source, target, start, stop, at))
            at += stop - start
            if source.nbytes == 0:
                break
    if batch:
        yield batch


def _bytes_of(piece: _Piece, buffer: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The piece's place in the buffer, and its bytes in the source."""
    size = piece.stop - piece.start
    source = piece.source.contiguous().view(-1).view(torch.uint8)[piece.start : piece.stop]
    return buffer[piece.at : piece.at + size].numpy(), source.numpy()


def _fill_forever(fills: "SimpleQueue[_Fill | None]", threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        while _fill_next(fills, pool):
            pass  # it waits without holding on to any tensor


def _fill_next(fills: "SimpleQueue[_Fill | None]", pool: ThreadPoolExecutor) -> bool:
    """Wait for a fill and do it. Returns whether there may be another."""
    if (fill := fills.get()) is None:
        return False
    try:
        pieces = [
            (target[start : start + PIECE_BYTES], source[start : start + PIECE_BYTES])
            for target, source in fill.pairs
            for start in range(0, len(source), PIECE_BYTES)
        ]
        list(pool.map(lambda pair: np.copyto(*pair), pieces))  # numpy lets go of the interpreter's lock
    except BaseException as error:  # noqa: BLE001 - whoever waits for the buffer has to hear of it
        fill.error = error
    fill.done.set()
    return True
