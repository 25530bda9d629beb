"""GTZAN: 10 musical genres, with the split that leaves out faulty and repeated excerpts."""

from os.path import exists, join
from pathlib import Path

from torchaudio.datasets.gtzan import filtered_test, filtered_train, filtered_valid

from .common import Clip, Task, locate, write_manifest

TASK = Task(
    name="gtzan",
    source="http://opihi.cs.uvic.ca/sound/genres.tar.gz, or its copy on Kaggle, "
    "andradaolteanu/gtzan-dataset-music-genre-classification (jazz.00054.wav is corrupt there)",
    classes=10,
    counts={"train": 443, "valid": 197, "test": 290},
)
LISTS = {"train": filtered_train, "valid": filtered_valid, "test": filtered_test}


def prepare(data_folder, save_folder, allow_missing: bool = False) -> Path:
    """Write the manifest; see `common.write_manifest`.

    Arguments
    ---------
    data_folder : str or path
        With a folder for each genre, or with `genres/` or `genres_original/` that hold them. Files
        are `<genre>/<genre>.00000.wav` or `.au`.
    save_folder : str or path
    allow_missing : bool
        Go on without missing files. Default False.

    Returns
    -------
    Path
    """
    places = ("", "genres", "genres_original", "Data/genres_original")
    root = locate(TASK, data_folder, "blues", places)
    clips = []
    for split, names in LISTS.items():
        for name in names:
            genre = name.split(".")[0]
            stem = join(root, genre, name)
            wav = f"{stem}.au" if exists(join(data_folder, f"{stem}.au")) else f"{stem}.wav"
            clips.append(Clip(wav, genre, split))
    return write_manifest(TASK, data_folder, save_folder, clips, allow_missing=allow_missing)
