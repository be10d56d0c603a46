import json
from pathlib import Path

import pytest

from dist_prune.config.flags import ConfigError
from dist_prune.config.recipes import RECIPES, parse
from dist_prune.config.run import require_complete, to_dict


def test_no_words_mean_the_digits() -> None:
    run = parse([])
    assert (run.recipe, run.images.data, run.network.arch) == ("digits", "digits", "resnet18")
    require_complete(run)


def test_correction_is_on_by_default_from_as_many_images_as_the_recipes_networks_need() -> None:
    found = {name: (run.correction.correct, run.correction.calibrate_images) for name, run in RECIPES.items()}
    small, large = ("regression", 1024), ("regression", 10_000)
    assert found == {name: large if "imagenet" in name else small for name in RECIPES}


def test_the_dense_network_teaches_by_default_where_images_are_many() -> None:
    distillation_loss = {name for name, run in RECIPES.items() if run.tuning.distillation is not None}
    assert distillation_loss == {name for name in RECIPES if "imagenet" in name}


def test_flags_override_the_recipe() -> None:
    words = "cifar10 --data /images --weights w.pt --ranks uniform:0.3 --sites layer3.* --epochs 5 --seed 7"
    run = parse([*words.split(), "--run-dir", "/runs/a", "--no-flip", "--pretrain.epochs", "2"])
    assert run.images.data == "/images"
    assert (run.network.arch, run.network.weights) == ("resnet20", "w.pt")
    assert (run.compression.ranks, run.compression.sites) == ("uniform:0.3", "layer3.*")
    assert (run.tuning.epochs, run.pretrain.epochs, run.seed) == (5, 2, 7)
    assert run.run_dir == Path("/runs/a")
    assert not run.images.augment.flip


def test_an_unknown_recipe_gets_close_ones() -> None:
    with pytest.raises(ConfigError, match="unknown recipe 'resnet18-imagnet'; did you mean resnet18-imagenet"):
        parse(["resnet18-imagnet"])
    with pytest.raises(ConfigError, match="recipes: digits, mnist, cifar10"):
        parse(["xyzzy"])


def test_an_unknown_flag_ends_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--epoch", "3"])
    assert ended.value.code == 2
    assert "--epochs" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_shows_the_recipes_defaults(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse([recipe, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert RECIPES[recipe].network.arch in shown
    assert "--ranks" in shown


def test_all_ranks_but_the_first_keep_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--nonsense"], quiet=True)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--ranks uniform:1.5", "at most 1, got 1.5"),
        ("--crop 0", "--crop 0: expected pixels"),
        ("--resize 32 --crop 64", "--resize 32 is smaller than --crop 64"),
        ("--batch-size 0", "--batch-size 0: expected at least 1"),
        ("--lr 0", "--lr 0.0: expected above 0"),
        ("--momentum 1", "--momentum 1.0"),
        ("--epochs -1", "--epochs -1"),
        ("--warmup 1", "--warmup 1.0"),
        ("--label-smoothing 1", "--label-smoothing"),
        ("--threads 0", "--threads 0"),
        ("--classes 1", "--classes 1"),
        ("--pad -1", "--pad -1"),
        ("--area 0.5 0.2", "--area 0.5 0.2"),
        ("--resume", "--resume needs --run-dir"),
        ("--statistics-views", "--statistics-views: there are none; give --mirrored"),
        ("--mirrored --statistics-views --method weight-svd", "--statistics-views: --method weight-svd uses none"),
        ("--resume --overwrite --run-dir x", "exclude each other"),
    ],
)
def test_settings_that_cannot_be_name_their_flag(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        require_complete(parse(words.split()))


def test_what_only_the_user_knows_must_be_given() -> None:
    with pytest.raises(ConfigError, match="--data DIR is missing"):
        require_complete(parse(["cifar10"]))
    with pytest.raises(ConfigError, match="--weights none leaves nothing to compress"):
        require_complete(parse(["cifar10", "--data", "x"]))
    require_complete(parse(["cifar10", "--dry-run"]))


@pytest.mark.parametrize("recipe", RECIPES)
def test_settings_are_plain_json(recipe: str) -> None:
    content = to_dict(RECIPES[recipe])
    assert json.loads(json.dumps(content)) == content
    assert content["compression"]["ranks"] == RECIPES[recipe].compression.ranks


@pytest.mark.parametrize(
    ("flags", "repair"),
    [
        ((), 2.0),
        (("--repair", "0.5"), 0.5),
        (("--correct", "none"), 0.0),
        (("--correct", "refit"), 0.0),
        (("--step", "0.9"), 0.0),
        (("--method", "random-init"), 0.0),
    ],
)
def test_later_sites_count_as_repairing_only_where_they_are_solved_anew(
    flags: tuple[str, ...], repair: float
) -> None:
    assert parse(["cifar10", *flags]).repair == repair
