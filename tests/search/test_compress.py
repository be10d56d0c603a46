"""`compress(…, search=N)`: a network at hand, in one process and in a group."""

import pytest
import torch
from torch import Tensor

from dist_prune import ConfigError, compress
from dist_prune.distributed.world import World
from tests.ranks import run_ranks
from tests.test_api_process import images, model, share

BUDGET = "budget:macs=0.35"


def searched(world: World) -> tuple[dict[str, str], float, dict[str, Tensor]]:
    found = compress(model(), share(world), BUDGET, calibrate_images=60, search=10)
    return (
        {name: choice.label for name, choice in found.plan.factored.items()},
        found.lost,
        found.model.state_dict(),
    )


def test_the_ranks_of_a_group_choose_what_one_process_chooses() -> None:
    alone = compress(model(), images().split(8), BUDGET, calibrate_images=60, search=10)
    everywhere = run_ranks(searched, 3)
    for labels, lost, state in everywhere:
        assert labels == {name: choice.label for name, choice in alone.plan.factored.items()}
        assert lost == pytest.approx(alone.lost, rel=1e-2)
        assert all(torch.equal(tensor, everywhere[0][2][name]) for name, tensor in state.items())


def test_one_candidate_is_no_search_and_every_budget_is_searched_again() -> None:
    given = list(images().split(8))
    one, none = (compress(model(), given, BUDGET, search=count) for count in (1, 0))
    assert one.plan == none.plan and one.lost == none.lost
    many = compress(model(), given, BUDGET, search=10)
    assert many.replan(BUDGET).plan == many.plan
    assert many.compressed.macs <= 0.35 * many.dense.macs


def test_what_cannot_be_searched_is_said_in_arguments() -> None:
    with pytest.raises(
        ConfigError, match=r"^search 3 with ranks uniform:0\.5 and forms auto: candidates are plans"
    ):
        compress(model(), [images()], "uniform:0.5", search=3)
