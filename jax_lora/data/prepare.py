"""Preparing a tensorflow-datasets folder of CIFAR-10 without TensorFlow.

TFDS's own builder needs TensorFlow to open and unpack files.  Here TFDS still does what it is good
at, which is the download with its checksum and the writing of records in the official order; the
archive is read by the standard library.  The result is an ordinary prepared folder:
`tfds.data_source("cifar10", data_dir=...)` reads it.
"""

import contextlib
import hashlib
import io
import os
import re
import shutil
import sys
import tarfile
import tempfile
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_lora.data.dataset import DatasetError, DatasetUnavailableError, import_for_cifar10

# How long to look for the server before giving up.  TFDS alone would retry for minutes, and a
# resolver can hang for longer than any socket timeout, so the whole look-up runs against this
# clock.
PROBE_SECONDS = 8.0

_RECORD = 1 + 3 * 32 * 32  # a label and a channels-first image, one byte each
_FOLDER = "cifar-10-batches-bin"
_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
_TEST = ("test_batch.bin",)


class Archive(NamedTuple):
    """The official archive.

    Attributes:
        url: Where it is.
        info: TFDS's record of it, with `size` in bytes, `checksum` (SHA-256) and `filename`.
    """

    url: str
    info: Any


def official_archive() -> Archive:
    """The archive that TFDS has registered for CIFAR-10."""
    tfds = import_for_cifar10("tensorflow_datasets")
    ((url, info),) = tfds.image_classification.Cifar10.url_infos.items()
    return Archive(url, info)


def prepare(data_dir: Path, *, archive: Path | None, explicit: bool, progress: bool) -> None:
    """Prepares CIFAR-10 in a folder that does not hold it yet.

    Interrupted anywhere, it leaves nothing half-prepared; a finished download is used again next
    time.

    Args:
        data_dir: The tensorflow-datasets folder, created if need be.
        archive: An archive that `verify_archive` has passed; None to look below `data_dir`, then
            download.
        explicit: Whether the caller named `data_dir`: then a folder that cannot be written is a
            mistake.
        progress: Whether to show progress on stderr.

    Raises:
        DatasetUnavailableError: If there is no archive and it cannot be downloaded.
        DatasetError: If an archive is wrong or the folder cannot be written.
    """
    if data_dir.exists() and not data_dir.is_dir():
        raise DatasetError(f"expected data_dir to be a folder, got the file {data_dir}")
    official = official_archive()
    archive = archive or _find_archive(data_dir, official)
    reason = None if archive else probe(official.url)
    if reason:
        raise DatasetUnavailableError(_not_available(data_dir, official, reason))
    blocker = _unwritable(data_dir)
    if blocker:
        kind = DatasetError if explicit or archive else DatasetUnavailableError
        raise kind(
            f"cifar10 is not prepared in {data_dir} and cannot be: {blocker} is not a folder that "
            "can be written to; give a data_dir that can be, or one that holds a prepared cifar10"
        )
    try:
        archive = archive or _download(data_dir, official, progress)
        _write_records(data_dir, archive, progress)
    except OSError as error:
        raise DatasetError(
            f"cifar10 could not be written to {data_dir} ({error}); free some space (it takes "
            "about 0.5 GB) or give another data_dir"
        ) from error


def verify_archive(path: Path, official: Archive) -> None:
    """Checks that a file is the official archive.

    Args:
        path: The file.
        official: What it should be.

    Raises:
        DatasetError: If it is not there, or is another file or a truncated one.
    """
    expected = official.info
    try:
        size, checksum = path.stat().st_size, _sha256(path)
    except OSError as error:
        raise DatasetError(
            f"expected {expected.filename} as the file {path}, which cannot be read ({error})"
        ) from error
    if checksum != expected.checksum:
        fault = "truncated" if size < int(expected.size) else "another file or damaged"
        raise DatasetError(
            f"{path} is not the official {expected.filename}: expected {int(expected.size)} bytes "
            f"with SHA-256 {expected.checksum}, got {size} bytes with SHA-256 {checksum} "
            f"(it is {fault}); download it again from {official.url}"
        )


def describe(folder: Path, *, limit: int = 8) -> str:
    """Says what a folder holds, as a predicate: "does not exist", "is empty", "holds a, b"."""
    try:
        names = sorted(file.name for file in folder.iterdir())
    except FileNotFoundError:
        return "does not exist"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not names:
        return "is empty"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"holds {', '.join(names[:limit])}{more}"


def probe(url: str) -> str | None:
    """Finds out whether a URL can be downloaded, within `PROBE_SECONDS`.

    Args:
        url: The URL, asked for with a HEAD request through the library and proxies TFDS would use.

    Returns:
        None if it can, else the reason.
    """
    requests = import_for_cifar10("requests")
    seconds = PROBE_SECONDS
    outcome: list[str | None] = []

    def ask() -> None:
        try:
            status = requests.head(url, timeout=seconds, allow_redirects=True).status_code
            # 405 and 501 refuse the HEAD, not the file.
            refused = status >= 400 and status not in (405, 501)
            outcome.append(f"the server answered with HTTP status {status}" if refused else None)
        except requests.RequestException as error:
            cause = getattr(error.args[0], "reason", error) if error.args else error
            # urllib3 prefixes the message with the repr of a connection object.
            text = re.sub(r"^\S*Connection\w*\(.*?\): |^<.*?>: ", "", str(cause))
            outcome.append(text or type(error).__name__)

    # A daemon, so that a resolver that hangs holds up neither this call nor the end of the process.
    thread = threading.Thread(target=ask, daemon=True, name="probe")
    thread.start()
    thread.join(seconds)
    return outcome[0] if outcome else f"no answer within {seconds:g} s"


def _not_available(data_dir: Path, official: Archive, reason: str) -> str:
    filename = official.info.filename
    manual = data_dir / "downloads" / "manual" / filename
    # The commonest slip: naming the data set's own folder instead of the one above it.
    above = next((p.parent for p in (data_dir, data_dir.parent) if p.name == "cifar10"), None)
    hint = f" (did you mean data_dir={above}?)" if above else ""
    return (
        f"expected a prepared cifar10 in {data_dir}, but that folder {describe(data_dir)}{hint}; "
        f"there is no {manual}; and downloading {official.url} failed: {reason}. "
        f"What to do: connect to the network and run again; or place {filename} at {manual} "
        "or pass it with --archive; or set data_dir (TFDS_DATA_DIR) to a folder that holds a "
        "prepared cifar10; or use --dataset digits, which needs no download."
    )


def _find_archive(data_dir: Path, official: Archive) -> Path | None:
    """An archive placed by hand, which must be right, or a finished download, by content."""
    downloads = data_dir / "downloads"
    manual: Path = downloads / "manual" / official.info.filename
    if manual.exists():
        verify_archive(manual, official)
        return manual
    for pattern in ("*.tar.gz", "cifar10/*.tar.gz"):
        for path in downloads.glob(pattern):
            with contextlib.suppress(OSError):
                # The size first: it spares reading other large files.
                same_size = path.stat().st_size == int(official.info.size)
                if same_size and _sha256(path) == official.info.checksum:
                    return path
    return None


def _unwritable(folder: Path) -> Path | None:
    """What keeps a folder from being created and written to, or None."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return None if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK) else folder


def _download(data_dir: Path, official: Archive, progress: bool) -> Path:
    """Downloads the archive with TFDS's download manager, which verifies the checksum.

    It works in a folder of its own, so that whatever happens can be cleaned up without touching
    another process's download; only the finished file is moved to where TFDS looks for it.
    """
    tfds = import_for_cifar10("tensorflow_datasets")
    downloads = data_dir / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".incomplete-", dir=downloads))
    try:
        with _tfds_output(tfds, progress):
            manager = tfds.download.DownloadManager(
                download_dir=partial,
                dataset_name="cifar10",
                url_infos={official.url: official.info},
                force_checksums_validation=True,
            )
            try:
                path = Path(manager.download(official.url))
            except KeyboardInterrupt:
                _abandon(manager)
                raise
        target = downloads / path.relative_to(partial)
        target.parent.mkdir(exist_ok=True)
        # TFDS believes a download only with its description beside it, so that goes first.
        described = path.with_name(f"{path.name}.INFO")
        if described.exists():
            described.replace(target.with_name(described.name))
        path.replace(target)
        return target
    except Exception as error:  # Requests, TFDS and the disk each raise their own kind.
        reason = f"{type(error).__name__}: {error}"
        raise DatasetUnavailableError(_not_available(data_dir, official, reason)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            downloads.rmdir()  # Only if nothing is in it.


def _abandon(manager: Any) -> None:
    """Makes TFDS's download thread stop; otherwise Ctrl-C would take effect after the last byte.

    The thread reports each MiB to a progress bar and offers no other hook, so it is given one that
    raises. Should TFDS rename it, Ctrl-C merely waits.
    """

    class Stop:
        def update(self, *_: Any) -> None:
            raise RuntimeError("interrupted")

        update_total = update

    with contextlib.suppress(AttributeError):
        manager._downloader._pbar_dl_size = Stop()


def _write_records(data_dir: Path, archive: Path, progress: bool) -> None:
    """Writes `<data_dir>/cifar10/<version>` from the archive."""
    tfds = import_for_cifar10("tensorflow_datasets")
    pillow = import_for_cifar10("PIL.Image")
    import_for_cifar10("array_record.python.array_record_module")
    label_names, contents = _read_archive(archive)

    # The official builder with another way to the same examples.  It is not registered, so that
    # `tfds.builder("cifar10")` stays what it was.
    class Builder(tfds.image_classification.Cifar10, skip_registration=True):  # type: ignore
        name = "cifar10"

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager  # The archive is there already.
            self.info.features["label"].names = label_names
            return {
                "train": self._generate_examples("train_", _TRAIN),
                "test": self._generate_examples("test_", _TEST),
            }

        def _generate_examples(
            self, split_prefix: str, filepaths: tuple[str, ...]
        ) -> Iterator[tuple[int, dict[str, Any]]]:
            records = np.concatenate([contents[name] for name in filepaths])
            # The integer keys and the split's name decide the official record order.
            for index, record in enumerate(records):
                pixels = record[1:].reshape(3, 32, 32).transpose(1, 2, 0)
                # Encoded here because TFDS would do it with TensorFlow; PNG is lossless.
                png = io.BytesIO()
                pillow.fromarray(np.ascontiguousarray(pixels)).save(png, format="PNG")
                png.seek(0)
                example = {"image": png, "label": int(record[0])}
                yield index, {"id": f"{split_prefix}{index:05d}", **example}

    builder = Builder(data_dir=data_dir, file_format="array_record")
    try:
        with _tfds_output(tfds, progress):
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(try_download_gcs=False)
            )
    except Exception:
        # Another process may have been faster: then its result is as good.
        if not (Path(builder.data_dir) / "dataset_info.json").is_file():
            raise
    finally:
        # TFDS removes its unfinished folder; these it leaves empty.
        for folder in ("downloads/extracted", "downloads", "cifar10"):
            with contextlib.suppress(OSError):
                (data_dir / folder).rmdir()


def _read_archive(archive: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """Reads the archive's known members into memory; no path it names is ever written to.

    Returns:
        The names of the classes, and per .bin file its records as uint8 [n, 3073].
    """
    wanted = {f"{_FOLDER}/{name}": name for name in (*_TRAIN, *_TEST, "batches.meta.txt")}
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                file = tar.extractfile(member) if member.name in wanted else None
                if file is not None:
                    contents[wanted[member.name]] = file.read()
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DatasetError(f"{archive} cannot be unpacked ({error}); download it again") from error
    missing = [name for name in wanted.values() if not contents.get(name)]
    ragged = [n for n, c in contents.items() if n.endswith(".bin") and len(c) % _RECORD]
    if missing or ragged:
        raise DatasetError(
            f"expected {', '.join(wanted.values())} in {archive}, the .bin files in records of "
            f"{_RECORD} bytes; missing or empty: {missing or 'none'}; "
            f"of another length: {ragged or 'none'}"
        )
    label_names = contents.pop("batches.meta.txt").decode("ascii").split()
    records = {n: np.frombuffer(c, np.uint8).reshape(-1, _RECORD) for n, c in contents.items()}
    return label_names, records


@contextlib.contextmanager
def _tfds_output(tfds: Any, progress: bool) -> Iterator[None]:
    """Sends what TFDS prints to stderr, where progress belongs, or nowhere."""
    if progress:
        with contextlib.redirect_stdout(sys.stderr):
            yield
        return
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
