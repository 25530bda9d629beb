"""Every yaml runs with the flags of its row, in the form of SpeechBrain's own recipe tests.

`tests/recipes/*.csv` has SpeechBrain's columns. In the flags, {data} and {labelled} stand for
generated audio, {encoder} for a small pretrained folder, {output} for an empty folder.
"""

import csv
import inspect
import re
import runpy
import sys
from pathlib import Path

import pytest
import trees

from speechbrain_jepa.checkpoints import save_pretrained
from speechbrain_jepa.features import Normalization
from speechbrain_jepa.vit import Encoder, PatchGrid

REPOSITORY = Path(__file__).parents[2]
ROWS = {
    row["Hparam_file"]: row
    for table in sorted(Path(__file__).parent.glob("*.csv"))
    for row in csv.DictReader(table.read_text(encoding="utf-8").splitlines())
}
IMPORTED_BY_SCRIPTS = ("train", "run_all", "prepare")  # names that several recipes have


@pytest.fixture
def folders(request, tmp_path, audio_folder):
    """What the flags may name."""
    name = Path(request.param["Hparam_file"]).stem.removesuffix("_m2d")
    if request.param["Task"] == "Pretraining":
        data = audio_folder
    elif request.param["Task"] == "EventDetection":
        data = trees.events(tmp_path / "data").folder
    else:
        data = trees.TREES[name](tmp_path / "data").folder
    labelled = tmp_path / "labelled"
    if "{labelled}" in request.param["test_debug_flags"]:
        trees.custom(labelled / "pitches")
    encoder = tmp_path / "encoder"
    if "{encoder}" in request.param["test_debug_flags"]:
        small = Encoder(PatchGrid(frames=64), dim=48, depth=2, num_heads=3)
        save_pretrained(encoder, small, Normalization(-7.0, 4.0))
    output = tmp_path / "output"
    return {"data": data, "labelled": labelled, "encoder": encoder, "output": output}


@pytest.mark.parametrize(
    ("folders", "row"), [(row, row) for row in ROWS.values()], indirect=["folders"], ids=list(ROWS)
)
def test_recipe_runs_with_its_debug_flags(folders, row, monkeypatch):
    output = folders["output"]
    flags = row["test_debug_flags"].format(**folders).split()
    script = REPOSITORY / row["Script_file"]
    hparams = str(REPOSITORY / row["Hparam_file"])
    monkeypatch.setattr(sys, "argv", [str(script), hparams, "--output_folder", str(output), *flags])
    monkeypatch.syspath_prepend(script.parent)
    # what inspect remembers, or a later import of the same file would pass for __main__
    monkeypatch.setattr(inspect, "modulesbyfile", {})
    monkeypatch.setattr(inspect, "_filesbymodname", {})
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        for name in list(sys.modules):
            if name.partition(".")[0] in IMPORTED_BY_SCRIPTS:
                del sys.modules[name]
    for problem in failed_checks(row["test_debug_checks"], output):
        pytest.fail(problem)


def failed_checks(checks: str, output: Path):
    """What `file_exists=[a,b]` and `performance_check=[log, name, <limit, epoch: n]` ask for."""
    files = re.search(r"file_exists=\[(.*?)\]", checks)
    for pattern in files[1].split(",") if files else ():
        if not list(output.glob(pattern.strip())):
            yield f"{pattern} was not written"
    performance = re.search(r"performance_check=\[(.*?), (.*?), <(.*?), (.*?)\]", checks)
    if performance:
        log, name, limit, line = performance.groups()
        lines = [
            text
            for text in (output / log).read_text().splitlines()
            if line in text and f"{name}: " in text
        ]
        if not lines:
            yield f"{log} has no {name} at {line}"
        elif not float(re.search(rf"{name}: (\S+)", lines[-1])[1].rstrip(",")) < float(limit):
            yield f"{lines[-1]}: {name} is not below {limit}"


def test_every_yaml_has_a_row_and_every_file_of_a_row_is_there():
    yamls = [
        path for folder in ("hparams", "recipes") for path in (REPOSITORY / folder).rglob("*.yaml")
    ]
    own = {str(path.relative_to(REPOSITORY)) for path in yamls if path.name != "base.yaml"}
    assert own - set(ROWS) == set()
    for row in ROWS.values():
        for column in ("Script_file", "Hparam_file", "Data_prep_file", "Readme_file"):
            assert not row[column] or (REPOSITORY / row[column]).is_file(), row[column]


def test_checks_that_do_not_hold_are_found(tmp_path):
    (tmp_path / "log.txt").write_text("epoch: 1 - valid loss: 2.0\n")
    checks = (
        "file_exists=[log.txt,lost.txt] performance_check=[log.txt, valid loss, <1.5, epoch: 1]"
    )
    assert len(list(failed_checks(checks, tmp_path))) == 2
    assert not list(failed_checks(checks.replace(",lost.txt", "").replace("1.5", "2.5"), tmp_path))
