"""What the suites that judge encoders have in common (hear.py, xares.py, mteb.py).

All of them keep results under the encoder's name and skip what they find there, so the name has to
say which checkpoint it was, and with which options.
"""

import hashlib
import json

from speechbrain_jepa.checkpoints import find_folder
from speechbrain_jepa.config import describe
from speechbrain_jepa.embedded import fingerprint
from speechbrain_jepa.encoder import AudioJEPA

ID_DIGITS = 10  # hex: 40 bits, which a million checkpoints share by chance with odds of 1 in 2


def parse_options(text: str | None) -> dict:
    """Options of `AudioJEPA` from a command line or an environment variable.

    Arguments
    ---------
    text : str or None
        A JSON object. None or empty: no options.

    Returns
    -------
    dict

    Raises
    ------
    ValueError
        If it is no JSON object, or asks for all layers at once: a suite takes one vector.

    Example
    -------
    >>> parse_options('{"step_seconds": 0.04, "flat": true}')
    {'step_seconds': 0.04, 'flat': True}
    """
    if not text:
        return {}
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        options = error
    if not isinstance(options, dict):
        raise ValueError(f"options {text!r}: give a JSON object, such as '{{\"flat\": true}}'")
    if options.get("output_all_hiddens"):
        raise ValueError("output_all_hiddens=True: suites take the embeddings of one layer only")
    return options


def checkpoint_name(source) -> str:
    """What people call an encoder: the name of its folder.

    Arguments
    ---------
    source : str, Path or None
        As for `AudioJEPA`.

    Returns
    -------
    str
        For a Hugging Face repo its name without the owner.

    Example
    -------
    >>> checkpoint_name(None)
    'tiny'
    """
    folder = find_folder(source).resolve()
    is_hub_snapshot = folder.parent.name == "snapshots"
    return str(source).split("/")[-1] if is_hub_snapshot else folder.name


def checkpoint_id(model: AudioJEPA) -> str:
    """Hex digits that stand for everything that an encoder's output depends on.

    Arguments
    ---------
    model : AudioJEPA

    Returns
    -------
    str
        Another one for other weights, features, normalisation, layers, pooling, `step_seconds`,
        `flat`, `output_norm` or `normalization`.

    Example
    -------
    >>> ids = {checkpoint_id(AudioJEPA(flat=flat)) for flat in (False, True, True)}
    >>> len(ids), {len(digits) for digits in ids}
    (2, {10})
    """
    what = {
        **describe(model.encoder, model.normalization, {}, model.read_out, model.features),
        "weights": fingerprint(model),
        "step_layers": model.step_layers,
        "embed_layers": model.embed_layers,
        "step_seconds": model.step_seconds,
        "flat": model.flat,
        "output_norm": model.output_norm,
        "normalize": model.normalize,
    }
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode())
    return digest.hexdigest()[:ID_DIGITS]
