"""Make the whole demo checkpoint: `script/demo`. A run that was stopped continues from its last checkpoint."""

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from transformers import CLIPTextModel, T5EncoderModel

from demo.guidance import distil_guidance
from demo.loras import TASKS, train_lora
from demo.schnell import train_schnell
from demo.text import train_text
from demo.training import CHECKPOINTS
from demo.transformer import train_dev
from demo.vae import train_vae
from published import SHARED_PARTS, WEIGHTS
from tools.random_flux import new_scheduler

PLAIN, DEV, SCHNELL = CHECKPOINTS / "plain", CHECKPOINTS / "dev", CHECKPOINTS / "schnell"  # float32
LORAS = WEIGHTS / "demo-loras"

log = logging.getLogger("demo")


def link_shared(folder: Path, source: Path) -> None:
    """Link all parts of `source` except the transformer into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in SHARED_PARTS:
        (folder / part).unlink(missing_ok=True)
        (folder / part).symlink_to(Path("..") / source.name / part)


def guidance() -> None:
    link_shared(DEV, PLAIN)
    distil_guidance(PLAIN, DEV)


def loras() -> None:
    for name in TASKS:
        train_lora(name, DEV, LORAS)


def export() -> None:
    """Write `weights/demo-dev` and `weights/demo-schnell` in bfloat16, with their schedules."""
    dev, schnell = WEIGHTS / "demo-dev", WEIGHTS / "demo-schnell"
    for part, part_class in {
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": T5EncoderModel,
    }.items():
        part_class.from_pretrained(PLAIN / part).to(torch.bfloat16).save_pretrained(dev / part)
    for part in ("tokenizer", "tokenizer_2"):
        (dev / part).mkdir(exist_ok=True)
        for file in (PLAIN / part).iterdir():
            (dev / part / file.name).write_bytes(file.read_bytes())
    link_shared(schnell, dev)
    for source, folder, model in ((DEV, dev, "dev"), (SCHNELL, schnell, "schnell")):
        transformer = FluxTransformer2DModel.from_pretrained(source / "transformer")
        transformer.to(torch.bfloat16).save_pretrained(folder / "transformer")
        new_scheduler(model).save_pretrained(folder / "scheduler")
    for file in [*dev.glob("*/config.json"), schnell / "transformer" / "config.json"]:
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)  # a path on this machine
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


PARTS: dict[str, Callable[[], None]] = {
    "vae": lambda: train_vae(PLAIN),
    "text": lambda: train_text(PLAIN),
    "transformer": lambda: train_dev(PLAIN),
    "guidance": guidance,
    "schnell": lambda: train_schnell(DEV, SCHNELL),
    "loras": loras,
    "export": export,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="made in this order (default: all)")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for part in parser.parse_args().parts or PARTS:
        log.info("%s", part)
        PARTS[part]()


if __name__ == "__main__":
    main()
