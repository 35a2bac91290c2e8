"""CIFAR-10 from a prepared tensorflow-datasets folder, without TensorFlow.

The way to the arrays: a cached copy of the decoded images if there is one (numpy only, no
tensorflow_datasets); else the folder's records, decoded with Pillow; else the official archive,
prepared into such a folder first (`prepare.py`).
"""

import io
import json
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jax_lora.data import cache, prepare
from jax_lora.data.dataset import (
    Dataset,
    DatasetError,
    DatasetUnavailableError,
    Split,
    import_for_cifar10,
)

# Records per read: large enough to amortise the call, small enough for a progress bar that moves.
_BATCH = 2000


def load_cifar10(
    *,
    data_dir: str | Path | None = None,
    archive: str | Path | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> Dataset:
    """Loads CIFAR-10 in the official tensorflow-datasets record order.

    Args:
        data_dir: See `jax_lora.data.load`.
        archive: See `jax_lora.data.load`.
        cache_dir: See `jax_lora.data.load`.
        progress: Whether to show progress bars on stderr.

    Returns:
        The data set; pixels are 0..255.

    Raises:
        DatasetUnavailableError: If there is no prepared copy and nothing to prepare one from.
        DatasetError: If what was given, or what is there, is wrong or damaged.
    """
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    if archive is not None:
        # Checked even where it is not needed: a wrong archive should be told as such, not passed
        # over.
        archive = Path(archive).expanduser()
        prepare.verify_archive(archive, prepare.official_archive())
    folder = find_prepared(root)
    if folder is None:
        prepare.prepare(root, archive=archive, explicit=data_dir is not None, progress=progress)
        folder = find_prepared(root)
        if folder is None:
            raise DatasetError(f"cifar10 was prepared in {root}, but cannot be found there")
    arrays = _load_arrays(folder, cache_dir, progress)
    return Dataset(
        name="cifar10",
        train=arrays.train,
        test=arrays.test,
        label_names=arrays.label_names,
        max_value=255,
        source=f"tensorflow-datasets cifar10:{folder.name} at {folder}",
    )


def find_prepared(data_dir: Path) -> Path | None:
    """Finds the newest prepared version of CIFAR-10.

    Args:
        data_dir: A tensorflow-datasets folder, which need not exist.

    Returns:
        `<data_dir>/cifar10/<version>`, or None if there is none.

    Raises:
        DatasetError: If a version's folder is there but incomplete.
    """
    versions = []
    try:
        for folder in (data_dir / "cifar10").iterdir():
            if re.fullmatch(r"\d+\.\d+\.\d+", folder.name) and folder.is_dir():
                versions.append((tuple(int(part) for part in folder.name.split(".")), folder))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DatasetError(f"cannot read {data_dir / 'cifar10'}: {error}") from error
    if not versions:
        return None
    folder = max(versions)[1]
    if not (folder / "dataset_info.json").is_file():
        raise DatasetError(
            f"expected a prepared cifar10 in {folder}, but it holds no dataset_info.json "
            f"(it {prepare.describe(folder)}): the copy is incomplete; remove that folder to "
            "have it prepared again, or copy it anew"
        )
    return folder


def _load_arrays(folder: Path, cache_dir: str | Path | None, progress: bool) -> cache.Arrays:
    cache_root = Path(cache_dir).expanduser() if cache_dir else cache.default_cache_dir()
    entry = cache.key(folder)
    arrays = cache.read(cache_root, entry)
    if arrays is None:
        arrays = decode(folder, progress=progress)
        cache.write(cache_root, entry, arrays)
    return arrays


def decode(folder: Path, *, progress: bool) -> cache.Arrays:
    """Reads and decodes a prepared folder.

    Args:
        folder: `<data_dir>/cifar10/<version>`, with records as array_record or tfrecord files.
        progress: Whether to show a progress bar on stderr.

    Returns:
        The decoded splits, in record order.

    Raises:
        DatasetError: If the folder is damaged; the message names the split and the file.
    """
    tfds = import_for_cifar10("tensorflow_datasets")
    tqdm = import_for_cifar10("tqdm").tqdm
    try:
        file_format = json.loads((folder / "dataset_info.json").read_text("utf-8"))["fileFormat"]
        builder = tfds.builder_from_directory(folder)
        label_names = tuple(builder.info.features["label"].names)
        shape = builder.info.features["image"].shape
        total = sum(builder.info.splits[split].num_examples for split in ("train", "test"))
    except Exception as error:  # TFDS raises whatever its parsers raise.
        raise DatasetError(
            f"expected a prepared cifar10 in {folder}, but its description cannot be read "
            f"by tensorflow-datasets {tfds.__version__} ({error!r}); "
            "remove that folder to have it prepared again, or copy it anew"
        ) from error
    with tqdm(total=total, desc="Decoding CIFAR-10", unit=" images", disable=not progress) as bar:
        train, test = (
            _decode_split(builder, split, file_format, shape, len(label_names), bar)
            for split in ("train", "test")
        )
    return cache.Arrays(train, test, label_names)


def _decode_split(
    builder: Any,
    split: str,
    file_format: str,
    shape: tuple[int, ...],
    num_classes: int,
    bar: Any,
) -> Split:
    example = import_for_cifar10("tensorflow_datasets.proto").tf_example_pb2.Example
    pillow = import_for_cifar10("PIL.Image")
    info = builder.info.splits[split]
    images = np.empty((info.num_examples, *shape), np.uint8)
    labels = np.empty(info.num_examples, np.int32)
    files = [Path(path) for path in info.filepaths]
    # The record that each file ends before, to name the file of a damaged record.
    ends = np.cumsum(info.shard_lengths)
    done = 0
    try:
        for records in _read_records(builder, split, file_format, files):
            for record in records:
                feature = example.FromString(record).features.feature
                encoded = feature["image"].bytes_list.value[0]
                # Naming the formats spares Pillow the search through all it knows.
                image = pillow.open(io.BytesIO(encoded), formats=("PNG", "JPEG"))
                if (image.height, image.width, len(image.getbands())) != shape:
                    raise ValueError(f"image is {image.size} {image.mode}, not {shape}")
                images[done] = image
                label = feature["label"].int64_list.value[0]
                if not 0 <= label < num_classes:
                    raise ValueError(f"label {label} is not among {num_classes} classes")
                labels[done] = label
                done += 1
            bar.update(len(records))
        if done != len(labels):
            raise ValueError(f"found {done} records, expected {len(labels)}")
    except DatasetError:
        raise
    # A damaged file makes the reader, protobuf or Pillow raise almost anything.
    except Exception as error:
        missing = [file for file in files if not file.is_file()]
        current = files[min(int(np.searchsorted(ends, done, "right")), len(files) - 1)]
        fault = (
            f"{missing[0]} is missing"
            if missing
            else f"{current} is damaged near record {done} of the split ({error})"
        )
        raise DatasetError(
            f"expected {len(labels)} records in split {split!r} of cifar10, but {fault}; "
            f"remove {current.parent} to have it prepared again, or copy it anew"
        ) from error
    return Split(images, labels)


def _read_records(
    builder: Any, split: str, file_format: str, files: list[Path]
) -> Iterator[list[bytes]]:
    """Yields the serialised records of a split in batches, in order."""
    if file_format == "array_record":
        import_for_cifar10("array_record.python.array_record_module")  # TFDS may come without it.
        # Raw, because parsing with TFDS's features costs twice as much as taking out two fields.
        raw = import_for_cifar10("tensorflow_datasets").decode.DeserializeMethod.RAW_BYTES
        source = builder.as_data_source(split, deserialize_method=raw)
        for start in range(0, len(source), _BATCH):
            yield source.__getitems__(range(start, min(start + _BATCH, len(source))))
    elif file_format == "tfrecord":
        # What TFDS writes by default, and reads only with TensorFlow; the format is simple enough
        # to do without.
        for file in files:
            records = list(_read_tfrecord(file))
            for start in range(0, len(records), _BATCH):
                yield records[start : start + _BATCH]
    else:
        raise DatasetUnavailableError(
            f"expected cifar10 in {files[0].parent} as array_record or tfrecord files, got "
            f"{file_format!r}; give another data_dir to have it prepared there"
        )


def _read_tfrecord(file: Path) -> Iterator[bytes]:
    """Yields the records: a length (uint64) and a CRC (uint32), the bytes, another CRC."""
    data = file.read_bytes()
    position = 0
    while position < len(data):
        (length,) = struct.unpack_from("<Q", data, position)
        start = position + 12
        position = start + length + 4
        if position > len(data):
            raise ValueError("the file is truncated")
        yield data[start : start + length]
