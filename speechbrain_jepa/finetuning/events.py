"""The fine-tuning loop for events in time: scores of time steps, pooled ones of clips."""

import numpy as np
import speechbrain as sb
import torch
import torch.nn.functional as F

from speechbrain_jepa.classifier import Decoding
from speechbrain_jepa.evaluation.event_scores import EventScores
from speechbrain_jepa.events import Event, decode, median_filter
from speechbrain_jepa.features import SAMPLE_RATE
from speechbrain_jepa.finetuning.brain import FinetuningBrain


class EventBrain(FinetuningBrain):
    """Trains an `AudioClassifier` of time steps.

    hparams beside those of `FinetuningBrain`: `median_seconds`, `clip_loss_weight`, `events` (dict
    of lists of lists of `Event`: of the clips of "valid" and "test").

    The loss is binary cross-entropy, the mean over steps and labels. With attention pooling that
    of the clip, whose targets are the labels in it, is added with `clip_loss_weight`. The
    score is the macro event-based F1 with the best threshold for each label; the thresholds that
    validation gives are those of the test.
    """

    def __init__(
        self, modules=None, opt_class=None, hparams=None, run_opts=None, checkpointer=None
    ):
        super().__init__(modules, opt_class, hparams, run_opts, checkpointer)
        self.score_name = "event F1"

    def compute_objectives(self, predictions, batch, stage):
        logits, targets = predictions
        if stage != sb.Stage.TRAIN:
            self._collect(logits, batch)
        smoothing = self.hparams.label_smoothing if stage == sb.Stage.TRAIN else 0.0
        smooth = targets * (1 - smoothing) + smoothing / 2
        present = logits.present
        loss = F.binary_cross_entropy_with_logits(logits.steps[present], smooth[present])
        if logits.clip is not None and self.hparams.clip_loss_weight:
            clip_loss = self.clip_loss(logits.clip, targets.amax(1), stage)
            loss = loss + self.hparams.clip_loss_weight * clip_loss
        return loss

    def _collect(self, logits, batch):
        """Scores of each clip's own steps, filtered."""
        samples = (batch.wav_lens * batch.wav.shape[1]).round().long()
        steps = self.classifier.encoder.num_steps(samples).tolist()
        scores = self.classifier.scores(logits.steps).float().cpu().numpy()
        step_seconds = self.classifier.encoder.step_seconds
        for row, count, length, values in zip(batch.rows, steps, samples.tolist(), scores):
            filtered = median_filter(values[:count], self.hparams.median_seconds, step_seconds)
            self.collected.append((row, length / SAMPLE_RATE, filtered))

    def scored(self, split: str) -> tuple[EventScores, list[np.ndarray]]:
        """What judges the last evaluation, and its scores."""
        rows, seconds, scores = zip(*self.collected)
        truth = [self.hparams.events[split][row] for row in rows]
        labels, step = self.classifier.labels, self.classifier.encoder.step_seconds
        return EventScores(truth, seconds, labels, step), list(scores)

    def detected(self, thresholds: list[float]) -> list[list[Event]]:
        """The events of the last evaluation's clips."""
        decoding = Decoding(thresholds)  # the scores are filtered
        step = self.classifier.encoder.step_seconds
        return [
            decode(scores, self.classifier.labels, step, decoding, seconds)
            for _, seconds, scores in self.collected
        ]

    def score(self) -> float:
        """The macro event-based F1 of the last evaluation with its best thresholds."""
        judge, scores = self.scored("valid")
        best, self.thresholds = judge.best_event_f1(scores)
        return best

    def tune(self, valid_set) -> None:
        """Find thresholds on the validation clips with the checkpoint that is loaded."""
        checkpointer = self.checkpointer  # type: ignore[has-type]  # SpeechBrain's
        self.checkpointer = None
        self.on_stage_start(sb.Stage.VALID)
        self.modules.eval()
        with torch.no_grad():
            for batch in valid_set:
                self.evaluate_batch(batch, stage=sb.Stage.VALID)
        self.score()
        self.classifier.decoding = Decoding(self.thresholds, self.hparams.median_seconds)
        self.checkpointer = checkpointer

    def on_stage_end(self, stage, stage_loss, epoch=None):
        if stage != sb.Stage.TEST:
            super().on_stage_end(stage, stage_loss, epoch)
            return
        judge, scores = self.scored("test")
        by_label = judge.event_f1(self.detected(self.classifier.decoding.thresholds))
        self.test_scores = {"event_f1": by_label.pop("macro"), **judge.psds(scores)}
        self.test_scores["event_f1_of"] = by_label
        shown = {name: value for name, value in self.test_scores.items() if value is not by_label}
        self.hparams.train_logger.log_stats(
            {"best epoch": self.best_epoch}, test_stats={"loss": float(stage_loss), **shown}
        )
