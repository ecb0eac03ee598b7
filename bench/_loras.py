"""Random LoRAs for every linear layer of the blocks, as this project reads them and as diffusers does."""

import tempfile
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from flux.pristine import Pristine
from lora.formats import read_lora
from lora.merge import Merge

STRENGTHS = (1.0, 0.8)  # of the first LoRA and of the second: what costs most, since two scales have to be one product
Tensors = dict[str, Tensor]
Merges = dict[str, Merge]  # by the parameter's name


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


def parsed(tensors: Tensors, pristine: Pristine, name: str) -> Merges:
    """The same as the product reads it from a file, at strength 1."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora.safetensors"
        save_file({f"transformer.{key}": tensor for key, tensor in tensors.items()}, path)
        updates = read_lora(path, {"transformer": pristine.shapes}, name).updates["transformer"]
    return {parameter: Merge([(name, 1.0, update)]) for parameter, update in updates.items()}


def together(*loras: Merges) -> Merges:
    """One or two LoRAs at once, each at its one of `STRENGTHS`, all of them for the same parameters."""
    merges: Merges = {}
    for name in loras[0]:
        updates = zip(STRENGTHS, (lora[name].parts[0] for lora in loras), strict=False)
        merges[name] = Merge([(sha256, strength, update) for strength, (sha256, _, update) in updates])
    return merges


def load(folder: Path, dtype: torch.dtype = torch.bfloat16) -> FluxTransformer2DModel:
    return FluxTransformer2DModel.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)


def adapter_names(which: range) -> list[str]:
    return [f"lora{i}" for i in which]


def load_adapters(transformer: FluxTransformer2DModel, files: list[Tensors], which: range) -> None:
    """Load the files as diffusers' adapters, not yet active."""
    for i in which:
        transformer.load_lora_adapter(dict(files[i]), prefix=None, adapter_name=f"lora{i}")


def activate_adapters(transformer: FluxTransformer2DModel, which: range) -> None:
    transformer.set_adapters(adapter_names(which), list(STRENGTHS[: len(which)]))
