"""The wheels' table without wheels: its own rows, a wheel that fails, embedding that goes on."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
from scripts import load_script

from speechbrain_jepa.encoder import AudioJEPA

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "wheel_encoders.py"


@pytest.fixture
def script():
    return load_script(SCRIPT)


def test_untrained_encoders_are_read_out_as_ours_and_a_wheel_that_fails_is_a_row(
    script, noise_tasks, tmp_path, monkeypatch
):
    def no_network(wheel, folder):
        raise subprocess.CalledProcessError(1, "pip", stderr="collecting\nERROR: no network\n")

    monkeypatch.setattr(script, "make_environment", no_network)
    script.main(f"{noise_tasks} --work_folder {tmp_path} --wheels silero-vad --seeds 2".split())
    _, _, *rows = (tmp_path / "table.md").read_text().splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[2] for row in cells[1:3]] == [str(AudioJEPA().embedding_dim)] * 2
    assert "±" in cells[1][-1]  # initialisations differ
    assert cells[2][-1] == "100.0"  # noises that any encoder tells apart
    assert cells[3] == ["silero-vad==6.2.3", "MIT", "not measured: ERROR: no network"]


def test_embedding_goes_on_where_it_was_stopped(script, tmp_path, monkeypatch):
    lengths = np.arange(1, 41)
    offsets = np.concatenate([[0], lengths.cumsum()])
    np.save(tmp_path / "wavs.npy", np.repeat(lengths, lengths).astype(np.float32))
    (tmp_path / "offsets.json").write_text(str(offsets.tolist()))
    seen, stop_at = [], [20]

    def load():
        def embed(wav):
            if len(wav) in stop_at:
                stop_at.remove(len(wav))
                raise KeyboardInterrupt
            seen.append(len(wav))
            return np.array([len(wav), wav.mean()])

        return embed

    monkeypatch.setitem(script.WHEELS, "fake", script.Wheel("fake==1", (), "MIT", load))
    out = tmp_path / "fake==1.npy"
    with pytest.raises(KeyboardInterrupt):
        script.embed_clips("fake", tmp_path, out)
    assert not out.exists()
    script.embed_clips("fake", tmp_path, out)
    assert seen.count(1) == 1  # what was written is not computed again
    np.testing.assert_array_equal(np.load(out), np.stack([lengths, lengths], 1))
