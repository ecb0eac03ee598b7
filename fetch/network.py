"""Requests to servers that a stranger may have named: public addresses only, few redirects, no token carried along.

A stranger's reference must not make this process talk to its own network. The check is made on the very addresses that
a connection is opened to, so that a name which resolves differently the next moment gains nothing.
"""

import ipaddress
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.utils import select_proxy
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError, NameResolutionError

from lora.errors import LoraError
from settings import MB

T = TypeVar("T")
MOST_REDIRECTS = 5
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: the last four bytes are an IPv4 address


class HubDownError(LoraError):
    """The server cannot be reached or cannot answer now; a copy in the cache may serve."""


class RetryError(HubDownError):
    """Trying again may help; the server may have said when."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


class StoppedError(Exception):
    """The work is not wanted any more."""


@dataclass(frozen=True)
class Pace:
    """How long to wait, how often to try again, how much at once. Seconds and bytes."""

    connect: float = 10.0
    idle: float = 20.0  # without a single byte
    total: float = 1800.0
    pauses: tuple[float, ...] = (0.5, 2.0, 8.0)  # before each further try
    longest_pause: float = 30.0  # a server that asks for a longer one has failed
    segment: int = 16 * MB  # of one ranged request; a file that is larger is fetched in parallel
    connections: int = 8
    report: float = 2.0  # between two lines of progress in the log


class Stop:
    """Tells the threads of one fetch to end. It also wakes those that wait for a server's next byte."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._responses: set[requests.Response] = set()

    def set(self) -> None:
        self._event.set()
        for response in list(self._responses):
            with suppress(ValueError, RuntimeError, OSError):  # it ended by itself just now
                response.raw.shutdown()

    def is_set(self) -> bool:
        return self._event.is_set()

    def check(self) -> None:
        """Raises `StoppedError` when the work is to end."""
        if self._event.is_set():
            raise StoppedError

    def wait(self, seconds: float) -> None:
        """Sleep, unless the work is to end: then raises `StoppedError`."""
        self._event.wait(seconds)
        self.check()

    @contextmanager
    def reading(self, response: requests.Response) -> Iterator[requests.Response]:
        """The response, closed afterwards."""
        self._responses.add(response)
        try:
            self.check()
            yield response
        finally:
            self._responses.discard(response)
            response.close()


def open_session(allow_private: bool, trusted: str | None, connections: int) -> requests.Session:
    """A session that reaches public addresses alone, and `trusted`, the address of a hub that the operator named.

    Proxies of the environment are used; what they may reach is their own business. A netrc file is not read.
    """
    session = requests.Session()
    session.auth = lambda request: request  # without one, requests looks into netrc
    adapter = HTTPAdapter if allow_private else _PublicAdapter
    for scheme in ("http://", "https://"):
        session.mount(scheme, adapter(pool_maxsize=connections))
    if trusted:
        parts = urlsplit(trusted)
        session.mount(f"{parts.scheme}://{parts.netloc}/".lower(), HTTPAdapter(pool_maxsize=connections))
    return session


def open_url(
    session: requests.Session, url: str, headers: Mapping[str, str], token: str | None, pace: Pace
) -> requests.Response:
    """The answer after at most five redirects, its body unread. `token` goes to the first address's server alone.

    Raises `HubDownError` when there is no answer and `LoraError` when a redirect leads nowhere good.
    """
    for _ in range(MOST_REDIRECTS + 1):
        sent = {"Accept-Encoding": "identity", **headers, **({"Authorization": f"Bearer {token}"} if token else {})}
        response = open_once(session, url, sent, pace)
        target = session.get_redirect_target(response)
        if target is None:
            return response
        response.close()
        previous, url = url, urljoin(url, target)
        if not same_server(url, previous):
            token = None
    raise LoraError(f"{host_of(url)} was reached after more than {MOST_REDIRECTS} redirects: use the final address.")


def open_once(session: requests.Session, url: str, headers: Mapping[str, str], pace: Pace) -> requests.Response:
    """The answer of this very address, a redirect or not, its body unread. Raises as `open_url` does."""
    if urlsplit(url).scheme.lower() not in ("http", "https"):
        raise LoraError(f"{host_of(url)} was to be reached by other means than http or https, which is refused.")
    try:
        return session.get(
            url, headers=dict(headers), stream=True, allow_redirects=False, timeout=(pace.connect, pace.idle)
        )
    except (requests.ConnectionError, requests.Timeout, HTTPError, OSError) as error:
        raise HubDownError(f"{host_of(url)} cannot be reached ({plain_reason(error)}).") from None
    except ValueError as error:  # requests' own words for a bad address may show all of it
        if isinstance(error, LoraError):
            raise
        raise LoraError(f"{host_of(url)} is not an address that can be opened.") from None


def retrying(action: Callable[[], T], stop: Stop, pace: Pace) -> T:
    """What `action` returns, after as many further tries as `pace` allows when the server may do better."""
    for pause in pace.pauses:
        try:
            return action()
        except RetryError as error:
            if error.wait > pace.longest_pause:
                raise
            stop.wait(max(pause, error.wait))
    return action()


def same_server(one: str, other: str) -> bool:
    """By scheme, host and port, as browsers compare."""
    return _origin(one) == _origin(other)


def host_of(url: str) -> str:
    """The server's name alone, since all else of an address may be a secret."""
    try:
        return urlsplit(url).hostname or "the address"
    except ValueError:
        return "the address"


def plain_reason(error: BaseException) -> str:
    """What happened, in a word or two, without the address that libraries put into their messages."""
    text = f"{type(error).__name__} {error!r}"
    for part, reason in (
        ("NameResolution", "its name does not resolve"),
        ("CERTIFICATE_VERIFY", "its certificate is not valid"),
        ("Timeout", "no answer in time"),
        ("timed out", "no answer in time"),
        ("refused", "it refuses connections"),
        ("Proxy", "the proxy does not let it through"),
    ):
        if part in text:
            return reason
    return "the connection broke"


def is_public(address: str) -> bool:
    """Whether the whole internet means the same machine by this address, whatever it is wrapped in."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _private(host: str) -> LoraError:
    return LoraError(
        f"{host} is on a private network, which is refused: use a public address, or set LORA_ALLOW_PRIVATE_HOSTS=1."
    )


class _PublicConnection(HTTPConnection):
    def _new_conn(self) -> socket.socket:
        """Resolve once, look at every address, connect to those very addresses."""
        try:
            found = socket.getaddrinfo(self._dns_host, self.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            reason = error if isinstance(error, socket.gaierror) else socket.gaierror(str(error))
            raise NameResolutionError(self.host, self, reason) from None
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        name = self._dns_host
        if not all(map(is_public, addresses)):
            raise _private(name)
        try:
            for address in addresses[:-1]:
                self._dns_host = address
                with suppress(HTTPError):
                    return super()._new_conn()
            self._dns_host = addresses[-1]
            return super()._new_conn()
        finally:
            self._dns_host = name


class _PublicSecureConnection(_PublicConnection, HTTPSConnection):
    pass


class _PublicPool(HTTPConnectionPool):
    ConnectionCls = _PublicConnection


class _PublicSecurePool(HTTPSConnectionPool):
    ConnectionCls = _PublicSecureConnection


class _PublicAdapter(HTTPAdapter):
    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, **options)
        self.poolmanager.pool_classes_by_scheme = {"http": _PublicPool, "https": _PublicSecurePool}

    def send(self, request: requests.PreparedRequest, *arguments: Any, **options: Any) -> requests.Response:
        """A proxy resolves names itself: what is plainly private is all that can be seen from here."""
        if select_proxy(request.url or "", options.get("proxies")):
            host = host_of(request.url or "")
            plain = True
            with suppress(ValueError):
                plain = is_public(host)
            if not plain or host == "localhost" or host.endswith(".localhost"):
                raise _private(host)
        return super().send(request, *arguments, **options)
