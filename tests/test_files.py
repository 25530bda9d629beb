"""Whole files, full disks, and folders that one process holds."""

import errno
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from speechbrain_jepa.files import (
    HOLDER,
    FolderInUse,
    allocate,
    folder_lock,
    full_disk_named,
    partial_path,
    remove_partials,
    whole_file,
    write_text,
)

HOLD = """
import sys, time
from speechbrain_jepa.files import folder_lock
with folder_lock(sys.argv[1], fix="wait"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_file_that_fails_half_way_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(KeyError), whole_file(path) as partial:
        partial.write_text("ne")
        raise KeyError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_longest_name_a_file_system_takes_can_be_written(tmp_path):
    path = tmp_path / ("n" * 251 + ".wav")
    with whole_file(path) as partial:
        partial.write_bytes(b"x")
    assert path.read_bytes() == b"x"
    assert len(partial_path(tmp_path / ("n." + "s" * 253)).name) < 64


def test_a_second_process_is_told_who_holds_the_folder(tmp_path, holder):
    with pytest.raises(FolderInUse) as error, folder_lock(tmp_path, fix="name another --out"):
        pass
    assert str(tmp_path) in str(error.value)
    assert f"process {holder.pid} " in str(error.value)
    assert str(error.value).endswith("name another --out")


def test_a_folder_given_as_two_is_held_once(tmp_path, monkeypatch):
    """As --cache_folder and --output_folder may be: no process waits for itself."""
    monkeypatch.chdir(tmp_path)
    with folder_lock(tmp_path, fix=""):
        with folder_lock(".", fix="", wait=60):
            assert (tmp_path / HOLDER).exists()
        assert (tmp_path / HOLDER).exists()
        command = [sys.executable, "-c", HOLD, tmp_path]
        assert "FolderInUse" in subprocess.run(command, capture_output=True, text=True).stderr
    with ThreadPoolExecutor(1) as pool, folder_lock(tmp_path, fix=""), pytest.raises(FolderInUse):
        pool.submit(folder_lock(tmp_path, fix="").__enter__).result()


def test_the_lock_goes_with_a_killed_process(tmp_path, holder):
    (tmp_path / ".partial-0.npy").write_bytes(b"half")
    holder.kill()
    holder.wait()
    assert (tmp_path / HOLDER).exists()
    with folder_lock(tmp_path, fix=""):
        assert not list(tmp_path.glob(".partial-*"))
    assert not (tmp_path / HOLDER).exists()


def test_waiting_for_the_folder(tmp_path, holder):
    began = time.monotonic()
    with pytest.raises(FolderInUse), folder_lock(tmp_path, fix="", wait=0.5):
        pass
    assert time.monotonic() - began >= 0.5
    holder.kill()
    with folder_lock(tmp_path, fix="", wait=20):
        pass


def test_partial_folders_are_removed_too(tmp_path):
    folder = tmp_path / ".partial-0"
    folder.mkdir()
    (folder / "a").touch()
    (tmp_path / "kept").touch()
    assert remove_partials(tmp_path) == [folder]
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(bytes(2**22)),
        lambda path: np.save(path, np.zeros(2**22, np.uint8)),
        lambda path: torch.save(torch.zeros(2**20), path),
    ],
    ids=["python", "numpy", "torch"],
)
def test_a_full_disk_is_named(small_disk, write):
    full = pytest.raises(OSError, match=f"disk of {small_disk} is full")
    with full as error, whole_file(small_disk / "a.npy") as partial:
        write(partial)
    assert error.value.errno == errno.ENOSPC
    assert list(small_disk.iterdir()) == []


def test_allocation_fails_before_a_memory_map_could(small_disk):
    with pytest.raises(OSError, match=r"is full .*4.0 MiB needed"):
        allocate(small_disk / "a.npy", 2**22)
    assert list(small_disk.iterdir()) == []
    allocate(small_disk / "a.npy", 2**18)
    assert (small_disk / "a.npy").stat().st_size == 2**18


def test_other_errors_pass_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), full_disk_named(tmp_path):
        (tmp_path / "missing").read_bytes()
    with pytest.raises(RuntimeError, match="unrelated"), full_disk_named(tmp_path):
        raise RuntimeError("unrelated")
