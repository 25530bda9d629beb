"""The HEAR 2021 API: `heareval` and its kin load this module by name.

    hear-validator speechbrain_jepa.hear --model <pretrained folder>

HEAR's path of a model is whatever `AudioJEPA` takes as source: a pretrained folder, an experiment
folder or a Hugging Face repo id.
"""

from torch import Tensor

from speechbrain_jepa.encoder import AudioJEPA


class HearModel(AudioJEPA):
    """An `AudioJEPA` with the attributes that HEAR asks of a model; `sample_rate` it has."""

    @property
    def scene_embedding_size(self) -> int:
        return self.embedding_dim

    @property
    def timestamp_embedding_size(self) -> int:
        return self.get_output_dim()


def load_model(model_file_path: str = "", **options) -> HearModel:
    """Load an encoder.

    Arguments
    ---------
    model_file_path : str
        A pretrained folder, an experiment folder or a Hugging Face repo id. Default: the encoder
        that comes with the package.
    **options
        For `AudioJEPA`: layers, pooling, step_seconds, flat, normalization, ...

    Returns
    -------
    HearModel

    Raises
    ------
    FileNotFoundError
        If there is no such folder or repo.
    ValueError
        If an option does not fit.

    Example
    -------
    >>> import torch
    >>> from speechbrain_jepa.checkpoints import save_pretrained
    >>> from speechbrain_jepa.features import Normalization
    >>> from speechbrain_jepa.vit import Encoder, PatchGrid
    >>> encoder = Encoder(PatchGrid(frames=208), dim=48, depth=2, num_heads=3)
    >>> model = load_model(
    ...     save_pretrained(getfixture("tmp_path") / "tiny", encoder, Normalization(-7.06, 4.19))
    ... )
    >>> audio = torch.randn(3, 2 * model.sample_rate).clamp(-1, 1)
    >>> get_scene_embeddings(audio, model).shape
    torch.Size([3, 240])
    >>> embeddings, timestamps = get_timestamp_embeddings(audio, model)
    >>> embeddings.shape, timestamps[0, :3]
    (torch.Size([3, 13, 240]), tensor([ 75., 235., 395.]))
    """
    if options.get("output_all_hiddens"):
        raise ValueError("output_all_hiddens=True: HEAR takes the embeddings of one layer only")
    return HearModel(model_file_path if str(model_file_path) else None, **options)


def get_scene_embeddings(audio: Tensor, model: HearModel) -> Tensor:
    """One embedding a sound, read out as the model's folder or its options say.

    Arguments
    ---------
    audio : Tensor [n_sounds, n_samples]
        Mono, from -1 to 1, at `model.sample_rate`, on the model's device.
    model : HearModel

    Returns
    -------
    Tensor [n_sounds, scene_embedding_size], float32
    """
    return model.embed(audio)


def get_timestamp_embeddings(audio: Tensor, model: HearModel) -> tuple[Tensor, Tensor]:
    """One embedding a time step.

    Arguments
    ---------
    audio, model
        As in `get_scene_embeddings`.

    Returns
    -------
    embeddings : Tensor [n_sounds, n_timestamps, timestamp_embedding_size], float32
    timestamps : Tensor [n_sounds, n_timestamps], float32
        The centres of the time patches, in milliseconds.
    """
    embeddings = model(audio).float()
    # the centres are whole milliseconds: rounding removes the float32 error of the seconds
    milliseconds = (model.timestamps(embeddings.shape[1]) * 1000).round()
    return embeddings, milliseconds.to(embeddings.device).expand(len(embeddings), -1)
