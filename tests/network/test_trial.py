"""Layers that the code around them sees more of than their output stay dense, with the reason; others do not."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from dist_prune.network.factored import Factored
from dist_prune.network.models import ModelError
from dist_prune.network.outputs import logits_of
from dist_prune.network.sites import Survey, survey
from dist_prune.network.trial import stand_ins


def surveyed(model: nn.Module, *shape: int) -> Survey:
    torch.manual_seed(0)
    return survey(model, torch.randn(1, *shape))


def reasons(found: Survey) -> dict[str, str]:
    return {skipped.name: skipped.reason for skipped in found.skipped}


def names(found: Survey) -> list[str]:
    return [site.name for site in found.sites]


class Reading(nn.Module):
    """As Hugging Face and open_clip do, it asks layers for more than their output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x.to(self.conv1.weight.dtype)).relu()
        return self.fc(self.conv2(x).mean((2, 3)).view(-1, self.fc.in_features))


class Asking(nn.Module):
    """ReLU after linear layers, and after nothing else."""

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


def test_a_layer_whose_attributes_are_read_stays_dense() -> None:
    found = surveyed(Reading(), 3, 16, 16)
    assert names(found) == ["conv2"]
    assert "reads its attribute 'weight'" in reasons(found)["conv1"]
    assert "reads its attribute 'in_features'" in reasons(found)["fc"]


def test_a_layer_whose_class_is_asked_for_stays_dense() -> None:
    found = surveyed(Asking(), 3, 4, 4)
    assert names(found) == ["layers.2"]
    assert "computes something else" in reasons(found)["layers.0"] == reasons(found)["layers.1"]


class Looking(nn.Module):
    """Its answer depends on what stands in it, not on layers' outputs alone."""

    def __init__(self, seen: Callable[[nn.Module], float]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2, self.fc, self.seen = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5), seen

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv2(self.conv1(x).relu()).relu().mean((2, 3))) * self.seen(self)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (lambda m: 1.0, ["conv1", "conv2", "fc"]),
        (lambda m: 2.0 if hasattr(m.conv1, "reduce") else 1.0, ["conv2", "fc"]),
        (lambda m: 2.0 if isinstance(m.conv2, nn.Sequential) else 1.0, ["conv1", "fc"]),
        (lambda m: sum(isinstance(each, nn.Conv2d) for each in m.modules()), ["fc"]),
        (lambda m: sum(isinstance(each, nn.Linear) for each in m.modules()), ["conv1", "conv2"]),
        (lambda m: len(list(m.parameters())), []),
        (lambda m: len(m.state_dict()), []),
        (lambda m: sum(p.numel() for p in m.parameters()), []),
    ],
)
def test_what_stands_in_for_a_layer_looks_as_a_pair_does(
    seen: Callable[[nn.Module], float], expected: list[str]
) -> None:
    found = surveyed(Looking(seen), 3, 12, 12)
    assert names(found) == expected
    assert all("computes something else" in reason for reason in reasons(found).values())


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_a_stand_in_computes_what_its_layer_does(groups: int, bias: bool) -> None:
    torch.manual_seed(0)
    layers = {
        "conv": nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=groups, bias=bias),
        "linear": nn.Linear(8, 6, bias=bias),
    }
    pairs = stand_ins(layers)
    for name, x in (("conv", torch.randn(2, 8, 9, 7)), ("linear", torch.randn(2, 3, 8))):
        torch.testing.assert_close(pairs[name](x), layers[name](x))
        assert (
            isinstance(pairs[name], Factored) and [type(each) for each in pairs[name]] == [type(layers[name])] * 2
        )


def test_layers_behind_a_fast_path_are_sites_as_it_is_left_where_one_is_replaced() -> None:
    found = surveyed(Encoding().eval(), 3, 16, 16)
    assert names(found) == ["patch", *(f"encoder.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)), "head"]


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "replaced forward"])
def test_a_layer_with_hooks_of_its_user_stays_dense(kind: str) -> None:
    model = plain()
    if kind == "forward":
        model[2].register_forward_hook(lambda m, i, y: y.clamp(-0.1, 0.1))
    elif kind == "pre":
        model[2].register_forward_pre_hook(lambda m, i: None)
    elif kind == "backward":
        model[2].register_full_backward_hook(lambda m, i, o: None)
    else:
        model[2].forward = lambda x: F.conv2d(x, model[2].weight) * 2
    found = surveyed(model, 3, 16, 16)
    assert names(found) == ["0", "5"] and "hooks of yours" in reasons(found)["2"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["pruned", "weight norm", "spectral norm"])
def test_a_layer_whose_weight_is_made_by_hooks_stays_dense_until_it_is_made_permanent(kind: str) -> None:
    model = plain()
    if kind == "pruned":
        prune.l1_unstructured(model[2], "weight", 0.3)
    elif kind == "weight norm":
        torch.nn.utils.weight_norm(model[2])
    else:
        torch.nn.utils.spectral_norm(model[2])
    found = surveyed(model, 3, 16, 16)
    assert names(found) == ["0", "5"] and "make it permanent" in reasons(found)["2"]
    if kind == "pruned":
        prune.remove(model[2], "weight")
        assert names(surveyed(model, 3, 16, 16)) == ["0", "2", "5"]


class Tied(nn.Module):
    """The output layer shares its weight with something that is no Conv2d or Linear."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(20, 8), nn.Linear(8, 20, bias=False)
        if kind == "embedding":
            self.other = nn.Embedding(20, 8)
            self.other.weight = self.fc.weight
        elif kind == "transposed":
            self.other = nn.ConvTranspose1d(20, 8, 1)
            self.other.weight = nn.Parameter(self.fc.weight[..., None].detach())
            self.fc.weight = self.other.weight
            self.fc.forward = lambda x: F.linear(x, self.other.weight[..., 0])
        else:
            self.other = self.fc.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).relu())


@pytest.mark.parametrize("kind", ["embedding", "transposed", "a parameter of the network itself"])
def test_a_weight_that_any_other_module_has_too_stays_dense(kind: str) -> None:
    model = Tied(kind)
    found = surveyed(model, 20)
    assert names(found) == ["body"] and "fc" in reasons(found)
    assert found.params == sum(parameter.numel() for parameter in model.parameters())


class Odd(nn.Module):
    """Ordinary calls that are not `layer(batch)`, and random numbers in evaluation mode."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.fc, self.how = nn.Conv2d(3, 16, 3), nn.Linear(16, 10), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "by keyword":
            return self.fc(input=self.conv(input=x).mean((2, 3)))
        if self.how == "one by one":
            return torch.stack([self.fc(self.conv(image).mean((1, 2))) for image in x])
        if self.how == "checkpointed":
            return self.fc(checkpoint(self.conv, x, use_reentrant=False).mean((2, 3)))
        if self.how == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return self.fc(self.conv(x).relu().mean((2, 3)))
        if self.how == "a list":
            return [self.fc(self.conv(x).mean((2, 3)))]  # type: ignore[return-value]
        return self.fc(F.dropout(self.conv(x), 0.5).mean((2, 3)))


@pytest.mark.parametrize("how", ["by keyword", "one by one", "checkpointed", "autocast", "a list", "dropout"])
def test_other_ways_to_call_layers_keep_them_sites(how: str) -> None:
    model = Odd(how)
    before = torch.get_rng_state()
    found = survey(model, torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(before, torch.get_rng_state())
    assert {site.name: site.rows for site in found.sites} == {"conv": 14 * 14, "fc": 1}
    assert not model.conv._forward_hooks


def test_few_passes_find_a_few_such_layers_among_many() -> None:
    layers = [nn.Linear(8, 8) for _ in range(64)]
    calls: Counter[str] = Counter()
    model = nn.Sequential(*layers, nn.Linear(8, 3))
    layers[10].register_forward_hook(lambda *_: None)
    layers[40].forward = lambda x: F.linear(x, layers[40].weight)
    model.register_forward_hook(lambda *_: calls.update(["pass"]))
    assert len(surveyed(model, 8).sites) == 63
    assert calls["pass"] == 3  # the plain one, one of two images, and one trial of all


def test_layers_of_other_kinds_are_listed_with_the_reason() -> None:
    model = nn.Sequential(nn.Conv3d(3, 8, 3), nn.ConvTranspose3d(8, 8, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    found = surveyed(nn.Sequential(*model, nn.Linear(8, 4)), 3, 8, 8, 8)
    assert names(found) == ["4"]
    assert reasons(found)["0"].startswith("Conv3d is not factored") and "ConvTranspose3d" in reasons(found)["1"]
    with pytest.raises(ValueError, match=r"chooses none of 0 sites; layers that can only stay dense: 0 \(Conv3d"):
        surveyed(model, 3, 8, 8, 8).select("*")


@pytest.mark.parametrize(
    ("model", "shape", "answer"),
    [
        (nn.Sequential(nn.Flatten()), (4,), "Sequential has no parameters"),
        (nn.Sequential(nn.LazyLinear(4)), (4,), r"0\.weight has no shape yet: run the network"),
        (torch.jit.script(nn.Sequential(nn.Linear(4, 3))), (4,), "is TorchScript"),
    ],
)
def test_networks_without_layers_to_replace_are_refused(
    model: nn.Module, shape: tuple[int, ...], answer: str
) -> None:
    with pytest.raises(ModelError, match=answer):
        surveyed(model, *shape)


def test_one_output_says_nothing_of_classes() -> None:
    surveyed(nn.Sequential(nn.Linear(4, 2)), 4).require_classes()
    with pytest.raises(ModelError, match="one output: a softmax over it is always 1"):
        surveyed(nn.Sequential(nn.Linear(4, 1)), 4).require_classes()


def test_a_softmax_inside_is_warned_of_and_logits_are_not() -> None:
    assert "after a softmax" in surveyed(nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)), 4).concern
    for last in (nn.Identity(), nn.ReLU(), nn.Sigmoid(), nn.LogSoftmax(1)):
        assert not surveyed(nn.Sequential(nn.Linear(4, 3), last), 4).concern


def test_what_a_network_may_return() -> None:
    logits = torch.zeros(2, 3)
    assert logits_of([logits, None]) is logits is logits_of((logits,))
    for other in (logits.argmax(1), logits.long(), {"a": logits, "b": logits}, []):
        with pytest.raises(ModelError, match="expected logits"):
            logits_of(other)
