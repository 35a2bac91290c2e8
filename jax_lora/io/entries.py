"""An adapter's entries, as trees of arrays and what has to be known to make entries of these."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jax_lora.adapter import Layout, Variant
from jax_lora.errors import CheckpointError, JaxLoraError
from jax_lora.variants import VARIANTS


def static_of(entry: Any) -> dict[str, Any]:
    """What is not an array of an entry, as JSON-able data."""
    fields = [f.name for f in dataclasses.fields(entry) if f.metadata.get("static")]
    values = {name: getattr(entry, name) for name in fields}
    plain = {n: dataclasses.asdict(x) if isinstance(x, Layout) else x for n, x in values.items()}
    return {"variant": entry.NAME, **plain}


def entries_of(folder: str | Path, arrays: Any, kept: Any) -> dict[str, Variant]:
    """The entries of these arrays and of what `static_of` kept of each.

    Raises:
        CheckpointError: Names every entry that the arrays do not make, and why.
    """
    entries, problems = {}, []
    for path in sorted({*arrays, *kept}):
        if path not in arrays or path not in kept:
            problems.append(f"{path}: only in the item {'arrays' if path in arrays else 'config'}")
            continue
        variant = VARIANTS.get(kept[path].get("variant"))
        if variant is None:
            problems.append(
                f"{path}: expected a variant out of {', '.join(VARIANTS)}; found "
                f"{kept[path].get('variant')!r}"
            )
            continue
        fields = dataclasses.fields(variant)  # type: ignore[arg-type]
        needed = {f.name for f in fields if f.default is dataclasses.MISSING}
        found = {*arrays[path], *kept[path]} - {"variant"}
        if not needed <= found <= {f.name for f in fields}:
            names = ", ".join(f.name for f in fields)
            problems.append(
                f"{path}: expected the fields of {variant.NAME!r}, {names}; found "
                f"{', '.join(sorted(found))}"
            )
            continue
        try:
            entries[path] = _entry(variant, arrays[path], kept[path])
            problems += [f"{path}: {problem}" for problem in entries[path].problems()]
        except (JaxLoraError, TypeError, AttributeError) as error:
            problems.append(f"{path}: {error}")
    if problems:
        raise CheckpointError(
            f"{folder}: the arrays do not make the adapter, a newer jax_lora may have written it: "
            + "; ".join(problems)
        )
    return entries


def _entry(variant: type[Variant], arrays: dict[str, Any], kept: dict[str, Any]) -> Variant:
    """The entry of these arrays and of what `static_of` kept."""
    static = {name: x for name, x in kept.items() if name != "variant"}
    if "layout" in static:
        layout = static["layout"]
        static["layout"] = Layout(**{name: tuple(axes) for name, axes in layout.items()})
    static = {name: tuple(x) if isinstance(x, list) else x for name, x in static.items()}
    return variant(**arrays, **static)
