"""NSynth: 11 families of instruments; no instrument of the training split is in another."""

import json
from os.path import join
from pathlib import Path

from .common import Clip, Task, locate, write_manifest

TASK = Task(
    name="nsynth",
    source="https://magenta.tensorflow.org/datasets/nsynth (json/wav)",
    classes=11,
    counts={"train": 289205, "valid": 12678, "test": 4096},
)


def prepare(data_folder, save_folder, allow_missing: bool = False) -> Path:
    """Write the manifest; see `common.write_manifest`.

    Arguments
    ---------
    data_folder : str or path
        With `examples.json` and `audio/` in each of `nsynth-train/`, `nsynth-valid/` and
        `nsynth-test/`.
    save_folder : str or path
    allow_missing : bool
        Go on without missing files. Default False.

    Returns
    -------
    Path
    """
    clips = []
    for split in TASK.counts:
        landmark = join(f"nsynth-{split}", "examples.json")
        root = locate(TASK, data_folder, landmark, ("", "nsynth"))
        with open(join(data_folder, root, landmark), encoding="utf-8") as file:
            notes = json.load(file)
        folder = join(root, f"nsynth-{split}", "audio")
        clips += [
            Clip(join(folder, f"{name}.wav"), note["instrument_family_str"], split)
            for name, note in notes.items()
        ]
    return write_manifest(TASK, data_folder, save_folder, clips, allow_missing=allow_missing)
