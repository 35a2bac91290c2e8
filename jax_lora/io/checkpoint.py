"""Orbax checkpoints of an adapter and of base parameters.

A checkpoint is a folder with two orbax items: ``arrays``, an ordinary tree that plain orbax
restores without this library, and ``config``, a JSON document that says what the arrays are. Orbax
writes both into a temporary folder and renames it at the end, so that a checkpoint is whole or
absent. ``config`` also holds a checksum of every array and of itself: a damaged byte in a
compressed chunk is otherwise read as another number without complaint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import signal
import stat
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

try:
    import orbax.checkpoint as ocp
except ModuleNotFoundError as error:  # pragma: no cover - it is a dependency of the package
    raise ModuleNotFoundError(
        "checkpoints need orbax: pip install orbax-checkpoint", name=error.name
    ) from error

from jax_lora.adapter import Adapter, Layout, Variant, check_fits, leaves_by_path
from jax_lora.config import LoraConfig
from jax_lora.errors import CheckpointError, JaxLoraError, expect_type
from jax_lora.variants import VARIANTS

_ADAPTER, _PARAMS = "jax_lora.adapter", "jax_lora.params"
#: Version 1 knew LoRA alone, and had a layout for each entry where version 2 has static fields.
_VERSION, _READABLE = 2, (1, 2)
#: Files that orbax reads whole, and what they may have; a hundred thousand arrays take less.
_TEXTS = ("_CHECKPOINT_METADATA", "_METADATA", "_sharding", "metadata", "manifest.ocdbt")
_MAX_TEXT = 16 * 2**20
#: What the best compression makes of zeros, and the size of arrays that is never too much.
_MAX_RATIO, _ALWAYS_TAKEN = 2**15, 2**30


def save_params(folder: str | Path, params: Any, metadata: Mapping[str, Any] | None = None) -> None:
    """Write parameters as an orbax checkpoint.

    Args:
        folder: The checkpoint: a folder that does not exist yet, or is empty.
        params: A pytree of arrays. Containers other than dicts and lists come back as these.
        metadata: JSON-able facts to keep beside them, such as the model's sizes.

    Raises:
        CheckpointError: The folder holds something, or it cannot be written, or a leaf is no array.
    """
    _save(folder, params, {"format": _PARAMS, "metadata": dict(metadata or {})})


def load_params(folder: str | Path) -> tuple[Any, dict[str, Any]]:
    """Read what `save_params` wrote.

    Returns:
        The parameters, on the default device, and their metadata.

    Raises:
        CheckpointError: There is no such checkpoint, it is damaged, or it holds something else.
    """
    arrays, config = _load(folder, _PARAMS)
    with _as_it_was_written(folder):
        return arrays, dict(config["metadata"])


def save_adapter(
    folder: str | Path,
    adapter: Adapter,
    config: LoraConfig | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter, and nothing but the adapter, as an orbax checkpoint.

    The ``arrays`` item is ``{path: {"a": ..., "b": ..., "scale": ...}}``, or what other arrays the
    variant has; the ``config`` item holds each path's variant and layout, and the configuration if
    there is one.

    Args:
        folder: The checkpoint: a folder that does not exist yet, or is empty.
        adapter: The adapter.
        config: The configuration it was made with.
        metadata: JSON-able facts to keep beside it.

    Raises:
        CheckpointError: The folder holds something, or it cannot be written, or a leaf is no array.
    """
    expect_type("an adapter", adapter, Adapter)
    if config is not None:
        expect_type("a configuration, such as plan.config", config, LoraConfig)
    odd = [path for path, entry in adapter.items() if not isinstance(entry, Variant)]
    if odd:
        raise CheckpointError(
            f"{folder}: expected the adapter itself, got one for a single call, such as with "
            f"dropout: {', '.join(odd)}"
        )
    arrays = {path: entry.arrays() for path, entry in adapter.items()}
    document = {
        "format": _ADAPTER,
        "lora": config.to_json() if config else None,
        "entries": {path: _static(entry) for path, entry in adapter.items()},
        "metadata": dict(metadata or {}),
    }
    _save(folder, arrays, document)


def load_adapter(
    folder: str | Path, params: Any = None
) -> tuple[Adapter, LoraConfig | None, dict[str, Any]]:
    """Read what `save_adapter` wrote.

    Args:
        folder: The checkpoint.
        params: The base parameters it will be used with, to check that it fits them.

    Returns:
        The adapter, on the default device; its configuration if there was one; its metadata.

    Raises:
        CheckpointError: There is no such checkpoint, it is damaged, or it holds something else.
        AdapterError: The adapter does not fit ``params``.
    """
    arrays, document = _load(folder, _ADAPTER)
    with _as_it_was_written(folder):
        if document["version"] == 1:
            static = {path: {"layout": layout} for path, layout in document["layouts"].items()}
            document["entries"] = {path: {"variant": "lora", **s} for path, s in static.items()}
        adapter = Adapter(_entries(folder, arrays, document["entries"]))
        metadata = dict(document["metadata"])
        try:
            config = LoraConfig.from_json(document["lora"]) if document["lora"] else None
        except JaxLoraError as error:
            raise CheckpointError(
                f"{folder}: the configuration cannot be read, a newer jax_lora may have written "
                f"it: {error}"
            ) from error
    if params is not None:
        check_fits(params, adapter)
    return adapter, config, metadata


def _static(entry: Any) -> dict[str, Any]:
    """What is not an array of an entry, as JSON-able data."""
    fields = [f.name for f in dataclasses.fields(entry) if f.metadata.get("static")]
    values = {name: getattr(entry, name) for name in fields}
    plain = {n: dataclasses.asdict(x) if isinstance(x, Layout) else x for n, x in values.items()}
    return {"variant": entry.NAME, **plain}


def _entries(folder: str | Path, arrays: Any, kept: Any) -> dict[str, Variant]:
    """The entries of these arrays and of what `_static` kept of each.

    Raises:
        CheckpointError: Names every entry that the arrays do not make, and why.
    """
    entries, problems = {}, []
    for path in sorted({*arrays, *kept}):
        if path not in arrays or path not in kept:
            problems.append(f"{path}: only in the item {'arrays' if path in arrays else 'config'}")
            continue
        variant = VARIANTS.get(kept[path].get("variant"))
        if variant is None:
            problems.append(
                f"{path}: expected a variant out of {', '.join(VARIANTS)}; found "
                f"{kept[path].get('variant')!r}"
            )
            continue
        fields = dataclasses.fields(variant)  # type: ignore[arg-type]
        needed = {f.name for f in fields if f.default is dataclasses.MISSING}
        found = {*arrays[path], *kept[path]} - {"variant"}
        if not needed <= found <= {f.name for f in fields}:
            names = ", ".join(f.name for f in fields)
            problems.append(
                f"{path}: expected the fields of {variant.NAME!r}, {names}; found "
                f"{', '.join(sorted(found))}"
            )
            continue
        try:
            entries[path] = _entry(variant, arrays[path], kept[path])
            problems += [f"{path}: {problem}" for problem in entries[path].problems()]
        except (JaxLoraError, TypeError, AttributeError) as error:
            problems.append(f"{path}: {error}")
    if problems:
        raise CheckpointError(
            f"{folder}: the arrays do not make the adapter, a newer jax_lora may have written it: "
            + "; ".join(problems)
        )
    return entries


def _entry(variant: type[Variant], arrays: dict[str, Any], kept: dict[str, Any]) -> Variant:
    """The entry of these arrays and of what `_static` kept."""
    static = {name: x for name, x in kept.items() if name != "variant"}
    if "layout" in static:
        layout = static["layout"]
        static["layout"] = Layout(**{name: tuple(axes) for name, axes in layout.items()})
    static = {name: tuple(x) if isinstance(x, list) else x for name, x in static.items()}
    return variant(**arrays, **static)


def _save(folder: str | Path, arrays: Any, document: dict[str, Any]) -> None:
    path = Path(folder).expanduser().absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(
            f"{folder}: expected a new or an empty folder, but it holds something; choose another"
        )
    odd = [p for p, leaf in leaves_by_path(arrays).items() if not _is_storable(leaf)]
    if odd or not jax.tree.leaves(arrays):
        what = f"found other leaves at {', '.join(odd)}" if odd else "found none"
        raise CheckpointError(f"{folder}: expected a tree of arrays that are not empty, {what}")
    described = {"arrays": _describe(arrays), "structure": _structure(arrays)}
    document = {"version": _VERSION} | described | document
    checked = document | {"crc32": _checksum(document)}
    items = ocp.args.Composite(
        arrays=ocp.args.StandardSave(arrays), config=ocp.args.JsonSave(checked)
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.rmdir()  # it is empty, and orbax wants to make it
        with _interrupts_deferred(), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as saver:
            saver.save(path, items)
    except Exception as error:  # whatever a full or read-only disk makes the storage layer raise
        for partial in path.parent.glob(f"{path.name}.orbax-checkpoint-tmp*"):
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{folder}: cannot be written: {error}") from error


def _is_storable(leaf: Any) -> bool:
    # A typed PRNG key has an extended dtype; numpy knows none of these.
    plain = hasattr(leaf, "dtype") and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    return plain and np.size(leaf) > 0


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


@contextlib.contextmanager
def _late_reads_quiet() -> Iterator[None]:
    """Keep the threads of a failed restore from printing.

    When one array cannot be read, orbax closes its event loop while others are still being read;
    each of these then complains to the closed loop, after the error that we raise.
    """
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if "loop is closed" not in str(unraisable.exc_value):
            previous(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    except BaseException:
        time.sleep(0.2)
        raise
    finally:
        sys.unraisablehook = previous


def _load(folder: str | Path, expected: str) -> tuple[Any, dict[str, Any]]:
    path = Path(folder).expanduser().absolute()
    if not path.is_dir():
        near = sorted(p.name for p in path.parent.glob("[!.]*/")) if path.parent.is_dir() else []
        beside = f"; beside it: {', '.join(near)}" if near else ""
        raise CheckpointError(f"{folder}: expected a checkpoint folder, found none{beside}")
    if not (path / "arrays").is_dir() or not (path / "config").is_dir():
        held = ", ".join(sorted(p.name for p in path.iterdir())) or "nothing"
        raise CheckpointError(
            f"{folder}: expected a checkpoint with the items 'arrays' and 'config', found {held}"
        )
    _check_files(folder, path)
    document = _guarded(folder, "config", lambda: _restore_json(path))
    if not isinstance(document, dict) or document.pop("crc32", None) != _checksum(document):
        raise CheckpointError(
            f"{folder}: the item 'config' is damaged or not from this library; restore the "
            "checkpoint from a copy"
        )
    if document.get("format") != expected:
        found = document.get("format")
        raise CheckpointError(f"{folder}: expected the format {expected!r}, found {found!r}")
    if document.get("version") not in _READABLE:
        raise CheckpointError(
            f"{folder}: expected format version {_VERSION} or older, found "
            f"{document.get('version')!r}; a newer jax_lora may have written it"
        )
    with _as_it_was_written(folder):
        written = {path: dict(told) for path, told in document["arrays"].items()}
    arrays = _guarded(folder, "arrays", lambda: _restore_arrays(folder, path, written))
    read = _describe(arrays)
    if written != read:
        odd = [n for n in sorted({*written, *read}) if written.get(n) != read.get(n)]
        raise CheckpointError(
            f"{folder}: damaged, the values read differ from those written: {', '.join(odd)}; "
            "restore the checkpoint from a copy"
        )
    # Paths do not tell lists from dicts, nor what is empty. Older checkpoints do not say it.
    if (document.get("structure") or _structure(arrays)) != _structure(arrays):
        raise CheckpointError(
            f"{folder}: damaged, the tree read has other containers than the one written; restore "
            "the checkpoint from a copy"
        )
    return jax.tree.map(jnp.asarray, arrays), document


@contextlib.contextmanager
def _as_it_was_written(folder: str | Path) -> Iterator[None]:
    """Anything but what `_save` writes, although its checksum is right, as one error of ours."""
    try:
        yield
    except JaxLoraError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{folder}: the item 'config' is not as this library writes it "
            f"({type(error).__name__}: {error}); a newer jax_lora may have written it"
        ) from error


def _check_files(folder: str | Path, path: Path) -> None:
    """Refuse what would be read for ever, and what orbax would read outside of the folder."""
    try:
        problem = _problem_of_files(path)
    except (OSError, ValueError, RecursionError) as error:
        problem = f"a file is missing, truncated or damaged ({error})"
    if problem:
        raise CheckpointError(
            f"{folder}: damaged or not from this library: {problem}; restore the checkpoint from "
            "a copy"
        )


def _problem_of_files(path: Path) -> str:
    for file in path.rglob("*"):
        status = file.stat()  # of what a link is to, as a cache of downloads has them
        text = file.name in _TEXTS or file.parent.name == "array_metadatas"
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            return f"expected {file.relative_to(path)} to be a file or a folder"
        if text and status.st_size > _MAX_TEXT:
            return f"expected at most {_MAX_TEXT:,} bytes in {file.relative_to(path)}"
    tree = json.loads((path / "arrays" / "_METADATA").read_bytes())
    # Without its database, orbax takes the arrays' names for paths, also for absolute ones.
    if not isinstance(tree, dict) or tree.get("use_ocdbt", True) is not True:
        return "expected arrays in a database of OCDBT, found other files"
    if not (path / "arrays" / "manifest.ocdbt").is_file():
        return "expected arrays/manifest.ocdbt, found none"
    return ""


def _check_sizes(folder: str | Path, path: Path, tree: Any, written: Mapping[str, Any]) -> None:
    """Before memory is taken: the arrays are of the sizes that were written, and these can be."""
    found = leaves_by_path(tree)
    sizes = {name: (list(x.shape), str(np.dtype(x.dtype))) for name, x in found.items()}
    told = {name: (x.get("shape"), x.get("dtype")) for name, x in written.items()}
    if sizes != told:
        odd = [name for name in sorted({*sizes, *told}) if sizes.get(name) != told.get(name)]
        raise CheckpointError(
            f"{folder}: damaged, the arrays differ from those written: {', '.join(odd[:9])}; "
            "restore the checkpoint from a copy"
        )
    needed = sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in found.values())
    stored = sum(file.stat().st_size for file in (path / "arrays").rglob("*") if file.is_file())
    if needed > _MAX_RATIO * stored + _ALWAYS_TAKEN:
        raise CheckpointError(
            f"{folder}: expected at most {_MAX_RATIO:,} times the {stored:,} bytes that its files "
            f"have, found arrays of {needed:,} bytes; not from this library"
        )


def _checksum(document: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(document, sort_keys=True).encode())


def _describe(arrays: Any) -> dict[str, Any]:
    """Shape, dtype and CRC-32 of every array, by path."""

    def describe(leaf: Any) -> dict[str, Any]:
        array = np.ascontiguousarray(leaf)
        crc32 = zlib.crc32(array.reshape(-1).view(np.uint8).data)
        return {"shape": list(np.shape(leaf)), "dtype": str(array.dtype), "crc32": crc32}

    return {path: describe(leaf) for path, leaf in leaves_by_path(arrays).items()}


def _structure(tree: Any) -> Any:
    """Dicts and lists as they are, and None for each array; ``""`` for a tree of anything else.

    Other containers come back as dicts or lists, so that nothing can be said about them.
    """
    inner: list[Any]
    if type(tree) is dict:
        inner = [_structure(x) for x in tree.values()]
        return "" if "" in inner else dict(zip(map(str, tree), inner, strict=True))
    if type(tree) in (list, tuple):
        inner = [_structure(x) for x in tree]
        return "" if "" in inner else inner
    return None if jax.tree_util.all_leaves([tree]) else ""


def _guarded(folder: str | Path, item: str, restore: Any) -> Any:
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
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        items = ocp.args.Composite(config=ocp.args.JsonRestore())
        return checkpointer.restore(path, items)["config"]


def _restore_arrays(folder: str | Path, path: Path, written: Mapping[str, Any]) -> Any:
    # Through numpy, so that a checkpoint does not ask for the devices it was written on.
    handler = ocp.CompositeCheckpointHandler(
        arrays=ocp.PyTreeCheckpointHandler(), config=ocp.JsonCheckpointHandler()
    )
    with _late_reads_quiet(), ocp.Checkpointer(handler) as checkpointer:
        tree = checkpointer.metadata(path).item_metadata["arrays"].tree
        _check_sizes(folder, path, tree, written)
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        args = ocp.args.PyTreeRestore(restore_args=restore_args)
        return checkpointer.restore(path, ocp.args.Composite(arrays=args))["arrays"]
