"""The model for which a LoRA was trained, as the metadata of its file says.

Some families call their layers as FLUX.1 does and have its width, so that a LoRA for one of them may fit and do harm.
Of all others the keys tell more than the metadata: until April 2025 ai-toolkit wrote "sd_1.5" into LoRAs for FLUX.1.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from lora.header import CONFIG_FILE, shown

DIFFUSERS_ENTRY = "lora_adapter_metadata"  # what diffusers writes: PEFT's configurations of all components

# Of a name in lower case, with "-" for whatever is no letter or digit. The first that is found counts.
_FLUX_1 = re.compile(r"\bflux-?1\b|\bflux-(dev|schnell|kontext|krea|fill)\b")
_FAMILIES = [
    (family, re.compile(pattern))
    for family, pattern in (
        ("FLUX.2 [klein] 4B", r"\bklein-(base-)?4b\b"),
        ("FLUX.2 [klein] 9B", r"\bklein-(base-)?9b\b"),
        ("FLUX.2 [klein]", r"\bklein\b"),
        ("FLUX.2", r"\bflux-?2\b"),
        ("Chroma", r"\bchroma(?!tic)"),
        ("Qwen-Image", r"\bqwen"),
        ("Stable Diffusion 3", r"\b(sd|stable-diffusion)-?3"),
        ("HunyuanVideo or HunyuanImage", r"\bhunyuan"),
        ("LongCat-Image", r"\blongcat"),
        ("Ovis-Image", r"\bovis"),
        ("Bria or FIBO", r"\b(bria|fibo)\b"),
        ("Flex", r"\bflex-?[12]\b"),
        ("Step1X-Edit", r"\bstep1x"),
    )
]


def named_bases(metadata: Mapping[str, str]) -> Iterator[str]:
    """What a file calls its base model, the entry that says most first."""
    yield from (metadata[key] for key in ("modelspec.architecture", "ss_base_model_version") if metadata.get(key))
    for entry in (CONFIG_FILE, DIFFUSERS_ENTRY):
        values = parse_object(metadata.get(entry) or "{}") or {}
        for key, value in values.items():
            if key.rpartition(".")[2] == "base_model_name_or_path" and isinstance(value, str) and value:
                yield value


def foreign_base(metadata: Mapping[str, str]) -> str | None:
    """The model for which a LoRA is that is not for FLUX.1, with the file's own word for it."""
    for base in named_bases(metadata):
        name = _plain(base)
        if _FLUX_1.search(name):
            return None
        if family := next((family for family, pattern in _FAMILIES if pattern.search(name)), None):
            return f"a LoRA for {family}, not for FLUX.1 (its metadata says {shown(base)})"
    return None


def is_flux_1(base: str) -> bool:
    """Whether a base model's name is one of FLUX.1's."""
    return _FLUX_1.search(_plain(base)) is not None


def parse_object(text: str) -> dict[str, Any] | None:
    """A JSON object; None for any other text."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _plain(base: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", base[:1000].lower())
