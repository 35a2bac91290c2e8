"""What all tests share: strict dtypes, and a float64 dense oracle."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl

if hasattr(jax, "enable_x64"):
    _enable_x64 = jax.enable_x64
else:  # older versions
    from jax.experimental import enable_x64 as _enable_x64


def pytest_report_header() -> str:
    packages = ("jax", "jaxlib", "numpy", "flax", "optax", "orbax-checkpoint")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


# Compiling takes longer than running here.
QUICK = {"xla_backend_optimization_level": 0}


_COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: _COMPILED.append(name) if "backend_compile" in name else None
)


@pytest.fixture(scope="session")
def compiled_programs() -> Callable[[], int]:
    """How many programs XLA has compiled in this process so far, those of single operations too."""
    return lambda: len(_COMPILED)


@pytest.fixture(autouse=True)
def _strict_dtypes() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"):
        yield


def _letters(axes: tuple[int, ...]) -> str:
    return "".join("z" if axis == -1 else "abcdefgh"[axis] for axis in axes)


def _delta64(factors: jl.LoraFactors) -> np.ndarray:
    layout = factors.layout
    a, b = np.asarray(factors.a, np.float64), np.asarray(factors.b, np.float64)
    spec_a = _letters((*layout.stack_axes, *layout.in_axes, -1))
    spec_b = _letters((*layout.stack_axes, -1, *layout.out_axes))
    out = _letters(tuple(range(len(layout.shape))))
    return float(factors.scale) * np.einsum(f"{spec_a},{spec_b}->{out}", a, b)


def _wide(tree: Any) -> Any:
    """All floating-point leaves in float64."""

    def widen(leaf: Any) -> Any:
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating):
            return np.asarray(leaf).astype(np.float64)
        return leaf

    return jax.tree.map(widen, tree)


def _not_numpy(leaf: Any) -> Any:
    """A numpy array as JAX's: numpy's own cannot be indexed by a tracer."""
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf


def _dense64(params: Any, adapter: jl.Adapter) -> Any:
    def add(key_path: Any, leaf: Any) -> Any:
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        return leaf + _delta64(adapter[path]) if path in adapter else leaf

    return jax.tree_util.tree_map_with_path(add, _wide(params))


@pytest.fixture(scope="session")
def delta64() -> Callable[[jl.LoraFactors], np.ndarray]:
    """``scale * a b`` of one entry, in float64 by numpy."""
    return _delta64


@pytest.fixture(scope="session")
def dense64() -> Callable[[Any, jl.Adapter], Any]:
    """``W + scale * a b`` for a tree, in float64 by numpy."""
    return _dense64


@pytest.fixture(scope="session")
def entry() -> Callable[..., jl.LoraFactors]:
    """One entry with normal ``a`` and ``b``: ``entry(layout, rank=3, seed=1, scale=0.7)``."""

    def make(
        layout: jl.Layout, rank: int = 2, seed: int = 0, scale: float = 0.7, dtype: Any = "float32"
    ) -> jl.LoraFactors:
        rng = np.random.default_rng([seed, rank, *layout.shape])
        a = jnp.asarray(rng.normal(size=layout.a_shape(rank)), dtype)
        b = jnp.asarray(rng.normal(size=layout.b_shape(rank)), dtype)
        return jl.LoraFactors(a, b, jnp.float32(scale), layout)

    return make


@pytest.fixture(scope="session")
def filled() -> Callable[..., jl.Adapter]:
    """An adapter with random ``b`` and a scale of its own, so that it changes its model."""

    def fill(adapter: jl.Adapter, seed: int = 0, scale: float = 0.7) -> jl.Adapter:
        rng = np.random.default_rng(seed)

        def one(f: jl.LoraFactors) -> jl.LoraFactors:
            a = jnp.asarray(rng.normal(size=f.a.shape), f.a.dtype)
            b = jnp.asarray(rng.normal(size=f.b.shape), f.b.dtype)
            return dataclasses.replace(f, a=a, b=b, scale=jnp.float32(scale))

        return jl.Adapter({path: one(f) for path, f in adapter.items()})

    return fill


@pytest.fixture(scope="session")
def planned(filled: Callable[..., jl.Adapter]) -> Callable[..., jl.Adapter]:
    """An adapter of rank 2 for all that a function uses as a matrix, with random ``b``."""

    def adapter(fun: Any, params: Any, *args: Any, rank: int = 2, seed: int = 0) -> jl.Adapter:
        plan = jl.plan(fun, params, *args, config=jl.LoraConfig(rank=rank))
        fresh = jax.eval_shape(lambda: jl.init(jax.random.key(seed), params, plan))
        return filled(fresh, seed)

    return adapter


@pytest.fixture(scope="session")
def float64() -> Callable[..., Any]:
    """``float64(fun, *trees)``: what a function makes of the trees in float64, as numpy arrays."""

    def run(fun: Callable[..., Any], *trees: Any) -> Any:
        with _enable_x64(True):
            wide = jax.tree.map(_not_numpy, _wide(trees))
            out = jax.jit(fun, compiler_options=QUICK)(*wide)
            return jax.tree.map(np.asarray, out)

    return run


@pytest.fixture(scope="session")
def normal() -> Callable[..., jax.Array]:
    """Reproducible normal float32 numbers: ``normal(4, 3)`` has the shape ``[4, 3]``."""

    def draw(*shape: int, seed: int = 1) -> jax.Array:
        return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)

    return draw


# An instruction of compiled HLO, "%name = f32[6,5]{1,0} add(..."; a tuple's type lists arrays.
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(", re.MULTILINE)
_FLOATS = re.compile(r"\b(?:f|bf)\d\w*\[([\d,]*)\]")
# What names, moves or casts a value that is there. The parts of a fusion, a call or a loop are
# listed by themselves.
_PASSIVE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "fusion", "call", "while"),
    *("conditional", "bitcast", "copy", "copy-start", "copy-done", "transpose", "reshape"),
    *("slice", "dynamic-slice", "reverse", "convert", "opt-barrier"),
}


def _weight_ops(program: Any, layouts: Iterable[jl.Layout]) -> Counter[str]:
    sizes = set()
    for layout in layouts:
        one = math.prod(layout.shape[i] for i in (*layout.in_axes, *layout.out_axes))
        sizes |= {one, math.prod(layout.shape)}
    found: Counter[str] = Counter()
    for kind, op in _INSTRUCTION.findall(program.as_text()):
        for dims in _FLOATS.findall(kind):
            size = math.prod(int(n) for n in dims.split(",") if n)
            if size in sizes and op not in _PASSIVE:
                found[f"{op}[{dims}]"] += 1
    return found


@pytest.fixture(scope="session")
def weight_ops() -> Callable[[Any, Iterable[jl.Layout]], Counter[str]]:
    """``weight_ops(program, layouts)``: what a compiled program computes of a weight's size.

    Counted are the instructions of the optimised HLO that make floating-point numbers, as many as
    a weight has, or one matrix of its stack. The shape does not matter, since XLA computes the
    gradient of a ``[8, 2, 4]`` as ``[8, 8]``; so the models' other sizes have to differ. What only
    moves or casts a weight is not counted.
    """
    return _weight_ops


@pytest.fixture(scope="session")
def check_dense() -> Callable[..., Any]:
    """Compare `apply` with the dense float64 model: outputs, and gradients of ``a, b, scale``.

    Returns what XLA made of the adapted program.
    """

    def check(
        fun: Callable[..., Any],
        params: Any,
        adapter: jl.Adapter,
        *args: Any,
        strict: bool = True,
        tol: float = 2e-6,
        grad: bool = True,
    ) -> Any:
        rng = np.random.default_rng(7)
        shape = jax.eval_shape(fun, params, *args).shape
        cotangent = rng.normal(size=shape)
        adapted = jl.apply(fun, strict=strict)

        # The base is an argument, as a constant it would be folded; what is no array stays as is.
        leaves, treedef = jax.tree.flatten((params, args))
        arrays = {k: leaf for k, leaf in enumerate(leaves) if hasattr(leaf, "shape")}

        def loss(adapter: jl.Adapter, arrays: Any) -> tuple[jax.Array, jax.Array]:
            filled = [arrays.get(k, leaf) for k, leaf in enumerate(leaves)]
            params, args = jax.tree.unflatten(treedef, filled)
            out = adapted(params, adapter, *args)
            return (out * jnp.asarray(cotangent, out.dtype)).sum(), out

        def dense_loss(dense: Any) -> tuple[jax.Array, jax.Array]:
            out = fun(dense, *jax.tree.map(_not_numpy, _wide(args)))
            return (out.astype(jnp.float64) * cotangent).sum(), out

        def compiled(loss: Any) -> Any:
            fun = jax.grad(loss, has_aux=True) if grad else lambda *args: (None, loss(*args)[1])
            return jax.jit(fun, compiler_options=QUICK)

        program = compiled(loss).lower(adapter, arrays).compile()
        got_grad, got = program(adapter, arrays)
        with _enable_x64(True):
            run = compiled(dense_loss)
            _, base = run(_wide(params))
            dense_grad, want = run(_dense64(params, adapter))
            base, want = np.asarray(base, np.float64), np.asarray(want, np.float64)
        size = np.abs(want).max()
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=tol * size)
        # The adapter has to matter, or everything above holds without it.
        assert np.abs(want - base).max() > max(10 * tol, 0.02) * size
        if not grad:
            return program
        by_path = {
            jax.tree_util.keystr(key_path, simple=True, separator="/"): np.asarray(leaf)
            for key_path, leaf in jax.tree_util.tree_leaves_with_path(dense_grad)
        }
        for path, f in adapter.items():
            # Closed form: with G = dL/dW, dA = s G B^T, dB = s A^T G, ds = <G, A B>.
            layout, s = f.layout, float(f.scale)
            a, b, g = (np.asarray(v, np.float64) for v in (f.a, f.b, by_path[path]))
            in_w = _letters(tuple(range(len(layout.shape))))
            in_a, in_b = _letters(layout.a_axes), _letters(layout.b_axes)
            wanted = {
                "a": s * np.einsum(f"{in_w},{in_b}->{in_a}", g, b),
                "b": s * np.einsum(f"{in_a},{in_w}->{in_b}", a, g),
                "scale": np.sum(g * _delta64(f)) / s,
            }
            for name, value in wanted.items():
                atol = 5 * tol * max(np.abs(value).max(), np.abs(g).max())
                found = np.asarray(getattr(got_grad[path], name), np.float64)
                np.testing.assert_allclose(
                    found, value, rtol=0, atol=atol, err_msg=f"{path} {name}"
                )
            assert np.abs(wanted["b"]).max() > 0
        return program

    return check
