"""What the hyperparams.yaml of a pretrained folder builds for SpeechBrain's WaveformEncoder."""

from pathlib import Path

import torch
from speechbrain.utils.fetching import FetchConfig, LocalStrategy, fetch
from speechbrain.utils.parameter_transfer import Pretrainer
from torch import Tensor, nn

from speechbrain_jepa.checkpoints import WEIGHTS
from speechbrain_jepa.config import CONFIG
from speechbrain_jepa.encoder import AudioJEPA


class NamedTensor(Tensor):
    """A tensor that also answers to ["embeddings"].

    `WaveformEncoder.encode_batch` gives the encoder's output as it is, a tensor by its
    documentation; `encode_file` looks up ["embeddings"] in it. Every operation on it gives a plain
    tensor.

    Example
    -------
    >>> import torch
    >>> named = torch.zeros(1, 7, 240).as_subclass(NamedTensor)
    >>> named["embeddings"].shape, type(named + 1)
    (torch.Size([1, 7, 240]), <class 'torch.Tensor'>)
    """

    # torch's own way to have operations give plain tensors; its stubs expect a method
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __getitem__(self, key):
        return self.as_subclass(Tensor) if key == "embeddings" else super().__getitem__(key)


class PretrainedAudioJEPA(nn.Module):
    """An `AudioJEPA` whose folder is known only when SpeechBrain's from_hparams has fetched it.

    Arguments
    ---------
    clip_level : bool
        Give one embedding per clip [B, C] instead of one per time step [B, T, C]. Default False.
    **options
        For `AudioJEPA`.
    """

    def __init__(self, clip_level: bool = False, **options):
        super().__init__()
        self.clip_level = clip_level
        self.options = options
        self.model: AudioJEPA | None = None

    def load(self, folder) -> None:
        """Load the encoder from a pretrained folder; from then on it is `self.model`."""
        self.model = AudioJEPA(folder, **self.options)

    def forward(self, wav: Tensor, wav_lens: Tensor | None = None) -> NamedTensor:
        """As `AudioJEPA.forward`, or `AudioJEPA.embed` with `clip_level`."""
        if self.model is None:
            raise RuntimeError(
                "no encoder has been loaded: call load(folder), as from_hparams does"
            )
        encode = self.model.embed if self.clip_level else self.model
        return encode(wav, wav_lens).as_subclass(NamedTensor)


class FolderPretrainer(Pretrainer):
    """SpeechBrain's Pretrainer for loadables that are read from a whole pretrained folder.

    Arguments
    ---------
    loadables : dict of str: module
        Each with `load(folder)`.
    """

    def collect_files(
        self,
        default_source=None,
        local_strategy=LocalStrategy.SYMLINK,
        fetch_config: FetchConfig | None = None,
    ):
        """Fetch config.json and model.safetensors, through SpeechBrain's own cache."""
        paths = {
            name: fetch(
                name,
                default_source,
                savedir=self.collect_in,
                local_strategy=local_strategy,
                fetch_config=fetch_config or FetchConfig(),
            )
            for name in (CONFIG, WEIGHTS)
        }
        self.folder = Path(paths[CONFIG]).parent
        return paths

    def load_collected(self):
        """Load them."""
        for loadable in self.loadables.values():
            loadable.load(self.folder)
