"""UrbanSound8K: 10 urban sounds, 10 folds."""

from os.path import join
from pathlib import Path

from .common import Clip, Task, locate, read_table, write_manifest

TASK = Task(
    name="urbansound8k",
    source="https://urbansounddataset.weebly.com/urbansound8k.html",
    classes=10,
    counts={"": 8732},
    folds=10,
)


def prepare(data_folder, save_folder, allow_missing: bool = False) -> Path:
    """Write the manifest; see `common.write_manifest`.

    Arguments
    ---------
    data_folder : str or path
        With `metadata/UrbanSound8K.csv` and `audio/fold1` to `audio/fold10`.
    save_folder : str or path
    allow_missing : bool
        Go on without missing files. Default False.

    Returns
    -------
    Path
    """
    root = locate(TASK, data_folder, "metadata/UrbanSound8K.csv", ("", "UrbanSound8K"))
    table = join(data_folder, root, "metadata/UrbanSound8K.csv")
    clips = [
        Clip(
            join(root, "audio", f"fold{row['fold']}", row["slice_file_name"]),
            row["class"],
            fold=row["fold"],
        )
        for row in read_table(table, ("slice_file_name", "fold", "class"))
    ]
    return write_manifest(TASK, data_folder, save_folder, clips, allow_missing=allow_missing)
