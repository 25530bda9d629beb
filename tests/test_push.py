"""Publishing a folder, to a stand-in for the Hub's client: nothing here asks a network."""

import json
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import create_autospec

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub.errors import HfHubHTTPError

from speechbrain_jepa import AudioJEPA, push
from speechbrain_jepa.checkpoints import FILES, packaged_encoders, save_pretrained, write_config
from speechbrain_jepa.features import Normalization
from speechbrain_jepa.vit import Encoder, PatchGrid

COMMIT = "c0ffee" * 7


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    encoder = Encoder(PatchGrid(frames=208), dim=24, depth=1, num_heads=3)
    return save_pretrained(tmp_path / "encoder", encoder, Normalization(-7.06, 4.19), {"steps": 7})


class Hub:
    """HfApi as its signatures say; what is published lands in a cache of huggingface_hub's kind."""

    def __init__(self, cache):
        self.cache = cache
        self.api = create_autospec(huggingface_hub.HfApi, instance=True)
        self.api.whoami.return_value = {"name": "user", "orgs": []}
        self.api.create_commit.side_effect = self.commit
        self.tokens = []

    def __call__(self, token=None):
        self.tokens.append(token)
        return self.api

    def commit(self, repo_id, operations, *, commit_message, revision=None):
        repo = self.cache / f"models--{repo_id.replace('/', '--')}"
        snapshot = repo / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(COMMIT)
        for operation in operations:
            assert isinstance(operation, huggingface_hub.CommitOperationAdd)
            with operation.as_file() as content:
                (snapshot / operation.path_in_repo).write_bytes(content.read())
        self.published = snapshot
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/{COMMIT}")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_stored")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return hub


def header(card):
    return yaml.safe_load(card.split("---")[1])


def refusal(status, text="what the Hub says\nand more"):
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError(text, response=response)


def test_what_is_published_is_loaded_by_its_name(folder, hub, capsys):
    push.main([str(folder), "user/name", "--license", "cc-by-4.0"])
    assert sorted(path.name for path in hub.published.iterdir()) == sorted(FILES)
    wav = torch.randn(2, 9_000, generator=torch.Generator().manual_seed(0))
    published = AudioJEPA("user/name", save_path=hub.cache)
    assert torch.equal(published.embed(wav), AudioJEPA(folder).embed(wav))
    hub.api.create_repo.assert_called_once_with("user/name", private=None, exist_ok=True)
    assert hub.tokens == ["hf_stored"]
    out = capsys.readouterr().out
    assert f"https://huggingface.co/user/name/commit/{COMMIT}" in out
    assert 'AudioJEPA("user/name")' in out


def test_the_published_card_has_the_licence_and_the_repos_name(folder, hub):
    before = (folder / "README.md").read_text()
    push.push(folder, "user/name", license="cc-by-4.0")
    card = (hub.published / "README.md").read_text()
    assert header(card)["license"] == "cc-by-4.0"
    assert header(card)["library_name"] == "speechbrain"
    assert 'AudioJEPA("user/name")' in card and "-k user/name" in card
    assert card.rstrip().endswith("cc-by-4.0.")
    for word in ("FOLDER", "TO BE CHOSEN", "To be filled in"):
        assert word in before and word not in card
    assert (folder / "README.md").read_text() == before


def test_a_licence_that_the_card_names_is_kept_and_one_given_goes_before_it(folder, hub):
    card = "---\nlicense: mit\ntags: [ours]\n---\n\n# Ours\n"
    (folder / "README.md").write_text(card)
    files = push.contents(folder, "user/name")
    assert header(files["README.md"]) == {"license": "mit", "tags": ["ours"]}
    files = push.contents(folder, "user/name", "apache-2.0")
    assert header(files["README.md"])["license"] == "apache-2.0"
    assert files["README.md"].endswith("---\n\n# Ours\n")


def test_other_files_of_the_folder_stay_at_home_and_missing_ones_are_written(folder, hub):
    (folder / "README.md").unlink()
    (folder / "hyperparams.yaml").unlink()
    (folder / "modeling.py").write_text("raise SystemExit")
    push.push(folder, "user/name", "mit")
    assert sorted(path.name for path in hub.published.iterdir()) == sorted(FILES)
    assert "2 layers" not in (hub.published / "README.md").read_text()
    assert "1 layers" in (hub.published / "README.md").read_text()
    assert "PretrainedAudioJEPA" in (hub.published / "hyperparams.yaml").read_text()


def test_options_reach_the_hub(folder, hub):
    arguments = ["--license", "mit", "--private", "--revision", "next", "--message", "More steps"]
    push.main([str(folder), "user/name", *arguments])
    hub.api.create_repo.assert_called_once_with("user/name", private=True, exist_ok=True)
    _, options = hub.api.create_commit.call_args
    assert options == {"commit_message": "More steps", "revision": "next"}


def test_a_dry_run_needs_nobody_logged_in_and_publishes_nothing(folder, hub, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    push.main([str(folder), "user/name", "--license", "mit", "--dry-run"])
    out = capsys.readouterr().out
    assert "license: mit" in out
    assert out.splitlines()[-1] == (
        "would publish config.json, model.safetensors, hyperparams.yaml, README.md at user/name"
    )
    assert not hub.tokens


def test_a_dry_run_by_itself(folder):
    """In a process in which nothing else has imported parts of huggingface_hub."""
    options = ["--license", "mit", "--dry-run"]
    command = [sys.executable, "-m", "speechbrain_jepa.push", folder, "user/name", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "license: mit" in done.stdout


def test_the_encoder_in_the_box_can_be_published():
    card = push.contents(packaged_encoders()["tiny"], "user/tiny", "other")["README.md"]
    assert 'AudioJEPA("user/tiny")' in card and "FOLDER" not in card


# Errors: nothing is asked of the Hub


def change_config(folder):
    config = json.loads((folder / "config.json").read_text())
    config["encoder"]["depth"] = 3
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (change_config, r"parameters do not fit the config: blocks\.1.* missing"),
        (lambda folder: (folder / "README.md").write_text("# None\n"), "no YAML header"),
        (lambda folder: (folder / "README.md").write_text("---\n{\n---\n"), "header is no YAML"),
        (
            lambda folder: write_config(
                folder / "encoder_config.json",
                Encoder(PatchGrid(), dim=24, depth=1, num_heads=3),
                Normalization(),
                {},
            ),
            r"training run, not a pretrained folder: python -m speechbrain_jepa\.export",
        ),
    ],
)
def test_what_is_no_pretrained_folder_is_not_published(break_it, message, folder, hub):
    break_it(folder)
    with pytest.raises(SystemExit, match=f"push: .*{message}"):
        push.main([str(folder), "user/name", "--license", "mit"])
    assert not hub.tokens


@pytest.mark.parametrize(
    ("repo", "licence", "message"),
    [
        ("name", "mit", "name the repo as user/name"),
        ("user/na me", "mit", "cannot name a repo of the Hub"),
        ("user/name", None, r"README\.md: the licence is to be chosen .* --license cc-by-4\.0"),
        ("user/name", "CC BY", r"--license CC BY: the Hub spells licences in lower case"),
    ],
)
def test_names_that_the_hub_would_refuse(repo, licence, message, folder, hub):
    with pytest.raises(ValueError, match=message):
        push.push(folder, repo, licence)
    assert not hub.tokens


def test_a_folder_that_is_not_there(hub):
    with pytest.raises(SystemExit, match="push: nowhere: no such folder"):
        push.main(["nowhere", "user/name", "--license", "mit"])


def test_nobody_logged_in(folder, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(SystemExit, match=r"push: not logged in .*`hf auth login`, or set HF_TOKEN"):
        push.main([str(folder), "user/name", "--license", "mit"])
    assert not hub.tokens


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ("whoami", refusal(401), "does not know the token: `hf auth login` again"),
        ("create_repo", refusal(403), r"user may not write to user/name: .* \(what the Hub says\)"),
        ("create_commit", refusal(403), "user may not write to user/name"),
        ("create_commit", refusal(500), "user/name: the Hugging Face Hub refused: what the Hub"),
        ("whoami", OSError("no route"), r"could not be reached \(no route\): nothing was pub"),
    ],
)
def test_what_the_hub_answers_is_one_sentence(call, error, message, folder, hub):
    getattr(hub.api, call).side_effect = error
    with pytest.raises(SystemExit, match=f"push: .*{message}"):
        push.main([str(folder), "user/name", "--license", "mit"])


def test_a_lost_connection_is_said_whichever_library_speaks_http(folder, hub):
    library = sys.modules[HfHubHTTPError.__bases__[0].__module__.partition(".")[0]]
    hub.api.create_commit.side_effect = library.ConnectTimeout("timed out")
    with pytest.raises(SystemExit, match=r"could not be reached \(timed out\)"):
        push.main([str(folder), "user/name", "--license", "mit"])
