"""Each site alone: what is measured is the divergence, and the Fisher metric predicts it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dist_prune.config.compression import MethodConfig
from dist_prune.config.flags import Rule
from dist_prune.config.images import ImageSpec
from dist_prune.data.dataset import list_images
from dist_prune.data.loader import Batch, evaluation_stream
from dist_prune.data.share import Unsharded
from dist_prune.distributed.fingerprint import digest
from dist_prune.distributed.world import World
from dist_prune.factorization.bases import solve
from dist_prune.factorization.plan import Choice, Plan, make_plan
from dist_prune.factorization.project import project
from dist_prune.factorization.spectra import spectra_of
from dist_prune.network.sites import survey
from dist_prune.statistics.collect import collect
from dist_prune.training.sensitivity import SiteLoss, format_summary, measure_sites, save
from tests.ranks import run_ranks

IMAGES = 3000
METHOD = MethodConfig("fisher", draws=0, damping=1e-9)


def network() -> nn.Module:
    """Linear all through, patches that do not overlap: errors at 16 positions are independent of each other."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 10, 2, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 8), nn.Linear(8, 6)
    )
    with torch.no_grad():
        model[0].weight *= 0.3
    return model


def images() -> torch.Tensor:
    return torch.randn(IMAGES, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def share(rank: int, size: int) -> list[Batch]:
    x, indices = images(), torch.arange(IMAGES)
    labels = torch.zeros(IMAGES, dtype=torch.int64)
    return [Batch(x[i], labels[i], i) for i in indices[rank::size].split(500)]


def measured(world: World) -> tuple[list[SiteLoss], bool]:
    model = network()
    found, before = survey(model, images()[:1]), digest(model)
    statistics = collect(model, found.sites, lambda _: share(world.rank, world.size), world, METHOD, 0)
    bases = solve(model, found.sites, statistics, METHOD, 0, world)
    plan = make_plan(Rule("uniform", 0.3), found, 1, spectra=spectra_of(bases, METHOD))
    compressed = project(model, found.sites, bases, plan)
    losses = measure_sites(model, compressed, plan, lambda: share(0, 1), world)
    return losses, digest(model) == before


@pytest.fixture(scope="module")
def on_two() -> list[tuple[list[SiteLoss], bool]]:
    return run_ranks(measured, 2)


def test_the_fisher_spectrum_predicts_the_divergence_in_nats_per_image(on_two) -> None:
    """Positions and all: an unwanted factor of the 16 rows would be seen."""
    losses, _ = on_two[0]
    assert [s.site for s in losses] == ["0", "3", "4"]
    for loss in losses:
        assert loss.predicted == pytest.approx(loss.measured, rel=0.1), loss.site
        assert loss.measured > 1e-6


def test_ranks_share_the_sites_and_agree(on_two, world: World) -> None:
    (first, kept), (second, kept_too) = on_two
    assert first == second
    assert kept and kept_too, "the dense network must be put back"
    alone, _ = measured(world)
    assert [(s.site, s.rank) for s in alone] == [(s.site, s.rank) for s in first]
    for one, two in zip(alone, first, strict=True):
        assert two.measured == pytest.approx(one.measured, rel=1e-4)
        assert two.predicted == pytest.approx(one.predicted, rel=1e-4)


def test_only_the_one_site_is_compressed(world: World) -> None:
    """A site whose pair is exact does not diverge, however wrong the others are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Linear(6, 4))
    pairs = [nn.Sequential(nn.Linear(12, 6, bias=False), nn.Linear(6, 6)), nn.Sequential(nn.Linear(6, 4))]
    with torch.no_grad():
        pairs[0][0].weight.copy_(model[1].weight)
        pairs[0][1].weight.copy_(torch.eye(6))
        pairs[0][1].bias.copy_(model[1].bias)
    compressed = nn.Sequential(nn.Flatten(), *pairs)
    x = torch.randn(20, 3, 2, 2)
    batch = Batch(x, torch.zeros(20, dtype=torch.int64), torch.arange(20))
    plan = Plan((Choice("1", 6, loss=0.25), Choice("2", 2)))
    exact, wrong = measure_sites(model, compressed, plan, lambda: [batch], world)
    assert (exact.predicted, wrong.predicted) == (0.25, None)
    assert exact.measured == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        p = model(x).double().softmax(1)
        q = pairs[1](model[1](x.flatten(1))).double().softmax(1)
    assert wrong.measured == pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=1e-5)


def test_table_and_file(tmp_path: Path) -> None:
    losses = [SiteLoss("conv1", 6, 0.25, 0.5), SiteLoss("conv2", 3, None, 0.125)]
    lines = format_summary(losses, "KL").splitlines()
    assert lines[0].split() == ["site", "alone", "form", "predicted", "KL", "measured", "KL"]
    assert lines[2].split() == ["conv1", "6", "0.25", "0.5"]
    assert lines[4].split() == ["sum", "0.25", "0.625"]
    save(tmp_path / "sites.json", losses, "KL", 512)
    content = json.loads((tmp_path / "sites.json").read_text())
    assert content["images"] == 512
    assert content["sites"][0] == {"site": "conv1", "rank": 6, "predicted": 0.25, "measured": 0.5, "label": ""}


def seen(world: World, folder: str) -> list[int]:
    split, spec = list_images(Path(folder)), ImageSpec(resize=0, crop=8)
    stream = evaluation_stream(split, spec, Unsharded(world.device, world.local_rank), 3, 1)
    return [i for batch in stream.raw() for i in batch.indices.tolist()]


def test_every_rank_can_see_everything(tmp_path: Path) -> None:
    for i in range(7):
        Image.fromarray(np.full((8, 8, 3), 30 * i, np.uint8)).save(tmp_path / f"{i}.png")
    assert run_ranks(seen, 2, str(tmp_path)) == [list(range(7))] * 2
