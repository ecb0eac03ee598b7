"""What real cards hold of FLUX.1, and the bytes that move between requests: the planner's own doing, counted."""

from collections.abc import Iterable, Iterator
from types import MappingProxyType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bench._common import Goal, announce, benchmark_parser, judge, table
from flux import live
from flux.device import RESERVED_BYTES, Memory
from flux.fp8 import fp8_layers
from flux.live import Changes
from flux.models import NAMES, TOKENIZERS, Flux, Precisions, fill_device, fits, with_twin
from flux.plan import denoising_bytes, picture_bytes
from flux.pristine import Pristine
from flux.residency import Residency
from flux.transfer import Source
from lora.merge import Merge
from lora.updates import LowRank
from settings import GB
from tools.random_flux import FLUX_1, new_networks

META = torch.device("meta")
SIZE = (1024, 1024)
CARDS = {  # MiB, as nvidia-smi lists them
    "H100": 81_559,
    "A100": 81_920,
    "L40S": 46_068,
    "RTX 4090": 24_564,
    "L4": 23_034,
    "16 GB": 16_376,
}
CONTEXT_BYTES = int(0.5 * GB)  # of CUDA, an estimate
CHECKER_BYTES = int(1.55 * GB)  # the two-stage checker in float32
HOST_BYTES = 128 * GB
RANK = 16
BLOCKS_GB = 23.67  # all linear layers of the blocks in bf16
ENCODERS_GB = 9.78  # T5 and CLIP
SCENES = ("new prompt", "another LoRA", "another LoRA, go_fast", "dev and dev go_fast", "dev and schnell")


def free(mib: int) -> int:
    """Bytes for models on a card of so many MiB."""
    return mib * 2**20 - CONTEXT_BYTES - CHECKER_BYTES - RESERVED_BYTES


class Card:
    """FLUX.1 on a card of so many MiB, all on the meta device: the real plan, loads, merges and restores of parts that
    have FLUX.1's shapes and no numbers. Copies from host memory are counted instead of made."""

    def __init__(self, mib: int) -> None:
        self.residency = Residency(META, Memory(free(mib), HOST_BYTES), self._count)
        self._sent = 0
        with META:
            torch.set_default_dtype(torch.bfloat16)
            try:
                networks = {model: new_networks(FLUX_1, model=model) for model in ("dev", "schnell")}
            finally:
                torch.set_default_dtype(torch.float32)
        shared = networks["dev"]
        for part, name in NAMES.items():
            self._add(name, shared[part], shared=True)
        self.models: dict[str, Precisions] = {}
        nothing = dict.fromkeys((*TOKENIZERS, "scheduler"))
        for model in ("dev", "schnell"):
            parts: dict[str, Any] = {**shared, **nothing, "transformer": networks[model]["transformer"]}
            self._add(model, parts["transformer"])
            self.models[model] = with_twin(self.residency, model, parts, weight_only=False)
        fill_device(self.models)

    def request(self, flux: Flux, changes: Changes = MappingProxyType({}), *, new_prompt: bool = False) -> int:
        """Do what a request does to the device. Returns the bytes that came from host memory."""
        before = self._sent
        self.residency.change(flux.transformer, changes)
        if new_prompt:
            self.residency.use(flux.text_encoder, flux.text_encoder_2)
            for block in flux.text_encoder_2.encoder.block:
                for hook in (*block._forward_pre_hooks.values(), *block._forward_hooks.values()):
                    hook()
        self.residency.use(flux.transformer, flux.vae, work=denoising_bytes(SIZE), room=picture_bytes(SIZE))
        self.residency.use(flux.vae, work=picture_bytes(SIZE))
        return self._sent - before

    def _add(self, name: str, module: nn.Module, *, shared: bool = False) -> None:
        shapes = {key: value.shape for key, value in module.named_parameters()}
        pristine = Pristine(
            shapes, lambda key: torch.empty(shapes[key], dtype=torch.bfloat16, device=META), self._count
        )
        self.residency.add(name, module, pristine, loaded=False, shared=shared)

    def _count(self, sources: Iterable[Source]) -> Iterator[Tensor]:
        for source, target in sources:
            self._sent += source.nbytes
            yield source if target is None else target

    def model(self, name: str, *, fast: bool) -> Flux:
        """What the predictor would run."""
        both = self.models[name]
        return both.fast if fast or not fits(both.exact, SIZE) else both.exact


def loras(flux: Flux, number: int, layers: str) -> dict[str, Merge]:
    shapes = flux.pristine("transformer").shapes

    def update(out: int, width: int) -> LowRank:
        up, down = torch.empty(out, RANK, device=META), torch.empty(RANK, width, device=META)
        return LowRank(up.bfloat16(), down.bfloat16(), 1.0)

    names = [f"{name}.weight" for name in fp8_layers(flux.transformer) if layers in name]
    return {name: Merge([(str(number), 1.0, update(*shapes[name]))]) for name in names}


def tour(mib: int, layers: str = "") -> tuple[list[str], dict[str, int]]:
    """What is on a card of so many MiB at the start; and by scene, the bytes that the second request of its kind brings
    to it, or the larger of the second two that alternate. LoRAs are on the blocks' linear layers with `layers` in their
    names."""
    with mock.patch.object(live, "to_host", torch.clone):  # the meta device has no bytes to bring back
        card = Card(mib)
        start = list(card.residency.resident)
        dev, fast = (card.model("dev", fast=fast) for fast in (False, True))
        schnell = card.model("schnell", fast=False)

        def with_loras(flux: Flux) -> int:
            moved = [card.request(flux, loras(flux, i, layers)) for i in range(2)]
            card.request(flux)
            return moved[-1]

        moved = {"new prompt": [card.request(dev, new_prompt=True) for _ in range(2)][-1]}
        moved["another LoRA"] = with_loras(dev)
        moved["another LoRA, go_fast"] = moved["another LoRA"] if fast is dev else with_loras(fast)
        moved["dev and dev go_fast"] = max([card.request(one) for one in (dev, fast) * 2][-2:])
        moved["dev and schnell"] = max([card.request(one) for one in (dev, schnell) * 2][-2:])
    return start, moved


def goals(name: str, mib: int, moved: dict[str, int]) -> list[Goal]:
    """Nothing but streamed encoders for a new prompt; nothing for another LoRA on 80 GB and one crossing of its weights
    elsewhere; nothing between the precisions of a model."""
    roomy = mib > 80_000
    return [
        Goal(f"{name}: GB for a new prompt", moved["new prompt"] / GB, 0 if roomy else ENCODERS_GB),
        Goal(f"{name}: GB for another LoRA", moved["another LoRA"] / GB, 0 if roomy else BLOCKS_GB),
        Goal(f"{name}: GB for another LoRA, go_fast", moved["another LoRA, go_fast"] / GB, 0 if roomy else BLOCKS_GB),
        Goal(f"{name}: GB between dev and dev go_fast", moved["dev and dev go_fast"] / GB, 0),
    ]


def main() -> None:
    arguments = benchmark_parser(__doc__, goals=True).parse_args()
    announce(60)
    rows, judged = [], list[Goal]()
    for name, mib in tqdm(CARDS.items()):
        start, moved = tour(mib)
        judged += goals(name, mib, moved)
        cells = [f"{moved[scene] / GB:.1f}" if moved[scene] else "0" for scene in SCENES]
        rows.append([name, f"{free(mib) / GB:.1f}", ", ".join(start), *cells])
    print(
        "GB that come from host memory for a request after others of its kind, for a picture of"
        f" {SIZE[0]} x {SIZE[1]}, with LoRAs of rank {RANK} on every linear layer of the blocks and"
        f" {HOST_BYTES / GB:.0f} GB of host memory. For models: what nvidia-smi lists less {CONTEXT_BYTES / GB} GB of"
        f" context and {CHECKER_BYTES / GB} GB of safety checker, which are estimates, less {RESERVED_BYTES / GB} GB in"
        " reserve."
    )
    table(["card", "GB for models", "there at start", *SCENES], rows)
    judge(judged, check=arguments.check)


if __name__ == "__main__":
    main()
