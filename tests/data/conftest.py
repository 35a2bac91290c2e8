"""A miniature CIFAR-10 archive in the official format, and no network unless a test asks for it."""

import dataclasses
import hashlib
import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_lora.data import prepare

_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclasses.dataclass(frozen=True)
class Miniature:
    """The archive and, by split, the images and labels in it, in the order of the official ids."""

    path: Path
    url: str
    official: prepare.Archive
    images: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    label_names: tuple[str, ...] = _NAMES


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="session")
def _archive(tmp_path_factory: pytest.TempPathFactory) -> Miniature:
    pytest.importorskip("tensorflow_datasets")
    rng = np.random.default_rng(0)
    images, labels = {}, {}
    path = tmp_path_factory.mktemp("archive") / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for split, files in (
            ("train", [f"data_batch_{i}.bin" for i in range(1, 6)]),
            ("test", ["test_batch.bin"]),
        ):
            per_file = 20 if split == "train" else 10
            # Noise, which a lossy encoding could not keep.
            images[split] = rng.integers(0, 256, (len(files) * per_file, 32, 32, 3), np.uint8)
            labels[split] = rng.integers(0, 10, len(images[split]), np.uint8)
            channels_first = images[split].transpose(0, 3, 1, 2).reshape(-1, 3072)
            records = np.concatenate([labels[split][:, None], channels_first], axis=1)
            for i, name in enumerate(files):
                _add(tar, name, records[i * per_file : (i + 1) * per_file].tobytes())
        # As in the official archive: a name a line, a blank line, and a file not needed.
        _add(tar, "batches.meta.txt", ("\n".join(_NAMES) + "\n\n").encode())
        _add(tar, "readme.html", b"<html></html>")
    url, info = prepare.official_archive()
    content = path.read_bytes()
    info = dataclasses.replace(
        info, size=type(info.size)(len(content)), checksum=hashlib.sha256(content).hexdigest()
    )
    return Miniature(path, url, prepare.Archive(url, info), images, labels)


@pytest.fixture
def miniature(_archive: Miniature, monkeypatch: pytest.MonkeyPatch) -> Miniature:
    """The archive, standing in for the official one."""
    monkeypatch.setattr(prepare, "official_archive", lambda: _archive.official)
    return _archive


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError("no network in this test")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    # No test may read or write the user's own folders.
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / "cache"))
