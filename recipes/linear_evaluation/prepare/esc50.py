"""ESC-50: 50 environmental sounds, 5 folds."""

from os.path import join
from pathlib import Path

from .common import Clip, Task, locate, read_table, write_manifest

TASK = Task(
    name="esc50",
    source="https://github.com/karolpiczak/ESC-50/archive/master.zip",
    classes=50,
    counts={"": 2000},
    folds=5,
)


def prepare(data_folder, save_folder, allow_missing: bool = False) -> Path:
    """Write the manifest; see `common.write_manifest`.

    Arguments
    ---------
    data_folder : str or path
        With `meta/esc50.csv` and `audio/`.
    save_folder : str or path
    allow_missing : bool
        Go on without missing files. Default False.

    Returns
    -------
    Path
    """
    root = locate(TASK, data_folder, "meta/esc50.csv", ("", "ESC-50-master", "ESC-50"))
    columns = ("filename", "fold", "category")
    clips = [
        Clip(join(root, "audio", row["filename"]), row["category"], fold=row["fold"])
        for row in read_table(join(data_folder, root, "meta/esc50.csv"), columns)
    ]
    return write_manifest(TASK, data_folder, save_folder, clips, allow_missing=allow_missing)
