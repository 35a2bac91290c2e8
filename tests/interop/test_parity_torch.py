"""The article's PyTorch program and this library, step by step: the same numbers come out.

Both start from torch's weights and see the same batches in the same order, the last one short. They
share the mathematics and not the order of the arithmetic, so the comparisons are to float32
tolerances: 50 steps at a rate of 0.001 add up gradients whose own rounding errors average out, so
that the weights end within one or two units in the last place (seen: 1.5e-8 beside weights up to
0.18, and 2.2e-7 of a loss). `CLOSE` and `CLOSE_LOSS` leave a factor of about ten for other
processors. The control at the end shows that a real difference is far larger: 3e-5 or more in a
weight.
"""

from __future__ import annotations

import importlib
import math
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_lora as jl
from jax_lora.models import MLP, torch_default
from jax_lora.training import TrainState, epoch_over_arrays, train_step

torch = pytest.importorskip("torch")
pytest.importorskip("PIL")

SIZES = ((3072, 128), (128, 128), (128, 10))
RANK, STEPS, BATCH, LAST = 32, 50, 32, 16
EXAMPLES = (STEPS - 1) * BATCH + LAST
CLOSE_LOSS = {"rtol": 2e-6}
CLOSE = {"rtol": 1e-6, "atol": 1e-7}

MODEL = MLP(tuple(width for _, width in SIZES))
ADAPTED = jl.apply(MODEL.apply)


@pytest.fixture(scope="module")
def article() -> ModuleType:
    return importlib.import_module("benchmarks.peers.article_pytorch")


@pytest.fixture(scope="module")
def data() -> dict[str, np.ndarray]:
    """Images with something to learn: a pattern for each class in noise, in [-1, 1]."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, EXAMPLES, np.int32)
    patterns = rng.normal(size=(10, 3072))
    images = np.tanh(1.0 * patterns[labels] + rng.normal(size=(EXAMPLES, 3072)))
    return {"image": images.astype(np.float32), "label": labels}


def torch_batches(data: dict[str, np.ndarray]) -> list[tuple[Any, Any]]:
    images, labels = torch.from_numpy(data["image"]), torch.from_numpy(data["label"]).long()
    batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    assert [len(labels) for _, labels in batches] == [BATCH] * (STEPS - 1) + [LAST]
    return batches


def numpy_of(tensor: Any) -> np.ndarray:
    return tensor.detach().numpy().copy()


def params_of(model: Any) -> Any:
    """torch keeps a weight as [out, in]; here it is [in, out]."""
    layers = {name: getattr(model, name) for name in ("l1", "l2", "l3")}
    return {
        "params": {
            name: {
                "kernel": jnp.asarray(numpy_of(layer.weight).T),
                "bias": jnp.asarray(numpy_of(layer.bias)),
            }
            for name, layer in layers.items()
        }
    }


def adapter_of(model: Any, scale: float = 1.0) -> jl.Adapter:
    """The article keeps A as [in, r] and B as [r, out], as we do."""
    entries = {}
    for index, size in enumerate(SIZES, start=1):
        lora = getattr(model, f"l{index}_lora")
        a, b = (jnp.asarray(numpy_of(factor)) for factor in (lora.A, lora.B))
        layout = jl.Layout(size, in_axes=(0,), out_axes=(1,))
        factors = jl.LoraFactors(a, b, jnp.float32(scale), layout)
        entries[f"params/l{index}/kernel"] = factors
    return jl.Adapter(entries)


def train(
    predict: Any,
    optimizer: optax.GradientTransformation,
    trained: Any,
    frozen: Any,
    data: dict[str, np.ndarray],
    padding_weight: float = 0.0,
) -> tuple[Any, np.ndarray]:
    """One epoch in the order of the data, as one program; returns the trained tree and losses."""

    def losses(trained: Any, frozen: Any, batch: Any) -> jax.Array:
        logits = predict(trained, frozen, batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])

    indices, weights = np.zeros(STEPS * BATCH, np.int32), np.full(STEPS * BATCH, padding_weight)
    indices[:EXAMPLES], weights[:EXAMPLES] = np.arange(EXAMPLES), 1
    order = indices.reshape(STEPS, BATCH), weights.reshape(STEPS, BATCH).astype(np.float32)
    step = train_step(losses, optimizer)
    run = jax.jit(lambda state, data, order: epoch_over_arrays(step, state, data, order))
    state, metrics = run(TrainState.create(trained, optimizer, frozen), data, order)
    return state.trained, np.asarray(metrics["loss"])


def train_base(params: Any, data: dict[str, np.ndarray], **options: Any) -> tuple[Any, np.ndarray]:
    sgd = optax.sgd(0.001, momentum=0.9)
    return train(lambda p, _, x: MODEL.apply(p, x), sgd, params, None, data, **options)


def train_lora(
    adapter: jl.Adapter, params: Any, data: dict[str, np.ndarray]
) -> tuple[Any, np.ndarray]:
    sgd = jl.optim.lora_optimizer(optax.sgd(0.001, momentum=0.9))
    return train(lambda a, p, x: ADAPTED(p, a, x), sgd, adapter, params, data)


@pytest.fixture
def base(article: ModuleType) -> Any:
    torch.manual_seed(0)
    return article.build_base_model()


def assert_close(found: Any, expected: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **CLOSE), found, expected)


def test_fifty_steps_of_the_base(article: ModuleType, base: Any, data: Any) -> None:
    start = params_of(base)
    trained, losses = train_base(start, data)
    expected = article.train_steps(base, article.build_optimizer(base), torch_batches(data))
    np.testing.assert_allclose(losses, expected, **CLOSE_LOSS)
    assert_close(trained, params_of(base))
    # It went somewhere: by far more than the tolerance.
    assert losses[-1] < losses[0] - 0.1
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), trained, start)
    assert min(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.parametrize("factored", [False, True])
def test_fifty_steps_of_lora(article: ModuleType, base: Any, data: Any, factored: bool) -> None:
    model = article.build_lora_model(base.state_dict(), factored=factored)
    params, start = params_of(model), adapter_of(model)
    trained, losses = train_lora(start, params, data)
    expected = article.train_steps(model, article.build_optimizer(model), torch_batches(data))
    np.testing.assert_allclose(losses, expected, **CLOSE_LOSS)
    assert_close(trained, adapter_of(model))
    jax.tree.map(np.testing.assert_array_equal, params_of(model), params)
    assert losses[-1] < losses[0] - 0.1
    assert min(np.abs(f.b).max() for f in trained.values()) > 1e-3

    # And the trained adapter is the same function, beside the base and merged into it.
    with torch.no_grad():
        wanted = model(torch.from_numpy(data["image"][:8])).numpy()
    x = jnp.asarray(data["image"][:8])
    scale = np.abs(wanted).max()
    for found in (ADAPTED(params, trained, x), MODEL.apply(jl.merge(params, trained), x)):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * scale)


def test_what_is_not_the_same_is_far_off(base: Any, article: ModuleType, data: Any) -> None:
    """The control: each of these would pass if the tolerances were loose."""
    model = article.build_lora_model(base.state_dict())
    params = params_of(base)
    wanted, _ = train_base(params, data)
    counted, _ = train_base(params, data, padding_weight=1.0)
    with pytest.raises(AssertionError):
        assert_close(counted, wanted)
    lora, losses = train_lora(adapter_of(model), params, data)
    by_rank, other = train_lora(adapter_of(model, scale=1 / RANK), params, data)
    assert np.abs(other - losses).max() > 1e3 * CLOSE_LOSS["rtol"] * losses.max()
    with pytest.raises(AssertionError):
        assert_close(by_rank, lora)


class TestInitialisation:
    """Bounds are exact; a moment of n draws is as uncertain as n draws make it, times five."""

    def check(self, found: np.ndarray, expected: np.ndarray, bound: float) -> None:
        for sample in (found, expected):
            sample = np.asarray(sample, np.float64).ravel()
            n = sample.size
            assert np.abs(sample).max() <= bound * (1 + 1e-6)
            # The farthest of n uniform draws lies about bound/n short of the bound.
            assert np.abs(sample).max() >= bound * (1 - min(0.5, 20 / n))
            assert abs(sample.mean()) < 5 * bound / math.sqrt(3 * n)
            # The variance bound^2/3 of a sample has the standard error bound^2 sqrt(4/45/n).
            assert abs(sample.var() - bound**2 / 3) < 5 * bound**2 * math.sqrt(4 / 45 / n)

    def test_of_the_base_is_torchs(self, base: Any) -> None:
        params = MODEL.init(jax.random.key(0), jnp.ones((1, 3072)))["params"]
        for name, (fan_in, _) in zip(("l1", "l2", "l3"), SIZES, strict=True):
            layer = getattr(base, name)
            bound = 1 / math.sqrt(fan_in)
            self.check(params[name]["kernel"], numpy_of(layer.weight).T, bound)
            self.check(params[name]["bias"], numpy_of(layer.bias), bound)
            assert params[name]["kernel"].shape == numpy_of(layer.weight).T.shape

    def test_torch_default_is_in_no_layers_name(self) -> None:
        sample = torch_default(400)(jax.random.key(1), (200, 300))
        self.check(sample, torch.empty(200, 300).uniform_(-0.05, 0.05).numpy(), 0.05)

    def test_of_a_is_the_articles_and_not_the_papers(self, article: ModuleType, base: Any) -> None:
        model = article.build_lora_model(base.state_dict())
        params = params_of(base)
        x = jax.ShapeDtypeStruct((BATCH, 3072), jnp.float32)
        adapters = {}
        for init in ("article", "kaiming"):
            config = jl.LoraConfig(
                rank=RANK, alpha=1, scaling="alpha", init=init, targets="**/kernel"
            )
            plan = jl.plan(MODEL.apply, params, x, config=config)
            adapters[init] = jl.init(jax.random.key(0), params, plan)
        wanted = adapter_of(model)
        assert jax.tree.structure(adapters["article"]) == jax.tree.structure(wanted)
        for path, factors in adapters["article"].items():
            self.check(factors.a, wanted[path].a, 1 / math.sqrt(RANK))
            np.testing.assert_array_equal(factors.b, wanted[path].b)
            assert factors.scale == wanted[path].scale == 1
        assert np.abs(adapters["kaiming"]["params/l1/kernel"].a).max() <= 1 / math.sqrt(3072)
