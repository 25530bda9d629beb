"""docs/released_code.md: what differs from the released code, and the options that set it equal."""

from pathlib import Path

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from torch import nn

from speechbrain_jepa.families import FAMILIES
from speechbrain_jepa.recipe import resolve_recipe
from speechbrain_jepa.vit import Encoder, PatchGrid

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "hparams").glob("*.yaml"))
SMALL = "encoder_dim: 24\nencoder_depth: 1\npredictor_dim: 24\npredictor_depth: 1\n"
HEADS = "encoder_heads: 3\npredictor_heads: 3\n"


def load(recipe, tmp_path, lines=""):
    overrides = f"output_folder: {tmp_path}\n{SMALL}{HEADS}{lines}"
    return load_hyperpyyaml(resolve_recipe(recipe, overrides))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize(("lines", "eps"), [("", 1e-6), ("norm_eps: 0.00001", 1e-5)])
def test_one_line_sets_the_eps_of_every_layer_norm(recipe, lines, eps, tmp_path):
    jepa = load(recipe, tmp_path, lines)["jepa"]
    norms = [module for module in jepa.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 9  # three in each of context encoder, target encoder and predictor
    assert {norm.eps for norm in norms} == {eps}
    assert jepa.context_encoder.config["norm_eps"] == eps  # which goes into config.json


def test_weights_are_xavier_uniform_and_biases_zero_the_patch_projections_too():
    torch.manual_seed(0)
    encoder = Encoder(PatchGrid(), dim=192, depth=1, num_heads=3)
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            bound = (6 / sum(module.weight.shape)) ** 0.5
            assert module.weight.abs().max() <= bound < 1.01 * module.weight.abs().max()
            assert not module.bias.any()


def test_audiosets_pair_is_the_same_wherever_it_is_named():
    """−7.0633, 4.1971: configs/data/audioset.yaml of the released code."""
    assert FAMILIES["released-jepa"].normalization == (-7.0633, 4.1971)
    recipe = ROOT / "hparams" / "jepa_unstructured.yaml"
    assert "AudioSet's pair is -7.0633, 4.1971" in recipe.read_text()
    for page in ("released_code.md", "convert.md"):
        text = (ROOT / "docs" / page).read_text()
        assert "7.0633, 4.1971" in text and "7.06," not in text


def test_texts_install_from_the_repository_while_there_is_no_release():
    sources = [
        path for folder in ("docs", "speechbrain_jepa") for path in (ROOT / folder).rglob("*")
    ]
    for path in [ROOT / "README.md", *sources]:
        if path.suffix in (".md", ".py"):
            text = path.read_text()
            assert "pip install speechbrain-jepa" not in text, path
            assert "pip install 'speechbrain-jepa" not in text, path
