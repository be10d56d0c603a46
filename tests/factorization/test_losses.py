"""Against layers that are really built, and bases that are really solved, in float64."""

import pytest
import torch
from torch import Tensor, nn

from dist_prune.config.compression import MethodConfig
from dist_prune.data.loader import Batch
from dist_prune.distributed.world import World
from dist_prune.factorization.bases import by_fisher, solve
from dist_prune.factorization.forms import FORMS, folded
from dist_prune.factorization.losses import DRAWS, FOLDS, continued, cross_fitted, descending, with_exact_losses
from dist_prune.factorization.nested import nested_of
from dist_prune.factorization.plan import Choice, Plan
from dist_prune.factorization.project import project
from dist_prune.factorization.spectra import Spectra, spectra_of
from dist_prune.network.sites import Survey, View, survey, weight_of
from dist_prune.statistics import collect as statistics
from dist_prune.statistics.moments import collect_moments
from dist_prune.statistics.second_order import Sample
from tests.gradients import per_image
from tests.ranks import run_ranks

IMAGES = 12


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(6, 8, 3, padding=1, groups=2),
        nn.Tanh(),
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 20)).double().eval()


def batches(start: int = 0, stop: int = IMAGES) -> list[Batch]:
    x = torch.randn(IMAGES, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [Batch(x[start:stop], torch.full((stop - start,), -1), torch.arange(start, stop))]


METHOD = MethodConfig("fisher", draws=3)


def found(world: World, share: list[Batch]) -> tuple[nn.Module, Survey, Spectra, object]:
    model = network()
    known = survey(model, batches()[0].images[:1])
    sums = statistics.collect(model, known.sites, lambda _: share, world, METHOD, 0, None, patches=True)
    bases = solve(model, known.sites, sums, METHOD, 0, world)
    nested = nested_of(model, known.sites, FORMS, bases, sums, METHOD.damping, world)
    spectra = spectra_of(bases, METHOD, nested)
    exact = with_exact_losses(spectra, model, known.sites, bases, nested, sums, lambda _: share, world, METHOD, 5)
    return model, known, exact, (bases, nested)


@pytest.mark.parametrize("form", ["output", "input", "vertical", "horizontal"])
@pytest.mark.parametrize("name", ["0", "2"])
def test_an_option_is_predicted_to_lose_what_its_layers_lose(form: str, name: str, world: World) -> None:
    model, known, spectra, (bases, nested) = found(world, batches())
    site = next(site for site in known.sites if site.name == name)
    mean = collect_moments(model, [View(site, "input")], [batches()[0].images], world)[name].mean
    gradients = torch.stack(
        [per_image(model, site, batches()[0], mean, 5, f"signs {d}") for d in range(DRAWS)]
    ).detach()
    weight = weight_of(model.get_submodule(name), site)
    least = float((gradients * weight).sum((2, 3, 4)).square().mean() / 2)
    for rank in range(site.groups, min(5, FORMS[form].full_ranks(site)[0] + 1), site.groups):
        plan = Plan((Choice(name, rank, form=form, ranks=(rank,)),))
        layers = project(model, [site], bases, plan, "output", nested).get_submodule(name)
        change = weight - folded(layers).flatten(2)
        least = min(least, float((gradients * change).sum((2, 3, 4)).square().mean() / 2))
        assert spectra.of_options(site, [(form, (rank,))])[0] == pytest.approx(least, rel=1e-6)  # none loses more


def test_both_projections_of_tucker_are_counted_with_what_they_lose_together(world: World) -> None:
    model, known, spectra, (bases, nested) = found(world, batches())
    site = known.sites[0]
    mean = collect_moments(model, [View(site, "input")], [batches()[0].images], world)["0"].mean
    gradients = torch.stack(
        [per_image(model, site, batches()[0], mean, 5, f"signs {d}") for d in range(DRAWS)]
    ).detach()
    weight, change = weight_of(model[0], site), torch.zeros(())
    for form, rank in (("input", 2), ("output", 5)):
        plan = Plan((Choice("0", rank, form=form, ranks=(rank,)),))
        layers = project(model, [site], bases, plan, "output", nested).get_submodule("0")
        change = change + weight - folded(layers).flatten(2)
    loss = (gradients * change).sum((2, 3, 4)).square().mean() / 2
    assert spectra.of_options(site, [("tucker", (2, 5))])[0] == pytest.approx(float(loss), rel=0.3)


def curves(world: World) -> dict[str, dict[str, list[float]]]:
    share = batches() if world.size == 1 else [batches(0, 3), batches(3), []][world.rank]
    _, _, spectra, _ = found(world, share)
    return {
        site: {form: curve.flatten().tolist() for form, curve in own.items()}
        for site, own in spectra.exact.items()
    }


@pytest.mark.parametrize("size", [2, 3])
def test_losses_depend_on_no_number_of_ranks(size: int) -> None:
    (alone,) = run_ranks(curves, 1)
    for several in run_ranks(curves, size):
        for site, own in alone.items():
            for form, curve in own.items():
                assert several[site][form] == pytest.approx(curve, rel=1e-6, abs=1e-15)


def weighed(inputs: int, width: int, groups: int = 1) -> Tensor:
    """A weight of fewer strong inputs than there are."""
    generator = torch.Generator().manual_seed(4)
    scales = torch.linspace(0, 4, inputs).neg().exp().double()
    return torch.randn(groups, width, inputs, generator=generator, dtype=torch.float64) * scales


def sample(rows: int, weight: Tensor) -> Sample:
    """Outputs of a weight, and gradients of a few strong directions; two rows for each image."""
    generator, (groups, width, inputs) = torch.Generator().manual_seed(3), weight.shape
    scales = torch.linspace(0, 4, width).neg().exp().double()
    x = torch.randn(rows, groups, inputs, generator=generator, dtype=torch.float64)
    g = torch.randn(2, rows, groups, width, generator=generator, dtype=torch.float64) * scales.flip(0)
    return Sample(torch.arange(rows) // 2 * 3, torch.einsum("gcd,ngd->ngc", weight, x) + 1, g)


@pytest.mark.parametrize(
    ("rows", "inputs", "width", "groups"),
    [(40, 9, 6, 1), (40, 6, 6, 2), (16, 30, 30, 1), (40, 4, 9, 2), (16, 20, 30, 1)],
)
def test_few_rows_are_predicted_from_bases_of_other_images(
    rows: int, inputs: int, width: int, groups: int
) -> None:
    weight = weighed(inputs, width, groups)
    given, known = sample(rows, weight), []
    images = torch.arange(rows) // 2
    for fold in range(FOLDS):
        held = images % FOLDS == fold
        seen, gradients = given.rows[~held], given.gradients[:, ~held].flatten(0, 1)
        mean = seen.mean(0)
        basis = by_fisher(moments(seen), torch.einsum("ngc,ngd->gcd", gradients, gradients), 0.01)
        known_rank = min(width, inputs, len(seen) - 1)
        for image in images[held].unique():
            rows_, g = given.rows[images == image] - mean, given.gradients[:, images == image]
            total = torch.einsum("pgc,dpgc->d", rows_, g)
            encoded, decoded = (
                torch.einsum("gkc,pgc->pgk", basis.encode, rows_),
                torch.einsum("gck,dpgc->dpgk", basis.decode, g),
            )
            each = (encoded * decoded).sum((1, 2))
            tails = torch.cat([total[:, None], total[:, None] - each.cumsum(1)], 1)[:, : known_rank + 1]
            known.append(tails.square().mean(0) / 2)
    curve = cross_fitted(given, 0.01, weight)
    full_rank, shortest = min(width, inputs), min(map(len, known))
    expected = torch.stack([k[:shortest] for k in known]).mean(0)
    torch.testing.assert_close(curve.loss[: min(shortest, full_rank)], expected[:full_rank], rtol=1e-6, atol=1e-12)


def moments(rows: Tensor) -> statistics.Moments:
    shift = rows.new_zeros(rows.shape[1:])
    outer = torch.einsum("ngc,ngd->gcd", rows, rows)
    return statistics.Moments(torch.tensor(float(len(rows)), dtype=torch.float64), shift, rows.sum(0), outer)


def test_directions_that_no_row_shows_are_not_free(world: World) -> None:
    """A classifier with more outputs than there are images: its own rows say that a few directions are enough."""
    _, known, spectra, _ = found(world, batches())
    linear = known.sites[-1]
    assert (linear.name, linear.width) == ("6", 20) and linear.width > IMAGES
    told, predicted = spectra.tails("6"), spectra.losses("6", "output")
    assert told[IMAGES - 1] < 1e-9 * told[0]
    assert predicted[IMAGES - 1] == predicted[19] > 0.05 * predicted[0]
    assert predicted[20] == 0


def test_a_full_rank_of_the_weight_loses_nothing() -> None:
    weight = weighed(5, 30)
    curve = cross_fitted(sample(16, weight), 0.01, weight)
    assert (curve.loss[:5] > 0).all() and not curve.loss[5:].any()


def test_one_image_says_nothing_of_others() -> None:
    weight = weighed(4, 4)
    assert torch.isinf(cross_fitted(sample(2, weight), 0.01, weight).loss).all()


def test_curves_descend_and_go_on_as_the_spectrum_does() -> None:
    exact = torch.tensor([4.0, 1.0, 2.0]).numpy()
    spectrum = torch.tensor([8.0, 3.0, 1.0, 0.5, 0.0]).numpy()
    assert descending(exact).tolist() == [4, 1, 1]
    assert continued(exact, spectrum).tolist() == [4, 1, 1, 1, 0]


@pytest.mark.parametrize("method", [MethodConfig("pca"), MethodConfig("fisher", loss_images=0)])
def test_of_other_methods_sites_with_few_rows_are_not_free(method: MethodConfig, world: World) -> None:
    model = network()
    known = survey(model, batches()[0].images[:1])
    sums = statistics.collect(model, known.sites, lambda _: batches(), world, method, 0)
    spectra = spectra_of(solve(model, known.sites, sums, method, 0, world), method)
    found = with_exact_losses(spectra, model, known.sites, {}, {}, sums, lambda _: [], world, method, 0)
    for name in ("0", "2"):  # as many rows as are wanted
        assert (found.losses(name, "output") == spectra.tails(name)).all()
    tails, losses = spectra.tails("6"), found.losses("6", "output")
    assert tails[IMAGES] < 1e-9 * tails[0]
    assert losses[2] == pytest.approx(tails[2] / (1 - 2 / IMAGES) ** 2)
    assert losses[9] == losses[19] == pytest.approx(16 * tails[9]) and losses[9] > 1e-3 * tails[0]
    assert losses[20] == 0
