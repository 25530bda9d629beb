"""SpeechBrain's checkpoints, whole or not there, when a process is killed or the disk is full."""

import copy
import logging
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from speechbrain.utils.checkpoints import (
    CKPT_PREFIX,
    DEFAULT_SAVE_HOOKS,
    METAFNAME,
    Checkpoint,
    Checkpointer,
    ckpt_recency,
    get_default_hook,
    torch_save,
)
from speechbrain.utils.distributed import (
    MainProcessContext,
    ddp_barrier,
    if_main_process,
    main_process_only,
)
from speechbrain.utils.logger import get_logger

from speechbrain_jepa.files import PARTIAL, full_disk_named, remove_partials, sync

logger = get_logger(__name__)


class AtomicCheckpointer(Checkpointer):
    """SpeechBrain's checkpointer, whose checkpoints appear under their name only when complete.

    The original writes CKPT.yaml, its sign of a checkpoint, before the parameters, so a process
    killed in between leaves one that recovery picks and cannot load. Here a checkpoint is written
    under another prefix, which recovery ignores, and renamed when all of it is on the disk.

    `save_and_keep_only` copies the parameters to the host's memory, and a thread writes the copy
    while training goes on. A disk that is full is then said by the next call, or by `finish`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future | None = None
        self._outdated: dict[str, Any] | None = None  # what to delete once it is written
        self._copies: dict[Path, Any] = {}

    def save_checkpoint(self, meta=None, end_of_epoch=True, name=None, verbosity=logging.INFO):
        """As in the base class. On a full disk the error names it; the rest is removed."""
        checkpoint = self._begin(meta, end_of_epoch, name, verbosity)
        self.finish()
        ddp_barrier()  # no process looks for checkpoints before the new one is there
        return checkpoint

    def save_and_keep_only(
        self,
        meta=None,
        end_of_epoch=True,
        name=None,
        num_to_keep=1,
        keep_recent=True,
        importance_keys=(),
        max_keys=(),
        min_keys=(),
        ckpt_predicate=None,
        verbosity=logging.INFO,
    ):
        """As in the base class, in the background: older checkpoints go when this one is there."""
        self._begin(meta, end_of_epoch, name, verbosity)
        self._outdated = dict(
            num_to_keep=num_to_keep,
            max_keys=max_keys,
            min_keys=min_keys,
            importance_keys=[*importance_keys, *([ckpt_recency] if keep_recent else [])],
            ckpt_predicate=ckpt_predicate,
            verbosity=verbosity,
        )

    def finish(self, wait: bool = True) -> None:
        """Wait for the checkpoint that is being written, and delete those it replaces.

        Arguments
        ---------
        wait : bool
            False: come back at once if it is not there yet. Default True.

        Raises
        ------
        OSError
            If it could not be written: the message names a full disk.
        """
        if self._writing is not None:
            if not wait and not self._writing.done():
                return
            try:
                self._writing.result()
            finally:  # not kept in this frame: its error would keep the unfinished file open
                self._writing = None
        outdated, self._outdated = self._outdated, None
        if outdated is not None and if_main_process():
            with MainProcessContext():  # in which the base class waits for no other process
                super().delete_checkpoints(**outdated)

    def list_checkpoints(self):
        """As in the base class, with the one that is being written."""
        self.finish()
        return super().list_checkpoints()

    def remove_leftovers(self) -> None:
        """Remove what killed processes left: unfinished checkpoints, and half-deleted ones.

        A half-deleted checkpoint lacks its CKPT.yaml, or is older than the newest and lacks a
        file that the newest has.
        """
        self.finish()
        if not if_main_process():
            return
        remove_partials(self.checkpoints_dir)
        newest = self.find_checkpoint()
        needed = {METAFNAME}
        if newest is not None:
            needed |= {path.name for path in newest.paramfiles.values()}
        for folder in self.checkpoints_dir.glob(f"{CKPT_PREFIX}+*/"):
            if needed - {path.name for path in folder.iterdir()}:
                shutil.rmtree(folder)

    @main_process_only
    def delete_checkpoints(self, *args, **kwargs):
        """As in the base class, but on the main process alone.

        There every process lists the checkpoints and waits at a barrier for each one it lists: if
        one lists them after another has deleted some, they wait for each other forever.
        """
        super().delete_checkpoints(*args, **kwargs)

    def _begin(self, meta, end_of_epoch, name, verbosity) -> Checkpoint | None:
        """Write what is small, copy the rest and have the thread write it.

        Returns
        -------
        Checkpoint or None
            As it will be; None where this is not the main process.
        """
        self.remove_leftovers()
        hooks = self.custom_save_hooks  # type: ignore[has-type]  # SpeechBrain's
        self._copies = {}
        copied = {
            name: self._copy
            for name, recoverable in self.recoverables.items()
            if get_default_hook(recoverable, DEFAULT_SAVE_HOOKS) is torch_save
        }
        self.custom_save_hooks = {**copied, **hooks}
        try:
            with full_disk_named(self.checkpoints_dir):
                partial = super().save_checkpoint(meta or {}, end_of_epoch, name, logging.DEBUG)
            ddp_barrier()  # every process writes its epoch counter
        except (OSError, RuntimeError):
            self.remove_leftovers()
            raise
        finally:
            self.custom_save_hooks = hooks
        if partial is None:  # not the main process
            return None
        final = partial.path.with_name(partial.path.name.removeprefix(PARTIAL))
        copies, self._copies = self._copies, {}
        self._writing = self._thread.submit(self._write, partial.path, final, copies, verbosity)
        paramfiles = {name: final / path.name for name, path in partial.paramfiles.items()}
        return partial._replace(path=final, paramfiles=paramfiles)

    def _copy(self, recoverable, path: Path) -> None:
        if if_main_process():
            self._copies[path] = copy_to_host(recoverable.state_dict())

    def _write(self, partial: Path, final: Path, copies: dict[Path, Any], verbosity: int) -> None:
        """In the thread, where no function of SpeechBrain's that knows of processes is called."""
        try:
            with full_disk_named(self.checkpoints_dir):
                for path in list(copies):
                    torch.save(copies.pop(path), path)
                for file in partial.iterdir():
                    sync(file)
                sync(partial)
                self._move_into_place(partial, final)
                sync(self.checkpoints_dir)
        except (OSError, RuntimeError):
            shutil.rmtree(partial, ignore_errors=True)
            raise
        logger.log(verbosity, f"Saved a checkpoint in {final}")

    def _move_into_place(self, partial: Path, final: Path) -> None:
        if final.exists():  # a checkpoint saved again under a custom name
            shutil.rmtree(final)
        partial.rename(final)

    def _new_checkpoint_dirpath(self):
        return self._partial(super()._new_checkpoint_dirpath())

    def _custom_checkpoint_dirpath(self, name):
        return self._partial(super()._custom_checkpoint_dirpath(name))

    def _partial(self, path: Path) -> Path:
        return path.with_name(PARTIAL + path.name)


def copy_to_host(state: Any) -> Any:
    """A state dict whose tensors are copies in the host's memory; whatever else it holds is shared.

    Example
    -------
    >>> weight = torch.zeros(2)
    >>> state = copy_to_host({"weight": weight, "groups": [{"lr": 0.1}]})
    >>> _ = weight.add_(1)
    >>> state
    {'weight': tensor([0., 0.]), 'groups': [{'lr': 0.1}]}
    """
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        new = copy.copy(state)  # with a module's _metadata
        new.update({key: copy_to_host(value) for key, value in state.items()})
        return new
    if isinstance(state, (list, tuple)):
        return type(state)(map(copy_to_host, state))
    return state
