"""Before ranks are connected: a name that no other start shares, and the network interface towards other hosts."""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import psutil

from dist_prune.distributed.launch_env import LaunchEnv
from dist_prune.distributed.watchdog import RendezvousStore

POLL_S = 0.01
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


@dataclass(frozen=True)
class Meeting:
    """What the ranks of one start agree on.

    Attributes:
        name: under which they write on the store, and no others do.
        addresses: by which the hosts reach the store, each once; empty strings where that is not by network.
    """

    name: str
    addresses: tuple[str, ...]


def meet(store: RendezvousStore, place: LaunchEnv, timeout_s: float) -> Meeting:
    """Find the other ranks of this start at a store that earlier starts may have written on.

    A launcher's store outlives the ranks, some of which may have died before they joined: counting does not tell
    starts apart. Each rank comes with a token that nobody had before, and rank 0 answers every token that it finds
    with one name, until all ranks are seen under that name.

    Raises:
        TimeoutError: names the ranks that did not come.
        ConnectionError: the launcher that started this rank is gone.
    """
    own = address_towards(place.address)
    if place.rank:
        token = secrets.token_hex(8)
        store.set(_key(place, f"hello/{place.rank}"), token)
        answer = _key(place, f"answer/{token}")
        _wait(lambda: store.check([answer]), place, timeout_s, lambda: "rank 0")
        name = store.get(answer).decode()
        store.set(f"{name}/at/{place.rank}", own)
    else:
        name = _key(place, secrets.token_hex(8))
        _gather(store, place, name, timeout_s)
        others = [store.get(f"{name}/at/{rank}").decode() for rank in range(1, place.size)]
        store.set(f"{name}/addresses", json.dumps(sorted({own, *others})))
    addresses = f"{name}/addresses"
    _wait(lambda: store.check([addresses]), place, timeout_s, lambda: "rank 0, which waits for others,")
    return Meeting(name, tuple(json.loads(store.get(addresses))))


def _key(place: LaunchEnv, what: str) -> str:
    return f"start{place.restart}/{what}"  # ranks of a start before, if they still live, are not even answered


def _gather(store: RendezvousStore, place: LaunchEnv, name: str, timeout_s: float) -> None:
    """Answer every token until each rank was seen under the name: an old token may lie where a new one is due."""
    absent = set(range(1, place.size))

    def all_came() -> bool:
        for rank in sorted(absent):
            hello = _key(place, f"hello/{rank}")
            if store.check([hello]):
                store.set(_key(place, f"answer/{store.get(hello).decode()}"), name)
            if store.check([f"{name}/at/{rank}"]):
                absent.discard(rank)
        return not absent

    _wait(all_came, place, timeout_s, lambda: f"rank {', '.join(map(str, sorted(absent)))}")


def _wait(happened: Callable[[], bool], place: LaunchEnv, timeout_s: float, whom: Callable[[], str]) -> None:
    launcher = os.getppid() if place.has_launcher else 0
    deadline = time.monotonic() + timeout_s
    while not happened():
        if launcher not in (0, os.getppid()):
            raise ConnectionError(f"torchrun, which started rank {place.rank}, is gone")
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"rank {place.rank} of {place.size}: {whom()} did not come to {place.address} in {timeout_s:g} s: "
                f"start every rank, and look for the errors of those"
            )
        time.sleep(POLL_S)


# ── several hosts ──────────────────────────────────────────────────────────────────────────────────────────


def address_towards(url: str) -> str:
    """This host's own address on the way to `tcp://host:port`, to which nothing is sent; empty if none."""
    parts = urlsplit(url)
    if parts.scheme != "tcp" or not parts.hostname:
        return ""
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or 1, type=socket.SOCK_DGRAM)
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as way:
                way.connect(address)
                return str(way.getsockname()[0])
    except OSError:  # no such host, or no route
        return ""
    return ""


def interface_of(address: str) -> str:
    """The network interface with that address; empty if none has it."""
    wanted = address.partition("%")[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address.partition("%")[0] == wanted for known in addresses):
            return str(name)
    return ""


def interface_to_others(addresses: Sequence[str], own: str) -> str:
    """The interface by which this host reaches the others; empty where all ranks are on one host.

    Where a host's own name leads to 127.0.1.1, as on Debian, rank 0 is by that route on the loopback: the way to
    another host's address then counts.

    Args:
        addresses: of all hosts, see `Meeting`.
        own: this host's among them.
    """
    if len(addresses) == 1:
        return ""
    if _is_loopback(own):
        others = [address for address in addresses if address and not _is_loopback(address)]
        own = address_towards(f"tcp://{f'[{others[0]}]' if ':' in others[0] else others[0]}:1") if others else ""
    return interface_of(own) if own else ""


def _is_loopback(address: str) -> bool:
    return bool(address) and ipaddress.ip_address(address.partition("%")[0]).is_loopback


@contextmanager
def gloo_reaching(interface: str) -> Iterator[None]:
    """While open, gloo binds to this interface; by itself it takes what the host's name leads to.

    What the user has set stands; an empty name changes nothing.
    """
    if not interface or GLOO_INTERFACE in os.environ:
        yield
        return
    os.environ[GLOO_INTERFACE] = interface
    try:
        yield
    finally:
        del os.environ[GLOO_INTERFACE]
