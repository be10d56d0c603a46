"""`dist-prune speed`: times are of the networks at hand, and reasons follow from what was measured."""

from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from dist_prune.artifacts.saved_model import Description, save_compressed
from dist_prune.config.images import ImageSpec
from dist_prune.export import speed_command
from dist_prune.export.pair_times import _site_speed, _Times, time_pairs
from dist_prune.export.speed import ENGINES, Speed, measure_speed, timed_passes
from dist_prune.factorization.execution import Execution
from dist_prune.factorization.plan import Choice, Plan, choose
from dist_prune.factorization.project import rebuild
from dist_prune.network.attention import opened_as
from dist_prune.network.models import build
from dist_prune.network.sites import evaluating, survey
from dist_prune.utils.files import CheckpointError
from tests.spin import spin

IMAGE = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
PLAN = Plan((Choice("conv1", None, "kept"), Choice("layer2.0.conv1", 4), Choice("layer3.2.conv2", 8)))


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    torch.manual_seed(0)
    return build("resnet20", 10)


@pytest.fixture(scope="module")
def compressed(dense: nn.Module) -> nn.Module:
    return rebuild(dense, PLAN)


@pytest.fixture(scope="module")
def folder(compressed: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    save_compressed(path, compressed, Description("resnet20", 10, ImageSpec(0, 16), (), PLAN))
    return path


def test_both_networks_are_measured_side_by_side(dense: nn.Module, compressed: nn.Module) -> None:
    found = measure_speed(dense, compressed, IMAGE, (1, 3, 2), ("eager",))
    assert found.macs.dense == survey(dense, IMAGE).macs
    assert found.macs.compressed == survey(compressed, IMAGE).macs < found.macs.dense
    assert found.params.compressed == sum(p.numel() for p in compressed.parameters())
    assert found.megabytes.dense == pytest.approx(sum(t.nbytes for t in dense.state_dict().values()) / 1e6)
    assert [(p.engine, p.batch) for p in found.passes] == [("eager", 1), ("eager", 3), ("eager", 2)]
    assert all(0 < p.slowest <= p.speedup <= p.fastest for p in found.passes)
    assert [s.site for s in found.sites] == ["layer2.0.conv1", "layer3.2.conv2"]
    assert found.sites[1].macs_ratio == pytest.approx(8 * (64 * 9 + 64) / (64 * 64 * 9))
    assert found.site_batch == 2 and 0 < found.site_share <= 1
    assert Speed.from_json(found.to_json()) == found
    assert dense.training and compressed.training, "left as they were"


class Slow(nn.Module):
    """Takes its time, told in seconds an image."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.linear, self.seconds = nn.Linear(3, 2), seconds

    def forward(self, x: Tensor) -> Tensor:
        spin(self.seconds * len(x))
        return self.linear(x.mean((2, 3)))


def test_a_pass_takes_what_the_network_takes() -> None:
    one, two = timed_passes("eager", Slow(0.02), Slow(0.002), [IMAGE, IMAGE.expand(2, -1, -1, -1)])
    assert one.dense >= 20 and one.compressed >= 2 and two.dense >= 40
    assert one.speedup > 1.5 and two.batch == 2


def test_channels_last_is_the_same_network_laid_out_otherwise(dense: nn.Module) -> None:
    laid_out = cast(nn.Module, ENGINES["channels-last"](dense, IMAGE))
    kernel = dense.get_parameter("layer1.0.conv1.weight")
    inside: list[Tensor] = []
    laid_out.get_submodule("layer2").register_forward_hook(lambda _m, _x, y: inside.append(y))
    with evaluating(dense), evaluating(laid_out), torch.no_grad():
        torch.testing.assert_close(laid_out(IMAGE), dense(IMAGE))
    assert inside[0].is_contiguous(memory_format=torch.channels_last)
    assert kernel.is_contiguous(), "of a copy"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "onnxruntime-int8", "compile"])
def test_other_engines_run_both_networks(engine: str, dense: nn.Module, compressed: nn.Module) -> None:
    found = measure_speed(dense, compressed, IMAGE, (1, 2), (engine,))  # type: ignore[arg-type]
    assert not found.notes
    assert [(p.engine, p.batch) for p in found.passes] == [(engine, 1), (engine, 2)]


def test_an_engine_that_cannot_run_them_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = measure_speed(Slow(0), Slow(0), IMAGE, (1,), ("onnxruntime", "eager"))
    assert [p.engine for p in found.passes] == ["eager"]
    assert found.notes == (
        "onnxruntime: ONNX needs onnx, onnxscript, onnxruntime: pip install 'dist_prune[onnx]'",
    )


# ── reasons ────────────────────────────────────────────────────────────────────────────────────────────────


LAYERS = nn.Sequential(nn.Conv2d(32, 16, 1), nn.Flatten(), nn.Linear(16, 2))
REASONS = {
    # the two layers have 0.25 and 0.125 of the MACs: 25 and 12.5 of the dense layer's 100 s
    "": _Times(100, 40, (26, 14), (1, 1)),
    "faster than its MACs": _Times(100, 20, (12, 8), (1, 1)),
    "expand: a call more": _Times(100, 60, (26, 34), (1, 1)),
    "expand: moves data, 75% of its time": _Times(100, 126, (26, 100), (1, 75)),
    "reduce: 25% of the dense layer's MACs a second": _Times(100, 113, (100, 13), (10, 1)),
    "unclear: the machine is busy, or the layers gain from one another's cache": _Times(
        100, 60, (100, 13), (1, 1)
    ),
}


@pytest.mark.parametrize("reason", REASONS)
def test_the_reason_is_what_was_measured_to_be_most_of_the_difference(reason: str) -> None:
    site = survey(LAYERS, torch.ones(1, 32, 1, 1)).sites[0]
    pair = rebuild(LAYERS, Plan((Choice("0", 4),))).get_submodule("0")
    found = _site_speed(site, pair, REASONS[reason], call=12.0)  # type: ignore[arg-type]
    assert found.macs_ratio == 4 * (32 + 16) / (32 * 16)
    assert found.reason == reason


class Busy(nn.Conv2d):
    """A layer that takes 3 ms."""

    def forward(self, x: Tensor) -> Tensor:
        spin(0.003)
        return super().forward(x)


class Twice(nn.Module):
    """One layer, called with two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3)) + self.conv(x[:, :, ::2]).mean((2, 3))


def test_a_site_that_runs_twice_counts_twice() -> None:
    network = Twice()
    compressed = rebuild(network, Plan((Choice("conv", 4),)))
    compressed.conv.expand = Busy(4, 8, 1)  # type: ignore[union-attr]
    (found,) = time_pairs(network, compressed, survey(network, IMAGE).sites, IMAGE)
    assert found.expand >= 6 > found.reduce
    assert found.pair >= 6 > found.dense


def test_every_layer_of_a_chain_is_timed() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16 * 16, 2))
    compressed = rebuild(network, Plan((choose("0", "tucker", (2, 4)),)))
    compressed[0].core = Busy(2, 4, 3, padding=1)
    (found,) = time_pairs(network, compressed, survey(network, IMAGE).sites[:1], IMAGE)
    assert (found.label, found.rank) == ("tucker 2x4", 2)
    assert found.core >= 3 > max(found.reduce, found.expand)
    assert found.macs_ratio == (3 * 2 + 9 * 2 * 4 + 4 * 8) / (9 * 3 * 8)


def test_in_bfloat16_networks_and_layers_are_measured_and_onnxruntime_is_not(
    dense: nn.Module, compressed: nn.Module
) -> None:
    seen = set[torch.dtype]()
    hooks = [
        network.get_submodule(name).register_forward_hook(lambda _m, _x, y: seen.add(y.dtype))
        for network in (dense, compressed)
        for name in ("conv1", "layer2.0.conv1")
    ]
    found = measure_speed(dense, compressed, IMAGE, (1,), ("eager", "onnxruntime"), Execution(bf16=True))
    for hook in hooks:
        hook.remove()
    assert seen == {torch.bfloat16}
    assert found.bf16 and [p.engine for p in found.passes] == ["eager"]
    (note,) = found.notes
    assert note == "onnxruntime: it knows no autocast, and would run as without; measure it without --bf16"
    assert "bfloat16 autocast" in speed_command.format_summary(found)
    assert Speed.from_json(found.to_json()) == found


# ── the command ────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_shows_and_keeps_what_it_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(folder), "--batches", "1", "2", "--engines", "eager"]
    assert speed_command.main(words) == 0
    shown = capsys.readouterr().out
    found = Speed.from_json((folder / "speed.json").read_text())
    assert speed_command.format_summary(found) in shown
    assert "eager, batch 2" in shown and "layer2.0.conv1" in shown and "speed-up (range)" in shown
    with pytest.raises(CheckpointError, match=r"speed\.json is there already"):
        speed_command.main(words)
    assert speed_command.main([*words, "--overwrite"]) == 0


def test_layers_of_attention_that_was_taken_apart_have_their_dense_ones_beside_them(tmp_path: Path) -> None:
    """nn.MultiheadAttention has none of that name until it is taken apart in the same way."""
    (tmp_path / "net.py").write_text(
        "from torchvision.models import VisionTransformer\n"
        "def vit(num_classes):\n"
        "    return VisionTransformer(16, 4, 2, 2, 16, 16, num_classes=num_classes)\n"
    )
    arch, attention = f"{tmp_path / 'net.py'}:vit", "encoder.layers.encoder_layer_1.self_attention"
    plan = Plan((Choice(f"{attention}.qkv", 4),), attention=(attention,))
    compressed = rebuild(opened_as(build(arch, 10), plan.attention), plan)
    save_compressed(tmp_path, compressed, Description(arch, 10, ImageSpec(0, 16), (), plan))
    assert speed_command.main([str(tmp_path), "--batches", "2", "--engines", "eager"]) == 0
    found = Speed.from_json((tmp_path / "speed.json").read_text())
    assert [(s.site, s.rank) for s in found.sites] == [(f"{attention}.qkv", 4)]
    assert found.sites[0].macs_ratio == pytest.approx(4 * (16 + 48) / (16 * 48))


def test_what_cannot_be_measured_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flag, value in (("--batches", "0"), ("--device", "tpu"), ("--threads", "-1")):
        with pytest.raises(SystemExit) as end:
            speed_command.main([str(folder), flag, value])
        assert end.value.code == 2
        assert f"{flag} " in capsys.readouterr().err


def test_another_file_is_not_taken_for_a_measurement() -> None:
    for text in ("{}", "[]", '{"macs": {"dense": 1}}'):
        with pytest.raises(ValueError, match="not what `dist-prune speed` writes"):
            Speed.from_json(text)
