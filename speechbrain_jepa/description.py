"""What config.json and the model card say of a training run: what ran, not what was asked for."""

import inspect
import os
import shlex
import sys

RUN_OPTIONS = (  # of SpeechBrain's, those that change what is learned
    "precision",
    "eval_precision",
    "grad_accumulation_factor",
    "optimizer_step_limit",
    "max_grad_norm",
    "nonfinite_patience",
    "remove_vector_weight_decay",
)
PLACES = ("data_folder", "train_csv", "output_folder", "save_folder", "cache_folder")
COMMAND_FILE = "command.txt"  # in the output folder
PLAIN = (str, int, float, bool, type(None))


def describe_object(thing) -> dict:
    """Name of its class, and what its constructor was given in numbers and words.

    Example
    -------
    >>> from speechbrain_jepa.losses import SmoothL1
    >>> describe_object(SmoothL1(beta=0.5))
    {'class': 'SmoothL1', 'beta': 0.5}
    """
    settings: dict = {"class": type(thing).__name__}
    for name in inspect.signature(type(thing)).parameters:
        value = getattr(thing, name, None)
        if isinstance(value, list | tuple):
            value = list(value)
        if isinstance(value, str | int | float | bool | list):
            settings[name] = value
    return settings


def _is_plain(value) -> bool:
    """A value that JSON has, or a list of such."""
    if isinstance(value, list):
        return all(isinstance(item, PLAIN) for item in value)
    return isinstance(value, PLAIN)


def describe_training(hparams: dict, brain) -> dict:
    """Plain values of the yaml, the objects' own numbers, the run options that the brain has.

    Arguments
    ---------
    hparams : dict
        Of the recipe. Folders of the machine are left out.
    brain : JEPABrain

    Returns
    -------
    dict
        For the section `training` of config.json.
    """
    objects = {
        "loss": brain.jepa.loss,
        "masking": hparams["masking"],
        "learning_rate_schedule": hparams["learning_rate_schedule"],
        "ema_schedule": hparams["ema_schedule"],
        "regularizer": brain.jepa.regularizer,
    }
    plain = {
        name: value
        for name, value in hparams.items()
        if _is_plain(value) and not name.startswith("_") and name not in PLACES
    }
    return {
        **{name: describe_object(thing) for name, thing in objects.items() if thing is not None},
        "global_batch": brain.global_batch,
        "processes": brain.world_size,
        **plain,
        **{name: getattr(brain, name) for name in RUN_OPTIONS},
    }


def command_line() -> str:
    """The command that this process was started with, by torchrun where it is one of several."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    program = "python" if processes == 1 else f"torchrun --nproc_per_node={here}"
    if processes > here:
        program += f" --nnodes={processes // here}"
    return f"{program} {shlex.join(sys.argv)}\n"
