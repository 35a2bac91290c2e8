"""Every variant on four devices gives what it gives on one.

The number of devices is set before JAX starts, so everything runs in one process of its own; each
test looks at one of its cases.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
VARIANTS = ("lora", "lora-fa", "dora", "vera", "loha", "lokr", "full", "lora pissa")


def _setup(case: str) -> Any:
    """Parameters, an adapter off its start, inputs; and what one device makes of them."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jax_lora as jl

    rng = np.random.default_rng(0)

    def draw(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=shape) / 3, jnp.float32)

    params, x = {"up": draw(8, 16), "down": draw(16, 8)}, draw(8, 8)
    variant, _, init = case.partition(" ")
    config = jl.LoraConfig(rank=2, variant=variant, **({"init": init} if init else {}))
    fresh = jl.init(jax.random.key(0), params, jl.plan(_model, params, x, config=config))

    def stir(entry: Any) -> Any:
        import dataclasses

        new = {n: leaf + draw(*leaf.shape) for n, leaf in entry.trained().items()}
        return dataclasses.replace(entry, **new)

    adapter = jl.Adapter({path: stir(entry) for path, entry in fresh.items()})
    return params, adapter, x, jax.jit(_gradient(_model))(params, adapter, x)


def _model(params: Any, x: Any) -> Any:
    import jax.numpy as jnp

    return jnp.tanh(x @ params["up"]) @ params["down"]


def _gradient(fun: Any) -> Callable[..., Any]:
    import jax

    import jax_lora as jl

    adapted = jl.apply(fun, strict=True)
    return jax.value_and_grad(lambda p, a, x: (adapted(p, a, x) ** 2).sum(), argnums=1)


def _compare(got: Any, want: Any) -> None:
    import jax
    import numpy as np

    for found, value in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        found, value = np.asarray(found), np.asarray(value)
        np.testing.assert_allclose(found, value, rtol=0, atol=2e-5 * np.abs(value).max())


def _mesh(explicit: bool = False) -> Any:
    import jax
    from jax.sharding import AxisType

    kind = AxisType.Explicit if explicit else AxisType.Auto
    return jax.make_mesh((2, 2), ("data", "tp"), axis_types=(kind, kind))


def automatic(case: str) -> None:
    """The base and the inputs are split, the adapter is on every device."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    params, adapter, x, want = _setup(case)
    mesh = _mesh()

    def place(leaf: Any, *spec: Any) -> Any:
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    params = {"up": place(params["up"], "data", "tp"), "down": place(params["down"], "tp", "data")}
    adapter = jax.tree.map(place, adapter)
    _compare(jax.jit(_gradient(_model))(params, adapter, place(x, "data")), want)


def explicit(case: str) -> None:
    """Shardings are part of the types: tensor parallel, the adapter on every device."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    params, adapter, x, want = _setup(case)
    mesh = _mesh(explicit=True)

    def place(leaf: Any, *spec: Any) -> Any:
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    def model(params: Any, x: Any) -> Any:
        by_data = NamedSharding(mesh, PartitionSpec("data", None))
        hidden = jnp.tanh(x @ params["up"])
        return jnp.einsum("bf,fd->bd", hidden, params["down"], out_sharding=by_data)

    params = {"up": place(params["up"], None, "tp"), "down": place(params["down"], "tp", None)}
    adapter = jax.tree.map(place, adapter)
    with (jax.set_mesh if hasattr(jax, "set_mesh") else jax.sharding.use_mesh)(mesh):
        _compare(jax.jit(_gradient(model))(params, adapter, place(x, "data")), want)


def manual(case: str) -> None:
    """`jax.shard_map` with tensor parallel products, and with weights that are gathered."""
    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax.sharding import PartitionSpec

    params, adapter, x, want = _setup(case)

    def parallel(x: Any, up: Any, down: Any) -> Any:
        return lax.psum(jnp.tanh(x @ up) @ down, "tp")

    def gathered(x: Any, up: Any, down: Any) -> Any:
        up = lax.all_gather(up, "data", axis=0, tiled=True)
        down = lax.all_gather(down, "data", axis=1, tiled=True)
        return jnp.tanh(x @ up) @ down

    rows, columns = PartitionSpec("data", None), PartitionSpec(None, "data")
    for body, specs in (
        (parallel, (PartitionSpec(None, "tp"), PartitionSpec("tp", None))),
        (gathered, (rows, columns)),
    ):
        mapped = jax.shard_map(body, mesh=_mesh(), in_specs=(rows, *specs), out_specs=rows)
        fun = functools.partial(lambda mapped, p, x: mapped(x, p["up"], p["down"]), mapped)
        _compare(jax.jit(_gradient(fun))(params, adapter, x), want)


MODES: dict[str, Callable[[str], None]] = {
    "automatic": automatic,
    "explicit": explicit,
    "manual": manual,
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, __file__], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", MODES)
def test_sharded(mode: str, variant: str, outcomes: dict[str, str]) -> None:
    assert outcomes[f"{mode} {variant}"] == ""


def _run() -> dict[str, str]:
    found = {}
    for mode, function in MODES.items():
        for variant in VARIANTS:
            try:
                function(variant)
                found[f"{mode} {variant}"] = ""
            except Exception:
                found[f"{mode} {variant}"] = traceback.format_exc()
    return found


if __name__ == "__main__":
    print(json.dumps(_run()))
