"""Doctests of modules that need an optional library are collected where it is installed."""

from importlib.util import find_spec

NEEDS = {
    "speechbrain_jepa/huggingface.py": "transformers",
    "speechbrain_jepa/mteb.py": "mteb",
}

collect_ignore = [module for module, library in NEEDS.items() if find_spec(library) is None]
