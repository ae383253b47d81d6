from importlib.metadata import entry_points
from pathlib import Path

import pytest

import hqlt
import hqlt.quickstart
from hqlt.cli import main
from hqlt.training import Interrupted


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Arguments of calls of the quick start, which then does nothing."""
    found: list[tuple] = []
    monkeypatch.setattr(hqlt.quickstart, "quickstart", lambda *arguments: found.append(arguments))
    return found


def fails_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(hqlt.quickstart, "quickstart", fail)


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"hqlt {hqlt.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["usage: hqlt", "quickstart", "--version"]),
        (["quickstart", "--help"], ["usage: hqlt quickstart", "--output", "runs/quickstart", "--seed", "--workers"]),
    ],
)
def test_help_names_what_there_is(capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(word in out for word in words)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["fly"], "fly"),
        (["quickstart", "--colour", "red"], "unrecognized arguments: --colour red"),
        (["quickstart", "here"], "unrecognized arguments: here"),
        (["quickstart", "--seed", "x"], "--seed: 'x' is not an integer"),
        (["quickstart", "--seed", "1.5"], "--seed: '1.5' is not an integer"),
        (["quickstart", "--seed", "-1"], "--seed: -1 is outside 0"),
        (["quickstart", "--seed", "9" * 12], "is outside 0"),
        (["quickstart", "--workers", "0"], "--workers: 0 is outside 1"),
        (["quickstart", "--workers", "many"], "--workers: 'many' is not an integer"),
        (["quickstart", "--output"], "--output: expected one argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_exit_2_and_run_nothing(capsys, calls, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("usage: hqlt")
    assert message in errors
    assert calls == []


def test_options_reach_the_quick_start(calls):
    assert main(["quickstart"]) == 0
    assert main(["quickstart", "--output", "some/where", "--seed", "7", "--workers", "3"]) == 0
    assert calls == [(Path("runs/quickstart"), 0, None), (Path("some/where"), 7, 3)]


@pytest.mark.parametrize(
    "error",
    [ValueError("bad value"), OSError("disk full"), RuntimeError("failed: one"), FileNotFoundError("no sources")],
    ids=repr,
)
def test_an_error_exits_1_with_one_line(capsys, monkeypatch, error):
    fails_with(monkeypatch, error)
    assert main(["quickstart"]) == 1
    captured = capsys.readouterr()
    assert captured.err == f"hqlt: {error}\n"
    assert captured.out == ""


def test_a_mistake_in_the_program_is_not_hidden(monkeypatch):
    fails_with(monkeypatch, AssertionError("a bug"))
    with pytest.raises(AssertionError, match="a bug"):
        main(["quickstart"])


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        (Interrupted("stopped; run the same command"), "stopped; run the same command"),
        (KeyboardInterrupt(), "interrupted"),
    ],
    ids=["Interrupted", "KeyboardInterrupt"],
)
def test_an_interruption_exits_130(capsys, monkeypatch, stop, message):
    fails_with(monkeypatch, stop)
    assert main(["quickstart"]) == 130
    errors = capsys.readouterr().err
    assert message in errors
    assert "hqlt:" not in errors


def test_the_command_is_installed():
    (command,) = (entry for entry in entry_points(group="console_scripts") if entry.name == "hqlt")
    assert command.load() is main
