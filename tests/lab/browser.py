"""A browser without a window, driven over WebDriver (W3C) as a user would drive it: clicks, keys, looking."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

PATIENCE: Final = 30.0  # seconds for an answer
KEYS: Final = {"Enter": "\ue007", "ArrowDown": "\ue015"}  # a character is its own key
_ELEMENT: Final = "element-6066-11e4-a52e-4f735466cecf"  # what WebDriver calls a reference to an element
# As root Chromium has no sandbox; and nothing of it is to leave this machine.
_FLAGS: Final = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
    --disable-background-networking --disable-component-update --disable-extensions --window-size=1400,2400"""


@dataclass(frozen=True)
class Browser:
    """One session."""

    url: str

    def open(self, page: str) -> None:
        """Go to an address, and wait until its page is there: the driver may answer while the last one still is."""
        ask(f"{self.url}/url", {"url": page})
        deadline = time.monotonic() + PATIENCE
        while not self.evaluate(f"document.readyState == 'complete' && location.href == {json.dumps(page)}"):
            assert time.monotonic() < deadline, f"{page} is not loaded"
            time.sleep(0.05)

    def click(self, selector: str) -> None:
        ask(f"{self.url}/element/{self._find(selector)}/click", {})

    def press(self, key: str) -> None:
        """Press a key on what has the focus."""
        strokes = [{"type": kind, "value": KEYS.get(key, key)} for kind in ("keyDown", "keyUp")]
        ask(f"{self.url}/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": strokes}]})

    def look(self, width: int, *, is_dark: bool, medium: str = "screen") -> None:
        """A window as wide, or a sheet of paper, as tall as the page is; and whether its user likes it dark."""
        self._command(
            "Emulation.setEmulatedMedia",
            {"media": medium, "features": [{"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}]},
        )
        window = {"width": width, "deviceScaleFactor": 1, "mobile": False}
        self._command("Emulation.setDeviceMetricsOverride", {**window, "height": 1000})
        height = self.evaluate("document.documentElement.scrollHeight")
        self._command("Emulation.setDeviceMetricsOverride", {**window, "height": height})

    def evaluate(self, expression: str) -> Any:
        """The value of some JavaScript."""
        return ask(f"{self.url}/execute/sync", {"script": f"return {expression}", "args": []})

    def complaints(self) -> list[str]:
        """What the browser's console tells, errors and refusals among it."""
        told = [entry["message"] for entry in ask(f"{self.url}/se/log", {"type": "browser"})]
        return [message for message in told if not message.startswith("chrome://")]  # about the browser's own pages

    def picture(self) -> bytes:
        """What is to be seen, as PNG."""
        return base64.b64decode(ask(f"{self.url}/screenshot"))

    def _command(self, name: str, parameters: dict[str, Any]) -> None:
        """What WebDriver has no word for, in Chromium's own."""
        ask(f"{self.url}/goog/cdp/execute", {"cmd": name, "params": parameters})

    def _find(self, selector: str) -> str:
        found: str = ask(f"{self.url}/element", {"using": "css selector", "value": selector})[_ELEMENT]
        return found


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with a profile of its own; the test is skipped where there is none."""
    found = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    # A snap may not see the profile, nor the report: /tmp is another one for it.
    if missing := [name for name, path in found.items() if path is None or path.startswith("/snap/")]:
        pytest.skip(f"missing {', '.join(missing)} (other than a snap): no browser to look at a report with")
    options = {"binary": shutil.which("chromium"), "args": [*_FLAGS.split(), f"--user-data-dir={profile}"]}
    wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
    with subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True) as driver:
        try:
            assert driver.stdout is not None
            port = next(match[1] for line in driver.stdout if (match := re.search(r"successfully on port (\d+)", line)))
            sessions = f"http://127.0.0.1:{port}/session"
            session = f"{sessions}/{ask(sessions, {'capabilities': {'alwaysMatch': wanted}})['sessionId']}"
            try:
                yield Browser(session)
            finally:
                ask(session, method="DELETE")
        finally:
            driver.terminate()


def ask(url: str, body: object = None, method: str | None = None) -> Any:
    """One WebDriver command."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=PATIENCE) as answer:
        return json.load(answer)["value"]
