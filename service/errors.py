"""Errors as the person reads them who sent the request: one line, not for ever, and never Python's own words."""

import logging
import re
import secrets
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from service.threads import TimeLimitError, Worker

log = logging.getLogger("flux-lora")

MOST_SHOWN = 2000  # characters of one sentence
LOG_SECONDS = 5.0

# Cog puts what the request's thread logs into the answer; what only the operator may read is logged on this one.
_LOGGER = Worker("errors")


class InputError(ValueError):
    """An input of a request cannot be used; the message is one sentence for the person who sent it."""


class UnforeseenError(RuntimeError):
    """Something broke that nobody had thought of; the log has the rest under the number in the message."""


def one_line(text: str) -> str:
    """The text as it may be shown: without control characters, and cut where it is absurdly long."""
    shown = "".join(character if character.isprintable() else " " for character in text[:MOST_SHOWN])
    return shown + ("..." if len(text) > MOST_SHOWN else "")


@contextmanager
def explained(*foreseen: type[Exception]) -> Iterator[None]:
    """Within, every error is a sentence.

    Errors of the kinds `foreseen`, whose messages are sentences already, pass; any other becomes an `UnforeseenError`.
    """
    try:
        yield
    except foreseen as error:
        if (text := str(error)) == one_line(text):
            raise
        raise type(error)(one_line(text)) from None
    except Exception as error:  # noqa: BLE001 - the one place where all that is left arrives
        raise UnforeseenError(_explain(error)) from None


def _explain(error: Exception) -> str:
    number = secrets.token_hex(4)
    details = _without_secrets("".join(traceback.format_exception(error)))
    with suppress(TimeLimitError, RuntimeError):
        _LOGGER.call(lambda: log.error("error %s: %s", number, details), LOG_SECONDS)
    what = "the memory was not enough" if isinstance(error, MemoryError) else "something broke that was not foreseen"
    return f"The request failed because {what}; the server's log explains it under error {number}."


def _without_secrets(text: str) -> str:
    """Libraries put whole addresses, whose queries and passwords may be secrets, into their messages."""
    text = re.sub(r"\b(https?:)?//\S+", "<an address>", text)
    return re.sub(r"(?i)\b(bearer|token\W?)\s*\S+", r"\1 <hidden>", text)
