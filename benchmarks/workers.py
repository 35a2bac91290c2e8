"""Programs in processes of their own, which take turns at our word.

JAX and PyTorch each keep threads, caches and memory; a program in its own process has them for
itself, its peak memory is its own, and a package that is missing is missing there only. While one
works the others wait for a message.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Protocol


class Missing(Exception):  # noqa: N818 - a state of this environment, not an error
    """A package that a program needs is not installed."""


class Subject(Protocol):
    """A program to measure: an object whose methods are called by name."""

    def call(self, method: str, *args: Any) -> Any:
        """Call one of its methods."""

    def close(self) -> None:
        """End it."""


def _make(factory: str, args: tuple[Any, ...]) -> Any:
    """``"package.module:function"``, called; what cannot be imported is `Missing`."""
    module, _, name = factory.partition(":")
    try:
        return getattr(importlib.import_module(module), name)(*args)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("benchmarks", "jax_lora"):
            raise
        raise Missing(f"needs {error.name}: pip install -e '.[bench]'") from error


class Local:
    """A subject in this process: for checks, where nothing is timed."""

    def __init__(self, factory: str, *args: Any) -> None:
        self._subject = _make(factory, args)

    def call(self, method: str, *args: Any) -> Any:
        """Call one of its methods."""
        return getattr(self._subject, method)(*args)

    def close(self) -> None:
        """Nothing to end."""


class Worker:
    """A subject in a process of its own.

    Raises:
        Missing: A package that it needs is not installed.
    """

    def __init__(self, factory: str, *args: Any) -> None:
        # Several processes share an accelerator here; none of them may take all of its memory.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, factory, args), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._receive()
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *args: Any) -> Any:
        """Call one of its methods there, and wait for what it returns."""
        self._connection.send((method, args))
        return self._receive()

    def _receive(self) -> Any:
        try:
            done, value = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(
                f"a program ended without an answer (exit code {self._process.exitcode}); "
                "was there enough memory?"
            ) from None
        if done:
            return value
        if isinstance(value, Missing):
            raise value
        raise RuntimeError(f"a program failed in its process:\n{value}")

    def close(self) -> None:
        """End the process."""
        self._connection.close()  # what it waits on ends, and so does it
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


def _serve(connection: Connection, factory: str, args: tuple[Any, ...]) -> None:
    """The other side: make the subject, then do what it is told until the pipe closes."""

    def answer(compute: Callable[[], Any]) -> bool:
        try:
            connection.send((True, compute()))
        except Missing as missing:
            connection.send((False, missing))
            return False
        except Exception:
            connection.send((False, traceback.format_exc()))
        return True

    made: list[Any] = []

    def make() -> None:
        made.append(_make(factory, args))

    if not answer(make) or not made:
        return
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        answer(functools.partial(getattr(made[0], method), *arguments))


class Crew:
    """Subjects by name, those that could be made; ended together.

    Attributes:
        subjects: What runs.
        missing: By name, why a subject is not there.
    """

    def __init__(self, factories: Mapping[str, tuple[Any, ...]], *, local: bool = False) -> None:
        """Start all of them.

        Args:
            factories: By name, ``("package.module:function", *arguments)``.
            local: All in this process.
        """
        self.subjects: dict[str, Subject] = {}
        self.missing: dict[str, str] = {}
        try:
            for name, (factory, *args) in factories.items():
                try:
                    make: type[Local] | type[Worker] = Local if local else Worker
                    self.subjects[name] = make(factory, *args)
                except Missing as missing:
                    self.missing[name] = str(missing)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End all of them."""
        for subject in self.subjects.values():
            subject.close()

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def ask(self, method: str, *args: Any) -> dict[str, Any]:
        """Call a method of each, one after another."""
        return {name: subject.call(method, *args) for name, subject in self.subjects.items()}

    def turns(self, method: str, *args: Any) -> dict[str, Callable[[], Any]]:
        """What `take_turns` takes: a call of that method of each."""

        def turn(subject: Subject) -> Callable[[], Any]:
            return lambda: subject.call(method, *args)

        return {name: turn(subject) for name, subject in self.subjects.items()}
