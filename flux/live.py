"""The live weights of one part, and what is in each of them.

A live weight is a function of the pristine one and of the change that is wanted for it, and of nothing that was before.
It is marked unknown before its first byte is written and known after its last, so that whatever interrupts, the next
`apply` writes that weight again.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from flux.device import multiplies_bf16
from flux.fp8 import Fp8Linear
from flux.pristine import Pristine

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
        """Compute from the pristine `weight`, and `base` (those that it reads), what `live` shall be, and write it in
        place; `write_rows` writes rows from a first one on, and quantizes them where the layer is fp8."""


Changes = Mapping[str, Change]  # by the parameter's name; a parameter without one is to be pristine


class Written(NamedTuple):
    """How many weights were written: with a change, and back to their pristine values."""

    changed: int
    restored: int


class LiveWeights:
    """The parameters of `module` on their device. `changes` are what they shall hold, now or once they are loaded."""

    def __init__(self, module: nn.Module, pristine: Pristine) -> None:
        self.module, self.pristine = module, pristine
        self.changes: Changes = {}
        self._contents: dict[str, Hashable | None] = {}  # of what may not be pristine; None: unknown

    @torch.no_grad()
    def apply(self, changes: Changes | None = None) -> Written:
        """Write every weight that is not yet what `changes` (None: those of the last call) make of it."""
        if changes is not None:
            self.changes = changes
        wanted = {name: change.content for name, change in self.changes.items()}
        names = [
            name for name in self.pristine.shapes if self._contents.get(name, PRISTINE) != wanted.get(name, PRISTINE)
        ]
        changed = 0
        for name in names:
            self._contents[name] = None
            change = self.changes.get(name)
            self._write(name, change)
            if change is None:
                del self._contents[name]
            else:
                self._contents[name] = change.content
                changed += 1
        return Written(changed, len(names) - changed)

    @torch.no_grad()
    def load(self, device: torch.device) -> None:
        """Give every parameter new storage on `device` and write it, once, as `changes` say.

        Each parameter stays the object that it is, so that what was compiled for it stays valid.
        """
        for name in self.pristine.shapes:
            self._contents[name] = None
            owner, parameter = self._parameter(name)
            if isinstance(owner, Fp8Linear) and parameter is owner.weight:
                owner.scale.data = torch.empty(owner.scale.shape, device=device)
            parameter.data = torch.empty(self.pristine.shapes[name], dtype=parameter.dtype, device=device)
        self.apply()

    def release(self, device: torch.device) -> None:
        """Free every parameter's storage; what is left of it counts as on `device`. The small buffers go there."""
        self._contents = dict.fromkeys(self.pristine.shapes)
        for owner in self.module.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                nothing = torch.empty(0, dtype=parameter.dtype, device=device)
                if parameter.is_meta:  # cannot be given storage
                    setattr(owner, name, nn.Parameter(nothing, requires_grad=False))
                else:
                    parameter.data = nothing
            for name, buffer in owner.named_buffers(recurse=False):
                if buffer.is_meta:
                    setattr(owner, name, torch.empty_like(buffer, device=device))
                else:
                    buffer.data = buffer.to(device)

    def _parameter(self, name: str) -> tuple[nn.Module, nn.Parameter]:
        path, _, last = name.rpartition(".")
        owner = self.module.get_submodule(path)
        parameter: nn.Parameter = getattr(owner, last)
        return owner, parameter

    def _write(self, name: str, change: Change | None) -> None:
        owner, live = self._parameter(name)

        def write_rows(start: int, rows: Tensor) -> None:
            if isinstance(owner, Fp8Linear) and live is owner.weight:
                owner.quantize_rows_(start, rows)
            else:
                live[start : start + len(rows)].copy_(rows)

        weight = self.pristine(name)
        if change is None:
            write_rows(0, weight)
            return
        weight = weight.to(live.device)
        base = {other: self.pristine(other).to(live.device) for other in change.reads}
        change.write(weight, base, live, write_rows, bf16_products=multiplies_bf16(live.device))
