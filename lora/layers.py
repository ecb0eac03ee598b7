"""FLUX.1's layers and their names: diffusers', transformers' and Black Forest Labs' own, and spellings of any.

github.com/black-forest-labs/flux, src/flux/model.py and modules/layers.py; diffusers' transformer_flux.py.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

COMPONENTS = TRANSFORMER, CLIP, T5 = "transformer", "text_encoder", "text_encoder_2"  # as diffusers calls them

# Where the second half of the rows is first: in all of an update, in lora_up alone, or in lora_up and dora_scale.
Swapped = Literal["rows", "lora_up", "lora_up and dora_scale"]


@dataclass(frozen=True)
class Layer:
    """What a layer's name in a file stands for: layers of this model, whose rows in this order are its rows."""

    component: str
    names: tuple[str, ...]
    swapped: Swapped | None = None


# A layer -> diffusers' layers whose rows, one after the other, are its rows. {} is a block's index.
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

# Of diffusers' fuse_qkv_projections, with which SimpleTuner trains.
FUSED = {
    "transformer_blocks.{}.attn.to_qkv": ORIGINAL["double_blocks.{}.img_attn.qkv"],
    "transformer_blocks.{}.attn.to_added_qkv": ORIGINAL["double_blocks.{}.txt_attn.qkv"],
    "single_transformer_blocks.{}.attn.to_qkv": ORIGINAL["single_blocks.{}.linear1_qkv"],
}


def own_names(component: str, ours: Mapping[str, None]) -> dict[str, Layer]:
    """What diffusers and transformers call the layers `ours` of a component, in any of their versions."""
    named = {name: Layer(component, (name,)) for name in ours}
    if component == TRANSFORMER:
        named |= {name.removesuffix(".0"): named[name] for name in ours if name.endswith(".to_out.0")}
    elif component == CLIP:  # transformers 5 took a level out of its names
        short = {name.removeprefix("text_model."): layer for name, layer in named.items()}
        short |= {re.sub(r"attn\.(\w+)_proj$", r"attn.to_\1", name): layer for name, layer in short.items()}
        short |= {f"{name}.0": layer for name, layer in short.items() if name.endswith(".to_out")}
        named = short | {f"text_model.{name}": layer for name, layer in short.items()}
    elif "shared" in named:  # one tensor under two names
        named["encoder.embed_tokens"] = named["shared"]
    return named


def other_names(
    layers: Mapping[str, tuple[str, ...]], swapped: Mapping[str, Swapped], component: str, ours: Mapping[str, None]
) -> dict[str, Layer]:
    """What a dialect calls the layers `ours` of a component, where `layers` says whose rows each of its layers has."""
    blocks = 1 + max((int(number) for name in ours for number in re.findall(r"\.(\d+)\.", name)), default=0)
    return {
        name.format(index): Layer(component, names, swapped.get(name))
        for name, rows in layers.items()
        for index in range(blocks if "{}" in name else 1)
        if ours.keys() >= set(names := tuple(row.format(index) for row in rows))
    }


def with_underscores(named: Mapping[str, Layer]) -> dict[str, Layer]:
    """Each name as it is, and with "_" for "."."""
    return {**named, **{name.replace(".", "_"): layer for name, layer in named.items()}}
