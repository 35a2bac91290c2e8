"""How a script ends: its exit code, and one clear line."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable

import pytest

from jax_lora.data import DatasetError
from jax_lora.errors import CheckpointError, ConfigError, JaxLoraError
from jax_lora.experiments.cli import main


@dataclasses.dataclass(frozen=True)
class Options:
    """Count to a number.

    Attributes:
        number: The number.
    """

    number: int = 3


def raising(error: BaseException) -> Callable[[Options], None]:
    def run(options: Options) -> None:
        raise error

    return run


def test_runs_with_the_parsed_options(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Options] = []
    assert main(Options, seen.append, ["--number", "5"]) == 0
    assert main(Options, seen.append, []) == 0
    assert seen == [Options(5), Options(3)]
    assert capsys.readouterr() == ("", "")


def test_arguments_of_the_process_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Options] = []
    monkeypatch.setattr(sys, "argv", ["program", "--number", "7"])
    assert main(Options, seen.append) == 0
    assert seen == [Options(7)]


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("expected this"),
        CheckpointError("expected this"),
        JaxLoraError("expected this"),
        DatasetError("expected this"),
        ImportError("expected this"),
        OSError("expected this"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_expected_error_is_one_line(
    error: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(Options, raising(error), []) == 1
    assert capsys.readouterr() == ("", "error: expected this\n")


def test_a_mistake_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        main(Options, raising(ZeroDivisionError()), [])


def test_ctrl_c_is_exit_code_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(Options, raising(KeyboardInterrupt()), []) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "checkpoints already saved are complete" in err


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_in_the_middle_of_a_compilation() -> None:
    """Whose remains make JAX 0.10 crash when the interpreter ends."""
    code = """
import dataclasses, os, signal, sys, threading
import jax, jax.numpy as jnp
from jax_lora.experiments.cli import main
@dataclasses.dataclass(frozen=True)
class Options: pass
def fun(x):
    for k in range(300):
        x = jnp.sin(x @ x) + k
    return x
def run(options):
    lowered = jax.jit(fun).lower(jnp.ones((8, 8)))
    print("compiling")
    threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGINT]).start()
    lowered.compile()
    print("compiled")
sys.exit(main(Options, run, []))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (130, "compiling\n")
    assert done.stderr == "interrupted; checkpoints already saved are complete\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--numbr", "5"], ["Unrecognized", "--numbr", "Perhaps you meant", "--number"]),
        (["--number", "five"], ["--number", "'five'"]),
        (["5"], ["Unrecognized", "5"]),
    ],
)
def test_what_cannot_be_parsed(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(Options, raising(AssertionError("ran")), argv)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert [word for word in words if word not in err] == []
    assert "Traceback" not in err


def test_help_is_made_of_the_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(Options, raising(AssertionError("ran")), ["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for words in ("Count to a number.", "--number INT", "The number.", "(default: 3)"):
        assert words in out


@pytest.mark.skipif(sys.platform == "win32", reason="no /bin/sh")
def test_a_reader_that_leaves_ends_it_quietly() -> None:
    code = """
import dataclasses, sys
from jax_lora.experiments.cli import main
@dataclasses.dataclass(frozen=True)
class Options: pass
def run(options):
    for number in range(100_000):
        print(number)
sys.exit(main(Options, run, []))
"""
    done = subprocess.run(
        [
            "/bin/sh",
            "-c",
            '{ "$0" -c "$1"; echo "code $?" >&2; } | head -n 1',
            sys.executable,
            code,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == "0\n"
    assert done.stderr == "code 141\n"
