"""PyTorch's transformer encoders, whose fast path reads the weights of their layers by itself."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dist_prune import apply, compress, load_compressed
from dist_prune.network.factored import Factored
from dist_prune.network.multiply_adds import MultiplyAdds
from dist_prune.network.replacing import replace_in, replaced, with_replaced
from tests.attending import Encoded, images, lively

FAST = "aten::_transformer_encoder_layer_fwd"


class Padded(nn.Module):
    """With tokens that do not count: without gradients, the encoder then works on nested tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=torch.tensor([[False] * 4 + [True]]).expand(len(x), -1))


def fast_layers(model: nn.Module, x: Tensor) -> int:
    """How many layers took the fast path."""
    with torch.profiler.profile() as profile, torch.no_grad():
        model(x)
    return [event.name for event in profile.events()].count(FAST)


def slowly(model: nn.Module, x: Tensor) -> Tensor:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            return model(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def pair() -> Factored:
    torch.manual_seed(1)
    return Factored(nn.Linear(16, 3, bias=False), nn.Linear(3, 32))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("how", ["a copy", "in place", "for a while"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_pair_in_an_encoder_is_not_passed_over_and_other_layers_stay_fast(how: str, padded: bool) -> None:
    model = (Padded() if padded else nn.Sequential(lively(Encoded).encoder)).eval()
    x, name = torch.randn(3, 5, 16), "encoder.layers.1.linear1" if padded else "0.layers.1.linear1"
    assert fast_layers(model, x) == 2
    before = slowly(model, x)
    copy, new = with_replaced(model, [(name, pair())]), pair()
    expected = slowly(copy, x)
    assert not torch.allclose(expected, before)
    if how == "for a while":
        with replaced(model, {name: new}):
            assert fast_layers(model, x) == 1
            torch.testing.assert_close(model(x), expected)
        assert fast_layers(model, x) == 2
        return
    if how == "in place":
        replace_in(model, {name: new})
    changed = copy if how == "a copy" else model
    assert fast_layers(changed, x) == 1 and fast_layers(model, x) == (2 if how == "a copy" else 1)
    with torch.no_grad():
        torch.testing.assert_close(changed(x), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_linear_layers_of_an_encoder_are_compressed_without_widths_too(masked: bool, tmp_path: Path) -> None:
    make = partial(Encoded, masked=masked)
    model, x = lively(make), images(16)
    how = {"width": "off", "sites": "encoder.*", "draws": 1, "calibrate_images": 32}
    found = compress(model, x.split(8), 0.9, **how)
    layers = {f"encoder.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)}
    left = {choice.site for choice in found.plan.choices if "within the budget" in choice.reason}
    assert left | {*found.plan.factored} == layers and found.plan.factored
    answer = slowly(found.model, x)
    with torch.no_grad(), MultiplyAdds() as counter:
        found.model(x[:1])
    assert counter.total == found.compressed.macs <= 0.9 * found.dense.macs
    found.save(tmp_path / "saved")
    again, applied = load_compressed(tmp_path / "saved", make()), apply(tmp_path / "saved", lively(make))
    applied.load_state_dict(found.model.state_dict())
    for network in (found.model, again.eval(), applied.eval()):
        with torch.no_grad():
            torch.testing.assert_close(network(x), answer)
    assert not torch.allclose(answer, slowly(model, x))
