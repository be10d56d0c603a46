"""TensorBoard as its user sees it: a real one, on a real run, in a real browser."""

import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import Browser
from tests.commands import shared_commands

READY_S = 90.0
# All words on the page, those within components included.
WORDS = """(function words(node) {
  if (node.nodeType === Node.TEXT_NODE) return node.textContent;
  if (['STYLE', 'SCRIPT'].includes(node.nodeName)) return '';
  const within = [...(node.shadowRoot ? [node.shadowRoot] : []), ...node.childNodes];
  return within.map(words).join(' ');
})(document.body)"""
PICTURES = """(function all(node) {
  const within = [...(node.shadowRoot ? [node.shadowRoot] : []), ...node.childNodes];
  const own = node.nodeName === 'IMG' && node.naturalWidth > 100 ? 1 : 0;
  return within.map(all).reduce((a, b) => a + b, own);
})(document.body)"""


@pytest.fixture(scope="module")
def board(whole_run: Path) -> Iterator[str]:
    """The address of a TensorBoard that shows the run."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    words = [sys.executable, "-m", "tensorboard.main", "--logdir", str(whole_run.parent)]
    words += ["--host", "127.0.0.1", "--port", str(port)]
    environ = shared_commands().environ | {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environ) as process:
        try:
            wait_for(f"http://127.0.0.1:{port}/data/runs")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def wait_for(address: str) -> None:
    local = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + READY_S
    while True:
        try:
            if b"run" in local.open(address, timeout=5).read():
                return
        except OSError:
            pass
        assert time.monotonic() < deadline, f"{address} does not answer"
        time.sleep(0.2)


def shown(browser: Browser, address: str, *expected: str) -> str:
    """The words of a page, once the expected ones are among them."""
    browser.open("about:blank")
    browser.open(address)
    deadline, text = time.monotonic() + READY_S, ""
    while any(word not in text for word in expected):
        assert time.monotonic() < deadline, f"{[w for w in expected if w not in text]} not in {text[-2000:]}"
        time.sleep(0.2)
        text = re.sub(r"\s+", " ", browser.ask(WORDS))
    return text


def test_custom_scalars_open_on_what_matters(browser: Browser, board: str) -> None:
    charts = [
        "the network at each stage",
        "top-1, %: dense, projected, corrected, distilled, tuned",
        "KL to the dense network, nats per image",
        "training",
        "images per second",
        "learning rate",
        "correction",
        "held-out KL after each layer",
    ]
    text = shown(browser, f"{board}/#custom_scalars", *charts)
    assert sorted(charts, key=text.index) == charts
    assert "rounds" not in text, "a chart of what there is not"
    asked = browser.requests()
    assert asked and all(address.startswith((board, "data:", "blob:")) for address in asked), (
        "works without a network"
    )


def test_scalars_have_every_group(browser: Browser, board: str) -> None:
    shown(browser, f"{board}/#scalars", "calibration", "distill", "final", "layer", "top1", "train", "val")


def test_images_show_spectra_and_predictions(browser: Browser, board: str) -> None:
    shown(browser, f"{board}/#images", "layer/3/spectrum", "layer/9/spectrum", "layers/predicted and measured")
    deadline = time.monotonic() + READY_S
    while browser.ask(PICTURES) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_text_shows_the_plan(browser: Browser, board: str) -> None:
    message = shown(browser, f"{board}/#text", "plan/text_summary", "16×16·3×3", "weights")
    assert "| 16" not in message, "a table, not its source"


def test_settings_and_final_figures_are_compared(browser: Browser, board: str) -> None:
    shown(browser, f"{board}/#hparams", "distill-steps", "regression", "final/top1", "run/tensorboard")
