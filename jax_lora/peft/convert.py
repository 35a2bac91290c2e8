"""Adapters and weights from one format to another, as ``scripts/convert.py`` does it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jax_lora.adapter import Adapter
from jax_lora.errors import CheckpointError, ConfigError
from jax_lora.io import load_adapter, save_adapter
from jax_lora.peft.bases import (
    Base,
    format_of,
    open_base,
    read_rules,
    shapes_of,
)
from jax_lora.peft.kohya import load_kohya
from jax_lora.peft.names import Name, Rules
from jax_lora.peft.places import places_of
from jax_lora.peft.reading import load
from jax_lora.peft.weights import save_weights
from jax_lora.peft.writing import save
from jax_lora.tables import count, format_table, group_numbered

#: Where a checkpoint's metadata have what an adapter came with.
_NAMES, _CONFIG = "names", "peft"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToCheckpoint:
    """From a folder of PEFT, or a file of kohya's or LyCORIS, to a checkpoint of jax_lora.

    Attributes:
        adapter: The folder or the file.
        base: What the adapter is for: weights of torch in safetensors, a file or a folder, whose
            names and shapes the checkpoint then has; or a checkpoint of jax_lora.
        out: The new checkpoint.
        names: A file of rules (TOML or JSON) that say what torch calls the base's parameters.
        start: For PiSSA and its like: the adapter before training.
        prefix: What comes before the modules' names in a file of kohya's.
    """

    adapter: Path
    base: Path
    out: Path
    names: Path | None = None
    start: Path | None = None
    prefix: str = "lora_"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToPeft:
    """From a checkpoint of jax_lora to a folder that PEFT loads.

    Attributes:
        adapter: The checkpoint.
        out: The new folder.
        names: A file of rules (TOML or JSON) that say what torch calls the parameters; by default
            those with which the adapter was converted to a checkpoint.
        base: The base, as for to-checkpoint; needed only where PEFT keeps more than was trained.
        flat: One rank and one scale for all modules, which every reader gets right.
        base_model: The base's name, for base_model_name_or_path.
        task_type: PEFT's, such as CAUSAL_LM.
    """

    adapter: Path
    out: Path
    names: Path | None = None
    base: Path | None = None
    flat: bool = True
    base_model: str | None = None
    task_type: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToWeights:
    """From a base, with an adapter merged into it or without, to safetensors for from_pretrained.

    Attributes:
        base: The base, as for to-checkpoint.
        out: The new folder.
        adapter: The adapter, in any of the formats.
        names: A file of rules (TOML or JSON) that say what torch calls the base's parameters.
        shard_gb: The most gigabytes in one file; above it there are several, with an index.
        start: For PiSSA and its like: the adapter before training.
        prefix: What comes before the modules' names in a file of kohya's.
    """

    base: Path
    out: Path
    adapter: Path | None = None
    names: Path | None = None
    shard_gb: float = 5.0
    start: Path | None = None
    prefix: str = "lora_"


Conversion = ToCheckpoint | ToPeft | ToWeights


def convert(options: Conversion) -> None:
    """Convert, and print what became what.

    Raises:
        JaxLoraError: Something cannot be read, does not fit, or cannot be written.
    """
    if isinstance(options, ToCheckpoint):
        _to_checkpoint(options)
    elif isinstance(options, ToPeft):
        _to_peft(options)
    else:
        _to_weights(options)


def _to_checkpoint(options: ToCheckpoint) -> None:
    base = open_base(options.base, _rules(options.names), options.adapter)
    adapter, config = _read(options, base)
    names = [rule.to_json() for rule in Rules(base.names).used_for(adapter)]
    save_adapter(options.out, adapter, metadata={_NAMES: names, _CONFIG: config})
    _report(adapter, base, options.out)


def _to_peft(options: ToPeft) -> None:
    adapter, _, metadata = load_adapter(options.adapter)
    rules = _rules(options.names) or tuple(map(Name.from_json, metadata.get(_NAMES, ())))
    if not rules:
        raise ConfigError(
            f"{options.adapter}: expected the parameters' names in torch, which this checkpoint "
            "does not hold; give --names, a file with the path, name, kind and axes of each"
        )
    base = open_base(options.base, rules, None) if options.base else shapes_of(adapter, rules)
    stored = metadata.get(_CONFIG, {})
    save(
        options.out,
        adapter,
        base.params,
        base.names,
        flat=options.flat,
        base_model=options.base_model or stored.get("base_model_name_or_path"),
        task_type=options.task_type or stored.get("task_type"),
    )
    _report(adapter, base, options.out)


def _to_weights(options: ToWeights) -> None:
    if not 0 < options.shard_gb < 1e9:
        raise ConfigError(f"expected --shard-gb above 0, got {options.shard_gb}")
    base = open_base(options.base, _rules(options.names), options.adapter)
    adapter = _read(options, base)[0] if options.adapter else None
    names = save_weights(
        options.out,
        base.params,
        base.names,
        adapter=adapter,
        shard_bytes=max(1, int(options.shard_gb * 1e9)),
    )
    if adapter is not None:
        _report(adapter, base, options.out)
    print(f"{count(len(names))} tensors of torch in {options.out}")


def _rules(file: Path | None) -> tuple[Name, ...]:
    return read_rules(file) if file else ()


def _read(options: ToCheckpoint | ToWeights, base: Base) -> tuple[Adapter, dict[str, Any]]:
    """An adapter in any format, for a base, and the settings that came with it."""
    assert options.adapter is not None
    found = format_of(options.adapter)
    if found == "peft":
        loaded = load(options.adapter, base.params, base.names, start=options.start)
        return loaded.adapter, loaded.config
    if found == "kohya":
        prefix = options.prefix
        loaded = load_kohya(options.adapter, base.params, base.names, prefix=prefix)
        return loaded.adapter, loaded.config
    if found == "jax_lora":
        return load_adapter(options.adapter, base.params)[0], {}
    raise CheckpointError(f"{options.adapter}: expected an adapter, found whole weights")


def _report(adapter: Adapter, base: Base, out: Path) -> None:
    """The table of what became what, equal modules of different layers in one row."""
    places = places_of(base.params, base.names)
    rows = {
        name: (
            re.sub(r"\d+", "*", place.path),
            str(adapter[place.path]),
            _scale(adapter[place.path]),
        )
        for name, place in sorted(places.items())
        if place.path in adapter
    }
    print(format_table(("torch", "here", "trained", "scale"), _table(rows), right=(3,)))
    for name in rows:
        place = places[name]
        if place.kind == "embedding" and not adapter[place.path].WHOLE:
            print(
                f"note: {name} is adapted where its rows are looked up; a function that has it as "
                "its head, too, would adapt both"
            )
    trained = count(adapter.trainable_params)
    print(f"{count(len(rows))} parameters of torch, {trained} trained numbers: {out}")


def _table(rows: Mapping[str, tuple[str, ...]]) -> list[tuple[str, ...]]:
    groups: Iterable[tuple[str, list[str]]] = group_numbered(rows).items()
    return [(name, *rows[names[0]]) for name, names in groups]


def _scale(entry: Any) -> str:
    scale = getattr(entry, "scale", None)
    return "-" if scale is None else f"{float(scale):.6g}"
