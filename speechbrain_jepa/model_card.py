"""The two files of a pretrained folder that are for people and for SpeechBrain."""

import yaml

from speechbrain_jepa import features
from speechbrain_jepa.vit import PatchGrid

LICENCE_TO_CHOOSE = (
    "To be filled in by whoever publishes this folder, with regard to the audio it was trained on."
)
HYPERPARAMS_TEXT = """\
# For SpeechBrain: WaveformEncoder.from_hparams(source=<this folder>). Settings and parameters are
# read from config.json and model.safetensors. Any line can be overridden:
# from_hparams(source=..., overrides={"output_all_hiddens": True})

output_norm: False # layer norm over each clip's output
output_all_hiddens: False # the output of every layer
layers: null # all, or a list of layers: of a time step; null: the last
pooling: null # of clip_level: mean or mean_std. null, and layers null: as config.json says
flat: False # average the frequency patches of a time step instead of concatenating them
normalization: pretraining # or instance
max_windows_per_batch: 128
clip_level: False # one embedding per clip instead of one per time step

encoder: !new:speechbrain_jepa.inference.PretrainedAudioJEPA
    clip_level: !ref <clip_level>
    output_norm: !ref <output_norm>
    output_all_hiddens: !ref <output_all_hiddens>
    layers: !ref <layers>
    pooling: !ref <pooling>
    flat: !ref <flat>
    normalization: !ref <normalization>
    max_windows_per_batch: !ref <max_windows_per_batch>

modules:
    encoder: !ref <encoder>

pretrainer: !new:speechbrain_jepa.inference.FolderPretrainer
    loadables:
        encoder: !ref <encoder>
"""


def model_card(config: dict, parameters: int) -> str:
    """README.md of a pretrained folder.

    Arguments
    ---------
    config : dict
        The content of config.json.
    parameters : int
        How many the encoder has.

    Returns
    -------
    str
    """
    settings, grid = config["encoder"], PatchGrid(**config["encoder"]["grid"])
    millions = parameters / 1e6
    seconds = grid.frames * features.HOP_LENGTH / features.SAMPLE_RATE
    step = grid.patch_time * features.HOP_LENGTH / features.SAMPLE_RATE
    layers = f"{settings['depth']} layers, {settings['num_heads']} heads, {settings['dim']} dims"
    shape = f"{grid.patch_frequency} bands x {grid.patch_time} frames"
    dims = f"{grid.frequency_patches} x {settings['dim']}"
    training = yaml.safe_dump(config["training"], sort_keys=False, allow_unicode=True).strip()
    title, origin, licence = _origin(config["training"])
    return f"""\
---
library_name: speechbrain
pipeline_tag: feature-extraction
tags: [audio, speechbrain, self-supervised, jepa]
license: other # TO BE CHOSEN by whoever publishes this folder
---

# Audio encoder {title}

A vision transformer over log-mel spectrograms (16 kHz audio, {config["features"]["n_mels"]} bands,
windows of {config["features"]["n_fft"]} samples, 100 frames a second), {origin}

| | |
| --- | --- |
| encoder | {layers}, {millions:.1f} M parameters |
| window | {grid.frames} frames ({seconds:.2f} s); longer audio is cut into windows |
| patches | {shape}, {grid.frequency_patches} x {grid.time_patches} of them |
| output | one vector of {dims} dims every {step:g} s |

## How it was trained

```yaml
{training}
```

## How to use it

In a clone of speechbrain-jepa's repository, `pip install .`. `FOLDER` is this folder, or its
Hugging Face repo id.

SpeechBrain:

```python
from speechbrain.inference.encoders import WaveformEncoder

encoder = WaveformEncoder.from_hparams(source="FOLDER")
embeddings = encoder.encode_file("audio.wav")  # [1, time steps, dims]
```

s3prl:

```
pip install '.[s3prl]'
python -m speechbrain_jepa.s3prl run_downstream.py -m train -n my_run -d emotion \\
    -u audio_jepa -k FOLDER
```

PyTorch:

```python
from speechbrain_jepa import AudioJEPA

encoder = AudioJEPA("FOLDER")
embedding = encoder.embed(wav)  # [B, samples] at 16 kHz to [B, dims]
```

## Licence

{licence}
"""


def _origin(training: dict) -> tuple[str, str, str]:
    """Title, description and licence of the model card."""
    if "converted_from" in training:
        return (
            f"converted from {training['converted_from']}",
            f"with the weights of {training['converted_from']} ({training['source']}), converted "
            "by\nspeechbrain-jepa.",
            "That of the original weights.",
        )
    return (
        "pretrained with a JEPA",
        "pretrained without labels by predicting the representations of masked patches:\n"
        'Riou et al., "Investigating Design Choices in Joint-Embedding Predictive Architectures '
        'for General\nAudio Representation Learning", 2024. Written by speechbrain-jepa.',
        LICENCE_TO_CHOOSE,
    )
