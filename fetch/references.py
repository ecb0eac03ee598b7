"""What a person pastes to name a LoRA becomes a source. This only reads text; nothing is asked or opened."""

import re
from urllib.parse import parse_qsl, unquote, urlsplit

from fetch import civitai, hugging_face, replicate, web
from fetch.hub import Address, Source
from lora.errors import LoraError

HUBS = (replicate.HUB, hugging_face.HUB, civitai.HUB)
ACCEPTED = ", ".join([*(hub.accepted for hub in HUBS), web.ACCEPTED])
LONGEST_SHOWN = 100
MOST_TEXT = 4096  # characters of a reference that is no data: URI
INVISIBLE = "\ufeff\u200b\u200c\u200d\u2060\xad"  # what copying from a page leaves at either end
QUOTES = "\"'`\u2018\u2019\u201c\u201d\xab\xbb"
BEFORE, AFTER = INVISIBLE + QUOTES + "<([", INVISIBLE + QUOTES + ">)].,;"
MARKDOWN_LINK = re.compile(r"\[[^\]]*\]\(<?([^()<>\s]+)>?(?: \"[^\"]*\")?\)")


def parse_reference(text: str) -> Source:
    """The source that `text` names. Raises `LoraError`, which lists the accepted forms."""
    text = text.strip()
    if re.match(r"data:", text, re.IGNORECASE):
        return web.parse_data_uri(text)
    source = _parse(text) or _parse(_unwrapped(text))
    if source is None:
        raise _not_understood(text)
    return source


def _unwrapped(text: str) -> str:
    """Without the quotes, brackets and full stop of the sentence from which it was copied; the target of a link."""
    if len(text) <= MOST_TEXT and (link := MARKDOWN_LINK.fullmatch(text)):
        return link[1]
    return text.lstrip(BEFORE + " ").rstrip(AFTER + " ")


def _parse(text: str) -> Source | None:
    if len(text) > MOST_TEXT or not text.isprintable():
        return None
    return web.parse_file_name(text) or civitai.parse_air(text) or _parse_address(text)


def _parse_address(text: str) -> Source | None:
    if re.search(r"[\s\\]", text):
        return None
    scheme = re.match(r"([a-z][a-z0-9+.-]*)://", text, re.IGNORECASE)
    if scheme and scheme[1].lower() not in ("http", "https"):
        return None
    if not scheme and not re.match(r"[^/?#]*\.[^/?#]*/", text):  # the first part is a name, not a host
        return replicate.parse_name(text)
    address = _take_apart(text if scheme else f"https://{text}")
    if address is None:
        return None
    hubs = HUBS if address.url.port in (None, 80, 443) else ()
    hub = next((hub for hub in hubs if address.host in hub.hosts), None)
    return hub.parse(address) if hub else web.parse_address(address)


def _take_apart(text: str) -> Address | None:
    """None for an address that is damaged, holds a password or would climb out of a folder."""
    try:
        url = urlsplit(text)
        named = url.hostname and ".." not in url.hostname and not url.hostname.startswith(".")
        valid = named and (url.port is None or url.port > 0) and "@" not in url.netloc
    except ValueError:
        return None
    parts = tuple(unquote(part) for part in url.path.split("/") if part)
    if not valid or not all(part.isprintable() and part not in (".", "..") and "\\" not in part for part in parts):
        return None
    host = (url.hostname or "").rstrip(".").removeprefix("www.")
    return Address(url, host, parts, {name.lower(): value for name, value in parse_qsl(url.query)})


def _not_understood(text: str) -> LoraError:
    """A query may hold a token, and what stands before an @ a password."""
    shown = re.sub(r"^(\w+://)?.*@", r"\1", re.sub(r"[?#].*", "", text, flags=re.DOTALL), flags=re.DOTALL)
    if len(shown) > LONGEST_SHOWN:
        shown = shown[:LONGEST_SHOWN] + "..."
    return LoraError(f"{shown!r} does not name a LoRA: use {ACCEPTED}.")
