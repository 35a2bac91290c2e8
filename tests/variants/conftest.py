"""The papers' formulas in float64, and what every test of a variant needs."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.adapter import leaves_by_path

if hasattr(jax, "enable_x64"):
    _enable_x64 = jax.enable_x64
else:  # older versions
    from jax.experimental import enable_x64 as _enable_x64

# Compiling takes longer than running here.
QUICK = {"xla_backend_optimization_level": 0}
Arrays = dict[str, Any]


def _lora(w: Any, e: Arrays, rows: Any) -> Any:
    start = e["a0"] @ e["b0"] if "a0" in e else 0.0
    return w + e["scale"] * (e["a"] @ e["b"] - start)


def _dora(w: Any, e: Arrays, rows: Any) -> Any:
    new = _lora(w, e, rows)
    return e["magnitude"] * new / jax.lax.stop_gradient(jnp.linalg.norm(new, axis=0))


def _vera(w: Any, e: Arrays, rows: Any) -> Any:
    return w + e["scale"] * e["a"] @ jnp.diag(e["d"]) @ e["b"] @ jnp.diag(e["g"])


def _loha(w: Any, e: Arrays, rows: Any) -> Any:
    return w + e["scale"] * (e["a1"] @ e["b1"]) * (e["a2"] @ e["b2"])


def _lokr(w: Any, e: Arrays, rows: Any) -> Any:
    return w + e["scale"] * jnp.kron(e["c"], e["a"] @ e["b"])


def _full(w: Any, e: Arrays, rows: Any) -> Any:
    return e["value"]


def _rows(w: Any, e: Arrays, rows: Any) -> Any:
    return w.at[np.array(rows)].set(e["value"])


#: ``W'`` from a matrix ``W: [in, out]`` and the arrays of its entry, as the papers write it.
FORMULAS: dict[str, Callable[[Any, Arrays, Any], Any]] = {
    "lora": _lora,
    "lora-fa": _lora,
    "dora": _dora,
    "vera": _vera,
    "loha": _loha,
    "lokr": _lokr,
    "full": _full,
    "rows": _rows,
}
#: The arrays whose gradient is zero at the start, as the others' product with them is.
STILL = {
    "lora": {"a"},
    "lora-fa": set(),
    "dora": {"a"},
    "vera": {"d"},
    "loha": {"a1", "b1", "a2"},
    "lokr": {"c", "a"},
    "full": set(),
    "rows": set(),
}
#: Axes beside the stack of each array in the formula: vectors have one, matrices two.
_VECTORS = ("magnitude", "base_norm", "d", "g")


def _matrix_form(name: str, array: Any, layout: jl.Layout) -> Any:
    """An array of an entry as ``[stack, ...]`` of the vectors or matrices of the formula."""
    if name == "scale":
        return array
    count = int(np.prod(layout.stack, dtype=int))
    if name in _VECTORS:
        return array.reshape(count, -1)
    if name in ("b", "b0", "b1", "b2", "value"):
        return array.reshape(count, array.shape[len(layout.stack)], -1)
    if name == "c":
        return array.reshape(count, *array.shape[-2:])
    return array.reshape(count, -1, array.shape[-1])


def formula(entry: Any, w: Any, arrays: Arrays) -> Any:
    """``W'`` of an entry with these arrays in the place of its own, matrix by matrix."""
    fun = FORMULAS[entry.NAME]
    if entry.NAME == "full":
        return fun(w, arrays, None)
    layout = entry.layout
    order = (*layout.stack_axes, *layout.in_axes, *layout.out_axes)
    count = int(np.prod(layout.stack, dtype=int))
    turned = jnp.transpose(w, order)
    matrices = turned.reshape(count, layout.fan_in, layout.fan_out)
    parts = {name: _matrix_form(name, x, layout) for name, x in arrays.items()}
    new = [
        fun(
            matrices[k],
            {n: x if n == "scale" else x[k] for n, x in parts.items()},
            getattr(entry, "rows", None),
        )
        for k in range(count)
    ]
    return jnp.transpose(jnp.stack(new).reshape(turned.shape), np.argsort(order))


def _wide(tree: Any) -> Any:
    def widen(leaf: Any) -> Any:
        leaf = np.asarray(leaf)
        return leaf.astype(np.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(widen, tree)


@pytest.fixture(scope="session")
def formulas() -> Any:
    """The formulas by the name of the variant, and what has no gradient at the start."""
    return FORMULAS, STILL


@pytest.fixture(scope="session")
def wide() -> Callable[[Any], Any]:
    """All floating-point leaves in float64, by numpy."""
    return _wide


@pytest.fixture(scope="session")
def x64() -> Any:
    """The context in which JAX computes in float64."""
    return _enable_x64


@pytest.fixture(scope="session")
def oracle() -> Callable[[jl.Adapter, Any], tuple[Any, Callable[[Any], Any]]]:
    """By the formulas in float64: ``(W' by path, gradients of the arrays from those of W')``."""

    def of(adapter: jl.Adapter, params: Any) -> tuple[Any, Callable[[Any], Any]]:
        leaves = leaves_by_path(params)
        weights = _wide({path: leaves[path] for path in adapter})
        arrays = _wide({path: entry.arrays() for path, entry in adapter.items()})

        def new(arrays: Any, weights: Any) -> Any:
            return {p: formula(entry, weights[p], arrays[p]) for p, entry in adapter.items()}

        def pull(gradients: Any) -> Any:
            def back(arrays: Any, weights: Any, gradients: Any) -> Any:
                return jax.vjp(lambda arrays: new(arrays, weights), arrays)[1](gradients)[0]

            with _enable_x64(True):
                run = jax.jit(back, compiler_options=QUICK)
                return jax.tree.map(np.asarray, run(arrays, weights, gradients))

        with _enable_x64(True):
            run = jax.jit(new, compiler_options=QUICK)
            return jax.tree.map(np.asarray, run(arrays, weights)), pull

    return of


@pytest.fixture(scope="session")
def stirred() -> Callable[..., jl.Adapter]:
    """An adapter whose trained arrays are all off their start, by normal numbers."""

    def stir(adapter: jl.Adapter, size: float = 0.3, seed: int = 0) -> jl.Adapter:
        def one(path: str, entry: Any) -> Any:
            new = {}
            for name, x in entry.trained().items():
                rng = np.random.default_rng([seed, zlib.crc32(f"{path} {name}".encode())])
                step = size * rng.normal(size=x.shape)
                new[name] = jnp.asarray(np.asarray(x, np.float64) + step, x.dtype)
            return dataclasses.replace(entry, **new)

        return jl.Adapter({path: one(path, entry) for path, entry in adapter.items()})

    return stir


@pytest.fixture(scope="session")
def started() -> Callable[..., jl.Adapter]:
    """A fresh adapter of rank 2: ``started(fun, params, *args, targets="w", variant="dora")``."""

    def start(fun: Any, params: Any, *args: Any, seed: int = 0, **settings: Any) -> jl.Adapter:
        config = jl.LoraConfig(**{"rank": 2, "alpha": 3.0, **settings})
        plan = jl.plan(fun, params, *args, config=config)
        init = lambda params: jl.init(jax.random.key(seed), params, plan)  # noqa: E731
        return jax.jit(init, compiler_options=QUICK)(params)

    return start


@pytest.fixture(scope="session")
def dense(oracle: Any) -> Callable[[Any, jl.Adapter], Any]:
    """The adapted parameters in float64, by the formulas."""

    def all_of(params: Any, adapter: jl.Adapter) -> Any:
        new = oracle(adapter, params)[0]

        def pick(key_path: Any, leaf: Any) -> Any:
            path = jax.tree_util.keystr(key_path, simple=True, separator="/")
            return new.get(path, leaf)

        return jax.tree_util.tree_map_with_path(pick, _wide(params))

    return all_of
