"""Adapters for Hugging Face PEFT, and for what reads its files."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_lora.adapter import Adapter, check_fits, leaves_by_path
from jax_lora.errors import AdapterError, expect_type
from jax_lora.peft.config import PeftConfig, adapter_config
from jax_lora.peft.entries import UNSURE, Factors, has_values, problem_of_value, split
from jax_lora.peft.files import CONFIG, PREFIX, TENSORS, new_folder, write_json
from jax_lora.peft.names import Name, Place, places_of
from jax_lora.peft.tensors import write_tensors
from jax_lora.variants import DoraFactors, FullValue

#: PEFT's own word for an adapter that is all `modules_to_save`; an empty list it refuses.
NO_TARGETS = "dummy-target-modules"


def save(
    folder: str | Path,
    adapter: Adapter,
    params: Any,
    names: Iterable[Name | tuple[str, str]],
    layouts: Mapping[str, Any],
    *,
    flat: bool = True,
    base_model: str | None = None,
    task_type: str | None = None,
    dropout: float = 0.0,
) -> dict[str, str]:
    """Write an adapter that PEFT and what reads its files load.

    By default it is flat, which every reader gets right: all modules have the largest rank, padded
    with zeros, the scale is in ``B``, and ``r = lora_alpha``. Other variants become LoRA where they
    are a product of factors; values trained whole become ``modules_to_save``, and what their
    modules have besides is taken from ``params``. If one entry is DoRA, the others are written as
    DoRA of the same update, as PEFT has one setting for all.

    Args:
        folder: A folder that does not exist yet, or is empty.
        adapter: The adapter.
        params: The base parameters; their shapes alone will do if no values are needed.
        names: What torch calls each parameter, as rules; see `Name`.
        layouts: The roles of the parameters' axes, as for `load`: an embedding or a convolution is
            told from a linear layer by its use.
        flat: False to keep ranks and scales as they are, in ``rank_pattern`` and
            ``alpha_pattern``.
        base_model: The base's name, for ``base_model_name_or_path``.
        task_type: PEFT's, such as ``"CAUSAL_LM"``.
        dropout: PEFT's ``lora_dropout``, which acts only in training.

    Returns:
        By the name of each of torch's parameters that the file adapts, our path.

    Raises:
        AdapterError: Entries that have no name, or that PEFT cannot have; all of them at once.
        CheckpointError: The folder holds something, or it cannot be written.
        ConfigError: The rules do not fit the parameters.
    """
    expect_type("an adapter", adapter, Adapter)
    check_fits(params, adapter)
    layouts = {path: layouts.get(path, entry) for path, entry in adapter.items()} | dict(layouts)
    places = places_of(params, names, layouts)
    leaves = leaves_by_path(params)
    dora = any(isinstance(entry, DoraFactors) for entry in adapter.values())
    problems: list[str] = []
    factors: dict[str, Factors] = {}
    values: dict[str, np.ndarray] = {}
    by_path: dict[str, list[Place]] = {}
    for place in places.values():
        by_path.setdefault(place.path, []).append(place)
    for path, entry in adapter.items():
        mine = by_path.get(path, [])
        if not mine:
            problems.append(f"{path}: no rule names it")
        elif isinstance(entry, FullValue):
            if problem := problem_of_value(mine[0], tied=True):
                problems.append(f"{path}: {problem}")
            else:
                array = np.asarray(entry.value)
                values |= {place.name: place.to_torch(array[place.where]) for place in mine}
        elif problem := _unfit(mine[0], getattr(entry, "layout", None)):
            problems.append(f"{path}: {problem}")
        else:
            w = leaves[path]
            if has_values(w) or not (dora or not entry.LINEAR):
                factors |= split(path, entry, w, mine, dora=dora, keep_scale=not flat)
            elif isinstance(entry, DoraFactors):
                factors |= split(path, entry, None, mine, dora=dora, keep_scale=not flat)
            else:
                problems.append(f"{path}: expected the base parameter's values, got its shape")
    _complete_modules(values, places, factors, leaves, problems)
    saved = sorted({places[name].module for name in values})
    targets = sorted(places[name].module for name in factors)
    _check_saved(saved, places, problems)
    if problems:
        raise AdapterError(
            f"{folder}: PEFT cannot have this adapter as it is:\n  " + "\n  ".join(problems)
        )
    rank = max((x.a.shape[0] for x in factors.values()), default=1)
    alpha: float = rank
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    if not flat and factors:
        kept = {places[name].module: (x.a.shape[0], _alpha(x)) for name, x in factors.items()}
        (rank, alpha), _ = Counter(kept.values()).most_common(1)[0]
        for module in sorted(kept):
            if kept[module] != (rank, alpha):
                # PEFT tries a pattern on the ends of names, too, unless it begins with a caret.
                pattern = f"^{re.escape(module)}"
                rank_pattern[pattern], alpha_pattern[pattern] = kept[module]
    tensors: dict[str, np.ndarray] = {}
    for name, x in factors.items():
        tensors |= _tensors_of(places[name], x, rank if flat else x.a.shape[0])
    tensors |= {PREFIX + name: value for name, value in values.items()}
    conv1d = any(places[name].kind == "conv1d" for name in factors)
    document = adapter_config(
        rank=rank,
        alpha=alpha,
        targets=_as_targets(targets, saved, places),
        saved=saved,
        dora=dora,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        base_model=base_model,
        task_type=task_type,
        fan_in_fan_out=conv1d,
        dropout=dropout,
    )
    with new_folder(folder) as partial:
        write_tensors(partial / TENSORS, tensors)
        write_json(partial / CONFIG, document)
    return {name: places[name].path for name in sorted({*factors, *values})}


def _tensors_of(place: Place, x: Factors, rank: int) -> dict[str, np.ndarray]:
    """The tensors of one module, padded to a rank."""
    more = rank - x.a.shape[0]
    a = np.pad(x.a, [(0, more), *[(0, 0)] * (x.a.ndim - 1)])
    b = np.pad(x.b, [(0, 0), (0, more), *[(0, 0)] * (x.b.ndim - 2)])
    start = PREFIX + place.module
    ends = ("lora_A.weight", "lora_B.weight")
    if place.kind == "embedding":
        ends = ("lora_embedding_A", "lora_embedding_B")
    tensors = {f"{start}.{end}": value for end, value in zip(ends, (a, b), strict=True)}
    if x.magnitude is not None:
        tensors[f"{start}.lora_magnitude_vector"] = x.magnitude
    return tensors


def _unfit(place: Place, layout: Any) -> str:
    """Why a parameter is no module that PEFT can adapt; empty if it is one."""
    if not place.is_weight:
        return f"expected the name of a weight, it is {place.name!r}"
    if layout is None or place.layout != layout:
        return f"its axes are {layout} in the adapter and {place.layout} in layouts"
    return place.problem_of_factors() or ("" if place.sure else UNSURE)


def _complete_modules(
    values: dict[str, np.ndarray],
    places: Mapping[str, Place],
    factors: Mapping[str, Factors],
    leaves: Mapping[str, Any],
    problems: list[str],
) -> None:
    """Add what modules have besides the values that are trained whole: PEFT keeps whole modules."""
    modules = {places[name].module for name in values}
    for name, place in places.items():
        if place.module not in modules or name in values:
            continue
        if name in factors:
            problems.append(
                f"{name}: has factors, and another parameter of its module is trained whole, where "
                "PEFT knows only whole modules"
            )
        elif not has_values(leaves[place.path]):
            problems.append(f"{place.path}: expected its values, as PEFT keeps the whole module")
        elif problem := problem_of_value(place):
            problems.append(f"{place.path}: {problem}")
        else:
            values[name] = place.to_torch(np.asarray(leaves[place.path])[place.where])


def _check_saved(saved: list[str], places: Mapping[str, Place], problems: list[str]) -> None:
    """PEFT takes every module whose name ends with one in ``modules_to_save``."""
    for name in sorted(_all_modules(places)):
        ends = [end for end in saved if name.endswith(end) and name != end]
        if ends:
            problems.append(f"{name}: would be trained whole, too: its name ends with {ends[0]!r}")


def _all_modules(places: Mapping[str, Place]) -> set[str]:
    modules = set()
    for place in places.values():
        parts = place.module.split(".")
        modules |= {".".join(parts[: k + 1]) for k in range(len(parts))}
    return modules


def _as_targets(
    targets: list[str], saved: list[str], places: Mapping[str, Place]
) -> tuple[str, ...] | str:
    """The full names, or, where they are also the ends of other names, one expression for them."""
    if not targets:
        return NO_TARGETS
    config = PeftConfig(1, 1.0, tuple(targets), saved=tuple(saved))
    others = _all_modules(places) - set(targets)
    if not any(config.is_target(module) for module in others):
        return tuple(targets)
    return "(" + "|".join(re.escape(module) for module in targets) + ")"


def _alpha(x: Factors) -> float:
    """PEFT's alpha: an integer if it is one to within the rounding of float32."""
    alpha = x.scale * x.a.shape[0]
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-7) else alpha
