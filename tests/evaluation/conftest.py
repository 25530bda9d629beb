"""A small labelled set."""

import numpy as np
import pytest
import soundfile


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Noise of two colours and three splits; valid has labels that are the other way round."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    rows = ["file,split,label"]
    for number in range(24):
        noise = rng.normal(0, 0.1, 8_000)
        low = number % 2
        soundfile.write(folder / f"{number}.wav", noise.cumsum() / 50 if low else noise, 16_000)
        split = ("train", "train", "valid", "test")[number // 2 % 4]
        rows.append(f"{number}.wav,{split},{'high' if bool(low) == (split == 'valid') else 'low'}")
    (folder / "meta.csv").write_text("\n".join(rows))
    return folder
