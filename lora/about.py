"""What the metadata of a LoRA file says about it: trigger words, base model and the like.

The entries are those of ModelSpec (github.com/Stability-AI/ModelSpec), of kohya's sd-scripts ("ss_"), which others
imitate, of SimpleTuner and of ai-toolkit. All of it is a stranger's text: shortened, and without control characters.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lora.bases import named_bases, parse_object
from lora.header import Header

# Entries that hold trigger words themselves, with "," between them.
WORDS = ("modelspec.trigger_phrase", "trained_words", "trigger_words", "trigger_word", "instance_prompt")
MOST_WORDS = 10
MOST_CHARACTERS = 200  # of any text
FEWEST_CAPTIONS = 4  # from which a tag of nearly all of them says something
NEARLY_ALL = 0.9


@dataclass(frozen=True)
class About:
    """What is empty or None is not in the metadata."""

    trigger_words: tuple[str, ...] = ()  # words or phrases, the most important first
    base_model: str | None = None  # as the file calls it
    title: str | None = None
    author: str | None = None
    license: str | None = None
    usage_hint: str | None = None
    steps: int | None = None  # of training


def describe(header: Header) -> About:
    """What the metadata says; never raises for what it may hold."""
    metadata = header.metadata
    texts = {
        field: next(_texts(metadata.get(entry) for entry in entries), None)
        for field, entries in {
            "title": ("modelspec.title", "ss_output_name", "name"),
            "author": ("modelspec.author",),
            "license": ("modelspec.license",),
            "usage_hint": ("modelspec.usage_hint",),
        }.items()
    }
    return About(_trigger_words(metadata), _base_model(metadata), **texts, steps=_steps(metadata))


def _trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Those of the first entry that has any."""
    for entry in WORDS:
        if words := _distinct(re.split(r"[,\n]", metadata.get(entry, "")[: MOST_WORDS * MOST_CHARACTERS])):
            return words
    return _distinct(_tags(metadata))


def _tags(metadata: Mapping[str, str]) -> Iterator[str]:
    """The tags that name a training set's folder, as of "10_ohwx man", or stand in nearly all of its captions.

    ss_tag_frequency counts, by folder, the captions that have a tag; ss_dataset_dirs counts a folder's pictures.
    """
    folders = parse_object(metadata.get("ss_dataset_dirs", "")) or {}
    for folder, counts in (parse_object(metadata.get("ss_tag_frequency", "")) or {}).items():
        tags = {tag: _count(count) for tag, count in counts.items()} if isinstance(counts, dict) else {}
        known = folders.get(folder)
        pictures = _count(known.get("img_count")) if isinstance(known, dict) else 0
        captions = pictures or max(tags.values(), default=0)
        concept = re.sub(r"^\d+_", "", folder).lower()
        for tag, count in sorted(tags.items(), key=lambda item: -item[1]):
            if tag.lower() == concept or (captions >= FEWEST_CAPTIONS and count >= NEARLY_ALL * captions):
                yield tag


def _count(value: Any) -> int:
    return value if isinstance(value, int) and 0 < value < 10**9 else 0


def _base_model(metadata: Mapping[str, str]) -> str | None:
    """Not the "sd_1.5" that ai-toolkit wrote into LoRAs for FLUX.1 until April 2025."""
    named = [*named_bases(metadata), metadata.get("ss_sd_model_name")]
    wrong = "sd_1.5" if "ai-toolkit" in metadata.get("software", "") else None
    return next(_texts(base for base in named if base != wrong), None)


def _steps(metadata: Mapping[str, str]) -> int | None:
    trained = (parse_object(metadata.get("training_info", "")) or {}).get("step")
    for value in (metadata.get("ss_steps"), trained, metadata.get("global_step")):
        if re.fullmatch(r"\d{1,9}", str(value)):
            return int(str(value))
    return None


def _distinct(words: Iterable[str]) -> tuple[str, ...]:
    """The first few that differ."""
    found: dict[str, None] = {}
    for word in _texts(words):
        if len(found) < MOST_WORDS:
            found[word] = None
    return tuple(found)


def _texts(values: Iterable[str | None]) -> Iterator[str]:
    """Those with anything in them, each on one line and not for ever."""
    for value in values:
        text = " ".join("".join(one if one.isprintable() else " " for one in (value or "")[:MOST_CHARACTERS]).split())
        if text and text.lower() != "none":  # kohya's word for what was not given
            yield text
