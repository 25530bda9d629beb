"""X-ARES: its runner loads this module by name.

    SPEECHBRAIN_JEPA_MODEL=<pretrained folder> \\
        python -m xares.run speechbrain_jepa.xares tasks/*.py --max-jobs 0

It takes the one name in here that ends in Encoder, and makes the encoder without arguments.
"""

import os
import re

import torchaudio
from speechbrain.dataio import audio_io
from torch import Tensor

from speechbrain_jepa.encoder import AudioJEPA
from speechbrain_jepa.suites import checkpoint_id, checkpoint_name, parse_options

MODEL = "SPEECHBRAIN_JEPA_MODEL"  # what AudioJEPA takes as source
OPTIONS = "SPEECHBRAIN_JEPA_OPTIONS"  # its options, a JSON object
LONGEST_NAME = 64  # of a checkpoint, in the name of a folder


def supply_decoder() -> None:
    """Let torchaudio read audio through soundfile where its own `load` cannot.

    Since 2.9 that needs torchcodec, and torchcodec FFmpeg. X-ARES drops clips that cannot be
    decoded in silence, and stops with "Empty dataloader" when none is left.
    """
    if hasattr(torchaudio, "list_audio_backends"):  # of 2.8, which reads by itself
        return
    try:
        import torchcodec  # noqa: F401
    except (ImportError, OSError, RuntimeError):  # the last two: it finds no FFmpeg
        torchaudio.load = audio_io.load


supply_decoder()


class AudioJEPAEncoder(AudioJEPA):
    """An `AudioJEPA` as X-ARES wants it; which one, the environment says.

    `SPEECHBRAIN_JEPA_MODEL` is a pretrained folder, an experiment folder, a Hugging Face repo id
    or the name of an encoder that comes with the package, and `SPEECHBRAIN_JEPA_OPTIONS` a JSON
    object of options for `AudioJEPA`: '{"step_seconds": 0.04}'.

    X-ARES keeps embeddings and scores under the name of the class, so every checkpoint is of a
    class of its own.

    Raises
    ------
    FileNotFoundError, ValueError
        If the encoder cannot be loaded or an option does not fit (see `AudioJEPA`).

    Example
    -------
    >>> import torch
    >>> encoder = AudioJEPAEncoder()
    >>> steps = encoder(torch.randn(2, 50_000))
    >>> steps.shape == (2, 40, encoder.output_dim), encoder.hop_size_in_ms
    (True, 80.0)
    """

    def __init__(self):
        source = os.environ.get(MODEL) or None
        super().__init__(source, **parse_options(os.environ.get(OPTIONS)))
        name = re.sub(r"\W", "_", checkpoint_name(source), flags=re.ASCII)[:LONGEST_NAME]
        name = f"{name}_{checkpoint_id(self)}_Encoder"
        self.__class__ = type(name, (AudioJEPAEncoder,), {})

    @property
    def sampling_rate(self) -> int:
        """Of the waveforms, in Hz."""
        return self.sample_rate

    @property
    def output_dim(self) -> int:
        """C: F * D, or D with `flat`."""
        return self.get_output_dim()

    @property
    def hop_size_in_ms(self) -> float:
        """Duration of a time step."""
        return 1000 * self.downsample_rate / self.sample_rate

    def forward(self, wav: Tensor) -> Tensor:  # type: ignore[override]  # as X-ARES calls it
        """Waveforms [B, samples], which X-ARES pads with zeros, to [B, T, C], float32."""
        return super().forward(wav).float()
