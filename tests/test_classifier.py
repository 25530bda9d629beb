"""The classifier: pooling written out, nothing depends on batch mates, its folder."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from speechbrain_jepa.checkpoints import load_pretrained
from speechbrain_jepa.classifier import AudioClassifier, Decoding
from speechbrain_jepa.encoder import AudioJEPA
from speechbrain_jepa.features import Normalization
from speechbrain_jepa.vit import Encoder, PatchGrid

LABELS = ["Füße", "dog; small", "rain"]
KINDS = (
    dict(),
    dict(flat=True, norm="layer", multilabel=True),
    dict(pooling="attention", step_seconds=0.04),
    dict(level="step", step_seconds=0.08, decoding=Decoding([0.1, 0.5, 0.9], 0.3)),
    dict(level="step", pooling="attention", flat=True, norm="none"),
)


def make(step_seconds=None, **options):
    torch.manual_seed(0)
    encoder = Encoder(PatchGrid(frames=64), dim=24, depth=1, num_heads=3)
    parts = encoder, Normalization(-7.0, 4.0)
    model = AudioClassifier(
        AudioJEPA(parts, freeze=False, step_seconds=step_seconds), LABELS, **options
    )
    for part in model.head.values():  # untrained they are near zero
        for tensor in part.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.1)
    return model.eval()


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join(map(str, kind.values())) or "mean")
def model(request):
    return make(**request.param)


def test_logits_are_the_definition_written_out(model):
    wav, wav_lens = torch.randn(2, 16_000), torch.tensor([1.0, 0.55])
    with torch.no_grad():
        found = model(wav, wav_lens)
    for clip, length in enumerate((16_000, 8_800)):
        with torch.no_grad():
            steps = model.encoder(wav[clip : clip + 1, :length])[0]
            features = steps.unflatten(-1, (5, 24)).mean(1) if model.flat else steps
            head = model.head

            def normal(x):
                return head["norm"](x) if "norm" in head else x  # noqa: B023

            if model.pooling == "mean":
                expected = head["linear"](normal(features.mean(0, keepdim=True)))[0]
                assert found.steps is None
            else:
                logits = head["linear"](normal(features))
                torch.testing.assert_close(
                    found.steps[clip, : len(steps)], logits, rtol=1e-3, atol=1e-4
                )
                assert not found.steps[clip, len(steps) :].any()
                if model.pooling is None:
                    assert found.clip is None
                    continue
                weights = head["attention"](normal(features)).softmax(0)
                expected = sum(weights[t] * logits[t] for t in range(len(steps)))
            torch.testing.assert_close(found.clip[clip], expected, rtol=1e-3, atol=1e-4)
        assert found.present[clip].sum() == len(steps)


def test_batch_norm_sees_steps_that_count_alone():
    model = make(level="step").train()
    model.head["norm"].reset_running_stats()
    wav = torch.randn(2, 16_000)
    model(wav, torch.tensor([1.0, 0.5]))
    with torch.no_grad():
        steps = torch.cat([model.encoder(wav[:1])[0], model.encoder(wav[1:, :8_000])[0]])
    torch.testing.assert_close(
        model.head["norm"].running_mean, 0.1 * steps.mean(0), rtol=1e-3, atol=1e-5
    )


def test_folder_brings_the_classifier_back(model, tmp_path):
    folder = model.save(tmp_path / "classifier", {"fine_tuned": {"test": 0.5}})
    loaded = AudioClassifier.load(folder)
    assert loaded.labels == LABELS and loaded.decoding == model.decoding
    wav, wav_lens = torch.randn(2, 20_000), torch.tensor([1.0, 0.4])
    with torch.no_grad():
        for before, after in zip(model(wav, wav_lens), loaded(wav, wav_lens)):
            assert before is after is None or torch.equal(before, after)
    assert not any(parameter.requires_grad for parameter in loaded.encoder.parameters())
    # the folder is a pretrained one too
    encoder, normalization, config = load_pretrained(folder)
    assert config["training"] == {"fine_tuned": {"test": 0.5}}
    for before, after in zip(model.encoder.encoder.parameters(), encoder.parameters()):
        assert torch.equal(before, after)
    plain = AudioJEPA(folder)
    assert torch.equal(plain(wav), AudioJEPA((encoder, normalization))(wav))
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "speechbrain_jepa.tag" in card and "Füße" in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classifier"]
    model.save(folder)  # replaces itself
    assert load_pretrained(folder)[2]["training"] == {}


def test_the_log_mel_pair_that_was_measured_goes_along(tmp_path):
    encoder = Encoder(PatchGrid(frames=64), dim=24, depth=1, num_heads=3)
    model = AudioJEPA((encoder, Normalization()), normalization="dataset", freeze=False)
    wav = torch.randn(4, 16_000)
    model.fit_normalization([wav])
    classifier = AudioClassifier(model, LABELS).eval()
    loaded = AudioClassifier.load(classifier.save(tmp_path / "c"))
    assert torch.equal(loaded(wav).clip, classifier(wav).clip)
    assert loaded.encoder.normalization.mean == model.normalization.mean != 0


def test_nothing_else_is_replaced(tmp_path):
    model = make()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        model.save(tmp_path)
    with pytest.raises(FileExistsError, match="is a file"):
        model.save(tmp_path / "notes.txt")
    model.head["linear"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"linear\.weight of the head holds NaN"):
        model.save(tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(format_version=2), "format_version 2"),
        (dict(labels=["a"]), "the head of 3 labels, .* names 1"),
        (dict(labels=["a", "a", "b"]), "none twice"),
        (dict(labels=[1, 2, 3]), "expected 1 to"),
        (dict(labels="abc"), "labels='abc'"),
        (dict(level="word"), "level='word'"),
        (dict(norm=None), "norm=None"),
        (dict(pooling="attention"), "asks for"),
        (dict(step_seconds=0.033), "step_seconds=0.033"),
        (dict(decoding={"thresholds": [0.5], "median_seconds": 0}), "decoding="),
        (dict(decoding={"thresholds": [0.5, 0.5, None], "median_seconds": 0}), "decoding="),
        (dict(code="import os"), "'code' is unknown"),
    ],
)
def test_a_folder_that_says_nonsense_is_an_error_that_names_it(change, message, tmp_path):
    folder = make().save(tmp_path / "c")
    config = json.loads((folder / "classifier.json").read_text())
    (folder / "classifier.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message) as error:
        AudioClassifier.load(folder)
    assert str(folder) in str(error.value)


def test_a_head_that_is_damaged_or_lacks_a_part_is_an_error(tmp_path):
    folder = make().save(tmp_path / "c")
    state = load_file(folder / "classifier.safetensors")
    save_file(
        {**state, "linear.bias": torch.full((3,), torch.inf)}, folder / "classifier.safetensors"
    )
    with pytest.raises(ValueError, match=r"linear\.bias holds NaN or infinity"):
        AudioClassifier.load(folder)
    state.pop("norm.running_var")
    save_file(state, folder / "classifier.safetensors")
    with pytest.raises(ValueError, match="asks for"):
        AudioClassifier.load(folder)
    (folder / "classifier.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="recipes/finetuning"):
        AudioClassifier.load(folder)


def test_options_that_do_not_fit_are_refused():
    for options, message in (
        (dict(pooling="max"), "pooling='max'"),
        (dict(level="step", pooling="mean"), "None, attention"),
        (dict(norm="group"), "norm='group'"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**options)
    encoder = Encoder(PatchGrid(frames=64), dim=24, depth=1, num_heads=3)
    parts = encoder, Normalization(-7.0, 4.0)
    with pytest.raises(ValueError, match="without output_all_hiddens"):
        AudioClassifier(AudioJEPA(parts, output_all_hiddens=True), LABELS)
