"""Disks that are full or read-only, damaged files, processes that end: what is left and said."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.io import folders, resuming
from tests.io.small import CONFIG, adam, adapter, base, files_of, same_bits, saved

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="limits, mounts and signals")


def open_again(folder: Path) -> jl.io.Checkpoints:
    return jl.io.Checkpoints(folder, base=base(), config=CONFIG)


@pytest.fixture(scope="module")
def example() -> tuple[jl.Adapter, object]:
    return adapter(), adam().init(adapter())


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    saved(folder, steps=(10, 20, 30))
    return folder


def largest_file(folder: Path) -> Path:
    return max((p for p in folder.rglob("d/*") if p.is_file()), key=lambda p: p.stat().st_size)


def damage(step: Path, how: str) -> None:
    if how == "gone":
        shutil.rmtree(step / "training")
    elif how == "config":
        file = step / "config" / "metadata"
        file.write_bytes(file.read_bytes().replace(b'"metrics": {}', b'"metrics": {"x": 1}'))
    elif how == "truncated":
        file = largest_file(step / "arrays")
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        flip_a_bit(step)


def flip_a_bit(step: Path) -> None:
    """In the middle of a file that is read: others hold orbax's own notes."""
    for file in sorted((step / "training").rglob("d/*")):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 8
        file.write_bytes(content)
        try:
            resuming.read(step)
        except jl.CheckpointError:
            return
    raise AssertionError("no file is read")


# When an array cannot be read, orbax closes its event loop while others are still being read, and
# their threads complain.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
class TestDamage:
    @pytest.mark.parametrize("how", ["truncated", "flipped", "config", "gone"])
    def test_names_the_last_good_step_and_falls_back_to_it(
        self, tmp_path: Path, three: Path, example: tuple[jl.Adapter, object], how: str
    ) -> None:
        folder = tmp_path / "run"
        shutil.copytree(three, folder)
        damage(folder / "30", how)
        before = files_of(folder)
        checkpoints = open_again(folder)
        with pytest.raises(jl.CheckpointError) as caught:
            checkpoints.restore(*example)
        message = str(caught.value)
        assert message.startswith(f"{folder / '30'}: ")
        assert "\n" not in message
        assert "the last good step is 20: restore(step=20), or restore(fall_back=True)" in message
        found = checkpoints.restore(*example, fall_back=True)
        assert (found.step, same_bits(found.trained, adapter(20))) == (20, True)
        assert files_of(folder) == before
        # It goes on from there, and what was damaged is still there under another name.
        checkpoints.save(25, *example)
        checkpoints.close()
        assert checkpoints.steps == [10, 20, 25]
        aside = {f"30/{name}": content for name, content in files_of(folder / "30.aside").items()}
        assert aside == {name: x for name, x in before.items() if name.startswith("30/")}
        assert open_again(folder).restore(*example).step == 25
        time.sleep(0.2)  # for the last of those threads

    def test_the_last_good_step_is_one_that_was_read(
        self, tmp_path: Path, three: Path, example: tuple[jl.Adapter, object]
    ) -> None:
        shutil.copytree(three, tmp_path / "run")
        for step in ("30", "20"):
            damage(tmp_path / "run" / step, "flipped")
        checkpoints = open_again(tmp_path / "run")
        with pytest.raises(jl.CheckpointError, match=r"the last good step is 10: restore\(step=10"):
            checkpoints.restore(*example)
        assert checkpoints.restore(*example, fall_back=True).step == 10
        damage(tmp_path / "run" / "10", "truncated")
        for fall_back in (False, True):
            with pytest.raises(jl.CheckpointError, match="there is no good step"):
                checkpoints.restore(*example, fall_back=fall_back)
        time.sleep(0.2)

    def test_what_cannot_be_read_is_not_deleted(
        self, tmp_path: Path, three: Path, example: tuple[jl.Adapter, object]
    ) -> None:
        shutil.copytree(three, tmp_path / "run")
        (tmp_path / "run" / "10" / "config" / "metadata").write_bytes(b"{")
        options = {"base": base(), "config": CONFIG, "keep": 1}
        with jl.io.Checkpoints(tmp_path / "run", **options) as checkpoints:
            checkpoints.restore(*example)
            checkpoints.save(40, *example)
        assert checkpoints.steps == [10, 40]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 400 kB; where that is not allowed, a limit of each file."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if os.getuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0:
        yield disk
        subprocess.run(["umount", str(disk)], check=True)
        return
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    yield disk
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class TestDisk:
    def test_is_full(self, small_disk: Path) -> None:
        noise = jnp.asarray(np.random.default_rng(0).integers(0, 2**32, 250_000, np.uint32))
        small = {"w": jnp.ones(3), "big": noise[:1000]}
        with jl.io.Checkpoints(small_disk / "run") as checkpoints:
            checkpoints.save(1, small, ())
            checkpoints.wait()
            before = files_of(small_disk / "run")
            checkpoints.save(2, {"w": jnp.ones(3), "big": noise}, ())
            with pytest.raises(
                jl.CheckpointError, match=r"2: cannot be written.*last good step is 1"
            ):
                checkpoints.wait()
            # Nothing half-written takes the space, and when there is some it goes on.
            assert files_of(small_disk / "run") == before
            checkpoints.save(3, small, ())
        assert checkpoints.steps == [1, 3]
        assert same_bits(checkpoints.restore(small, ()).trained, small)

    def test_is_read_only(self, tmp_path: Path) -> None:
        folder = tmp_path / "disk"
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "tmpfs", str(folder)]
        if os.getuid() != 0:
            mounted = False
        else:
            mounted = subprocess.run(mount, capture_output=True).returncode == 0
            if not mounted:
                pytest.skip("root may write everywhere, and may not mount here")
        try:
            saved(folder / "run", steps=[10])
            if mounted:
                subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
            else:
                (folder / "run").chmod(0o555)
            before = files_of(folder)
            checkpoints = open_again(folder / "run")
            assert checkpoints.restore(adapter(), adam().init(adapter())).step == 10
            with pytest.raises(
                jl.CheckpointError, match=r"run: cannot be written: .*; the last good step is 10"
            ):
                checkpoints.save(20, adapter(), adam().init(adapter()))
            assert checkpoints.steps == [10]
            assert files_of(folder) == before
            with pytest.raises(jl.CheckpointError, match="new: cannot be written"):
                jl.io.Checkpoints(folder / "run" / "new").claim()
        finally:
            if mounted:
                subprocess.run(["umount", str(folder)], check=True)
            else:
                (folder / "run").chmod(0o755)


ENDS = """
import sys
import jax.numpy as jnp
import jax_lora as jl

saved = jl.io.Checkpoints(sys.argv[1])
for step in (1, 2, 3):
    saved.save(step, {f"w{k}": jnp.full(1000, step * k) for k in range(40)}, ())
print("the end")
"""


def test_a_process_that_ends_without_closing(tmp_path: Path) -> None:
    """Its last save is whole."""
    root = str(Path(jl.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-c", ENDS, str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the end\n", "")
    assert folders.steps_in(tmp_path / "run") == [1, 2, 3]
    assert folders.leftovers(tmp_path / "run") == []
    example = {f"w{k}": jax.ShapeDtypeStruct((1000,), jnp.int32) for k in range(40)}
    found = jl.io.Checkpoints(tmp_path / "run").restore(example, ())
    assert (found.step, int(found.trained["w3"][0])) == (3, 9)
