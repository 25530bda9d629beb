"""Training checkpoints that other projects pickled, read without running what is in them."""

import argparse
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from speechbrain_jepa.untrusted import reason, short

WRAPPERS = ("model", "state_dict")  # where a training checkpoint keeps the parameters


class _Kept:
    """Takes the place of omegaconf's classes and of the types that they name; runs nothing."""

    def __init__(self, *args):
        pass


def _empty_dict(*args) -> dict:
    return {}


# what a pickled omegaconf.ListConfig or DictConfig asks for
HYDRA = (
    *((_Kept, f"omegaconf.{name}") for name in ("listconfig.ListConfig", "dictconfig.DictConfig")),
    *((_Kept, f"omegaconf.base.{name}") for name in ("ContainerMetadata", "Metadata")),
    *(
        (_Kept, f"omegaconf.nodes.{name}Node")
        for name in ("Any", "Boolean", "Bytes", "Float", "Integer", "Path", "String")
    ),
    *((_Kept, f"builtins.{name}") for name in ("bool", "dict", "float", "int", "list", "str")),
    *((_Kept, f"typing.{name}") for name in ("Any", "Dict", "List", "Tuple")),
    (_empty_dict, "collections.defaultdict"),
)


def read_checkpoint(path, unsafe: bool = False) -> Mapping:
    """The content of a checkpoint, on the CPU, without running code from it unless `unsafe`.

    Besides tensors and plain values, `argparse.Namespace` is read, as training scripts of this
    family keep their options in one, and omegaconf's lists and dicts, which Hydra leaves in an
    optimiser's state; in place of omegaconf's classes an empty one is built (`_Kept`).

    Arguments
    ---------
    path : str or Path
    unsafe : bool
        Unpickle whatever it holds.

    Returns
    -------
    mapping

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no checkpoint, is damaged, or needs `unsafe`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the checkpoint itself")
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *HYDRA]):
            contents = torch.load(path, map_location="cpu", weights_only=not unsafe)
    except Exception as error:  # torch.load has no common base for what a damaged file raises
        needs = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and needs:
            raise ValueError(
                f"{path} was not read: it asks for {needs[1]}, and to obey can run any code. If "
                "you trust whoever made the file, add --unsafe"
            ) from error
        raise ValueError(f"{path} is not a checkpoint, or is damaged ({reason(error)})") from error
    if not isinstance(contents, Mapping):
        raise ValueError(f"{path} holds a {type(contents).__name__}, not a dict of parameters")
    return contents


def state_dict(contents: Mapping) -> dict[str, Tensor]:
    """The tensors of a training checkpoint by name, without torch.compile's `_orig_mod.`

    Arguments
    ---------
    contents : dict
        A state dict, or what holds one as "model" or "state_dict".

    Raises
    ------
    ValueError
        If a tensor is sparse or nested.
    """
    inner = (contents[key] for key in WRAPPERS if isinstance(contents.get(key), Mapping))
    state = {}
    for name, tensor in (next(inner, None) or contents).items():
        if isinstance(name, str) and isinstance(tensor, Tensor):
            if tensor.is_nested or tensor.layout != torch.strided:
                raise ValueError(f"{short(name)} is a {tensor.layout} tensor, not a dense one")
            state[name.replace("_orig_mod.", "")] = tensor
    return state
