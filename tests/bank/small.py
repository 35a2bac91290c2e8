"""A small transformer: scanned, rematerialised layers, a table that is also a head, and a head."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jax_lora as jl

DEPTH, WIDTH, TOKENS, VOCABULARY = 2, 8, 5, 11
#: The adapters of the examples that the tests share; None is the base.
NAMES = ("a", "c", None, "b", "a", "c")


def norm(x: Any, scale: Any) -> Any:
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def attend(q: Any, k: Any, v: Any) -> Any:
    """Causal attention with two heads on ``[n, t, width]``."""
    n, t, width = q.shape
    q, k, v = (x.reshape(n, t, 2, width // 2) for x in (q, k, v))
    scores = jnp.einsum("nqhd,nkhd->nhqk", q, k) / 2
    scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, jnp.asarray(-1e9, q.dtype))
    return jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(scores), v).reshape(n, t, width)


def layer(x: Any, p: Any) -> tuple[Any, None]:
    h = norm(x, p["norm1"])
    x = x + attend(h @ p["query"], h @ p["key"], h @ p["value"]) @ p["out"]
    h = norm(x, p["norm2"])
    return x + jax.nn.silu(h @ p["up"]) @ p["down"], None


def model(params: Any, tokens: Any) -> Any:
    """``[n, t] -> {"next": [n, vocabulary], "each": [n, t, 3]}``."""
    x, _ = lax.scan(jax.checkpoint(layer), params["table"][tokens], params["layers"])
    return {"next": x[:, -1] @ params["table"].T, "each": jax.nn.relu(x) @ params["head"]}


def of_each_token(stacks: Any, slots: Any, tokens: Any) -> Any:
    """The same with other weights for each token: ``stacks`` has one axis more for each weight."""

    def dense(path: str, x: Any, k: Any = None) -> Any:
        w = stacks[path][slots] if k is None else stacks[path][slots][:, :, k]
        return jnp.einsum("nti,ntio->nto", x, w)

    n, t = tokens.shape
    each = jnp.arange(n)[:, None], jnp.arange(t)
    x = stacks["table"][slots][(*each, tokens)]
    for k in range(DEPTH):
        names = ("query", "key", "value", "out", "up", "down")
        query, key, value, out, up, down = (f"layers/{name}" for name in names)
        norm1, norm2 = (stacks[f"layers/{name}"][0, k] for name in ("norm1", "norm2"))
        h = norm(x, norm1)
        x = x + dense(out, attend(*(dense(path, h, k) for path in (query, key, value))), k)
        x = x + dense(down, jax.nn.silu(dense(up, norm(x, norm2), k)), k)
    last = jnp.einsum("ni,nvi->nv", x[:, -1], stacks["table"][slots[:, -1]])
    return {"next": last, "each": dense("head", jax.nn.relu(x))}


@dataclasses.dataclass(frozen=True)
class World:
    """The model's parameters, and adapters of them.

    Attributes:
        params: The base.
        adapters: ``a`` of rank 1, ``b`` of rank 3, ``c`` of rank 2 for some of the parameters.
        tokens: ``[6, t]``, one row for each of `NAMES`.
    """

    params: Any
    adapters: dict[str, jl.Adapter]
    tokens: jax.Array

    def bank(self, slots: int = 5) -> jl.Bank:
        """A new bank with the three of them, a slot between them left free."""
        bank = jl.Bank.empty(self.adapters["b"], slots)
        bank = bank.add("a", self.adapters["a"]).add("gone", self.adapters["b"])
        return bank.add("b", self.adapters["b"]).add("c", self.adapters["c"]).remove("gone")


def make_world() -> World:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2]), jnp.float32)

    shapes = dict.fromkeys(("query", "key", "value", "out"), (DEPTH, WIDTH, WIDTH))
    shapes |= {"up": (DEPTH, WIDTH, 12), "down": (DEPTH, 12, WIDTH)}
    norms = {name: 1 + normal(DEPTH, WIDTH) / 4 for name in ("norm1", "norm2")}
    params = {
        "table": normal(VOCABULARY, WIDTH),
        "head": normal(WIDTH, 3),
        "layers": norms | {name: normal(*shape) for name, shape in shapes.items()},
    }
    tokens = jnp.asarray(rng.integers(VOCABULARY, size=(len(NAMES), TOKENS)), jnp.int32)
    adapters = {}
    for name, rank in (("a", 1), ("b", 3), ("c", 2)):
        config = jl.LoraConfig(rank=rank, targets="all")
        plan = jl.plan(model, params, tokens, config=config)
        fresh = jax.eval_shape(lambda plan=plan: jl.init(jax.random.key(0), params, plan))
        adapters[name] = jl.Adapter(
            {
                path: jl.LoraFactors(
                    normal(*f.a.shape), normal(*f.b.shape), jnp.float32(0.3 + rank / 4), f.layout
                )
                for path, f in fresh.items()
            }
        )
    adapters["c"] = jl.select(adapters["c"], ["table", "layers/up"])
    return World(params, adapters, tokens)
