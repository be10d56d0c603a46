"""A compressed network leaves this process as files and comes back as the same function, anywhere."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_prune import load_compressed
from dist_prune.artifacts.saved_model import Description, save_compressed
from dist_prune.config.images import ImageSpec
from dist_prune.distributed.fingerprint import digest
from dist_prune.factorization.plan import Choice, Plan
from dist_prune.factorization.project import rebuild
from dist_prune.network.memory_format import lay_out
from dist_prune.network.models import ModelError, build
from dist_prune.network.sites import survey
from dist_prune.utils.files import CheckpointError, seal
from tests.commands import ROOT, shared_commands

OWN = """
import torch
from torch import nn


class Tiny(nn.Module):
    '''Patches, one block of attention and one of two linear layers, as in a vision transformer.'''

    def __init__(self, num_classes, width=24):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, 8)
        self.place = nn.Parameter(torch.randn(1, 16, width))
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        x = self.patch(x).flatten(2).mT + self.place
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.down(torch.relu(self.up(x)))).mean(1))


def transformer(num_classes):
    return Tiny(num_classes)


class Tied(nn.Module):
    '''Two layers with one weight, one buffer that is not saved, and a head of its own.'''

    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.full((1,), 0.5), persistent=False)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(torch.relu(self.stem(x))))))
        return self.head(self.scale * x.mean((2, 3)))


def tied(num_classes):
    return Tied(num_classes)
"""
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NETWORKS = ("resnet18", "resnet20", "mobilenet_v2", "transformer", "tied")


@dataclass(frozen=True)
class Saved:
    """A compressed network and the folder it was saved to."""

    folder: Path
    model: nn.Module
    plan: Plan

    @property
    def logits(self) -> Tensor:
        return logits(self.model)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IMAGES)


def saved(home: Path, name: str) -> Saved:
    """Half the channels of every site, with random weights and statistics; its own source goes away after."""
    source = home / "own.py"
    source.write_text(OWN)
    arch = f"{source}:{name}" if f"def {name}(" in OWN else name
    torch.manual_seed(0)
    dense = build(arch, 7)
    found = survey(dense, IMAGES[:1])
    halves = (Choice(site.name, max(site.outputs // 2 // site.groups, 1) * site.groups) for site in found.sites)
    plan = Plan((*halves, *(Choice(s.name, None, s.reason) for s in found.skipped)))
    model = rebuild(dense, plan)
    logits(model.train())  # lazily made state, and statistics of batch norm that are not the initial ones
    for key, tensor in model.state_dict().items():
        if key.endswith(("running_mean", "running_var")):
            tensor.mul_(1.5).add_(0.1)
    save_compressed(home / "run", model, Description(arch, 7, ImageSpec(0, 32), tuple("abcdefg"), plan))
    source.unlink()
    return Saved(home / "run", model, plan)


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    return {name: saved(tmp_path_factory.mktemp(name), name) for name in NETWORKS}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_comes_back_bit_for_bit(networks: dict[str, Saved], name: str) -> None:
    network = networks[name]
    loaded = load_compressed(network.folder)
    assert not loaded.training
    assert digest(loaded) == digest(network.model)
    assert torch.equal(logits(loaded), network.logits)
    assert len(network.plan.ranks) >= 1
    for site, rank in network.plan.ranks.items():
        assert loaded.get_submodule(site).reduce.weight.shape[0] == rank  # type: ignore[union-attr]


def test_shared_weights_stay_shared_and_are_saved_once(networks: dict[str, Saved]) -> None:
    from safetensors.torch import load_file

    loaded = load_compressed(networks["tied"].folder)
    assert loaded.second.weight is loaded.first.weight  # type: ignore[union-attr]
    names = load_file(networks["tied"].folder / "model.safetensors")
    assert len({"first.weight", "second.weight"} & set(names)) == 1


def test_the_memory_layout_does_not_matter(tmp_path: Path) -> None:
    """Fine-tuning lays weights out for tensor cores; files are in the ordinary order."""
    model = build("resnet20", 10)
    lay_out(model, torch.channels_last)
    save_compressed(tmp_path, model, Description("resnet20", 10, ImageSpec(0, 32), (), Plan(())))
    assert digest(load_compressed(tmp_path)) == digest(model)


def print_digests(*folders: str) -> int:
    print(json.dumps([digest(load_compressed(folder)) for folder in folders]))
    return 0


def test_another_process_loads_them_without_the_original_source(networks: dict[str, Saved]) -> None:
    folders = [network.folder for network in networks.values()]
    done = shared_commands().succeed(*folders, ranks=0, function="tests.artifacts.test_saved_model:print_digests")
    assert json.loads(done.out) == [digest(n.model) for n in networks.values()]


def test_a_run_that_was_moved_still_loads(networks: dict[str, Saved], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(networks["transformer"].folder, tmp_path / "elsewhere")
    assert torch.equal(logits(load_compressed(str(tmp_path / "elsewhere"))), networks["transformer"].logits)


def test_plan_json_tells_what_the_network_is(networks: dict[str, Saved]) -> None:
    plan = json.loads((networks["mobilenet_v2"].folder / "plan.json").read_text())
    assert plan["format"] == 1
    assert plan["network"] == {"arch": "mobilenet_v2", "weights": "model.safetensors", "classes": 7}
    assert plan["labels"] == list("abcdefg")
    assert plan["image"]["crop"] == 32 and len(plan["image"]["mean"]) == 3
    reasons = {row["site"]: row["reason"] for row in plan["choices"] if row["rank"] is None}
    assert reasons["features.1.conv.0.0"] == "depthwise: each group has one input channel"


# ── files that are not what was written ────────────────────────────────────────────────────────────────────


def changed_plan(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "plan.json").read_text()) | changes
        kept = {name: value for name, value in content.items() if value is not None}
        (folder / "plan.json").write_text(json.dumps(kept))

    return change


def flip_a_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def cut_and_sealed(folder: Path) -> None:
    cut(folder)
    seal(folder / "model.safetensors")


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a bit flipped": (flip_a_bit, r"model\.safetensors: its SHA-256 differs .* damaged"),
    "truncated": (cut, r"model\.safetensors: its SHA-256 differs"),
    "truncated, checksum renewed": (cut_and_sealed, r"model\.safetensors does not fit plan\.json"),
    "no checksum": (remove("model.safetensors.sha256"), "it was not written to the end"),
    "no weights": (remove("model.safetensors"), r"model\.safetensors: there is no such file"),
    "no plan": (remove("plan.json"), r"no plan\.json; expected the directory of a finished run"),
    "plan empty": (write("plan.json", ""), r"plan\.json: not JSON"),
    "plan not JSON": (write("plan.json", '{"format": 1,'), r"plan\.json: not JSON"),
    "plan a list": (write("plan.json", "[1]"), r"plan\.json: format list, this version reads 1"),
    "newer format": (changed_plan(format=2), r"plan\.json: format 2, this version reads 1"),
    "no choices": (changed_plan(choices=None), r"plan\.json: incomplete or edited wrongly .*choices"),
    "no network": (changed_plan(network=None), r"plan\.json: incomplete or edited wrongly .*network"),
    "row without rank": (changed_plan(choices=[{"site": "linear"}]), "incomplete or edited wrongly .*not a plan"),
    "unknown site": (changed_plan(choices=[{"site": "conv9", "rank": 1}]), "does not fit plan.json .*conv9"),
    "impossible rank": (
        changed_plan(choices=[{"site": "linear", "rank": 99}]),
        "linear has output rank 99; expected 1 to 64",
    ),
    "other ranks": (changed_plan(choices=[{"site": "linear", "rank": 2}]), "does not fit plan.json"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_told_as_what_it_is(tmp_path: Path, name: str) -> None:
    harm, message = DAMAGE[name]
    model = build("resnet20", 10)
    plan = Plan((Choice("linear", 5), Choice("conv1", None, "kept")))
    save_compressed(
        tmp_path, rebuild(model, plan), Description("resnet20", 10, ImageSpec(0, 32), tuple("0123456789"), plan)
    )
    load_compressed(tmp_path)
    harm(tmp_path)
    with pytest.raises(CheckpointError, match=message) as raised:
        load_compressed(tmp_path)
    assert str(tmp_path) in str(raised.value), "the message says which run"


def test_an_architecture_that_is_not_known_here_is_named(tmp_path: Path) -> None:
    save_compressed(tmp_path, build("resnet20", 10), Description("resnet20", 10, ImageSpec(0, 32), (), Plan(())))
    changed_plan(network={"arch": "resnet2000", "weights": "", "classes": 10})(tmp_path)
    with pytest.raises(ModelError, match="unknown architecture 'resnet2000'"):
        load_compressed(tmp_path)


def test_a_failed_save_leaves_the_former_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    description = Description("resnet20", 10, ImageSpec(0, 32), (), Plan(()))
    model = build("resnet20", 10)
    save_compressed(tmp_path, model, description)

    def fails(_model: nn.Module, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dist_prune.artifacts.saved_model.save_model", fails)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: could not be written \(No space left"):
        save_compressed(tmp_path, build("resnet20", 10), description)
    assert digest(load_compressed(tmp_path)) == digest(model)


BARRED = ("nvidia", "tensorboard", "submitit", "matplotlib", "sklearn", "onnx", "timm", "scipy")
TRAINING = ("pipeline", "training", "finetune", "report", "job")
LOAD = f"""
import sys
sys.modules.update(dict.fromkeys({BARRED}))  # importing one is now an ImportError
from dist_prune import load_compressed
load_compressed(sys.argv[1])
training = [name for name in {TRAINING} if f"dist_prune.{{name}}" in sys.modules]
assert not training, training
"""


def test_loading_needs_no_data_no_training_code_and_no_reports(networks: dict[str, Saved]) -> None:
    words = [sys.executable, "-c", LOAD, str(networks["transformer"].folder)]
    done = subprocess.run(words, check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_what_a_networks_file_imports_travels_with_it(tmp_path: Path) -> None:
    """Loaded where the sources are gone, and where the same name is another module."""
    home = tmp_path / "home"
    (home / "parts").mkdir(parents=True)
    (home / "parts" / "__init__.py").write_text("")
    (home / "parts" / "heads.py").write_text("from torch import nn\nHead = nn.Linear\n")
    (home / "blocks.py").write_text("from parts.heads import Head\n")
    (home / "network.py").write_text(
        "import blocks\ndef net(num_classes):\n    return blocks.Head(3, num_classes)\n"
    )
    arch = f"{home / 'network.py'}:net"
    model = build(arch, 7)
    save_compressed(tmp_path / "run", model, Description(arch, 7, ImageSpec(0, 32), (), Plan(())))
    shutil.rmtree(home)
    for name in ("network.py", "blocks.py", "parts/heads.py"):
        assert (tmp_path / "run" / "network" / name).is_file()
    assert digest(load_compressed(tmp_path / "run")) == digest(model)


def test_options_of_torchvisions_networks_come_back(tmp_path: Path) -> None:
    options = {"transform_input": True}
    model = build("googlenet", 7, options)
    description = Description("googlenet", 7, ImageSpec(0, 32), (), Plan(()), options)
    save_compressed(tmp_path, model, description)
    loaded = load_compressed(tmp_path)
    assert loaded.transform_input
    assert torch.equal(logits(loaded), logits(model.eval()))


def test_networks_that_ask_for_their_version_come_back(tmp_path: Path) -> None:
    """safetensors keep tensors alone."""
    model = build("mnasnet0_5", 7)
    save_compressed(tmp_path, model, Description("mnasnet0_5", 7, ImageSpec(0, 32), (), Plan(())))
    assert digest(load_compressed(tmp_path)) == digest(model)
