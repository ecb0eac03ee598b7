"""A dialect, a hub and a checker that nobody has heard of: each is added where such things are listed and nowhere else,
and one request goes through all three."""

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

import predict
import safety
import settings as settings_module
from fetch import references
from lora import names
from safety import BlockedError, Checker, Scores
from settings import Settings
from tests.shelf import shelf_hub
from tests.web import Web, serve

CPU = torch.device("cpu")


@pytest.fixture
def web() -> Iterator[Web]:
    with serve(Web()) as web:
        yield web


def test_a_dialect_a_hub_and_a_checker_have_one_place_each(
    environment: dict[str, str],
    web: Web,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    acme = names.Dialect(
        "Acme", prefixes={"acme:": "transformer"}, suffixes={"down": "=in", "up": "=out", "alpha": "=alpha"}
    )
    monkeypatch.setattr(names, "DIALECTS", (*names.DIALECTS, acme))

    monkeypatch.setattr(references, "HUBS", (*references.HUBS, shelf_hub(web.url)))

    def load_brightness(settings: Settings, device: torch.device) -> Checker:
        def score(pictures: Sequence[Image.Image]) -> Scores:
            return np.array([[np.asarray(picture).mean()] for picture in pictures], np.float32)

        return Checker("brightness", score, {"brightness": settings.safety_vit_limit * 255})

    monkeypatch.setitem(safety.CHECKERS, "brightness", load_brightness)
    monkeypatch.setattr(settings_module, "SAFETY_MODELS", (*settings_module.SAFETY_MODELS, "brightness"))

    factors = {"=in": torch.ones(2, 32), "=out": torch.full((32, 2), 0.01), "=alpha": torch.tensor(2.0)}
    layer = "acme:transformer_blocks.0.attn.to_q"
    web.files["/api/cars.safetensors"] = save({layer + suffix: value for suffix, value in factors.items()})
    for name, value in {**environment, "LORA_CACHE_DIR": str(tmp_path), "SAFETY_MODEL": "brightness"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SAFETY_VIT_LIMIT", "1")
    predictor = predict.Predictor()
    predictor.setup()
    defaults = {name: one.default.default for name, one in inspect.signature(predictor.run).parameters.items()}
    request = {**defaults, "prompt": "x", "megapixels": "0.25", "num_inference_steps": 1, "seed": 1}
    with caplog.at_level("INFO"):
        assert len(predictor.run(**{**request, "replicate_weights": "shelf.test/cars"})) == 1
    assert "shelf.test/cars at 1 (from download): Acme, rank 2" in caplog.text
    assert "picture 0 shown, brightness" in caplog.text
    predictor.screener.checker = load_brightness(Settings(**{**vars(predictor.settings), "safety_vit_limit": 0.0}), CPU)
    with pytest.raises(BlockedError):
        predictor.run(**request)
    predictor.output_folders.cleanup()
