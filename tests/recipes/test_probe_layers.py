"""The script that compares read-outs, on an encoder and a label set that the test makes."""

import importlib.util
from pathlib import Path

import torch

from speechbrain_jepa.checkpoints import save_pretrained
from speechbrain_jepa.features import Normalization
from speechbrain_jepa.vit import Encoder, PatchGrid

SCRIPT = Path(__file__).parents[2] / "recipes" / "pretraining" / "probe_layers.py"


def test_every_read_out_has_a_row(audio_folder, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("probe_layers", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    rows = ["file,split,register"]
    for number in range(24):
        split, register = "train" if number % 3 else "test", "high" if number > 11 else "low"
        rows.append(f"{audio_folder}/tone_{number:02d}.flac,{split},{register}")
    (tmp_path / "meta.csv").write_text("\n".join(rows))
    torch.manual_seed(0)
    encoder = Encoder(PatchGrid(frames=64), dim=24, depth=2, num_heads=3)
    save_pretrained(tmp_path / "tiny", encoder, Normalization(-9.0, 4.0))
    script.main([str(tmp_path / "tiny"), "--tasks_folder", str(tmp_path)])
    printed = capsys.readouterr().out
    for layer in range(3):
        assert f"layer {layer}, mean " in printed
    for name in ("last layer, mean and deviation", "all layers, mean and deviation"):
        assert name in printed
    assert "register" in printed
