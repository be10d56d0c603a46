"""Forms: what each chain computes and costs, which sites it fits, and how plans and flags name it."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dist_prune.config import flags
from dist_prune.config.flags import ConfigError, parse_forms, parse_rule
from dist_prune.factorization.forms import FORMS, Form, fitting_forms, folded, kernels
from dist_prune.factorization.nested import FIRST_AXIS, decompose, whitened
from dist_prune.factorization.plan import Plan, PlanError, choose, cost, make_plan
from dist_prune.factorization.project import balanced_kernels, chain, rebuild
from dist_prune.factorization.spectra import Spectra
from dist_prune.network.factored import Factored
from dist_prune.network.sites import Site, SiteError, View, input_rows, survey
from dist_prune.statistics.patches import PatchMoments

LAYERS = {
    "plain": nn.Conv2d(6, 8, 3, padding=1),
    "few outputs": nn.Conv2d(6, 3, 3, padding=1),
    "strided, dilated, reflected": nn.Conv2d(
        6, 8, (3, 5), (2, 1), (1, 2), (2, 1), bias=False, padding_mode="reflect"
    ),
    "strided both ways": nn.Conv2d(6, 8, 3, (2, 3), padding=1),
    "groups": nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2),
    "same": nn.Conv2d(6, 8, 3, padding="same", dilation=2, padding_mode="circular"),
    "even kernel, no padding": nn.Conv2d(6, 8, (2, 4), padding="valid"),
}
BOTH = pytest.mark.parametrize(
    ("layer", "form"), [(name, form) for name in LAYERS for form in FORMS.values()], ids=lambda x: str(x)[:30]
)


def surveyed(layer: str) -> Site:
    module = LAYERS[layer]
    model = nn.Sequential(nn.Conv2d(3, 6, 1), module, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return next(site for site in survey(model, torch.zeros(1, 3, 13, 17)).sites if site.name == "1")


def in_double(layer: str) -> nn.Conv2d:
    return copy.deepcopy(LAYERS[layer]).double()


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 6, 13, 17, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def half(form: Form, site: Site) -> tuple[int, ...]:
    return tuple(max(1, rank // site.groups // 2) * site.groups for rank in form.full_ranks(site))


def whole_chain(form: Form, module: nn.Module, site: Site) -> Factored:
    """The chain at its full ranks, its kernels from an SVD of the unfolded kernel alone."""
    weight = kernels(module, site.groups)
    groups, outputs, channels, tall, wide = weight.shape
    if form.name == "output":
        identity = torch.eye(outputs, dtype=torch.float64).expand(groups, -1, -1)
        layers = [weight, identity[..., None, None]]
    elif form.name == "tucker":
        before = torch.eye(channels, dtype=torch.float64).expand(groups, -1, -1)[..., None, None]
        after = torch.eye(outputs, dtype=torch.float64).expand(groups, -1, -1)[..., None, None]
        layers = [before, weight, after]
    else:
        order = {"input": (0, 2, 1, 3, 4), "vertical": (0, 2, 3, 1, 4), "horizontal": (0, 2, 4, 1, 3)}[form.name]
        rows = 1 if form.name == "input" else 2
        matrix = weight.permute(order).flatten(1 + rows).flatten(1, rows)
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        own = {"input": (1, 1), "vertical": (tall, 1), "horizontal": (1, wide)}[form.name]
        rest = tall // own[0], wide // own[1]
        first = u.mT.reshape(groups, -1, channels, *own)
        second = (s[..., None] * v).reshape(groups, -1, outputs, *rest).transpose(1, 2)
        layers = [first, second]
    bias = torch.zeros(outputs * groups) if module.bias is None else module.bias.detach()
    return chain(module, form, layers, bias.double().reshape(groups, -1))


@BOTH
def test_at_full_rank_a_chain_is_the_layer(layer: str, form: Form) -> None:
    module, site, x = in_double(layer), surveyed(layer), images()
    made = whole_chain(form, module, site)
    torch.testing.assert_close(made(x), module(x), rtol=1e-9, atol=1e-9)
    dense = form.fold(made)
    assert type(dense) is nn.Conv2d
    torch.testing.assert_close(dense(x), module(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dense.weight, module.weight, rtol=1e-9, atol=1e-9)


@BOTH
def test_costs_are_those_that_are_counted(layer: str, form: Form) -> None:
    site, ranks = surveyed(layer), half(form, surveyed(layer))
    made = form.build(LAYERS[layer], ranks)
    with FlopCounterMode(display=False) as counter:
        made(images(1).float())
    assert counter.get_total_flops() == 2 * form.macs(site, ranks)
    assert sum(p.numel() for n, p in made.named_parameters() if n.endswith("weight")) == form.params(site, ranks)
    with pytest.raises(SiteError, match=f"{form.name} rank"):
        form.require(site, (10_000,) * len(ranks))
    with pytest.raises(SiteError, match=r"rank\(s\), got"):
        form.require(site, (*ranks, 2))


def test_a_whole_plan_costs_what_is_counted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 12, 3, stride=2),
        nn.Conv2d(12, 8, 5, padding=2, bias=False),
        nn.Flatten(),
        nn.Linear(8 * 49, 5),
    )
    found = survey(model, torch.zeros(1, 3, 16, 16))
    plan = Plan((choose("0", "vertical", (5,)), choose("1", "input", (4,)), choose("2", "tucker", (6, 4))))
    small = rebuild(model, Plan.from_json(plan.to_json()))
    with FlopCounterMode(display=False) as counter:
        small(torch.zeros(1, 3, 16, 16))
    after = cost(found, plan)
    assert (after.macs, after.params) == (
        counter.get_total_flops() // 2,
        sum(p.numel() for p in small.parameters()),
    )


def test_forms_fit_what_they_can_split() -> None:
    fits = {site: fitting_forms(site) for site in survey(mixed(), torch.zeros(1, 3, 9, 9)).sites}
    assert list(fits.values()) == [["output"], [*FORMS], ["output", "input", "tucker"], ["output"]]
    with pytest.raises(
        SiteError, match=r"0 cannot take the form tucker: a 1×1 kernel .* \(forms that fit: output\)"
    ):
        FORMS["tucker"].require(next(iter(fits)), (2, 2))


def mixed() -> nn.Module:
    layers = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 6, (1, 3))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))


@BOTH
def test_balanced_layers_compute_the_same_and_are_equally_large(layer: str, form: Form) -> None:
    module, site = in_double(layer), surveyed(layer)
    made = form.build(module, half(form, site)).double()
    before = [
        kernels(made.get_submodule(name), site.groups) * scale
        for name, scale in zip(form.layers, (1e5, 1, 1e-3), strict=False)
    ]
    after = balanced_kernels(before)
    norms = torch.stack([layer.flatten(1).norm(dim=1) for layer in after])
    torch.testing.assert_close(norms, norms[:1].expand_as(norms))
    for name, kernel in zip(form.layers, before, strict=True):
        made.get_submodule(name).weight.data.copy_(kernel.reshape(made.get_submodule(name).weight.shape))
    expected = folded(made)
    for name, kernel in zip(form.layers, after, strict=True):
        made.get_submodule(name).weight.data.copy_(kernel.reshape(made.get_submodule(name).weight.shape))
    torch.testing.assert_close(folded(made), expected, rtol=1e-9, atol=1e-9)


# ── every rank from one decomposition ──────────────────────────────────────────────────────────────────────


def patch_moments(site: Site, module: nn.Module, x: Tensor) -> tuple[PatchMoments, Tensor]:
    """By patches laid out in memory; and their whole covariance, (g, d, d)."""
    rows = input_rows(site, module, x).flatten(1).unflatten(0, (site.groups, site.inputs))
    places = site.kernel[0] * site.kernel[1]
    total, count = rows.sum(-1), torch.tensor(float(rows.shape[-1]), dtype=torch.float64)
    split = rows.unflatten(1, (site.channels, places))
    among_channels = torch.einsum("gasn,gbsn->gab", split, split)
    among_places = torch.einsum("gcsn,gctn->gst", split, split)
    centred = rows - total[..., None] / count
    shift = total.new_zeros(site.groups, site.channels)
    found = PatchMoments(count, shift, total.unflatten(1, (-1, places)), among_channels, among_places)
    return found, centred @ centred.mT / count


@pytest.mark.parametrize("layer", ["plain", "few outputs"])
@pytest.mark.parametrize("form", FIRST_AXIS)
def test_a_decomposition_is_exact_at_full_rank_and_its_spectrum_is_what_is_lost(form: str, layer: str) -> None:
    """On independent inputs of equal variance the product of covariances is exact: so are the tails."""
    site, module = surveyed(layer), in_double(layer)
    weight = kernels(module, site.groups)
    identity = torch.eye(site.width, dtype=torch.float64)[None]
    metric = identity + 0.5
    channels = torch.diag(torch.linspace(1, 3, 6, dtype=torch.float64))[None]
    places = torch.eye(9, dtype=torch.float64)[None] * 12  # the trace of the channels, at each place
    zeros = torch.zeros(1, 6, 9, dtype=torch.float64)
    patches = PatchMoments(torch.ones((), dtype=torch.float64), zeros.sum(-1), zeros, 9 * channels, places)
    covariance = torch.einsum("gab,st->gasbt", channels, torch.eye(9, dtype=torch.float64)).reshape(1, 54, 54)
    flat = weight.flatten(2)
    worth = (metric @ flat @ covariance * flat).sum((1, 2))
    found = decompose(form, whitened(weight, patches, metric), worth)
    losses = []
    for rank in range(1, found.spectrum.shape[1] + 1):
        first, second = found.kept(rank)
        tall, wide = site.kernel
        parts = (t.expand(*t.shape[:3], tall, wide) for t in (second, first))
        lost = flat - torch.einsum("gorhw,grihw->goihw", *parts).flatten(2)
        losses.append(float((metric @ lost @ covariance * lost).sum()))
    tails = [*found.spectrum[0].flip(0).cumsum(0).flip(0)[1:].tolist(), 0.0]
    assert losses == pytest.approx(tails, rel=1e-6, abs=1e-9)


def test_tails_predict_what_a_projection_loses_on_real_maps() -> None:
    """C_xx is no product here: tails stay within a factor of 1.5 of the losses themselves."""
    site, module = surveyed("plain"), in_double("plain")
    smooth = torch.nn.functional.avg_pool2d(images(40), 3, 1, 1).relu()
    patches, covariance = patch_moments(site, module, smooth)
    weight = kernels(module, 1)
    flat, metric = weight.flatten(2), torch.eye(8, dtype=torch.float64)[None]
    worth = (flat @ covariance * flat).sum((1, 2))
    for form in FIRST_AXIS:
        found = decompose(form, whitened(weight, patches, metric), worth)
        for rank in half(FORMS[form], site):
            first, second = found.kept(rank)
            parts = (t.expand(*t.shape[:3], 3, 3) for t in (second, first))
            lost = flat - torch.einsum("gorhw,grihw->goihw", *parts).flatten(2)
            tail = float(found.spectrum[0, rank:].sum())
            assert 1 / 1.5 < float((lost @ covariance * lost).sum()) / tail < 1.5


# ── plans and flags ────────────────────────────────────────────────────────────────────────────────────────


def test_old_plan_files_are_read_as_pairs() -> None:
    (old,) = Plan.from_json([{"site": "a", "rank": 4, "reason": ""}]).choices
    assert (old.form, old.ranks, old.label) == ("output", (4,), "4")
    plan = Plan((choose("a", "tucker", (4, 6)), choose("b", "vertical", (3,))))
    assert Plan.from_json(plan.to_json()) == plan
    assert [choice.label for choice in plan.choices] == ["tucker 4x6", "vertical 3"]
    with pytest.raises(PlanError, match="did you mean vertical"):
        Plan.from_json([{"site": "a", "rank": 4, "reason": "", "form": "vertcal"}])


def test_ranks_name_forms() -> None:
    rule = parse_rule("sites:a=8,b=vertical:3,c=tucker:4x6")
    assert rule.listed == (("a", "output", (8,)), ("b", "vertical", (3,)), ("c", "tucker", (4, 6)))
    assert parse_rule(rule.text) == rule
    found = survey(mixed(), torch.zeros(1, 3, 9, 9))
    plan = make_plan(parse_rule("sites:1=tucker:2x3"), found, 1)
    assert plan.factored["1"].ranks == (2, 3)
    for text, message in (
        ("sites:1=tucker:2", r"tucker has 2 rank\(s\), got 2"),
        ("sites:1=tucker:2x99", "tucker rank 99; expected 1 to 4"),
        ("sites:0=input:2", "cannot take the form input"),
        ("sites:1=diagonal:2", "unknown form 'diagonal'"),
    ):
        with pytest.raises((PlanError, ConfigError), match=message):
            make_plan(parse_rule(text), found, 1)


def test_the_list_of_forms() -> None:
    assert flags.FORMS == tuple(FORMS) == parse_forms("all")
    assert parse_forms("tucker, output,dense") == ("output", "tucker")
    with pytest.raises(ConfigError, match=r"unknown form 'vertikal'; did you mean vertical\?"):
        parse_forms("output,vertikal")
    with pytest.raises(ConfigError, match="expected auto, all, or some of"):
        parse_forms(", ")
    assert parse_forms("dense") == ()


def test_a_budget_takes_the_form_that_loses_least() -> None:
    """One form is made the best at each site; with `output` alone the same budget loses more."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = survey(model, torch.zeros(1, 3, 12, 12))
    flat, steep = (torch.tensor([[base**-i for i in range(24)]]) for base in (1.05, 3.0))
    nested = {
        "0": {"vertical": steep[:, :9], "input": flat[:, :3]},
        "1": {"horizontal": steep, "input": flat[:, :8]},
    }
    spectra = Spectra(dict.fromkeys("01", flat[:, :8]), "KL", True, nested)
    rule = parse_rule("budget:macs=0.4")
    plan = make_plan(rule, found, 1, spectra=spectra, forms=tuple(FORMS.values()))
    assert {c.site: c.form for c in plan.choices if c.rank} == {"0": "vertical", "1": "horizontal"}
    assert cost(found, plan).macs <= 0.4 * found.macs
    pairs = make_plan(rule, found, 1, spectra=spectra)
    assert pairs.loss is not None and plan.loss is not None and plan.loss < 0.2 * pairs.loss


def test_both_projections_of_tucker_are_counted() -> None:
    site = surveyed("plain")
    spectra = Spectra({"1": torch.tensor([[4.0, 2, 1]])}, "KL", True, {"1": {"input": torch.tensor([[8.0, 4.0]])}})
    losses = spectra.of_options(site, [("tucker", (1, 2)), ("input", (1,)), ("output", (2,)), ("vertical", (1,))])
    assert losses[:3].tolist() == [2.5, 2.0, 0.5]
    assert losses[3] != losses[3], "nothing is known of it"
    assert all(a >= b for a, b in pairwise(spectra.tails("1", "input")))
    assert View(site).full_rank == 8
