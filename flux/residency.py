"""Which parts of the models are on the device: planned from their sizes, carried out, and logged.

A request needs its parts one stage after another: the text encoders, then one transformer, then the VAE. What is on the
device stays there until something else needs the room; then the least recently used goes first. Nothing is carried back
to the host: a part that left is built again from its file, which the host keeps mapped.
"""

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import nn

from flux.device import Memory
from flux.fp8 import load_weights, release_weights
from flux.pristine import Pristine
from settings import GB

log = logging.getLogger("flux-lora")
T = TypeVar("T")

VAE = "VAE"
FP8_SUFFIX = " fp8"


class TooSmallError(RuntimeError):
    """The device cannot hold what is needed at once; the message says what it needs."""


@dataclass(frozen=True)
class Moves:
    """What has to leave the device, in that order, and then come to it."""

    evict: list[str]
    load: list[str]


def plan_moves(
    sizes: Mapping[str, int], device: int, resident: Sequence[str], needed: Collection[str], work: int
) -> Moves:
    """How to have all of `needed` on a device of so many bytes, with `work` bytes left for activations.

    `resident` is what is there, least recently used first; it stays as far as there is room. Raises `TooSmallError`.
    """
    room = device - work - sum(sizes[name] for name in needed)
    if room < 0:
        raise TooSmallError(
            f"The device has {device / GB:.1f} GB for models, but {_listed(needed)} with {work / GB:.1f} GB to work in "
            f"need {(device - room) / GB:.1f} GB at once."
        )
    others = [name for name in resident if name not in needed]
    evict = []
    while sum(sizes[name] for name in others) > room:
        evict.append(others.pop(0))
    return Moves(evict, [name for name in needed if name not in resident])


@dataclass(frozen=True)
class Layout:
    """What a device of some size does with the models."""

    usable: list[str]  # the transformers that it can run
    resident: list[str]  # what it holds at once when nothing is asked for twice: brought there at the start
    waiting: list[str]  # the other parts, built when asked for from files that host memory can hold
    on_disk: list[str]  # the same from files that it cannot hold as well
    encoders_stay: bool  # whether the text encoders fit beside a transformer


def plan_layout(
    sizes: Mapping[str, int], memory: Memory, transformers: Sequence[str], encoders: Sequence[str], work: int
) -> Layout:
    """Lay out `transformers`, the most wanted first, and the text encoders; the VAE stays beside any transformer.

    `sizes` has all of them; "dev fp8" is built from the file of "dev". Raises `TooSmallError` when not one transformer,
    or not even the encoders, can be on the device.
    """
    usable = [name for name in transformers if sizes[name] + sizes[VAE] + work <= memory.device]
    smallest = min(transformers, key=lambda name: sizes[name])
    for needed in ([smallest, VAE], encoders):
        plan_moves(sizes, memory.device, [], needed, work)
    room = memory.device - work - sizes[VAE]
    encoders_stay = sizes[usable[0]] + sum(sizes[name] for name in encoders) <= room
    resident, others = [VAE], []
    for name in (*encoders, *usable):
        if sizes[name] <= room and (encoders_stay or name not in encoders):
            resident.append(name)
            room -= sizes[name]
        else:
            others.append(name)
    host, files, waiting, on_disk = memory.host, set[str](), [], []
    for name in others:
        file = name.removesuffix(FP8_SUFFIX)
        if file not in files and sizes[file] > host:
            on_disk.append(name)
        else:
            waiting.append(name)
            host -= 0 if file in files else sizes[file]
            files.add(file)
    return Layout(usable, resident, waiting, on_disk, encoders_stay)


class Listener(Protocol):
    """Who writes into the weights, and has to know when they become those of the checkpoint again."""

    def before_load(self, module: nn.Module) -> None:
        """The module has no weights, and is about to get those of the checkpoint."""

    def after_load(self, module: nn.Module) -> None:
        """It has them."""


@dataclass(frozen=True)
class _Part:
    module: nn.Module
    pristine: Pristine
    bytes: int


class Residency:
    """The parts that are on the device, least recently used first. Without a `Memory` (a CPU, whose mapped files the
    operating system moves) there is room for all, and a part is only ever loaded."""

    def __init__(self, device: torch.device, memory: Memory | None = None) -> None:
        self.device = device
        self.memory = memory
        self.resident: list[str] = []
        self.listeners: list[Listener] = []
        self._parts: dict[str, _Part] = {}
        self._names: dict[int, str] = {}  # of the parts, by their modules

    @property
    def sizes(self) -> dict[str, int]:
        return {name: part.bytes for name, part in self._parts.items()}

    def add(self, name: str, module: nn.Module, pristine: Pristine, *, loaded: bool) -> None:
        """Take charge of a part. `loaded`: it is on the device; otherwise it has no weights until it is used."""
        size = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
        self._parts[name] = _Part(module, pristine, size)
        self._names[id(module)] = name
        if loaded:
            self.resident.append(name)
        else:
            release_weights(module, self.device)

    def pristine(self, module: nn.Module) -> Pristine:
        """A part's weights as its file has them."""
        return self._parts[self._names[id(module)]].pristine

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

    def bring(self, layout: Layout) -> None:
        """Load what the layout keeps on the device, and say in the log what it does with the rest."""
        for name in layout.resident:
            self.use(self._parts[name].module)
        for names, text in (
            (layout.waiting, "built from host memory when asked for"),
            (layout.on_disk, "built from the disk when asked for, because host memory cannot hold its file as well"),
        ):
            for name in names:
                log.info("%s: %s", name, text)

    def guarded(self, work: Callable[[], T]) -> T:
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
            release_weights(part.module, self.device)
        log.info("everything leaves the device")

    def _evict(self, name: str) -> None:
        self.resident.remove(name)
        release_weights(self._parts[name].module, self.device)
        log.info("%s leaves the device", name)

    def _load(self, name: str) -> None:
        started, part = time.perf_counter(), self._parts[name]
        for listener in self.listeners:
            listener.before_load(part.module)
        try:
            load_weights(part.module, part.pristine, self.device)
        except BaseException:  # out of memory or cancelled: half a part is none
            release_weights(part.module, self.device)
            raise
        self.resident.append(name)
        for listener in self.listeners:
            listener.after_load(part.module)
        log.info("%s comes to the device: %.1f GB in %.1f s", name, part.bytes / GB, time.perf_counter() - started)


def _listed(names: Collection[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
