"""Any contraction, after any chain of structural operations, is that of the dense weight."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_lora as jl
from jax_lora.interpreter import Interpreter
from jax_lora.virtual import virtual_weight

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

QUICK = {"xla_backend_optimization_level": 0}
# Each example is a program of its own, so what takes time is to compile it.
SETTINGS = hypothesis.settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


@st.composite
def _layouts(draw: Any) -> jl.Layout:
    """A weight of 2 to 4 axes, each of which is in, out or stack."""
    ndim = draw(st.integers(2, 4))
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=ndim, max_size=ndim)))
    order = draw(st.permutations(range(ndim)))
    inputs = draw(st.integers(1, ndim - 1))
    outputs = draw(st.integers(1, ndim - inputs))
    return jl.Layout(
        shape,
        tuple(order[:inputs]),
        tuple(order[inputs : inputs + outputs]),
        tuple(order[inputs + outputs :]),
    )


@st.composite
def _steps(draw: Any, shape: tuple[int, ...]) -> tuple[list[tuple[Any, ...]], tuple[int, ...]]:
    """Up to four structural operations in sequence, and the shape that they lead to."""
    steps: list[tuple[Any, ...]] = []
    for kind in draw(
        st.lists(
            st.sampled_from(["transpose", "split", "merge", "new", "cut", "flip", "scale", "add"]),
            max_size=4,
        )
    ):
        axis = draw(st.integers(0, len(shape) - 1))
        if kind == "transpose":
            order = tuple(draw(st.permutations(range(len(shape)))))
            steps.append((kind, order))
            shape = tuple(shape[i] for i in order)
        elif kind == "split" and shape[axis] % 2 == 0 and len(shape) < 6:
            shape = (*shape[:axis], 2, shape[axis] // 2, *shape[axis + 1 :])
            steps.append(("reshape", shape))
        elif kind == "merge" and axis + 1 < len(shape):
            shape = (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
            steps.append(("reshape", shape))
        elif kind == "new" and len(shape) < 6:
            shape = (*shape[:axis], 1, *shape[axis:])
            steps.append(("reshape", shape))
        elif kind == "cut":
            start = draw(st.integers(0, shape[axis] - 1))
            steps.append((kind, axis, start))
            shape = (*shape[:axis], shape[axis] - start, *shape[axis + 1 :])
        elif kind == "flip":
            steps.append((kind, axis))
        elif kind in ("scale", "add"):
            steps.append((kind,))
    return steps, shape


def _run(steps: list[tuple[Any, ...]], w: Any) -> Any:
    for kind, *rest in steps:
        if kind == "transpose":
            w = w.transpose(*rest[0])
        elif kind == "reshape":
            w = w.reshape(rest[0])
        elif kind == "cut":
            w = lax.slice_in_dim(w, rest[1], w.shape[rest[0]], axis=rest[0])
        elif kind == "flip":
            w = lax.rev(w, (rest[0],))
        elif kind == "scale":
            w = w * jnp.asarray(-0.5, w.dtype)
        else:
            term = np.cos(np.arange(np.prod(w.shape))).reshape(w.shape)
            w = jnp.asarray(term, w.dtype) - w
    return w


@st.composite
def _cases(draw: Any) -> tuple[Any, ...]:
    layout = draw(_layouts())
    steps, shape = draw(_steps(layout.shape))
    roles = draw(st.lists(st.sampled_from("cbf"), min_size=len(shape), max_size=len(shape)))
    contract = [i for i, role in enumerate(roles) if role == "c"]
    batch = [i for i, role in enumerate(roles) if role == "b"]
    # The other operand has the contracted and batched axes in some order, and up to two of its own.
    own = draw(st.integers(0, 2))
    places = draw(st.permutations(range(len(contract) + len(batch) + own)))
    sizes = [shape[i] for i in (*contract, *batch)] + [3, 2][:own]
    x_shape = [0] * len(sizes)
    for place, size in zip(places, sizes, strict=True):
        x_shape[place] = size
    pairs = list(zip((*contract, *batch), places, strict=False))
    of_contract, of_batch = pairs[: len(contract)], pairs[len(contract) :]
    of_contract, of_batch = draw(st.permutations(of_contract)), draw(st.permutations(of_batch))
    left = draw(st.booleans())  # is the weight on the left?
    numbers = tuple(
        tuple(tuple(pair[k if left else 1 - k] for pair in group) for k in range(2))
        for group in (of_contract, of_batch)
    )
    dtype = draw(st.sampled_from(["float32", "float32", "bfloat16"]))
    rank = draw(st.integers(1, 3))
    return layout, steps, tuple(x_shape), numbers, left, dtype, rank, draw(st.integers(0, 99))


@hypothesis.given(case=_cases())
@SETTINGS
def test_contractions_after_structural_operations(case: tuple[Any, ...]) -> None:
    """With the operations as they are, the weight is factored or formed, and right either way.

    In float32 the output and the gradients are within rounding of float64. In bf16 each operation
    rounds to 8 bits; there the bound is on the sum of the magnitudes that enter, not on the sum.
    """
    layout, steps, x_shape, numbers, left, dtype, rank, seed = case
    rng = np.random.default_rng(seed)
    w, a, b, x = (
        rng.normal(size=size)
        for size in (layout.shape, layout.a_shape(rank), layout.b_shape(rank), x_shape)
    )
    w, x = (jnp.asarray(v, dtype) for v in (w, x))
    a, b = (jnp.asarray(v, jnp.float32) for v in (a, b))
    factors = jl.LoraFactors(a, b, jnp.float32(0.5), layout)

    def fun(w: Any, x: Any) -> Any:
        moved = _run(steps, w)
        return lax.dot_general(*((moved, x) if left else (x, moved)), numbers)

    with jax.numpy_dtype_promotion("standard"):
        jaxpr = jax.make_jaxpr(fun)(w, x)

        cotangent = rng.normal(size=jaxpr.out_avals[0].shape)

        def adapted(factors: Any, w: Any, x: Any) -> Any:
            weight = virtual_weight(w, factors, "w")
            (out,) = Interpreter().run(jaxpr.jaxpr, jaxpr.consts, [weight, x])
            return (out.astype(jnp.float32) * jnp.asarray(cotangent, jnp.float32)).sum(), out

        run = jax.jit(jax.grad(adapted, has_aux=True), compiler_options=QUICK)
        grad, out = run(factors, w, x)

        def delta64(a: Any, b: Any) -> Any:
            letter = dict(enumerate("ijkl")) | {-1: "r"}
            spec = ["".join(letter[i] for i in axes) for axes in (layout.a_axes, layout.b_axes)]
            return np.einsum(f"{','.join(spec)}->{'ijkl'[: len(layout.shape)]}", a, b)

        got = np.asarray(out).astype(np.float64)
        w64, x64, a64, b64 = (np.asarray(v).astype(np.float64) for v in (w, x, a, b))
        want = _dot64(_run64(steps, w64 + 0.5 * delta64(a64, b64)), x64, numbers, left)
        assert got.shape == want.shape
        magnitude = _dot64(
            np.abs(_run64(steps, np.abs(w64), bound=True))
            + np.abs(_run64(steps, 0.5 * delta64(np.abs(a64), np.abs(b64)), bound=True)),
            np.abs(x64),
            numbers,
            left,
        )
        roundings = 8 + len(steps)
        eps = float(jnp.finfo(dtype).eps)
        assert (np.abs(got - want) <= roundings * eps * magnitude + 1e-30).all()
        if dtype != "float32":
            return
        # b enters linearly: <dL/db, b> is the loss without what does not depend on b.
        zero = _dot64(_run64(steps, w64), x64, numbers, left)
        linear = ((want - zero) * cotangent).sum()
        size = float((magnitude * np.abs(cotangent)).sum()) + 1e-30
        for part in ("a", "b", "scale"):
            found = np.vdot(np.asarray(getattr(grad, part), np.float64), getattr(factors, part))
            assert abs(found - linear) <= 40 * eps * size


def _run64(steps: list[tuple[Any, ...]], w: np.ndarray, *, bound: bool = False) -> np.ndarray:
    """The operations in numpy; with ``bound``, what bounds the magnitude of every entry."""
    for kind, *rest in steps:
        if kind == "transpose":
            w = w.transpose(*rest[0])
        elif kind == "reshape":
            w = w.reshape(rest[0])
        elif kind == "cut":
            w = w[(slice(None),) * rest[0] + (slice(rest[1], None),)]
        elif kind == "flip":
            w = np.flip(w, rest[0])
        elif kind == "scale":
            w = 0.5 * w if bound else -0.5 * w
        else:
            term = np.cos(np.arange(w.size)).reshape(w.shape)
            w = np.abs(term) + w if bound else term - w
    return w


def _dot64(w: np.ndarray, x: np.ndarray, numbers: Any, left: bool) -> np.ndarray:
    """`dot_general` by einsum: batch axes, then the left's own, then the right's."""
    lhs, rhs = (w, x) if left else (x, w)
    names = iter("abcdefghijklmnopqrstuvwxyz")
    of_lhs = [next(names) for _ in lhs.shape]
    of_rhs = [""] * rhs.ndim
    for group in numbers:
        for i, j in zip(*group, strict=True):
            of_rhs[j] = of_lhs[i]
    of_rhs = [known or next(names) for known in of_rhs]
    (lc, rc), (lb, rb) = numbers
    out = [of_lhs[i] for i in lb]
    out += [n for i, n in enumerate(of_lhs) if i not in (*lc, *lb)]
    out += [n for j, n in enumerate(of_rhs) if j not in (*rc, *rb)]
    return np.einsum(f"{''.join(of_lhs)},{''.join(of_rhs)}->{''.join(out)}", lhs, rhs)
