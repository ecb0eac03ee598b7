"""A made-up hub: its source and its `Hub` are all that it takes."""

from dataclasses import dataclass

from fetch.hub import Address, Hub, Source
from fetch.network import Client
from fetch.remote import RemoteFile
from settings import Settings


@dataclass(frozen=True)
class Shelf(Source):
    """A LoRA on a hub that nobody has heard of, whose server is at `url`."""

    name: str
    url: str

    immutable = True

    @property
    def label(self) -> str:
        return f"shelf.test/{self.name}"

    def endpoint(self, settings: Settings) -> str:
        return self.url

    def resolve(self, settings: Settings, client: Client) -> RemoteFile:
        return RemoteFile(self.label, f"{self.url}/api/{self.name}.safetensors")


def shelf_hub(url: str) -> Hub:
    """The hub of such sources."""

    def parse(address: Address) -> Shelf | None:
        return Shelf(address.parts[0], url) if len(address.parts) == 1 else None

    return Hub(hosts=("shelf.test",), accepted="shelf.test/<name>", parse=parse)
