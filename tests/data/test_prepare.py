"""Preparing CIFAR-10: every way to the archive, and every way it can go wrong."""

import functools
import http.server
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_lora.data import Dataset, DatasetError, load, prepare

Load = Callable[..., Dataset]


@pytest.fixture
def load_mini(tmp_path: Path, miniature: Any) -> Load:
    """`load("cifar10")` with the miniature as the official archive, in a folder of its own."""
    return functools.partial(
        load, "cifar10", data_dir=tmp_path / "data", cache_dir=tmp_path / "cache", progress=False
    )


@pytest.fixture
def server(miniature: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Serves a folder on this machine, and has the archive's URL point there."""
    monkeypatch.undo()  # The refusal of all connections; what follows is set again.
    monkeypatch.setenv("NO_PROXY", "*")
    root = tmp_path / "served"
    root.mkdir()
    shutil.copy(miniature.path, root)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    handler = functools.partial(Handler, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{httpd.server_port}/{miniature.path.name}"
        official = prepare.Archive(url, miniature.official.info)
        monkeypatch.setattr(prepare, "official_archive", lambda: official)
        yield root
        httpd.shutdown()


def files_below(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def assert_is_miniature(data: Dataset, miniature: Any) -> None:
    """All images are there, each with its label; the order is TFDS's, not the archive's."""
    for split in ("train", "test"):
        got, images = getattr(data, split), miniature.images[split]
        index = {image.tobytes(): i for i, image in enumerate(images)}
        order = [index[image.tobytes()] for image in got.images]
        assert sorted(order) == list(range(len(images)))
        assert order != sorted(order)
        np.testing.assert_array_equal(got.labels, miniature.labels[split][order])


def test_prepares_from_an_archive(load_mini: Load, miniature: Any) -> None:
    data = load_mini(archive=miniature.path)
    assert_is_miniature(data, miniature)
    assert data.label_names == miniature.label_names
    assert (data.num_classes, data.image_shape, data.max_value) == (10, (32, 32, 3), 255)
    assert (data.train.images.dtype, data.train.labels.dtype) == (np.uint8, np.int32)
    assert "tensorflow" not in sys.modules


def test_tfds_reads_the_result_as_its_own(load_mini: Load, miniature: Any, tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    data = load_mini(archive=miniature.path)
    assert tfds.builder("cifar10", data_dir=tmp_path / "data").is_prepared()
    source = tfds.data_source("cifar10", data_dir=tmp_path / "data")
    for split in ("train", "test"):
        assert len(source[split]) == len(miniature.images[split])
        for i, example in enumerate(source[split]):
            name, number = example["id"].decode().split("_")
            assert (name, len(number)) == (split, 5)
            np.testing.assert_array_equal(example["image"], miniature.images[split][int(number)])
            assert example["label"] == miniature.labels[split][int(number)]
            # Ours keeps that order.
            np.testing.assert_array_equal(getattr(data, split).images[i], example["image"])


def test_does_not_need_the_archive_twice(load_mini: Load, miniature: Any) -> None:
    first = load_mini(archive=miniature.path)
    np.testing.assert_array_equal(load_mini().train.images, first.train.images)


def test_prepares_from_the_manual_folder(load_mini: Load, miniature: Any, tmp_path: Path) -> None:
    manual = tmp_path / "data" / "downloads" / "manual"
    manual.mkdir(parents=True)
    shutil.copy(miniature.path, manual)
    assert_is_miniature(load_mini(), miniature)


@pytest.mark.parametrize("name", ["cifar10", "auto"])
@pytest.mark.parametrize("where", ["archive", "manual"])
@pytest.mark.parametrize("fault", ["truncated", "another file"])
def test_a_wrong_archive_is_an_error(
    name: str, where: str, fault: str, miniature: Any, tmp_path: Path
) -> None:
    content = bytearray(miniature.path.read_bytes())
    if fault == "truncated":
        content = content[:-100]
    else:
        content[len(content) // 2] ^= 1
    manual = tmp_path / "data" / "downloads" / "manual" / miniature.path.name
    wrong = manual if where == "manual" else tmp_path / "wrong.tar.gz"
    wrong.parent.mkdir(parents=True, exist_ok=True)
    wrong.write_bytes(content)
    with pytest.raises(DatasetError, match=fault) as caught:
        load(
            name,
            data_dir=tmp_path / "data",
            archive=wrong if where == "archive" else None,
            progress=False,
        )
    checksums = (miniature.official.info.checksum, prepare._sha256(wrong))
    assert all(checksum in str(caught.value) for checksum in checksums)
    assert not (tmp_path / "data" / "cifar10").exists()


@pytest.mark.parametrize("name", ["cifar10", "auto"])
def test_an_archive_that_is_not_there_is_an_error(
    name: str, miniature: Any, tmp_path: Path
) -> None:
    with pytest.raises(DatasetError, match=r"nowhere\.tar\.gz"):
        load(name, data_dir=tmp_path, archive=tmp_path / "nowhere.tar.gz")


def test_an_archive_without_its_members_is_an_error(
    load_mini: Load, miniature: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "_FOLDER", "elsewhere")
    with pytest.raises(DatasetError, match=r"missing or empty: .*data_batch_1\.bin"):
        load_mini(archive=miniature.path)
    assert files_below(tmp_path / "data") == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_preparation_leaves_nothing(
    error: type[BaseException],
    load_mini: Load,
    miniature: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from PIL import Image

    original, calls = Image.fromarray, []

    def fail_midway(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 105:  # In the second split: the first is written already.
            raise error
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Image, "fromarray", fail_midway)
        with pytest.raises(error):
            load_mini(archive=miniature.path)
    assert list((tmp_path / "data").rglob("*")) == []
    assert_is_miniature(load_mini(archive=miniature.path), miniature)


def test_another_process_may_be_faster(
    load_mini: Load, miniature: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    load_mini(archive=miniature.path, data_dir=tmp_path / "other")
    original = Image.fromarray

    def meanwhile(*args: Any) -> Any:
        shutil.copytree(
            tmp_path / "other" / "cifar10", tmp_path / "data" / "cifar10", dirs_exist_ok=True
        )
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Image, "fromarray", meanwhile)
        assert_is_miniature(load_mini(archive=miniature.path), miniature)
    assert [p.name for p in (tmp_path / "data" / "cifar10").iterdir()] == ["3.0.2"]


def test_downloads_and_keeps_the_download(
    load_mini: Load, server: Path, miniature: Any, tmp_path: Path
) -> None:
    assert_is_miniature(load_mini(), miniature)
    # Prepared anew, the download serves again without the server's file.
    (server / miniature.path.name).unlink()
    shutil.rmtree(tmp_path / "data" / "cifar10")
    assert_is_miniature(load_mini(), miniature)
    downloads = files_below(tmp_path / "data" / "downloads")
    assert [Path(name).suffix for name in downloads] == [".gz", ".INFO"]


def test_a_wrong_download_is_refused(load_mini: Load, server: Path, tmp_path: Path) -> None:
    (file,) = server.iterdir()
    file.write_bytes(b"please log in to this network")
    with pytest.raises(DatasetError, match="NonMatchingChecksumError") as caught:
        load_mini()
    assert prepare._sha256(file) in str(caught.value)
    assert prepare.official_archive().info.checksum in str(caught.value)
    assert files_below(tmp_path / "data") == []


def test_a_server_without_the_file_is_a_reason(load_mini: Load, server: Path) -> None:
    next(server.iterdir()).unlink()
    with pytest.raises(DatasetError, match="HTTP status 404"):
        load_mini()


def test_an_interrupted_download_leaves_nothing(
    load_mini: Load, server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensorflow_datasets as tfds

    def interrupt(self: Any, _: str) -> None:
        (Path(self.download_dir) / "half").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(tfds.download.DownloadManager, "download", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_mini()
    assert list((tmp_path / "data").rglob("*")) == []


def test_offline_is_told_soon_and_says_what_to_do(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow_datasets")
    data_dir = tmp_path / "data"
    (data_dir / "mnist").mkdir(parents=True)
    start = time.monotonic()
    with pytest.raises(DatasetError) as caught:
        load("cifar10", data_dir=data_dir)
    assert time.monotonic() - start < 15
    message = str(caught.value)
    manual = data_dir / "downloads" / "manual" / "cifar-10-binary.tar.gz"
    url = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    for part in ("holds mnist", "no network", url, str(manual), "--archive", "--dataset digits"):
        assert part in message
    assert files_below(data_dir) == []


def test_a_resolver_that_hangs_does_not_hold_us_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("requests")
    release = threading.Event()

    def hang(*_: Any, **__: Any) -> Any:
        release.wait(30)
        raise OSError("released")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    monkeypatch.setattr(prepare, "PROBE_SECONDS", 0.3)
    start = time.monotonic()
    assert prepare.probe("https://example.org/file") == "no answer within 0.3 s"
    assert time.monotonic() - start < 5
    release.set()


def test_the_folder_of_the_data_set_itself_gets_a_hint(miniature: Any, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=f"did you mean data_dir={tmp_path}\\?"):
        load("cifar10", data_dir=tmp_path / "cifar10" / "3.0.2")


def test_an_incomplete_copy_is_an_error(load_mini: Load, miniature: Any, tmp_path: Path) -> None:
    load_mini(archive=miniature.path)
    (tmp_path / "data" / "cifar10" / "3.0.2" / "dataset_info.json").unlink()
    with pytest.raises(DatasetError, match=r"no dataset_info\.json"):
        load_mini(archive=miniature.path)


def test_a_file_as_data_dir_is_an_error(load_mini: Load, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("not a folder")
    with pytest.raises(DatasetError, match="expected data_dir to be a folder"):
        load_mini()


@pytest.mark.parametrize("name", ["cifar10", "auto"])
def test_a_data_dir_that_cannot_be_written_is_an_error(
    name: str, miniature: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not with chmod, which does not bind root.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(DatasetError, match=f"{tmp_path} is not a folder that can be written"):
        load(name, data_dir=tmp_path / "data", archive=miniature.path)


def test_a_full_disk_is_an_error(
    load_mini: Load, miniature: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("PIL.Image.fromarray", full)
    with pytest.raises(DatasetError, match=r"No space left on device.*free some space"):
        load_mini(archive=miniature.path)
    assert files_below(tmp_path / "data") == []
