"""Linear evaluation of a frozen encoder on one task.

    python train.py hparams/esc50.yaml --data_folder /data/ESC-50-master --encoder my_encoder
    python train.py hparams/gtzan.yaml --data_folder /data/gtzan --encoder logmel --probe sweep
    python train.py hparams/custom.yaml --data_folder /my/audio --csv my_labels.csv \
        --encoder s3prl:wav2vec2 --layer all

Every line of the yaml is an option. Clips are embedded once for each encoder; another probe, other
seeds or another try after an interruption take the embeddings from `features_folder`.
"""

import hashlib
import importlib
import json
import re
import sys
from pathlib import Path

import speechbrain as sb
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.logger import get_logger

from speechbrain_jepa.evaluation import figures
from speechbrain_jepa.evaluation.labelled import read_labelled
from speechbrain_jepa.evaluation.linear_probe import VERSION, probe
from speechbrain_jepa.evaluation.results import RESULT, Result, summarise
from speechbrain_jepa.evaluation.sources import load_source
from speechbrain_jepa.evaluation.store import embed_once
from speechbrain_jepa.recipe import resolve_recipe

logger = get_logger("linear_evaluation")

MAX_SECONDS = 10.0  # of clips, where the yaml does not say


def evaluate(hparams: dict, device: str = "cpu") -> tuple[Result, Path]:
    """Prepare, embed, probe, write; what has been done before is read.

    Arguments
    ---------
    hparams : dict
        Of one of the yaml files.
    device : str

    Returns
    -------
    result : Result
    folder : Path
        With result.json and the figures.
    """
    prepare = importlib.import_module(f"prepare.{hparams['task']}")
    manifest = prepare.prepare(
        hparams["data_folder"],
        Path(hparams["output_folder"]) / "manifest",
        allow_missing=hparams["allow_missing"],
        **hparams["prepare"],
    )
    clips = read_labelled(manifest, hparams["data_folder"], hparams["multilabel"])["label"]

    clip_seconds = hparams["clip_seconds"] or min(clips.longest or MAX_SECONDS, MAX_SECONDS)

    source = load_source(
        hparams["encoder"],
        all_layers=hparams["layer"] != "last",
        normalization=hparams["normalization"],
        precision=hparams["precision"],
        device=device,
        seed=hparams["encoder_seed"],
        save_path=hparams["save_path"],
        trust_remote_code=hparams["trust_remote_code"],
    )
    features = embed_once(
        source,
        clips,
        clip_seconds,
        hparams["features_folder"],
        layer=hparams["layer"],
        dtype=hparams["feature_dtype"],
        crop_seed=hparams["crop_seed"],
        batch_seconds=hparams["batch_seconds"],
        num_workers=hparams["num_workers"],
    )
    skipped = len(clips) - int(features.usable.sum())
    if skipped:
        logger.warning(f"{skipped} clips skipped: {features.folder / 'skipped.csv'}")

    protocol, seeds = hparams["protocol"], hparams["seeds"]
    settings = {
        "features": features.folder.name,
        "labels": hashlib.sha256(Path(manifest).read_bytes()).hexdigest()[:16],
        "seeds": list(seeds),
        "protocol": {name: str(value) for name, value in vars(protocol).items()},
        "probe_version": VERSION,
    }
    folder = result_folder(hparams, source.name, settings)
    if (folder / RESULT).exists():
        return Result.load(folder / RESULT), folder

    outcomes = probe(features, clips, seeds, protocol, device)
    rows = outcomes[0].trial.rows
    result = summarise(
        outcomes,
        clips,
        features.layers,
        task=hparams["task_name"],
        encoder=hparams["encoder_name"] or source.name,
        probe=protocol.probe,
        counts={
            "clips": len(clips),
            "skipped": skipped,
            **{name: len(getattr(rows, name)) for name in ("train", "valid", "test")},
        },
        settings=settings,
        own_split=prepare.TASK.has_own_split(hparams["prepare"]),
    )
    folder.mkdir(parents=True, exist_ok=True)
    if hparams["figures"]:
        draw(result, features, clips, rows.test, folder, hparams["map_clips"])
    result.save(folder / RESULT)
    return result, folder


def result_folder(hparams: dict, encoder: str, settings: dict) -> Path:
    """One folder for each encoder and settings."""
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    readable = re.sub(r"[^\w.-]+", "_", hparams["encoder_name"] or encoder).strip("_")
    return Path(hparams["output_folder"]) / f"{readable}-{hparams['protocol'].probe}-{key}"


def draw(result: Result, features, clips, test_rows, folder: Path, map_clips: int) -> None:
    """Confusion matrix, classes, a map of the test clips (of a cross-validation's first fold)."""
    if result.confusion:
        figures.draw_confusion(result.confusion, result.classes, folder / "confusion.png")
    figures.draw_class_scores(
        result.class_scores, result.classes, folder / "classes.png", result.metric
    )
    if map_clips and not clips.multilabel and len(test_rows) >= 4:
        layer = features.layers.index(result.best.layer)
        labels = [clips.labels[row] for row in test_rows]
        x = features.array[layer][test_rows]
        figures.draw_map(x, labels, folder / "map.png", map_clips)


def load_hparams(arguments: list[str]) -> tuple[dict, str]:
    """A yaml with its overrides, and the device to compute on."""
    hparams_file, run_opts, overrides = sb.parse_arguments(arguments)
    given = {name: run_opts[name] for name in run_opts.overridden_args}
    hparams = load_hyperpyyaml(resolve_recipe(hparams_file, overrides, given))
    return hparams, run_opts.device or sb.utils.distributed.infer_device()


if __name__ == "__main__":
    hparams, device = load_hparams(sys.argv[1:])
    result, folder = evaluate(hparams, device)
    unit = f"{result.metric} in %, {len(hparams['seeds'])} seeds"
    print(f"\n{result.task}, {result.encoder}, probe {result.probe}: {unit}")
    print(f"{result.layer_table()}\n\n{folder}")
