"""The pretraining loop as a SpeechBrain Brain: it moves data and steps, and owns no model code."""

import os
import platform
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
from speechbrain.utils.distributed import if_main_process, main_process_only
from speechbrain.utils.logger import get_logger

from speechbrain_jepa.attention import choose_backend
from speechbrain_jepa.files import full_disk_named
from speechbrain_jepa.masking import PatchMasks
from speechbrain_jepa.monitors import (
    CollapseAlarm,
    Interval,
    MetricsTable,
    PatchStatistics,
    effective_rank,
    peak_memory_gib,
)

logger = get_logger(__name__)

REFERENCE_BATCH = 256  # the learning rate is base rate * global batch / 256
MONITORED_PATCHES = 4096  # of the validation set, about: their embeddings give the effective rank
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
# values of ONEDNN_MAX_CPU_ISA that leave oneDNN an instruction set with bfloat16 products
NATIVE_BF16_ISA = ("DEFAULT", "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX")
VALID_COLUMNS = ("loss", "target_deviation", "embedding_deviation", "embedding_rank")


def default_precision(device: str | None = None) -> str:
    """The precision to train in: "bf16" where the machine multiplies it natively, else "fp32".

    Example
    -------
    >>> default_precision("cpu") in ("bf16", "fp32")
    True
    """
    device = device or sb.utils.distributed.infer_device()
    if device.startswith("cuda"):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device == "cpu" and _cpu_multiplies_bf16() else "fp32"


def _cpu_multiplies_bf16() -> bool:
    """Whether oneDNN multiplies bfloat16 in hardware.

    On x86 its own answer is yes from AVX-512 on, where it converts to float32 and back: several
    times slower than float32 itself.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "DEFAULT"
    allowed = limit.upper() in NATIVE_BF16_ISA or limit.upper().startswith("AVX10")
    return allowed and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@register_checkpoint_hooks
class JEPABrain(sb.Brain):
    """Pretrains a JEPA.

    Modules: `jepa` (speechbrain_jepa.jepa.JEPA), `features` (LogMelSpectrogram), `normalization`.
    Batches are `speechbrain_jepa.data.CropBatch`es whose sampler has `set_epoch(epoch,
    batches_done)`.

    hparams read here: `masking` (a strategy), `learning_rate_schedule`, `ema_schedule` (callables
    of step and total steps), `seed`, `batch_size` (per device), `log_interval` (optimiser steps),
    `collapse_share`, `output_folder`, `train_logger`, and optionally `tensorboard_logger`,
    `online_probe` (speechbrain_jepa.evaluation.online_probe) and `skipped_files` (told of audio
    files that break during training). Run options are SpeechBrain's own.

    One optimiser step: gradients of `grad_accumulation_factor` batches, clipped together over all
    parameter groups, AdamW, then one EMA update of the target encoder. A step whose loss or
    gradient is not finite is skipped and counted; more than `nonfinite_patience` in a row stop
    the run.
    """

    def __init__(
        self, modules=None, opt_class=None, hparams=None, run_opts=None, checkpointer=None
    ):
        super().__init__(modules, opt_class, hparams, run_opts, checkpointer)
        self.jepa = modules["jepa"]  # as it is, without DDP's or torch.compile's wrapper
        if self.optimizer_step_limit is not None:
            # given on the command line it arrives as text: the option has no type of its own
            self.optimizer_step_limit = int(self.optimizer_step_limit)
        self.world_size = (
            torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        )
        self.process_rank = (
            torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        )
        for precision in (self.precision, self.eval_precision):
            dtype = AMPConfig.from_name(precision).dtype
            choose_backend(self.jepa.context_encoder.attention, torch.device(self.device), dtype)
        self.mask_generator = torch.Generator(self.device)
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
        self.interval = Interval()

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
        self.epoch_counter, self.train_set, self.valid_set = epoch_counter, train_set, valid_set
        self.total_steps = epoch_counter.limit * steps_per_epoch
        if self.optimizer_step_limit is not None:
            self.total_steps = min(self.total_steps, self.optimizer_step_limit)
        logger.info(
            f"{self.total_steps} optimiser steps of {self.global_batch} clips "
            f"({self.hparams.batch_size} x {self.grad_accumulation_factor} accumulated x "
            f"{self.world_size} processes), {steps_per_epoch} an epoch; peak learning rate "
            f"{self.hparams.learning_rate_schedule.peak_rate * self.rate_scale:.3g}"
        )
        super().fit(epoch_counter, train_set, valid_set, **kwargs)

    def on_fit_start(self):
        super().on_fit_start()
        if if_main_process():
            self.metrics.drop_after(self.optimizer_step if self.optimizer_step else -1)
        if self.optimizer_step:
            logger.info(f"Resuming after optimiser step {self.optimizer_step}")
            if self.optimizer_step >= self.total_steps:
                self.epoch_counter.current = self.epoch_counter.limit  # nothing is left to do
        else:
            self._fit_valid(self.valid_set, epoch=0, enable=False)

    def on_stage_start(self, stage, epoch=None):
        self.epoch = epoch
        if stage == sb.Stage.TRAIN:
            # after a resume `step` says how many of this epoch's batches were done
            self.train_set.batch_sampler.set_epoch(epoch, batches_done=self.step)
            if self.step:
                self.interval.resume()
            else:
                self.interval.restart()
        else:
            num_patches = self.jepa.context_encoder.grid.num_patches
            self.target_statistics = PatchStatistics(num_patches)
            self.embedding_statistics = PatchStatistics(num_patches)
            self.embeddings = []  # of the first clips
            self.valid_parts = []

    # One batch

    def draw_masks(self, clips: int, stage) -> PatchMasks:
        """Masks that depend only on seed, process, epoch and batch: a resume draws them again."""
        if stage == sb.Stage.TRAIN:
            key = (self.hparams.seed, self.process_rank, self.epoch, self.step)
        else:
            key = (self.hparams.seed, -1, 0, self.step)  # the same in every validation
        self.mask_generator.manual_seed(hash(key) & (2**63 - 1))
        return self.hparams.masking(clips, device=self.device, generator=self.mask_generator)

    def compute_forward(self, batch, stage):
        """Log-mel, normalisation, masks and the JEPA's forward pass."""
        self._report_skipped(batch)
        batch = batch.to(self.device)
        with torch.no_grad():
            spectrogram = self.modules.features(batch.wav, margins=True)
            spectrogram = self.modules.normalization(spectrogram)
        masks = self.draw_masks(len(batch), stage)
        output = self.modules.jepa(spectrogram, masks)
        if stage != sb.Stage.TRAIN:
            self._collect(spectrogram, masks, output)
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
        if should_step:
            self.optimizers_step()
        self.on_fit_batch_end(batch, output, loss, should_step)
        loss = loss.detach().float().cpu()
        parts = {name: part.item() for name, part in output.parts.items()}
        self.interval.batch_done(len(batch), loss=loss.item(), **parts)
        if should_step and self.optimizer_step % self.hparams.log_interval == 0:
            self._log_interval()
        return loss

    def optimizers_step(self):
        """Schedules, clipping over all groups, the step or its skipping, and the EMA update."""
        progress = (self.optimizer_step, self.total_steps)
        rate = self.hparams.learning_rate_schedule(*progress) * self.rate_scale
        ema_rate = self.hparams.ema_schedule(*progress)
        self.scaler.unscale_(self.optimizer)
        # SpeechBrain clips param_groups[0] alone, which leaves the decayed matrices unclipped
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        limit = self.max_grad_norm if self.max_grad_norm > 0 else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=True).item()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if torch.isfinite(torch.tensor(norm)):
            self.scaler.step(self.optimizer)
            self.jepa.update_target(ema_rate)
            self.nonfinite_streak = 0
        else:
            self._count_nonfinite()
        self.scaler.update()
        self.optimizer_step += 1
        self.interval.stepped(learning_rate=rate, ema_rate=ema_rate, gradient_norm=norm)

    @property
    def rate_scale(self) -> float:
        """What the base learning rate is multiplied with: global batch / 256."""
        return self.global_batch / REFERENCE_BATCH

    def _count_nonfinite(self):
        self.nonfinite_streak += 1
        self.nonfinite_total += 1
        logger.warning(
            f"Step {self.optimizer_step + 1} skipped: its loss or gradient is not finite "
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
        stats["memory_gib"] = peak_memory_gib(self.device)
        stats["nonfinite_steps"] = self.nonfinite_total
        self._log("train", {name: stats.get(name, float("nan")) for name in self.train_columns})

    def _collect(self, spectrogram, masks, output):
        """Targets of this batch and the context encoder's view of whole spectrograms."""
        self.valid_parts.append({name: part.item() for name, part in output.parts.items()})
        targets, index = output.targets, masks.target_index
        if output.target_valid is not None:
            targets, index = targets[output.target_valid], index[output.target_valid]
        self.target_statistics.add(targets, index)
        embeddings = self.jepa.context_encoder(spectrogram).float().cpu()
        clips, num_patches, _ = embeddings.shape
        self.embedding_statistics.add(embeddings, torch.arange(num_patches).expand(clips, -1))
        if sum(map(len, self.embeddings)) * num_patches < MONITORED_PATCHES:
            self.embeddings.append(embeddings)

    def on_stage_end(self, stage, stage_loss, epoch=None):
        if stage == sb.Stage.TRAIN:
            if self.interval.steps:
                self._log_interval()
            return
        content = torch.cat(self.embeddings) - self.embedding_statistics.mean().float()
        monitors = {
            "target_deviation": self.target_statistics.deviation(),
            "embedding_deviation": self.embedding_statistics.deviation(),
            "embedding_rank": effective_rank(content.flatten(0, 1)),
        }
        batches = len(self.valid_parts)
        parts = {name: sum(p[name] for p in self.valid_parts) / batches for name in self.parts}
        self._log("valid", {"loss": float(stage_loss), **monitors, **parts, **self._probe(epoch)})
        first_check = not self.alarm.start
        fallen_values = self.alarm.check(monitors)
        if first_check and self.alarm.blind():
            logger.warning(
                f"The collapse alarm is blind: {' and '.join(self.alarm.blind())}, too low for a "
                f"fall to {self.alarm.share:.0%} of it. There are {len(self.valid_set.dataset)} "
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
        if self.checkpointer is not None and epoch:
            self.checkpointer.save_and_keep_only(
                meta={"valid_loss": float(stage_loss), "epoch": epoch, "step": self.optimizer_step},
                num_to_keep=1,
            )

    def _probe(self, epoch: int | None) -> dict[str, float]:
        """Accuracies of the online probe: before the first step, and every so many epochs."""
        probe = self.online_probe
        if probe is None or not if_main_process() or (epoch or 0) % probe.every:
            return {}
        return probe(self.jepa.context_encoder, self.modules.normalization, self.modules.features)

    # Checkpoints

    def _should_save_intra_epoch_ckpt(self, last_ckpt_time, steps_since_ckpt):
        """Between optimiser steps only: accumulated gradients are not part of a checkpoint."""
        if self.step % self.grad_accumulation_factor:
            return False
        return super()._should_save_intra_epoch_ckpt(last_ckpt_time, steps_since_ckpt)

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
