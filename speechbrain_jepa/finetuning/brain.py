"""The fine-tuning loop as a SpeechBrain Brain.

Nothing random is kept as state: order and crops follow from (seed, epoch), augmentation, patch
dropping and dropout from (seed, process, epoch, batch). So a resumed run draws what the killed one
would have drawn.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import speechbrain as sb
import torch
import torch.nn.functional as F
from speechbrain.utils.distributed import if_main_process
from speechbrain.utils.logger import get_logger
from torch import Tensor

from speechbrain_jepa.classifier import AudioClassifier, Logits
from speechbrain_jepa.finetuning.data import LabelledBatch
from speechbrain_jepa.finetuning.optimizer import layerwise_groups

logger = get_logger(__name__)


class FinetuningBrain(sb.Brain):
    """Trains an `AudioClassifier` of clips.

    Modules: `classifier`. Loaders are those of `speechbrain_jepa.finetuning.data.make_loader`.

    hparams read here: `learning_rate_schedule` (callable of step and total steps), `layer_decay`,
    `mixup` (see `speechbrain_jepa.finetuning.augment`), `label_smoothing`, `seed`, `train_logger`,
    `skipped_files` (or None: told of files that cannot be read). Run options are SpeechBrain's own.

    The loss is cross-entropy, or with `multilabel` binary cross-entropy, the mean over clips and
    labels. The score is the accuracy, or the mean average precision. The checkpoint with the best
    validation score and the newest are kept.
    """

    score_name = "score"

    def __init__(
        self, modules=None, opt_class=None, hparams=None, run_opts=None, checkpointer=None
    ):
        super().__init__(modules, opt_class, hparams, run_opts, checkpointer)
        self.classifier: AudioClassifier = modules["classifier"]  # without DDP's wrapper
        dropped = getattr(self.classifier.encoder, "patch_drop", None)
        if dropped is not None and not dropped.whole_steps and self.classifier.pooling != "mean":
            raise ValueError(
                "patch_drop_share: attention pooling and event detection need whole time steps: "
                "patch_drop_steps=True"
            )
        self.score_name = "mAP" if self.classifier.multilabel else "accuracy"
        self.rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        if self.optimizer_step_limit is not None:
            self.optimizer_step_limit = int(self.optimizer_step_limit)  # text on the command line

    # Before the loop

    @classmethod
    def of_recipe(cls, hparams: dict, run_opts: dict, labels, train_files):
        """The brain of a recipe, with a classifier of these labels that its checkpoints hold.

        An encoder whose normalisation has yet to be measured does so on the training files, unless
        there is a checkpoint to go on from.

        Arguments
        ---------
        hparams : dict
            With `classifier` (called with `labels`), `encoder`, `opt_class`, `checkpointer`, and
            what the class reads.
        run_opts : dict
        labels : sequence of str
        train_files : sequence of str or Path
        """
        classifier, checkpointer = hparams["classifier"](labels=labels), hparams["checkpointer"]
        checkpointer.add_recoverable("classifier", classifier)
        modules = {"classifier": classifier}
        brain = cls(modules, hparams["opt_class"], hparams, run_opts, checkpointer)
        if not hparams["encoder"].is_fitted and checkpointer.find_checkpoint() is None:
            hparams["encoder"].fit_normalization(train_files)
        return brain

    def fit(self, epoch_counter, train_set, valid_set=None, **kwargs):
        """SpeechBrain's `fit`; both sets are loaders."""
        steps_per_epoch = len(train_set) // self.grad_accumulation_factor
        if steps_per_epoch == 0:
            raise ValueError(
                f"grad_accumulation_factor={self.grad_accumulation_factor} is more than the "
                f"{len(train_set)} batches of an epoch: use at most {len(train_set)}, a smaller "
                "batch_size, or more passes_per_epoch"
            )
        self.train_set = train_set
        self.total_steps = epoch_counter.limit * steps_per_epoch
        if self.optimizer_step_limit is not None:
            self.total_steps = min(self.total_steps, self.optimizer_step_limit)
        super().fit(epoch_counter, train_set, valid_set, **kwargs)

    def init_optimizers(self):
        """One group of parameters for each learning rate."""
        groups = layerwise_groups(
            self.classifier, self.hparams.layer_decay, not self.remove_vector_weight_decay
        )
        self.optimizer = self.opt_class(groups)
        self.optimizers_dict = {"opt_class": self.optimizer}
        if self.checkpointer is not None:
            self.checkpointer.add_recoverable("optimizer", self.optimizer)

    def on_stage_start(self, stage, epoch=None):
        self.epoch = epoch
        self.collected: list[tuple] = []  # what an evaluation is scored from
        if stage == sb.Stage.TRAIN:
            # after a resume `step` says how many of this epoch's batches were done
            self.train_set.batch_sampler.set_epoch(epoch, batches_done=self.step)

    # One batch

    def on_fit_batch_start(self, batch, should_step):
        """All randomness of a batch follows from its place."""
        key = (self.hparams.seed, self.rank, self.epoch, self.step)
        torch.manual_seed(hash(key) & (2**63 - 1))

    def compute_forward(self, batch: LabelledBatch, stage) -> tuple[Logits, Tensor]:
        """Logits, and the targets they are compared with (mixed ones in training)."""
        if self.hparams.skipped_files is not None:
            self.hparams.skipped_files.report(batch.failures)
        batch = batch.to(self.device)
        wav, wav_lens, targets = batch.wav, batch.wav_lens, batch.targets
        if stage == sb.Stage.TRAIN and self.hparams.mixup.alpha:
            if not targets.is_floating_point():
                targets = F.one_hot(targets, len(self.classifier.labels)).float()
            wav, wav_lens, targets = self.hparams.mixup(wav, wav_lens, targets)
        return self.modules.classifier(wav, wav_lens), targets

    def compute_objectives(self, predictions, batch, stage):
        logits, targets = predictions
        if stage != sb.Stage.TRAIN:
            self.collected.append((batch.rows, logits.clip.float().cpu(), targets.cpu()))
        return self.clip_loss(logits.clip, targets, stage)

    def clip_loss(self, logits: Tensor, targets: Tensor, stage) -> Tensor:
        """Of logits [B, K]; labels are smoothed in training."""
        smoothing = self.hparams.label_smoothing if stage == sb.Stage.TRAIN else 0.0
        if not self.classifier.multilabel:
            return F.cross_entropy(logits, targets, label_smoothing=smoothing)
        targets = targets.float() * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, targets)

    def optimizers_step(self):
        """Schedule, clipping over all groups together, and the step, unless it is not finite."""
        rate = self.hparams.learning_rate_schedule(self.optimizer_step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        self.scaler.unscale_(self.optimizer)
        # SpeechBrain clips param_groups[0] alone
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        limit = self.max_grad_norm if self.max_grad_norm > 0 else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        if norm.isfinite():
            self.scaler.step(self.optimizer)
        else:
            logger.warning(f"Step {self.optimizer_step + 1} skipped: its gradient is not finite")
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer_step += 1
        self.rate = rate

    # Scores

    def predictions(self) -> tuple[list[int], Tensor, Tensor]:
        """Rows, logits [n, ...] and targets of the clips of the last evaluation."""
        rows, logits, targets = zip(*self.collected)
        return [row for part in rows for row in part], torch.cat(logits), torch.cat(targets)

    def score(self) -> float:
        """Accuracy or mean average precision of the last evaluation, from 0 to 1."""
        _, logits, targets = self.predictions()
        if not self.classifier.multilabel:
            return (logits.argmax(1) == targets).double().mean().item()
        from speechbrain_jepa.evaluation.linear_probe.metrics import average_precisions

        return float(np.nanmean(average_precisions(logits, targets)))

    def on_stage_end(self, stage, stage_loss, epoch=None):
        if stage == sb.Stage.TRAIN:
            self.train_loss = float(stage_loss)
            return
        score = self.score()
        stats = {"loss": float(stage_loss), self.score_name: score}
        if stage == sb.Stage.TEST:
            self.test_score = score
            self.hparams.train_logger.log_stats({"best epoch": self.best_epoch}, test_stats=stats)
            return
        self.hparams.train_logger.log_stats(
            {"epoch": epoch, "step": self.optimizer_step, "learning rate": self.rate},
            train_stats={"loss": self.train_loss},
            valid_stats=stats,
        )
        if self.checkpointer is not None:
            self.checkpointer.save_and_keep_only(
                meta={"score": score, "epoch": epoch}, max_keys=["score"], num_to_keep=1
            )

    def on_evaluate_start(self, max_key=None, min_key=None):
        """Take the checkpoint with the best validation score."""
        self.best_epoch = self.best_score = None
        if self.checkpointer is not None:
            found = self.checkpointer.recover_if_possible(max_key=max_key, min_key=min_key)
            if found is not None:
                self.best_epoch, self.best_score = found.meta["epoch"], found.meta["score"]

    def _should_save_intra_epoch_ckpt(self, last_ckpt_time, steps_since_ckpt):
        """Between optimiser steps only: accumulated gradients are not part of a checkpoint."""
        if self.step % self.grad_accumulation_factor:
            return False
        return super()._should_save_intra_epoch_ckpt(last_ckpt_time, steps_since_ckpt)


def write_predictions(path: Path, brain: FinetuningBrain, ids: Sequence[str]) -> None:
    """The test clips with their label and the score of each, as a csv; on the main process."""
    from speechbrain_jepa.data.skipped import csv_line
    from speechbrain_jepa.files import whole_file

    if not if_main_process():
        return
    rows, logits, targets = brain.predictions()
    scores = brain.classifier.scores(logits)
    labels = brain.classifier.labels
    with whole_file(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        file.write(csv_line("file", "target", *labels))
        for row, target, values in zip(rows, targets, scores):
            if target.dim():
                name = ";".join(label for label, hit in zip(labels, target) if hit)
            else:
                name = labels[int(target)]
            file.write(csv_line(ids[row], name, *(f"{value:.5f}" for value in values.tolist())))
