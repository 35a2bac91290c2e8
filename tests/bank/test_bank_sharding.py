"""A bank on eight devices is one on one device: in outputs, in gradients, and when it is written.

The number of devices is set before JAX starts, so all of it runs in one process of its own.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_lora as jl

ROOT = Path(jl.__file__).parents[1]
SLOTS, NAMES = 16, ("a", "b", None, "c", "a", "b", "c", None)
#: How each parameter is split over a mesh of 4 x 2 devices, how the batch, and how the slots.
WAYS: dict[str, tuple[dict[str, tuple[Any, ...]], tuple[Any, ...], Any]] = {
    "data": ({}, (("x", "y"),), None),
    "tensor": ({"w": (None, "y"), "layers": (None, None, "y"), "table": (None, "y")}, ("x",), None),
    "slots": ({}, (), "x"),
}


def _model(params: Any, x: Any) -> Any:
    def layer(h: Any, w: Any) -> tuple[Any, None]:
        return jnp.tanh(h @ w) + h, None

    h, _ = lax.scan(jax.checkpoint(layer), x @ params["w"], params["layers"])
    return (h + params["table"][jnp.argmax(h, -1)]) @ params["table"].T


def _explicit(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["w"])


def _world() -> tuple[Any, dict[str, jl.Adapter], np.ndarray]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return np.asarray(rng.normal(size=shape) / 3, np.float32)

    params = {"w": normal(5, 6), "layers": normal(3, 6, 6), "table": normal(8, 6)}
    x = normal(len(NAMES), 4, 5)
    adapters = {}
    for rank, name in enumerate("abc", 1):
        config = jl.LoraConfig(rank=rank, targets="all")
        fresh = jl.init(jax.random.key(0), params, jl.plan(_model, params, x, config=config))
        adapters[name] = jax.tree.map(
            lambda leaf: leaf if leaf.ndim == 0 else jnp.asarray(normal(*leaf.shape)), fresh
        )
    return params, adapters, x


def _bank(adapters: dict[str, jl.Adapter], place: Any) -> jl.Bank:
    """Written after it is placed: with a slot that was another's, and one that is free again."""
    bank = jl.Bank.empty(adapters["c"], SLOTS)
    bank = bank.with_arrays(place(bank))
    bank = bank.add("a", adapters["b"]).add("gone", adapters["c"]).add("b", adapters["b"])
    return bank.replace("a", adapters["a"]).remove("gone").add("c", adapters["c"])


def _run(params: Any, bank: jl.Bank, ids: Any, x: Any) -> dict[str, Any]:
    def out(bank: Any, params: Any, ids: Any, x: Any) -> Any:
        return jl.apply_bank(_model, strict=True)(params, bank, ids, x)

    def gradient(*args: Any) -> Any:
        return jax.grad(lambda *args: (out(*args) ** 2).sum())(*args)

    args = (bank, params, ids, x)
    forward, backward = (jax.jit(fun).lower(*args).compile() for fun in (out, gradient))
    return {
        "out": forward(*args).tolist(),
        "grads": [leaf.tolist() for leaf in jax.tree.leaves(backward(*args))],
        "collectives": [_collectives(program.as_text()) for program in (forward, backward)],
        "parts": {
            path: [array.addressable_shards[0].data.shape for array in (slots.a, slots.b)]
            for path, slots in bank.entries.items()
        },
    }


def _collectives(text: str) -> list[int]:
    """The elements of every array that a collective of a compiled program makes."""
    pattern = r"= (\(.*?\)|\S+) (?:all-\w+|collective-\w+|reduce-scatter)(?:-start)?\("
    return [
        math.prod(int(n) for n in dims.split(",") if n)
        for kind in re.findall(pattern, text)
        for dims in re.findall(r"\[([\d,]*)\]", kind)
    ]


def _main() -> None:
    params, adapters, x = _world()
    bank = _bank(adapters, lambda bank: bank)
    ids = bank.ids(NAMES)
    found = {"one": _run(params, bank, ids, x)}
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    for way, (specs, batch, slots) in WAYS.items():

        def put(array: Any, *spec: Any) -> Any:
            return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))

        placed = {path: put(w, *specs.get(path, ())) for path, w in params.items()}

        def place(bank: Any, placed: Any = placed, slots: Any = slots) -> Any:
            if slots is None:
                return jax.device_put(bank, bank.shardings(placed))
            return jax.tree.map(lambda leaf: put(leaf, slots), bank)

        found[way] = _run(placed, _bank(adapters, place), *(put(v, *batch) for v in (ids, x)))
    found["explicit"] = _with_types(params["w"], adapters, ids, x)
    print(json.dumps(found))


def _with_types(w: Any, adapters: dict[str, jl.Adapter], ids: Any, x: Any) -> dict[str, Any]:
    """Where shardings are part of the types."""
    only = {name: jl.select(adapter, "w") for name, adapter in adapters.items()}
    bank = _bank(only, lambda bank: bank)
    wanted = jl.apply_bank(_explicit)({"w": w}, bank, ids, x)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    use = jax.set_mesh if hasattr(jax, "set_mesh") else jax.sharding.use_mesh
    with use(mesh):

        def put(array: Any, *spec: Any) -> Any:
            return jax.device_put(np.asarray(array), NamedSharding(mesh, PartitionSpec(*spec)))

        bank = jl.Bank(jax.tree.map(put, bank.entries))
        run = jax.jit(jl.apply_bank(_explicit, strict=True))
        out = run({"w": put(w)}, bank, put(ids, "x"), put(x, "x"))
        return {"type": str(jax.typeof(out)), "error": float(np.abs(out - wanted).max())}


@pytest.fixture(scope="module")
def found() -> Any:
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
def test_eight_devices_compute_what_one_does(way: str, found: Any) -> None:
    one, other = found["one"], found[way]
    np.testing.assert_allclose(other["out"], one["out"], rtol=0, atol=2e-6)
    for got, want in zip(other["grads"], one["grads"], strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    # Negative control: examples with other adapters are others.
    assert np.abs(np.subtract(one["out"][0], one["out"][4])).max() > 0.1


def test_each_device_holds_its_part(found: Any) -> None:
    """Of the features as the parameter's; writing into the bank leaves it where it is."""
    assert found["data"]["parts"]["layers"] == [[SLOTS, 3, 3, 6], [SLOTS, 3, 3, 6]]
    assert found["tensor"]["parts"]["layers"] == [[SLOTS, 3, 3, 6], [SLOTS, 3, 3, 3]]
    assert found["slots"]["parts"]["layers"] == [[SLOTS // 4, 3, 3, 6], [SLOTS // 4, 3, 3, 6]]


def test_no_bank_travels(found: Any) -> None:
    whole = SLOTS * 3 * 6  # of the smallest factor of a bank with all slots
    for way in WAYS:
        outputs, gradients = found[way]["collectives"]
        assert outputs
        assert max(outputs) < whole, way
        # Negative control: gradients do, where every device has all of them.
        assert (max(gradients) >= whole) == (way != "slots")


def test_shardings_in_the_types(found: Any) -> None:
    assert found["explicit"]["error"] < 1e-6
    assert "@x" in found["explicit"]["type"]


if __name__ == "__main__":
    _main()
