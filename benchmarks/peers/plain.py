"""The transformer as a plain JAX function, for `ours`, `by_hand` and `weight_space`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.models import scanned_transformer, unrolled_transformer
from benchmarks.transformer import MATRICES, Task, factors, tokens, unstacked, weights


def adam(task: Task) -> optax.GradientTransformation:
    """The optimizer of all programs."""
    return optax.adam(task.learning_rate)


def loss_of(task: Task) -> Any:
    """``loss(params, tokens)``."""
    return scanned_transformer if task.scanned else unrolled_transformer


def params_of(task: Task) -> dict[str, Any]:
    """The parameters of `loss_of`."""
    arrays = weights(task)

    def cast(array: np.ndarray) -> jax.Array:
        return jnp.asarray(array, task.dtype)

    def layer(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return {
            name: {"kernel": cast(array)} if name in MATRICES else cast(array)
            for name, array in arrays.items()
        }

    layers = [layer(unstacked(arrays, k)) for k in range(task.depth)]
    return {
        "embedding": cast(arrays["embedding"]),
        "head": {"kernel": cast(arrays["head"])},
        "norm": cast(arrays["norm"]),
        "layers": jax.tree.map(lambda *x: jnp.stack(x), *layers) if task.scanned else layers,
    }


def batch_of(task: Task) -> tuple[jax.Array]:
    """The rest of the arguments."""
    return (jnp.asarray(tokens(task)),)


def factors_of(task: Task) -> Any:
    """A pair ``(a, b)`` for each matrix: stacked if the layers are, else in a list of layers."""
    arrays = factors(task)

    def pairs(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[jax.Array, jax.Array]]:
        return {n: (jnp.asarray(arrays[f"{n} a"]), jnp.asarray(arrays[f"{n} b"])) for n in MATRICES}

    if task.scanned:
        return pairs(arrays)
    return [pairs(unstacked(arrays, k)) for k in range(task.depth)]


def layers_of(task: Task) -> list[Any]:
    """The pairs as a list, with one element for all layers if they are stacked."""
    pairs = factors_of(task)
    return [pairs] if task.scanned else pairs


def arrays_of(pairs: Any) -> dict[str, np.ndarray]:
    """The arrays of such pairs by the names of `factors`, those of the layers stacked."""
    if isinstance(pairs, list):
        columns = {n: zip(*(layer[n] for layer in pairs), strict=True) for n in MATRICES}
        pairs = {n: tuple(map(np.stack, column)) for n, column in columns.items()}
    return {f"{n} {ab}": array for n in MATRICES for ab, array in zip("ab", pairs[n], strict=True)}


def with_weights(params: Any, pairs: Any, weight: Any) -> Any:
    """The parameters with ``weight(w, a, b)`` in the place of each adapted one."""

    def layer(layer: Any, pairs: Any) -> Any:
        made = {n: {"kernel": weight(layer[n]["kernel"], *pairs[n])} for n in MATRICES}
        return layer | made

    layers = params["layers"]
    if isinstance(layers, list):
        return params | {"layers": list(map(layer, layers, pairs))}
    return params | {"layers": layer(layers, pairs)}
