"""The files of a checkpoint: named trees of arrays, and a document that says what they are.

A checkpoint is a folder with orbax items: ``arrays``, in a training checkpoint also ``training``,
which are ordinary trees that plain orbax restores without this library, and ``config``, a JSON
document. Orbax writes all of them into a temporary folder and renames it at the end, so that a
checkpoint is whole or absent. ``config`` also holds a checksum of every array and of itself: a
damaged byte in a compressed chunk is otherwise read as another number without complaint.
"""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import shutil
import signal
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

try:
    import orbax.checkpoint as ocp
except ModuleNotFoundError as error:  # pragma: no cover - it is a dependency of the package
    raise ModuleNotFoundError(
        "checkpoints need orbax: pip install orbax-checkpoint", name=error.name
    ) from error

import jax

from jax_lora.adapter import leaves_by_path
from jax_lora.errors import CheckpointError, ConfigError, JaxLoraError
from jax_lora.io import guards

ADAPTER, PARAMS = "jax_lora.adapter", "jax_lora.params"
ARRAYS, TRAINING, CONFIG = "arrays", "training", "config"
#: Version 1 knew LoRA alone, and had a layout for each entry where version 2 has static fields.
#: Version 3 may have the fingerprint of a base, and the state of a training.
VERSION, READABLE = 3, (1, 2, 3)
#: How the names of folders end that orbax writes into before it renames them.
UNFINISHED = ".orbax-checkpoint-tmp*"
#: Orbax numbers its saves for the whole process: two at a time wait for each other's signals.
_one_at_a_time = threading.Lock()


def write(folder: str | Path, document: Mapping[str, Any], **items: Any) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        folder: A folder that does not exist yet, or is empty.
        document: What the arrays are, as JSON-able data.
        items: Trees of arrays by the name of their item.

    Raises:
        CheckpointError: The folder holds something, or it cannot be written, or a leaf is no array.
    """
    path = Path(folder).expanduser().absolute()
    check_path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(
            f"{folder}: expected a new or an empty folder, but it holds something; choose another"
        )
    for tree in items.values():
        check_storable(folder, tree)
    described = {name: describe(tree) for name, tree in items.items()}
    structures = {name: guards.structure(tree) for name, tree in items.items()}
    checked = {"version": VERSION, "structures": structures} | described | dict(document)
    checked["crc32"] = checksum(checked)
    if (size := len(json.dumps(checked))) > guards.MAX_TEXT:
        raise CheckpointError(
            f"{folder}: expected at most {guards.MAX_TEXT:,} letters of metadata and names, which "
            f"is what is read again, got {size:,}; keep long ones in files of their own"
        )
    args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    args[CONFIG] = ocp.args.JsonSave(checked)
    with _interrupts_deferred(), _one_at_a_time:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_unfinished(path)  # of a process that was killed
            if path.exists():
                path.rmdir()  # it is empty, and orbax wants to make it
            handler = ocp.CompositeCheckpointHandler()
            with _quiet, ocp.Checkpointer(handler) as saver:
                saver.save(path, ocp.args.Composite(**args))
        except Exception as error:  # whatever a full or read-only disk makes the storage raise
            _remove_unfinished(path)
            raise CheckpointError(f"{folder}: cannot be written: {error}") from error


def _remove_unfinished(path: Path) -> None:
    for partial in path.parent.glob(glob.escape(path.name) + UNFINISHED):
        shutil.rmtree(partial, ignore_errors=True)


def check_path(path: Path) -> None:
    """Refuse a path under which orbax would lose the arrays, as it takes it for a pattern.

    Raises:
        CheckpointError: There is a bracket or a backslash in it.
    """
    if odd := {*path.as_posix()} & {"[", "\\"}:
        raise CheckpointError(
            f"{path}: expected a path without {' and '.join(sorted(odd))}, with which orbax writes "
            "what it cannot read; choose another"
        )


def check_storable(folder: str | Path, tree: Any) -> None:
    """Refuse a tree that orbax cannot store.

    Raises:
        CheckpointError: Names every leaf that is no array with something in it, or those of which
            orbax would keep only one.
    """
    leaves = leaves_by_path(tree)
    odd = [path for path, leaf in leaves.items() if not _is_storable(leaf)]
    if odd or not leaves:
        what = f"found other leaves at {', '.join(odd)}" if odd else "found none"
        raise CheckpointError(f"{folder}: expected a tree of arrays that are not empty, {what}")
    stored = Counter(path.replace("/", ".") for path in leaves)
    if same := [path for path in leaves if stored[path.replace("/", ".")] > 1]:
        raise CheckpointError(
            f"{folder}: expected names that differ also where a dot is a slash, as orbax has it, "
            f"got {', '.join(same)}; rename one"
        )


def _is_storable(leaf: Any) -> bool:
    # A typed PRNG key has an extended dtype; numpy knows none of these.
    plain = hasattr(leaf, "dtype") and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    return plain and np.size(leaf) > 0 and np.dtype(leaf.dtype).isnative


def read_document(folder: str | Path, *formats: str) -> dict[str, Any]:
    """Read and check what a checkpoint says of itself.

    Args:
        folder: The checkpoint.
        formats: Those that it may have.

    Raises:
        CheckpointError: There is no such checkpoint, its document is damaged, or it is of another
            format or a newer version.
    """
    path = Path(folder).expanduser().absolute()
    if not path.is_dir():
        near = sorted(p.name for p in path.parent.glob("[!.]*/")) if path.parent.is_dir() else []
        beside = f"; beside it: {', '.join(near)}" if near else ""
        raise CheckpointError(f"{folder}: expected a checkpoint folder, found none{beside}")
    if not (path / ARRAYS).is_dir() or not (path / CONFIG).is_dir():
        held = ", ".join(sorted(p.name for p in path.iterdir())) or "nothing"
        raise CheckpointError(
            f"{folder}: expected a checkpoint with the items 'arrays' and 'config', found {held}"
        )
    guards.check_files(folder)
    document = _guarded(folder, CONFIG, lambda: _restore_json(path))
    if not isinstance(document, dict) or document.pop("crc32", None) != checksum(document):
        raise CheckpointError(
            f"{folder}: the item 'config' is damaged or not from this library; restore the "
            "checkpoint from a copy"
        )
    if missing := {"version", "format", "metadata", ARRAYS} - set(document):
        raise CheckpointError(
            f"{folder}: the item 'config' is not from this library, it lacks "
            f"{', '.join(sorted(missing))}"
        )
    with guards.as_it_was_written(folder):
        known = document["format"] in formats, document["version"] in READABLE
    if not known[0]:
        expected, found = " or ".join(map(repr, formats)), document["format"]
        raise CheckpointError(f"{folder}: expected the format {expected}, found {found!r}")
    if not known[1]:
        raise CheckpointError(
            f"{folder}: expected format version {VERSION} or older, found "
            f"{document['version']!r}; a newer jax_lora may have written it"
        )
    return document


def read_arrays(folder: str | Path, document: Mapping[str, Any], item: str = ARRAYS) -> Any:
    """Read one of a checkpoint's trees, as numpy arrays with the bits that were written.

    Raises:
        CheckpointError: The arrays cannot be read, or are not those that were written.
    """
    guards.check_database(folder, item)
    with guards.as_it_was_written(folder):
        written = {path: dict(told) for path, told in document[item].items()}
        structure = document.get("structures", {}).get(item)  # which older checkpoints do not say
    arrays = _guarded(folder, item, lambda: _restore_arrays(folder, item, written))
    read = describe(arrays)
    if written != read:
        odd = [n for n in sorted({*written, *read}) if written.get(n) != read.get(n)]
        raise CheckpointError(
            f"{folder}: damaged, the values read differ from those written: {', '.join(odd)}; "
            "restore the checkpoint from a copy"
        )
    # Paths do not tell lists from dicts, nor what is empty.
    if structure and structure != guards.structure(arrays):
        raise CheckpointError(
            f"{folder}: damaged, the tree read has other containers than the one written; restore "
            "the checkpoint from a copy"
        )
    return arrays


def plain(what: str, data: Any) -> Any:
    """A copy of JSON-able data, as it comes back from a file.

    Raises:
        ConfigError: Names everything that JSON does not have.
    """
    if odd := list(_not_json(what, data)):
        raise ConfigError(f"expected what JSON has, got {', '.join(odd)}; convert it")
    return json.loads(json.dumps(data))


def _not_json(where: str, data: Any) -> Iterator[str]:
    if isinstance(data, Mapping):
        for name, value in data.items():
            if not isinstance(name, (str, int, float, bool, type(None))):
                yield f"{where}: the name {name!r}"
            yield from _not_json(f"{where}/{name}", value)
    elif isinstance(data, (list, tuple)):
        for k, value in enumerate(data):
            yield from _not_json(f"{where}/{k}", value)
    elif not isinstance(data, (str, int, float, bool, type(None))):
        yield f"{where}: {type(data).__name__}"


def checksum(document: Mapping[str, Any]) -> int:
    """The CRC-32 of a document."""
    return zlib.crc32(json.dumps(document, sort_keys=True).encode())


def describe(arrays: Any) -> dict[str, Any]:
    """Shape, dtype and CRC-32 of every array, by path."""

    def one(leaf: Any) -> dict[str, Any]:
        array = np.ascontiguousarray(leaf)
        crc32 = zlib.crc32(array.reshape(-1).view(np.uint8).data)
        return {"shape": list(np.shape(leaf)), "dtype": str(array.dtype), "crc32": crc32}

    return {path: one(leaf) for path, leaf in leaves_by_path(arrays).items()}


@contextlib.contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Hold back Ctrl-C until the body is done: a save takes a moment, and is whole or absent."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread receives signals
        return
    received: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if received:
        raise KeyboardInterrupt


class _Quiet:
    """Keeps the threads of a failed read or write from printing, for as long as one is entered.

    When one array cannot be read or written, orbax closes its event loop while others still are;
    each of these then complains to the closed loop, and others log the error that we raise.
    """

    def __init__(self) -> None:
        self._lock, self._entered = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._entered:
                self._previous = sys.unraisablehook
                sys.unraisablehook = self._hook
                logging.getLogger("absl").addFilter(self._filter)
            self._entered += 1

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is not None:
            time.sleep(0.2)  # for the last of those threads
        with self._lock:
            self._entered -= 1
            if not self._entered:
                sys.unraisablehook = self._previous
                logging.getLogger("absl").removeFilter(self._filter)

    def _hook(self, unraisable: Any) -> None:
        if "loop is closed" not in str(unraisable.exc_value):
            self._previous(unraisable)

    @staticmethod
    def _filter(record: logging.LogRecord) -> bool:
        return "raised an exception" not in record.getMessage()


_quiet = _Quiet()


def _guarded(folder: str | Path, item: str, restore: Callable[[], Any]) -> Any:
    """What ``restore`` returns; any failure of the storage layer as one error of ours."""
    try:
        return restore()
    except JaxLoraError:
        raise
    except Exception as error:  # whatever a damaged file makes orbax or tensorstore raise
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise CheckpointError(
            f"{folder}: the item {item!r} cannot be read, a file is missing, truncated or damaged "
            f"({type(error).__name__}: {reason}); restore the checkpoint from a copy"
        ) from error


def _restore_json(path: Path) -> Any:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        return checkpointer.restore(path / CONFIG)


def _restore_arrays(folder: str | Path, item: str, written: Mapping[str, Any]) -> Any:
    path = Path(folder).expanduser().absolute() / item
    # Through numpy, so that a checkpoint does not ask for the devices it was written on.
    handler = ocp.PyTreeCheckpointHandler()
    with _quiet, ocp.Checkpointer(handler) as checkpointer:
        tree = handler.metadata(path).tree
        guards.check_sizes(folder, item, tree, written)
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        args = ocp.args.PyTreeRestore(restore_args=restore_args)
        return checkpointer.restore(path, args)
