"""A LoRA file becomes updates of this model's weights, whichever program wrote it.

    lora = read_lora(path, shapes, "huggingface.co/owner/name")

The header is judged first: every key has to be understood, every module whole, every shape this model's. Only then are
the tensors read, and what is left to go wrong is in their values.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lora_families import other_family
from lora_kinds import KINDS, LYCORIS_EPS, Kind, magnitude_fits, magnitude_of, split
from lora_names import Key, Names, Shapes
from lora_peft import PeftConfigs
from lora_references import LoraError
from lora_tensors import DTYPES, FLOATS, Header, Shape, is_finite, read_header, read_tensors
from lora_updates import Full, Update, take_rows

MOST_NAMED = 3  # in one error
MOST_TEXT = 120  # characters of a key in one error

# What a module has in common with all that its writer wrote: a single one without it has lost it.
SHARED_PARTS = ("alpha", "dora_scale", "magnitude", "up_bias")
WORDS = {"down": "lora_A or lora_down", "up": "lora_B or lora_up"}


@dataclass(frozen=True)
class LoraUpdates:
    """A LoRA, parsed: what it does to each weight. The tensors are its own, none is a view of the file."""

    dialect: str  # who wrote it, for the log
    updates: Mapping[str, Mapping[str, tuple[Update, ...]]]  # component -> parameter name -> its updates


@dataclass
class _Group:
    """The keys of one module of the file, by the part of an update that they hold."""

    key: Key
    keys: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)

    @property
    def kinds(self) -> list[Kind]:
        return [kind for kind in KINDS if any(part in self.keys for part in kind.parts)]

    @property
    def whole(self) -> bool:
        """Whether it is made of whole matrices, for which alpha has no meaning."""
        return {"lokr_w1", "lokr_w2"} <= set(self.keys)


def read_lora(path: Path, shapes: Shapes, name: str) -> LoraUpdates:
    """The updates in a safetensors file, for a model whose parameters have these `shapes`.

    `name` is for people. Raises `LoraError`, one sentence that begins with it.
    """
    header = read_header(path, name)
    groups = _understand(header, shapes, name)
    configs = PeftConfigs(header.metadata, path, name)
    tensors = read_tensors(path, header, name)
    updates: dict[str, dict[str, tuple[Update, ...]]] = defaultdict(dict)
    for group in groups:
        component = updates[group.key.module.component]
        parts = {part: tensors[key].reshape(group.shapes[part]) for part, key in group.keys.items()}
        for part, key in group.keys.items():
            if part != "alpha" and not is_finite(parts[part]):
                raise LoraError(f"{name} is damaged: {_short(key)} holds numbers that are not finite.")
        for parameter, update in _updates(group, parts, shapes, configs, name):
            component[parameter] = (*component.get(parameter, ()), update)
    return LoraUpdates(_writers(groups), dict(updates))


def _writers(groups: Collection[_Group]) -> str:
    """The dialects in the order of the file."""
    return " + ".join(dict.fromkeys(group.key.dialect for group in groups if group.key.dialect)) or "kohya"


def _understand(header: Header, shapes: Shapes, name: str) -> list[_Group]:
    """The modules that the file is about. Raises `LoraError` for whatever is wrong with names, dtypes and shapes."""
    names = Names(shapes)
    groups: dict[str, _Group] = {}
    unknown, wrong = [], []
    for text, entry in header.entries.items():
        key = names.understand(text)
        if key is None:
            unknown.append(_short(text))
            continue
        if entry.dtype not in (DTYPES if key.part == "alpha" else FLOATS):
            wrong.append(f"{_short(text)} is of type {entry.dtype}")
        group = groups.setdefault(key.stem, _Group(key))
        if key.part in group.keys:
            wrong.append(f"{_short(text)} is there twice")
        group.keys[key.part] = text
        group.shapes[key.part] = entry.shape[:2] if entry.shape[2:] == (1, 1) else entry.shape  # a linear layer saved as a convolution
    for group in groups.values():
        wrong += _misfits(group, shapes)
    wrong += _conflicts(groups.values()) + _lost(groups.values())
    if not unknown and not wrong and groups:
        return list(groups.values())
    if error := other_family(header, shapes, name):
        raise error
    if unknown:
        raise LoraError(f"{name} is not a LoRA for this model: nothing here is called {_some(unknown)}.")
    raise LoraError(f"{name} cannot be used: {_some(wrong) or 'it is empty'}.")


def _misfits(group: _Group, shapes: Shapes) -> list[str]:
    """What is wrong with the parts of one module, by their names and shapes alone."""
    has, kinds, stem = group.shapes, group.kinds, _short(group.key.stem)
    parameters = shapes[group.key.module.component]
    weights = [tuple(parameters.get(f"{name}.weight", ())) for name in group.key.module.names]
    biases = [tuple(parameters.get(f"{name}.bias", ())) for name in group.key.module.names]
    weight = (sum(shape[0] for shape in weights if shape), *weights[0][1:])
    wrong = [f"{stem} holds several kinds of update"] if len(kinds) > 1 else []
    for kind in kinds:
        try:
            made = kind.shape(has)
        except KeyError as missing:
            part = str(missing.args[0])
            wrong.append(f"{stem} has no {WORDS.get(part, part)}")
            continue
        if made is None:
            wrong.append(f"the parts of {stem} do not fit each other")
        elif made != weight:
            wrong.append(f"{stem} is for a weight of {_times(made)}, here it is {_times(weight)}")
    scaled = any(kind.scaled for kind in kinds)
    fits = {
        "alpha": lambda shape: scaled and math.prod(shape) == 1,
        "dora_scale": lambda shape: scaled and magnitude_fits(shape, weight),
        "magnitude": lambda shape: scaled and magnitude_fits(shape, weight) and "dora_scale" not in has,
        "diff_b": lambda shape: () not in biases and shape == weight[:1],
        "up_bias": lambda shape: () not in biases and shape == weight[:1] and "up" in has,
    }
    return wrong + [f"{_short(group.keys[part])} does not fit" for part in fits if part in has and not fits[part](has[part])]


def _conflicts(groups: Collection[_Group]) -> list[str]:
    """Keys in two dialects that speak of the same weight; which of them counts, nobody knows."""
    first: dict[tuple[str, str, bool], str] = {}
    wrong = []
    for group in groups:
        for of_bias in {part in ("diff_b", "up_bias") for part in group.keys}:
            for name in group.key.module.names:
                other = first.setdefault((group.key.module.component, name, of_bias), group.key.stem)
                if other != group.key.stem:
                    wrong.append(f"{_short(other)} and {_short(group.key.stem)} are about the same weight")
    return wrong


def _lost(groups: Collection[_Group]) -> list[str]:
    """Modules without what all others of the same writer have: without it they would count differently."""
    alike: dict[tuple[str, str], list[_Group]] = defaultdict(list)
    for group in groups:
        if any(kind.scaled for kind in group.kinds):
            alike[group.key.dialect, group.key.module.component].append(group)
    wrong = []
    for many in alike.values():
        counts = Counter(part for group in many for part in group.keys)
        for part in SHARED_PARTS:
            if counts[part]:
                lacking = [group for group in many if part not in group.keys and not (part == "alpha" and group.whole)]
                wrong += [f"{_short(group.key.stem)} has no {part}, as others have" for group in lacking]
    return wrong


def _updates(
    group: _Group, parts: Mapping[str, Tensor], shapes: Shapes, configs: PeftConfigs, name: str
) -> Iterator[tuple[str, Update]]:
    """The parameters that a module of the file changes, each with its update."""
    module = group.key.module
    parameters = shapes[module.component]
    weights, biases = ([f"{one}.{kind}" for one in module.names] for kind in ("weight", "bias"))
    scale = 1.0
    for kind in group.kinds:
        if kind.scaled:
            scale = _scale(group, kind.rank(group.shapes), parts.get("alpha"), configs, name)
        counts = [parameters[weight][0] for weight in weights]
        whole, dora = kind.build(parts, scale), None
        if part := magnitude_of(parts):
            dora = parts[part], (LYCORIS_EPS if part == "dora_scale" else 0.0)
        if module.swapped:
            order = torch.arange(sum(counts)).roll(sum(counts) // 2)
            whole = take_rows(whole, order)
            if dora and dora[0].shape[0] > 1:
                dora = dora[0][order], dora[1]
        yield from zip(weights, split(whole, dora, tuple(weights), counts), strict=True)
    for part in ("diff_b", "up_bias"):
        if part in parts:
            value = parts[part] if part == "diff_b" else parts[part].float() * scale
            counts = [parameters[bias][0] for bias in biases]
            whole = Full(value.roll(len(value) // 2, 0) if module.swapped else value)
            yield from zip(biases, split(whole, None, tuple(biases), counts), strict=True)


def _scale(group: _Group, rank: int | None, alpha: Tensor | None, configs: PeftConfigs, name: str) -> float:
    """How much an update counts: alpha / rank, 1 where the file does not say."""
    value = None if alpha is None or rank is None else float(alpha)
    if value is not None and not (math.isfinite(value) and value):
        raise LoraError(f"{name} is damaged: {_short(group.keys['alpha'])} is {value:g}.")
    if config := configs.of(group.key):
        return config.scale(group.key.name, rank, value)
    return 1.0 if value is None or rank is None else value / rank


def _some(texts: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    more = f" and {len(texts) - MOST_NAMED} more" if len(texts) > MOST_NAMED else ""
    return ", ".join(texts[:MOST_NAMED]) + more


def _short(key: str) -> str:
    return key if len(key) <= MOST_TEXT and key.isprintable() else repr(key[:MOST_TEXT])


def _times(shape: Shape) -> str:
    return " x ".join(map(str, shape))
