"""Small runs of the recipe with one option each: for test_options.py, and as one of two ranks.

RANK=0 LOCAL_RANK=0 python option_runs.py <folder> <folder of audio>
"""

import os
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from ruamel.yaml import YAML
from scripts import load_script
from speechbrain.utils.epoch_loop import EpochCounter
from written_out import EPS, REPOSITORY, recipe_hparams

from speechbrain_jepa.brain import JEPABrain
from speechbrain_jepa.data import scan_folder

CLIPS, STEPS = 4, 4  # 24 files: six batches an epoch on one process, three on each of two
OPTIONS = {
    "target_layers": {"target_layers": "all", "encoder_depth": 2},
    "cross-attention": {"predictor_cross_attention": True},
    "share of targets": {"predicted_share": 0.5},
    "mixed durations": {"mixed_frames": [32, 64], "batch_size": 2},
    "muon": {"muon": True},
    "augmentation": {"mix_background": 0.5, "random_gain_db": 6},
    "many masks": {"masks_per_clip": 3, "target_masking": "latent", "target_share": 0.8},
    "inverse blocks": {"recipe": "inverse_blocks", "masks_per_clip": 3},
    "VarianceCovariance": {"recipe": "quickstart"},
    "SIGReg": {"regularizer": YAML().load("!new:speechbrain_jepa.regularizers.SIGReg {}")},
}
if not hasattr(torch.optim, "Muon"):
    del OPTIONS["muon"]  # torch before 2.9
SETTINGS = {
    **{"crop_frames": 64, "batch_size": CLIPS, "num_workers": 0, "number_of_epochs": 2},
    **{"norm_mean": -9.0, "norm_std": 4.0, "warmup_epochs": 1, "base_learning_rate": 0.05},
    **{"ema_start": 0.9, "ema_end": 0.99, "precision": "fp32", "log_interval": 1},
}
RUN = {"device": "cpu", "noprogressbar": True, "optimizer_step_limit": STEPS}


class Recorded(JEPABrain):
    """Keeps what its JEPA was given in training, and dies before a step if it is told to."""

    dies_before = None

    def on_fit_start(self):
        super().on_fit_start()
        self.given = []
        self.jepa.register_forward_pre_hook(
            lambda _, given: self.given.append(given) if torch.is_grad_enabled() else None
        )

    def on_fit_batch_start(self, batch, should_step):
        if self.optimizer_step == self.dies_before:
            raise KeyboardInterrupt
        super().on_fit_batch_start(batch, should_step)


def recipe():
    """train.py as a module."""
    return load_script(REPOSITORY / "train.py")


def make_brain(folder, audio_folder, options, **run_opts):
    """A brain of the recipe (the option `recipe`, default jepa_unstructured), and its loaders."""
    folder.mkdir(exist_ok=True)
    data = {"data_folder": str(audio_folder), **SETTINGS, **options}
    hparams = recipe_hparams(data.pop("recipe", "jepa_unstructured"), folder, **data)
    hparams["normalization"].set(hparams["norm_mean"], hparams["norm_std"])
    brain = Recorded(
        hparams["modules"],
        partial(hparams["opt_class"], eps=EPS),
        hparams,
        {**RUN, "max_grad_norm": 3.0, **run_opts},
        hparams["checkpointer"],
    )
    brain.counter = EpochCounter(hparams["number_of_epochs"])
    hparams["checkpointer"].recoverables["counter"] = brain.counter
    return brain, recipe().make_loaders(hparams)


def split(folder, audio_folder):
    """The manifests that `make_loaders` reads: the same files for both."""
    manifest, _ = scan_folder(audio_folder, folder.parent / "scan", progress=False)
    manifest.save(folder / "split" / "train")
    manifest.subset(range(CLIPS)).save(folder / "split" / "valid")


if __name__ == "__main__":
    base, audio = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{base / 'meeting'}",
        rank=int(os.environ["RANK"]),
        world_size=2,
        timeout=timedelta(seconds=500),
    )
    for name, chosen in OPTIONS.items():
        brain, loaders = make_brain(base / name, audio, chosen, distributed_backend="gloo")
        start = {key: value.clone() for key, value in brain.jepa.state_dict().items()}
        brain.fit(brain.counter, *loaders)
        diary = (start, brain.jepa.state_dict(), brain.given)
        torch.save(diary, base / name / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
