"""One trial: its images, and what it measures, against the same done step by step."""

import copy

import pytest
import torch
from torch import Tensor, nn

from dist_prune.config.compression import MethodConfig
from dist_prune.config.correction import CorrectionConfig
from dist_prune.correction.calibration import HELD, Calibration
from dist_prune.correction.correct import correct
from dist_prune.data.views import Views
from dist_prune.distributed.alone import Alone
from dist_prune.distributed.world import World
from dist_prune.factorization.bases import solve
from dist_prune.factorization.nested import nested_of
from dist_prune.factorization.plan import Plan, choose
from dist_prune.factorization.project import project
from dist_prune.network.sites import survey
from dist_prune.search import trial as trials
from dist_prune.search.trial import Ground, TrialImages, gather_images, trial_on
from dist_prune.statistics.collect import collect
from tests.correction.test_correction_walk import Small
from tests.ranks import run_ranks

TOTAL = 203
PLAN = Plan((choose("units.0.conv1", "output", (2,)), choose("units.1.conv2", "output", (3,))))


def calibration(indices: Tensor, mirrored: bool = False) -> Calibration:
    """Images whose every pixel is the image's place in the list, in batches of as many as this rank likes."""
    pixels = indices[:, None, None, None].expand(-1, 3, 2, 2).to(torch.uint8)
    return Calibration(pixels, indices, lambda kept: kept.float(), 7, Views(mirrored))


def gathered(world: World) -> tuple[list[int], list[int], list[int], list[int]]:
    """Every rank has every so many, the last rank of three none at all."""
    ranks = min(world.size, 2)
    own = torch.arange(TOTAL)[world.rank :: ranks] if world.rank < ranks else torch.arange(0)
    found = gather_images(calibration(own.flip(0)), world)
    solved, measured = (each.pixels[:, 0, 0, 0].tolist() for each in (found.solved, found.measured))
    return solved, measured, found.solved.indices.tolist(), found.measured.indices.tolist()


@pytest.mark.parametrize("most", [(128, 2048), (20, 30)])
def test_all_ranks_have_the_same_images_none_for_two_purposes(
    most: tuple[int, int], monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    monkeypatch.setattr(trials, "MOST_SOLVED", most[0])
    monkeypatch.setattr(trials, "MOST_MEASURED", most[1])
    solved, measured, _, _ = gathered(world)
    assert not {*solved} & {*measured}
    assert not [place for place in (*solved, *measured) if place % HELD == 0], "the correction holds these out"
    assert (len(solved), len(measured)) == ((52, 125) if most[0] == 128 else most)
    assert solved == sorted(solved) and max(solved) > 0.9 * TOTAL, "they are spread over the whole list"


def test_any_number_of_ranks_has_the_same_images(world: World) -> None:
    alone = gathered(world)
    for size in (2, 3):
        assert run_ranks(gathered, size) == [alone] * size


def test_what_measures_is_held_out_whole_and_of_what_solves_an_eighth(world: World) -> None:
    found = gather_images(calibration(torch.arange(TOTAL)), world)
    assert sum(len(p) for p, _ in found.measured.batches(held=True)) == len(found.measured.pixels)
    assert sum(len(p) for p, _ in found.solved.batches(held=True)) == -(-len(found.solved.pixels) // HELD)


# ── what is measured ───────────────────────────────────────────────────────────────────────────────────────


def pictures(count: int, seed: int) -> Tensor:
    coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, size=(8, 8), mode="bilinear")


def ground() -> Ground:
    torch.manual_seed(0)
    model = Small().eval()
    nn.init.normal_(model.head.weight, std=2)
    alone, seen = Alone(torch.device("cpu")), pictures(64, 1)
    found, method = survey(model, seen[:1]), MethodConfig("fisher")
    batches = calibration_of(seen).prepared
    sums = collect(model, found.sites, lambda _: batches(), alone, method, 0)
    bases = solve(model, found.sites, sums, method, 0, alone)
    nested = nested_of(model, found.sites, frozenset({"output"}), bases, sums, method.damping, alone)
    return Ground(model, model, found, bases, nested)


def calibration_of(pixels: Tensor, held: bool = False) -> Calibration:
    indices = torch.arange(len(pixels)) * (HELD if held else 1)
    return Calibration(pixels, indices, torch.clone, 16)


@pytest.mark.parametrize("kind", ["none", "regression"])
def test_a_trial_is_corrected_from_some_images_and_measured_on_others(kind: str) -> None:
    own, settings = ground(), CorrectionConfig(kind, calibrate_images=64)
    images = TrialImages(calibration_of(pictures(64, 2)), calibration_of(pictures(40, 3), held=True))
    before = copy.deepcopy(own.dense.state_dict())
    losses = trial_on(own, images, settings, 0)(PLAN)

    network = project(own.dense, own.survey.sites, own.bases, PLAN).eval()
    if kind != "none":
        alone = Alone(torch.device("cpu"))
        correct(own.dense, network, own.survey, calibration_of(pictures(64, 2)), settings, 0, alone)
    with torch.no_grad():
        dense, other = (m(pictures(40, 3)).double().log_softmax(1) for m in (own.dense, network))
    torch.testing.assert_close(losses, (dense.exp() * (dense - other)).sum(1), rtol=1e-4, atol=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.dense.state_dict().items())


def tried(world: World) -> list[list[float]]:
    images = TrialImages(calibration_of(pictures(64, 2)), calibration_of(pictures(40, 3), held=True))
    trial = trial_on(ground(), images, CorrectionConfig(calibrate_images=64), 0)
    return [trial(PLAN).tolist() for _ in range(world.rank + 1)]  # without the others: no two ranks do as much


def test_a_rank_tries_without_the_others_and_finds_the_very_same() -> None:
    found = run_ranks(tried, 3)
    assert [len(losses) for losses in found] == [1, 2, 3]
    assert all(losses == found[0][0] for some in found for losses in some)
