"""The live weights of one part, and what is in each of them.

A live weight is a function of the pristine one and of the change that is wanted for it, and of nothing that was before.
It is marked unknown before its first byte is written and known after its last, so that whatever interrupts, the next
`apply` writes that weight again.
"""

from collections.abc import Callable, Collection, Hashable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from flux.device import Stopwatch, free_host_memory, multiplies_bf16, to_host
from flux.fp8 import Fp8Linear
from flux.pristine import Pristine, Wanted
from settings import GB

PRISTINE: Hashable = ()  # the content of a weight that nothing has changed


class Change(Protocol):
    """What a weight becomes instead of its pristine value; LoRAs are merged through one."""

    @property
    def content(self) -> Hashable:
        """Two changes of the same content make the same of a weight. Never `PRISTINE`."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The parameters whose pristine values it needs, besides that of the weight itself."""

    def write(
        self,
        weight: Tensor,
        base: Mapping[str, Tensor],
        live: Tensor,
        write_rows: Callable[[int, Tensor], None],
        *,
        bf16_products: bool,
    ) -> None:
        """Compute from the pristine `weight` what `live` shall be, and write it in place, all on one device.

        `weight` may be `live` itself, and `base` holds the parameters that are read. `write_rows` writes rows from a
        first one on, and quantizes them where the layer is fp8.
        """


Changes = Mapping[str, Change]  # by the parameter's name; a parameter without one is to be pristine


class Written(NamedTuple):
    """How many weights an `apply` wrote with a change, how many it wrote back to their pristine values, and the seconds
    that computing the changes took."""

    changed: int = 0
    restored: int = 0
    seconds: float = 0.0


class NoMemoryError(RuntimeError):
    """A CPU cannot hold the weights that a change would make private copies of; the message says what it takes."""


class LiveWeights:
    """The parameters of `module` on their device. `changes` are what they shall hold, now or once they are loaded.

    `mapped`: the parameters are pages of the file itself, as they are on a CPU, and the first change of one makes a
    private copy of it.
    """

    def __init__(self, module: nn.Module, pristine: Pristine, *, mapped: bool = False) -> None:
        self.module, self.pristine = module, pristine
        self._mapped = set(pristine.shapes) if mapped else set[str]()
        self.changes: Changes = {}
        self.host_copy: dict[str, tuple[Tensor, Tensor]] | None = None  # pristine fp8 weights and their scales
        self._loaded = set(pristine.shapes)  # the parameters that have storage
        self._contents: dict[str, Hashable | None] = {}  # of what may not be pristine; None: unknown

    def untouched(self, name: str) -> Tensor | None:
        """The live weight, where it is the pristine one: loaded, unchanged and in the file's dtype."""
        if name in self._contents or name not in self._loaded:
            return None
        live = self._parameter(name)[1].data
        return live if live.dtype == self.pristine(name).dtype else None

    def nbytes(self, name: str) -> int:
        """What a parameter takes when it is loaded, in its live dtype and without fp8 scales."""
        return self.pristine.shapes[name].numel() * self._parameter(name)[1].dtype.itemsize

    def bytes_to_keep(self) -> int:
        """What `apply` with `keep` would keep."""
        return sum(self.pristine(name).nbytes for name in self.changes if self._is_to_be_kept(name))

    @torch.no_grad()
    def apply(self, changes: Changes | None = None, *, keep: bool = False) -> Written:
        """Write every loaded weight that is not yet what `changes` (None: those of the last call) make of it.

        With `keep`, the pristine values of what is changed stay on the device, for the next change. Raises
        `NoMemoryError`, before anything is written, where mapped weights would become private copies that the machine
        has no memory for.
        """
        if changes is not None:
            self.changes = changes
        contents = {name: change.content for name, change in self.changes.items()}
        stale = [
            name
            for name in self.pristine.shapes
            if name in self._loaded and self._contents.get(name, PRISTINE) != contents.get(name, PRISTINE)
        ]
        self._check_memory(stale)
        from_host = self._restore_from_host([name for name in stale if name not in self.changes])
        changed, watch = 0, Stopwatch(self._device())
        for one, values in self.pristine.nearest(self._wanted(name) for name in stale if name not in from_host):
            change = self.changes.get(one.name)
            self._mapped.discard(one.name)
            if change is None:
                self._restore(one, values[one.name])
                continue
            if keep and self._is_to_be_kept(one.name):
                self.pristine.keep(one.name, values[one.name])
            self._contents[one.name] = None
            with watch.running():
                self._change(one.name, change, values)
            self._contents[one.name] = contents[one.name]
            changed += 1
        return Written(changed, len(stale) - changed, watch.seconds())

    @torch.no_grad()
    def load(self, device: torch.device, names: Collection[str] | None = None, *, keep: bool = False) -> Written:
        """Give the parameters (None: all) new storage on `device` and write them, once each, as `changes` say.

        Each parameter stays the object that it is, so that what was compiled for it stays valid.
        """
        for name in self.pristine.shapes if names is None else names:
            self._contents[name] = None
            if layer := self._fp8_layer(name):
                layer.scale.data = torch.empty(layer.scale.shape, device=device)
            self._mapped.discard(name)
            parameter = self._parameter(name)[1]
            parameter.data = torch.empty(self.pristine.shapes[name], dtype=parameter.dtype, device=device)
            self._loaded.add(name)
        return self.apply(keep=keep)

    def release(self, device: torch.device, names: Collection[str] | None = None) -> None:
        """Free the parameters' storage (None: all); what is left of it counts as on `device`. The buffers, which are
        small, go there."""
        for name in self.pristine.shapes if names is None else names:
            self._loaded.discard(name)
            owner, parameter = self._parameter(name)
            nothing = torch.empty(0, dtype=parameter.dtype, device=device)
            if parameter.is_meta and device.type != "meta":  # cannot be given storage
                setattr(owner, name.rpartition(".")[2], nn.Parameter(nothing, requires_grad=False))
            else:
                parameter.data = nothing
        if names is None:
            for owner in self.module.modules():
                for name, buffer in owner.named_buffers(recurse=False):
                    if buffer.is_meta:
                        setattr(owner, name, torch.empty_like(buffer, device=device))
                    else:
                        buffer.data = buffer.to(device)

    def _check_memory(self, names: Collection[str]) -> None:
        needed = sum(self.nbytes(name) for name in names if name in self._mapped)
        if needed and needed > (free := free_host_memory()):
            raise NoMemoryError(
                f"The LoRAs change weights of {needed / GB:.1f} GB, which take as much memory as long as they are"
                f" changed, and {free / GB:.1f} GB are free: give the machine more, or use LoRAs of fewer layers."
            )

    def _device(self) -> torch.device:
        return next(self.module.parameters()).device

    def _parameter(self, name: str) -> tuple[nn.Module, nn.Parameter]:
        path, _, last = name.rpartition(".")
        owner = self.module.get_submodule(path)
        parameter: nn.Parameter = getattr(owner, last)
        return owner, parameter

    def _wanted(self, name: str) -> Wanted:
        """Straight into the live weight where nothing is to be computed."""
        if change := self.changes.get(name):
            return Wanted(name, tuple(other for other in change.reads if other != name))
        self._contents[name] = None  # it is written before `apply` hears of it
        live = self._parameter(name)[1].data
        return Wanted(name, target=live if live.dtype == self.pristine(name).dtype else None)

    def _fp8_layer(self, name: str) -> Fp8Linear | None:
        """The layer whose quantized weight the parameter is."""
        owner, parameter = self._parameter(name)
        return owner if isinstance(owner, Fp8Linear) and parameter is owner.weight else None

    def _is_to_be_kept(self, name: str) -> bool:
        """Whether a change takes the last pristine value off the device, or one had to come there for it."""
        kept = name in self.pristine.copies
        return not kept and (self.untouched(name) is not None or not self.pristine.is_near(name))

    def _write_rows(self, name: str) -> Callable[[int, Tensor], None]:
        if layer := self._fp8_layer(name):
            return layer.quantize_rows_
        live = self._parameter(name)[1].data

        def write_rows(start: int, rows: Tensor) -> None:
            live[start : start + len(rows)].copy_(rows)

        return write_rows

    def _restore(self, wanted: Wanted, value: Tensor) -> None:
        name = wanted.name
        if value is not wanted.target:  # else it came straight there
            self._write_rows(name)(0, value)
        if self.host_copy is not None and (layer := self._fp8_layer(name)):
            self.host_copy[name] = (to_host(layer.weight.data), to_host(layer.scale.data))
        del self._contents[name]

    def _restore_from_host(self, names: Collection[str]) -> set[str]:
        """Bring back those whose quantized values are kept in host memory, unless something nearer gives them. Returns
        their names."""
        copies = self.host_copy or {}
        layers = {name: layer for name in names if name in copies and (layer := self._fp8_layer(name))}
        layers = {name: layer for name, layer in layers.items() if not self.pristine.is_near(name)}
        targets = {name: (layer.weight.data, layer.scale.data) for name, layer in layers.items()}
        self._contents |= dict.fromkeys(layers)
        sources = ((name, i) for name in layers for i in range(2))
        arriving = self.pristine.stream((copies[name][i], targets[name][i]) for name, i in sources)
        for name in layers:
            for target in targets[name]:
                value = next(arriving)
                if value is not target:
                    target.copy_(value)
            del self._contents[name]
        return set(layers)

    def _change(self, name: str, change: Change, values: Mapping[str, Tensor]) -> None:
        live = self._parameter(name)[1].data
        bf16_products = multiplies_bf16(live.device)
        change.write(values[name], values, live, self._write_rows(name), bf16_products=bf16_products)
