"""What the LoRAs of a request make of one weight: W + sum of strength * difference, computed from the pristine W.

The sum is float32 and is rounded once. Nothing is ever subtracted from a live weight: what a LoRA leaves behind when it
goes is nothing, because the next value is computed from the pristine one again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lora.updates import LowRank, Update

CHUNK = 3 * 2**18  # float32 numbers that a CPU merges at a time: few enough to stay in its cache
EXACT_IN_BF16 = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)

WriteRows = Callable[[int, Tensor], None]  # the first row, and rows [n, in] of any float dtype


@dataclass(frozen=True)
class Merge:
    """The updates of one weight: (sha256 of the LoRA's file, strength, update) each."""

    parts: Sequence[tuple[str, float, Update]]

    @cached_property
    def content(self) -> tuple[tuple[str, float], ...]:
        """Tells apart what different merges make of the same weight."""
        return tuple((sha256, strength) for sha256, strength, _ in self._sorted)

    @cached_property
    def _sorted(self) -> list[tuple[str, float, Update]]:
        # the order of float32 sums must not depend on which input named which LoRA
        return sorted(self.parts, key=lambda part: part[:2])

    @property
    def reads(self) -> tuple[str, ...]:
        """The parameters whose pristine values are read, besides the one that is written."""
        return tuple(dict.fromkeys(name for _, _, update in self.parts for name in update.reads))

    def write(
        self, weight: Tensor, base: Mapping[str, Tensor], live: Tensor, write_rows: WriteRows, *, bf16_products: bool
    ) -> None:
        """Merge into the live weight, in place: `merge` with this weight's updates."""
        updates = [(strength, update.to(live.device)) for _, strength, update in self._sorted]
        merge(updates, weight, base, live, write_rows, bf16_products=bf16_products)


def merge(
    updates: Sequence[tuple[float, Update]],
    weight: Tensor,
    base: Mapping[str, Tensor],
    live: Tensor,
    write_rows: WriteRows,
    *,
    bf16_products: bool,
) -> None:
    """Write weight + sum of strength * difference over the live weight, all on one device.

    `weight` is the pristine value and may be `live` itself, `base` holds those that the updates read. `write_rows`
    writes rows of the live weight, and quantizes them where the layer is quantized. Low-rank updates are one matrix
    product for all of them. Where everything is bf16 and the device has `bf16_products`, that product adds and rounds
    too; otherwise a chunk of rows at a time is summed in float32. Other updates are computed whole.
    """
    low_rank = [(strength, update) for strength, update in updates if isinstance(update, LowRank)]
    others = [
        (strength, update.difference(base.__getitem__))
        for strength, update in updates
        if not isinstance(update, LowRank)
    ]
    if not others and weight.dtype == live.dtype == torch.bfloat16 and bf16_products:
        scale, up, down = _bf16_factors(low_rank)
        # its sums are float32, this one too: bf16 is only what it reads and what it rounds to in the end
        torch.addmm(weight, up, down, alpha=scale, out=live)
        return
    if low_rank:
        up = torch.cat([(strength * update.scale) * update.up.float() for strength, update in low_rank], dim=1)
        down = torch.cat([update.down.float() for _, update in low_rank])
    rows = max(1, CHUNK * len(weight) // weight.numel()) if live.device.type == "cpu" else len(weight)
    for start in range(0, len(weight), rows):
        chunk = slice(start, start + rows)
        total = weight[chunk].to(torch.float32, copy=True)
        for strength, difference in others:
            total.add_(difference[chunk], alpha=strength)
        if low_rank:
            total.addmm_(up[chunk], down)
        write_rows(start, total)


def _bf16_factors(updates: Sequence[tuple[float, LowRank]]) -> tuple[float, Tensor, Tensor]:
    """A scale and two bf16 matrices whose product is the sum of strength * difference, as precise as in float32.

    The largest scale is taken out, so that bf16 factors with that scale go in as they are. Others are sums of bf16
    matrices, and their product that of all pairs but those below float32's precision.
    """
    scales = [strength * update.scale for strength, update in updates]
    largest = max(scales, key=abs) or 1.0
    ups, downs = [], []
    for scale, (_, update) in zip(scales, updates, strict=True):
        terms = _bf16_terms(update.down, 1.0)
        for i, up in enumerate(_bf16_terms(update.up, scale / largest)):
            for down in terms[: 3 - i]:
                ups.append(up)
                downs.append(down)
    return largest, torch.cat(ups, dim=1), torch.cat(downs)


def _bf16_terms(factor: Tensor, scale: float) -> list[Tensor]:
    """Bf16 matrices, as few as it takes, whose sum is factor * scale in float32: three times 8 bits are its 24.

    Whether a remainder is zero is only looked at on a CPU: a GPU would have to be waited for.
    """
    if scale == 1.0 and factor.dtype in EXACT_IN_BF16:
        return [factor.to(torch.bfloat16)]
    remainder = factor.float() * scale
    terms: list[Tensor] = []
    while len(terms) < 3 and (not terms or remainder.device.type != "cpu" or remainder.any()):
        terms.append(remainder.to(torch.bfloat16))
        remainder = remainder - terms[-1]
    return terms
