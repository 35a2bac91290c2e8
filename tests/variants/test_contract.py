"""What every variant has to keep, on every kind of model, start and base dtype.

A variant enters by being in ``VARIANTS``; beside that it has its formula in `conftest`.

Left out of the product, and why that is sound: the engine sees of a variant the labelled factors, a
gain and keys, never its name, so base dtypes other than float32 are combined with all variants on
one model and not on all of them. Rows need a parameter that is looked up, so they are in the one
model that has a table. Shardings are in `test_sharded`, dropout in `test_dropout`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jax_lora as jl
from jax_lora.adapter import leaves_by_path
from jax_lora.initializers import FROM_WEIGHT
from jax_lora.variants import VARIANTS

# Compiling takes longer than running here.
QUICK = {"xla_backend_optimization_level": 0}

#: Every variant, and its starts from the weight.
CASES = [
    name if init is None else f"{name} {init}"
    for name, variant in VARIANTS.items()
    for init in (None, *(i for i in FROM_WEIGHT if i in variant.INITS))
]


class Model(NamedTuple):
    """A function, the shapes of its parameters, its input, and which of them are matrices."""

    fun: Callable[..., Any]
    shapes: dict[str, tuple[int, ...]]
    x: Any
    matrices: tuple[str, ...]


def _two_layers(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]


def _scanned(p: Any, x: Any) -> Any:
    @jax.checkpoint
    def layer(x: Any, layer: Any) -> Any:
        w, bias = layer
        return jnp.tanh(x @ w.T + bias), None

    return lax.scan(layer, x, (p["layers"], p["bias"]))[0]


def _heads(p: Any, ids: Any) -> Any:
    """Attention-like: heads by einsum, and a table that is also the head."""
    x = p["table"][ids]
    heads = jnp.tanh(jnp.einsum("td,dhk->thk", x, p["qk"]))
    x = x + jnp.einsum("thk,hkd->td", heads, p["out"])
    return x @ p["table"].T


def _convolved(p: Any, x: Any) -> Any:
    options = {"padding": "SAME", "dimension_numbers": ("NWC", "WIO", "NWC")}
    # No tanh: XLA's differs by a unit in the last place with what it is fused with.
    x = jax.nn.relu(lax.conv_general_dilated(x, p["conv"], (2,), **options))
    x = lax.conv_general_dilated(x, p["grouped"], (1,), feature_group_count=2, **options)
    return x.mean(1) @ p["head"]


def _experts(p: Any, x: Any) -> Any:
    """All experts by einsum, then one for each group of rows by a ragged product."""
    hidden = jnp.tanh(jnp.einsum("td,edf->etf", x, p["up"])).sum(0)
    return lax.ragged_dot(hidden, p["down"], jnp.array([1, 0, 4], jnp.int32))


def _numbers(*shape: int) -> Any:
    return np.random.default_rng(shape).normal(size=shape)


MODELS = {
    "two layers": Model(
        _two_layers,
        {"w1": (6, 5), "b1": (5,), "w2": (5, 4), "b2": (4,)},
        _numbers(7, 6),
        ("w1", "w2"),
    ),
    "scan with remat": Model(
        _scanned, {"layers": (3, 6, 6), "bias": (3, 6)}, _numbers(7, 6), ("layers",)
    ),
    "heads and tied table": Model(
        _heads,
        {"table": (11, 6), "qk": (6, 2, 3), "out": (2, 3, 6)},
        np.array([3, 0, 10, 3]),
        ("table", "qk", "out"),
    ),
    "convolutions": Model(
        _convolved,
        {"conv": (3, 4, 6), "grouped": (2, 3, 4), "head": (4, 5)},
        _numbers(2, 8, 4),
        ("conv", "grouped", "head"),
    ),
    "experts": Model(
        _experts, {"up": (3, 6, 5), "down": (3, 5, 4)}, _numbers(5, 6), ("up", "down")
    ),
}


class Setup:
    """Several models as one function, ``fun(params, xs) -> outputs``, each by its name.

    One program for all of them takes much less time to compile than one for each.
    """

    def __init__(self, names: tuple[str, ...], x64: Any, dtype: str = "float32"):
        self.names, self._x64 = names, x64
        rng = np.random.default_rng(3)
        self.params = {
            name: {
                path: jnp.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape[-2:-1])), dtype)
                for path, shape in MODELS[name].shapes.items()
            }
            for name in names
        }
        self.xs = {name: self._input(MODELS[name].x, dtype) for name in names}
        outs = jax.eval_shape(self.fun, self.params, self.xs)
        rng = np.random.default_rng(4)
        self.cotangents = {name: rng.normal(size=outs[name].shape) for name in names}
        self.base = jax.jit(self.fun, compiler_options=QUICK)
        self._gradient64 = jax.jit(
            jax.grad(lambda *args: self.loss(self.fun, *args), has_aux=True), compiler_options=QUICK
        )

    @staticmethod
    def _input(x: Any, dtype: Any) -> Any:
        return jnp.asarray(x, "int32" if np.issubdtype(x.dtype, np.integer) else dtype)

    def fun(self, params: Any, xs: Any) -> Any:
        return {name: MODELS[name].fun(params[name], xs[name]) for name in self.names}

    def loss(self, fun: Any, *args: Any) -> Any:
        """A fixed linear function of all outputs, and the outputs."""
        outs = fun(*args)
        parts = [
            (out * jnp.asarray(self.cotangents[name], out.dtype)).sum()
            for name, out in outs.items()
        ]
        return sum(part.astype("float32") for part in parts[1:]) + parts[0].astype("float32"), outs

    def in_float64(self, params: Any) -> tuple[Any, Any]:
        """The gradients of the loss by path, and the outputs, at ordinary parameters."""
        with self._x64(True):
            xs = {name: self._input(MODELS[name].x, "float64") for name in self.names}
            found = self._gradient64(jax.tree.map(jnp.asarray, params), xs)
            grads, outs = jax.tree.map(np.asarray, found)
        return leaves_by_path(grads), outs

    def settings(self, case: str) -> dict[str, Any]:
        """Those of a configuration that adapts all that the variant can."""
        variant, _, init = case.partition(" ")
        if variant == "rows":
            return {"targets": jl.Rule("**/table", rows=(1, 3, 10))}
        matrices = (f"{name}/{path}" for name in self.names for path in MODELS[name].matrices)
        targets = ("**",) if VARIANTS[variant].WHOLE else tuple(matrices)
        return {"variant": variant, "targets": targets} | ({"init": init} if init else {})


@pytest.fixture(scope="module")
def everything(x64: Any) -> Setup:
    return Setup(tuple(MODELS), x64)


def _close(found: Any, want: Any, tol: float, size: float | None = None, what: str = "") -> None:
    """Within ``tol`` of the largest expected number."""
    size = float(np.abs(want).max()) if size is None else size
    found = np.asarray(found, np.float64)
    np.testing.assert_allclose(found, want, rtol=0, atol=tol * size, err_msg=what)


def _same(found: Any, want: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, want)


def test_every_variant_has_a_formula(formulas: Any) -> None:
    assert set(formulas[0]) == set(formulas[1]) == set(VARIANTS)


@pytest.mark.parametrize("case", CASES)
def test_contract(
    case: str,
    everything: Setup,
    started: Any,
    stirred: Any,
    dense: Any,
    oracle: Any,
    formulas: Any,
) -> None:
    setup, params, xs = everything, everything.params, everything.xs
    before = jax.tree.map(np.array, params)
    fresh = started(setup.fun, params, xs, **setup.settings(case))
    base = setup.base(params, xs)
    adapted = jl.apply(setup.fun, strict=True)
    forward = jax.jit(lambda p, a, xs: adapted(p, a, xs), compiler_options=QUICK)
    optimizer = jl.optim.lora_optimizer(optax.sgd(0.01))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(params: Any, adapter: Any, xs: Any) -> Any:
        def loss(adapter: Any) -> Any:
            return setup.loss(adapted, params, adapter, xs)

        grads, outs = jax.grad(loss, has_aux=True)(adapter)
        updates, _ = optimizer.update(grads, optimizer.init(adapter), adapter)
        return grads, outs, optax.apply_updates(adapter, updates)

    # Identity at the start, bit for bit; what has no gradient there, and that all else has one.
    _same(forward(params, fresh, xs), base)
    grads, _, now = step(params, fresh, xs)
    variant, _, anchored = case.partition(" ")
    still = set() if anchored else formulas[1][variant]
    for path, entry in fresh.items():
        for leaf in entry.trained():
            moves = bool(np.asarray(getattr(grads[path], leaf)).any())
            assert moves == (leaf not in still), f"{path} {leaf}"

    # In three steps every trained leaf moves, and nothing else.
    for _ in range(2):
        _, _, now = step(params, now, xs)
    for path, entry in now.items():
        for leaf, x in entry.arrays().items():
            moved = np.asarray(x) != np.asarray(getattr(fresh[path], leaf))
            assert moved.any() == (leaf in entry.TRAINED), f"{path} {leaf}"

    # Off the start: outputs and gradients are those of the formula in float64.
    adapter = stirred(fresh)
    new, pull = oracle(adapter, params)
    full = jax.tree.unflatten(
        jax.tree.structure(params),
        [new.get(path, np.asarray(x, np.float64)) for path, x in leaves_by_path(params).items()],
    )
    want_grads, want = setup.in_float64(full)
    wanted = pull({path: want_grads[path] for path in adapter})
    grads, outs, _ = step(params, adapter, xs)
    for name in setup.names if variant != "rows" else ["heads and tied table"]:
        _close(outs[name], want[name], 3e-6, what=name)
        change = np.abs(want[name] - np.asarray(base[name])).max()
        assert change > 0.02 * np.abs(want[name]).max(), name  # negative control
    assert jax.tree.structure(grads) == jax.tree.structure(adapter)
    for path, entry in adapter.items():
        for leaf, found in grads[path].arrays().items():
            assert found.dtype == getattr(entry, leaf).dtype
            value = wanted[path][leaf]
            if leaf in entry.TRAINED or leaf == "scale":
                size = max(np.abs(value).max(), np.abs(want_grads[path]).max())
                _close(found, value, 1e-5, size, f"{path} {leaf}")
                assert np.abs(value).max() > 1e-3 * np.abs(want_grads[path]).max(), (path, leaf)
            else:
                assert not np.asarray(found).any(), f"{path} {leaf} is frozen"

    # Merging is applying.
    merged = jax.jit(jl.merge, compiler_options=QUICK)(params, adapter)
    for path, found in leaves_by_path(merged).items():
        _close(found, new.get(path, np.asarray(leaves_by_path(params)[path])), 3e-7, what=path)
    for name, out in setup.base(merged, xs).items():
        _close(outs[name], np.asarray(out, np.float64), 3e-6, what=name)

    # Disabling is exact.
    if all(entry.LINEAR for entry in adapter.values()):
        off = jl.Adapter(
            {p: dataclasses.replace(e, scale=np.float32(0)) for p, e in adapter.items()}
        )
        _same(forward(params, off, xs), base)

    # Whatever was done, the base has its bytes.
    _same(params, before)


#: Half a unit in the last place, relative.
UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float64": 2.0**-53}
#: Starts from the weight meet rounded weights in bfloat16; float16 is cast at the same places.
DTYPES = [(case, "bfloat16") for case in CASES]
DTYPES += [("lora", "float16"), ("dora", "float16")]
DTYPES += [(variant, "float64") for variant in VARIANTS]


@pytest.mark.parametrize(("case", "dtype"), DTYPES)
def test_base_dtypes(
    case: str, dtype: str, x64: Any, started: Any, stirred: Any, oracle: Any
) -> None:
    """The factors are float32 beside a narrow base, and float64 beside float64."""
    with x64(dtype == "float64"):
        setup = Setup(("two layers", "heads and tied table"), x64, dtype)
        params, xs = setup.params, setup.xs
        trained = "float64" if dtype == "float64" else "float32"
        settings = setup.settings(case) | {"dtype": trained}
        fresh = started(setup.fun, params, xs, **settings)
        adapted = jl.apply(setup.fun, strict=True)

        @functools.partial(jax.jit, compiler_options=QUICK)
        def forward(params: Any, adapter: Any, xs: Any) -> Any:
            return adapted(params, adapter, xs), jl.merge(params, adapter)

        base = setup.base(params, xs)
        with jax.disable_jit():  # XLA may sum a product that is scaled afterwards in another order
            _same(adapted(params, fresh, xs), setup.fun(params, xs))
        _same(forward(params, fresh, xs)[1], params)

        adapter = stirred(fresh, size=0.2)
        outs, merged = forward(params, adapter, xs)
        new, _ = oracle(adapter, params)
        before = leaves_by_path(params)
        for path, found in leaves_by_path(merged).items():
            assert found.dtype == before[path].dtype
            if path in adapter:
                # The sum is rounded once; the factors add some of their own roundings.
                size = np.abs(new[path])
                inner = 8 * (2.0**-24 if trained == "float32" else UNIT["float64"])
                bound = UNIT[dtype] * size + inner * (size.max() + 1)
                assert (np.abs(np.asarray(found, np.float64) - new[path]) <= bound).all(), path
        full = jax.tree.unflatten(
            jax.tree.structure(params),
            [new.get(path, np.asarray(x, np.float64)) for path, x in before.items()],
        )
        _, want = setup.in_float64(full)
        for name in setup.names if case != "rows" else ["heads and tied table"]:
            assert outs[name].dtype == dtype
            _close(outs[name], want[name], 8 * UNIT[dtype], what=name)
            change = np.abs(want[name] - np.asarray(base[name], np.float64)).max()
            assert change > 0.05 * np.abs(want[name]).max()  # negative control

        def loss(adapter: Any) -> Any:
            return setup.loss(adapted, params, adapter, xs)[0]

        grads = jax.eval_shape(jax.grad(loss), adapter)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), grads) == jax.tree.map(
            lambda x: (x.shape, x.dtype), adapter
        )


# Ops that hold an array without computing with it.
_READS = {"parameter", "tuple", "get-tuple-element", "bitcast", "copy", "fusion"}


def _ops_of_shape(compiled: Any, shapes: set[tuple[int, ...]]) -> list[str]:
    """The ops of an XLA program whose result has one of these shapes."""
    found = []
    for sizes, op in re.findall(r"= \w+\[([\d,]*)\](?:\{[^}]*\})? ([\w\-]+)\(", compiled.as_text()):
        if tuple(int(n) for n in sizes.split(",") if n) in shapes and op not in _READS:
            found.append(op)
    return found


LOW_RANK = [case for case in CASES if not VARIANTS[case.partition(" ")[0]].WHOLE]


@pytest.mark.parametrize("case", LOW_RANK)
def test_no_weight_is_formed_and_only_what_is_trained_has_state(
    case: str, normal: Any, started: Any, stirred: Any
) -> None:
    """On the compiled training step, with sizes that nothing else has."""
    variant, _, init = case.partition(" ")
    params, x = {"w1": normal(46, 38), "w2": normal(38, 58)}, normal(7, 46)

    def model(p: Any, x: Any) -> Any:
        return jnp.tanh(x @ p["w1"]) @ p["w2"]

    settings = {"variant": variant} | ({"init": init} if init else {})
    adapter = stirred(started(model, params, x, **settings))
    optimizer = jl.optim.lora_optimizer(optax.adam(1e-3))

    def step(fun: Any) -> Any:
        def train(adapter: Any, state: Any, params: Any, x: Any) -> Any:
            grads = jax.grad(lambda a: (fun(params, a, x) ** 2).sum())(adapter)
            with jax.numpy_dtype_promotion("standard"):  # optax leaves it to JAX
                updates, state = optimizer.update(grads, state, adapter)
            return optax.apply_updates(adapter, updates), state

        state = optimizer.init(adapter)
        return state, jax.jit(train).lower(adapter, state, params, x).compile()

    state, compiled = step(jl.apply(model, strict=True))
    weights = {(46, 38), (38, 46), (38, 58), (58, 38)}
    assert _ops_of_shape(compiled, weights) == []
    if case == "lora":  # negative control: the merged model forms both, and their gradients
        _, merged = step(lambda p, a, x: model(jl.merge(p, a), x))
        assert len(_ops_of_shape(merged, weights)) >= 4
    # Two moments of what is trained, and a count.
    sizes = [x.size for x in jax.tree.leaves(state)]
    assert sum(sizes) == 2 * adapter.trainable_params + 1


@pytest.mark.parametrize("case", LOW_RANK)
def test_one_program_for_many_adapters(case: str, normal: Any, started: Any, stirred: Any) -> None:
    """Other values and scales are other arguments; another rank is another program."""
    variant, _, init = case.partition(" ")
    params, x = {"w": normal(6, 4)}, normal(3, 6)

    def model(p: Any, x: Any) -> Any:
        return x @ p["w"]

    settings = {"variant": variant} | ({"init": init} if init else {})
    traces = []

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params: Any, adapter: Any, x: Any) -> Any:
        traces.append(0)
        return jl.apply(model, strict=True)(params, adapter, x)

    fresh = started(model, params, x, **settings)
    adapters = [stirred(fresh, seed=seed) for seed in range(2)]
    adapters.append(jl.Adapter({"w": dataclasses.replace(adapters[1]["w"], scale=jnp.float32(5))}))
    outs = {np.asarray(run(params, adapter, x)).tobytes() for adapter in adapters}
    assert (len(traces), len(outs)) == (1, 3)
    run.trace(params, started(model, params, x, rank=3, **settings), x)
    assert len(traces) == 2  # negative control


@pytest.mark.parametrize("case", [c for c in LOW_RANK if "-" in c or c[:4] in ("lora", "dora")])
def test_rank_padding_changes_neither_output_nor_gradient(
    case: str, normal: Any, started: Any, stirred: Any
) -> None:
    """Of those that keep their kind when resized; the sums may be in another order."""
    variant, _, init = case.partition(" ")
    params, x = {"w": normal(6, 4)}, normal(3, 6)

    def model(p: Any, x: Any) -> Any:
        return x @ p["w"]

    settings = {"variant": variant} | ({"init": init} if init else {})
    adapter = stirred(started(model, params, x, **settings))
    plain = jl.resize(adapter, adapter["w"].a.shape[-1] * (2 if init else 1)).adapter
    larger, errors = jl.resize(adapter, 9)
    assert type(larger["w"]) is type(adapter["w"])
    assert float(errors["w"]) == 0
    adapted = jl.apply(model, strict=True)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(adapter: Any) -> Any:
        def loss(adapter: Any) -> Any:
            out = adapted(params, adapter, x)
            return (out**2).sum(), out

        return jax.grad(loss, has_aux=True)(adapter)

    grads, out = run(plain)
    padded, same = run(larger)
    np.testing.assert_allclose(same, out, rtol=0, atol=1e-6 * np.abs(out).max())
    rank = plain["w"].rank
    for name in plain["w"].TRAINED:
        want, got = np.asarray(getattr(grads["w"], name)), getattr(padded["w"], name)
        got = np.asarray(got)
        kept = {"a": np.s_[..., :rank], "b": np.s_[:rank]}.get(name, np.s_[:])
        np.testing.assert_allclose(got[kept], want, rtol=0, atol=1e-6 * np.abs(want).max())
        assert np.abs(want).max() > 0.1
        if name in "ab":
            rest = {"a": np.s_[..., rank:], "b": np.s_[rank:]}[name]
            assert not got[rest].any()
