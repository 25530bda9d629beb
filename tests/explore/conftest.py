"""A collection of clips, and a browser to look at its page with."""

import os
import shutil

import pytest
from pages_seen import CLIPS, FLAGS, HOSTILE, make_collection


@pytest.fixture(scope="session")
def collection(tmp_path_factory):
    """The folder, its files and their embeddings; the first names are hostile."""
    folder = tmp_path_factory.mktemp("collection")
    plain = [
        b"%s/clip_%02d.wav" % (b"ab"[n % 2 : n % 2 + 1], n) for n in range(CLIPS - len(HOSTILE))
    ]
    files, vectors = make_collection(folder, [*HOSTILE, *plain])
    return folder, files, vectors


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Chromium without a window; every test starts with an empty console."""
    binary, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if binary is None or driver is None:
        message = "no chromium and chromedriver here: apt-get install chromium chromium-driver"
        if os.environ.get("CHROMIUM_REQUIRED"):
            pytest.fail(message)
        pytest.skip(message)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chromium = webdriver.Chrome(options=options, service=Service(driver))
    chromium.set_page_load_timeout(300)
    chromium.set_script_timeout(120)
    yield chromium
    chromium.quit()
