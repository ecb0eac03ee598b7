"""The weights as their checkpoint has them, at hand while the process runs, and never a second copy in memory."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")  # what diffusers and transformers call theirs
# CLIP as it is published; transformers 5 drops this first part of the names when it loads one
OLD_PREFIX = "text_model."


class Pristine:
    """The parameters of one loaded part, read from its memory-mapped files: pristine("x_embedder.weight").

    `shapes` has them all by their names in the module. A tensor is a view of the file, in the file's dtype, and must
    not be written to. Raises `ValueError` when the files lack a parameter or have another shape of it.
    """

    def __init__(self, folder: Path, module: nn.Module) -> None:
        self.shapes: dict[str, torch.Size] = {name: value.shape for name, value in module.named_parameters()}
        self._sources: dict[str, tuple[Any, str]] = {}  # name -> its file and its name there
        for path in weight_files(folder):
            file: Any = safe_open(path, "pt")
            self._sources |= {key: (file, key) for key in file.keys()}  # noqa: SIM118 - it is no dict
        for name, shape in self.shapes.items():
            source = self._sources.get(name) or self._sources.get(OLD_PREFIX + name)
            if source is None:
                raise ValueError(f"{folder} has no weight {name}: it is no complete checkpoint.")
            file, key = source
            if file.get_slice(key).get_shape() != list(shape):
                raise ValueError(f"{folder} has a weight {name} of another shape than its config says.")
            self._sources[name] = source

    def __call__(self, name: str) -> Tensor:
        file, key = self._sources[name]
        tensor: Tensor = file.get_tensor(key)
        return tensor


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that diffusers or transformers would load from a part's folder."""
    for name in FILES:
        if (index := folder / f"{name}.index.json").is_file():
            return [folder / file for file in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        if (folder / name).is_file():
            return [folder / name]
    raise ValueError(f"{folder} has no safetensors weights: neither {FILES[0]} nor {FILES[1]}.")
