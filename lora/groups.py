"""The keys of a LoRA file, grouped by the layer that they are about, and judged by names, dtypes and shapes alone."""

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from lora.about import describe
from lora.bases import foreign_base, is_flux_1, named_bases
from lora.errors import LoraError
from lora.families import may_be_klein, other_family
from lora.header import Header, Shape, shown
from lora.kinds import KINDS, Kind, magnitude_fits
from lora.layers import Layer
from lora.names import Key, Names, Shapes, is_unused
from lora.tensors import DTYPES, FLOATS

log = logging.getLogger("flux-lora")

MOST_LISTED = 3  # in one error

# What a writer gives to all layers or to none: one layer without it has lost it.
SHARED_PARTS = ("alpha", "dora_scale", "magnitude", "up_bias")
PART_NAMES = {"down": "lora_A or lora_down", "up": "lora_B or lora_up"}
ABOUT_OTHERS = ("alpha", "reshape_weight")  # parts that change no weight themselves; integers will do


@dataclass
class Group:
    """The keys of one layer of the file, and their shapes, by the part of an update that each holds."""

    key: Key  # the first of them
    keys: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)

    @property
    def kinds(self) -> list[Kind]:
        """Those that it has parts of; in a file that can be used, one or none."""
        return [kind for kind in KINDS if not self.keys.keys().isdisjoint(kind.parts)]

    @property
    def ignores_alpha(self) -> bool:
        """Whether it is a Kronecker product of two matrices that are no products themselves, and so has no rank."""
        return {"lokr_w1", "lokr_w2"} <= set(self.keys)


def group_keys(header: Header, shapes: Shapes, name: str) -> list[Group]:
    """One group for each layer of the file, for a model whose parameters have these `shapes`.

    Raises `LoraError` unless every key is understood, every layer is complete and every shape is this model's, or where
    the metadata names another model.
    """
    if family := foreign_base(header.metadata):
        raise LoraError(f"{name} is {family}.")
    names = Names(shapes, header.metadata)
    groups, unknown, wrong = _group(header, names, name)
    _rename_full_differences(groups, shapes)
    for group in groups:
        wrong += _misfits(group, shapes)
    wrong += _incomplete(groups)
    if not unknown and not wrong and groups:
        if may_be_klein(header, shapes) and not any(named_bases(header.metadata)):
            log.warning("%s may be for FLUX.2 [klein] 4B: its layers are called and shaped as that model's", name)
        return groups
    if error := other_family(header, shapes, name):
        raise error
    if whole := [key for key in unknown if names.is_parameter(key)]:
        raise LoraError(
            f"{name} cannot be used: {_listed([*map(shown, whole)])} are whole weights, not updates of any."
        )
    if unknown:
        base = describe(header).base_model
        said = f"; its metadata says that it is for {shown(base)}" if base and not is_flux_1(base) else ""
        raise LoraError(
            f"{name} is not a LoRA for this model: nothing here is called {_listed([*map(shown, unknown)])}{said}."
        )
    raise LoraError(f"{name} cannot be used: {_listed(wrong) or 'it is empty'}.")


def _group(header: Header, names: Names, name: str) -> tuple[list[Group], list[str], list[str]]:
    """The groups, the keys that are not understood, and what is wrong with dtypes or is there twice."""
    groups: dict[str, Group] = {}
    unknown, wrong = [], []
    for text, entry in header.entries.items():
        key = names.understand(text)
        if key is None and is_unused(text):
            log.warning("%s: %s is about a layer that FLUX.1 does not use; it has no effect", name, shown(text))
            continue
        if key is None:
            unknown.append(text)
            continue
        if entry.dtype not in (DTYPES if key.part in ABOUT_OTHERS else FLOATS):
            wrong.append(f"{shown(text)} is of type {entry.dtype}")
        group = groups.setdefault(key.stem, Group(key))
        if key.part in group.keys:
            wrong.append(f"{shown(text)} is there twice")
        group.keys[key.part] = text
        shape = entry.shape
        group.shapes[key.part] = shape[:2] if shape[2:] == (1, 1) else shape  # a linear layer saved as a convolution
    return list(groups.values()), unknown, wrong


def weight_shape(layer: Layer, shapes: Shapes) -> Shape:
    """The shape of the weight that a layer of the file is about: that of all its layers here, one below the other."""
    weights = [shapes[layer.component].get(f"{name}.weight", ()) for name in layer.names]
    return (sum(shape[0] for shape in weights if shape), *weights[0][1:])


def _rename_full_differences(groups: Collection[Group], shapes: Shapes) -> None:
    """ai-toolkit's "fullrank" network names a difference that is no product lora_A, and no lora_B is in its files."""
    if any(part in group.keys for group in groups for part in ("up", "alpha")):
        return
    for group in groups:
        if group.shapes.get("down") == weight_shape(group.key.layer, shapes):
            group.keys["diff"], group.shapes["diff"] = group.keys.pop("down"), group.shapes.pop("down")


def _misfits(group: Group, shapes: Shapes) -> list[str]:
    """What is wrong with the parts of one layer."""
    has, kinds, stem = group.shapes, group.kinds, shown(group.key.stem)
    weight, parameters = weight_shape(group.key.layer, shapes), shapes[group.key.layer.component]
    biased = all(f"{name}.bias" in parameters for name in group.key.layer.names)
    wrong = [f"{stem} holds several kinds of update"] if len(kinds) > 1 else []
    for kind in kinds:
        try:
            made = kind.shape(has)
        except KeyError as missing:
            part = str(missing.args[0])
            wrong.append(f"{stem} has no {PART_NAMES.get(part, part)}")
            continue
        if made is None:
            wrong.append(f"the parts of {stem} do not fit each other")
        elif made != weight:
            wrong.append(f"{stem} is for a weight of {times(made)}, here it is {times(weight)}")
    scaled = any(kind.scaled for kind in kinds)
    fits: dict[str, Callable[[Shape], bool]] = {
        "alpha": lambda shape: scaled and math.prod(shape) == 1,
        "dora_scale": lambda shape: scaled and magnitude_fits(shape, weight),
        "magnitude": lambda shape: scaled and magnitude_fits(shape, weight) and "dora_scale" not in has,
        "reshape_weight": lambda shape: shape == (len(weight),),
        "diff_b": lambda shape: biased and shape == weight[:1],
        "up_bias": lambda shape: biased and shape == weight[:1] and "up" in has,
    }
    return wrong + [
        f"{shown(group.keys[part])} does not fit" for part in fits if part in has and not fits[part](has[part])
    ]


def _incomplete(groups: Collection[Group]) -> list[str]:
    """Layers without a part that all others of the same dialect have: they would count differently. Nor does a writer
    take DoRA's norms along the rows of one layer and along the columns of another."""
    alike: dict[tuple[str, str], list[Group]] = defaultdict(list)
    for group in groups:
        if any(kind.scaled for kind in group.kinds):
            alike[group.key.dialect, group.key.layer.component].append(group)
    wrong = []
    for many in alike.values():
        counts = Counter(part for group in many for part in group.keys)
        for part in SHARED_PARTS:
            if counts[part]:
                lacking = [
                    group for group in many if part not in group.keys and not (part == "alpha" and group.ignores_alpha)
                ]
                wrong += [f"{shown(group.key.stem)} has no {part}, as others have" for group in lacking]
        columns = [group for group in many if group.shapes.get("dora_scale", ())[:1] == (1,)]
        if columns and len(columns) < counts["dora_scale"]:
            wrong.append(f"{shown(columns[0].key.stem)} has a dora_scale along another side than others")
    return wrong


def _listed(texts: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    more = f" and {len(texts) - MOST_LISTED} more" if len(texts) > MOST_LISTED else ""
    return ", ".join(texts[:MOST_LISTED]) + more


def times(shape: Shape) -> str:
    return " x ".join(map(str, shape))
