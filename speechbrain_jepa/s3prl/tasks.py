"""The tasks of SUPERB in s3prl, in one table: what each is called, reads, wants and prints.

The launcher takes the longest time step from here, `python -m speechbrain_jepa.s3prl superb` the
commands, and docs/s3prl.md lists the same rows.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

SAMPLE_RATE = 16_000
RUNNER = "run_downstream.py"
ENTRIES = {0.04: "audio_jepa_40ms", 0.02: "audio_jepa_20ms"}  # by their time step

# Why a step is too coarse
CTC = (
    "CTC emits at most one label a step, and s3prl ignores what does not fit (zero_infinity): a "
    "loss of 0.0 then says that no target fits, not that training is done"
)
STFT = "the step becomes the hop of the STFT that the masks are applied to"
LABELS = "labels and predictions have one value a step, so boundaries are known to a step only"
X_VECTOR = "the x-vector needs 15 steps, and utterances from 2 s on are trained with"
QUERIES = "a query under 5 steps scores 0 against everything"


@dataclass(frozen=True)
class Metric:
    """One number that a task prints.

    Arguments
    ---------
    name : str
        As in the table.
    pattern : str
        Regular expression with one group, matched at the beginning of a line.
    scale : float
        What it is multiplied with: 100 makes a share per cent.
    higher_is_better : bool
    """

    name: str
    pattern: str
    scale: float = 1.0
    higher_is_better: bool = True


@dataclass(frozen=True)
class Task:
    """A task of SUPERB.

    Arguments
    ---------
    name, title : str
        "KS", "keyword spotting".
    downstream : str
        What -d takes.
    config : str
        Its yaml file, as seen from the folder of run_downstream.py.
    data : str
        What lies in the folder that is given for it.
    paths : dict of str to str
        Lines of the yaml and their values; {data} is the folder.
    metrics : tuple of Metric
        Printed by the evaluation.
    best : str
        The checkpoint that is evaluated.
    needs : tuple of str
        Modules beyond what s3prl itself imports.
    longest_step : float or None
        In seconds; None where any step will do.
    why : str
        What goes wrong beyond it.
    split : str
        What -t takes. Default "test".
    folds : tuple of str
        Values of `test_fold`; the score is the mean over them.
    """

    name: str
    title: str
    downstream: str
    config: str
    data: str
    paths: dict[str, str]
    metrics: tuple[Metric, ...]
    best: str = "dev-best.ckpt"
    needs: tuple[str, ...] = ()
    longest_step: float | None = None
    why: str = ""
    split: str = "test"
    folds: tuple[str, ...] = ()

    @property
    def entry(self) -> str:
        """The upstream that suits it, with the longest step that does."""
        steps = [step for step in ENTRIES if step <= (self.longest_step or 0)]
        return ENTRIES[max(steps)] if steps else "audio_jepa"

    def overrides(self, data: str) -> dict[str, str]:
        """Lines of the yaml with the folder put in, as -o takes them."""
        return {
            f"config.downstream_expert.{key}": value.format(data=data)
            for key, value in self.paths.items()
        }


_PARTS = ("train", "dev", "test")


def _accuracy(split: str = "test") -> tuple[Metric, ...]:
    return (Metric("accuracy %", rf"{split} acc: (\S+)", 100),)


def _frames(train: str) -> dict[str, str]:
    folders = zip(_PARTS, (train, "dev", "test"))
    return {f"loaderrc.{part}_dir": f"{{data}}/{folder}" for part, folder in folders}


_ENHANCED = r"Average {} of \d+ utts(?: is|:) (\S+)"
_COMMON_VOICE = {"corpus.path": "{data}/clips"} | {
    f"corpus.{part}": f"['{{data}}/{part}.tsv']" for part in _PARTS
}

TASKS = {
    task.name: task
    for task in (
        Task(
            "KS",
            "keyword spotting",
            "speech_commands",
            "downstream/speech_commands/config.yaml",
            "speech_commands_v0.01/ and speech_commands_test_set_v0.01/",
            {
                "datarc.speech_commands_root": "{data}/speech_commands_v0.01",
                "datarc.speech_commands_test_root": "{data}/speech_commands_test_set_v0.01",
            },
            _accuracy(),
        ),
        Task(
            "IC",
            "intent classification",
            "fluent_commands",
            "downstream/fluent_commands/config.yaml",
            "Fluent Speech Commands: wavs/ and data/",
            {"datarc.file_path": "{data}"},
            _accuracy(),
            needs=("pandas",),
        ),
        Task(
            "SID",
            "speaker identification",
            "voxceleb1",
            "downstream/voxceleb1/config.yaml",
            "VoxCeleb1: dev/wav/ and test/wav/",
            {"datarc.file_path": "{data}"},
            _accuracy(),
        ),
        Task(
            "ER",
            "emotion recognition",
            "emotion",
            "downstream/emotion/config.yaml",
            "IEMOCAP: Session1/ to Session5/",
            {"datarc.root": "{data}"},
            _accuracy(),
            folds=("fold1", "fold2", "fold3", "fold4", "fold5"),
        ),
        Task(
            "ASV",
            "speaker verification",
            "sv_voxceleb1",
            "downstream/sv_voxceleb1/config.yaml",
            "VoxCeleb1: dev/wav/ and test/wav/",
            {"datarc.file_path": "{data}"},
            (Metric("EER %", r"sv-voxceleb1/test-EER: (\S+)", 100, False),),
            best="states-*.ckpt",
            needs=("sklearn", "scipy"),
            longest_step=0.13,
            why=X_VECTOR,
        ),
        Task(
            "ASR",
            "speech recognition",
            "asr",
            "downstream/asr/config.yaml",
            "LibriSpeech: train-clean-100/, dev-clean/ and test-clean/",
            {"datarc.libri_root": "{data}"},
            (Metric("WER %", r"test-clean wer: (\S+)", 1, False),),
            best="dev-clean-best.ckpt",
            needs=("editdistance", "pandas"),
            longest_step=0.04,
            why=CTC,
            split="test-clean",
        ),
        Task(
            "PR",
            "phoneme recognition",
            "ctc",
            "downstream/ctc/libriphone.yaml",
            "LibriSpeech: train-clean-100/, dev-clean/ and test-clean/",
            {"corpus.path": "{data}"},
            (Metric("PER %", r"test per: (\S+)", 100, False),),
            needs=("editdistance",),
            longest_step=0.04,
            why=CTC,
        ),
        Task(
            "SF",
            "slot filling",
            "ctc",
            "downstream/ctc/snips.yaml",
            "Audio SNIPS: train/, valid/, test/, all.iob.snips.txt and slots.txt",
            {"corpus.path": "{data}", "text.slots_file": "{data}/slots.txt"},
            (
                Metric("slot type F1", r"test slot_type_f1: (\S+)", 100),
                Metric("slot value CER %", r"test slot_value_cer: (\S+)", 100, False),
            ),
            needs=("editdistance",),
            longest_step=0.04,
            why=CTC,
        ),
        Task(
            "OOD-ASR",
            "speech recognition, Common Voice",
            "ctc",
            "downstream/ctc/cv_config/cv_es.yaml",
            "clips/ (16 kHz), train.tsv, dev.tsv and test.tsv of one language",
            _COMMON_VOICE,
            (Metric("WER %", r"test wer: (\S+)", 100, False),),
            needs=("editdistance",),
            longest_step=0.04,
            why=CTC,
        ),
        Task(
            "SD",
            "speaker diarization",
            "diarization",
            "downstream/diarization/config.yaml",
            "Kaldi folders train/, dev/ and test/ of Libri2Mix",
            _frames("train"),
            (Metric("frame DER %", r"mode test acc \S+ der (\S+)", 100, False),),
            best="best-states-dev.ckpt",
            needs=("h5py", "pandas"),
            longest_step=0.04,
            why=LABELS,
        ),
        Task(
            "QbE",
            "query by example",
            "quesst14_dtw",
            "downstream/quesst14_dtw/config.yaml",
            "quesst14Database: Audio/ and scoring/",
            {"datarc.dataset_root": "{data}"},
            (Metric("MTWV %", r".*maxTWV: (\S+)", 100),),
            best="",
            needs=("dtw", "lxml", "scipy"),
            longest_step=0.04,
            why=QUERIES,
        ),
        Task(
            "SE",
            "speech enhancement",
            "enhancement_stft",
            "downstream/enhancement_stft/configs/cfg_voicebank.yaml",
            "Kaldi folders train/, dev/ and test/ of Voicebank-DEMAND",
            _frames("train"),
            (
                Metric("PESQ", _ENHANCED.format("pesq")),
                Metric("STOI %", _ENHANCED.format("stoi"), 100),
            ),
            best="best-states-dev.ckpt",
            needs=("asteroid", "h5py", "pystoi", "pesq"),
            longest_step=0.02,
            why=STFT,
        ),
        Task(
            "SS",
            "source separation",
            "separation_stft",
            "downstream/separation_stft/configs/cfg.yaml",
            "Kaldi folders train-100/, dev/ and test/ of Libri2Mix",
            _frames("train-100"),
            (Metric("SI-SDRi dB", _ENHANCED.format("si_sdr")),),
            best="best-states-dev.ckpt",
            needs=("asteroid", "h5py"),
            longest_step=0.02,
            why=STFT,
        ),
    )
}


def find_task(downstream: str, config: str | None = None) -> Task | None:
    """The task that -d and -c name.

    Arguments
    ---------
    downstream : str
        A trailing 2 (enhancement_stft2) is the same task.
    config : str or None
        Tells the tasks of one downstream apart, by its file name.

    Example
    -------
    >>> find_task("ctc", "downstream/ctc/snips.yaml").name, find_task("emotion").name
    ('SF', 'ER')
    """
    same = [task for task in TASKS.values() if task.downstream == downstream.removesuffix("2")]
    name = PurePath(config or "").name
    named = [task for task in same if PurePath(task.config).name == name]
    return next(iter(named or same), None)


def option(arguments: Sequence[str], *names: str) -> str | None:
    """The last value of an option on a command line of argparse.

    Example
    -------
    >>> option(["-m", "train", "-dasr", "--device=cpu"], "-d", "--downstream")
    'asr'
    >>> option(["--device=cpu"], "--device"), option(["-m", "train"], "-d")
    ('cpu', None)
    """
    found = None
    for place, argument in enumerate(arguments):
        for name in names:
            if argument == name:
                found = next(iter(arguments[place + 1 : place + 2]), None)
            elif argument.startswith(f"{name}=") and name.startswith("--"):
                found = argument.removeprefix(f"{name}=")
            elif not name.startswith("--") and argument.startswith(name) and argument[1] != "-":
                found = argument.removeprefix(name)
    return found


def coarse_step_warning(command: Sequence[str], downsample_rate: int) -> str | None:
    """What to say where the encoder's time step is too long for the task of a command.

    Arguments
    ---------
    command : sequence of str
        Of run_downstream.py, itself first.
    downsample_rate : int
        Samples of a time step.

    Returns
    -------
    str or None
        None where the step suits the task, and for commands that name no task.

    Example
    -------
    >>> command = ["run_downstream.py", "-m", "train", "-u", "audio_jepa", "-d", "asr", "-n", "a"]
    >>> print(coarse_step_warning(command, 2560).splitlines()[-1].strip())
    python -m speechbrain_jepa.s3prl run_downstream.py -m train -u audio_jepa_40ms -d asr -n a
    >>> coarse_step_warning(command, 640)
    """
    script, *arguments = command
    downstream = option(arguments, "-d", "--downstream")
    if PurePath(script).name != RUNNER or downstream is None:
        return None
    task = find_task(downstream, option(arguments, "-c", "--config"))
    if task is None or task.longest_step is None:
        return None
    step = downsample_rate / SAMPLE_RATE
    if step <= task.longest_step * (1 + 1e-9):
        return None
    upstream = option(arguments, "-u", "--upstream")
    finer = [task.entry if argument == upstream else argument for argument in arguments]
    if task.entry not in finer:  # -uaudio_jepa: the last one counts
        finer += ["-u", task.entry]
    again = shlex.join(["python", "-m", "speechbrain_jepa.s3prl", script, *finer])
    return (
        f"{task.name} ({task.title}) WANTS TIME STEPS OF {1000 * task.longest_step:g} ms OR LESS, "
        f"AND THESE ARE {1000 * step:g} ms.\n{task.why[0].upper()}{task.why[1:]}.\n"
        f"Finer steps from the same weights:\n    {again}"
    )


_said: list[str] = []


def warn_of_coarse_step(downsample_rate: int) -> None:
    """Say it on stderr, once a process, and in the first process only."""
    text = coarse_step_warning(sys.argv, downsample_rate)
    if text and not _said and os.environ.get("RANK", "0") == "0":
        _said.append(text)
        line = "!" * 80
        print(f"\n{line}\n{text}\n{line}\n", file=sys.stderr, flush=True)
