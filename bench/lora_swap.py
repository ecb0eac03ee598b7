"""Swapping LoRAs at full width: merging from the pristine base beside diffusers' ways, a step's cost, and drift."""

import argparse
import copy
import gc
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from bench._common import full_width_checkpoints, seconds, table
from lora_formats import read_lora
from lora_loader import LiveWeights
from lora_updates import LowRank, Update
from pristine import Pristine
from random_flux import FluxSize, write_random_flux

RANKS = (4, 16, 64, 128)
ROUNDS = 5
STEP_ROUNDS = 3
STEP_TOKENS = (256, 256)  # text and picture
SWAPS = 1000
GOAL_FLOOR, GOAL_FUSE, GOAL_EQUAL = 3.0, 12.0, 0.999
Tensors = dict[str, Tensor]
Parts = dict[str, list[tuple[str, float, Update]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=["swap", "step", "drift", []], help="all of them unless told")
    chosen = parser.parse_args().parts or ["swap", "step", "drift"]
    swaps = swap_times() if "swap" in chosen else {}
    if "step" in chosen:
        step_costs(swaps)
    if "drift" in chosen:
        drift()


def block_layers(pristine: Pristine) -> dict[str, torch.Size]:
    """The weights' shapes of every linear layer of the blocks: what a LoRA touches at most."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in pristine.shapes.items()
        if len(shape) == 2 and "transformer_blocks." in name
    }


def new_lora(pristine: Pristine, rank: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """A file's tensors, in diffusers' names without the first `transformer.`; differences of about 1% of a weight."""
    generator = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    for name, (out, width) in block_layers(pristine).items():
        down = torch.randn(rank, width, generator=generator) / rank**0.5
        up = torch.randn(out, rank, generator=generator) * 2e-4
        tensors |= {f"{name}.lora_A.weight": down.to(dtype), f"{name}.lora_B.weight": up.to(dtype)}
    return tensors


def parsed(tensors: Tensors, pristine: Pristine, name: str) -> Parts:
    """The same as the product reads it from a file, at strength 1."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora.safetensors"
        save_file({f"transformer.{key}": tensor for key, tensor in tensors.items()}, path)
        updates = read_lora(path, {"transformer": pristine.shapes}, name).updates["transformer"]
    return {parameter: [(name, 1.0, update) for update in several] for parameter, several in updates.items()}


def together(*loras: Parts) -> Parts:
    sums: Parts = {}
    for lora in loras:
        for name, updates in lora.items():
            sums.setdefault(name, []).extend(updates)
    return sums


def load(folder: Path, dtype: torch.dtype = torch.bfloat16) -> FluxTransformer2DModel:
    return FluxTransformer2DModel.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)


def swap_times() -> dict[tuple[int, int], dict[str, float]]:
    """Median seconds by (rank, number of LoRAs), printed as a table."""
    folder = full_width_checkpoints()["dev"] / "transformer"
    theirs = load(folder)
    module = load(folder)
    live = LiveWeights(module, Pristine(folder, module))
    rows, results = [], {}
    for rank in RANKS:
        files = [new_lora(live.pristine, rank, seed) for seed in range(4)]
        loras = [parsed(file, live.pristine, f"{rank} {i}") for i, file in enumerate(files)]
        for count in (1, 2):
            sets = [together(*loras[:count]), together(*loras[2 : 2 + count])]
            times = {**time_ours(live, sets), **time_theirs(theirs, files, count)}
            if (rank, count) == (16, 2):
                equal, worst = against_float64(live, sets[(ROUNDS - 1) % 2])
            results[rank, count] = times
            rows.append(
                [
                    rank,
                    count,
                    f"{times['floor']:.3f}",
                    f"{times['ours']:.3f}",
                    f"{times['ours'] / times['floor']:.2f}",
                    f"{times['load'] + times['set']:.2f}",
                    f"{times['set']:.3f}",
                    f"{times['fuse']:.2f}",
                    f"{times['fuse'] / times['ours']:.1f}",
                ]
            )
            print(*rows[-1], flush=True)
    touched = sum(live.pristine(f"{name}.weight").nbytes for name in block_layers(live.pristine))
    print(
        f"\nOne swap of every linear layer of the blocks in bf16, {touched / 1e9:.2f} GB, files in memory; medians in"
        f" seconds. Goals at rank 16: ours / floor at most {GOAL_FLOOR}, fuse / ours at least {GOAL_FUSE}."
    )
    header = ["rank", "LoRAs", "floor: copy", "ours", "ours / floor", "diffusers: load + set_adapters"]
    header += ["set_adapters alone", "unfuse_lora + fuse_lora", "that / ours"]
    table(header, rows)
    print(
        f"\nTwo LoRAs of rank 16 merged, beside float64 rounded to bf16: {equal:.4%} of the weights are the same bits"
        f" (goal {GOAL_EQUAL:.1%}), the others differ by at most {worst} unit in the last place."
    )
    return results


def time_ours(live: LiveWeights, sets: list[Parts]) -> dict[str, float]:
    """Medians of a swap and of copying the same weights, in turn, so that the machine's moods meet both."""
    scratch = {name: torch.empty_like(live.pristine(name)) for name in sets[0]}

    def copy_all() -> None:
        for name, target in scratch.items():
            target.copy_(live.pristine(name))

    floor, ours = [], []
    for i in range(ROUNDS + 1):
        floor.append(seconds(copy_all))
        ours.append(seconds(partial(live.apply, sets[(i + 1) % 2])))
    return {"floor": statistics.median(floor[1:]), "ours": statistics.median(ours[1:])}  # the first touches new memory


def time_theirs(transformer: FluxTransformer2DModel, files: list[Tensors], count: int) -> dict[str, float]:
    """Medians of diffusers' ways from one set of adapters to another: loading, activating, unfusing and fusing."""
    first, second = range(count), range(2, 2 + count)
    load, activate, fuse = [], [], []
    for _ in range(2):
        for which in (first, second):
            load.append(seconds(partial(load_adapters, transformer, files, which)))
        for before, after in ((first, second), (second, first)):
            transformer.set_adapters(names(before))
            transformer.fuse_lora(adapter_names=names(before))
            unfuse = seconds(transformer.unfuse_lora)
            activate.append(seconds(partial(transformer.set_adapters, names(after))))
            fuse.append(unfuse + seconds(partial(transformer.fuse_lora, adapter_names=names(after))))
            transformer.unfuse_lora()
        transformer.delete_adapters(names(first) + names(second))
    medians = map(statistics.median, (load, activate, fuse))
    return dict(zip(("load", "set", "fuse"), medians, strict=True))


def names(which: range) -> list[str]:
    return [f"lora{i}" for i in which]


def load_adapters(transformer: FluxTransformer2DModel, files: list[Tensors], which: range) -> None:
    for i in which:
        transformer.load_lora_adapter(dict(files[i]), prefix=None, adapter_name=f"lora{i}")


@torch.no_grad()
def against_float64(live: LiveWeights, parts: Parts) -> tuple[float, int]:
    """The share of merged weights that are bit for bit the float64 sum rounded, and the largest distance in units."""
    equal = count = worst = 0
    for name, several in parts.items():
        exact = live.pristine(name).double()
        for _, strength, update in several:
            assert isinstance(update, LowRank)
            exact.addmm_(update.up.double(), update.down.double(), alpha=strength * update.scale)
        bits = [value.view(torch.int16).int() for value in (exact.to(torch.bfloat16), live.module.get_parameter(name))]
        # sign and magnitude to a scale on which neighbours differ by one
        first, second = (torch.where(value < 0, -(value & 0x7FFF), value) for value in bits)
        distance = (first - second).abs()
        equal, count = equal + int((distance == 0).sum()), count + distance.numel()
        worst = max(worst, int(distance.max()))
    return equal / count, worst


def step_costs(swaps: dict[tuple[int, int], dict[str, float]]) -> None:
    """One forward with LoRAs beside one without, in float32: bf16 products are not what this machine is good at."""
    gc.collect()
    folder = full_width_checkpoints()["dev"] / "transformer"
    transformer = load(folder, torch.float32)
    live = LiveWeights(transformer, Pristine(folder, transformer))
    config, (text, picture) = transformer.config, STEP_TOKENS
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(1, picture, config.in_channels),
        "encoder_hidden_states": torch.randn(1, text, config.joint_attention_dim),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.0]),
        "img_ids": torch.zeros(picture, 3),
        "txt_ids": torch.zeros(text, 3),
    }

    @torch.no_grad()
    def step() -> None:
        transformer(**inputs)

    rows = []
    step()
    for rank in (16, 128):
        files = [new_lora(live.pristine, rank, seed) for seed in range(2)]
        for count in (1, 2):
            parts = together(*(parsed(file, live.pristine, str(i)) for i, file in enumerate(files[:count])))
            plain, merged, unmerged = [], [], []
            for _ in range(STEP_ROUNDS):
                plain.append(seconds(step))
                live.apply(parts)
                merged.append(seconds(step))
                live.apply({})
                load_adapters(transformer, files, range(count))
                transformer.set_adapters(names(range(count)))
                unmerged.append(seconds(step))
                transformer.unload_lora()
            # the quietest of each: a neighbour on this machine only ever adds
            base, with_merged, with_unmerged = min(plain), min(merged), min(unmerged)
            row = [rank, count, f"{base:.2f}", f"{with_merged / base:.3f}", f"{with_unmerged / base:.3f}"]
            if (rank, count) in swaps and with_unmerged > with_merged:
                times = swaps[rank, count]
                steps = (times["ours"] - times["set"]) / (with_unmerged - with_merged)
                row.append(f"{max(0.0, steps):.2f}")
            rows.append(row)
            print(*row, flush=True)
    print(
        f"\nOne step of the same transformer in float32, {text} text and {picture} picture tokens; the smallest of"
        f" {STEP_ROUNDS}. Merged layers are the same layers: the goal is 1.00."
    )
    header = ["rank", "LoRAs", "step without (s)", "merged / without", "unmerged (set_adapters) / without"]
    table(header + (["steps until merging pays"] if swaps else []), rows)


def drift() -> None:
    """What swaps leave behind on a narrow model: fuse and unfuse beside merging from the base."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_random_flux(folder, FluxSize(heads=4, rope_axes=(8, 12, 12)), model="dev")
        ours = load(folder / "transformer")
        theirs = copy.deepcopy(ours)
        pristine = Pristine(folder / "transformer", ours)
        live = LiveWeights(ours, pristine)
        files = [new_lora(pristine, 16, seed) for seed in range(2)]
        sets = [parsed(file, pristine, str(i)) for i, file in enumerate(files)]
        load_adapters(theirs, files, range(2))
        rows = []
        for swap in range(1, SWAPS + 1):
            live.apply(sets[swap % 2])
            theirs.set_adapters([f"lora{swap % 2}"])
            theirs.fuse_lora(adapter_names=[f"lora{swap % 2}"])
            theirs.unfuse_lora()
            if swap in (1, 10, 100, SWAPS):
                live.apply({})
                rows.append([swap, *drifted(ours, pristine, ""), *drifted(theirs, pristine, ".base_layer")])
    print("\nHow far the weights are from the checkpoint's after so many swaps, all LoRAs taken out again, bf16.")
    header = ["swaps", "ours: weights changed", "ours: error", "fuse/unfuse: weights changed", "fuse/unfuse: error"]
    table(header, rows)


def drifted(module: nn.Module, pristine: Pristine, suffix: str) -> tuple[str, str]:
    """The share of weights that differ, and the norm of the difference relative to the weights'."""
    changed = count = 0
    error = norm = 0.0
    for layer in block_layers(pristine):
        before, now = pristine(f"{layer}.weight"), module.get_parameter(f"{layer}{suffix}.weight")
        changed, count = changed + int((before != now).sum()), count + before.numel()
        error += float((now.double() - before.double()).square().sum())
        norm += float(before.double().square().sum())
    return f"{changed / count:.1%}", f"{(error / norm) ** 0.5:.2g}"


if __name__ == "__main__":
    main()
