"""The small model, its adapters, and a function that takes them from a bank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import pytest

import jax_lora as jl
from tests.bank.small import World, make_world, model
from tests.conftest import QUICK


@pytest.fixture(scope="session")
def world() -> World:
    return make_world()


@pytest.fixture(scope="session")
def mixed() -> Callable[..., Any]:
    """``mixed(params, bank, ids, tokens)``, compiled once for each shape."""
    return jax.jit(jl.apply_bank(model, strict=True), compiler_options=QUICK)
