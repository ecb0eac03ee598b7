"""The weights as their checkpoint has them, at hand while the process runs, wherever they are nearest."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor, nn

from flux.transfer import Stream, views

FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")  # what diffusers and transformers call theirs
# CLIP as it is published; transformers 5 drops this first part of the names when it loads one
OLD_PREFIX = "text_model."


@dataclass(frozen=True)
class Wanted:
    """A parameter whose pristine value is wanted on the device, with those of others that it is computed from."""

    name: str
    others: tuple[str, ...] = ()
    target: Tensor | None = None  # where the value may go straight from the file; None: to a new tensor

    @property
    def parameters(self) -> tuple[str, ...]:
        return (self.name, *self.others)


class Pristine:
    """The pristine parameters of one part. `pristine("x_embedder.weight")` is a view of its memory-mapped file.

    `shapes` has them all by their names in the module, in the order in which the files hold them. A view is in the
    file's dtype and must not be written to. `stream` brings views to the device.

    Some are on the device already, where nothing has to move: `copies`, and those weights of the part itself that
    nothing has changed, for which `untouched` is asked.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], read: Callable[[str], Tensor], stream: Stream = views) -> None:
        self.shapes, self.read, self.stream = shapes, read, stream
        self.copies: dict[str, Tensor] = {}
        self.untouched: Callable[[str], Tensor | None] = lambda _: None

    @classmethod
    def of(cls, folder: Path, module: nn.Module, stream: Stream = views) -> Self:
        """Those of `module`, from its folder in a checkpoint. Raises `ValueError` when the files lack a parameter or
        have another shape of it."""
        places: dict[str, tuple[Any, str]] = {}  # a name in the files -> its file and that name, in the files' order
        for path in weight_files(folder):
            file: Any = safe_open(path, "pt")
            places |= {key: (file, key) for key in file.offset_keys()}
        sources: dict[str, tuple[Any, str]] = {}
        shapes = {name: value.shape for name, value in module.named_parameters()}
        for name, shape in shapes.items():
            source = places.get(name) or places.get(OLD_PREFIX + name)
            if source is None:
                raise ValueError(f"{folder} has no weight {name}: it is no complete checkpoint.")
            file, key = source
            if file.get_slice(key).get_shape() != list(shape):
                raise ValueError(f"{folder} has a weight {name} of another shape than its config says.")
            sources[name] = source

        def read(name: str) -> Tensor:
            file, key = sources[name]
            tensor: Tensor = file.get_tensor(key)
            return tensor

        order = {source: i for i, source in enumerate(places.values())}
        return cls({name: shapes[name] for name in sorted(shapes, key=lambda one: order[sources[one]])}, read, stream)

    def __call__(self, name: str) -> Tensor:
        return self.read(name)

    def is_near(self, name: str) -> bool:
        """Whether the value is on the device."""
        return self._near(name) is not None

    def keep(self, name: str, value: Tensor) -> None:
        """Keep a value that `nearest` gave, which may be a live weight that is about to be overwritten."""
        self.copies[name] = value if self._near(name) is None else value.clone()

    def nearest(self, wanted: Iterable[Wanted]) -> Iterator[tuple[Wanted, Mapping[str, Tensor]]]:
        """Yield each parameter with its value and those of the others by their names, all on the device.

        What is on the device already comes first and the rest in the order asked for. A value may be the live weight
        itself: whoever overwrites it has to be done with it.
        """
        far = []
        for one in wanted:
            found = {name: value for name in one.parameters if (value := self._near(name)) is not None}
            if len(found) == len(one.parameters):
                yield one, found
            else:
                far.append(one)
        sources = ((self(name), one.target if name == one.name else None) for one in far for name in one.parameters)
        arriving = self.stream(sources)
        for one in far:
            yield one, {name: next(arriving) for name in one.parameters}

    def _near(self, name: str) -> Tensor | None:
        copy = self.copies.get(name)
        return self.untouched(name) if copy is None else copy


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that diffusers or transformers would load from a part's folder."""
    for name in FILES:
        if (index := folder / f"{name}.index.json").is_file():
            return [folder / file for file in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        if (folder / name).is_file():
            return [folder / name]
    raise ValueError(f"{folder} has no safetensors weights: neither {FILES[0]} nor {FILES[1]}.")
