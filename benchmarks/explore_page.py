"""How large a page of `explore` is, and how it moves in a browser.

    python benchmarks/explore_page.py --clips 1000 10000 50000

Random clips in 20 clusters, without sound and pictures, in headless Chromium (Debian's chromium
and chromium-driver, `pip install selenium`, which brings websocket-client) with WebGL in software:
a graphics card is faster. The mouse drags the map for five seconds, with 60 events a second; a
frame is one in which the map has moved. The page's CPU time is that of plotly and of our script,
the other is the rasteriser's.
"""

import argparse
import json
import math
import shutil
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import websocket
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from speechbrain_jepa.embedded import read_embedded
from speechbrain_jepa.explore.build import explore

FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --use-gl=angle --use-angle=swiftshader "
    "--enable-unsafe-swiftshader --window-size=1300,800"
)
COUNT = """
const map = document.getElementById("map");
window.frames_ = {moved: 0, began: performance.now()};
let last = String(map._fullLayout.xaxis.range);
const frame = () => {
  const range = String(map._fullLayout.xaxis.range);
  if (range !== last) frames_.moved++;
  last = range;
  requestAnimationFrame(frame);
};
requestAnimationFrame(frame);
"""
COUNTED = "return [frames_.moved, (performance.now() - frames_.began) / 1000]"
CENTRE = """
const box = document.getElementById("map").getBoundingClientRect();
return [box.left + box.width / 2, box.top + box.height / 2];
"""
DRAG_SECONDS = 5
EVENTS = 60  # of the mouse, a second


class DevTools:
    """A connection to Chromium which, like a mouse, need not wait for an answer."""

    def __init__(self, address: str):
        self.socket = websocket.create_connection(address, suppress_origin=True)
        self.sent = 0

    def send(self, method: str, **parameters) -> None:
        self.sent += 1
        command = {"id": self.sent, "method": method, "params": parameters}
        self.socket.send(json.dumps(command))

    def ask(self, method: str, **parameters) -> dict:
        self.send(method, **parameters)
        while (answer := json.loads(self.socket.recv())).get("id") != self.sent:
            pass
        return answer["result"]


def drag(browser) -> tuple[float, float, float]:
    """Frames a second, and CPU milliseconds a frame in the page and in the process that draws."""
    address = browser.capabilities["goog:chromeOptions"]["debuggerAddress"]
    with urllib.request.urlopen(f"http://{address}/json/version") as answer:
        chromium = DevTools(json.load(answer)["webSocketDebuggerUrl"])
    with urllib.request.urlopen(f"http://{address}/json") as answer:
        pages = [target for target in json.load(answer) if target["type"] == "page"]
    page = DevTools(pages[0]["webSocketDebuggerUrl"])

    def used(kind: str) -> float:
        processes = chromium.ask("SystemInfo.getProcessInfo")["processInfo"]
        return sum(process["cpuTime"] for process in processes if process["type"] == kind)

    x, y = browser.execute_script(CENTRE)
    mouse = {"button": "left", "buttons": 1, "clickCount": 1}
    page.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    page.ask("Input.dispatchMouseEvent", type="mousePressed", x=x, y=y, **mouse)
    before = used("renderer"), used("GPU")
    browser.execute_script(COUNT)
    began = time.perf_counter()
    for event in range(DRAG_SECONDS * EVENTS):
        place = {"x": x + 100 * math.sin(event / 15), "y": y + 60 * math.sin(event / 20)}
        page.send("Input.dispatchMouseEvent", type="mouseMoved", **place, **mouse)
        time.sleep(max(0, began + event / EVENTS - time.perf_counter()))
    frames, seconds = browser.execute_script(COUNTED)
    after = used("renderer"), used("GPU")
    page.ask("Input.dispatchMouseEvent", type="mouseReleased", x=x, y=y, **mouse)
    return frames / seconds, *(1000 * (b - a) / frames for a, b in zip(before, after))


def make_page(folder: Path, clips: int) -> tuple[Path, float]:
    """A page of so many clips, and the seconds it took."""
    random = np.random.default_rng(0)
    cluster = random.integers(20, size=clips)
    vectors = random.normal(size=(20, 64))[cluster] + 0.4 * random.normal(size=(clips, 64))
    files = [f"{folder}/cluster_{c:02d}/clip_{number:06d}.wav" for number, c in enumerate(cluster)]
    np.savez(folder / "emb.npz", files=np.array(files), embeddings=vectors.astype(np.float32))
    began = time.perf_counter()
    out = folder / "page.html"
    explore(read_embedded(folder / "emb.npz"), out, maps=["pca"], pictures=False, audio="none")
    return out, time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clips", type=int, nargs="+", default=[1_000, 10_000, 50_000])
    args = parser.parse_args()
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        parser.error("no chromium and chromedriver here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    with tempfile.TemporaryDirectory() as profile:
        for flag in [*FLAGS.split(), f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        browser = webdriver.Chrome(options=options, service=Service(driver))
        browser.set_page_load_timeout(600)
        print("| clips | MB | built in s | open in s | frames/s | CPU ms/frame: page | drawing |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for clips in args.clips:
            with tempfile.TemporaryDirectory() as folder:
                page, seconds = make_page(Path(folder), clips)
                began = time.perf_counter()
                browser.get(page.as_uri())
                while not browser.execute_script("return document.body.dataset.ready"):
                    time.sleep(0.02)
                opened = time.perf_counter() - began
                frames, script, drawing = drag(browser)
                size = page.stat().st_size / 1e6
            print(
                f"| {clips:,} | {size:.1f} | {seconds:.1f} | {opened:.1f} | {frames:.0f} "
                f"| {script:.0f} | {drawing:.0f} |"
            )
        browser.quit()


if __name__ == "__main__":
    main()
