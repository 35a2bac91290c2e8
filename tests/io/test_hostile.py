"""Checkpoints that were made to do harm: refused before orbax reads what they name."""

from __future__ import annotations

import collections
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jax_lora as jl
from jax_lora.io.files import checksum

Edit = Callable[[Any], Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of parameters, one of an adapter, and arrays as orbax writes them elsewhere."""
    folder = tmp_path_factory.mktemp("saved")
    tree = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
    jl.io.save_params(folder / "params", tree, {"x": 1})
    layout = jl.Layout((2, 3), (0,), (1,))
    factors = jl.LoraFactors(jnp.ones((2, 1)), jnp.ones((1, 3)), jnp.float32(1), layout)
    jl.io.save_adapter(folder / "adapter", jl.Adapter({"a": factors}), jl.LoraConfig(rank=1))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(folder / "files", tree)
    return folder


def copied(saved: Path, tmp_path: Path, name: str) -> Path:
    shutil.copytree(saved / name, tmp_path / name)
    return tmp_path / name


def edit(folder: Path, change: Edit) -> None:
    """Change the document, and make its checksum right again."""
    file = folder / "config" / "metadata"
    document = json.loads(file.read_text())
    del document["crc32"]
    document = change(document)
    file.write_text(json.dumps(document | {"crc32": checksum(document)}))


def refused(load: Callable[[Path], Any], folder: Path, message: str) -> None:
    with pytest.raises(jl.CheckpointError) as caught:
        load(folder)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["a", "/absolute", "../../outside"])
def test_arrays_outside_of_the_folder(saved: Path, tmp_path: Path, name: str) -> None:
    """Without its database, orbax joins the arrays' names to the folder, absolute ones as well."""
    outside = tmp_path / "outside"
    shutil.copytree(saved / "files" / "a", outside)
    folder = copied(saved, tmp_path, "params")
    shutil.rmtree(folder / "arrays")
    shutil.copytree(saved / "files", folder / "arrays")
    path = name.replace("/absolute", str(outside))
    tree = (folder / "arrays" / "_METADATA").read_text()
    (folder / "arrays" / "_METADATA").write_text(
        tree.replace('"a"', json.dumps(path)).replace("'a'", repr(path))
    )
    edit(folder, lambda x: x | {"arrays": {path: x["arrays"]["a"]}})
    # An old orbax does not write what it is, but there is no database.
    with pytest.raises(
        jl.CheckpointError, match=r"in a database of OCDBT|manifest\.ocdbt, found none"
    ):
        jl.io.load_params(folder)
    # The flag alone does not help.
    changed = (folder / "arrays" / "_METADATA").read_text().replace("false", "true")
    (folder / "arrays" / "_METADATA").write_text(changed)
    refused(jl.io.load_params, folder, "expected arrays/manifest.ocdbt, found none")


def test_what_is_no_file(saved: Path, tmp_path: Path) -> None:
    """A pipe or a device would be read for ever."""
    folder = copied(saved, tmp_path, "params")
    os.mkfifo(folder / "arrays" / "d" / "pipe")
    refused(jl.io.load_params, folder, "expected arrays/d/pipe to be a file or a folder")
    (folder / "arrays" / "d" / "pipe").unlink()
    for name in ("arrays/_METADATA", "_CHECKPOINT_METADATA"):
        file = folder / name
        content = file.read_bytes()
        file.unlink()
        for target in ("/dev/zero", "nowhere", file.name):
            file.symlink_to(target)
            with pytest.raises(jl.CheckpointError, match="damaged or not from this library"):
                jl.io.load_params(folder)
            file.unlink()
        if name != "_CHECKPOINT_METADATA":
            file.write_bytes(content)
    # The control: a link to a file is how a cache keeps downloads.
    (tmp_path / "blob").write_bytes(content)
    file.symlink_to(tmp_path / "blob")
    jl.io.load_params(folder)


def test_texts_that_are_too_long(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path, "params")
    for name in ("_CHECKPOINT_METADATA", "arrays/_METADATA", "config/metadata"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content + b" " * 17 * 2**20)
        refused(jl.io.load_params, folder, f"expected at most 16,777,216 bytes in {name}")
        (folder / name).write_bytes(content)
    (folder / "arrays" / "_METADATA").write_bytes(b"[" * 100_000)
    refused(jl.io.load_params, folder, "damaged")


def test_sizes_are_checked_before_memory_is_taken(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(saved, tmp_path, "params")
    monkeypatch.setattr(ocp.RestoreArgs, "__init__", None)  # no array is asked for
    edit(folder, lambda x: x | {"arrays": {"a": x["arrays"]["a"] | {"shape": [3, 2]}}})
    refused(jl.io.load_params, folder, "the arrays differ from those written: a")
    from jax_lora.io import guards

    # An array of 24 bytes whose files may only be of none.
    monkeypatch.setattr(guards, "_ALWAYS_TAKEN", 0)
    monkeypatch.setattr(guards, "_MAX_RATIO", 0)
    edit(folder, lambda x: x | {"arrays": {"a": x["arrays"]["a"] | {"shape": [2, 3]}}})
    refused(jl.io.load_params, folder, "found arrays of 24 bytes; not from this library")


@pytest.mark.parametrize(
    "change",
    [
        lambda x: {k: y for k, y in x.items() if k != "version"},
        lambda x: {k: y for k, y in x.items() if k != "format"},
        lambda x: {k: y for k, y in x.items() if k != "arrays"},
        lambda x: {k: y for k, y in x.items() if k != "metadata"},
        lambda x: {k: y for k, y in x.items() if k != "entries"},
        lambda x: x | {"version": []},
        lambda x: x | {"version": 1},
        lambda x: x | {"arrays": []},
        lambda x: x | {"arrays": {"a": None}},
        lambda x: x | {"metadata": 3},
        lambda x: x | {"entries": {"a": []}},
        lambda x: x | {"entries": {"a": {"variant": []}}},
        lambda x: x | {"entries": {"a": x["entries"]["a"] | {"layout": 3}}},
        lambda x: x | {"lora": [1]},
    ],
)
def test_a_document_that_is_not_ours(saved: Path, tmp_path: Path, change: Edit) -> None:
    """Its checksum is right: a newer version, or somebody who means harm."""
    folder = copied(saved, tmp_path, "adapter")
    edit(folder, change)
    with pytest.raises(jl.CheckpointError):
        jl.io.load_adapter(folder)


def test_a_layout_that_the_arrays_do_not_have(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path, "adapter")

    def change(document: Any) -> Any:
        document["entries"]["a"]["layout"]["shape"] = [2, 4]
        return document

    jl.io.load_adapter(folder)
    edit(folder, change)
    refused(jl.io.load_adapter, folder, "a: expected a, b of shapes ((2, 1), (1, 4))")


def test_containers_that_no_array_tells_of(tmp_path: Path) -> None:
    """What is empty, and whether numbers are places in a list: paths are the same."""
    w = np.ones(2, np.float32)
    jl.io.save_params(tmp_path / "params", {"empty": {}, "list": [w, w]})
    file = tmp_path / "params" / "arrays" / "_METADATA"
    good = file.read_text()
    # Other containers come back as these.
    pair = collections.namedtuple("pair", "x y")(w, {"z": w})
    jl.io.save_params(tmp_path / "other", {"pair": pair, "empty": {}})
    assert jl.io.load_params(tmp_path / "other")[0]["empty"] == {}
    found, _ = jl.io.load_params(tmp_path / "params")
    assert found["empty"] == {}
    assert isinstance(found["list"], list)
    tree = json.loads(good)
    for name, entry in tree["tree_metadata"].items():
        if "list" in name:
            entry["key_metadata"][1]["key_type"] = 2  # a key of a dict
    for changed in (good.replace("empty", "ampty"), json.dumps(tree)):
        file.write_text(changed)
        with pytest.raises(jl.CheckpointError):
            jl.io.load_params(tmp_path / "params")


@pytest.mark.parametrize(
    "change",
    [
        lambda x: None,
        lambda x: {k: y for k, y in x.items() if k != "step"},
        lambda x: x | {"step": "3"},
        lambda x: x | {"position": {"epoch": 1}},
        lambda x: x | {"metrics": {"loss": "low"}},
        lambda x: x | {"run": 3},
        lambda x: x | {"impls": {"keys": {}}},
    ],
)
def test_the_state_of_a_training_that_is_not_ours(tmp_path: Path, change: Edit) -> None:
    w = {"w": jnp.ones(2)}
    with jl.io.Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(3, w, w, metrics={"loss": 1.0})
    assert jl.io.Checkpoints(tmp_path / "run").restore(w, w).step == 3
    edit(tmp_path / "run" / "3", lambda x: x | {"state": change(x["state"])})
    with pytest.raises(jl.CheckpointError):
        jl.io.Checkpoints(tmp_path / "run").restore(w, w)


@pytest.mark.parametrize("name", ["entries", "lora", "base"])
def test_a_training_without_what_an_adapter_has(saved: Path, tmp_path: Path, name: str) -> None:
    adapter, config, _ = jl.io.load_adapter(saved / "adapter")
    base, momentum = {"a": jnp.ones((2, 3))}, {"m": jnp.ones(2)}
    settings = {"base": base, "config": config}
    with jl.io.Checkpoints(tmp_path / "run", **settings) as checkpoints:
        checkpoints.save(3, adapter, momentum)
    edit(tmp_path / "run" / "3", lambda x: {k: y for k, y in x.items() if k != name})
    with pytest.raises(jl.CheckpointError):
        jl.io.Checkpoints(tmp_path / "run", **settings).restore(adapter, momentum)
