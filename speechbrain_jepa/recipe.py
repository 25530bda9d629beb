"""Recipes as yaml files, and variants that say only what is different.

A variant has the one key `recipe`, which includes another yaml with lines of its own:

    recipe: !include:jepa_unstructured.yaml
        output_folder: !ref results/jepa_time/<seed>
        masking: !ref <time_masking>
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from io import StringIO
from pathlib import Path

import speechbrain as sb
import torch
from hyperpyyaml import resolve_references
from ruamel.yaml import YAML

RECIPE = "recipe"
INCLUDE = "!include:"


def parse_arguments(arguments: list[str]) -> tuple:
    """SpeechBrain's `parse_arguments`, with gloo between processes where there is no GPU.

    Arguments
    ---------
    arguments : list of str
        A yaml and options.

    Returns
    -------
    path : str
    run_opts : speechbrain.core.RunOptions
    overrides : str
        Of the yaml's lines, as a yaml.
    given : dict
        The run options that were given, for `resolve_recipe`.
    """
    path, run_opts, overrides = sb.parse_arguments(arguments)
    if not torch.cuda.is_available():
        names = run_opts.overridden_args | {"distributed_backend"}
        run_opts = replace(run_opts, distributed_backend="gloo", overridden_args=names)
    return path, run_opts, overrides, {name: run_opts[name] for name in run_opts.overridden_args}


def resolve_recipe(
    path: str | os.PathLike,
    overrides: str | Mapping | None = None,
    run_options: Mapping | None = None,
) -> str:
    """A recipe with its overrides and references filled in, as one yaml.

    Arguments
    ---------
    path : str or path
        A yaml in hyperpyyaml's syntax, or a variant of one (or of a variant).
    overrides : str or dict
        As SpeechBrain's `parse_arguments` gives them, whichever file an option stands in.
    run_options : dict or None
        SpeechBrain's own options given on the command line. They replace the lines of their names,
        where the recipe has such lines, so that what refers to those follows.

    Returns
    -------
    str
        For `hyperpyyaml.load_hyperpyyaml`, and to keep beside the results.

    Raises
    ------
    KeyError
        If an override is no line of the recipe.
    FileNotFoundError
        If a yaml is not there.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "long.yaml").write_text("seed: 1\\nout: !ref results/<seed>\\n")
    >>> _ = (folder / "short.yaml").write_text("recipe: !include:long.yaml\\n    seed: 2\\n")
    >>> print(resolve_recipe(folder / "short.yaml", "seed: 3"))
    seed: 3
    out: results/3
    <BLANKLINE>
    """
    path = Path(path)
    lines: dict = {}
    given: dict = dict((YAML().load(overrides) if isinstance(overrides, str) else overrides) or {})
    while True:
        text = path.read_text(encoding="utf-8")
        included = _included(text)
        if included is None:
            break
        name, own = included
        path, lines = path.parent / name, {**own, **lines}
    document = YAML().load(text)
    options = [name for name in {**document, **lines} if not name.startswith("__")]
    unknown = [name for name in given if name not in options]
    if unknown:
        raise KeyError(
            f"{', '.join(unknown)}: no option of this recipe; the options are {', '.join(options)}"
        )
    given |= {name: value for name, value in (run_options or {}).items() if name in options}
    for name, value in {**lines, **given}.items():
        both = isinstance(value, Mapping) and isinstance(document.get(name), Mapping)
        if both and not _tag(value):  # some arguments of an object
            document[name].update(value)
        else:
            document[name] = value
    merged = StringIO()
    YAML().dump(document, merged)
    merged.seek(0)
    return resolve_references(merged).getvalue()


def _included(text: str) -> tuple[str, Mapping] | None:
    """The file that a variant includes and its own lines; None for any other yaml."""
    document = YAML().load(text)
    if not isinstance(document, Mapping) or list(document) != [RECIPE]:
        return None
    node = document[RECIPE]
    if not _tag(node).startswith(INCLUDE):
        return None
    return _tag(node).removeprefix(INCLUDE), node if isinstance(node, Mapping) else {}


def _tag(node) -> str:
    return str(node.tag.value or "") if hasattr(node, "tag") else ""
