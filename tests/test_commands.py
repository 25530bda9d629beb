"""The console command and its subcommands."""

import subprocess
import sys
from importlib.metadata import version

import pytest

from speechbrain_jepa.__main__ import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_a_module_that_says_how_it_is_used(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["speechbrain-jepa"])
    try:
        main([command, "--help"])
    except SystemExit as end:
        assert end.code == 0
    assert f"python -m speechbrain_jepa.{command}" in capsys.readouterr().out


def test_the_package_is_a_program():
    process = subprocess.run(
        [sys.executable, "-m", "speechbrain_jepa", "--version"], capture_output=True, text=True
    )
    assert process.stdout.strip() == version("speechbrain-jepa")


def test_an_unknown_command_lists_those_there_are():
    with pytest.raises(SystemExit, match=r"embedd: no such command(.|\n)*embed  "):
        main(["embedd"])
