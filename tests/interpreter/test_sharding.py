"""Adapted functions on four devices: automatic, explicit and manual shardings.

The number of devices is set before JAX starts, so everything runs in one process of its own; each
test looks at one of its cases.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CASES: dict[str, Callable[[], None]] = {}
ROOT = Path(__file__).parents[2]


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__] = function
    return function


class _Setup:
    """A two-layer network, its adapter, and the gradients of the merged network."""

    def __init__(self) -> None:
        import jax
        import jax.numpy as jnp
        import numpy as np

        import jax_lora as jl

        rng = np.random.default_rng(0)
        self.params = {
            name: jnp.asarray(rng.normal(size=shape) / 4, jnp.float32)
            for name, shape in (("up", (8, 16)), ("down", (16, 8)))
        }
        self.x = jnp.asarray(rng.normal(size=(8, 8)), jnp.float32)
        plan = jl.plan(self.model, self.params, self.x, config=jl.LoraConfig(rank=2))
        fresh = jl.init(jax.random.key(0), self.params, plan)
        self.adapter = jax.tree.map(
            lambda leaf: (
                jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) if leaf.ndim else leaf
            ),
            fresh,
        )
        self.want = jax.jit(jax.value_and_grad(self.dense_loss, argnums=1))(
            self.params, self.adapter, self.x
        )

    @staticmethod
    def model(params: Any, x: Any) -> Any:
        import jax.numpy as jnp

        return jnp.tanh(x @ params["up"]) @ params["down"]

    def dense_loss(self, params: Any, adapter: Any, x: Any) -> Any:
        import jax_lora as jl

        return (self.model(jl.merge(params, adapter), x) ** 2).sum()

    def loss(self, fun: Any) -> Any:
        import jax_lora as jl

        adapted = jl.apply(fun, strict=True)
        return lambda params, adapter, x: (adapted(params, adapter, x) ** 2).sum()

    def check(self, fun: Any, params: Any = None, adapter: Any = None, x: Any = None) -> Any:
        """Value and gradients of the adapted function; returns what was compiled."""
        import jax
        import numpy as np

        args = (
            self.params if params is None else params,
            self.adapter if adapter is None else adapter,
            self.x if x is None else x,
        )
        compiled = jax.jit(jax.value_and_grad(self.loss(fun), argnums=1)).lower(*args).compile()
        got = compiled(*args)
        for found, value in zip(jax.tree.leaves(got), jax.tree.leaves(self.want), strict=True):
            found, value = np.asarray(found), np.asarray(value)
            np.testing.assert_allclose(found, value, rtol=0, atol=2e-5 * np.abs(value).max())
        return compiled

    def placed(self, mesh: Any, specs: dict[str, Any]) -> tuple[Any, Any]:
        """Parameters as ``specs`` say, and the adapter as follows from them."""
        import jax
        from jax.sharding import NamedSharding, PartitionSpec

        import jax_lora as jl

        params = {
            path: jax.device_put(leaf, NamedSharding(mesh, specs[path]))
            for path, leaf in self.params.items()
        }

        def factors(path: str, f: Any) -> Any:
            axes = (*specs[path], *[None] * (2 - len(specs[path])))

            def of(labels: tuple[int, ...]) -> Any:
                return NamedSharding(
                    mesh, PartitionSpec(*[axes[i] if i >= 0 else None for i in labels])
                )

            return jl.LoraFactors(
                jax.device_put(f.a, of(f.layout.a_axes)),
                jax.device_put(f.b, of(f.layout.b_axes)),
                jax.device_put(f.scale, of(())),
                f.layout,
            )

        adapter = jl.Adapter({path: factors(path, f) for path, f in self.adapter.items()})
        return params, adapter


def _mesh(explicit: bool = False) -> Any:
    import jax
    from jax.sharding import AxisType

    kind = AxisType.Explicit if explicit else AxisType.Auto
    return jax.make_mesh((2, 2), ("data", "tp"), axis_types=(kind, kind))


def _automatic(up: tuple[Any, ...], down: tuple[Any, ...], x: tuple[Any, ...]) -> None:
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    setup, mesh = _Setup(), _mesh()
    params, adapter = setup.placed(mesh, {"up": PartitionSpec(*up), "down": PartitionSpec(*down)})
    inputs = jax.device_put(setup.x, NamedSharding(mesh, PartitionSpec(*x)))
    setup.check(setup.model, params, adapter, inputs)


@case
def automatic_data_parallel() -> None:
    _automatic((), (), (("data", "tp"), None))


@case
def automatic_fsdp() -> None:
    _automatic(("data", None), (None, "data"), ("data", None))


@case
def automatic_tensor_parallel() -> None:
    _automatic((None, "tp"), ("tp", None), ("data", None))


@case
def automatic_all() -> None:
    _automatic(("data", "tp"), ("tp", "data"), ("data", None))


@case
def automatic_grouped_convolution() -> None:
    """Of a kernel's own gradient XLA sums too much here, ``dW`` times 2; of ``a`` it must not."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax
    from jax.sharding import NamedSharding, PartitionSpec

    import jax_lora as jl

    def fun(p: Any, x: Any) -> Any:
        numbers = ("NWC", "WIO", "NWC")
        return lax.conv_general_dilated(
            x, p["w"], (1,), "SAME", dimension_numbers=numbers, feature_group_count=2
        )

    mesh, rng = _mesh(), np.random.default_rng(3)
    w, x = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 4, 6), (4, 5, 8)))
    config = jl.LoraConfig(rank=2, targets="w")
    fresh = jl.init(jax.random.key(0), {"w": w}, jl.plan(fun, {"w": w}, x, config=config))
    adapter = jax.tree.map(lambda leaf: leaf + 0.3, fresh)

    def gradient(apply: Any) -> Any:
        return jax.jit(jax.grad(lambda *args: (apply(*args) ** 2).sum()))

    params = jax.device_put({"w": w}, NamedSharding(mesh, PartitionSpec()))
    inputs = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    placed = jax.device_put(adapter, jl.adapter_shardings(adapter, params))
    adapted = jl.apply(fun, strict=True)
    got = gradient(lambda a, p, x: adapted(p, a, x))(placed, params, inputs)
    want = gradient(lambda a, p, x: fun(jl.merge(p, a), x))(adapter, {"w": w}, x)
    for found, value in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        value = np.asarray(value)
        np.testing.assert_allclose(found, value, rtol=0, atol=2e-5 * np.abs(value).max())


def _explicit(up: tuple[Any, ...], down: tuple[Any, ...]) -> None:
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    import jax_lora as jl

    setup, mesh = _Setup(), _mesh(explicit=True)
    params, adapter = setup.placed(mesh, {"up": PartitionSpec(*up), "down": PartitionSpec(*down)})
    inputs = jax.device_put(setup.x, NamedSharding(mesh, PartitionSpec("data", None)))
    by_data = NamedSharding(mesh, PartitionSpec("data", None))

    def model(params: Any, x: Any) -> Any:
        hidden = jnp.tanh(x @ params["up"])
        assert jax.typeof(hidden).sharding.spec[1] == (up[1] if up else None)
        return jnp.einsum("bf,fd->bd", hidden, params["down"], out_sharding=by_data)

    scope = jax.set_mesh if hasattr(jax, "set_mesh") else jax.sharding.use_mesh
    with scope(mesh):
        setup.check(model, params, adapter, inputs)
        # The rank is whole on every device, and the batch is not gathered for it.
        jaxpr = jax.make_jaxpr(jl.apply(model, strict=True))(params, adapter, inputs)
    hidden = [v.aval for e in jaxpr.jaxpr.eqns for v in e.outvars if v.aval.shape == (8, 2)]
    assert hidden
    assert all(tuple(aval.sharding.spec) == ("data", None) for aval in hidden)


@case
def explicit_data_parallel() -> None:
    _explicit((), ())


@case
def explicit_tensor_parallel() -> None:
    _explicit((None, "tp"), ("tp", None))


def _explicit_use(
    fun: Any, plain: Any, shape: tuple[int, ...], spec: tuple[Any, ...], x: Any, by: tuple[Any, ...]
) -> None:
    """``fun(params, x)`` with ``w`` split as ``spec`` and ``x`` as ``by``, beside ``plain``.

    Output and gradients are those of ``plain`` on the merged weight and one device, eagerly too,
    and the output is split as that of ``fun`` without an adapter.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    import jax_lora as jl

    mesh, rng = _mesh(explicit=True), np.random.default_rng(2)
    w = jnp.asarray(rng.normal(size=shape) / 4, jnp.float32)
    plan = jl.plan(plain, {"w": w}, x, config=jl.LoraConfig(rank=2, targets="w"))
    fresh = jl.init(jax.random.key(0), {"w": w}, plan)
    adapter = jax.tree.map(
        lambda leaf: jnp.asarray(0.5 + rng.normal(size=leaf.shape), leaf.dtype), fresh
    )

    def loss(apply: Any) -> Any:
        def fun(adapter: Any) -> Any:
            out = apply(adapter)
            return (out**2).sum(), out

        return jax.jit(jax.grad(fun, has_aux=True))

    want = loss(lambda adapter: plain(jl.merge({"w": w}, adapter), x))(adapter)
    params = {"w": jax.device_put(w, NamedSharding(mesh, PartitionSpec(*spec)))}
    placed = jax.device_put(adapter, jl.adapter_shardings(adapter, params))
    inputs = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*by)))
    adapted = jl.apply(fun, strict=True)
    scope = jax.set_mesh if hasattr(jax, "set_mesh") else jax.sharding.use_mesh
    with scope(mesh):
        assert list(jl.plan(fun, params, inputs, config=plan.config).targets) == ["w"]
        got = loss(lambda adapter: adapted(params, adapter, inputs))(placed)
        eager = adapted(params, placed, inputs)
        types = [jax.eval_shape(f) for f in (lambda: fun(params, inputs), lambda: eager)]
    assert types[0].sharding.spec == types[1].sharding.spec
    for found, value in zip(
        jax.tree.leaves((got, eager)), jax.tree.leaves((want, want[1])), strict=True
    ):
        value = np.asarray(value)
        np.testing.assert_allclose(found, value, rtol=0, atol=2e-5 * np.abs(value).max())


def _auto_axes(fun: Any, out: tuple[Any, ...]) -> Any:
    """``fun`` with its inner shardings left to XLA, and its output split as ``out``."""
    import jax
    from jax.sharding import PartitionSpec

    if hasattr(jax.sharding, "auto_axes"):
        return jax.sharding.auto_axes(fun, out_sharding=PartitionSpec(*out))
    from jax.experimental.shard import auto_axes

    return auto_axes(fun, out_sharding=PartitionSpec(*out))


@case
def explicit_convolution() -> None:
    import inspect

    import jax.numpy as jnp
    import numpy as np
    from jax import lax
    from jax.sharding import PartitionSpec

    def conv(x: Any, w: Any, **options: Any) -> Any:
        numbers = ("NWC", "WIO", "NWC")
        return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=numbers, **options)

    def plain(p: Any, x: Any) -> Any:
        return conv(x, p["w"])

    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 6, 8)), jnp.float32)
    by, shape = ("data",), (3, 8, 4)
    _explicit_use(plain, plain, shape, (), x, by)

    def grouped(p: Any, x: Any) -> Any:
        return conv(x, p["w"], feature_group_count=2)

    _explicit_use(grouped, grouped, (3, 4, 4), (), x, by)
    split = _auto_axes(conv, ("data", None, "tp"))
    for spec in ((None, None, "tp"), (None, "tp", None)):
        _explicit_use(lambda p, x: split(x, p["w"]), plain, shape, spec, x, by)
    if "out_sharding" in inspect.signature(lax.conv_general_dilated).parameters:
        for spec in ((None, None, "tp"), (None, "tp", None)):
            out = PartitionSpec("data", None, spec[2])

            def named(p: Any, x: Any, out: Any = out) -> Any:
                return conv(x, p["w"], out_sharding=out)

            _explicit_use(named, plain, shape, spec, x, by)


@case
def explicit_lookup() -> None:
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import PartitionSpec

    def plain(p: Any, ids: Any) -> Any:
        return p["w"][ids]

    ids = jnp.asarray(np.random.default_rng(1).integers(0, 8, (4, 5)))
    for spec in ((None, None), (None, "tp"), ("tp", None), ("data", None)):
        out = PartitionSpec("data", None, spec[1])

        def named(p: Any, ids: Any, out: Any = out) -> Any:
            return p["w"].at[ids].get(out_sharding=out)

        _explicit_use(named, plain, (8, 6), spec, ids, ("data",))


@case
def explicit_experts() -> None:
    """JAX has ragged products only where shardings are left to XLA."""
    import jax.numpy as jnp
    import numpy as np
    from jax import lax

    def experts(x: Any, w: Any) -> Any:
        return lax.ragged_dot(x, w, jnp.array([3, 1, 4, 0], jnp.int32))

    x = jnp.asarray(np.random.default_rng(1).normal(size=(8, 6)), jnp.float32)
    for spec in ((), (None, None, "tp"), (None, "tp", None), ("tp", None, None)):
        split = _auto_axes(experts, ("data", "tp"))
        _explicit_use(
            lambda p, x, split=split: split(x, p["w"]),
            lambda p, x: experts(x, p["w"]),
            (4, 6, 8),
            spec,
            x,
            ("data", None),
        )


@case
def explicit_fsdp() -> None:
    """A weight that is gathered before its use: its factors are, and their product never is."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    import jax_lora as jl

    if hasattr(jax.sharding, "reshard"):
        from jax.sharding import reshard
    else:
        from jax.experimental.shard import reshard

    def plain(p: Any, x: Any) -> Any:
        return x @ p["w"]

    def gathered(p: Any, x: Any) -> Any:
        return x @ reshard(p["w"], PartitionSpec(None, "tp"))

    x = jnp.asarray(np.random.default_rng(1).normal(size=(8, 6)), jnp.float32)
    spec = ("data", "tp")
    _explicit_use(gathered, plain, (6, 8), spec, x, ("data", None))

    # What is gathered of each factor is the axis that is gathered of the weight, and no other.
    mesh = _mesh(explicit=True)
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    params = {"w": jax.device_put(jnp.ones((6, 8)), sharding)}
    f = jl.LoraFactors(
        jnp.ones((6, 2)), jnp.ones((2, 8)), jnp.ones(()), jl.Layout((6, 8), (0,), (1,))
    )
    adapter = jl.Adapter({"w": f})
    adapter = jax.device_put(adapter, jl.adapter_shardings(adapter, params))
    inputs = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", None)))
    with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else jax.sharding.use_mesh(mesh):
        jaxpr = jax.make_jaxpr(jl.apply(gathered, strict=True))(params, adapter, inputs)
    moved = {
        tuple(v.aval.shape): tuple(v.aval.sharding.spec)
        for eqn in jaxpr.jaxpr.eqns
        for v in eqn.outvars
        if eqn.primitive.name == "reshard"
    }
    assert moved == {(6, 8): (None, "tp"), (6, 2): (None, None), (2, 8): (None, "tp"), (): ()}


def _manual(body: Any, specs: tuple[Any, ...], **options: Any) -> tuple[_Setup, Any]:
    import jax
    from jax.sharding import PartitionSpec

    setup, mesh = _Setup(), _mesh()
    by_data = PartitionSpec("data", None)

    def fun(params: Any, x: Any) -> Any:
        mapped = jax.shard_map(
            body, mesh=mesh, in_specs=(by_data, *specs), out_specs=by_data, **options
        )
        return mapped(x, params["up"], params["down"])

    return setup, fun


@case
def manual_tensor_parallel() -> None:
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec

    specs = PartitionSpec(None, "tp"), PartitionSpec("tp", None)
    for options in ({}, {"check_vma": False}):
        setup, fun = _manual(
            lambda x, up, down: jax.lax.psum(jnp.tanh(x @ up) @ down, "tp"), specs, **options
        )
        setup.check(fun)


@case
def manual_fsdp() -> None:
    """Weights are gathered inside, and so are the factors that hold the axis: never their sum."""
    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax.sharding import PartitionSpec

    import jax_lora as jl

    def body(x: Any, up: Any, down: Any) -> Any:
        up = lax.all_gather(up, "data", axis=0, tiled=True)
        down = lax.all_gather(down, "data", axis=1, tiled=True)
        return jnp.tanh(x @ up) @ down

    setup, fun = _manual(body, (PartitionSpec("data", None), PartitionSpec(None, "data")))
    plan = jl.plan(fun, setup.params, setup.x, config=jl.LoraConfig(rank=2))
    assert {path: t.layout.in_axes for path, t in plan.targets.items()} == {
        "up": (0,),
        "down": (0,),
    }
    setup.check(fun)
    text = str(jax.make_jaxpr(jl.apply(fun, strict=True))(setup.params, setup.adapter, setup.x))
    assert text.count(" all_gather[") == 4  # W, and the one factor that has the axis, of each


@case
def manual_untiled_gather_is_formed() -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax
    from jax.sharding import PartitionSpec

    import jax_lora as jl

    def body(x: Any, up: Any, down: Any) -> Any:
        up = lax.all_gather(up, "data", axis=0).reshape(8, 16)
        return jnp.tanh(x @ up) @ down

    setup, fun = _manual(body, (PartitionSpec("data", None), PartitionSpec()))
    with pytest.raises(jl.MaterializeError, match="up: the adapted weight reaches `all_gather`"):
        jax.eval_shape(jl.apply(fun, strict=True), setup.params, setup.adapter, setup.x)
    got = jax.jit(jl.apply(fun))(setup.params, setup.adapter, setup.x)
    want = setup.model(jl.merge(setup.params, setup.adapter), setup.x)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@case
def a_factor_of_its_own_on_each_device_is_formed_before_gathering() -> None:
    """Inside the user's own shard_map, ``b`` may differ where the rows of W are gathered."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax
    from jax.sharding import PartitionSpec

    import jax_lora as jl

    setup, mesh = _Setup(), _mesh()
    layout = jl.Layout((4, 16), (0,), (1,))
    f = setup.adapter["up"]
    bs = jnp.stack([f.b, -2 * f.b])

    def fun(params: Any, x: Any) -> Any:
        return x @ lax.all_gather(params["w"], "data", axis=0, tiled=True)

    def body(x: Any, w: Any, a: Any, b: Any) -> Any:
        adapter = jl.Adapter({"w": jl.LoraFactors(a, b[0], f.scale, layout)})
        return jl.apply(fun)({"w": w}, adapter, x)

    rows = PartitionSpec("data", None)
    mapped = jax.shard_map(
        body, mesh=mesh, in_specs=(rows, rows, rows, PartitionSpec("data")), out_specs=rows
    )
    got = jax.jit(mapped)(setup.x, setup.params["up"], f.a, bs)
    w, a, s = np.asarray(setup.params["up"]), np.asarray(f.a), float(f.scale)
    deltas = [s * a[4 * k : 4 * k + 4] @ np.asarray(bs[k]) for k in range(2)]
    want = np.asarray(setup.x) @ (w + np.concatenate(deltas))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@case
def manual_convolution_and_lookup() -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax
    from jax.sharding import PartitionSpec

    import jax_lora as jl

    mesh, rng = _mesh(), np.random.default_rng(1)
    params = {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32)
        for name, shape in (("table", (6, 4)), ("conv", (6, 4, 3)), ("experts", (2, 6, 5)))
    }
    ids, sizes = jnp.asarray(rng.integers(0, 6, (4, 7))), jnp.array([5, 2], jnp.int32)

    def body(ids: Any, table: Any, conv: Any, experts: Any) -> Any:
        x = jnp.moveaxis(table[ids], 2, 1)
        x = lax.conv_general_dilated(x, conv, (1,), "SAME")
        rows = jax.vmap(lambda x: x.T, in_axes=0)(x)[0]
        return x.sum(2) @ jnp.ones((6, 1)) + lax.ragged_dot(rows, experts, sizes).sum()

    by_data, whole = PartitionSpec("data"), PartitionSpec()

    def fun(params: Any, ids: Any) -> Any:
        mapped = jax.shard_map(
            body, mesh=mesh, in_specs=(by_data, whole, whole, whole), out_specs=by_data
        )
        return mapped(ids, params["table"], params["conv"], params["experts"])

    config = jl.LoraConfig(rank=2, targets=tuple(params))
    fresh = jl.init(jax.random.key(0), params, jl.plan(fun, params, ids, config=config))
    adapter = jax.tree.map(lambda leaf: leaf + 0.3, fresh)

    def loss(apply: Any) -> Any:
        return jax.jit(jax.value_and_grad(lambda a: (apply(a) ** 2).sum()))(adapter)

    got = loss(lambda a: jl.apply(fun, strict=True)(params, a, ids))
    want = loss(lambda a: fun(jl.merge(params, a), ids))
    for found, value in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        value = np.asarray(value)
        np.testing.assert_allclose(found, value, rtol=0, atol=1e-4 * np.abs(value).max())


@case
def apply_inside_a_shard_map() -> None:
    """Data parallel by hand: gradients of the replicated adapter are summed over the devices."""
    import jax
    import numpy as np
    from jax import lax
    from jax.sharding import PartitionSpec

    setup, mesh = _Setup(), _mesh()
    whole = PartitionSpec()
    loss = setup.loss(setup.model)

    def mapped(params: Any, adapter: Any, x: Any) -> Any:
        return jax.shard_map(
            lambda p, a, x: lax.psum(loss(p, a, x), "data"),
            mesh=mesh,
            in_specs=(whole, whole, PartitionSpec("data")),
            out_specs=whole,
        )(params, adapter, x)

    got = jax.jit(jax.value_and_grad(mapped, argnums=1))(setup.params, setup.adapter, setup.x)
    for found, value in zip(jax.tree.leaves(got), jax.tree.leaves(setup.want), strict=True):
        value = np.asarray(value)
        np.testing.assert_allclose(found, value, rtol=0, atol=2e-5 * np.abs(value).max())


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    environment = {
        **os.environ,
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", __file__],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_on_four_devices(name: str, outcomes: dict[str, str]) -> None:
    assert outcomes[name] == "", outcomes[name]


def test_the_cases_can_fail(outcomes: dict[str, str]) -> None:
    """Negative control: the check sees gradients of another adapter."""
    assert "Not equal to tolerance" in outcomes["negative control"]


def _main() -> None:
    import jax

    assert len(jax.devices()) == 4

    def negative() -> None:
        setup = _Setup()
        setup.check(setup.model, adapter=jax.tree.map(lambda leaf: 1.01 * leaf, setup.adapter))

    found = {}
    for name, function in {**CASES, "negative control": negative}.items():
        try:
            function()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    _main()
