"""Distillation: when images held out are looked at, and how far its weights are followed."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from dist_prune.distributed.world import World
from dist_prune.run.distill import CHECKS, EVERY, bearable, best_share, is_checked
from dist_prune.run.holdout import Holdout, between, holding, weights_of
from dist_prune.run.state import State, Undistilled
from tests.ranks import run_ranks


@pytest.mark.parametrize("steps", [1, 8, 19, 20, 21, 160, 300, 2000])
def test_images_held_out_are_looked_at_after_the_last_step_and_eight_times_at_most(steps: int) -> None:
    shown = sorted({*range(EVERY, steps + 1, EVERY), steps})
    checked = [step for step in shown if is_checked(step, steps)]
    assert checked[-1] == steps and len(checked) == min(CHECKS, len(shown))
    gaps = [b - a for a, b in itertools.pairwise([0, *checked])]
    assert max(gaps) - min(gaps) <= 2 * EVERY or steps < CHECKS * EVERY


def test_more_loss_than_before_is_borne_for_three_quarters_of_the_steps_and_less_and_less_of_it() -> None:
    most = [bearable(step / 8) for step in range(1, 9)]
    assert most == pytest.approx([17 / 12, 16 / 12, 15 / 12, 14 / 12, 13 / 12, 1, 1, 1])


def test_the_weights_before_are_in_a_checkpoint() -> None:
    model = nn.Linear(3, 2)
    before = Undistilled(0.125, {name: value + 1 for name, value in model.state_dict().items()}, 0.01, 40)
    later = State(model)
    later.load_state_dict(copy.deepcopy(State(model, undistilled=before).state_dict()))
    assert later.undistilled is not None
    assert (later.undistilled.kl, later.undistilled.lr, later.undistilled.taken_back) == (0.125, 0.01, 40)
    for name, value in model.state_dict().items():
        assert torch.equal(later.undistilled.weights[name], value + 1)


def test_a_point_between_weights_is_at_that_share_of_the_way_and_counters_are_the_last() -> None:
    one = {"w": torch.tensor([0.0, 4.0]), "n": torch.tensor(3)}
    other = {"w": torch.tensor([4.0, 0.0]), "n": torch.tensor(7)}
    found = between(one, other, 0.25)
    assert (found["w"].tolist(), int(found["n"])) == ([1.0, 3.0], 7)
    lost = {"w": torch.full((2,), torch.nan), "n": torch.tensor(7)}
    assert between(one, lost, 0)["w"].tolist() == [0.0, 4.0]


def held_out(world: World) -> tuple[nn.Module, Holdout]:
    """A dense network, and images of which rank 0 has more than the others together."""
    torch.manual_seed(0)
    dense, x = nn.Linear(6, 5).eval(), torch.randn(40, 6)
    own = x[: 25 if world.size > 1 else 40] if world.rank == 0 else x[25 + world.rank - 1 :: world.size - 1]
    with torch.no_grad():
        return dense, Holdout([(part, dense(part)) for part in own.split(8)], lambda pixels: pixels, world)


def preferred(world: World) -> tuple[bool, bool, bool, bool]:
    """Between weights near to the dense network's and others."""
    dense, holdout = held_out(world)
    exact = {name: value.clone() for name, value in dense.state_dict().items()}
    noise = {name: 0.05 * torch.randn_like(value) for name, value in exact.items()}

    def at(scale: float) -> dict[str, Tensor]:
        return {name: value + scale * noise[name] for name, value in exact.items()}

    def prefers(other: float, own: float) -> bool:
        dense.load_state_dict(at(own))
        with holding(dense, at(other)):
            others = holdout.losses(dense)
        found = holdout.prefers(others, holdout.losses(dense))
        assert all(torch.equal(value, at(own)[name]) for name, value in dense.state_dict().items())
        return found

    with torch.no_grad():
        return prefers(0, 1), prefers(1, 0), prefers(1, 1), prefers(-1, 1) or prefers(1, -1)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_earlier_weights_are_kept_only_where_they_are_better_by_more_than_chance(size: int) -> None:
    for clearly, worse, same, by_chance in run_ranks(preferred, size):
        assert clearly and not worse and not same and not by_chance


def shares(world: World) -> list[float]:
    """How far it is gone towards the dense network's own weights, past them by as much, away from them."""
    dense, holdout = held_out(world)
    exact = weights_of(dense)
    off = {name: value + 0.05 * torch.randn_like(value) for name, value in exact.items()}

    def share(start: float, end: float) -> float:
        with torch.no_grad(), holding(dense, between(exact, off, start)):
            before = Undistilled(holdout.kl(dense), weights_of(dense), 0.01)
        with torch.no_grad(), holding(dense, between(exact, off, end)):
            return best_share(dense, before, holdout)[0]

    return [share(1, 0), share(1, -1), share(1, -3), share(1, -1.1), share(0, 1), share(1, 2)]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_weights_are_followed_as_far_as_they_help_on_images_held_out(size: int) -> None:
    assert run_ranks(shares, size) == [[1.0, 0.5, 0.25, 0.5, 0.0, 0.0]] * size


@pytest.mark.parametrize(("end", "kept"), [(0.9, 1.0), (1.1, 0.25)])
def test_an_end_no_better_than_the_beginning_is_not_kept_however_little_speaks_for_another_point(
    monkeypatch: pytest.MonkeyPatch, world: World, end: float, kept: float
) -> None:
    """Where nothing is clear, as with very few images held out: all the way, but only if that is better."""
    kls = iter([end, 1.0, 1.0, 0.8])  # at the end, at ¾, ½ and ¼ of the way to it; 1.0 at the beginning
    monkeypatch.setattr(Holdout, "mean", lambda *_: next(kls))
    monkeypatch.setattr(Holdout, "prefers", lambda *_: False)
    layer = nn.Linear(2, 2)
    share, _ = best_share(
        layer, Undistilled(1.0, weights_of(layer), 0.01), Holdout([], lambda pixels: pixels, world)
    )
    assert share == kept
