"""The quickstart's report: a probe table, the paper's Fig. 1, the run's curves."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from speechbrain_jepa.data import CropDataset, make_demo_corpus
from speechbrain_jepa.encoder import AudioJEPA
from speechbrain_jepa.evaluation.comparison import untrained_like
from speechbrain_jepa.evaluation.logmel import LOG_MEL
from speechbrain_jepa.evaluation.online_probe import embed_with
from speechbrain_jepa.evaluation.pictures import draw_curves, draw_masks
from speechbrain_jepa.evaluation.quick_probe import ProbeTable, quick_probe
from speechbrain_jepa.files import whole_file
from speechbrain_jepa.masking import MultiBlockMasking, TimeMasking, UnstructuredMasking

UNTRAINED_ENCODERS = 3  # other initialisations of the same architecture


def report(hparams: dict, pretrained: Path, tasks_folder: str | Path | None = None) -> ProbeTable:
    """Probe a pretrained encoder against untrained ones and log-mel statistics; draw pictures.

    Prints the table; writes `probe.csv`, `masks.png` and `curves.png` into the output folder.

    Arguments
    ---------
    hparams : dict
        Of the pretraining recipe.
    pretrained : Path
        The exported encoder.
    tasks_folder : str, Path or None
        Label sets to probe (see `read_label_sets`). None: the demo corpus.

    Returns
    -------
    ProbeTable
    """
    output = Path(hparams["output_folder"])
    table = probe_run(hparams, pretrained, tasks_folder or make_demo_corpus())
    masks = draw_strategies(hparams, output / "masks.png")
    curves = draw_curves(output / "metrics.csv", output / "curves.png")
    print(f"\n{table}\n{table.verdict()}\n")
    print(f"Masking strategies:  {masks}\nLoss and rank:       {curves}")
    print(f"Pretrained encoder:  {pretrained}")
    return table


def probe_run(hparams: dict, pretrained: Path, labelled: str | Path) -> ProbeTable:
    """Probe a run's encoder, untrained ones of its shape and log-mel statistics: `probe.csv`.

    Arguments
    ---------
    hparams : dict
        Of the pretraining recipe.
    pretrained : Path
        The exported encoder.
    labelled : str or Path
        See `read_label_sets`.

    Returns
    -------
    ProbeTable
    """
    seeds = (hparams["seed"] + 1000 * number for number in range(UNTRAINED_ENCODERS))
    untrained = [untrained_like(AudioJEPA(pretrained), seed) for seed in seeds]
    table = quick_probe(
        labelled,
        {
            "untrained": [embed_with(encoder) for encoder in untrained],
            "trained": [embed_with(AudioJEPA(pretrained))],
        },
    )
    with whole_file(Path(hparams["output_folder"]) / "probe.csv") as partial:
        table.accuracy.to_csv(partial)
    return table


def draw_strategies(hparams: dict, path: Path) -> Path:
    """One validation crop under each strategy, with masks from the samplers themselves.

    Arguments
    ---------
    hparams : dict
        Of the pretraining recipe, with `valid_set`.
    path : Path
        Where the PNG goes.

    Returns
    -------
    Path
    """
    grid = hparams["grid"]
    dataset: CropDataset = hparams["valid_set"]
    wav = dataset.__getitems__([(0, 0)]).wav
    spectrogram = hparams["features"].cpu()(wav, margins=True)[0]
    generator = torch.Generator().manual_seed(hparams["seed"])
    masks = {}
    for name, strategy in (
        ("unstructured", UnstructuredMasking(grid)),
        ("multi-block", MultiBlockMasking(grid)),
        ("time", TimeMasking(grid)),
    ):
        drawn = strategy(1, generator=generator)
        masks[name] = (drawn.context_index[0], drawn.target_index[0])
    return draw_masks(spectrogram, masks, (grid.patch_frequency, grid.patch_time), path)


def join(tables: Sequence[str | Path]) -> ProbeTable:
    """The `probe.csv` of several runs as one table: each run's encoders are further seeds."""
    frames = [pd.read_csv(table, index_col=["features", "seed"]) for table in tables]
    joined = pd.concat(frames)
    deterministic = joined.xs(LOG_MEL, drop_level=False).iloc[:1]
    seeds = joined.drop(LOG_MEL).reset_index("seed", drop=True)
    numbers = seeds.groupby(level=0).cumcount()
    seeds.index = pd.MultiIndex.from_arrays([seeds.index, numbers], names=["features", "seed"])
    return ProbeTable(pd.concat([deterministic, seeds.sort_index(ascending=[False, True])]))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m speechbrain_jepa.evaluation.quickstart RUN/probe.csv ...")
    combined = join(sys.argv[1:])
    print(combined)
    print(combined.verdict())
