"""A pretrained folder behind transformers' AutoConfig and AutoModel.

    import speechbrain_jepa.huggingface
    model = AutoModel.from_pretrained("my_encoder")

Importing this module registers the two classes below; SpeechBrain's WeightedSSLModel (learnt
weights over the layers) loads its encoder through them too. Weights and config are read by
`speechbrain_jepa.checkpoints`: no code of a folder is run. Needs transformers.
"""

import tempfile

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from speechbrain_jepa.checkpoints import find_folder
from speechbrain_jepa.config import MODEL_TYPE, log_mel_of
from speechbrain_jepa.encoder import AudioJEPA
from speechbrain_jepa.push import push
from speechbrain_jepa.read_out import pooled, side_by_side, step_statistics
from speechbrain_jepa.untrusted import checked_encoder, checked_normalization
from speechbrain_jepa.vit import Encoder

HUB_OPTIONS = ("revision", "token", "force_download", "local_files_only")
# what AutoModel adds on its own, and what says what holds here anyway
WITHOUT_EFFECT = frozenset(
    (
        "_from_auto",
        "_commit_hash",
        "adapter_kwargs",
        "code_revision",
        "proxies",
        "use_safetensors",
        "low_cpu_mem_usage",
        "output_hidden_states",
        "return_dict",
    )
)


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
    """An `AudioJEPA` with the inputs and outputs of a transformers audio encoder.

    Arguments
    ---------
    config : AudioJEPAConfig
    encoder : AudioJEPA or None
        Default None: untrained, of the shape that the config says (`AutoModel.from_config`).

    Example
    -------
    >>> from transformers import AutoModel
    >>> from speechbrain_jepa.checkpoints import packaged_encoders
    >>> model = AutoModel.from_pretrained(packaged_encoders()["tiny"])
    >>> out = model(torch.randn(2, 16_000))
    >>> out.last_hidden_state.shape, out.pooler_output.shape
    (torch.Size([2, 13, 768]), torch.Size([2, 10752]))
    """

    config_class = AudioJEPAConfig
    base_model_prefix = "encoder"
    main_input_name = "input_values"

    def __init__(self, config: AudioJEPAConfig, encoder: AudioJEPA | None = None):
        super().__init__(config)
        if encoder is None:
            grid, sizes = checked_encoder(config.encoder)
            pair = checked_normalization(config.normalization)
            log_mel = log_mel_of({"features": config.features})
            encoder = AudioJEPA((Encoder(grid, **sizes), pair, log_mel), freeze=False)
        self.encoder = encoder

    @classmethod
    def from_pretrained(  # type: ignore[override]  # no argument of pickled weights
        cls, source, *, config=None, cache_dir=None, dtype=None, torch_dtype=None, **options
    ) -> "AudioJEPAModel":
        """Load a folder or Hugging Face repo with `speechbrain_jepa.checkpoints`, not by pickle.

        Arguments
        ---------
        source : str or Path
            What `AudioJEPA` takes.
        config : AudioJEPAConfig or None
            Default: the folder's.
        cache_dir : str or Path or None
            Where a repo is cached. Default: huggingface_hub's own cache.
        dtype, torch_dtype : str, torch.dtype or None
            "auto" or float32, the only one: for another use torch.autocast.
        **options
            revision, token, force_download and local_files_only of a repo; others are for
            `AudioJEPA`: step_seconds, normalization, flat, freeze_layers, ... freeze is False
            unless it is given.

        Returns
        -------
        AudioJEPAModel
            In eval mode.

        Raises
        ------
        FileNotFoundError, TypeError, ValueError
            If the encoder cannot be loaded, or there is no such option or it does not fit.
        """
        for name in (dtype, torch_dtype):
            if name not in (None, "auto", "float32", torch.float32):
                raise ValueError(
                    f"dtype={name}: weights are kept in float32, and log-mel needs it; for half "
                    "precision call the model under torch.autocast(device, torch.bfloat16)"
                )
        if options.pop("output_all_hiddens", False):
            raise ValueError("output_all_hiddens: transformers' name is output_hidden_states")
        if options.pop("subfolder", ""):
            raise ValueError("subfolder: a pretrained folder has none, give its own path or repo")
        hub = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
        options = {name: value for name, value in options.items() if name not in WITHOUT_EFFECT}
        folder = find_folder(source, cache_dir, **hub)
        encoder = AudioJEPA(folder, **{"freeze": False, **options})
        return cls(config or AudioJEPAConfig(**encoder.description), encoder).eval()

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        wav_lens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple:
        """
        Arguments
        ---------
        input_values : Tensor [B, samples], floating
            Mono, 16 kHz, -1 to 1; not scaled to unit variance.
        attention_mask : Tensor [B, samples] or None
            1 for a clip's samples, then 0, as transformers' feature extractors give it.
        wav_lens : Tensor [B] or None
            In its place: lengths over that of the batch, as in SpeechBrain.
        output_hidden_states : bool or None
            Default: what the config says.
        return_dict : bool or None
            False: a tuple of what is there.

        Returns
        -------
        BaseModelOutputWithPooling
            last_hidden_state [B, T, C], zeros past a clip's own time steps, and pooler_output, as
            `AudioJEPA.forward` and `embed` give them; hidden_states, 1 + depth of [B, T, C].

        Raises
        ------
        ValueError
            If a clip or a mask does not fit (see `AudioJEPA.forward`).
        """
        if attention_mask is not None:
            if wav_lens is not None:
                raise ValueError("attention_mask and wav_lens say the same: give one of them")
            wav_lens = _relative_lengths(input_values, attention_mask)
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        encoder, samples = self.encoder, input_values.shape[1]
        wanted = sorted({*encoder.step_layers, *encoder.embed_layers})
        if output_hidden_states:
            wanted = list(range(encoder.num_layers))
        layers = self._layers(wanted, input_values, wav_lens)
        lengths = torch.full((layers.shape[1],), float(samples), dtype=torch.float64)
        if wav_lens is not None:
            lengths = (wav_lens.detach().cpu().double() * samples).round()
        own = torch.arange(layers.shape[2]) < encoder.num_steps(lengths.long())[:, None]
        read = torch.stack([layers[wanted.index(number)] for number in encoder.embed_layers])
        statistics = step_statistics(read, own.to(layers.device))
        steps = torch.stack([layers[wanted.index(number)] for number in encoder.step_layers])
        output = BaseModelOutputWithPooling(
            last_hidden_state=side_by_side(steps),
            pooler_output=side_by_side(encoder.read_out.joined(*pooled(statistics))),
            hidden_states=tuple(layers) if output_hidden_states else None,
        )
        return output.to_tuple() if return_dict is False else output

    def _layers(self, numbers: list[int], wav: Tensor, wav_lens: Tensor | None) -> Tensor:
        """The outputs of some layers one by one, [R, B, T, C]."""
        encoder = self.encoder
        chosen = encoder.step_layers
        try:
            encoder.step_layers, encoder.output_all_hiddens = numbers, True
            return encoder(wav, wav_lens)
        finally:
            encoder.step_layers, encoder.output_all_hiddens = chosen, False

    def save_pretrained(self, save_directory, **options) -> None:  # type: ignore[override]
        """Write a pretrained folder, which everything here loads.

        Arguments
        ---------
        save_directory : str or Path
            New, empty, or a pretrained folder, which is replaced.
        **options
            Of transformers' method: without effect, but push_to_hub=True is an error.
        """
        if options.get("push_to_hub"):
            raise ValueError("push_to_hub=True: call push_to_hub(repo), which names the licence")
        self.encoder.save_pretrained(save_directory)

    def push_to_hub(self, repo_id: str, license: str | None = None, **options) -> str:  # type: ignore[override]
        """Publish it as a pretrained folder (`speechbrain_jepa.push.push`).

        Arguments
        ---------
        repo_id, license, **options
            See `push`.

        Returns
        -------
        str
            The commit's address.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push(folder, repo_id, license, **options)


def _relative_lengths(wav: Tensor, mask: Tensor) -> Tensor:
    if mask.shape != wav.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, input_values {tuple(wav.shape)}"
        )
    own = mask.bool().cpu()
    lengths = own.sum(1)
    beginning = torch.arange(own.shape[1]) < lengths[:, None]
    if not torch.equal(own, beginning):
        clip = int((own != beginning).any(1).nonzero()[0])
        raise ValueError(
            f"attention_mask of clip {clip} is not ones and then zeros: pad clips at their end"
        )
    return lengths.double() / own.shape[1]


def register() -> None:
    """Let AutoConfig and AutoModel know pretrained folders; importing this module does it."""
    AutoConfig.register(MODEL_TYPE, AudioJEPAConfig, exist_ok=True)
    AutoModel.register(AudioJEPAConfig, AudioJEPAModel, exist_ok=True)


register()
