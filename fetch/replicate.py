"""Replicate: a model that was trained there gives the tar of its weights, at /<owner>/<name>/_weights."""

import re
from dataclasses import dataclass, field, replace
from urllib.parse import urlsplit

from fetch.errors import NotFoundError
from fetch.hub import Address, Hub, Source
from fetch.network import Client
from fetch.remote import RemoteFile, check_answer
from fetch.web import WebFile
from lora.errors import LoraError
from settings import Settings

PAGES = ("api", "examples", "playground", "readme", "train", "versions")  # of a model
NOT_OWNERS = {"p": "a prediction", "collections": "a collection", "deployments": "a deployment"}
OWNER, NAME, VERSION = r"[a-z0-9][a-z0-9_-]*", r"[a-z0-9][a-z0-9._-]*", r"[a-z0-9]{1,64}"


@dataclass(frozen=True)
class ReplicateModel(Source):
    """What a trainer on Replicate made; without a version the newest."""

    owner: str
    name: str
    version: str | None = None
    written: str | None = field(default=None, compare=False)  # the two names, where nothing says whose they are

    @property
    def label(self) -> str:
        return "/".join(part for part in (self.owner, self.name, self.version) if part)

    @property
    def immutable(self) -> bool:
        return self.version is not None

    def endpoint(self, settings: Settings) -> str:
        return settings.replicate_endpoint

    def resolve(self, settings: Settings, client: Client) -> RemoteFile:
        """`_weights` redirects to the tar; where to tells which one the newest version is."""
        version = f"versions/{self.version}/" if self.version else ""
        url = f"{settings.replicate_endpoint}/{self.owner}/{self.name}/{version}_weights"
        remote = RemoteFile(self.label, url, settings.replicate_api_token, "REPLICATE_API_TOKEN")
        if self.immutable:
            return remote

        def redirect() -> str | None:
            with client.get_without_redirects(url, self.label, remote.token) as response:
                target = client.redirect_target(response)
                if target is None:
                    check_answer(response, remote)
                return target

        try:
            target = client.retrying(redirect)
        except NotFoundError as error:
            if not self.written:
                raise
            looks = "it looks like" if self.written != self.written.lower() else "if it is"
            sentence = str(error).removesuffix(".")
            raise NotFoundError(f"{sentence}; {looks} a Hugging Face repo: huggingface.co/{self.written}.") from None
        if target is None:
            return remote
        unsigned = urlsplit(target)._replace(query="", fragment="").geturl()
        return replace(remote, key=WebFile(unsigned).key)


def parse_name(text: str) -> ReplicateModel | None:
    """<owner>/<name>, <owner>/<name>/<version>, <owner>/<name>/versions/<version> or <owner>/<name>:<version>."""
    names = re.sub(r"[?#].*", "", text).rstrip("/")
    match = re.fullmatch(rf"({OWNER})/({NAME})(?:(?:/versions/|[/:])({VERSION}))?", names.lower())
    if not match or match[2].endswith(".safetensors") or match[3] == "versions":
        return None
    return ReplicateModel(match[1], match[2], match[3], written=None if match[3] else names)


def _parse(address: Address) -> ReplicateModel | None:
    """A model's page, one of the pages below it, or one version. Raises `LoraError` for what else has a page there."""
    parts = [part.lower() for part in address.parts]
    if len(parts) > 1 and parts[0] in NOT_OWNERS:
        shown = "/".join(parts[:2])
        raise LoraError(f"replicate.com/{shown} is {NOT_OWNERS[parts[0]]}, not a model: use {HUB.accepted}.")
    path = "/".join(parts[:2] if len(parts) == 3 and parts[2] in PAGES else parts)
    match = re.fullmatch(rf"({OWNER})/({NAME})(?:(?:(?:/versions)?/|:|@sha256:)({VERSION}))?(?:/_weights)?", path)
    return ReplicateModel(*match.groups()) if match and match[3] != "versions" else None


HUB = Hub(
    hosts=("replicate.com", "r8.im"),  # the second is its registry of containers, where a version is a digest
    accepted="a Replicate model <owner>/<name> or <owner>/<name>/<version>",
    parse=_parse,
)
