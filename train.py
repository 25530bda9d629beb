"""Pretrain an audio encoder with a JEPA.

    python train.py hparams/jepa_unstructured.yaml --data_folder /any/folder/of/audio
    torchrun --nproc_per_node=8 train.py hparams/jepa_unstructured.yaml --data_folder ... \
        --batch_size 256

Every line of the yaml is an option; SpeechBrain's run options (--device, --precision, --debug, ...)
work as everywhere. Started again with the same command, a run continues where it was stopped.
"""

import contextlib
import sys
from pathlib import Path

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.checkpoints import torch_recovery
from speechbrain.utils.distributed import if_main_process, main_process_only, run_on_main
from speechbrain.utils.logger import get_logger
from torch.distributed import get_rank, get_world_size, is_initialized

from speechbrain_jepa.brain import JEPABrain
from speechbrain_jepa.checkpoints import export_experiment, write_config
from speechbrain_jepa.data import (
    CropDataset,
    CropSampler,
    Manifest,
    MixedCropSampler,
    SkippedFiles,
    choose_workers,
    crop_loader,
    cut_segments,
    decode_once,
    make_demo_corpus,
    read_csv,
    scan_folder,
    split_held_out,
)
from speechbrain_jepa.description import COMMAND_FILE, command_line, describe_training
from speechbrain_jepa.files import folder_lock, full_disk_named, write_text
from speechbrain_jepa.recipe import parse_arguments, resolve_recipe

logger = get_logger("speechbrain_jepa.train")

SPLIT = "split"  # folder of the two manifests that this run trains and validates on


def prepare_manifests(hparams):
    """Find the audio and set some files aside; both parts are left in the output folder, for the
    cache folder may be shared by runs that set aside others."""
    options = {name: hparams[name] for name in ("data_folder", "cache_folder", "min_seconds")}
    if hparams["train_csv"] is not None:
        manifest, skipped = read_csv(hparams["train_csv"], **options)
    else:
        manifest, skipped = scan_folder(**options)
    parts = split_held_out(
        manifest,
        hparams["valid_share"],
        hparams["max_valid"],
        data_folder=hparams["data_folder"] or "",
        crop_frames=hparams["crop_frames"],
        seed=hparams["seed"],
        n_fft=hparams["n_fft"],
        verdicts=Path(hparams["output_folder"]) / SPLIT / "verdicts.json",
        progress=True,
    )
    cache_folder = Path(hparams["cache_folder"])
    for name, items in zip(("train", "valid"), parts):
        part = manifest.subset(items)
        if hparams["decode_once"]:
            kind = "float" if hparams["decode_once"] is True else hparams["decode_once"]
            place = (hparams["data_folder"], cache_folder / "decoded", skipped)
            part = decode_once(part, *place, kind=kind)
        if name == "valid":
            part = cut_segments(part, hparams["crop_frames"])
        part.save(Path(hparams["output_folder"]) / SPLIT / name)


def make_loaders(hparams):
    """Loaders of random training crops and of fixed validation crops, for this process."""
    rank, world_size = (get_rank(), get_world_size()) if is_initialized() else (0, 1)
    split = Path(hparams["output_folder"]) / SPLIT
    where = (hparams["data_folder"], hparams["crop_frames"], hparams["seed"])
    window = {"n_fft": hparams["n_fft"]}
    on_gpu = torch.cuda.is_available()
    workers = choose_workers(hparams["num_workers"], on_gpu)
    options = {"num_workers": workers, "pin_memory": on_gpu}
    sampling = (hparams["batch_size"], hparams["seed"])
    crops = {"crops_per_file": hparams["crops_per_file"]}

    train_set = CropDataset(Manifest.load(split / "train"), *where, **crops, **window)
    ranks = {"rank": rank, "world_size": world_size, "passes": hparams["passes_per_epoch"]}
    if hparams["mixed_frames"]:
        check_mixed(hparams["mixed_frames"], hparams["crop_frames"], hparams["crops_per_file"])
        mixed = (hparams["batch_size"], hparams["mixed_frames"])
        sampler = MixedCropSampler(len(train_set), *mixed, seed=hparams["seed"], **ranks)
    else:
        sampler = CropSampler(len(train_set), *sampling, **ranks, **crops)
    valid_set = CropDataset(Manifest.load(split / "valid"), *where, random_crops=False, **window)
    batches = list(CropSampler(len(valid_set), *sampling, shuffle=False))[rank::world_size]
    advice = {"advise_after": hparams["log_interval"]} if if_main_process() else {}
    return (
        crop_loader(train_set, sampler, **options, **advice),
        crop_loader(valid_set, batches, **options, keep_workers=False),  # read once, then kept
    )


def check_mixed(frames, crop_frames, crops_per_file):
    """The grid is that of the longest duration, and a file is opened for one crop."""
    if crops_per_file > 1:
        raise ValueError(f"crops_per_file={crops_per_file} with mixed_frames: set it to 1")
    if max(frames) != crop_frames:
        raise ValueError(
            f"mixed_frames={frames} with crop_frames={crop_frames}: crop_frames must be the "
            f"longest of them, {max(frames)}"
        )


@main_process_only
def find_normalization(hparams, dataset):
    """The pair of the checkpoint that is gone on from, or the yaml's, or that of random crops."""
    checkpoint = hparams["checkpointer"].find_checkpoint()
    if checkpoint is not None and "normalization" in checkpoint.paramfiles:
        normalization = hparams["normalization"]
        torch_recovery(normalization, checkpoint.paramfiles["normalization"], end_of_epoch=True)
        return normalization.mean.item(), normalization.std.item()
    if hparams["norm_mean"] is not None and hparams["norm_std"] is not None:
        return hparams["norm_mean"], hparams["norm_std"]
    normalization, features = hparams["normalization"], hparams["features"]
    sampler = CropSampler(len(dataset), 32, hparams["seed"], passes=hparams["passes_per_epoch"])
    batches = -(-hparams["norm_crops"] // (32 * dataset.crops_per_file))

    def spectrograms():
        for keys, _ in zip(sampler, range(batches)):
            batch = dataset.__getitems__(keys)
            hparams["skipped_files"].report(batch.failures)
            yield features(batch.wav, margins=True)

    normalization.fit(spectrograms())
    return normalization.mean.item(), normalization.std.item()


@main_process_only
def finish(hparams, brain):
    """Export the encoder, and whatever else the yaml asks for at the end."""
    output_folder = Path(hparams["output_folder"])
    if brain.debug:
        return
    pretrained = export_experiment(output_folder, output_folder / "pretrained")
    logger.info(f"Pretrained encoder: {pretrained}")
    if hparams.get("after_training") is not None:
        hparams["after_training"](hparams, pretrained)
    if hparams.get("report"):
        write_page_of_run(hparams, pretrained)


def write_page_of_run(hparams, pretrained):
    """report.html, where the libraries of the extra [evaluation] are installed."""
    try:
        from speechbrain_jepa.report import report_run
    except ImportError as error:
        logger.warning(f"No report: {error}")
    else:
        report_run(hparams, pretrained)


def pretrain(hparams, recipe, run_opts):
    """The whole run, in an output folder that nobody else works in."""
    with full_disk_named(hparams["output_folder"]):
        sb.create_experiment_directory(hparams["output_folder"])
    run_on_main(write_text, [Path(hparams["output_folder"]) / "hyperparams.yaml", recipe])
    run_on_main(write_text, [Path(hparams["output_folder"]) / COMMAND_FILE, command_line()])

    if hparams["online_probe_csv"] is not None:
        from speechbrain_jepa.evaluation.online_probe import OnlineProbe

        hparams["online_probe"] = OnlineProbe(
            hparams["online_probe_csv"], hparams["online_probe_every"], hparams["read_out"]
        )
    if hparams["data_folder"] is None and hparams["train_csv"] is None:
        logger.info("No --data_folder and no --train_csv: taking the generated demo corpus")
        hparams["data_folder"] = str(run_on_main(make_demo_corpus))
        logger.info(f"Demo corpus: {hparams['data_folder']}")
    run_on_main(prepare_manifests, [hparams])
    train_loader, valid_loader = make_loaders(hparams)
    hparams["skipped_files"] = SkippedFiles(Path(hparams["cache_folder"]) / "skipped.csv")
    hparams["normalization"].set(*find_normalization(hparams, train_loader.dataset))
    if hparams["use_tensorboard"]:
        from speechbrain.utils.train_logger import TensorboardLogger

        hparams["tensorboard_logger"] = TensorboardLogger(
            str(Path(hparams["output_folder"]) / "tensorboard")
        )

    hparams["valid_set"] = valid_loader.dataset
    brain = JEPABrain(
        hparams["modules"], hparams["opt_class"], hparams, run_opts, hparams["checkpointer"]
    )
    run_on_main(
        write_config,
        [Path(hparams["output_folder"]) / "encoder_config.json"],
        {
            "encoder": hparams["encoder"],
            "normalization": hparams["normalization"],
            "training": describe_training(hparams, brain),
            "read_out": hparams["read_out"],
            "log_mel": hparams["features"],
        },
    )
    brain.fit(hparams["epoch_counter"], train_loader, valid_loader)
    finish(hparams, brain)


if __name__ == "__main__":
    hparams_file, run_opts, overrides, given = parse_arguments(sys.argv[1:])
    recipe = resolve_recipe(hparams_file, overrides, given)
    sb.utils.distributed.ddp_init_group(run_opts)
    hparams = load_hyperpyyaml(recipe)
    with contextlib.ExitStack() as stack:
        if if_main_process():
            stack.enter_context(
                folder_lock(
                    hparams["output_folder"],
                    fix="wait for that run, end it (after a torchrun that was killed, its "
                    "processes go on), or name another --output_folder",
                )
            )
            hparams["checkpointer"].remove_leftovers()
        pretrain(hparams, recipe, run_opts)
