"""What several tests need: one thread, a size-1 world, a network's sites, and whole runs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from dist_prune.distributed.world import World, joined
from dist_prune.network.models import build
from dist_prune.network.sites import Survey, survey
from tests.browser import Browser, browsing
from tests.commands import shared_commands
from tests.runs import NETWORK, WHOLE, Bench, torchrun, write_images, write_weights

torch.set_num_threads(1)


class ByFile(LoadScopeScheduling):
    """A file's tests share what they prepare, and all tests on a cluster the cluster: each stay in one process."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "slurm" if "slurm/" in file else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile:
    return ByFile(config, log)


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    with joined("cpu") as alone:
        yield alone


@pytest.fixture(scope="session")
def resnet20() -> Survey:
    return survey(build("resnet20", 10), torch.zeros(1, 3, 32, 32))


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    home = tmp_path_factory.mktemp("bench")
    (home / "net.py").write_text(NETWORK)
    data = write_images(home / "images")
    return Bench(shared_commands(), data, home / "net.py", write_weights(home / "weights.pt", data))


@pytest.fixture(scope="session")
def whole_run(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage on 2 ranks, with a warning."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    bench.commands.succeed(*bench.words(folder, **WHOLE), ranks=2)
    return folder


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with browsing() as found:
        yield found


@pytest.fixture(scope="session")
def runs(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same run on 1, 2 and 3 ranks; the one on 2 is started by torchrun itself."""
    home = tmp_path_factory.mktemp("runs")
    bench.commands.succeed(*bench.words(home / "1"), ranks=0)
    bench.commands.succeed(*bench.words(home / "3"), ranks=3)
    done = torchrun(bench.commands, *bench.words(home / "2"))
    assert done.returncode == 0, done.stdout + done.stderr
    return {ranks: home / str(ranks) for ranks in (1, 2, 3)}
