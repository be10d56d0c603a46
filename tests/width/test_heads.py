"""Dimensions of attention's heads: what they are worth, networks without some, and the budget that they share."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention

from dist_prune import apply, compress, load_compressed
from dist_prune.compression import Compression
from dist_prune.distributed.world import World
from dist_prune.factorization.plan import Plan
from dist_prune.network.attention import opened, opened_as
from dist_prune.network.channels import QUERIES, VALUES, KeptChannels
from dist_prune.network.head_attention import HeadAttention, HeadMixing
from dist_prune.network.multiply_adds import MultiplyAdds
from dist_prune.width.costs import width_costs
from dist_prune.width.groups import find_groups
from dist_prune.width.heads import blocks, directions, elimination_of, turned
from dist_prune.width.moments import collect_channel_moments
from dist_prune.width.narrowing import kept_outputs, narrowed
from tests.attending import NETWORKS, NORMALISED, Masked, Net, Weighing, encoder, images, lively, swin, timms
from tests.ranks import run_ranks

SHARES = {  # of the MACs, that heads alone can come to
    "timm": 0.8,
    "torchvision": 0.95,
    "swin": 0.9,
    "timm's swin": 0.9,
    "nn.TransformerEncoder": 0.95,
    **dict.fromkeys(NORMALISED, 0.95),
}


@pytest.mark.parametrize(("make", "size"), [*NETWORKS.values(), (encoder, 16)])
def test_attention_taken_apart_computes_the_same_from_the_same_parameters(
    make: Callable[[], nn.Module], size: int
) -> None:
    model, x = lively(make), images(size, 3)
    found = opened(model, x[:1])
    assert found.names and not found.closed
    with torch.no_grad():
        torch.testing.assert_close(found.network(x), model(x))
    joined = [name for name, _ in model.named_parameters() if name.endswith(("q_bias", "v_bias"))]
    assert {id(p) for n, p in model.named_parameters() if n not in joined} <= {
        *map(id, found.network.parameters())
    }
    assert len([*found.network.parameters()]) == len([*model.parameters()]) - len(joined) // 2


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: timms(scale_attn_norm=True), "parameters besides"),
        (lambda: nn.Sequential(Net()), "something else"),
        (lambda: Masked(), "takes no mask"),
        (lambda: Weighing(), "reads its attribute"),
    ],
)
def test_what_cannot_be_taken_apart_stays_and_says_why(make: Callable[[], nn.Module], reason: str) -> None:
    found = opened(lively(make), images(16, 1))
    assert not found.names
    assert all(reason in why for why in found.closed.values()) and found.closed


def test_directions_lose_least_at_every_rank() -> None:
    """Against the closed form: the tail of the singular values of M^½C^½, by square roots that are symmetric."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(2, 3, 6, 9, generator=generator, dtype=torch.float64)
    first, second = factors @ factors.mT
    a, b = directions(first, second)
    torch.testing.assert_close(a.mT @ b, torch.eye(6, dtype=torch.float64).expand(3, 6, 6))
    for head in range(3):
        (x, p), (y, q) = (torch.linalg.eigh(m[head]) for m in (first, second))
        roots = [v @ e.sqrt().diag() @ v.T for e, v in ((x, p), (y, q))]
        values = torch.linalg.svdvals(roots[0] @ roots[1])
        for rank in range(7):
            left_out = torch.eye(6, dtype=torch.float64) - a[head, :rank].T @ b[head, :rank]
            lost = (roots[0] @ left_out @ roots[1]).square().sum()
            assert float(lost) == pytest.approx(float(values[rank:].square().sum()), rel=1e-4, abs=1e-6)


def test_directions_are_found_of_sums_that_rounding_left_indefinite() -> None:
    """One direction that outweighs all others by more than float32 has digits for."""
    factors = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(3, -5, 64)
    first, second = (factors @ factors.mT).double()
    assert torch.linalg.eigvalsh(first)[0, 0] < -1e-6 * first[0].diagonal().mean()
    a, b = directions(first, second)
    torch.testing.assert_close(a.mT @ b, torch.eye(64, dtype=torch.float64)[None], rtol=0, atol=1e-6)
    change = torch.eye(64, dtype=torch.float64) - a[:, :16].mT @ b[:, :16]
    kept = [(change.mT @ first @ change * second.mT).sum(), (first * second.mT).sum()]
    assert abs(kept[0]) < 1e-6 * kept[1]


def weighed(name: str, world: World) -> tuple[nn.Module, nn.Module, tuple, dict, dict, Tensor]:
    make, size = NETWORKS[name]
    model, x = lively(make), images(size)
    network = opened(model, x[:1]).network
    groups = find_groups(network, x[:2]).groups
    moments = collect_channel_moments(network, [c for g in groups for c in g.consumers], [x], world)
    widths = {c.name: len(network.get_submodule(c.name).weight) for g in groups for c in g.solved}
    metrics = {n: torch.eye(w, dtype=torch.float64)[None] for n, w in widths.items()}
    other, found = turned(network, groups, moments, metrics, world)
    return network, other, groups, found, metrics, x


@pytest.mark.parametrize("name", NETWORKS)
def test_turned_heads_compute_the_same_and_have_the_moments_that_were_computed(name: str, world: World) -> None:
    network, other, groups, moments, _, x = weighed(name, world)
    heads = [group for group in groups if group.part]
    assert {group.part for group in heads} == ({VALUES} if name in NORMALISED else {QUERIES, VALUES})
    with torch.no_grad():
        torch.testing.assert_close(other(x), network(x), rtol=1e-3, atol=1e-4)
    collected = collect_channel_moments(other, [c for g in heads for c in g.consumers], [x], world)
    for group in heads:
        place = group.consumers[0].name
        found, expected = moments[place].channels.covariance, collected[place].channels.covariance
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_what_queries_and_keys_lose_is_what_their_products_change_by(world: World) -> None:
    """Half the mean squared change of qᵀk over all pairs of tokens of all images, keys about their mean."""
    _, other, groups, moments, metrics, x = weighed("timm", world)
    group = next(group for group in groups if group.part == QUERIES)
    losses, given = elimination_of(other, group, moments, metrics).losses, []
    hook = other.get_submodule(group.consumers[0].name).register_forward_pre_hook(lambda _, a: given.append(a[0]))
    with torch.no_grad():
        other(x)
    hook.remove()
    q, k = given[0][..., :48].double().flatten(0, 1).view(-1, 2, 2, 12).permute(1, 2, 0, 3)
    k = k - k.mean(1, keepdim=True)
    for rank in (0, 3, 9):
        change = q[..., rank:] @ k[..., rank:].mT
        assert losses[rank] == pytest.approx(float(change.square().mean((1, 2)).sum() / 2), rel=1e-3)


def test_blocks_lie_on_the_diagonal() -> None:
    matrix = torch.arange(36.0).view(6, 6)
    assert torch.equal(blocks(matrix, 3), torch.stack([matrix[i : i + 2, i : i + 2] for i in (0, 2, 4)]))


@pytest.mark.parametrize("name", NETWORKS)
def test_fewer_dimensions_compute_what_zeros_in_their_place_do_and_cost_what_was_counted(name: str) -> None:
    make, size = NETWORKS[name]
    model, x = lively(make), images(size, 3)
    network = opened(model, x[:1]).network
    groups = find_groups(network, x[:2]).groups
    kept = [KeptChannels(g, tuple(range(0, g.width, 3 if g.part == QUERIES else 2))) for g in groups]
    cut = opened_as(lively(make), opened(model, x[:1]).names)
    with torch.no_grad():
        for layer, left in kept_outputs(network, kept).items():
            gone = torch.ones(len(cut.get_submodule(layer).weight), dtype=torch.bool)
            gone[left] = False
            cut.get_submodule(layer).weight[gone], cut.get_submodule(layer).bias[gone] = 0, 0
        torch.testing.assert_close(narrowed(network, kept)(x), cut(x), rtol=1e-4, atol=1e-5)
    costs = width_costs(network, groups, x[:1])
    built = narrowed(network, kept)
    with MultiplyAdds() as counter, torch.no_grad():
        built(x[:1])
    assert costs.at([len(each.channels) for each in kept]) == counter.total
    params = width_costs(network, groups, x[:1], "params")
    assert params.at([len(each.channels) for each in kept]) == sum(p.numel() for p in built.parameters())


@pytest.mark.parametrize("size", [(2, 3), (4, 4), (5, 9), (8, 6), (12, 3)])
def test_windows_of_maps_of_any_size_are_those_of_torchvision(size: tuple[int, int]) -> None:
    """Smaller than a window, a multiple of it, or neither; shifted, and shifted along one axis only."""
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    for shift in ([0, 0], [2, 1], [0, 1]):
        attention = ShiftedWindowAttention(8, [4, 3], shift, 2).double().eval()
        nn.init.normal_(attention.relative_position_bias_table)
        with torch.no_grad():
            torch.testing.assert_close(opened_as(nn.Sequential(attention), ["0"])(x), attention(x))


def test_fused_attention_and_the_fast_path_are_counted() -> None:
    attention = nn.MultiheadAttention(16, 2, batch_first=True).eval()  # heads of 8, in the fast path
    x = torch.randn(1, 5, 16)
    with MultiplyAdds() as counter, torch.no_grad():
        attention(x, x, x, need_weights=False)
    assert counter.total == 5 * 16 * 4 * 16 + 2 * 5 * 5 * 16
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(("qk", "vo"), [(2, 5), (5, 2), (4, 4)])
@pytest.mark.parametrize("biased", [False, True])
def test_heads_of_any_dimensions_take_the_fused_kernel_of_cpus_and_are_counted_as_they_are(
    qk: int, vo: int, biased: bool
) -> None:
    """Against softmax(QKᵀ · scale + bias) V written out."""
    mix, x = HeadMixing(2, qk, vo, 0.3), torch.randn(3, 7, 2 * (2 * qk + vo))
    bias = [torch.randn(1, 2, 7, 7)] if biased else []
    q, k, v = (p.unflatten(-1, (2, -1)).transpose(1, 2) for p in x.split([2 * qk, 2 * qk, 2 * vo], -1))
    expected = torch.softmax(0.3 * q @ k.mT + sum(bias), -1) @ v
    with torch.profiler.profile() as profile, torch.no_grad():
        torch.testing.assert_close(mix(x, *bias), expected.transpose(1, 2).flatten(-2), rtol=1e-4, atol=1e-5)
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in {event.name for event in profile.events()}
    with MultiplyAdds() as counter, torch.no_grad():
        mix(x, *bias)
    assert counter.total == 3 * 2 * 7 * 7 * (qk + vo)


def test_heads_of_different_dimensions_can_be_compiled() -> None:
    mix, x = HeadMixing(2, 2, 5, 0.3), torch.randn(3, 7, 18)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(mix, backend="aot_eager", fullgraph=True)(x), mix(x))


def squeezed(name: str) -> tuple[nn.Module, Compression, Tensor]:
    make, size = NETWORKS[name]
    model, x = lively(make), images(size)
    how = {"forms": "dense", "sites": "*qkv,*proj,!*patch*,!conv_proj", "draws": 1, "calibrate_images": 32}
    return model, compress(model, x.split(8), SHARES[name], **how), x


@pytest.mark.parametrize("name", NETWORKS)
def test_heads_alone_meet_a_budget_and_what_is_saved_applied_or_planned_again_is_the_same(
    name: str, tmp_path: Path
) -> None:
    model, found, x = squeezed(name)
    assert {each.group.part for each in found.kept} <= {QUERIES, VALUES} and found.kept
    sizes = {(m.qk, m.vo) for m in found.model.modules() if isinstance(m, HeadMixing)}
    dense = {(m.qk, m.vo) for m in opened(model, x[:1]).network.modules() if isinstance(m, HeadMixing)}
    assert sizes != dense
    for network, cost in ((model, found.dense), (found.model, found.compressed)):
        with MultiplyAdds() as counter, torch.no_grad():
            network(x[:1])
        assert counter.total == cost.macs
    assert found.compressed.macs <= SHARES[name] * found.dense.macs
    found.save(tmp_path / "saved")
    make = NETWORKS[name][0]
    again, applied = load_compressed(tmp_path / "saved", make()), apply(tmp_path / "saved", lively(make))
    applied.load_state_dict(found.model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(x), found.model(x)) and torch.equal(applied(x), found.model(x))
    planned = compress(model, x.split(8), found.plan, draws=1, calibrate_images=32)
    with torch.no_grad():
        torch.testing.assert_close(planned.model(x), found.model(x), rtol=1e-2, atol=1e-3)


FORMS = ("onnx", "torch-export", "python", "state-dict")
FAST = {("timm", "state-dict"), ("timm", "python"), ("swin", "python"), ("swin v2", "python")}


@pytest.mark.parametrize(
    ("name", "form"),
    [pytest.param(*both, marks=() if both in FAST else pytest.mark.slow) for both in product(NETWORKS, FORMS)],
)
def test_exports_compute_the_same(name: str, form: str, tmp_path: Path) -> None:
    """What is written is read back and compared; a difference is an error."""
    _, found, x = squeezed(name)
    assert found.export(tmp_path / "file", form, images=x[:3])


def test_ignored_attention_stays_the_module_it_was() -> None:
    model, x = lively(timms), images(16)
    found = compress(model, x.split(8), 0.9, ignored=["blocks.0.attn"], draws=1, calibrate_images=32)
    assert type(found.model.blocks[0].attn) is type(model.blocks[0].attn)
    assert isinstance(found.model.blocks[1].attn, HeadAttention)


SHARED_OUT = {1: (0, 24), 2: (0, 7, 24), 3: (0, 4, 15, 24)}  # which images each rank has


def on_ranks(world: World) -> tuple[Plan, dict[str, Tensor]]:
    model, bounds = lively(partial(swin, stages=1)), SHARED_OUT[world.size]
    own = images(16, 24)[bounds[world.rank] : bounds[world.rank + 1]]
    found = compress(model, own.split(5), 0.6, forms="dense", draws=1, calibrate_images=24)
    choices = tuple(replace(choice, loss=None) for choice in found.plan.choices)
    return replace(found.plan, choices=choices), found.model.state_dict()


def test_heads_and_widths_and_weights_are_the_same_on_any_number_of_ranks(world: World) -> None:
    alone, weights = on_ranks(world)
    assert {each.group.part for each in alone.kept} == {"", QUERIES, VALUES}
    for size in (2, 3):
        answers = run_ranks(on_ranks, size, deadline_s=120)
        for plan, state in answers:
            assert plan == alone
            for name, tensor in state.items():
                assert torch.equal(tensor, answers[0][1][name])
                torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=1e-4)
