"""Variants of a recipe, and their overrides."""

import pytest
from hyperpyyaml import load_hyperpyyaml

from speechbrain_jepa.recipe import resolve_recipe

LONG = """\
seed: 1
out: !ref results/<seed>
share: 0.5
thing: !new:collections.Counter
    a: !ref <seed>
    b: 2
"""
SHORT = """\
recipe: !include:long.yaml
    out: !ref results/short/<seed>
    number: 7
    thing: !new:fractions.Fraction
        numerator: !ref <number>
        denominator: 2
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "long.yaml").write_text(LONG)
    (tmp_path / "variants").mkdir()
    (tmp_path / "variants" / "long.yaml").write_text("recipe: !include:../long.yaml\n")
    (tmp_path / "variants" / "short.yaml").write_text(SHORT)
    return tmp_path


def load(path, overrides=None):
    return load_hyperpyyaml(resolve_recipe(path, overrides))


def test_a_recipe_that_includes_nothing_is_hyperpyyaml_as_it_is(folder):
    with open(folder / "long.yaml") as file:
        expected = load_hyperpyyaml(file, "seed: 4")
    assert load(folder / "long.yaml", "seed: 4") == expected


def test_a_variant_replaces_values_and_whole_objects_and_adds_options(folder):
    hparams = load(folder / "variants" / "short.yaml")
    assert hparams["out"] == "results/short/1"
    assert hparams["share"] == 0.5
    assert hparams["thing"] == 3.5


def test_overrides_come_last_whichever_file_an_option_stands_in(folder):
    hparams = load(folder / "variants" / "short.yaml", "{seed: 3, number: 8, share: 0.1}")
    assert hparams["out"] == "results/short/3"
    assert (hparams["share"], hparams["thing"]) == (0.1, 4)


def test_an_override_may_give_one_argument_of_an_object(folder):
    assert load(folder / "long.yaml", {"thing": {"b": 5}})["thing"] == {"a": 1, "b": 5}


def test_a_misspelt_option_is_an_error_that_lists_the_options(folder):
    with pytest.raises(KeyError, match=r"sead: no option .* seed, out, share, thing, number"):
        load(folder / "variants" / "short.yaml", "sead: 3")


def test_run_options_replace_lines_of_their_names_only(folder):
    given = {"share": 0.25, "precision": "fp32"}
    hparams = load_hyperpyyaml(resolve_recipe(folder / "long.yaml", "seed: 2", given))
    assert hparams["share"] == 0.25
    assert "precision" not in hparams


def test_a_missing_file_is_named(folder):
    (folder / "broken.yaml").write_text("recipe: !include:lost.yaml\n")
    with pytest.raises(FileNotFoundError, match=r"lost.yaml"):
        resolve_recipe(folder / "broken.yaml")
