"""`adapter_shardings`, and training with them on eight devices as on one.

The number of devices is set before JAX starts, so training runs in one process of its own.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

import jax_lora as jl

ROOT = Path(jl.__file__).parents[1]

LAYOUTS = {
    "matrix": (jl.Layout((4, 6), (0,), (1,)), ("x", "y"), ("x", None), (None, "y")),
    "used transposed": (jl.Layout((4, 6), (1,), (0,)), ("x", "y"), ("y", None), (None, "x")),
    "short spec": (jl.Layout((4, 6), (0,), (1,)), ("x",), ("x", None), (None, None)),
    "stacked": (
        jl.Layout((3, 4, 6), (1,), (2,), (0,)),
        ("x", None, ("y", "z")),
        ("x", None, None),
        ("x", None, ("y", "z")),
    ),
    "stacked in the middle": (
        jl.Layout((4, 3, 6), (0,), (2,), (1,)),
        ("x", "y", "z"),
        ("y", "x", None),
        ("y", None, "z"),
    ),
    "heads": (
        jl.Layout((4, 2, 6), (0,), (1, 2)),
        (None, "y", None),
        (None, None),
        (None, "y", None),
    ),
    "whole": (jl.Layout((4, 6), (0,), (1,)), (), (None, None), (None, None)),
}


@pytest.fixture(scope="module")
def mesh() -> Any:
    kinds = (AxisType.Auto,) * 3
    return jax.make_mesh((1, 1, 1), ("x", "y", "z"), axis_types=kinds, devices=jax.devices()[:1])


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_factor_axis_is_split_as_the_weights(name: str, entry: Any, mesh: Any) -> None:
    layout, spec, a, b = LAYOUTS[name]
    adapter = jl.Adapter({"w": entry(layout)})
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    found = jl.adapter_shardings(adapter, {"w": sharding})
    assert (tuple(found["w"].a.spec), tuple(found["w"].b.spec)) == (a, b)
    assert tuple(found["w"].scale.spec) == ()
    assert jax.tree.structure(found) == jax.tree.structure(adapter)
    assert {s.mesh for s in jax.tree.leaves(found)} == {mesh}
    # The same from the arrays, from their shapes, and of an adapter that is shapes alone.
    w = jax.device_put(jnp.ones(layout.shape), sharding)
    shapes = jax.eval_shape(lambda: adapter)
    for params in (w, jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=sharding)):
        assert jl.adapter_shardings(shapes, {"w": params}) == found
    # What they are for: placing, and as the shardings of a jitted function.
    placed = jax.device_put(adapter, found)
    made = jax.jit(lambda: adapter, out_shardings=found)()
    for tree in (placed, made):
        assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, tree, found))


def test_of_many_adapters_the_first_axis_is_whole(entry: Any, mesh: Any) -> None:
    layout, spec, *_ = LAYOUTS["matrix"]
    many = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), jl.Adapter({"w": entry(layout)}))
    found = jl.adapter_shardings(many, {"w": NamedSharding(mesh, PartitionSpec(*spec))})
    assert tuple(found["w"].a.spec) == (None, "x", None)
    assert tuple(found["w"].b.spec) == (None, None, "y")
    jax.device_put(many, found)


def test_parameters_that_are_not_placed_are_on_one_device(entry: Any) -> None:
    layout, *_ = LAYOUTS["matrix"]
    adapter = jl.Adapter({"w": entry(layout)})
    found = jl.adapter_shardings(adapter, {"w": jnp.ones(layout.shape)})
    assert {type(s) for s in jax.tree.leaves(found)} == {SingleDeviceSharding}
    jax.device_put(adapter, found)


def test_everything_wrong_is_named_at_once(entry: Any, mesh: Any) -> None:
    layout, *_ = LAYOUTS["matrix"]
    paths = ("numpy", "spec", "long", "wrong")
    adapter = jl.Adapter({path: entry(layout) for path in paths})
    params = {
        "numpy": np.ones(layout.shape),
        "spec": PartitionSpec("x"),
        "long": NamedSharding(mesh, PartitionSpec("x", None, "y")),
        "right": NamedSharding(mesh, PartitionSpec()),
    }
    with pytest.raises(jl.AdapterError) as caught:
        jl.adapter_shardings(adapter, params)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("expected a NamedSharding for every adapted parameter; place")
    for path, found in (
        ("long", "is for 3 axes, of 2"),
        ("numpy", "got ndarray"),
        ("spec", r"without a mesh; wrap it, NamedSharding\(mesh, spec\)"),
        ("wrong", r"no such parameter"),
    ):
        (line,) = (line for line in lines if line.startswith(f"  {path}: "))
        assert re.search(found, line)
    with pytest.raises(jl.AdapterError, match=r"made for shape \(4, 6\), found \(6, 4\)"):
        jl.adapter_shardings(jl.Adapter({"w": entry(layout)}), {"w": jnp.ones((6, 4))})
    with pytest.raises(jl.AdapterError, match=r"expected an adapter .*Adapter\), got dict"):
        jl.adapter_shardings({}, params)


# Parameters, batch: how each is split over a mesh of 2 x 4 devices.
WAYS: dict[str, tuple[dict[str, tuple[Any, ...]], tuple[Any, ...]]] = {
    "data": ({}, (("x", "y"),)),
    "tensor": (
        {"table": (None, "y"), "up": (None, None, "y"), "down": (None, "y"), "head": (None, "y")},
        ("x",),
    ),
    "fsdp": (
        {"table": ("y",), "up": (None, "y"), "down": (None, None, "y"), "head": ("y",)},
        (("x", "y"),),
    ),
    "fsdp and tensor": (
        {
            "table": ("x", "y"),
            "up": (None, "x", "y"),
            "down": (None, "y", "x"),
            "head": ("x", "y"),
        },
        ("x",),
    ),
}
SHAPES = {"table": (20, 16), "up": (3, 16, 40), "down": (3, 40, 16), "head": (16, 56)}
RANK = 3


def _model(params: Any, ids: Any, shift: Any = None) -> Any:
    def layer(x: Any, step: Any) -> Any:
        up, down = step
        return x + jnp.tanh(x @ up) @ down, None

    x = params["table"][ids] + (0 if shift is None else shift)
    x = jax.lax.scan(layer, x, (params["up"], params["down"]))[0]
    return x @ params["head"]


def _main() -> None:
    """Train for three steps on one device and in every way on eight; print what came out."""
    import optax

    rng = np.random.default_rng(0)
    params = {path: np.asarray(rng.normal(size=s) / 4, "float32") for path, s in SHAPES.items()}
    ids, target = rng.integers(0, 20, 24), rng.integers(0, 56, 24)
    plan = jl.plan(_model, params, ids, config=jl.LoraConfig(rank=RANK, targets="**"))
    fresh = jl.init(jax.random.key(0), params, plan)
    # In numpy, so that placing it copies it: training donates what is placed.
    adapter = jax.tree.map(
        lambda leaf: np.asarray(leaf + 0.1 * rng.normal(size=leaf.shape), leaf.dtype), fresh
    )
    optimizer = jl.optim.lora_optimizer(optax.sgd(0.05, momentum=0.9))

    def loss(logits: Any, target: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()

    def in_weight_space(params: Any, adapter: Any, ids: Any) -> Any:
        return _model(jl.merge(params, adapter), ids)

    def base_gradient(shift: Any, params: Any, ids: Any, target: Any) -> Any:
        """What comes back through all of the model without an adapter."""
        return jax.grad(lambda shift: loss(_model(params, ids, shift), target))(shift)

    def train(model: Any, adapter: Any, params: Any, data: Any, shardings: Any) -> Any:
        def step(adapter: Any, state: Any, params: Any, data: Any) -> Any:
            ids, target = data
            value, grads = jax.value_and_grad(lambda a: loss(model(params, a, ids), target))(
                adapter
            )
            updates, state = optimizer.update(grads, state, adapter)
            return optax.apply_updates(adapter, updates), state, value

        state = optimizer.init(adapter)  # zeros, placed like the adapter
        places = None if shardings is None else jax.tree.map(lambda leaf: leaf.sharding, state)
        run = jax.jit(step, out_shardings=(shardings, places, None), donate_argnums=(0, 1))
        program = run.lower(adapter, state, params, data).compile()
        losses = []
        for _ in range(3):
            adapter, state, value = program(adapter, state, params, data)
            losses.append(float(value))
        return {
            "losses": losses,
            "adapter": {path: [f.a.tolist(), f.b.tolist()] for path, f in adapter.items()},
            "parts": {
                path: [f.a.addressable_shards[0].data.shape, f.b.addressable_shards[0].data.shape]
                for path, f in adapter.items()
            },
            "collectives": _collectives(program.as_text()),
        }

    adapted = jl.apply(_model, strict=True)
    data = (jnp.asarray(ids), jnp.asarray(target))
    one = jax.tree.map(jnp.asarray, params)
    found = {"one": train(adapted, jax.tree.map(jnp.asarray, adapter), one, data, None)}
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    for name, (specs, batch) in WAYS.items():
        placed = {
            path: jax.device_put(w, NamedSharding(mesh, PartitionSpec(*specs.get(path, ()))))
            for path, w in params.items()
        }
        shardings = jl.adapter_shardings(fresh, placed)
        data = jax.device_put((ids, target), NamedSharding(mesh, PartitionSpec(*batch)))
        found[name] = train(adapted, jax.device_put(adapter, shardings), placed, data, shardings)
        program = jax.jit(base_gradient).lower(jnp.zeros(16), placed, *data).compile()
        found[name]["of the base"] = _collectives(program.as_text())
        if not specs:
            copied = jax.device_put(adapter, shardings)
            dense = train(in_weight_space, copied, placed, data, shardings)
            found["in weight space"] = dense | {"of the base": found[name]["of the base"]}
    print(json.dumps(found))


def _collectives(text: str) -> list[tuple[str, str]]:
    """The collectives of a compiled program: each array that one makes, with its shape."""
    pattern = r"= (\(.*?\)|\S+) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\("
    return [
        (op, dims)
        for kind, op in re.findall(pattern, text)
        for dims in re.findall(r"\[([\d,]*)\]", kind)
    ]


@pytest.fixture(scope="module")
def trained() -> Any:
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = os.environ | {
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-W", "error", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("way", WAYS)
def test_training_on_eight_devices_is_training_on_one(way: str, trained: Any) -> None:
    one, other = trained["one"], trained[way]
    np.testing.assert_allclose(other["losses"], one["losses"], rtol=1e-5)
    for path in SHAPES:
        for found, want in zip(other["adapter"][path], one["adapter"][path], strict=True):
            np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)
    # Negative control: a step moves the loss by far more than that.
    assert abs(one["losses"][2] - one["losses"][0]) > 1e-2


@pytest.mark.parametrize("way", WAYS)
def test_each_device_holds_its_part_of_the_factors(way: str, trained: Any) -> None:
    mesh = {"x": 2, "y": 4}

    def part(shape: tuple[int, ...], spec: tuple[Any, ...]) -> list[int]:
        by = [entry if isinstance(entry, tuple) else (entry,) for entry in spec]
        parts = [math.prod(mesh.get(name, 1) for name in names) for names in by]
        return [n // k for n, k in zip(shape, parts, strict=False)]

    for path, shape in SHAPES.items():
        spec = (*WAYS[way][0].get(path, ()), *[None] * len(shape))
        *stack, n, m = part(shape, spec)
        assert trained[way]["parts"][path] == [[*stack, n, RANK], [*stack, RANK, m]]


def test_no_collective_is_of_a_weights_size(trained: Any) -> None:
    """But those that the model itself needs; a collective may make a part of a weight, too."""
    sizes = {math.prod(shape[-2:]) // parts for shape in SHAPES.values() for parts in (1, 2, 4)}

    def of_weights(name: str) -> Counter[str]:
        found = Counter(
            f"{op}[{dims}]"
            for op, dims in trained[name]["collectives"]
            if math.prod(int(n) for n in dims.split(",") if n) in sizes
        )
        return found - Counter(f"{op}[{dims}]" for op, dims in trained[name]["of the base"])

    for way in WAYS:
        assert not of_weights(way), way
        assert trained[way]["collectives"]
    # Negative control: the gradient of each W, summed over the devices.
    assert of_weights("in weight space").total() >= len(SHAPES)


if __name__ == "__main__":
    _main()
