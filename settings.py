"""Every environment variable that the predictor reads, once, typed, with an error that names the variable."""

import math
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, overload
from urllib.parse import urlsplit

MB = 10**6
GB = 10**9
SAFETY_MODELS = ("two-stage", "vit", "open-nsfw")
T = TypeVar("T")


class SettingsError(ValueError):
    """An environment variable has a value that cannot be used; the message names it and says what would do."""


# The parsers: the text of a variable -> its value. Each raises a `ValueError` that goes on after the variable's name.


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


def _number(text: str) -> float:
    """nan for what is no number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _positive(text: str) -> float:
    number = _number(text)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"must be a number above 0, not {text!r}")
    return number


def _positive_or_off(text: str) -> float:
    number = _number(text)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"must be a number above 0, or 0 for no limit, not {text!r}")
    return number


def _between(least: float, most: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        number = _number(text)
        if not least <= number <= most:
            raise ValueError(f"must be a number from {least} to {most}, not {text!r}")
        return number

    return parse


def _gigabytes(text: str) -> int:
    return int(_positive(text) * GB)


def _path(text: str) -> Path:
    return Path(_nonempty(text)).expanduser()


def _url(text: str) -> str:
    with suppress(ValueError):  # urlsplit's, for a damaged host or a port above 65535
        parts = urlsplit(text)
        if re.fullmatch(r"https?://[^\s/?#]+[^\s?#]*", text) and parts.hostname and parts.port != 0:
            return text.rstrip("/")
    raise ValueError(f"must be an address such as https://example.com, not {text!r}")


def _token(text: str) -> str | None:
    """Tokens travel in HTTP headers; an empty one (a secret that a platform left blank) counts as none."""
    if not text.isprintable() or " " in text:
        raise ValueError("holds a space or a control character, which no token does")
    return text or None


@overload
def _variable(name: str, parse: Callable[[str], T], *, secret: bool = False) -> T | None: ...
@overload
def _variable(name: str, parse: Callable[[str], T], default: str) -> T: ...
def _variable(name: str, parse: Callable[[str], T], default: str | None = None, *, secret: bool = False) -> Any:
    """A field of `Settings`: its environment variable, the parser, and the default as one would write it there.

    Without a default the field is None where the variable is not set. A secret is left out of `repr`.
    """
    return field(metadata={"variable": (name, parse, default)}, repr=not secret)


@dataclass(frozen=True)
class Settings:
    """What the operator decided. Tokens are left out of `repr`, so that no log can show them."""

    # Where a model is: a folder in diffusers layout or a Hugging Face repo id; None: look in weights/
    flux_dev: str | None = _variable("FLUX_DEV", _nonempty)
    flux_schnell: str | None = _variable("FLUX_SCHNELL", _nonempty)
    # Whether the demo model stands in for one that is neither named nor in weights/; False: that one is fetched
    flux_demo: bool = _variable("FLUX_DEMO", _switch, "1")
    flux_device: str | None = _variable("FLUX_DEVICE", _device)  # None: the first CUDA device, else the CPU
    flux_compile: bool | None = _variable("FLUX_COMPILE", _switch)  # None: on for CUDA, off elsewhere
    go_fast_lora_multiplier: float = _variable("GO_FAST_LORA_MULTIPLIER", _positive, "1.5")
    # None: every step runs every block
    go_fast_cache_threshold: float | None = _variable("GO_FAST_CACHE_THRESHOLD", _positive)
    lora_cache_dir: Path = _variable("LORA_CACHE_DIR", _path, "~/.cache/flux-lora")  # noqa: RUF009 - a field()
    lora_cache_bytes: int = _variable("LORA_CACHE_GB", _gigabytes, "50")
    lora_ram_bytes: int = _variable("LORA_RAM_GB", _gigabytes, "8")
    lora_max_bytes: int = _variable("LORA_MAX_GB", _gigabytes, "5")
    # None: no request can name a file of this machine; else those in this very folder, by name
    lora_folder: Path | None = _variable("LORA_FOLDER", _path)  # noqa: RUF009 - a field()
    lora_allow_private_hosts: bool = _variable("LORA_ALLOW_PRIVATE_HOSTS", _switch, "0")
    hf_endpoint: str = _variable("HF_ENDPOINT", _url, "https://huggingface.co")
    civitai_endpoint: str = _variable("CIVITAI_ENDPOINT", _url, "https://civitai.com")
    replicate_endpoint: str = _variable("REPLICATE_ENDPOINT", _url, "https://replicate.com")
    # One of SAFETY_MODELS; None: the two-stage one where its weights are at hand
    safety_model: str | None = _variable("SAFETY_MODEL", _safety_model)
    # Where a checker's weights are: a folder or a Hugging Face repo id
    safety_concepts: str | None = _variable("SAFETY_CONCEPTS", _nonempty)
    safety_vit: str | None = _variable("SAFETY_VIT", _nonempty)
    safety_concept_limit: float = _variable("SAFETY_CONCEPT_LIMIT", _between(-1, 1), "0")  # a difference of cosines
    safety_vit_limit: float = _variable("SAFETY_VIT_LIMIT", _between(0, 1), "0.5")  # a probability, as is the next
    safety_open_nsfw_limit: float = _variable("SAFETY_OPEN_NSFW_LIMIT", _between(0, 1), "0.8")
    safety_timeout: float = _variable("SAFETY_TIMEOUT", _positive, "30")  # seconds
    safety_check_inputs: bool = _variable("SAFETY_CHECK_INPUTS", _switch, "0")
    inputs_as_data_only: bool = _variable("INPUTS_AS_DATA_ONLY", _switch, "0")
    # Seconds; 0: no limit. The watchdog ends a server that has no prediction, and is not ready, for the second as well
    request_timeout: float = _variable("REQUEST_TIMEOUT", _positive_or_off, "3600")  # one prediction, by the watchdog
    input_timeout: float = _variable("INPUT_TIMEOUT", _positive_or_off, "300")  # one picture that is sent as an address
    hf_token: str | None = _variable("HF_TOKEN", _token, secret=True)
    civitai_api_token: str | None = _variable("CIVITAI_API_TOKEN", _token, secret=True)
    replicate_api_token: str | None = _variable("REPLICATE_API_TOKEN", _token, secret=True)


def read_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """Read the environment. Raises `SettingsError` on the first variable that cannot be used."""
    values: dict[str, Any] = {}
    for entry in fields(Settings):
        name, parse, default = entry.metadata["variable"]
        text = environment.get(name, default)
        try:
            values[entry.name] = None if text is None else parse(text.strip())
        except ValueError as error:
            raise SettingsError(f"The environment variable {name} {error}.") from None
    return Settings(**values)
