"""`apply`: any function of parameters, with the adapter as an argument."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_args

import jax
import numpy as np

from jax_lora.adapter import Adapter, check_fits, leaves_by_path
from jax_lora.errors import ConfigError, expect_callable, near_misses
from jax_lora.interpreter import Interpreter
from jax_lora.rules import Mode

#: What `apply` and `discover` take, in the words of their errors.
FUNCTION = "a function of parameters first, such as model.apply"


def apply(
    fun: Callable[..., Any], *, strict: bool = False, mode: Mode | Mapping[str, Mode] = "factored"
) -> Callable[..., Any]:
    """Make ``fun(params, ...)`` take an adapter: ``adapted(params, adapter, ...)``.

    Each adapted weight acts as ``W + scale * a b`` without being formed: where the function
    contracts it with an input, ``x W + scale (x a) b`` is computed. A weight that meets a primitive
    without a factored rule is formed at that place; `plan` lists those places before anything runs.

    The function is traced on every call, so call the result under `jax.jit`: eager calls are right
    but slow.

    Args:
        fun: A pure function whose first argument is a pytree of parameters, such as Flax's
            ``model.apply``. Its code is not touched.
        strict: Refuse to form any adapted weight that no rule can keep factored.
        mode: What a product with an adapted weight does, for all or by path, such as
            ``plan.modes``: ``"factored"`` never forms the weight where a rule can do without;
            ``"materialize"`` forms it; ``"auto"`` takes what a training step does with fewer
            operations and bytes, counted from the shapes when the function is traced, and
            factored is that unless the rank is large. `plan` says what it decides. In low
            precision ``W + scale * a b`` rounds a small update away, factored does not.

    Returns:
        A function ``(params, adapter, *args, **kwargs)`` with the outputs of ``fun``. It is
        differentiable in every argument, and composes with jit, grad, vmap and scan. Python
        numbers, booleans and other leaves that are not arrays reach ``fun`` as they are.

    Raises:
        AdapterError: From the returned function: an entry of the adapter has no parameter, or one
            of another shape.
        MaterializeError: From the returned function, under ``strict``.
        ConfigError: ``fun`` is no function; an unknown mode, or a mapping with a path that is not
            adapted.

    Example:
        >>> import jax, jax.numpy as jnp, jax_lora as jl
        >>> def model(params, x):
        ...     return x @ params["w"]
        >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
        >>> plan = jl.plan(model, params, x, config=jl.LoraConfig(rank=2))
        >>> adapter = jl.init(jax.random.key(0), params, plan)
        >>> y = jax.jit(jl.apply(model))(params, adapter, x)
        >>> bool((y == model(params, x)).all())  # b = 0: the base model, bit for bit
        True

    References:
        Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.
    """
    expect_callable(FUNCTION, fun)
    _check_mode(mode)

    @functools.wraps(fun)
    def adapted(params: Any, adapter: Adapter, *args: Any, **kwargs: Any) -> Any:
        interpreter = Interpreter(strict=strict, modes=_modes(mode, adapter))
        return interpret(interpreter, fun, params, adapter, args, kwargs)

    # Otherwise jax.jit would count and name the arguments by fun's signature, without the adapter.
    del adapted.__wrapped__
    signature = signature_with(fun, "adapter")
    if signature is not None:
        adapted.__signature__ = signature  # type: ignore[attr-defined]
    return adapted


def _check_mode(mode: Any) -> None:
    known = get_args(Mode)
    for value in mode.values() if isinstance(mode, Mapping) else (mode,):
        if value not in known:
            raise ConfigError(
                f"expected mode to be one of {', '.join(known)}, or one of them by path; got "
                f"{value!r} ({near_misses(str(value), known)})"
            )


def _modes(mode: Any, adapter: Adapter) -> Mapping[str, str]:
    if not isinstance(mode, Mapping):
        return dict.fromkeys(adapter, mode) if isinstance(adapter, Adapter) else {}
    unknown = [f"{path!r} ({near_misses(path, adapter)})" for path in mode if path not in adapter]
    if unknown:
        raise ConfigError(f"expected modes of adapted parameters, got others: {', '.join(unknown)}")
    return mode


def signature_with(fun: Callable[..., Any], *names: str) -> inspect.Signature | None:
    """The signature of ``fun`` with more arguments after the first; None if there is no telling."""
    try:
        signature = inspect.signature(fun)
        first, *others = signature.parameters.values()
        more = [inspect.Parameter(name, first.kind) for name in names]
        return signature.replace(parameters=[first, *more, *others])
    except (TypeError, ValueError):  # no parameters, a builtin, (*args), a clash
        return None


def interpret(
    interpreter: Interpreter,
    fun: Callable[..., Any],
    params: Any,
    adapter: Adapter,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Trace ``fun`` on ordinary values and evaluate it with the adapted weights virtual."""
    check_fits(params, adapter)
    leaves, treedef = jax.tree.flatten(((params, *args), kwargs))
    traced = Traced(fun, leaves, treedef)
    if interpreter.tokens is not None:
        interpreter.tokens.follow(traced.jaxpr, traced.array_leaves)
    # The parameters are the first leaves, in the order of their paths.
    for index, path in enumerate(leaves_by_path(params)):
        if path in adapter:
            leaves[index] = adapter[path].virtual(leaves[index], path)
    outs = interpreter.run(traced.jaxpr, traced.consts, [leaves[i] for i in traced.array_leaves])
    return traced.rebuild([interpreter.materialize(out, "function output") for out in outs])


class Traced:
    """A function traced to a jaxpr over those of its arguments' leaves that are arrays.

    Attributes:
        jaxpr: The jaxpr.
        consts: Its constants.
        array_leaves: The indices of the leaves that are the jaxpr's inputs, in order.
    """

    def __init__(self, fun: Callable[..., Any], leaves: list[Any], treedef: Any):
        self.array_leaves = [i for i, leaf in enumerate(leaves) if is_array(leaf)]

        def flat(*arrays: Any) -> list[Any]:
            filled = list(leaves)
            for i, array in zip(self.array_leaves, arrays, strict=True):
                filled[i] = array
            args, kwargs = jax.tree.unflatten(treedef, filled)
            outs, self._out_treedef = jax.tree.flatten(fun(*args, **kwargs))
            self._static_outs = [None if is_array(out) else (out,) for out in outs]
            return [out for out in outs if is_array(out)]

        closed = jax.make_jaxpr(flat)(*[leaves[i] for i in self.array_leaves])
        self.jaxpr, self.consts = closed.jaxpr, closed.consts

    def rebuild(self, arrays: list[Any]) -> Any:
        """The function's output, from the jaxpr's outputs."""
        rest = iter(arrays)
        outs = [next(rest) if static is None else static[0] for static in self._static_outs]
        return jax.tree.unflatten(self._out_treedef, outs)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is traced: an array, or the shape of one."""
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))
