"""A page in headless Chromium over its DevTools pipe, with the standard library alone."""
import base64
import contextlib
import fcntl
import json
import os
import select
import subprocess
import time
from time import sleep as pause  # not a test's time.sleep

FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
           --disable-component-update --disable-sync --remote-debugging-pipe""".split()


class Page:
    """browser: path of Chromium; folder: an empty one for its profile. `problems` collects errors and requests of the page."""

    def __init__(self, browser, folder, width=1280, height=900):
        low = (*os.pipe(), *os.pipe())
        theirs_in, self.out, self.into, theirs_out = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 50) for fd in low)  # above 3 and 4
        for fd in low:
            os.close(fd)
        self.process = subprocess.Popen([browser, *FLAGS, f"--user-data-dir={folder}", f"--window-size={width},{height}", "about:blank"],
                                        preexec_fn=lambda: (os.dup2(theirs_in, 3), os.dup2(theirs_out, 4)), pass_fds=(3, 4),
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs_in)
        os.close(theirs_out)
        self.rest, self.number, self.session, self.problems = b"", 0, None, []
        deadline = time.time() + 30
        while not (pages := [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]):
            assert time.time() < deadline, "Chromium opened no page"
            time.sleep(0.1)
        self.session = self.call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def message(self):
        while b"\0" not in self.rest:
            assert select.select([self.into], [], [], 60)[0], "Chromium is silent"
            new = os.read(self.into, 1 << 20)
            assert new, "Chromium ended"
            self.rest += new
        line, self.rest = self.rest.split(b"\0", 1)
        return json.loads(line)

    def call(self, method, **params):
        self.number += 1
        call = {"id": self.number, "method": method, "params": params} | ({"sessionId": self.session} if self.session else {})
        message = memoryview(json.dumps(call).encode() + b"\0")
        while message:
            message = message[os.write(self.out, message) :]
        while (answer := self.message()).get("id") != self.number:
            name, event = answer.get("method"), answer.get("params", {})
            if name in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Page.javascriptDialogOpening"):
                self.problems.append(event)
            elif name == "Network.requestWillBeSent" and not event["request"]["url"].startswith(("file:", "data:")):
                self.problems.append(event["request"]["url"])
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path):
        self.call("Page.navigate", url=f"file://{path}")
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def reload(self):
        self.js("document.documentElement.dataset.old = 'yes'")
        self.call("Page.reload")
        self.wait("document.readyState === 'complete' && !document.documentElement.dataset.old")

    def wait(self, expression):
        """Until it is true of the page, which may be between two loads and then knows nothing."""
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(AssertionError):
                if self.js(f"Boolean({expression})"):
                    return
            assert time.monotonic() < deadline, f"never: {expression}"
            pause(0.05)

    def js(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def point_at(self, selector):
        """Move the mouse to the middle of an element."""
        x, y = self.js(f"""(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: "center"}});
                           const b = e.getClientRects()[0]; return [b.x + b.width / 2, b.y + b.height / 2]; }})()""")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def picture(self, path, width, height, dark=False, whole=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self):
        self.call("Browser.close")
        self.process.wait(30)
        os.close(self.out)
        os.close(self.into)
