"""A pretrained folder behind transformers' AutoConfig and AutoModel, once `register` is called.

SpeechBrain's WeightedSSLModel (learnt weights over the layers) loads its encoder through these two.
Needs transformers, as that module does.
"""

from torch import Tensor
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from speechbrain_jepa.config import MODEL_TYPE
from speechbrain_jepa.encoder import AudioJEPA


class AudioJEPAConfig(PretrainedConfig):
    """config.json of a pretrained folder, as transformers reads it."""

    model_type = MODEL_TYPE

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the transformer."""
        return self.encoder["depth"]

    @property
    def hidden_size(self) -> int:
        """C: dims of a time step, F * D."""
        grid = self.encoder["grid"]
        return self.encoder["dim"] * grid["bands"] // grid["patch_frequency"]


class AudioJEPAModel(PreTrainedModel):
    """An `AudioJEPA` with the outputs of a transformers encoder.

    Use `AutoModel.from_pretrained(folder)` after `register()`.
    """

    config_class = AudioJEPAConfig

    def __init__(self, config: AudioJEPAConfig, encoder: AudioJEPA):
        super().__init__(config)
        self.encoder = encoder

    @classmethod
    def from_pretrained(  # type: ignore[override]  # no argument of pickled weights
        cls, source, *, config=None, cache_dir=None, **ignored
    ) -> "AudioJEPAModel":
        """Load a folder or Hugging Face repo with `speechbrain_jepa.checkpoints`, not by pickle."""
        encoder = AudioJEPA(source, save_path=cache_dir, freeze=False, output_all_hiddens=True)
        return cls(config or AudioJEPAConfig(**encoder.description), encoder).eval()

    def forward(self, input_values: Tensor, wav_lens: Tensor | None = None) -> BaseModelOutput:
        """
        Arguments
        ---------
        input_values, wav_lens
            As in `AudioJEPA.forward`.

        Returns
        -------
        BaseModelOutput
            last_hidden_state [B, T, C], and hidden_states, 1 + depth of them.
        """
        layers = self.encoder(input_values, wav_lens)
        return BaseModelOutput(last_hidden_state=layers[-1], hidden_states=tuple(layers))


def register() -> None:
    """Let AutoConfig and AutoModel know pretrained folders; a second call does nothing."""
    AutoConfig.register(MODEL_TYPE, AudioJEPAConfig, exist_ok=True)
    AutoModel.register(AudioJEPAConfig, AudioJEPAModel, exist_ok=True)
