"""Every environment variable that the predictor reads, once, typed, with an error that names the variable."""

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

MB = 10**6
GB = 10**9
SAFETY_MODELS = ("two-stage", "vit", "open-nsfw")
T = TypeVar("T")


class SettingsError(ValueError):
    """An environment variable has a value that cannot be used; the message names it and says what would do."""


@dataclass(frozen=True)
class Settings:
    """What the operator decided. Tokens are left out of `repr`, so that no log can show them."""

    flux_dev: str | None  # a folder in diffusers layout or a Hugging Face repo id; None: look in weights/
    flux_schnell: str | None
    flux_device: str | None  # None: the first CUDA device, or the CPU where there is none
    flux_compile: bool | None  # None: on for CUDA, off elsewhere
    go_fast_lora_multiplier: float
    go_fast_cache_threshold: float | None  # None: every step runs every block
    lora_cache_dir: Path
    lora_cache_bytes: int
    lora_ram_bytes: int
    lora_max_bytes: int
    lora_allow_private_hosts: bool
    hf_endpoint: str
    civitai_endpoint: str
    replicate_endpoint: str
    safety_model: str | None  # one of SAFETY_MODELS; None: the two-stage one where its weights are at hand
    safety_concepts: str | None  # a folder or a Hugging Face repo id, as is the next
    safety_vit: str | None
    safety_concept_limit: float
    safety_vit_limit: float
    safety_open_nsfw_limit: float
    safety_timeout: float  # seconds
    safety_check_inputs: bool
    hf_token: str | None = field(repr=False)
    civitai_api_token: str | None = field(repr=False)
    replicate_api_token: str | None = field(repr=False)


def read_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """Read the environment. Raises `SettingsError` on the first variable that cannot be used."""

    def read(name: str, parse: Callable[[str], T], default: T) -> T:
        if name not in environment:
            return default
        try:
            return parse(environment[name].strip())
        except ValueError as error:
            raise SettingsError(f"The environment variable {name} {error}.") from None

    return Settings(
        flux_dev=read("FLUX_DEV", _nonempty, None),
        flux_schnell=read("FLUX_SCHNELL", _nonempty, None),
        flux_device=read("FLUX_DEVICE", _device, None),
        flux_compile=read("FLUX_COMPILE", _switch, None),
        go_fast_lora_multiplier=read("GO_FAST_LORA_MULTIPLIER", _positive, 1.5),
        go_fast_cache_threshold=read("GO_FAST_CACHE_THRESHOLD", _positive, None),
        lora_cache_dir=read("LORA_CACHE_DIR", _path, Path.home() / ".cache" / "flux-lora"),
        lora_cache_bytes=read("LORA_CACHE_GB", _gigabytes, 50 * GB),
        lora_ram_bytes=read("LORA_RAM_GB", _gigabytes, 8 * GB),
        lora_max_bytes=read("LORA_MAX_GB", _gigabytes, 5 * GB),
        lora_allow_private_hosts=read("LORA_ALLOW_PRIVATE_HOSTS", _switch, False),
        hf_endpoint=read("HF_ENDPOINT", _url, "https://huggingface.co"),
        civitai_endpoint=read("CIVITAI_ENDPOINT", _url, "https://civitai.com"),
        replicate_endpoint=read("REPLICATE_ENDPOINT", _url, "https://replicate.com"),
        safety_model=read("SAFETY_MODEL", _safety_model, None),
        safety_concepts=read("SAFETY_CONCEPTS", _nonempty, None),
        safety_vit=read("SAFETY_VIT", _nonempty, None),
        safety_concept_limit=read("SAFETY_CONCEPT_LIMIT", _cosine, 0.0),
        safety_vit_limit=read("SAFETY_VIT_LIMIT", _probability, 0.5),
        safety_open_nsfw_limit=read("SAFETY_OPEN_NSFW_LIMIT", _probability, 0.8),
        safety_timeout=read("SAFETY_TIMEOUT", _positive, 30.0),
        safety_check_inputs=read("SAFETY_CHECK_INPUTS", _switch, False),
        hf_token=read("HF_TOKEN", _token, None),
        civitai_api_token=read("CIVITAI_API_TOKEN", _token, None),
        replicate_api_token=read("REPLICATE_API_TOKEN", _token, None),
    )


def _nonempty(text: str) -> str:
    if not text:
        raise ValueError("is set but empty; give it a value or unset it")
    return text


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise ValueError(f"must be cpu, cuda or cuda:<number>, not {text!r}")
    return text


def _switch(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError(f"must be 1 or 0, not {text!r}")


def _safety_model(text: str) -> str:
    if text not in SAFETY_MODELS:
        raise ValueError(f"must be {', '.join(SAFETY_MODELS[:-1])} or {SAFETY_MODELS[-1]}, not {text!r}")
    return text


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"must be a number above 0, not {text!r}")
    return number


def _probability(text: str) -> float:
    return _between(text, 0, 1)


def _cosine(text: str) -> float:
    return _between(text, -1, 1)


def _between(text: str, least: float, most: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not least <= number <= most:
        raise ValueError(f"must be a number from {least} to {most}, not {text!r}")
    return number


def _gigabytes(text: str) -> int:
    return int(_positive(text) * GB)


def _path(text: str) -> Path:
    return Path(_nonempty(text)).expanduser()


def _url(text: str) -> str:
    if not re.fullmatch(r"https?://[^\s/?#]+[^\s?#]*", text):
        raise ValueError(f"must be an address such as https://example.com, not {text!r}")
    return text.rstrip("/")


def _token(text: str) -> str | None:
    """Tokens travel in HTTP headers; an empty one (a secret that a platform left blank) counts as none."""
    if not text.isprintable() or " " in text:
        raise ValueError("holds a space or a control character, which no token does")
    return text or None
