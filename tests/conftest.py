"""What the tests share: tiny random checkpoints, and Cog's real server running the predictor on them."""

import base64
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before torch is loaded, and for the servers too: the models here are so small that threads which wait for each other
# cost more than they bring, and several times as much on a machine that has something else to do.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import requests
from PIL import Image

from published import SHARED_PARTS
from tools.random_flux import FluxSize, write_random_flux
from tools.server import cog_server, predict


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All parts of dev, and of schnell only its own: the others are the same, and a folder need not have them."""
    root = tmp_path_factory.mktemp("checkpoints")
    folders = {model: root / model for model in ("dev", "schnell")}
    for seed, (model, folder) in enumerate(folders.items()):
        write_random_flux(folder, FluxSize(double_blocks=2, single_blocks=2), model=model, seed=seed)
    for part in SHARED_PARTS:
        shutil.rmtree(folders["schnell"] / part)
    return folders


@dataclass
class Server:
    """A running predictor; calling it makes a prediction and returns coglet's whole answer."""

    url: str
    log: list[str] = field(default_factory=list)  # the lines that the predictor has logged

    def __call__(self, **inputs: Any) -> Any:
        return predict(self.url, inputs)

    def post(self, body: Any) -> requests.Response:
        return requests.post(f"{self.url}/predictions", json=body, timeout=None)  # pytest's own limit ends it

    def pictures(self, **inputs: Any) -> list[Image.Image]:
        """The output of a prediction that has to succeed."""
        answer = self(**inputs)
        assert answer["status"] == "succeeded", answer
        return [decode_picture(url) for url in answer["output"]]


@pytest.fixture(scope="session")
def environment(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a server needs to run on the tiny checkpoints, with a LoRA cache and a temporary folder of its own."""
    models = {f"FLUX_{model.upper()}": str(folder) for model, folder in checkpoints.items()}
    folders = {name: str(tmp_path_factory.mktemp(name)) for name in ("LORA_CACHE_DIR", "TMPDIR")}
    return models | folders


@pytest.fixture(scope="session")
def server(environment: dict[str, str]) -> Iterator[Server]:
    log: list[str] = []
    with cog_server(environment, on_log=log.append) as running:
        yield Server(running.url, log)
    assert running.process.returncode == 0


@pytest.fixture
def light(tmp_path: Path) -> dict[str, str]:
    """What a server needs to run the predictor of tests/light.py, which has no models."""
    folders = {"LORA_CACHE_DIR": str(tmp_path / "loras"), "TMPDIR": str(tmp_path)}
    return {"COG_PREDICT_TYPE_STUB": "tests/light.py:Predictor", **folders}


SMALL = {"prompt": "a red circle", "aspect_ratio": "custom", "width": 256, "height": 320, "output_format": "png"}


@pytest.fixture
def small() -> dict[str, Any]:
    """The inputs of a quick prediction whose pixels can be compared."""
    return {**SMALL, "num_inference_steps": 3, "seed": 5, "disable_safety_checker": True}


def decode_picture(data_url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data_url.split(",", 1)[1])))


def data_url(picture: Image.Image, kind: str = "PNG", **options: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return raw_data_url(buffer.getvalue(), f"image/{kind.lower()}")


def raw_data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """A picture with colour everywhere; 240 x 300 is neither square nor a multiple of 16 on both sides."""
    gradients = [Image.linear_gradient("L"), Image.radial_gradient("L"), Image.linear_gradient("L").rotate(90)]
    return Image.merge("RGB", gradients).resize((240, 300))


def same(a: Image.Image, b: Image.Image) -> bool:
    return np.array_equal(np.asarray(a.convert("RGB")), np.asarray(b.convert("RGB")))


def failure(answer: dict[str, Any]) -> str:
    """The sentence of a failed prediction, without what coglet puts before it."""
    assert answer["status"] == "failed", answer
    assert "Traceback" not in json.dumps(answer)
    sentence = re.sub(r"^(Prediction failed: )+\w+Error: ", "", answer["error"])
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence
