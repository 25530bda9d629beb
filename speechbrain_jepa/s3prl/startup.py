"""`enable` and `disable`: plain `python run_downstream.py -u audio_jepa`, in this environment.

`enable` writes one file into site-packages, which Python runs when it starts. It only puts a finder
into `sys.meta_path`; this package is imported when s3prl is, or when a script of s3prl imports
torchaudio, and only if it is still installed. The launcher cannot take its place inside scripts of
s3prl that call `python3 run_downstream.py`.
"""

import sysconfig
from pathlib import Path

FILE = "speechbrain_jepa_s3prl.pth"

# What to do when s3prl or torchaudio is looked for. It is compiled only then: at startup it is a
# string. Scripts import torchaudio first, then what today's packages lack, and then s3prl
_FIND = """\
import sys
from importlib.util import find_spec
from pathlib import Path
script = any(folder.name == "s3prl" and (folder / "hub.py").is_file()
    for folder in Path(sys.argv[0]).resolve().parents)
spec = None
if script or name == "s3prl":
    sys.meta_path.remove(hook)
    if find_spec("speechbrain_jepa"):
        from speechbrain_jepa.s3prl.registration import install
        install(torchaudio=script)
    spec = find_spec(name)
"""
# The whole file. Of a .pth file, Python runs each line that begins with import.
_LINE = (
    "import sys; sys.meta_path.insert(0, type('SpeechBrainJEPAForS3PRL', (), {'find_spec': "
    "lambda hook, name, path=None, target=None: None if name not in ('s3prl', 'torchaudio') else "
    f"exec({_FIND!r}, found := {{'hook': hook, 'name': name}}) or found['spec']}})())\n"
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
