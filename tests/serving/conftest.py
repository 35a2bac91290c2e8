"""The small model, and servers of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import jax_lora as jl
from tests.serving.small import World, make_world, model


@pytest.fixture(scope="session")
def world() -> World:
    return make_world()


@pytest.fixture
def serve(world: World) -> Callable[..., jl.serving.Server]:
    """``serve(bank, load=..., max_wait=...)``: a server of the small model in batches of four."""

    def make(bank: jl.Bank, load: Any = None, **config: Any) -> jl.serving.Server:
        config = {"batch_sizes": (4,), "max_wait": 0.0, **config}
        return jl.serving.Server(
            config.pop("fun", model),
            world.params,
            bank,
            world.examples[0],
            load=load,
            config=jl.serving.ServerConfig(**config),
        )

    return make
