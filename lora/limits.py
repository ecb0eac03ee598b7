"""How large the numbers of an update can get: it is computed in float32, and the weight may be bfloat16."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lora.updates import Dora, Full, Hadamard, Kronecker, LowRank, Replacement, Update

LARGEST_FACTOR = torch.finfo(torch.float32).max
LARGEST_DIFFERENCE = torch.finfo(torch.bfloat16).max
LARGEST_IN_NORM = 1e15  # the norms of a DoRA are sums of squares
USUAL = 100.0  # what is not larger cannot get too large


def fits(update: Update, largest: float) -> bool:
    """Whether every number on the way to the difference, and the difference itself, is finite; `largest` is that of all
    numbers in the update's tensors."""
    if largest <= USUAL and abs(_scale(update)) <= USUAL:
        return True
    factors_fit = all(_largest(tensor) <= LARGEST_FACTOR for tensor in update.tensors())
    return factors_fit and _largest_difference(update) <= LARGEST_DIFFERENCE


def _scale(update: Update) -> float:
    match update:
        case LowRank() | Kronecker() | Hadamard():
            return update.scale
        case Dora():
            return _scale(update.inner)
    return 1.0


def _largest_difference(update: Update) -> float:
    """No element of the difference is larger; with infinity where one that comes before is too large."""
    match update:
        case LowRank():
            return _scaled(update.scale, update.up) * _largest_product((update.up, update.down))
        case Kronecker():
            return abs(update.scale) * _largest_product(update.w1) * _largest_product(update.w2)
        case Hadamard():
            first, second = _largest_product((update.w1_a, update.w1_b)), _largest_product((update.w2_a, update.w2_b))
            return _scaled(update.scale, update.w1_a) * first * second
        case Full() | Replacement():
            return _largest(update.value)
        case Dora():
            return _largest(update.magnitude) if _largest_difference(update.inner) <= LARGEST_IN_NORM else math.inf


def _scaled(scale: float, factor: Tensor) -> float:
    """The scale, or infinity where a factor multiplied by it is too large."""
    return abs(scale) if abs(scale) * _largest(factor) <= LARGEST_FACTOR else math.inf


def _largest(tensor: Tensor) -> float:
    return float(tensor.double().abs().max()) if tensor.numel() else 0.0


def _largest_product(factors: Sequence[Tensor]) -> float:
    """No element of a product of matrices is larger: the largest of each column and of each row meet."""
    first, *others = (factor.double().abs() for factor in factors)
    largest = first.amax(0)
    if not others:
        return float(largest.max())
    for factor in others[:-1]:
        largest = largest @ factor
    return float(largest @ others[-1].amax(1))
