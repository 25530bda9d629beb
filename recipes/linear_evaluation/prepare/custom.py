"""Any other data set: a CSV file that names the files, their labels, and a split or a fold."""

from pathlib import Path

from speechbrain_jepa.evaluation.labelled import SPLITS

from .common import Clip, Task, read_table, write_manifest

TASK = Task(name="custom", source="your own files")


def prepare(
    data_folder, save_folder, allow_missing: bool = False, *, csv, multilabel: bool = False
) -> Path:
    """Write the manifest; see `common.write_manifest`.

    Arguments
    ---------
    data_folder : str or path
        What the files in the CSV are relative to.
    save_folder : str or path
    allow_missing : bool
        Go on without missing files. Default False.
    csv : str or path
        With the columns file, label, and either split (train, valid, test) or fold (a number).
    multilabel : bool
        A label is any number of names joined by `;`. Default False.

    Returns
    -------
    Path

    Raises
    ------
    FileNotFoundError
        If the CSV is not there, or files are missing.
    ValueError
        If a column is missing, or a split, fold or label cannot be meant so.
    """
    if not Path(csv).is_file():
        raise FileNotFoundError(f"{csv} does not exist: it has the columns file, label, split")
    rows = read_table(csv, ("file", "label"))
    given = {"split", "fold"} & set(rows[0]) if rows else set()
    if len(given) != 1:
        has = "both split and fold" if given else "neither split nor fold, or no rows"
        raise ValueError(
            f"{csv} has {has}: it needs the columns file, label, and one of the two, and a row for "
            "each file"
        )
    clips = []
    for number, row in enumerate(rows, start=1):
        place = f"{csv}, row {number} ({row['file']})"
        split, fold = row.get("split", ""), row.get("fold", "")
        if "split" in given and split not in SPLITS:
            raise ValueError(f"{place}: split {split!r} is none of {', '.join(SPLITS)}")
        if "fold" in given and not fold.isdigit():
            raise ValueError(f"{place}: fold {fold!r} is not a number")
        clips.append(Clip(row["file"], _label(row["label"], multilabel, place), split, fold))
    return write_manifest(TASK, data_folder, save_folder, clips, allow_missing=allow_missing)


def _label(label: str, multilabel: bool, place: str) -> str:
    names = [name.strip() for name in label.split(";") if name.strip()]
    if not multilabel and len(names) != 1:
        raise ValueError(
            f"{place}: label {label!r} is {len(names)} labels: with any number of them, "
            "--multilabel True"
        )
    return ";".join(dict.fromkeys(names))
