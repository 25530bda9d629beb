"""What the site adds to the Markdown files: the README as first page, a page per public class."""

import ast
import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PACKAGE = "speechbrain_jepa"
# first, in the order the data flows; every other module with a public class follows
MODULES = (
    "encoder",
    "checkpoints",
    "features",
    "patches",
    "vit",
    "masking",
    "losses",
    "regularizers",
    "schedules",
    "jepa",
    "checkpointer",
    "brain",
    "validation",
    "monitors",
    "hear",
)
WITHOUT_PAGES = ("s3prl.compat",)  # what s3prl lacks, under s3prl's names
# SpeechBrain's names of docstring sections, and those that griffe knows
SECTIONS = {"Arguments": "Parameters", "Example": "Examples"}


def public(module: str, kind) -> list[str]:
    """Public classes (or functions) of a module, in its order."""
    path = (ROOT / PACKAGE / module.replace(".", "/")).with_suffix(".py")
    path = path if path.exists() else path.with_suffix("") / "__init__.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node.name for node in tree.body if isinstance(node, kind) and node.name[0] != "_"]


def api_pages() -> dict[str, list[str]]:
    """By module, what has a page of its own: its classes, or its functions where it has none."""
    pages = {}
    for module in MODULES:
        functions = [name for name in public(module, ast.FunctionDef) if name != "main"]
        pages[module] = public(module, ast.ClassDef) or functions
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        module = ".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts)
        module = module.removesuffix(".__init__")
        is_listed = module in pages or module in WITHOUT_PAGES or module.startswith("__")
        if not is_listed and public(module, ast.ClassDef):
            pages[module] = public(module, ast.ClassDef)
    return pages


def on_config(config):
    """Put the API pages at the end of the navigation."""
    pages = api_pages()
    config.nav.append(
        {"API": [{m: [f"api/{m}.{name}.md" for name in names]} for m, names in pages.items()]}
    )
    config.extra["api"] = pages
    return config


def on_files(files, config):
    """Generate the first page from the README, and the API pages."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace('src="docs/', 'src="')
    readme = re.sub(r"\[([^\]]+)\]\(([^)]+)\)", _as_seen_from_docs, readme)
    pages = {"index.md": readme}
    for module, names in config.extra["api"].items():
        for name in names:
            pages[f"api/{module}.{name}.md"] = f"# {name}\n\n::: {PACKAGE}.{module}.{name}\n"
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def _as_seen_from_docs(link) -> str:
    """A link of the README: to a page of docs/ or elsewhere, or the name of what is no page."""
    text, target = link.groups()
    if target.startswith("http"):
        return link[0]
    return f"[{text}]({target[5:]})" if target.startswith("docs/") else f"`{text}`"


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
