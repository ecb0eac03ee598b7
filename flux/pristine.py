"""The weights as their checkpoint has them, at hand while the process runs."""

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
    """The parameters of one part, read from its memory-mapped files: pristine("x_embedder.weight").

    `shapes` has them all by their names in the module, in the order in which the files hold them. A tensor is a view of
    the file, in the file's dtype, and must not be written to. Raises `ValueError` when the files lack a parameter or
    have another shape of it.
    """

    def __init__(self, folder: Path, module: nn.Module) -> None:
        places: dict[str, tuple[Any, str]] = {}  # a name in the files -> its file and that name, in the files' order
        for path in weight_files(folder):
            file: Any = safe_open(path, "pt")
            places |= {key: (file, key) for key in file.offset_keys()}
        self._sources: dict[str, tuple[Any, str]] = {}
        shapes = {name: value.shape for name, value in module.named_parameters()}
        for name, shape in shapes.items():
            source = places.get(name) or places.get(OLD_PREFIX + name)
            if source is None:
                raise ValueError(f"{folder} has no weight {name}: it is no complete checkpoint.")
            file, key = source
            if file.get_slice(key).get_shape() != list(shape):
                raise ValueError(f"{folder} has a weight {name} of another shape than its config says.")
            self._sources[name] = source
        order = {key: i for i, key in enumerate(places)}
        self.shapes: dict[str, torch.Size] = dict(
            sorted(shapes.items(), key=lambda item: order[self._sources[item[0]][1]])
        )

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
