"""Operations that move a weight's entries around keep it factored, and move the factors alike."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jax_lora as jl
from jax_lora.interpreter import RULES, Interpreter
from jax_lora.interpreter.structural import reshape_groups
from jax_lora.virtual import LoraWeight, virtual_weight

if hasattr(jax, "enable_x64"):
    enable_x64 = jax.enable_x64
else:  # older versions
    from jax.experimental import enable_x64

# Compiling takes longer than running here.
QUICK = {"xla_backend_optimization_level": 0}

LAYOUTS = {
    "matrix": jl.Layout((6, 4), (0,), (1,)),
    "stack": jl.Layout((3, 6, 4), (1,), (2,), (0,)),
    "experts last": jl.Layout((6, 4, 3), (0,), (1,), (2,)),
    "heads": jl.Layout((6, 2, 4), (0,), (1, 2)),
    "heads in": jl.Layout((2, 3, 4), (0, 1), (2,)),
    "interleaved": jl.Layout((2, 4, 3), (0, 2), (1,)),
    "ones": jl.Layout((1, 6, 1, 4, 1), (0, 1), (2, 3, 4)),
}


def _sharding() -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()[:1]), ("d",)), PartitionSpec("d"))


def _term(w: Any) -> Any:
    """A dense array like the weight, that is not one."""
    return jnp.sin(jnp.arange(math.prod(w.shape)).astype(w.dtype)).reshape(w.shape)


# name: (layout, fun(w, i)), where i is a traced index, 1.
FACTORED: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "transpose": ("matrix", lambda w, i: w.T),
    "transpose stack": ("stack", lambda w, i: w.transpose(2, 0, 1)),
    "transpose twice": ("interleaved", lambda w, i: w.transpose(2, 0, 1).transpose(0, 2, 1)),
    "reshape merges out": ("heads", lambda w, i: w.reshape(6, 8)),
    "reshape merges in": ("heads in", lambda w, i: w.reshape(6, 4)),
    "reshape splits in": ("matrix", lambda w, i: w.reshape(2, 3, 4)),
    "reshape splits both": ("matrix", lambda w, i: w.reshape(3, 2, 2, 2)),
    "reshape regroups": ("heads", lambda w, i: w.reshape(3, 2, 4, 2)),
    "reshape adds ones": ("matrix", lambda w, i: w.reshape(1, 6, 1, 4, 1)),
    "reshape drops ones": ("ones", lambda w, i: w.reshape(6, 4)),
    "reshape ones and splits": ("ones", lambda w, i: w.reshape(2, 1, 3, 4)),
    "transpose then merge": ("interleaved", lambda w, i: w.transpose(0, 2, 1).reshape(6, 4)),
    "transpose and merge in one": ("interleaved", lambda w, i: lax.reshape(w, (6, 4), (0, 2, 1))),
    "move layers in one": ("stack", lambda w, i: lax.reshape(w, (6, 4, 3), (1, 2, 0))),
    "squeeze": ("ones", lambda w, i: lax.squeeze(w, (0, 2))),
    "squeeze all": ("ones", lambda w, i: jnp.squeeze(w)),
    "expand_dims": ("matrix", lambda w, i: jnp.expand_dims(w, 1)),
    "expand_dims, transpose": ("matrix", lambda w, i: w[None].transpose(2, 0, 1)),
    "expand and squeeze": ("stack", lambda w, i: jnp.squeeze(w[:, None], 1)),
    "broadcast to new axes": ("matrix", lambda w, i: jnp.broadcast_to(w, (5, 2, 6, 4))),
    "broadcast, merge new axes": (
        "matrix",
        lambda w, i: jnp.broadcast_to(w, (5, 2, 6, 4)).reshape(10, 6, 4),
    ),
    "broadcast, slice": ("matrix", lambda w, i: jnp.broadcast_to(w, (5, 6, 4))[1:3, 2:5, :1]),
    "slice in": ("matrix", lambda w, i: w[1:5]),
    "slice out, strides": ("matrix", lambda w, i: w[:, 1:4:2]),
    # Older versions write w[1:, ::3, 1::2] as a gather with a window, which has to be formed.
    "slice both, strides": ("stack", lambda w, i: lax.slice(w, (1, 0, 1), (3, 6, 4), (1, 3, 2))),
    "static layer": ("stack", lambda w, i: w[1]),
    "one row": ("matrix", lambda w, i: w[2]),
    "dynamic layer": ("stack", lambda w, i: lax.dynamic_index_in_dim(w, i, 0, keepdims=False)),
    "dynamic last expert": ("experts last", lambda w, i: lax.dynamic_index_in_dim(w, i, 2)),
    "dynamic in": ("matrix", lambda w, i: lax.dynamic_slice_in_dim(w, i, 3, 0)),
    "dynamic out": ("matrix", lambda w, i: lax.dynamic_slice_in_dim(w, i, 2, 1)),
    "dynamic all": ("stack", lambda w, i: lax.dynamic_slice(w, (i, i, i), (1, 4, 2))),
    "dynamic, clamped": ("stack", lambda w, i: lax.dynamic_slice_in_dim(w, i + 7, 2, 0)),
    "traced subscript": ("stack", lambda w, i: w[i]),
    "neg": ("matrix", lambda w, i: -w),
    "mul": ("matrix", lambda w, i: w * jnp.asarray(0.3, w.dtype)),
    "mul from the left": ("matrix", lambda w, i: jnp.asarray(-2.5, w.dtype) * w),
    "mul traced": ("matrix", lambda w, i: (i + 2).astype(w.dtype) * w),
    "div": ("matrix", lambda w, i: w / jnp.asarray(3.0, w.dtype)),
    "div, neg, mul": ("matrix", lambda w, i: -(w / (i + 3).astype(w.dtype)) * 0.5),
    "stop_gradient": ("matrix", lambda w, i: lax.stop_gradient(w)),
    "barrier": ("matrix", lambda w, i: lax.optimization_barrier((w, i))[0]),
    "copy": ("matrix", lambda w, i: jnp.copy(w)),
    "name": ("matrix", lambda w, i: checkpoint_name(w, "weight")),
    "sharding": ("matrix", lambda w, i: lax.with_sharding_constraint(w, _sharding())),
    "split in": ("matrix", lambda w, i: jnp.split(w, 3)[1]),
    "split out": ("matrix", lambda w, i: jnp.split(w, [1, 3], axis=1)[1]),
    "split stack": ("stack", lambda w, i: jnp.split(w, 3)[2]),
    "split, then a layer": ("stack", lambda w, i: jnp.split(w, 2, axis=1)[1][i]),
    "reverse in": ("matrix", lambda w, i: w[::-1]),
    "reverse all": ("stack", lambda w, i: w[::-1, ::-1, ::-1]),
    "reverse interleaved": ("interleaved", lambda w, i: w[:, ::-1, ::-1]),
    "add a term": ("matrix", lambda w, i: w + _term(w)),
    "a term added to": ("matrix", lambda w, i: _term(w) + w),
    "add a number": ("matrix", lambda w, i: w + jnp.asarray(1.0, w.dtype)),
    "subtracted from a row": ("stack", lambda w, i: _term(w)[:, :1] - w),
    "subtract a term": ("matrix", lambda w, i: w - _term(w)),
    "subtracted from a term": ("matrix", lambda w, i: _term(w) - w),
    "residual of a stack": ("stack", lambda w, i: -(_term(w) - w)[i] + _term(w)[i]),
    "nothing": ("matrix", lambda w, i: w),
    "empty slice": ("matrix", lambda w, i: w[:, 2:2]),
    "rounded": ("matrix", lambda w, i: lax.reduce_precision(w, 11, 52)),
    "optimised away cast": ("matrix", lambda w, i: w.astype(w.dtype)),
}

# What has to be formed: the primitive that does it, the layout, and fun.
FORMED: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "reshape across in and out": ("reshape", "matrix", lambda w: w.reshape(24)),
    "reshape stack into in": ("reshape", "stack", lambda w: w.reshape(18, 4)),
    "reshape with two roles in a group": ("reshape", "matrix", lambda w: w.reshape(8, 3)),
    "broadcast of a size-1 axis": (
        "broadcast_in_dim",
        "ones",
        lambda w: lax.broadcast_in_dim(w, (1, 6, 2, 4, 1), range(5)),
    ),
    "mul by a vector": ("mul", "matrix", lambda w: w * jnp.arange(1.0, 5.0).astype(w.dtype)),
    "mul by itself": ("mul", "matrix", lambda w: w * w),
    "div by a vector": ("div", "matrix", lambda w: w / jnp.arange(1.0, 5.0).astype(w.dtype)),
    "div of a number": ("div", "matrix", lambda w: jnp.asarray(1.0, w.dtype) / w),
    "convert to integers": ("convert_element_type", "matrix", lambda w: w.astype(jnp.int32)),
    "sin": ("sin", "matrix", jnp.sin),
    "add of itself": ("add", "matrix", lambda w: w + w),
    "sub of itself": ("sub", "stack", lambda w: w - w[:1]),
    "concatenate": ("concatenate", "matrix", lambda w: jnp.concatenate([w, w])),
    "sort": ("sort", "matrix", lambda w: jnp.sort(w, axis=0)),
    "cumulative sum": ("cumsum", "matrix", lambda w: jnp.cumsum(w, axis=1)),
    "sum": ("reduce_sum", "matrix", lambda w: w.sum(0)),
    "pad": ("pad", "matrix", lambda w: jnp.pad(w, 1)),
}


@pytest.fixture(scope="module")
def weights(filled: Any, normal: Any) -> dict[str, LoraWeight]:
    def weight(name: str) -> LoraWeight:
        layout = LAYOUTS[name]
        zeros = jl.LoraFactors(
            jnp.zeros(layout.a_shape(2)), jnp.zeros(layout.b_shape(2)), jnp.float32(1), layout
        )
        factors = filled(jl.Adapter({name: zeros}), seed=3)[name]
        return virtual_weight(normal(*layout.shape), factors, name)

    return {name: weight(name) for name in LAYOUTS}


def _interpret(fun: Any, weight: LoraWeight, *rest: Any, strict: bool = True) -> Any:
    jaxpr = jax.make_jaxpr(fun)(weight.w, *rest)
    (out,) = Interpreter(strict=strict).run(jaxpr.jaxpr, jaxpr.consts, [weight, *rest])
    return out


def _dense(weights: dict[str, LoraWeight], delta64: Any, name: str) -> np.ndarray:
    w = weights[name]
    return np.asarray(w.w, np.float64) + delta64(jl.LoraFactors(w.a, w.b, w.scale, LAYOUTS[name]))


@pytest.fixture(scope="module")
def results(weights: Any, delta64: Any) -> tuple[Any, Any, Any]:
    """For every factored case: formed, through a product, and the gradients; in one compilation."""

    def probe(name: str, weight: LoraWeight, i: Any) -> Any:
        out = _interpret(FACTORED[name][1], weight, i)
        assert isinstance(out, LoraWeight), f"{name} was formed"
        assert out.shape == tuple(out.w.shape)
        size = math.prod(out.shape)
        cotangent = jnp.cos(jnp.arange(size, dtype=jnp.float32)).reshape(out.shape)
        product = _interpret(lambda w: jnp.tensordot(w, cotangent, w.ndim), out)
        return product, out.materialize()

    @functools.partial(jax.jit, compiler_options=QUICK)
    def everything(weights: Any, i: Any) -> Any:
        found = {}
        for name, (layout, _) in FACTORED.items():
            found[name] = jax.value_and_grad(lambda w, n=name: probe(n, w, i), has_aux=True)(
                weights[layout]
            )
        return found

    dense = {name: _dense(weights, delta64, name) for name in LAYOUTS}
    with enable_x64(True):

        @functools.partial(jax.jit, compiler_options=QUICK)
        def oracle(dense: Any, i: Any) -> Any:
            found = {}
            for name, (layout, fun) in FACTORED.items():

                def loss(w: Any, fun: Any = fun) -> Any:
                    out = fun(w, i)
                    weight = jnp.cos(jnp.arange(out.size, dtype=jnp.float64)).reshape(out.shape)
                    return (out * weight).sum(), out

                found[name] = jax.value_and_grad(loss, has_aux=True)(dense[layout])
            return found

        want = jax.tree.map(np.asarray, oracle(dense, np.int32(1)))
    return everything(weights, jnp.int32(1)), want, dense


@pytest.mark.parametrize("name", FACTORED)
def test_stays_factored(name: str, results: Any, weights: Any) -> None:
    got, want, dense = results
    layout_name = FACTORED[name][0]
    ((product, formed), grads), ((want_product, want_formed), want_grad) = got[name], want[name]
    size = max(np.abs(dense[layout_name]).max(), 1)
    np.testing.assert_allclose(formed, want_formed, rtol=0, atol=2e-6 * size)
    np.testing.assert_allclose(product, want_product, rtol=0, atol=2e-5 * size)
    # dW of the dense weight pushed through W + s a b gives those of the factors.
    w = weights[layout_name]
    a, b, s = (np.asarray(v, np.float64) for v in (w.a, w.b, w.scale))
    letters = {
        axes: "".join("z" if i < 0 else "abcdef"[i] for i in axes)
        for axes in (w.a_axes, w.b_axes, tuple(range(w.ndim)))
    }
    of_a, of_b, of_w = letters[w.a_axes], letters[w.b_axes], letters[tuple(range(w.ndim))]
    for found, value in (
        (grads.w, want_grad),
        (grads.a, s * np.einsum(f"{of_w},{of_b}->{of_a}", want_grad, b)),
        (grads.b, s * np.einsum(f"{of_w},{of_a}->{of_b}", want_grad, a)),
        (grads.scale, np.einsum(f"{of_w},{of_a},{of_b}->", want_grad, a, b)),
    ):
        np.testing.assert_allclose(found, value, rtol=0, atol=2e-5 * max(np.abs(value).max(), 1))
    if name == "stop_gradient":
        assert not np.asarray(grads.b).any()
    elif name != "empty slice":
        assert np.asarray(grads.b).any()
        assert np.asarray(grads.a).any()


@pytest.mark.parametrize("name", FORMED)
def test_what_no_rule_covers_is_formed_there(name: str, weights: Any, delta64: Any) -> None:
    primitive, layout, fun = FORMED[name]
    with pytest.raises(jl.MaterializeError) as error:
        _interpret(fun, weights[layout])
    # The path, the primitive and the shape, in one message.
    assert f"{layout}: " in str(error.value)
    assert f"`{primitive}`" in str(error.value)
    assert str(LAYOUTS[layout].shape) in str(error.value)
    out = _interpret(fun, weights[layout], strict=False)
    assert not isinstance(out, LoraWeight)
    dense = weights[layout].materialize()
    np.testing.assert_allclose(dense, _dense(weights, delta64, layout), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(out, fun(dense))


@pytest.mark.parametrize("narrow", [jnp.bfloat16, jnp.float16])
def test_a_cast_rounds_the_weight_and_not_the_factors(narrow: Any, weights: Any) -> None:
    weight = weights["matrix"]
    out = _interpret(lambda w: w.astype(narrow), weight)
    assert isinstance(out, LoraWeight)
    assert out.dtype == narrow
    np.testing.assert_array_equal(out.w, weight.w.astype(narrow))
    assert out.a is weight.a
    assert out.b is weight.b
    # The sum is rounded once: not W to the narrow type, then dW, then the sum.
    wide = (weight.w.astype(narrow).astype(jnp.float32) + weight.delta()).astype(narrow)
    formed = out.materialize()
    assert formed.dtype == narrow
    np.testing.assert_array_equal(formed, wide)


def _random_program(rng: np.random.Generator, shape: tuple[int, ...]) -> list[Any]:
    """Between one and five structural operations that fit the shape one after the other."""
    program: list[Any] = []
    for _ in range(rng.integers(1, 6)):
        kind = rng.choice(["transpose", "split", "merge", "ones", "slice"])
        k, new = int(rng.integers(0, len(shape))), list(shape)
        if kind == "transpose":
            order = tuple(int(i) for i in rng.permutation(len(shape)))
            program.append(lambda w, o=order: w.transpose(o))
            new = [shape[i] for i in order]
        elif kind == "slice":
            cut = tuple(slice(int(rng.integers(0, n)), n) for n in shape)
            program.append(lambda w, c=cut: w[c])
            new = [c.stop - c.start for c in cut]
        else:
            if kind == "ones":
                new.insert(k, 1)
            elif kind == "merge" and k + 1 < len(shape):
                new[k : k + 2] = [shape[k] * shape[k + 1]]
            elif kind == "split" and shape[k] % 2 == 0:
                new[k : k + 1] = [2, shape[k] // 2]
            program.append(lambda w, n=tuple(new): w.reshape(n))
        shape = tuple(new)
    return program


def test_random_programs(weights: Any, delta64: Any) -> None:
    """Chains of operations, formed at the end or where one mixes axes of both factors."""
    rng = np.random.default_rng(11)
    names = [str(rng.choice(list(LAYOUTS))) for _ in range(60)]
    programs = [_random_program(rng, LAYOUTS[name].shape) for name in names]
    factored = []

    @functools.partial(jax.jit, compiler_options=QUICK)
    def interpreted(weights: Any) -> list[Any]:
        outs = []
        for name, program in zip(names, programs, strict=True):
            out = weights[name]
            for fun in program:
                out = (
                    _interpret(fun, out, strict=False) if isinstance(out, LoraWeight) else fun(out)
                )
            factored.append(isinstance(out, LoraWeight))
            outs.append(out.materialize() if factored[-1] else out)
        return outs

    for name, program, out in zip(names, programs, interpreted(weights), strict=True):
        want = _dense(weights, delta64, name)
        for fun in program:
            want = fun(want)
        np.testing.assert_allclose(out, want, rtol=0, atol=1e-5)
    assert 30 < sum(factored) < 60  # both kinds occur


@pytest.mark.parametrize(
    ("old", "new", "groups"),
    [
        ((6, 4), (6, 4), [((0,), (0,)), ((1,), (1,))]),
        ((6, 4), (24,), [((0, 1), (0,))]),
        ((24,), (2, 3, 4), [((0,), (0, 1, 2))]),
        ((6, 4), (8, 3), [((0, 1), (0, 1))]),
        ((6, 2, 2), (3, 2, 4), [((0,), (0, 1)), ((1, 2), (2,))]),
        ((1, 6), (6, 1), [((0,), ()), ((1,), (0,)), ((), (1,))]),
        ((), (1,), [((), (0,))]),
        ((1, 1), (), [((0,), ()), ((1,), ())]),
    ],
)
def test_reshape_groups(old: Any, new: Any, groups: Any) -> None:
    assert reshape_groups(old, new) == groups


def test_reshape_groups_partition_both_sides() -> None:
    rng = np.random.default_rng(5)

    def shape(primes: list[int]) -> tuple[int, ...]:
        sizes, pool = [], list(primes)
        while pool:
            taken = int(rng.integers(0, len(pool) + 1))
            sizes.append(math.prod(pool[:taken]))
            pool = pool[taken:]
        return tuple(sizes)

    for _ in range(200):
        primes = [int(p) for p in rng.choice([2, 3, 5], size=rng.integers(1, 6))]
        old, new = shape(primes), shape(primes)
        groups = reshape_groups(old, new)
        assert [i for left, _ in groups for i in left] == list(range(len(old)))
        assert [j for _, right in groups for j in right] == list(range(len(new)))
        for left, right in groups:
            assert math.prod(old[i] for i in left) == math.prod(new[j] for j in right)


def test_every_rule_is_exercised_here_or_in_control() -> None:
    """A rule under a name that no JAX primitive has would be dead code."""
    jaxprs = [
        jax.make_jaxpr(fun)(jnp.zeros(LAYOUTS[layout].shape), jnp.int32(1))
        for layout, fun in FACTORED.values()
    ]
    met = {eqn.primitive.name for jaxpr in jaxprs for eqn in jaxpr.eqns}
    structural = {name for name, rule in RULES.items() if rule.__module__.endswith("structural")}
    aliases = {"copy_p", "stop_gradient"}  # of other versions of JAX
    # Inside shard_map, and with explicit shardings: test_sharding.py.
    elsewhere = {"all_gather", "pvary", "pcast", "reshard", "mesh_cast"}
    gradients = {"add_any"}  # a weight is never its operand in a function's own jaxpr
    assert structural - met <= aliases | elsewhere | gradients | {"copy"}
