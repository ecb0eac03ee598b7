"""The words that turn a LoRA on, where they are published beside the file: on its page, or in its training's config.

They are kept in the fetched file's own metadata, under the name that ModelSpec gives them.
"""

import re
import tarfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

ENTRY = "modelspec.trigger_phrase"  # github.com/Stability-AI/ModelSpec
MOST_WORDS = 10
MOST_CHARACTERS = 200  # of one word or phrase
TRAINING_CONFIGS = (
    "config.yaml",
    "config.yml",
)  # what ai-toolkit, and so Replicate's trainer, packs beside the weights
LARGEST_CONFIG = 1 << 20  # bytes
MOST_MEMBERS = 10_000
IN_CONFIG = re.compile(
    r"^[ \t-]*trigger_word[ \t]*:[ \t]*(?P<quote>[\"']?)(?P<word>[^\"'#\n]+)(?P=quote)", re.MULTILINE
)
# A prompt's words that several prompts share by chance.
COMMON = re.compile(
    "a|an|and|at|by|for|from|in|is|of|on|or|photo|picture|image|portrait|style|the|this|to|with", re.IGNORECASE
)


def clean(words: Iterable[Any]) -> tuple[str, ...]:
    """Those that are text and not empty, each once, on one line and not for ever."""
    found: dict[str, None] = {}
    for word in words:
        text = " ".join(str(word)[:MOST_CHARACTERS].split()).strip(" ,") if isinstance(word, str) else ""
        if text and text.isprintable() and text.lower() not in ("none", "null"):
            found[text] = None
    return tuple(found)[:MOST_WORDS]


def of_card(card: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of a Hugging Face repo's card: `instance_prompt`, or what all of its example prompts begin or end with."""
    instance = card.get("instance_prompt")
    if words := clean([instance] if isinstance(instance, str) else instance or []):
        return words
    widgets = card.get("widget")
    examples = [one.get("text") for one in widgets if isinstance(one, Mapping)] if isinstance(widgets, list) else []
    prompts = list(dict.fromkeys(clean(examples)))
    if len(prompts) < 2:
        return ()
    split = [prompt.split() for prompt in prompts]
    shared = [_shared_start(split), _shared_start([words[::-1] for words in split])[::-1]]
    return clean(" ".join(_without_common(words)) for words in shared)


def _shared_start(prompts: list[list[str]]) -> list[str]:
    shared = []
    for words in zip(*prompts, strict=False):
        if len({word.lower().strip(",.") for word in words}) > 1:
            break
        shared.append(words[0].strip(",."))
    return shared


def _without_common(words: list[str]) -> list[str]:
    """Without the ordinary words at either end."""
    while words and COMMON.fullmatch(words[0]):
        words = words[1:]
    while words and COMMON.fullmatch(words[-1]):
        words = words[:-1]
    return words


def of_archive(archive: Path) -> tuple[str, ...]:
    """`trigger_word` of a training's config in a tar that has been read before, and is sound."""
    with suppress(tarfile.TarError, OSError, ValueError, EOFError), tarfile.open(archive, "r:") as members:
        for count, member in enumerate(members):
            if count >= MOST_MEMBERS:
                break
            if PurePosixPath(member.name).name in TRAINING_CONFIGS and member.isreg() and member.size <= LARGEST_CONFIG:
                file = members.extractfile(member)
                text = file.read().decode(errors="replace") if file else ""
                return clean(match["word"] for match in IN_CONFIG.finditer(text))
    return ()
