from pathlib import Path
from typing import cast

import pytest
import torch
from torch import nn

from dist_prune.network.models import ModelError, build, load
from dist_prune.network.outputs import logits_of

IMAGE = torch.zeros(1, 3, 32, 32)


def test_cifar_resnet20_is_the_one_of_the_paper() -> None:
    model = build("resnet20", 10)
    assert sum(p.numel() for p in model.parameters()) == 269_722
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(names) == 20
    assert names[:3] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
    assert names[-1] == "linear"
    assert model(IMAGE).shape == (1, 10)


@pytest.mark.parametrize(("arch", "millions"), [("resnet32", 0.46), ("resnet44", 0.66), ("resnet56", 0.85)])
def test_deeper_cifar_resnets_have_the_published_sizes(arch: str, millions: float) -> None:
    assert sum(p.numel() for p in build(arch, 10).parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_the_shortcut_takes_every_second_pixel_and_pads_channels_on_both_sides() -> None:
    shortcut = build("resnet20", 10).layer2[0].shortcut
    x = torch.randn(1, 16, 4, 4)
    y = shortcut(x)
    assert y.shape == (1, 32, 2, 2)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any() and not y[:, 24:].any()


def test_unknown_names_get_close_matches() -> None:
    with pytest.raises(ModelError, match="unknown architecture 'resnet19'; close: resnet18"):
        build("resnet19", 10)


def test_a_network_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from torch import nn\ndef tiny(num_classes):\n    return nn.Linear(4, num_classes)\n")
    assert build(f"{file}:tiny", 7).out_features == 7
    with pytest.raises(ModelError, match="has no function 'huge'; it has tiny"):
        build(f"{file}:huge", 7)
    with pytest.raises(ModelError, match="there is no file"):
        build(f"{tmp_path}/absent.py:tiny", 7)


def test_a_function_that_loads_weights_itself_keeps_them_where_pretrained_ones_are_asked_for(
    tmp_path: Path,
) -> None:
    file = tmp_path / "mine.py"
    body = "    layer = nn.Linear(4, num_classes)\n    nn.init.constant_(layer.weight, 3)\n    return layer\n"
    file.write_text(f"from torch import nn\ndef tiny(num_classes):\n{body}")
    layer = load(f"{file}:tiny", 7, "pretrained")
    assert bool((cast(nn.Linear, layer).weight == 3).all())
    with pytest.raises(ModelError, match="neither a file nor known"):
        load(f"{file}:tiny", 7, "IMAGENET1K_V1")


def saved(tmp_path: Path, state: object) -> str:
    torch.save(state, tmp_path / "weights.pt")
    return str(tmp_path / "weights.pt")


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"model": s}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_come_back_whatever_they_are_wrapped_in(tmp_path: Path, wrap, prefix: str) -> None:
    state = build("resnet20", 10).state_dict()
    file = saved(tmp_path, wrap({prefix + name: tensor for name, tensor in state.items()}))
    model = load("resnet20", 10, file)
    assert not model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_weights_in_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = build("resnet20", 10).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    model = load("resnet20", 10, str(tmp_path / "w.safetensors"))
    assert torch.equal(model.state_dict()["conv1.weight"], state["conv1.weight"])


def test_a_checkpoint_of_another_architecture_names_what_differs(tmp_path: Path) -> None:
    file = saved(tmp_path, build("resnet32", 10).state_dict())
    with pytest.raises(ModelError, match=r"another architecture .*not in the network: layer1\.3\.conv1\.weight"):
        load("resnet20", 10, file)
    file = saved(tmp_path, build("resnet20", 100).state_dict())
    with pytest.raises(ModelError, match=r"linear\.weight \(100, 64\) for \(10, 64\)"):
        load("resnet20", 10, file)


def test_files_that_are_not_weights_are_refused(tmp_path: Path) -> None:
    for content in (b"", b"garbage", Path(saved(tmp_path, [1, 2])).read_bytes()):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(ModelError, match=r"bad\.pt: (not readable as weights|expected a state dict)"):
            load("resnet20", 10, str(tmp_path / "bad.pt"))
    with pytest.raises(ModelError, match="there is no such file"):
        load("resnet20", 10, str(tmp_path / "absent.pt"))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    """`weights_only`: a pickle that would run a command is refused."""
    import os

    class Trap:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/trapped",)

    with pytest.raises(ModelError, match="not readable as weights"):
        load("resnet20", 10, saved(tmp_path, {"conv1.weight": Trap()}))
    assert not (tmp_path / "trapped").exists()


def test_enums_are_checked_before_anything_is_downloaded() -> None:
    with pytest.raises(ModelError, match="resnet18 has IMAGENET1K_V1"):
        load("resnet18", 1000, "IMAGENET1K_V9")
    with pytest.raises(ModelError, match="has 1000 classes, --classes is 10"):
        load("resnet18", 10, "IMAGENET1K_V1")
    with pytest.raises(ModelError, match="neither a file nor known for resnet20"):
        load("resnet20", 10, "DEFAULT")


def test_only_classifiers_are_accepted() -> None:
    assert logits_of((torch.zeros(2, 5), None)).shape == (2, 5)
    with pytest.raises(ModelError, match="expected logits \\(images, classes\\)"):
        logits_of(torch.zeros(2))
