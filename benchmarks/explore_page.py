"""How large a page of `explore` is, and how it moves in a browser.

    python benchmarks/explore_page.py --clips 1000 10000 50000

Random clips in 20 clusters, without sound and pictures, in headless Chromium (Debian's chromium
and chromium-driver, `pip install selenium`) with WebGL in software: a graphics card is faster.
Frames are counted over three seconds of dragging the view.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from speechbrain_jepa.embedded import read_embedded
from speechbrain_jepa.explore.build import explore

FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --use-gl=angle --use-angle=swiftshader "
    "--enable-unsafe-swiftshader --window-size=1300,800"
)
DRAG = """
const done = arguments[0], map = document.getElementById("map");
const range = map._fullLayout.xaxis.range;
const width = range[1] - range[0], times = [];
const step = async () => {
  const now = performance.now();
  times.push(now);
  if (now - times[0] > 3000) { done(times.length / (now - times[0]) * 1000); return; }
  const moved = 0.1 * width * Math.sin(times.length / 10);
  await Plotly.relayout(map, {"xaxis.range": [range[0] + moved, range[1] + moved]});
  requestAnimationFrame(step);
};
step();
"""


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
        browser.set_script_timeout(120)
        print("| clips | MB | built in s | open in s | frames/s |\n| --- | --- | --- | --- | --- |")
        for clips in args.clips:
            with tempfile.TemporaryDirectory() as folder:
                page, seconds = make_page(Path(folder), clips)
                began = time.perf_counter()
                browser.get(page.as_uri())
                while not browser.execute_script("return document.body.dataset.ready"):
                    time.sleep(0.02)
                opened = time.perf_counter() - began
                frames = browser.execute_async_script(DRAG)
                size = page.stat().st_size / 1e6
            print(f"| {clips:,} | {size:.1f} | {seconds:.1f} | {opened:.1f} | {frames:.0f} |")
        browser.quit()


if __name__ == "__main__":
    main()
