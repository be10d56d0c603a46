"""Two hosts: network namespaces with an address each, joined by a cable, under one torchrun on either.

As Debian installs it, each host's own name leads to 127.0.1.1.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.commands import ROOT

ADDRESSES = ("10.213.7.1", "10.213.7.2")
PORT = "29471"
LIMIT_S = 60


@dataclass(frozen=True)
class Host:
    """A process that holds the namespaces of a host."""

    name: str
    pid: int

    def words(self, *command: str) -> list[str]:
        return ["nsenter", "-t", str(self.pid), "--net", "--uts", "--mount", *command]


def do(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)


@contextmanager
def host(name: str, folder: Path, hosts: str) -> Iterator[Host]:
    holder = subprocess.Popen(
        ["unshare", "--net", "--uts", "--mount", "sh", "-c", "echo here; exec sleep 300"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout
        if holder.stdout.readline() != "here\n":
            raise PermissionError("unshare: not permitted")
        found, path = Host(name, holder.pid), folder / f"hosts.{name}"
        path.write_text(hosts)
        do(*found.words("hostname", name))
        do(*found.words("mount", "--bind", str(path), "/etc/hosts"))
        do(*found.words("ip", "link", "set", "lo", "up"))
        yield found
    finally:
        holder.kill()
        holder.wait()


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    names = [f"left{os.getpid()}", f"right{os.getpid()}"]
    with ExitStack() as stack:
        try:
            found = []
            for own, (name, address) in enumerate(zip(names, ADDRESSES, strict=True)):
                other = f"{ADDRESSES[1 - own]} {names[1 - own]}"
                hosts = f"127.0.0.1 localhost\n127.0.1.1 {name}\n{other}\n"
                found.append((stack.enter_context(host(name, tmp_path, hosts)), address))
            ends = [f"dp{place.pid}" for place, _ in found]
            do("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            for end, (place, address) in zip(ends, found, strict=True):
                do("ip", "link", "set", end, "netns", str(place.pid))
                do(*place.words("ip", "addr", "add", f"{address}/24", "dev", end))
                do(*place.words("ip", "link", "set", end, "up"))
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"this machine does not allow network namespaces: {getattr(error, 'stderr', '') or error}")
        yield found[0][0], found[1][0]


MEET = r"""
import os, torch
from torch import nn
from dist_prune.distributed.world import joined
with joined("cpu", 30) as world:
    numbers = torch.full((1000,), world.rank + 1.0)
    world.sum_(numbers)
    replica = world.replicate(nn.Linear(3, 1))
    replica(torch.ones(2, 3) * world.rank).sum().backward()
    said = world.gather((float(numbers[0]), float(replica.module.weight.grad[0, 0])))
    os.write(1, f"RESULT {world.rank} {world.size} {said}\n".encode())
"""


def run_on_both(two: tuple[Host, Host], script: Path, *meeting: str) -> list[str]:
    """What torchrun says on either host, with two ranks on each."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2", *meeting]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env.pop("GLOO_SOCKET_IFNAME", None)
    started = [
        subprocess.Popen(
            place.words(*launch, "--node-rank", str(rank), str(script)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
        )
        for rank, place in enumerate(two)
    ]
    said = ["", ""]
    try:
        for place, each in enumerate(started):
            try:
                said[place] = each.communicate(timeout=LIMIT_S)[0]
            except subprocess.TimeoutExpired:
                each.kill()
                said[place] = f"{each.communicate()[0]}\nhung, killed after {LIMIT_S} s"
    finally:
        for each in started:
            each.kill()
    return said


@pytest.mark.parametrize(
    "meeting",
    [
        ["--rdzv-backend", "c10d", "--rdzv-id", "7", "--rdzv-endpoint", f"LEFT:{PORT}"],
        pytest.param(["--master-addr", ADDRESSES[0], "--master-port", PORT], marks=pytest.mark.slow),
        pytest.param(["--master-addr", "LEFT", "--master-port", PORT], marks=pytest.mark.slow),
    ],
    ids=["c10d", "address", "name"],
)
def test_ranks_of_two_hosts_meet_though_each_name_leads_to_the_loopback(
    two: tuple[Host, Host], tmp_path: Path, meeting: list[str]
) -> None:
    (tmp_path / "meet.py").write_text(MEET)
    words = [word.replace("LEFT", two[0].name) for word in meeting]
    said = run_on_both(two, tmp_path / "meet.py", *words)
    lines = sorted(line for text in said for line in text.splitlines() if line.startswith("RESULT"))
    assert lines == [f"RESULT {rank} 4 {[(10.0, 3.0)] * 4}" for rank in range(4)], "\n".join(said)
