"""A small model, adapters of it, and what an example gives with each of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_lora as jl


def model(params: Any, x: Any) -> Any:
    """``[n, 4] -> {"y": [n, 3], "h": [n, 5]}``."""
    h = jnp.tanh(x @ params["up"]["kernel"])
    return {"y": h @ params["down"]["kernel"], "h": h}


@dataclasses.dataclass(frozen=True)
class World:
    """What the tests share.

    Attributes:
        params: The base.
        uses: The roles of the axes of its parameters.
        adapters: Six, of ranks 1 and 2, by name.
        examples: ``[64, 4]``.
    """

    params: Any
    uses: Any
    adapters: dict[str, jl.Adapter]
    examples: np.ndarray

    def bank(self, slots: int, *names: str) -> jl.Bank:
        """A new bank with some of them."""
        bank = jl.Bank.empty(self.adapters["b"], slots)
        for name in names:
            bank = bank.add(name, self.adapters[name])
        return bank

    def expected(self, name: str | None, k: int) -> dict[str, np.ndarray]:
        """What an example gives with an adapter, from dense weights in float64."""
        dense = {}
        for path, kernel in (("up", self.params["up"]), ("down", self.params["down"])):
            dense[path] = {"kernel": np.asarray(kernel["kernel"], np.float64)}
            if name is not None:
                f = self.adapters[name][f"{path}/kernel"]
                a, b = np.asarray(f.a, np.float64), np.asarray(f.b, np.float64)
                dense[path]["kernel"] = dense[path]["kernel"] + float(f.scale) * a @ b
        h = np.tanh(self.examples[k].astype(np.float64) @ dense["up"]["kernel"])
        return {"y": h @ dense["down"]["kernel"], "h": h}

    def check(self, found: Any, name: str | None, k: int) -> None:
        """That a result is that of this adapter and of this example."""
        expected = self.expected(name, k)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert isinstance(found[key], np.ndarray)
            assert found[key].dtype == np.float32
            np.testing.assert_allclose(found[key], value, rtol=0, atol=2e-6)


def make_world() -> World:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)

    params = {"up": {"kernel": normal(4, 5)}, "down": {"kernel": normal(5, 3)}}
    uses = jl.discover(model, params, jnp.ones((1, 4)))
    adapters = {}
    for k, name in enumerate("abcdef"):
        plan = jl.plan(model, params, jnp.ones((1, 4)), config=jl.LoraConfig(rank=1 + k % 2))
        fresh = jax.eval_shape(lambda plan=plan: jl.init(jax.random.key(0), params, plan))
        adapters[name] = jl.Adapter(
            {
                path: jl.LoraFactors(
                    normal(*f.a.shape), normal(*f.b.shape), jnp.float32(1 + k / 4), f.layout
                )
                for path, f in fresh.items()
            }
        )
    return World(params, uses, adapters, rng.normal(size=(64, 4)).astype(np.float32))
