"""Which weights a key of a LoRA file is about: rules over the two naming dialects, diffusers' and the original.

A key is <prefix><module><suffix>. The prefix says which component, the suffix which part of an update; the module is
named in either dialect, with "." or, where the writer wrote so, with "_". A name with "_" cannot be split by itself
("attn_to_q" against "to_out_0"), so every name that this model has is written that way once and then looked up.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from lora.header import Shape

Shapes = Mapping[str, Mapping[str, Shape]]  # component -> parameter name -> shape, of the model at hand

TRANSFORMER, CLIP, T5 = "transformer", "text_encoder", "text_encoder_2"  # diffusers' names of the components

# Prefix, component, who writes it. The first that fits counts.
PREFIXES = (
    ("lora_unet_", TRANSFORMER, "kohya"),
    ("lora_transformer_", TRANSFORMER, "OneTrainer"),
    ("lycoris_", TRANSFORMER, "LyCORIS"),
    ("lora_te1_", CLIP, ""),  # kohya and OneTrainer alike
    ("lora_te_", CLIP, ""),
    ("lora_te2_", T5, "OneTrainer"),  # in a file for SDXL it is the second CLIP, whose names T5 has not
    ("lora_te3_", T5, "kohya"),
    ("text_encoders.clip_l.transformer.", CLIP, "ComfyUI"),
    ("text_encoders.t5xxl.transformer.", T5, "ComfyUI"),
    ("text_encoder_2.", T5, "diffusers"),
    ("text_encoder.", CLIP, "diffusers"),
    ("model.diffusion_model.", TRANSFORMER, "ComfyUI"),
    ("diffusion_model.", TRANSFORMER, "ComfyUI"),
    ("transformer.", TRANSFORMER, "diffusers"),
    ("unet.", TRANSFORMER, "diffusers"),
)
UNUSED = re.compile(r"(lora_te1?_|text_encoder\.|text_encoders\.clip_l\.transformer\.)text_projection\.")  # by FLUX.1
PEFT_PREFIX = "base_model.model."  # alone, or before or after one of those

# The original's module -> the diffusers modules whose rows, one after the other, are its rows. {} is a block's index.
# github.com/black-forest-labs/flux, src/flux/model.py and modules/layers.py; diffusers' transformer_flux.py.
ORIGINAL = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "single_blocks.{}.linear1": tuple(
        f"single_transformer_blocks.{{}}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    ),
    "single_blocks.{}.linear1_qkv": tuple(f"single_transformer_blocks.{{}}.attn.to_{name}" for name in "qkv"),
    "single_blocks.{}.linear2": ("single_transformer_blocks.{}.proj_out",),
    "single_blocks.{}.modulation.lin": ("single_transformer_blocks.{}.norm.linear",),
    "single_blocks.{}.norm.query_norm": ("single_transformer_blocks.{}.attn.norm_q",),
    "single_blocks.{}.norm.key_norm": ("single_transformer_blocks.{}.attn.norm_k",),
}
for _ours, _theirs in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance")):
    for _number, _layer in ((1, "in_layer"), (2, "out_layer")):
        ORIGINAL[f"{_theirs}_in.{_layer}"] = (f"time_text_embed.{_ours}_embedder.linear_{_number}",)
for _stream, _qkv, _out, _norm, _suffix in (
    ("img", "to_{}", "to_out.0", "norm_{}", ""),
    ("txt", "add_{}_proj", "to_add_out", "norm_added_{}", "_context"),
):
    _block = "transformer_blocks.{}."
    ORIGINAL |= {
        f"double_blocks.{{}}.{_stream}_attn.qkv": tuple(f"{_block}attn.{_qkv.format(name)}" for name in "qkv"),
        f"double_blocks.{{}}.{_stream}_attn.proj": (f"{_block}attn.{_out}",),
        f"double_blocks.{{}}.{_stream}_attn.norm.query_norm": (f"{_block}attn.{_norm.format('q')}",),
        f"double_blocks.{{}}.{_stream}_attn.norm.key_norm": (f"{_block}attn.{_norm.format('k')}",),
        f"double_blocks.{{}}.{_stream}_mlp.0": (f"{_block}ff{_suffix}.net.0.proj",),
        f"double_blocks.{{}}.{_stream}_mlp.2": (f"{_block}ff{_suffix}.net.2",),
        f"double_blocks.{{}}.{_stream}_mod.lin": (f"{_block}norm1{_suffix}.linear",),
    }
_SWAPPED = "final_layer.adaLN_modulation.1"  # it has shift before scale, diffusers' scale before shift

# github.com/XLabs-AI/x-flux trains attention alone and names it after the processors that it puts in.
_XLABS = {
    "double_blocks.{}.processor.qkv_lora1": "double_blocks.{}.img_attn.qkv",
    "double_blocks.{}.processor.qkv_lora2": "double_blocks.{}.txt_attn.qkv",
    "double_blocks.{}.processor.proj_lora1": "double_blocks.{}.img_attn.proj",
    "double_blocks.{}.processor.proj_lora2": "double_blocks.{}.txt_attn.proj",
    "single_blocks.{}.processor.qkv_lora": "single_blocks.{}.linear1_qkv",
    "single_blocks.{}.processor.proj_lora": "single_blocks.{}.linear2",
}

# Part of an update -> the suffixes that name it. In "lora_A.default.weight" PEFT's name of the adapter is in between.
_SUFFIXES = {
    "down": r"\.lora_A(\.[^.]+)?\.weight|\.lora_down\.weight|[._]lora(_linear_layer)?\.down\.weight",
    "up": r"\.lora_B(\.[^.]+)?\.weight|\.lora_up\.weight|[._]lora(_linear_layer)?\.up\.weight",
    "up_bias": r"\.lora_B(\.[^.]+)?\.bias|\.lora_up\.bias",
    "alpha": r"\.alpha",
    "dora_scale": r"\.dora_scale",
    "magnitude": r"\.lora_magnitude_vector(\.[^.]+)?(\.weight)?|\.magnitude",
    **{name: rf"\.{name}(\.[^.]+)?" for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a")},
    **{name: rf"\.{name}(\.[^.]+)?" for name in ("lokr_w2_b", "lokr_t2")},
    **{name: rf"\.{name}(\.[^.]+)?" for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    "diff": r"\.diff|\.w_norm",
    "diff_b": r"\.diff_b|\.b_norm",
    "embedding_down": r"\.lora_embedding_A(\.[^.]+)?",
    "embedding_up": r"\.lora_embedding_B(\.[^.]+)?",
}
_PARTS = [(part, re.compile(f"(?:{suffix})$")) for part, suffix in _SUFFIXES.items()]
_HINTS = re.compile(r"lora|lokr_|hada_|oft_|dora_scale", re.IGNORECASE)  # of adapters that are not supported, too
_XLABS_KEY = re.compile(r"(.*\.processor\.(?:qkv|proj)_lora[12]?)\.(down|up)\.weight")


@dataclass(frozen=True)
class Module:
    """What a module's name in a file stands for: modules of this model, whose rows in this order are its rows."""

    component: str
    names: tuple[str, ...]
    swapped: bool = False  # the file has the second half of the rows first


@dataclass(frozen=True)
class Key:
    """A key of a file, understood."""

    module: Module
    part: str
    stem: str  # the key without its suffix
    name: str  # the module's name in the file, without prefix
    dialect: str  # who writes keys so


class Names:
    """Every name that a module of this model may have in a LoRA file."""

    def __init__(self, shapes: Shapes) -> None:
        self._modules = {component: _spellings(component, tuple(named)) for component, named in shapes.items()}

    def understand(self, key: str) -> Key | None:
        """None for a key that no rule knows or whose module this model does not have."""
        stem, part = split_key(key)
        if part is None:
            return None
        for component, name, dialect in _without_prefix(stem):
            modules = self._modules.get(component, {})
            if module := modules.get(name) or modules.get(name.replace(".processor.", ".")):  # diffusers' before PEFT
                return Key(module, part, stem, name, dialect)
        return None


def split_key(key: str) -> tuple[str, str | None]:
    """The key without its suffix, and the part of an update that the suffix names."""
    if match := _XLABS_KEY.fullmatch(key):
        return match[1], match[2]
    for part, pattern in _PARTS:
        if match := pattern.search(key):
            return key[: match.start()], part
    return key, None


def is_adapter_key(key: str) -> bool:
    """Whether the key is one of an adapter's, be it of a kind that is not supported."""
    return split_key(key)[1] is not None or _HINTS.search(key) is not None


def _without_prefix(stem: str) -> Iterator[tuple[str, str, str]]:
    """What the stem may be: component, module's name, dialect."""
    name = stem.replace(PEFT_PREFIX, "", 1)
    by_peft = "PEFT" if len(name) < len(stem) else None
    for prefix, component, dialect in PREFIXES:
        if name.startswith(prefix):
            yield component, name.removeprefix(prefix), by_peft or dialect
            return
    for component in (TRANSFORMER, CLIP, T5):
        yield component, name, by_peft or ("XLabs" if ".processor." in name else "bare")


@lru_cache(maxsize=8)  # dev and schnell differ; each is asked for with every file
def _spellings(component: str, parameters: tuple[str, ...]) -> Mapping[str, Module]:
    """Every spelling of the name of every module that a component has."""
    modules = dict.fromkeys(name.rpartition(".")[0] for name in parameters)
    named = {name: Module(component, (name,)) for name in modules}
    if component == TRANSFORMER:
        named |= _original_names(modules)
        named |= {name.removesuffix(".0"): named[name] for name in modules if name.endswith(".to_out.0")}
    elif component == CLIP:  # transformers 5 took a level out of its names
        short = {name.removeprefix("text_model."): module for name, module in named.items()}
        short |= {re.sub(r"attn\.(\w+)_proj$", r"attn.to_\1", name): module for name, module in short.items()}
        named = short | {f"text_model.{name}": module for name, module in short.items()}
    elif "shared" in named:  # one tensor under two names
        named["encoder.embed_tokens"] = named["shared"]
    return named | {name.replace(".", "_"): module for name, module in named.items()}


def _original_names(modules: Mapping[str, None]) -> dict[str, Module]:
    """The modules that this model has, as the original names them."""
    blocks = 1 + max((int(number) for name in modules for number in re.findall(r"blocks\.(\d+)\.", name)), default=0)
    named: dict[str, Module] = {}
    for original, ours in ORIGINAL.items():
        for index in range(blocks if "{}" in original else 1):
            names = tuple(name.format(index) for name in ours)
            if all(name in modules for name in names):
                named[original.format(index)] = Module(TRANSFORMER, names, swapped=original == _SWAPPED)
    named |= {f"{name}.scale": module for name, module in named.items() if name.endswith("_norm")}
    for xlabs, original in _XLABS.items():
        for index in range(blocks):
            if original.format(index) in named:
                named[xlabs.format(index)] = named[original.format(index)]
    return named
