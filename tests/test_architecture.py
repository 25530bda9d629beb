"""docs/architecture.md names every module, in an order in which none imports one below it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "speechbrain_jepa"


@pytest.fixture(scope="module")
def order():
    """The modules and folders of the package as the page lists them."""
    listing = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("```")[1]
    lines = [line for line in listing.splitlines() if re.match(r"  \S", line)]
    return [name for line in lines for name in re.findall(r"(\w+)(?:\.py|/)(?=\s)", line)]


def imported(path):
    """Names behind `speechbrain_jepa.` in a file's imports, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == PACKAGE.name:
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE.name):
            yield node.module.split(".")[1]


def test_every_module_has_its_line_and_every_line_its_module(order):
    found = [path for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()]
    assert sorted(order) == sorted(p.stem for p in found if not p.stem.startswith("__"))


def test_no_module_imports_one_further_down(order):
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own.startswith("__"):
            continue
        below = {name for name in imported(path) if name in order[order.index(own) + 1 :]}
        assert not below, f"{path.name} imports {below}"
