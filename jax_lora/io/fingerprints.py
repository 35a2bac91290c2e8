"""The fingerprint of base parameters: so few bits that they go into every checkpoint.

It is computed where the parameters are, in one pass over them, and is the same however they are
split over devices, because it is made of sums of integers.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.adapter import leaves_by_path

#: By the path of each parameter: its shape, dtype and 64 bits that stand for its values.
Fingerprint = dict[str, dict[str, Any]]
_SEEDS = (0x9E3779B9, 0x85EBCA6B)
#: Up to so many bytes in all numpy is faster, because there is nothing to compile.
_SMALL = 2**24


def fingerprint(params: Any) -> Fingerprint:
    """What tells these parameters from others of the same shapes.

    For a parameter whose bits are the 32-bit words ``w_i`` (a shorter element makes one word, a
    longer one several) these are the two sums ``sum_i mix(w_i ^ mix(i + seed)) mod 2^32``, where
    ``mix`` is the bijection at the end of MurmurHash3. So another word always changes the sums, but
    for chance in two places at once, and so does the same word at another place. No adversary is
    thought of.

    Args:
        params: A pytree of arrays, on the host or on any devices. Leaves without a shape are left
            out; of ``jax.ShapeDtypeStruct`` there are shapes and dtypes alone.

    Returns:
        ``{path: {"shape": [2], "dtype": "float32", "hash": "16 hexadecimal digits"}}``, JSON-able.

    Example:
        >>> import jax.numpy as jnp
        >>> one, other = (fingerprint({"w": jnp.array(w)})["w"] for w in ([1.0, 2], [2.0, 1]))
        >>> one["shape"], one["dtype"], one["hash"] == other["hash"]
        ([2], 'float32', False)
    """
    leaves = {p: x for p, x in leaves_by_path(params).items() if hasattr(x, "dtype")}
    values = {p: x for p, x in leaves.items() if not isinstance(x, jax.ShapeDtypeStruct)}
    small = sum(x.size * x.dtype.itemsize for x in values.values()) <= _SMALL
    sums = jax.device_get({path: _sums(x, small) for path, x in values.items()})
    hashes = {path: "".join(f"{int(word):08x}" for word in pair) for path, pair in sums.items()}
    return {
        path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        | ({"hash": hashes[path]} if path in hashes else {})
        for path, leaf in leaves.items()
    }


def differences(saved: Fingerprint, params: Any) -> list[str]:
    """What is not as it was in these parameters, one line for each; empty if nothing is.

    Args:
        saved: The fingerprint of what they should be.
        params: The parameters, or their shapes, of which values are not compared.
    """
    found, lines = fingerprint(params), []
    for path in sorted({*saved, *found}):
        if path not in found:
            lines.append(f"{path}: no such parameter now")
        elif path not in saved:
            lines.append(f"{path}: no such parameter then")
        else:
            then, now = saved[path], found[path]
            kinds = [f"{x['dtype']}{tuple(x['shape'])}" for x in (then, now)]
            if kinds[0] != kinds[1]:
                lines.append(f"{path}: then {kinds[0]}, now {kinds[1]}")
            elif "hash" in now and now["hash"] != then.get("hash", now["hash"]):
                lines.append(f"{path}: other values")
    return lines


def _sums(leaf: Any, small: bool) -> Any:
    if not small:
        return _on_device(leaf if isinstance(leaf, jax.Array) else _words_on_host(leaf))
    words = _words_on_host(leaf)
    return [x.sum(dtype=np.uint32) for x in _mixed(words, np.arange(words.size, dtype=np.uint32))]


@jax.jit
def _on_device(leaf: jax.Array) -> jax.Array:
    words = _words(leaf)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        stride = jnp.uint32(math.prod(words.shape[axis + 1 :]) % 2**32)
        place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * stride
    mixed = _mixed(words, place)
    # Both in one reduction, or XLA writes what is summed into memory first.
    zeros, axes = [jnp.uint32(0)] * len(mixed), tuple(range(words.ndim))
    return jnp.stack(jax.lax.reduce(mixed, zeros, lambda x, y: jax.tree.map(jnp.add, x, y), axes))


def _words(leaf: jax.Array) -> jax.Array:
    """The bits as ``[*shape]`` of uint32, or ``[*shape, words]`` for more than 32 bits."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag], -1)
    bits = _bits(leaf.dtype)
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    if bits > 32:
        return jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, f"uint{bits}").astype(jnp.uint32)


def _words_on_host(leaf: Any) -> np.ndarray:
    """The same words in the same order, ``[words]``."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.ascontiguousarray(leaf).reshape(-1)
    words = array.view(f"uint{8 * min(array.dtype.itemsize, 4)}").astype(np.uint32)
    # Numbers of less than a byte have one each.
    return words & np.uint32(2 ** min(_bits(array.dtype), 32) - 1)


def _bits(dtype: Any) -> int:
    if dtype == jnp.bool_:
        return 8
    info: Any = jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo
    return info(dtype).bits


def _mixed(words: Any, place: Any) -> list[Any]:
    """``mix(word ^ mix(place + seed))`` for each seed; of numpy's or JAX's arrays."""
    return [_mix(words ^ _mix(place + np.uint32(seed))) for seed in _SEEDS]


def _mix(x: Any) -> Any:
    """The finalizer of MurmurHash3 (Appleby 2011), a bijection of 32-bit words."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
