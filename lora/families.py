"""What a file is when it is not a LoRA for this model, told from its keys and shapes."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain, islice, product

from lora.errors import LoraError
from lora.header import Header, Shape, shown
from lora.names import PEFT_PREFIX, TRANSFORMER, Names, Shapes, split_key
from lora.unsupported import unsupported_kind

# What only the layers of one family are called; "~" is "." or "_". The first that is found counts.
_NO_LORAS = (
    ("an IP-Adapter", r"ip_adapter|image_proj\b"),
    ("a ControlNet", r"controlnet|input_hint_block|^control_model\."),
    ("a textual-inversion embedding", r"^(emb_params|string_to_param|clip_[lg]|t5(xxl)?|<[^>]*>)(\.\*)?$"),
    ("a LoRA with textual-inversion embeddings in it, which are not supported", r"^bundle_emb\."),
)
_FAMILIES = (
    ("a LoRA for Nunchaku's quantized models", r"\.(qweight|wscales|smooth(_orig)?|lora_down|lora_up)$"),
    ("a LoRA for FLUX.2", r"(double|single)_stream_modulation|to_qkv_mlp_proj|ff(_context)?~linear_(in|out)\b"),
    ("a LoRA for Chroma", r"distilled_guidance_layer|nerf_blocks"),
    ("a LoRA for Stable Diffusion 3", r"joint_blocks"),
    ("a LoRA for AuraFlow", r"joint_transformer_blocks"),
    ("a LoRA for HiDream", r"(double|single)_stream_blocks"),
    ("a LoRA for Stable Cascade", r"^lora_prior_"),
    ("a LoRA for Qwen-Image", r"transformer_blocks~\d+~((img|txt)_mlp~net|(img|txt)_mod~1)"),
    (
        "a LoRA for HunyuanVideo or HunyuanImage",
        r"(img|txt)_attn~[qkv]$|(img|txt)_mod~linear|(img|txt)_mlp~fc[12]|blocks\.\d+\.(img|txt)_attn_(qkv|proj)|token_refiner|modulation~linear",
    ),
    ("a LoRA for Ideogram", r"(?<![a-z])layers~\d+~(attention~o$|adaln_modulation)|adaln_proj"),
    (
        "a LoRA for Z-Image or Lumina",
        r"(noise|context)_refiner|(?<![a-z])layers~\d+~(attention|feed_forward|adaLN_modulation)",
    ),
    ("a LoRA for Stable Diffusion 1.5, 2 or SDXL", r"(input|output)_blocks|middle_block|mid_block|(down|up)_blocks~\d"),
    ("a LoRA for LTX-Video, PixArt, CogVideoX or a model like them", r"transformer_blocks~\d+~attn[12]~"),
    ("a LoRA for ERNIE-Image", r"(?<![a-z])layers~\d+~self_attention~"),
    ("a LoRA for Krea 2", r"blocks~\d+~(attn~(w[qkvo]|gate|to_gate)|(mlp|ff)~(gate|up|down))$|txtfusion|text_fusion"),
    ("a LoRA for Kandinsky", r"(visual|text)_transformer_blocks"),
    ("a LoRA for Wan", r"(?<!transformer_)blocks~\d+~((self|cross)_attn~[qkvo]\b|attn[12]~|ffn~)"),
    ("a LoRA for Cosmos or Anima", r"(?<!transformer_)blocks~\d+~(self|cross)_attn~[qkvo]_proj"),
    ("a LoRA for a language model", r"(?<!encoder)~layers~\d+~(self_attn~[qkvo]_proj|mlp~(gate|up|down)_proj)"),
    ("a LoRA for SDXL", r"^(lora_te2[._]|text_encoder_2\.)text_model"),
)
MOST_KEYS = 5_000  # that are looked at: more than any LoRA for FLUX.1 has
_PARAMETER = re.compile(r"(weight|bias|scale)(\.(absmax|quant_map|quant_state\..*))?$|^scaled_fp8$")
_STABLE_DIFFUSION = {
    768: "a LoRA for Stable Diffusion 1.5",
    1024: "a LoRA for Stable Diffusion 2",
    2048: "a LoRA for SDXL",
}
# Families whose layers are called as FLUX.1's are, by the width of their blocks.
_WIDTHS = {
    1536: "a LoRA for Stable Diffusion 3 Medium",
    2432: "a LoRA for Stable Diffusion 3.5 Large",
    4096: "a LoRA for FLUX.2 [klein] 9B",
    6144: "a LoRA for FLUX.2 [dev] or Krea 2",
}
_FLUX_WIDTH = 3072
# Layers of FLUX.2 that Black Forest Labs call as FLUX.1's: their rows and columns, in widths of its blocks.
_FLUX_2_LAYERS = {"linear1$": (9, 1), "linear2$": (1, 4), r"_mlp[._]0$": (6, 1), r"_mlp[._]2$": (1, 3)}
_FLUX_2_WIDTHS = {3072: "[klein] 4B", 4096: "[klein] 9B", 6144: "[dev]"}
_KLEIN_DEPTHS = 5, 0  # double and single blocks; the 20 single ones have attention and feed-forward in one layer
_DOUBLE_ATTENTION = re.compile(r"double_blocks[._]\d+[._](img|txt)_attn[._]")
_BLOCK = re.compile(
    r"((?<!single_)transformer_blocks|double_blocks|single_transformer_blocks|single_blocks)([._])(\d+)"
)

# The parts whose rows, multiplied, are a weight's rows, and those whose columns are its columns.
_ROWS = ("up", "hada_w1_a", "lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a", "diff")
_COLUMNS = ("down", "hada_w1_b", "lokr_w1", "lokr_w1_b", "lokr_w2", "lokr_w2_b", "diff")

Sizes = Mapping[str, tuple[int, int]]  # a layer of the file -> rows and columns of its weight; 0: not known


def other_family(header: Header, shapes: Shapes, name: str) -> LoraError | None:
    """The error for a file that is something known, but no LoRA for this model; None where nothing is known of it."""
    header = _shortened(header)
    text = next(chain(_foreign(header), _other_flux(header, shapes)), None)
    return LoraError(f"{name} is {text}.") if text else None


def foreign_family(header: Header) -> str | None:
    """What a file is whose keys alone show that it is no LoRA for FLUX.1."""
    return next(_foreign(_shortened(header)), None)


def _shortened(header: Header) -> Header:
    return replace(header, entries=dict(islice(header.entries.items(), MOST_KEYS)))


def may_be_klein(header: Header, shapes: Shapes) -> bool:
    """Whether the file fits FLUX.1, and as well FLUX.2 [klein] 4B, of which it would train all attention of the double
    blocks. Nothing but its metadata could tell."""
    attention = all(_DOUBLE_ATTENTION.search(key) for key in header.entries)
    return attention and _hidden(shapes[TRANSFORMER]) == _FLUX_WIDTH and _depths(header.entries) == _KLEIN_DEPTHS


def _foreign(header: Header) -> Iterator[str]:
    """What it is, for a file with layers that FLUX.1 has not, or without an update of any."""
    stems = {key: split_key(key)[0] for key in header.entries}
    for family, key in _called(_NO_LORAS, stems):
        yield f"{family}, not a LoRA for FLUX.1 (it has {shown(key)})"
    for key in stems:
        if kind := unsupported_kind(key):
            yield f"{kind}, which is not supported (it has {shown(key)})"
    for family, key in _called(_FAMILIES, stems):
        exact = _STABLE_DIFFUSION.get(_size(_sizes(header), r"attn2[._]to_[kv]$")[1]) if "or SDXL" in family else None
        yield f"{exact or family}, not a LoRA for FLUX.1 (it has {shown(key)})"
    if stems and not any(split_key(key)[1] for key in stems):
        whole = all(_PARAMETER.search(key) and not key.startswith(PEFT_PREFIX) for key in stems)
        what = "a whole model or a part of one" if whole else "an adapter of a kind that is not known"
        yield f"{what}, not a LoRA (it has {shown(next(iter(stems)))})"


def _called(families: Iterable[tuple[str, str]], stems: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The families that have a layer so called, each with its key."""
    for family, pattern in families:
        search = re.compile(pattern.replace("~", "[._]")).search
        yield from ((family, key) for key, stem in stems.items() if search(stem))


def _other_flux(header: Header, shapes: Shapes) -> Iterator[str]:
    """What it is, for a file whose layers are called as FLUX.1's are."""
    names, ours, sizes = Names(shapes), shapes[TRANSFORMER], _sizes(header)
    needed, width, channels = ours["x_embedder.weight"][1], _hidden(ours), _size(sizes, r"(img_in|x_embedder)$")[1]
    if channels not in (0, needed):
        kind = "FLUX.1 Control LoRA" if channels == 2 * needed else "LoRA for a FLUX.1 such as Fill or Control"
        yield f"a {kind}: its input layer has {channels} channels, this model's has {needed}"
    if any(key.endswith("query_norm.scale") for key in header.entries):
        yield "a FLUX.1 Control LoRA, which replaces norms; those are not supported"
    unknown = [key for key in header.entries if names.understand(key) is None]
    if unknown and all(re.search(r"guidance_(in|embedder)", key) for key in unknown):
        yield "for FLUX.1 dev: it changes the guidance embedder, which schnell has not; use model dev"
    if not all(names.understand(_BLOCK.sub(r"\g<1>\g<2>0", key)) for key in unknown):
        return  # they are not FLUX.1's at any depth
    for (layer, (rows, columns)), (other, model) in product(_FLUX_2_LAYERS.items(), _FLUX_2_WIDTHS.items()):
        if _size(sizes, layer) == (rows * other, columns * other):
            size = f"{rows * other} x {columns * other}"
            yield f"a LoRA for FLUX.2 {model}, not a LoRA for FLUX.1 (it changes a weight of {size})"
    theirs = _size(sizes, r"(to_q|img_attn[._](qkv|proj)|txt_attn[._]qkv|linear1|qkv_lora\d?)$")[1]
    doubles, singles = _depths(header.entries)
    our_doubles, our_singles = _depths(ours)
    if theirs != width and theirs in _WIDTHS:
        yield f"{_WIDTHS[theirs]}, not a LoRA for FLUX.1 (its blocks are {theirs} wide)"
    if theirs == width == _FLUX_WIDTH and doubles > our_doubles and not singles:
        yield f"a LoRA for Qwen-Image or HunyuanVideo, not for FLUX.1 (it has {doubles} blocks, not {our_doubles})"
    if theirs not in (0, width) or doubles > our_doubles or singles > our_singles:
        yield (
            f"for a FLUX.1 that is {theirs or 'otherwise'} wide and has at least {doubles} double and {singles} single "
            f"blocks; this model is {width} wide and has {our_doubles} and {our_singles}"
        )


def _sizes(header: Header) -> Sizes:
    """Of every layer whose update is made of factors."""
    rows: dict[str, int] = {}
    columns: dict[str, int] = {}
    for key, entry in header.entries.items():
        stem, part = split_key(key)
        if len(entry.shape) >= 2 and part in _ROWS:
            rows[stem] = rows.get(stem, 1) * entry.shape[0]
        if len(entry.shape) >= 2 and part in _COLUMNS:
            columns[stem] = columns.get(stem, 1) * entry.shape[1]
    return {stem: (rows.get(stem, 0), columns[stem]) for stem in columns}


def _size(sizes: Sizes, layer: str) -> tuple[int, int]:
    """That of the first layer so called."""
    return next((size for stem, size in sizes.items() if re.search(layer, stem)), (0, 0))


def _hidden(ours: Mapping[str, Shape]) -> int:
    """The width of the transformer's blocks."""
    return ours["x_embedder.weight"][0]


def _depths(keys: Iterable[str]) -> tuple[int, int]:
    """At least how many double and single blocks a model has whose keys are these."""
    most = {"double": 0, "single": 0}
    for key in keys:
        for kind, _, index in _BLOCK.findall(key):
            side = "single" if kind.startswith("single") else "double"
            most[side] = max(most[side], int(index[:6]) + 1)
    return most["double"], most["single"]
