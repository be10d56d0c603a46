"""Networks of timm get images as they were trained on them, unless flags say otherwise."""

import json
from pathlib import Path

import pytest

from dist_prune.config.flags import ConfigError
from dist_prune.config.recipes import given, parse
from dist_prune.config.run import ImageSpec, Run
from dist_prune.data import timm_images
from dist_prune.network.models import is_timms
from tests.runs import Bench

VIT = "vit_tiny_patch16_224"  # half of its data configuration is not ImageNet's usual one


def read(*words: str) -> Run:
    return timm_images.adapted(parse(words), given(words))


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
    assert not is_timms(arch) and timm_images.adopted(parse(["--arch", arch])) == ""
    assert read("digits", "--arch", arch).images == parse(["digits"]).images


def test_what_cannot_be_had_is_refused_or_told(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"input_size": (1, 28, 28), "interpolation": "lanczos", "crop_pct": 0.5, "crop_mode": "squash"}
    known |= {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    monkeypatch.setattr(timm_images, "_data_config", lambda arch: known)
    with pytest.raises(ConfigError, match="takes 1 × 28 × 28"):
        read("digits", "--arch", VIT)
    known["input_size"] = (3, 28, 28)
    run = read("digits", "--arch", VIT, "--crop", "20")
    assert run.images.image.interpolation == "bilinear"
    said = timm_images.adopted(run)
    assert "its own interpolation, lanczos, cannot be had" in said and "it cuts by 'squash'" in said
    assert "resize 56, crop 28" in said and "here: resize 40, crop 20" in said


def test_a_run_says_what_was_taken_and_keeps_it(bench: Bench, tmp_path: Path) -> None:
    arch = "test_resnet"  # timm's smallest, of 160 pixels
    words = bench.words(tmp_path / "run", arch=arch, weights="none", crop=None, sites="*conv2", epochs=None)
    bench.commands.succeed(*words, "--epochs", 0, "--pretrain.epochs", 1, "--pretrain.batch-size", 4, ranks=1)
    image = json.loads((tmp_path / "run" / "config.json").read_text())["run"]["images"]["image"]
    wanted = timm_images.spec_of(arch)
    assert (image["crop"], image["resize"], image["interpolation"]) == (160, wanted.resize, wanted.interpolation)
    assert f"images as timm has them for {arch}: resize {wanted.resize}, crop 160" in (
        tmp_path / "run" / "log.txt"
    ).read_text().replace("\n", " ")
