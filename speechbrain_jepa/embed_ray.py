"""Embedding on a Ray cluster: CPU workers decode, actors embed and write parts.

Every node sees the audio and the folder of the output under the same paths, and has this package
installed. A worker that is lost, or its node, is replaced by Ray, and what it held is done again; a
part's name follows from its files, so that one that was written twice is there once.
"""

import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from speechbrain_jepa.data.audio import UnreadableAudio
from speechbrain_jepa.data.clips import in_batches, read_audio
from speechbrain_jepa.data.skipped import SkippedFiles
from speechbrain_jepa.embedding_parts import Embeddings, embed_batch, part_of, write_part
from speechbrain_jepa.encoder import AudioJEPA
from speechbrain_jepa.features import SAMPLE_RATE
from speechbrain_jepa.ray_cluster import cause_of, on_cluster
from speechbrain_jepa.throughput import Spent

FILES_A_PART = 64
BLOCKS_A_CPU = 4  # at least, so that a lost worker costs little
ACTOR_CPUS = 0.5  # of an actor without a GPU: a quarter of all, where as many are left to decode


def decode(row: dict) -> dict:
    """The samples of one file, or why there are none."""
    began = time.perf_counter()
    wav, reason = b"", ""
    try:
        wav = read_audio(os.fsdecode(row["path"])).numpy().tobytes()
    except UnreadableAudio as error:
        reason = error.reason
    return {**row, "wav": wav, "reason": reason, "reading": time.perf_counter() - began}


class EncoderActor:
    """An actor: the encoder, on a GPU of its own where the cluster has any.

    Arguments
    ---------
    model : AudioJEPA, or Ray's reference to one
    parts : str
        Folder to write to.
    level, precision, batch_seconds
        See `speechbrain_jepa.embed.embed_files`.
    device : str
        "cuda" (the one GPU that Ray shows to the actor) or "cpu" (default).
    """

    def __init__(
        self,
        model,
        parts: str,
        level: str,
        precision: str,
        batch_seconds: float,
        device: str = "cpu",
    ):
        if not isinstance(model, AudioJEPA):
            import ray

            model = ray.get(model)
        self.model = model.to(device)
        self.parts, self.options = Path(parts), (level, precision)
        self.batch_seconds = batch_seconds

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, list]:
        """Embed some decoded files and write them as one part; says what was done, in one row."""
        spent = Spent(reading=float(rows["reading"].sum()))
        files = [bytes(file) for file in rows["file"]]
        failed = [
            (os.fsdecode(file), str(reason))
            for file, reason in zip(files, rows["reason"])
            if reason
        ]
        clips = [
            (os.fsdecode(file), torch.from_numpy(np.frombuffer(wav, np.float32).copy()))
            for file, wav, reason in zip(files, rows["wav"], rows["reason"])
            if not reason
        ]
        pairs = []
        with spent.on("encoding"):
            for batch in in_batches(clips, self.batch_seconds):
                pairs += embed_batch(self.model, batch, *self.options)
        if pairs:
            with spent.on("writing"):
                write_part(self.parts / part_of([os.fsencode(file) for file, _ in pairs]), pairs)
        spent.files = len(pairs)
        spent.audio = sum(len(wav) for _, wav in clips) / SAMPLE_RATE
        return {"done": [json.dumps([vars(spent), failed])]}


def embed_on_ray(
    address: str,
    model: AudioJEPA,
    embeddings: Embeddings,
    skipped: SkippedFiles,
    files: list[str],
    level: str,
    precision: str,
    batch_seconds: float,
    spent: Spent,
) -> None:
    """Embed the files that no part has on a cluster, into the parts' folder.

    As many actors embed as there are GPUs; without any, one for every two CPUs.

    Arguments
    ---------
    address : str
        See `ray_cluster.on_cluster`.
    model, level, precision, batch_seconds
        See `speechbrain_jepa.embed.embed_files`.
    embeddings : Embeddings
        Gets the parts.
    skipped : SkippedFiles
        Told of what cannot be read.
    files : list of str
        Relative ones begin in the folder that this process is in.
    spent : Spent
        Gets what the work took.

    Raises
    ------
    OSError, ValueError
        Whatever ended a worker, other than its loss.
    """
    left = [file for file in files if file not in embeddings.place]
    if not left:
        return
    with on_cluster(address) as ray, spent.on("whole"):
        gpus = int(ray.cluster_resources().get("GPU", 0))
        cpus = int(ray.cluster_resources().get("CPU", 1))
        actors = gpus or max(cpus // 2, 1)
        blocks = min(len(left), max(BLOCKS_A_CPU * cpus, len(left) // FILES_A_PART)) or 1
        data = ray.data.from_items(
            [
                {"file": os.fsencode(file), "path": os.fsencode(os.path.abspath(file))}
                for file in left
            ],
            override_num_blocks=blocks,
        )
        reference = ray.put(model)
        done = data.map(decode).map_batches(
            EncoderActor,
            fn_constructor_args=(
                *(reference, os.path.abspath(embeddings.parts)),
                *(level, precision, batch_seconds, "cuda" if gpus else "cpu"),
            ),
            batch_size=FILES_A_PART,
            compute=ray.data.ActorPoolStrategy(size=actors),
            **({"num_gpus": 1} if gpus else {"num_cpus": ACTOR_CPUS}),
        )
        busy = Spent()
        with tqdm(total=len(files), initial=len(files) - len(left)) as bar:
            try:
                for row in done.iter_rows():
                    part, failed = json.loads(row["done"])
                    busy.sum_of([busy, Spent(**part)])
                    skipped.report([(file, reason) for file, reason in failed])
                    bar.update(part["files"] + len(failed))
            except ray.exceptions.RayError as error:
                cause = cause_of(error)
                raise OSError(f"a worker ended with {type(cause).__name__}: {cause}") from error
        embeddings.take_in(embeddings.parts)
    # of the whole time, what the processes of each stage were at work
    spent.files, spent.audio = busy.files, busy.audio
    spent.encoding, spent.writing = busy.encoding / actors, busy.writing / actors
    spent.reading = busy.reading / max(cpus - (0 if gpus else actors), 1)
