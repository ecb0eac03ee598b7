"""What a Cog server tells while it predicts: webhooks carry its log, and the log carries tqdm's bar of the steps.

Cog has no other way to ask (its streamed answers need a predictor that yields). It sends at most two webhooks a second.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

BAR = re.compile(r"(\d+)/(\d+) \[")


@dataclass(frozen=True)
class Bar:
    """Steps done, of how many."""

    done: int
    total: int


@dataclass
class Hook:
    """Where the server is asked to report one prediction, and the log that came there so far."""

    url: str
    log: str = ""


@dataclass
class Hooks:
    """The predictions that are being listened to, by their ids, which nobody can guess."""

    base_url: str  # of the page, as the server reaches it
    _hooks: dict[str, Hook] = field(default_factory=dict)

    @contextmanager
    def listen(self, identity: str) -> Iterator[Hook]:
        hook = self._hooks[identity] = Hook(f"{self.base_url}/webhooks/{identity}")
        try:
            yield hook
        finally:
            del self._hooks[identity]

    def receive(self, identity: str, prediction: dict[str, Any]) -> None:
        """Take what the server sent. Webhooks may overtake each other: the longest log is the newest."""
        hook = self._hooks.get(identity)
        if hook and len(log := str(prediction.get("logs") or "")) > len(hook.log):
            hook.log = log


def last_bar(log: str) -> Bar | None:
    """The newest state of the newest tqdm bar in the log."""
    found = BAR.findall(log)
    return Bar(int(found[-1][0]), int(found[-1][1])) if found and int(found[-1][1]) else None


def readable(log: str) -> str:
    """The log as a terminal shows it: of a bar that was drawn over and over, the last state."""
    return "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in log.split("\n") if line.strip())
