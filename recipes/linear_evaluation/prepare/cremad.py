"""CREMA-D: 6 acted emotions, divided by speaker."""

import re
from os.path import join
from pathlib import Path

from speechbrain_jepa.data.listing import list_audio

from .common import Clip, Task, locate, write_manifest

TASK = Task(
    name="cremad",
    source="https://github.com/CheyneyComputerScience/CREMA-D (AudioWAV/, with Git LFS)",
    classes=6,
    counts={"train": 5155, "valid": 732, "test": 1551},
)
SPEAKERS = range(1001, 1092)
VALID = frozenset((1009, 1011, 1022, 1034, 1039, 1047, 1066, 1070, 1082))
TEST = frozenset(
    (
        *(1001, 1004, 1017, 1019, 1020, 1025, 1026, 1029, 1033, 1035),
        *(1042, 1044, 1050, 1053, 1056, 1058, 1060, 1069, 1083),
    )
)
# 7438 of the 7442 files are evaluated on: three recordings are there under two emotions each, and
# one file is named otherwise than in the data set's tables. (1076_MTI_SAD_XX, which is silent from
# end to end, is among the 7438.)
LEFT_OUT = {
    "1006_TIE_NEU_XX": "the same recording as 1006_TIE_HAP_XX",
    "1013_WSI_DIS_XX": "the same recording as 1013_WSI_SAD_XX",
    "1017_IWW_FEA_XX": "the same recording as 1017_IWW_ANG_XX",
    "1040_ITH_SAD_X": "not in the published selection",
    "1040_ITH_SAD_XX": "not in the published selection",
}
# speaker, sentence, emotion, level
NAME = re.compile(r"(\d{4})_[A-Z]{3}_(ANG|DIS|FEA|HAP|NEU|SAD)_[A-Z]{1,2}\.wav")
BAD_NAME = "the name is not <speaker>_<sentence>_<emotion>_<level>.wav"


def prepare(data_folder, save_folder, allow_missing: bool = False) -> Path:
    """Write the manifest; see `common.write_manifest`.

    Arguments
    ---------
    data_folder : str or path
        With `AudioWAV/`.
    save_folder : str or path
    allow_missing : bool
        Go on without missing files. Default False.

    Returns
    -------
    Path
    """
    root = join(
        locate(TASK, data_folder, "AudioWAV", ("", "CREMA-D", "CREMA-D-master")), "AudioWAV"
    )
    clips, excluded = [], []
    for name, *_ in list_audio(join(data_folder, root))[0]:
        match = NAME.fullmatch(name)
        if match is None or int(match[1]) not in SPEAKERS:
            excluded.append((join(root, name), BAD_NAME))
        elif reason := LEFT_OUT.get(name.removesuffix(".wav")):
            excluded.append((join(root, name), reason))
        else:
            clips.append(Clip(join(root, name), match[2], split_of(int(match[1]))))
    return write_manifest(
        TASK, data_folder, save_folder, clips, excluded, listed=False, allow_missing=allow_missing
    )


def split_of(speaker: int) -> str:
    """The split that a speaker belongs to."""
    return "valid" if speaker in VALID else "test" if speaker in TEST else "train"
