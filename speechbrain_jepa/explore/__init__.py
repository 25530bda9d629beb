"""Pages to look at embeddings and listen to their clips: one file that opens in a browser."""

from importlib.util import find_spec

PACKAGES = {"sklearn": "scikit-learn", "plotly": "plotly", "PIL": "pillow"}
missing = [name for module, name in PACKAGES.items() if find_spec(module) is None]
if missing:
    raise ModuleNotFoundError(
        f"explore needs {', '.join(missing)}: in a clone, pip install '.[explore]'"
    )
