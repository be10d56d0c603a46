"""Against autograd's own Jacobians and Hessians in float64, never against the code itself."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_prune.data.loader import Batch
from dist_prune.distributed.world import World
from dist_prune.network.sites import View, input_rows, output_rows, survey
from dist_prune.statistics.curvature import STEPS, Objective, collect_curvature, hessian_step
from dist_prune.statistics.moments import StatisticsError, collect_moments
from tests.gradients import tensors_alive
from tests.ranks import run_ranks

IMAGES, CLASSES = 11, 4


def network(relu_in_place: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return (
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.ReLU(relu_in_place),
            nn.Conv2d(4, 6, 3, stride=2, groups=2, padding=1),
            nn.BatchNorm2d(6),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(54, CLASSES),
        )
        .double()
        .eval()
    )


def batch(start: int = 0, stop: int = IMAGES) -> Batch:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(IMAGES, 3, 6, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (IMAGES,), generator=generator)
    return Batch(x[start:stop], labels[start:stop], torch.arange(start, stop))


def views(model: nn.Module, side: str = "output", chunk_bytes: int = 1 << 27) -> list[View]:
    return [View(site, side, chunk_bytes) for site in survey(model, batch().images[:1]).sites]


def per_image(view: View, mean: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each image: centred rows (g, k, P), Jacobian of the logits by its rows (classes, g, k, P), logits."""
    index, model = int(view.site.name), network(relu_in_place=False)
    for x in batch().images.split(1):
        before = model[:index](x).detach()
        module = model[index]

        def tail(y: Tensor) -> Tensor:
            return model[index + 1 :](y)[0]

        y = module(before).detach()
        jacobian = torch.autograd.functional.jacobian(tail, y)[:, 0]  # classes × the output's shape
        stacked = output_rows(view.site, jacobian).transpose(0, 1)  # classes, C, P
        stacked = stacked.reshape(CLASSES, view.site.groups, view.site.width, -1)
        if view.side == "input":
            weight = module.weight.detach().reshape(view.site.groups, view.site.width, -1)
            stacked = torch.einsum("gcd,zgcp->zgdp", weight, stacked)
            rows = input_rows(view.site, module, before)
        else:
            rows = output_rows(view.site, y)
        rows = rows.detach().reshape(view.site.groups, view.width, -1)
        yield rows - mean[..., None], stacked, model(x)[0].detach()


def means_of(model: nn.Module, side: str, world: World) -> dict[str, Tensor]:
    moments = collect_moments(model, views(model, side), [batch().images], world)
    return {name: m.mean for name, m in moments.items()}


@pytest.mark.parametrize("side", ["output", "input"])
def test_gradient_is_the_mean_of_rows_times_task_gradients(side: str, world: World) -> None:
    model = network()
    means = means_of(model, side, world)
    found = collect_curvature(
        model, views(model, side), [batch()], world, STEPS["gradient"], Objective("task"), means
    )
    for view in views(model, side):
        expected = 0
        for (rows, jacobian, logits), label in zip(
            per_image(view, means[view.site.name]), batch().labels, strict=True
        ):
            error = logits.softmax(0) - F.one_hot(label, CLASSES)
            gradients = torch.einsum("z,zgkp->gkp", error, jacobian)
            expected = expected + rows @ gradients.mT / IMAGES
        expected = (expected + expected.mT) / 2
        torch.testing.assert_close(found[view.site.name], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_exact_fisher_is_the_gauss_newton_matrix_summed_over_positions(loss: str, world: World) -> None:
    model = network()
    found = collect_curvature(model, views(model), [batch()], world, STEPS["fisher"], Objective(loss, draws=0))
    for view in views(model):
        expected = 0
        for _, jacobian, logits in per_image(view, torch.zeros(view.site.groups, view.width)):
            p = logits.softmax(0)
            metric = torch.eye(CLASSES).double() if loss == "mse" else p.diag() - p[:, None] * p
            expected = expected + torch.einsum("zgkp,zy,yglp->gkl", jacobian, metric, jacobian) / IMAGES
        torch.testing.assert_close(found[view.site.name], expected, rtol=1e-9, atol=1e-12)


def spherical_design(width: int) -> Tensor:
    """Unit vectors that average every polynomial of degree ≤ 5 as the sphere does, in 2, 3 or 4 dimensions."""
    if width == 2:
        angles = torch.arange(6).double() * torch.pi / 3
        return torch.stack([angles.cos(), angles.sin()], 1)
    if width == 3:  # the icosahedron
        golden = (1 + 5**0.5) / 2
        corners = [(0, s, t * golden) for s in (1, -1) for t in (1, -1)]
        turned = [c[i:] + c[:i] for c in corners for i in range(3)]
    else:  # the 24-cell
        assert width == 4
        signs = [(a, b, c, d) for a in (1, -1) for b in (1, -1) for c in (1, -1) for d in (1, -1)]
        turned = signs + [tuple(2 * s * (i == j) for j in range(4)) for i in range(4) for s in (1, -1)]
    return F.normalize(torch.tensor(turned, dtype=torch.float64), dim=1)


@pytest.mark.parametrize("width", [2, 3, 4])
def test_the_designs_have_the_moments_of_the_sphere(width: int) -> None:
    v = spherical_design(width)
    fourth = torch.einsum("ni,nj,nk,nl->ijkl", v, v, v, v) / len(v)
    eye = torch.eye(width).double()
    pairs = [torch.einsum(s, eye, eye) for s in ("ij,kl->ijkl", "ik,jl->ijkl", "il,jk->ijkl")]
    torch.testing.assert_close(fourth, sum(pairs) / (width * (width + 2)), rtol=0, atol=1e-14)


def loss_of_change(
    model: nn.Module, view: View, mean: Tensor, x: Tensor, v: Tensor, w: Tensor, loss: str
) -> Tensor:
    """The image's loss when each output row a_p becomes a_p − v·wᵀ(a_p − mean); one group only."""
    index = int(view.site.name)
    y = model[: index + 1](x).detach()
    rows = y.flatten(2)[0] if y.dim() == 4 else y[0][:, None]
    changed = rows - v[:, None] * (w @ (rows - mean[0][:, None]))
    z, changed_z = model(x)[0].detach(), model[index + 1 :](changed.reshape(y.shape))[0]
    if loss == "mse":
        return (changed_z - z).square().sum() / 2
    p, q = z.log_softmax(0), changed_z.log_softmax(0)
    return (p.exp() * (p - q)).sum() if loss == "kl" else (q.exp() * (q - p)).sum()


@pytest.mark.parametrize("loss", ["kl", "kl-reverse", "mse"])
@pytest.mark.parametrize("name", ["0", "6"])
def test_closed_form_local_hessian_is_autograds_averaged_over_directions(
    loss: str, name: str, world: World
) -> None:
    model = network(relu_in_place=False)
    means = means_of(model, "output", world)
    view = next(v for v in views(model) if v.site.name == name)
    objective = Objective(loss.removesuffix("-reverse"), draws=0)
    found = collect_curvature(model, [view], [batch()], world, hessian_step, objective, means)[name]
    design = spherical_design(view.width)
    expected = torch.zeros(view.width, view.width, dtype=torch.float64)
    for x in batch().images.split(1):
        for v in design:
            hessian = torch.autograd.functional.hessian(
                lambda w, x=x, v=v: loss_of_change(model, view, means[name], x, v, w, loss),
                torch.zeros(view.width, dtype=torch.float64),
            )
            expected += view.width * torch.outer(hessian @ v, v) / (len(design) * IMAGES)
    expected = (expected + expected.mT) / 2
    torch.testing.assert_close(found[0], expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("side", ["output", "input"])
def test_local_hessian_is_its_formula_whatever_the_shape(side: str, world: World) -> None:
    """Groups, more and fewer positions than dimensions, both sides, chunked or not: against S written out."""
    model = network()
    means = means_of(model, side, world)
    for chunk_bytes in (1, 1 << 27):
        found = collect_curvature(
            model, views(model, side, chunk_bytes), [batch()], world, hessian_step, Objective("kl", 0), means
        )
        for view in views(model, side):
            k = view.width
            expected = torch.zeros(view.site.groups, k, k, dtype=torch.float64)
            for rows, jacobian, logits in per_image(view, means[view.site.name]):
                p = logits.softmax(0)
                for label in range(CLASSES):
                    score = F.one_hot(torch.tensor(label), CLASSES) - p
                    s = rows @ torch.einsum("z,zgkp->gkp", score, jacobian).mT
                    trace = s.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] * torch.eye(k).double()
                    expected += p[label] * s @ (trace + s + s.mT) / ((k + 2) * IMAGES)
            expected = (expected + expected.mT) / 2
            torch.testing.assert_close(found[view.site.name], expected, rtol=1e-8, atol=1e-11)


def test_gradient_covariance_of_a_two_layer_linear_network_is_analytic(world: World) -> None:
    """z = V(Wx): the mse gradient at y = Wx is Vᵀu with u normal, so G = VᵀV and T vanishes in the mean."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Linear(5, 3)).double().eval()
    x = torch.randn(9, 6, dtype=torch.float64)
    data = Batch(x, torch.zeros(9, dtype=torch.int64), torch.arange(9))
    (view, _) = [View(site) for site in survey(model, x[:1]).sites]
    found = collect_curvature(model, [view], [data], world, STEPS["fisher"], Objective("mse", draws=0))["1"]
    outer = model[2].weight.detach()
    torch.testing.assert_close(found[0], outer.mT @ outer, rtol=1e-10, atol=1e-12)


def test_many_draws_approach_the_exact_expectation(world: World) -> None:
    model = network()
    for loss in ("kl", "mse"):
        exact = collect_curvature(model, views(model), [batch()], world, STEPS["fisher"], Objective(loss, 0))
        errors = []
        for draws in (10, 1000):
            drawn = collect_curvature(
                model, views(model), [batch()], world, STEPS["fisher"], Objective(loss, draws)
            )
            errors.append(max((drawn[n] - exact[n]).norm() / exact[n].norm() for n in exact))
        assert errors[1] < 0.1
        assert errors[1] < 0.35 * errors[0]


def test_a_layer_used_twice_counts_the_products_of_both_calls(world: World) -> None:
    """Its S is the sum over all its rows, so the Hessian holds cross terms between the calls."""
    torch.manual_seed(3)
    shared = nn.Linear(3, 3).double()
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(3, 2).double()).eval()
    x = torch.randn(1, 3, dtype=torch.float64)
    data = Batch(x, torch.zeros(1, dtype=torch.int64), torch.arange(1))
    view = View(survey(model, x).sites[0])
    zero = {"0": torch.zeros(1, 3, dtype=torch.float64)}
    found = collect_curvature(model, [view], [data], world, hessian_step, Objective("mse", 0), zero)["0"]
    first = shared(x).detach().requires_grad_()
    second = shared(first.tanh())
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for z in model[3](second)[0]:
        gradients = torch.autograd.grad(z, (first, second), retain_graph=True)
        s = sum(torch.outer(a.detach()[0], g[0]) for a, g in zip((first, second), gradients, strict=True))
        expected += s @ (s.trace() * torch.eye(3).double() + s + s.mT) / 5
    torch.testing.assert_close(found[0], (expected + expected.mT) / 2, rtol=1e-9, atol=1e-12)


def share(world: World, kind: str, side: str) -> dict[str, Tensor]:
    model = network()
    cuts = {1: [0, 11], 2: [0, 8, 11], 3: [0, 7, 11, 11]}[world.size]
    start, stop = cuts[world.rank], cuts[world.rank + 1]
    batches = [batch(start, start), *(batch(i, min(i + 3, stop)) for i in range(start, stop, 3))]
    moments = collect_moments(model, views(model, side), [b.images for b in batches], world)
    objective = Objective("task" if kind == "gradient" else "kl", draws=2, seed=5)
    means = {name: m.mean for name, m in moments.items()}
    return collect_curvature(model, views(model, side), batches, world, STEPS[kind], objective, means)


@pytest.mark.parametrize(
    ("kind", "side"), [("gradient", "input"), ("fisher", "output"), ("hessian-local", "output")]
)
def test_any_number_of_uneven_ranks_gives_the_same(kind: str, side: str) -> None:
    """Labels are drawn by image, so even random gradients do not depend on the ranks."""
    (alone,) = run_ranks(share, 1, kind, side)
    for size in (2, 3):
        for found in run_ranks(share, size, kind, side):
            for name, expected in alone.items():
                torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-13)


def test_the_network_is_left_as_it_was(world: World) -> None:
    model = network().train()
    collect_curvature(model, views(model), [batch()], world, STEPS["fisher"], Objective("kl"))
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model[1].inplace
    assert not any(m._forward_hooks for m in model.modules())


def test_non_finite_gradients_name_site_and_batch(world: World) -> None:
    model = network()
    with torch.no_grad():
        model[6].weight[0, 0] = float("nan")
    with pytest.raises(
        StatisticsError, match=r"^0: its gradients hold NaN or infinity, first in batch 0 of rank 0"
    ):
        collect_curvature(model, views(model), [batch()], world, STEPS["fisher"], Objective("kl"))
    bad = batch()
    bad.images[9, 0, 0, 0] = float("inf")
    with pytest.raises(StatisticsError, match="first in batch 1 of rank 0"):
        collect_curvature(network(), views(model), [batch(), bad], world, STEPS["fisher"], Objective("kl"))


def test_the_task_loss_needs_labels(world: World) -> None:
    unlabelled = Batch(batch().images, torch.full((IMAGES,), -1), torch.arange(IMAGES))
    with pytest.raises(StatisticsError, match="needs labels and these images have none; use --method fisher"):
        collect_curvature(network(), views(network()), [unlabelled], world, STEPS["gradient"], Objective("task"))


class InPlace(nn.Module):
    """A functional in-place operation, which no switch turns off."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x), inplace=True).mean((2, 3)))


def test_outputs_changed_in_place_are_noticed(world: World) -> None:
    model = InPlace().double()
    means = {"conv": torch.zeros(1, 4).double(), "head": torch.zeros(1, 2).double()}
    with pytest.raises(StatisticsError, match="conv: its output is changed in place"):
        collect_curvature(model, views(model), [batch()], world, hessian_step, Objective("kl"), means)


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_draws_at_several_positions_have_the_hessian_of_their_mean_loss(loss: str) -> None:
    count, logits = 40_000, torch.tensor([[[2.0, 0.0], [1.0, 0.5], [0.0, -1.0]]], dtype=torch.float64)
    many = logits.expand(count, -1, -1).clone().requires_grad_()  # 3 classes, 2 positions
    data = Batch(torch.zeros(count, 1), torch.full((count,), -1), torch.arange(count))
    (drawn,) = Objective(loss, draws=1)(many, data)
    (g,) = torch.autograd.grad(drawn, many)
    p = logits[0].softmax(0)
    for position in range(2):
        here, own = g[:, :, position], p[:, position]
        hessian = own.diag() - own.outer(own) if loss == "kl" else torch.eye(3, dtype=torch.float64)
        torch.testing.assert_close(here.T @ here / count, hessian / 2, rtol=0, atol=1e-2)
    torch.testing.assert_close(g[:, :, 0].T @ g[:, :, 1] / count, torch.zeros_like(p @ p.T), rtol=0, atol=1e-2)


def test_no_activation_outlives_its_batch(world: World) -> None:
    """A hook that holds its own tensor keeps it for ever: no collector sees the circle through autograd."""
    model = network()
    found = views(model)

    def kept(batches: int) -> int:
        step, many = STEPS["fisher"], [batch()] * batches
        before = tensors_alive()
        collect_curvature(model, found, many, world, step, Objective("kl"))
        return tensors_alive() - before

    assert kept(1) == kept(5) == 0
