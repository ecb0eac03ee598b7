"""Which parts of the models are on the device: as planned from their sizes, carried out and logged.

A request needs its parts one stage after another: the text encoders, then one transformer, then the VAE. What is on the
device stays there until something else needs the room; then the least recently used part is evicted first. Nothing is
carried back to the host: a part that was evicted is built again from its file, which the host keeps mapped.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from flux.device import Memory
from flux.live import Changes, LiveWeights, Written
from flux.plan import Layout, Moves, plan_moves
from flux.pristine import Pristine
from settings import GB

log = logging.getLogger("flux-lora")
T = TypeVar("T")


@dataclass(frozen=True)
class _Part:
    live: LiveWeights
    bytes: int


class Residency:
    """The parts that are on the device, least recently used first. Without a `Memory` (a CPU, whose mapped files the
    operating system moves) there is room for all, and a part is only ever loaded."""

    def __init__(self, device: torch.device, memory: Memory | None = None) -> None:
        self.device = device
        self.memory = memory
        self.resident: list[str] = []
        self._parts: dict[str, _Part] = {}
        self._names: dict[int, str] = {}  # of the parts, by their modules

    @property
    def sizes(self) -> dict[str, int]:
        return {name: part.bytes for name, part in self._parts.items()}

    def add(self, name: str, module: nn.Module, pristine: Pristine, *, loaded: bool) -> None:
        """Take charge of a part. `loaded`: it is on the device; otherwise it has no weights until it is used."""
        size = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
        live = LiveWeights(module, pristine)
        self._parts[name] = _Part(live, size)
        self._names[id(module)] = name
        if loaded:
            self.resident.append(name)
        else:
            live.release(self.device)

    def pristine(self, module: nn.Module) -> Pristine:
        """A part's weights as its file has them."""
        return self._parts[self._names[id(module)]].live.pristine

    def has(self, module: nn.Module) -> bool:
        """Whether a part is on the device."""
        return self._names[id(module)] in self.resident

    def fits(self, *modules: nn.Module, work: int) -> bool:
        """Whether the device can hold all of `modules` at once, and `work` bytes beside them."""
        needed = sum(self._parts[self._names[id(module)]].bytes for module in modules)
        return self.memory is None or needed + work <= self.memory.device

    def use(self, *modules: nn.Module, work: int = 0) -> None:
        """Have all of `modules` on the device at once, and `work` bytes free there for what is computed with them.

        Raises `TooSmallError` when they do not fit, before anything has moved.
        """
        needed = [self._names[id(module)] for module in modules]
        if self.memory is None:
            moves = Moves([], [name for name in needed if name not in self.resident])
        else:
            moves = plan_moves(self.sizes, self.memory.device, self.resident, needed, work)
        for name in moves.evict:
            self._evict(name)
        for name in moves.load:
            self._load(name)
        self.resident = [name for name in self.resident if name not in needed] + needed

    def change(self, module: nn.Module, changes: Changes) -> Written:
        """Let a part's weights be what `changes` make of the pristine ones: now, or when it comes to the device."""
        live = self._parts[self._names[id(module)]].live
        if self.has(module):
            return live.apply(changes)
        live.changes = changes
        return Written(0, 0)

    def bring(self, layout: Layout) -> None:
        """Load what the layout keeps on the device, and say in the log what it does with the rest."""
        for name in layout.resident:
            self.use(self._parts[name].live.module)
        for names, text in (
            (layout.waiting, "built from host memory when asked for"),
            (layout.on_disk, "built from the disk when asked for, because host memory cannot hold its file as well"),
        ):
            for name in names:
                log.info("%s: %s", name, text)

    def or_clear(self, work: Callable[[], T]) -> T:
        """Do `work`. When the device runs out of memory in spite of the plan, everything is given back and the error is
        one sentence, `RuntimeError`."""
        try:
            return work()
        except torch.OutOfMemoryError:
            pass  # what was computed lives as long as the exception: leave it before freeing
        self.evict_all()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        raise RuntimeError(
            "The device ran out of memory on this request and has been cleared: try again, or a smaller picture."
        )

    def evict_all(self) -> None:
        """Give all memory back, also of what was cancelled half-way; what is used next is loaded again."""
        self.resident = []
        for part in self._parts.values():
            part.live.release(self.device)
        log.info("everything leaves the device")

    def _evict(self, name: str) -> None:
        self.resident.remove(name)
        self._parts[name].live.release(self.device)
        log.info("%s leaves the device", name)

    def _load(self, name: str) -> None:
        started, part = time.perf_counter(), self._parts[name]
        try:
            part.live.load(self.device)
        except BaseException:  # out of memory or cancelled: half a part is none
            part.live.release(self.device)
            raise
        self.resident.append(name)
        log.info("%s comes to the device: %.1f GB in %.1f s", name, part.bytes / GB, time.perf_counter() - started)
