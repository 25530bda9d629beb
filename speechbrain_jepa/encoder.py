"""AudioJEPA: waveforms in, embeddings out, in place of SpeechBrain's Wav2Vec2.

Shapes: B clips, K shifts, W windows of all of them, F frequency and T time patches, D dims,
L = 1 + depth layers, R of them read; C = F * D dims of a time step in one layer, or D with `flat`.

A clip of n samples has T = ceil(n / downsample_rate) time steps. It is cut into windows of the
training length (`speechbrain_jepa.windows`), each encoded on its own, so that nothing of its
output depends on the batch. With `step_seconds` K shifted copies of it are, and their time steps
interleaved.
"""

import copy
import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from speechbrain_jepa.attention import check_attention
from speechbrain_jepa.checkpoints import load_pretrained, save_pretrained
from speechbrain_jepa.config import log_mel_of
from speechbrain_jepa.features import HOP_LENGTH, SAMPLE_RATE, LogMelSpectrogram
from speechbrain_jepa.read_out import (
    ReadOut,
    normalized,
    normalized_steps,
    pooled,
    side_by_side,
    step_statistics,
)
from speechbrain_jepa.windows import (
    WindowBatch,
    Windows,
    count_shifts,
    cut_into_windows,
    lead_frames,
)

NORMALIZATIONS = ("pretraining", "dataset", "instance")
INSTANCE_STD_FLOOR = 1e-5  # for clips of constant sound
# arguments of SpeechBrain's Hugging Face interfaces that mean nothing here
IGNORED = frozenset(
    (
        "for_pretraining",
        "with_lm_head",
        "with_casual_lm",
        "seq2seqlm",
        "quantization_config",
        "cache_dir",
        "trust_remote_code",
    )
)


class AudioJEPA(nn.Module):
    """A pretrained encoder for waveforms, with the constructor of SpeechBrain's Wav2Vec2.

    A recipe that has `!new:speechbrain.integrations.huggingface.wav2vec2.Wav2Vec2` takes
    `!new:speechbrain_jepa.AudioJEPA` in its place (docs/speechbrain.md).

    Arguments
    ---------
    source : str, Path, None, or (Encoder, Normalization[, LogMelSpectrogram])
        A pretrained folder, an experiment folder with checkpoints, a Hugging Face repo id, the
        name of an encoder that comes with the package, or its parts in memory, which are copied.
        Default None: the package's "tiny".
    save_path : str or Path or None
        Where a Hugging Face repo is cached. Default: huggingface_hub's own cache.
    output_norm : bool
        Normalise each clip's output over its own time steps and features. Default False.
    freeze : bool
        No gradients, always in eval mode. Default True.
    freeze_feature_extractor : bool
        With freeze=False: keep the patch embedding (and class token) as it is. Default False.
    apply_spec_augment : bool
        Accepted, has no effect: augment the waveform. Default False.
    output_all_hiddens : bool
        Give what enters the first layer and leaves each, one by one. Default False.
    layers : str or sequence of int, or None
        Whose outputs are read, side by side (see `ReadOut`): "last", "all", or numbers from 0, the
        patch embedding. Default None: for `forward` the last; for `embed` what the folder's
        config.json says, else the last.
    pooling : str or None
        Of a clip's time steps in `embed`: "mean", or "mean_std", their deviation beside it. Default
        None: what config.json says, else (and with `output_all_hiddens`) the mean.
    freeze_layers : int
        With freeze=False: keep the patch embedding and so many first layers. Default 0.
    flat : bool
        Average the F frequency patches of a time step instead of concatenating them.
        Default False.
    normalization : str
        "pretraining" (default): the pair stored with the encoder. "dataset": a pair that
        `fit_normalization` measures once, kept in the state dict; the paper's evaluation does
        this. "instance": each clip's own.
    max_windows_per_batch : int
        Windows that go through the encoder at once: bounds the memory for long audio.
        Default 128.
    gradient_checkpointing : bool
        Compute each layer again in the backward pass instead of keeping what is inside it.
        Default False.
    attention : str
        "auto", "flash_attn" or "sdpa" (see `speechbrain_jepa.attention`). Default "auto".
    step_seconds : float or None
        Duration of a time step, for finer ones than the encoder was trained with: that of a time
        patch over K, in whole frames, so 0.16, 0.08, 0.04, 0.02 or 0.01 with patches of 16. The
        encoder sees the clip K times, at K times the compute (docs/embeddings.md). Default None:
        a time patch.
    device : str or torch.device or None
        Where to put the module. Default: where the encoder is, for one from disk the CPU.
    **ignored
        for_pretraining, with_lm_head, with_casual_lm, seq2seqlm, quantization_config, cache_dir
        and trust_remote_code are accepted and have no effect.

    Raises
    ------
    FileNotFoundError, ValueError
        If the encoder cannot be loaded (see `load_pretrained`) or an option does not fit.

    Example
    -------
    >>> from speechbrain_jepa.features import Normalization
    >>> from speechbrain_jepa.vit import Encoder, PatchGrid
    >>> encoder = Encoder(PatchGrid(frames=208), dim=48, depth=2, num_heads=3)
    >>> model = AudioJEPA((encoder, Normalization(-7.06, 4.19)))
    >>> wav, wav_lens = torch.randn(2, 48_000), torch.tensor([1.0, 0.5])
    >>> model(wav, wav_lens).shape  # 48000 / 2560 rounded up, 5 * 48
    torch.Size([2, 19, 240])
    >>> model.embed(wav, wav_lens).shape
    torch.Size([2, 240])
    >>> model = AudioJEPA((encoder, Normalization(-7.06, 4.19)), layers="all", pooling="mean_std")
    >>> model.embed(wav, wav_lens).shape  # 3 layers, mean and deviation
    torch.Size([2, 1440])
    >>> model = AudioJEPA((encoder, Normalization(-7.06, 4.19)), step_seconds=0.04)
    >>> model(wav, wav_lens).shape  # 48000 / 640
    torch.Size([2, 75, 240])
    """

    def __init__(
        self,
        source=None,
        save_path=None,
        output_norm=False,
        freeze=True,
        freeze_feature_extractor=False,
        apply_spec_augment=False,
        output_all_hiddens=False,
        *,
        layers=None,
        pooling=None,
        freeze_layers=0,
        flat=False,
        normalization="pretraining",
        max_windows_per_batch=128,
        gradient_checkpointing=False,
        attention="auto",
        step_seconds=None,
        device=None,
        **ignored,
    ):
        super().__init__()
        unknown = ignored.keys() - IGNORED
        if unknown:
            raise TypeError(f"AudioJEPA has no argument {sorted(unknown)[0]!r}")
        if normalization not in NORMALIZATIONS:
            raise ValueError(
                f"normalization={normalization!r}: choose one of {', '.join(NORMALIZATIONS)}"
            )
        if max_windows_per_batch < 1:
            raise ValueError(f"max_windows_per_batch={max_windows_per_batch}: use at least 1")
        if isinstance(source, tuple):
            self.encoder, self.normalization, *log_mel = copy.deepcopy(source)
            self.description = {"training": {}}
            self.features = (*log_mel, LogMelSpectrogram(n_mels=self.encoder.grid.bands))[0]
        else:
            self.encoder, self.normalization, self.description = load_pretrained(source, save_path)
            self.features = log_mel_of(self.description)
        self.num_layers = 1 + len(self.encoder.blocks)  # L: outputs with `output_all_hiddens`
        stored = ReadOut(**self.description.get("embedding", {}))
        self.read_out = stored.chosen(layers, pooling, output_all_hiddens)  # of `embed`
        self.embed_layers = self.read_out.numbers(self.num_layers)
        self.step_layers = (
            ReadOut().chosen(layers, None, output_all_hiddens).numbers(self.num_layers)
        )
        self.shifts = count_shifts(self.encoder.grid, step_seconds)
        self.output_norm = output_norm
        self.output_all_hiddens = output_all_hiddens
        self.flat = flat
        self.normalize = normalization
        self.max_windows_per_batch = max_windows_per_batch
        check_attention(attention)
        self.encoder.attention = attention
        if normalization == "dataset":
            self.normalization.mean.fill_(math.nan)  # until it is fitted, or loaded
        self.freeze = freeze
        self._freeze(freeze_feature_extractor, freeze_layers)
        if gradient_checkpointing:
            for block in self.encoder.blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        self.train()
        self.to(self.encoder.patch_embed.weight.device if device is None else device)

    def _freeze(self, feature_extractor: bool, layers: int) -> None:
        depth = len(self.encoder.blocks)
        if not 0 <= layers <= depth:
            raise ValueError(f"freeze_layers={layers}: this encoder has {depth} layers")
        self.requires_grad_(not self.freeze)
        if self.freeze:
            if layers:
                raise ValueError(
                    f"freeze_layers={layers} with freeze=True, which freezes all: set freeze=False"
                )
            return
        if feature_extractor or layers:
            self.encoder.patch_embed.requires_grad_(False)
            if self.encoder.class_token is not None:
                self.encoder.class_token.requires_grad_(False)
        self.encoder.blocks[:layers].requires_grad_(False)

    def train(self, mode: bool = True) -> "AudioJEPA":
        """A frozen encoder stays in eval mode."""
        return super().train(mode and not self.freeze)

    # What it gives

    @property
    def sample_rate(self) -> int:
        """Of the waveforms, in Hz."""
        return SAMPLE_RATE

    @property
    def downsample_rate(self) -> int:
        """Samples of one time step: patch_time / K * hop."""
        return self.encoder.grid.patch_time // self.shifts * HOP_LENGTH

    @property
    def step_seconds(self) -> float:
        """Duration of one time step."""
        return self.downsample_rate / SAMPLE_RATE

    def get_output_dim(self) -> int:
        """Dims of a time step: R * C, or C with `output_all_hiddens`."""
        return self._dims(self.step_layers)

    @property
    def embedding_dim(self) -> int:
        """Dims of what `embed` gives: as of a time step of what it reads, or twice that."""
        return self._dims(self.embed_layers) * self.read_out.statistics

    def _dims(self, layers: list[int]) -> int:
        patches = 1 if self.flat else self.encoder.grid.frequency_patches
        return self.encoder.dim * patches * (1 if self.output_all_hiddens else len(layers))

    def num_steps(self, samples):
        """T: time steps of a clip of so many samples (int or integer Tensor)."""
        return -(-samples // self.downsample_rate)

    def timestamps(self, num_steps: int) -> Tensor:
        """Where the time steps are.

        Arguments
        ---------
        num_steps : int
            T.

        Returns
        -------
        Tensor [T], float32
            Centre of each step's time patch, the mean of its frames' centres, in seconds.
        """
        grid = self.encoder.grid
        first = (grid.patch_time - 1) / 2 - lead_frames(grid, self.shifts)
        frames = torch.arange(num_steps) * (grid.patch_time // self.shifts) + first
        return frames * (HOP_LENGTH / SAMPLE_RATE)

    def forward(self, wav: Tensor, wav_lens: Tensor | None = None) -> Tensor:
        """
        Arguments
        ---------
        wav : Tensor [B, samples], floating
            Mono, 16 kHz.
        wav_lens : Tensor [B] or None
            Lengths over that of the batch, as everywhere in SpeechBrain. None: all 1.

        Returns
        -------
        Tensor [B, T, R * C], or [L, B, T, C] with `output_all_hiddens`
            T is that of the whole batch. Time steps past a clip's own are zeros.

        Raises
        ------
        ValueError
            If the shape is another, or a clip is empty or holds NaN or infinity.
        """
        with self._grad_mode():
            clips = self._cut(wav, wav_lens)
            out = self._over_windows(clips, self.step_layers, lambda steps, _: steps, clips.longest)
            shifts = out.unflatten(-3, (self.shifts, -1)).flatten(-3, -2)  # [..., B, K, T', C]
            out = shifts.transpose(-3, -2).flatten(-3, -2)  # step K * m + i is patch m of shift i
            out = out[..., : clips.num_steps, :].contiguous()
            out = normalized_steps(out, clips.steps) if self.output_norm else out
            return out if self.output_all_hiddens else side_by_side(out)

    def embed(self, wav: Tensor, wav_lens: Tensor | None = None) -> Tensor:
        """One vector for each clip: its own time steps pooled, in the layers that are read.

        The time steps are added up window by window, so that the memory for hours of audio is
        that of the audio itself.

        Arguments
        ---------
        wav, wav_lens
            As in `forward`.

        Returns
        -------
        Tensor [B, `embedding_dim`], or [L, B, `embedding_dim`] with `output_all_hiddens`, float32
            Layer by layer; the deviations of a layer behind its means.
        """
        with self._grad_mode():
            clips = self._cut(wav, wav_lens)
            windows = self._over_windows(clips, self.embed_layers, step_statistics, steps=1)
            mean, variance = pooled(windows.squeeze(-2))
            if self.output_norm:
                mean, variance = normalized(mean, variance)
            rows = self.read_out.joined(mean, variance)
            return rows if self.output_all_hiddens else side_by_side(rows)

    # Normalisation

    @torch.no_grad()
    def fit_normalization(self, source, max_clips: int = 5000, num_workers: int = 2) -> "AudioJEPA":
        """Measure mean and deviation of the log-mel for `normalization="dataset"`.

        Arguments
        ---------
        source : str, Path, list of them, or iterable of batches
            A folder or files of audio (those that cannot be read are left out), or batches
            [B, samples] or pairs (batch, wav_lens), as from a SpeechBrain loader:
            `(batch.sig for batch in loader)`.
        max_clips : int
            Measure on so many: files evenly spread, or the first batches. Default 5000, the
            paper's evaluation.
        num_workers : int
            Threads that decode files. Default 2.

        Returns
        -------
        AudioJEPA
            Itself. The pair is part of the state dict, so a checkpoint brings it back.

        Raises
        ------
        FileNotFoundError, ValueError
            If there is no clip to measure on, or all are constant.
        """
        from speechbrain_jepa.data.clips import waveforms  # not needed without this

        count = total = squares = 0.0
        seen = 0
        for wav, wav_lens in waveforms(source, max_clips, num_workers):
            # the pair is the same for any step, and costs the same
            clips = self._cut(wav.to(self.normalization.mean.device), wav_lens, shifts=1)
            sums = clips.log_mel_sums(self.features).sum(1).tolist()
            count, total, squares = count + sums[0], total + sums[1], squares + sums[2]
            seen += len(wav)
            if seen >= max_clips:
                break
        if not seen:
            raise ValueError("fit_normalization: there was no clip to measure on")
        mean = total / count
        self.normalization.set(mean, max(squares / count - mean**2, 0.0) ** 0.5)
        return self

    def save_pretrained(self, folder):
        """Write the encoder as it is now, after fine-tuning say, as a pretrained folder."""
        self._check_fitted()
        training, stored = self.description["training"], self.description.get("embedding", {})
        read_out = ReadOut(**stored) if self.output_all_hiddens else self.read_out
        parts = (self.encoder, self.normalization, training, read_out, self.features)
        return save_pretrained(folder, *parts)

    @property
    def is_fitted(self) -> bool:
        """False for `normalization="dataset"` before `fit_normalization`."""
        return self.normalize != "dataset" or not self.normalization.mean.isnan()

    def _check_fitted(self) -> None:
        if not self.is_fitted:
            raise RuntimeError(
                'normalization="dataset" has no statistics yet: call fit_normalization on the '
                "training clips, or load a checkpoint of a model where that was done"
            )

    # How it is computed

    def _grad_mode(self):
        return torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze)

    def _cut(self, wav: Tensor, wav_lens: Tensor | None, shifts: int | None = None) -> Windows:
        grid, limit, n_fft = self.encoder.grid, self.max_windows_per_batch, self.features.n_fft
        return cut_into_windows(wav, wav_lens, grid, limit, shifts or self.shifts, n_fft)

    def _spectrograms(self, clips: Windows) -> Iterator[tuple[WindowBatch, Tensor]]:
        """Windows of similar length with their normalised spectrogram."""
        if self.normalize == "instance":
            count, total, squares = clips.log_mel_sums(self.features)
            mean = total / count
            std = (squares / count - mean.square()).clamp(min=0).sqrt()
            mean, std = mean.float(), std.float().clamp(min=INSTANCE_STD_FLOOR)
            for windows, log_mel, _ in clips.log_mels(self.features):
                clip = windows.clip.to(mean.device)
                yield windows, (log_mel - mean[clip, None, None]) / std[clip, None, None]
            return
        self._check_fitted()
        for windows, log_mel, _ in clips.log_mels(self.features):
            yield windows, self.normalization(log_mel)

    def _over_windows(self, clips: Windows, layers: list[int], reduce, steps: int) -> Tensor:
        """`reduce` of every window's output [R, W, T', C], at most `steps` long, at its place.

        Returns [R, B, K * windows, steps, what `reduce` leaves of C], zeros where there is
        nothing.
        """
        only_last = layers == [self.num_layers - 1]
        frequency_patches = self.encoder.grid.frequency_patches
        out: Tensor | None = None
        for windows, spectrogram in self._spectrograms(clips):
            valid = present = None
            if windows.ragged:
                present = torch.arange(windows.longest) < windows.patches[:, None]
                present = present.to(spectrogram.device)
                valid = present.repeat(1, frequency_patches)
            tokens = self._encode(windows, spectrogram, valid, all_layers=not only_last)
            tokens = tokens[None] if only_last else torch.stack([tokens[n] for n in layers])
            tokens = tokens.unflatten(-2, (frequency_patches, -1)).transpose(-3, -2)
            value = reduce(tokens.mean(-2) if self.flat else tokens.flatten(-2), present)
            if out is None:
                rows = self.shifts * clips.per_shift
                shape = (len(clips.samples), rows, steps, value.shape[-1])
                out = value.new_zeros(*value.shape[:-3], *shape)
            row = windows.shift * clips.per_shift + windows.number
            clip, row = windows.clip.to(value.device), row.to(value.device)
            out[..., clip, row, : value.shape[-2], :] = value
        assert out is not None  # a batch has a clip, and a clip a window
        return out

    def _encode(self, windows: WindowBatch, spectrogram: Tensor, valid, all_layers: bool) -> Tensor:
        return self.encoder(spectrogram, valid=valid, all_layers=all_layers)
