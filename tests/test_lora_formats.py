"""Any program's LoRA file becomes the same updates; what is no LoRA for this model is refused by name."""

import json
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.training_utils import _collate_lora_metadata
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from lycoris.functional.general import rebuild_tucker
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from peft import (
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    PeftType,
    RandLoraConfig,
    VeraConfig,
    get_peft_model,
)
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from fetch.sources import fetch_weights
from lora.errors import LoraError
from lora.formats import Adapter, read_lora
from lora.header import MOST_BYTES, MOST_TENSORS
from lora.names import Shapes
from lora.patterns import PatternError, parse_pattern
from lora.updates import LowRank
from settings import read_settings
from tests.lora_files import (
    DIALECTS,
    KINDS,
    Base,
    FileModule,
    LoraFile,
    base_of,
    file_modules,
    make_lora,
    original_modules,
    shapes_of,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
SOME = r"[bB]locks?[._]1[._]|final_layer|norm_out|img_in"  # enough of a file to go wrong

Models = dict[str, torch.nn.Module]
Read = Callable[[LoraFile], Adapter]


def new_models(doubles: int, singles: int, *, width: int = 16, guidance: bool = True) -> Models:
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=doubles,
        num_single_layers=singles,
        attention_head_dim=width // 2,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=12,
        guidance_embeds=guidance,
        axes_dims_rope=(width // 2 - 4, 2, 2),
    )
    clip = CLIPTextConfig(
        vocab_size=9, hidden_size=12, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    t5 = T5Config(vocab_size=9, d_model=24, d_ff=60, d_kv=12, num_heads=2, num_layers=2, feed_forward_proj="gated-gelu")
    return {"transformer": transformer, "text_encoder": CLIPTextModel(clip), "text_encoder_2": T5EncoderModel(t5)}


@pytest.fixture(scope="module")
def models() -> Models:
    torch.manual_seed(0)
    return new_models(2, 2)


@pytest.fixture(scope="module")
def shapes(models: Models) -> Shapes:
    return shapes_of(**models)


@pytest.fixture(scope="module")
def base(models: Models) -> Base:
    return base_of(**models)


@pytest.fixture(scope="module")
def flux_shapes() -> Shapes:
    """FLUX.1-dev's own, to the last block."""
    with torch.device("meta"):
        return shapes_of(
            transformer=FluxTransformer2DModel(guidance_embeds=True),
            text_encoder=CLIPTextModel(CLIPTextConfig(num_hidden_layers=12, hidden_size=768, intermediate_size=3072)),
            text_encoder_2=T5EncoderModel(
                T5Config(d_model=64, d_ff=160, num_layers=24, feed_forward_proj="gated-gelu")
            ),
        )


@pytest.fixture(scope="module")
def read(shapes: Shapes, tmp_path_factory: pytest.TempPathFactory) -> Read:
    folder = tmp_path_factory.mktemp("loras")
    return lambda file: read_lora(file.save(folder / "lora.safetensors"), shapes, "acme/lora")


def differences(lora: Adapter, base: Base) -> dict[tuple[str, str], Tensor]:
    return {
        (component, name): update.difference(lambda one, c=component: base(c, one))
        for component, named in lora.updates.items()
        for name, update in named.items()
    }


def assert_makes(lora: Adapter, file: LoraFile, base: Base) -> None:
    found = differences(lora, base)
    assert found.keys() == file.makes.keys()
    for where, difference in found.items():
        assert difference.shape == base(*where).shape
        torch.testing.assert_close(difference.double(), file.makes[where](base), rtol=1e-4, atol=2e-5)


# What each program writes


@pytest.mark.parametrize(("dialect", "kind"), list(product(DIALECTS, KINDS)))
def test_every_dialect_and_kind_is_what_its_formula_says(
    dialect: str, kind: str, shapes: Shapes, base: Base, read: Read
) -> None:
    file = make_lora(shapes, dialect, kind)
    lora = read(file)
    assert lora.dialect == dialect
    assert_makes(lora, file, base)


@pytest.mark.parametrize("dialect", [name for name in DIALECTS if name != "XLabs"])
def test_every_key_of_a_real_file_has_a_home(dialect: str, tmp_path: Path) -> None:
    shapes = shapes_of(**new_models(19, 38, width=8))
    file = make_lora(shapes, dialect, rank=1)
    lora = read_lora(file.save(tmp_path / "lora.safetensors"), shapes, "it")
    linear = {
        (component, name)
        for component, named in shapes.items()
        for name, shape in named.items()
        if len(shape) == 2 and not re.search("embedding|shared|relative", name)
    }
    found = {(component, name) for component, named in lora.updates.items() for name in named}
    assert found == {one for one in linear if one[0] in lora.updates}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dialect=st.sampled_from(DIALECTS),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    rank=st.sampled_from([1, 3, 4, 17]),
    alpha=st.sampled_from([None, 0.5, 1.0, 12.0, -4.0]),
    seed=st.integers(0, 99),
)
def test_any_dtype_rank_and_alpha(
    shapes: Shapes,
    base: Base,
    read: Read,
    dialect: str,
    kind: str,
    dtype: torch.dtype,
    rank: int,
    alpha: float,
    seed: int,
) -> None:
    file = make_lora(shapes, dialect, kind, rank=rank, alpha=alpha, dtype=dtype, seed=seed, only=SOME)
    assert_makes(read(file), file, base)


def test_files_of_several_writers_and_ranks(shapes: Shapes, base: Base, read: Read) -> None:
    file = make_lora(shapes, "kohya", only="double", rank=2) | make_lora(
        shapes, "diffusers", only=r"\.q_proj|SelfAttention"
    )
    file |= make_lora(shapes, "bare", "lokr", only="single_blocks.0.l")
    file |= make_lora(shapes, "diffusers", only="blocks.1.proj_out", rank=7)
    lora = read(file)
    assert lora.dialect == "kohya + bare + diffusers"
    assert_makes(lora, file, base)


RENAMED = [
    ("diffusers", r"\.lora_([AB])\.weight", r".lora_\1.default.weight"),
    ("diffusers", r"\.lora_A\.", ".lora_down."),
    ("diffusers", r"^transformer\.", "unet."),
    ("diffusers", r"^text_encoder\.text_model\.", "text_encoder."),
    ("diffusers", r"\.lora_A\.", ".lora.down."),
    ("diffusers", r"\.lora_A\.", ".lora_linear_layer.down."),
    (
        "diffusers",
        r"\.to_out\.0\.lora_([AB])\.",
        lambda match: ".processor.to_out_lora" + {"A": ".down.", "B": ".up."}[match[1]],
    ),
    ("diffusers", r"(self_attn)\.out_proj\.", r"\1.to_out.0."),
    ("diffusers", r"(self_attn)\.([qkv])_proj\.", r"\1.to_\2."),
    ("LyCORIS", r"^lycoris_(.*attn_to_[qkv])\.", r"lora_unet_\1_."),
    ("LyCORIS", r"^(lycoris_.*attn_to_[qkv])\.lora_", r"\1_.lora_"),  # and alpha without
    ("PEFT", r"^base_model\.model\.", "base_model.model.transformer."),
    ("PEFT", r"^base_model\.model\.", "transformer.base_model.model."),
    ("ComfyUI", r"^diffusion_model\.", "model.diffusion_model."),
    ("ComfyUI", r"^diffusion_model\.", "base_model.model."),
    ("kohya", r"^lora_te1_", "lora_te_"),
    ("kohya", r"\.lora_(up|down)\.", lambda match: {"up": ".lora_B.", "down": ".lora_A."}[match[1]]),
    ("LyCORIS", r"^lycoris_", "lora_unet_"),
    ("XLabs", r"^", "diffusion_model."),
    ("diffusers", r"^transformer\.", "transformer._orig_mod."),  # trained with torch.compile
    ("PEFT", r"blocks\.(\d)\.", r"blocks.\1._orig_mod."),  # block by block
    ("PEFT", r"^base_model\.model\.", "base_model.model.module."),  # on several GPUs
    ("diffusers", r"blocks\.(\d)\.", r"blocks.\1._fsdp_wrapped_module."),
]


@pytest.mark.parametrize(("dialect", "pattern", "by"), RENAMED)
def test_names_that_older_and_other_programs_write(
    dialect: str, pattern: str, by: Any, shapes: Shapes, base: Base, read: Read
) -> None:
    file = make_lora(shapes, dialect)
    renamed = {re.sub(pattern, by, key): tensor for key, tensor in file.tensors.items()}
    assert renamed.keys() != file.tensors.keys()
    file.tensors = renamed
    assert_makes(read(file), file, base)


DIFFSYNTH = {
    "img_": "a_",
    "txt_": "b_",
    r"([ab])_attn\.qkv": r"attn.\1_to_qkv",
    r"([ab])_attn\.proj": r"attn.\1_to_out",
    r"([ab])_mlp": r"ff_\1",
    r"([ab])_mod\.lin": r"norm1_\1.linear",
    "double_blocks": "blocks",
    "modulation.lin": "norm.linear",
    "linear1": "to_qkv_mlp",
    "linear2": "proj_out",
    "final_layer.adaLN_modulation.1": "final_norm_out.linear",
    "final_layer.linear": "final_proj_out",
    r"\.lora_([AB])\.": r".lora_\1.default.",
}
AI_TOOLKIT = {r"^text_encoder\.": "lora_te1.", r"^text_encoder_2\.": "lora_te2."}
UNDERSCORES = {r"\.(lokr|hada)_": r"_\1_"}
MFLUX = {
    r"\.ff(_context)?\.net\.0\.proj": r".ff\1.linear1",
    r"\.ff(_context)?\.net\.2": r".ff\1.linear2",
    r"\.weight$": "",
}

WRITTEN = [  # a program; the dialect above that is nearest, the kind, which layers; what is different
    ("mflux", "diffusers", "lora", r"transformer\S*blocks", MFLUX),
    ("DiffSynth", "bare", "lora", "blocks|final", DIFFSYNTH | {r"^": "pipe.dit."}),
    ("DiffSynth", "bare", "dora_out", "blocks|final", DIFFSYNTH),
    *(("ai-toolkit", "diffusers", kind, "^text_encoder", AI_TOOLKIT) for kind in ("lora", "lokr_full")),
    ("ai-toolkit", "diffusers", "dora_peft", "^text_encoder", {**AI_TOOLKIT, r"\.lora_magnitude_vector": ".magnitude"}),
    *(("OneTrainer", "OneTrainer", kind, "", UNDERSCORES) for kind in ("loha", "lokr", "lokr_full", "lokr_both")),
]


@pytest.mark.parametrize(("program", "dialect", "kind", "only", "renamed"), WRITTEN)
def test_names_that_one_program_writes(
    program: str, dialect: str, kind: str, only: str, renamed: dict[str, str], shapes: Shapes, base: Base, read: Read
) -> None:
    file = make_lora(shapes, dialect, kind, only=only)
    for pattern, by in renamed.items():
        keys = {re.sub(pattern, by, key): tensor for key, tensor in file.tensors.items()}
        assert keys.keys() != file.tensors.keys()
        assert len(keys) == len(file.tensors)
        file.tensors = keys
    lora = read(file)
    assert lora.dialect == program
    assert_makes(lora, file, base)


@pytest.mark.parametrize("kind", ["lora", "dora_out", "dora_in", "loha", "lokr", "diff"])
def test_onetrainers_omi_files(kind: str, shapes: Shapes, base: Base, read: Read) -> None:
    """q, k, v and mlp are apart under Black Forest Labs' names. Its writer swaps halves in lora_up alone."""
    file = make_lora(shapes, "diffusers", kind, alpha=3)
    called = {f"{component}.": prefix for component, prefix in (("text_encoder", "clip_l."), ("text_encoder_2", "t5."))}
    for name, ours in original_modules(shapes):
        written = {ours[0]: "img_in.proj" if name == "img_in" else name}
        if len(ours) > 1:
            written = {one: f"{name}.{i}" for i, one in enumerate(ours)}
        called |= {f"transformer.{one}.": f"transformer.{omi}." for one, omi in written.items()}
    tensors = {}
    for key, tensor in file.tensors.items():
        prefix = next(one for one in called if key.startswith(one))
        name = (
            (called[prefix] + key.removeprefix(prefix))
            .replace(".lora_A.", ".lora_down.")
            .replace(".lora_B.", ".lora_up.")
        )
        swapped = name == "transformer.final_layer.adaLN_modulation.1.lora_up.weight"
        tensors[name] = tensor.roll(len(tensor) // 2, 0) if swapped else tensor
    file.tensors = tensors
    lora = read(file)
    assert lora.dialect == "OneTrainer"
    assert_makes(lora, file, base)


@pytest.mark.parametrize("kind", ["lora", "dora_out", "dora_in", "loha", "lokr"])
@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model.", ""])
def test_onetrainers_kohya_comfyui_and_original_files(
    kind: str, prefix: str, shapes: Shapes, base: Base, read: Read
) -> None:
    """Since August 2026 it swaps halves in lora_up and in dora_scale, but in no factor of LoHa and LoKr."""
    file = make_lora(shapes, "diffusers", kind, alpha=3, only="norm_out")
    name = "final_layer.adaLN_modulation.1"
    stem = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
    tensors = {}
    for key, tensor in file.tensors.items():
        part = key.removeprefix("transformer.norm_out.linear.")
        swapped = part == "lora_B.weight" or (part == "dora_scale" and len(tensor) > 1)
        part = part.replace("lora_A", "lora_down").replace("lora_B", "lora_up") if prefix.endswith("_") else part
        tensors[f"{stem}.{part}"] = tensor.roll(len(tensor) // 2, 0) if swapped else tensor
    file.tensors, file.metadata = tensors, {"ot_branch": "master", "ot_revision": "23df383"}
    lora = read(file)
    assert lora.dialect == "OneTrainer"
    assert_makes(lora, file, base)


def test_biases_norms_and_embeddings(base: Base, read: Read) -> None:
    draw = torch.Generator().manual_seed(0)
    ups = {"a": torch.randn(48, 2, generator=draw), "b": torch.randn(32, 2, generator=draw)}
    downs = {"a": torch.randn(2, 16, generator=draw), "b": torch.randn(2, 16, generator=draw)}
    bias, swapped, norm = (
        torch.randn(48, generator=draw),
        torch.randn(32, generator=draw),
        torch.randn(8, generator=draw),
    )
    column, tokens = torch.randn(2, 24, generator=draw), torch.randn(2, 9, generator=draw)
    qkv, final, query = "double_blocks.1.img_attn.qkv", "final_layer.adaLN_modulation.1", "attn.norm_added_q"
    lora = read(
        LoraFile(
            {
                f"diffusion_model.{qkv}.lora_A.weight": downs["a"],
                f"diffusion_model.{qkv}.lora_B.weight": ups["a"],
                f"diffusion_model.{qkv}.lora_B.bias": bias,
                f"diffusion_model.{qkv}.alpha": torch.tensor([1]),
                "lora_unet_" + final.replace(".", "_") + ".lora_down.weight": downs["b"],
                "lora_unet_" + final.replace(".", "_") + ".lora_up.weight": ups["b"],
                "lora_unet_" + final.replace(".", "_") + ".diff_b": swapped,
                "lycoris_double_blocks_0_txt_attn_norm_query_norm.w_norm": norm,
                "diffusion_model.single_blocks.1.norm.key_norm.scale.diff": norm,
                "diffusion_model.double_blocks.0.txt_attn.proj.bias.diff": norm.repeat(2),
                "text_encoder_2.encoder.embed_tokens.lora_embedding_A": tokens,
                "text_encoder_2.encoder.embed_tokens.lora_embedding_B": column.T.contiguous(),
            }
        )
    )
    found = differences(lora, base)
    expected = {
        ("transformer", "norm_out.linear.weight"): (ups["b"] @ downs["b"]).roll(16, 0),
        ("transformer", "norm_out.linear.bias"): swapped.roll(16),
        ("transformer", f"transformer_blocks.0.{query}.weight"): norm,
        ("transformer", "single_transformer_blocks.1.attn.norm_k.weight"): norm,
        ("transformer", "transformer_blocks.0.attn.to_add_out.bias"): norm.repeat(2),
        ("text_encoder_2", "shared.weight"): (column.T @ tokens).T,
    }
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        rows = slice(16 * i, 16 * (i + 1))
        expected["transformer", f"transformer_blocks.1.attn.{name}.weight"] = (ups["a"] @ downs["a"])[rows] / 2
        expected["transformer", f"transformer_blocks.1.attn.{name}.bias"] = bias[rows] / 2
    assert found.keys() == expected.keys()
    for where, difference in expected.items():
        torch.testing.assert_close(found[where], difference)


def test_weights_that_are_set(base: Base, read: Read) -> None:
    """ComfyUI's set_weight and reshape_weight, which it makes of FLUX.1's Control LoRAs."""
    draw, prefix = torch.Generator().manual_seed(0), "diffusion_model."
    qkv, modulation, norm = (torch.randn(shape, generator=draw) for shape in ((48, 16), (32, 16), (8,)))
    file = LoraFile(
        {
            f"{prefix}double_blocks.0.img_attn.qkv.set_weight": qkv,
            f"{prefix}double_blocks.0.img_attn.qkv.reshape_weight": torch.tensor([48, 16]),
            f"{prefix}final_layer.adaLN_modulation.1.set_weight": modulation,
            f"{prefix}double_blocks.0.img_attn.norm.query_norm.scale.set_weight": norm,
        }
    )
    set_to = {
        **{f"transformer_blocks.0.attn.to_{one}.weight": qkv[16 * i : 16 * i + 16] for i, one in enumerate("qkv")},
        "norm_out.linear.weight": modulation.roll(16, 0),
        "transformer_blocks.0.attn.norm_q.weight": norm,
    }
    found = differences(read(file), base)
    assert found.keys() == {("transformer", name) for name in set_to}
    for name, weight in set_to.items():
        torch.testing.assert_close(base("transformer", name) + found["transformer", name], weight)
    file.tensors[f"{prefix}double_blocks.0.img_attn.qkv.reshape_weight"][1] = 17
    assert "qkv.reshape_weight asks for a weight of 48 x 17, here it is 48 x 16" in refusal(read, file)


def test_a_lora_that_is_in_the_file_twice_counts_once(shapes: Shapes, base: Base, read: Read) -> None:
    """So that it loads everywhere, some are written in diffusers' names and in kohya's."""
    file = make_lora(shapes, "kohya", only="double_blocks_._img_attn_qkv", rank=3)
    for i, name in product((0, 1), "qkv"):
        stem = f"lora_unet_double_blocks_{i}_img_attn_qkv"
        rows = slice("qkv".index(name) * 16, "qkv".index(name) * 16 + 16)
        again = f"transformer.transformer_blocks.{i}.attn.to_{name}"
        file.tensors[f"{again}.lora_A.weight"] = file.tensors[f"{stem}.lora_down.weight"] / 2  # alpha / rank
        file.tensors[f"{again}.lora_B.weight"] = file.tensors[f"{stem}.lora_up.weight"][rows].clone()
    assert_makes(read(file), file, base)
    file.tensors["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"] *= 1.1
    assert "are about the same weight and differ" in refusal(read, file)


@pytest.mark.parametrize(
    ("kind", "dialects"), list(product(KINDS, [("kohya", "ComfyUI"), ("OneTrainer", "diffusers")]))
)
def test_any_kind_that_is_in_the_file_twice_counts_once(
    kind: str, dialects: tuple[str, str], shapes: Shapes, base: Base, read: Read
) -> None:
    modules = [list(file_modules(shapes, dialect)) for dialect in dialects]
    again = {first.stem: second.stem for first, second in zip(*modules, strict=True)}
    parts = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
    file = make_lora(shapes, dialects[0], kind, alpha=3, only=SOME)
    for key, tensor in list(file.tensors.items()):
        stem, _, part = key.partition(".")
        file.tensors[f"{again[stem]}.{parts.get(part, part)}"] = tensor.clone()
    lora = read(file)
    assert set(lora.dialect.split(" + ")) == set(dialects)
    assert_makes(lora, file, base)
    file.tensors[next(key for key in reversed(file.tensors) if not key.endswith(".alpha"))] *= 1.2
    assert "are about the same weight and differ" in refusal(read, file)


def test_what_flux_does_not_use_is_left_out_aloud(
    shapes: Shapes, base: Base, read: Read, caplog: pytest.LogCaptureFixture
) -> None:
    file = make_lora(shapes, "ComfyUI", only=SOME)
    key = "text_encoders.clip_l.transformer.text_projection.lora_A.weight"
    file.tensors[key] = torch.ones(4, 12)
    assert_makes(read(file), file, base)
    assert f"{key} is about a layer that FLUX.1 does not use" in caplog.text


def test_full_differences_that_ai_toolkit_names_as_factors(shapes: Shapes, base: Base, read: Read) -> None:
    file = make_lora(shapes, "ComfyUI", "diff", only="blocks")
    file.tensors = {key.replace(".diff", ".lora_A.weight"): tensor for key, tensor in file.tensors.items()}
    assert_makes(read(file), file, base)


def test_the_tensors_do_not_need_the_file(shapes: Shapes, base: Base, tmp_path: Path) -> None:
    file = make_lora(shapes, "kohya", only=SOME)
    path = file.save(tmp_path / "lora.safetensors")
    lora = read_lora(path, shapes, "it")
    path.write_bytes(b"\xff" * path.stat().st_size)
    path.unlink()
    assert_makes(lora, file, base)


# Other programs' own readings


def probed(lora: Adapter) -> dict[tuple[str, str], Tensor]:
    """Each difference times a vector: matrices of the real size never exist."""
    found = {}
    for component, named in lora.updates.items():
        for name, update in named.items():
            assert isinstance(update, LowRank)
            vector = torch.linspace(-1, 1, update.down.shape[1])
            found[component, name] = update.scale * update.up.float() @ (update.down.float() @ vector)
    return found


@pytest.mark.parametrize(
    ("dialect", "only", "renamed"),
    [
        ("kohya", "lora_unet|lora_te1", None),
        ("OneTrainer", "attn|embedder", None),  # diffusers takes the rest for the block itself
        ("XLabs", "", None),
        ("ComfyUI", "blocks", (r"\.lora_([AB])\.", lambda match: {"A": ".lora_down.", "B": ".lora_up."}[match[1]])),
        ("ComfyUI", "blocks|final_layer.linear", (r"^diffusion_model\.", "base_model.model.")),  # fal
        ("diffusers", "^transformer", None),
    ],
)
def test_diffusers_reads_the_same(
    dialect: str, only: str, renamed: tuple[str, Any] | None, flux_shapes: Shapes, tmp_path: Path
) -> None:
    file = make_lora(flux_shapes, dialect, rank=2, only=only)
    if renamed:
        file.tensors = {re.sub(*renamed, key): tensor for key, tensor in file.tensors.items()}
    for key, tensor in file.tensors.items():
        if "final_layer" in key and key.endswith(".alpha"):
            tensor.fill_(2)  # diffusers leaves it unread
    ours = probed(read_lora(file.save(tmp_path / "ours.safetensors"), flux_shapes, "it"))
    converted = FluxPipeline.lora_state_dict(dict(file.tensors))
    theirs = probed(read_lora(LoraFile(converted).save(tmp_path / "theirs.safetensors"), flux_shapes, "it"))
    assert ours.keys() == theirs.keys()
    for where, vector in theirs.items():
        torch.testing.assert_close(ours[where], vector, rtol=1e-4, atol=1e-4)


TARGETS = ["to_q", "to_k", "add_v_proj", "proj_mlp", "norm.linear", "net.2"]
PATTERNS = {"rank_pattern": {"to_k": 5, "transformer_blocks.1.attn.to_q": 2}, "alpha_pattern": {"to_k": 3, "net.2": 9}}
PEFT_CONFIGS = {
    "plain": LoraConfig(r=4, lora_alpha=2, target_modules=TARGETS),
    "patterns": LoraConfig(r=4, lora_alpha=2, target_modules=TARGETS, **PATTERNS),
    "rank-stabilised": LoraConfig(r=4, lora_alpha=3, target_modules=TARGETS, use_rslora=True, **PATTERNS),
    "DoRA": LoraConfig(r=4, lora_alpha=2, target_modules=TARGETS, use_dora=True, **PATTERNS),
    "biases": LoraConfig(r=4, lora_alpha=2, target_modules=TARGETS, lora_bias=True),
    "LoKr": LoKrConfig(r=4, alpha=2, target_modules=TARGETS),
    "LoKr, no products": LoKrConfig(r=64, alpha=16, target_modules=TARGETS),
    "LoHa": LoHaConfig(r=4, alpha=2, target_modules=TARGETS, **PATTERNS),
}


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT takes biases for damaged matrices
@pytest.mark.parametrize("way", ["adapter_config.json", "metadata", "metadata of a component"])
@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_peft_merges_the_same(name: str, way: str, models: Models, shapes: Shapes, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = new_models(2, 2)["transformer"]
    base = base_of(transformer=new_models(2, 2)["transformer"])
    model.load_state_dict({name: base("transformer", name) for name, _ in model.named_parameters()})
    config = PEFT_CONFIGS[name]
    if way == "adapter_config.json":
        adapted = get_peft_model(model, config)
        layers = randomised_layers(model)
        adapted.save_pretrained(tmp_path)
        cached = fetch_weights(
            str(tmp_path / "adapter_model.safetensors"), read_settings({"LORA_CACHE_DIR": str(tmp_path / "cache")})
        )
        path = cached.path
    else:
        model.add_adapter(config)
        layers = randomised_layers(model)
        path = tmp_path / "pytorch_lora_weights.safetensors"
        if way == "metadata":
            model.save_lora_adapter(tmp_path)
        else:
            metadata = _collate_lora_metadata({"transformer": model})
            FluxPipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(model), **metadata)
    found = differences(read_lora(path, shapes, "it"), base)
    for layer in layers.values():
        layer.merge()
    merged = {
        (layer_name.removeprefix("base_model.model.") + f".{parameter}"): value
        for layer_name, layer in layers.items()
        for parameter, value in layer.get_base_layer().named_parameters()
    }
    changed = {name for name, value in merged.items() if not torch.equal(value, base("transformer", name))}
    assert changed == {name for _, name in found}
    for (_, parameter), difference in found.items():
        torch.testing.assert_close(base("transformer", parameter) + difference, merged[parameter], rtol=1e-4, atol=1e-5)


def test_layers_that_diffusers_fuses(shapes: Shapes, base: Base, tmp_path: Path) -> None:
    """As SimpleTuner trains them with --fuse_qkv_projections."""
    torch.manual_seed(1)
    model = new_models(2, 2)["transformer"]
    model.fuse_qkv_projections()
    model.add_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=["to_qkv", "to_added_qkv", "to_out.0"]))
    layers = randomised_layers(model)
    FluxPipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(model))
    found = differences(read_lora(tmp_path / "pytorch_lora_weights.safetensors", shapes, "it"), base)
    assert len(found) == 2 * (3 + 3 + 1) + 2 * 3
    for name, layer in layers.items():
        names = [name]
        if name.endswith("qkv"):
            pattern = "add_{}_proj" if name.endswith("to_added_qkv") else "to_{}"
            names = [name.rpartition(".")[0] + "." + pattern.format(one) for one in "qkv"]
        difference = torch.cat([found["transformer", f"{one}.weight"] for one in names])
        torch.testing.assert_close(difference, layer.get_delta_weight("default"), rtol=1e-4, atol=1e-5)


PATTERN_PARTS = ["to_q", "a", ".", r"\.", r"\d", r"\w", "[0-9]", "[^.]", "[ab]", "_", "1", "block", r"\-", "-"]
PIECES = st.tuples(st.sampled_from(PATTERN_PARTS), st.sampled_from(["", "", "", "*", "+", "?", ".*"])).map("".join)
TEXTS = st.lists(PIECES, max_size=3).map("".join)
GROUPS = st.lists(TEXTS, min_size=1, max_size=3).map(lambda options: f"({'|'.join(options)})")
PATTERN = st.tuples(st.sampled_from(["", "^"]), TEXTS, GROUPS | TEXTS, TEXTS, st.sampled_from(["", "$"])).map("".join)
NAMES = st.text("ab1.-_q", max_size=8) | st.sampled_from(["block.1.to_q", "a.to_q", "to_q", "blocks.11.to_q"])


@settings(max_examples=400, deadline=None)
@given(
    patterns=st.lists(PATTERN | st.tuples(PATTERN, PATTERN).map("|".join), min_size=1, max_size=3),
    names=st.lists(NAMES, min_size=1),
)
def test_patterns_match_as_in_peft(patterns: list[str], names: list[str]) -> None:
    forms = {}
    for pattern in patterns:
        try:
            forms[pattern] = parse_pattern(pattern)
        except PatternError:
            assert len(re.findall(r"[*?]", pattern)) > 5  # which makes too many forms of it
            return
    for name in names:
        found = next((pattern for pattern in patterns if any(form.fits(name) for form in forms[pattern])), name)
        assert found == get_pattern_key(patterns, name)


def randomised_layers(model: torch.nn.Module) -> dict[str, BaseTunerLayer]:
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    with torch.no_grad():
        for layer in layers.values():
            for name, parameter in layer.named_parameters():
                if "base_layer" not in name:
                    parameter.copy_(torch.rand_like(parameter) * 0.5 + 0.1)
    return layers


LYCORIS = {
    "LoCon": (LoConModule, {"lora_dim": 2, "alpha": 1}),
    "LoKr": (LokrModule, {"lora_dim": 2, "alpha": 1, "factor": 4}),
    "LoKr, both sides factored": (LokrModule, {"lora_dim": 1, "alpha": 3, "factor": 4, "decompose_both": True}),
    "LoKr, no products": (LokrModule, {"lora_dim": 9, "alpha": 2, "factor": 2, "full_matrix": True}),
    "LoCon, rank-stabilised": (LoConModule, {"lora_dim": 2, "alpha": 1, "rs_lora": True}),
    "LoHa": (LohaModule, {"lora_dim": 2, "alpha": 1}),
}


@pytest.mark.parametrize(
    "dora", [{}, {"weight_decompose": True, "wd_on_out": True}, {"weight_decompose": True, "wd_on_out": False}]
)
@pytest.mark.parametrize("name", LYCORIS)
def test_lycoris_makes_the_same(name: str, dora: dict[str, bool], shapes: Shapes, base: Base, read: Read) -> None:
    torch.manual_seed(2)
    kind, options = LYCORIS[name]
    file, expected = LoraFile(), {}
    modules = [
        *file_modules(shapes, "kohya"),
        *(one for one in file_modules(shapes, "LyCORIS") if "context_embedder" in one.stem),
    ]
    for module in [one for one in modules if re.search("blocks_1|adaLN|context_embedder", one.stem)]:
        weights = [base(module.component, f"{one}.weight") for one in module.names]
        whole = in_file_order(module, torch.cat(weights))
        linear = torch.nn.Linear(whole.shape[1], whole.shape[0], bias=False)
        linear.weight.data = whole.clone()
        adapter = kind(module.stem, linear, multiplier=1.0, **options, **dora)
        with torch.no_grad():
            for part in adapter.parameters():
                part.copy_(torch.rand_like(part) * 0.5 + 0.1)
        file.tensors |= {
            f"{module.stem}.{part}": tensor.detach() for part, tensor in adapter.custom_state_dict().items()
        }
        adapter.apply_to()
        changed = in_file_order(module, linear(torch.eye(whole.shape[1])).T.detach() - whole)
        parts = changed.split([len(weight) for weight in weights])
        expected |= {(module.component, f"{one}.weight"): part for one, part in zip(module.names, parts, strict=True)}
    found = differences(read(file), base)
    assert found.keys() == expected.keys()
    for where, difference in expected.items():
        torch.testing.assert_close(found[where], difference, rtol=1e-3, atol=2e-5)


def test_tuckers_core_is_multiplied_in(base: Base, read: Read) -> None:
    stem, draw = "lycoris_context_embedder", torch.Generator().manual_seed(0)
    first, core = torch.randn(4, 4, generator=draw), torch.randn(2, 2, generator=draw)
    left, right = torch.randn(2, 4, generator=draw), torch.randn(2, 6, generator=draw)
    parts = {"lokr_w1": first, "lokr_t2": core[:, :, None, None], "lokr_w2_a": left, "lokr_w2_b": right}
    (found,) = differences(read(LoraFile({f"{stem}.{part}": tensor for part, tensor in parts.items()})), base).values()
    torch.testing.assert_close(found, torch.kron(first, rebuild_tucker(core, left, right)))


def test_locons_core_is_multiplied_in(base: Base, read: Read) -> None:
    stem, draw = "lora_unet_double_blocks_0_img_mlp_0", torch.Generator().manual_seed(0)
    up, core, down = (torch.randn(shape, generator=draw) for shape in ((64, 3), (3, 3, 1, 1), (3, 16)))
    parts = {"lora_up.weight": up, "lora_mid.weight": core, "lora_down.weight": down, "alpha": torch.tensor(1.5)}
    (found,) = differences(read(LoraFile({f"{stem}.{part}": tensor for part, tensor in parts.items()})), base).values()
    torch.testing.assert_close(found, rebuild_tucker(core[..., 0, 0], up.T, down) / 2)


def in_file_order(module: FileModule, rows: Tensor) -> Tensor:
    return rows.roll(len(rows) // 2, 0) if module.swapped else rows


# What is refused


def refusal(read: Read, file: LoraFile) -> str:
    with pytest.raises(LoraError) as caught:
        read(file)
    text = str(caught.value)
    assert text.startswith("acme/lora")
    assert "\n" not in text
    assert len(text) < 700
    return text


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_refused_or_right(data: st.DataObject, shapes: Shapes, base: Base, read: Read) -> None:
    dialect, kind = data.draw(st.sampled_from(DIALECTS)), data.draw(st.sampled_from(KINDS))
    file = make_lora(shapes, dialect, kind, alpha=data.draw(st.sampled_from([None, 3.0])), only=SOME)
    key = data.draw(st.sampled_from(sorted(file.tensors)))
    damage = data.draw(st.sampled_from(["drop", "truncate", "widen", "transpose", "rename", "move", "type", "nan"]))
    tensor = file.tensors.pop(key)
    if damage in ("truncate", "widen") and tensor.ndim:
        side = data.draw(st.integers(0, tensor.ndim - 1))
        longer = torch.cat([tensor, tensor], side)
        file.tensors[key] = longer.narrow(side, 0, tensor.shape[side] + (1 if damage == "widen" else -1))
    elif damage == "transpose":
        assume(tensor.ndim > 1)
        file.tensors[key] = tensor.t().contiguous()
        if tensor.shape[0] == tensor.shape[1]:
            file.tensors[key] = tensor  # it cannot be seen
    elif damage == "rename":
        index = data.draw(st.integers(0, len(key) - 1))
        file.tensors[key[:index] + "x" + key[index + 1 :]] = tensor
    elif damage == "move":
        other = data.draw(st.sampled_from(sorted(file.tensors)))
        file.tensors[key.rpartition(".")[0] + "." + other.rpartition(".")[2]] = tensor
    elif damage == "type":
        file.tensors[key] = tensor.int()
    elif damage == "nan":
        file.tensors[key] = torch.full_like(
            tensor, data.draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
        )
    try:
        lora = read(file)
    except LoraError:
        return
    update_is_gone = damage == "drop" and kind == "diff"
    found = differences(lora, base)
    assert found.keys() == file.makes.keys() or update_is_gone
    for where, difference in found.items():
        torch.testing.assert_close(difference.double(), file.makes[where](base), rtol=1e-4, atol=2e-5)


def with_parts(file: LoraFile, **parts: Tensor) -> LoraFile:
    """The file, each key that ends so replaced; a `None` is taken out."""
    for key in list(file.tensors):
        if (part := key.rpartition(".")[2]) in parts:
            file.tensors[key] = parts[part]
    return file


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_are_not_finite_are_refused(dtype: torch.dtype, shapes: Shapes, base: Base, read: Read) -> None:
    file = make_lora(shapes, "diffusers", only=r"blocks\.1\.attn\.to_q", dtype=dtype)
    key = "transformer.transformer_blocks.1.attn.to_q.lora_B.weight"
    good = file.tensors[key]
    none = [float("nan")] if dtype == torch.float8_e4m3fn else [float("nan"), float("inf"), -float("inf")]
    for sign, value in product((1, -1), [torch.finfo(dtype).max, 0, *none]):
        numbers = good.float()
        numbers[3, 1] = sign * value
        file.tensors[key] = numbers.to(dtype)
        if value in none:
            assert f"{key} holds numbers that are not finite" in refusal(read, file)
        else:
            read(file)


@pytest.mark.parametrize(
    ("kind", "dtype", "fits", "too_large"),
    [
        ("lora", torch.float16, 65504, None),
        ("lora", torch.bfloat16, 1e19, 3.3e38),
        ("lora", torch.float32, 1e19, 2e19),
        ("lora", torch.float64, 1e19, 1e300),
        ("lokr", torch.float32, 1e12, 1e13),
        ("lokr_both", torch.float32, 1e9, 1e10),
        ("loha", torch.float32, 1e9, 1e10),
        ("diff", torch.float32, 1e38, 3.4e38),
        ("diff", torch.float64, 1e38, 1e39),
        ("dora_out", torch.float32, 1e6, 1e9),
    ],
)
def test_factors_whose_product_no_weight_can_hold_are_refused(
    kind: str, dtype: torch.dtype, fits: float, too_large: float | None, shapes: Shapes, base: Base, read: Read
) -> None:
    file = make_lora(shapes, "diffusers", kind, dtype=torch.float64, rank=1, only=r"blocks\.1\.attn\.to_q")

    def filled(number: float) -> LoraFile:
        return replace(
            file, tensors={key: torch.full_like(one, number, dtype=dtype) for key, one in file.tensors.items()}
        )

    for difference in differences(read(filled(fits)), base).values():
        assert difference.bfloat16().isfinite().all()
    if too_large is not None:
        assert refusal(read, filled(too_large)).endswith("to_q holds numbers that are too large for a weight.")


def test_a_scale_that_makes_factors_too_large_is_refused(shapes: Shapes, read: Read) -> None:
    file = make_lora(shapes, "diffusers", alpha=1, dtype=torch.float64, only=r"blocks\.1\.attn\.to_q")
    file = with_parts(file, alpha=torch.tensor(1e300, dtype=torch.float64))
    assert "too large for a weight" in refusal(read, file)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 0.0])
def test_an_alpha_that_means_nothing_is_refused(alpha: float, shapes: Shapes, read: Read) -> None:
    file = with_parts(make_lora(shapes, "kohya", only=SOME), alpha=torch.tensor(alpha))
    assert re.search(r"is damaged: \S+\.alpha is (nan|inf|0)\.", refusal(read, file))


def test_an_alpha_without_a_meaning_is_not_looked_at(shapes: Shapes, base: Base, read: Read) -> None:
    """ai-toolkit writes 9999999999 beside LoKr matrices that are no products, which is infinite in float16."""
    file = make_lora(shapes, "LyCORIS", "lokr_full", only=SOME)
    assert_makes(read(with_parts(file, alpha=torch.tensor(9999999999.0).half())), file, base)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: tensors.pop(LAST + ".lora_B.weight"), r"proj_out has no lora_B or lora_up"),
        (lambda tensors: tensors.pop(LAST + ".lora_A.weight"), r"proj_out has no lora_A or lora_down"),
        (lambda tensors: tensors.pop(LAST + ".alpha"), r"proj_out has no alpha, as others have"),
        (
            lambda tensors: tensors.update({LAST + ".lora_A.weight": torch.ones(4, 17)}),
            r"for a weight of 16 x 17, here it is 16 x 80",
        ),
        (
            lambda tensors: tensors.update({LAST + ".lora_A.weight": torch.ones(3, 80)}),
            r"the parts of \S+proj_out do not fit each other",
        ),
        (
            lambda tensors: tensors.update({LAST + ".lora_A.weight": torch.ones(4, 80).int()}),
            r"lora_A.weight is of type I32",
        ),
        (lambda tensors: tensors.update({LAST + ".lora_A.default.weight": torch.ones(4, 80)}), r"is there twice"),
        (lambda tensors: tensors.update({LAST + ".alpha": torch.ones(2)}), r"proj_out.alpha does not fit"),
        (lambda tensors: tensors.update({LAST + ".dora_scale": torch.ones(7, 1)}), r"proj_out.dora_scale does not fit"),
        (lambda tensors: tensors.update({LAST + ".diff_b": torch.ones(7)}), r"proj_out.diff_b does not fit"),
        (lambda tensors: tensors.update({LAST + ".diff": torch.ones(16, 80)}), r"holds several kinds of update"),
        (
            lambda tensors: tensors.update({"transformer.secret.lora_A.weight": torch.ones(1)}),
            r"nothing here is called transformer.secret.lora_A",
        ),
        (
            lambda tensors: tensors.update({f"transformer.x{i}.alpha": torch.ones(1) for i in range(9)}),
            r"x2.alpha and 6 more",
        ),
        (lambda tensors: tensors.update({"\n" * 5000: torch.ones(1)}), r"nothing here is called '\\n"),
        (
            lambda tensors: tensors.update(
                {"transformer.proj_out.weight": torch.ones(64, 16)}
            ),  # PEFT's modules_to_save
            r"cannot be used: transformer.proj_out.weight are whole weights, not updates",
        ),
        (
            lambda tensors: tensors.update({"lora_unet_single_blocks_1_linear2.diff": torch.ones(16, 80)}),
            r"single_blocks_1_linear2\b.* are about the same weight and differ",
        ),
    ],
)
def test_what_is_wrong_is_said(
    change: Callable[[dict[str, Tensor]], Any], says: str, shapes: Shapes, read: Read
) -> None:
    file = make_lora(shapes, "diffusers", alpha=2, only=r"single\S+1\.")
    change(file.tensors)
    assert re.search(says, refusal(read, file))


LAST = "transformer.single_transformer_blocks.1.proj_out"


def test_a_file_that_is_not_whole_is_refused(shapes: Shapes, tmp_path: Path) -> None:
    path = make_lora(shapes, "kohya", only=SOME).save(tmp_path / "lora.safetensors")
    content = path.read_bytes()
    for damaged in (b"", content[:5], content[:-1], content + b"0", b"\xff" * 100):
        path.write_bytes(damaged)
        with pytest.raises(LoraError, match=r"^it is not a whole safetensors file"):
            read_lora(path, shapes, "it")


def test_a_header_that_is_too_large_is_not_parsed(tmp_path: Path) -> None:
    """A million tensors take some ten seconds and a gigabyte; refusing them costs neither."""
    path = tmp_path / "lora.safetensors"
    entry = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    for entries, padding, says in (
        (MOST_TENSORS + 1, b"", f"it has {MOST_TENSORS + 1} tensors"),
        (1, b" " * MOST_BYTES, "it has a header of 250000"),
    ):
        header = b"{" + b",".join(entry % i for i in range(entries)) + padding + b"}"
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        tracemalloc.start()
        with pytest.raises(LoraError, match=f"^{says}"):
            read_lora(path, {}, "it")
        assert tracemalloc.get_traced_memory()[1] < 3 * MOST_BYTES
        tracemalloc.stop()


PAIR = (".lora_A.weight", ".lora_B.weight")
OTHER_FAMILIES = [
    (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight",
        (4, 2048),
        "SDXL, not a LoRA for FLUX.1",
    ),
    (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight",
        (4, 768),
        "Stable Diffusion 1.5",
    ),
    ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k.lora_A.weight", (4, 320), "1.5, 2 or SDXL"),
    ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", (4, 1280), "SDXL"),
    ("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight", (4, 1536), "Stable Diffusion 3"),
    ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", (4, 1536), "Stable Diffusion 3 Medium"),
    ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", (4, 2432), "Stable Diffusion 3.5 Large"),
    ("diffusion_model.double_stream_modulation_img.lin.lora_A.weight", (4, 6144), "FLUX.2"),
    ("diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight", (4, 6144), r"FLUX.2 \[dev\]"),
    ("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight", (4, 3072), "FLUX.2"),
    ("transformer.transformer_blocks.0.img_mlp.net.0.proj.lora_A.weight", (4, 3072), "Qwen-Image"),
    ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", (4, 5120), "Wan"),
    ("lora_unet_blocks_0_cross_attn_k.lora_down.weight", (4, 5120), "Wan"),
    ("transformer.blocks.0.attn1.to_q.lora_A.weight", (4, 5120), "Wan"),
    ("diffusion_model.blocks.0.self_attn.q_proj.lora_A.weight", (4, 2048), "Cosmos"),
    ("diffusion_model.layers.0.attention.to_q.lora_A.weight", (4, 3840), "Z-Image"),
    ("lora_unet_layers_0_attention_to_q.lora_down.weight", (4, 3840), "Z-Image"),
    ("transformer.double_blocks.0.img_attn_qkv.lora_A.weight", (4, 3072), "HunyuanVideo"),
    ("lora_unet_double_blocks_0_img_mod_linear.lora_down.weight", (4, 3072), "HunyuanVideo"),
    ("lora_unet_double_blocks_0_img_attn_q.lora_down.weight", (4, 3584), "HunyuanImage"),
    ("diffusion_model.nerf_blocks.0.param_generator.lora_A.weight", (4, 3072), "Chroma"),
    ("transformer.visual_transformer_blocks.0.self_attention.to_query.lora_A.weight", (4, 4096), "Kandinsky"),
    ("double_blocks.0.img_attn.qkv.weight.absmax", (4,), "a whole model"),
    ("transformer.transformer_blocks.0.attn1.to_q.lora_A.weight", (4, 2048), "LTX-Video"),
    ("diffusion_model.distilled_guidance_layer.layers.0.in_layer.lora_A.weight", (4, 5120), "Chroma"),
    ("diffusion_model.double_stream_blocks.0.block.ff_i.w1.lora_A.weight", (4, 2560), "HiDream"),
    ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", (4, 4096), "a language model"),
    ("double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight", (3072, 4096), "an IP-Adapter"),
    ("\n\n.ip_adapter" * 500, (4, 768), "an IP-Adapter"),
    ("emb_params", (4, 768), "a textual-inversion embedding"),
    ("bundle_emb.sks.clip_l", (4, 768), "textual-inversion embeddings in it"),
    ("controlnet_x_embedder.lora_A.weight", (4, 64), "a ControlNet"),
    ("transformer.transformer_blocks.0.attn.to_q.oft_blocks", (4, 8, 8), "an OFT or BOFT adapter"),
    ("transformer_blocks.0.qkv_proj.lora_down", (4, 3072), "Nunchaku"),
    ("single_transformer_blocks.0.norm.linear.lora_up", (9216, 16), "Nunchaku"),
    ("transformer_blocks.0.attn.processor.q_loras.0.down.weight", (128, 3072), "an EasyControl LoRA"),
    ("base_model.model.transformer_blocks.0.attn.to_q.lora_E", (4, 1), "an AdaLoRA adapter, which is not supported"),
    ("transformer.transformer_blocks.0.attn.to_q.lora_training_steps", (1,), "a SingLoRA adapter"),
    ("lycoris_transformer_blocks_0_attn_to_q.on_input", (1,), "a LyCORIS adapter of the kind IA3"),
    ("lycoris_transformer_blocks_0_attn_to_q.lambda_layer", (1, 4), "a LyCORIS adapter of the kind T-LoRA"),
    ("diffusion_model.blocks.0.attn.wq.lora_A.weight", (4, 6144), "Krea 2"),
    ("transformer.transformer_blocks.0.attn.to_gate.lora_A.weight", (4, 6144), "Krea 2"),
    ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", (4, 6144), r"FLUX.2 \[dev\] or Krea 2"),
    ("diffusion_model.layers.0.attention.o.lora_A.weight", (4, 4608), "Ideogram"),
    ("diffusion_model.layers.0.self_attention.to_q.lora_A.weight", (4, 4096), "ERNIE-Image"),
    ("base_model.model.transformer_blocks.0.attn.to_q.new_thing", (4,), "an adapter of a kind that is not known"),
    ("transformer_blocks.0.attn.to_q.new_thing", (4,), "an adapter of a kind that is not known"),
    ("double_blocks.0.img_attn.norm.query_norm.scale", (8,), "a FLUX.1 Control LoRA"),
    (
        "transformer.x_embedder.lora_A.weight",
        (4, 128),
        "a FLUX.1 Control LoRA: its input layer has 128 channels, this model's has 64",
    ),
    ("transformer.x_embedder.lora_A.weight", (4, 384), "such as Fill"),
    ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", (48, 16), "a whole model"),
    (
        "transformer.transformer_blocks.18.attn.to_q.lora_A.weight",
        (4, 3072),
        "3072 wide and has at least 19 double and 0 single blocks; this model is 16 wide and has 2 and 2",
    ),
    ("lora_unet_single_blocks_37_linear1.lora_down.weight", (4, 3072), "3072 wide and has at least 0 double and 38"),
    (
        "transformer.transformer_blocks.2.attn.to_q.lora_A.weight",
        (4, 16),
        "3 double and 0 single blocks; this model is 16 wide",
    ),
]


@pytest.mark.parametrize(("key", "shape", "says"), OTHER_FAMILIES)
def test_another_family_is_told_by_name(key: str, shape: tuple[int, ...], says: str, read: Read) -> None:
    tensors = {key: torch.zeros(shape)}
    for down, up in (PAIR, (".lora_down.weight", ".lora_up.weight")):
        if key.endswith(down):
            tensors[key.removesuffix(down) + up] = torch.zeros(shape[1], shape[0])
    if key.endswith(".scale"):
        tensors["double_blocks.0.img_attn.proj.lora_A.weight"] = torch.zeros(4, 16)
    assert re.search(says, refusal(read, LoraFile(tensors)))


@pytest.mark.parametrize("tuner", [tuner for tuner in PeftType if tuner not in ("LORA", "LOKR", "LOHA", "ADALORA")])
def test_every_other_adapter_of_peft_is_told_by_name(tuner: PeftType, read: Read) -> None:
    key = f"base_model.model.transformer_blocks.0.attn.to_q.{PEFT_TYPE_TO_PREFIX_MAPPING[tuner]}A"
    said = refusal(read, LoraFile({key: torch.zeros(4)}))
    assert "which is not supported (it has " in said
    assert tuner.value.lower().replace("_", "") in re.sub(r"\W", "", said.lower())


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (IA3Config(target_modules=["to_q"], feedforward_modules=[]), "IA3"),
        (VeraConfig(target_modules=["to_q"], r=2), "VeRA"),
        (MissConfig(target_modules=["to_q"], r=2), "MiSS"),
        (HRAConfig(target_modules=["to_q"], r=2), "HRA"),
        (FourierFTConfig(target_modules=["to_q"], n_frequency=4), "FourierFT"),
        (RandLoraConfig(target_modules=["to_q"], r=2), "RandLoRA"),
    ],
)
def test_an_adapter_that_peft_wrote_is_told_by_name(config: Any, kind: str, read: Read) -> None:
    file = LoraFile(get_peft_model_state_dict(get_peft_model(new_models(1, 1)["transformer"], config)))
    assert f"is an adapter of PEFT's kind {kind}, which is not supported" in refusal(read, file)


@pytest.mark.parametrize(
    ("stem", "down", "up", "says"),
    [
        (
            "single_blocks.3.linear1",
            3072,
            27648,
            r"FLUX.2 \[klein\] 4B, not a LoRA for FLUX.1 .* weight of 27648 x 3072",
        ),
        ("single_blocks.3.linear2", 12288, 3072, r"FLUX.2 \[klein\] 4B"),
        ("double_blocks.3.txt_mlp.2", 9216, 3072, r"FLUX.2 \[klein\] 4B"),
        ("double_blocks.3.img_mlp.0", 4096, 24576, r"FLUX.2 \[klein\] 9B"),
        ("single_blocks.40.linear2", 24576, 6144, r"FLUX.2 \[dev\]"),
    ],
)
def test_flux_2_is_told_by_its_sizes(
    stem: str, down: int, up: int, says: str, flux_shapes: Shapes, tmp_path: Path
) -> None:
    for parts in (
        {"lora_A.weight": (4, down), "lora_B.weight": (up, 4)},
        {"lokr_w1": (16, 16), "lokr_w2_a": (up // 16, 4), "lokr_w2_b": (4, down // 16)},
    ):
        tensors = {f"diffusion_model.{stem}.{part}": torch.zeros(shape) for part, shape in parts.items()}
        with pytest.raises(LoraError, match=f"^it is a LoRA for {says}"):
            read_lora(LoraFile(tensors).save(tmp_path / "lora.safetensors"), flux_shapes, "it")


FOREIGN = [
    ({"modelspec.architecture": "chroma/lora", "ss_base_model_version": "chroma"}, "Chroma"),
    ({"ss_base_model_version": "flux2_klein_4b"}, r"FLUX.2 \[klein\] 4B"),
    ({"modelspec.architecture": "flux2-klein-base-9b/lora"}, r"FLUX.2 \[klein\] 9B"),
    ({"modelspec.architecture": "Flux.2-dev/lora"}, "FLUX.2"),
    ({"ss_base_model_version": "qwen_image"}, "Qwen-Image"),
    ({"modelspec.architecture": "sd3-medium/lora"}, "Stable Diffusion 3"),
    ({"adapter_config.json": json.dumps({"base_model_name_or_path": "Qwen/Qwen-Image"})}, "Qwen-Image"),
    ({"lora_adapter_metadata": json.dumps({"transformer.base_model_name_or_path": "lodestones/Chroma1-HD"})}, "Chroma"),
]
OURS = [
    {"modelspec.architecture": "flux-1-dev/lora", "ss_base_model_version": "flux1"},
    {"modelspec.architecture": "flux-kontext/lora"},
    {"ss_base_model_version": "flux.1_kontext"},
    {"ss_base_model_version": "sd_1.5"},  # of ai-toolkit, until April 2025
    {"adapter_config.json": json.dumps({"base_model_name_or_path": "/models/chroma/FLUX.1-dev", "r": 4})},
    {"adapter_config.json": json.dumps({"base_model_name_or_path": None, "r": 4}), "modelspec.architecture": "lora"},
]


def test_what_metadata_names_is_not_taken_for_flux_1(shapes: Shapes, base: Base, read: Read) -> None:
    """Of other models that call their layers so, and are as wide: nothing else tells a LoRA for them."""
    for metadata, family in FOREIGN:
        file = make_lora(shapes, "ComfyUI", only="double_blocks.*attn")
        file.metadata = metadata
        assert re.search(
            rf"^acme/lora is a LoRA for {family}, not for FLUX.1 \(its metadata says ", refusal(read, file)
        )
    for metadata in OURS:
        file = make_lora(shapes, "PEFT", only="attn", alpha=4)
        file.metadata = metadata
        assert_makes(read(file), file, base)


def test_an_unknown_family_is_told_by_its_metadata(read: Read) -> None:
    for metadata, says in (
        ({"ss_base_model_version": "new_1"}, "; its metadata says that it is for new_1."),
        (OURS[0], ""),
    ):
        file = LoraFile({f"diffusion_model.new.{i}.lora_A.weight": torch.ones(1, 1) for i in "ab"}, metadata)
        assert refusal(read, file).endswith(f"diffusion_model.new.b.lora_A.weight{says or '.'}")


@pytest.mark.parametrize(
    ("only", "metadata", "doubtful"),
    [
        (r"double_blocks\.[0-4]\.\S*attn", {}, True),
        (r"double_blocks\.[0-4]\.\S*attn", {"ss_base_model_version": "flux1"}, False),
        (r"double_blocks\.[0-5]\.\S*attn", {}, False),
        (r"double_blocks\.[0-4]\.", {}, False),
    ],
)
def test_what_fits_klein_as_well_is_said(
    only: str,
    metadata: dict[str, str],
    doubtful: bool,
    flux_shapes: Shapes,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = make_lora(flux_shapes, "ComfyUI", rank=1, only=only)
    file.metadata = metadata
    read_lora(file.save(tmp_path / "lora.safetensors"), flux_shapes, "it")
    assert ("it may be for FLUX.2 [klein] 4B" in caplog.text) == doubtful


def test_a_lora_for_dev_says_so_to_schnell(shapes: Shapes, tmp_path: Path) -> None:
    schnell = shapes_of(**new_models(2, 2, guidance=False))
    for dialect in ("diffusers", "kohya"):
        path = make_lora(shapes, dialect, only="guidance|blocks").save(tmp_path / "lora.safetensors")
        with pytest.raises(LoraError, match=r"it is for FLUX\.1 dev: it changes the guidance embedder"):
            read_lora(path, schnell, "it")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"peft_type": "IA3"}, "is for IA3, which is not supported"),
        ({"r": 8}, "says rank 8 for single_transformer_blocks.1.attn.to_q, which has 4"),
        ({"r": 4, "lora_alpha": 0}, "says alpha 0 and rank 4"),
        ({"r": 4, "init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the base model"),
        ({"r": 4, "alora_invocation_tokens": [1]}, "uses alora_invocation_tokens, which is not supported"),
        ({"r": "many"}, "is not understood"),
        ({"r": 4, "alpha_pattern": {"(a+)+": 1}}, "is not understood"),
        ({"r": 4, "alpha_pattern": {"[": 1}}, "is not understood"),
        ({"r": 4, "rank_pattern": {r"(.|\w)" * 36 + "!": 8}}, r"is not understood: '\(\.\|.* is none"),
        ({"r": 4, "rank_pattern": {".*.*.*.*.*.*.*.*": 8}}, "is not understood"),
        ({"r": 4, "rank_pattern": {f".*{i}": 8 for i in range(999)}}, "is not understood: it has too many patterns"),
        ({"r": 4, "rank_pattern": {"(" * 3000: 8}}, "is not understood"),
        ({"r": 10**400}, "is not understood"),
        ({"r": 4, "alpha_pattern": {"to_q": 10**400}}, "is not understood"),
        (["r"], "is not a JSON object"),
    ],
)
def test_a_peft_configuration_that_cannot_be_followed_is_refused(
    config: Any, says: str, shapes: Shapes, read: Read
) -> None:
    file = make_lora(shapes, "PEFT", only=r"blocks\.1\.attn\.to_q")
    file.metadata = {"adapter_config.json": json.dumps(config)}
    assert re.search(says, refusal(read, file))
