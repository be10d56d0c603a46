"""Weights as people have them on disk: each file gives the network the same values, or one line of what to do."""

import argparse
import collections
import os
import pathlib
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from dist_prune.network.errors import ModelError
from dist_prune.network.models import build, fill
from dist_prune.network.weights import load_file, load_state

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """A ResNet-20 in which no tensor is at its initial value."""
    torch.manual_seed(0)
    model = build("resnet20", 10).train()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.rand_like(tensor.float()) + 0.5)
    return model.eval()


@pytest.fixture(scope="module")
def state(net: nn.Module) -> State:
    return dict(net.state_dict())


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def other(state: State) -> State:
    return {name: tensor + 1 for name, tensor in state.items()}


def inner(state: State, layer: str, wrapper: str) -> State:
    return {name.replace(f"{layer}.", f"{layer}.{wrapper}."): tensor for name, tensor in state.items()}


def given(tmp_path: Path, content: object, model: nn.Module | None = None, **options: bool) -> tuple[State, str]:
    """What a network holds after loading the file, and what was said."""
    path = tmp_path / "weights.pth"
    torch.save(content, path, **options)
    model = model or build("resnet20", 10)
    said = fill(model, "resnet20", 10, str(path))
    return dict(model.state_dict()), said


def same(one: State, two: State) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


class Recipe:
    """A class of a user's own, in a checkpoint."""

    def __init__(self) -> None:
        self.layers = [1, 2]


class Box(dict):  # type: ignore[type-arg]
    """A mapping of a user's own, such as EasyDict."""


TAKEN: dict[str, tuple[Callable[[State], object], str]] = {
    "as it is": (lambda s: s, ""),
    "compiled": (lambda s: prefixed("_orig_mod.", s), "stripped '_orig_mod.'"),
    "compiled under DDP": (lambda s: prefixed("module._orig_mod.", s), "stripped 'module._orig_mod.'"),
    "Lightning": (
        lambda s: {
            "state_dict": prefixed("model.", s) | {"criterion.weight": torch.ones(10)},
            "hyper": {"lr": 0.1},
        },
        "took 'state_dict', stripped 'model.', left out criterion.weight",
    ),
    "any prefix": (lambda s: prefixed("online.backbone.", s), "stripped 'online.backbone.'"),
    "net": (lambda s: {"net": prefixed("module.", s), "acc": 91.2}, "took 'net', stripped 'module.'"),
    "torchvision's train.py": (
        lambda s: {
            "model": other(s),
            "optimizer": {"state": {0: {"momentum_buffer": s["conv1.weight"]}}, "param_groups": [{"lr": 0.1}]},
            "args": argparse.Namespace(lr=0.1, output=pathlib.PosixPath("out")),
            "model_ema": {"n_averaged": torch.tensor(3), **prefixed("module.", s)},
        },
        "took 'model_ema' ('model' would fit, too), stripped 'module.', left out n_averaged",
    ),
    "timm's train.py": (
        lambda s: {"state_dict": other(s), "args": argparse.Namespace(lr=0.1), "state_dict_ema": s, "metric": 7.0},
        "took 'state_dict_ema' ('state_dict' would fit, too)",
    ),
    "a counter that is a number": (lambda s: {**s, "step": 100}, ""),
    "counters that are tensors": (
        lambda s: {**s, "step": torch.tensor(7), "best": torch.tensor(93.1)},
        "left out step, best",
    ),
    "thop's counts": (
        lambda s: {**s, "conv1.total_ops": torch.zeros(1, dtype=torch.float64)},
        "left out conv1.total_ops",
    ),
    "classes of others": (
        lambda s: {"state_dict": s, "recipe": Recipe(), "best": np.float32(3), "past": collections.deque([1, 2])},
        "took 'state_dict'",
    ),
    "mappings of others": (lambda s: Box(model=collections.defaultdict(list, s)), "took 'model'"),
    "a layer compiled": (lambda s: inner(s, "layer1", "_orig_mod"), "read past _orig_mod in names"),
    "a layer under DataParallel": (lambda s: inner(s, "layer1", "module"), "read past module in names"),
}


@pytest.mark.parametrize("name", TAKEN)
def test_weights_are_found_in_what_people_save(name: str, tmp_path: Path, state: State) -> None:
    content, words = TAKEN[name]
    found, said = given(tmp_path, content(state))
    assert same(found, state)
    assert said == (words and f"weights from weights.pth: {words}")


def test_a_file_older_than_the_zip_format_is_read_alike(tmp_path: Path, state: State) -> None:
    content = {"state_dict": prefixed("module.", state), "args": argparse.Namespace(lr=0.1)}
    found, _ = given(tmp_path, content, _use_new_zipfile_serialization=False)
    assert same(found, state)


def test_a_network_saved_whole_is_read_without_its_class(tmp_path: Path, net: nn.Module, state: State) -> None:
    found, said = given(tmp_path, {"model": nn.DataParallel(net), "epoch": 3})
    assert same(found, state)
    assert "took 'model', stripped 'module.'" in said


def test_averages_of_weights_are_read_as_torch_saves_them(tmp_path: Path, net: nn.Module, state: State) -> None:
    average = torch.optim.swa_utils.AveragedModel(net, use_buffers=True)
    found, said = given(tmp_path, average.state_dict())
    assert same(found, state)
    assert "stripped 'module.', left out n_averaged" in said


@pytest.mark.parametrize("wrap", ["{}", "module.{}", "_orig_mod.{}"])
def test_a_child_that_is_called_module_keeps_its_name(wrap: str, tmp_path: Path, net: nn.Module) -> None:
    class Wrapped(nn.Module):
        def __init__(self, inside: nn.Module) -> None:
            super().__init__()
            self.module = inside
            self.conv1 = nn.Conv2d(1, 1, 1)  # without the name `module`, two of the names would be one

    whole = Wrapped(net)
    content = {wrap.format(name): tensor for name, tensor in whole.state_dict().items()}
    found, _ = given(tmp_path, content, Wrapped(build("resnet20", 10)))
    assert same(found, dict(whole.state_dict()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted(tmp_path: Path, state: State, dtype: torch.dtype) -> None:
    content = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}
    found, _ = given(tmp_path, content)
    assert same(found, {name: content[name].to(state[name].dtype) for name in state})


@pytest.mark.parametrize("prefix", ["module.", "module._orig_mod.", "model."])
def test_safetensors_are_read_alike_whatever_the_file_is_called(tmp_path: Path, state: State, prefix: str) -> None:
    for name in ("weights.safetensors", "weights.pth"):
        save_file(prefixed(prefix, state), tmp_path / name)
        model = build("resnet20", 10)
        assert f"stripped {prefix!r}" in fill(model, "resnet20", 10, str(tmp_path / name))
        assert same(dict(model.state_dict()), state)


# ── networks whose classes have hooks for loading ──────────────────────────────────────────────────────────


def torchvisions(name: str, **options: object) -> nn.Module:
    return torchvision.models.get_model(name, weights=None, num_classes=4, **options).eval()


def check_agrees(tmp_path: Path, content: object, make: Callable[[], nn.Module], want: nn.Module) -> None:
    torch.save(content, tmp_path / "w.pth")
    model = make()
    load_file(model, tmp_path / "w.pth", "")
    assert same(dict(model.state_dict()), dict(want.state_dict()))


def test_batch_norm_from_before_it_counted_batches(tmp_path: Path, state: State) -> None:
    """akamaster's ResNets, and all files older than PyTorch 0.4.1."""
    old = {f"module.{name}": tensor for name, tensor in state.items() if not name.endswith("tracked")}
    found, _ = given(tmp_path, {"state_dict": old, "best_prec1": 91.7}, _use_new_zipfile_serialization=False)
    fresh = build("resnet20", 10).state_dict()
    assert same(found, {n: fresh[n] if n.endswith("tracked") else state[n] for n in state})


def test_batches_uncounted_in_a_state_dict_that_has_its_versions(tmp_path: Path, net: nn.Module) -> None:
    kept = net.state_dict()  # whose `_metadata` says that batch norm counts
    for name in [name for name in kept if name.endswith("tracked")]:
        del kept[name]
    found, _ = given(tmp_path, kept)
    assert torch.equal(found["conv1.weight"], net.state_dict()["conv1.weight"])


def test_mnasnet_with_and_without_its_version(tmp_path: Path) -> None:
    """Its class refuses a state dict without one; those of a wrapped network lie one level deeper."""
    want = torchvisions("mnasnet0_5")
    for content in (want.state_dict(), dict(want.state_dict()), nn.DataParallel(want).state_dict()):
        check_agrees(tmp_path, content, lambda: torchvisions("mnasnet0_5"), want)
    model = torchvisions("mnasnet0_5")
    load_state(model, dict(want.state_dict()), "")
    assert same(dict(model.state_dict()), dict(want.state_dict()))


def test_an_mnasnet_of_the_first_version_is_another_network(tmp_path: Path) -> None:
    first = torchvisions("mnasnet0_5")
    versioned = first.state_dict()
    versioned._metadata[""]["version"] = 1
    torch.save(versioned, tmp_path / "w.pth")
    with pytest.raises(ModelError, match="another architecture"):
        load_file(torchvisions("mnasnet0_5"), tmp_path / "w.pth", "w.pth")


def test_densenets_names_of_old(tmp_path: Path) -> None:
    """As torchvision's own files have them: `denselayer1.norm.1.weight`."""
    want = torchvisions("densenet121")
    pattern = re.compile(r"(denselayer\d+\.(?:norm|conv))([12])\.")
    old = {pattern.sub(r"\1.\2.", name): tensor for name, tensor in want.state_dict().items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    check_agrees(tmp_path, old, lambda: torchvisions("densenet121"), want)


def test_a_transformers_names_of_old(tmp_path: Path) -> None:
    def make() -> nn.Module:
        sizes = {"num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
        return torchvision.models.VisionTransformer(32, 16, 2, **sizes, num_classes=5)

    want = make()
    names = {".mlp.0.": ".mlp.linear_1.", ".mlp.3.": ".mlp.linear_2."}
    old = {re.sub(r"\.mlp\.[03]\.", lambda m: names[m[0]], n): t for n, t in want.state_dict().items()}
    check_agrees(tmp_path, old, make, want)


def test_weights_that_a_file_has_once_and_the_network_twice(tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        return model

    want, model = make(), make()
    content = {name: t for name, t in want.state_dict().items() if name != "1.weight"}
    load_state(model, content, "")
    assert same(dict(model.state_dict()), dict(want.state_dict()))


def test_auxiliary_heads_of_torchvisions_files_are_left_out(tmp_path: Path) -> None:
    trained = torchvisions("googlenet", aux_logits=True, init_weights=False)
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    model = build("googlenet", 4)
    assert load_file(model, tmp_path / "w.pth", "") == ""
    assert all(torch.equal(tensor, trained.state_dict()[n]) for n, tensor in model.state_dict().items())


# ── what is refused ────────────────────────────────────────────────────────────────────────────────────────


class Trap:
    def __init__(self, function: Callable[[str], object], text: str) -> None:
        self.call = function, (text,)

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return self.call


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda s: {"best": s, "last": other(s)}, "'best' and 'last' fit alike; save the one that is meant alone"),
        (
            lambda s: prefixed("encoder_q.", s) | prefixed("encoder_k.", other(s)),
            "names under 'encoder_q.' and 'encoder_k.' fit alike",
        ),
        (lambda s: {n: t.to(torch.int8) for n, t in s.items()}, "quantised: conv1.weight torch.int8"),
        (
            lambda s: {n: t for n, t in s.items() if n != "conv1.weight"},
            r"another architecture \(1 missing: conv1",
        ),
        (
            lambda s: {**s, "head.scale": torch.ones(1)},
            r"architecture \(1 not in the network: head\.scale",
        ),
        (lambda s: {"optimizer": {"lr": 1}}, r"expected a state dict \(name → tensor\), got dict"),
    ],
    ids=["two mappings", "two prefixes", "quantised", "missing", "left over", "no tensors"],
)
def test_what_does_not_fit_is_refused(content: Callable[[State], object], words: str, tmp_path, state) -> None:
    with pytest.raises(ModelError, match=words) as refused:
        given(tmp_path, content(state))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "pointer of Git LFS; run git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html>", "it is a web page"),
        (b'{"weight_map": {}}', "it is JSON"),
        (b"\x1f\x8b\x08\x00", "it is packed"),
        (b"Not Found", "damaged"),
    ],
)
def test_files_that_are_taken_for_weights_are_named(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=f"weights.pth: not readable as weights: .*{words}") as refused:
        fill(build("resnet20", 10), "resnet20", 10, str(path))
    assert "\n" not in str(refused.value) and "\x1b" not in str(refused.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("left", [10, 1000, -1000])
def test_files_that_are_cut_off_are_named(tmp_path: Path, state: State, zipped: bool, left: int) -> None:
    path = tmp_path / "weights.pth"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ModelError, match=r"weights\.pth: not readable as weights: .*copy it again"):
        fill(build("resnet20", 10), "resnet20", 10, str(path))


def test_programs_are_not_weights_but_hold_some(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    torch.jit.script(nn.Linear(2, 2)).save(path)
    with pytest.raises(ModelError, match=r"it is TorchScript.*torch\.jit\.load\('script\.pt'\)\.state_dict\(\)"):
        fill(build("resnet20", 10), "resnet20", 10, str(path))


@pytest.mark.parametrize("function", [os.system, eval])
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, state: State, function: Callable[[str], object]) -> None:
    """A call that is refused, or that a stand-in takes: the weights beside it may be had, its effect may not."""
    text = f"touch {tmp_path}/trapped" if function is os.system else f"open('{tmp_path}/trapped', 'w')"
    content = {"state_dict": state, "extra": Trap(function, text)}
    if function is os.system:
        with pytest.raises(ModelError, match=r"it would call posix\.system; do not use this file"):
            given(tmp_path, content)
    else:
        assert same(given(tmp_path, content)[0], state)
    assert not (tmp_path / "trapped").exists()


def test_folders_and_addresses_are_told_from_files(tmp_path: Path) -> None:
    model = build("resnet20", 10)
    with pytest.raises(ModelError, match="is a folder; give the file in it"):
        fill(model, "resnet20", 10, str(tmp_path))
    with pytest.raises(ModelError, match="is an address; download it"):
        fill(model, "resnet20", 10, "https://example.org/weights.pth")
