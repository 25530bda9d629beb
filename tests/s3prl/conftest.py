"""A tiny pretrained folder, and what the tests of s3prl itself need."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

import speechbrain_jepa
from speechbrain_jepa.checkpoints import save_pretrained
from speechbrain_jepa.features import Normalization
from speechbrain_jepa.vit import Encoder, PatchGrid


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    torch.manual_seed(0)
    encoder = Encoder(PatchGrid(frames=208), dim=48, depth=2, num_heads=3)
    folder = tmp_path_factory.mktemp("encoder") / "tiny"
    return save_pretrained(folder, encoder, Normalization(-7.06, 4.19))


@pytest.fixture(scope="session")
def s3prl_folder():
    """Where the s3prl that is imported lies. Without one, tests/s3prl is importable as s3prl."""
    spec = importlib.util.find_spec("s3prl")
    if spec is None or spec.origin is None:
        pytest.skip("s3prl is not installed: pip install s3prl==0.4.18, or make test-s3prl")
    return Path(spec.origin).parent


@pytest.fixture(scope="session")
def s3prl_distribution(s3prl_folder):
    """What pip installed there: s3prl, or its fork espnet-s3prl."""
    for distribution in importlib.metadata.distributions():
        is_here = Path(distribution.locate_file("s3prl/hub.py")) == s3prl_folder / "hub.py"
        if is_here and distribution.metadata["Name"] in ("s3prl", "espnet-s3prl"):
            return distribution
    return pytest.skip(f"{s3prl_folder} was not installed by pip")


class Environment:
    """A virtual environment of its own that sees the packages of this one."""

    def __init__(self, folder: Path):
        venv.create(folder, with_pip=False)
        self.python = folder / "bin" / "python"
        self.home = folder / "home"
        self.site_packages = next(folder.glob("lib/python3*/site-packages"))
        self.shared = self.site_packages / "shared.pth"
        self.share()

    def share(self, *paths) -> None:
        """What it sees: by default all of this environment's packages."""
        here = [path for path in sys.path if path.endswith("site-packages")]
        here.append(Path(speechbrain_jepa.__file__).parents[1])
        self.shared.write_text("".join(f"{path}\n" for path in paths or here))

    def run(self, *arguments, cwd=None, check=True) -> subprocess.CompletedProcess:
        return run(self.python, *arguments, cwd=cwd or self.site_packages, check=check)


@pytest.fixture
def environment(tmp_path):
    return Environment(tmp_path / "environment")


def run(*command, cwd, check=True) -> subprocess.CompletedProcess:
    """Run a command by itself: no settings of this test run reach it, and no GPU."""
    removed = ("PYTHONPATH", "PYTEST_CURRENT_TEST")
    environ = {name: value for name, value in os.environ.items() if name not in removed}
    environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HOME": str(cwd)}
    command = [os.fspath(part) for part in command]
    done = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True)
    if check and done.returncode:
        pytest.fail(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done


@pytest.fixture(scope="session")
def launch():
    """Run `python -m speechbrain_jepa.s3prl` with some arguments."""
    return lambda *arguments, **options: run(
        sys.executable, "-m", "speechbrain_jepa.s3prl", *arguments, **options
    )
