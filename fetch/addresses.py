"""Which IP addresses and names mean a machine on the public internet, and which ones a stranger must not reach.

Our own tables rather than `ipaddress.is_global`: that one is as old as the Python that runs us, and lets through
addresses that carry a private IPv4 address within them.
"""

import ipaddress
import socket
from collections.abc import Iterable
from contextlib import suppress

# IANA's special-purpose registries of 2025 (iana.org/assignments/iana-ipv4-special-registry and -ipv6-special-registry)
# and its multicast space. The few blocks that the registries call globally reachable are refused too where what
# answers there is the nearest network's own service, such as 192.0.0.9.
NOT_PUBLIC_IPV4 = (
    "0.0.0.0/8",  # this network
    "10.0.0.0/8",  # private
    "100.64.0.0/10",  # shared by the customers of one provider; Alibaba's metadata is in it
    "127.0.0.0/8",  # loopback
    "168.63.129.16/32",  # Azure's metadata and DNS, in the midst of public addresses; in no registry
    "169.254.0.0/16",  # link-local; the metadata of most clouds
    "172.16.0.0/12",  # private
    "192.0.0.0/24",  # protocol assignments; Oracle's metadata was in it
    "192.0.2.0/24",  # documentation
    "192.31.196.0/24",  # AS112, which answers for private names
    "192.52.193.0/24",  # multicast tunnels
    "192.88.99.0/24",  # relays from IPv6
    "192.168.0.0/16",  # private
    "192.175.48.0/24",  # AS112
    "198.18.0.0/15",  # benchmarks
    "198.51.100.0/24",  # documentation
    "203.0.113.0/24",  # documentation
    "224.0.0.0/4",  # multicast
    "240.0.0.0/4",  # reserved, and broadcast
)
GLOBAL_UNICAST_IPV6 = "2000::/3"  # all that IANA assigns from: 5f00::/16, 100::/64, fc00::/7 and the like are elsewhere
NOT_PUBLIC_IPV6 = (  # within it
    "2001::/23",  # protocol assignments, among them Teredo's own
    "2001:db8::/32",  # documentation
    "2002::/16",  # 6to4
    "2620:4f:8000::/48",  # AS112
    "3ffe::/16",  # the 6bone, given back
    "3fff::/20",  # documentation
)
# IPv4 addresses that travel as the last four bytes of an IPv6 address
MAPPED = ("::ffff:0:0/96", "64:ff9b::/96")  # RFC 4291 2.5.5.2 and RFC 6052: as public as what they carry
TUNNELS = (0x00005EFE, 0x02005EFE)  # ISATAP (RFC 5214 6.1): the third quarter of an address under any prefix

# Names that only the network around a machine answers: they are refused before they are resolved, since a proxy would
# resolve them itself.
PRIVATE_NAMES = ("localhost", "localdomain", "local", "internal", "home.arpa", "metadata.goog")


def is_public(address: str) -> bool:
    """Whether this IP address means the same machine to the whole internet, whatever it is wrapped in.

    Raises `ValueError` for what is no IP address.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv4Address):
        return not _within(ip, _NOT_PUBLIC_IPV4)
    last = str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
    if _within(ip, _MAPPED):
        return is_public(last)
    if not _within(ip, _GLOBAL_UNICAST_IPV6) or _within(ip, _NOT_PUBLIC_IPV6):
        return False
    return (int(ip) >> 32) & 0xFFFFFFFF not in TUNNELS or is_public(last)


def is_private_host(host: str) -> bool:
    """Whether a host, as an address names it, is plainly not public before anything is resolved."""
    name = host.rstrip(".").lower()
    with suppress(ValueError):
        return not is_public(name.strip("[]"))
    with suppress(OSError, UnicodeError):  # such as 2130706433, 0x7f.1 and 127.1, which C's resolvers take
        return not is_public(socket.inet_ntoa(socket.inet_aton(name)))
    return "." not in name or any(f".{name}".endswith(f".{private}") for private in PRIVATE_NAMES)


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def _networks(*texts: str) -> tuple[Network, ...]:
    return tuple(map(ipaddress.ip_network, texts))


_NOT_PUBLIC_IPV4, _NOT_PUBLIC_IPV6 = _networks(*NOT_PUBLIC_IPV4), _networks(*NOT_PUBLIC_IPV6)
_GLOBAL_UNICAST_IPV6, _MAPPED = _networks(GLOBAL_UNICAST_IPV6), _networks(*MAPPED)


def _within(ip: ipaddress.IPv4Address | ipaddress.IPv6Address, networks: Iterable[Network]) -> bool:
    return any(ip in network for network in networks)
