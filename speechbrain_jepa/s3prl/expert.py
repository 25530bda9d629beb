"""The upstream: what s3prl calls an expert."""

from pathlib import Path

import torch
import yaml
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from speechbrain_jepa.encoder import AudioJEPA
from speechbrain_jepa.s3prl.sources import open_source
from speechbrain_jepa.s3prl.tasks import warn_of_coarse_step


class UpstreamExpert(nn.Module):
    """An `AudioJEPA` with s3prl's interface: wavs in, all layers out.

    s3prl decides whether it is trained: without -f it runs under no_grad. Train and eval mode
    compute the same.

    Arguments
    ---------
    ckpt : str or Path
        A pretrained folder, its model.safetensors, an experiment folder, a zip or tar of a
        pretrained folder, or a Hugging Face repo id.
    model_config : str or Path or None
        A yaml file with options of `AudioJEPA`, such as `flat: True`.
    **options
        Of `AudioJEPA`; they go before those of the file.

    Example
    -------
    >>> from speechbrain_jepa.checkpoints import save_pretrained
    >>> from speechbrain_jepa.features import Normalization
    >>> from speechbrain_jepa.vit import Encoder, PatchGrid
    >>> encoder = Encoder(PatchGrid(frames=208), dim=48, depth=2, num_heads=3)
    >>> folder = getfixture("tmp_path") / "tiny"
    >>> upstream = UpstreamExpert(save_pretrained(folder, encoder, Normalization(-7.06, 4.19)))
    >>> features = upstream([torch.randn(48_000), torch.randn(800)])
    >>> len(features["hidden_states"]), features["last_hidden_state"].shape
    (3, torch.Size([2, 19, 240]))
    >>> upstream.get_downsample_rates("hidden_states")
    2560
    """

    def __init__(self, ckpt, model_config=None, **options):
        super().__init__()
        if model_config is not None:
            options = {**_read_options(model_config), **options}
        with open_source(ckpt) as source:
            self.model = AudioJEPA(source, freeze=False, output_all_hiddens=True, **options)
        warn_of_coarse_step(self.model.downsample_rate)

    def get_downsample_rates(self, key: str) -> int:
        """Samples of one time step, the same for every layer."""
        return self.model.downsample_rate

    def forward(self, wavs: list[Tensor]) -> dict:
        """
        Arguments
        ---------
        wavs : list of Tensor [samples], floating
            Mono, 16 kHz.

        Returns
        -------
        dict
            "hidden_states", a list of 1 + depth tensors [B, T, C], and "last_hidden_state", the
            last of them. Time steps past a wav's own are zeros.
        """
        samples = torch.tensor([len(wav) for wav in wavs], dtype=torch.float64)
        wav_lens = samples / samples.max().clamp(min=1)
        hidden_states = list(self.model(pad_sequence(list(wavs), batch_first=True), wav_lens))
        return {"hidden_states": hidden_states, "last_hidden_state": hidden_states[-1]}


def _read_options(path) -> dict:
    options = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(options, dict):
        raise ValueError(
            f"{path}: -g takes a yaml file with options of AudioJEPA, as in flat: True"
        )
    return options
