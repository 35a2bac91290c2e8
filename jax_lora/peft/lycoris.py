"""LoHa and LoKr as LyCORIS and PEFT lay them out, and convolutions in Tucker's form."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from jax_lora.peft.parts import Part, narrowed, one_dtype
from jax_lora.peft.places import Place
from jax_lora.variants import LohaFactors, LokrFactors

Shapes = Mapping[str, tuple[int, ...]]
#: The tensors of LoHa's two products, and of LoKr's.
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR = (
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b"),
    *("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
)


def tucker(core: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """``[r, in, *space]`` of a core ``[r, r, *space]`` and of ``[r, in]``."""
    wide = np.float64 if core.dtype == np.float64 else np.float32
    found = np.einsum("ij...,jc->ic...", core.astype(wide), inner.astype(wide))
    return narrowed(found, core.dtype)


def loha_problem(place: Place, shapes: Shapes, rank: int) -> str:
    """What is wrong with the tensors of LoHa; empty if nothing is."""
    out, (channels, *space) = place.fan_out, place.torch_ins
    cores = _spaces(rank, space)
    expected: list[dict[str, tuple[int, ...]]] = []
    plain = {"a": (out, rank), "b": (rank, channels * math.prod(space))}
    expected.append({f"hada_w{k}_{x}": shape for k in "12" for x, shape in plain.items()})
    turned = {"a": (rank, out), "b": (rank, channels)}
    for core in cores:
        both = {f"hada_w{k}_{x}": shape for k in "12" for x, shape in turned.items()}
        expected.append(both | {"hada_t1": core, "hada_t2": core})
    return "" if dict(shapes) in expected else _expected(shapes, expected)


def loha(place: Place, arrays: Mapping[str, np.ndarray], scale: float) -> Part:
    """The update ``scale * (w1_a w1_b) * (w2_a w2_b)`` of ``[out, in]``, elementwise."""
    mine: dict[str, np.ndarray] = {}
    for k in "12":
        outer, inner = arrays[f"hada_w{k}_a"], arrays[f"hada_w{k}_b"]
        if f"hada_t{k}" in arrays:
            outer, inner = outer.T, tucker(arrays[f"hada_t{k}"], inner)
        mine |= {f"a{k}": place.a_from_torch(inner), f"b{k}": place.b_from_torch(outer)}
    return Part(mine, scale, variant=LohaFactors)


def lokr_problem(place: Place, shapes: Shapes, rank: int | None) -> str:
    """What is wrong with the tensors of LoKr; empty if nothing is.

    Without a ``rank`` it is that of the tensors.
    """
    out, (channels, *space) = place.fan_out, place.torch_ins
    first, second = _first_of(shapes), shapes.get("lokr_w2") or shapes.get("lokr_w2_a", ())
    if not first or len(second) < 2 or 0 in (*first, *second):
        return f"expected lokr_w1 and lokr_w2, or their factors _a and _b, found {_listed(shapes)}"
    o1, i1 = first
    if out % o1 or channels % i1:
        return f"expected lokr_w1 to divide {out} outputs and {channels} inputs, found {first}"
    o2, i2 = out // o1, channels // i1
    found = {*second[:2], *shapes.get("lokr_w1_b", ())[:1]}
    expected = []
    for r in [rank] if rank else sorted(found):
        smalls = [{"lokr_w1": (o1, i1)}, {"lokr_w1_a": (o1, r), "lokr_w1_b": (r, i1)}]
        larges: list[dict[str, tuple[int, ...]]] = [
            {"lokr_w2": (o2, i2, *space)},
            {"lokr_w2_a": (o2, r), "lokr_w2_b": (r, i2 * math.prod(space))},
        ]
        for core in _spaces(r, space):
            larges.append({"lokr_t2": core, "lokr_w2_a": (r, o2), "lokr_w2_b": (r, i2)})
        expected += [small | large for small in smalls for large in larges]
    return "" if dict(shapes) in expected else _expected(shapes, expected)


def lokr(place: Place, arrays: Mapping[str, np.ndarray], scale: float) -> Part:
    """The update ``scale * w1 (x) w2`` of ``[out, in]``, both from their factors first."""
    small = arrays.get("lokr_w1")
    if small is None:
        small = _product(arrays["lokr_w1_a"], arrays["lokr_w1_b"])
    if "lokr_w2" in arrays:
        a, b = _factored(arrays["lokr_w2"])
    elif "lokr_t2" in arrays:
        a, b = tucker(arrays["lokr_t2"], arrays["lokr_w2_b"]), arrays["lokr_w2_a"].T
    else:
        a, b = arrays["lokr_w2_b"], arrays["lokr_w2_a"]
    a = a.reshape(len(a), -1)
    if len(a) > min(a.shape[1], len(b)):
        a, b = _factored(_product(b, a))  # a rank that says the same more than once
    part = Part({"c": small.T, "a": a.T, "b": b.T}, scale, variant=LokrFactors)
    if place.kind != "conv":
        return part
    # The inputs are split within the channels, before the directions: not as ours are split.
    plain = part.as_lora()
    return Part(dict(plain.arrays) | {"a": place.a_from_torch(plain.arrays["a"].T)}, scale)


def lokr_rank(shapes: Shapes) -> int | None:
    """The rank of LoKr's factors; None if neither matrix has any, and then its scale is 1."""
    for name in ("lokr_w2_b", "lokr_w1_b"):
        if shapes.get(name):
            return shapes[name][0]
    return None


def _factored(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``[rank, in]`` and ``[out, rank]`` of ``[out, *in]``: the matrix and an identity."""
    matrix = matrix.reshape(len(matrix), -1)
    identity = np.eye(min(matrix.shape), dtype=matrix.dtype)
    return (matrix, identity) if len(matrix) <= matrix.shape[1] else (identity, matrix)


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    dtype = one_dtype((left, right))
    wide = np.float64 if dtype == np.float64 else np.float32
    return narrowed(left.astype(wide) @ right.astype(wide), dtype)


def _spaces(rank: int, space: list[int]) -> list[tuple[int, ...]]:
    """The shapes of a Tucker core: PEFT gives one direction a second of size 1."""
    if not space:
        return []
    found = [(rank, rank, *space)]
    return [*found, (rank, rank, *space, 1)] if len(space) == 1 else found


def _first_of(shapes: Shapes) -> tuple[int, int] | None:
    whole = shapes.get("lokr_w1")
    if whole is not None:
        return (whole[0], whole[1]) if len(whole) == 2 else None
    a, b = shapes.get("lokr_w1_a", ()), shapes.get("lokr_w1_b", ())
    return (a[0], b[1]) if len(a) == len(b) == 2 else None


def _listed(shapes: Shapes) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in sorted(shapes.items())) or "none"


def _expected(shapes: Shapes, expected: list[dict[str, tuple[int, ...]]]) -> str:
    """The nearest of what could be, beside what is there."""
    nearest = max(expected, key=lambda x: len(set(x.items()) & set(shapes.items())))
    return f"expected {_listed(nearest)}; found {_listed(shapes)}"
