"""A LoRA file becomes updates of this model's weights, whichever program wrote it.

    lora = read_lora(path, shapes, "huggingface.co/owner/name")

The header is judged first: every key has to be understood, every module whole, every shape this model's. Only then are
the tensors read, and what is left to go wrong is in their values.
"""

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lora.errors import LoraError
from lora.families import other_family
from lora.header import Header, Shape, read_header, shown
from lora.kinds import KINDS, LYCORIS_EPS, Kind, magnitude_fits, magnitude_of, split
from lora.names import Key, Module, Names, Shapes, is_unused
from lora.peft import PeftConfigs
from lora.tensors import DTYPES, FLOATS, is_finite, read_tensors
from lora.updates import Full, LowRank, Update, take_rows

log = logging.getLogger("flux-lora")

MOST_NAMED = 3  # in one error
ROUNDING = 0.02  # of bfloat16 factors, relative to the largest number

# What a module has in common with all that its writer wrote: a single one without it has lost it.
SHARED_PARTS = ("alpha", "dora_scale", "magnitude", "up_bias")
WORDS = {"down": "lora_A or lora_down", "up": "lora_B or lora_up"}


@dataclass(frozen=True)
class Adapter:
    """A LoRA, parsed: what it does to each weight. The tensors are its own, none is a view of the file."""

    dialect: str  # who wrote it, for the log
    updates: Mapping[str, Mapping[str, Update]]  # component -> parameter name -> what it does to that parameter


@dataclass
class _Group:
    """The keys of one module of the file, by the part of an update that they hold."""

    key: Key
    keys: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)

    @property
    def kinds(self) -> list[Kind]:
        return [kind for kind in KINDS if not self.keys.keys().isdisjoint(kind.parts)]

    @property
    def whole(self) -> bool:
        """Whether it is made of whole matrices, for which alpha has no meaning."""
        return {"lokr_w1", "lokr_w2"} <= set(self.keys)


def read_lora(path: Path, shapes: Shapes, name: str) -> Adapter:
    """The updates in a safetensors file, for a model whose parameters have these `shapes`.

    `name` is for people. Raises `LoraError`, one sentence that begins with it, and `FileNotFoundError` when there is no
    file.
    """
    header = read_header(path, name)
    groups = _understand(header, shapes, name)
    configs = PeftConfigs(header.metadata, name)
    tensors = read_tensors(path, header, name)
    updates: dict[str, dict[str, Update]] = defaultdict(dict)
    first: dict[tuple[str, str], str] = {}  # where each parameter's update was found
    twice = 0
    for group in groups:
        component, stem = group.key.module.component, group.key.stem
        parts = {part: tensors[key].reshape(group.shapes[part]) for part, key in group.keys.items()}
        for part, key in group.keys.items():
            if part != "alpha" and not is_finite(parts[part]):
                raise LoraError(f"{name} is damaged: {shown(key)} holds numbers that are not finite.")
        for parameter, update in _updates(group, parts, shapes, configs, name):
            known = updates[component].setdefault(parameter, update)
            other = first.setdefault((component, parameter), stem)
            if known is not update and not _same(known, update):
                both = f"{shown(other)} and {shown(stem)}"
                raise LoraError(f"{name} cannot be used: {both} are about the same weight and differ.")
            twice += known is not update
    if twice:
        log.info("%s names %d weights twice, in two dialects, and says the same of them", name, twice)
    return Adapter(_writers(groups), dict(updates))


def _same(one: Update, other: Update) -> bool:
    """Whether two low-rank updates make the same difference, but for the rounding of their factors."""
    if not (isinstance(one, LowRank) and isinstance(other, LowRank)):
        return False
    probe = torch.linspace(-1, 1, one.down.shape[1])
    left, right = (update.scale * (update.up.float() @ (update.down.float() @ probe)) for update in (one, other))
    return torch.allclose(left, right, rtol=0, atol=ROUNDING * float(left.abs().max()))


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
        if key is None and is_unused(text):
            log.warning("%s: %s is about a layer that FLUX.1 does not use; it has no effect", name, shown(text))
            continue
        if key is None:
            unknown.append(shown(text))
            continue
        if entry.dtype not in (DTYPES if key.part == "alpha" else FLOATS):
            wrong.append(f"{shown(text)} is of type {entry.dtype}")
        group = groups.setdefault(key.stem, _Group(key))
        if key.part in group.keys:
            wrong.append(f"{shown(text)} is there twice")
        group.keys[key.part] = text
        shape = entry.shape
        group.shapes[key.part] = shape[:2] if shape[2:] == (1, 1) else shape  # a linear layer saved as a convolution
    _rename_whole_differences(groups.values(), shapes)
    for group in groups.values():
        wrong += _misfits(group, shapes)
    wrong += _lost(groups.values())
    if not unknown and not wrong and groups:
        return list(groups.values())
    if error := other_family(header, shapes, name):
        raise error
    if unknown:
        raise LoraError(f"{name} is not a LoRA for this model: nothing here is called {_some(unknown)}.")
    raise LoraError(f"{name} cannot be used: {_some(wrong) or 'it is empty'}.")


def _weight_of(module: Module, shapes: Shapes) -> Shape:
    """The shape of the weight that a module of the file is about: that of all its modules here, one below the other."""
    weights = [shapes[module.component].get(f"{name}.weight", ()) for name in module.names]
    return (sum(shape[0] for shape in weights if shape), *weights[0][1:])


def _rename_whole_differences(groups: Collection[_Group], shapes: Shapes) -> None:
    """ai-toolkit's "fullrank" network calls whole differences lora_A, and there is no lora_B in all the file."""
    if any(part in group.keys for group in groups for part in ("up", "alpha")):
        return
    for group in groups:
        if group.shapes.get("down") == _weight_of(group.key.module, shapes):
            group.keys["diff"], group.shapes["diff"] = group.keys.pop("down"), group.shapes.pop("down")


def _misfits(group: _Group, shapes: Shapes) -> list[str]:
    """What is wrong with the parts of one module, by their names and shapes alone."""
    has, kinds, stem = group.shapes, group.kinds, shown(group.key.stem)
    weight, parameters = _weight_of(group.key.module, shapes), shapes[group.key.module.component]
    biased = all(f"{name}.bias" in parameters for name in group.key.module.names)
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
    fits: dict[str, Callable[[Shape], bool]] = {
        "alpha": lambda shape: scaled and math.prod(shape) == 1,
        "dora_scale": lambda shape: scaled and magnitude_fits(shape, weight),
        "magnitude": lambda shape: scaled and magnitude_fits(shape, weight) and "dora_scale" not in has,
        "diff_b": lambda shape: biased and shape == weight[:1],
        "up_bias": lambda shape: biased and shape == weight[:1] and "up" in has,
    }
    return wrong + [
        f"{shown(group.keys[part])} does not fit" for part in fits if part in has and not fits[part](has[part])
    ]


def _lost(groups: Collection[_Group]) -> list[str]:
    """Modules without what all others of the same writer have: without it they would count differently. Nor does a
    writer take DoRA's norms along the rows here and along the columns there."""
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
                wrong += [f"{shown(group.key.stem)} has no {part}, as others have" for group in lacking]
        columns = [group for group in many if group.shapes.get("dora_scale", ())[:1] == (1,)]
        if columns and len(columns) < counts["dora_scale"]:
            wrong.append(f"{shown(columns[0].key.stem)} has a dora_scale along another side than others")
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
            whole = Full(value.float().roll(len(value) // 2) if module.swapped else value)
            yield from zip(biases, split(whole, None, tuple(biases), counts), strict=True)


def _scale(group: _Group, rank: int | None, alpha: Tensor | None, configs: PeftConfigs, name: str) -> float:
    """How much an update counts: alpha / rank, 1 where the file does not say."""
    value = None if alpha is None or rank is None else float(alpha)
    if value is not None and not (math.isfinite(value) and value):
        raise LoraError(f"{name} is damaged: {shown(group.keys['alpha'])} is {value:g}.")
    if config := configs.of(group.key):
        return config.scale(group.key.name, rank, value)
    return 1.0 if value is None or rank is None else value / rank


def _some(texts: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    more = f" and {len(texts) - MOST_NAMED} more" if len(texts) > MOST_NAMED else ""
    return ", ".join(texts[:MOST_NAMED]) + more


def _times(shape: Shape) -> str:
    return " x ".join(map(str, shape))
