"""Replicate: a model that was trained there gives the tar of its weights, at /<owner>/<name>/_weights."""

import re
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from fetch.hub import Address, Hub, Source
from fetch.network import Client
from fetch.remote import RemoteFile, check_answer
from fetch.web import WebFile
from settings import Settings

OWNER, NAME, VERSION = r"[a-z0-9][a-z0-9_-]*", r"[a-z0-9][a-z0-9._-]*", r"[a-z0-9]{1,64}"


@dataclass(frozen=True)
class ReplicateModel(Source):
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

        target = client.retrying(redirect)
        if target is None:
            return remote
        unsigned = urlsplit(target)._replace(query="", fragment="").geturl()
        return replace(remote, key=WebFile(unsigned).key)


def parse_name(text: str) -> ReplicateModel | None:
    """<owner>/<name>, <owner>/<name>/<version> or <owner>/<name>:<version>."""
    match = re.fullmatch(rf"({OWNER})/({NAME})(?:[/:]({VERSION}))?/*", re.sub(r"[?#].*", "", text).lower())
    return ReplicateModel(*match.groups()) if match and not match[2].endswith(".safetensors") else None


def _parse(address: Address) -> ReplicateModel | None:
    path = "/".join(address.parts).lower()
    match = re.fullmatch(rf"({OWNER})/({NAME})(?:(?:/versions)?/({VERSION}))?(?:/_weights)?", path)
    return ReplicateModel(*match.groups()) if match and match[3] != "versions" else None


HUB = Hub(
    hosts=("replicate.com",),
    accepted="a Replicate model <owner>/<name> or <owner>/<name>/<version>",
    parse=_parse,
)
