"""`compress` on networks of several inputs: as mappings, or as `inputs` says what they are called with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_prune import (
    BatchesError,
    CheckpointError,
    Compressor,
    ConfigError,
    ModelError,
    apply,
    compress,
    load_compressed,
)
from dist_prune.distributed.world import World
from dist_prune.export import command
from dist_prune.export.formats import ExportError
from dist_prune.network.inputs import InputPacking
from tests.ranks import run_ranks


class Located(nn.Module):
    """An image, where it was taken, and which camera took it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1)
        self.place, self.camera = nn.Linear(5, 12), nn.Embedding(7, 12)
        self.fc = nn.Linear(36, 4)

    def forward(self, image: Tensor, place: Tensor, camera: Tensor, scale: float = 1.0) -> Tensor:
        x = self.conv2(self.conv1(image).relu()).relu().mean((2, 3)) * scale
        return self.fc(torch.cat([x, self.place(place).relu() + self.camera(camera)], 1))


def network() -> Located:
    torch.manual_seed(0)
    return Located().eval()


def mappings(count: int = 60, size: int = 8) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    whole = {
        "image": torch.randn(count, 3, 10, 10, generator=generator),
        "place": torch.randn(count, 5, generator=generator),
        "camera": torch.randint(7, (count,), generator=generator),
    }
    parts = [{name: value[i : i + size] for name, value in whole.items()} for i in range(0, count, size)]
    return [part | {"scale": 2.0} for part in parts]


def together(batches: list[dict[str, Any]]) -> dict[str, Any]:
    return {n: torch.cat([b[n] for b in batches]) for n in ("image", "place", "camera")} | {"scale": 2.0}


def divergence(dense: nn.Module, other: nn.Module, given: dict[str, Any]) -> float:
    with torch.no_grad():
        p, q = (model(**given).double().log_softmax(1) for model in (dense, other))
    return float((p.exp() * (p - q)).sum(1).mean())


def held_out(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value[::8] if isinstance(value, Tensor) else value for name, value in given.items()}


# ── the network is called as it wants to be ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("options", [{}, {"width": "on", "forms": "dense"}, {"method": "pca", "search": 2}])
def test_mappings_are_passed_as_keywords(options: dict[str, Any]) -> None:
    model, batches = network(), mappings()
    found = compress(model, batches, 0.6, **options)
    given = together(batches)
    assert type(found.model) is Located and found.compressed.macs <= 0.6 * found.dense.macs
    assert found.lost == pytest.approx(divergence(model, found.model, held_out(given)), rel=1e-3)
    assert found.lost <= found.lost_projected
    if options:
        return
    whole = compress(model, batches, "uniform:1.0", correct="none")
    assert "place" in whole.plan.factored
    torch.testing.assert_close(whole.model(**given), model(**given), rtol=1e-4, atol=1e-5)


def test_a_function_says_what_a_batch_of_any_kind_becomes() -> None:
    model, batches = network(), mappings()
    expected = compress(model, batches, 0.6)
    tuples = [(b["camera"], b["image"], b["place"], "a.jpg") for b in batches]
    found = compress(model, tuples, 0.6, inputs=lambda b: ((b[1], b[2]), {"camera": b[0], "scale": 2.0}))
    assert found.plan == expected.plan and found.lost == pytest.approx(expected.lost, rel=1e-5)


def test_statistics_are_those_of_a_network_of_one_input() -> None:
    """The same network, its other inputs fixed: a closed case that needs no packing."""

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, image: Tensor) -> Tensor:
            zeros = image.new_zeros(len(image), 5)
            return self.inner(image, zeros, torch.zeros(len(image), dtype=torch.int64))

    batches = [
        {"image": b["image"], "place": torch.zeros_like(b["place"]), "camera": torch.zeros_like(b["camera"])}
        for b in mappings()
    ]
    several = Compressor(correct="none", sites="conv*").fit(network(), batches).plan(0.6)
    alone = Compressor(correct="none", sites="inner.conv*").fit(Fixed(), [b["image"] for b in batches]).plan(0.6)
    assert several.loss == pytest.approx(alone.loss, rel=1e-5)
    assert several.ranks == {name.removeprefix("inner."): rank for name, rank in alone.ranks.items()}


@pytest.mark.parametrize("method", ["hessian-global", "hessian-local"])
def test_other_methods_and_a_budget_of_time(method: Any) -> None:
    assert compress(network(), mappings(), "uniform:0.5", method=method).lost < 1
    wide = network()
    wide.conv1, wide.conv2 = nn.Conv2d(3, 128, 3, padding=1), nn.Conv2d(128, 24, 3, padding=1)
    found = compress(wide, mappings(), "budget:latency=0.9", method="pca", correct="none", sites="conv2")
    assert list(found.plan.factored) == ["conv2"]


def test_labels_among_the_keywords_are_labels() -> None:
    model, batches = network(), mappings()
    labelled = [b | {"labels": torch.arange(len(b["image"])) % 4} for b in batches]
    expected = compress(model, batches, 0.6)
    assert compress(model, labelled, 0.6).lost == pytest.approx(expected.lost, rel=1e-6)
    assert compress(model, labelled, "uniform:0.5", method="gradient").plan.ranks
    with pytest.raises(
        BatchesError, match=r"labels of 8 images are torch.float32 \(8, 2\); expected whole numbers \(n,\)"
    ):
        compress(model, [b | {"labels": torch.zeros(8, 2)} for b in batches[:-1]], 0.6)


def test_what_a_processor_of_hugging_face_gives() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_labels=4)
    model = transformers.ResNetForImageClassification(config).eval()
    x = torch.randn(32, 3, 32, 32)
    features = transformers.BatchFeature({"pixel_values": x, "labels": torch.arange(32) % 4})
    found, plain = (compress(model, [given], 0.6) for given in (features, x))
    assert found.plan == plain.plan and found.lost == plain.lost
    with torch.no_grad():
        assert type(found.model(**features)) is type(model(**features))
        assert torch.isfinite(found.model(**features).loss), "labels go to the network again where it is trained"


# ── on several ranks ───────────────────────────────────────────────────────────────────────────────────────


def on_ranks(world: World) -> tuple[dict[str, int], float, dict[str, Tensor]]:
    bounds = {1: [0, 8], 3: [0, 1, 3, 8]}[world.size]
    own = mappings()[bounds[world.rank] : bounds[world.rank + 1]]
    found = compress(network(), own, 0.6, calibrate_images=40)
    return found.plan.ranks, found.lost, found.model.state_dict()


def test_the_number_of_ranks_does_not_matter() -> None:
    ((ranks, lost, _),) = run_ranks(on_ranks, 1)
    everywhere = run_ranks(on_ranks, 3)
    for other, also_lost, state in everywhere:
        assert other == ranks and also_lost == pytest.approx(lost, rel=1e-2)
        assert all(torch.equal(tensor, everywhere[0][2][name]) for name, tensor in state.items())


# ── packed ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_numbers_of_every_type_come_out_as_they_went_in() -> None:
    given = {
        "a": torch.randn(3, 2, 5, dtype=torch.float64),
        "b": torch.tensor([2**62 + 1, -1, 0]),
        "c": torch.tensor([[True, False, True]] * 3),
        "d": torch.randn(3, 7).bfloat16(),
        "e": torch.randn(3, 1, 3).half().transpose(1, 2),
        "f": torch.zeros(3, 0),
    }
    call = ((torch.arange(3, dtype=torch.uint8), None), given | {"g": "mean", "h": 0.5})
    packing = InputPacking.of(call)
    rows = packing.packed(call)
    assert rows.shape == (3, 1 + 80 + 8 + 3 + 14 + 6) and rows.dtype is torch.uint8
    for some in (slice(None), slice(1, 2), slice(0, 0)):
        args, kwargs = packing.unpacked(rows[some])
        assert torch.equal(args[0], call[0][0][some]) and args[1] is None
        assert kwargs["g"] == "mean" and kwargs["h"] == 0.5
        assert all(torch.equal(kwargs[name], value[some]) for name, value in given.items())
        assert all(kwargs[name].dtype is value.dtype for name, value in given.items())


# ── what leaves ────────────────────────────────────────────────────────────────────────────────────────────


def test_the_result_is_saved_loaded_applied_and_exported(tmp_path: Path) -> None:
    batches = mappings()
    found, given = compress(network(), batches, 0.6), together(batches)
    found.save(tmp_path / "small")
    with torch.no_grad():
        expected = found.model(**given)
        torch.testing.assert_close(load_compressed(tmp_path / "small", network())(**given), expected)
        mine = apply(found.plan, network())
        mine.load_state_dict(found.model.state_dict())
        torch.testing.assert_close(mine.eval()(**given), expected)
        text = found.export(tmp_path / "m.pt2", "torch-export")
        assert "top-1 the same for 8 of 8" in text
        program = torch.export.load(tmp_path / "m.pt2").module()
        torch.testing.assert_close(program(**given), expected)
    text = found.export(tmp_path / "m.onnx")
    assert (
        "inputs image: torch.float32 (n, 3, 10, 10), place: torch.float32 (n, 5), camera: torch.int64 (n,)" in text
    )
    with pytest.raises(ExportError, match="writes networks of images alone, this one takes image: "):
        found.export(tmp_path / "m.py", "python")
    with pytest.raises(ExportError, match="the network takes several inputs"):
        found.export(tmp_path / "n.onnx", images=given["image"])
    with pytest.raises(ExportError, match="int8 is of networks of images alone; this one takes image: "):
        found.export_int8(tmp_path / "n.onnx")
    found.save(tmp_path / "named", arch="resnet18")
    with pytest.raises(CheckpointError, match=r"takes inputs by name \(image, place, camera\)"):
        command.main([str(tmp_path / "named"), "--format", "onnx"])


# ── what is refused ────────────────────────────────────────────────────────────────────────────────────────


IMAGE, PLACE = torch.zeros(8, 3, 10, 10), torch.zeros(8, 5)


@pytest.mark.parametrize(
    ("batch", "options", "answer"),
    [
        ((IMAGE, PLACE, PLACE), {}, r"a batch is tuple \(0: torch.float32 \(8, 3, 10, 10\), 1: .*`inputs`"),
        ((IMAGE, PLACE), {}, r"labels of 8 images are torch.float32 \(8, 5\).*`inputs`"),
        (IMAGE, {}, r"does not take batches of \(n, 3, 10, 10\): .*place.*`inputs`"),
        ({"image": IMAGE, "site": PLACE}, {}, r"does not take batches of image: .*site: .*unexpected keyword"),
        ({"image": IMAGE, "place": PLACE[:4]}, {}, "expected as many images along the first dimension"),
        ({"image": IMAGE, "place": ["here"] * 8}, {}, r"place: list.*expected tensors"),
        ({"scale": 2.0}, {}, "expected tensors"),
        ((IMAGE, PLACE), {"inputs": lambda b: b[0]}, r"inputs returned torch.float32 .*\(args, kwargs\)"),
        ((IMAGE, PLACE), {"inputs": lambda b: b}, r"inputs returned tuple \(0: .*\(args, kwargs\)"),
    ],
)
def test_what_cannot_be_passed_is_listed_with_what_to_give(
    batch: Any, options: dict[str, Any], answer: str
) -> None:
    with pytest.raises(BatchesError, match=answer):
        compress(network(), [batch, batch], 0.6, **options)


def test_batches_of_several_kinds_mirror_images_and_traced_networks_are_refused() -> None:
    batches = mappings()
    with pytest.raises(BatchesError, match=r"images of image: .*place: torch.float32 \(n, 5\).* and image"):
        compress(network(), [*batches, batches[0] | {"place": torch.zeros(8, 4)}], 0.6)
    with pytest.raises(BatchesError, match=r"scale: 2.0 and .*scale: 3.0"):
        compress(network(), [*batches, batches[0] | {"scale": 3.0}], 0.6)
    with pytest.raises(ConfigError, match="mirrored: the network takes several inputs"):
        compress(network(), batches, 0.6, mirrored=True)
    with pytest.raises(ConfigError, match="crops: the network takes several inputs"):
        compress(network(), batches, 0.6, crops=1)
    with pytest.raises(ModelError, match=r"torch\.fx\.GraphModule"):
        compress(torch.fx.symbolic_trace(network()), batches, 0.6)
