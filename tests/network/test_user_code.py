"""`--arch file.py:function` as people write it: the network, or one line that says what is wrong and where."""

import sys
from pathlib import Path

import pytest
from torch import nn

from dist_prune.network.errors import ModelError
from dist_prune.network.models import build
from dist_prune.network.user_code import sources

NET = "from torch import nn\ndef net(num_classes):\n    return nn.Linear(WIDTH, num_classes)\n"
PLAIN = NET.replace("WIDTH", "4")


def write(folder: Path, text: str, **beside: str) -> str:
    folder.mkdir(exist_ok=True)
    for name, content in beside.items():
        (folder / f"{name}.py").write_text(content)
    (folder / "mine.py").write_text(text)
    return f"{folder}/mine.py"


def width(arch: str) -> int:
    model = build(arch, 3)
    assert isinstance(model, nn.Linear) and model.out_features == 3
    return model.in_features


def test_dataclasses_with_postponed_annotations(tmp_path: Path) -> None:
    """dataclasses look their module up by its name."""
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    text += "@dataclass\nclass Config:\n    width: int = 5\n" + NET.replace("WIDTH", "Config().width")
    assert width(f"{write(tmp_path, text)}:net") == 5


@pytest.mark.parametrize("how", ["import blocks", "from .blocks import *\nfrom . import blocks"])
def test_modules_beside_the_file(tmp_path: Path, how: str) -> None:
    path = write(tmp_path, f"{how}\n{NET.replace('WIDTH', 'blocks.WIDTH')}", blocks="WIDTH = 6\n")
    before = list(sys.path)
    assert width(f"{path}:net") == 6
    assert sys.path == before


def test_a_module_that_is_imported_when_the_function_runs(tmp_path: Path) -> None:
    text = NET.replace("    return", "    import blocks\n    return").replace("WIDTH", "blocks.WIDTH")
    assert width(f"{write(tmp_path, text, blocks='WIDTH = 7')}:net") == 7


def test_two_files_with_modules_of_the_same_name(tmp_path: Path) -> None:
    text = "import blocks\n" + NET.replace("WIDTH", "blocks.WIDTH")
    one, two = (f"{write(tmp_path / str(w), text, blocks=f'WIDTH = {w}')}:net" for w in (8, 9))
    assert (width(one), width(two), width(one)) == (8, 9, 8)


def test_what_travels_is_the_file_and_all_it_imports_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "__init__.py").write_text("from parts.inner import X\n")
    (tmp_path / "parts" / "inner.py").write_text("X = 4\nimport json, torchvision.ops\n")
    text = "import blocks\n" + NET.replace("WIDTH", "blocks.X")
    path = write(tmp_path, text, blocks="from parts import X\n", unused="raise RuntimeError\n")
    assert width(f"{path}:net") == 4
    assert set(sources(f"{path}:net")) == {"mine.py", "blocks.py", "parts/__init__.py", "parts/inner.py"}
    assert next(iter(sources(f"{path}:net"))) == "mine.py"


def test_classes_and_networks_may_be_named_too(tmp_path: Path) -> None:
    text = f"{PLAIN}class Net(nn.Linear):\n    def __init__(self, num_classes):\n"
    text += "        super().__init__(5, num_classes)\nmade = net(3)\n"
    path = write(tmp_path, text)
    assert (width(f"{path}:Net"), width(f"{path}:made")) == (5, 4)


@pytest.mark.parametrize(
    ("text", "function", "words"),
    [
        ("\ndef net(:\n", "net", "mine.py line 2 is not Python: invalid syntax"),
        ("import broken\n", "net", "broken.py line 1 is not Python"),
        (f"{PLAIN}raise RuntimeError('boom\\nmore')\n", "net", r"RuntimeError: boom \(mine.py line 4\)"),
        ("import absent_module\n", "net", r"No module named 'absent_module' \(mine.py line 1\)"),
        ("from ..up import x\n", "net", "attempted relative import beyond top-level package"),
        ("def net(num_classes):\n    return 1 / 0\n", "net", r"ZeroDivisionError: .* \(mine.py line 2\)"),
        ("def net(num_classes):\n    pass\n", "net", "returned None: is a `return` missing; expected a network"),
        ("def net(num_classes):\n    return 5\n", "net", "returned int; expected a network"),
        (PLAIN.replace("num_classes", "n"), "net", r"called as net\(num_classes=N\), which it does not take"),
        (PLAIN.replace("(num_classes)", "(num_classes, w)"), "net", "missing a required argument: 'w'"),
        ("import sys\nsys.exit(3)\n", "net", "ends the program when it is imported"),
        (PLAIN, "huge", "has no function 'huge'; it has net"),
        (PLAIN, "", r"name the function, .*mine.py:FUNCTION; it has net"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, text: str, function: str, words: str) -> None:
    path = write(tmp_path, text, broken="x = = 1\n")
    with pytest.raises(ModelError, match=words) as refused:
        build(f"{path}:{function}" if function else path, 3)
    assert "\n" not in str(refused.value) and str(refused.value).startswith(f"--arch {path}")
