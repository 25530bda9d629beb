"""Which layers and which pooling of a frozen encoder a linear probe likes best.

    python recipes/pretraining/probe_layers.py results/tiny --tasks_folder my_tasks

Takes what AudioJEPA takes, a run that is still going included. One row per read-out: a layer's mean
over time, its mean and deviation, and all layers together; beside log-mel statistics and untrained
encoders of the same shape, which are read out as `embed` does. Choose with --split valid.
"""

import argparse

import numpy as np

from speechbrain_jepa import AudioJEPA
from speechbrain_jepa.evaluation.comparison import UNTRAINED, untrained_like
from speechbrain_jepa.evaluation.logmel import LOG_MEL, logmel_statistics
from speechbrain_jepa.evaluation.online_probe import embed_with
from speechbrain_jepa.evaluation.quick_probe import (
    embed_files,
    files_used,
    probe_table,
    read_label_sets,
)


def statistics(encoder: AudioJEPA, wavs: list[np.ndarray]) -> np.ndarray:
    """Mean and deviation over each clip's own time steps of every layer: [clips, L, 2, C]."""
    layers = embed_with(encoder)(wavs).swapaxes(0, 1)
    return layers.reshape(*layers.shape[:2], 2, -1)


def read_outs(features: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of the table from [clips, L, 2, C]."""
    clips, layers = features.shape[:2]
    named = {f"layer {layer}, mean": features[:, layer, 0] for layer in range(layers)}
    named["last layer, mean and deviation"] = features[:, -1].reshape(clips, -1)
    named["all layers, mean"] = features[:, :, 0].reshape(clips, -1)
    named["all layers, mean and deviation"] = features.reshape(clips, -1)
    return named


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("encoder", help="a pretrained folder, an experiment folder, a repo id")
    parser.add_argument("--tasks_folder", required=True, help="of meta.csv files")
    parser.add_argument("--split", choices=("valid", "test"), default="test", help="to score on")
    parser.add_argument("--seeds", type=int, default=3, help="of the untrained encoders")
    options = parser.parse_args(arguments)
    encoder = AudioJEPA(options.encoder, output_all_hiddens=True, pooling="mean_std")
    shape = (encoder.num_layers, 2, encoder.get_output_dim())
    untrained = [untrained_like(AudioJEPA(options.encoder), seed) for seed in range(options.seeds)]
    embedders = {
        LOG_MEL: [logmel_statistics],
        UNTRAINED: [embed_with(fresh) for fresh in untrained],
        "all": [lambda wavs: statistics(encoder, wavs).reshape(len(wavs), -1)],
    }
    label_sets = read_label_sets(options.tasks_folder)
    features, read = embed_files(files_used(label_sets, ("train", options.split)), embedders)
    rows = read_outs(features.pop("all")[0].reshape(len(read), *shape))
    features |= {name: [x] for name, x in rows.items()}
    print(probe_table(features, read, label_sets, options.split))


if __name__ == "__main__":
    main()
