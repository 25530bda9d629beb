"""Speech Commands V2: 35 spoken words, speakers kept apart by two lists."""

from os.path import join
from pathlib import Path

from speechbrain_jepa.data.listing import list_audio

from .common import Clip, Task, locate, write_manifest

TASK = Task(
    name="speech_commands",
    source="http://download.tensorflow.org/data/speech_commands_v0.02.tar.gz",
    classes=35,
    counts={"train": 84843, "valid": 9981, "test": 11005},
)
LISTS = {"valid": "validation_list.txt", "test": "testing_list.txt"}
VERSION = "speech_commands_v0.02"


def prepare(data_folder, save_folder, allow_missing: bool = False) -> Path:
    """Write the manifest; see `common.write_manifest`.

    Arguments
    ---------
    data_folder : str or path
        With a folder for each word, `validation_list.txt` and `testing_list.txt`. What neither
        lists is for training; `_background_noise_` is left out.
    save_folder : str or path
    allow_missing : bool
        Go on without missing files. Default False.

    Returns
    -------
    Path
    """
    root = locate(TASK, data_folder, LISTS["test"], ("", VERSION, f"SpeechCommands/{VERSION}"))
    folder = Path(data_folder) / root
    locate(TASK, folder, LISTS["valid"])
    split_of = {
        path: split
        for split, name in LISTS.items()
        for path in (folder / name).read_text().splitlines()
        if path
    }
    found = (path for path, *_ in list_audio(str(folder))[0])
    words = {
        path
        for path in found
        if path.count("/") == 1 and path.endswith(".wav") and not path.startswith("_")
    }
    clips = [
        Clip(join(root, path), path.split("/")[0], split_of.get(path, "train"))
        for path in sorted(words | split_of.keys())
    ]
    return write_manifest(
        TASK, data_folder, save_folder, clips, listed=False, allow_missing=allow_missing
    )
