"""An encoder as one ONNX file: waveforms in, time steps and clip embeddings out.

The graph computes what `AudioJEPA` computes, log-mel and windows included, for any number of clips
of any length. `AudioJEPA` loops over batches of windows of similar length; a graph has no such
loop, so every clip is cut into as many windows as the longest of its batch has.

Shapes: B clips, K shifts, W windows of each, F frequency and T time patches of a window, D dims.
"""

import copy
import json
import logging
import math
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from speechbrain_jepa import __version__
from speechbrain_jepa.config import describe
from speechbrain_jepa.encoder import INSTANCE_STD_FLOOR, AudioJEPA
from speechbrain_jepa.features import HOP_LENGTH, LOG_OFFSET, N_FFT, SAMPLE_RATE, crop_samples
from speechbrain_jepa.files import whole_file
from speechbrain_jepa.read_out import (
    normalized,
    normalized_steps,
    pooled,
    side_by_side,
    step_statistics,
)
from speechbrain_jepa.windows import SILENCE, lead_frames

TOLERANCE = 1e-4  # of the file's output in onnxruntime from torch's, over the largest value or 1
LARGEST = 2**31 - 2**20  # bytes: what an ONNX file can hold is 2 GiB, less the graph itself
SMALLEST_HALF = 1024  # values: smaller tensors stay in float32, they weigh nothing
INPUTS = {
    "waveform": "[batch, samples], float32: mono, 16 kHz, -1 to 1. What is behind a clip's own "
    "length is never looked at.",
    "lengths": "[batch], int64: samples of each clip, 1 to those of the batch.",
}
OUTPUTS = {
    "steps": "[batch, steps, dims], float32: one row every step_seconds, zeros past a clip's own "
    "num_steps.",
    "clip_embedding": "[batch, embedding_dims], float32: the clip's own time steps, pooled.",
    "num_steps": "[batch], int64: time steps of each clip, its samples over samples_per_step "
    "rounded up.",
}


class PowerSpectrum(nn.Module):
    """Squared magnitudes of the Fourier transform of windowed frames, by matrix products.

    A transform of N = P * Q samples is one of P and one of Q with a rotation between them (Cooley
    and Tukey 1965): for 400 = 20 x 20 a third of the work of one product with all 201 cosines and
    sines, and as exact. Why not ONNX's STFT: few runtimes have it.

    Arguments
    ---------
    n_fft : int
        N. Default 400.

    Example
    -------
    >>> frames = torch.randn(2, 7, 400)
    >>> spectrum = torch.fft.rfft(frames * torch.hann_window(400)).abs().square()
    >>> ours = PowerSpectrum()(frames)
    >>> ours.shape, torch.allclose(ours[..., :201], spectrum, atol=1e-3)
    (torch.Size([2, 7, 220]), True)
    """

    window: Tensor
    first: Tensor
    rotation: Tensor
    second: Tensor

    def __init__(self, n_fft: int = N_FFT):
        super().__init__()
        middle = math.isqrt(n_fft)
        self.rows = next(p for p in range(middle, 0, -1) if n_fft % p == 0)  # P
        self.columns = n_fft // self.rows  # Q
        row, column = torch.arange(self.rows), torch.arange(self.columns)
        self.powers = self.rows * (n_fft // 2 // self.rows + 1)  # those above n_fft / 2 are spare
        kept = column[: self.powers // self.rows]
        self.register_buffer("window", torch.hann_window(n_fft))
        cos, sin = _cos_sin(row[:, None] * row, self.rows)
        self.register_buffer("first", torch.cat([cos, -sin], 1))
        self.register_buffer("rotation", _cos_sin(column[:, None] * row, n_fft))
        self.register_buffer("second", _cos_sin(column[:, None] * kept, self.columns))

    def forward(self, frames: Tensor) -> Tensor:
        """Frames [..., N] to powers [..., N / 2 + 1 and some more] of the frequencies from 0 on."""
        # sample Q a + b and frequency c + P d: first over a, then over b
        samples = (frames * self.window).unflatten(-1, (self.rows, self.columns))
        real, imaginary = (samples.transpose(-2, -1) @ self.first).chunk(2, -1)  # [..., b, c]
        cos, sin = self.rotation
        real, imaginary = real * cos + imaginary * sin, imaginary * cos - real * sin
        real, imaginary = real.transpose(-2, -1), imaginary.transpose(-2, -1)
        cos, sin = self.second
        real, imaginary = real @ cos + imaginary @ sin, imaginary @ cos - real @ sin
        power = real.square() + imaginary.square()  # [..., c, d]
        return power.transpose(-2, -1).flatten(-2)


def _cos_sin(turns: Tensor, size: int) -> Tensor:
    """Cosine and sine of turns / size of a circle, rounded from float64: [2, ...]."""
    angle = (turns % size).double() * (2 * math.pi / size)
    return torch.stack([angle.cos(), angle.sin()]).float()


class EncoderGraph(nn.Module):
    """`AudioJEPA` without loops, branches on lengths and Fourier transforms: what is exported.

    Arguments
    ---------
    model : AudioJEPA
        All of it is taken over: log-mel, normalisation, layers, pooling, step_seconds, flat and
        output_norm.

    Raises
    ------
    ValueError
        If the model gives its layers one by one.

    Example
    -------
    >>> from speechbrain_jepa.features import Normalization
    >>> from speechbrain_jepa.vit import Encoder, PatchGrid
    >>> encoder = Encoder(PatchGrid(frames=208), dim=48, depth=2, num_heads=3)
    >>> graph = EncoderGraph(AudioJEPA((encoder, Normalization(-7.06, 4.19))))
    >>> steps, embedding, num_steps = graph(torch.randn(2, 48_000), torch.tensor([48_000, 9_000]))
    >>> steps.shape, embedding.shape, num_steps
    (torch.Size([2, 19, 240]), torch.Size([2, 240]), tensor([19,  4]))
    """

    filterbank: Tensor

    def __init__(self, model: AudioJEPA):
        super().__init__()
        if model.output_all_hiddens:
            raise ValueError(
                "output_all_hiddens=True: an ONNX file gives layers side by side; use layers='all'"
            )
        model._check_fitted()
        self.encoder = copy.deepcopy(model.encoder).float().cpu().eval().requires_grad_(False)
        self.encoder.attention = "sdpa"
        for block in self.encoder.blocks:
            block.__dict__.pop("forward", None)  # gradient checkpointing's
        self.grid = model.encoder.grid
        self.shifts = model.shifts
        self.flat = model.flat
        self.output_norm = model.output_norm
        self.step_layers, self.embed_layers = model.step_layers, model.embed_layers
        self.read_out = model.read_out
        self.pair: tuple[float, float] | None = None  # None: each clip's own
        if model.normalize != "instance":
            self.pair = (model.normalization.mean.item(), model.normalization.std.item())
        self.n_fft = model.features.n_fft
        self.spectrum = PowerSpectrum(self.n_fft)
        filters = model.features.filterbank.T.cpu()
        spare = filters.new_zeros(self.spectrum.powers - len(filters), filters.shape[1])
        self.register_buffer("filterbank", torch.cat([filters, spare]))

    def forward(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Arguments
        ---------
        waveform : Tensor [B, samples], float32
        lengths : Tensor [B], int64
            Samples of each clip.

        Returns
        -------
        steps : Tensor [B, steps, C]
        embedding : Tensor [B, C]
        num_steps : Tensor [B], int64
        """
        grid, batch, samples = self.grid, waveform.shape[0], waveform.shape[1]
        hop = grid.patch_time // self.shifts * HOP_LENGTH  # samples of a time step
        windows = _over(samples, grid.frames * HOP_LENGTH)
        num_steps = _over(lengths, hop)
        spectrogram = self._windows(self._log_mel(waveform, lengths, windows), windows)
        # of shift k: the steps K * m + k
        patches = (num_steps[:, None] + self.shifts - 1 - torch.arange(self.shifts)) // self.shifts
        valid = torch.arange(windows * grid.time_patches) < patches[..., None]
        valid = valid.reshape(-1, 1, grid.time_patches)
        # of a batch shorter than a window, the patches that all of its clips lack are left out
        length = torch.sym_min(_over(samples, grid.patch_time * HOP_LENGTH), grid.time_patches)
        rows = torch.arange(grid.frequency_patches)[:, None] * grid.time_patches
        index = (rows + torch.arange(length)).flatten().expand(valid.shape[0], -1)
        valid = valid[..., :length].expand(-1, grid.frequency_patches, -1).flatten(1)
        wanted = sorted({*self.step_layers, *self.embed_layers})
        only_last = wanted == [len(self.encoder.blocks)]
        tokens = self.encoder(spectrogram, index=index, valid=valid, all_layers=not only_last)
        layers = {
            number: self._steps(tokens if only_last else tokens[number], batch, windows, length)
            for number in wanted
        }
        longest = _over(samples, hop)
        steps = torch.stack([layers[number][:, :longest] for number in self.step_layers])
        read = torch.stack([layers[number][:, :longest] for number in self.embed_layers])
        own = torch.arange(longest) < num_steps[:, None]
        mean, variance = pooled(step_statistics(read, own))
        if self.output_norm:
            steps = normalized_steps(steps, num_steps)
            mean, variance = normalized(mean, variance)
        embedding = side_by_side(self.read_out.joined(mean, variance))
        return side_by_side(steps), embedding, num_steps

    def _steps(self, tokens: Tensor, batch, windows, length) -> Tensor:
        """One layer's tokens [B * K * W, F * length, D] to time steps [B, steps, C]."""
        rows = self.grid.frequency_patches
        tokens = tokens.reshape(batch, self.shifts, windows, rows, length, -1)
        # a time step is (window, patch, shift), in this order
        tokens = tokens.permute(0, 2, 4, 1, 3, 5).flatten(1, 3)
        return tokens.mean(2) if self.flat else tokens.flatten(2)

    def _log_mel(self, waveform: Tensor, lengths: Tensor, windows) -> Tensor:
        """Normalised log-mel [B, bands, frames] of so many windows, all shifts, `lead` included."""
        lead = lead_frames(self.grid, self.shifts)
        step = self.grid.patch_time // self.shifts
        frames = windows * self.grid.frames + (self.shifts - 1) * step
        margin = lead * HOP_LENGTH + self.n_fft // 2
        place = torch.arange(crop_samples(frames, self.n_fft)) - margin
        # a clip goes on being reflected at its two ends, back and forth
        period = (2 * (lengths[:, None] - 1)).clamp(min=1)
        phase = place.remainder(period)
        reflected = waveform.gather(1, torch.minimum(phase, period - phase))
        chunk = math.gcd(self.n_fft, HOP_LENGTH)  # frames are whole numbers of them
        chunks, stride = reflected.unflatten(1, (-1, chunk)), HOP_LENGTH // chunk
        parts = [
            chunks[:, first : first + (frames - 1) * stride + 1 : stride]
            for first in range(self.n_fft // chunk)
        ]
        power = self.spectrum(torch.cat(parts, 2)) @ self.filterbank
        log_mel = (power + LOG_OFFSET).log().transpose(1, 2)
        frame = torch.arange(frames) - lead
        audio = (frame >= 0) & (frame < _over(lengths, HOP_LENGTH)[:, None])
        audio = audio[:, None]
        if self.pair is None:
            count = audio.sum(2, keepdim=True) * self.grid.bands
            mean = (log_mel * audio).sum((1, 2), keepdim=True) / count
            variance = ((log_mel - mean) * audio).square().sum((1, 2), keepdim=True) / count
            std = variance.sqrt().clamp(min=INSTANCE_STD_FLOOR)
        else:
            mean, std = self.pair
        return (torch.where(audio, log_mel, SILENCE) - mean) / std

    def _windows(self, log_mel: Tensor, windows) -> Tensor:
        """[B, bands, frames] to [B * K * W, bands, frames of a window]."""
        grid, step = self.grid, self.grid.patch_time // self.shifts
        width = windows * grid.frames
        shifts = [log_mel[:, :, k * step : k * step + width] for k in range(self.shifts)]
        views = torch.stack(shifts, 1).unflatten(3, (windows, grid.frames))
        return views.transpose(2, 3).flatten(0, 2)


def _over(count, size: int):
    """Count over size, rounded up."""
    return (count + size - 1) // size


def export_onnx(model: AudioJEPA, path: str | os.PathLike, half: bool = False) -> Path:
    """Write an encoder as one ONNX file (opset 18), which onnxruntime has run and torch confirmed.

    Arguments
    ---------
    model : AudioJEPA
        What it computes is what the file computes: `layers`, `pooling`, `step_seconds`, `flat`,
        `output_norm` and `normalization` are taken over.
    path : str or path
        Ends in .onnx. A file that is there is replaced.
    half : bool
        Keep the encoder's weights as float16, half the size. They are float32 again when the
        file is loaded. Default False.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ImportError
        If onnx, onnxscript or onnxruntime is missing.
    ValueError
        If the path has another suffix, the encoder is too large for one file, or the model gives
        its layers one by one.
    RuntimeError
        If onnxruntime's output differs from torch's by more than 1e-4. Nothing is written then.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise ValueError(f"{path}: the name of an ONNX file ends in .onnx")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder, to write {path.name} in")
    _import_libraries()
    graph = EncoderGraph(model)
    if half:
        graph.encoder.half().float()  # what the file will hold is what is compared
    size = sum(tensor.numel() for tensor in graph.state_dict().values()) * (2 if half else 4)
    if size > LARGEST:
        raise ValueError(
            f"{path}: {size / 2**30:.1f} GiB of weights are more than the 2 GiB of an ONNX file"
            + ("" if half else ": half=True (--half) halves them")
        )
    proto = _exported(graph)
    _label(proto, model, graph)
    if half:
        _keep_half(proto)
    with whole_file(path) as partial:
        partial.write_bytes(proto.SerializeToString())
        _compare(partial, path, model, graph)
    return path


def _import_libraries() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"an ONNX file needs onnx, onnxscript and onnxruntime ({error}): pip install '.[onnx]' "
            "in a clone of this repository"
        ) from error


def _example(samples: int) -> tuple[Tensor, Tensor]:
    """Three clips of so many samples, of a third as many and of one."""
    generator = torch.Generator().manual_seed(0)
    waveform = 0.1 * torch.randn(3, samples, generator=generator)
    return waveform, torch.tensor([samples, max(samples // 3, 1), 1])


def _exported(graph: EncoderGraph):
    """The graph as onnx.ModelProto."""
    window = graph.grid.frames * HOP_LENGTH
    batch, samples = torch.export.Dim("batch"), torch.export.Dim("samples")
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    try:
        exporter.setLevel(logging.ERROR)  # it tells of packages that are not needed here
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                graph,
                _example(2 * window + window // 2),
                dynamo=True,
                opset_version=18,
                input_names=list(INPUTS),
                output_names=list(OUTPUTS),
                dynamic_shapes=({0: batch, 1: samples}, {0: batch}),
                verbose=False,
            )
    finally:
        exporter.setLevel(level)
    assert program is not None  # given where no file is written
    return program.model_proto


def _label(proto, model: AudioJEPA, graph: EncoderGraph) -> None:
    """Say in the file what goes in, what comes out, and what the encoder is."""
    for values, descriptions in ((proto.graph.input, INPUTS), (proto.graph.output, OUTPUTS)):
        for value in values:
            value.doc_string = descriptions[value.name]
    for value in proto.graph.output:
        if value.name == "steps":
            value.type.tensor_type.shape.dim[1].dim_param = "steps"
    proto.producer_name, proto.producer_version = "speechbrain-jepa", __version__
    training = model.description["training"]
    parts = (model.encoder, model.normalization, training, model.read_out, model.features)
    facts = {
        "sample_rate": SAMPLE_RATE,
        "samples_per_step": model.downsample_rate,
        "step_seconds": model.step_seconds,
        "first_step_center_seconds": round(model.timestamps(1).item(), 6),
        "window_samples": graph.grid.frames * HOP_LENGTH,
        "dims": model.get_output_dim(),
        "embedding_dims": model.embedding_dim,
        "normalization": model.normalize,
        "config": json.dumps(describe(*parts), ensure_ascii=False),
    }
    for part in (proto, proto.graph, *proto.graph.node, *proto.graph.value_info):
        del part.metadata_props[:]  # the exporter's notes, with paths of this machine
    for key, value in facts.items():
        proto.metadata_props.add(key=key, value=str(value))


def _keep_half(proto) -> None:
    """Float16 in the place of the encoder's float32 weights, and a cast behind each."""
    import onnx

    casts = []
    for tensor in proto.graph.initializer:
        values, name = onnx.numpy_helper.to_array(tensor), tensor.name
        is_weight = values.dtype == np.float32 and values.size >= SMALLEST_HALF
        if not is_weight or not np.array_equal(values, values.astype(np.float16), equal_nan=True):
            continue
        half = onnx.numpy_helper.from_array(values.astype(np.float16), f"{name}.half")
        tensor.CopyFrom(half)
        to = onnx.TensorProto.FLOAT
        casts.append(onnx.helper.make_node("Cast", [half.name], [name], to=to))
    nodes = [*casts, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def _compare(file: Path, path: Path, model: AudioJEPA, graph: EncoderGraph) -> None:
    """Run a file in onnxruntime beside torch, on lengths that it was not exported with."""
    import onnx
    import onnxruntime

    onnx.checker.check_model(str(file))
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    reference = copy.deepcopy(model).cpu()
    reference.encoder = graph.encoder
    window = graph.grid.frames * HOP_LENGTH
    for samples in (window // 5, window + 1):
        waveform, lengths = _example(samples)
        feed = {"waveform": waveform.numpy(), "lengths": lengths.numpy()}
        steps, embedding, _ = session.run(list(OUTPUTS), feed)
        wav_lens = lengths / samples
        with torch.no_grad():
            expected = reference(waveform, wav_lens), reference.embed(waveform, wav_lens)
        for name, ours, theirs in zip(OUTPUTS, (steps, embedding), expected):
            deviation = np.abs(ours - theirs.numpy()).max()
            if not deviation <= TOLERANCE * max(1.0, theirs.abs().max().item()):
                raise RuntimeError(
                    f"{path}: {name} in onnxruntime differ from torch's by {deviation:.2g} on "
                    f"clips of up to {samples} samples, and at most {TOLERANCE:g} is allowed: "
                    "the file is not written"
                )
