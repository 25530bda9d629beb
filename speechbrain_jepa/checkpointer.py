"""SpeechBrain's checkpoints, whole or not there, when a process is killed or the disk is full."""

import logging
import shutil
from pathlib import Path

from speechbrain.utils.checkpoints import CKPT_PREFIX, METAFNAME, Checkpoint, Checkpointer
from speechbrain.utils.distributed import ddp_barrier, if_main_process, main_process_only
from speechbrain.utils.logger import get_logger

from speechbrain_jepa.files import PARTIAL, full_disk_named, remove_partials, sync

logger = get_logger(__name__)


class AtomicCheckpointer(Checkpointer):
    """SpeechBrain's checkpointer, whose checkpoints appear under their name only when complete.

    The original writes CKPT.yaml, its sign of a checkpoint, before the parameters, so a process
    killed in between leaves one that recovery picks and cannot load. Here a checkpoint is written
    under another prefix, which recovery ignores, and renamed at the end.
    """

    def save_checkpoint(self, meta=None, end_of_epoch=True, name=None, verbosity=logging.INFO):
        """As in the base class. On a full disk the error names it; the rest is removed."""
        self.remove_leftovers()
        try:
            with full_disk_named(self.checkpoints_dir):
                partial = super().save_checkpoint(meta or {}, end_of_epoch, name, logging.DEBUG)
                ddp_barrier()  # every process writes its epoch counter
                if partial is not None:  # on the main process
                    for file in partial.path.iterdir():
                        sync(file)
        except (OSError, RuntimeError):
            self.remove_leftovers()
            raise
        final = self._move_into_place(partial, verbosity)
        ddp_barrier()  # no process looks for checkpoints before the new one is there
        return final

    def remove_leftovers(self) -> None:
        """Remove what killed processes left: unfinished checkpoints, and half-deleted ones.

        A half-deleted checkpoint lacks its CKPT.yaml, or is older than the newest and lacks a
        file that the newest has.
        """
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

    def _move_into_place(self, partial: Checkpoint | None, verbosity: int) -> Checkpoint | None:
        if partial is None:  # not the main process
            return None
        final = partial.path.with_name(partial.path.name.removeprefix(PARTIAL))
        if final.exists():  # a checkpoint saved again under a custom name
            shutil.rmtree(final)
        partial.path.rename(final)
        logger.log(verbosity, f"Saved a checkpoint in {final}")
        paramfiles = {name: final / path.name for name, path in partial.paramfiles.items()}
        return partial._replace(path=final, paramfiles=paramfiles)

    def _new_checkpoint_dirpath(self):
        return self._partial(super()._new_checkpoint_dirpath())

    def _custom_checkpoint_dirpath(self, name):
        return self._partial(super()._custom_checkpoint_dirpath(name))

    def _partial(self, path: Path) -> Path:
        return path.with_name(PARTIAL + path.name)
