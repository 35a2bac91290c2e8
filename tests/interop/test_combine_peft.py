"""`combine` beside PEFT's `add_weighted_adapter`, where both mean the same update."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

FAN_IN, FAN_OUT, DENSITY = 12, 10, 0.5  # the share of 120 elements is a whole number
RANKS, ALPHAS = (4, 4), (8, 6)
LAYOUT = jl.Layout((FAN_IN, FAN_OUT), in_axes=(0,), out_axes=(1,))


@pytest.fixture(scope="module")
def model() -> Any:
    """One layer with two trained adapters of PEFT."""
    torch.manual_seed(0)
    names = [f"t{k}" for k in range(len(RANKS))]
    configs = [
        peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"])
        for rank, alpha in zip(RANKS, ALPHAS, strict=True)
    ]
    model = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(FAN_IN, FAN_OUT)), configs[0], names[0]
    )
    model.add_adapter(names[1], configs[1])
    layer = _layer(model)
    for name in names:
        torch.nn.init.normal_(layer.lora_B[name].weight)
    return model


def _layer(model: Any) -> Any:
    return model.base_model.model[0]


def _theirs(model: Any, combination: str, weights: list[float], **options: Any) -> np.ndarray:
    """The update ``[in, out]`` of PEFT's combination."""
    name = f"{combination} {weights}".replace(".", "_")
    model.add_weighted_adapter(["t0", "t1"], weights, name, combination, **options)
    update: np.ndarray = _layer(model).get_delta_weight(name).detach().numpy().T
    return update


def _ours(model: Any) -> list[jl.Adapter]:
    layer = _layer(model)
    adapters = []
    for k, (rank, alpha) in enumerate(zip(RANKS, ALPHAS, strict=True)):
        a, b = (part[f"t{k}"].weight.detach().numpy().T for part in (layer.lora_A, layer.lora_B))
        factors = jl.LoraFactors(jnp.asarray(a), jnp.asarray(b), jnp.float32(alpha / rank), LAYOUT)
        adapters.append(jl.Adapter({"w": factors}))
    return adapters


# Theirs, ours; the adapters' weights. Theirs elects a sign before the weights, ours after them.
SAME: dict[str, Any] = {
    "cat": ("cat", {"method": "cat"}, [0.7, 1.3]),
    "svd": ("svd", {"method": "svd", "rank": 3}, [0.7, 1.3]),
    "pruned": (
        "magnitude_prune_svd",
        {"method": "magnitude_prune", "rank": 3, "density": DENSITY},
        [0.7, 1.3],
    ),
    "ties": ("ties_svd", {"method": "ties", "rank": 3, "density": DENSITY}, [0.8, 0.8]),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_update(name: str, model: Any) -> None:
    combination, options, weights = SAME[name]
    theirs = {"svd_rank": options["rank"]} if "rank" in options else {}
    theirs |= {"density": DENSITY} if "density" in options else {}
    want = _theirs(model, combination, weights, **theirs)
    got = jl.delta(jl.combine(_ours(model), weights, **options).adapter)["w"]
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())
    plain = sum(w * jl.delta(a)["w"] for w, a in zip(weights, _ours(model), strict=True))
    assert (np.abs(got - plain).max() < 1e-4) == (name == "cat")  # the others do change something


def test_what_is_called_linear_there_has_cross_terms(model: Any) -> None:
    weights = [0.7, 1.3]
    ours = _ours(model)
    theirs = _theirs(model, "linear", weights)
    roots = [np.sqrt(w * a["w"].scale) for w, a in zip(weights, ours, strict=True)]
    a, b = (
        sum(root * getattr(adapter["w"], name) for root, adapter in zip(roots, ours, strict=True))
        for name in ("a", "b")
    )
    np.testing.assert_allclose(a @ b, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    got = np.asarray(jl.delta(jl.combine(ours, weights, "linear").adapter)["w"])
    want = sum(w * jl.delta(adapter)["w"] for w, adapter in zip(weights, ours, strict=True))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    assert np.abs(got - theirs).max() > 0.1 * np.abs(got).max()


def test_a_sign_is_elected_after_the_weights(model: Any) -> None:
    weights = [0.3, 1.7]
    with pytest.warns(UserWarning, match="no pruning will be performed"):
        theirs = _theirs(model, "ties_svd", weights, svd_rank=10, density=1.0)
    got = jl.combine(_ours(model), weights, "ties", rank=10, density=1.0).adapter
    updates = [np.asarray(jl.delta(a)["w"]) for a in _ours(model)]
    heard = np.sign(updates[0] + updates[1]) == np.sign(
        weights[0] * updates[0] + weights[1] * updates[1]
    )
    assert 0.05 < 1 - heard.mean() < 0.5
    differs = np.abs(np.asarray(jl.delta(got)["w"]) - theirs) > 1e-3
    assert differs.any()
    assert not differs[heard].any()
