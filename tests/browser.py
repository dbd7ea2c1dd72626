"""A headless Chromium, driven over its DevTools pipe: no package, no port."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

NAMES = ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser")


def need_browser():
    """Its path; skips where there is none."""
    found = [path for path in map(shutil.which, NAMES) if path]
    if not found:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on PATH")
    return found[0]


class Page:
    """One tab.

    `errors` has what a reader's console would show as an error, and exceptions of scripts;
    `requests` has the address of everything that the page asked for.
    """

    def __init__(self, browser, profile):
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        # DevTools are read at descriptor 3 and answer at 4; only a shell can put them there safely.
        script = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
        words = [browser, "--headless=new", "--remote-debugging-pipe", "--no-first-run"]
        words += ["--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
        words += ["--no-sandbox"] * (os.geteuid() == 0)  # its own sandbox refuses root
        self._process = subprocess.Popen(
            ["bash", "-c", script, *words, f"--user-data-dir={profile}"],
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._numbers, self._unread, self._session = itertools.count(1), b"", None
        self.errors, self.requests, self._loaded = [], [], 0
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self._ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._ask(f"{domain}.enable")

    def close(self):
        """Ends the browser."""
        try:
            self._session = None
            self._ask("Browser.close")
            self._process.wait(timeout=20)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._write)
            os.close(self._read)

    def _ask(self, method, **parameters):
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def _message(self):
        while b"\0" not in self._unread:
            more = os.read(self._read, 1 << 20)
            assert more, "the browser has gone"
            self._unread += more
        text, self._unread = self._unread.split(b"\0", 1)
        message = json.loads(text)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method, event):
        if method == "Runtime.exceptionThrown":
            self.errors.append(event["exceptionDetails"]["text"] + str(event))
        elif method == "Runtime.consoleAPICalled" and event["type"] in ("error", "warning"):
            self.errors.append(str(event["args"]))
        elif method == "Log.entryAdded" and event["entry"]["level"] in ("error", "warning"):
            self.errors.append(event["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(event["request"]["url"])
        elif method == "Page.loadEventFired":
            self._loaded += 1

    def open(self, path, *, width=1400, height=900, scheme="light"):
        """Loads a file in a window of that size, under a light or dark system."""
        self.scheme(scheme)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._ask("Emulation.setDeviceMetricsOverride", **size)
        self.errors.clear()
        self.requests.clear()
        before = self._loaded
        self._ask("Page.navigate", url=Path(path).resolve().as_uri())
        deadline = time.monotonic() + 240
        while self._loaded == before:
            assert time.monotonic() < deadline, "the page does not load"
            self._message()

    def scheme(self, name):
        """What the system prefers: `light` or `dark`."""
        features = [{"name": "prefers-color-scheme", "value": name}]
        self._ask("Emulation.setEmulatedMedia", features=features)

    def evaluate(self, expression):
        """The value of an expression, as JSON can hold it."""
        answer = self._ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def hover(self, selector):
        """Moves the mouse to the middle of an element."""
        x, y = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        self._ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key):
        """A key, to what has the focus."""
        for kind in ("keyDown", "keyUp"):
            self._ask("Input.dispatchKeyEvent", type=kind, key=key)

    def screenshot(self, path, *, whole=True):
        """A PNG of the page, or of the window."""
        picture = self._ask("Page.captureScreenshot", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(picture["data"]))
