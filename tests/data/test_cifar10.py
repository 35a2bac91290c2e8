"""Reading a prepared CIFAR-10: the decoded arrays, their cache, and damage to either."""

import functools
import json
import os
import shutil
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_lora.data import Dataset, DatasetError, cache, cifar10, load

# Read before the tests are cut off from the user's environment.
_REAL = os.environ.get("TFDS_DATA_DIR")

Load = Callable[..., Dataset]


@pytest.fixture
def folder(tmp_path: Path, miniature: Any) -> Path:
    """The miniature, prepared, with nothing cached yet."""
    load(
        "cifar10",
        data_dir=tmp_path / "data",
        archive=miniature.path,
        cache_dir=tmp_path / "other",
        progress=False,
    )
    return tmp_path / "data" / "cifar10" / "3.0.2"


@pytest.fixture
def load_mini(tmp_path: Path, folder: Path) -> Load:
    """`load("cifar10")` of the prepared miniature."""
    return functools.partial(
        load, "cifar10", data_dir=tmp_path / "data", cache_dir=tmp_path / "cache", progress=False
    )


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Records each decoding, so that a test can tell a cache hit from a miss."""
    calls: list[Path] = []
    original = cifar10.decode

    def decode(folder: Path, *, progress: bool) -> cache.Arrays:
        calls.append(folder)
        return original(folder, progress=progress)

    monkeypatch.setattr(cifar10, "decode", decode)
    return calls


def assert_equal(a: Dataset, b: Dataset) -> None:
    assert (a.label_names, a.source) == (b.label_names, b.source)
    for split in ("train", "test"):
        np.testing.assert_array_equal(getattr(a, split).images, getattr(b, split).images)
        np.testing.assert_array_equal(getattr(a, split).labels, getattr(b, split).labels)


def only_entry(cache_dir: Path) -> Path:
    (entry,) = (cache_dir / "cifar10").iterdir()
    return entry


def test_the_second_load_comes_from_the_cache(
    load_mini: Load, folder: Path, decodings: list[Path]
) -> None:
    first, second = load_mini(), load_mini()
    assert decodings == [folder]
    assert_equal(first, second)
    assert str(folder) in second.source


def test_a_cached_load_imports_no_tfds(load_mini: Load, tmp_path: Path) -> None:
    load_mini()
    program = f"""
        import sys
        from jax_lora.data import load
        data = load("cifar10", data_dir={str(tmp_path / "data")!r},
                    cache_dir={str(tmp_path / "cache")!r})
        assert len(data.train.images) == 100
        heavy = {{"tensorflow_datasets", "tensorflow", "array_record", "PIL", "sklearn", "tqdm"}}
        print(sorted(heavy & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout == "[]\n", done.stderr


def test_the_modules_import_nothing_of_ours_but_data() -> None:
    for file in Path(cifar10.__file__).parent.glob("*.py"):
        for line in file.read_text("utf-8").splitlines():
            if line.strip().startswith(("import jax", "from jax")):
                assert line.strip().startswith("from jax_lora.data"), f"{file.name}: {line}"


@pytest.mark.parametrize("name", ["train_images.npy", "test_labels.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "empty", "another shape"])
def test_a_damaged_cache_is_decoded_again(
    name: str, damage: str, load_mini: Load, tmp_path: Path, decodings: list[Path]
) -> None:
    good = load_mini()
    file = only_entry(tmp_path / "cache") / name
    content = bytearray(file.read_bytes())
    if damage == "truncate":
        file.write_bytes(content[:-7])
    elif damage == "flip":
        # An array's last byte is data, which no shape check sees; in meta.json, a digit.
        at = -1 if name.endswith(".npy") else content.index(b": ", 20) + 2
        content[at] ^= 1
        file.write_bytes(content)
    elif damage == "remove":
        file.unlink()
    elif damage == "empty":
        file.write_bytes(b"")
    elif name.endswith(".npy"):
        np.save(file, np.zeros((3, 3), np.uint8))
    else:
        file.write_text("[]")
    assert_equal(load_mini(), good)
    assert len(decodings) == 2
    assert_equal(load_mini(), good)  # And the cache is whole again.
    assert len(decodings) == 2


def test_another_copy_of_the_data_is_decoded_again(
    load_mini: Load, folder: Path, tmp_path: Path, decodings: list[Path]
) -> None:
    load_mini()
    stat = (folder / "dataset_info.json").stat()
    os.utime(folder / "dataset_info.json", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    load_mini()
    assert len(decodings) == 2
    only_entry(tmp_path / "cache")  # The entry for the earlier contents is gone.


def test_a_cache_that_cannot_be_written_is_a_warning(load_mini: Load, tmp_path: Path) -> None:
    good = load_mini()
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(RuntimeWarning, match="could not be cached"):
        assert_equal(load_mini(cache_dir=tmp_path / "file"), good)


def test_a_failed_cache_write_leaves_nothing(
    load_mini: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        load_mini()
    assert list((tmp_path / "cache" / "cifar10").iterdir()) == []


def test_processes_that_race_for_the_cache_all_get_it(load_mini: Load, tmp_path: Path) -> None:
    load_mini(cache_dir=tmp_path / "elsewhere")
    program = f"""
        from jax_lora.data import load
        data = load("cifar10", data_dir={str(tmp_path / "data")!r},
                    cache_dir={str(tmp_path / "cache")!r}, progress=False)
        print(int(data.train.images.sum()))
    """
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for _ in range(3)
    ]
    sums = {process.communicate(timeout=60)[0] for process in running}
    assert sums == {f"{load_mini().train.images.sum()}\n"}
    only_entry(tmp_path / "cache")


@pytest.mark.parametrize("name", ["cifar10", "auto"])
@pytest.mark.parametrize("damage", ["truncate", "zeros", "remove", "empty"])
def test_a_damaged_record_file_is_an_error_naming_it(
    name: str, damage: str, load_mini: Load, folder: Path, tmp_path: Path
) -> None:
    (file,) = folder.glob("cifar10-test.array_record*")
    content = file.read_bytes()
    middle = len(content) // 2
    if damage == "truncate":
        file.write_bytes(content[:middle])
    elif damage == "zeros":
        file.write_bytes(content[: middle // 2] + bytes(middle) + content[middle // 2 + middle :])
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
    with pytest.raises(DatasetError, match="split 'test'") as caught:
        load(name, data_dir=tmp_path / "data", cache_dir=tmp_path / "cache", progress=False)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("content", ["", "{}", "not json"])
def test_a_damaged_description_is_an_error(content: str, load_mini: Load, folder: Path) -> None:
    (folder / "dataset_info.json").write_text(content)
    with pytest.raises(DatasetError, match="description cannot be read"):
        load_mini()


def _to_tfrecord(folder: Path) -> None:
    """Rewrites a folder in TFDS's default format; the CRCs, which nobody checks, are zero."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    for split in ("train", "test"):
        records = list(builder.as_data_source(split, deserialize_method=raw))
        for file in folder.glob(f"cifar10-{split}.array_record*"):
            file.unlink()
        (folder / f"cifar10-{split}.tfrecord-00000-of-00001").write_bytes(
            b"".join(struct.pack("<Q", len(r)) + bytes(4) + r + bytes(4) for r in records)
        )
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (folder / "dataset_info.json").write_text(json.dumps(info))


def test_reads_the_default_record_format_too(load_mini: Load, folder: Path) -> None:
    good = load_mini()
    _to_tfrecord(folder)
    assert_equal(load_mini(), good)
    (file,) = folder.glob("cifar10-train.tfrecord*")
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(DatasetError, match=f"{file} is damaged.*truncated"):
        load_mini()


def test_another_record_format_is_an_error(load_mini: Load, folder: Path) -> None:
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "riegeli"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(DatasetError, match="got 'riegeli'"):
        load_mini()


def test_the_newest_version_is_taken(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder, folder.parent / "3.0.10")
    (folder.parent / "3.0.11.incompleteABCDEF").mkdir()
    assert cifar10.find_prepared(tmp_path / "data") == folder.parent / "3.0.10"


@pytest.mark.cifar10
@pytest.mark.skipif(
    not (_REAL and (Path(_REAL) / "cifar10").is_dir()),
    reason="TFDS_DATA_DIR does not point to a folder with a prepared cifar10",
)
def test_the_real_cifar10(tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    data = load("cifar10", data_dir=_REAL, cache_dir=tmp_path, progress=False)
    assert data.train.images.shape == (50_000, 32, 32, 3)
    assert data.test.images.shape == (10_000, 32, 32, 3)
    assert np.bincount(data.train.labels).tolist() == [5000] * 10
    assert np.bincount(data.test.labels).tolist() == [1000] * 10
    assert data.label_names[:3] == ("airplane", "automobile", "bird")
    source = tfds.data_source("cifar10", split="train", data_dir=_REAL)
    # The official order, which follows from the keys and the split's name.
    ids = [source[i]["id"] for i in range(3)]
    assert ids == [b"train_16399", b"train_01680", b"train_47917"]
    for i in (0, 1, 2, 49_999):
        np.testing.assert_array_equal(data.train.images[i], source[i]["image"])
        assert data.train.labels[i] == source[i]["label"]
