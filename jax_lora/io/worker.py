"""One thread that writes while the training goes on, and what it may read meanwhile."""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401 - its hook runs after ours if it was there before
import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def snapshot(tree: Any) -> Any:
    """What a tree holds now, whatever happens to its arrays: a step may reuse their memory.

    Of arrays in the host's memory this is numpy's view, once they are computed; JAX does not reuse
    what numpy sees. Others are copied where they are, which is not waited for.
    """
    leaves, structure = jax.tree.flatten(tree)
    elsewhere = [x for x in leaves if isinstance(x, jax.Array) and not _is_on_host(x)]
    copies = iter(jax.device_put(elsewhere, may_alias=False))

    def now(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return np.array(leaf)
        return np.asarray(leaf) if _is_on_host(leaf) else next(copies)

    return jax.tree.unflatten(structure, [now(leaf) for leaf in leaves])


def _is_on_host(array: jax.Array) -> bool:
    # Numpy has no view of typed PRNG keys.
    plain = not jax.numpy.issubdtype(array.dtype, jax.dtypes.extended)
    return plain and all(device.platform == "cpu" for device in array.devices())


_WORKERS: weakref.WeakSet[Worker] = weakref.WeakSet()


@functools.cache
def _finish_before_exit() -> None:
    """Make the interpreter wait for running jobs before it ends, once and for all.

    Any later, as in `atexit`, it refuses new threads, and orbax's own wait for them for ever. The
    hook is that of `concurrent.futures`, there is no public one; the last one given runs first.
    """

    def finish() -> None:
        for worker in list(_WORKERS):
            worker.join()

    if hook := getattr(threading, "_register_atexit", None):
        hook(finish)


class Worker:
    """Runs one job at a time in a thread; what a job raises comes out of the next call."""

    def __init__(self, name: str):
        self._name = name
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a job is running."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, job: Callable[[], None]) -> None:
        """Begin a job, after the one before it.

        Raises:
            BaseException: What the one before it raised; the new one is not begun then.
        """
        self.wait()
        _finish_before_exit()
        _WORKERS.add(self)
        self._thread = threading.Thread(target=self._run, args=(job,), name=self._name)
        self._thread.start()

    def wait(self) -> None:
        """Wait until no job is running.

        Raises:
            BaseException: What the last one raised, once.
        """
        self.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def join(self) -> None:
        """Wait until no job is running, and leave what it raised to the next call."""
        # Garbage may be collected in any thread, and with it who has this worker.
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # it is raised where it is looked for
            self._error = error
