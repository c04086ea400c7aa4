"""A headless Chromium, driven by its DevTools protocol, for tests of what a person sees.

`https://chromedevtools.github.io/devtools-protocol/`. Tornado, which comes with Jupyter's packages
in the extra `test`, holds the connection.
"""

import asyncio
import base64
import functools
import http.server
import json
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tornado import httpclient, websocket

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 60.0  # A page that takes longer hangs.


def find_chromium() -> str | None:
    """Return the path of a Chromium; None if there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Tab:
    """A page of the browser."""

    def __init__(self, loop: asyncio.AbstractEventLoop, connection: Any):
        self._loop, self._connection, self._number = loop, connection, 0
        self.problems: list[str] = []
        for domain in ("Page", "Runtime", "DOM", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command of the protocol; return its result."""
        return self._loop.run_until_complete(self._call(method, params))

    async def _call(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        request = {"id": self._number, "method": method, "params": params}
        await self._connection.write_message(json.dumps(request))
        while True:
            text = await asyncio.wait_for(self._connection.read_message(), SECONDS)
            if text is None:
                raise ConnectionError(f"Chromium has ended during {method}.")
            answer = json.loads(text)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        """Keep uncaught errors of the page."""
        if event.get("method") == "Runtime.exceptionThrown":
            details = event["params"]["exceptionDetails"]
            self.problems.append(details.get("exception", details).get("description", str(details)))

    def open(self, url: str, *, width: int = 1280, height: int = 900) -> None:
        """Load a page in a window of this size, in CSS pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, or of its promise."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + SECONDS
        while not self.evaluate(expression):
            if time.monotonic() > end:
                raise TimeoutError(f"{expression} stays false; the page says {self.problems}.")
            time.sleep(0.02)

    def choose_files(self, selector: str, paths: Sequence[Path]) -> None:
        """Choose files in a file input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in paths])

    def screenshot(self) -> bytes:
        """Return the whole page as PNG."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(found["data"])


@contextmanager
def chromium() -> Iterator[Tab]:
    """Start a headless Chromium with one page, and end it."""
    program = find_chromium()
    if program is None:
        raise FileNotFoundError("there is no Chromium on this machine.")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0")
        more = ("--no-first-run", "--disable-background-networking", "--disable-dev-shm-usage")
        fake = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
        command = [program, *options, *more, *fake, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        loop = asyncio.new_event_loop()
        try:
            connection = loop.run_until_complete(_connect(_port(Path(profile), process)))
            yield Tab(loop, connection)
        finally:
            process.terminate()
            process.wait(SECONDS)
            loop.close()


def _port(profile: Path, process: subprocess.Popen) -> int:
    file, end = profile / "DevToolsActivePort", time.monotonic() + SECONDS
    while not file.is_file() or not file.read_text().strip():
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError("Chromium does not start.")
        time.sleep(0.05)
    return int(file.read_text().split()[0])


async def _connect(port: int) -> Any:
    client = httpclient.AsyncHTTPClient()
    answer = await client.fetch(f"http://127.0.0.1:{port}/json/list")
    (page,) = (each for each in json.loads(answer.body) if each["type"] == "page")
    return await websocket.websocket_connect(
        page["webSocketDebuggerUrl"], max_message_size=2**28, ping_interval=0
    )


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on this machine; give its address."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
