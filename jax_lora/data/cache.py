"""Decoded images kept as .npy files, so that the second start costs a file read and no decoding.

The arrays are read with plain `np.load`, not memory-mapped: training reads all of them anyway, a
map would turn a file truncated later into a crash of the process, and reading 184 MB from the page
cache takes about 0.1 s.  Reading also lets a checksum tell a damaged file from a good one.
"""

import dataclasses
import hashlib
import json
import shutil
import tempfile
import warnings
import zlib
from pathlib import Path

import numpy as np

from jax_lora.data.dataset import DatasetError, Split, import_for_cifar10

_FORMAT = 1
_SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True)
class Arrays:
    """What the cache holds: both splits and the names of the classes."""

    train: Split
    test: Split
    label_names: tuple[str, ...]


def default_cache_dir() -> Path:
    """The user's cache folder for this package."""
    return Path(import_for_cifar10("platformdirs").user_cache_dir("jax_lora"))


def key(folder: Path) -> str:
    """A name for the present contents of a folder.

    The first half stands for the folder, the second for its files' names, sizes and modification
    times, so that entries for earlier contents of the same folder can be told and removed.

    Args:
        folder: A prepared tensorflow-datasets folder.

    Returns:
        Two short digests joined by a hyphen.
    """
    folder = folder.resolve()
    stats = sorted((file.name, file.stat()) for file in folder.iterdir() if file.is_file())
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return f"{_digest(str(folder))}-{_digest(json.dumps([_FORMAT, files]))}"


def read(cache_dir: Path, entry: str) -> Arrays | None:
    """Reads an entry.

    Args:
        cache_dir: The cache folder.
        entry: The entry's `key`.

    Returns:
        The arrays, or None if the entry is missing, truncated or damaged in any way.
    """
    folder = cache_dir / "cifar10" / entry
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        splits = {}
        for split in _SPLITS:
            arrays = []
            for part in ("images", "labels"):
                array = np.load(folder / f"{split}_{part}.npy", allow_pickle=False)
                if zlib.crc32(array) != meta["crc32"][f"{split}_{part}"]:
                    return None
                arrays.append(array)
            splits[split] = Split(*arrays)
        return Arrays(splits["train"], splits["test"], tuple(meta["label_names"]))
    # Whatever is wrong with a cache, the remedy is the same: decode again.
    except (OSError, ValueError, KeyError, TypeError, EOFError, DatasetError):
        return None


def write(cache_dir: Path, entry: str, arrays: Arrays) -> None:
    """Writes an entry, all of it or nothing; a folder that cannot be written is only a warning.

    Args:
        cache_dir: The cache folder, created if need be.
        entry: The entry's `key`.
        arrays: What to write.
    """
    root = cache_dir / "cifar10"
    try:
        root.mkdir(parents=True, exist_ok=True)
        # In the same folder, so that the final rename stays on one file system.
        with tempfile.TemporaryDirectory(
            prefix=".incomplete-", dir=root, ignore_cleanup_errors=True
        ) as tmp:
            new = Path(tmp) / "new"
            new.mkdir()
            _fill(new, arrays)
            # A damaged entry and entries for earlier contents of the folder go; a rename into the
            # temporary folder takes each away at once, so that no other process sees half of it.
            for index, stale in enumerate(root.glob(f"{entry.split('-')[0]}-*")):
                _move(stale, Path(tmp) / f"old{index}")
            _move(new, root / entry)
    except OSError as error:
        warnings.warn(
            f"decoded CIFAR-10 images could not be cached in {root} ({error}); every start will "
            "decode them again; give another cache_dir to avoid that",
            RuntimeWarning,
            stacklevel=2,
        )


def _fill(folder: Path, arrays: Arrays) -> None:
    checksums = {}
    for split in _SPLITS:
        for part in ("images", "labels"):
            array = getattr(getattr(arrays, split), part)
            np.save(folder / f"{split}_{part}.npy", array, allow_pickle=False)
            checksums[f"{split}_{part}"] = zlib.crc32(array)
    meta = {"crc32": checksums, "label_names": arrays.label_names}
    (folder / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")


def _move(source: Path, target: Path) -> None:
    """Renames a folder, unless another process was faster: then its result is as good."""
    try:
        source.replace(target)
    except OSError:
        if source.exists() and not target.exists():
            raise
        shutil.rmtree(source, ignore_errors=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
