"""Swapping LoRAs at full width: merging from the pristine base beside diffusers' ways, a step's cost, and drift."""

import copy
import gc
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import nn
from tqdm import tqdm

from bench._common import Goal, announce, benchmark_parser, full_width_checkpoints, judge, seconds, table
from bench._loras import (
    STRENGTHS,
    Merges,
    Tensors,
    activate_adapters,
    adapter_names,
    block_layers,
    load,
    load_adapters,
    new_lora,
    parsed,
    together,
)
from flux.device import compute_dtype
from flux.live import LiveWeights
from flux.pristine import Pristine
from lora.updates import LowRank
from tools.random_flux import FluxSize, write_random_flux

RANKS = (4, 16, 64, 128)
GOAL_RANK = 16
PART_SECONDS = {"swap": 10, "step": 90, "drift": 20}  # about, on 2 cores; every rank of the swaps comes on top
ROUNDS = 5
FUSE_SWAPS = {GOAL_RANK: 3}  # with diffusers, where a swap takes long; one at the ranks without a goal
STEP_RANKS = (16, 128)
STEP_ROUNDS = 3
STEP_TOKENS = (256, 256)  # text and picture
SWAPS = 1000
GOAL_FLOOR, GOAL_FUSE, GOAL_EQUAL = 3.0, 12.0, 0.999


def main() -> None:
    parser = benchmark_parser(__doc__, goals=True)
    parts_help = f"{', '.join(PART_SECONDS)}; unless told, all of them"
    parser.add_argument("parts", nargs="*", choices=[*PART_SECONDS, []], metavar="PART", help=parts_help)
    parser.add_argument("--ranks", type=int, nargs="+", default=[GOAL_RANK], help="of the swaps (default: %(default)s)")
    parser.add_argument("--full", action="store_const", dest="ranks", const=RANKS, help=f"the ranks {RANKS}")
    options = parser.parse_args()
    chosen = options.parts or list(PART_SECONDS)
    rank_seconds = sum(30 + rank / 2 for rank in options.ranks) if "swap" in chosen else 0
    announce(rank_seconds + sum(PART_SECONDS[part] for part in chosen))
    goals: list[Goal] = []
    if "swap" in chosen:
        goals += swap_times(options.ranks)
    if "step" in chosen:
        step_costs()
    if "drift" in chosen:
        goals += drift()
    judge(goals, check=options.check)


def swap_times(ranks: Sequence[int]) -> list[Goal]:
    """Median seconds by rank and number of LoRAs, printed as a table."""
    folder = full_width_checkpoints()["dev"] / "transformer"
    theirs = load(folder)
    module = load(folder)
    live = LiveWeights(module, Pristine.of(folder, module))
    rows, goals, checked = [], [], ""
    bar = tqdm(total=2 * len(ranks), desc="swap", unit="set")
    for rank in ranks:
        files = [new_lora(live.pristine, rank, seed) for seed in range(4)]
        loras = [parsed(file, live.pristine, f"{rank} {i}") for i, file in enumerate(files)]
        for count in (1, 2):
            sets = [together(*loras[:count]), together(*loras[2 : 2 + count])]
            times = {**time_ours(live, sets), **time_theirs(theirs, files, count, FUSE_SWAPS.get(rank, 1))}
            rows.append([rank, count, *swap_row(times)])
            if rank == GOAL_RANK:
                name = f"rank {rank}, LoRAs: {count}"
                goals.append(Goal(f"{name}, ours / floor", times["ours"] / times["floor"], GOAL_FLOOR))
                goals.append(Goal(f"{name}, fuse / ours", times["fuse"] / times["ours"], GOAL_FUSE, at_least=True))
            if (rank, count) == (GOAL_RANK, 2):
                equal, near, worst = against_float64(live, sets[(ROUNDS + 1) % 2])
                checked = (
                    f"\nTwo LoRAs of rank 16 merged, beside float64 rounded to bf16: {equal:.4%} of the weights are the"
                    f" same bits (goal {GOAL_EQUAL:.1%}), {near:.6%} are so or the next number. The largest difference"
                    f" is {worst:.1e}."
                )
                goals.append(Goal("merged weights of the same bits as float64's", equal, GOAL_EQUAL, at_least=True))
            bar.update()
    bar.close()
    touched = sum(live.pristine(f"{name}.weight").nbytes for name in block_layers(live.pristine))
    print(
        f"\nOne swap of every linear layer of the blocks in bf16, {touched / 1e9:.2f} GB, files in memory, strengths"
        f" {' and '.join(map(str, STRENGTHS))}; medians in seconds of {ROUNDS} swaps; of {FUSE_SWAPS[GOAL_RANK]} of"
        f" diffusers' fusings at rank {GOAL_RANK}, of one at others. Goals at rank {GOAL_RANK}: ours / floor at most"
        f" {GOAL_FLOOR}, fuse / ours at least {GOAL_FUSE}."
    )
    header = ["rank", "LoRAs", "floor: copy", "ours", "ours / floor", "diffusers: load + set_adapters"]
    header += ["set_adapters alone", "unfuse_lora + fuse_lora", "that / ours"]
    table(header, rows)
    print(checked)
    return goals


def swap_row(times: Mapping[str, float]) -> list[str]:
    return [
        f"{times['floor']:.3f}",
        f"{times['ours']:.3f}",
        f"{times['ours'] / times['floor']:.2f}",
        f"{times['load'] + times['set']:.2f}",
        f"{times['set']:.3f}",
        f"{times['fuse']:.2f}",
        f"{times['fuse'] / times['ours']:.1f}",
    ]


def time_ours(live: LiveWeights, sets: list[Merges]) -> dict[str, float]:
    """Medians of a swap and of copying the same weights, in turn, so that whatever else the machine does slows both."""
    scratch = {name: torch.empty_like(live.pristine(name)) for name in sets[0]}

    def copy_all() -> None:
        for name, target in scratch.items():
            target.copy_(live.pristine(name))

    floor, ours = [], []
    for i in range(ROUNDS + 1):
        floor.append(seconds(copy_all))
        ours.append(seconds(partial(live.apply, sets[(i + 1) % 2])))
    # without the first one, which touches new memory
    return {"floor": statistics.median(floor[1:]), "ours": statistics.median(ours[1:])}


def time_theirs(transformer: FluxTransformer2DModel, files: list[Tensors], count: int, swaps: int) -> dict[str, float]:
    """Median seconds of diffusers from one set of adapters to another: loading, activating, unfusing and fusing."""
    sets = (range(count), range(2, 2 + count))
    load = [seconds(partial(load_adapters, transformer, files, which)) for which in sets]
    activate, fuse = [], []
    activate_adapters(transformer, sets[0])
    transformer.fuse_lora(adapter_names=adapter_names(sets[0]))
    for i in range(swaps):
        after = sets[(i + 1) % 2]
        unfuse = seconds(transformer.unfuse_lora)
        activate.append(seconds(partial(activate_adapters, transformer, after)))
        fuse.append(unfuse + seconds(partial(transformer.fuse_lora, adapter_names=adapter_names(after))))
    transformer.unfuse_lora()
    transformer.delete_adapters([name for which in sets for name in adapter_names(which)])
    medians = map(statistics.median, (load, activate, fuse))
    return dict(zip(("load", "set", "fuse"), medians, strict=True))


@torch.no_grad()
def against_float64(live: LiveWeights, merges: Merges) -> tuple[float, float, float]:
    """Compare merged weights with the float64 sum, rounded to bf16.

    Returns the share of equal weights, the share that is at most one bf16 number apart, and the largest difference.
    """
    equal = near = count = 0
    worst = 0.0
    for name, merge in merges.items():
        exact = live.pristine(name).double()
        for _, strength, update in merge.parts:
            assert isinstance(update, LowRank)
            exact.addmm_(update.up.double(), update.down.double(), alpha=strength * update.scale)
        rounded, merged = exact.to(torch.bfloat16), live.module.get_parameter(name)
        bits = [value.view(torch.int16).int() for value in (rounded, merged)]
        # as integers on a scale on which neighbouring bf16 numbers differ by 1
        first, second = (torch.where(value < 0, -(value & 0x7FFF), value) for value in bits)
        distance = (first - second).abs()
        equal, near = equal + int((distance == 0).sum()), near + int((distance <= 1).sum())
        count += distance.numel()
        worst = max(worst, float((rounded.float() - merged.float()).abs().max()))
    return equal / count, near / count, worst


def step_costs() -> None:
    """One forward with LoRAs compared with one without, and from how many steps on merging is faster."""
    gc.collect()
    folder = full_width_checkpoints()["dev"] / "transformer"
    dtype = compute_dtype(torch.device("cpu"))
    transformer = load(folder, dtype)
    live = LiveWeights(transformer, Pristine.of(folder, transformer))
    config, (text, picture) = transformer.config, STEP_TOKENS
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(1, picture, config.in_channels, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, text, config.joint_attention_dim, dtype=dtype),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, dtype=dtype),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "guidance": torch.tensor([3.0], dtype=dtype),
        "img_ids": torch.zeros(picture, 3),
        "txt_ids": torch.zeros(text, 3),
    }

    @torch.no_grad()
    def step() -> None:
        transformer(**inputs)

    rows = []
    bar = tqdm(total=2 * len(STEP_RANKS) * STEP_ROUNDS, desc="step", unit="round")
    step()
    for rank in STEP_RANKS:
        files = [new_lora(live.pristine, rank, seed) for seed in range(2)]
        for count in (1, 2):
            parts = together(*(parsed(file, live.pristine, str(i)) for i, file in enumerate(files[:count])))
            plain, swap, merged, activate, unmerged = [], [], [], [], []
            for _ in range(STEP_ROUNDS):
                plain.append(seconds(step))
                swap.append(seconds(partial(live.apply, parts)))
                merged.append(seconds(step))
                live.apply({})
                load_adapters(transformer, files, range(count))
                activate.append(seconds(partial(activate_adapters, transformer, range(count))))
                unmerged.append(seconds(step))
                transformer.unload_lora()
                bar.update()
            # the smallest of each, since other work on the machine only ever adds time
            base, with_merged, with_unmerged = min(plain), min(merged), min(unmerged)
            row = [rank, count, f"{base:.2f}", f"{with_merged / base:.3f}", f"{with_unmerged / base:.3f}"]
            row += [f"{min(swap):.3f}", f"{min(activate):.3f}"]
            row.append(break_even(min(swap) - min(activate), with_unmerged - with_merged))
            rows.append(row)
    bar.close()
    print(
        f"\nOne step of the same transformer in {str(dtype).removeprefix('torch.')}, {text} text and {picture} picture"
        f" tokens, in seconds; the smallest of {STEP_ROUNDS}. Merged layers are the same layers: the goal is 1.00. The"
        " last column: the fewest steps with which a request (a swap and its steps) takes no longer than one that sets"
        " adapters which are loaded already and leaves them unmerged."
    )
    header = ["rank", "LoRAs", "step without (s)", "merged / without", "unmerged (set_adapters) / without"]
    table([*header, "swap (s)", "set_adapters (s)", "steps until merging pays"], rows)


def break_even(more_once: float, less_each_step: float) -> str:
    """The fewest steps that save the time which merging costs more than activating."""
    return str(max(1, math.ceil(more_once / less_each_step))) if less_each_step > 0 else "none"


def drift() -> list[Goal]:
    """What swaps leave behind in a narrow model's weights: merging from the base, and diffusers' fuse and unfuse."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_random_flux(folder, FluxSize(heads=4, rope_axes=(8, 12, 12)), model="dev")
        ours = load(folder / "transformer")
        theirs = copy.deepcopy(ours)
        pristine = Pristine.of(folder / "transformer", ours)
        live = LiveWeights(ours, pristine)
        files = [new_lora(pristine, 16, seed) for seed in range(2)]
        sets = [parsed(file, pristine, str(i)) for i, file in enumerate(files)]
        load_adapters(theirs, files, range(2))
        rows = []
        for swap in tqdm(range(1, SWAPS + 1), desc="drift", unit="swap"):
            live.apply(sets[swap % 2])
            theirs.set_adapters([f"lora{swap % 2}"])
            theirs.fuse_lora(adapter_names=[f"lora{swap % 2}"])
            theirs.unfuse_lora()
            if swap in (1, 10, 100, SWAPS):
                live.apply({})
                ours_changed, ours_error = drifted(ours, pristine, "")
                theirs_changed, theirs_error = drifted(theirs, pristine, ".base_layer")
                errors = (f"{ours_error:.2g}", f"{theirs_changed:.1%}", f"{theirs_error:.2g}")
                rows.append([swap, f"{ours_changed:.1%}", *errors])
    print("\nHow far the weights are from the checkpoint's after so many swaps, all LoRAs taken out again, bf16.")
    header = ["swaps", "ours: weights changed", "ours: error", "fuse/unfuse: weights changed", "fuse/unfuse: error"]
    table(header, rows)
    return [Goal(f"weights changed after {SWAPS} swaps", ours_changed, 0)]


def drifted(module: nn.Module, pristine: Pristine, suffix: str) -> tuple[float, float]:
    """The share of weights that differ, and the norm of the difference relative to the weights'."""
    changed = count = 0
    error = norm = 0.0
    for layer in block_layers(pristine):
        before, now = pristine(f"{layer}.weight"), module.get_parameter(f"{layer}{suffix}.weight")
        changed, count = changed + int((before != now).sum()), count + before.numel()
        error += float((now.double() - before.double()).square().sum())
        norm += float(before.double().square().sum())
    return changed / count, (error / norm) ** 0.5


if __name__ == "__main__":
    main()
