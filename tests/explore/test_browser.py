"""The page as people have it: in Chromium, from the disk, with real clicks."""

import io
import shutil

import numpy as np
import pytest
from pages_seen import CLIPS, HOSTILE, errors, make_collection, wait
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains

from speechbrain_jepa.data.clips import read_audio
from speechbrain_jepa.embedded import read_embedded
from speechbrain_jepa.explore.build import explore
from speechbrain_jepa.explore.sounds import mel_picture
from speechbrain_jepa.features import LogMelSpectrogram

# where a clip is on the screen, the trace that holds it, and its colour
PLACE = """
const map = document.getElementById("map"), layout = map._fullLayout;
const box = map.getBoundingClientRect();
const text = atob(document.getElementById("map-pca").textContent);
const places = new Float32Array(Uint8Array.from(text, (c) => c.charCodeAt(0)).buffer);
const x = places[2 * arguments[0]], y = places[2 * arguments[0] + 1];
return [Math.round(box.left + layout.xaxis._offset + layout.xaxis.l2p(x)),
  Math.round(box.top + layout.yaxis._offset + layout.yaxis.l2p(y))];
"""
PLAYER = """
const player = document.getElementById("player");
return {source: player.src, time: player.currentTime, paused: player.paused, ended: player.ended,
  problem: document.getElementById("problem").textContent};
"""


@pytest.fixture(scope="module")
def page(browser, collection):
    """The page of the collection, coloured by a csv, open in the browser."""
    folder, files, _ = collection
    lines = [
        f"{name},{'high' if n >= CLIPS // 2 else 'low'}"
        for n, name in enumerate(files)
        if n >= len(HOSTILE)
    ]
    table = folder / "meta.csv"
    table.write_text("\n".join(["file,pitch", *lines]), encoding="utf-8")
    out = folder / "page.html"
    explore(read_embedded(folder / "emb.npz"), out, maps=["pca", "tsne"], k=5, tables=[table])
    load(browser, out)
    return browser


def load(browser, path):
    browser.get_log("browser")
    browser.get(path.as_uri())
    wait(browser, "return document.body.dataset.ready")


def text(browser, identity):
    return browser.execute_script(f"return document.getElementById('{identity}').textContent")


def listed(browser, identity):
    """Clips and cosines of a list."""
    rows = browser.execute_script(
        f"return [...document.querySelectorAll('#{identity} .row[data-clip]')].map("
        "(row) => [Number(row.dataset.clip), row.querySelector('.number').textContent])"
    )
    return [clip for clip, _ in rows], [cosine for _, cosine in rows]


def point_at(browser, clip):
    """The mouse beside the map, then on a clip."""
    x, y = browser.execute_script(PLACE, clip)
    actions = ActionChains(browser)
    actions.w3c_actions.pointer_action.move_to_location(x, y)
    return actions


def click(browser, clip):
    point_at(browser, clip).perform()
    wait(browser, "return !document.getElementById('tip').hidden")
    point_at(browser, clip).click().perform()


def test_the_page_loads_without_an_error_and_without_the_network(page):
    assert errors(page) == []
    resources = page.execute_script(
        "return performance.getEntriesByType('resource').map((r) => r.name)"
    )
    assert not [name for name in resources if not name.startswith(("data:", "blob:"))]
    assert text(page, "count") == f"{CLIPS} clips"


def test_webgl_draws_no_more_pixels_than_the_screen_has(page):
    """Plotly's own canvases have four times as many, each sampled four times over."""
    drawn, shown, smoothed = page.execute_script(
        "const c = document.querySelector('.gl-canvas-context'), gl = c.getContext('webgl');"
        "return [c.width, c.clientWidth * devicePixelRatio, gl.getContextAttributes().antialias]"
    )
    assert abs(drawn - shown) <= 1 and smoothed is False


def test_points_are_painted_in_the_colours_of_the_legend(page):
    legend = page.execute_script(
        "return [...document.querySelectorAll('#legend button')].map((b) => "
        "[b.textContent, getComputedStyle(b.querySelector('.dot')).backgroundColor])"
    )
    colours = {label.rstrip("0123456789"): colour for label, colour in legend}
    assert set(colours) == {"high", "low", "no value"}
    screen = np.asarray(Image.open(io.BytesIO(page.get_screenshot_as_png())).convert("RGB"), float)
    for clip, label in ((CLIPS - 1, "high"), (len(HOSTILE), "low"), (0, "no value")):
        x, y = page.execute_script(PLACE, clip)
        colour = np.array([int(part) for part in colours[label][4:-1].split(",")])
        around = screen[y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3)
        # points are drawn at an opacity of 0.8 on white
        assert np.abs(around - (0.8 * colour + 0.2 * 255)).max(1).min() < 12, label


def test_pointing_at_a_clip_shows_its_name_and_its_picture(page, collection):
    _, files, _ = collection
    clip = CLIPS - 2
    point_at(page, clip).perform()
    wait(
        page,
        "return document.querySelector('#tip .name').textContent.includes(arguments[0])",
        f"clip_{clip - len(HOSTILE):02d}",
    )
    shades = wait(
        page,
        "const c = document.querySelector('#tip canvas'), context = c.getContext('2d');"
        "const d = context.getImageData(0, 0, c.width, c.height).data;"
        "return d[3] && [c.width, c.height, ...d.filter((_, i) => i % 4 === 0)]",
    )
    width, height, *red = shades
    rows = np.reshape(red, (height, width)).mean(1)
    expected = mel_picture(read_audio(files[clip]), LogMelSpectrogram()).mean(1)
    assert abs(int(rows.argmax()) - int(expected.argmax())) <= 1


def test_a_click_plays_and_lists_the_neighbours_that_numpy_finds(page, collection):
    _, files, vectors = collection
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for clip in (1, CLIPS - 1):
        click(page, clip)
        wait(
            page,
            "return document.getElementById('name').textContent === arguments[0]",
            name_of(files[clip], files),
        )
        state = wait(page, f"const state = (() => {{{PLAYER}}})(); return state.time > 0 && state")
        assert state["problem"] == ""
        cosine = unit @ unit[clip]
        cosine[clip] = -1
        order = np.argsort(-cosine)[:5]
        clips, printed = listed(page, "neighbours")
        assert clips == order.tolist()
        assert printed == [f"{value:.4f}" for value in cosine[order]]
    assert errors(page) == []


def name_of(file, files):
    """As the page shows it: below what all have in common, with what is no Unicode spelt out."""
    import os

    name = os.path.relpath(file, os.path.commonpath([os.path.dirname(f) for f in files]))
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def test_a_neighbour_that_is_clicked_plays_in_its_turn(page):
    page.find_element("css selector", "#neighbours .row").click()
    clip = int(
        page.execute_script(
            "return document.querySelector('.row[aria-current=true]')?.dataset.clip ?? -1"
        )
    )
    state = wait(
        page,
        f"const state = (() => {{{PLAYER}}})(); return (state.time > 0 || state.problem) && state",
    )
    assert state["problem"] == ""
    assert clip == -1 or clip in listed(page, "neighbours")[0]


@pytest.mark.parametrize("clip", range(len(HOSTILE)))
def test_a_hostile_name_is_text_and_plays(clip, page, collection):
    _, files, _ = collection
    page.execute_script("document.getElementById('search').value = ''")
    click(page, clip)
    shown = wait(page, "return document.getElementById('name').textContent")
    assert shown == name_of(files[clip], files)
    state = wait(
        page,
        f"const state = (() => {{{PLAYER}}})(); return (state.time > 0 || state.problem) && state",
    )
    assert state["problem"] == "" and state["source"].startswith("file://")
    assert page.execute_script(
        "return window.hacked === undefined && !document.querySelector('img[src=x]')"
    )
    assert errors(page) == []


def test_search_finds_names_and_marks_them(page):
    box = page.find_element("id", "search")
    box.clear()
    box.send_keys("CLIP wav a/")
    wait(page, "return document.getElementById('tab-matches').textContent === 'found (6)'")
    clips, _ = listed(page, "matches")
    assert clips == list(range(len(HOSTILE), CLIPS, 2))
    marked = (
        "return document.getElementById('map').data.some("
        "(trace) => trace.marker.symbol === 'circle-open' && trace.x.length === 6)"
    )
    assert wait(page, marked)
    box.clear()
    box.send_keys(" ")
    wait(page, "return document.getElementById('tab-matches').hidden")


def test_near_duplicates_have_a_list(page):
    page.find_element("id", "tab-duplicates").click()
    assert listed(page, "duplicates") == ([1, 3], ["1.0000", ""])
    assert text(page, "tab-duplicates") == "near-duplicates (1)"


def test_the_map_and_the_colour_are_chosen_on_the_page(page):
    change = "const s = document.getElementById(arguments[0]); s.value = arguments[1]; s.onchange()"
    before = page.execute_script("return [...document.getElementById('map').data[0].x]")
    page.execute_script(change, "maps", "1")
    wait(page, "return document.getElementById('map').data[0].x[0] !== arguments[0]", before[0])
    page.execute_script(change, "columns", "1")
    labels = wait(
        page, "return [...document.querySelectorAll('#legend .label')].map((l) => l.textContent)"
    )
    assert {"a", "b"} <= set(labels)
    page.find_element("css selector", "#legend button").click()
    wait(page, "return document.getElementById('map').data[0].visible === false")
    assert errors(page) == []


def test_embedded_sound_plays_where_the_files_are_gone(browser, tmp_path):
    audio = tmp_path / "audio"
    audio.mkdir()
    make_collection(audio, [b"%d.wav" % number for number in range(5)])
    explore(read_embedded(audio), tmp_path / "page.html", maps=["pca"], k=2, audio="embed")
    shutil.rmtree(audio)
    load(browser, tmp_path / "page.html")
    click(browser, 2)
    state = wait(
        browser,
        f"const state = (() => {{{PLAYER}}})(); return (state.time > 0 || state.problem) && state",
    )
    assert state["problem"] == "" and state["source"].startswith("blob:")
    assert errors(browser) == []


def test_a_file_that_is_gone_is_said(browser, tmp_path):
    make_collection(tmp_path, [b"%d.wav" % number for number in range(5)])
    explore(read_embedded(tmp_path), tmp_path / "page.html", maps=["pca"], k=2)
    (tmp_path / "3.wav").unlink()
    load(browser, tmp_path / "page.html")
    click(browser, 3)
    wait(
        browser,
        "return document.getElementById('problem').textContent.includes('not where it was')",
    )
