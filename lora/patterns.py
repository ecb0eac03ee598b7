r"""The patterns by which a PEFT configuration gives some layers a rank or an alpha of their own.

For PEFT each is a regular expression that a layer's name, or the end of it after a dot, matches (peft/utils/other.py,
get_pattern_key). A stranger's expression could keep Python's engine busy for years. So only a part of the language is
read, and a name is matched in one pass over it: letters, digits, "_", "-", ".", "\.", "\d", "\w" and sets such as
"[0-9]", with "*", "+" or "?" behind any of these, "|", parentheses that hold no others, "^" first and "$" last.
"""

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

ANY = string.printable.replace("\n", "")  # a layer's name is ASCII
CLASSES = {"d": string.digits, "w": string.ascii_letters + string.digits + "_"}

MOST_CHARACTERS = 300  # of one pattern
MOST_SHOWN = 100  # of these in an error
MOST_FORMS = 5_000  # that a table of patterns stands for
MOST_REPEATING = 128  # of these, with "*" or "+" in them, which take longer to match

_PART = re.compile(r"\([^()]*\)|\||[^()|]+")
_TOKEN = re.compile(
    r"(?:(?P<any>\.)|\\(?P<class>[dw])|\\(?P<escaped>[^\sA-Za-z0-9])|\[(?P<set>\^?(?:\w-\w|[\w.])+)\]|(?P<plain>[\w-]))"
    r"(?P<how>[*+?]?)",
    re.ASCII,
)


class PatternError(ValueError):
    """A pattern is none of those that are read here; the message names it."""


@dataclass(frozen=True)
class Form:
    """How a name may look: sets of characters, each for one character or, where it repeats, for one or more."""

    sets: tuple[str, ...] = ()
    repeats: tuple[bool, ...] = ()
    anchored: bool = False  # the name itself has to match, not the end of it after a dot
    _holding: dict[str, int] = field(default_factory=dict, compare=False)  # a character -> bit i: set i holds it

    def __add__(self, other: "Form") -> "Form":
        return Form(self.sets + other.sets, self.repeats + other.repeats, self.anchored)

    def fits(self, name: str) -> bool:
        """Whether the name, or the end of it after a dot, looks so."""
        if any(self.repeats):
            return self._fits_repeating(name)
        start = len(name) - len(self.sets)
        return self._may_start(name, start) and all(map(str.__contains__, self.sets, name[start:]))

    def _may_start(self, name: str, index: int) -> bool:
        return index == 0 or (index > 0 and name[index - 1] == "." and not self.anchored)

    def _fits_repeating(self, name: str) -> bool:
        """Bit i of `ends` says whether the characters so far can be matched with set i as the last."""
        repeating = sum(1 << i for i, repeats in enumerate(self.repeats) if repeats)
        ends = 0
        for index, character in enumerate(name):
            if character not in self._holding:
                self._holding[character] = sum(1 << i for i, one in enumerate(self.sets) if character in one)
            ends = (ends << 1 | ends & repeating | self._may_start(name, index)) & self._holding[character]
        return bool(ends >> (len(self.sets) - 1))


class Patterns:
    """A table of patterns with their values, as a configuration has it. Raises `PatternError`, or what `float` raises
    for a value that is no number."""

    def __init__(self, values: Mapping[str, Any] | None) -> None:
        self._table: list[tuple[list[Form], float]] = []
        count = repeating = 0
        for pattern, value in (values or {}).items():
            self._table.append((parse_pattern(pattern), float(value)))
            count += len(self._table[-1][0])
            repeating += sum(any(form.repeats) for form in self._table[-1][0])
            if count > MOST_FORMS or repeating > MOST_REPEATING:
                raise PatternError("it has too many patterns")

    def value(self, name: str, otherwise: float) -> float:
        """The value of the first pattern that the name of a layer fits."""
        return next((value for forms, value in self._table if any(form.fits(name) for form in forms)), otherwise)


def parse_pattern(pattern: str) -> list[Form]:
    """The forms that a name may have. Raises `PatternError`."""
    error = PatternError(f"{pattern[:MOST_SHOWN]!r} is none of the patterns that are supported")
    parts = _PART.findall(pattern[: MOST_CHARACTERS + 1])
    if "".join(parts) != pattern or len(pattern) > MOST_CHARACTERS:
        raise error
    complete: list[Form] = []
    current = [Form()]
    for part, following in pairwise([*parts, "|"]):
        if part == "|":
            complete, current = complete + current, [Form()]
            continue
        options = [part]
        if part.startswith("("):
            options = part[1:-1].removeprefix("?:").split("|")
        elif part.startswith("^") and current == [Form()]:
            options, current = [part[1:]], [Form(anchored=True)]
        if following == "|":
            options = [option.removesuffix("$") for option in options]
        current = _joined(current, [one for option in options for one in _forms(option, error)], error)
    return complete + current


def _forms(text: str, error: PatternError) -> list[Form]:
    """The forms of a text without "|" and parentheses: two for each part that may be left out."""
    forms, position = [Form()], 0
    while position < len(text):
        token = _TOKEN.match(text, position)
        if not token:
            raise error
        one = Form((_characters(token),), (token["how"] in ("*", "+"),))
        forms = _joined(forms, [Form(), one] if token["how"] in ("*", "?") else [one], error)
        position = token.end()
    return forms


def _joined(left: list[Form], right: list[Form], error: PatternError) -> list[Form]:
    if len(left) * len(right) > MOST_REPEATING:
        raise error
    return [one + other for one in left for other in right]


def _characters(token: re.Match[str]) -> str:
    """Those that a token stands for."""
    if token["any"]:
        return ANY
    if token["class"]:
        return CLASSES[token["class"]]
    if not token["set"]:
        return token["escaped"] or token["plain"]
    ranges = re.findall(r"(\w)-(\w)|([\w.])", token["set"])
    members = "".join(one or "".join(map(chr, range(ord(first), ord(last) + 1))) for first, last, one in ranges)
    return "".join(set(ANY) - set(members)) if token["set"].startswith("^") else members
