"""A headless Chromium, driven over the W3C WebDriver protocol; enough of it to look at a page."""

import base64
import json
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
import requests

CHROMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]


def programs() -> tuple[str, str]:
    """Paths of a Chrome and its chromedriver; the test is skipped where there is none."""
    chrome = next((path for name in CHROMES if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if chrome is None or driver is None:
        pytest.skip("no Chromium with chromedriver here (Debian: apt-get install chromium chromium-driver)")
    return chrome, driver


MEASURE = """
const page = document.documentElement;
const seen = e => e.getBoundingClientRect().width > 0 && e.getBoundingClientRect().height > 0;
return {
  wide: page.scrollWidth - window.innerWidth,
  sections: [...document.querySelectorAll("section")].filter(seen).length,
  charts: [...document.querySelectorAll("figure > svg")].map(e => e.getBoundingClientRect().width),
  smallest: Math.min(...[...document.querySelectorAll("figure > svg text")].map(
    e => parseFloat(getComputedStyle(e).fontSize) * e.ownerSVGElement.getBoundingClientRect().width / 400), 99),
  outside: [...document.querySelectorAll("figure > svg text")].filter(e => {
    const a = e.getBoundingClientRect(), b = e.closest("figure").getBoundingClientRect();
    return a.left < b.left - 1 || a.right > b.right + 1; }).map(e => e.textContent),
  spilt: [...document.querySelectorAll("td, th")].filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0)
    .map(e => e.textContent),
  ground: getComputedStyle(document.body).backgroundColor,
};
"""


class Browser:
    """One window. Use as a context manager: the browser ends with it."""

    def __init__(self, profile: Path) -> None:
        chrome, driver = programs()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._base = f"http://127.0.0.1:{port}"
        self._http = requests.Session()
        self._http.trust_env = False  # a proxy has nothing to do with this
        self._driver = subprocess.Popen(
            [driver, f"--port={port}"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            self._wait()
            options = {"binary": chrome, "args": [*FLAGS, f"--user-data-dir={profile}"]}
            capabilities = {
                "browserName": "chrome",
                "goog:chromeOptions": options,
                "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
            }
            made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
            self._session = f"/session/{made['sessionId']}"
        except BaseException:
            self._driver.kill()
            self._driver.wait()
            raise

    def _wait(self) -> None:
        for _ in range(200):
            try:
                if self._call("GET", "/status")["ready"]:
                    return
            except requests.ConnectionError:
                time.sleep(0.05)
        raise TimeoutError("chromedriver does not answer")

    def _call(self, method: str, path: str, body: dict | None = None):
        answer = self._http.request(method, self._base + path, json=body, timeout=60)
        value = answer.json()["value"]
        assert answer.ok, value
        return value

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_) -> None:
        try:
            self._call("DELETE", self._session)
        finally:
            self._driver.terminate()
            self._driver.wait(10)
            self._http.close()

    def cdp(self, command: str, **parameters):
        """A command of the Chrome DevTools Protocol."""
        return self._call(
            "POST", f"{self._session}/goog/cdp/execute", {"cmd": command, "params": parameters}
        )  # fmt: skip

    def open(self, file: Path, width: int = 1280, dark: bool = False) -> None:
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.cdp("Emulation.setEmulatedMedia", features=[scheme])
        self.logs("performance")
        self.logs("browser")
        self._call("POST", f"{self._session}/url", {"url": file.as_uri()})

    def run(self, script: str):
        """What a script's `return` gives."""
        return self._call("POST", f"{self._session}/execute/sync", {"script": script, "args": []})

    def logs(self, kind: str) -> list[dict]:
        """What has been logged since the last call: browser (the console) or performance (events of DevTools)."""
        return self._call("POST", f"{self._session}/se/log", {"type": kind})

    def requests(self) -> list[str]:
        """Addresses that were asked for since the page was opened."""
        events = [json.loads(entry["message"])["message"] for entry in self.logs("performance")]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def screenshot(self, path: Path) -> None:
        """The whole page."""
        shot = self.cdp("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


def look(browser: Browser, html: str, file: Path, width: int, name: str) -> dict:
    """What a page of `html` looks like; asserted is what holds for every report."""
    file.write_text(html, encoding="utf-8")
    browser.open(file, width)
    found = browser.run(MEASURE)
    assert browser.logs("browser") == [], name  # no error, no warning of the console
    assert browser.requests() == [file.as_uri()], name
    assert found["wide"] <= 0, name  # the page itself never scrolls sideways
    assert all(width / 3 < w <= width for w in found["charts"]), name
    assert found["smallest"] >= 8.5, name
    assert found["outside"] == [], name
    assert found["spilt"] == [], name  # no cell's words run into the next
    return found
