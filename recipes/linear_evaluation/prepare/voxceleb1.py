"""VoxCeleb1: 1251 speakers, all of them in each split; the official list divides the clips."""

import os
from os.path import join
from pathlib import Path

from .common import Clip, Task, locate, write_manifest

SPLIT_URL = "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/meta/iden_split.txt"
TASK = Task(
    name="voxceleb1",
    source=f"https://www.robots.ox.ac.uk/~vgg/data/voxceleb/vox1.html and {SPLIT_URL}",
    classes=1251,
    counts={"train": 138361, "valid": 6904, "test": 8251},
)
SPLITS = {"1": "train", "2": "valid", "3": "test"}
# the two archives unpacked into one folder, or each into its own
SPEAKER_FOLDERS = (
    *("wav", "vox1_dev_wav/wav", "vox1_test_wav/wav", "dev/wav", "test/wav"),
    *("vox1_dev_wav", "vox1_test_wav", "dev", "test", ""),
)


def prepare(data_folder, save_folder, allow_missing: bool = False, iden_split=None) -> Path:
    """Write the manifest; see `common.write_manifest`.

    Arguments
    ---------
    data_folder : str or path
        With the speakers' folders (`id10001` ...) in `wav/`, or in `wav/` below `vox1_dev_wav/`
        and `vox1_test_wav/`, or below `dev/` and `test/`.
    save_folder : str or path
    allow_missing : bool
        Go on without missing files. Default False.
    iden_split : str, path or None
        The official list of splits. None: `iden_split.txt` in the data folder or its `meta/`.

    Returns
    -------
    Path
    """
    if iden_split is None:
        folder = locate(TASK, data_folder, "iden_split.txt", ("", "meta"))
        iden_split = join(data_folder, folder, "iden_split.txt")
    home: dict[str, str] = {}  # of each speaker
    for folder in SPEAKER_FOLDERS:
        if os.path.isdir(join(data_folder, folder)):
            for name in os.listdir(join(data_folder, folder)):
                home.setdefault(name, folder)
    clips = []
    for number, line in enumerate(Path(iden_split).read_text().splitlines(), start=1):
        if not line.strip():
            continue
        split, path = line.split()
        if split not in SPLITS:
            raise ValueError(f"{iden_split}, line {number}: {split!r} is none of 1, 2, 3")
        speaker = path.split("/")[0]
        clips.append(Clip(join(home.get(speaker, "wav"), path), speaker, SPLITS[split]))
    return write_manifest(TASK, data_folder, save_folder, clips, allow_missing=allow_missing)
