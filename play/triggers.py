"""The words that make a LoRA work, as far as its file or the server tells them."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MOST_HEADER_BYTES = 100 * 2**20  # the most that safetensors itself allows
MOST_TAGS = 8  # of kohya's, which count every word of the captions
METRIC = "lora_trigger_words"
LOG_LINE = re.compile(r"^trigger words: ([^;\n]+)", re.MULTILINE)


def words_of_file(path: Path) -> list[str]:
    """From the metadata of a safetensors file: modelspec's trigger phrase, or kohya's most frequent tags."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MOST_HEADER_BYTES:
                return []
            metadata = json.loads(file.read(length)).get("__metadata__") or {}
        return _split(metadata.get("modelspec.trigger_phrase")) or _frequent(metadata.get("ss_tag_frequency"))
    except (OSError, ValueError, AttributeError, TypeError):
        return []


def words_of_answer(metrics: dict[str, Any], log: str) -> list[str]:
    """From what the server told with a prediction: its metric, or else its line in the log."""
    found = LOG_LINE.search(log)
    return _split(metrics.get(METRIC)) or _split(found.group(1) if found else None)


def missing_words(words: Sequence[str], prompt: str) -> list[str]:
    return [word for word in words if word.lower() not in prompt.lower()]


def with_word(prompt: str, word: str) -> str:
    """The prompt with the word at its end, if it is not in it."""
    return prompt if not missing_words([word], prompt) else f"{prompt.rstrip()} {word}".lstrip()


def _split(value: object) -> list[str]:
    parts = value if isinstance(value, list) else str(value or "").split(",")
    return [word for part in parts if (word := str(part).strip())]


def _frequent(frequencies: object) -> list[str]:
    """kohya's: JSON of folders, each with its tags and how often each occurs."""
    counts: dict[str, int] = {}
    for tags in json.loads(str(frequencies or "{}")).values():
        for tag, count in tags.items():
            counts[tag.strip()] = counts.get(tag.strip(), 0) + int(count)
    return sorted(counts, key=lambda tag: -counts[tag])[:MOST_TAGS]
