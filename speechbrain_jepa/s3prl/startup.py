"""`enable` and `disable`: plain `python run_downstream.py -u audio_jepa`, in this environment.

`enable` writes one file into site-packages, which Python runs when it starts. It only puts a finder
into `sys.meta_path`; this package is imported when s3prl is, and only if it is still installed.
The launcher cannot take its place inside scripts of s3prl that call `python3 run_downstream.py`.
"""

import sysconfig
from pathlib import Path

FILE = "speechbrain_jepa_s3prl.pth"

# What to do when s3prl is looked for. It is compiled only then: at startup it is a string.
_FIND = """\
import sys
from importlib.util import find_spec
sys.meta_path.remove(hook)
if find_spec("speechbrain_jepa"):
    import speechbrain_jepa.s3prl
spec = find_spec("s3prl")
"""
# The whole file. Of a .pth file, Python runs each line that begins with import.
_LINE = (
    "import sys; sys.meta_path.insert(0, type('SpeechBrainJEPAForS3PRL', (), {'find_spec': "
    "lambda hook, name, path=None, target=None: None if name != 's3prl' else "
    f"exec({_FIND!r}, found := {{'hook': hook}}) or found['spec']}})())\n"
)


def startup_file() -> Path:
    """Where `enable` writes."""
    return Path(sysconfig.get_path("purelib")) / FILE


def enable() -> Path:
    """Write the startup file; once more does no harm.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    PermissionError
        If site-packages is not ours.
    """
    file = startup_file()
    try:
        file.write_text(_LINE, encoding="utf-8")
    except PermissionError as error:
        raise PermissionError(
            f"{file} cannot be written: use a virtual environment, or the launcher, which needs no "
            "file: python -m speechbrain_jepa.s3prl run_downstream.py ..."
        ) from error
    return file


def disable() -> bool:
    """Remove the startup file.

    Returns
    -------
    bool
        Whether there was one.
    """
    file = startup_file()
    there = file.exists()
    file.unlink(missing_ok=True)
    return there
