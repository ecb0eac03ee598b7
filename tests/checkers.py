"""Safety checkers with tiny random weights, in the folders and under the names that the published ones have."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, ViTConfig, ViTForImageClassification

CLIP_PREPROCESSOR = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 224,
}
VIT_PREPROCESSOR = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "ViTImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,
    "rescale_factor": 1 / 255,
    "size": {"height": 224, "width": 224},
}


def write_concepts(folder: Path, weights: Mapping[str, torch.Tensor] | None = None, *, seed: int = 0) -> Path:
    """CompVis's checker. `weights` replace tensors by name, such as `concept_embeds_weights`, the 17 thresholds."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config={**vision, "patch_size": 14}, text_config=text, projection_dim=12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = StableDiffusionSafetyChecker(config)
        state = {"concept_embeds": torch.randn(17, 12), "special_care_embeds": torch.randn(3, 12), **(weights or {})}
    model.load_state_dict(state, strict=False)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(CLIP_PREPROCESSOR))
    file = folder / "model.safetensors"
    tensors = {name.replace("vision_model.", "vision_model.vision_model."): t for name, t in load_file(file).items()}
    tensors["vision_model.vision_model.embeddings.position_ids"] = torch.arange(257)[None]
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def write_vit(
    folder: Path,
    *,
    nsfw_bias: float = 0.0,
    labels: tuple[str, ...] = ("normal", "nsfw"),
    preprocessor: Mapping[str, Any] = VIT_PREPROCESSOR,
    patch_weight: float | None = None,
    **config: Any,
) -> Path:
    """Falconsai's classifier. `nsfw_bias` pushes its verdict, `patch_weight` fills the first layer."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"initializer_range": 0.4, **config}  # small weights would give every picture the same score
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ViTForImageClassification(
            ViTConfig(id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)}, **sizes)
        )
    state = model.state_dict()
    state["classifier.bias"][-1] = nsfw_bias
    if patch_weight is not None:
        state["vit.embeddings.patch_embeddings.projection.weight"].fill_(patch_weight)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(preprocessor)))
    return folder
