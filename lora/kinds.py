"""The kinds of update that a LoRA file holds: which parts make one, of what shape, and how it is built."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lora.header import Shape
from lora.updates import Dora, Full, Hadamard, Kronecker, LowRank, Replacement, Update, take_rows

LYCORIS_EPS = torch.finfo(torch.float32).eps  # lycoris/modules/locon.py adds it to a norm; PEFT does not


@dataclass(frozen=True)
class Kind:
    """One kind of update. `shape` and `rank` look at the shapes of the parts, `build` makes the update of them."""

    parts: tuple[str, ...]
    shape: Callable[[Mapping[str, Shape]], Shape | None]  # of the difference; None where the parts do not fit together
    build: Callable[[Mapping[str, Tensor], float], Update]
    rank: Callable[[Mapping[str, Shape]], int | None] = lambda _: None  # by which alpha is divided
    scaled: bool = True  # whether alpha, and DoRA's magnitude, may go with it


def _product(*shapes: Shape) -> Shape | None:
    """The shape of a product of matrices, None where there is none."""
    fits = all(len(shape) == 2 and 0 not in shape for shape in shapes)
    fits = fits and all(left[1] == right[0] for left, right in pairwise(shapes))
    return (shapes[0][0], shapes[-1][1]) if fits else None


def _low_rank(has: Mapping[str, Shape]) -> Shape | None:
    return _product(has["up"], *([has["mid"]] if "mid" in has else []), has["down"])


def _build_low_rank(get: Mapping[str, Tensor], scale: float) -> Update:
    """With LoCon's core, `mid`, the first factor is a product (lycoris/functional/general.py, rebuild_tucker)."""
    up = get["up"].float() @ get["mid"].float() if "mid" in get else get["up"]
    return LowRank(up, get["down"], scale)


def _embedding(has: Mapping[str, Shape]) -> Shape | None:
    shape = _product(has["embedding_up"], has["embedding_down"])
    return shape and shape[::-1]


def _side(has: Mapping[str, Any], side: str, transpose: Callable[[Any], Any]) -> tuple[Any, ...]:
    """The matrices whose product is one side of a Kronecker product. With `lokr_t2`, Tucker's core, the first is
    transposed (lycoris/functional/general.py, rebuild_tucker)."""
    if side in has and not {f"{side}_a", f"{side}_b"} & set(has):
        return (has[side],)
    if side == "lokr_w2" and "lokr_t2" in has:
        return transpose(has["lokr_w2_a"]), has["lokr_t2"], has["lokr_w2_b"]
    return has[f"{side}_a"], has[f"{side}_b"]


def _kronecker(has: Mapping[str, Shape]) -> Shape | None:
    first, second = (_product(*_side(has, side, lambda shape: shape[::-1])) for side in ("lokr_w1", "lokr_w2"))
    twice = (
        {"lokr_w1", "lokr_w1_a"} <= set(has)
        or {"lokr_w2", "lokr_w2_a"} <= set(has)
        or {"lokr_w2", "lokr_t2"} <= set(has)
    )
    return (first[0] * second[0], first[1] * second[1]) if first and second and not twice else None


def _kronecker_rank(has: Mapping[str, Shape]) -> int | None:
    """None where neither side is a product: LyCORIS then has no scale."""
    factor = has.get("lokr_w2_b", has.get("lokr_w1_b"))
    return factor[0] if factor else None


def _hadamard(has: Mapping[str, Shape]) -> Shape | None:
    first = _product(has["hada_w1_a"], has["hada_w1_b"])
    return first if first == _product(has["hada_w2_a"], has["hada_w2_b"]) else None


KINDS = (
    Kind(
        parts=("down", "up", "mid"),
        shape=_low_rank,
        build=_build_low_rank,
        rank=lambda has: has["down"][0],
    ),
    Kind(
        parts=("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        shape=_kronecker,
        build=lambda get, scale: Kronecker(_side(get, "lokr_w1", Tensor.t), _side(get, "lokr_w2", Tensor.t), scale),
        rank=_kronecker_rank,
    ),
    Kind(
        parts=("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        shape=_hadamard,
        build=lambda get, scale: Hadamard(
            get["hada_w1_a"], get["hada_w1_b"], get["hada_w2_a"], get["hada_w2_b"], scale
        ),
        rank=lambda has: has["hada_w1_b"][0],
    ),
    Kind(  # PEFT's for an embedding, whose weight is [tokens, width]
        parts=("embedding_down", "embedding_up"),
        shape=_embedding,
        build=lambda get, scale: LowRank(get["embedding_down"].t(), get["embedding_up"].t(), scale),
        rank=lambda has: has["embedding_down"][0],
    ),
    Kind(parts=("diff",), shape=lambda has: has["diff"], build=lambda get, _: Full(get["diff"]), scaled=False),
    Kind(
        parts=("set_weight",),
        shape=lambda has: has["set_weight"],
        build=lambda get, _: Replacement(get["set_weight"]),
        scaled=False,
    ),
)


def magnitude_of(parts: Mapping[str, Any]) -> str | None:
    """The part that holds DoRA's magnitude."""
    return next((part for part in ("dora_scale", "magnitude") if part in parts), None)


def magnitude_fits(shape: Shape, weight: Shape) -> bool:
    """[out] or [out, 1] for norms along the rows, [1, in] for norms along the columns."""
    return shape in ((weight[0],), (weight[0], 1), (1, *weight[1:]))


def split(update: Update, dora: tuple[Tensor, float] | None, names: tuple[str, ...], counts: list[int]) -> list[Update]:
    """The update of a weight [sum(counts), in], for each of the weights that it consists of.

    `dora` is a magnitude and the epsilon of its norms. A magnitude [1, in] belongs to norms over all the rows.
    """
    if len(counts) == 1 and dora is None and not isinstance(update, Replacement):
        return [update]
    updates: list[Update] = []
    start = 0
    for name, count in zip(names, counts, strict=True):
        rows = torch.arange(start, start + count)
        part = update if len(counts) == 1 else take_rows(update, rows)
        if isinstance(part, Replacement):
            part = replace(part, name=name)
        if dora is None:
            updates.append(part)
        elif dora[0].shape[0] == 1 != sum(counts):
            span = None if len(counts) == 1 else (start, start + count)
            updates.append(Dora(update, dora[0], names, span, dora[1]))
        else:
            updates.append(Dora(part, dora[0].flatten()[rows][:, None], (name,), eps=dora[1]))
        start += count
    return updates
