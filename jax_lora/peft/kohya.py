"""LoRA files of kohya's scripts and of LyCORIS: one file, ``lora_down``, ``lora_up``, ``alpha``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_lora.errors import CheckpointError
from jax_lora.peft.entries import Factors, build
from jax_lora.peft.names import Name, Place, places_of
from jax_lora.peft.reading import Loaded, check_pair, read_numbers, unknown
from jax_lora.peft.tensors import TensorFile

_ENDS = {"lora_down.weight", "lora_up.weight", "alpha"}


def load_kohya(
    file: str | Path,
    params: Any,
    names: Iterable[Name | tuple[str, str]],
    layouts: Mapping[str, Any],
    *,
    prefix: str = "lora_",
) -> Loaded:
    """Read a LoRA file of kohya's scripts, or of LyCORIS where its algorithm is LoRA.

    A module ``unet.down_blocks.0.to_q`` is called ``lora_unet_down_blocks_0_to_q`` there. The scale
    is ``alpha / rank``, and 1 for a module without ``alpha``. Other algorithms (LoHa, LoKr, a
    convolution's ``lora_mid``, ``dora_scale``) are refused by the names of their keys.

    Args:
        file: A safetensors file.
        params: The base parameters.
        names: What torch calls each parameter, as rules; see `Name`.
        layouts: The roles of the parameters' axes, as for `load`.
        prefix: What comes before a module's name, such as ``"lora_"`` or ``"lycoris_"``.

    Returns:
        The adapter, the strings that the file keeps beside it, and our path by torch's name.

    Raises:
        CheckpointError: The file is missing or damaged, or keys or shapes do not fit; all of them
            at once.
        ConfigError: The rules do not fit the parameters.
    """
    stored = TensorFile.open(Path(file).expanduser().absolute())
    places = places_of(params, names, layouts)
    problems: list[str] = []
    called: dict[str, str] = {}
    for name, place in places.items():
        if place.is_weight:
            short = prefix + place.module.replace(".", "_")
            if short in called:
                problems.append(
                    f"{name}: would be called {short!r}, and so would {called[short]!r}"
                )
            called[short] = name
    found: dict[str, dict[str, str]] = {}
    for key in sorted(stored.tensors):
        module, _, end = key.partition(".")
        if end not in _ENDS:
            problems.append(f"{key}: expected a key of LoRA: {', '.join(sorted(_ENDS))}")
        elif module not in called:
            problems.append(f"{key}: {unknown('module', module, called, problems)}")
        else:
            found.setdefault(called[module], {})[end] = key
    factors: dict[str, Factors] = {}
    for name, keys in found.items():
        one = _factors(stored, places[name], keys, problems)
        if one is not None:
            factors[name] = one
    if not found and not problems:
        problems.append("expected keys of LoRA, found none")
    if problems:
        raise CheckpointError(
            f"{file}: the adapter does not fit these parameters:\n  " + "\n  ".join(problems)
        )
    adapter = build(str(file), params, places, factors, {})
    return Loaded(adapter, dict(stored.metadata), {n: places[n].path for n in sorted(factors)})


def _factors(
    file: TensorFile, place: Place, keys: Mapping[str, str], problems: list[str]
) -> Factors | None:
    down, up = keys.get("lora_down.weight"), keys.get("lora_up.weight")
    if down is None or up is None:
        found = ", ".join(sorted(keys))
        problems.append(f"{place.module}: expected lora_down and lora_up, found {found}")
        return None
    if problem := place.problem_of_factors():
        problems.append(f"{place.path}: {problem}")
        return None
    if place.kind == "embedding":
        problems.append(f"{place.module}: expected no factors of an embedding in this format")
        return None
    shapes = [file.tensors[key].shape for key in (down, up)]
    if place.kind != "conv":  # a convolution of one pixel is a linear layer
        shapes = [x[:2] if set(x[2:]) <= {1} else x for x in shapes]
    rank = shapes[0][0] if shapes[0] else 0
    wrong = check_pair(place, rank, *shapes) if rank else [f"{place.module}: its rank is 0"]
    alpha_key = keys.get("alpha")
    if alpha_key is not None and np.prod(file.tensors[alpha_key].shape) != 1:
        wrong.append(f"{alpha_key}: expected one number")
    if wrong:
        problems += wrong
        return None
    a, b = read_numbers(file, down, problems), read_numbers(file, up, problems)
    alpha = read_numbers(file, alpha_key, problems) if alpha_key else np.float32(rank)
    if a is None or b is None or alpha is None:
        return None
    scale = float(np.asarray(alpha).reshape(())) / rank
    return Factors(a.reshape(shapes[0]), b.reshape(shapes[1]), scale)
