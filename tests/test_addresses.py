"""Which addresses and names are the internet's, and which the operator's network, in every form."""

from ipaddress import IPv4Address, IPv6Address, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fetch.addresses import NOT_PUBLIC_IPV4, is_private_host, is_public


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *[(address, True) for address in ("8.8.8.8", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8")],
        *[(address, True) for address in ("168.63.129.15", "172.32.0.0", "2001:4860:4860::8888", "2001:200::1")],
        *[(address, False) for address in ("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254")],
        *[(address, False) for address in ("0.0.0.0", "100.64.0.1", "224.0.0.1", "255.255.255.255", "198.18.0.1")],
        *[(address, False) for address in ("::1", "::", "fe80::1%eth0", "fc00::1", "fec0::1", "ff02::1")],
        *[(address, False) for address in ("::ffff:127.0.0.1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::")],
        *[(address, False) for address in ("::7f00:1", "::ffff:0:7f00:1", "64:ff9b:1::7f00:1", "2002:808:808::1")],
        *[(address, False) for address in ("2001:0:4136:e378::1", "2a00::5efe:7f00:1", "2606:4700::200:5efe:a00:1")],
        *[(address, False) for address in ("192.0.0.192", "192.88.99.1", "3fff::", "5f00::1", "100::1", "100:0:0:1::")],
        *[(address, False) for address in ("168.63.129.16", "100.100.100.200", "fd00:ec2::254", "fd20:ce::254")],
    ],
)  # fmt: skip
def test_public_addresses_are_told_apart(address: str, public: bool) -> None:
    assert is_public(address) is public


WRAPPERS = (
    "::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/96", "2002::/16", "2001::/32",
    "2606:4700::5efe:0:0/96", "2606:4700::200:5efe:0:0/96",
)  # fmt: skip


@given(
    private=st.sampled_from(NOT_PUBLIC_IPV4).flatmap(lambda network: st.ip_addresses(network=network)),
    wrapper=st.sampled_from(WRAPPERS),
)
def test_a_private_address_stays_private_in_whatever_carries_it(private: IPv4Address, wrapper: str) -> None:
    assert not is_public(str(private))
    network = IPv6Network(wrapper)
    room = 128 - network.prefixlen - 32  # 6to4 and Teredo carry it before other bits
    carried = int(private) if wrapper != "2001::/32" else int(private) ^ 0xFFFFFFFF
    assert not is_public(str(network[carried << (room if wrapper == "2002::/16" else 0)]))


@given(st.ip_addresses())
def test_what_python_calls_private_is_not_public(address: IPv4Address | IPv6Address) -> None:
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    if not (mapped or address).is_global and address not in IPv6Network("64:ff9b::/96"):
        assert not is_public(str(address))


@pytest.mark.parametrize(
    ("host", "private"),
    [
        *[(host, False) for host in ("example.com", "8.8.8.8", "[2606:4700::1111]", "internal.test", "134744072")],
        *[(host, True) for host in ("a.LOCALHOST.", "metadata", "metadata.google.internal", "metadata.goog")],
        *[(host, True) for host in ("nas.local", "x.home.arpa", "127.1", "0x7f000001", "2130706433", "[::1]")],
    ],
)  # fmt: skip
def test_private_hosts_are_told_by_their_names(host: str, private: bool) -> None:
    assert is_private_host(host) is private
