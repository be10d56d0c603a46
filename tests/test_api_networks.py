"""`compress` on networks as people have them: what comes back is finite, balanced, and what it is said to be."""

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from dist_prune import Compression, ModelError, StatisticsError, compress
from dist_prune.network.factored import Factored


def images(count: int = 64, size: int = 16) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    ).eval()


def answers(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


def divergence(dense: nn.Module, other: nn.Module, x: Tensor) -> float:
    p, q = (answers(m, x).double().log_softmax(1) for m in (dense, other))
    return float((p.exp() * (p - q)).sum(1).mean())


def require_sound(found: Compression, model: nn.Module, x: Tensor) -> None:
    """What must hold of every network that is returned."""
    assert all(torch.isfinite(t).all() for t in found.model.state_dict().values())
    assert torch.isfinite(answers(found.model, x)).all()
    assert math.isfinite(found.kl) and math.isfinite(found.kl_projected) and found.kl >= 0
    assert found.compressed.params == sum(p.numel() for p in found.model.parameters())
    assert found.dense.params == sum(p.numel() for p in model.parameters())
    for pair in found.model.modules():
        if isinstance(pair, Factored):
            first, second = (layer.weight.norm().item() for layer in (pair.reduce, pair.expand))
            assert first == pytest.approx(second, rel=0.01)
    held = x[torch.arange(len(x)) % 8 == 0]
    assert found.kl == pytest.approx(divergence(model, found.model, held), rel=1e-2, abs=1e-7)


# ── sites that nothing can be learnt of ────────────────────────────────────────────────────────────────────


class Branching(nn.Module):
    """A residual block whose branch counts for nothing, and a head that the loss does not see."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.fc, self.side, self.how = nn.Linear(16, 10), nn.Linear(16, 4), how
        if how == "zero gamma":
            nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x).relu()
        branch = self.norm(self.conv(x))
        x = (x + (branch.detach() if self.how == "detached" else branch)).mean((2, 3))
        return [self.fc(x), self.side(x)] if self.how == "auxiliary head" else self.fc(x)


def dead(kind: str) -> nn.Module:
    model = plain()
    with torch.no_grad():
        if kind == "dead ReLU":
            model[0].bias.fill_(-100)
        elif kind == "zero layer":
            model[2].weight.zero_()
            model[2].bias.zero_()
        elif kind == "nearly dead":
            model[6].weight.mul_(1e-25)
        else:
            torch.manual_seed(0)
            return Branching(kind).eval()
    return model


@pytest.mark.parametrize("method", ["fisher", "hessian-local", "pca"])
@pytest.mark.parametrize(
    "kind", ["dead ReLU", "zero layer", "nearly dead", "zero gamma", "detached", "auxiliary head"]
)
def test_sites_that_the_loss_does_not_see_do_no_harm(kind: str, method: Any) -> None:
    model, x = dead(kind), images()
    for ranks in ("uniform:0.5", "budget:macs=0.5"):
        found = compress(model, x.split(16), ranks, method=method)
        kept = model if kind != "auxiliary head" else nn.Sequential(model, Heads())
        other = found.model if kind != "auxiliary head" else nn.Sequential(found.model, Heads())
        assert torch.isfinite(answers(other, x)).all() and found.plan.ranks
        assert math.isfinite(found.kl) and all(torch.isfinite(p).all() for p in found.model.parameters())
        assert found.kl == pytest.approx(divergence(kept, other, x[::8]), rel=1e-2, abs=1e-7)


class Heads(nn.Module):
    def forward(self, heads: list[Tensor]) -> Tensor:
        return heads[0]


# ── what training needs, and what is told ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("correct", ["none", "refit", "regression"])
@pytest.mark.parametrize("method", ["fisher", "pca", "weight-svd", "random"])
def test_every_network_returned_is_balanced_and_its_figures_are_its_own(correct: Any, method: Any) -> None:
    model, x = plain(), images()
    require_sound(compress(model, x.split(16), "uniform:0.5", method=method, correct=correct), model, x)


def test_training_improves_what_is_returned() -> None:
    """With the usual learning rate: factors of unequal size would be thrown far off by the first steps."""
    torch.manual_seed(0)
    model, x = plain(), images(128)
    with torch.no_grad():
        labels = (x[:, 0].mean((1, 2)) > 0).long() + 2 * (x[:, 1].mean((1, 2)) > 0).long()
    found = compress(model, x.split(32), "uniform:0.5").model.train()
    optimizer = torch.optim.SGD(found.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(found(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0] and max(losses[1:]) < 1.5 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_divergences_are_those_of_the_logits_whatever_the_network_computes_in(dtype: torch.dtype) -> None:
    model, x = plain().to(dtype), images().to(dtype)
    found = compress(model, [x], "uniform:0.5")
    assert {p.dtype for p in found.model.parameters()} == {dtype}
    assert found.kl == pytest.approx(divergence(model, found.model, x[::8]), rel=1e-3, abs=1e-9)
    assert found.kl <= found.kl_projected


@pytest.mark.parametrize("kind", ["embedding", "transposed"])
def test_parameters_are_counted_where_weights_are_tied(kind: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Embedding(50, 16) if kind == "embedding" else nn.ConvTranspose1d(50, 16, 1)
            self.body, self.fc = nn.Linear(16, 16), nn.Linear(16, 50, bias=False)
            if kind == "embedding":
                self.fc.weight = self.other.weight

        def forward(self, x: Tensor) -> Tensor:
            kernel = self.other.weight if kind == "embedding" else self.other.weight[..., 0]
            return self.fc(self.body(x.softmax(-1) @ kernel).relu())

    torch.manual_seed(0)
    model, x = Tied(), torch.randn(64, 50)
    found = compress(model, [x], {"body": 4}, correct="none")
    assert found.compressed.params == sum(p.numel() for p in found.model.parameters()) < found.dense.params
    assert ("fc" in [c.site for c in found.plan.choices if "shares" in c.reason]) == (kind == "embedding")


# ── all directions kept is the same function, or the layer stays dense ─────────────────────────────────────


class Asking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(48, 64), nn.Linear(64, 64), nn.Linear(64, 10)])

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if isinstance(layer, nn.Linear) and index < 2:
                x = x.relu()
        return x


class Encoding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 4, 4)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


def odd(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "asks for classes":
        return Asking()
    if kind == "fused path":
        return Encoding().eval()
    model = plain()
    if kind == "hook":
        model[2].register_forward_hook(lambda m, i, y: y.clamp(-0.1, 0.1) * 4)
    elif kind == "pruned":
        prune.l1_unstructured(model[2], "weight", 0.3)
    else:
        torch.nn.utils.weight_norm(model[2])
        model(images(2))
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["asks for classes", "fused path", "hook", "pruned", "weight norm"])
@pytest.mark.parametrize("correct", ["none", "regression"])
def test_at_full_rank_nothing_changes_whatever_surrounds_a_layer(kind: str, correct: Any) -> None:
    model, x = odd(kind), images(32, 4 if kind == "asks for classes" else 16)
    found = compress(model, [x], "uniform:1", correct=correct)
    # The ridge of the correction leaves directions without variance as they are: those are not in x.
    torch.testing.assert_close(answers(found.model, x), answers(model, x), rtol=1e-3, atol=1e-4)
    assert found.kl == pytest.approx(0, abs=1e-6) and found.plan.ranks


# ── gradients, calls, precision ────────────────────────────────────────────────────────────────────────────


def test_the_callers_gradient_mode_does_not_matter() -> None:
    x = images()
    with torch.inference_mode():
        made_inside, batch = plain(), images()
    expected = compress(plain(), [x], "uniform:0.5").kl
    for context in (torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)):
        with context():
            found = compress(plain(), [x], "uniform:0.5")
        assert found.kl == pytest.approx(expected, rel=1e-3)
    for model, given in ((made_inside, x), (plain(), batch)):
        found = compress(model, [given], "uniform:0.5")
        assert found.kl == pytest.approx(expected, rel=1e-3)
        assert not any(p.is_inference() for p in found.model.parameters())
        F.cross_entropy(found.model(x), torch.zeros(64).long()).backward()


class Frozen(nn.Module):
    """A backbone that is run without gradients."""

    def __init__(self, context: Any = torch.no_grad) -> None:
        super().__init__()
        self.conv, self.fc, self.context = nn.Conv2d(3, 16, 3), nn.Linear(16, 10), context

    def forward(self, x: Tensor) -> Tensor:
        with self.context():
            x = self.conv(x).relu().mean((2, 3))
        return self.fc(x.clone())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_backbones_without_gradients_work_with_pca_and_are_named_otherwise(context: Any) -> None:
    torch.manual_seed(0)
    model, x = Frozen(context), images()
    with pytest.raises(
        StatisticsError, match=r"^conv: the network computes them under torch.no_grad.* method pca"
    ):
        compress(model, [x], "uniform:0.5")
    with pytest.warns(UserWarning, match="corrected without a metric: conv"):
        found = compress(model, [x], "uniform:0.5", method="pca")
    assert found.kl <= found.kl_projected and set(found.plan.ranks) == {"conv", "fc"}


def test_answers_without_gradients_are_named() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).detach()

    with pytest.raises(StatisticsError, match="no gradient reaches"):
        compress(Detached(), [torch.randn(32, 8)], "uniform:0.5")
    with pytest.raises(ModelError, match=r"returned torch.int64 \(1,\); expected logits"):
        compress(nn.Sequential(nn.Linear(8, 4), Best()), [torch.randn(32, 8)], "uniform:0.5")


class Best(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(1)


class Calling(nn.Module):
    """The same function, its layers called in several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc, self.how = nn.Conv2d(3, 16, 3), nn.Linear(16, 10), how

    def forward(self, x: Tensor) -> Any:
        if self.how == "by keyword":
            return self.fc(input=self.conv(input=x).relu().mean((2, 3)))
        if self.how == "one by one":
            return torch.stack([self.fc(self.conv(image).relu().mean((1, 2))) for image in x])
        if self.how.startswith("checkpointed"):
            kept = checkpoint(self.conv, x, use_reentrant=False)
            return self.fc(kept.relu().mean((2, 3)))
        if self.how == "a list":
            return [self.fc(self.conv(x).relu().mean((2, 3)))]
        return self.fc(self.conv(x).relu().mean((2, 3)))


@pytest.mark.parametrize("how", ["by keyword", "one by one", "checkpointed", "a list"])
@pytest.mark.parametrize("method", ["fisher", "hessian-local", "pca", "gradient"])
def test_however_layers_are_called_the_plan_and_its_losses_are_the_same(how: str, method: Any) -> None:
    x, labels = images(), torch.arange(64) % 10
    options: dict[str, Any] = {"ranks": 0.5, "method": method, "correct": "none", "width": "off"}
    usual, other = (compress(Calling(h), [(x, labels)], **options) for h in ("", how))
    assert other.plan.ranks == usual.plan.ranks
    assert other.predicted == pytest.approx(usual.predicted, rel=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # layers called once per image are not corrected, which is said
        assert math.isfinite(compress(Calling(how), [x], "uniform:0.5", method="pca").kl)


def test_autocast_inside_is_followed() -> None:
    class Half(Calling):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    x = images()
    for found in (
        compress(Half(""), [x], "uniform:0.5"),
        compress(Half("one by one"), [x], "uniform:0.5", method="pca"),
    ):
        assert set(found.plan.ranks) == {"conv", "fc"} and math.isfinite(found.kl)
        assert found.kl <= found.kl_projected


# ── networks of other kinds ────────────────────────────────────────────────────────────────────────────────


def test_compiled_networks_are_compressed_without_their_wrapping() -> None:
    x = images()
    model = plain()
    expected = compress(model, [x], "uniform:0.5")
    compiled = torch.compile(model, backend="eager")
    inside = plain()
    inside[2] = torch.compile(inside[2], backend="eager")
    for given in (compiled, nn.DataParallel(model)):
        given(x)
        found = compress(given, [x], "uniform:0.5")
        assert type(found.model) is nn.Sequential and found.kl == pytest.approx(expected.kl, rel=1e-6)
    inside(x)
    assert compress(inside, [x], "uniform:0.5").kl == pytest.approx(expected.kl, rel=0.2)


def test_networks_that_cannot_be_taken_apart_are_refused_by_name() -> None:
    x = images()
    exported = torch.export.export(plain(), (x,))
    cases: list[tuple[Any, str]] = [
        (torch.jit.script(plain()), "TorchScript"),
        (torch.jit.trace(plain(), x), "TorchScript"),
        (exported, "ExportedProgram; expected the torch.nn.Module"),
        (exported.module(), "exported program"),
        (nn.Sequential(nn.Flatten()), "no parameters"),
        (nn.Sequential(nn.LazyConv2d(4, 3)), "no shape yet"),
        (nn.Sequential(nn.Flatten(), nn.Linear(768, 1)), "one output"),
        ("resnet18", "model is str"),
    ]
    for model, answer in cases:
        with pytest.raises(ModelError, match=answer):
            compress(model, [x], "uniform:0.5")


def test_a_softmax_inside_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="as after a softmax"):
        compress(nn.Sequential(*plain(), nn.Softmax(1)), [images()], "uniform:0.5")


def test_layers_of_other_kinds_are_in_the_table_with_the_reason() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv3d(3, 16, 3),
        nn.ReLU(),
        nn.Conv3d(16, 16, 3),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    found = compress(model, [torch.randn(32, 3, 8, 8, 8)], "uniform:0.5")
    assert "Conv3d is not factored" in repr(found) and found.plan.ranks == {"5": 5}
