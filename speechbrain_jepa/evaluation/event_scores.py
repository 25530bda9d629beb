"""Scores of event detection through the field's libraries: sed_eval and sed_scores_eval.

| score | library | settings |
| --- | --- | --- |
| event-based F1 | sed_eval | macro; onsets within 0.2 s, offsets 0.2 s or 20 % of the length |
| best event-based F1 | sed_scores_eval | the same collars, over all thresholds |
| PSDS 1, PSDS 2 | sed_scores_eval | scenarios 1 and 2 of DCASE task 4 |

`pip install '.[events]'`.
"""

import warnings
from collections.abc import Sequence

import numpy as np

from speechbrain_jepa.events import Event

COLLAR = 0.2  # seconds
OFFSET_SHARE = 0.2  # of an event's length, where that is more than the collar
# Ebbers et al., "Threshold-independent evaluation of sound event detection scores", 2022, and DCASE
# 2021 to 2023, task 4
PSDS = {
    "psds1": dict(dtc_threshold=0.7, gtc_threshold=0.7, alpha_st=1.0),
    "psds2": dict(
        dtc_threshold=0.1, gtc_threshold=0.1, cttc_threshold=0.3, alpha_ct=0.5, alpha_st=1.0
    ),
}


class EventScores:
    """Scores of detectors on clips whose events are known.

    Arguments
    ---------
    truth : sequence of sequence of Event
        Of each clip.
    seconds : sequence of float
        Durations of the clips.
    labels : list of str
    step_seconds : float
        Of the scores.

    Raises
    ------
    ImportError
        If the libraries are not installed.

    Example
    -------
    >>> scores = EventScores([[Event(0.0, 1.0, "dog")]], [2.0], ["dog"], step_seconds=0.5)
    >>> scores.event_f1([[Event(0.1, 1.1, "dog")]])
    {'dog': 1.0, 'macro': 1.0}
    >>> scores.psds([np.array([[0.9], [0.8], [0.1], [0.2]])])
    {'psds1': 1.0, 'psds2': 1.0}
    """

    def __init__(
        self,
        truth: Sequence[Sequence[Event]],
        seconds: Sequence[float],
        labels: list[str],
        step_seconds: float,
    ):
        self.names = [f"{number:06d}" for number in range(len(truth))]
        self.truth = dict(zip(self.names, (_joined(events) for events in truth)))
        self.seconds = dict(zip(self.names, map(float, seconds)))
        self.labels = labels
        self.step_seconds = step_seconds

    def event_f1(self, found: Sequence[Sequence[Event]]) -> dict[str, float]:
        """F1 of each label, and "macro", their mean; NaN for a label that is nowhere.

        Arguments
        ---------
        found : sequence of sequence of Event
            What was detected in each clip.
        """
        sed_eval = _import("sed_eval")
        metrics = sed_eval.sound_event.EventBasedMetrics(
            self.labels, t_collar=COLLAR, percentage_of_length=OFFSET_SHARE
        )
        for name, events in zip(self.names, found):
            metrics.evaluate(_dicts(name, self.truth[name]), _dicts(name, events))
        by_label = metrics.results_class_wise_metrics()
        scores = {}
        for label in self.labels:
            there = by_label[label]["count"]["Nref"]
            value = by_label[label]["f_measure"]["f_measure"] if there else np.nan
            # with nothing found at all sed_eval says NaN
            scores[label] = 0.0 if there and np.isnan(value) else float(value)
        return {**scores, "macro": float(np.nanmean(list(scores.values())))}

    def best_event_f1(self, scores: Sequence[np.ndarray]) -> tuple[float, list[float]]:
        """The best macro event-based F1, and the thresholds, one a label, that give it.

        Arguments
        ---------
        scores : sequence of array [T, K]
            Of each clip's steps, filtered.
        """
        library = _import("sed_scores_eval")
        best, _, _, thresholds, _ = library.collar_based.best_fscore(
            self._frames(scores),
            self.truth,
            onset_collar=COLLAR,
            offset_collar=COLLAR,
            offset_collar_rate=OFFSET_SHARE,
        )
        here = {event[2] for events in self.truth.values() for event in events}
        macro = float(np.mean([best[label] for label in self.labels if label in here]))
        # no threshold finds anything: one that no score passes
        return macro, [float(min(thresholds[label], 1.0)) for label in self.labels]

    def psds(self, scores: Sequence[np.ndarray]) -> dict[str, float]:
        """Polyphonic sound detection scores of both scenarios, from 0 to 1.

        Arguments
        ---------
        scores : sequence of array [T, K]
        """
        library = _import("sed_scores_eval")
        frames = self._frames(scores)
        found = {}
        for name, settings in PSDS.items():
            settings = dict(settings)
            if len(self.labels) == 1:  # no other label to take it for
                settings.pop("alpha_ct", None), settings.pop("cttc_threshold", None)
            value = library.intersection_based.psds(frames, self.truth, self.seconds, **settings)
            found[name] = float(value[0])
        return found

    def _frames(self, scores: Sequence[np.ndarray]) -> dict:
        _import("sed_scores_eval")
        from sed_scores_eval.base_modules.scores import create_score_dataframe

        frames = {}
        for name, values in zip(self.names, scores):
            times = np.minimum(np.arange(len(values) + 1) * self.step_seconds, self.seconds[name])
            frame = create_score_dataframe(np.asarray(values, np.float64), times, self.labels)
            # in float32 they are copied by the library, which cannot take pandas 3's read-only ones
            frames[name] = frame.astype({label: np.float32 for label in self.labels})
        return frames


def _import(name: str):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # dcase_util's pkg_resources
            return __import__(name)
    except ImportError as error:
        raise ImportError(
            f"event-based F1 and PSDS need {name} ({error}): pip install '.[events]' in a clone of "
            "this repository"
        ) from error


def _joined(events: Sequence[Event]) -> list[tuple[float, float, str]]:
    """Events of one label that overlap, as one: no detector of labels can tell them apart."""
    joined: list[list] = []
    for onset, offset, label in sorted(events, key=lambda event: (event.label, event.onset)):
        if joined and joined[-1][2] == label and onset <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], offset)
        else:
            joined.append([onset, offset, label])
    return sorted((onset, offset, label) for onset, offset, label in joined)


def _dicts(name: str, events) -> list[dict]:
    return [
        {"filename": name, "onset": onset, "offset": offset, "event_label": label}
        for onset, offset, label in events
    ]
