"""Which layers and which pooling of a frozen encoder a linear probe likes best.

    python recipes/pretraining/probe_layers.py results/tiny --tasks_folder my_tasks

Takes what AudioJEPA takes, a run that is still going included. One row per read-out: a layer's mean
over time, its mean and deviation, and all layers together.
"""

import argparse

import numpy as np

from speechbrain_jepa import AudioJEPA
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
    options = parser.parse_args(arguments)
    encoder = AudioJEPA(options.encoder, output_all_hiddens=True, pooling="mean_std")
    shape = (encoder.num_layers, 2, encoder.get_output_dim())
    label_sets = read_label_sets(options.tasks_folder)
    embed = {"all": [lambda wavs: statistics(encoder, wavs).reshape(len(wavs), -1)]}
    features, read = embed_files(files_used(label_sets), embed)
    rows = read_outs(features["all"][0].reshape(len(read), *shape))
    print(probe_table({name: [x] for name, x in rows.items()}, read, label_sets))


if __name__ == "__main__":
    main()
