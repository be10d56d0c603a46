"""Ranks find those of their own start and no others, and gloo the network between hosts."""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from dist_prune.distributed import meeting
from dist_prune.distributed.launch_env import LaunchEnv
from dist_prune.distributed.meeting import (
    GLOO_INTERFACE,
    Meeting,
    address_towards,
    gloo_reaching,
    interface_of,
    interface_to_others,
    meet,
)


@pytest.fixture
def store() -> HashStore:
    found = HashStore()
    found.set_timeout(timedelta(seconds=20))
    return found


def come(
    store: HashStore, ranks: Sequence[int], size: int = 3, restart: int = 0, timeout_s: float = 10
) -> list[Meeting | Exception]:
    """What each rank that comes ends with, all at the store at once."""

    def one(rank: int) -> Meeting | Exception:
        place = LaunchEnv(rank, size, rank, "file:///nowhere", "torchrun", restart=restart)
        try:
            return meet(store, place, timeout_s)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, ranks))


def names(found: Sequence[Meeting | Exception]) -> set[str]:
    assert all(isinstance(each, Meeting) for each in found), found
    return {each.name for each in found if isinstance(each, Meeting)}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_all_ranks_of_a_start_agree_on_a_name_that_no_other_start_had(store: HashStore, size: int) -> None:
    first, second = (names(come(store, range(size), size)) for _ in range(2))
    assert len(first) == len(second) == 1
    assert first != second


@pytest.mark.parametrize("came", [[0], [0, 2], [1, 2], [2]])
def test_ranks_that_came_in_a_start_before_do_not_keep_those_of_this_one_apart(
    store: HashStore, came: list[int]
) -> None:
    """A rank died before it joined, and the launcher started all again at the same store."""
    for error in come(store, came, timeout_s=0.3):
        assert isinstance(error, TimeoutError)
    assert len(names(come(store, range(3)))) == 1


def test_a_rank_that_outlived_its_start_is_not_met_by_those_of_the_next(store: HashStore) -> None:
    """As after a preemption: one of eight ranks still lives and finds the new store (submitit#1613)."""
    with ThreadPoolExecutor(2) as pool:
        old = pool.submit(come, store, [2], 3, 0, 1.5)
        time.sleep(0.2)
        new = pool.submit(come, store, [0, 1, 2], 3, 1)
        assert len(names(new.result())) == 1
        (error,) = old.result()
    assert isinstance(error, TimeoutError)


def test_the_ranks_that_did_not_come_are_named(store: HashStore) -> None:
    (error,) = come(store, [0], 4, timeout_s=0.3)
    assert "rank 0 of 4: rank 1, 2, 3 did not come to file:///nowhere in 0.3 s" in str(error)
    (error,) = come(store, [1], 4, timeout_s=0.3)
    assert "rank 1 of 4: rank 0 did not come" in str(error)


def test_a_rank_whose_launcher_is_gone_does_not_wait(store: HashStore, monkeypatch: pytest.MonkeyPatch) -> None:
    parents = iter([7] + [1] * 9)
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    with pytest.raises(ConnectionError, match="torchrun, which started rank 1, is gone"):
        meet(store, LaunchEnv(1, 2, 1, "file:///nowhere", "torchrun", has_launcher=True), 10)


# ── several hosts ──────────────────────────────────────────────────────────────────────────────────────────


def test_on_one_host_gloo_is_left_alone() -> None:
    assert interface_to_others(("127.0.0.1",), "127.0.0.1") == ""
    assert interface_to_others(("",), "") == ""


def test_an_interface_is_found_by_any_of_its_addresses() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.7") == ""


def test_where_the_own_name_leads_to_the_loopback_the_way_to_another_host_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ways = {"tcp://10.0.0.2:1": "10.0.0.1", "tcp://[fd00::2]:1": "fd00::1"}
    monkeypatch.setattr(meeting, "address_towards", lambda url: ways[url])
    monkeypatch.setattr(meeting, "interface_of", {"10.0.0.1": "ib0", "fd00::1": "eth1", "10.0.0.2": "ib1"}.get)
    assert interface_to_others(("10.0.0.2", "127.0.1.1"), "127.0.1.1") == "ib0"
    assert interface_to_others(("::1", "fd00::2"), "::1") == "eth1"
    assert interface_to_others(("10.0.0.2", "127.0.1.1"), "10.0.0.2") == "ib1"


def test_the_own_address_is_that_of_the_route() -> None:
    assert address_towards("tcp://127.0.0.1:4000") == "127.0.0.1"
    assert address_towards("tcp://[::1]:4000") in ("::1", "")  # a machine without IPv6
    assert address_towards("file:///nowhere/meet") == ""
    assert address_towards("tcp://no.such.host.invalid:4000") == ""


def test_what_the_user_says_of_gloo_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(GLOO_INTERFACE, raising=False)
    with gloo_reaching("ib0"):
        assert os.environ[GLOO_INTERFACE] == "ib0"
    assert GLOO_INTERFACE not in os.environ
    monkeypatch.setenv(GLOO_INTERFACE, "eth7")
    with gloo_reaching("ib0"):
        assert os.environ[GLOO_INTERFACE] == "eth7"
