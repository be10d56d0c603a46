"""Recipes in TOML: written, read, overridden by flags, and refused with the file's name."""

import json
from pathlib import Path

import pytest

from dist_prune.cli.main import main
from dist_prune.config.flags import ConfigError
from dist_prune.config.recipe_files import from_dict, read_recipe, to_toml
from dist_prune.config.recipes import RECIPES, parse
from dist_prune.config.run import Run, to_dict
from dist_prune.config.settings import changed, settings


def written(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_was_written_is_read_as_it_was(recipe: str, tmp_path: Path) -> None:
    assert read_recipe(Path(written(tmp_path, to_toml(RECIPES[recipe]))), {}) == RECIPES[recipe]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_s_own_record_gives_its_settings_back(recipe: str) -> None:
    """As config.json has them; one of an earlier version leaves at their defaults what it did not know."""
    words = [recipe, "--metric-damping", "0.5", "--calibrate-data", "images", "--run-dir", "there", "--no-flip"]
    run = parse(words)
    record = json.loads(json.dumps(to_dict(run)))
    assert from_dict(record) == run
    del record["tuning"]["optimizer"], record["pretrain"]["compile"]
    assert from_dict(record) == run
    record["images"]["threads"] = "many"
    with pytest.raises(ConfigError, match="threads = 'many': expected a whole number"):
        from_dict(record)


def test_flags_override_the_file_as_they_override_a_recipe(tmp_path: Path) -> None:
    words = ["--ranks", "budget:macs=0.4", "--metric-damping", "0.5", "inf", "--pretrain.lr", "0.3"]
    words += ["--calibrate-data", "images", "--seed", "3", "--run-dir", "there", "--no-flip"]
    name = written(tmp_path, to_toml(parse(["cifar10", *words])))
    found, expected = parse([name, "--seed", "4"]), parse(["cifar10", *words, "--seed", "4"])
    assert found.run_dir is None and found.recipe == "mine"
    assert changed(found, {("run_dir",): Path("there"), ("recipe",): "cifar10"}) == expected


def test_a_file_may_build_on_a_recipe_and_say_only_what_differs(tmp_path: Path) -> None:
    name = written(tmp_path, 'recipe = "cifar10"\nsites = "layer3.*"\nridge = 1\n[pretrain]\nepochs = 3\n')
    assert parse([name]) == changed(
        parse(["cifar10", "--sites", "layer3.*", "--pretrain.epochs", "3", "--ridge", "1"]), {("recipe",): "mine"}
    )
    assert parse([written(tmp_path, "")]) == changed(Run(), {("recipe",): "mine"})


def test_settings_that_only_fit_together_can_be_given_together(tmp_path: Path) -> None:
    assert parse([written(tmp_path, "resize = 0\ncrop = 500\n")]).images.image.crop == 500


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("epoch = 3", "there is no epoch; did you mean epochs"),
        ("[pretrain]\nepocs = 3", "there is no pretrain.epocs; did you mean pretrain.epochs"),
        ('run-dir = "x"', "there is no run-dir"),
        ('recipe = "cifar"', "recipe = 'cifar': did you mean cifar10"),
        ('epochs = "3"', "epochs = '3': expected a whole number"),
        ("epochs = 3.0", "epochs = 3.0: expected a whole number"),
        ("epochs = true", "epochs = True: expected a whole number"),
        ("ridge = true", "ridge = True: expected a number"),
        ("flip = 1", "flip = 1: expected true or false"),
        ("ranks = 0.5", "ranks = 0.5: expected text"),
        ("class_list = 3", "class_list = 3: expected a path as text"),
        ('method = "pcb"', "method = 'pcb': expected one of pca, "),
        ("mean = [0.5]", r"mean = \[0.5\]: expected a list of 3 numbers"),
        ("mean = 0.5", "mean = 0.5: expected a list of 3 numbers"),
        ('std = ["a", 1, 1]', "expected a number"),
        ("metric-damping = 1.0", "expected a list of numbers"),
        ("crop = -1", "--crop -1: expected pixels"),
        ("epochs = ", "not TOML .*Invalid value"),
        ("[[pretrain]]\nepochs = 1", "there is no pretrain"),
    ],
)
def test_what_cannot_be_names_the_file_and_the_key(text: str, answer: str, tmp_path: Path) -> None:
    name = written(tmp_path, text)
    with pytest.raises(ConfigError, match=answer) as refused:
        parse([name])
    assert name in str(refused.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.toml: could not be read \(No such file"):
        parse([str(tmp_path / "absent.toml")])


def test_saving_stops_there_and_replaces_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "mine.toml"
    words = ["cifar10", "--epochs", "7", "--save-recipe", str(path)]
    assert main(words) == 0
    assert parse([str(path)]).tuning.epochs == 7
    before = path.read_text()
    assert main([*words, "--epochs", "8"]) == 1
    assert "is there already" in capsys.readouterr().err
    assert path.read_text() == before


def test_settings_know_their_flags_places_and_texts() -> None:
    lr = settings()["pretrain.lr"]
    assert lr.path == ("pretrain", "lr") and lr.kind is float and "global batch of 256" in lr.text
    assert lr.of(RECIPES["digits"]) == RECIPES["digits"].pretrain.lr
    assert settings()["distill"].path == ("tuning", "distill") and settings()["epochs"].path == (
        "tuning",
        "epochs",
    )
