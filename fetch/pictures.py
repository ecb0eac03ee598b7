"""The pictures of a request as bytes: out of data: URIs, and from addresses under the network rules that LoRAs have.

Cog's server would fetch them before it calls `run()`: from any host, without a limit of time or size, on threads that a
cancel can leave standing for ever.
"""

import base64
import binascii
import http.client
import math
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import unquote_to_bytes

from urllib3.exceptions import HTTPError

from fetch.errors import UnavailableError
from fetch.limits import FetchLimits
from fetch.network import Cancellation, Client, host_of, plain_reason
from fetch.remote import RemoteFile, check_answer
from lora.errors import LoraError
from service.errors import InputError
from service.threads import TimeLimitError, call_on_new_thread
from settings import MB, Settings

MOST_BYTES = 300 * MB  # 89 megapixels, not compressed, have 267
BLOCK = 1 << 20
LIMITS = FetchLimits(retry_pauses=(0.5,))


def take_as_sent(run: Callable[..., Any], *names: str) -> None:
    """Let Cog's server hand the inputs called `names` to `run` as the text that was sent.

    It fetches what is annotated as `cog.Path` when a request comes, and passes a `str` on as it is. The schema stays,
    since that is made from the source text.
    """
    run.__annotations__.update(dict.fromkeys(names, str | None))


def fetch_inputs(image: object, mask: object, settings: Settings) -> tuple[bytes | None, bytes | None]:
    """The files of `image` and `mask`, as `fetch_picture` gives them. Raises `InputError`."""
    return fetch_picture(image, "image", settings), fetch_picture(mask, "mask", settings)


def fetch_picture(sent: object, name: str, settings: Settings) -> bytes | None:
    """The file that was sent as the input `name`, whatever is in it; None where there is none, or empty text, which
    some clients send for an input that is left out. Raises `InputError`."""
    text = "" if sent is None else str(sent).strip()
    if not text:
        return None
    if re.match("data:", text, re.IGNORECASE):
        return _decode(text, name)
    if not re.match("https?://", text, re.IGNORECASE):
        raise InputError(f"{name} must be an http(s) address or a data: URI; paths on the server are not read.")
    if settings.inputs_as_data_only:
        raise InputError(f"{name} is an address, and this server takes pictures only as data: URIs.")
    return _fetch(text, name, settings)


def _decode(uri: str, name: str) -> bytes:
    """data:[<media type>][;base64],<data> (RFC 2397)."""
    header, comma, data = uri.partition(",")
    with suppress(binascii.Error):
        if comma:
            content = unquote_to_bytes(data)
            return base64.b64decode(content) if header.lower().endswith(";base64") else content
    raise InputError(f"{name} is not a whole data: URI: send data:image/png;base64,<data>.")


def _fetch(url: str, name: str, settings: Settings) -> bytes:
    """The work is done on a thread of its own, which ends when the request is cancelled or its time is up."""
    cancellation, seconds = Cancellation(), settings.input_timeout or math.inf

    def work() -> bytes:
        private = settings.lora_allow_private_hosts
        with Client(LIMITS, cancellation, allow_private=private, trusted=None) as client:
            return client.retrying(lambda: _read(client, url, name))

    try:
        return call_on_new_thread(work, seconds, name)
    except TimeLimitError:
        raise InputError(f"{name} did not arrive within {seconds:g} seconds.") from None
    except LoraError as error:
        raise InputError(str(error)) from None
    finally:
        cancellation.cancel()


def _read(client: Client, url: str, name: str) -> bytes:
    """Raises `LoraError`."""
    content = bytearray()
    with client.get(url, name) as response:
        check_answer(response, RemoteFile(name, url))
        try:
            while block := response.raw.read1(BLOCK, decode_content=False):
                content += block
                if len(content) > MOST_BYTES:
                    raise LoraError(f"{name} has more than {MOST_BYTES // MB} MB: send a smaller file.")
        except (HTTPError, OSError, http.client.HTTPException) as error:
            client.cancellation.check()
            host = host_of(response.url)
            raise UnavailableError(
                f"{name} broke off on its way from {host} ({plain_reason(error)}).", retry_after=0
            ) from None
    return bytes(content)
