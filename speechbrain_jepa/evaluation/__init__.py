"""Embed once, probe fast, report."""

from importlib.util import find_spec

missing = [name for name in ("sklearn", "pandas", "matplotlib") if find_spec(name) is None]
if missing:
    raise ModuleNotFoundError(
        f"evaluation needs {', '.join(missing)}: in a clone, pip install '.[evaluation]'"
    )
