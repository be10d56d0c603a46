"""Against per-image weight gradients of torch.func and the whole Fisher matrix, in float64."""

from collections.abc import Mapping
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from dist_prune.data.loader import Batch
from dist_prune.distributed.world import World
from dist_prune.network.sites import Site, View, survey, weight_of
from dist_prune.statistics.moments import StatisticsError, collect_moments
from dist_prune.statistics.second_order import Family, SecondOrder, collect_losses, signed
from dist_prune.statistics.terms import ChainTerms, Directions, Terms, offset_of
from tests.gradients import output_gradients, per_image, tensors_alive
from tests.ranks import run_ranks

IMAGES, CLASSES, DRAWS = 11, 4, 3
SIZES: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {  # kernels of the two layers
    "vertical": ((3, 1), (1, 3)),
    "horizontal": ((1, 3), (3, 1)),
}


class Net(nn.Module):
    """Strided, dilated, grouped, circularly padded; one layer is called twice, one on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 4, 3, stride=2, padding=2, dilation=2, bias=False)
        self.grouped = nn.Conv2d(4, 6, 3, padding="same", groups=2)
        self.circular = nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular")
        self.tokens = nn.Linear(6, 5)
        self.linear = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.plain(x))
        x = torch.tanh(self.grouped(x))
        x = torch.tanh(self.circular(x))
        x = torch.tanh(self.circular(x))
        x = self.tokens(x.flatten(2).mT)
        return self.linear(torch.tanh(x).mean(1))


def network() -> nn.Module:
    torch.manual_seed(0)
    return Net().double().eval()


def batch(start: int = 0, stop: int = IMAGES) -> Batch:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(IMAGES, 3, 8, 8, generator=generator, dtype=torch.float64)
    return Batch(x[start:stop], torch.full((stop - start,), -1), torch.arange(start, stop))


def means_of(model: nn.Module, sites: tuple[Site, ...], side: str, world: World) -> dict[str, Tensor]:
    moments = collect_moments(model, [View(site, side) for site in sites], [batch().images], world)
    return {name: m.mean for name, m in moments.items()}


def families_of(model: nn.Module, site: Site, inputs: Tensor, outputs: Tensor) -> dict[str, Terms]:
    """Five random terms per group of every form that the site has."""
    module = model.get_submodule(site.name)
    found: dict[str, Terms] = {"output": directions("output", site.width, outputs)}
    if isinstance(module, nn.Conv2d):
        weight = module.weight.detach().unflatten(0, (site.groups, -1))  # g, C, c, kh, kw
        found["input"] = directions("input", site.channels, inputs, weight)
        found |= {name: conv_terms(module, inputs, *kernels) for name, kernels in SIZES.items()}
    return found


def directions(
    side: Literal["input", "output"], width: int, mean: Tensor, weight: Tensor | None = None
) -> Directions:
    """Random encoders and decoders; `weight` is needed for what a direction of the input gives for the mean."""
    encode, decode = torch.randn(2, len(mean), 5, width, dtype=torch.float64)
    if weight is None:
        offset = torch.einsum("grc,grk,gk->gcr", decode, encode, mean)
    else:
        patch = mean.reshape(len(mean), width, *weight.shape[3:])
        offset = torch.einsum("gCchw,grc,grk,gkhw->gCr", weight, decode, encode, patch)
    return Directions(side, encode, decode.mT, offset.flatten(0, 1))


def conv_terms(module: nn.Conv2d, mean: Tensor, one: tuple[int, int], two: tuple[int, int]) -> ChainTerms:
    def layer(channels_in: int, channels: int, kernel: tuple[int, int]) -> nn.Conv2d:
        def own(values: tuple[int, ...], other: int) -> tuple[int, ...]:
            return tuple(v if k > 1 else other for v, k in zip(values, kernel, strict=True))

        padding = module.padding if isinstance(module.padding, str) else own(module.padding, 0)
        how = {"stride": own(module.stride, 1), "dilation": own(module.dilation, 1), "padding": padding}
        mode = module.padding_mode
        made = nn.Conv2d(channels_in, channels, kernel, groups=module.groups, bias=False, padding_mode=mode, **how)
        return made.double()

    first = layer(module.in_channels, 5 * module.groups, one)
    second = layer(5 * module.groups, module.out_channels, two)
    return ChainTerms(first, second, offset_of(first, second, mean))


def folded(site: Site, weight: Tensor, terms: Terms, rank: int) -> Tensor:
    """The weight (g, C, c·k²) that the first `rank` terms of each group come to."""
    if isinstance(terms, Directions):
        both = terms.decode[..., :rank] @ terms.encode[:, :rank]
        if terms.side == "output":
            return both @ weight
        return torch.einsum("gCcs,gck->gCks", weight.unflatten(2, (site.channels, -1)), both).flatten(2)
    assert isinstance(terms, ChainTerms)
    first, second = (layer.weight.detach() for layer in (terms.first, terms.second))
    a = first.unflatten(0, (site.groups, -1))[:, :rank]
    b = second.unflatten(0, (site.groups, -1))[:, :, :rank]
    product = torch.einsum("gcruv,grdhw->gcdhuwv", b, a)  # one of each pair of axes has length 1
    return product.flatten(2)


def collected(
    world: World, model: nn.Module, batches: list[Batch]
) -> tuple[SecondOrder, Mapping[Site, Mapping[str, Terms]]]:
    sites = survey(model, batch().images[:1]).sites
    inputs, outputs = (means_of(model, sites, side, world) for side in ("input", "output"))
    torch.manual_seed(3)
    families = {site: families_of(model, site, inputs[site.name], outputs[site.name]) for site in sites}
    return collect_losses(model, families, outputs, batches, world, "kl", DRAWS, 7), families


def test_every_rank_of_every_form_loses_what_per_image_gradients_say(world: World) -> None:
    model = network()
    found, families = collected(world, model, [batch(0, 4), batch(4, 4), batch(4)])
    curves = found.curves
    assert {key.site for key in curves} == {"plain", "grouped", "circular", "tokens", "linear"}
    for site, own in families.items():
        mean = means_of(model, (site,), "input", world)[site.name]
        gradients = torch.stack([per_image(model, site, batch(), mean, 7, f"signs {d}") for d in range(DRAWS)])
        weight = weight_of(model.get_submodule(site.name), site)
        changes = {
            name: [weight - folded(site, weight, terms, r) for r in range(6)] for name, terms in own.items()
        }
        lost = {
            name: torch.stack([(gradients * c).sum((2, 3, 4)) for c in some]) for name, some in changes.items()
        }
        for name in own:  # lost: ranks, draws, images
            curve, losses = curves[Family(site.name, name)], lost[name].square().mean(1) / 2
            torch.testing.assert_close(curve.loss, losses.mean(1), rtol=1e-9, atol=0)
            torch.testing.assert_close(curve.error, losses.std(1, correction=0) / IMAGES**0.5, rtol=1e-6, atol=0)
        if "input" in own:
            cross = torch.einsum("rdn,sdn->rs", lost["input"], lost["output"]) / (DRAWS * IMAGES)
            torch.testing.assert_close(found.crosses[site.name], cross, rtol=1e-9, atol=1e-12)
    assert found.crosses.keys() == {"plain", "grouped", "circular"}


def spread(world: World) -> tuple[list[tuple[str, str, list[float], list[float]]], list[Tensor]]:
    """All curves, and the sample of a layer that is called for several positions of each image."""
    model = network()
    share = (
        [batch(0, 7), batch(7)]
        if world.size == 1
        else [batch(0, 2), batch(2, 2), batch(2)][world.rank :: world.size]
    )
    found, _ = collected(world, model, share)
    curves = [(key.site, key.name, c.loss.tolist(), c.error.tolist()) for key, c in found.curves.items()]
    tokens = next(site for site in survey(model, batch().images[:1]).sites if site.name == "tokens")
    sample = collect_losses(model, {}, {}, share, world, "kl", DRAWS, 7, [tokens]).samples["tokens"]
    return curves, [sample.images, sample.rows, sample.gradients]


@pytest.mark.parametrize("size", [2, 3])
def test_losses_depend_on_no_number_of_ranks(size: int) -> None:
    ((alone, rows),) = run_ranks(spread, 1)
    for found, rows_there in run_ranks(spread, size):
        for (site, name, loss, error), there in zip(alone, found, strict=True):
            assert (site, name) == there[:2]
            assert there[2] == pytest.approx(loss, rel=1e-9, abs=0)
            assert there[3] == pytest.approx(error, rel=1e-6, abs=0)
        for one, other in zip(rows, rows_there, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_sample_has_all_rows_and_their_gradients(world: World) -> None:
    model = network()
    site = next(site for site in survey(model, batch().images[:1]).sites if site.name == "tokens")
    sample = collect_losses(model, {}, {}, [batch(5), batch(0, 5)], world, "kl", DRAWS, 7, [site]).samples[
        "tokens"
    ]
    outputs = []
    with model.tokens.register_forward_hook(lambda _m, _i, y: outputs.append(y.detach())):
        model(batch().images)
    assert torch.equal(sample.images, torch.arange(IMAGES).repeat_interleave(site.rows))
    torch.testing.assert_close(sample.rows[:, 0], outputs[0].flatten(0, 1), rtol=1e-9, atol=1e-12)
    sums = sample.gradients[1, :, 0].reshape(IMAGES, site.rows, -1).sum(1)
    torch.testing.assert_close(sums, output_gradients(model, site, batch(), 7, "signs 1"), rtol=1e-9, atol=1e-12)


def test_signs_have_the_fisher_information_as_their_second_moment() -> None:
    logits = torch.tensor([[4.0, 1.0, 0.0, -1.0]], dtype=torch.float64).expand(20_000, -1).clone().requires_grad_()
    (g,) = torch.autograd.grad(signed(logits, torch.arange(20_000), "kl", 0, "test"), logits)
    p = logits[0].detach().softmax(0)
    torch.testing.assert_close(g.T @ g / len(g), p.diag() - p.outer(p), rtol=0, atol=2e-3)


def test_signs_of_several_positions_have_the_information_of_their_mean_loss() -> None:
    logits = torch.tensor([[[2.0, 0.0], [1.0, 0.5], [0.0, -1.0]]], dtype=torch.float64)  # 3 classes, 2 positions
    many = logits.expand(40_000, -1, -1).clone().requires_grad_()
    (g,) = torch.autograd.grad(signed(many, torch.arange(40_000), "kl", 0, "test"), many)
    p = logits[0].softmax(0)
    for position in range(2):
        here, own = g[:, :, position], p[:, position]
        torch.testing.assert_close(here.T @ here / len(here), (own.diag() - own.outer(own)) / 2, rtol=0, atol=4e-3)
    torch.testing.assert_close(g[:, :, 0].T @ g[:, :, 1] / len(g), torch.zeros_like(p @ p.T), rtol=0, atol=4e-3)


def test_a_small_change_costs_the_divergence_predicted(world: World) -> None:
    model = network()
    site = next(site for site in survey(model, batch().images[:1]).sites if site.name == "plain")
    mean = means_of(model, (site,), "input", world)[site.name]
    terms = conv_terms(model.plain, mean, *SIZES["vertical"])
    close = 1e-3  # the replacement is the weight but for this share of random terms
    with torch.no_grad():
        before = model(batch().images).log_softmax(1)
        weight = weight_of(model.plain, site)
        change = close * (weight - folded(site, weight, terms, 5)).reshape(model.plain.weight.shape)
        shift = change.flatten(1) @ mean[0]
        after = model.plain.weight - change
        logits = functional_call(
            model,
            {
                "plain.weight": after,
                "plain.bias": shift,
                **{n: p for n, p in model.named_parameters() if n != "plain.weight"},
            },
            (batch().images,),
        )
    measured = (before.exp() * (before - logits.log_softmax(1))).sum(1).mean()
    outputs = means_of(model, (site,), "output", world)
    curves = collect_losses(model, {site: {"vertical": terms}}, outputs, [batch()], world, "kl", 400, 0).curves
    assert close**2 * float(curves[Family("plain", "vertical")].loss[5]) == pytest.approx(float(measured), rel=0.1)


def test_gradients_that_are_no_numbers_are_refused(world: World) -> None:
    model = network()
    sites = survey(model, batch().images[:1]).sites
    inputs, outputs = (means_of(model, sites, side, world) for side in ("input", "output"))
    families = {site: families_of(model, site, inputs[site.name], outputs[site.name]) for site in sites}
    model.linear.weight.data[0, 0] = torch.nan
    with pytest.raises(StatisticsError, match="plain: its gradients hold NaN"):
        collect_losses(model, families, outputs, [batch()], world)


def test_no_images_are_refused(world: World) -> None:
    with pytest.raises(StatisticsError, match="no images"):
        collected(world, network(), [batch(4, 4)])


def test_no_activation_outlives_its_batch(world: World) -> None:
    """See the test of the same name of the curvature."""
    model = network()

    def kept(batches: int) -> int:
        _, families = collected(world, model, [batch()])
        means = means_of(model, tuple(families), "output", world)
        many, before = [batch()] * batches, tensors_alive()
        collect_losses(model, families, means, many, world)
        return tensors_alive() - before

    assert kept(1) == kept(5) == 0
