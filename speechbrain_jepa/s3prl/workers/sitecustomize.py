"""Python runs this when it starts with this folder on PYTHONPATH, where the launcher puts it.

So worker processes and the scripts that a script of s3prl calls have `audio_jepa`, and what today's
packages lack. Another sitecustomize that this one hides is run as well.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent

others = [folder for folder in sys.path if Path(folder or ".").resolve() != HERE]
if (hidden := PathFinder.find_spec("sitecustomize", others)) and hidden.loader:
    hidden.loader.exec_module(module_from_spec(hidden))
try:
    from speechbrain_jepa.s3prl import registration
except ImportError:  # another environment's Python
    pass
else:
    registration.install(torchaudio=True)
