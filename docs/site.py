"""What the site adds to the Markdown files: the README as first page, a page per public class."""

import ast
import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PACKAGE = "speechbrain_jepa"
# in the order the data flows; the public classes and functions of each get their pages
MODULES = (
    "encoder",
    "checkpoints",
    "features",
    "vit",
    "masking",
    "losses",
    "regularizers",
    "schedules",
    "jepa",
    "checkpointer",
    "brain",
    "monitors",
    "hear",
)
# SpeechBrain's names of docstring sections, and those that griffe knows
SECTIONS = {"Arguments": "Parameters", "Example": "Examples"}


def public_names(module: str) -> list[str]:
    """Public classes of a module, in its order; its public functions, where it has no class."""
    tree = ast.parse((ROOT / PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    named = {
        kind: [node.name for node in tree.body if isinstance(node, kind) and node.name[0] != "_"]
        for kind in (ast.ClassDef, ast.FunctionDef)
    }
    functions = [name for name in named[ast.FunctionDef] if name != "main"]
    return named[ast.ClassDef] or functions


def on_config(config):
    """Put the API pages at the end of the navigation."""
    pages = {module: public_names(module) for module in MODULES}
    config.nav.append(
        {"API": [{m: [f"api/{name}.md" for name in names]} for m, names in pages.items()]}
    )
    config.extra["api"] = pages
    return config


def on_files(files, config):
    """Generate the first page from the README, and the API pages."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    readme = re.sub(r"\]\(docs/", "](", readme)
    readme = re.sub(r'src="docs/', 'src="', readme)
    pages = {"index.md": readme}
    for module, names in config.extra["api"].items():
        for name in names:
            pages[f"api/{name}.md"] = f"# {name}\n\n::: {PACKAGE}.{module}.{name}\n"
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown, **_):
    """Files of the repository that are no pages are named, not linked."""
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)+[^)]+\)", r"`\1`", markdown)


class SpeechBrainSections(griffe.Extension):
    """Reads docstrings with SpeechBrain's section names."""

    def on_instance(self, *, obj, **_):
        """Rename the sections of one docstring."""
        if obj.docstring is not None:
            for ours, theirs in SECTIONS.items():
                obj.docstring.value = re.sub(
                    rf"^{ours}\n-+$",
                    f"{theirs}\n{'-' * len(theirs)}",
                    obj.docstring.value,
                    flags=re.MULTILINE,
                )
