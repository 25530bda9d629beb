"""transformers: AutoModel on a pretrained folder, without code from the folder."""

import json
import subprocess
import sys

import pytest
import torch

from speechbrain_jepa import AudioJEPA
from speechbrain_jepa.checkpoints import FILES, save_pretrained
from speechbrain_jepa.features import Normalization
from speechbrain_jepa.vit import Encoder, PatchGrid

transformers = pytest.importorskip("transformers")
huggingface = pytest.importorskip("speechbrain_jepa.huggingface")


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    encoder = Encoder(PatchGrid(frames=208), dim=24, depth=2, num_heads=3)
    return save_pretrained(tmp_path / "encoder", encoder, Normalization(-7.06, 4.19), {"steps": 7})


@pytest.fixture
def wav():
    return 0.1 * torch.randn(3, 50_000, generator=torch.Generator().manual_seed(1))


def load(folder, **options):
    return transformers.AutoModel.from_pretrained(folder, **options)


def test_importing_the_module_is_all_that_it_takes(folder):
    code = f"""
import torch, transformers
import speechbrain_jepa.huggingface
model = transformers.AutoModel.from_pretrained({str(folder)!r})
assert model(torch.zeros(1, 9000)).last_hidden_state.shape == (1, 4, 120)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_outputs_are_those_of_audio_jepa(folder, wav):
    model = load(folder)
    assert not model.training
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (120, 2)
    out = model(wav)
    ours = AudioJEPA(folder)
    torch.testing.assert_close(out.last_hidden_state, ours(wav), rtol=0, atol=0)
    torch.testing.assert_close(out.pooler_output, ours.embed(wav))
    assert out.hidden_states is None
    out = model(wav, output_hidden_states=True)
    layers = AudioJEPA(folder, output_all_hiddens=True)(wav)
    torch.testing.assert_close(torch.stack(out.hidden_states), layers, rtol=0, atol=0)
    torch.testing.assert_close(out.pooler_output, ours.embed(wav))
    assert model(wav).hidden_states is None  # asked for once, not for good
    assert load(folder, output_hidden_states=True)(wav).hidden_states is not None
    first, second = model(wav, return_dict=False)
    assert first.shape == (3, 20, 120) and second.shape == (3, 120)


def test_the_pooler_reads_out_what_the_folder_says(folder, wav, tmp_path):
    model = AudioJEPA(folder, layers="all", pooling="mean_std")
    again = load(model.save_pretrained(tmp_path / "all"))
    lengths = torch.tensor([1.0, 0.5, 0.01])
    for options in ({}, {"output_hidden_states": True}):
        out = again(wav, wav_lens=lengths, **options)
        torch.testing.assert_close(out.pooler_output, model.embed(wav, lengths))
        torch.testing.assert_close(out.last_hidden_state, AudioJEPA(folder)(wav, lengths))
    out = load(folder, layers=[0, 1], output_norm=True)(wav, wav_lens=lengths)
    model = AudioJEPA(folder, layers=[0, 1], output_norm=True)
    torch.testing.assert_close(out.last_hidden_state, model(wav, lengths))
    torch.testing.assert_close(out.pooler_output, model.embed(wav, lengths))


def test_an_attention_mask_says_how_long_a_clip_is(folder, wav):
    model, lengths = load(folder), [50_000, 9_000, 1]
    mask = torch.stack([torch.arange(50_000) < length for length in lengths]).long()
    wav = wav.masked_fill(mask == 0, torch.nan)
    out = model(wav, attention_mask=mask)
    for clip, length in enumerate(lengths):
        alone = AudioJEPA(folder).embed(wav[clip : clip + 1, :length])
        torch.testing.assert_close(out.pooler_output[clip], alone[0])
    relative = model(wav, wav_lens=torch.tensor(lengths) / 50_000)
    torch.testing.assert_close(out.last_hidden_state, relative.last_hidden_state)
    with pytest.raises(ValueError, match="give one of them"):
        model(wav, mask, torch.ones(3))
    with pytest.raises(ValueError, match="of clip 1 is not ones and then zeros"):
        model(wav, mask.flip(1)[[0, 1, 2]])
    with pytest.raises(ValueError, match=r"shape \(3, 4\), input_values \(3, 50000\)"):
        model(wav, mask[:, :4])


def test_transformers_feature_extractor_pads_for_it(folder, wav):
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=False)
    clips = [wav[0].numpy(), wav[1, :9_000].numpy()]
    options = {"sampling_rate": 16_000, "return_attention_mask": True, "return_tensors": "pt"}
    out = load(folder)(**extractor(clips, padding=True, **options))
    torch.testing.assert_close(out.pooler_output[1], AudioJEPA(folder).embed(wav[1:2, :9_000])[0])


def test_options_of_audio_jepa_and_of_the_hub_are_passed_on(folder, wav, monkeypatch):
    out = load(folder, step_seconds=0.04, flat=True)(wav)
    torch.testing.assert_close(
        out.last_hidden_state, AudioJEPA(folder, step_seconds=0.04, flat=True)(wav)
    )
    asked = {}

    def find_folder(source, save_path=None, **options):
        asked.update(source=source, save_path=save_path, **options)
        return folder

    monkeypatch.setattr(huggingface, "find_folder", find_folder)
    model = huggingface.AudioJEPAModel
    model.from_pretrained("user/name", cache_dir="here", revision="v1", token="hf_x")
    assert asked == {
        "source": "user/name",
        "save_path": "here",
        "revision": "v1",
        "token": "hf_x",
    }
    with pytest.raises(TypeError, match="no argument 'device_map'"):
        load(folder, device_map="auto")
    with pytest.raises(ValueError, match=r"kept in float32.*torch\.autocast"):
        load(folder, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="subfolder"):
        model.from_pretrained(folder, subfolder="onnx")


def test_fine_tuned_weights_are_saved_as_a_pretrained_folder(folder, wav, tmp_path):
    model = load(folder).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(wav).pooler_output.square().mean().backward()
    assert all(p.grad.any() for p in model.parameters())
    optimizer.step()
    model.eval().save_pretrained(tmp_path / "tuned")
    assert sorted(path.name for path in (tmp_path / "tuned").iterdir()) == sorted(FILES)
    again = load(tmp_path / "tuned")(wav).last_hidden_state
    torch.testing.assert_close(again, model(wav).last_hidden_state, rtol=0, atol=0)
    assert not torch.equal(again, AudioJEPA(folder)(wav))
    with pytest.raises(ValueError, match=r"call push_to_hub\(repo\)"):
        model.save_pretrained(tmp_path / "tuned", push_to_hub=True)


def test_push_to_hub_publishes_a_pretrained_folder(folder, monkeypatch):
    published = {}

    def push(folder, repo, license, **options):
        published.update({path.name: path.read_bytes() for path in folder_files(folder)})
        published["call"] = repo, license, options
        return "address"

    def folder_files(folder):
        from pathlib import Path

        return Path(folder).iterdir()

    monkeypatch.setattr(huggingface, "push", push)
    assert load(folder).push_to_hub("user/name", "mit", private=True) == "address"
    assert published.pop("call") == ("user/name", "mit", {"private": True})
    assert published.keys() == set(FILES)
    assert published["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_config_alone_gives_an_untrained_model(folder, wav):
    config = transformers.AutoConfig.from_pretrained(folder)
    torch.manual_seed(3)
    model = transformers.AutoModel.from_config(config)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert shapes == {name: p.shape for name, p in load(folder).named_parameters()}
    assert all(p.requires_grad for p in model.parameters())
    assert not torch.equal(model.eval()(wav).pooler_output, load(folder)(wav).pooler_output)


def test_no_code_of_the_folder_is_run(folder, tmp_path, wav):
    """A config may name classes in a file beside it: ours are taken, the file is not looked at."""
    ran = tmp_path / "ran"
    (folder / "modeling.py").write_text(f"open({str(ran)!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling.Config", "AutoModel": "modeling.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "pytorch_model.bin").write_bytes(b"no weights")
    model = load(folder)
    assert isinstance(model, huggingface.AudioJEPAModel)
    assert model(wav).pooler_output.isfinite().all()
    assert not ran.exists()


def test_what_is_wrong_with_a_folder_is_said_as_everywhere(folder):
    config = json.loads((folder / "config.json").read_text())
    config["encoder"]["depth"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model\.safetensors: the parameters do not fit"):
        load(folder)
