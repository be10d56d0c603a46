"""Pretrained networks get images as they were trained on them, unless flags say otherwise."""

import json
from pathlib import Path

import pytest
import torch
import torchvision

from dist_prune.config.flags import ConfigError
from dist_prune.config.images import ImageSpec
from dist_prune.config.recipes import given, parse
from dist_prune.config.run import NetworkConfig, Run
from dist_prune.data import pretrained_images
from dist_prune.network.models import build, is_timms, load
from dist_prune.network.published import options_of
from tests.runs import Bench

VIT = "vit_tiny_patch16_224"  # half of its data configuration is not ImageNet's usual one


def read(*words: str) -> Run:
    return pretrained_images.adapted(parse(words), given(words))


def test_its_own_data_configuration_is_taken() -> None:
    assert read("digits", "--arch", VIT).images.image == ImageSpec(248, 224, (0.5,) * 3, (0.5,) * 3, "bicubic")


def test_flags_win_even_where_they_say_what_the_recipe_says() -> None:
    assert read("digits", "--arch", VIT, "--crop", "32", "--resize=0").images.image.resize == 0
    image = read(
        "digits", "--arch", VIT, "--mean", "0.1", "0.2", "0.3", "--interpolation", "bilinear"
    ).images.image
    assert image == ImageSpec(248, 224, (0.1, 0.2, 0.3), (0.5,) * 3, "bilinear")


def test_a_crop_alone_keeps_its_share_of_the_picture() -> None:
    assert read("digits", "--arch", VIT, "--crop", "112").images.image.resize == 124


def test_a_recipes_file_counts_as_flags(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'recipe = "digits"\narch = "{VIT}"\nresize = 300\n')
    assert read(str(path)).images.image == ImageSpec(300, 224, (0.5,) * 3, (0.5,) * 3, "bicubic")


@pytest.mark.parametrize(
    "arch", ["resnet18", "resnet20", "mnist", "net.py:vit_tiny_patch16_224", "no_such_network"]
)
def test_other_networks_are_left_alone(arch: str) -> None:
    assert not is_timms(arch) and pretrained_images.adopted(parse(["--arch", arch])) == ""
    assert read("digits", "--arch", arch).images == parse(["digits"]).images


def test_what_cannot_be_had_is_refused_or_told(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"input_size": (1, 28, 28), "interpolation": "lanczos", "crop_pct": 0.5, "crop_mode": "squash"}
    known |= {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    monkeypatch.setattr(pretrained_images, "_data_config", lambda arch: known)
    with pytest.raises(ConfigError, match="takes 1 × 28 × 28"):
        read("digits", "--arch", VIT)
    known["input_size"] = (3, 28, 28)
    run = read("digits", "--arch", VIT, "--crop", "20")
    assert run.images.image.interpolation == "bilinear"
    said = pretrained_images.adopted(run)
    assert "its own interpolation, lanczos, cannot be had" in said and "it cuts by 'squash'" in said
    assert "resize 56, crop 28" in said and "here: resize 40, crop 20" in said


def test_a_run_says_what_was_taken_and_keeps_it(bench: Bench, tmp_path: Path) -> None:
    arch = "test_resnet"  # timm's smallest, of 160 pixels
    words = bench.words(tmp_path / "run", arch=arch, weights="none", crop=None, sites="*conv2", epochs=None)
    bench.commands.succeed(*words, "--epochs", 0, "--pretrain.epochs", 1, "--pretrain.batch-size", 4, ranks=1)
    image = json.loads((tmp_path / "run" / "config.json").read_text())["run"]["images"]["image"]
    wanted = pretrained_images.spec_of(NetworkConfig(arch))
    assert wanted is not None
    assert (image["crop"], image["resize"], image["interpolation"]) == (160, wanted.resize, wanted.interpolation)
    assert f"images as timm has them for {arch}: resize {wanted.resize}, crop 160" in (
        tmp_path / "run" / "log.txt"
    ).read_text().replace("\n", " ")


# ── torchvision's weights ──────────────────────────────────────────────────────────────────────────────────


def published() -> list[tuple[str, str]]:
    found = {}
    for arch in torchvision.models.list_models(module=torchvision.models):
        for name in torchvision.models.get_model_weights(arch).__members__:
            found[arch, name] = None
    return list(found)


def test_all_of_torchvisions_weights_get_their_own_transforms() -> None:
    """Against the transforms themselves."""
    assert len(published()) > 100
    for arch, name in published():
        wanted = torchvision.models.get_model_weights(arch)[name].transforms()
        spec = pretrained_images.spec_of(NetworkConfig(arch, name))
        assert spec is not None
        assert ([spec.crop], [spec.resize]) == (wanted.crop_size, wanted.resize_size), arch
        assert (list(spec.mean), list(spec.std)) == (wanted.mean, wanted.std), arch
        assert spec.interpolation == wanted.interpolation.value, arch


def test_a_file_that_is_named_as_torchvisions_counts_as_its_weights() -> None:
    """It is how they come to machines without network."""
    words = ("--arch", "efficientnet_b1", "--weights")
    name = Path(torchvision.models.get_model_weights("efficientnet_b1").IMAGENET1K_V1.url).name
    by_file = read("resnet18-imagenet", *words[:3], f"downloads/{name}").images.image
    assert by_file == ImageSpec(256, 240, interpolation="bicubic")
    assert by_file == read("resnet18-imagenet", *words[:3], "IMAGENET1K_V1").images.image
    assert read("resnet18-imagenet", *words[:3], "mine.pth").images.image == ImageSpec()


def test_flags_win_over_torchvisions_and_the_log_says_so() -> None:
    words = ("resnet18-imagenet", "--arch", "efficientnet_b1", "--weights", "IMAGENET1K_V2")
    assert read(*words).images.image == ImageSpec(255, 240)
    run = read(*words, "--crop", "120", "--interpolation", "bicubic")
    assert run.images.image == ImageSpec(127, 120, interpolation="bicubic")
    said = pretrained_images.adopted(run)
    assert "images as torchvision has them for IMAGENET1K_V2 of efficientnet_b1: resize 255, crop 240" in said
    assert "here: resize 127, crop 120, interpolation bicubic" in said


@pytest.mark.parametrize("arch", ["googlenet", pytest.param("inception_v3", marks=pytest.mark.slow)])
def test_networks_that_shift_their_input_still_do(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same answers as torchvision's own builder gives with the same file, by its name and as a file."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(0)
    trained = torchvision.models.get_model(arch, weights=None, aux_logits=True, init_weights=False)
    entry = torchvision.models.get_model_weights(arch).IMAGENET1K_V1
    path = tmp_path / "hub" / "checkpoints" / Path(entry.url).name
    path.parent.mkdir(parents=True)
    torch.save(trained.state_dict(), path)
    want = torchvision.models.get_model(arch, weights="IMAGENET1K_V1").eval()
    images = torch.randn(2, 3, 96, 96)
    assert want.transform_input
    for weights in ("IMAGENET1K_V1", str(path)):
        assert torch.equal(load(arch, 1000, weights)(images), want(images))
    said = pretrained_images.adopted(read("resnet18-imagenet", "--arch", arch, "--weights", "IMAGENET1K_V1"))
    assert "the network itself shifts them" in said
    other = tmp_path / "mine.pth"
    path.rename(other)
    assert not load(arch, 1000, str(other)).transform_input
    said = pretrained_images.adopted(read("resnet18-imagenet", "--arch", arch, "--weights", str(other)))
    assert "transform_input off" in said


def test_transformers_for_larger_images_are_built_for_them() -> None:
    assert options_of("vit_b_16", "IMAGENET1K_SWAG_E2E_V1") == {"image_size": 384}
    assert options_of("vit_b_16", "IMAGENET1K_V1") == {} == options_of("resnet18", "mine.pth")
    with torch.device("meta"):
        model = build("vit_b_16", 1000, options_of("vit_b_16", "IMAGENET1K_SWAG_E2E_V1"))
    assert model.encoder.pos_embedding.shape == (1, (384 // 16) ** 2 + 1, 768)
