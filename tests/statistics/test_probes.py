import pytest
import torch
from torch import Tensor, nn

from dist_prune.data.loader import Batch
from dist_prune.distributed.world import World
from dist_prune.network.sites import View, survey
from dist_prune.statistics.curvature import Objective, collect_curvature, hessian_step
from dist_prune.statistics.moments import StatisticsError, collect_moments
from dist_prune.statistics.probes import (
    LOSSES,
    Probing,
    _fit,
    collect_global,
    collect_sampled,
    mse,
    perturbed,
    probe_directions,
)
from tests.layers import LAYERS, layer
from tests.ranks import run_ranks


def network(groups: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return (
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, groups=groups),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 3, 3, stride=2),
            nn.Flatten(),
            nn.Linear(12, 3),
        )
        .double()
        .eval()
    )


def data(count: int, first: int = 0) -> Batch:
    """Images that repeat after six: many directions for the same few images."""
    x = torch.randn(6, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    index = torch.arange(first, first + count)
    return Batch(x[index % 6], index % 3, index)


def views(model: nn.Module, side: str = "output") -> list[View]:
    return [View(site, side) for site in survey(model, data(1).images).sites]


def means_of(model: nn.Module, side: str, world: World) -> dict[str, Tensor]:
    return {n: m.mean for n, m in collect_moments(model, views(model, side), [data(6).images], world).items()}


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_direction_written_where_it_is_read_is_projected_out(kind: str, side: str) -> None:
    """After the perturbation nothing is left along v, and all else stays."""
    from dist_prune.network.sites import describe, input_rows, output_rows, weight_of

    module, x = layer(kind)
    site = describe(kind, module)
    view = View(site, side)
    v = probe_directions(view, torch.arange(len(x)), 3)
    mean = torch.randn(site.groups, view.width, dtype=torch.float64)
    dense = module(x)
    with perturbed(module, view, mean, v, v):
        changed = module(x)
    rows = output_rows(site, dense) if side == "output" else input_rows(site, module, x)
    rows = rows.reshape(site.groups, view.width, len(x), -1) - mean[..., None, None]
    left = rows - torch.einsum("ngk,gnp->gknp", v, torch.einsum("ngk,gknp->gnp", v, rows))
    change = left - rows
    if side == "input":
        change = torch.einsum("gcd,gdnp->gcnp", weight_of(module, site), change)
    found = output_rows(site, changed - dense)
    torch.testing.assert_close(found, change.reshape(found.shape))


def test_a_known_quadratic_form_is_recovered_without_bias(world: World) -> None:
    """Synthetic losses vᵀHv: the estimate's error is noise that falls as 1/√n around zero."""
    generator = torch.Generator().manual_seed(4)
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    hessian = root @ root.T
    view = View(survey(nn.Sequential(nn.Flatten(), nn.Linear(7, 5)), torch.zeros(1, 7)).sites[0])
    estimates = []
    for seed in range(60):
        indices = torch.arange(2000)
        v = probe_directions(view, indices, seed)[:, 0]
        losses = torch.einsum("nk,kl,nl->n", v, hessian, v)
        estimates.append(_fit(view, indices, losses, Probing(mse, seed), world)[0])
    stacked = torch.stack(estimates)
    error = stacked.mean(0) - hessian
    spread = stacked.std(0) / len(estimates) ** 0.5
    assert (error.abs() < 4.5 * spread).all()
    assert error.norm() < 0.02 * hessian.norm()
    (one,) = [_fit(view, indices[:1000], losses[:1000], Probing(mse, 59), world)[0]]
    assert (one - hessian).norm() < 0.5 * hessian.norm()


@pytest.mark.parametrize("loss", LOSSES)
def test_global_probes_find_the_losses_own_hessian(loss: str, world: World) -> None:
    """The mse of the last layer is exactly quadratic: H = Σ_images ½(y−ȳ)(y−ȳ)ᵀ∘I…, known in closed form."""
    model = network()
    (*_, view) = views(model)
    means = means_of(model, "output", world)
    found = collect_global(model, [view], [data(6000)], world, Probing(LOSSES[loss]), means)["4"][0]
    rows = model(data(6).images).detach() - means["4"]
    if loss == "mse":  # l = ½(vᵀa)²·‖v‖², so H = ½E[a aᵀ]
        expected = rows.T @ rows / 12
        assert (found - expected).norm() < 0.12 * expected.norm()
    assert torch.equal(found, found.T)
    assert torch.linalg.eigvalsh(found)[-1] > 0


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("loss", LOSSES)
def test_sampling_approaches_the_closed_form_as_one_over_root_n(loss: str, side: str, world: World) -> None:
    model = network()
    means = means_of(model, side, world)
    chosen = views(model, side)[1:]
    objective = Objective(loss.removesuffix("-reverse"), draws=0)
    exact = collect_curvature(model, chosen, [data(6)], world, hessian_step, objective, means)
    errors = {}
    for count in (240, 240 * 16):
        squares = []
        for seed in range(4):
            probing = Probing(LOSSES[loss], seed)
            batches = [data(480, start) for start in range(0, count, 480)] if count > 480 else [data(count)]
            found = collect_sampled(model, chosen, batches, world, probing, means)
            squares.append(torch.stack([((found[n] - exact[n]).norm() / exact[n].norm()) ** 2 for n in exact]))
        errors[count] = torch.stack(squares).mean(0).sqrt()
    ratio = errors[240] / errors[240 * 16]
    assert (ratio > 2.2).all() and (ratio < 7.5).all(), ratio  # 4 in the mean
    assert (errors[240 * 16] < 0.5).all()


def probe_share(world: World, side: str, rank_loss: bool) -> dict[str, Tensor]:
    model = network(groups=2)
    cuts = {1: [0, 40], 2: [0, 33, 40], 3: [0, 30, 40, 40]}[world.size]
    start, stop = cuts[world.rank], cuts[world.rank + 1]
    batches = [data(0, start), *(data(min(7, stop - i), i) for i in range(start, stop, 7))]
    moments = collect_moments(model, views(model, side), [b.images for b in batches], world)
    means = {n: m.mean for n, m in moments.items()}
    probing = Probing(LOSSES["kl"], 2, rank_loss)
    found = collect_global(model, views(model, side), batches, world, probing, means)
    if not rank_loss:
        sampled = collect_sampled(model, views(model, side), batches, world, probing, means)
        found |= {f"sampled {name}": matrix for name, matrix in sampled.items()}
    return found


@pytest.mark.parametrize("rank_loss", [False, True])
@pytest.mark.parametrize("side", ["output", "input"])
def test_any_number_of_uneven_ranks_gives_the_same(side: str, rank_loss: bool) -> None:
    (alone,) = run_ranks(probe_share, 1, side, rank_loss)
    for size in (2, 3):
        for found in run_ranks(probe_share, size, side, rank_loss):
            for name, expected in alone.items():
                torch.testing.assert_close(found[name], expected, rtol=1e-8, atol=1e-9 * expected.abs().max())


def test_ranks_of_losses_depend_on_their_order_only(world: World) -> None:
    """Squaring positive losses changes H, but not its rank version."""
    model = network()
    means = means_of(model, "output", world)

    def squared(dense: Tensor, changed: Tensor) -> Tensor:
        return mse(dense, changed).square()

    plain, twisted = (
        collect_global(model, views(model), [data(50)], world, Probing(loss, 0, rank_loss=True), means)
        for loss in (mse, squared)
    )
    for name in plain:
        assert torch.equal(plain[name], twisted[name])


def test_losses_that_are_no_numbers_name_the_site(world: World) -> None:
    model = network()
    means = means_of(model, "output", world)
    with torch.no_grad():
        model[4].bias[0] = float("nan")
    with pytest.raises(StatisticsError, match=r"^0: the loss of a probe is NaN or infinite"):
        collect_global(model, views(model), [data(6)], world, Probing(mse), means)
