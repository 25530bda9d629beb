"""Probes of frozen encoders: embeddings on the disk, probes trained on them, tables, figures."""

from importlib.util import find_spec

missing = [name for name in ("sklearn", "pandas", "matplotlib") if find_spec(name) is None]
if missing:
    raise ModuleNotFoundError(
        f"evaluation needs {', '.join(missing)}: in a clone, pip install '.[evaluation]'"
    )
