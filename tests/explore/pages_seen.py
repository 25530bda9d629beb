"""A small collection of clips with hostile names, and what to ask a browser."""

import os
import time

import numpy as np
import soundfile

# names that mean something to a browser, a shell or a csv; a file name is any bytes but / and NUL
HOSTILE = (
    b"</script><script>window.hacked = 1</script>.wav",
    b"<img src=x onerror='window.hacked = 1'>.wav",
    b"a&lt;b> \"c\" 'd'.wav",
    b"50%41 #1?x=1.wav",
    b"line\nbreak.wav",
    b"caf\xe9.wav",
)
CLIPS = 18
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --mute-audio "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--use-gl=angle --use-angle=swiftshader --enable-unsafe-swiftshader "
    "--window-size=1300,800"
)


def make_collection(folder, names):
    """Tones of half a second that rise from clip to clip, embeddings and their table."""
    rng = np.random.default_rng(0)
    time_ = np.arange(8_000) / 16_000
    files = []
    for number, name in enumerate(names):
        path = os.path.join(os.fsencode(folder), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        tone = 0.3 * np.sin(2 * np.pi * 200 * 2 ** (number / 4) * time_)
        with open(path, "wb") as file:
            soundfile.write(file, tone, 16_000, format="WAV")
        files.append(os.fsdecode(path))
    vectors = rng.normal(size=(len(names), 12)).astype(np.float32)
    vectors[3] = 2 * vectors[1]  # near-duplicates, whatever their loudness
    np.savez(folder / "emb.npz", files=np.array(files), embeddings=vectors)
    return files, vectors


def wait(browser, script, *args, seconds=120):
    """Until a script returns something true, which is returned."""
    deadline = time.monotonic() + seconds
    while True:
        value = browser.execute_script(script, *args)
        if value:
            return value
        assert time.monotonic() < deadline, f"not true after {seconds} s: {script}"
        time.sleep(0.05)


def errors(browser):
    """What the console says, but for the software renderer's notes on its speed."""
    return [entry for entry in browser.get_log("browser") if "GPU stall" not in entry["message"]]
