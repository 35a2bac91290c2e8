"""Whole parameters, merged or not, as the safetensors that PyTorch's libraries load."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_lora.adapter import leaves_by_path
from jax_lora.errors import CheckpointError
from jax_lora.peft.entries import has_values, problem_of_value
from jax_lora.peft.files import new_folder, write_json
from jax_lora.peft.names import Name, places_of
from jax_lora.peft.tensors import FLOATS, write_tensors


def save_weights(
    folder: str | Path,
    params: Any,
    names: Iterable[Name | tuple[str, str]],
    layouts: Mapping[str, Any],
    *,
    shard_bytes: int = 5_000_000_000,
) -> dict[str, str]:
    """Write parameters under torch's names and in torch's shapes, such as those of `jl.merge`.

    Up to ``shard_bytes`` they are one file, ``model.safetensors``. Above it they are several, with
    ``model.safetensors.index.json`` that says which has what: what ``from_pretrained`` of
    transformers reads. One shard at a time is in memory.

    Args:
        folder: A folder that does not exist yet, or is empty.
        params: The parameters.
        names: What torch calls each parameter, as rules; see `Name`.
        layouts: The roles of the parameters' axes, as for `load`.
        shard_bytes: The most that one file holds, unless a single parameter is larger.

    Returns:
        Our path by torch's name.

    Raises:
        CheckpointError: Parameters without a name, or without what their transposition needs; all
            of them at once. Or the folder holds something, or cannot be written.
        ConfigError: The rules do not fit the parameters.
    """
    places = places_of(params, names, layouts)
    leaves = leaves_by_path(params)
    named = {place.path for place in places.values()}
    problems = [f"{path}: no rule names it" for path in leaves if path not in named]
    for path in sorted(named):
        if not has_values(leaves[path]):
            problems.append(f"{path}: expected an array, got its shape")
        elif np.dtype(leaves[path].dtype) not in FLOATS.values():
            problems.append(f"{path}: expected a floating-point dtype, got {leaves[path].dtype}")
    problems += [f"{x.path}: {text}" for x in places.values() if (text := problem_of_value(x))]
    if type(shard_bytes) is not int or shard_bytes < 1:
        problems.append(f"expected shard_bytes to be a positive integer, got {shard_bytes!r}")
    if problems:
        raise CheckpointError(f"{folder}: cannot be written:\n  " + "\n  ".join(problems))
    sizes = {
        name: math.prod(place.part_shape) * np.dtype(leaves[place.path].dtype).itemsize
        for name, place in sorted(places.items())
    }
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    held: dict[str, str] = {}
    with new_folder(folder) as partial:
        for k, shard in enumerate(shards):
            number = f"-{k + 1:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            file = f"model{number}.safetensors"
            held |= dict.fromkeys(shard, file)
            tensors = {}
            for name in shard:
                place = places[name]
                tensors[name] = place.to_torch(np.asarray(leaves[place.path][place.where]))
            write_tensors(partial / file, tensors)
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": held}
            write_json(partial / "model.safetensors.index.json", index)
    return {name: places[name].path for name in held}
