"""From a dataclass of options to a script: parse, run, and end with one clear line."""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from jax_lora.data import DatasetError
from jax_lora.errors import JaxLoraError


def main(
    options: Any,
    run: Callable[[Any], object],
    argv: Sequence[str] | None = None,
    *,
    failure: int = 1,
) -> int:
    """Parse ``argv`` into ``options`` and call ``run`` with them.

    Args:
        options: A dataclass; its fields are the command line, its docstring the help. Or a union
            of such, each of which is a subcommand.
        run: What to do.
        argv: The arguments; those of the process by default.
        failure: The exit code after a failed write or an error of this library.

    Returns:
        The exit code: 0; ``failure`` after one, which was printed; 2 after options out of range;
        130 after Ctrl-C and 141 after the reader of the output left, as shells have it. What was
        saved before stays valid.

    Raises:
        SystemExit: With code 2 after options that cannot be parsed, with code 0 after --help.
    """
    received: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        received.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        # The scripts leave Ctrl-C to the system while they import; from here on it is an exception.
        signal.signal(signal.SIGINT, interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ± shows a question mark
    try:
        try:
            parsed = tyro.cli(options, args=argv)
        except JaxLoraError as error:  # newer parsers put it into their box and exit with 2 as well
            print(f"error: {error}", file=sys.stderr)
            return 2
        run(parsed)
    except KeyboardInterrupt:
        print("interrupted; checkpoints already saved are complete", file=sys.stderr)
        if received:
            atexit.register(_end, 130)
        return 130
    except (JaxLoraError, DatasetError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return failure
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return failure
    return 0


def _end(code: int) -> None:
    """End the process at once, after what threads were writing.

    An interrupted compilation leaves behind what makes JAX 0.10 crash when the interpreter ends.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)
