"""Tables beside the paper's rows, and figures."""

import csv
from dataclasses import replace

import numpy as np
import pytest

from speechbrain_jepa.evaluation import figures
from speechbrain_jepa.evaluation.results import (
    PAPER_ROWS,
    REFERENCE,
    TASKS,
    LayerScore,
    Result,
    collect,
    table,
    write_tables,
)


def result(task="esc50", encoder="mine", scores=(88.0, 90.0), probe="paper"):
    layers = [LayerScore(0, [10.0], 12.0, 9.0), LayerScore(1, list(scores), 80.0)]
    return Result(
        task, encoder, probe, "accuracy", layers, ["a", "b"], [80.0, 90.0], [[8, 2], [1, 9]], {}
    )


def test_paper_rows_are_whole_and_table_3_begins_with_table_2s_first():
    assert all(len(row) == len(TASKS) == 8 for row in PAPER_ROWS.values())
    assert [number for number, _ in PAPER_ROWS].count("2") == 7
    assert PAPER_ROWS["3", "unstructured, audio"] == PAPER_ROWS[REFERENCE]
    # sums of the columns of Tables 2 and 3, added up by hand from the paper
    assert sum(
        row[0] for number, row in ((k[0], v) for k, v in PAPER_ROWS.items()) if number == "2"
    ) == (pytest.approx(89.3 + 89.8 + 90.0 + 57.6 + 92.9 + 88.6 + 89.7))


def test_best_layer_is_chosen_on_validation():
    layers = [LayerScore(0, [99.0], 50.0), LayerScore(1, [60.0], 70.0)]
    found = Result("x", "mine", "paper", "accuracy", layers, [], [], [], {}).best
    assert found.layer == 1


def test_results_come_back_from_the_disk(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        result(encoder=name).save(tmp_path / name / "result.json")
    assert collect(tmp_path) == [result(encoder="a"), result(encoder="b")]


def test_table_marks_the_difference_to_the_paper_and_leaves_gaps():
    ours, theirs = table([result(), result("music", "logmel", [50.0]), result("gtzan", "logmel")])
    assert list(ours.columns) == ["ESC-50", "GTZAN", "music"]
    assert ours.loc["mine", "ESC-50"] == "89.0 ± 1.4 (-0.3)"
    assert ours.loc["mine", "GTZAN"] == "" and ours.loc["logmel", "music"] == "50.0"
    assert list(theirs.columns) == ["ESC-50", "GTZAN"] and len(theirs) == len(PAPER_ROWS)
    assert theirs.loc["wav2vec 2.0 (Table 2)", "GTZAN"] == "57.8"


def test_a_split_of_our_own_is_marked_and_not_compared_with_the_paper(tmp_path):
    own = replace(result("surge"), own_split=True)
    ours, _ = table([own, result()])
    assert ours.loc["mine", "Surge"] == "89.0 ± 1.4 †"
    assert ours.loc["mine", "ESC-50"] == "89.0 ± 1.4 (-0.3)"
    text = write_tables([own, result()], tmp_path)
    assert "† Surge: divided by this recipe" in text
    assert "† Surge" in (tmp_path / "results.md").read_text()
    with open(tmp_path / "results.csv", newline="") as file:
        sources = {row["task"]: row["source"] for row in csv.DictReader(file) if row["seeds"]}
    assert sources == {"surge": "own split", "esc50": ""}
    assert "†" not in write_tables([result()], tmp_path)


def test_tasks_that_the_paper_has_not_stand_alone(tmp_path):
    text = write_tables([result("music")], tmp_path)
    assert "M2D" not in text and "M2D" not in (tmp_path / "results.csv").read_text()


def test_files_hold_every_layer_and_the_papers_rows_with_their_source(tmp_path):
    write_tables([result(), result(probe="sweep")], tmp_path)
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    mine = [row for row in rows if row["paper"] == "False"]
    assert [row["layer"] for row in mine] == ["0", "1", "0", "1"]
    assert mine[1]["mean"] == "89.0" and mine[1]["seeds"] == "2"
    assert all("Table" in row["source"] for row in rows if row["paper"] == "True")
    assert "| mine [sweep] | 89.0 ± 1.4 (-0.3) |" in (tmp_path / "results.md").read_text()
    tex = (tmp_path / "results.tex").read_text()
    assert r"89.0 $\pm$ 1.4 (-0.3) \\" in tex and tex.count(r"\midrule") == 2


def test_figures_are_drawn_with_many_classes_and_gaps(tmp_path):
    classes = [str(number) for number in range(88)]
    rng = np.random.default_rng(0)
    figures.draw_confusion(rng.integers(9, size=(88, 88)), classes, tmp_path / "a.png")
    figures.draw_class_scores([np.nan, *rng.uniform(0, 100, 87)], classes, tmp_path / "b.png")
    figures.draw_map(
        rng.normal(size=(90, 60)), [*classes, "0", "1"], tmp_path / "c.png", max_clips=40
    )
    for name in "abc":
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="too few"):
        figures.draw_map(np.zeros((3, 2)), list("abc"), tmp_path / "d.png")
    with pytest.raises(ValueError, match="no scores"):
        figures.draw_profiles({}, tmp_path / "e.png")
