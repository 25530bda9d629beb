"""MAEB, the audio benchmark of mteb: an encoder, and a command that runs mteb's own `evaluate`.

    python -m speechbrain_jepa.mteb <pretrained folder> --out results

Needs mteb 2.26 or later, but neither torchcodec nor FFmpeg: clips are decoded by soundfile.
"""

import argparse
import io

import numpy as np
import soundfile
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm import tqdm

from speechbrain_jepa import __version__
from speechbrain_jepa.data.clips import BATCH_SECONDS
from speechbrain_jepa.encoder import AudioJEPA
from speechbrain_jepa.suites import checkpoint_id, checkpoint_name, parse_options

try:
    import mteb
    from datasets import Audio
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.modality_collators import AudioCollator
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"MAEB needs mteb 2.26 or later ({error}): in a clone, pip install '.[mteb]'"
    ) from error

BENCHMARK = "MAEB(beta, audio-only)"


class MTEBEncoder(AbsEncoder):
    """An `AudioJEPA` as mteb wants it: `mteb.evaluate(MTEBEncoder(folder), tasks)`.

    Clips of any lengths go through the encoder together: what they are padded with changes none
    of their embeddings. mteb keeps scores under name and revision; the revision stands for the
    weights and the options.

    Arguments
    ---------
    source : str, Path or None
        As for `AudioJEPA`. Default: the encoder that comes with the package.
    device : str or None
        Default: a GPU, where there is one.
    batch_seconds : float
        Of audio that goes through the encoder at once, padding included. Default 600.
    **options
        For `AudioJEPA`: flat, normalization, ...

    Raises
    ------
    FileNotFoundError, ValueError
        If the encoder cannot be loaded or an option does not fit (see `AudioJEPA`).

    Example
    -------
    >>> encoder = MTEBEncoder()
    >>> encoder.mteb_model_meta.name, len(encoder.mteb_model_meta.revision)
    ('speechbrain-jepa/tiny', 10)
    """

    def __init__(self, source=None, device=None, batch_seconds: float = BATCH_SECONDS, **options):
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = AudioJEPA(source, device=device, **options)
        self.batch_seconds = batch_seconds
        parameters = sum(parameter.numel() for parameter in self.model.encoder.parameters())
        self.mteb_model_meta = ModelMeta(
            loader=None,
            name=f"speechbrain-jepa/{checkpoint_name(source)}",
            revision=checkpoint_id(self.model),
            release_date=None,
            languages=None,
            n_parameters=parameters,
            memory_usage_mb=round(parameters * 4 / 2**20),
            max_tokens=None,
            embed_dim=self.model.embedding_dim,
            license=None,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=["PyTorch"],
            similarity_fn_name="cosine",
            use_instructions=False,
            training_datasets=None,
            modalities=["audio"],
            experiment_kwargs=options or None,
        )

    @torch.inference_mode()
    def encode(
        self,
        inputs: DataLoader,
        *,
        task_metadata,
        hf_split: str,
        hf_subset: str,
        prompt_type=None,
        show_progress_bar: bool = True,
        **kwargs,
    ) -> np.ndarray:
        """One embedding a clip.

        Arguments
        ---------
        inputs : DataLoader
            Of rows with "audio": {"array", "sampling_rate"}, or a column of `datasets.Audio`.
        task_metadata, hf_split, hf_subset
            Named where a clip cannot be used.
        prompt_type, **kwargs
            Of mteb; they change nothing.
        show_progress_bar : bool
            Default True.

        Returns
        -------
        array [N, C], float32

        Raises
        ------
        ValueError
            If there is no audio, or a clip cannot be decoded, is empty, or holds NaN or infinity.
        """
        embeddings = []
        try:
            for batch in tqdm(_loader(inputs), disable=not show_progress_bar, desc="clips"):
                clips = [np.asarray(clip["array"], np.float32).ravel() for clip in batch["audio"]]
                embeddings.append(self._embed([torch.from_numpy(clip) for clip in clips]))
        except (ValueError, soundfile.LibsndfileError) as error:
            place = f"{task_metadata.name}, {hf_subset}, {hf_split}, batch {len(embeddings)}"
            raise ValueError(f"{place} (from 0): {error}") from error
        return np.concatenate(embeddings)

    def _embed(self, clips: list[torch.Tensor]) -> np.ndarray:
        """Clips [samples] in groups of similar length that together are not too long; their order
        is kept."""
        lengths = torch.tensor([len(clip) for clip in clips])
        order = lengths.argsort(descending=True, stable=True).tolist()
        device = next(self.model.parameters()).device
        out = np.empty((len(clips), self.model.embedding_dim), np.float32)
        while order:
            longest = max(int(lengths[order[0]]), 1)
            count = max(int(self.batch_seconds * self.model.sample_rate / longest), 1)
            rows, order = order[:count], order[count:]
            wav = pad_sequence([clips[row] for row in rows], batch_first=True)
            wav_lens = lengths[rows].double() / longest
            out[rows] = self.model.embed(wav.to(device), wav_lens).cpu().numpy()
        return out


def _loader(inputs: DataLoader) -> DataLoader:
    """The same rows, decoded by soundfile where `datasets` would need torchcodec."""
    dataset = inputs.dataset
    features = getattr(dataset, "features", {})
    if "audio" not in features:
        raise ValueError(f"the encoder takes audio, and this has {', '.join(features) or 'none'}")
    if isinstance(features["audio"], Audio):
        dataset = dataset.cast_column("audio", Audio(decode=False))  # type: ignore[attr-defined]
    return DataLoader(
        dataset,
        batch_size=inputs.batch_size,
        num_workers=inputs.num_workers,
        collate_fn=_collate,
    )


def _collate(rows: list[dict]) -> dict:
    """To mono and 16 kHz, by mteb's own collator."""
    rows = [{"audio": _decoded(row["audio"])} for row in rows]
    return AudioCollator(target_sampling_rate=16_000)(rows)


def _decoded(audio) -> dict:
    if not isinstance(audio, dict) or "array" in audio:
        return audio
    file = io.BytesIO(audio["bytes"]) if audio["bytes"] is not None else audio["path"]
    wav, rate = soundfile.read(file, dtype="float32", always_2d=True)
    return {"array": wav.mean(1), "sampling_rate": rate}


def main(arguments=None) -> None:
    """The command line: `arguments` is a list of str, default the process' own."""
    parser = argparse.ArgumentParser(
        prog="python -m speechbrain_jepa.mteb",
        description="Evaluate an encoder on MAEB; tasks that have their scores are not run again.",
    )
    add = parser.add_argument
    add(
        "encoder",
        nargs="?",
        help="pretrained folder, experiment folder, Hugging Face repo id, or name of an encoder "
        "that comes with the package (default: tiny)",
    )
    add("--benchmark", default=BENCHMARK, help=f"of mteb (default: {BENCHMARK})")
    add("--tasks", nargs="+", help="tasks of mteb by name, in place of a benchmark")
    add("--out", default="mteb_results", help="folder of the scores (default: mteb_results)")
    add("--batch_size", type=int, default=32, help="clips read at once")
    add("--model_options", help="of AudioJEPA, a JSON object such as '{\"flat\": true}'")
    add("--device", help="default: a GPU, where there is one")
    options = parser.parse_args(arguments)
    try:
        encoder = MTEBEncoder(
            options.encoder, options.device, **parse_options(options.model_options)
        )
        if options.tasks:
            tasks = [mteb.get_task(name) for name in options.tasks]
        else:
            tasks = list(mteb.get_benchmark(options.benchmark).tasks)
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"mteb: {error.args[0] if error.args else error}") from error
    cache = mteb.ResultCache(options.out)
    results = mteb.evaluate(
        encoder,
        tasks,
        cache=cache,
        raise_error=False,
        encode_kwargs={"batch_size": options.batch_size},
    )
    print(f"\n{options.out}, speechbrain_jepa {__version__}, mteb {mteb.__version__}:")
    for result in results.task_results:
        print(f"{result.task_name:40}{100 * result.get_score():8.2f}")
    if results.exceptions:
        reasons = "".join(f"\n{error.task_name}: {error.exception}" for error in results.exceptions)
        raise SystemExit(f"mteb: no score for {len(results.exceptions)} tasks{reasons}")


if __name__ == "__main__":
    main()
