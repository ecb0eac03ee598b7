"""A LoRA file becomes updates of this model's weights, whichever program wrote it.

    lora = read_lora(path, shapes, "huggingface.co/owner/name")

The header is judged first: every key has to be understood, every layer has to be complete, every shape has to be this
model's. Only then are the tensors read, and what is left to go wrong is in their values.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora.duplicates import same_difference
from lora.errors import LoraError
from lora.groups import ABOUT_OTHERS, Group, group_keys, times, weight_shape
from lora.header import read_header, shown
from lora.kinds import LYCORIS_EPS, magnitude_of, split
from lora.limits import fits
from lora.names import Shapes
from lora.peft import PeftConfigs
from lora.tensors import largest, read_tensors
from lora.updates import Full, Update, take_rows

log = logging.getLogger("flux-lora")


@dataclass(frozen=True)
class Adapter:
    """A LoRA, parsed: what it does to each weight. The tensors are its own, none is a view of the file."""

    dialect: str  # who wrote it, for the log
    updates: Mapping[str, Mapping[str, Update]]  # component -> parameter name -> what it does to that parameter


def read_lora(path: Path, shapes: Shapes, name: str) -> Adapter:
    """The updates in a safetensors file, for a model whose parameters have these `shapes`.

    `name` is for people. Raises `LoraError`, one sentence that begins with it, and `FileNotFoundError` when there is no
    file.
    """
    header = read_header(path, name)
    groups = group_keys(header, shapes, name)
    configs = PeftConfigs(header.metadata, name)
    tensors = read_tensors(path, header, name)
    updates: dict[str, dict[str, Update]] = defaultdict(dict)
    first: dict[tuple[str, str], str] = {}  # the layer of the file in which each parameter's update was found
    twice = 0
    for group in groups:
        component, stem = group.key.layer.component, group.key.stem
        parts = {part: tensors[key].reshape(group.shapes[part]) for part, key in group.keys.items()}
        number = _largest(group, parts, name)
        if "reshape_weight" in parts:
            _check_reshaping(group, parts["reshape_weight"], shapes, name)
        for parameter, update in _updates(group, parts, shapes, configs, name):
            if not fits(update, number):
                raise LoraError(f"{name} cannot be used: {shown(stem)} holds numbers that are too large for a weight.")
            known = updates[component].setdefault(parameter, update)
            other = first.setdefault((component, parameter), stem)
            if known is not update and not same_difference(known, update):
                both = f"{shown(other)} and {shown(stem)}"
                raise LoraError(f"{name} cannot be used: {both} are about the same weight and differ.")
            twice += known is not update
    if twice:
        log.info("%s holds the updates of %d weights twice, in two dialects; each counts once", name, twice)
    return Adapter(_dialects(groups), dict(updates))


def _largest(group: Group, parts: Mapping[str, Tensor], name: str) -> float:
    """The largest number in the tensors of a layer. Raises `LoraError` for one that is not finite."""
    numbers = {part: largest(parts[part]) for part in parts if part not in ABOUT_OTHERS}
    for part, number in numbers.items():
        if not math.isfinite(number):
            raise LoraError(f"{name} is damaged: {shown(group.keys[part])} holds numbers that are not finite.")
    return max(numbers.values(), default=0.0)


def _dialects(groups: Collection[Group]) -> str:
    """In the order of the file."""
    return " + ".join(dict.fromkeys(group.key.dialect for group in groups if group.key.dialect)) or "kohya"


def _updates(
    group: Group, parts: Mapping[str, Tensor], shapes: Shapes, configs: PeftConfigs, name: str
) -> Iterator[tuple[str, Update]]:
    """The parameters that a layer of the file changes, each with its update."""
    layer = group.key.layer
    parameters = shapes[layer.component]
    weights, biases = ([f"{one}.{kind}" for one in layer.names] for kind in ("weight", "bias"))
    scale = 1.0
    for kind in group.kinds:
        if kind.scaled:
            scale = _scale(group, kind.rank(group.shapes), parts.get("alpha"), configs, name)
        counts = [parameters[weight][0] for weight in weights]
        update, dora = kind.build(parts, scale), None
        if part := magnitude_of(parts):
            dora = parts[part], (LYCORIS_EPS if part == "dora_scale" else 0.0)
        order = torch.arange(sum(counts)).roll(sum(counts) // 2)
        if layer.swapped == "rows" or (layer.swapped and "up" in parts):
            update = take_rows(update, order)
        if dora and dora[0].shape[0] > 1 and layer.swapped in ("rows", "lora_up and dora_scale"):
            dora = dora[0][order], dora[1]
        yield from zip(weights, split(update, dora, tuple(weights), counts), strict=True)
    for part in ("diff_b", "up_bias"):
        if part in parts:
            value = parts[part] if part == "diff_b" else parts[part].float() * scale
            counts = [parameters[bias][0] for bias in biases]
            bias = Full(value.float().roll(len(value) // 2) if layer.swapped == "rows" else value)
            yield from zip(biases, split(bias, None, tuple(biases), counts), strict=True)


def _check_reshaping(group: Group, asked: Tensor, shapes: Shapes, name: str) -> None:
    """ComfyUI lets a LoRA enlarge a weight, as FLUX.1's Control LoRAs do; here it has to keep its shape."""
    weight, wanted = weight_shape(group.key.layer, shapes), tuple(int(size) for size in asked)
    if wanted != weight:
        key = shown(group.keys["reshape_weight"])
        raise LoraError(
            f"{name} cannot be used: {key} asks for a weight of {times(wanted)}, here it is {times(weight)}."
        )


def _scale(group: Group, rank: int | None, alpha: Tensor | None, configs: PeftConfigs, name: str) -> float:
    """By what an update is multiplied: alpha / rank, 1 where the file does not say."""
    value = None if alpha is None or rank is None else float(alpha)
    if value is not None and not (math.isfinite(value) and value):
        raise LoraError(f"{name} is damaged: {shown(group.keys['alpha'])} is {value:g}.")
    if config := configs.of(group.key):
        return config.scale(group.key.name, rank, value)
    return 1.0 if value is None or rank is None else value / rank
