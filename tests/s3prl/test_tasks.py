"""The table of SUPERB's tasks, and what is said where a time step is too long for one."""

import re
from pathlib import Path

import pytest

from speechbrain_jepa.s3prl import tasks
from speechbrain_jepa.s3prl.expert import UpstreamExpert
from speechbrain_jepa.s3prl.tasks import TASKS, coarse_step_warning, find_task, option

COMMAND = ("run_downstream.py", "-m", "train", "-u", "audio_jepa", "-k", "my_encoder", "-n", "x")


@pytest.fixture(scope="module")
def page():
    return (Path(__file__).parents[2] / "docs" / "s3prl.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_task_is_found_by_its_command(task):
    assert find_task(task.downstream, task.config) is task
    assert find_task(task.downstream, f"/elsewhere/{Path(task.config).name}") is task


def test_a_task_by_its_downstream_alone():
    assert find_task("separation_stft2") is TASKS["SS"]
    assert find_task("ctc") is TASKS["PR"]
    assert find_task("example") is None


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_downstream_is_in_s3prl(task, s3prl_folder):
    assert (s3prl_folder / "downstream" / task.downstream / "expert.py").is_file()


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_page_lists_every_task(task, page):
    """A row of the table, with its step and what it needs, and a command."""
    (row,) = re.findall(rf"^\| {task.name} \|.*$", page, re.MULTILINE)
    step = "any" if task.longest_step is None else f"{1000 * task.longest_step:g} ms"
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert f"`-d {task.downstream}`" in cells[2] and cells[3] == step
    commands = re.findall(r"^\$train.*-d (\S+)|^\$run -m evaluate.*-d (\S+)", page, re.MULTILINE)
    assert task.downstream in {name for pair in commands for name in pair}
    for key in task.paths:
        assert key.split(".", 1)[1] in page, key


@pytest.mark.parametrize(
    "task", [t for t in TASKS.values() if t.longest_step], ids=lambda t: t.name
)
def test_too_coarse_a_step_is_said_with_the_command_that_works(task):
    command = [*COMMAND, "-d", task.downstream, "-c", task.config]
    said = coarse_step_warning(command, 2560)
    assert "ARE 160 ms" in said and f"{1000 * task.longest_step:g} ms OR LESS" in said
    again = said.splitlines()[-1].split()
    assert again[:3] == ["python", "-m", "speechbrain_jepa.s3prl"]
    assert option(again, "-u") == task.entry
    step = int(task.entry.removeprefix("audio_jepa_").removesuffix("ms")) / 1000
    assert step <= task.longest_step
    rest = [word for word in again[3:] if word != option(again, "-u")]
    assert rest == [word for word in command if word != "audio_jepa"]
    assert coarse_step_warning(command, round(16_000 * task.longest_step)) is None
    joined = [*COMMAND[:3], "-uaudio_jepa", "-d", task.downstream]
    assert option(coarse_step_warning(joined, 2560).split(), "-u") == task.entry


@pytest.mark.parametrize("arguments", [("-d", "emotion"), ("-d", "example"), ("-e", "a.ckpt"), ()])
def test_nothing_is_said_of_tasks_that_do_not_mind(arguments):
    assert coarse_step_warning([*COMMAND, *arguments], 2560) is None
    assert coarse_step_warning(["other.py", "-d", "asr"], 2560) is None


@pytest.fixture
def told(monkeypatch, capsys, encoder_folder):
    """What stderr has after the upstream is made twice, for a command line."""

    def told(*arguments, **options):
        monkeypatch.setattr("sys.argv", [*COMMAND, *arguments])
        monkeypatch.setattr(tasks, "_said", [])
        for _ in range(2):
            UpstreamExpert(encoder_folder, **options)
        return capsys.readouterr().err

    return told


def test_it_is_said_once_and_loudly(told, monkeypatch):
    said = told("-d", "asr")
    assert said.count("ASR (speech recognition) WANTS TIME STEPS OF 40 ms OR LESS") == 1
    assert "loss of 0.0" in said and said.count("!" * 80) == 2
    assert told("-d", "asr", step_seconds=0.04) == told("-d", "emotion") == ""
    assert "WANTS TIME STEPS OF 20 ms" in told("-d", "separation_stft", step_seconds=0.04)
    monkeypatch.setenv("RANK", "1")
    assert told("-d", "asr") == ""


def test_the_modules_that_are_needed_are_those_of_the_extra():
    setup = (Path(__file__).parents[2] / "setup.cfg").read_text(encoding="utf-8")
    extra = setup.split("\nsuperb =\n")[1].split("\n#")[0]
    packages = {re.match(r"\s*([\w-]+)", line)[1] for line in extra.splitlines()}
    names = {"sklearn": "scikit-learn", "dtw": "dtw-python"}
    needed = {names.get(name, name) for task in TASKS.values() for name in task.needs}
    assert needed == packages
