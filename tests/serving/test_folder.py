"""Adapters in the folders of a folder: our own checkpoints beside what PEFT writes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jax_lora as jl
from tests.serving.small import World

NAMES = (
    jl.peft.Name("up/kernel", "up_proj.weight"),
    jl.peft.Name("down/kernel", "down_proj.weight"),
)
Serve = Callable[..., jl.serving.Server]
# A context manager would hide what is tested; orbax closes its threads when collected.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture(scope="module")
def root(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of ours ``a``, ``b``, of PEFT ``c``, ``d``; one broken of each, and one of another base."""
    root = tmp_path_factory.mktemp("adapters")
    for name in "ab":
        jl.io.save_adapter(root / name, world.adapters[name], base=world.params)
    for name in "cd":
        adapter, uses = world.adapters[name], world.uses
        jl.peft.save(root / name, adapter, world.params, NAMES, uses)
    other = jax.tree.map(lambda w: w + 1, world.params)
    jl.io.save_adapter(root / "other", world.adapters["a"], base=other)
    for name, of in (("broken", "a"), ("broken-peft", "c")):
        shutil.copytree(root / of, root / name)
        files = [p for p in (root / name).rglob("*") if p.is_file() and p.suffix != ".json"]
        for path in files:
            path.write_bytes(path.read_bytes()[:8])
    (root / "notes.txt").write_text("no adapter")
    return root


@pytest.fixture(scope="module")
def folder(world: World, root: Path) -> jl.serving.AdapterFolder:
    return jl.serving.AdapterFolder(root, world.params, NAMES, world.uses)


def test_both_kinds(world: World, folder: jl.serving.AdapterFolder) -> None:
    assert list(folder) == ["a", "b", "broken", "broken-peft", "c", "d", "other"]
    for name in "abcd":
        found, expected = jl.delta(folder(name)), jl.delta(world.adapters[name])
        assert found.keys() == expected.keys()
        for path, update in expected.items():
            np.testing.assert_allclose(found[path], update, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("aa", jl.AdapterError, ["no adapter 'aa'"]),
        ("notes.txt", jl.AdapterError, ["no adapter"]),
        ("../adapters", jl.AdapterError, ["no adapter"]),
        ("broken", jl.CheckpointError, ["broken"]),
        ("broken-peft", jl.CheckpointError, ["broken-peft"]),
        ("other", jl.AdapterError, ["other", "trained on"]),
    ],
)
def test_what_cannot_be_loaded(
    folder: jl.serving.AdapterFolder, name: str, error: type, words: list[str]
) -> None:
    with pytest.raises(error) as caught:
        folder(name)
    assert [word for word in words if word not in str(caught.value)] == []


def test_without_names_there_are_checkpoints_alone(world: World, root: Path) -> None:
    folder = jl.serving.AdapterFolder(root, world.params)
    assert set(folder("a")) == {"up/kernel", "down/kernel"}
    with pytest.raises(jl.CheckpointError, match="PEFT wrote this"):
        folder("c")
    with pytest.raises(jl.ConfigError, match="names and layouts"):
        jl.serving.AdapterFolder(root, world.params, NAMES)
    with pytest.raises(jl.CheckpointError, match="found none"):
        jl.serving.AdapterFolder(root / "nowhere", world.params)


def test_a_server_of_a_folder(world: World, folder: jl.serving.AdapterFolder, serve: Serve) -> None:
    """Twice as many adapters as slots; what is broken or unknown is that request's error alone."""
    order = ["a", "c", "broken", None, "b", "nobody", "d", "other", "broken-peft", *"abcd"]
    with serve(world.bank(2), folder) as server:
        futures = [server.submit(name, world.examples[k]) for k, name in enumerate(order)]
    errors: dict[Any, BaseException | None] = {}
    for k, (name, future) in enumerate(zip(order, futures, strict=True)):
        if name is None or len(name) == 1:
            world.check(future.result(0), name, k)
        else:
            errors[name] = future.exception(0)
    assert {name: type(error) for name, error in errors.items()} == {
        "broken": jl.CheckpointError,
        "broken-peft": jl.CheckpointError,
        "nobody": jl.AdapterError,
        "other": jl.AdapterError,
    }
    assert server.stats.evictions == server.stats.loads - 2


def test_one_that_comes_later(world: World, root: Path, serve: Serve, tmp_path: Path) -> None:
    """The folder is read when somebody asks, also for a name that was not there before."""
    folder = jl.serving.AdapterFolder(tmp_path, world.params)
    with serve(world.bank(1), folder) as server:
        assert isinstance(server.submit("late", world.examples[0]).exception(60), jl.AdapterError)
        shutil.copytree(root / "b", tmp_path / "late")
        world.check(server.submit("late", world.examples[0]).result(60), "b", 0)
