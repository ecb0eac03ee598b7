"""The requests of one fetch: few redirects, no token carried to another server, tried again, cancelled at any time."""

import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TypeVar
from urllib.parse import urljoin, urlsplit

import requests
from urllib3.exceptions import HTTPError

from fetch.errors import FetchCancelledError, UnavailableError
from fetch.limits import FetchLimits
from fetch.public import WatchedAdapter
from lora.errors import LoraError

T = TypeVar("T")
MOST_REDIRECTS = 5
BROKEN = "the connection broke"


class Cancellation:
    """Tells the threads of one fetch to end, and wakes those that wait for a server's next byte."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._sockets: set[socket.socket] = set()
        self._responses: set[requests.Response] = set()

    def cancel(self) -> None:
        self._event.set()
        for connected in list(self._sockets):
            with suppress(OSError):  # it ended by itself just now
                connected.shutdown(socket.SHUT_RDWR)
        for response in list(self._responses):
            with suppress(ValueError, RuntimeError, OSError):
                response.raw.shutdown()

    def watch(self, connected: socket.socket) -> Callable[[], None]:
        """Let `cancel` end this connection, whatever is waited for on it, until what this returns is called. Raises
        `FetchCancelledError`."""
        self.check()
        watched = connected.dup()  # the original changes hands when TLS begins
        self._sockets.add(watched)

        def forget() -> None:
            self._sockets.discard(watched)
            watched.close()

        if self.is_cancelled():  # just now, perhaps before it was in the set
            forget()
            raise FetchCancelledError
        return forget

    @contextmanager
    def reading(self, response: requests.Response) -> Iterator[requests.Response]:
        """The response, which `cancel` interrupts even where the connection is its own by now; closed afterwards."""
        self._responses.add(response)
        try:
            self.check()
            yield response
        finally:
            self._responses.discard(response)
            response.close()

    def is_cancelled(self) -> bool:
        return self._event.is_set()

    def check(self) -> None:
        """Raises `FetchCancelledError` if the fetch is cancelled."""
        if self._event.is_set():
            raise FetchCancelledError

    def sleep(self, seconds: float) -> None:
        """Raises `FetchCancelledError` as soon as the fetch is cancelled."""
        self._event.wait(seconds)
        self.check()


class Client:
    """Makes the requests of one fetch. Several threads may use it at once.

    It reaches public addresses only, unless `allow_private`, and `trusted`, an address that the operator named. Proxies
    of the environment are used; what they may reach is their own business. A netrc file is not read.
    """

    def __init__(
        self, limits: FetchLimits, cancellation: Cancellation, *, allow_private: bool, trusted: str | None
    ) -> None:
        self.limits, self.cancellation = limits, cancellation
        self._session = requests.Session()
        self._session.auth = lambda request: request  # without one, requests reads netrc

        def adapter(*, public: bool) -> WatchedAdapter:
            return WatchedAdapter(cancellation.watch, public=public, pool_maxsize=limits.connections)

        for scheme in ("http://", "https://"):
            self._session.mount(scheme, adapter(public=not allow_private))
        if trusted:
            parts = urlsplit(trusted)
            server = f"{parts.scheme}://{parts.netloc}/".lower()
            self._session.mount(server, adapter(public=False))

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    @contextmanager
    def get(
        self, url: str, label: str, token: str | None = None, headers: Mapping[str, str] | None = None
    ) -> Iterator[requests.Response]:
        """The answer after at most five redirects, its body unread. `token` goes to the first address's server only.

        Raises `UnavailableError` when there is no answer and `LoraError` when a redirect may not be followed.
        """
        for _ in range(MOST_REDIRECTS + 1):
            with self.get_without_redirects(url, label, token, headers) as response:
                target = self.redirect_target(response)
                if target is None:
                    yield response
                    return
            if not same_server(target, url):
                token = None
            url = target
        raise LoraError(
            f"{host_of(url)} was reached after more than {MOST_REDIRECTS} redirects: use the final address."
        )

    @contextmanager
    def get_without_redirects(
        self, url: str, label: str, token: str | None = None, headers: Mapping[str, str] | None = None
    ) -> Iterator[requests.Response]:
        """The answer of this very address, a redirect or not. Raises as `get` does."""
        sent = {"Accept-Encoding": "identity", **(headers or {})}
        if token:
            sent["Authorization"] = f"Bearer {token}"
        if urlsplit(url).scheme.lower() not in ("http", "https"):
            raise LoraError(
                f"{label}: a redirect leads to an address that is neither http nor https, which is refused."
            )
        timeouts = (self.limits.connect_timeout, self.limits.read_timeout)
        try:
            response = self._session.get(url, headers=sent, stream=True, allow_redirects=False, timeout=timeouts)
        except LoraError:
            raise
        except ValueError:  # requests' own words for a bad address may show all of it
            raise LoraError(f"{host_of(url)} is not an address that can be opened.") from None
        except (requests.ConnectionError, requests.Timeout, HTTPError, OSError) as error:
            self.cancellation.check()
            raise UnavailableError(
                f"{label}: {host_of(url)} cannot be reached ({plain_reason(error)}).", retry_after=0
            ) from None
        with self.cancellation.reading(response):
            yield response

    def redirect_target(self, response: requests.Response) -> str | None:
        """The address that the answer redirects to, None when it is none. Raises `LoraError` for a damaged one."""
        location = self._session.get_redirect_target(response)
        if location is None:
            return None
        target = urljoin(response.url, location)
        try:
            _origin(target)
        except ValueError:
            raise LoraError(f"{host_of(response.url)} redirects to an address that cannot be opened.") from None
        return target

    def retrying(self, action: Callable[[], T]) -> T:
        """What `action` returns, after as many further tries as the limits allow while they may be of use."""
        pauses = iter(self.limits.retry_pauses)
        while True:
            try:
                return action()
            except UnavailableError as error:
                pause = next(pauses, None)
                wait = error.retry_after
                if pause is None or wait is None or wait > self.limits.longest_retry_pause:
                    error.retry_after = None  # nor are more tries of use to whoever called
                    raise
            self.cancellation.sleep(max(pause, wait))


def same_server(one: str, other: str) -> bool:
    """By scheme, host and port, as browsers compare."""
    return _origin(one) == _origin(other)


def host_of(url: str) -> str:
    """The server's name only, since all else of an address may be a secret. Of an address with an @ nothing is shown:
    a damaged one may have its password where the name belongs."""
    with suppress(ValueError):
        host = urlsplit(url).hostname or ""
        if "@" not in url and re.fullmatch(r"[\w.:-]{1,253}", host):
            return host
    return "the address"


def plain_reason(error: BaseException) -> str:
    """What happened, in a few words, without the address that libraries put into their messages."""
    text = f"{type(error).__name__} {error!r}"
    for part, reason in (
        ("NameResolution", "its name does not resolve"),
        ("CERTIFICATE_VERIFY", "its certificate is not valid"),
        ("Timeout", "no answer in time"),
        ("timed out", "no answer in time"),
        ("refused", "it refuses connections"),
        ("Proxy", "the proxy does not let it through"),
        ("unreachable", "no network leads there"),
        ("No route", "no network leads there"),
        ("BadStatusLine", "what it answers is not HTTP"),
        ("LineTooLong", "what it answers is not HTTP"),
        ("reset", BROKEN),
        ("aborted", BROKEN),
        ("Broken", BROKEN),
        ("broken", BROKEN),
        ("IncompleteRead", BROKEN),
        ("EOF", BROKEN),
        ("SSL", "TLS with it fails"),
    ):
        if part in text:
            return reason
    return type(error).__name__


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
