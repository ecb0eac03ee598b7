"""Any program's LoRA file becomes the same updates; what is no LoRA for this model is refused by name."""

from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from lora_formats import LoraUpdates, read_lora
from lora_names import Shapes
from tests.lora_files import DIALECTS, KINDS, Base, LoraFile, base_of, make_lora, shapes_of

WIDTH = 16


@pytest.fixture(scope="module")
def models() -> dict[str, torch.nn.Module]:
    """As deep as FLUX.1-dev, so that every key of a real file has a home, and as narrow as can be."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=19,
        num_single_layers=38,
        attention_head_dim=WIDTH // 2,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=12,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    clip = CLIPTextConfig(
        vocab_size=10, hidden_size=12, intermediate_size=48, num_hidden_layers=12, num_attention_heads=2
    )
    t5 = T5Config(
        vocab_size=10, d_model=24, d_ff=60, d_kv=12, num_heads=2, num_layers=24, feed_forward_proj="gated-gelu"
    )
    return {"transformer": transformer, "text_encoder": CLIPTextModel(clip), "text_encoder_2": T5EncoderModel(t5)}


@pytest.fixture(scope="module")
def shapes(models: dict[str, torch.nn.Module]) -> Shapes:
    return shapes_of(**models)


@pytest.fixture(scope="module")
def base(models: dict[str, torch.nn.Module]) -> Base:
    return base_of(**models)


def differences(lora: LoraUpdates, base: Base) -> dict[tuple[str, str], torch.Tensor]:
    return {
        (component, name): sum(update.difference(lambda one, c=component: base(c, one)) for update in updates)
        for component, named in lora.updates.items()
        for name, updates in named.items()
    }


def assert_makes(lora: LoraUpdates, file: LoraFile, base: Base) -> None:
    found = differences(lora, base)
    assert found.keys() == file.makes.keys()
    for where, difference in found.items():
        expected = file.makes[where](base)
        torch.testing.assert_close(difference.double(), expected, rtol=1e-4, atol=1e-5, msg=str(where))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_and_kind_becomes_what_its_formula_says(
    dialect: str, kind: str, shapes: Shapes, base: Base, tmp_path: Path
) -> None:
    file = make_lora(shapes, dialect, kind)
    lora = read_lora(file.save(tmp_path / "lora.safetensors"), shapes, "it")
    assert lora.dialect == dialect
    assert_makes(lora, file, base)
