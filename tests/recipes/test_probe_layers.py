"""The comparison of read-outs: what each row is of."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from scripts import load_script

from speechbrain_jepa import AudioJEPA
from speechbrain_jepa.features import Normalization
from speechbrain_jepa.vit import Encoder, PatchGrid

SCRIPT = Path(__file__).parents[2] / "recipes" / "pretraining" / "probe_layers.py"


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPT)


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(0)
    encoder = Encoder(PatchGrid(frames=208), dim=24, depth=2, num_heads=3)
    return encoder, Normalization(-7.06, 4.19)


def test_statistics_are_those_of_each_clip_alone(script, source):
    rng = np.random.default_rng(0)
    wavs = [rng.normal(0, 0.1, n).astype(np.float32) for n in (16_000, 50_000, 3_000)]
    encoder = AudioJEPA(source, output_all_hiddens=True, pooling="mean_std")
    ours = script.statistics(encoder, wavs)
    assert ours.shape == (3, 3, 2, 120)
    for wav, rows in zip(wavs, ours):
        wav = torch.from_numpy(wav)[None]
        np.testing.assert_allclose(rows[-1, 0], AudioJEPA(source).embed(wav)[0], atol=1e-5)
        steps = AudioJEPA(source)(wav)[0].numpy()
        np.testing.assert_allclose(rows[-1, 1], steps.std(0), atol=1e-5)


@pytest.mark.parametrize("split", ["test", "valid"])
def test_every_read_out_is_a_row_of_the_table(script, source, tmp_path, capsys, split):
    AudioJEPA(source).save_pretrained(tmp_path / "encoder")
    rows = ["file,split,label"]
    for number in range(16):
        tone = np.sin(np.arange(8_000) * (0.1 if number % 2 else 0.7)) * 0.3
        soundfile.write(tmp_path / f"{number}.wav", tone, 16_000)
        part = "train" if number < 8 else "test" if number < 12 else "valid"
        # tones that a linear probe tells apart, in valid by the wrong names
        names = ("high", "low") if part == "valid" else ("low", "high")
        rows.append(f"{number}.wav,{part},{names[number % 2]}")
    (tmp_path / "meta.csv").write_text("\n".join(rows))
    options = ("--tasks_folder", str(tmp_path), "--split", split, "--seeds", "2")
    script.main([str(tmp_path / "encoder"), *options])
    title, _, *table = capsys.readouterr().out.splitlines()
    assert title == f"Linear probe, {split} accuracy in %, mean ± deviation over 2 seeds"
    assert [line.split("  ")[0] for line in table] == [
        "log-mel statistics",
        "untrained",
        "layer 0, mean",
        "layer 1, mean",
        "layer 2, mean",
        "last layer, mean and deviation",
        "all layers, mean",
        "all layers, mean and deviation",
    ]
    expected = "100.0" if split == "test" else "0.0"
    assert all(line.replace("± 0.0", "").split()[-2:] == [expected] * 2 for line in table)
    assert table[1].count("± 0.0") == 2
