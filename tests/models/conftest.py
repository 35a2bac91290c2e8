"""One check for every model of every framework: sites, identity, outputs and gradients."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.adapter import leaves_by_path

# Compiling takes longer than running here.
QUICK = {"xla_backend_optimization_level": 0}


@pytest.fixture(autouse=True)
def _strict_dtypes() -> Iterator[None]:
    """Frameworks promote dtypes as they like, so here promotion is the usual one."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def check_model(filled: Any, check_dense: Any, weight_ops: Any) -> Callable[..., jl.Adapter]:
    """Adapt all that has a layout and check it against the dense float64 model.

    ``sites`` is the stated expectation: for every weight that is adapted, the primitives at which
    it is formed, none of them if it stays factored. Model and adapter have to agree in

    - the sites, and the refusal of strict mode exactly where a weight is formed;
    - identity at the start, bit for bit, for every output. If XLA is known to compile the products
      of both in different orders (not ``exact``): rounding apart compiled, bit for bit op by op;
    - the output that ``pick`` returns, and its gradients with respect to ``a``, ``b``, ``scale``;
    - for factored models, what the compiled gradient computes of a weight's size: nothing, apart
      from what the model itself does with a weight on its way to the gradient of its inputs.
    """

    def check(
        fun: Callable[..., Any],
        params: Any,
        *args: Any,
        sites: dict[str, tuple[str, ...]],
        pick: Callable[[Any], Any] = lambda out: out,
        rank: int = 2,
        scale: float = 0.3,
        tol: float = 1e-5,
        grad: bool = True,
        exact: bool = True,
    ) -> jl.Adapter:
        leaves = leaves_by_path(params)
        uses = jl.discover(fun, params, *args)
        targets = tuple(
            path
            for path, found in uses.items()
            if any(use.layout(tuple(leaves[path].shape)) for use in found)
        )
        plan = jl.plan(fun, params, *args, config=jl.LoraConfig(rank=rank, targets=targets))
        assert {path: target.materialized for path, target in plan.targets.items()} == sites
        strict = not any(sites.values())
        fresh = jl.init(jax.random.key(0), params, plan)

        # Each compiled by itself: in one program XLA would share what they have in common.
        run = jax.jit(lambda params, args: fun(params, *args), compiler_options=QUICK)
        base = run(params, args)
        adapted = jl.apply(fun, strict=strict)
        run = jax.jit(lambda params, args: adapted(params, fresh, *args), compiler_options=QUICK)
        outs = run(params, args)
        for got, want in zip(jax.tree.leaves(outs), jax.tree.leaves(base), strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=0 if exact else 1e-5)
        if not exact:
            with jax.disable_jit():
                outs, base = adapted(params, fresh, *args), fun(params, *args)
            for got, want in zip(jax.tree.leaves(outs), jax.tree.leaves(base), strict=True):
                np.testing.assert_array_equal(got, want)
        if not strict:
            with pytest.raises(jl.MaterializeError):
                jax.eval_shape(jl.apply(fun, strict=True), params, fresh, *args)
        adapter = filled(fresh, scale=scale)
        program = check_dense(
            lambda *args: pick(fun(*args)),
            params,
            adapter,
            *args,
            strict=strict,
            tol=tol,
            grad=grad,
        )
        if strict and grad:
            check_counts(program, fun, params, adapter, args, pick)
        return adapter

    def check_counts(
        program: Any, fun: Any, params: Any, adapter: jl.Adapter, args: Any, pick: Any
    ) -> None:
        layouts = [f.layout for f in adapter.values()]

        def count(loss: Any, *args: Any) -> Counter[str]:
            run = jax.jit(jax.grad(loss, allow_int=True), compiler_options=QUICK)
            return weight_ops(run.lower(*args).compile(), layouts)

        found = weight_ops(program, layouts)
        if found:
            inputs = lambda args, params: (pick(jax.jit(fun)(params, *args)) ** 2).sum()  # noqa: E731
            found -= count(inputs, args, params)
        assert not found

        def in_weight_space(adapter: jl.Adapter, params: Any, args: Any) -> jax.Array:
            return (pick(jax.jit(fun)(jl.merge(params, adapter), *args)) ** 2).sum()

        # Negative control: W + scale * a b, and the gradient of each W.
        formed = count(in_weight_space, adapter, params, args)
        assert formed.total() >= 2 * len(adapter)

    return check


@pytest.fixture(scope="session")
def drawn() -> Callable[[Any], Any]:
    """Random parameters for a tree of shapes, without compiling the model's own initialisation."""

    def draw(shapes: Any) -> Any:
        rng = np.random.default_rng(5)

        def one(key_path: Any, leaf: Any) -> Any:
            if not hasattr(leaf, "shape") or not jnp.issubdtype(leaf.dtype, jnp.floating):
                return leaf
            if jax.tree_util.keystr(key_path[-1:], simple=True) == "var":
                return jnp.ones(leaf.shape, leaf.dtype)
            fan_in = max(math.prod(leaf.shape[:-1]), 1)
            values = rng.normal(size=leaf.shape) / np.sqrt(fan_in)
            return jnp.asarray(values + (leaf.ndim == 1), leaf.dtype)

        return jax.tree_util.tree_map_with_path(one, shapes)

    return draw


@pytest.fixture(scope="session")
def factored() -> Callable[..., dict[str, tuple[str, ...]]]:
    """The expectation that these paths are adapted and factored."""
    return lambda *paths: dict.fromkeys(paths, ())
