"""`audio_jepa` among s3prl's upstreams: what s3prl's own tests ask of each."""

import base64
import hashlib
import importlib
import math

import numpy as np
import pytest
import soundfile
import torch

import speechbrain_jepa.s3prl  # noqa: F401  before s3prl: this registers the entries

RATE = 16_000
SHORTEST = 0.05  # seconds


@pytest.fixture(scope="module", autouse=True)
def needs_s3prl(s3prl_folder):
    return s3prl_folder


@pytest.fixture
def model(encoder_folder):
    from s3prl.nn import S3PRLUpstream

    return S3PRLUpstream("audio_jepa", path_or_url=str(encoder_folder))


def pseudo_wavs(**options):
    from s3prl.util.pseudo_data import get_pseudo_wavs

    return get_pseudo_wavs(padded=True, **options)


def test_entries_are_on_the_hub():
    from s3prl import hub
    from s3prl.nn import S3PRLUpstream

    names = {name for name in S3PRLUpstream.available_names() if "jepa" in name}
    entries = ("", "_20ms", "_40ms", "_hf", "_local", "_url")
    assert names == {f"audio_jepa{entry}" for entry in entries}
    assert all(callable(getattr(hub, name)) for name in names)


def test_same_features_and_layers_in_eval_and_train_mode(model):
    model.eval()
    with torch.no_grad():
        first, lengths = model(*pseudo_wavs())
        again, _ = model(*pseudo_wavs())
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    assert len(first) == model.num_layers == 3
    assert model.hidden_sizes == [240] * 3 and model.downsample_rates == [2560] * 3
    for training in (False, True):
        model.train(training)
        for seed in range(1, 4):
            wavs, wavs_len = pseudo_wavs(seed=seed)
            layers, lengths = model(wavs, wavs_len)
            assert len(layers) == 3
            expected = [math.ceil(samples / 2560) for samples in wavs_len.tolist()]
            assert all(length.tolist() == expected for length in lengths)


@pytest.mark.parametrize("count, longest", [(1, SHORTEST), (2, SHORTEST), (3, 1)])
def test_gradients_under_anomaly_detection(model, count, longest):
    with torch.autograd.set_detect_anomaly(True):
        layers, _ = model(*pseudo_wavs(n=count, min_secs=SHORTEST, max_secs=longest))
        sum(layer.sum() for layer in layers).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("entry", "rate"), [("audio_jepa_20ms", 320), ("audio_jepa_40ms", 640)])
def test_finer_steps_from_the_same_weights(entry, rate, encoder_folder):
    from s3prl.nn import Featurizer, S3PRLUpstream

    upstream = S3PRLUpstream(entry, path_or_url=str(encoder_folder))
    wavs, wavs_len = pseudo_wavs(n=3, min_secs=SHORTEST, max_secs=4)
    features, lengths = Featurizer(upstream)(*upstream(wavs, wavs_len))
    assert upstream.downsample_rates == [rate] * 3
    assert lengths.tolist() == [math.ceil(samples / rate) for samples in wavs_len.tolist()]
    assert features.shape == (3, max(lengths), 240)
    by_option = S3PRLUpstream(
        "audio_jepa", path_or_url=str(encoder_folder), extra_conf={"step_seconds": rate / RATE}
    )
    torch.testing.assert_close(by_option(wavs, wavs_len)[0], upstream(wavs, wavs_len)[0])


def test_shorter_than_s3prl_allows(model):
    layers, lengths = model(torch.randn(2, 400), torch.tensor([400, 80]))
    assert layers[0].shape == (2, 1, 240) and lengths[0].tolist() == [1, 1]


def test_randomized(encoder_folder):
    from s3prl.nn import S3PRLUpstream

    torch.manual_seed(0)
    trained, random = (
        S3PRLUpstream("audio_jepa", path_or_url=str(encoder_folder), randomize=randomize)
        for randomize in (False, True)
    )
    wavs = pseudo_wavs()
    assert not torch.allclose(trained(*wavs)[0][-1], random(*wavs)[0][-1], atol=0.1)


def test_featurizer_of_the_package(model):
    from s3prl.nn import Featurizer

    for normalize in (False, True):
        featurizer = Featurizer(model, normalize=normalize)
        features, _ = featurizer(*model(*pseudo_wavs()))
        assert featurizer.output_size == features.shape[-1] == 240
        assert featurizer.downsample_rate == 2560


def test_features_of_the_runner_do_not_depend_on_the_batch(encoder_folder):
    """Through the Featurizer of run_downstream.py, which cuts to len / downsample rate."""
    from s3prl import hub
    from s3prl.upstream.interfaces import TOLERABLE_SEQLEN_DIFF, Featurizer

    upstream = hub.audio_jepa(ckpt=str(encoder_folder), model_config=None, refresh=False)
    featurizer = Featurizer(upstream, upstream_device="cpu")
    torch.nn.init.normal_(featurizer.weights)
    generator = torch.Generator().manual_seed(0)
    seconds = [SHORTEST, 60.0, *torch.empty(5).uniform_(0.05, 60, generator=generator).tolist()]
    wavs = [torch.randn(int(s * RATE), generator=generator) for s in seconds]
    with torch.no_grad():
        together = featurizer(wavs, upstream(wavs))
        for wav, own in zip(wavs, together):
            whole = upstream([wav])
            (alone,) = featurizer([wav], whole)
            steps = whole["last_hidden_state"].shape[1]
            assert abs(steps - round(len(wav) / 2560)) < TOLERABLE_SEQLEN_DIFF
            assert own.shape == alone.shape
            assert (own - alone).norm() <= 1e-5 * alone.norm()


def test_a_wrong_source_has_the_error_of_load_pretrained(tmp_path):
    from s3prl.nn import S3PRLUpstream

    with pytest.raises(FileNotFoundError, match=r"has no config\.json: a pretrained folder has"):
        S3PRLUpstream("audio_jepa", path_or_url=str(tmp_path))


@pytest.mark.parametrize(
    "task", ["speech_commands", "fluent_commands", "voxceleb1", "sv_voxceleb1", "emotion"]
)
def test_the_tasks_of_the_documentation_import(task):
    """With what the extra s3prl installs."""
    expert = importlib.import_module(f"s3prl.downstream.{task}.expert")
    assert issubclass(expert.DownstreamExpert, torch.nn.Module)


def test_keyword_spotting_reads_its_files(tmp_path):
    """The task whose data go through sox effects: mono, 16 kHz, 3 dB down."""
    from s3prl.downstream.speech_commands.dataset import SpeechCommandsTestingDataset

    wav = 0.5 * np.sin(np.arange(8_000) / 10)
    (tmp_path / "yes").mkdir()
    soundfile.write(tmp_path / "yes" / "a.wav", np.stack([wav, wav], 1), 16_000, "FLOAT")
    dataset = SpeechCommandsTestingDataset(speech_commands_test_root=tmp_path)
    read, label, name = dataset[0]
    assert (label, name) == (dataset.class2index["yes"], "yes-a.wav")
    np.testing.assert_allclose(read, wav * 10 ** (-3 / 20), atol=1e-4)


def test_s3prl_itself_is_as_it_was_shipped(s3prl_distribution):
    """Every file of s3prl has the checksum with which it was installed."""
    files = [f for f in s3prl_distribution.files if f.suffix == ".py"]
    assert len(files) > 250
    for file in files:
        digest = hashlib.new(file.hash.mode, file.read_binary()).digest()
        assert base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == file.hash.value, file
