"""What a LoRA does to one weight: the kinds of update there are, and the difference that each makes.

`difference` is what an update adds at strength 1 to the pristine weight W, in float32. At strength s the weight is
W + s * difference; for several LoRAs it is W + the sum of theirs, each computed from W alone. Factors keep the dtype of
their file, and are computed with in float32 on the device that they are on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor

Base: TypeAlias = Callable[[str], Tensor]  # a parameter's name -> its pristine value, any float dtype


class _Tensors:
    """What the kinds of update have in common: they consist of tensors."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The parameters whose pristine values `difference` asks for."""
        return ()

    def tensors(self) -> list[Tensor]:
        found: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self._map(note)
        return found

    def to(self, device: torch.device) -> Self:
        """The same on another device; on the same one itself."""
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        def changed(value: Any) -> Any:
            if isinstance(value, Tensor):
                return change(value)
            if isinstance(value, _Tensors):
                return value._map(change)
            return tuple(map(changed, value)) if isinstance(value, tuple) else value

        return replace(self, **{entry.name: changed(getattr(self, entry.name)) for entry in fields(self)})  # type: ignore[type-var, arg-type] # every subclass is a dataclass


@dataclass(frozen=True)
class LowRank(_Tensors):
    """scale * up @ down (LoRA, arXiv:2106.09685) for up [out, rank], down [rank, in]; scale is alpha / rank or so."""

    up: Tensor
    down: Tensor
    scale: float

    def difference(self, base: Base) -> Tensor:
        return (self.scale * self.up.float()) @ self.down.float()


@dataclass(frozen=True)
class Kronecker(_Tensors):
    """scale * kron(w1, w2), or some rows of it (LoKr, arXiv:2309.14859). A factor is a matrix or a product of two."""

    w1: tuple[Tensor, ...]  # [a, b], or [a, rank] and [rank, b]
    w2: tuple[Tensor, ...]  # [c, d], or [c, rank] and [rank, d]
    scale: float
    rows: Tensor | None = None  # int64 [out]: which of the a * c rows; None: all

    def difference(self, base: Base) -> Tensor:
        w1, w2 = _product(self.w1) * self.scale, _product(self.w2)
        if self.rows is None:
            return torch.kron(w1, w2)
        high, low = self.rows // len(w2), self.rows % len(w2)
        return (w1[high][:, :, None] * w2[low][:, None, :]).flatten(1)


@dataclass(frozen=True)
class Hadamard(_Tensors):
    """scale * (w1_a @ w1_b) * (w2_a @ w2_b), elementwise (LoHa, arXiv:2108.06098): [out, rank] and [rank, in] each."""

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    scale: float

    def difference(self, base: Base) -> Tensor:
        first = (self.scale * self.w1_a.float()) @ self.w1_b.float()
        return first.mul_(self.w2_a.float() @ self.w2_b.float())


@dataclass(frozen=True)
class Full(_Tensors):
    """The difference itself: [out, in] of a weight, [out] of a bias or a norm's scale."""

    value: Tensor

    def difference(self, base: Base) -> Tensor:
        return self.value.float()


@dataclass(frozen=True)
class Replacement(_Tensors):
    """The new weight itself."""

    value: Tensor
    name: str = ""  # of the parameter

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.name,)

    def difference(self, base: Base) -> Tensor:
        return self.value.float() - base(self.name).float()


@dataclass(frozen=True)
class Dora(_Tensors):
    """V = W + inner; the new weight is magnitude * V / norm(V) (DoRA, arXiv:2402.09353).

    A magnitude [out, 1] belongs to norms along the rows; [1, in] to norms along the columns, which run over all the
    weights that were one when the file was trained. `fused` names those, in order; `inner` updates their rows, one
    below the other, and `rows` says which of them are this weight's.
    """

    inner: "Update"
    magnitude: Tensor
    fused: tuple[str, ...]  # parameter names
    rows: tuple[int, int] | None = None  # first and one past the last; None: all
    eps: float = 0.0  # added to the norms, as LyCORIS does

    @property
    def reads(self) -> tuple[str, ...]:
        return self.fused

    def difference(self, base: Base) -> Tensor:
        weight = torch.cat([base(name).float() for name in self.fused])
        start, stop = self.rows or (0, len(weight))
        new = weight + self.inner.difference(base)
        along = 1 if self.magnitude.shape[1] == 1 else 0
        new.mul_(self.magnitude.float() / (torch.linalg.vector_norm(new, dim=along, keepdim=True) + self.eps))
        return new.sub_(weight)[start:stop]


Update: TypeAlias = LowRank | Kronecker | Hadamard | Full | Replacement | Dora


def _product(factors: Sequence[Tensor]) -> Tensor:
    product = factors[0].float()
    for factor in factors[1:]:
        product = product @ factor.float()
    return product


def rank_of(update: Update) -> int | None:
    """For the log; None where the kind has none."""
    match update:
        case LowRank():
            return update.down.shape[0]
        case Dora():
            return rank_of(update.inner)
        case Hadamard():
            return update.w1_b.shape[0]
    return None


def take_rows(update: Update, rows: Tensor) -> Update:
    """The update of some rows of the weight that `update` is for; `rows` is int64, and views are made of a range."""
    match update:
        case LowRank():
            return replace(update, up=_rows_of(update.up, rows))
        case Kronecker():
            return replace(update, rows=rows if update.rows is None else update.rows[rows])
        case Hadamard():
            return replace(update, w1_a=_rows_of(update.w1_a, rows), w2_a=_rows_of(update.w2_a, rows))
        case Full() | Replacement():
            return replace(update, value=_rows_of(update.value, rows))
    raise TypeError(f"the rows of {type(update).__name__} depend on each other")


def _rows_of(tensor: Tensor, rows: Tensor) -> Tensor:
    first, count = int(rows[0]), len(rows)
    if torch.equal(rows, torch.arange(first, first + count)):
        return tensor[first : first + count]
    source = tensor.contiguous().view(torch.uint8) if tensor.element_size() == 1 else tensor  # no float8 gather
    return source[rows].view(tensor.dtype)
