"""The notebooks run from top to bottom, on less audio and in fewer steps."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from speechbrain_jepa.data import make_demo_corpus

REPOSITORY = Path(__file__).parents[1]
NOTEBOOKS = REPOSITORY / "docs" / "notebooks"


@pytest.fixture(scope="module")
def parameters(tmp_path_factory):
    """In the place of the notebooks' own: the parameters cell is followed by these."""
    folder = tmp_path_factory.mktemp("notebooks")
    demo = make_demo_corpus(folder / "demo", clips_per_sound=8)
    return {
        "audio": str(demo),
        "labelled": str(demo),
        "results": str(folder / "results"),
        "encoder": str(folder / "results" / "pretrained"),
        "options": ["--optimizer_step_limit", "20", "--encoder_depth", "1", "--norm_crops", "64"],
    }


# in this order: the second takes the encoder that the first one makes
@pytest.mark.parametrize("name", ["pretrain_on_your_own_audio", "embed_and_explore"])
def test_notebook_runs(name, parameters, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in every test (conftest.py)
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    own = re.findall(r"^(\w+) = ", cell.source, re.MULTILINE)
    cell.source += "".join(f"\n{key} = {parameters[key]!r}" for key in own)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": REPOSITORY}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in shown)
    assert not any(output.output_type == "error" for output in shown)


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path):
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs") and not cell.get("execution_count")
