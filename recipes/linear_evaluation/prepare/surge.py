"""Surge: 88 pitches of a synthesizer, divided by preset."""

import hashlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from speechbrain_jepa.data.listing import list_audio

from .common import Clip, Task, read_table, write_manifest

PITCHES = 88
PRESETS = {"train": 1692, "valid": 195, "test": 197}
TASK = Task(
    name="surge",
    source="https://zenodo.org/record/4677097",
    classes=PITCHES,
    counts={split: PITCHES * presets for split, presets in PRESETS.items()},
    split_option="split_csv",
)


def prepare(data_folder, save_folder, allow_missing: bool = False, split_csv=None) -> Path:
    """Write the manifest; see `common.write_manifest`.

    Arguments
    ---------
    data_folder : str or path
        With a folder for each preset that holds `<MIDI pitch>.ogg`, at any depth.
    save_folder : str or path
    allow_missing : bool
        Go on without missing files. Default False.
    split_csv : str, path or None
        With the columns preset (or tone) and split: EVAR's is dataset_surge_tone_splits.csv in its
        folder evar/predefined. None: `split_presets` divides them; scores then do not compare with
        the paper's.

    Returns
    -------
    Path
    """
    found = [PurePosixPath(path) for path, *_ in list_audio(str(data_folder))[0]]
    notes = [
        path for path in found if path.suffix == ".ogg" and path.stem.isdigit() and path.parent.name
    ]
    if not notes:
        raise FileNotFoundError(
            f"{TASK.name}: data_folder={data_folder} holds no <preset>/<MIDI pitch>.ogg. "
            f"Download: {TASK.source}"
        )
    presets = {path.parent.name for path in notes}
    split_of = split_presets(presets) if split_csv is None else _read_splits(split_csv, presets)
    clips = [Clip(str(path), str(int(path.stem)), split_of[path.parent.name]) for path in notes]
    return write_manifest(
        TASK, data_folder, save_folder, clips, listed=False, allow_missing=allow_missing
    )


def split_presets(presets: Iterable[str]) -> dict[str, str]:
    """Divide presets in the published proportions, by a hash of their names.

    Arguments
    ---------
    presets : iterable of str

    Returns
    -------
    dict
        The split of each preset.
    """
    order = sorted(presets, key=lambda name: hashlib.blake2b(name.encode()).digest())
    total = sum(PRESETS.values())
    test, valid = (
        max(round(len(order) * PRESETS[split] / total), 1) for split in ("test", "valid")
    )
    names = ["test"] * test + ["valid"] * valid
    return dict(zip(order, names + ["train"] * (len(order) - len(names))))


def _read_splits(split_csv, presets: set[str]) -> dict[str, str]:
    rows = read_table(split_csv, ("split",))
    names = {"preset", "tone"} & set(rows[0]) if rows else ()
    if not names:
        raise ValueError(
            f"{split_csv} needs the columns preset and split, and a row for each preset"
        )
    column = names.pop()
    splits = {row[column]: row["split"] for row in rows}
    for preset, split in splits.items():
        if split not in PRESETS:
            raise ValueError(
                f"{split_csv}: split {split!r} of {preset} is none of {', '.join(PRESETS)}"
            )
    unknown = presets - splits.keys()
    if unknown:
        raise ValueError(f"{split_csv} has no row for {len(unknown)} presets, as {min(unknown)}")
    return splits
