"""The pretraining loop as a SpeechBrain Brain: it moves data and steps, and owns no model code."""

import math
from dataclasses import replace
from pathlib import Path

import speechbrain as sb
import torch
import yaml
from speechbrain.core import AMPConfig
from speechbrain.utils.checkpoints import (
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)
from speechbrain.utils.distributed import ddp_barrier, if_main_process, main_process_only
from speechbrain.utils.logger import get_logger

from speechbrain_jepa.attention import choose_backend
from speechbrain_jepa.files import full_disk_named
from speechbrain_jepa.masking import PatchMasks, for_durations
from speechbrain_jepa.monitors import CollapseAlarm, Interval, MetricsTable, peak_memory_gib
from speechbrain_jepa.validation import KeptBatches, Validation

logger = get_logger(__name__)

AUGMENTATION = 1  # a stream of random numbers beside that of the masks
REFERENCE_BATCH = 256  # the learning rate is base rate * global batch / 256
TRAIN_COLUMNS = (
    "loss",
    "learning_rate",
    "ema_rate",
    "gradient_norm",
    "clips_per_second",
    "data_wait",
    "memory_gib",
    "nonfinite_steps",
)
VALID_COLUMNS = ("loss", "target_deviation", "embedding_deviation", "embedding_rank")


@register_checkpoint_hooks
class JEPABrain(sb.Brain):
    """Pretrains a JEPA.

    Modules: `jepa` (speechbrain_jepa.jepa.JEPA), `features` (LogMelSpectrogram), `normalization`.
    Batches are `speechbrain_jepa.data.CropBatch`es whose sampler has `set_epoch(epoch,
    batches_done)`.

    hparams read here: `masking` (a strategy), `learning_rate_schedule`, `ema_schedule` (callables
    of step and total steps), `seed`, `batch_size` (per device), `log_interval` (optimiser steps),
    `collapse_share`, `output_folder`, `train_logger`, and optionally `masks_per_clip` (1 if there
    is none), `predicted_share` (of the targets), `mixed_frames` (durations beside the grid's),
    `augment` (of the waveforms), `tensorboard_logger`, `online_probe`
    (speechbrain_jepa.evaluation.online_probe), `skipped_files` (told of audio files that break
    during training), `valid_every` and `checkpoint_every` (optimiser steps from one to the next;
    None or not there: at the end of every epoch). Run options are SpeechBrain's own.

    One optimiser step: gradients of `grad_accumulation_factor` batches, clipped together over all
    parameter groups, AdamW, then one EMA update of the target encoder. A step whose loss or
    gradient is not finite is skipped, by a fused optimiser without the host knowing; skipped steps
    are counted when the losses are fetched, every `log_interval` steps and before a checkpoint, and
    more than `nonfinite_patience` in a row stop the run.

    Every process validates on batches of its own, which it keeps in memory.
    """

    def __init__(
        self, modules=None, opt_class=None, hparams=None, run_opts=None, checkpointer=None
    ):
        super().__init__(modules, opt_class, hparams, run_opts, checkpointer)
        self.jepa = modules["jepa"]  # as it is, without DDP's or torch.compile's wrapper
        if self.optimizer_step_limit is not None:
            # given on the command line it arrives as text: the option has no type of its own
            self.optimizer_step_limit = int(self.optimizer_step_limit)
        distributed = torch.distributed.is_initialized()
        self.world_size = torch.distributed.get_world_size() if distributed else 1
        self.process_rank = torch.distributed.get_rank() if distributed else 0
        for precision in (self.precision, self.eval_precision):
            dtype = AMPConfig.from_name(precision).dtype
            choose_backend(self.jepa.context_encoder.attention, torch.device(self.device), dtype)
        self.mask_generator = torch.Generator(self.device)
        others = getattr(self.hparams, "mixed_frames", None) or ()
        self.maskings = for_durations(self.hparams.masking, self.jepa.context_encoder.grid, others)
        self.alarm = CollapseAlarm(self.hparams.collapse_share)
        regularizer = self.jepa.regularizer
        self.parts = () if regularizer is None else ("prediction", *regularizer.names)
        columns = ["step", "epoch"]
        self.train_columns = (*TRAIN_COLUMNS, *self.parts)
        columns += [f"train_{name}" for name in self.train_columns]
        columns += [f"valid_{name}" for name in (*VALID_COLUMNS, *self.parts)]
        self.online_probe = getattr(self.hparams, "online_probe", None)
        if self.online_probe is not None:
            columns += [f"valid_{name}" for name in self.online_probe.columns]
        self.metrics = MetricsTable(Path(self.hparams.output_folder) / "metrics.csv", columns)
        self.nonfinite_streak = 0
        self.nonfinite_total = 0
        self.interval = Interval(self.device)
        self.valid_every = self._every("valid_every")
        self.checkpoint_every = self._every("checkpoint_every")

    def _every(self, name: str) -> int | None:
        every = getattr(self.hparams, name, None)
        if every is not None and every < 1:
            raise ValueError(
                f"{name}={every}: must be at least 1 optimiser step, or null for every epoch"
            )
        return every

    # Before the loop

    @property
    def global_batch(self) -> int:
        """Clips of one optimiser step over all processes."""
        return self.hparams.batch_size * self.grad_accumulation_factor * self.world_size

    def fit(self, epoch_counter, train_set, valid_set=None, **kwargs):
        """SpeechBrain's `fit`; both sets are loaders. Validates once before the first step."""
        steps_per_epoch = len(train_set) // self.grad_accumulation_factor
        if steps_per_epoch == 0:
            raise ValueError(
                f"grad_accumulation_factor={self.grad_accumulation_factor} is more than the "
                f"{len(train_set)} batches of an epoch: use at most {len(train_set)}, a smaller "
                "batch_size, or more passes_per_epoch"
            )
        self.epoch_counter, self.train_set = epoch_counter, train_set
        self.valid_batches = None
        if valid_set is not None:
            self.valid_batches, self.valid_clips = KeptBatches(valid_set), len(valid_set.dataset)
        self.total_steps = epoch_counter.limit * steps_per_epoch
        if self.optimizer_step_limit is not None:
            self.total_steps = min(self.total_steps, self.optimizer_step_limit)
        logger.info(
            f"{self.total_steps} optimiser steps of {self.global_batch} clips "
            f"({self.hparams.batch_size} x {self.grad_accumulation_factor} accumulated x "
            f"{self.world_size} processes), {steps_per_epoch} an epoch; peak learning rate "
            f"{self.hparams.learning_rate_schedule.peak_rate * self.rate_scale:.3g}"
        )
        try:
            super().fit(epoch_counter, train_set, **kwargs)
        finally:
            if self.checkpointer is not None:
                self.checkpointer.finish()
        ddp_barrier()  # nobody looks for the last checkpoint before it is there

    def on_fit_start(self):
        super().on_fit_start()
        if if_main_process():
            self.metrics.drop_after(self.optimizer_step if self.optimizer_step else -1)
        if self.optimizer_step:
            logger.info(f"Resuming after optimiser step {self.optimizer_step}")
            if self.optimizer_step >= self.total_steps:
                self.epoch_counter.current = self.epoch_counter.limit  # nothing is left to do
        else:
            self._validate(epoch=0)

    def on_stage_start(self, stage, epoch=None):
        self.epoch, self.stage = epoch, stage
        if stage == sb.Stage.TRAIN:
            # after a resume `step` says how many of this epoch's batches were done
            self.train_set.batch_sampler.set_epoch(epoch, batches_done=self.step)
            if self.step:
                self.interval.resume()
            else:
                self.interval.restart()
        else:
            self.validation = Validation(self.jepa.context_encoder, self.parts)

    # One batch

    def draw_masks(self, clips: int, stage, frames: int | None = None) -> PatchMasks:
        """Masks that depend only on seed, process, epoch and batch: a resume draws them again."""
        self._seed(stage)
        rows = clips * getattr(self.hparams, "masks_per_clip", 1)
        masking = self.maskings.get(frames, self.hparams.masking)
        masks = masking(rows, device=self.device, generator=self.mask_generator)
        masks = replace(masks, frames=frames) if frames in self.maskings else masks
        share = getattr(self.hparams, "predicted_share", None)
        return masks if share is None else masks.predicting(share, self.mask_generator)

    def _seed(self, stage, *stream: int) -> torch.Generator:
        """The generator of masks, or of another stream, at the place of this batch."""
        if stage == sb.Stage.TRAIN:
            key = (self.hparams.seed, self.process_rank, self.epoch, self.step)
        else:
            # the same in every validation, whichever process has the batch
            key = (self.hparams.seed, -1, 0, self._valid_batch + 1)
        return self.mask_generator.manual_seed(hash((*key, *stream)) & (2**63 - 1))

    @property
    def _valid_batch(self) -> int:
        """Number of a process's batch among all of the validation set, from 0."""
        return self.process_rank + (self.step - 1) * self.world_size

    def compute_forward(self, batch, stage):
        """Log-mel, normalisation, masks and the JEPA's forward pass."""
        self._report_skipped(batch)
        batch = batch.to(self.device)
        with torch.no_grad():
            wav, augment = batch.wav, getattr(self.hparams, "augment", None)
            if augment is not None and stage == sb.Stage.TRAIN:
                wav = augment(wav, self._seed(stage, AUGMENTATION))
            spectrogram = self.modules.features(wav, margins=True)
            spectrogram = self.modules.normalization(spectrogram)
        masks = self.draw_masks(len(batch), stage, spectrogram.shape[2])
        if stage == sb.Stage.TRAIN:
            return self.modules.jepa(spectrogram, masks)
        # without DDP, which would wait for processes that have fewer batches
        output = self.jepa(spectrogram, masks)
        first_clip = self._valid_batch * self.hparams.batch_size
        self.validation.add(spectrogram, masks, output, first_clip)
        return output

    def compute_objectives(self, predictions, batch, stage):
        """The loss that the JEPA computed."""
        return predictions.loss

    def fit_batch(self, batch):
        """One batch, and every `grad_accumulation_factor` batches an optimiser step."""
        self.interval.batch_arrived()
        should_step = self.step % self.grad_accumulation_factor == 0
        self.on_fit_batch_start(batch, should_step)
        with self.no_sync(not should_step):
            with self.training_ctx:
                output = self.compute_forward(batch, sb.Stage.TRAIN)
                loss = self.compute_objectives(output, batch, sb.Stage.TRAIN)
            # a loss that is not finite makes every gradient NaN, on every process of a DDP run,
            # and so they all skip the same step
            poison = 0 * loss.detach()
            if (self.step - 1) % self.grad_accumulation_factor == 0:
                # not right after the step: memory that is free for a whole forward pass goes back
                # to the system, and comes again page by page: 658 against 625 ms of ViT-Tiny's step
                self.optimizer.zero_grad()
            self.scaler.scale(loss / self.grad_accumulation_factor + poison * loss).backward()
        self.interval.add(len(batch), loss=loss, **output.parts)
        if should_step:
            self.optimizers_step()
        ends_interval = should_step and self._is_due(self.hparams.log_interval)
        if ends_interval:
            self._look()
        self.on_fit_batch_end(batch, output, loss, should_step)
        self.interval.batch_done()
        if ends_interval:
            self._log_interval()
        is_last = self.optimizer_step >= self.total_steps  # its epoch's end validates
        if should_step and self._is_due(self.valid_every) and not is_last:
            self._validate(self.epoch)
        return loss.detach()

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.optimizer_step % every == 0

    def update_average(self, loss, avg_loss):
        """Not with each loss, for which the host would wait: the progress bar has the last row."""
        return super().update_average(loss, avg_loss) if self.stage == sb.Stage.TEST else avg_loss

    @torch.no_grad()
    def evaluate_batch(self, batch, stage):
        """As in the base class, but the loss stays on its device."""
        with self.evaluation_ctx:
            output = self.compute_forward(batch, stage)
            return self.compute_objectives(output, batch, stage)

    def optimizers_step(self):
        """Schedules, clipping over all groups, the step or its skipping, and the EMA update."""
        progress = (self.optimizer_step, self.total_steps)
        rate = self.hparams.learning_rate_schedule(*progress) * self.rate_scale
        ema_rate = self.hparams.ema_schedule(*progress)
        self.scaler.unscale_(self.optimizer)
        # SpeechBrain clips param_groups[0] alone, which leaves the decayed matrices unclipped
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        limit = self.max_grad_norm if self.max_grad_norm > 0 else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=True)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if getattr(self.optimizer, "_step_supports_amp_scaling", False):
            # torch's fused optimisers leave everything as it is where found_inf is 1
            skip = (~norm.isfinite()).float()
            self.optimizer.found_inf = skip
            self.optimizer.step()
            del self.optimizer.found_inf
            self.jepa.update_target(ema_rate, skip)
        elif norm.isfinite():  # others have to be asked to: the host waits for the norm
            self.scaler.step(self.optimizer)
            self.jepa.update_target(ema_rate)
        self.scaler.update()
        self.optimizer_step += 1
        self.interval.stepped(learning_rate=rate, ema_rate=ema_rate, gradient_norm=norm)

    def _look(self):
        """Fetch the losses and gradient norms since the last look, and count skipped steps."""
        norms = self.interval.look()
        for step, norm in enumerate(norms, self.optimizer_step - len(norms) + 1):
            if math.isfinite(norm):
                self.nonfinite_streak = 0
            else:
                self._count_nonfinite(step)
        if self.checkpointer is not None:
            self.checkpointer.finish(wait=False)

    @property
    def rate_scale(self) -> float:
        """What the base learning rate is multiplied with: global batch / 256."""
        return self.global_batch / REFERENCE_BATCH

    def _count_nonfinite(self, step: int):
        self.nonfinite_streak += 1
        self.nonfinite_total += 1
        logger.warning(
            f"Step {step} skipped: its loss or gradient is not finite "
            f"({self.nonfinite_streak} in a row, {self.nonfinite_total} in all)"
        )
        if self.nonfinite_streak > self.nonfinite_patience:
            raise RuntimeError(
                f"{self.nonfinite_streak} optimiser steps in a row had a loss or gradient that is "
                f"not finite (nonfinite_patience={self.nonfinite_patience}): lower "
                "base_learning_rate, lengthen the warm-up, or use --precision fp32 or bf16; the "
                "last checkpoint is from before"
            )

    def _report_skipped(self, batch):
        if getattr(self.hparams, "skipped_files", None) is not None:
            self.hparams.skipped_files.report(batch.failures)

    # Reports

    def _log(self, split: str, stats: dict):
        meta = {"epoch": self.epoch, "step": self.optimizer_step}
        with full_disk_named(self.hparams.output_folder):
            self.hparams.train_logger.log_stats(meta, **{f"{split}_stats": stats})
        if not if_main_process():
            return
        self.metrics.append(**meta, **{f"{split}_{name}": value for name, value in stats.items()})
        tensorboard = getattr(self.hparams, "tensorboard_logger", None)
        if tensorboard is not None:
            for name, value in stats.items():
                tensorboard.writer.add_scalar(f"{name}/{split}", value, self.optimizer_step)

    def _log_interval(self):
        stats = self.interval.close(self.world_size)
        self.avg_train_loss = stats["loss"]
        stats["memory_gib"] = peak_memory_gib(self.device)
        stats["nonfinite_steps"] = self.nonfinite_total
        self._log("train", {name: stats.get(name, float("nan")) for name in self.train_columns})

    # Validation

    def _validate(self, epoch: int, enable: bool = False):
        """Between two batches of training, or epochs; its time is not the interval's."""
        step: int = self.step  # type: ignore[has-type]  # SpeechBrain's
        self.step = 0
        self.interval.pause()
        super()._fit_valid(self.valid_batches, epoch, enable)
        self.interval.resume()
        self.modules.train()
        self.stage, self.step = sb.Stage.TRAIN, step

    def _fit_valid(self, valid_set, epoch, enable):
        """The end of an epoch: validation and a checkpoint, where they are due."""
        is_last = epoch >= self.epoch_counter.limit or self.optimizer_step >= self.total_steps
        meta = {"epoch": epoch, "step": self.optimizer_step}
        if self.valid_batches is not None and (self.valid_every is None or is_last):
            self._validate(epoch, enable)
            meta["valid_loss"] = self.valid_loss
        if self.checkpointer is not None and (self.checkpoint_every is None or is_last):
            self.checkpointer.save_and_keep_only(meta=meta, num_to_keep=1)

    def on_stage_end(self, stage, stage_loss, epoch=None):
        if stage == sb.Stage.TRAIN:
            self._look()
            if self.interval.steps:
                self._log_interval()
            return
        losses, monitors = self.validation.results()
        self.valid_loss = losses["loss"]
        self._log("valid", {**losses, **monitors, **self._probe(epoch)})
        first_check = not self.alarm.start
        fallen_values = self.alarm.check(monitors)
        if first_check and self.alarm.blind():
            logger.warning(
                f"The collapse alarm is blind: {' and '.join(self.alarm.blind())}, too low for a "
                f"fall to {self.alarm.share:.0%} of it. There are {self.valid_clips} "
                "validation clips: raise valid_share (max_valid), or give more or longer files."
            )
        for fallen in fallen_values:
            logger.warning(
                f"COLLAPSE? {fallen}, under {self.alarm.share:.0%} of its start. What to try: a "
                "regularizer (speechbrain_jepa.regularizers.VarianceCovariance in the yaml); a "
                "lower learning rate or a longer warm-up; a slower EMA (ema_start nearer to 1: "
                "targets that change faster than the predictor learns lose their content); a "
                "larger batch; more target patches; a shallower encoder."
            )

    def _probe(self, epoch: int | None) -> dict[str, float]:
        """Accuracies of the online probe: before the first step, and every so many validations."""
        probe, number = self.online_probe, epoch or 0
        if self.valid_every is not None:
            number = math.ceil(self.optimizer_step / self.valid_every)
        if probe is None or not if_main_process() or number % probe.every:
            return {}
        return probe(self.jepa.context_encoder, self.modules.normalization, self.modules.features)

    # Checkpoints

    def _should_save_intra_epoch_ckpt(self, last_ckpt_time, steps_since_ckpt):
        """Between optimiser steps only: accumulated gradients are not part of a checkpoint.

        What the processes' clocks decide they have to agree on, which makes them wait for each
        other: every `log_interval` steps, where they have waited for the device already.
        """
        if self.checkpointer is None or self.step % self.grad_accumulation_factor:
            return False
        if 0 < self.ckpt_interval_steps <= steps_since_ckpt or self._is_due(self.checkpoint_every):
            return True
        if self.ckpt_interval_minutes <= 0 or not self._is_due(self.hparams.log_interval):
            return False
        return super()._should_save_intra_epoch_ckpt(last_ckpt_time, steps_since_ckpt)

    def _save_intra_epoch_ckpt(self):
        self._look()
        super()._save_intra_epoch_ckpt()

    @mark_as_saver
    @main_process_only
    def _save(self, path):
        state = {
            "step": self.step,
            "avg_train_loss": float(self.avg_train_loss),
            "optimizer_step": self.optimizer_step,
            "nonfinite_streak": self.nonfinite_streak,
            "nonfinite_total": self.nonfinite_total,
            "alarm_start": self.alarm.start,
            "interval": self.interval.state(),
        }
        with open(path, "w", encoding="utf-8") as file:
            yaml.safe_dump(state, file)

    @mark_as_loader
    def _recover(self, path, end_of_epoch):
        with open(path, encoding="utf-8") as file:
            state = yaml.safe_load(file)
        self.alarm.start = state.pop("alarm_start")
        self.interval.load(state.pop("interval"))
        for name, value in state.items():
            setattr(self, name, value)
