"""Entries of an adapter as the factors of single modules, in torch's shapes, and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.adapter import Adapter, Entry, Settings, leaves_by_path
from jax_lora.errors import AdapterError
from jax_lora.lowrank import working_dtype
from jax_lora.peft.names import Place
from jax_lora.variants import DoraFactors, FullValue, LoraFactors, factor_matrices

#: Why a matrix is not written without knowing what it is in torch.
UNSURE = (
    "whether it is a linear layer, an embedding or a convolution in torch is not known from a "
    "layout alone; pass layouts=jl.discover(fun, params, x), or kind= in its rule"
)


@dataclasses.dataclass(frozen=True)
class Factors:
    """The factors of one module, as torch has them.

    Attributes:
        a: ``[rank, in]``, or as a convolution.
        b: ``[out, rank]``, or as a convolution.
        scale: What multiplies their product.
        magnitude: DoRA's, or None.
        a0: What ``a`` was at the start, if that was subtracted from the base.
        b0: What ``b`` was.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None
    a0: np.ndarray | None = None
    b0: np.ndarray | None = None


def build(
    where: str,
    params: Any,
    places: Mapping[str, Place],
    factors: Mapping[str, Factors],
    values: Mapping[str, np.ndarray],
) -> Adapter:
    """The adapter of these modules' factors and of these parameters' values."""
    leaves = leaves_by_path(params)
    parts: dict[str, list[tuple[Place, Factors]]] = {}
    wholes: dict[str, list[tuple[Place, np.ndarray]]] = {}
    for name, one in factors.items():
        parts.setdefault(places[name].path, []).append((places[name], one))
    for name, value in values.items():
        wholes.setdefault(places[name].path, []).append((places[name], value))
    both = sorted(parts.keys() & wholes.keys())
    problems = [f"{path}: has layers with factors and layers trained whole" for path in both]
    entries: dict[str, Entry] = {}
    for path, layers in parts.items():
        dora = any(x.magnitude is not None for _, x in layers)
        if dora and not has_values(leaves[path]):
            problems.append(f"{path}: DoRA needs the base parameter's values, got its shape")
        elif path not in wholes:
            entries[path] = _joined(layers, leaves[path], dora=dora)
    for path, given in wholes.items():
        count = math.prod(given[0][0].shape[i] for i in given[0][0].stack_axes)
        if len(given) < count and not has_values(leaves[path]):
            problems.append(f"{path}: the other layers need the base parameter's values")
        elif path not in parts:
            dtype = one_dtype(value for _, value in given)
            whole = np.empty(given[0][0].shape, dtype)
            if len(given) < count:
                whole[...] = np.asarray(leaves[path]).astype(dtype)
            for place, value in given:
                whole[place.where] = place.from_torch(value)
            entries[path] = FullValue(jnp.asarray(whole), given[0][0].shape)
    if problems:
        raise AdapterError(f"{where}: cannot be joined:\n  " + "\n  ".join(problems))
    return Adapter(entries)


def split(
    path: str, entry: Any, w: Any, places: list[Place], *, dora: bool, keep_scale: bool
) -> dict[str, Factors]:
    """The factors of each layer of one entry."""
    dtype = np.dtype(jax.tree.leaves(entry.trained())[0].dtype)
    plain, scale, magnitude = entry, 1.0, None
    if isinstance(entry, LoraFactors):
        held = entry.without_anchor()
        plain = LoraFactors(held.a, held.b, held.scale, held.layout)
        if keep_scale:
            scale = float(entry.scale)
            plain = dataclasses.replace(plain, scale=jnp.ones((), jnp.float32))
    a, b = factor_matrices(path, plain, None if plain.LINEAR else w)
    if dora:
        if isinstance(entry, DoraFactors):
            magnitude = np.asarray(entry.magnitude)
        else:
            full = entry.layout.matrices(jnp.asarray(w).astype(working_dtype(w.dtype)))
            moved = full + scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
            magnitude = np.asarray(jnp.sqrt((moved**2).sum(-2)))
    a_np, b_np = (np.asarray(x).astype(dtype) for x in (a, b))
    factors = {}
    for place in places:
        at, m = place.index, None
        if magnitude is not None:
            m = magnitude[at].reshape(place.magnitude_shapes()[0])
        a_part, b_part = place.a_to_torch(a_np[at]), place.b_to_torch(b_np[at])
        factors[place.name] = Factors(a_part, b_part, scale, m)
    return factors


def problem_of_value(place: Place, *, tied: bool = False) -> str:
    """Why a parameter cannot be turned into torch's or from it; empty if it can.

    With ``tied``, also if torch has it in two modules, of which only one is to have the value.
    """
    if len(place.used_as) > 1 and tied:
        return place.problem_of_factors()
    matrix = len(place.part_shape) > 1 and (place.is_weight or place.layout is not None)
    if matrix and place.layout is None and place.kind != "embedding":
        return (
            f"the roles of its axes are not known, which {place.name!r} needs; pass "
            "layouts=jl.discover(fun, params, x), or kind='embedding' for a table"
        )
    if matrix and not place.sure:
        return UNSURE
    return ""


def has_values(leaf: Any) -> bool:
    """Whether a parameter is there, and not its shape alone."""
    return not isinstance(leaf, (jax.ShapeDtypeStruct, jax.core.Tracer))


def _joined(layers: list[tuple[Place, Factors]], w: Any, *, dora: bool) -> LoraFactors:
    """The entry of one parameter, of the factors of each of its layers."""
    layout = layers[0][0].matrix
    rank = max(x.a.shape[0] for _, x in layers)
    scales = {x.scale for _, x in layers}
    scale = scales.pop() if len(scales) == 1 else None
    parts = []
    for place, x in layers:
        part = {"a": place.a_from_torch(x.a), "b": place.b_from_torch(x.b)}
        if x.a0 is not None and x.b0 is not None:
            part |= {"a0": place.a_from_torch(x.a0), "b0": place.b_from_torch(x.b0)}
        if scale is None:
            part = {k: _times(y, x.scale) if k[0] == "b" else y for k, y in part.items()}
        parts.append((place.index, part))
    arrays: dict[str, Any] = {}
    for field, shape in (
        ("a", layout.a_shape(rank)),
        ("b", layout.b_shape(rank)),
        ("a0", layout.a_shape(rank)),
        ("b0", layout.b_shape(rank)),
    ):
        given = [(index, part[field]) for index, part in parts if field in part]
        if not given:
            continue
        joined = np.zeros(shape, one_dtype(value for _, value in given))
        for index, value in given:
            # The rank of b comes first, that of a last.
            at = slice(value.shape[0]) if field[0] == "b" else (..., slice(value.shape[-1]))
            joined[index][at] = value
        arrays[field] = jnp.asarray(joined)
    arrays["scale"] = jnp.asarray(1.0 if scale is None else scale, jnp.float32)
    if not dora:
        return LoraFactors(**arrays, layout=layout)
    settings = Settings(layout.shape, layout, rank, init="kaiming", dtype="float32")
    fresh = DoraFactors.create(jax.random.key(0), jnp.asarray(w), settings)
    magnitude = np.array(fresh.magnitude)
    for place, x in layers:
        assert x.magnitude is not None
        magnitude[place.index] = x.magnitude.astype(magnitude.dtype).reshape(place.outs)
    return DoraFactors(
        **arrays, layout=layout, magnitude=jnp.asarray(magnitude), base_norm=fresh.base_norm
    )


def _times(value: np.ndarray, scale: float) -> np.ndarray:
    wide = np.dtype(np.float64 if value.dtype == np.float64 else np.float32)
    return (value.astype(wide) * np.asarray(scale, wide)).astype(value.dtype)


def one_dtype(values: Iterable[np.ndarray]) -> Any:
    """The dtype of all, or float32 if they differ."""
    dtypes = {value.dtype for value in values}
    return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
