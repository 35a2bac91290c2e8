"""What is written: the flat form word for word, the same updates again, and what is refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.errors import AdapterError, CheckpointError
from tests.peft.small import NAMES, P, World

R = jl.Rule


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def _file(folder: Path) -> dict[str, np.ndarray]:
    file = jl.peft.tensors.TensorFile.open(folder / "adapter_model.safetensors")
    return {name: file.read(name) for name in file.tensors}


def test_the_flat_form(world: World, tmp_path: Path) -> None:
    adapter = world.adapter(targets=(R("head/kernel", rank=3, alpha=6), "layers/w"))
    names = world.save(tmp_path / "out", adapter, base_model="a/b", task_type="CAUSAL_LM")
    assert names == {
        "head.weight": "head/kernel",
        "layers.0.fc.weight": "layers/w",
        "layers.1.fc.weight": "layers/w",
    }
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert _config(tmp_path / "out") == {
        "alpha_pattern": {},
        "base_model_name_or_path": "a/b",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 3,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 3,
        "rank_pattern": {},
        "target_modules": ["head", "layers.0.fc", "layers.1.fc"],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    tensors = _file(tmp_path / "out")
    head, stack = adapter["head/kernel"], adapter["layers/w"]
    np.testing.assert_array_equal(tensors[f"{P}head.lora_A.weight"], head.a.T)
    np.testing.assert_array_equal(tensors[f"{P}head.lora_B.weight"], 2 * head.b.T)
    a, b = (tensors[f"{P}layers.1.fc.lora_{x}.weight"] for x in "AB")
    np.testing.assert_array_equal(a, np.pad(stack.a[1].T, [(0, 1), (0, 0)]))
    np.testing.assert_array_equal(b, np.pad(np.float32(1.5) * stack.b[1].T, [(0, 0), (0, 1)]))
    assert len(tensors) == 6


EVERYTHING = (
    R("head/kernel", rank=3, alpha=6),
    R("layers/w", init="pissa", alpha=1),
    R("table", rank=1, scaling="rslora"),
    R("conv/kernel", rank=4),
)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("variant", ["lora", "dora", "lora-fa"])
def test_the_same_update_again(world: World, tmp_path: Path, flat: bool, variant: str) -> None:
    adapter = world.adapter(targets=EVERYTHING, variant=variant)
    world.save(tmp_path / "out", adapter, flat=flat)
    again = world.load(tmp_path / "out")
    expected = jl.delta(adapter, world.params)
    found = jl.delta(again, world.params)
    assert expected.keys() == found.keys()
    for path, update in expected.items():
        assert np.abs(update).max() > 0.1
        np.testing.assert_allclose(found[path], update, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(world.ours(again), world.ours(adapter), rtol=1e-4, atol=1e-5)
    config = _config(tmp_path / "out")
    assert bool(config["rank_pattern"]) is not flat
    assert config["use_dora"] is (variant == "dora")
    assert not flat or {x.rank for x in again.values()} == {config["r"]}


@pytest.mark.parametrize("flat", [True, False])
def test_lora_beside_dora_is_written_as_dora(world: World, tmp_path: Path, flat: bool) -> None:
    """PEFT has one setting for all: magnitudes that make DoRA the same update as LoRA."""
    targets = (R("head/kernel", variant="dora"), R("layers/w", alpha=5), R("table", alpha=1))
    adapter = world.adapter(targets=targets)
    world.save(tmp_path / "out", adapter, flat=flat)
    again = world.load(tmp_path / "out")
    assert {type(entry) for entry in again.values()} == {jl.DoraFactors}
    found, expected = jl.delta(again, world.params), jl.delta(adapter, world.params)
    for path, update in expected.items():
        np.testing.assert_allclose(found[path], update, rtol=1e-5, atol=1e-5)


def test_whole_modules_are_written(world: World, tmp_path: Path) -> None:
    adapter = world.adapter(targets=("layers/w", R("head/bias", variant="full")))
    world.save(tmp_path / "out", adapter)
    tensors = _file(tmp_path / "out")
    np.testing.assert_array_equal(tensors[f"{P}head.weight"], world.params["head"]["kernel"].T)
    np.testing.assert_array_equal(tensors[f"{P}head.bias"], adapter["head/bias"].value)
    assert _config(tmp_path / "out")["modules_to_save"] == ["head"]
    again = world.load(tmp_path / "out")
    assert set(again) == {"layers/w", "head/bias", "head/kernel"}
    np.testing.assert_allclose(world.ours(again), world.ours(adapter), rtol=1e-5, atol=1e-6)
    both = dict(world.adapter(targets=("layers/w", R("layers/b", variant="full"))))
    both["layers/b"] = jl.FullValue(both["layers/b"].value, (2, 4))
    weight = jl.peft.Name("layers/b", "layers.{layer}.fc.other")
    names = (*NAMES[:2], weight, *NAMES[3:])
    with pytest.raises(AdapterError, match="PEFT knows only whole modules"):
        jl.peft.save(tmp_path / "both", jl.Adapter(both), world.params, names, world.uses)


def test_biases_beside_factors(world: World, tmp_path: Path) -> None:
    """Of adapted modules alone they are ``lora_only``; with others, PEFT trains them all."""
    near = world.adapter(targets=("head/kernel", R("head/bias", variant="full")))
    world.save(tmp_path / "near", near)
    assert _config(tmp_path / "near")["bias"] == "lora_only"
    assert _config(tmp_path / "near")["modules_to_save"] is None
    tensors = _file(tmp_path / "near")
    assert len(tensors) == 3
    np.testing.assert_array_equal(tensors[f"{P}head.base_layer.bias"], near["head/bias"].value)
    assert set(world.load(tmp_path / "near")) == {"head/kernel", "head/bias"}

    far = world.adapter(targets=("head/kernel", R("**/b*", variant="full")))
    far = jl.drop(far, "layers/b")
    far = jl.Adapter(dict(far) | dict(world.adapter(targets=(R("layers/b", variant="full"),))))
    world.save(tmp_path / "far", far, flat=False)
    assert _config(tmp_path / "far")["bias"] == "all"
    tensors = _file(tmp_path / "far")
    np.testing.assert_array_equal(tensors[f"{P}layers.1.fc.bias"], far["layers/b"].value[1])
    assert len(tensors) == 5
    for name, adapter in (("near", near), ("far", far)):
        again = world.load(tmp_path / name)
        assert set(again) == set(adapter)
        np.testing.assert_allclose(world.ours(again), world.ours(adapter), rtol=1e-5, atol=1e-5)

    # One bias of two: PEFT keeps both, the other as it is in the base, which is then needed.
    one = world.adapter(targets=("head/kernel", R("head/bias", variant="full"), "layers/w"))
    world.save(tmp_path / "one", one)
    np.testing.assert_array_equal(
        _file(tmp_path / "one")[f"{P}layers.0.fc.base_layer.bias"], world.params["layers"]["b"][0]
    )
    shapes = jax.eval_shape(lambda: world.params)
    with pytest.raises(AdapterError, match="layers/b: expected its values, as bias='lora_only'"):
        jl.peft.save(tmp_path / "shapes", one, shapes, NAMES, world.uses)


def test_rows_of_a_table_that_is_the_head(tmp_path: Path) -> None:
    """LoRA of PEFT's embedding would reach the lookup alone; its trained tokens reach both."""

    def tied(p: Any, tokens: Any) -> Any:
        return p["table"][tokens] @ p["mix"] @ p["table"].T

    rng = np.random.default_rng(0)
    params = {"table": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32), "mix": jnp.eye(3)}
    tokens = jnp.array([[0, 3, 4]])
    uses = jl.discover(tied, params, tokens)
    names = [("{module**}", "{module}.weight")]
    config = jl.LoraConfig(rank=1, targets=(R("table", rows=(0, 4)), "mix"))
    adapter = jl.init(jax.random.key(0), params, jl.plan(tied, params, tokens, config=config))
    value = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
    rows = dataclasses.replace(adapter["table"], value=value)
    adapter = jl.Adapter(dict(adapter) | {"table": rows})
    jl.peft.save(tmp_path / "out", adapter, params, names, uses)
    assert _config(tmp_path / "out")["trainable_token_indices"] == {"table": [0, 4]}
    found = _file(tmp_path / "out")[f"{P}table.token_adapter.trainable_tokens_delta"]
    np.testing.assert_array_equal(found, value)
    again = jl.peft.load(tmp_path / "out", params, names, uses).adapter
    assert (again["table"].rows, again["table"].layout) == ((0, 4), rows.layout)
    np.testing.assert_array_equal(again["table"].value, value)
    # Of a table that is the lookup alone they are LoRA, which every reader knows.
    single = jl.discover(lambda p, t: p["table"][t] @ p["mix"], params, tokens)
    jl.peft.save(tmp_path / "plain", adapter, params, names, single)
    assert "trainable_token_indices" not in _config(tmp_path / "plain")
    plain = jl.peft.load(tmp_path / "plain", params, names, single).adapter
    np.testing.assert_allclose(
        jl.delta(plain)["table"], jl.delta(adapter, params)["table"], rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("variant", ["lora", "dora", "full"])
def test_modules_that_are_side_by_side(tmp_path: Path, variant: Any) -> None:
    """One kernel here is three of torch's, of different sizes, in each of two layers."""
    sizes = {"q": 4, "k": 2, "v": 2}
    rule = jl.peft.Name("qkv", "h.{n}.{p}.weight", kind="linear", axes="io", parts={"p": sizes})
    layout = jl.Layout((2, 3, 8), (1,), (2,), (0,))
    params = {"qkv": jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8)), jnp.float32)}

    def fun(p: Any, x: Any) -> Any:
        return jax.lax.scan(lambda x, w: ((x @ w)[:, :3], None), x, p["qkv"])[0]

    targets = (R("qkv", variant="full"),) if variant == "full" else ("qkv",)
    settings = {} if variant == "full" else {"variant": variant}
    config = jl.LoraConfig(rank=2, alpha=3.0, targets=targets, **settings)
    fresh = jl.init(
        jax.random.key(0), params, jl.plan(fun, params, jnp.ones((1, 3)), config=config)
    )
    moved = {x: getattr(fresh["qkv"], x) + 0.5 for x in fresh["qkv"].TRAINED}
    adapter = jl.Adapter({"qkv": dataclasses.replace(fresh["qkv"], **moved)})
    jl.peft.save(tmp_path / "out", adapter, params, [rule])
    tensors = _file(tmp_path / "out")
    assert len(tensors) == 6 * {"lora": 2, "dora": 3, "full": 1}[variant]
    if variant == "lora":
        entry = adapter["qkv"]
        for word, columns in (("q", slice(4)), ("k", slice(4, 6)), ("v", slice(6, 8))):
            a, b = (tensors[f"{P}h.1.{word}.lora_{x}.weight"] for x in "AB")
            np.testing.assert_array_equal(a, entry.a[1].T)
            np.testing.assert_array_equal(b, np.float32(1.5) * entry.b[1, :, columns].T)
    again = jl.peft.load(tmp_path / "out", params, [rule]).adapter
    assert variant == "full" or again["qkv"].rank == 2  # what they share is there once
    found, expected = jl.delta(again, params)["qkv"], jl.delta(adapter, params)["qkv"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert layout.shape == again["qkv"].shape


def test_names_that_are_ends_of_others_get_an_expression(tmp_path: Path) -> None:
    """PEFT takes a name in a list as the end of a name: `q` would adapt `x.q`, too."""

    def fun(p: Any, x: Any) -> Any:
        return x @ p["q"] @ p["x"]["q"] @ p["y"] @ p["z"]

    params = {"q": jnp.eye(3), "x": {"q": jnp.eye(3)}, "y": jnp.eye(3), "z": jnp.eye(3)}
    uses = jl.discover(fun, params, jnp.ones((1, 3)))
    names = [("{module**}", "{module}.weight")]
    plan = jl.plan(fun, params, jnp.ones((1, 3)), config=jl.LoraConfig(rank=1, targets=("q",)))
    adapter = jl.init(jax.random.key(0), params, plan)
    jl.peft.save(tmp_path / "out", adapter, params, names, uses)
    assert _config(tmp_path / "out")["target_modules"] == "(q)"
    assert set(jl.peft.load(tmp_path / "out", params, names, uses).adapter) == {"q"}
    # A pattern is tried on the ends of names, too, and the first that matches decides.
    both = jl.LoraConfig(
        targets=(R("q", rank=1, alpha=5), R("x/q", rank=2, alpha=7), R("*", rank=3, alpha=9))
    )
    adapter = jl.init(
        jax.random.key(0), params, jl.plan(fun, params, jnp.ones((1, 3)), config=both)
    )
    jl.peft.save(tmp_path / "both", adapter, params, names, uses, flat=False)
    again = jl.peft.load(tmp_path / "both", params, names, uses).adapter
    assert {path: (x.rank, float(x.scale)) for path, x in again.items()} == {
        "q": (1, 5.0),
        "x/q": (2, 3.5),
        "y": (3, 3.0),
        "z": (3, 3.0),
    }
    whole = jl.Adapter({"q": jl.FullValue(jnp.ones((3, 3)), (3, 3))})
    with pytest.raises(AdapterError, match=r"x\.q: would be trained whole, too"):
        jl.peft.save(tmp_path / "whole", whole, params, names, uses)


def test_what_cannot_be_written_is_one_error(world: World, tmp_path: Path) -> None:
    adapter = world.adapter(targets=("layers/w", "table", "conv/kernel", "head/kernel"))
    with pytest.raises(AdapterError) as caught:
        jl.peft.save(tmp_path / "out", adapter, world.params, NAMES[3:], {})
    text = str(caught.value)
    assert "layers/w: no rule names it" in text
    assert "table: no rule names it" in text
    # From a layout alone, a kernel could be an embedding.
    assert "head/kernel: whether it is a linear layer, an embedding or a convolution" in text
    assert not list(tmp_path.iterdir())
    wrong = {"head/kernel": jl.Layout((6, 3), in_axes=(1,), out_axes=(0,))}
    head = jl.select(adapter, "head/kernel")
    with pytest.raises(AdapterError, match="in the adapter and"):
        jl.peft.save(tmp_path / "out", head, world.params, NAMES, wrong)


def test_a_folder_is_whole_or_absent(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = world.adapter(targets=("head/kernel",))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(CheckpointError, match="expected a new or an empty folder"):
        world.save(tmp_path / "full", adapter)
    (tmp_path / "empty").mkdir()
    world.save(tmp_path / "empty", adapter)
    assert set(world.load(tmp_path / "empty")) == {"head/kernel"}

    # A link is to where the adapter goes; it stays one.
    (tmp_path / "link").symlink_to(tmp_path / "linked", target_is_directory=True)
    world.save(tmp_path / "link", adapter)
    assert (tmp_path / "link").is_symlink()
    assert set(world.load(tmp_path / "linked")) == {"head/kernel"}
    # A folder that fills up meanwhile is not replaced.
    writing = jl.peft.files.write_json

    def filled_by_another(path: Path, value: Any) -> None:
        (tmp_path / "raced").mkdir()
        (tmp_path / "raced" / "theirs").touch()
        writing(path, value)

    monkeypatch.setattr(jl.peft.writing, "write_json", filled_by_another)
    with pytest.raises(CheckpointError, match="cannot be written"):
        world.save(tmp_path / "raced", adapter)
    assert [p.name for p in (tmp_path / "raced").iterdir()] == ["theirs"]
    names = ["empty", "full", "link", "linked", "raced"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_a_disk_that_is_full(world: World, tmp_path: Path) -> None:
    """The system refuses what is beyond the first hundred bytes of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot be written") as caught:
            world.save(tmp_path / "out", world.adapter(targets=("head/kernel",)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


class _KilledError(BaseException):
    """The end of the process."""


def test_a_process_that_is_killed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before every call to the system that matters: the whole adapter is there, or none."""
    adapter = world.adapter(targets=("head/kernel",))
    left = iter(())

    def mortal(call: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if next(left, None) is None:
                raise _KilledError
            return call(*args, **kwargs)

        return wrapped

    for where, name in ((os, "fsync"), (Path, "mkdir"), (Path, "rename"), (Path, "open")):
        monkeypatch.setattr(where, name, mortal(getattr(where, name)))
    # What is dead does not tidy up.
    monkeypatch.setattr(jl.peft.files.shutil, "rmtree", lambda *args, **kwargs: None)
    absent = 0
    for calls in range(100):
        left = iter(range(calls))
        folder = tmp_path / f"{calls}"
        try:
            world.save(folder, adapter)
        except _KilledError:
            pass
        else:
            break
        finally:
            left = iter(range(1000))
        if folder.exists():
            assert set(world.load(folder)) == {"head/kernel"}
        else:
            absent += 1
    # Two files are opened and synced, and two folders; then it is renamed.
    assert calls == 8
    assert absent == 7


def test_an_adapter_with_a_leading_axis_is_refused(world: World, tmp_path: Path) -> None:
    adapter = world.adapter(targets=("head/kernel",))
    many = jax.tree.map(lambda x: jnp.stack([x, x]), adapter)
    with pytest.raises(AdapterError):
        world.save(tmp_path / "out", many)


def test_bfloat16_factors_stay(world: World, tmp_path: Path) -> None:
    adapter = world.adapter(targets=("head/kernel",), dtype="bfloat16", alpha=4)
    world.save(tmp_path / "out", adapter)
    again = world.load(tmp_path / "out")["head/kernel"]
    assert again.a.dtype == jnp.bfloat16
    np.testing.assert_array_equal(again.a, adapter["head/kernel"].a)
    # The scale is 2, a power of two: it costs no bit.
    np.testing.assert_array_equal(again.b, 2 * adapter["head/kernel"].b)


def test_a_scale_that_bfloat16_would_round(world: World, tmp_path: Path) -> None:
    """One for all is in the configuration; of several, each is in a B of float32."""
    one = world.adapter(targets=("head/kernel", "layers/w"), dtype="bfloat16", alpha=3)
    world.save(tmp_path / "one", one)
    config, tensors = _config(tmp_path / "one"), _file(tmp_path / "one")
    assert (config["r"], config["lora_alpha"], config["alpha_pattern"]) == (2, 3, {})
    assert {x.dtype for x in tensors.values()} == {np.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(tensors[f"{P}head.lora_B.weight"], one["head/kernel"].b.T)
    two = world.adapter(
        targets=(R("head/kernel", alpha=3), R("layers/w", alpha=4)), dtype="bfloat16"
    )
    world.save(tmp_path / "two", two)
    tensors = _file(tmp_path / "two")
    assert _config(tmp_path / "two")["lora_alpha"] == 2
    dtypes = {key: str(tensors[f"{P}{key}.weight"].dtype) for key in ("head.lora_A", "head.lora_B")}
    assert dtypes == {"head.lora_A": "bfloat16", "head.lora_B": "float32"}
    assert tensors[f"{P}layers.0.fc.lora_B.weight"].dtype == jnp.bfloat16  # twice is exact
    for name, adapter in (("one", one), ("two", two)):
        found, expected = jl.delta(world.load(tmp_path / name)), jl.delta(adapter)
        for path, update in expected.items():
            np.testing.assert_allclose(found[path], update, rtol=1e-6, atol=1e-6)


def test_shapes_are_enough_for_factors(world: World, tmp_path: Path) -> None:
    shapes = jax.eval_shape(lambda: world.params)
    adapter = world.adapter(targets=("head/kernel",))
    jl.peft.save(tmp_path / "out", adapter, shapes, NAMES, world.uses)
    assert set(world.load(tmp_path / "out")) == {"head/kernel"}
    mixed = {"head/kernel": adapter["head/kernel"]}
    mixed |= dict(world.adapter(targets=("layers/w",), variant="dora"))
    with pytest.raises(AdapterError, match="head/kernel: expected the base parameter's values"):
        jl.peft.save(tmp_path / "mixed", jl.Adapter(mixed), shapes, NAMES, world.uses)


def test_scaled_adapters_keep_their_scale(world: World, tmp_path: Path) -> None:
    adapter = world.adapter(targets=("head/kernel",))
    entry = dataclasses.replace(adapter["head/kernel"], scale=jnp.float32(-0.3))
    adapter = jl.Adapter({"head/kernel": entry})
    for flat in (True, False):
        world.save(tmp_path / str(flat), adapter, flat=flat)
        found = jl.delta(world.load(tmp_path / str(flat)))["head/kernel"]
        np.testing.assert_allclose(found, jl.delta(adapter)["head/kernel"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("layout", "name", "count"),
    [
        (jl.Layout((4, 2, 3), (0,), (1, 2)), "q.weight", 1),  # to several heads
        (jl.Layout((2, 3, 4), (0, 1), (2,)), "o.weight", 1),  # and from them
        (jl.Layout((5, 4), (1,), (0,)), "w.weight", 1),  # as torch has it
        (jl.Layout((3, 2, 4), (2,), (0,), (1,)), "h.{k}.w.weight", 2),  # layers in the middle
        (jl.Layout((2, 3, 4, 5), (2,), (3,), (0, 1)), "h.{k}.e.{j}.w.weight", 6),
        (jl.Layout((2, 4, 3, 5), (1, 2), (3,), (0,)), "h.{k}.o.weight", 2),
    ],
)
@pytest.mark.parametrize("variant", [jl.LoraFactors, jl.FullValue])
def test_axes_in_any_order(
    layout: jl.Layout, name: str, count: int, variant: Any, tmp_path: Path
) -> None:
    """Each matrix of the stack is, for torch, ``[out, in]`` with its axes flattened in order."""
    rng = np.random.default_rng(0)
    rank = 2

    def normal(shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    w = normal(layout.shape)
    entry: Any = jl.FullValue(normal(layout.shape), layout.shape)
    if variant is jl.LoraFactors:
        a, b = normal(layout.a_shape(rank)), normal(layout.b_shape(rank))
        entry = jl.LoraFactors(a, b, jnp.float32(0.5), layout)
    adapter = jl.Adapter({"w": entry})
    rules = [jl.peft.Name("w", name, kind="linear")]
    jl.peft.save(tmp_path / "out", adapter, {"w": w}, rules, {"w": layout})
    tensors = _file(tmp_path / "out")
    assert len(tensors) == count * (2 if variant is jl.LoraFactors else 1)
    change = jl.delta(adapter, {"w": w})["w"]
    matrices = np.asarray(layout.matrices(change)).reshape(-1, layout.fan_in, layout.fan_out)
    bases = np.asarray(layout.matrices(w)).reshape(matrices.shape)
    for index, expected, base in zip(np.ndindex(layout.stack), matrices, bases, strict=True):
        fields = dict(zip(("k", "j"), index, strict=False))
        module = P + name.format(**fields).removesuffix(".weight")
        if variant is jl.LoraFactors:
            found = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
            np.testing.assert_allclose(found.T, expected, rtol=1e-5, atol=1e-6)
        else:
            found = tensors[f"{module}.weight"]
            np.testing.assert_allclose(found.T - base, expected, rtol=1e-5, atol=1e-6)
    again = jl.peft.load(tmp_path / "out", {"w": w}, rules, {"w": layout}).adapter
    found = jl.delta(again, {"w": w})["w"]
    np.testing.assert_allclose(found, change, rtol=1e-5, atol=1e-6)
