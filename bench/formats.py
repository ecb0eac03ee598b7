"""Parsing a LoRA for every linear layer of the real FLUX.1-dev, from the page cache, against reading its bytes."""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from tqdm import tqdm

from bench._common import announce, benchmark_parser, spread, table
from lora.formats import read_lora
from lora.names import Shapes

RANKS = (16, 64)
ROUNDS = 9
MB = 10**6


def main() -> None:
    benchmark_parser(__doc__).parse_args()
    announce(40)
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    shapes = {"transformer": {name: parameter.shape for name, parameter in model.named_parameters()}}
    rows = []
    for rank in RANKS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "lora.safetensors"
            write_lora(path, shapes, rank)
            reading, parsing = in_turn(partial(read_bytes, path), partial(read_lora, path, shapes, "it"))
            ratios = [parse / read for read, parse in zip(reading, parsing, strict=True)]
            size = f"{path.stat().st_size / MB:.0f} MB"
        rows.append([f"{rank}, {size}", spread(reading, 3), spread(parsing, 3), spread(ratios)])
    table(["rank", "read into memory, s", "parsed, s", "ratio"], rows)


def write_lora(path: Path, shapes: Shapes, rank: int) -> None:
    tensors = {}
    for name, shape in shapes["transformer"].items():
        if len(shape) == 2:
            stem = f"transformer.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, shape[1]).bfloat16()
            tensors[f"{stem}.lora_B.weight"] = torch.randn(shape[0], rank).bfloat16()
    save_file(tensors, path)


def read_bytes(path: Path) -> None:
    with path.open("rb") as file:
        file.readinto(torch.empty(path.stat().st_size, dtype=torch.uint8).numpy().data)


def in_turn(*functions: Callable[[], object]) -> list[list[float]]:
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in tqdm(range(ROUNDS), unit="round"):
        for function, taken in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
