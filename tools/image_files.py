"""What `cog build` copies into the image: the files of this folder that .dockerignore leaves, by Docker's rules.

    python -m tools.image_files

prints them by the first part of their names, with their sizes. Cog itself leaves out its own folder, .cog. The rules
are those of Docker's documentation of .dockerignore files: a pattern begins at this folder, `*` and `?` stay within
one part of a name and `**` does not, what is in a folder that matches matches as well, and the last match decides.
`cog build --separate-weights` looks for large files in a way of its own, which does not read .dockerignore.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from settings import MB
from tools import ROOT

COGS_OWN = ".cog"


class Rule(NamedTuple):
    """One line of a .dockerignore."""

    pattern: str
    leaves_out: bool

    def matches(self, name: str) -> bool:
        """Whether the pattern matches the name, such as "flux/models.py", or a folder that it lies in."""
        parts = name.split("/")
        expression = _expression(self.pattern)
        return any(expression.fullmatch("/".join(parts[: i + 1])) for i in range(len(parts)))

    def may_match_below(self, folder: str) -> bool:
        return "**" in self.pattern or self.pattern.count("/") > folder.count("/")


def read_rules(text: str) -> list[Rule]:
    """Raises `ValueError` for what Docker knows and this does not: sets in brackets, and escapes."""
    lines = [line.strip() for line in text.splitlines() if not line.startswith("#")]
    rules = [Rule(line.removeprefix("!").strip().strip("/"), not line.startswith("!")) for line in lines if line]
    for rule in rules:
        if re.search(r"[\[\]\\]|\.\.", rule.pattern):
            raise ValueError(f"{rule.pattern}: brackets, backslashes and .. are not known here")
    return rules


def image_files(root: Path = ROOT) -> list[Path]:
    """The files that go into the image, relative to `root`, in order. A link counts as a file."""
    rules = read_rules((root / ".dockerignore").read_text())
    return sorted(_walk(root, "", rules))


def _walk(root: Path, folder: str, rules: Sequence[Rule]) -> Iterator[Path]:
    for entry in os.scandir(root / folder):
        name = f"{folder}/{entry.name}" if folder else entry.name
        if name == COGS_OWN:
            continue
        left_out = _left_out(name, rules)
        if entry.is_dir(follow_symlinks=False):
            if not left_out or any(rule.may_match_below(name) for rule in rules if not rule.leaves_out):
                yield from _walk(root, name, rules)
        elif not left_out:
            yield Path(name)


def _left_out(name: str, rules: Sequence[Rule]) -> bool:
    verdicts = [rule.leaves_out for rule in rules if rule.matches(name)]
    return bool(verdicts) and verdicts[-1]


def _expression(pattern: str) -> re.Pattern[str]:
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    return re.compile("".join(known.get(part, re.escape(part)) for part in parts))


def main() -> None:
    sizes: dict[str, list[int]] = {}
    for file in image_files():
        sizes.setdefault(file.parts[0], []).append((ROOT / file).lstat().st_size)
    for name, each in sizes.items():
        print(f"{sum(each) / MB:10.2f} MB  {len(each):4} files  {name}")
    print(f"{sum(map(sum, sizes.values())) / MB:10.2f} MB  {sum(map(len, sizes.values())):4} files")


if __name__ == "__main__":
    main()
