"""`extract` and `resize` against numpy's SVD in float64."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl

LAYOUTS = {
    "l1/kernel": jl.Layout((6, 5), (0,), (1,)),
    "l2/kernel": jl.Layout((5, 3, 2, 2), (1, 2), (0,), (3,)),
    "l3/kernel": jl.Layout((2, 4, 3), (1,), (2,), (0,)),
}


@pytest.fixture
def adapter(entry: Any) -> jl.Adapter:
    return jl.Adapter({path: entry(layout, rank=2) for path, layout in LAYOUTS.items()})


@pytest.fixture
def base(normal: Any) -> dict[str, Any]:
    layers = {path.split("/")[0]: normal(*layout.shape) for path, layout in LAYOUTS.items()}
    return {name: {"kernel": kernel, "bias": normal(3)} for name, kernel in layers.items()}


def singular_values(update: Any, layout: jl.Layout) -> np.ndarray:
    """``[matrices, min(in, out)]``."""
    order = (*layout.stack_axes, *layout.in_axes, *layout.out_axes)
    flat = np.asarray(update, np.float64).transpose(order)
    return np.linalg.svd(flat.reshape(-1, layout.fan_in, layout.fan_out), compute_uv=False)


def tail(s: np.ndarray, rank: int) -> float:
    """The relative error of keeping ``rank``."""
    return float(np.sqrt((s[:, rank:] ** 2).sum() / (s**2).sum()))


def leaf(params: Any, path: str) -> Any:
    layer, name = path.split("/")
    return params[layer][name]


# extract


def test_what_was_merged_is_recovered(base: Any, adapter: Any, delta64: Any) -> None:
    tuned = jl.merge(base, adapter)
    got = jl.extract(base, tuned, adapter, rank=2)
    energetic = jl.extract(base, tuned, LAYOUTS, energy=1 - 1e-9)
    again = jl.merge(base, got.adapter)
    for path, f in got.adapter.items():
        # The merged sum was rounded once, and subtracting rounds once more.
        size = np.abs(np.asarray(leaf(tuned, path))).max()
        np.testing.assert_allclose(delta64(f), delta64(adapter[path]), rtol=0, atol=1e-6 * size)
        np.testing.assert_allclose(leaf(again, path), leaf(tuned, path), rtol=0, atol=1e-6 * size)
        assert float(got.errors[path]) < 5e-7
        assert f.layout == LAYOUTS[path]
        assert energetic.adapter[path].rank == 2
    # Negative control: rank 1 is not enough.
    assert min(float(e) for e in jl.extract(base, tuned, adapter, rank=1).errors.values()) > 0.05


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_error_is_the_tail_of_the_singular_values(
    base: Any, normal: Any, delta64: Any, rank: int
) -> None:
    tuned = jax.tree.map(lambda x: x, base)
    for path, layout in LAYOUTS.items():
        layer = path.split("/")[0]
        tuned[layer]["kernel"] = tuned[layer]["kernel"] + 0.3 * normal(*layout.shape, seed=4)
    got = jl.extract(base, tuned, LAYOUTS, rank=rank)
    for path, f in got.adapter.items():
        update = np.asarray(leaf(tuned, path), np.float64) - np.asarray(leaf(base, path))
        error = tail(singular_values(update, f.layout), rank)
        assert f.rank == rank
        np.testing.assert_allclose(got.errors[path], error, rtol=1e-5, atol=2e-6)
        measured = np.linalg.norm(delta64(f) - update) / np.linalg.norm(update)
        np.testing.assert_allclose(measured, error, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.99, 1.0])
def test_energy_keeps_the_smallest_rank(base: Any, normal: Any, energy: float) -> None:
    tuned = jax.tree.map(lambda x: x, base)
    for path, layout in LAYOUTS.items():
        layer = path.split("/")[0]
        tuned[layer]["kernel"] = tuned[layer]["kernel"] + 0.3 * normal(*layout.shape, seed=4)
    got = jl.extract(base, tuned, LAYOUTS, energy=energy)
    for path, f in got.adapter.items():
        update = np.asarray(leaf(tuned, path), np.float64) - np.asarray(leaf(base, path))
        s = singular_values(update, f.layout)
        assert tail(s, f.rank) <= np.sqrt(1 - energy) + 1e-6
        assert f.rank == 1 or tail(s, f.rank - 1) > np.sqrt(1 - energy)
        assert float(got.errors[path]) <= np.sqrt(1 - energy) + 1e-6


def test_the_energy_of_a_stack_is_that_of_all_its_matrices() -> None:
    """Squared singular values (9, 0) and (4, 4): rank 1 keeps 13 of 17."""
    layout = jl.Layout((2, 2, 2), (1,), (2,), (0,))
    base, tuned = (
        {"w": jnp.zeros((2, 2, 2))},
        {"w": jnp.stack([jnp.diag(jnp.array([3.0, 0.0])), 2 * jnp.eye(2)])},
    )
    for energy, rank in ((0.76, 1), (0.77, 2)):
        adapter, errors = jl.extract(base, tuned, {"w": layout}, energy=energy)
        assert adapter["w"].rank == rank
        np.testing.assert_allclose(errors["w"], np.sqrt(4 / 17) if rank == 1 else 0, atol=1e-6)


def test_no_difference_is_a_zero_adapter(base: Any, delta64: Any) -> None:
    for options in ({"rank": 2}, {"energy": 0.9}):
        got = jl.extract(base, base, LAYOUTS, **options)
        for path, f in got.adapter.items():
            assert f.rank == options.get("rank", 1)
            assert not delta64(f).any()
            assert float(got.errors[path]) == 0


def test_what_differs_beside_it_is_named(base: Any, adapter: Any) -> None:
    tuned = jl.merge(base, adapter)
    tuned["l1"]["bias"] = tuned["l1"]["bias"] + 1
    tuned["l3"]["bias"] = tuned["l3"]["bias"].astype(jnp.bfloat16)
    with pytest.raises(jl.AdapterError) as error:
        jl.extract(base, tuned, jl.drop(adapter, "l2/*"), rank=2)
    for path in ("l1/bias", "l3/bias", "l2/kernel"):
        assert f"{path}: differs and is not extracted" in str(error.value)
    assert "l2/bias" not in str(error.value)
    got = jl.extract(base, tuned, adapter, rank=2, ignore="**/bias").adapter
    assert list(got) == list(adapter)
    with pytest.raises(jl.TargetError, match="'norm' "):
        jl.extract(base, tuned, adapter, rank=2, ignore=("**/bias", "norm"))


def test_trees_that_do_not_fit_are_named_at_once(base: Any, adapter: Any) -> None:
    tuned = jl.merge(base, adapter)
    del tuned["l1"]["bias"]
    tuned["l2"]["kernel"] = jnp.zeros((5, 3, 2))
    tuned["l3"]["kernel"] = tuned["l3"]["kernel"].astype(jnp.int32)
    layouts = {**LAYOUTS, "l4/kernel": LAYOUTS["l1/kernel"]}
    with pytest.raises(jl.AdapterError) as error:
        jl.extract(base, tuned, layouts, rank=2)
    message = str(error.value)
    assert "l1/bias: only in the base parameters" in message
    assert "l2/kernel: expected shape (5, 3, 2, 2), got (5, 3, 2, 2), (5, 3, 2)" in message
    assert "l3/kernel: expected floats, got float32, int32" in message
    assert "l4/kernel: no such parameter (nearest: " in message


def test_a_plan_s_targets_are_layouts(base: Any) -> None:
    def model(params: Any, x: Any) -> Any:
        return x @ params["l1"]["kernel"]

    plan = jl.plan(model, base, jnp.ones((2, 6)), config=jl.LoraConfig(rank=2, targets="l1/kernel"))
    tuned = jax.tree.map(lambda x: x, base)
    tuned["l1"]["kernel"] = 2 * tuned["l1"]["kernel"]
    adapter, errors = jl.extract(base, tuned, plan.targets, rank=5)
    x = jnp.ones((2, 6))
    np.testing.assert_allclose(
        jl.apply(model)(base, adapter, x), model(tuned, x), rtol=0, atol=1e-5
    )
    assert float(errors["l1/kernel"]) == 0


def test_narrow_parameters_are_compared_in_float32(base: Any, adapter: Any) -> None:
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    tuned = jl.merge(narrow, adapter)
    got = jl.extract(narrow, tuned, adapter, rank=5)
    for path, f in got.adapter.items():
        assert f.a.dtype == jnp.float32
        np.testing.assert_array_equal(
            leaf(jl.merge(narrow, got.adapter), path), leaf(tuned, path), err_msg=path
        )


def test_extract_under_jit_and_its_gradient(base: Any, adapter: Any, delta64: Any) -> None:
    """The derivative of the nearest matrix, in the direction of the matrix, is the matrix."""
    tuned = jl.merge(base, adapter)

    def update(t: Any, rank: int) -> Any:
        moved = jax.tree.map(lambda x, y: x + t * (y - x), base, tuned)
        return jl.delta(jl.extract(base, moved, LAYOUTS, rank=rank, ignore="**").adapter)

    _, got = jax.jit(lambda t: jax.jvp(lambda t: update(t, 2), (t,), (jnp.ones(()),)))(0.5)
    for path, f in adapter.items():
        want = delta64(f)
        np.testing.assert_allclose(got[path], want, rtol=0, atol=5e-6 * np.abs(want).max())

    for options, needs in (({"energy": 0.9, "ignore": "**"}, "energy"), ({"rank": 2}, "compare")):
        with pytest.raises(jl.ConfigError, match=f"concrete parameters.*{needs}"):
            jax.jit(lambda x, o: jl.extract(base, x, LAYOUTS, **o), static_argnums=1)(
                tuned, Frozen(options)
            )


class Frozen(dict):  # type: ignore[type-arg]
    """Options that may be static arguments."""

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of rank and energy, got neither"),
        ({"rank": 2, "energy": 0.5}, "got both"),
        ({"rank": 0}, "got rank=0"),
        ({"rank": True}, "got rank=True"),
        ({"energy": 0.0}, r"energy in \(0, 1\].*got 0.0"),
        ({"energy": 1.01}, "got 1.01"),
        ({"energy": float("nan")}, "got nan"),
        ({"energy": "most"}, "got 'most'"),
    ],
)
def test_what_extract_cannot_do(base: Any, options: Any, message: str) -> None:
    with pytest.raises(jl.ConfigError, match=message):
        jl.extract(base, base, LAYOUTS, **options)


# resize


def test_larger_changes_no_update_and_no_gradient(base: Any, adapter: Any) -> None:
    larger, errors = jl.resize(adapter, 7)

    def loss(adapter: Any) -> Any:
        return sum((x**3).sum() for x in jl.delta(adapter).values())

    grads, padded = jax.grad(loss)(adapter), jax.grad(loss)(larger)
    for path, f in larger.items():
        stack = len(f.layout.stack_axes)
        assert f.rank == 7
        assert f.scale is adapter[path].scale
        assert float(errors[path]) == 0
        rows = (slice(None),) * stack
        for got, want in ((f, adapter[path]), (padded[path], grads[path])):
            tol = {"rtol": 1e-5, "atol": 1e-5} if want is not adapter[path] else {"rtol": 0}
            np.testing.assert_allclose(got.a[..., :2], want.a, **tol)
            np.testing.assert_allclose(got.b[(*rows, slice(2))], want.b, **tol)
            # The zeros never move.
            assert not np.asarray(got.a[..., 2:]).any()
            assert not np.asarray(got.b[(*rows, slice(2, None))]).any()
        assert np.abs(np.asarray(grads[path].b)).max() > 0.1


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_smaller_is_the_best_approximation(entry: Any, delta64: Any, rank: int) -> None:
    adapter = jl.Adapter({path: entry(layout, rank=4) for path, layout in LAYOUTS.items()})
    smaller, errors = jl.resize(adapter, rank)
    for path, f in smaller.items():
        update = delta64(adapter[path])
        error = tail(singular_values(update, f.layout), rank)
        measured = np.linalg.norm(delta64(f) - update) / np.linalg.norm(update)
        assert f.rank == rank
        assert f.scale is adapter[path].scale
        np.testing.assert_allclose(errors[path], error, rtol=1e-5, atol=2e-6)
        np.testing.assert_allclose(measured, error, rtol=1e-5, atol=2e-6)
        assert error > 0.05 or rank == min(f.layout.fan_in, f.layout.fan_out)


def test_up_then_down_is_the_identity(adapter: Any, delta64: Any) -> None:
    back, errors = jl.resize(jl.resize(adapter, 9).adapter, 2)
    for path, f in back.items():
        want = delta64(adapter[path])
        np.testing.assert_allclose(delta64(f), want, rtol=0, atol=2e-6 * np.abs(want).max())
        assert float(errors[path]) < 1e-6
    same, _ = jl.resize(adapter, 2)
    jax.tree.map(np.testing.assert_array_equal, same, adapter)


def test_resize_never_forms_the_update() -> None:
    """Counted: no array of the compiled program has as many elements as the weight."""
    layout = jl.Layout((300, 200), (0,), (1,))
    a, b = jnp.ones((300, 8)), jnp.ones((8, 200))
    adapter = jl.Adapter({"w": jl.LoraFactors(a, b, jnp.float32(1), layout)})

    def largest(fun: Any) -> int:
        text = str(jax.make_jaxpr(fun)(adapter))
        sizes = [eval(s.replace(",", "*")) for s in re.findall(r"f32\[([\d,]+)\]", text)]
        return max(sizes)

    assert largest(lambda x: jl.resize(x, 2).adapter) <= 300 * 8
    assert largest(jl.delta) == 300 * 200  # negative control


def test_resize_of_a_switched_off_and_of_a_fresh_adapter(adapter: Any, delta64: Any) -> None:
    off, errors = jl.resize(jl.scale(adapter, 0.0), 1)
    assert not any(delta64(f).any() for f in off.values())
    fresh = jl.Adapter(
        {p: dataclasses.replace(f, b=jnp.zeros_like(f.b)) for p, f in adapter.items()}
    )
    zero, errors = jl.resize(fresh, 1)
    assert not any(delta64(f).any() for f in zero.values())
    assert all(float(e) == 0 for e in errors.values())


def test_resize_keeps_dtypes_and_works_under_jit(entry: Any) -> None:
    adapter = jl.Adapter({"w": entry(LAYOUTS["l2/kernel"], rank=4, dtype="bfloat16")})
    for rank in (2, 6):
        got, want = jax.jit(jl.resize, static_argnums=1)(adapter, rank), jl.resize(adapter, rank)
        assert got.adapter["w"].a.dtype == got.adapter["w"].b.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            jl.delta(got.adapter)["w"], jl.delta(want.adapter)["w"], rtol=0, atol=0.05
        )


def test_resize_keeps_its_arguments(base: Any, adapter: Any) -> None:
    tuned = jl.merge(base, adapter)
    given = (base, tuned, adapter)
    before = [np.asarray(x).tobytes() for x in jax.tree.leaves(given)]
    jl.resize(adapter, 1), jl.resize(adapter, 5)
    jl.extract(base, tuned, adapter, rank=1), jl.extract(base, tuned, adapter, energy=0.9)
    assert [np.asarray(x).tobytes() for x in jax.tree.leaves(given)] == before


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "2"])
def test_what_is_no_rank(adapter: Any, rank: Any) -> None:
    with pytest.raises(jl.ConfigError, match="expected a rank of at least 1, got rank="):
        jl.resize(adapter, rank)
