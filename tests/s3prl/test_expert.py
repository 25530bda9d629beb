"""The upstream by itself, and where it takes its weights from: nothing here needs s3prl."""

import http.server
import shutil
import tarfile
import threading
from pathlib import Path

import pytest
import torch

from speechbrain_jepa import AudioJEPA
from speechbrain_jepa.s3prl import hubconf
from speechbrain_jepa.s3prl.expert import UpstreamExpert

RATE = 16_000


def noise(samples, seed=0):
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def same_weights(upstream, folder):
    expected = AudioJEPA(folder).state_dict()
    return all(torch.equal(upstream.model.state_dict()[name], expected[name]) for name in expected)


# What it computes


def test_layers_are_those_of_audio_jepa(encoder_folder):
    upstream = UpstreamExpert(encoder_folder)
    wavs = [noise(50_000), noise(900, 1)]
    features = upstream(wavs)
    alone = AudioJEPA(encoder_folder, output_all_hiddens=True)
    assert len(features["hidden_states"]) == alone.num_layers == 3
    torch.testing.assert_close(torch.stack(features["hidden_states"])[:, :1], alone(wavs[0][None]))
    torch.testing.assert_close(features["last_hidden_state"], features["hidden_states"][-1])
    assert upstream.get_downsample_rates("hidden_states") == alone.downsample_rate


def test_features_of_a_wav_do_not_depend_on_the_list(encoder_folder):
    upstream = UpstreamExpert(encoder_folder).eval()
    seconds = torch.empty(8).uniform_(0.05, 60, generator=torch.Generator().manual_seed(2))
    seconds[0], seconds[1] = 0.05, 60.0
    wavs = [noise(int(s * RATE), seed) for seed, s in enumerate(seconds)]
    with torch.no_grad():
        together = torch.stack(upstream(wavs)["hidden_states"])
        for number, wav in enumerate(wavs):
            alone = torch.stack(upstream([wav])["hidden_states"])[:, 0]
            own = together[:, number, : alone.shape[1]]
            deviation = (own - alone).norm() / alone.norm()
            assert deviation < 1e-5, f"{len(wav)} samples: {deviation:.2g}"


def test_lengths_of_many_minutes_are_exact(encoder_folder):
    """The ratio of two lengths in float32 is off by a sample at 20 minutes."""
    upstream = UpstreamExpert(encoder_folder)
    asked = []
    upstream.model.forward = lambda wav, wav_lens: asked.append(wav_lens * wav.shape[1]) or wav
    samples = torch.tensor([20 * 60 * RATE + 7, 19 * 60 * RATE + 1, 11_111_111])
    upstream([torch.zeros(1).expand(n) for n in samples])
    torch.testing.assert_close(asked[0], samples.double(), rtol=0, atol=1e-6)


def test_every_parameter_is_trained_when_s3prl_wants_it(encoder_folder):
    upstream = UpstreamExpert(encoder_folder).train()
    with torch.autograd.set_detect_anomaly(True):
        layers = upstream([noise(800), noise(40_000, 1)])["hidden_states"]
        sum(layer.square().mean() for layer in layers).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in upstream.parameters())


def test_train_mode_computes_what_eval_mode_does(encoder_folder):
    upstream, wavs = UpstreamExpert(encoder_folder), [noise(30_000), noise(800, 1)]
    trained = upstream.train()(wavs)["hidden_states"]
    for _ in range(2):
        torch.testing.assert_close(upstream.eval()(wavs)["hidden_states"], trained)


def test_options_of_audio_jepa_from_a_file_and_by_name(encoder_folder, tmp_path):
    options = tmp_path / "options.yaml"
    options.write_text("flat: True\nfreeze_layers: 1\n")
    upstream = UpstreamExpert(encoder_folder, model_config=options)
    assert upstream([noise(4_000)])["last_hidden_state"].shape == (1, 2, 48)
    assert not any(p.requires_grad for p in upstream.model.encoder.blocks[0].parameters())
    upstream = UpstreamExpert(encoder_folder, model_config=options, flat=False)
    assert upstream([noise(4_000)])["last_hidden_state"].shape == (1, 2, 240)
    options.write_text("flat")
    with pytest.raises(ValueError, match="yaml file with options of AudioJEPA"):
        UpstreamExpert(encoder_folder, model_config=options)
    options.write_text("dropout: 0.1")
    with pytest.raises(TypeError, match="no argument 'dropout'"):
        UpstreamExpert(encoder_folder, model_config=options)


@pytest.mark.parametrize(
    ("wavs", "message"),
    [
        ([torch.zeros(9_000), torch.zeros(0)], "clip 1 .* of 2 is empty"),
        ([torch.zeros(0)], "clip 0 .* of 1 is empty"),
        ([torch.zeros(9_000, dtype=torch.int16)], "divide int16 by 32768"),
        ([torch.zeros(1, 9_000)], "average channels"),
        ([torch.zeros(9_000), torch.full((500,), torch.nan)], "clip 1 .* NaN"),
    ],
)
def test_wavs_that_do_not_fit_say_which(encoder_folder, wavs, message):
    with pytest.raises(ValueError, match=message):
        UpstreamExpert(encoder_folder)(wavs)


# Where the weights come from


@pytest.fixture
def archives(encoder_folder, tmp_path):
    """The folder as a zip, and within another folder as a tar.gz."""
    parent, name = encoder_folder.parent, encoder_folder.name
    return {
        "zip": shutil.make_archive(tmp_path / "a", "zip", encoder_folder),
        "tar.gz": shutil.make_archive(tmp_path / "b", "gztar", parent, name),
    }


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server for files, what was asked of it, and a cache of its own."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / "web")

        def log_message(self, *args):
            pass

        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url, server.asked, server.files = (
        f"http://127.0.0.1:{server.server_port}",
        asked,
        tmp_path / "web",
    )
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("entry", ["audio_jepa", "audio_jepa_local"])
def test_local_sources(entry, encoder_folder, archives):
    load = getattr(hubconf, entry)
    weights = encoder_folder / "model.safetensors"
    for source in (encoder_folder, str(encoder_folder), weights, *archives.values()):
        upstream = load(ckpt=source, model_config=None, refresh=False)  # as s3prl's runner calls it
        assert same_weights(upstream, encoder_folder), source


@pytest.mark.parametrize("entry", ["audio_jepa", "audio_jepa_url"])
@pytest.mark.parametrize("query", ["", "?download=1"])
def test_a_folder_on_the_web_is_downloaded_once(entry, query, encoder_folder, server):
    shutil.copytree(encoder_folder, server.files / "tiny")
    load, url = getattr(hubconf, entry), f"{server.url}/tiny/model.safetensors{query}"
    assert same_weights(load(url), encoder_folder)
    once = [f"/tiny/config.json{query}", f"/tiny/model.safetensors{query}"]
    assert server.asked == once
    load(url)
    assert server.asked == once
    load(url, refresh=True)
    assert server.asked == once + once


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_an_archive_on_the_web(kind, encoder_folder, archives, server):
    server.files.mkdir()
    shutil.copy(archives[kind], server.files / "x")
    for _ in range(2):
        assert same_weights(hubconf.audio_jepa_url(f"{server.url}/x"), encoder_folder)
    assert server.asked == ["/x"]


def test_a_url_that_is_not_there_is_an_error_and_is_not_cached(encoder_folder, server):
    server.files.mkdir()
    url = f"{server.url}/tiny/model.safetensors"
    with pytest.raises(OSError, match=r"config\.json could not be downloaded: .*404"):
        hubconf.audio_jepa(url)
    shutil.copytree(encoder_folder, server.files / "tiny")
    assert same_weights(hubconf.audio_jepa(url), encoder_folder)


def test_a_repo_is_found_by_load_pretrained(encoder_folder, monkeypatch):
    calls = []

    def snapshot_download(repo, **options):
        calls.append((repo, options["revision"], options["force_download"]))
        return str(encoder_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for entry in (hubconf.audio_jepa, hubconf.audio_jepa_hf):
        assert same_weights(entry("someone/tiny", refresh=True, revision="v1"), encoder_folder)
    assert calls == 2 * [("someone/tiny", "v1", True)]


def test_paths_in_an_archive_are_not_followed(encoder_folder, tmp_path):
    archive = tmp_path / "inner" / "evil.tar"
    archive.parent.mkdir()
    with tarfile.open(archive, "w") as tar:
        for name in ("config.json", "model.safetensors"):
            tar.add(encoder_folder / name, f"../../{name}")
        tar.add(encoder_folder / "README.md", str(tmp_path / "written.md"))
    before = sorted(tmp_path.rglob("*"))
    assert same_weights(UpstreamExpert(archive), encoder_folder)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_in_an_archive_is_not_read(encoder_folder, tmp_path):
    with tarfile.open(tmp_path / "link.tar", "w") as tar:
        tar.add(encoder_folder / "config.json", "config.json")
        link = tarfile.TarInfo("model.safetensors")
        link.type, link.linkname = tarfile.SYMTYPE, str(encoder_folder / "model.safetensors")
        tar.addfile(link)
    with pytest.raises(ValueError, match=r"0 files model\.safetensors"):
        UpstreamExpert(tmp_path / "link.tar")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickled_checkpoint_is_refused_without_running_it(tmp_path):
    exploded = tmp_path / "exploded"
    torch.save({"model": Bomb(exploded)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt holds 0 files config\.json"):
        UpstreamExpert(tmp_path / "model.pt")
    assert not exploded.exists()
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert exploded.exists()  # it would have been run


def test_an_archive_of_two_folders(encoder_folder, tmp_path):
    with tarfile.open(tmp_path / "two.tar", "w") as tar:
        tar.add(encoder_folder, "one")
        tar.add(encoder_folder, "two")
    with pytest.raises(ValueError, match=r"2 files config\.json: it should hold one"):
        UpstreamExpert(tmp_path / "two.tar")


def test_wrong_sources_say_what_is_wrong(tmp_path):
    missing = tmp_path / "missing"
    with pytest.raises(FileNotFoundError, match="no such folder; give a pretrained folder"):
        hubconf.audio_jepa(missing)
    with pytest.raises(FileNotFoundError, match="audio_jepa_local takes what is on this machine"):
        hubconf.audio_jepa_local(missing)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        hubconf.audio_jepa(tmp_path)
    with pytest.raises(ValueError, match="takes a URL"):
        hubconf.audio_jepa_url(str(tmp_path))
    (tmp_path / "text.txt").write_text("nothing")
    with pytest.raises(ValueError, match="no zip or tar of a pretrained folder"):
        hubconf.audio_jepa(tmp_path / "text.txt")
