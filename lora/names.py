"""Which weights a key of a LoRA file is about: one table of dialects, and the rules that all of them share.

A key is <prefix><layer><suffix>: the prefix says which component, the suffix which part of an update. A layer has the
name that diffusers or Black Forest Labs gave it, with "." or, where the writer wrote so, with "_". Whatever a program
does otherwise is an entry of `DIALECTS`; nothing else in this project knows how it writes. A name with "_" cannot be
split by itself ("attn_to_q" against "to_out_0"), so every name that a layer may have is spelled once and looked up.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from lora.header import Shape
from lora.layers import COMPONENTS, FUSED, ORIGINAL, Layer, Swapped, other_names, own_names, with_underscores
from lora.unsupported import unsupported_kind

Shapes = Mapping[str, Mapping[str, Shape]]  # component -> parameter name -> shape, of the model at hand
Layers = Mapping[str, tuple[str, ...]]  # a layer's name -> the layers of this model whose rows, in order, are its rows

TRANSFORMER, CLIP, T5 = COMPONENTS
PEFT_PREFIX = "base_model.model."  # alone, or before or after a dialect's prefix
LONGEST_SUFFIX = 80  # the longest that is looked for, PEFT's name of the adapter included


@dataclass(frozen=True, eq=False)
class Dialect:
    """How one program writes keys. What all dialects have is understood in any combination, since programs mix."""

    name: str  # of the program, for the log; "" where several write so
    prefixes: Mapping[str, str] = field(default_factory=dict)  # what a key begins with -> its component
    layers: Layers = field(default_factory=dict)  # what it calls layers; {} is a block's index
    swapped: Mapping[str, Swapped] = field(default_factory=dict)  # which of `layers` have their second half first
    suffixes: Mapping[str, str] = field(default_factory=dict)  # a part of an update -> regular expression
    marks: tuple[str, ...] = ()  # the entries of the metadata that this program alone writes


_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_ADAPTER = r"(\.[^.]+)?"  # PEFT's name of the adapter, as in "lora_A.default.weight"
# What torch.compile, DistributedDataParallel and FSDP put into the names of what they wrap.
_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.")

# A new dialect is a new entry. Where several have the same prefix, the log names the first of them.
DIALECTS: tuple[Dialect, ...] = (
    Dialect(
        "",
        prefixes={"lora_te1_": CLIP, "lora_te_": CLIP},
        layers={**ORIGINAL, **FUSED},
        swapped={"final_layer.adaLN_modulation.1": "rows"},  # shift before scale; diffusers has scale before shift
        suffixes={
            "down": rf"\.lora_A{_ADAPTER}\.weight|\.lora_down\.weight|[._]lora(_linear_layer)?\.down\.weight",
            "up": rf"\.lora_B{_ADAPTER}\.weight|\.lora_up\.weight|[._]lora(_linear_layer)?\.up\.weight",
            "mid": r"\.lora_mid\.weight",
            "up_bias": rf"\.lora_B{_ADAPTER}\.bias|\.lora_up\.bias",
            "alpha": r"\.alpha",
            "dora_scale": r"\.dora_scale",
            "magnitude": rf"\.lora_magnitude_vector{_ADAPTER}(\.weight)?|\.magnitude",
            **{part: rf"\.{part}{_ADAPTER}" for part in (*_LOKR, *_HADA)},
            "diff_b": r"\.diff_b|\.b_norm|\.bias\.diff",
            "diff": r"([._]scale)?(\.diff|\.w_norm)",  # the weight of a norm is called scale
            "set_weight": r"([._]scale)?\.set_weight",
            "reshape_weight": r"\.reshape_weight",
            "embedding_down": rf"\.lora_embedding_A{_ADAPTER}",
            "embedding_up": rf"\.lora_embedding_B{_ADAPTER}",
        },
    ),
    Dialect(
        "diffusers",
        prefixes={"transformer.": TRANSFORMER, "unet.": TRANSFORMER, "text_encoder.": CLIP, "text_encoder_2.": T5},
    ),
    Dialect(
        "ComfyUI",
        prefixes={
            "model.diffusion_model.": TRANSFORMER,
            "diffusion_model.": TRANSFORMER,
            "text_encoders.clip_l.transformer.": CLIP,
            "text_encoders.t5xxl.transformer.": T5,
        },
    ),
    Dialect("kohya", prefixes={"lora_unet_": TRANSFORMER, "lora_te3_": T5}),
    Dialect(  # github.com/Nerogar/OneTrainer; the dotted prefixes are those of its "OMI" files and of its backups
        "OneTrainer",
        prefixes={
            "lora_transformer_": TRANSFORMER,
            "lora_te2_": T5,
            "transformer.": TRANSFORMER,
            "clip_l.": CLIP,
            "t5.": T5,
        },
        layers={
            **ORIGINAL,
            "img_in.proj": ORIGINAL["img_in"],
            **{f"{name}.{i}": (row,) for name, rows in ORIGINAL.items() if len(rows) > 1 for i, row in enumerate(rows)},
            "transformer_blocks.{}.attn.qkv": ORIGINAL["double_blocks.{}.img_attn.qkv"],
            "transformer_blocks.{}.attn.added_qkv": ORIGINAL["double_blocks.{}.txt_attn.qkv"],
            "single_transformer_blocks.{}.qkv_mlp": ORIGINAL["single_blocks.{}.linear1"],
        },
        swapped={"final_layer.adaLN_modulation.1": "lora_up"},
        suffixes={part: f"_{part}" for part in (*_LOKR, *_HADA)},  # until July 2026
    ),
    Dialect(  # since August 2026 also in kohya's, ComfyUI's and Black Forest Labs' names
        "OneTrainer",
        layers={"final_layer.adaLN_modulation.1": ORIGINAL["final_layer.adaLN_modulation.1"]},
        swapped={"final_layer.adaLN_modulation.1": "lora_up and dora_scale"},
        marks=("ot_branch", "ot_revision"),
    ),
    Dialect("LyCORIS", prefixes={"lycoris_": TRANSFORMER}),
    Dialect("ai-toolkit", prefixes={"lora_te1.": CLIP, "lora_te2.": T5, "lora_te.": CLIP}),
    Dialect(  # github.com/filipstrand/mflux, up to 0.15
        "mflux",
        prefixes={"transformer.": TRANSFORMER},
        layers={
            "transformer_blocks.{}.ff.linear1": ("transformer_blocks.{}.ff.net.0.proj",),
            "transformer_blocks.{}.ff.linear2": ("transformer_blocks.{}.ff.net.2",),
            "transformer_blocks.{}.ff_context.linear1": ("transformer_blocks.{}.ff_context.net.0.proj",),
            "transformer_blocks.{}.ff_context.linear2": ("transformer_blocks.{}.ff_context.net.2",),
        },
        suffixes={"down": r"\.lora_A", "up": r"\.lora_B"},
    ),
    Dialect(  # github.com/modelscope/DiffSynth-Studio, diffsynth/models/flux_dit.py
        "DiffSynth",
        prefixes={"pipe.dit.": TRANSFORMER, "dit.": TRANSFORMER},
        layers={
            "blocks.{}.attn.a_to_qkv": ORIGINAL["double_blocks.{}.img_attn.qkv"],
            "blocks.{}.attn.b_to_qkv": ORIGINAL["double_blocks.{}.txt_attn.qkv"],
            "blocks.{}.attn.a_to_out": ORIGINAL["double_blocks.{}.img_attn.proj"],
            "blocks.{}.attn.b_to_out": ORIGINAL["double_blocks.{}.txt_attn.proj"],
            "blocks.{}.ff_a.0": ORIGINAL["double_blocks.{}.img_mlp.0"],
            "blocks.{}.ff_a.2": ORIGINAL["double_blocks.{}.img_mlp.2"],
            "blocks.{}.ff_b.0": ORIGINAL["double_blocks.{}.txt_mlp.0"],
            "blocks.{}.ff_b.2": ORIGINAL["double_blocks.{}.txt_mlp.2"],
            "blocks.{}.norm1_a.linear": ORIGINAL["double_blocks.{}.img_mod.lin"],
            "blocks.{}.norm1_b.linear": ORIGINAL["double_blocks.{}.txt_mod.lin"],
            "single_blocks.{}.to_qkv_mlp": ORIGINAL["single_blocks.{}.linear1"],
            "single_blocks.{}.proj_out": ORIGINAL["single_blocks.{}.linear2"],
            "single_blocks.{}.norm.linear": ORIGINAL["single_blocks.{}.modulation.lin"],
            "final_norm_out.linear": ORIGINAL["final_layer.adaLN_modulation.1"],
            "final_proj_out": ORIGINAL["final_layer.linear"],
        },
        swapped={"final_norm_out.linear": "rows"},
    ),
    Dialect(  # github.com/XLabs-AI/x-flux trains attention alone and names it after the processors that it puts in
        "XLabs",
        layers={
            "double_blocks.{}.processor.qkv_lora1": ORIGINAL["double_blocks.{}.img_attn.qkv"],
            "double_blocks.{}.processor.qkv_lora2": ORIGINAL["double_blocks.{}.txt_attn.qkv"],
            "double_blocks.{}.processor.proj_lora1": ORIGINAL["double_blocks.{}.img_attn.proj"],
            "double_blocks.{}.processor.proj_lora2": ORIGINAL["double_blocks.{}.txt_attn.proj"],
            "single_blocks.{}.processor.qkv_lora": ORIGINAL["single_blocks.{}.linear1_qkv"],
            "single_blocks.{}.processor.proj_lora": ORIGINAL["single_blocks.{}.linear2"],
        },
        suffixes={
            part: rf"((?<=\.processor\.qkv_lora)|(?<=\.processor\.proj_lora)|(?<=_lora[12]))\.{part}\.weight"
            for part in ("down", "up")
        },
    ),
)


@dataclass(frozen=True)
class Key:
    """A key of a file, understood."""

    layer: Layer
    part: str
    stem: str  # the key without its suffix
    name: str  # the layer's name in the file, without prefix
    dialect: str  # who writes keys so


class Names:
    """Every name that a layer of this model may have in a LoRA file, whose metadata may say which program wrote it."""

    def __init__(self, shapes: Shapes, metadata: Collection[str] = ()) -> None:
        self._writers = tuple(one for one in DIALECTS if any(mark in metadata for mark in one.marks))
        self._spelled = {component: _spell(DIALECTS, component, tuple(named)) for component, named in shapes.items()}

    def understand(self, key: str) -> Key | None:
        """None for a key that no rule knows or whose layer this model does not have."""
        stem, part, by_suffix = _split(key)
        if part is None:
            return None
        for component, name, by_prefix in _without_prefix(stem):
            if found := self._find(component, name, by_prefix):
                layer, by_layer = found
                writers = (one.name for one in (*self._writers, by_layer, by_suffix, *by_prefix) if one and one.name)
                dialect = "PEFT" if PEFT_PREFIX in stem else next(writers, "" if by_prefix else "bare")
                return Key(layer, part, stem, name, dialect)
        return None

    def is_parameter(self, key: str) -> bool:
        """Whether it names a weight of this model itself, as PEFT's modules_to_save and Control LoRAs hold some."""
        stem, dot, kind = key.rpartition(".")
        return dot != "" and kind in ("weight", "bias", "scale") and self.understand(f"{stem}.diff") is not None

    def _find(self, component: str, name: str, by_prefix: tuple[Dialect, ...]) -> tuple[Layer, Dialect | None] | None:
        """The layer so called and whose name it is: that of a dialect with the key's prefix, of the program that wrote
        the file, diffusers' own, any."""
        spelled = self._spelled.get(component, {})
        in_turn = [*by_prefix, *self._writers, None, *DIALECTS]
        for one in (name, re.sub(r"([._])processor[._]", r"\1", name)):  # so were attention's layers called before PEFT
            for dialect in in_turn:
                if layer := spelled.get(dialect, {}).get(one):
                    return layer, dialect
        return None


def is_adapter_key(key: str) -> bool:
    """Whether it names a part of an update, of a kind that is supported or one that is known not to be."""
    return split_key(key)[1] is not None or unsupported_kind(key) is not None


def is_unused(key: str) -> bool:
    """Whether it is about a layer of CLIP that FLUX.1 does not use."""
    return any(
        component == CLIP and name.startswith("text_projection.") and by_prefix
        for component, name, by_prefix in _without_prefix(key)
    )


def split_key(key: str) -> tuple[str, str | None]:
    """The key without its suffix, and the part of an update that the suffix names."""
    return _split(key)[:2]


def _split(key: str) -> tuple[str, str | None, Dialect | None]:
    """The key without its suffix, the part of an update that the suffix names, and the dialect with that suffix."""
    for dialect, part, pattern in _suffixes(DIALECTS):
        if match := pattern.search(key, max(0, len(key) - LONGEST_SUFFIX)):
            return key[: match.start()], part, dialect
    return key, None, None


@lru_cache(maxsize=2)
def _suffixes(dialects: tuple[Dialect, ...]) -> list[tuple[Dialect, str, re.Pattern[str]]]:
    """In the order in which they are tried: a program's own before those that several write.

    From names such as to_q_lora.down.weight, which diffusers wrote before PEFT, converters left the first underscore.
    """
    return [
        (dialect, part, re.compile(f"_?(?:{suffix})$"))
        for dialect in sorted(dialects, key=lambda one: one.name == "")
        for part, suffix in dialect.suffixes.items()
    ]


def _without_prefix(stem: str) -> Iterator[tuple[str, str, tuple[Dialect, ...]]]:
    """What the stem may be about: a component, the layer's name and the dialects that have its prefix."""
    name = _WRAPPERS.sub("", stem.replace(PEFT_PREFIX, "", 1))
    for prefix, (component, dialects) in _prefixes(DIALECTS).items():
        if name.startswith(prefix):
            yield component, name.removeprefix(prefix), dialects
            return
    for component in COMPONENTS:
        yield component, name, ()


@lru_cache(maxsize=2)
def _prefixes(dialects: tuple[Dialect, ...]) -> dict[str, tuple[str, tuple[Dialect, ...]]]:
    """Each prefix with its component and the dialects that have it."""
    return {
        prefix: (component, tuple(other for other in dialects if prefix in other.prefixes))
        for dialect in dialects
        for prefix, component in dialect.prefixes.items()
    }


@lru_cache(maxsize=8)  # dev and schnell differ; each is asked for with every file
def _spell(
    dialects: tuple[Dialect, ...], component: str, parameters: tuple[str, ...]
) -> Mapping[Dialect | None, Mapping[str, Layer]]:
    """Every name of every layer that a component has, by the dialect whose name it is; None: diffusers' own."""
    ours = dict.fromkeys(name.rpartition(".")[0] for name in parameters)
    spelled: dict[Dialect | None, Mapping[str, Layer]] = {None: with_underscores(own_names(component, ours))}
    for dialect in dialects:
        spelled[dialect] = with_underscores(other_names(dialect.layers, dialect.swapped, component, ours))
    return spelled
