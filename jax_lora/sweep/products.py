"""Products of one array with a stack of others, in the order in which a processor is fast at them.

Where all trials see the same batch, `jax.vmap` makes of the first layer's ``x a`` one product of
``x: [batch, in]`` with a stack ``a: [trials, in, rank]``. XLA reads the first operand of a product
as it lies in memory if what is summed over comes last, and the second if it comes first; it copies
what lies otherwise, here the whole stack, in every step, and its gradient too. So the stack is made
the first operand, and what is kept from step to step is kept with the summed axes last. In the
article's experiment with 16 trials of rank 32 a step takes less than half of the time that it takes
otherwise (see ``benchmarks/sweep.py``).

Neither changes what is computed, but for the order in which a product is summed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_lora.interpreter.core import evaluate_one, is_literal, open_jaxpr

#: The order of an array's axes in memory.
Order = tuple[int, ...]
_JIT = ("jit", "pjit")


class Reordered:
    """A function with stacks as the first operands of its products with what is no stack.

    Args:
        fun: The function.
        *args: Its arguments, or their shapes.

    Attributes:
        orders: For each leaf of the arguments, by the end of its key path, the order of axes in
            which it is best kept; only those for which that is not the order of its own axes.
    """

    def __init__(self, fun: Callable[..., Any], *args: Any):
        self._closed, out = jax.make_jaxpr(fun, return_shape=True)(*args)
        self._treedef = jax.tree.structure(out)
        orders = _orders(self._closed.jaxpr)
        leaves = jax.tree_util.tree_leaves_with_path(args)
        self.orders = {
            path[-2:]: orders[var]
            for (path, _), var in zip(leaves, self._closed.jaxpr.invars, strict=True)
            if var in orders
        }

    def __call__(self, *args: Any) -> Any:
        """The function's outputs."""
        outs = _evaluate(self._closed.jaxpr, self._closed.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(self._treedef, outs)


def arranged(tree: Any, orders: Mapping[Any, Order]) -> Any:
    """The arrays of a tree with their axes in the order in which they are kept.

    An optimizer's state has them in the order of the arrays that it is about.
    """
    return _transposed(tree, orders)


def restored(tree: Any, orders: Mapping[Any, Order]) -> Any:
    """The inverse of `arranged`."""
    inverse = {path: tuple(map(order.index, range(len(order)))) for path, order in orders.items()}
    return _transposed(tree, inverse)


def _transposed(tree: Any, orders: Mapping[Any, Order]) -> Any:
    def transposed(path: Any, leaf: jax.Array) -> jax.Array:
        order = orders.get(path[-2:], ())
        return jnp.transpose(leaf, order) if len(order) == leaf.ndim > 0 else leaf

    return jax.tree_util.tree_map_with_path(transposed, tree)


def _stack_second(eqn: Any) -> bool:
    """Whether an equation is a product whose second operand XLA would have to copy."""
    if eqn.primitive.name != "dot_general" or eqn.params.get("out_sharding") is not None:
        return False
    (_, contracted), (batch, _) = eqn.params["dimension_numbers"]
    x, stacked = (atom.aval for atom in eqn.invars)
    first = tuple(contracted) == tuple(range(len(contracted)))
    free = stacked.ndim - len(contracted)
    return not batch and free > 1 and not first and stacked.size >= x.size


def _stack_first(eqn: Any, x: jax.Array, stacked: jax.Array) -> jax.Array:
    """The same product with the operands exchanged."""
    (of_x, of_stacked), batch = eqn.params["dimension_numbers"]
    precision = eqn.params["precision"]
    out = jax.lax.dot_general(
        stacked,
        x,
        ((of_stacked, of_x), batch),
        precision=precision[::-1] if isinstance(precision, tuple) else precision,
        preferred_element_type=eqn.params["preferred_element_type"],
    )
    free = stacked.ndim - len(of_stacked)
    return jnp.moveaxis(out, range(free), range(out.ndim - free, out.ndim))


def _inner(eqn: Any) -> Any:
    """The jaxpr of a jitted function in which there is something to exchange, or None."""
    if eqn.primitive.name not in _JIT:
        return None
    jaxpr, _ = open_jaxpr(eqn.params["jaxpr"])
    found = any(_stack_second(inner) or _inner(inner) is not None for inner in jaxpr.eqns)
    return jaxpr if found else None


def _orders(jaxpr: Any) -> dict[Any, Order]:
    """For variables of a jaxpr, the order of axes in which they are best kept."""
    orders: dict[Any, Order] = {}
    for eqn in reversed(jaxpr.eqns):
        inner = _inner(eqn)
        if _stack_second(eqn):
            (_, contracted), _ = eqn.params["dimension_numbers"]
            stacked = eqn.invars[1]
            free = [axis for axis in range(stacked.aval.ndim) if axis not in contracted]
            found = {stacked: (*free, *contracted)}
        elif eqn.primitive.name == "convert_element_type" and eqn.outvars[0] in orders:
            found = {eqn.invars[0]: orders[eqn.outvars[0]]}
        elif inner is not None:
            of = _orders(inner)
            pairs = zip(eqn.invars, inner.invars, strict=True)
            found = {outer: of[var] for outer, var in pairs if var in of}
        else:
            continue
        orders |= found
    return orders


def _evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if is_literal(atom) else env[atom]

    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        if _stack_second(eqn):
            outs = [_stack_first(eqn, *values)]
        elif _inner(eqn) is not None:
            outs = _evaluate(*open_jaxpr(eqn.params["jaxpr"]), values)
        else:
            outs = evaluate_one(eqn, values)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]
