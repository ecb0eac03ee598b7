"""fp8 against bf16: errors of layers, of the transformer and of pictures, bytes, and the time to build and swap."""

import re
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from diffusers import FluxTransformer2DModel
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from bench._common import (
    Goal,
    announce,
    benchmark_parser,
    full_width_checkpoints,
    judge,
    psnr,
    relative_error,
    seconds,
    table,
)
from flux.device import compute_dtype
from flux.fp8 import Fp8Linear, fp8_layers, new_twin, quantize_rows
from flux.live import LiveWeights
from flux.models import Flux, load_flux
from flux.pipelines import Job, decode, denoise, encode_prompt
from flux.pristine import Pristine
from lora.merge import Merge
from lora.updates import LowRank
from published import WEIGHTS
from tools.random_flux import FULL_WIDTH

CPU = torch.device("cpu")
ROUNDS = 3
GOAL_BYTES = 0.52
GROUPS = {  # of a transformer's linear layers
    "double blocks, attention": r"^transformer_blocks.*attn",
    "double blocks, feed-forward": r"^transformer_blocks.*ff",
    "double blocks, modulation": r"^transformer_blocks.*norm1",
    "single blocks, attention": r"^single.*attn",
    "single blocks, into the MLP": r"^single.*proj_mlp",
    "single blocks, out of it": r"^single.*proj_out",
    "single blocks, modulation": r"^single.*norm",
    "all of those (go_fast)": r"transformer_blocks",
    "x_embedder": r"^x_embedder",
    "context_embedder": r"^context_embedder",
    "time, guidance and CLIP embedders": r"^time_text",
    "norm_out": r"^norm_out",
    "proj_out": r"^proj_out",
}


def main() -> None:
    parts: dict[str, tuple[Callable[[], list[Goal] | None], int]] = {  # and the seconds that it takes
        "layers": (layers, 20),
        "groups": (groups, 240),
        "bytes": (sizes, 5),
        "swap": (swap, 60),
        "merge": (merge, 20),
        "pictures": (pictures, 60),
    }
    parser = benchmark_parser(__doc__, goals=True)
    parts_help = f"{', '.join(parts)}; unless told, all but groups"
    parser.add_argument("parts", nargs="*", choices=[*parts, []], metavar="PART", help=parts_help)
    options = parser.parse_args()
    chosen = options.parts or [name for name in parts if name != "groups"]
    announce(sum(parts[name][1] for name in chosen))
    goals: list[Goal] = []
    with torch.no_grad():
        for name in chosen:
            goals += parts[name][0]() or []
    judge(goals, check=options.check)


def layers() -> None:
    """One layer at FLUX.1's width on Gaussian data."""
    rows = []
    sides = ((1024, 3072, 3072), (1024, 3072, 12288), (1024, 15360, 3072), (1, 3072, 18432))
    for count, width, out in tqdm(sides, desc="layers", unit="layer"):
        generator = torch.Generator().manual_seed(0)
        weight, x = (torch.randn(n, width, generator=generator) for n in (out, count))
        truth = x.double() @ weight.double().T
        layer = Fp8Linear(width, out, weight_only=False, dtype=torch.float32)
        layer.quantize_rows_(0, weight)
        layer.bias.zero_()
        in_bf16 = (x.bfloat16().float() @ weight.bfloat16().float().T).bfloat16()
        layer(x)
        ratio = seconds(partial(layer, x)) / seconds(partial(torch.matmul, x, weight.T))
        errors = (relative_error(y, truth) for y in (layer(x), in_bf16))
        rows.append([f"{count} x {width} -> {out}", *(f"{error:.4f}" for error in errors), f"{ratio:.1f}"])
    table(["rows, layer", "error of fp8", "error of bf16", "fp8's time here / float32's"], rows)


def groups() -> None:
    """The error of the transformer's output with one group of layers in fp8 at a time."""
    columns: list[list[tuple[float, float]]] = []
    for model, inputs in ((WEIGHTS / "demo-dev", demo_inputs()), (full_width_checkpoints()["dev"], random_inputs())):
        folder = model / "transformer"
        exact = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32).eval()
        expected = [exact(**one, return_dict=False)[0] for one in inputs]
        pristine, linear = Pristine.of(folder, exact), [n for n, m in exact.named_modules() if isinstance(m, nn.Linear)]
        total = sum(parameter.numel() for parameter in exact.parameters())
        exact.to("meta")  # there is not enough memory for both
        columns.append([])
        for pattern in tqdm(GROUPS.values(), desc=f"groups, {model.name}", unit="group"):
            names = [name for name in linear if re.search(pattern, name)]
            twin = live_twin(exact, pristine, names).module
            outputs = [twin(**one, return_dict=False)[0] for one in inputs]
            error = relative_error(torch.cat(outputs), torch.cat(expected).double())
            share = sum(pristine.shapes[f"{name}.weight"].numel() for name in names) / total
            columns[-1].append((error, share))
            del twin
    rows = [
        [group, f"{demo[0]:.4f}", f"{full[0]:.4f}", f"{100 * full[1]:.1f}%"]
        for group, demo, full in zip(GROUPS, *columns, strict=True)
    ]
    print(
        f"Full width: {FULL_WIDTH.double_blocks} double and {FULL_WIDTH.single_blocks} single blocks, random weights."
    )
    table(["layers in fp8", "error at the output, demo dev", "full width", "of the parameters, full width"], rows)


def live_twin(exact: nn.Module, pristine: Pristine, names: list[str] | None = None) -> LiveWeights:
    """The weights of a twin with the layers `names` (None: all inside the blocks) in fp8, on the CPU."""
    live = LiveWeights(new_twin(exact, weight_only=False, layers=names), pristine)
    live.release(CPU)
    live.load(CPU)
    return live


def demo_inputs() -> list[dict[str, Tensor]]:
    """What the demo model's transformer gets in eight steps of one picture."""
    flux = load_flux({"dev": WEIGHTS / "demo-dev"}, CPU, torch.float32)["dev"].exact
    seen: list[dict[str, Tensor]] = []
    flux.transformer.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs), with_kwargs=True)
    job = Job((256, 256), 8, 3.0, encode_prompt(flux, PROMPTS[0]))
    denoise(flux, job, 1, lambda: None)
    return [{name: value for name, value in one.items() if name != "return_dict"} for one in seen]


def random_inputs() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    side = 16
    places = torch.cartesian_prod(torch.arange(float(side)), torch.arange(float(side)))
    return [
        {
            "hidden_states": torch.randn(1, side * side, 64, generator=generator),
            "encoder_hidden_states": torch.randn(1, 128, FULL_WIDTH.t5_width, generator=generator),
            "pooled_projections": torch.randn(1, FULL_WIDTH.clip_width, generator=generator),
            "timestep": torch.tensor([time]),
            "guidance": torch.tensor([3.0]),
            "img_ids": torch.cat([torch.zeros(side * side, 1), places], dim=1),
            "txt_ids": torch.zeros(128, 3),
        }
        for time in (0.9, 0.3)
    ]


def sizes() -> list[Goal]:
    """Bytes of the twin, here and at FLUX.1's depth."""
    rows, goals = [], []
    for double, single in ((FULL_WIDTH.double_blocks, FULL_WIDTH.single_blocks), (19, 38)):
        with torch.device("meta"):
            exact = FluxTransformer2DModel(num_layers=double, num_single_layers=single, guidance_embeds=True)
        nn.Module.to(exact, torch.bfloat16)
        twin = new_twin(exact, weight_only=False)
        before, after = (sum(t.nbytes for t in (*m.parameters(), *m.buffers())) for m in (exact, twin))
        blocks = f"{double} double, {single} single"
        rows.append([blocks, f"{before / 1e9:.2f}", f"{after / 1e9:.2f}", f"{after / before:.3f}"])
        goals.append(Goal(f"bytes in fp8 / in bf16, blocks: {blocks}", after / before, GOAL_BYTES))
    print(f"Goal: at most {GOAL_BYTES} of bf16.")
    table(["blocks", "bf16 (GB)", "fp8 (GB)", "ratio"], rows)
    return goals


def swap() -> None:
    """Building the twin and swapping LoRAs in it, beside copying the bytes that are read."""
    folder = full_width_checkpoints()["dev"] / "transformer"
    with torch.device("meta"):
        exact = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(folder))
    pristine = Pristine.of(folder, exact)
    live = live_twin(exact, pristine)
    touched = [f"{name}.weight" for name in fp8_layers(live.module) if "norm" not in name]
    read = {name: pristine(name).clone() for name in pristine.shapes}
    build = [seconds(partial(live.load, CPU)) for _ in range(ROUNDS)]
    copy = [seconds(lambda: [value.clone() for value in read.values()]) for _ in range(ROUNDS)]
    copy_touched = [seconds(lambda: [read[name].clone() for name in touched]) for _ in range(ROUNDS)]
    merges, restores = [], []
    for seed in tqdm(range(ROUNDS), desc="swap", unit="LoRA"):
        merges.append(seconds(partial(live.apply, new_merges(pristine, touched, seed))))
        restores.append(seconds(partial(live.apply, {})))
    total, some = (sum(read[name].nbytes for name in names) / 1e9 for names in (read, touched))
    rows = [
        [what, f"{statistics.median(times):.2f}", f"{statistics.median(times) / statistics.median(floor):.1f}"]
        for what, times, floor in (
            (f"building the twin from {total:.2f} GB in bf16", build, copy),
            (f"merging a LoRA of rank 16 into {some:.2f} GB of it", merges, copy_touched),
            ("restoring those", restores, copy_touched),
        )
    ]
    table(["what", "seconds", "times copying the bf16 bytes"], rows)


def new_merges(pristine: Pristine, names: list[str], seed: int) -> dict[str, Merge]:
    generator = torch.Generator().manual_seed(seed)

    def update(out: int, width: int) -> LowRank:
        down = torch.randn(16, width, generator=generator) / 4
        return LowRank((torch.randn(out, 16, generator=generator) * 2e-4).bfloat16(), down.bfloat16(), 1.0)

    return {name: Merge([(str(seed), 1.0, update(*pristine.shapes[name]))]) for name in names}


def merge() -> None:
    """A LoRA in one weight of full width, merged before the weight is quantized or into the quantized weight."""
    folder = full_width_checkpoints()["dev"] / "transformer"
    with torch.device("meta"):
        exact = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(folder))
    weight = Pristine.of(folder, exact)("single_transformer_blocks.0.attn.to_q.weight").double()
    generator = torch.Generator().manual_seed(0)
    rows = []
    for size in tqdm((0.001, 0.003, 0.01, 0.03, 0.1), desc="merge", unit="size"):
        up, down = (torch.randn(*shape, generator=generator) for shape in ((len(weight), 16), (16, weight.shape[1])))
        update = (up @ down).double()
        update *= size * weight.norm() / update.norm()
        truth, quantized = weight + update, dequantized(weight)
        ways = (dequantized(truth), dequantized(quantized + update))
        errors = [f"{relative_error(way, truth):.4f}" for way in ways]
        kept = [f"{100 * float(((way - quantized) * update).sum() / (update * update).sum()):.0f}%" for way in ways]
        # what changes besides the update is noise
        noise = [f"{float((way - quantized - update).norm() / update.norm()):.1f}" for way in ways]
        rows.append([f"{100 * size:g}%", *errors, *kept, *noise])
    once, twice = "merge, quantize", "quantize, merge, quantize"
    header = ["update / weight"]
    for what in ("error", "of the update kept", "other changes / update"):
        header += [f"{what}: {once}", twice]
    table(header, rows)


def dequantized(weight: Tensor) -> Tensor:
    values, scale = quantize_rows(weight)
    return values.double() * scale.double()


PROMPTS = ("a large blue ring on the left on an orange background", "a red circle on a white background")


def pictures() -> None:
    """The demo model's pictures with go_fast compared with those without, at 512 x 512."""
    folders = {model: WEIGHTS / f"demo-{model}" for model in ("dev", "schnell")}
    models = load_flux(folders, CPU, compute_dtype(CPU))
    rows = []
    for model, steps in (("dev", 28), ("schnell", 4)):
        exact, fast = models[model]
        for with_lora in (False, True):
            values, times = [], []
            for flux in (exact, fast):
                flux.residency.change(flux.transformer, demo_lora(flux) if with_lora else {})
            for seed, prompt in enumerate(tqdm(PROMPTS, desc=f"pictures, {model}", unit="pair")):
                started = time.perf_counter()
                picture = draw(exact, prompt, steps, seed)
                between = time.perf_counter()
                values.append(psnr(picture, draw(fast, prompt, steps, seed)))
                times.append((time.perf_counter() - between) / (between - started))
            spread = f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"
            what = f"{model}, {steps} steps" + (", random LoRA of rank 4 on all blocks" if with_lora else "")
            rows.append([what, spread, f"{statistics.median(times):.2f}"])
    print("The CPU has no fp8 units: what is faster on a GPU is slower here.")
    table(["demo model", "PSNR of go_fast (dB)", "its time here / without"], rows)


def demo_lora(flux: Flux) -> dict[str, Merge]:
    """Changes each weight by 2%."""
    pristine, generator = flux.pristine("transformer"), torch.Generator().manual_seed(1)

    def update(name: str) -> LowRank:
        out, width = pristine.shapes[name]
        up, down = torch.randn(out, 4, generator=generator), torch.randn(4, width, generator=generator)
        return LowRank(up, down, 0.02 * float(pristine(name).float().norm() / (up @ down).norm()))

    names = [f"{layer}.weight" for layer in fp8_layers(flux.transformer)]
    return {name: Merge([("", 1.0, update(name))]) for name in names}


def draw(flux: Flux, prompt: str, steps: int, seed: int) -> Image.Image:
    job = Job((512, 512), steps, 3.0, encode_prompt(flux, prompt))
    return decode(flux, denoise(flux, job, seed, lambda: None), job.size)


if __name__ == "__main__":
    main()
