"""First-block caching under go_fast: how many blocks it skips, how much sooner the picture comes, how far it is off."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from bench._common import announce, benchmark_parser, full_width_checkpoints, psnr, table
from bench.fp8 import PROMPTS
from flux.device import compute_dtype
from flux.models import Flux, Precisions, PromptEmbeds, cache_blocks, load_flux
from flux.pipelines import Job, decode, denoise, encode_prompt
from published import WEIGHTS

CPU = torch.device("cpu")
THRESHOLDS = (0.03, 0.06, 0.12, 0.25)
FULL_WIDTH_THRESHOLDS = (0.06, 0.25)  # few, for a step takes two cores 20 seconds
FULL_WIDTH_TEXT = 64  # tokens


@dataclass
class Picture:
    latents: Tensor
    seconds: float
    full_steps: int


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--full", action="store_true", help="the full width as well, seven minutes more")
    options = parser.parse_args()
    announce(40 + 420 * options.full)
    demo = load_flux({"dev": WEIGHTS / "demo-dev"}, CPU, compute_dtype(CPU))["dev"]
    job = Job((512, 512), 28, 3.0, encode_prompt(demo.fast, PROMPTS[0]))
    measure("demo dev, 512 x 512, 28 steps", demo, job, THRESHOLDS)
    if options.full:
        measure_full_width()


def measure_full_width() -> None:
    full = load_flux({"dev": full_width_checkpoints()["dev"]}, CPU, compute_dtype(CPU))["dev"]
    embeds = encode_prompt(full.fast, PROMPTS[0])
    full.fast.residency.evict_all()
    short = PromptEmbeds(embeds.t5[:, :FULL_WIDTH_TEXT], embeds.clip)
    job = Job((256, 256), 6, 3.0, short)
    measure("full width, random weights, 256 x 256, 6 steps", full, job, FULL_WIDTH_THRESHOLDS)


def measure(what: str, flux: Precisions, job: Job, thresholds: Sequence[float]) -> None:
    draw(flux.fast, Job(job.size, 1, 3.0, job.embeds))
    plain = draw(flux.fast, job)
    rows = [["off", plain.full_steps, "1.00", ""]]
    for threshold in tqdm(thresholds, desc=what, unit="threshold"):
        cache_blocks({"": flux}, threshold)
        cached = draw(flux.fast, job)
        flux.fast.transformer.disable_cache()
        off = psnr(*(decode(flux.fast, picture.latents, job.size) for picture in (cached, plain)))
        faster = f"{plain.seconds / cached.seconds:.2f}"
        rows.append([f"{threshold:g}", cached.full_steps, faster, f"{off:.1f}"])
    header = [f"GO_FAST_CACHE_THRESHOLD: {what}", "steps that ran all blocks", "times as fast", "PSNR (dB)"]
    table(header, rows)


def draw(flux: Flux, job: Job) -> Picture:
    full_steps = 0

    def count(*_: object) -> None:
        nonlocal full_steps
        full_steps += 1

    last = flux.transformer.single_transformer_blocks[-1].attn.register_forward_hook(count)
    started = time.perf_counter()
    latents = denoise(flux, job, 1, lambda: None)
    seconds = time.perf_counter() - started
    last.remove()
    return Picture(latents, seconds, full_steps)


if __name__ == "__main__":
    main()
