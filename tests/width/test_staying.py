"""What a user sees of attention and of channels that stay, and of plans that do not fit."""

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from dist_prune import Compressor, apply
from dist_prune.factorization.plan import Plan, PlanError
from dist_prune.network.attention import opened, opened_in
from dist_prune.network.channels import QUERIES, KeptChannels
from dist_prune.network.replay import follow
from dist_prune.network.tracing import Program
from dist_prune.width.groups import NORMALISED as STAY
from dist_prune.width.groups import find_groups
from tests.attending import NORMALISED, Encoded, Multihead, Weighing, images, lively, swin, timms


@pytest.mark.parametrize(
    ("make", "reason"), [(partial(timms, scale_attn_norm=True), "parameters besides"), (Weighing, "reads")]
)
def test_a_compression_says_which_heads_stay_and_why(make: Callable[[], nn.Module], reason: str) -> None:
    model, x = lively(make), images(16, 16)
    compressor = Compressor(draws=1, calibrate_images=16).fit(model, x.split(8))
    closed = opened(model, x[:1]).closed
    assert all(reason in compressor.staying_[name] for name in closed) and closed
    assert all(f"{name} ({why})" in str(compressor.compress(0.8)) for name, why in closed.items())


@pytest.mark.parametrize("name", NORMALISED)
def test_a_compression_says_that_normalised_queries_and_keys_stay(name: str) -> None:
    """Values go all the same, see `test_heads`."""
    make, size = NORMALISED[name]
    model, x = lively(make), images(size, 16)
    compressor = Compressor(draws=1, calibrate_images=16).fit(model, x.split(8))
    layers = [f"{attention}.qkv" for attention in opened(model, x[:1]).names]
    assert all(compressor.staying_[layer] == STAY for layer in layers) and layers
    assert f"{QUERIES} stay as they are in {', '.join(layers)}: {STAY}" in str(compressor.compress(0.9))


class Deciding(Multihead):
    """By the values of what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x.flatten(2))
        tokens = self.attention(tokens, tokens, tokens)[0] if x.abs().sum() > 0 else tokens
        return self.head(tokens.mean(1))


def test_a_compression_says_that_a_network_cannot_be_traced() -> None:
    compressor = Compressor(draws=1, calibrate_images=16).fit(lively(Deciding), images(16, 16).split(8))
    assert "torch.fx cannot follow Deciding" in compressor.staying_["stem"]
    assert "channels stay: torch.fx cannot follow Deciding" in str(compressor.compress(0.8))


def test_encoders_of_pytorch_are_followed_unless_they_are_given_a_mask() -> None:
    x = images(16, 2)
    network = opened(lively(Encoded), x[:1]).network
    layers = [f"encoder.layers.{n}.{name}" for n in (0, 1) for name in ("self_attn.qkv", "linear1")]
    assert {group.producers[0] for group in find_groups(network, x).groups} == {*layers}
    program = follow(network, layers, x)
    assert isinstance(program, Program) and list(program.stops) == layers
    assert torch.backends.mha.get_fastpath_enabled()
    masked = find_groups(lively(partial(Encoded, masked=True)), x)
    assert not masked.groups and masked.staying[0].reason == "used by encoder (TransformerEncoder)"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            partial(timms, qk_norm=True),
            "blocks.0.attn.mix normalises queries and keys here, of which the plan removes dimensions",
        ),
        (partial(timms, num_heads=4), "blocks.0.attn.mix has 4 heads here; the plan is of a network with 2"),
        (partial(timms, embed_dim=48), "blocks.0.attn.mix has 24 channels here; the plan is of a network with 12"),
        (swin, "no attribute `blocks`"),
    ],
)
def test_a_plan_of_other_attention_is_refused_and_nothing_changes(
    make: Callable[[], nn.Module], said: str
) -> None:
    network, other, x = opened(lively(timms), images(16, 1)).network, lively(make), images(16, 2)
    kept = tuple(KeptChannels(g, (0, 1)) for g in find_groups(network, x).groups if g.part == QUERIES)
    plan, kinds = Plan((), kept=kept, attention=opened_in(network)), [type(m) for m in other.modules()]
    with torch.no_grad():
        before = other(x)
        with pytest.raises(PlanError, match=re.escape(said)):
            apply(plan, other)
        assert [type(m) for m in other.modules()] == kinds and torch.equal(other(x), before)
