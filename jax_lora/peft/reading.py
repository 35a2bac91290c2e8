"""Adapters that Hugging Face PEFT wrote."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jax_lora.adapter import Adapter
from jax_lora.errors import CheckpointError
from jax_lora.peft.files import CONFIG, listed
from jax_lora.peft.names import Name
from jax_lora.peft.parts import Contents, Part, build
from jax_lora.peft.places import places_of
from jax_lora.peft.source import Source


class Loaded(NamedTuple):
    """What `load` returns.

    Attributes:
        adapter: The adapter.
        config: What ``adapter_config.json`` holds: the base's name, the rate of dropout, and so on.
        names: By the name of each of torch's parameters that the file adapts, our path.
    """

    adapter: Adapter
    config: dict[str, Any]
    names: dict[str, str]


def load(
    folder: str | Path,
    params: Any,
    names: Iterable[Name | tuple[str, str]],
    layouts: Mapping[str, Any] | None = None,
    *,
    start: str | Path | None = None,
) -> Loaded:
    """Read an adapter that PEFT wrote: ``adapter_config.json`` and safetensors.

    Every key of the file has to belong to a parameter of ``params``, and every module that the
    configuration names has to have its keys: all that does not fit is one error. The factors keep
    their dtype. Where the layers of a stacked parameter have different ranks, the smaller are
    padded with zeros; where they have different scales, these are taken into ``b``, in float32 if
    they would be rounded; a layer that the file does not adapt has zeros, which do not move in
    training either. Modules that are
    trained whole (``modules_to_save``) and biases become values of variant ``full``, trained
    tokens rows of their table. LoHa is read as ``loha``, and LoKr as ``lokr`` where its matrices
    are split as they are here, else as the LoRA that it is.

    Args:
        folder: The folder with both files.
        params: The base parameters.
        names: What torch calls each parameter, as rules; see `Name`. A pair is a rule, too.
        layouts: The roles of the parameters' axes: ``jl.discover(fun, params, x)``,
            ``plan.targets``, or `Layout` by path. What is missing is what the rules say.
        start: For an adapter that started from parts of the base (PiSSA, OLoRA, CorDA, LoRA-GA),
            which PEFT subtracts from the base: a folder with the adapter as it was then. The
            result is the difference of both, for the base as it was before.

    Raises:
        CheckpointError: A file is missing or damaged, a field of the configuration is set that is
            not implemented, or keys, shapes or ranks do not fit; all of them at once.
        ConfigError: The rules do not fit the parameters.
        AdapterError: The base parameters' values are needed, and there are only shapes.
    """
    source = Source.open(folder, places_of(params, names, layouts))
    problems: list[str] = []
    found = source.sort_keys(problems)
    first: dict[str, Part] = {}
    if source.config.start and start is None:
        problems.append(
            f"{CONFIG}: init_lora_weights is {source.config.start!r}: PEFT subtracted the factors "
            "at the start from the base, so that on the plain base this adapter is another model; "
            "pass start=, a folder with the adapter before training, or convert it with PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    elif start is not None:
        first = _read_start(start, source, problems)
    parts = source.read_parts(found, problems, params)
    if start is not None:
        parts = _since(parts, first, problems)
    values = source.read_values(found, problems)
    rows = source.read_rows(found, problems, params)
    if problems:
        raise CheckpointError(
            f"{source.path}: the adapter does not fit these parameters:\n  {listed(problems)}"
        )
    contents = Contents(parts, values, rows)
    adapter = build(str(source.path), params, source.places, contents)
    used = {name: source.places[name].path for name in contents.names}
    return Loaded(adapter, source.stored, used)


def _read_start(folder: str | Path, now: Source, problems: list[str]) -> dict[str, Part]:
    """The factors before training."""
    if now.config.start == "":
        problems.append(
            "start: expected none, as init_lora_weights leaves the base as it is and nothing is to "
            "be subtracted"
        )
    source = Source.open(folder, now.places)
    mine: list[str] = []
    parts = source.read_parts(source.sort_keys(mine), mine, {})
    problems += [f"{source.path.name}: {problem}" for problem in mine]
    return parts


def _since(
    parts: Mapping[str, Part], first: Mapping[str, Part], problems: list[str]
) -> dict[str, Part]:
    """The updates since the factors at the start."""
    odd = sorted(first.keys() ^ parts.keys())
    problems += [f"{name}: is only in one of the adapter and its start" for name in odd]
    since = {}
    for name in sorted(parts.keys() & first.keys()):
        then, now = first[name], parts[name]
        if (then.arrays["a"].shape, then.scale) != (now.arrays["a"].shape, now.scale):
            problems.append(f"{name}: has another rank or scale than at the start")
        anchor = {"a0": then.arrays["a"], "b0": then.arrays["b"]}
        since[name] = dataclasses.replace(now, arrays={**now.arrays, **anchor})
    return since
