"""Compiled blocks with the real compiler: graphs after the warm-up and after a tour, agreement, seconds."""

import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from bench._common import announce, benchmark_parser, relative_error, table
from flux.device import compute_dtype
from flux.models import Models, compile_blocks, load_flux, precisions, residency_of
from flux.pipelines import Job, denoise, encode_prompt, warm_up
from tools.random_flux import FluxSize, write_random_flux

CPU = torch.device("cpu")
SIZES = ((256, 256), (512, 256), (320, 448), (512, 512))


def main() -> None:
    benchmark_parser(__doc__).parse_args()
    announce(150)
    with tempfile.TemporaryDirectory() as folder, tqdm(total=4, unit="part") as bar:
        folders = {model: Path(folder) / model for model in ("dev", "schnell")}
        for model, path in folders.items():
            write_random_flux(path, FluxSize(double_blocks=2, single_blocks=3), model=model)
        models = load_flux(folders, CPU, compute_dtype(CPU))
        bar.set_description("uncompiled")
        expected = tour(models)
        bar.update()
        bar.set_description("warm-up")
        compile_blocks(models)
        started = time.perf_counter()
        warm_up(models)
        seconds, graphs = time.perf_counter() - started, count()
        bar.update()
        bar.set_description("compiled")
        drawn = tour(models)
        errors = [relative_error(a, b.double()) for a, b in zip(drawn, expected, strict=True)]
        after_tour = count()
        bar.update()
        bar.set_description("compiled, after every part left")
        residency_of(models).evict_all()
        tour(models)
        bar.update()
        rows: list[list[object]] = [
            ["seconds of the warm-up: two kinds of block, two precisions", f"{seconds:.0f}"],
            ["graphs after it", graphs],
            [f"graphs after {len(drawn)} pictures: two models, two precisions, {len(SIZES)} sizes", after_tour],
            ["graphs after every part left and came back", count()],
            ["largest difference of the latents from uncompiled blocks, relative", f"{max(errors):.0e}"],
        ]
    table(["compiled by inductor, tiny random models, two steps a picture", ""], rows)


def tour(models: Models) -> list[Tensor]:
    drawn = []
    for flux in precisions(models):
        embeds = encode_prompt(flux, "a red circle")
        drawn += [denoise(flux, Job(size, 2, 3.0, embeds), 1, lambda: None) for size in SIZES]
    return drawn


def count() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


if __name__ == "__main__":
    main()
