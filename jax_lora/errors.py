"""Errors that finish the debugging: what was expected, what was found, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class JaxLoraError(ValueError):
    """Base class of every error this library raises on purpose."""


class ConfigError(JaxLoraError):
    """A configuration value that cannot mean anything."""


class TargetError(JaxLoraError):
    """A selection that matches nothing, or that matches what cannot be adapted."""


class AdapterError(JaxLoraError):
    """An adapter that does not fit the parameters it is used with."""


class MaterializeError(JaxLoraError):
    """Under ``strict=True``: a weight reached a primitive that has no factored rule."""


class CheckpointError(JaxLoraError):
    """A checkpoint that is missing, damaged, or of another shape than expected."""


def expect_type(what: str, value: object, expected: type) -> None:
    """Refuse an argument of another type, before it fails somewhere inside.

    Raises:
        AdapterError: Names what was expected and what came.
    """
    if not isinstance(value, expected):
        raise AdapterError(
            f"expected {what} ({expected.__module__}.{expected.__qualname__}), "
            f"got {type(value).__name__}"
        )


def expect_callable(what: str, value: object) -> None:
    """Refuse an argument that is no function, before it is called somewhere inside.

    Raises:
        ConfigError: Names what was expected and what came.
    """
    if not callable(value):
        raise ConfigError(f"expected {what}, got {type(value).__name__}")


def near_misses(name: str, candidates: Iterable[str], count: int = 3) -> str:
    """Name the candidates nearest to ``name``, as the tail of an error message.

    Example:
        >>> near_misses("params/l1/kernal", ["params/l1/kernel", "params/l1/bias"])
        "nearest: 'params/l1/kernel', 'params/l1/bias'"
    """
    known = sorted(set(candidates))
    if not known:
        return "there is nothing to choose from"
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.4)
    if close:
        return "nearest: " + ", ".join(repr(c) for c in close)
    shown = ", ".join(repr(c) for c in known[:count])
    more = f" and {len(known) - count} more" if len(known) > count else ""
    return f"known: {shown}{more}"
