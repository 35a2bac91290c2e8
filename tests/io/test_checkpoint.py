"""What is written comes back bit for bit, or the reason why not is one clear error."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jax_lora as jl
from jax_lora.io import files, guards

Files = dict[str, bytes]


def random(shape: tuple[int, ...], dtype: Any = jnp.float32, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), dtype)


def factors(layout: jl.Layout, rank: int, dtype: Any = jnp.float32) -> jl.LoraFactors:
    a, b = random(layout.a_shape(rank), dtype), random(layout.b_shape(rank), dtype, seed=1)
    return jl.LoraFactors(a, b, jnp.float32(1 / 3), layout)


@pytest.fixture(scope="module")
def params() -> Any:
    return {
        "params": {
            "l1": {"kernel": random((6, 4)), "bias": random((4,), jnp.bfloat16)},
            "stack": {"kernel": random((2, 4, 3), jnp.float16)},
            "steps": jnp.int32(7),
        },
        "flags": [jnp.array([True, False]), jnp.arange(3, dtype=jnp.uint8)],
        "empty": {},
        # What a comparison with == would miss.
        "odd": jnp.array([jnp.nan, -0.0, jnp.inf, 1e-45]),
    }


@pytest.fixture(scope="module")
def adapter() -> jl.Adapter:
    return jl.Adapter(
        {
            "params/l1/kernel": factors(jl.Layout((6, 4), (0,), (1,)), rank=2),
            "params/stack/kernel": factors(jl.Layout((2, 4, 3), (1,), (2,), (0,)), 3, jnp.bfloat16),
        }
    )


CONFIG = jl.LoraConfig(rank=2, alpha=0.1, targets=("**/kernel",), exclude=("x/**",), init="article")


def assert_same_bits(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.tobytes() == other.tobytes()


def files_of(folder: Path) -> Files:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


class TestRoundTrip:
    def test_params(self, tmp_path: Path, params: Any) -> None:
        jl.io.save_params(tmp_path / "new" / "base", params, {"sizes": [6, 4], "name": "ü"})
        found, metadata = jl.io.load_params(tmp_path / "new" / "base")
        assert_same_bits(found, params)
        assert metadata == {"sizes": [6, 4], "name": "ü"}
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))

    def test_adapter(self, tmp_path: Path, adapter: jl.Adapter) -> None:
        jl.io.save_adapter(tmp_path / "adapter", adapter, CONFIG, {"accuracy": 0.5})
        found, config, metadata = jl.io.load_adapter(tmp_path / "adapter")
        assert isinstance(found, jl.Adapter)
        assert_same_bits(found, adapter)  # the structure includes paths and layouts
        assert (config, metadata) == (CONFIG, {"accuracy": 0.5})

    def test_config_and_metadata_may_be_absent(self, tmp_path: Path, adapter: jl.Adapter) -> None:
        jl.io.save_adapter(tmp_path / "adapter", adapter)
        assert jl.io.load_adapter(tmp_path / "adapter")[1:] == (None, {})

    def test_numpy_leaves_and_str_folder(self, tmp_path: Path, params: Any) -> None:
        jl.io.save_params(str(tmp_path / "base"), jax.tree.map(np.asarray, params))
        assert_same_bits(jl.io.load_params(str(tmp_path / "base"))[0], params)

    def test_relative_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: jl.Adapter
    ) -> None:
        monkeypatch.chdir(tmp_path)
        jl.io.save_adapter("adapter", adapter)
        assert_same_bits(jl.io.load_adapter("adapter")[0], adapter)

    def test_adapter_that_was_trained_works_the_same(self, tmp_path: Path) -> None:
        def model(params: Any, x: jax.Array) -> jax.Array:
            return x @ params["params"]["l1"]["kernel"]

        base, x = {"params": {"l1": {"kernel": random((6, 4))}}}, random((5, 6))
        adapter = jl.Adapter({"params/l1/kernel": factors(jl.Layout((6, 4), (0,), (1,)), rank=2)})
        jl.io.save_adapter(tmp_path / "adapter", adapter)
        jl.io.save_params(tmp_path / "base", base)
        params, _ = jl.io.load_params(tmp_path / "base")
        found, _, _ = jl.io.load_adapter(tmp_path / "adapter", params)
        adapted = jl.apply(model)
        assert (adapted(params, found, x) == adapted(base, adapter, x)).all()
        assert (adapted(params, found, x) != model(base, x)).any()


class TestWhatIsOnDisk:
    def test_an_adapter_is_only_the_adapter(self, tmp_path: Path) -> None:
        """The article's: 115,008 trained numbers beside 411,146 frozen ones."""
        sizes = ((3072, 128), (128, 128), (128, 10))
        adapter = jl.Adapter(
            {
                f"params/l{i}/kernel": factors(jl.Layout(size, (0,), (1,)), rank=32)
                for i, size in enumerate(sizes, start=1)
            }
        )
        jl.io.save_adapter(tmp_path / "adapter", adapter)
        assert sorted(path.name for path in (tmp_path / "adapter").iterdir() if path.is_dir()) == [
            "arrays",
            "config",
        ]
        arrays = ocp.StandardCheckpointer().restore(tmp_path / "adapter" / "arrays")
        assert {path: set(entry) for path, entry in arrays.items()} == {
            f"params/l{i}/kernel": {"a", "b", "scale"} for i in (1, 2, 3)
        }
        trained = sum(entry[name].nbytes for entry in arrays.values() for name in "ab")
        assert trained == 4 * 115_008 < 0.5e6
        on_disk = sum(map(len, files_of(tmp_path / "adapter").values()))
        assert on_disk < 0.5e6 < 4 * 411_146

    def test_plain_orbax_reads_both(self, tmp_path: Path, params: Any, adapter: jl.Adapter) -> None:
        """What the README shows to readers without this library."""
        jl.io.save_params(tmp_path / "base", params)
        jl.io.save_adapter(tmp_path / "adapter", adapter, CONFIG)
        with ocp.StandardCheckpointer() as checkpointer:
            assert_same_bits(checkpointer.restore(tmp_path / "base" / "arrays"), params)
            arrays = checkpointer.restore(tmp_path / "adapter" / "arrays")
        assert_same_bits(
            arrays, {p: {"a": f.a, "b": f.b, "scale": f.scale} for p, f in adapter.items()}
        )
        config = json.loads((tmp_path / "adapter" / "config" / "metadata").read_text())
        assert config["lora"] == CONFIG.to_json()
        kept = config["entries"]["params/stack/kernel"]
        assert (kept["variant"], kept["layout"]["stack_axes"]) == ("lora", [0])


class TestRefusals:
    @pytest.fixture
    def base(self, tmp_path: Path, params: Any) -> Path:
        jl.io.save_params(tmp_path / "base", params)
        return tmp_path / "base"

    @pytest.fixture
    def saved(self, tmp_path: Path, adapter: jl.Adapter) -> Path:
        jl.io.save_adapter(tmp_path / "adapter", adapter, CONFIG)
        return tmp_path / "adapter"

    @pytest.mark.parametrize("load", [jl.io.load_params, jl.io.load_adapter])
    def test_what_is_no_checkpoint(self, tmp_path: Path, load: Callable[..., Any]) -> None:
        (tmp_path / "file").write_text("hello")
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "mine.txt").write_text("mine")
        (tmp_path / "empty").mkdir()
        before = files_of(tmp_path)
        for name in ("missing", "file", "folder", "empty"):
            with pytest.raises(jl.CheckpointError, match=name) as caught:
                load(tmp_path / name)
            assert "\n" not in str(caught.value)
        assert files_of(tmp_path) == before
        assert not (tmp_path / "missing").exists()

    def test_an_existing_target_stays_as_it_is(
        self, tmp_path: Path, params: Any, adapter: jl.Adapter, base: Path
    ) -> None:
        (tmp_path / "file").write_text("hello")
        before = files_of(tmp_path)
        for name in ("base", "file"):
            with pytest.raises(jl.CheckpointError, match="it holds something; choose another"):
                jl.io.save_params(tmp_path / name, params)
            with pytest.raises(jl.CheckpointError, match="it holds something; choose another"):
                jl.io.save_adapter(tmp_path / name, adapter)
        assert files_of(tmp_path) == before

    def test_an_empty_folder_may_be_filled(self, tmp_path: Path, params: Any) -> None:
        (tmp_path / "empty").mkdir()
        jl.io.save_params(tmp_path / "empty", params)
        jl.io.load_params(tmp_path / "empty")

    @pytest.mark.parametrize(
        "leaves",
        [
            {},
            {"w": "text"},
            {"w": jnp.zeros((0, 3))},
            {"w": jax.random.key(0)},
            {"w": np.ones(2, ">f4")},
        ],
    )
    def test_what_is_no_array_is_refused_before_anything_is_written(
        self, tmp_path: Path, leaves: Any
    ) -> None:
        with pytest.raises(
            jl.CheckpointError, match="expected a tree of arrays that are not empty"
        ):
            jl.io.save_params(tmp_path / "base", leaves)
        assert list(tmp_path.iterdir()) == []

    def test_names_of_which_orbax_keeps_one(self, tmp_path: Path) -> None:
        both = {"a": {"b": jnp.ones(1)}, "a.b": jnp.zeros(1), "a.c": jnp.ones(1)}
        with pytest.raises(jl.CheckpointError, match=r"got a/b, a\.b; rename one"):
            jl.io.save_params(tmp_path / "base", both)
        assert list(tmp_path.iterdir()) == []

    def test_ctrl_c_while_saving_waits_for_the_save(self, tmp_path: Path, params: Any) -> None:
        timer = threading.Timer(0.005, os.kill, [os.getpid(), signal.SIGINT])

        def save() -> None:
            with files._interrupts_deferred():
                timer.start()
                jl.io.save_params(tmp_path / "base", params)
                timer.join()

        with pytest.raises(KeyboardInterrupt):
            save()
        assert [path.name for path in tmp_path.iterdir()] == ["base"]
        jl.io.load_params(tmp_path / "base")

    def test_several_threads_at_a_time(self, tmp_path: Path, params: Any) -> None:
        """As when an adapter is saved while a training writes its checkpoint."""
        folders = [tmp_path / str(k) for k in range(4)]
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda folder: jl.io.save_params(folder, params), folders))
        for folder in folders:
            assert_same_bits(jl.io.load_params(folder)[0], params)

    def test_what_a_killed_process_left_is_replaced(
        self, tmp_path: Path, params: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        names = ("a*", "ab")  # of which the first is also a pattern for the second
        for name in names:
            (tmp_path / f"{name}.orbax-checkpoint-tmp" / "arrays").mkdir(parents=True)
        jl.io.save_params(tmp_path / "a*", params)
        present = sorted(path.name for path in tmp_path.iterdir())
        assert present == ["a*", "ab.orbax-checkpoint-tmp"]
        assert caplog.messages == []

    @pytest.mark.parametrize("name", ["a[1]", "targets=[q,v]/base", "a\\b"])
    def test_a_path_that_orbax_takes_for_a_pattern(
        self, tmp_path: Path, params: Any, name: str
    ) -> None:
        with pytest.raises(jl.CheckpointError, match="expected a path without"):
            jl.io.save_params(tmp_path / name, params)
        with pytest.raises(jl.CheckpointError, match="expected a path without"):
            jl.io.Checkpoints(tmp_path / name).claim()
        assert list(tmp_path.iterdir()) == []

    def test_a_target_that_cannot_be_made(self, tmp_path: Path, params: Any) -> None:
        (tmp_path / "file").write_text("hello")
        with pytest.raises(jl.CheckpointError, match="cannot be written"):
            jl.io.save_params(tmp_path / "file" / "base", params)
        assert files_of(tmp_path) == {"file": b"hello"}

    def test_metadata_that_is_not_json(self, tmp_path: Path, params: Any) -> None:
        odd = {"x": object(), "list": [1, np.float32(2)], "fine": {"1": (None, 2.5)}, ("a",): 1}
        with pytest.raises(jl.ConfigError) as caught:
            jl.io.save_params(tmp_path / "base", params, odd)
        assert str(caught.value) == (
            "expected what JSON has, got metadata/x: object, metadata/list/1: float32, metadata: "
            "the name ('a',); convert it"
        )
        assert list(tmp_path.iterdir()) == []

    def test_metadata_that_would_not_be_read_again(
        self, tmp_path: Path, params: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(guards, "MAX_TEXT", 5000)
        with pytest.raises(jl.CheckpointError, match=r"expected at most 5,000 letters of metadata"):
            jl.io.save_params(tmp_path / "base", params, {"x": "a" * 5000})
        assert list(tmp_path.iterdir()) == []
        jl.io.save_params(tmp_path / "base", params, {"x": "a" * 2000})
        assert jl.io.load_params(tmp_path / "base")[1] == {"x": "a" * 2000}

    def test_the_wrong_kind(self, base: Path, saved: Path) -> None:
        with pytest.raises(jl.CheckpointError, match=r"expected .*adapter.*found .*params"):
            jl.io.load_adapter(base)
        with pytest.raises(jl.CheckpointError, match=r"expected .*params.*found .*adapter"):
            jl.io.load_params(saved)

    def test_plain_orbax_of_someone_else(self, tmp_path: Path) -> None:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "theirs", {"w": jnp.ones(2)})
        with pytest.raises(jl.CheckpointError, match="theirs"):
            jl.io.load_params(tmp_path / "theirs")

    def test_a_newer_version(self, saved: Path) -> None:
        path = saved / "config" / "metadata"
        document = json.loads(path.read_text()) | {"version": 4}
        del document["crc32"]
        document["crc32"] = files.checksum(document)
        path.write_text(json.dumps(document))
        with pytest.raises(jl.CheckpointError, match=r"version 3 or older, found 4; a newer"):
            jl.io.load_adapter(saved)

    def test_params_that_the_adapter_does_not_fit(self, saved: Path, params: Any) -> None:
        assert jl.io.load_adapter(saved, params)[0]
        other = {
            "params": {"l1": {"kernel": jnp.ones((4, 6))}, "stacked": params["params"]["stack"]}
        }
        with pytest.raises(jl.AdapterError) as caught:
            jl.io.load_adapter(saved, other)
        message = str(caught.value)
        assert "params/l1/kernel: made for shape (6, 4), found (4, 6)" in message
        assert "params/stack/kernel: no such parameter" in message
        assert "'params/stacked/kernel'" in message


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, adapter: jl.Adapter) -> Path:
    folder = tmp_path_factory.mktemp("damage") / "adapter"
    jl.io.save_adapter(folder, adapter, CONFIG, {"name": "original"})
    return folder


class TestDamage:
    """Whatever happens to a file: the same bits come back, or a CheckpointError; never else."""

    @staticmethod
    def damages(content: bytes) -> Iterator[tuple[str, bytes | None]]:
        yield "deleted", None
        for size in {0, 1, len(content) // 2, len(content) - 1}:
            yield f"cut to {size}", content[:size]
        rng = np.random.default_rng(len(content))
        for index in sorted(rng.choice(len(content), min(12, len(content)), replace=False)):
            flipped = bytearray(content)
            flipped[index] ^= 1 << int(rng.integers(8))
            yield f"byte {index}", bytes(flipped)

    # When one array cannot be read, orbax closes its event loop while others are still being read,
    # and their threads complain.
    @pytest.mark.filterwarnings(
        "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"
    )
    def test_is_noticed_or_harmless(
        self, tmp_path: Path, original: Path, adapter: jl.Adapter
    ) -> None:
        folder = tmp_path / "adapter"
        shutil.copytree(original, folder)
        noticed, harmless = 0, 0
        for name, content in files_of(original).items():
            for what, damaged in self.damages(content):
                if damaged is None:
                    (folder / name).unlink()
                else:
                    (folder / name).write_bytes(damaged)
                before = files_of(folder)
                message = None
                try:
                    found, config, metadata = jl.io.load_adapter(folder)
                except jl.CheckpointError as error:
                    message = str(error)
                if message is None:
                    harmless += 1
                    assert_same_bits(found, adapter)
                    assert (config, metadata) == (CONFIG, {"name": "original"}), (name, what)
                else:
                    noticed += 1
                    assert "adapter" in message
                    assert "\n" not in message
                assert files_of(folder) == before, (name, what)
                (folder / name).write_bytes(content)
        assert_same_bits(jl.io.load_adapter(folder)[0], adapter)
        time.sleep(0.2)  # for the last of those threads
        # Most of the bytes matter; some files are orbax's own notes, not needed to read.
        assert noticed > 50
        assert harmless > 0

    def test_every_changed_number_is_noticed(self, tmp_path: Path, original: Path) -> None:
        """Another checkpoint's arrays are valid for orbax; only the checksums tell."""
        other, _, _ = jl.io.load_adapter(original)
        changed = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].add(1), other)
        jl.io.save_adapter(tmp_path / "other", changed, CONFIG, {"name": "original"})
        folder = tmp_path / "mixed"
        shutil.copytree(original, folder)
        shutil.rmtree(folder / "arrays")
        shutil.copytree(tmp_path / "other" / "arrays", folder / "arrays")
        with pytest.raises(jl.CheckpointError, match="damaged, the values read differ") as caught:
            jl.io.load_adapter(folder)
        assert "params/l1/kernel/a" in str(caught.value)
