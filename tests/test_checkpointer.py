"""A checkpoint is whole or not there, and a full disk or a kill takes none that was."""

import shutil
import threading

import pytest
import torch

from speechbrain_jepa.checkpointer import AtomicCheckpointer


def test_a_full_disk_is_named_and_gets_its_space_back(small_disk):
    """A checkpoint of 0.5 MB fits on a disk of 1 MiB; a second one beside it does not."""
    state = torch.nn.Linear(128_000, 1)
    checkpointer = AtomicCheckpointer(small_disk / "save", {"state": state})
    first = checkpointer.save_checkpoint()
    (small_disk / "other").write_bytes(bytes(200_000))
    with pytest.raises(OSError, match=f"the disk of {small_disk / 'save'} is full"):
        checkpointer.save_checkpoint()
    assert [path for path in (small_disk / "save").iterdir()] == [first.path]
    (small_disk / "other").unlink()
    assert shutil.disk_usage(small_disk).free > 500_000
    with torch.no_grad():
        state.weight.zero_()
    checkpointer.recover_if_possible()
    assert state.weight.any()


def test_a_checkpoint_that_a_kill_left_half_deleted_is_removed(tmp_path):
    state = torch.nn.Linear(2, 2)
    checkpointer = AtomicCheckpointer(tmp_path, {"state": state, "other": torch.nn.Linear(1, 1)})
    no_meta, no_parameters, complete, newest = (
        checkpointer.save_checkpoint(name=name).path for name in ("a", "b", "c", "d")
    )
    (no_meta / "CKPT.yaml").unlink()
    (no_parameters / "state.ckpt").unlink()
    emptied = tmp_path / "CKPT+emptied"
    emptied.mkdir()
    partial = tmp_path / ".partial-CKPT+e"
    shutil.copytree(complete, partial)
    (tmp_path / "CKPT+notes.txt").touch()
    checkpointer.remove_leftovers()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {complete.name, newest.name, "CKPT+notes.txt"}


def test_a_half_written_checkpoint_is_never_picked(tmp_path, monkeypatch):
    checkpointer = AtomicCheckpointer(tmp_path, {"state": torch.nn.Linear(2, 2)})
    whole = checkpointer.save_checkpoint()

    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(AtomicCheckpointer, "_move_into_place", dies)
    with pytest.raises(KeyboardInterrupt):
        checkpointer.save_checkpoint()
    monkeypatch.undo()
    leftovers = list(tmp_path.glob(".partial-*"))
    assert len(leftovers) == 1
    assert checkpointer.find_checkpoint().path == whole.path
    checkpointer.save_checkpoint()
    assert not leftovers[0].exists()


def slow_writing(monkeypatch):
    """The thread waits for the event that is returned."""
    go, write = threading.Event(), AtomicCheckpointer._write
    monkeypatch.setattr(AtomicCheckpointer, "_write", lambda *args: go.wait(60) and write(*args))
    return go


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """What there was when it was saved is written; the older one stays until it is there."""
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    checkpointer = AtomicCheckpointer(tmp_path, {"model": model, "optimizer": optimizer})
    older = checkpointer.save_checkpoint()
    go = slow_writing(monkeypatch)
    saved = [p.clone() for p in model.parameters()]
    moment = optimizer.state[model.weight]["exp_avg"].clone()
    checkpointer.save_and_keep_only()
    optimizer.step()  # in place, before anything is written
    checkpointer.finish(wait=False)
    assert list(tmp_path.glob("CKPT*")) == [older.path]
    go.set()
    checkpointer.finish()
    (newer,) = tmp_path.glob("CKPT*")
    assert newer != older.path and not list(tmp_path.glob(".partial*"))
    assert not any(map(torch.equal, model.parameters(), saved))
    checkpointer.recover_if_possible()
    assert all(map(torch.equal, model.parameters(), saved))
    assert torch.equal(optimizer.state[model.weight]["exp_avg"], moment)


def test_everything_is_on_the_disk_before_the_checkpoint_has_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("speechbrain_jepa.checkpointer.sync", lambda path: synced.append(path))
    move = AtomicCheckpointer._move_into_place

    def moves(self, partial, final):
        assert {path.name for path in synced} == {"CKPT.yaml", "state.ckpt", partial.name}
        move(self, partial, final)

    monkeypatch.setattr(AtomicCheckpointer, "_move_into_place", moves)
    AtomicCheckpointer(tmp_path, {"state": torch.nn.Linear(2, 2)}).save_checkpoint()
    assert synced[-1] == tmp_path  # which holds the name


def test_a_disk_full_for_the_thread_is_named_at_the_next_call(small_disk):
    state = torch.nn.Linear(128_000, 1)
    checkpointer = AtomicCheckpointer(small_disk / "save", {"state": state})
    first = checkpointer.save_checkpoint()
    (small_disk / "other").write_bytes(bytes(200_000))
    checkpointer.save_and_keep_only()
    with pytest.raises(OSError, match=f"the disk of {small_disk / 'save'} is full"):
        checkpointer.finish()
    assert list((small_disk / "save").iterdir()) == [first.path]
