"""What a person pastes to name a LoRA, as a typed source: pure text, nothing is asked or opened here."""

import re
from dataclasses import dataclass, field
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit, urlunsplit

from lora.errors import LoraError

ACCEPTED = (
    "a Replicate model <owner>/<name> or <owner>/<name>/<version>, huggingface.co/<owner>/<name> with or without "
    "/<file>.safetensors, civitai.com/models/<id>, the http(s) address of a .safetensors file, or a data: URI"
)
HUGGING_FACE_HOSTS = ("huggingface.co", "hf.co")
CIVITAI_HOSTS = ("civitai.com", "civitai.green", "civitai.red")  # one service, one set of ids
REPLICATE_HOST, REPLICATE_FILES = "replicate.com", "replicate.delivery"
OWNER, NAME, VERSION = r"[a-z0-9][a-z0-9_-]*", r"[a-z0-9][a-z0-9._-]*", r"[a-z0-9]{1,64}"
NOT_OWNERS = ("api", "collections", "datasets", "docs", "models", "spaces")  # first parts of other Hugging Face pages
LONGEST_SHOWN = 100
MOST_TEXT = 4096  # characters of a reference that is no data: URI


@dataclass(frozen=True)
class ReplicateModel:
    """What a trainer on Replicate made; without a version the newest."""

    owner: str
    name: str
    version: str | None = None

    @property
    def label(self) -> str:
        return "/".join(part for part in (self.owner, self.name, self.version) if part)

    @property
    def immutable(self) -> bool:
        return self.version is not None


@dataclass(frozen=True)
class HuggingFaceRepo:
    """A repo, at a branch, tag or commit (None: main), and a file of it (None: the one that is the LoRA)."""

    repo: str
    revision: str | None = None
    file: str | None = None

    @property
    def label(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"huggingface.co/{self.repo}{at}" + (f"/{self.file}" if self.file else "")

    @property
    def immutable(self) -> bool:
        return re.fullmatch(r"[0-9a-f]{40}", self.revision or "") is not None


@dataclass(frozen=True)
class CivitaiModel:
    """A model's page, or one version of a model. The token is one that was in the pasted address."""

    model: int | None
    version: int | None = None
    token: str | None = field(default=None, repr=False)

    @property
    def label(self) -> str:
        page = f"civitai.com/models/{self.model}" if self.model else "civitai.com"
        return f"{page} version {self.version}" if self.version else page

    @property
    def immutable(self) -> bool:
        return self.version is not None


@dataclass(frozen=True)
class WebFile:
    """A file anywhere. The query may hold a secret and is never shown."""

    url: str = field(repr=False)

    @property
    def label(self) -> str:
        parts = urlsplit(self.url)
        return f"{parts.netloc}{parts.path}"

    @property
    def immutable(self) -> bool:
        return False


@dataclass(frozen=True)
class DataUri:
    """A file that came with the request."""

    encoded: str = field(repr=False)

    label = "the data: URI"
    immutable = True


@dataclass(frozen=True)
class LocalFile:
    """A file of the operator's on this machine; no request can name one."""

    path: str

    @property
    def label(self) -> str:
        return self.path

    @property
    def immutable(self) -> bool:
        return False


Source = ReplicateModel | HuggingFaceRepo | CivitaiModel | WebFile | DataUri | LocalFile


def parse_reference(text: str) -> Source:
    """The source that `text` names. Raises `LoraError`, which lists the accepted forms."""
    text = text.strip()
    if re.match(r"data:", text, re.IGNORECASE):
        return _data_uri(text)
    if len(text) > MOST_TEXT or not text.isprintable() or re.search(r"[\s\\]", text):
        raise _not_understood(text)
    scheme = re.match(r"([a-z][a-z0-9+.-]*)://", text, re.IGNORECASE)
    if scheme and scheme[1].lower() not in ("http", "https"):
        raise _not_understood(text)
    if not scheme and not re.match(r"[^/?#]*\.[^/?#]*/", text):  # the first part is a name, not a host
        return _replicate_name(text)
    try:
        url = urlsplit(text if scheme else f"https://{text}")
        named = (url.hostname or "") and (url.port is None or url.port > 0)
    except ValueError:
        named = False
    if not named or "@" in url.netloc:
        raise _not_understood(text)
    source = _page(url)
    if source is None:
        raise _not_understood(text)
    return source


def _page(url: SplitResult) -> Source | None:
    host = (url.hostname or "").rstrip(".").removeprefix("www.")
    parts = [unquote(part) for part in url.path.split("/") if part]
    if not all(part.isprintable() and part not in (".", "..") and "\\" not in part for part in parts):
        return None
    if url.port in (None, 80, 443):
        if host in HUGGING_FACE_HOSTS:
            return _hugging_face(parts)
        if host in CIVITAI_HOSTS:
            return _civitai(parts, {name.lower(): value for name, value in parse_qsl(url.query)})
        if host == REPLICATE_HOST:
            return _replicate(parts)
    kinds = (".safetensors", ".tar") if f".{host}".endswith(f".{REPLICATE_FILES}") else (".safetensors",)
    if url.path.rstrip("/").lower().endswith(kinds):
        return WebFile(urlunsplit((url.scheme.lower(), url.netloc.lower(), url.path.rstrip("/"), url.query, "")))
    return None


def _replicate_name(text: str) -> ReplicateModel:
    match = re.fullmatch(rf"({OWNER})/({NAME})(?:[/:]({VERSION}))?/*", re.sub(r"[?#].*", "", text).lower())
    if not match or match[2].endswith(".safetensors"):
        raise _not_understood(text)
    return ReplicateModel(*match.groups())


def _replicate(parts: list[str]) -> ReplicateModel | None:
    path = "/".join(parts).lower()
    match = re.fullmatch(rf"({OWNER})/({NAME})(?:(?:/versions)?/({VERSION}))?(?:/_weights)?", path)
    return ReplicateModel(*match.groups()) if match and match[3] != "versions" else None


def _hugging_face(parts: list[str]) -> HuggingFaceRepo | None:
    """huggingface.co/<owner>/<name>, then nothing, a file, or what a browser shows: /resolve, /blob, /raw and /tree."""
    if len(parts) < 2 or parts[0] in NOT_OWNERS or not all(re.fullmatch(r"[\w-][\w.-]*", part) for part in parts[:2]):
        return None
    repo, rest = "/".join(parts[:2]), parts[2:]
    if not rest:
        return HuggingFaceRepo(repo)
    revision = None
    if rest[0] in ("resolve", "blob", "raw", "tree") and len(rest) > 1:
        kind, revision, *rest = rest
        if kind == "tree" and not rest:
            return HuggingFaceRepo(repo, revision)
    file = "/".join(rest)
    return HuggingFaceRepo(repo, revision, file) if file.lower().endswith(".safetensors") else None


def _civitai(parts: list[str], query: dict[str, str]) -> CivitaiModel | None:
    """civitai.com/models/<id>/<name>?modelVersionId=<version>, and the addresses of its API."""
    path, token = "/".join(parts).lower(), query.get("token") or None
    if match := re.fullmatch(r"(?:api/download/models|(?:api/v1/)?model-versions)/(\d{1,18})", path):
        return CivitaiModel(None, int(match[1]), token)
    version = query.get("modelversionid", "")
    if not re.fullmatch(r"\d{0,18}", version, re.ASCII):
        return None
    if match := re.fullmatch(r"(?:api/v1/)?models/(\d{1,18})(?:/.*)?", path, re.ASCII):
        return CivitaiModel(int(match[1]), int(version) if version else None, token)
    return None


def _data_uri(text: str) -> DataUri:
    """data:[<media type>];base64,<data>, as RFC 2397 has it; the data may be percent-encoded."""
    header, comma, encoded = text.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise LoraError("The data: URI is not of the form data:application/octet-stream;base64,<data>.")
    return DataUri(unquote(encoded))


def _not_understood(text: str) -> LoraError:
    """A query may hold a token, and what stands before an @ a password."""
    shown = re.sub(r"^(\w+://)?.*@", r"\1", re.sub(r"[?#].*", "", text, flags=re.DOTALL), flags=re.DOTALL)
    if len(shown) > LONGEST_SHOWN:
        shown = shown[:LONGEST_SHOWN] + "..."
    return LoraError(f"{shown!r} does not name a LoRA: use {ACCEPTED}.")
