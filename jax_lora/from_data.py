"""Starts from data: from the inputs of each adapted weight (EVA), or its gradient (LoRA-GA).

Both need singular vectors of a matrix that is never formed: of all inputs of a weight, one below
the other, or of the gradient of the whole weight. Differentiating the adapted function gives its
products with thin matrices, for every weight at once and through whatever the function does with
it (scans, checkpoints, convolutions, experts); subspace iteration (Halko et al. 2011,
arXiv:0909.4061) makes singular vectors of them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_lora.adapter import Adapter, Layout, leaves_by_path, param_key
from jax_lora.errors import ConfigError, TargetError, expect_type
from jax_lora.interpreter import Interpreter
from jax_lora.linalg import eigh, qr, svd
from jax_lora.lowrank import pad, product, working_dtype
from jax_lora.plan import Plan, init
from jax_lora.selection import Target
from jax_lora.transform import interpret
from jax_lora.variants import LoraFactors
from jax_lora.virtual import LoraWeight

_Arrays = dict[str, jax.Array]


def init_eva(
    key: jax.Array,
    fun: Callable[..., Any],
    params: Any,
    plan: Plan,
    batches: Iterable[Any],
    *,
    rho: float = 1.0,
    passes: int = 8,
    oversample: int = 8,
) -> Adapter:
    r"""A fresh adapter whose ``a`` spans the largest part of its weight's inputs.

    With ``X = U S V^T`` all inputs of a weight, one row for each: ``a = V[:, :r]``, the first right
    singular vectors, and ``b = 0``. The inputs are not centred. Those of a convolution are its
    patches, and each matrix of a stack has the inputs of its own layer or expert. Nothing of ``X``
    is kept: each pass over the batches computes ``X^T X Q`` with the ``Q`` of the pass before.

    With ``rho`` above 1 the ranks are redistributed. Of each weight the first ``rho * r`` singular
    values are candidates; those that explain the largest share of the variance of their weight's
    inputs, ``s_j^2 / |X|^2``, are taken until the sum of all ranks is that of the plan. The
    matrices of a stack share a rank, and the mean of their shares. A weight that is left with none
    is not in the adapter. Scales stay those of the plan.

    Entries of kinds without ``a`` and ``b`` (VeRA, LoHa, LoKr, whole values, rows) start as in
    `init`; ``a`` and ``b`` start as said here whatever the plan's ``init`` is.

    Only inputs that matter for the outputs count: ``fun`` is differentiated, so it cannot hold a
    ``while_loop``, and what is behind ``stop_gradient`` or an integer is not seen. Matrix products
    run in the dtype of ``fun``; in float32, singular values below ``1e-3`` of the first are noise.

    Args:
        key: A JAX PRNG key. It fixes the result up to the sign of each column.
        fun: The function that the plan was made for.
        params: Its parameters.
        plan: The plan.
        batches: The data: for each batch the arguments of ``fun`` after ``params``, as a tuple, or
            the only one as it is. They are gone through ``passes`` times.
        rho: How much larger than planned a rank may become, at least 1.
        passes: Passes over the batches, at least 2. The error of a direction falls with
            ``(s_m / s_j)^2`` in each, where m is r plus ``oversample``; a few batches need few.
        oversample: How many directions more than the rank are followed.

    Returns:
        The adapter, with which the adapted function is the base function.

    Raises:
        AdapterError: The parameters are not those of the plan.
        ConfigError: An argument that cannot mean anything.
        TargetError: Weights that no product gives inputs to: looked-up embeddings, whose inputs
            are row numbers; weights that are always formed; inputs that are all zero.

    Example:
        >>> import jax, jax.numpy as jnp, jax_lora as jl
        >>> model = lambda params, x: x @ params["w"]
        >>> params, x = {"w": jnp.ones((3, 2))}, jnp.array([[0., 4., 0.], [0., 0., 2.]])
        >>> plan = jl.plan(model, params, x, config=jl.LoraConfig(rank=1))
        >>> adapter = jl.init_eva(jax.random.key(0), model, params, plan, [x])
        >>> print(jnp.abs(adapter["w"].a[:, 0]).round(3))
        [0. 1. 0.]

    References:
        Paischer et al. 2024, One Initialization to Rule them All: Fine-tuning via Explained
        Variance Adaptation, arXiv:2410.07170.
    """
    if not rho >= 1:
        raise ConfigError(f"expected rho to be at least 1, got {rho!r}")
    fresh, targets = _fresh(key, params, plan)
    batches = _kept(batches)
    counts = {path: math.ceil(rho * target.rank) for path, target in targets.items()}
    layouts = {path: target.settings.matrix for path, target in targets.items()}
    found = principal_inputs(key, fun, params, layouts, counts, batches, passes, oversample)
    ranks = {path: target.rank for path, target in targets.items()}
    if rho > 1:
        energies = input_energies(fun, params, layouts, batches)
        ranks = _redistributed(targets, found, energies)

    entries = dict(fresh)
    for path, rank in ranks.items():
        entry, layout = entries.pop(path), layouts[path]
        if not rank:
            continue
        # Beyond as many columns as there are inputs, random ones.
        v = found[path].directions[..., :rank]
        more = entry.a.reshape(*layout.stack, layout.fan_in, -1)[..., v.shape[-1] : rank]
        a = jnp.concatenate([v.astype(entry.a.dtype), more], axis=-1)
        b = jnp.zeros(layout.b_shape(rank), entry.b.dtype)
        entries[path] = dataclasses.replace(entry, a=a.reshape(layout.a_shape(rank)), b=b)
    return Adapter(entries)


class PrincipalInputs(NamedTuple):
    """The first right singular vectors of a weight's inputs ``X``, for each matrix of its stack.

    Attributes:
        directions: ``[*stack, in, k]``, orthonormal columns.
        singular_values: ``[*stack, k]``, falling.
    """

    directions: jax.Array
    singular_values: jax.Array


def principal_inputs(
    key: jax.Array,
    fun: Callable[..., Any],
    params: Any,
    layouts: Mapping[str, Layout],
    counts: Mapping[str, int],
    batches: Iterable[Any],
    passes: int = 8,
    oversample: int = 8,
) -> dict[str, PrincipalInputs]:
    """The singular vectors behind `init_eva`, ``counts[path]`` of them or all that there are.

    Raises:
        ConfigError: An argument that cannot mean anything.
        TargetError: As in `init_eva`.
    """
    _check_counts(passes, 2, oversample)
    batches, leaves = _kept(batches), leaves_by_path(params)
    times = _Summed(functools.partial(_from_inputs, _gram, fun, layouts))
    q: _Arrays = {}
    y: _Arrays = {}
    for path, layout in layouts.items():
        k = min(counts[path] + oversample, layout.fan_in)
        q[path] = _normal(param_key(key, path), (*layout.stack, layout.fan_in, k), leaves[path])
    for n in range(passes):
        q = {path: _orthonormal(x) for path, x in (y if n else q).items()}
        y = times(params, batches, q)
        if n == 0:
            _refuse_zeros(y, _NO_INPUTS)
    found = {}
    for path, x in y.items():
        # Rayleigh and Ritz: within the last subspace, the eigenvectors of X^T X.
        small = product(q[path].mT, x)
        values, vectors = eigh((small + small.mT) / 2)
        directions = product(q[path], vectors[..., ::-1])[..., : counts[path]]
        values = jnp.maximum(values[..., ::-1], 0)[..., : counts[path]]
        found[path] = PrincipalInputs(directions, jnp.sqrt(values))
    return found


def input_energies(
    fun: Callable[..., Any], params: Any, layouts: Mapping[str, Layout], batches: Iterable[Any]
) -> _Arrays:
    """``|X|^2: [*stack]`` of each weight's inputs: the squares of all singular values, summed."""
    squares = _Summed(functools.partial(_from_inputs, _squares, fun, layouts))
    leaves = leaves_by_path(params)
    ones = {
        path: jnp.ones((*layout.stack, layout.fan_in, 1), working_dtype(leaves[path].dtype))
        for path, layout in layouts.items()
    }
    return {path: x.sum((-2, -1)) for path, x in squares(params, _kept(batches), ones).items()}


def _redistributed(
    targets: Mapping[str, Target],
    found: Mapping[str, PrincipalInputs],
    energies: Mapping[str, jax.Array],
) -> dict[str, int]:
    """The rank of each weight by the shares of the variance that its directions explain."""
    candidates = []
    matrices = {path: math.prod(target.settings.matrix.stack) for path, target in targets.items()}
    for path, (_, s) in found.items():
        energy = energies[path][..., None]
        shares = jnp.where(energy > 0, s**2 / jnp.where(energy > 0, energy, 1), 0)
        mean = shares.reshape(-1, s.shape[-1]).mean(0)
        candidates += [(float(share), path) for share in mean]
    budget = sum(target.rank * matrices[path] for path, target in targets.items())
    ranks = dict.fromkeys(targets, 0)
    for _, path in sorted(candidates, key=lambda candidate: -candidate[0]):
        if matrices[path] <= budget:
            ranks[path] += 1
            budget -= matrices[path]
    return ranks


#: Of a product ``to_rank(x, a)``, its input and the factor: what is to be the factor's gradient.
_Gradient = Callable[[Callable[[jax.Array, jax.Array], jax.Array], jax.Array, jax.Array], jax.Array]


def _gram(to_rank: Any, x: jax.Array, a: jax.Array) -> jax.Array:
    """``x^T (x a)``."""
    hidden, back = jax.vjp(functools.partial(to_rank, x), a)
    (gradient,) = back(hidden)
    return gradient


def _squares(to_rank: Any, x: jax.Array, a: jax.Array) -> jax.Array:
    """The sum of the squares of each input, for a factor of one column."""
    hidden, back = jax.vjp(functools.partial(to_rank, x * x), a)
    (gradient,) = back(jnp.ones_like(hidden))
    return gradient


class _Inputs(Interpreter):
    """Computes what ``fun`` computes, with something made of the inputs as a gradient of ``a``.

    A weight's update is zero as ``b`` is. In its place stands a value that is zero too, and whose
    gradient with respect to ``a`` is what `gradient` says, whatever the gradient of the output is.
    It is computed on the way forward, so that no input is kept. What adds it up, over the uses of
    a weight, and puts that of a layer or an expert in its place is JAX.
    """

    def __init__(self, gradient: _Gradient):
        super().__init__()
        self._gradient = gradient

    def updated(
        self,
        to_rank: Callable[[jax.Array, jax.Array], jax.Array],
        x: jax.Array,
        factor: jax.Array,
        from_rank: Callable[[jax.Array], jax.Array],
    ) -> jax.Array:
        x, held = jax.lax.stop_gradient((x, factor))
        update = jax.lax.stop_gradient(from_rank(to_rank(x, held)))
        return _with_gradient(factor, self._gradient(to_rank, x, held), update)

    def materialize(self, value: Any, primitive: str) -> Any:
        return value.w if isinstance(value, LoraWeight) else value

    def apply_rule(self, eqn: Any, values: list[Any]) -> list[Any]:
        if eqn.primitive.name == "gather":
            # Looked-up rows: their update is zero, and its gradient may be zero times infinity.
            return jax.lax.stop_gradient(super().apply_rule(eqn, values))
        return super().apply_rule(eqn, values)


@jax.custom_vjp
def _with_gradient(factor: jax.Array, gradient: jax.Array, update: jax.Array) -> jax.Array:
    """``update``, and as the gradient of ``factor`` always ``gradient``."""
    return update


def _with_gradient_fwd(
    factor: jax.Array, gradient: jax.Array, update: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return update, gradient


def _with_gradient_bwd(gradient: jax.Array, _: jax.Array) -> tuple[jax.Array, None, None]:
    return gradient, None, None


_with_gradient.defvjp(_with_gradient_fwd, _with_gradient_bwd)


def _from_inputs(
    gradient: _Gradient,
    fun: Callable[..., Any],
    layouts: Mapping[str, Layout],
    params: Any,
    args: tuple[Any, ...],
    factors: _Arrays,
) -> _Arrays:
    """What `gradient` makes of the inputs of each weight and the columns ``[*stack, in, k]``."""

    def outputs(factors: _Arrays) -> list[jax.Array]:
        adapter = _probes(layouts, a=factors)
        outs = interpret(_Inputs(gradient), fun, params, adapter, args, {})
        return [x for x in jax.tree.leaves(outs) if jnp.issubdtype(x.dtype, jnp.inexact)]

    outs, back = jax.vjp(outputs, factors)
    (gradients,) = back([jnp.zeros_like(out) for out in outs])
    return gradients


def init_lora_ga(
    key: jax.Array,
    loss: Callable[..., jax.Array],
    params: Any,
    plan: Plan,
    batches: Iterable[Any],
    *,
    gamma: float = 16.0,
    passes: int = 4,
    oversample: int = 8,
) -> Adapter:
    r"""A fresh adapter whose first step is as near to that of the whole weight as it can be.

    With ``G = dL/dW = U S V^T``, the mean over the batches, and ``c = out^(1/4) / sqrt(gamma)``:
    ``a = c U[:, :r]`` and ``b = c V[:, r:2r]^T``. To first order in the learning rate ``lr``, a
    step of gradient descent then changes ``W`` by ``-lr s^2 (G b^T b + a a^T G)``, that is by
    ``-lr s^2 c^2`` times the best approximation of ``G`` of rank ``2r``; ``c`` makes the size of
    the outputs independent of the number of outputs, if ``s`` is ``alpha / sqrt(r)``
    (``scaling="rslora"``). Where ``min(in, out)`` is below ``2r``, ``b`` has the last rows there
    are.

    As the base is not to change, the product at the start is subtracted (see `LoraFactors`): the
    adapted function is the base function, bit for bit, until it is trained. ``G`` is never formed
    where the weight stays factored: ``G b^T`` and ``a^T G`` are gradients of a LoRA's factors.

    Entries of kinds without ``a`` and ``b`` (VeRA, LoHa, LoKr, whole values, rows) start as in
    `init`; ``a`` and ``b`` start as said here whatever the plan's ``init`` is.

    Args:
        key: A JAX PRNG key. It fixes the result up to the signs of pairs of directions.
        loss: ``loss(params, *batch)``, a scalar, with the parameters used as in the plan.
        params: The parameters.
        plan: The plan.
        batches: The data: for each batch the arguments of ``loss`` after ``params``, as a tuple,
            or the only one as it is. They are gone through ``2 * passes + 2`` times.
        gamma: The larger, the smaller both factors; 16 is what the authors' code has.
        passes: Power iterations, at least 0. The error of a direction falls with
            ``(s_m / s_j)^2`` in each, where m is 2r plus ``oversample``.
        oversample: How many directions more than ``2r`` are followed.

    Returns:
        The adapter, anchored at its start.

    Raises:
        AdapterError: The parameters are not those of the plan.
        ConfigError: An argument that cannot mean anything.
        TargetError: Weights whose gradient is zero.

    Example:
        >>> import jax, jax.numpy as jnp, jax_lora as jl
        >>> model = lambda params, x: x @ params["w"]
        >>> loss = lambda params, x: (model(params, x) ** 2).sum()
        >>> params, x = {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
        >>> config = jl.LoraConfig(rank=1, scaling="rslora")
        >>> plan = jl.plan(model, params, x, config=config)
        >>> adapter = jl.init_lora_ga(jax.random.key(0), loss, params, plan, [x])
        >>> bool((jl.apply(model)(params, adapter, x) == model(params, x)).all())
        True

    References:
        Wang et al. 2024, LoRA-GA: Low-Rank Adaptation with Gradient Approximation,
        arXiv:2407.05000.
    """
    if not 0 < gamma < math.inf:
        raise ConfigError(f"expected gamma to be a positive number, got {gamma!r}")
    fresh, targets = _fresh(key, params, plan)
    layouts = {path: target.settings.matrix for path, target in targets.items()}
    counts = {path: 2 * target.rank for path, target in targets.items()}
    found = principal_gradients(key, loss, params, layouts, counts, batches, passes, oversample)
    entries = dict(fresh)
    for path, (u, _, vt) in found.items():
        entry, layout, rank = fresh[path], layouts[path], targets[path].rank
        size = layout.fan_out**0.25 / math.sqrt(gamma)
        start = max(vt.shape[-2] - rank, 0)
        a, b = pad(size * u[..., :rank], size * vt[..., start:, :], rank)
        a = a.reshape(layout.a_shape(rank)).astype(entry.a.dtype)
        b = b.reshape(layout.b_shape(rank)).astype(entry.b.dtype)
        # Copies: a buffer that two leaves share cannot be donated.
        entries[path] = dataclasses.replace(entry, a=a, b=b, a0=jnp.array(a), b0=jnp.array(b))
    return Adapter(entries)


class PrincipalGradients(NamedTuple):
    """The first singular vectors of a weight's gradient, for each matrix of its stack.

    Attributes:
        u: ``[*stack, in, k]``.
        singular_values: ``[*stack, k]``, falling.
        vt: ``[*stack, k, out]``.
    """

    u: jax.Array
    singular_values: jax.Array
    vt: jax.Array


def principal_gradients(
    key: jax.Array,
    loss: Callable[..., jax.Array],
    params: Any,
    layouts: Mapping[str, Layout],
    counts: Mapping[str, int],
    batches: Iterable[Any],
    passes: int = 4,
    oversample: int = 8,
) -> dict[str, PrincipalGradients]:
    """The singular vectors behind `init_lora_ga`, ``counts[path]`` of them or all that there are.

    Raises:
        ConfigError: An argument that cannot mean anything.
        TargetError: As in `init_lora_ga`.
    """
    _check_counts(passes, 0, oversample)
    batches, leaves = _kept(batches), leaves_by_path(params)
    times = _Summed(functools.partial(_gradient_times, loss, layouts))
    transposed_times = _Summed(functools.partial(_transposed_gradient_times, loss, layouts))
    y = {}
    for path, layout in layouts.items():
        k = min(counts[path] + oversample, layout.fan_in, layout.fan_out)
        y[path] = _normal(param_key(key, path), (*layout.stack, layout.fan_out, k), leaves[path])
    for n in range(passes + 1):
        y = times(params, batches, {path: _orthonormal(x) for path, x in y.items()})
        if n == 0:
            _refuse_zeros(y, _NO_GRADIENT)
        q = {path: _orthonormal(x) for path, x in y.items()}
        y = transposed_times(params, batches, q)
    found = {}
    for path, x in y.items():
        n = counts[path]
        u, s, vt = svd(x.mT / len(batches))
        found[path] = PrincipalGradients(product(q[path], u)[..., :n], s[..., :n], vt[..., :n, :])
    return found


def _gradient_times(
    loss: Callable[..., jax.Array],
    layouts: Mapping[str, Layout],
    params: Any,
    args: tuple[Any, ...],
    columns: _Arrays,
) -> _Arrays:
    """``G v`` for ``v: [*stack, out, k]``: with ``b = v^T``, the gradient of ``a`` at 0."""

    def of(a: _Arrays) -> jax.Array:
        b = {path: v.mT for path, v in columns.items()}
        return interpret(Interpreter(), loss, params, _probes(layouts, a=a, b=b), args, {})

    zeros = {
        path: jnp.zeros((*v.shape[:-2], layouts[path].fan_in, v.shape[-1]), v.dtype)
        for path, v in columns.items()
    }
    return jax.grad(of)(zeros)


def _transposed_gradient_times(
    loss: Callable[..., jax.Array],
    layouts: Mapping[str, Layout],
    params: Any,
    args: tuple[Any, ...],
    columns: _Arrays,
) -> _Arrays:
    """``G^T u`` for ``u: [*stack, in, k]``: with ``a = u``, the gradient of ``b^T`` at 0."""

    def of(bt: _Arrays) -> jax.Array:
        b = {path: v.mT for path, v in bt.items()}
        return interpret(Interpreter(), loss, params, _probes(layouts, a=columns, b=b), args, {})

    zeros = {
        path: jnp.zeros((*u.shape[:-2], layouts[path].fan_out, u.shape[-1]), u.dtype)
        for path, u in columns.items()
    }
    return jax.grad(of)(zeros)


def _probes(
    layouts: Mapping[str, Layout], a: Mapping[str, jax.Array], b: _Arrays | None = None
) -> Adapter:
    """LoRA entries of scale 1 with ``a: [*stack, in, k]`` and ``b: [*stack, k, out]``, or 0."""
    entries = {}
    for path, layout in layouts.items():
        k, dtype = a[path].shape[-1], a[path].dtype
        right = jnp.zeros(layout.b_shape(k), dtype) if b is None else b[path]
        entries[path] = LoraFactors(
            a[path].reshape(layout.a_shape(k)),
            right.reshape(layout.b_shape(k)),
            jnp.ones((), jnp.float32),
            layout,
        )
    return Adapter(entries)


class _Summed:
    """``step(params, args, arrays)`` compiled, and its sum over batches.

    Leaves of the parameters and arguments that are not arrays reach ``step`` as they are.
    """

    def __init__(self, step: Callable[[Any, tuple[Any, ...], _Arrays], _Arrays]):
        self._step = step
        self._compiled: dict[Any, Callable[..., _Arrays]] = {}

    def __call__(self, params: Any, batches: list[tuple[Any, ...]], arrays: _Arrays) -> _Arrays:
        total: _Arrays | None = None
        for args in batches:
            leaves, treedef = jax.tree.flatten((params, args))
            traced = {i: leaf for i, leaf in enumerate(leaves) if hasattr(leaf, "shape")}
            rest = [None if i in traced else leaf for i, leaf in enumerate(leaves)]
            known = (treedef, tuple((type(leaf), leaf) for leaf in rest))
            if known not in self._compiled:
                self._compiled[known] = jax.jit(functools.partial(self._run, treedef, rest))
            found = self._compiled[known](traced, arrays)
            total = found if total is None else jax.tree.map(jnp.add, total, found)
        assert total is not None
        return total

    def _run(self, treedef: Any, rest: list[Any], traced: dict[int, Any], arrays: _Arrays) -> Any:
        leaves = [traced.get(i, leaf) for i, leaf in enumerate(rest)]
        params, args = jax.tree.unflatten(treedef, leaves)
        return self._step(params, args, arrays)


def _fresh(key: jax.Array, params: Any, plan: Plan) -> tuple[Adapter, dict[str, Target]]:
    """An adapter as `init` makes it, with ``b = 0``, and the targets that have ``a`` and ``b``."""
    expect_type("a plan", plan, Plan)
    targets = {
        path: target
        for path, target in plan.targets.items()
        if issubclass(target.entry, LoraFactors)
    }
    if not targets:
        raise TargetError(
            "expected a plan with at least one weight that gets factors a and b (the variants "
            "lora, lora-fa and dora), got none: start this one with init"
        )
    plain = {path: dataclasses.replace(target, init="kaiming") for path, target in targets.items()}
    return init(key, params, dataclasses.replace(plan, targets=plan.targets | plain)), targets


def _kept(batches: Iterable[Any]) -> list[tuple[Any, ...]]:
    kept = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    if not kept:
        raise ConfigError("expected at least one batch, got none")
    return kept


def _check_counts(passes: int, least: int, oversample: int) -> None:
    for name, value, low in (("passes", passes, least), ("oversample", oversample, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ConfigError(f"expected {name} to be an integer of at least {low}, got {value!r}")


def _normal(key: jax.Array, shape: tuple[int, ...], like: jax.Array) -> jax.Array:
    return jax.random.normal(key, shape, working_dtype(like.dtype))


def _orthonormal(columns: jax.Array) -> jax.Array:
    return qr(columns)[0]


_NO_INPUTS = (
    "expected weights that products give inputs to, which reach a floating-point output that can "
    "be differentiated; found no inputs, or zeros alone, for:\n  {}\nLooked-up rows have no "
    "inputs, and neither has a weight that is formed (print the plan). Give these parameters a "
    "plan of their own, start that with init, and use both: Adapter({{**one, **other}})"
)
_NO_GRADIENT = (
    "expected weights that the loss depends on; found a gradient that is zero for:\n  {}\nExclude "
    "them, or give them a plan of their own, start that with init, and use both: "
    "Adapter({{**one, **other}})"
)


def _refuse_zeros(products: Mapping[str, jax.Array], message: str) -> None:
    empty = [path for path, x in products.items() if not bool(jnp.any(x != 0))]
    if empty:
        raise TargetError(message.format("\n  ".join(empty)))
