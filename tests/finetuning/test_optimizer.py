"""Layer-wise learning rates."""

import pytest

from speechbrain_jepa.classifier import AudioClassifier
from speechbrain_jepa.finetuning.encoder import FinetunedJEPA
from speechbrain_jepa.finetuning.optimizer import layerwise_groups


def test_every_parameter_has_the_rate_of_its_layer_and_vectors_no_decay(parts):
    model = AudioClassifier(FinetunedJEPA(parts), ["a", "b"], norm="layer")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in layerwise_groups(model, layer_decay=0.5):
        for parameter in group["params"]:
            name = names.pop(id(parameter))
            found[name] = group["lr_scale"]
            assert (group.get("weight_decay") == 0) == (parameter.dim() == 1), name
    assert not names
    expected = {
        "encoder.encoder.patch_embed.weight": 0.125,
        "encoder.encoder.blocks.0.mlp.fc1.bias": 0.25,
        "encoder.encoder.blocks.1.attn.qkv.weight": 0.5,
        "encoder.encoder.norm.weight": 1.0,
        "head.linear.weight": 1.0,
        "head.norm.bias": 1.0,
    }
    assert expected.items() <= found.items()


def test_frozen_parameters_are_left_out(parts):
    model = AudioClassifier(FinetunedJEPA(parts, freeze_layers=1), ["a", "b"])
    scales = {group["lr_scale"] for group in layerwise_groups(model, layer_decay=0.5)}
    assert scales == {0.5, 1.0}
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        layerwise_groups(model)
    with pytest.raises(ValueError, match="layer_decay=0"):
        layerwise_groups(model, layer_decay=0)
