"""Packages that only some of the functions need."""

from __future__ import annotations

import importlib
from typing import Any


def import_extra(name: str) -> Any:
    """Import a module of a package that the ``cifar10`` extra installs.

    Raises:
        ImportError: It is not there; the message names the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f"jax_lora.report needs {package} for this; run: pip install 'jax_lora[cifar10]'"
        ) from error
