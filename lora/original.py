"""What Black Forest Labs call FLUX.1's layers, and what diffusers calls those that it fuses.

github.com/black-forest-labs/flux, src/flux/model.py and modules/layers.py; diffusers' transformer_flux.py.
"""

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
