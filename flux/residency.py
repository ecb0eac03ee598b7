"""Which parts of the models are on the device: as planned from their sizes, carried out and logged.

A request needs its parts one stage after another: the text encoders, then one transformer, then the VAE. What is on the
device stays there until something else needs the room; then pristine copies are dropped first, and of the parts the
least recently used one. Nothing is carried back to the host, but for fp8 weights, once, when they are first built where
they will have to leave: any other part that was evicted comes again from its file, which the host keeps mapped.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from flux.device import Memory, is_out_of_memory
from flux.live import Changes, LiveWeights, Written
from flux.plan import FP8_SUFFIX, Layout, Moves, plan_moves, plan_room
from flux.pristine import Pristine
from flux.transfer import Ring, Stream, views
from phases import Phases
from settings import GB

log = logging.getLogger("flux-lora")
T = TypeVar("T")

COPIES_SUFFIX = " pristine"  # of the part's name: the copies of its pristine weights on the device


class DeviceMemoryError(RuntimeError):
    """The device ran out of memory; the message is one sentence for the person who sent the request."""


@dataclass
class _Part:
    live: LiveWeights
    bytes: int
    shared: bool  # by all models
    blocks: list[list[str]] = field(default_factory=list)  # where they are streamed: the parameters of each
    used: int = 0  # when it was last used, and its changes were last set, as the count of uses
    changed: int = 0


class Residency:
    """The parts that are on the device, least recently used first. Without a `Memory` (a CPU, whose mapped files the
    operating system moves) there is room for all, and a part is only ever loaded.

    `phases` is the clock of the request that runs: what comes to the device counts as "load", and what is merged on the
    way as "lora_apply".
    """

    def __init__(self, device: torch.device, memory: Memory | None = None, stream: Stream | None = None) -> None:
        self.device = device
        self.memory = memory
        self.stream: Stream = stream or (views if memory is None else Ring(device).stream)
        self.phases = Phases()
        self.when_host_is_full: Callable[[], None] = lambda: None  # somebody else's caches in the host's memory
        self.resident: list[str] = []
        self._parts: dict[str, _Part] = {}
        self._names: dict[int, str] = {}  # of the parts, by their modules
        self._originals: dict[str, Pristine] = {}  # by the part whose live weights are in the files' precision
        self._room = 0  # what a picture takes beside the parts, at the most so far
        self._uses = 0

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every part, and of the pristine copies that are on the device."""
        return {name: part.bytes for name, part in self._parts.items()} | self._copies()

    def add(self, name: str, module: nn.Module, pristine: Pristine, *, loaded: bool, shared: bool = False) -> None:
        """Take charge of a part. `loaded`: it is on the device; otherwise it has no weights until it is used. `shared`:
        all models use it. The first part of a `Pristine` is the one whose unchanged weights serve the others as theirs.
        """
        size = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
        live = LiveWeights(module, pristine, mapped=loaded and self.device.type == "cpu")
        if self.memory is not None and pristine not in self._originals.values():
            self._originals[name] = pristine
            pristine.untouched = live.untouched
        self._parts[name] = _Part(live, size, shared)
        self._names[id(module)] = name
        if loaded:
            self.resident.append(name)
        else:
            live.release(self.device)

    def live(self, module: nn.Module) -> LiveWeights:
        """A part's weights."""
        return self._part(module).live

    def has(self, module: nn.Module) -> bool:
        """Whether a part is on the device."""
        return self._names[id(module)] in self.resident

    def fits(self, *modules: nn.Module, work: int) -> bool:
        """Whether the device can hold all of `modules` at once, and `work` bytes beside them."""
        return self.memory is None or sum(self._part(one).bytes for one in modules) + work <= self.memory.device

    def use(self, *modules: nn.Module, work: int = 0, room: int = 0) -> None:
        """Have all of `modules` on the device at once, and `work` bytes free there for what is computed with them; or
        `room` bytes, for what is computed after that, where there can be so many.

        Raises `TooSmallError` when they do not fit, before anything has moved.
        """
        needed = [self._names[id(module)] for module in modules]
        self._room = max(self._room, work, room)
        self._uses += 1
        if self.memory is None:
            moves = Moves([], [name for name in needed if name not in self.resident])
        else:
            there = [*self._copies(), *self.resident]
            moves = plan_moves(self.sizes, self.memory.device, there, needed, work, room)
        for name in moves.evict:
            self._evict(name)
        for name in moves.load:
            self._load(name)
        self.resident = [name for name in self.resident if name not in needed] + needed
        for name in needed:
            self._parts[name].used = self._uses
            for block in self._parts[name].blocks:  # of an encoding that was cancelled
                self._parts[name].live.release(self.device, block)

    def change(self, module: nn.Module, changes: Changes) -> Written:
        """Let a part's weights be what `changes` make of the pristine ones: now, or when it comes to the device."""
        name, part = self._names[id(module)], self._part(module)
        part.live.changes = changes
        keep = name in self.resident and self._make_room_for_copies(name, idle_since=part.changed)
        part.changed = self._uses
        return part.live.apply(keep=keep) if name in self.resident else Written()

    def bring(self, layout: Layout, room: int) -> None:
        """Load what the layout keeps on the device beside `room` bytes, and log what it does with the rest."""
        self._room = room
        for name in layout.streamed:
            log.info("%s: streamed block by block for every new prompt", name)
        if layout.keeps_twins:
            for name, part in self._parts.items():
                part.live.host_copy = {} if name.endswith(FP8_SUFFIX) else None
        for name in layout.resident:
            self.use(self._parts[name].live.module)
        for names, text in (
            (layout.later, "comes to the device when it is first asked for, and stays"),
            (layout.waiting, "built from host memory when asked for"),
            (layout.on_disk, "built from the disk when asked for, because host memory cannot hold its file as well"),
        ):
            for name in names:
                log.info("%s: %s", name, text)

    def or_clear(self, work: Callable[[], T]) -> T:
        """Do `work`. When the device runs out of memory in spite of the plan, everything is given back and the error is
        one sentence, `DeviceMemoryError`."""
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # what was computed lives as long as the exception: leave it before freeing
        self.evict_all()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            self.when_host_is_full()
        raise DeviceMemoryError(
            "The device ran out of memory on this request and has been cleared: try again, or a smaller picture."
        )

    def evict_all(self) -> None:
        """Give all memory back, also of what was cancelled half-way; what is used next is loaded again."""
        self.resident = []
        for part in self._parts.values():
            part.live.pristine.copies.clear()
            part.live.release(self.device)
        log.info("everything leaves the device")

    def streamed_size(self, module: nn.Module, blocks: str) -> int:
        """What a part takes on the device once `stream_blocks` is called for it."""
        part = self._part(module)
        sizes = [sum(map(part.live.nbytes, names)) for names in _names_of(module, blocks)]
        return part.bytes - sum(sizes) + max(sizes)

    def stream_blocks(self, module: nn.Module, blocks: str) -> None:
        """From now on, have each layer of the module's list `blocks` on the device only while it runs."""
        part = self._part(module)
        part.bytes = self.streamed_size(module, blocks)
        part.blocks = _names_of(module, blocks)
        for block, names in zip(module.get_submodule(blocks).children(), part.blocks, strict=True):
            block.register_forward_pre_hook(self._block_loader(part, names))
            block.register_forward_hook(self._block_releaser(part, names))

    def _part(self, module: nn.Module) -> _Part:
        return self._parts[self._names[id(module)]]

    def _copies(self) -> dict[str, int]:
        held = {name: sum(copy.nbytes for copy in one.copies.values()) for name, one in self._originals.items()}
        return {name + COPIES_SUFFIX: size for name, size in held.items() if size}

    def _make_room_for_copies(self, name: str, idle_since: int = 0) -> bool:
        """Whether there is room for copies of what the part's changes overwrite. Another model's part that was last
        used before that count of uses leaves for them."""
        if self.memory is None or self._parts[name].blocks:
            return False
        wanted = self._parts[name].live.bytes_to_keep()
        if not wanted:
            return False
        sizes, copies = self.sizes, self._copies()
        free = self.memory.device - self._room - sum(sizes[one] for one in {*self.resident, *copies, name})
        parts = {one: self._parts[one] for one in self.resident if one != name}
        idle = [one for one, part in parts.items() if part.used < idle_since and not part.shared]
        evict = plan_room(sizes, free, idle, wanted)
        for one in evict or []:
            self._evict(one)
        return evict is not None

    def _evict(self, name: str) -> None:
        if name in self._copies():
            self._originals[name.removesuffix(COPIES_SUFFIX)].copies.clear()
        else:
            self.resident.remove(name)
            self._parts[name].live.release(self.device)
        log.info("%s leaves the device", name)

    def _load(self, name: str) -> None:
        started, part = time.perf_counter(), self._parts[name]
        rest = set(part.live.pristine.shapes).difference(*part.blocks) if part.blocks else None
        with self.phases.time("load"):
            try:
                written = part.live.load(self.device, rest, keep=self._make_room_for_copies(name))
            except BaseException:  # out of memory or cancelled: half a part is none
                part.live.release(self.device)
                raise
        self.phases.move("load", "lora_apply", written.seconds)
        self.resident.append(name)
        log.info("%s comes to the device: %.1f GB in %.1f s", name, part.bytes / GB, time.perf_counter() - started)

    def _block_loader(self, part: _Part, names: list[str]) -> Callable[..., None]:
        def load_block(*_: Any) -> None:
            with self.phases.time("load"):
                written = part.live.load(self.device, names)
            self.phases.move("load", "lora_apply", written.seconds)

        return load_block

    def _block_releaser(self, part: _Part, names: list[str]) -> Callable[..., None]:
        def release_block(*_: Any) -> None:
            part.live.release(self.device, names)

        return release_block


def _names_of(module: nn.Module, blocks: str) -> list[list[str]]:
    """The names of the parameters of each layer of a list of layers."""
    layers = module.get_submodule(blocks).named_children()
    return [[f"{blocks}.{i}.{name}" for name, _ in layer.named_parameters()] for i, layer in layers]
