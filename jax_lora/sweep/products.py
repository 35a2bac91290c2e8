"""Products of one array with a stack of others, in the order in which a processor is fast at them.

Where all trials see the same batch, `jax.vmap` makes of the first layer's ``x a`` one product of
``x: [batch, in]`` with a stack ``a: [trials, in, rank]``. XLA's products on a CPU read the first
operand as it lies in memory if what is summed over comes last, and copy it otherwise, which here is
the whole stack in every step, and its gradient too. So the stack is made the first operand, and is
kept from step to step with the summed axes last. In the article's experiment with 16 trials of rank
32 it makes a step take about two thirds of its time (``vmap`` against ``same`` in
``benchmarks/sweep.py``); neither of the two alone does.

What is computed stays the same, but for the order in which a product is summed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from jax_lora.interpreter.core import evaluate_one, is_literal, open_jaxpr

#: The order of an array's axes in memory.
Order = tuple[int, ...]
_JIT = ("jit", "pjit")


class Reordered:
    """A function with stacks as the first operands of its products with what is no stack.

    What is in a loop or a branch of the function stays as it is.

    Args:
        fun: The function.
        *args: Its arguments, or their shapes.

    Attributes:
        orders: For each leaf of the arguments, by the end of its key path, the order of axes in
            which it is best kept; only those for which that is not the order of its own axes.
    """

    def __init__(self, fun: Callable[..., Any], *args: Any):
        leaves = jax.tree_util.tree_leaves_with_path(args)
        closed, out = jax.make_jaxpr(fun, return_shape=True)(*args)
        exchanged = functools.partial(_evaluate, closed.jaxpr, closed.consts)
        self._closed = jax.make_jaxpr(exchanged)(*(leaf for _, leaf in leaves))
        self._treedef = jax.tree.structure(out)
        orders = _orders(self._closed.jaxpr)
        variables = zip(leaves, self._closed.jaxpr.invars, strict=True)
        self.orders = {path[-2:]: orders[var] for (path, _), var in variables if var in orders}

    def __call__(self, *args: Any) -> Any:
        """The function's outputs."""
        jaxpr, consts = self._closed.jaxpr, self._closed.consts
        outs = jax.core.eval_jaxpr(jaxpr, consts, *jax.tree.leaves(args))
        return jax.tree.unflatten(self._treedef, outs)


def arranged(tree: Any, orders: Mapping[Any, Order]) -> Any:
    """The arrays of a tree with their axes in the order in which they are kept.

    An optimizer's state has them in the order of the arrays that it is about.
    """

    def transposed(path: Any, leaf: jax.Array) -> jax.Array:
        order = orders.get(path[-2:], ())
        return jnp.transpose(leaf, order) if len(order) == leaf.ndim > 0 else leaf

    return jax.tree_util.tree_map_with_path(transposed, tree)


def restored(tree: Any, orders: Mapping[Any, Order]) -> Any:
    """The inverse of `arranged`."""
    return arranged(
        tree, {path: tuple(map(order.index, range(len(order)))) for path, order in orders.items()}
    )


def _evaluate(jaxpr: Any, consts: Sequence[Any], *args: Any) -> list[Any]:
    """The outputs of a jaxpr with operands exchanged, and what it jits in line."""
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if is_literal(atom) else env[atom]

    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        if eqn.primitive.name in _JIT:
            outs = _evaluate(*open_jaxpr(eqn.params["jaxpr"]), *values)
        elif _copies_its_stack(eqn):
            outs = [_stack_first(eqn, *values)]
        else:
            outs = evaluate_one(eqn, values)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _copies_its_stack(eqn: Any) -> bool:
    """Whether an equation is a product whose second operand is a stack that XLA would copy."""
    if eqn.primitive.name != "dot_general" or eqn.params.get("out_sharding") is not None:
        return False
    (_, contracted), (batch, _) = eqn.params["dimension_numbers"]
    x, stack = (atom.aval for atom in eqn.invars)
    summed_first = tuple(contracted) == tuple(range(len(contracted)))
    is_stack = stack.ndim - len(contracted) > 1 and stack.size >= x.size
    return not batch and is_stack and not summed_first


def _stack_first(eqn: Any, x: jax.Array, stack: jax.Array) -> jax.Array:
    """The same product with the operands exchanged."""
    (of_x, of_stack), batch = eqn.params["dimension_numbers"]
    precision = eqn.params["precision"]
    out = jax.lax.dot_general(
        stack,
        x,
        ((of_stack, of_x), batch),
        precision=precision[::-1] if isinstance(precision, tuple) else precision,
        preferred_element_type=eqn.params["preferred_element_type"],
    )
    free = stack.ndim - len(of_stack)
    return jnp.moveaxis(out, range(free), range(out.ndim - free, out.ndim))


def _orders(jaxpr: Any) -> dict[Any, Order]:
    """For variables of a jaxpr without jits, the order of axes in which they are best kept."""
    orders: dict[Any, Order] = {}
    for eqn in reversed(jaxpr.eqns):
        if eqn.primitive.name == "convert_element_type" and eqn.outvars[0] in orders:
            orders[eqn.invars[0]] = orders[eqn.outvars[0]]
        elif eqn.primitive.name == "dot_general":
            (summed, _), (batch, _) = eqn.params["dimension_numbers"]
            stack = eqn.invars[0]
            free = tuple(axis for axis in range(stack.aval.ndim) if axis not in summed)
            order = (*free, *summed)
            if not batch and len(free) > 1 and order != tuple(sorted(order)):
                orders[stack] = order
    return orders
