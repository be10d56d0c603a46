"""A real browser without a window, at any width and in light or dark; chromium and its driver from Debian."""

import base64
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)


def require_browser() -> tuple[str, str]:
    """Where both programs are; without them a test is skipped, or fails under REQUIRE_BROWSER=1."""
    found = shutil.which("chromium"), shutil.which("chromedriver")
    if found[0] and found[1]:
        return found[0], found[1]
    text = "no chromium and chromedriver here: apt-get install chromium chromium-driver"
    if os.environ.get("REQUIRE_BROWSER"):
        pytest.fail(text)
    pytest.skip(text)


class Browser:
    """Opens pages; knows what they asked the network for, and of what they complained."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def open(self, address: str, width: int = 1600, height: int = 1000, dark: bool = False) -> None:
        for log in ("browser", "performance"):
            self.driver.get_log(log)  # what earlier pages left is not this one's
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        self.driver.get(address)

    def ask(self, script: str) -> Any:
        return self.driver.execute_script(f"return {script}")

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses that this page asked for, its own included."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        page = self.driver.current_url.partition("#")[0]
        return [a["request"]["url"] for a in asked if a["documentURL"].partition("#")[0] == page]

    def picture(self, path: Path, whole: bool = False) -> None:
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": whole})
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def browsing() -> Iterator[Browser]:
    program, driver = require_browser()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        options = ChromeOptions()
        options.binary_location = program
        for flag in (*FLAGS, f"--user-data-dir={home}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        chrome = Chrome(options, ChromeService(driver))
        try:
            yield Browser(chrome)
        finally:
            chrome.quit()
