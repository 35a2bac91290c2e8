"""What is checked of a checkpoint's files before orbax reads them: anybody may have made them."""

from __future__ import annotations

import contextlib
import json
import math
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_lora.adapter import leaves_by_path
from jax_lora.errors import CheckpointError, JaxLoraError

#: Files that orbax reads whole, and what they may have; a hundred thousand arrays take less.
_TEXTS = ("_CHECKPOINT_METADATA", "_METADATA", "_sharding", "metadata", "manifest.ocdbt")
MAX_TEXT = 16 * 2**20
#: What the best compression makes of zeros, and the size of arrays that is never too much.
_MAX_RATIO, _ALWAYS_TAKEN = 2**15, 2**30


@contextlib.contextmanager
def as_it_was_written(folder: str | Path) -> Iterator[None]:
    """Anything but what this library writes, although its checksum is right, as one error of ours.

    Raises:
        CheckpointError: The body met a document without what it expected there.
    """
    try:
        yield
    except JaxLoraError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{folder}: the item 'config' is not as this library writes it "
            f"({type(error).__name__}: {error}); a newer jax_lora may have written it"
        ) from error


def check_files(folder: str | Path) -> None:
    """Refuse what would be read for ever.

    Raises:
        CheckpointError: A file is none, or is too large for what it is.
    """
    path = Path(folder).expanduser().absolute()
    with _readable(folder):
        for file in path.rglob("*"):
            status = file.stat()  # of what a link is to, as a cache of downloads has them
            text = file.name in _TEXTS or file.parent.name == "array_metadatas"
            name = file.relative_to(path)
            if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
                raise _not_ours(folder, f"expected {name} to be a file or a folder")
            if text and status.st_size > MAX_TEXT:
                raise _not_ours(folder, f"expected at most {MAX_TEXT:,} bytes in {name}")


def check_database(folder: str | Path, item: str) -> None:
    """Refuse what orbax would read outside of the folder.

    Without its database, orbax takes the arrays' names for paths, also for absolute ones.

    Raises:
        CheckpointError: The arrays of the item are not in a database.
    """
    path = Path(folder).expanduser().absolute() / item
    with _readable(folder):
        tree = json.loads((path / "_METADATA").read_bytes())
        if not isinstance(tree, dict) or tree.get("use_ocdbt", True) is not True:
            raise _not_ours(folder, "expected arrays in a database of OCDBT, found other files")
        if not (path / "manifest.ocdbt").is_file():
            raise _not_ours(folder, f"expected {item}/manifest.ocdbt, found none")


def check_sizes(folder: str | Path, item: str, tree: Any, written: Mapping[str, Any]) -> None:
    """Before memory is taken: the arrays are of the sizes that were written, and these can be.

    Args:
        folder: The checkpoint.
        item: The name of an item.
        tree: What orbax says of the item's arrays, each with a shape and a dtype.
        written: What the document says of them, by path.

    Raises:
        CheckpointError: Names the arrays that differ, or says that they cannot be in these files.
    """
    found = leaves_by_path(tree)
    sizes = {name: (list(x.shape), str(np.dtype(x.dtype))) for name, x in found.items()}
    told = {name: (x.get("shape"), x.get("dtype")) for name, x in written.items()}
    if sizes != told:
        odd = [name for name in sorted({*sizes, *told}) if sizes.get(name) != told.get(name)]
        raise CheckpointError(
            f"{folder}: damaged, the arrays differ from those written: {', '.join(odd[:9])}; "
            "restore the checkpoint from a copy"
        )
    path = Path(folder).expanduser().absolute() / item
    needed = sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in found.values())
    stored = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if needed > _MAX_RATIO * stored + _ALWAYS_TAKEN:
        raise CheckpointError(
            f"{folder}: expected at most {_MAX_RATIO:,} times the {stored:,} bytes that its files "
            f"have, found arrays of {needed:,} bytes; not from this library"
        )


def structure(tree: Any) -> Any:
    """Dicts and lists as they are, and None for each array; ``""`` for a tree of anything else.

    Other containers come back as dicts or lists, so that nothing can be said about them.
    """
    inner: list[Any]
    if type(tree) is dict:
        inner = [structure(x) for x in tree.values()]
        return "" if "" in inner else dict(zip(map(str, tree), inner, strict=True))
    if type(tree) in (list, tuple):
        inner = [structure(x) for x in tree]
        return "" if "" in inner else inner
    return None if jax.tree_util.all_leaves([tree]) else ""


@contextlib.contextmanager
def _readable(folder: str | Path) -> Iterator[None]:
    try:
        yield
    except JaxLoraError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        problem = f"a file is missing, truncated or damaged ({error})"
        raise _not_ours(folder, problem) from error


def _not_ours(folder: str | Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: damaged or not from this library: {problem}; restore the checkpoint from a copy"
    )
