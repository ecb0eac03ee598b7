"""Whether two updates of one weight make the same difference, as where a file holds a LoRA in two dialects."""

from math import prod

import torch
from torch import Tensor

from lora.updates import Dora, Full, Hadamard, Kronecker, LowRank, Replacement, Update

ROUNDING = 0.02  # of bfloat16 factors, relative to the largest number


def same_difference(one: Update, other: Update) -> bool:
    """But for the rounding of their factors. Differences are compared by their product with one random vector."""
    match one, other:
        case Dora(), Dora():
            alike = (one.fused, one.rows, one.magnitude.shape) == (other.fused, other.rows, other.magnitude.shape)
            return alike and _close(one.magnitude, other.magnitude) and same_difference(one.inner, other.inner)
        case Replacement(), Replacement():
            return _close(one.value, other.value)
        case (Dora() | Replacement(), _) | (_, Dora() | Replacement()):
            return False
    vector = torch.randn(_columns(one), generator=torch.Generator().manual_seed(0))
    return _close(_times(one, vector), _times(other, vector))


def _close(left: Tensor, right: Tensor) -> bool:
    left, right = left.float(), right.float()
    return torch.allclose(left, right, rtol=0, atol=ROUNDING * float(left.abs().max()))


def _columns(update: Update) -> int:
    match update:
        case LowRank():
            return update.down.shape[1]
        case Kronecker():
            return update.w1[-1].shape[1] * update.w2[-1].shape[1]
        case Hadamard():
            return update.w1_b.shape[1]
        case Full():
            return prod(update.value.shape[1:])
    raise TypeError(f"the difference of a {type(update).__name__} depends on the weight")


def _times(update: Update, vector: Tensor) -> Tensor:
    """difference @ vector, [out], without the matrix that the difference is; for a bias the difference itself."""
    match update:
        case LowRank():
            return update.scale * (update.up.float() @ (update.down.float() @ vector))
        case Kronecker():  # kron(w1, w2) @ vector = w1 @ V @ w2.T, whose elements in order are the rows
            product = vector.reshape(update.w1[-1].shape[1], -1)
            for factor in reversed(update.w1):
                product = factor.float() @ product
            for factor in reversed(update.w2):
                product = product @ factor.float().T
            rows = update.scale * product.flatten()
            return rows if update.rows is None else rows[update.rows]
        case Hadamard():
            inner = (update.w1_b.float() * vector) @ update.w2_b.float().T
            return update.scale * ((update.w1_a.float() @ inner) * update.w2_a.float()).sum(1)
        case Full():
            return update.value.float() @ vector if update.value.ndim > 1 else update.value
    raise TypeError(f"the difference of a {type(update).__name__} depends on the weight")
