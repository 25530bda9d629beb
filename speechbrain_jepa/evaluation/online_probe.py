"""A linear probe of a small labelled set while pretraining goes on."""

from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from speechbrain_jepa.encoder import AudioJEPA
from speechbrain_jepa.evaluation.quick_probe import (
    embed_files,
    files_used,
    probe_table,
    read_label_sets,
)
from speechbrain_jepa.features import LogMelSpectrogram, Normalization
from speechbrain_jepa.read_out import ReadOut
from speechbrain_jepa.vit import Encoder


def embed_with(encoder: AudioJEPA):
    """Waveforms to clip embeddings: what `embed_files` calls.

    Arguments
    ---------
    encoder : AudioJEPA

    Returns
    -------
    callable
        list of n arrays [samples] to an array [n, C].
    """

    @torch.inference_mode()
    def embed(wavs: list[np.ndarray]) -> np.ndarray:
        device = encoder.normalization.mean.device
        lengths = torch.tensor([len(wav) for wav in wavs], dtype=torch.float64)
        padded = pad_sequence([torch.from_numpy(wav) for wav in wavs], batch_first=True)
        return encoder.embed(padded.to(device), lengths / lengths.max()).cpu().numpy()

    return embed


class OnlineProbe:
    """Test accuracies of a logistic regression on the frozen context encoder, as it is.

    Arguments
    ---------
    csv : str or Path
        With the columns file (relative to the csv's folder), split (train, valid or test) and
        label, or a column for each of several label sets.
    every : int
        Epochs from one probe to the next. Default 1.
    read_out : ReadOut or None
        What is probed. Default None: the mean of the last layer.

    Raises
    ------
    FileNotFoundError, ValueError
        If the csv is not there or does not fit (see `read_label_sets`), or `every` is below 1.
    """

    def __init__(self, csv: str | Path, every: int = 1, read_out: ReadOut | None = None):
        if every < 1:
            raise ValueError(f"online_probe_every={every}: must be at least 1 epoch")
        self.every = every
        self.read_out = read_out or ReadOut()
        self.label_sets = read_label_sets(csv)

    @property
    def columns(self) -> list[str]:
        """Names of what a probe gives."""
        return [f"{name}_accuracy" for name in self.label_sets]

    def __call__(
        self,
        encoder: Encoder,
        normalization: Normalization,
        log_mel: LogMelSpectrogram | None = None,
    ) -> dict[str, float]:
        """Embed the labelled files and probe.

        Arguments
        ---------
        encoder, normalization, log_mel
            The three in memory, as `AudioJEPA` takes them.

        Returns
        -------
        dict
            Per cent by column.
        """
        files = files_used(self.label_sets)
        source = (encoder, normalization, log_mel or LogMelSpectrogram())
        model = AudioJEPA(source, **self.read_out.describe())
        embedder = embed_with(model)
        features, read = embed_files(files, {"encoder": [embedder]})
        accuracy = probe_table(features, read, self.label_sets).accuracy.iloc[0]
        return dict(zip(self.columns, accuracy.tolist()))
