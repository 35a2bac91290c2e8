"""The entries of an adapter, joined from what a file has for single modules of torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.adapter import Adapter, Entry, Layout, Settings, Variant, leaves_by_path
from jax_lora.errors import AdapterError
from jax_lora.peft.places import Place
from jax_lora.variants import (
    DoraFactors,
    FullValue,
    LohaFactors,
    LoraFactors,
    RowValues,
    column_norms,
)


@dataclasses.dataclass(frozen=True)
class Part:
    """The update of one module.

    Attributes:
        arrays: The factors by their names in the variant, as matrices: ``a: [in, rank]``,
            ``b: [rank, out]``, and so on.
        scale: What multiplies the update.
        magnitude: DoRA's, ``[out]``, or None.
        variant: What the factors are of.
    """

    arrays: Mapping[str, np.ndarray]
    scale: float
    magnitude: np.ndarray | None = None
    variant: type[Variant] = LoraFactors

    def as_lora(self) -> Part:
        """The same update as one product, whose rank may be larger.

        Raises:
            AdapterError: The rank would be larger than that of any matrix of this size.
        """
        if self.variant is LoraFactors:
            return self
        layout = Layout(self._sizes(), in_axes=(0,), out_axes=(1,))
        wide = {name: x.astype(_wide(x.dtype)) for name, x in self.arrays.items()}
        variant: Any = self.variant
        entry = variant(**wide, scale=np.ones((), np.float32), layout=layout)
        if self.variant is LohaFactors and entry.rank**2 > min(layout.shape):
            raise AdapterError(
                f"LoHa of rank {entry.rank} would be LoRA of rank {entry.rank**2}, more than the "
                f"{min(layout.shape)} that its matrix has"
            )
        a, b = (np.asarray(x) for x in entry.update())
        dtype = one_dtype(self.arrays.values())
        arrays = {"a": narrowed(a, dtype), "b": narrowed(b, dtype)}
        return Part(arrays, self.scale, self.magnitude)

    def _sizes(self) -> tuple[int, int]:
        """The inputs and outputs of the matrix that the update is."""
        arrays = dict(self.arrays)
        small = arrays.pop("c", np.ones((1, 1)))  # LoKr's, at each entry of which is a product
        a, b = (next(x for name, x in arrays.items() if name[0] == letter) for letter in "ab")
        return small.shape[0] * a.shape[0], small.shape[1] * b.shape[1]


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a file holds, by the name of torch's parameter.

    Attributes:
        parts: Updates.
        values: Values of whole parameters.
        rows: Some rows of a parameter, and their values ``[n, width]``.
    """

    parts: Mapping[str, Part]
    values: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    rows: Mapping[str, tuple[tuple[int, ...], np.ndarray]] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Of all parameters that are adapted."""
        return sorted({*self.parts, *self.values, *self.rows})


def build(where: str, params: Any, places: Mapping[str, Place], contents: Contents) -> Adapter:
    """The adapter of what a file holds.

    Raises:
        AdapterError: Names every parameter that cannot be joined, and why.
    """
    leaves = leaves_by_path(params)
    found: dict[str, dict[str, list[tuple[Place, Any]]]] = {"parts": {}, "values": {}, "rows": {}}
    for what, mine in found.items():
        for name, x in getattr(contents, what).items():
            mine.setdefault(places[name].path, []).append((places[name], x))
    entries: dict[str, Entry] = {}
    problems = []
    for path in sorted({path for mine in found.values() for path in mine}):
        kinds = [what for what, mine in found.items() if path in mine]
        if len(kinds) > 1:
            what = " and ".join(_WORDS[kind] for kind in kinds)
            problems.append(f"{path}: expected one kind of training for all of it, found {what}")
            continue
        (kind,) = kinds
        try:
            entries[path] = _ENTRIES[kind](found[kind][path], leaves[path])
        except AdapterError as error:
            problems.append(f"{path}: {error}")
    if problems:
        raise AdapterError(f"{where}: cannot be joined:\n  " + "\n  ".join(problems))
    # All at once: a transfer of each takes longer than reading it.
    return jax.device_put(Adapter(entries))


def has_values(leaf: Any) -> bool:
    """Whether a parameter is there, and not its shape alone."""
    return not isinstance(leaf, (jax.ShapeDtypeStruct, jax.core.Tracer))


def one_dtype(values: Iterable[np.ndarray]) -> Any:
    """The dtype of all, or float32 if they differ."""
    dtypes = {value.dtype for value in values}
    return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)


def scaled(b: np.ndarray, scale: float) -> np.ndarray:
    """``scale * b``, in float32 if a narrower dtype would round or overflow."""
    wide = _wide(b.dtype)
    with np.errstate(over="ignore", under="ignore"):
        return narrowed(b.astype(wide) * np.asarray(scale, wide), b.dtype)


def narrowed(x: np.ndarray, dtype: Any) -> np.ndarray:
    """The numbers in a dtype, if it has them; else as they are."""
    with np.errstate(over="ignore"):
        narrow = x.astype(dtype)
    return narrow if np.array_equal(narrow.astype(x.dtype), x) else x


def _wide(dtype: Any) -> Any:
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def _updated(layers: list[tuple[Place, Part]], w: Any) -> Entry:
    """The entry of one parameter, of the updates of its modules."""
    layout = layers[0][0].matrix
    dora = any(x.magnitude is not None for _, x in layers)
    if dora and not has_values(w):
        raise AdapterError("DoRA needs the base parameter's values, got its shape")
    split = any(place.columns for place, _ in layers)
    forms = {_form(x, layout) for _, x in layers}
    alike = not split and len(forms) == 1 and None not in forms
    parts = layers if alike else [(place, x.as_lora()) for place, x in layers]
    scales = {x.scale for _, x in parts}
    scale = scales.pop() if len(scales) == 1 else None
    if scale is None:
        parts = [(place, _scaled(x)) for place, x in parts]
    if split:
        parts = _side_by_side(parts)
    arrays = _stacked(parts)
    arrays["scale"] = np.asarray(1.0 if scale is None else scale, np.float32)
    if not dora:
        variant: Any = parts[0][1].variant
        return variant(**arrays, layout=layout)
    norms = column_norms(jnp.asarray(w), layout)
    magnitude = np.array(norms).reshape(*layout.stack, layout.fan_out)
    for place, x in layers:
        assert x.magnitude is not None
        magnitude[place.index][place.outs] = x.magnitude
    arrays["magnitude"] = magnitude.reshape(layout.column_shape)
    return DoraFactors(**arrays, layout=layout, base_norm=norms)


def _form(part: Part, layout: Layout) -> type[Variant] | None:
    """The variant that an update is of here; None for one whose factors are split otherwise."""
    if part.variant is LoraFactors:
        return LoraFactors
    rank = next(x.shape[-1] for name, x in part.arrays.items() if name[0] == "a")
    matrix = Layout((layout.fan_in, layout.fan_out), in_axes=(0,), out_axes=(1,))
    shapes = part.variant.shapes(Settings(matrix.shape, matrix, rank))
    return part.variant if {n: x.shape for n, x in part.arrays.items()} == shapes else None


def _scaled(part: Part) -> Part:
    """The same update with scale 1."""
    arrays = dict(part.arrays)
    for name in ("b", "b0") if "b" in arrays else ("b1",):
        if name in arrays:
            arrays[name] = scaled(arrays[name], part.scale)
    return dataclasses.replace(part, arrays=arrays, scale=1.0)


def _side_by_side(parts: list[tuple[Place, Part]]) -> list[tuple[Place, Part]]:
    """One update for each matrix of the stack, of those of modules that are side by side in it.

    Modules with the same ``a`` share it, as those do that were one update before they were written.
    """
    matrices: dict[tuple[int, ...], list[tuple[Place, Part]]] = {}
    for place, part in parts:
        matrices.setdefault(place.index, []).append((place, part))
    return [(mine[0][0], _concatenated(mine)) for mine in matrices.values()]


def _concatenated(parts: Sequence[tuple[Place, Part]]) -> Part:
    anchored = "a0" in parts[0][1].arrays
    arrays: dict[str, np.ndarray] = {}
    for a_name, b_name in (("a", "b"), ("a0", "b0")) if anchored else (("a", "b"),):
        shared: list[tuple[np.ndarray, list[tuple[Place, np.ndarray]]]] = []
        for place, part in parts:
            a, b = part.arrays[a_name], part.arrays[b_name]
            # With an anchor there are two factors, of which one may differ.
            same = (those for one, those in shared if not anchored and np.array_equal(one, a))
            those = next(same, None)
            if those is None:
                shared.append((a, [(place, b)]))
            else:
                those.append((place, b))
        rank = sum(a.shape[1] for a, _ in shared)
        dtype = one_dtype(b for _, those in shared for _, b in those)
        wide = np.zeros((rank, parts[0][0].matrix.fan_out), dtype)
        row = 0
        for a, those in shared:
            for place, b in those:
                wide[row : row + len(b), place.outs] = b
            row += a.shape[1]
        arrays |= {a_name: np.concatenate([a for a, _ in shared], axis=1), b_name: wide}
    return Part(arrays, parts[0][1].scale)


def _stacked(parts: list[tuple[Place, Part]]) -> dict[str, Any]:
    """The arrays of an entry; where ranks differ, or a layer has no update, there are zeros."""
    layout, variant = parts[0][0].matrix, parts[0][1].variant
    rank = max(x.shape[-1] for _, p in parts for name, x in p.arrays.items() if name[0] == "a")
    shapes = variant.shapes(Settings(layout.shape, layout, rank))
    joined: dict[str, Any] = {}
    for name in dict.fromkeys(name for _, part in parts for name in part.arrays):
        given = [(place, part.arrays[name]) for place, part in parts if name in part.arrays]
        most = tuple(max(x.shape[i] for _, x in given) for i in range(2))
        whole = np.zeros((*layout.stack, *most), one_dtype(x for _, x in given))
        for place, x in given:
            whole[place.index][tuple(map(slice, x.shape))] = x
        if not np.isfinite(whole.astype(_wide(whole.dtype))).all():
            raise AdapterError(f"{name} with its scale is beyond the numbers of {whole.dtype}")
        joined[name] = whole.reshape(shapes[name])
    return joined


def _whole(given: list[tuple[Place, np.ndarray]], w: Any) -> Entry:
    """The entry of a parameter that is trained whole, or of which some modules are."""
    place = given[0][0]
    dtype = one_dtype(value for _, value in given)
    told = sum(value.size for _, value in given)
    whole: Any = np.empty(place.shape, dtype)
    if told < whole.size:
        if not has_values(w):
            raise AdapterError("the other layers or modules need the base parameter's values")
        whole[...] = np.asarray(w).astype(dtype)
    for part, value in given:
        part.write(whole, value)
    return FullValue(whole, place.shape)


def _rows(given: list[tuple[Place, tuple[tuple[int, ...], np.ndarray]]], w: Any) -> Entry:
    """The entry of rows of torch's parameter: of a table, or of a head that is ``[out, in]``."""
    (place, (rows, value)), *more = given
    layout = place.matrix
    if more or place.index or place.columns:
        raise AdapterError("expected rows of a parameter that is one in torch")
    if place.kind != "embedding":
        layout = dataclasses.replace(layout, in_axes=layout.out_axes, out_axes=layout.in_axes)
    shape = layout.b_shape(len(rows))
    moved: Any = value.reshape(shape)
    return RowValues(moved, rows, layout)


#: What each attribute of `Contents` is called.
_WORDS = {"parts": "factors", "values": "whole values", "rows": "trained rows"}
_ENTRIES: Mapping[str, Any] = {"parts": _updated, "values": _whole, "rows": _rows}
