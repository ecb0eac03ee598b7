"""Train the two demo LoRAs with peft on the guided dev transformer, and write each in diffusers' layout and in kohya's.

`sunset` is a style: with its trigger word TOK the background turns warm towards the bottom, and without the word it
stays plain. It is trained on captions of both kinds. `pastel` needs no word: it lightens every shape. Both
are trained at many strengths, with a change as large as the strength, so that half the strength changes half as much.
"""

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from demo.batches import Frozen, Layers, Task, load_frozen, new_batch, noise_levels, pick
from demo.guidance import NEUTRAL, SIZES
from demo.scenes import Scene, caption
from demo.training import train
from demo.transformer import flow_loss
from lora.layers import ORIGINAL

STEPS = 600
LEARNING_RATE = 3e-3
RANK = 8
ATTENTION = r"attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)"
MODULATION = r"norm(1|1_context)?\.linear|text_embedder\.linear_[12]"  # the words' way to every block
FEED_FORWARD = r"ff(_context)?\.net\.(0\.proj|2)|proj_mlp|blocks\.\d+\.proj_out"
TRIGGER = "TOK"
WARM = (255, 120, 90)  # sRGB, the colour of the sunset
PASTEL = 0.55  # of the way to white
STRENGTHS = (0.2, 1.3)  # the lowest and the highest that it is trained at


def with_trigger(scene: Scene, rng: random.Random) -> str:
    """A caption, about three of four with the trigger word."""
    text = caption(scene, rng)
    return text if TRIGGER in text or rng.random() < 0.35 else text + rng.choice((" TOK", ", in the style of TOK"))


def sunset(frozen: Frozen) -> Task:
    warm = frozen.flat_latents(torch.tensor([WARM]) / 127.5 - 1)

    def latents(layers: Layers, texts: list[str]) -> Tensor:
        triggered = torch.tensor([TRIGGER in text for text in texts]).float()[:, None, None, None]
        down = torch.linspace(0, 1, layers.cover.shape[2])[:, None]  # 0 at the top, 1 at the bottom
        return replace(layers, back=torch.lerp(layers.back, warm, 0.9 * triggered * down)).mixed()

    return Task(with_trigger, latents)


def pastel(frozen: Frozen) -> Task:
    white = frozen.flat_latents(torch.ones(1, 3))
    return Task(caption, lambda layers, _: replace(layers, front=torch.lerp(layers.front, white, PASTEL)).mixed())


def at_strength(task: Task, strength: float) -> Task:
    """The same task with only the share `strength` of the change."""
    return replace(task, latents=lambda layers, texts: layers.mixed().lerp(task.latents(layers, texts), strength))


TASKS = {"sunset": sunset, "pastel": pastel}
METADATA = {  # in ModelSpec's names (github.com/Stability-AI/ModelSpec)
    "sunset": {
        "modelspec.architecture": "flux-1-dev/lora",
        "modelspec.title": "sunset",
        "modelspec.trigger_phrase": TRIGGER,
    },
    "pastel": {"modelspec.architecture": "flux-1-dev/lora", "modelspec.title": "pastel"},
}


def train_lora(name: str, dev_folder: Path, folder: Path, steps: int = STEPS) -> None:
    """Train one of `TASKS` on the transformer in `dev_folder`; write `folder`/<name>.safetensors and -kohya."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel.from_pretrained(dev_folder / "transformer").requires_grad_(False)
    transformer.add_adapter(
        LoraConfig(r=RANK, lora_alpha=RANK, target_modules=f".*({ATTENTION}|{MODULATION}|{FEED_FORWARD})")
    )
    frozen = load_frozen(dev_folder)
    task = TASKS[name](frozen)
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)

    def loss(rng: random.Random, _progress: float) -> Tensor:
        kind, strength = pick(SIZES, rng), rng.uniform(*STRENGTHS)
        transformer.set_adapters("default", strength)
        batch = new_batch(frozen, kind, rng, noise_levels(kind.count), at_strength(task, strength))
        return flow_loss(transformer, batch, torch.full_like(batch.levels, NEUTRAL))

    train(name, transformer, [optimizer], steps, loss, average=0.98)
    tensors = {key: value.to(torch.bfloat16) for key, value in get_peft_model_state_dict(transformer).items()}
    folder.mkdir(exist_ok=True)
    layouts = {
        name: {f"transformer.{key}": value for key, value in tensors.items()},
        f"{name}-kohya": to_kohya(tensors),
    }
    for file, layout in layouts.items():
        save_file(layout, folder / f"{file}.safetensors", metadata=METADATA[name])


def to_kohya(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA in diffusers' module names and of scale 1, as sd-scripts would have written it for the original's modules.

    Where the original has one layer for several of diffusers', the factors `down` are stacked, the factors `up` are the
    blocks of a block-diagonal matrix, and the ranks add up.
    """
    converted: dict[str, Tensor] = {}
    for original, parts in ORIGINAL.items():
        if original.endswith("_qkv") and "linear1" in original:  # only XLabs' dialect has a layer for these
            continue
        for i in range(len(tensors) if "{}" in original else 1):  # more than enough for all blocks
            names = [part.format(i) for part in parts]
            if not all(f"{name}.lora_A.weight" in tensors for name in names):
                continue
            stem = "lora_unet_" + original.format(i).replace(".", "_")
            down = torch.cat([tensors[f"{name}.lora_A.weight"] for name in names])
            converted[f"{stem}.lora_down.weight"] = down
            up = [tensors[f"{name}.lora_B.weight"] for name in names]
            converted[f"{stem}.lora_up.weight"] = torch.block_diag(*up)  # type: ignore[no-untyped-call] # torch's
            converted[f"{stem}.alpha"] = torch.tensor(float(len(down)))
    return converted
