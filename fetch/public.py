"""Connections to public addresses only: a stranger's reference must not make this process talk to its own network.

The check is made on the very addresses that a connection is opened to, so that a name which resolves differently the
next moment gains nothing.
"""

import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.utils import select_proxy
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError, NameResolutionError

from fetch.addresses import is_private_host, is_public
from lora.errors import LoraError

Watch = Callable[[socket.socket], Callable[[], None]]  # what it returns is called when the socket is closed


class WatchedAdapter(HTTPAdapter):
    """What `requests` needs to hand every socket that it opens to `watch`, and where `public`, to connect to public
    addresses only. Raises `LoraError` for others."""

    def __init__(self, watch: Watch, *, public: bool, pool_maxsize: int) -> None:
        self._watch, self._public = watch, public
        super().__init__(pool_maxsize=pool_maxsize)

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, **options)
        self.poolmanager.pool_classes_by_scheme = _pools(self._watch, public=self._public)

    def proxy_manager_for(self, *arguments: Any, **options: Any) -> Any:
        """A proxy is the operator's choice and may be private."""
        manager = super().proxy_manager_for(*arguments, **options)
        manager.pool_classes_by_scheme = _pools(self._watch, public=False)
        return manager

    def send(self, request: requests.PreparedRequest, *arguments: Any, **options: Any) -> requests.Response:
        """A proxy resolves names itself: here only a host that is plainly private can be refused."""
        if self._public and select_proxy(request.url or "", options.get("proxies")):
            host = urlsplit(request.url or "").hostname or ""
            if is_private_host(host):
                raise _private(host)
        return super().send(request, *arguments, **options)


def _private(host: str) -> LoraError:
    return LoraError(
        f"{host} is on a private network, which is refused: use a public address, or set LORA_ALLOW_PRIVATE_HOSTS=1."
    )


def _pools(watch: Watch, *, public: bool) -> dict[str, type[HTTPConnectionPool]]:
    """urllib3 takes classes, which are made here for one fetch."""

    class Connection(HTTPConnection):
        forget: Callable[[], None] | None = None

        def _new_conn(self) -> socket.socket:
            connected = _connect_to_public(self, super()._new_conn) if public else super()._new_conn()
            try:
                self.forget = watch(connected)
            except BaseException:
                connected.close()
                raise
            return connected

        def close(self) -> None:
            super().close()
            if self.forget:
                self.forget()

    class SecureConnection(Connection, HTTPSConnection):
        pass

    class Pool(HTTPConnectionPool):
        ConnectionCls = Connection

    class SecurePool(HTTPSConnectionPool):
        ConnectionCls = SecureConnection

    return {"http": Pool, "https": SecurePool}


def _connect_to_public(connection: HTTPConnection, connect: Callable[[], socket.socket]) -> socket.socket:
    """Resolve the name once, check every address, connect to one of those very addresses."""
    name = connection._dns_host
    if is_private_host(name):
        raise _private(name)
    try:
        found = socket.getaddrinfo(name, connection.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = error if isinstance(error, socket.gaierror) else socket.gaierror(str(error))
        raise NameResolutionError(connection.host, connection, reason) from None
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if not all(map(is_public, addresses)):
        raise _private(name)
    try:
        for address in addresses[:-1]:
            connection._dns_host = address
            with suppress(HTTPError):
                return connect()
        connection._dns_host = addresses[-1]
        return connect()
    finally:
        connection._dns_host = name
