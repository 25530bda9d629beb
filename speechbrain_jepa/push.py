"""Publish a pretrained folder at the Hugging Face Hub, from where every command reads it by name.

python -m speechbrain_jepa.push my_encoder user/name --license cc-by-4.0
"""

import argparse
import re
from pathlib import Path

import huggingface_hub
import yaml
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from speechbrain_jepa.checkpoints import (
    CARD,
    CONFIG,
    EXPERIMENT_CONFIG,
    HYPERPARAMS,
    WEIGHTS,
    load_pretrained,
)
from speechbrain_jepa.model_card import HYPERPARAMS_TEXT, LICENCE_TO_CHOOSE, model_card

# of whichever library huggingface_hub speaks HTTP with; not all are OSErrors
NETWORK_ERRORS: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)
LICENCE_NAME = r"[a-z0-9][a-z0-9.+-]*"  # how the Hub spells licences


def push(
    folder,
    repo: str,
    license: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Upload an audio encoder",
    token: str | None = None,
) -> str:
    """Publish a pretrained folder in one commit: config, weights, hyperparams.yaml, model card.

    The folder itself is not changed, other files in it or in the repo are left alone. The repo is
    made if it is not there.

    Arguments
    ---------
    folder : str or Path
        A pretrained folder. What cannot be loaded is not published.
    repo : str
        "user/name" or "organisation/name".
    license : str or None
        For the model card, as the Hub spells licences: "cc-by-4.0", "apache-2.0", "other".
        Default None: the one that the card names.
    private : bool or None
        Of a repo that is made now. Default None: as the Hub has it for the account.
    revision : str or None
        A branch that the repo has. Default None: main.
    message : str
        Of the commit.
    token : str or None
        Default None: that of `hf auth login`, or the environment variable HF_TOKEN.

    Returns
    -------
    str
        The commit's address.

    Raises
    ------
    FileNotFoundError, ValueError
        If the folder is no pretrained folder, the repo's name cannot be one, or the licence is
        still to be chosen.
    PermissionError
        If nobody is logged in, or whoever is may not write there.
    ConnectionError
        If the Hub cannot be reached or refuses.
    """
    files = contents(folder, repo, license)
    token = token or huggingface_hub.get_token()
    if token is None:
        raise PermissionError(
            "not logged in to the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN to a "
            "token with write access (https://huggingface.co/settings/tokens)"
        )
    api = huggingface_hub.HfApi(token=token)
    operations = [
        huggingface_hub.CommitOperationAdd(
            name, content if isinstance(content, Path) else content.encode()
        )
        for name, content in files.items()
    ]
    user = None
    try:
        user = api.whoami()["name"]
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.create_commit(repo, operations, commit_message=message, revision=revision)
    except HfHubHTTPError as error:
        raise _refusal(error, repo, user) from error
    except NETWORK_ERRORS as error:
        raise ConnectionError(
            f"the Hugging Face Hub could not be reached ({_first_line(error)}): nothing was "
            "published; check the network and run the same command again"
        ) from error
    return commit.commit_url


def contents(folder, repo: str, license: str | None = None) -> dict[str, Path | str]:
    """What `push` publishes, by name in the repo: the path of a file, or a text.

    Arguments
    ---------
    folder, repo, license
        See `push`.

    Raises
    ------
    FileNotFoundError, ValueError
        See `push`.
    """
    folder = Path(folder).expanduser()
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"{repo}: cannot name a repo of the Hub ({error})") from error
    if repo.count("/") != 1:
        raise ValueError(f"{repo}: name the repo as user/name")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give a pretrained folder")
    if (folder / EXPERIMENT_CONFIG).is_file():
        raise ValueError(
            f"{folder} is the output_folder of a training run, not a pretrained folder: "
            f"python -m speechbrain_jepa.export {folder} my_encoder makes one"
        )
    encoder, _, config = load_pretrained(folder)  # what cannot be loaded is not published
    path, hyperparams = folder / CARD, folder / HYPERPARAMS
    if path.is_file():
        card = path.read_text(encoding="utf-8")
    else:
        card = model_card(config, sum(p.numel() for p in encoder.parameters()))
    return {
        CONFIG: folder / CONFIG,
        WEIGHTS: folder / WEIGHTS,
        HYPERPARAMS: hyperparams if hyperparams.is_file() else HYPERPARAMS_TEXT,
        CARD: published_card(card, repo, license, path),
    }


def published_card(card: str, repo: str, license: str | None, path) -> str:
    """A model card with its licence, and the repo's name where the folder's is to be put.

    Arguments
    ---------
    card : str
    repo, license
        See `push`.
    path
        Of the card, for messages.

    Raises
    ------
    ValueError
        If the card names no licence and none is given, or has no YAML header.

    Example
    -------
    >>> card = "---\\nlicense: mit\\n---\\n\\nAudioJEPA(\\"FOLDER\\")\\n"
    >>> print(published_card(card, "user/name", "cc0-1.0", "README.md"))
    ---
    license: cc0-1.0
    ---
    <BLANKLINE>
    AudioJEPA("user/name")
    <BLANKLINE>
    """
    if license is not None and not re.fullmatch(LICENCE_NAME, license):
        raise ValueError(
            f"--license {license}: the Hub spells licences in lower case, such as cc-by-4.0, "
            "apache-2.0, mit, other"
        )
    match = re.match(r"---\r?\n(.*?\n)---\r?\n", card, re.DOTALL)
    try:
        header = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: its header is no YAML ({_first_line(error)})") from error
    if match is None or not isinstance(header, dict):
        raise ValueError(
            f"{path} begins with no YAML header between two lines ---, which the Hub reads: "
            "remove the file to have it written anew"
        )
    is_open = "license" not in header or "TO BE CHOSEN" in match[1]
    if license is None and is_open:
        raise ValueError(
            f"{path}: the licence is to be chosen by whoever publishes, with regard to the audio "
            "that was trained on: --license cc-by-4.0 (or apache-2.0, mit, other ...)"
        )
    body = card[match.end() :]
    if license is not None:
        header["license"] = license
        body = body.replace(LICENCE_TO_CHOOSE, f"{license}.")
    body = re.sub(r" `FOLDER` is this folder, or its\s+Hugging Face repo id\.", "", body)
    body = re.sub(r'"FOLDER"', f'"{repo}"', body)
    body = re.sub(r"\bFOLDER\b", repo, body)
    written = yaml.safe_dump(header, sort_keys=False, allow_unicode=True)
    return f"---\n{written}---\n{body}"


def _refusal(error: HfHubHTTPError, repo: str, user: str | None) -> OSError:
    """What the Hub's answer means."""
    status = getattr(error.response, "status_code", None)
    if user is None and status == 401:
        return PermissionError(
            "the Hugging Face Hub does not know the token: `hf auth login` again, or set HF_TOKEN "
            "to one with write access"
        )
    if status in (401, 403):
        return PermissionError(
            f"{user} may not write to {repo}: name a repo of yours or of an organisation that you "
            f"are in, and use a token with write access ({_first_line(error)})"
        )
    return ConnectionError(f"{repo}: the Hugging Face Hub refused: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def main(arguments=None) -> None:
    """The command line: `arguments` is a list of str, default the process' own."""
    parser = argparse.ArgumentParser(
        prog="python -m speechbrain_jepa.push", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", help="pretrained folder")
    parser.add_argument("repo", help="user/name; made if it is not there")
    parser.add_argument("--license", help="of the weights, as the Hub spells it: cc-by-4.0, mit")
    parser.add_argument("--private", action="store_true", default=None, help="a new repo is")
    parser.add_argument("--revision", help="a branch that the repo has; default: main")
    parser.add_argument("--message", default="Upload an audio encoder", help="of the commit")
    parser.add_argument(
        "--dry-run", action="store_true", help="check, print the model card, publish nothing"
    )
    options = parser.parse_args(arguments)
    try:
        if options.dry_run:
            files = contents(options.folder, options.repo, options.license)
            print(files[CARD])
            print(f"would publish {', '.join(files)} at {options.repo}")
            return
        address = push(
            options.folder,
            options.repo,
            options.license,
            options.private,
            options.revision,
            options.message,
        )
    except (OSError, ValueError) as error:
        raise SystemExit(f"push: {error}") from error
    print(f"published: {address}")
    print(f'AudioJEPA("{options.repo}") loads it')


if __name__ == "__main__":
    main()
