"""What the front reads in a client's request, and answers in Cog's form that no server gave."""

import json
import re
import secrets
from dataclasses import dataclass
from typing import Any

from fleet.dispatch import Weights

VALID_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
SEED_BITS = 32
EVENTS = ("start", "output", "logs", "completed")  # that a webhook can ask for
LORAS = (("replicate_weights", "lora_scale"), ("extra_lora", "extra_lora_scale"))  # inputs: reference, strength


@dataclass(frozen=True)
class Body:
    """Of a prediction. One that is not as Cog wants it has no input; a server says what is wrong with it."""

    input: dict[str, Any] | None = None
    id: str | None = None
    webhook: str | None = None
    webhook_events: tuple[str, ...] | None = None  # None: all

    @property
    def weights(self) -> Weights | None:
        """What it runs on, with the defaults of the contract."""
        if self.input is None:
            return None
        loras = ((self.input.get(name) or "", self.input.get(scale, 1)) for name, scale in LORAS)
        named = tuple((str(name).strip(), _number(scale)) for name, scale in loras if name)
        custom = self.input.get("aspect_ratio") == "custom" and not self.input.get("image")  # never runs in fp8
        return Weights(str(self.input.get("model", "dev")), bool(self.input.get("go_fast")) and not custom, named)

    def additions(self, prediction: str, method: str) -> dict[str, Any]:
        """What a server is told besides: the id, and a seed where none is given, so that a second try is the same."""
        if self.input is None:
            return {}
        added: dict[str, Any] = {"id": prediction} if method == "POST" else {}
        if self.input.get("seed") is None:
            added["seed"] = secrets.randbits(SEED_BITS)
        return added


def read_body(raw: bytes) -> Body:
    """Read what concerns the front; never an error."""
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError):
        return Body()
    if not isinstance(document, dict) or not isinstance(document.get("input", {}), dict):
        return Body()
    events = document.get("webhook_events_filter")
    id_, webhook = document.get("id"), document.get("webhook")
    if not isinstance(id_, str | None) or not isinstance(webhook, str | None) or not _are_events(events):
        return Body()
    return Body(
        input=document.setdefault("input", {}),
        id=id_,
        webhook=webhook,
        webhook_events=None if events is None else tuple(events),
    )


def new_id() -> str:
    """Of the form that coglet gives."""
    return f"pred_{secrets.token_hex(8)}"


def to_json(document: Any) -> bytes:
    """Compact, as coglet writes it."""
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")


def failed(prediction: str, error: str) -> dict[str, Any]:
    """A prediction that no worker could make."""
    return {"error": error, "id": prediction, "logs": "", "metrics": {}, "status": "failed"}


def canceled(prediction: str) -> dict[str, Any]:
    """A prediction that was canceled before a worker had it."""
    return {"id": prediction, "logs": "", "metrics": {}, "status": "canceled"}


def _number(value: Any) -> float:
    """1, as if it were left out, for what is none: a server refuses that anyway."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return 1.0


def _are_events(events: Any) -> bool:
    return events is None or (isinstance(events, list) and all(event in EVENTS for event in events))
