"""The command finds subcommands, imports them late, and tells errors on one line."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from unweave.cli import ENTRY_POINT_GROUP, app
from unweave.cli.discovery import discover, summary

pytestmark = pytest.mark.usefixtures("sample")


def unweave(runner: CliRunner, *args: str):
    return runner.invoke(app, list(args))


def test_a_command_runs_under_the_name_of_its_entry_point(runner):
    result = unweave(runner, "add", "2", "3", "--times", "4")
    assert (result.exit_code, result.stdout) == (0, "20\n")


def test_help_lists_commands_with_their_docstrings_and_imports_none(runner):
    result = unweave(runner, "--help")
    assert result.exit_code == 0
    assert "Add two numbers." in result.stdout
    assert "Told without an import." in result.stdout
    assert "And print the sum." not in result.stdout
    assert "sample_was_imported" not in sys.modules


def test_help_of_a_command_shows_its_arguments(runner):
    result = unweave(runner, "add", "--help")
    assert result.exit_code == 0
    assert "And print the sum." in result.stdout
    assert "--times" in result.stdout


def test_a_group_is_listed_with_its_help_and_runs_its_commands(runner):
    assert "Do one of several things." in unweave(runner, "--help").stdout
    assert "sample_was_imported" not in sys.modules
    assert unweave(runner, "several", "double", "4").stdout == "8\n"
    assert "Print twice the number." in unweave(runner, "several", "--help").stdout
    result = unweave(runner, "several", "refuse")
    assert (result.exit_code, result.stderr) == (2, "error: `kind` must be good, got 'own'\n")


def test_no_arguments_show_the_help(runner):
    result = unweave(runner)
    assert "Usage" in result.stdout + result.stderr


def test_summary_of_a_command_without_a_source_is_empty():
    assert summary(discover()["broken"]) == ""


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("own", "error: `kind` must be good, got 'own'\n"),
        (
            "space",
            "error: cannot write 'x'; free some space or write to another disk\n",
        ),
        ("os", "error: 'some/file': Permission denied\n"),
    ],
)
def test_errors_take_one_line_on_stderr_and_status_2(runner, kind, message):
    result = unweave(runner, "fail", kind)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", message)


def test_a_bug_keeps_its_traceback(runner):
    result = unweave(runner, "fail", "bug")
    assert isinstance(result.exception, ValueError)
    assert str(result.exception) == "a bug"


def test_an_interrupt_ends_with_status_130(runner):
    assert unweave(runner, "fail", "interrupt").exit_code == 130


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["no-such"], "no-such"),
        (["add", "2"], "SECOND"),
        (["add", "2", "x"], "second"),
        (["add", "2", "3", "--time", "1"], "--time"),
    ],
)
def test_wrong_usage_is_one_line_that_names_the_value(runner, args, named):
    result = unweave(runner, *args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert named.lower() in result.stderr.lower()


def test_a_command_that_cannot_be_imported_names_its_package(runner):
    result = unweave(runner, "broken")
    assert result.exit_code == 2
    assert "pip install --force-reinstall sample-package" in result.stderr
    assert result.stderr.count("\n") == 1


def test_version_names_the_packages_with_commands(runner):
    result = unweave(runner, "--version")
    assert result.exit_code == 0
    assert "sample-package 1.2" in result.stdout
    assert "unweave " in result.stdout


def environment(sample) -> dict[str, str]:
    paths = [str(sample), *filter(None, sys.path)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def test_completion_offers_the_commands(sample):
    script = "from unweave.cli import main; main()"
    request = {"_UNWEAVE_COMPLETE": "complete_bash", "COMP_WORDS": "unweave ", "COMP_CWORD": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**environment(sample), **request},
        capture_output=True,
        text=True,
    )
    assert {"add", "fail"} <= set(result.stdout.split())


def test_completion_offers_the_options_of_a_command(sample):
    script = "from unweave.cli import main; main()"
    words = {"COMP_WORDS": "unweave add --t", "COMP_CWORD": "2"}
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**environment(sample), "_UNWEAVE_COMPLETE": "complete_bash", **words},
        capture_output=True,
        text=True,
    )
    assert result.stdout.split() == ["--times"]


def test_completion_can_be_installed(runner):
    assert "--install-completion" in unweave(runner, "--help").stdout


def test_help_imports_no_framework_and_takes_less_than_a_second(sample):
    script = (
        "import sys\n"
        "sys.argv = ['unweave', '--help']\n"
        "from unweave.cli import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    heavy = {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)\n"
        "    print('heavy:', sorted(heavy), file=sys.stderr)\n"
    )
    seconds = []
    for _ in range(3):
        start = os.times().children_user
        result = subprocess.run(
            [sys.executable, "-c", script], env=environment(sample), capture_output=True, text=True
        )
        seconds.append(os.times().children_user - start)
        assert result.returncode == 0
        assert "heavy: []" in result.stderr
    assert min(seconds) < 1


def test_the_group_name_is_part_of_the_interface():
    assert ENTRY_POINT_GROUP == "unweave.commands"
