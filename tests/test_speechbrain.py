"""The encoder inside SpeechBrain: its inference interface, its weighted layers, its recipes."""

import itertools
import json
import math
import re
from pathlib import Path

import pytest
import soundfile
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.inference.encoders import WaveformEncoder
from speechbrain.nnet.schedulers import CyclicLRScheduler

from speechbrain_jepa import AudioJEPA
from speechbrain_jepa.checkpoints import save_pretrained
from speechbrain_jepa.features import Normalization
from speechbrain_jepa.inference import PretrainedAudioJEPA
from speechbrain_jepa.vit import Encoder, PatchGrid

LEVELS = {"high": 3_000.0, "middle": 1_000.0, "low": 300.0}  # class: Hz


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    encoder = Encoder(PatchGrid(frames=208), dim=24, depth=2, num_heads=3)
    return save_pretrained(tmp_path_factory.mktemp("model") / "p", encoder, Normalization(-7, 4))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return 0.1 * torch.randn(3, 50_000, generator=generator), torch.tensor([1.0, 0.25, 0.6])


# WaveformEncoder


def test_encode_batch_is_forward(folder, batch):
    encoder = WaveformEncoder.from_hparams(source=str(folder))
    expected = AudioJEPA(folder)(*batch)
    actual = encoder.encode_batch(*batch)
    assert isinstance(actual, torch.Tensor)  # as its documentation says
    torch.testing.assert_close(actual.as_subclass(torch.Tensor), expected)
    assert type(actual.mean(1)) is torch.Tensor


def test_encode_file_is_forward(folder, batch, tmp_path):
    """A stereo file at another rate, through SpeechBrain's own loading."""
    soundfile.write(tmp_path / "a.wav", batch[0][:2].T.numpy(), 32_000)
    encoder = WaveformEncoder.from_hparams(source=str(folder))
    wav = encoder.load_audio(str(tmp_path / "a.wav"))
    embeddings = encoder.encode_file(str(tmp_path / "a.wav"))
    assert embeddings.shape == (1, math.ceil(25_000 / 2_560), 120)
    torch.testing.assert_close(embeddings, AudioJEPA(folder)(wav[None]))


def test_from_hparams_with_overrides_and_a_folder_to_collect_in(folder, batch, tmp_path):
    encoder = WaveformEncoder.from_hparams(
        source=str(folder),
        savedir=str(tmp_path / "collected"),
        overrides={"clip_level": True, "flat": True},
    )
    expected = AudioJEPA(folder, flat=True).embed(*batch)
    actual = encoder.encode_batch(*batch)
    torch.testing.assert_close(actual.as_subclass(torch.Tensor), expected)


def test_an_encoder_that_was_not_loaded_says_how_it_is():
    with pytest.raises(RuntimeError, match=r"call load\(folder\), as from_hparams does"):
        PretrainedAudioJEPA()(torch.zeros(1, 16_000))


def test_a_moved_folder_still_loads(folder, batch, tmp_path, monkeypatch):
    """Nothing in it says where it was."""
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in folder.iterdir():
        assert str(folder) not in file.read_text(errors="ignore")
        (moved / file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path)
    encoder = WaveformEncoder.from_hparams(source="elsewhere")
    expected = AudioJEPA(folder)(*batch)
    torch.testing.assert_close(encoder(*batch).as_subclass(torch.Tensor), expected)


# Weights over the layers

WEIGHTED = """
    register: !apply:speechbrain_jepa.huggingface.register []
    encoder: !new:speechbrain.integrations.huggingface.weighted_ssl.WeightedSSLModel
        hub: {folder}
        save_path: {save_path}
        freeze: {freeze}
"""


@pytest.mark.parametrize("freeze", [True, False])
def test_speechbrains_weighted_ssl_model_sums_the_layers(freeze, folder, batch, tmp_path):
    pytest.importorskip("transformers", reason="WeightedSSLModel needs transformers")
    options = {"folder": folder, "save_path": tmp_path, "freeze": freeze}
    weighted = load_hyperpyyaml(WEIGHTED.format(**options))["encoder"]
    weighted.weights.data = torch.tensor([0.3, -1.0, 2.0])
    wav, _ = batch
    layers = AudioJEPA(folder, output_all_hiddens=True)(wav)
    expected = (layers * weighted.weights.softmax(0)[:, None, None, None]).sum(0)
    out = weighted(wav)
    torch.testing.assert_close(out, expected)
    out.square().mean().backward()
    assert weighted.weights.grad.any()
    assert all((p.grad is None) == freeze for p in weighted.model.parameters())


# A recipe. SpeechBrain's wheel has no recipes, so this is a Brain and a yaml in the exact shape of
# recipes/IEMOCAP/emotion_recognition (train_with_wav2vec2.py and its yaml), with the lines changed
# that docs/speechbrain.md changes.

RECIPE = """
seed: 1993
__set_seed: !apply:speechbrain.utils.seed_everything [!ref <seed>]
data_folder: !PLACEHOLDER
output_folder: !PLACEHOLDER
save_folder: !ref <output_folder>/save
train_annotation: !ref <data_folder>/train.json
valid_annotation: !ref <data_folder>/valid.json
test_annotation: !ref <data_folder>/test.json

wav2vec2_hub: !PLACEHOLDER # changed: a pretrained folder
wav2vec2_folder: !ref <save_folder>/wav2vec2_checkpoint
number_of_epochs: 4
lr: 0.003
lr_wav2vec2: 0.001
freeze_wav2vec2: False
freeze_wav2vec2_conv: False # changed: the script's own freezing reaches into wav2vec 2.0
encoder_dim: 120 # changed: 5 frequency patches x 24 dims
out_n_neurons: 3
dataloader_options:
    batch_size: 4
    shuffle: True

wav2vec2: !new:speechbrain_jepa.AudioJEPA # changed
    source: !ref <wav2vec2_hub>
    output_norm: True
    freeze: !ref <freeze_wav2vec2>
    freeze_feature_extractor: True # changed: it is done here
    save_path: !ref <wav2vec2_folder>

avg_pool: !new:speechbrain.nnet.pooling.StatisticsPooling
    return_std: False
output_mlp: !new:speechbrain.nnet.linear.Linear
    input_size: !ref <encoder_dim>
    n_neurons: !ref <out_n_neurons>
    bias: False
epoch_counter: !new:speechbrain.utils.epoch_loop.EpochCounter
    limit: !ref <number_of_epochs>
modules:
    wav2vec2: !ref <wav2vec2>
    output_mlp: !ref <output_mlp>
model: !new:torch.nn.ModuleList
    - [!ref <output_mlp>]
log_softmax: !new:speechbrain.nnet.activations.Softmax
    apply_log: True
compute_cost: !name:speechbrain.nnet.losses.nll_loss
error_stats: !name:speechbrain.utils.metric_stats.MetricStats
    metric: !name:speechbrain.nnet.losses.classification_error
        reduction: batch
opt_class: !name:torch.optim.Adam
    lr: !ref <lr>
wav2vec2_opt_class: !name:torch.optim.Adam
    lr: !ref <lr_wav2vec2>
checkpointer: !new:speechbrain.utils.checkpoints.Checkpointer
    checkpoints_dir: !ref <save_folder>
    recoverables:
        model: !ref <model>
        wav2vec2: !ref <wav2vec2>
        counter: !ref <epoch_counter>
"""


class EmoIdBrain(sb.Brain):
    def compute_forward(self, batch, stage):
        batch = batch.to(self.device)
        wavs, lens = batch.sig
        outputs = self.modules.wav2vec2(wavs, lens)
        outputs = self.hparams.avg_pool(outputs, lens)
        outputs = outputs.view(outputs.shape[0], -1)
        outputs = self.modules.output_mlp(outputs)
        return self.hparams.log_softmax(outputs)

    def compute_objectives(self, predictions, batch, stage):
        emoid, _ = batch.emo_encoded
        emoid = emoid.squeeze(1)
        if stage != sb.Stage.TRAIN:
            self.error_metrics.append(batch.id, predictions, emoid)
        return self.hparams.compute_cost(predictions, emoid)

    def on_stage_start(self, stage, epoch=None):
        if stage != sb.Stage.TRAIN:
            self.error_metrics = self.hparams.error_stats()

    def on_stage_end(self, stage, stage_loss, epoch=None):
        if stage == sb.Stage.TRAIN:
            self.train_losses = [*getattr(self, "train_losses", []), stage_loss]
            return
        self.error_rate = self.error_metrics.summarize("average")
        if stage == sb.Stage.VALID:
            self.checkpointer.save_and_keep_only(
                meta={"error_rate": self.error_rate}, min_keys=["error_rate"]
            )

    def init_optimizers(self):
        self.wav2vec2_optimizer = self.hparams.wav2vec2_opt_class(
            self.modules.wav2vec2.parameters()
        )
        self.optimizer = self.hparams.opt_class(self.hparams.model.parameters())
        self.optimizers_dict = {
            "opt": self.optimizer,
            "wav2vec2_opt": self.wav2vec2_optimizer,
        }
        self.checkpointer.add_recoverable("wav2vec2_opt", self.wav2vec2_optimizer)
        self.checkpointer.add_recoverable("optimizer", self.optimizer)


def make_corpus(folder):
    """Tones with noise, of different lengths, in the json of iemocap_prepare.py."""
    generator = torch.Generator().manual_seed(0)
    for split, clips in {"train": 8, "valid": 2, "test": 4}.items():
        rows = {}
        for emotion, frequency in LEVELS.items():
            for number in range(clips):
                samples = int(torch.randint(8_000, 48_000, (1,), generator=generator))
                time = torch.arange(samples) / 16_000
                detune = 1 + 0.2 * torch.rand(1, generator=generator)
                wav = 0.1 * torch.sin(2 * math.pi * frequency * detune * time)
                wav += 0.03 * torch.randn(samples, generator=generator)
                name = f"{split}_{emotion}_{number}"
                soundfile.write(folder / f"{name}.wav", wav.numpy(), 16_000)
                path = f"{{data_root}}/{name}.wav"
                rows[name] = {"wav": path, "length": samples / 16_000, "emo": emotion}
        (folder / f"{split}.json").write_text(json.dumps(rows))


def dataio_prep(hparams):
    @sb.utils.data_pipeline.takes("wav")
    @sb.utils.data_pipeline.provides("sig")
    def audio_pipeline(wav):
        return sb.dataio.dataio.read_audio(wav)

    label_encoder = sb.dataio.encoder.CategoricalEncoder()

    @sb.utils.data_pipeline.takes("emo")
    @sb.utils.data_pipeline.provides("emo", "emo_encoded")
    def label_pipeline(emo):
        yield emo
        yield label_encoder.encode_label_torch(emo)

    datasets = {
        split: sb.dataio.dataset.DynamicItemDataset.from_json(
            json_path=hparams[f"{split}_annotation"],
            replacements={"data_root": hparams["data_folder"]},
            dynamic_items=[audio_pipeline, label_pipeline],
            output_keys=["id", "sig", "emo_encoded"],
        )
        for split in ("train", "valid", "test")
    }
    label_encoder.update_from_didataset(datasets["train"], output_key="emo")
    return datasets


def make_brain(overrides, run_opts):
    hparams = load_hyperpyyaml(RECIPE, overrides)
    hparams["wav2vec2"] = hparams["wav2vec2"].to(device=run_opts["device"])
    if not hparams["freeze_wav2vec2"] and hparams["freeze_wav2vec2_conv"]:
        hparams["wav2vec2"].model.feature_extractor._freeze_parameters()
    brain = EmoIdBrain(
        modules=hparams["modules"],
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    return brain, hparams, dataio_prep(hparams)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_recipe_fine_tunes_and_finds_its_checkpoint_again(precision, folder, tmp_path):
    (tmp_path / "data").mkdir()
    make_corpus(tmp_path / "data")
    overrides = {
        "data_folder": str(tmp_path / "data"),
        "output_folder": str(tmp_path / "out"),
        "wav2vec2_hub": str(folder),
    }
    run_opts = {"device": "cpu", "precision": precision, "noprogressbar": True}
    brain, hparams, datasets = make_brain(overrides, run_opts)
    before = {name: p.clone() for name, p in hparams["wav2vec2"].named_parameters()}
    loader = hparams["dataloader_options"]
    brain.fit(
        hparams["epoch_counter"],
        datasets["train"],
        datasets["valid"],
        train_loader_kwargs=loader,
        valid_loader_kwargs=loader,
    )
    brain.evaluate(datasets["test"], min_key="error_rate", test_loader_kwargs=loader)
    assert brain.train_losses[-1] < 0.5 * brain.train_losses[0]
    assert brain.error_rate < 0.2  # chance is 2 / 3
    for name, parameter in hparams["wav2vec2"].named_parameters():
        assert torch.equal(parameter, before[name]) == ("patch_embed" in name), name

    again, _, datasets = make_brain(overrides, run_opts)
    again.evaluate(datasets["test"], min_key="error_rate", test_loader_kwargs=loader)
    assert again.error_rate == brain.error_rate


def test_it_is_a_front_end_for_speechbrains_classifiers(folder):
    """The yaml lines that docs/speechbrain.md changes in the Google Speech Commands recipe."""
    hparams = load_hyperpyyaml(f"""
        compute_features: !new:speechbrain_jepa.AudioJEPA
            source: {folder}
        mean_var_norm: !new:speechbrain.processing.features.InputNormalization
            norm_type: sentence
            std_norm: False
        embedding_model: !new:speechbrain.lobes.models.Xvector.Xvector
            in_channels: 120
            activation: !name:torch.nn.LeakyReLU
            tdnn_blocks: 5
            tdnn_channels: [64, 64, 64, 64, 96]
            tdnn_kernel_sizes: [5, 3, 3, 1, 1]
            tdnn_dilations: [1, 2, 3, 1, 1]
            lin_neurons: 32
    """)
    wavs, lens = torch.randn(4, 16_000), torch.ones(4)
    feats = hparams["mean_var_norm"](hparams["compute_features"](wavs), lens)
    assert hparams["embedding_model"](feats).shape == (4, 1, 32)


# --- lines of docs/speechbrain.md for recipes that are not run here ------------------------------


@pytest.mark.parametrize(("base", "peak", "last"), [(1e-8, 2e-4, 3.1e-5), (1e-3, 1e-3, 1e-3)])
def test_esc50s_schedule_reaches_a_rate_that_learns_only_with_our_lines(base, peak, last):
    """200 epochs of 38 training and 13 validation batches; second row: docs/speechbrain.md."""
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=peak)
    schedule = CyclicLRScheduler(base_lr=base, max_lr=peak, step_size=65_000)
    for _ in range(200 * (38 + 13)):
        schedule.on_batch_end(optimizer)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(last, rel=0.02)


def test_three_overrides_read_google_speech_commands_where_the_script_writes_them():
    """The yaml's lines of SpeechBrain 1.1.0; its script writes <output_folder>/<split>.csv."""
    splits = ("train", "valid", "test")
    lines = ["output_folder: out", "save_folder: !ref <output_folder>/save"]
    lines += [f"{split}_annotation: !ref <save_folder>/{split}.csv" for split in splits]
    page = (Path(__file__).parent.parent / "docs" / "speechbrain.md").read_text()
    options = re.findall(r"(--\w+_annotation) '(.*)'", page)
    assert len(options) == 3
    _, _, overrides = sb.parse_arguments(["xvect.yaml", *itertools.chain(*options)])
    loaded = load_hyperpyyaml("\n".join(lines), overrides)
    assert [loaded[f"{split}_annotation"] for split in splits] == [f"out/{s}.csv" for s in splits]
