"""How an adapter differs from what a file says, in float64 and by rules of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

import jax_lora as jl
from jax_lora.adapter import leaves_by_path
from jax_lora.experiments.fuzzing.examples import BASE, PLACES


def difference(
    adapter: jl.Adapter, expected: Mapping[str, np.ndarray], rows: Mapping[str, list[int]]
) -> str:
    """How an adapter differs from what it should be, by torch's names; empty if it does not."""
    bases = leaves_by_path(BASE)
    names = {name.partition(" ")[0] for name in expected}
    paths = {PLACES[name][0] for name in names}
    if set(adapter) != paths:
        return f"adapts {sorted(adapter)} and not {sorted(paths)}"
    for name, (path, at, turned) in PLACES.items():
        if path not in paths:
            continue
        entry, base = adapter[path], bases[path].astype(np.float64)
        update, value, more = _numbers(entry, base)
        if f"{name} rows" in expected:
            wanted = base.copy()
            wanted[rows[name]] = expected[f"{name} rows"]
            wrong = _far(value, wanted)
        elif name not in expected:
            wrong = _far(update[at], np.zeros_like(update[at]))
        elif isinstance(entry, (jl.FullValue, jl.RowValues)):
            wrong = _far(turned(value[at]), expected[name])
        else:
            wrong = _far(turned(update[at]), expected[name].reshape(turned(update[at]).shape))
            magnitude = expected.get(f"{name} magnitude")
            if not wrong and (magnitude is None) is not (more is None):
                wrong = "is DoRA in one of both alone"
            elif not wrong and magnitude is not None and more is not None:
                wrong = _far(more[at], magnitude)
        if wrong:
            return f"{name}: {wrong}"
    return ""


def _numbers(entry: Any, base: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The update, the new value, and DoRA's magnitudes, in float64; of DoRA the direction's."""
    x = {name: np.asarray(y).astype(np.float64) for name, y in entry.arrays().items()}
    if isinstance(entry, jl.FullValue):
        return x["value"] - base, x["value"], None
    if isinstance(entry, jl.RowValues):
        value = base.copy()
        value[list(entry.rows)] = x["value"]
        return value - base, value, None
    layout = entry.layout
    shape = (*layout.stack, layout.fan_in, -1), (*layout.stack, -1, layout.fan_out)
    if isinstance(entry, jl.LohaFactors):
        both = [x[f"a{k}"].reshape(shape[0]) @ x[f"b{k}"].reshape(shape[1]) for k in "12"]
        update = both[0] * both[1]
    elif isinstance(entry, jl.LokrFactors):
        product = x["a"] @ x["b"]
        update = np.stack(
            [np.kron(c, ab) for c, ab in zip(_flat(x["c"]), _flat(product), strict=True)]
        )
    else:
        update = x["a"].reshape(shape[0]) @ x["b"].reshape(shape[1])
    update = update.reshape(
        *layout.stack, *(layout.shape[i] for i in (*layout.in_axes, *layout.out_axes))
    )
    order = (*layout.stack_axes, *layout.in_axes, *layout.out_axes)
    update = x["scale"] * update.transpose([order.index(i) for i in range(len(order))])
    more = x.get("magnitude")
    if more is not None:
        norm = np.sqrt((base**2).sum(layout.in_axes))
        assert not _far(x["base_norm"], norm)
    return update, base + update, more


def _flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, *x.shape[-2:])


def _far(found: np.ndarray, expected: np.ndarray) -> str:
    if found.shape != expected.shape:
        return f"shape {found.shape} and not {expected.shape}"
    size = float(np.abs(expected).max(initial=0))
    error = float(np.abs(found - expected).max(initial=0))
    # A part that is tiny beside the largest may be rounded away where layers have other scales.
    return f"off by {error:g} beside {size:g}" if not error <= 1e-5 * size + 1e-37 else ""
