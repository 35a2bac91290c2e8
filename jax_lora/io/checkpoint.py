"""Orbax checkpoints of an adapter and of base parameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_lora.adapter import Adapter, Variant, check_fits
from jax_lora.config import LoraConfig
from jax_lora.errors import AdapterError, CheckpointError, JaxLoraError, expect_type
from jax_lora.io import files, guards
from jax_lora.io.entries import entries_of, static_of
from jax_lora.io.fingerprints import Fingerprint, differences, fingerprint


def save_params(folder: str | Path, params: Any, metadata: Mapping[str, Any] | None = None) -> None:
    """Write parameters as an orbax checkpoint.

    Args:
        folder: The checkpoint: a folder that does not exist yet, or is empty.
        params: A pytree of arrays. Containers other than dicts and lists come back as these.
        metadata: JSON-able facts to keep beside them, such as the model's sizes.

    Raises:
        CheckpointError: The folder holds something, or it cannot be written, or a leaf is no array.
        ConfigError: The metadata are not JSON-able.
    """
    document = {"format": files.PARAMS, "metadata": files.plain("metadata", metadata or {})}
    files.write(folder, document, arrays=params)


def load_params(folder: str | Path) -> tuple[Any, dict[str, Any]]:
    """Read what `save_params` wrote, or the parameters of a training checkpoint of such.

    Returns:
        The parameters, on the default device, and their metadata.

    Raises:
        CheckpointError: There is no such checkpoint, it is damaged, or it holds something else.
    """
    document = files.read_document(folder, files.PARAMS)
    arrays = files.read_arrays(folder, document)
    with guards.as_it_was_written(folder):
        return jax.tree.map(jnp.asarray, arrays), dict(document["metadata"])


def save_adapter(
    folder: str | Path,
    adapter: Adapter,
    config: LoraConfig | None = None,
    metadata: Mapping[str, Any] | None = None,
    base: Any = None,
) -> None:
    """Write an adapter, and nothing but the adapter, as an orbax checkpoint.

    The ``arrays`` item is ``{path: {"a": ..., "b": ..., "scale": ...}}``, or what other arrays the
    variant has; the ``config`` item holds each path's variant and layout, the configuration, and
    the base's fingerprint, as far as these are given.

    Args:
        folder: The checkpoint: a folder that does not exist yet, or is empty.
        adapter: The adapter.
        config: The configuration it was made with.
        metadata: JSON-able facts to keep beside it.
        base: The parameters it was trained on, so that `load_adapter` can refuse others. Kept of
            them is their `fingerprint`: shapes, dtypes, and 64 bits for each.

    Raises:
        CheckpointError: The folder holds something, or it cannot be written, or a leaf is no array.
        AdapterError: The adapter does not fit ``base``.
        ConfigError: The metadata are not JSON-able.
    """
    arrays, document = adapter_parts(folder, adapter, config)
    if base is not None:
        check_fits(base, adapter)
        document["base"] = fingerprint(base)
    document["metadata"] = files.plain("metadata", metadata or {})
    files.write(folder, document, arrays=arrays)


class SavedAdapter(NamedTuple):
    """What an adapter checkpoint holds.

    Attributes:
        adapter: The adapter, on the default device.
        config: Its configuration, if there was one.
        metadata: What was kept beside it.
    """

    adapter: Adapter
    config: LoraConfig | None
    metadata: dict[str, Any]


def load_adapter(folder: str | Path, params: Any = None, force: bool = False) -> SavedAdapter:
    """Read what `save_adapter` wrote, or the adapter of a training checkpoint.

    Args:
        folder: The checkpoint.
        params: The base parameters it will be used with, or their shapes, to check that it fits
            them and that they are those it was trained on, as far as it knows these.
        force: Take it although it was trained on other parameters; the shapes have to fit.

    Returns:
        What it holds: adapter, configuration and metadata.

    Raises:
        CheckpointError: There is no such checkpoint, it is damaged, or it holds something else.
        AdapterError: The adapter does not fit ``params``, or was trained on others; all of those
            that differ are named.
    """
    document = files.read_document(folder, files.ADAPTER)
    arrays = files.read_arrays(folder, document)
    with guards.as_it_was_written(folder):
        adapter = adapter_of(folder, document, jax.tree.map(jnp.asarray, arrays))
        config, metadata = config_of(folder, document), dict(document["metadata"])
    if params is not None:
        check_fits(params, adapter)
        if not force:
            with guards.as_it_was_written(folder):
                base = document.get("base")
                check_base(folder, base, params, "pass force=True if you know better")
    return SavedAdapter(adapter, config, metadata)


def adapter_parts(
    folder: str | Path, adapter: Adapter, config: LoraConfig | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """An adapter as a tree of arrays and the beginning of their document.

    Raises:
        CheckpointError: It is one for a single call, such as with dropout.
    """
    expect_type("an adapter", adapter, Adapter)
    if config is not None:
        expect_type("a configuration, such as plan.config", config, LoraConfig)
    odd = [path for path, entry in adapter.items() if not isinstance(entry, Variant)]
    if odd:
        raise CheckpointError(
            f"{folder}: expected the adapter itself, got one for a single call, such as with "
            f"dropout: {', '.join(odd)}"
        )
    arrays = {path: entry.arrays() for path, entry in adapter.items()}
    document = {
        "format": files.ADAPTER,
        "lora": config.to_json() if config else None,
        "entries": {path: static_of(entry) for path, entry in adapter.items()},
    }
    return arrays, document


def adapter_of(folder: str | Path, document: Mapping[str, Any], arrays: Any) -> Adapter:
    """The adapter that these arrays are.

    Raises:
        CheckpointError: Names every entry that the arrays do not make.
    """
    if document["version"] == 1:
        layouts = document["layouts"]
        static = {path: {"variant": "lora", "layout": layout} for path, layout in layouts.items()}
    else:
        static = document["entries"]
    return Adapter(entries_of(folder, arrays, static))


def config_of(folder: str | Path, document: Mapping[str, Any]) -> LoraConfig | None:
    """The configuration that a document holds, if there is one.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        return LoraConfig.from_json(document["lora"]) if document["lora"] else None
    except JaxLoraError as error:
        raise CheckpointError(
            f"{folder}: the configuration cannot be read, a newer jax_lora may have written it: "
            f"{error}"
        ) from error


def check_base(folder: str | Path, saved: Fingerprint | None, params: Any, remedy: str) -> None:
    """Check that these are the parameters whose fingerprint was saved, if one was.

    Raises:
        AdapterError: Names every parameter that differs.
    """
    if saved is not None and (lines := differences(saved, params)):
        raise AdapterError(
            f"{folder}: expected the base that the adapter was trained on, got one that differs in "
            f"{len(lines)} of {len(saved)} parameters; use that base, or {remedy}:\n  "
            + "\n  ".join(lines)
        )
