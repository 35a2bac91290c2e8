"""Every method of `combine` against float64 on the dense updates, and the laws they obey."""

from __future__ import annotations

import itertools
import zlib
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.combine import Method
from jax_lora.lowrank import truncate

LAYOUTS = {
    "matrix": jl.Layout((6, 5), (0,), (1,)),
    "transposed": jl.Layout((5, 6), (1,), (0,)),
    "stack": jl.Layout((3, 6, 5), (1,), (2,), (0,)),
    "heads": jl.Layout((4, 2, 3), (0,), (1, 2)),
    "interleaved": jl.Layout((2, 5, 3), (0, 2), (1,)),
    "experts last": jl.Layout((6, 5, 2), (0,), (1,), (2,)),
    "two stacks": jl.Layout((4, 2, 5, 2), (2,), (0,), (3, 1)),
}
FEW = ("heads", "two stacks")
METHODS = get_args(Method)
EXACT = ("cat", "linear")
TRUNCATING = tuple(m for m in METHODS if m not in EXACT)
SPARSE = ("magnitude_prune", "ties", "dare", "dare_ties")
QUICK = {"xla_backend_optimization_level": 0}  # compiling takes longer than running here
ALL = 10  # a rank above min(in, out) of every layout: nothing is truncated


def options(method: str, rank: int | None = None, density: float = 0.5) -> dict[str, Any]:
    """The arguments that a method requires."""
    found: dict[str, Any] = {"method": method}
    if method in TRUNCATING:
        found["rank"] = rank
    if method in SPARSE:
        found["density"] = density
    if method.startswith("dare"):
        found["key"] = jax.random.key(5)
    return found


@pytest.fixture
def adapters(entry: Any) -> list[jl.Adapter]:
    """Three of different ranks and scales; the third lacks a path and has one of its own."""
    first, second, third = (
        {n: entry(layout, rank, seed=rank, scale=s) for n, layout in LAYOUTS.items()}
        for rank, s in ((2, 0.7), (3, -1.3), (1, 0.4))
    )
    del third["stack"]
    third["own"] = entry(jl.Layout((3, 4), (0,), (1,)), rank=1, scale=2.0)
    return [jl.Adapter(a) for a in (first, second, third)]


@pytest.fixture
def few(adapters: list[jl.Adapter]) -> list[jl.Adapter]:
    """Two paths of them, for what takes long to compile."""
    return [jl.select(adapter, FEW) for adapter in adapters]


@pytest.fixture
def update64(adapters: list[jl.Adapter], delta64: Any) -> Any:
    """The update of one adapter, zero where it has no entry."""
    layouts = {path: f.layout for adapter in adapters for path, f in adapter.items()}

    def update(adapter: jl.Adapter, path: str) -> np.ndarray:
        return delta64(adapter[path]) if path in adapter else np.zeros(layouts[path].shape)

    return update


def matrices64(weight: np.ndarray, layout: jl.Layout) -> np.ndarray:
    """``[matrices, in, out]``."""
    order = (*layout.stack_axes, *layout.in_axes, *layout.out_axes)
    return (
        np.asarray(weight, np.float64).transpose(order).reshape(-1, layout.fan_in, layout.fan_out)
    )


def trimmed64(matrices: np.ndarray, density: float) -> np.ndarray:
    out = np.zeros_like(matrices)
    for matrix, kept in zip(matrices, out, strict=True):
        count = max(1, round(density * matrix.size))
        for place in np.argsort(-np.abs(matrix), axis=None)[:count]:
            kept.flat[place] = matrix.flat[place]
    return out


def elected64(updates: list[np.ndarray]) -> np.ndarray:
    out = np.zeros_like(updates[0])
    for place in np.ndindex(out.shape):
        values = [float(update[place]) for update in updates]
        agreeing = [v for v in values if v * sum(values) > 0]
        out[place] = sum(agreeing) / len(agreeing) if agreeing else 0
    return out


def truncated64(matrices: np.ndarray, rank: int) -> tuple[np.ndarray, float]:
    """The best approximations, and the relative error over all of them."""
    u, s, vt = np.linalg.svd(matrices, full_matrices=False)
    total = np.sqrt((s**2).sum())
    error = np.sqrt((s[:, rank:] ** 2).sum()) / total if total else 0.0
    s[:, rank:] = 0
    return (u * s[:, None, :]) @ vt, error


def check(got: jl.Approximation, path: str, want: np.ndarray, rank: int, delta64: Any) -> None:
    """The update of a path is the best approximation of ``want``, with the error it states."""
    factors = got.adapter[path]
    exact, error = truncated64(want, rank)
    found = matrices64(delta64(factors), factors.layout)
    size = np.abs(want).max()
    np.testing.assert_allclose(found, exact, rtol=0, atol=3e-6 * size, err_msg=path)
    np.testing.assert_allclose(got.errors[path], error, rtol=1e-5, atol=2e-6, err_msg=path)
    measured = np.linalg.norm(found - want) / np.linalg.norm(want)
    np.testing.assert_allclose(got.errors[path], measured, rtol=1e-4, atol=2e-6, err_msg=path)


W = [1.5, -0.5, 0.8]


@pytest.mark.parametrize("method", EXACT)
def test_exact_methods(adapters: Any, update64: Any, delta64: Any, method: str) -> None:
    got = jl.combine(adapters, W, method)
    assert list(got.adapter) == sorted([*LAYOUTS, "own"])
    for path, f in got.adapter.items():
        want = sum(w * update64(x, path) for w, x in zip(W, adapters, strict=True))
        np.testing.assert_allclose(delta64(f), want, rtol=0, atol=1e-6 * np.abs(want).max())
        assert float(got.errors[path]) == 0
        assert float(f.scale) == 1
        ranks = sum(x[path].rank for x in adapters if path in x)
        small = min(f.layout.fan_in, f.layout.fan_out)
        assert f.rank == (ranks if method == "cat" else min(ranks, small))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_svd(adapters: Any, update64: Any, delta64: Any, rank: int) -> None:
    got = jl.combine(adapters, W, "svd", rank=rank)
    for path, f in got.adapter.items():
        want = sum(w * update64(x, path) for w, x in zip(W, adapters, strict=True))
        assert f.rank == rank
        check(got, path, matrices64(want, f.layout), rank, delta64)


@pytest.mark.parametrize("rank", [1, 3, ALL])
@pytest.mark.parametrize("method", ["magnitude_prune", "ties"])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_trimming_methods(
    adapters: Any, update64: Any, delta64: Any, method: str, rank: int, density: float
) -> None:
    got = jl.combine(adapters, W, method, rank=rank, density=density)
    for path, f in got.adapter.items():
        thin = [
            w * trimmed64(matrices64(update64(x, path), f.layout), density)
            for w, x in zip(W, adapters, strict=True)
        ]
        check(got, path, elected64(thin) if method == "ties" else sum(thin), rank, delta64)


@pytest.mark.parametrize("method", ["dare", "dare_ties"])
def test_dropping_methods(adapters: Any, update64: Any, delta64: Any, method: str) -> None:
    """The masks are read off adapters alone; the rest is float64."""
    density, key = 0.4, jax.random.key(2)
    got = jl.combine(adapters, W, method, density=density, key=key, rank=ALL)
    nothing = jl.scale(adapters[0], 0.0)
    for path, f in got.adapter.items():
        thin = []
        for place, (w, x) in enumerate(zip(W, adapters, strict=True)):
            update = matrices64(update64(x, path), f.layout)
            if path in x:
                alone = [nothing] * place + [jl.select(x, path)]
                one = jl.combine(alone, method="dare", density=density, key=key, rank=ALL).adapter
                mask = np.abs(matrices64(delta64(one[path]), f.layout)) > 1e-4 * np.abs(update)
                update = np.where(mask, update / density, 0)
            thin.append(w * update)
        check(got, path, elected64(thin) if method == "dare_ties" else sum(thin), ALL, delta64)


def test_ties_by_hand() -> None:
    """Every element of a 2 x 3 weight is another case."""
    layout = jl.Layout((2, 3), (0,), (1,))
    updates = (
        [[4.0, 1.0, -3.0], [5.0, 2.0, -6.0]],
        [[2.0, -7.0, 3.0], [0.5, 4.0, 8.0]],
        [[-3.0, 6.0, 0.25], [-9.0, 1.0, -5.0]],
    )
    adapters = [
        jl.Adapter({"w": jl.LoraFactors(jnp.array(x), jnp.eye(3), jnp.float32(1), layout)})
        for x in updates
    ]
    # Four of six are kept: not (1, 2), not (0.5, 2), not (0.25, 1).
    #   4, -3 -> +: 4       -7, 6 -> -: -7     -3, 3 -> 0
    #   5, -9 -> -: -9       4 -> 4            -6, 8, -5 -> -: (-6 - 5) / 2
    wanted = [[4.0, -7.0, 0.0], [-9.0, 4.0, -5.5]]
    got = jl.combine(adapters, method="ties", density=4 / 6, rank=2).adapter
    np.testing.assert_allclose(jl.delta(got)["w"], wanted, rtol=0, atol=5e-6)
    # With all kept, 2 and 1, 0.5 and 0.25 vote and count, and nothing ties.
    #   4+2-3 -> (4+2)/2     1-7+6 = 0         -3+3+0.25 -> (3+0.25)/2
    #   5+0.5-9 -> -9        (2+4+1)/3         -6+8-5 -> -5.5
    wanted = [[3.0, 0.0, 1.625], [-9.0, 7 / 3, -5.5]]
    got = jl.combine(adapters, method="ties", density=1, rank=2).adapter
    np.testing.assert_allclose(jl.delta(got)["w"], wanted, rtol=0, atol=5e-6)


def test_pruning_by_hand() -> None:
    """Each matrix of a stack is pruned on its own; equal magnitudes share one fate."""
    layout = jl.Layout((2, 2, 2), (1,), (2,), (0,))
    update = jnp.array([[[4.0, 1.0], [-3.0, 2.0]], [[40.0, -20.0], [20.0, 10.0]]])
    eye = jnp.stack([jnp.eye(2)] * 2)
    adapter = jl.Adapter({"w": jl.LoraFactors(update, eye, jnp.float32(1), layout)})
    got = jl.combine([adapter], method="magnitude_prune", density=0.5).adapter
    wanted = [[[4.0, 0.0], [-3.0, 0.0]], [[40.0, -20.0], [20.0, 0.0]]]
    np.testing.assert_allclose(jl.delta(got)["w"], wanted, rtol=0, atol=2e-5)
    least = jl.combine([adapter], method="magnitude_prune", density=0.01).adapter
    wanted = [[[4.0, 0.0], [0.0, 0.0]], [[40.0, 0.0], [0.0, 0.0]]]
    np.testing.assert_allclose(jl.delta(least)["w"], wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_one_adapter_of_weight_one_is_itself(adapters: Any, delta64: Any, method: str) -> None:
    for adapter in adapters:
        got = jl.combine([adapter], **options(method, density=1.0))
        for path, f in adapter.items():
            want = delta64(f)
            atol = 3e-6 * np.abs(want).max()
            np.testing.assert_allclose(delta64(got.adapter[path]), want, rtol=0, atol=atol)
            assert float(got.errors[path]) < 2e-6
            assert got.adapter[path].rank == f.rank


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_scales_its_adapter(adapters: Any, method: str) -> None:
    weighted = jl.combine(adapters, W, **options(method, rank=ALL))
    scaled = [jl.scale(x, w) for w, x in zip(W, adapters, strict=True)]
    unweighted = jl.combine(scaled, **options(method, rank=ALL))
    plain = jl.combine(adapters, **options(method, rank=ALL))
    for path, want in jl.delta(unweighted.adapter).items():
        atol = 5e-6 * np.abs(want).max()
        np.testing.assert_allclose(jl.delta(weighted.adapter)[path], want, rtol=0, atol=atol)
        assert np.abs(jl.delta(plain.adapter)[path] - want).max() > 100 * atol  # it matters


@pytest.mark.parametrize("method", METHODS)
def test_the_factorisation_does_not_matter(adapters: Any, method: str) -> None:
    """``a G`` and ``G^-1 b`` are the same update; what the field calls linear would differ."""
    turn = {r: np.linalg.qr(np.random.default_rng(r).normal(size=(r, r)))[0] for r in (1, 2, 3)}

    def turned(f: jl.LoraFactors) -> jl.LoraFactors:
        g, stack = jnp.asarray(-3 * turn[f.rank], jnp.float32), len(f.layout.stack_axes)
        b = jnp.moveaxis(jnp.tensordot(jnp.linalg.inv(g), f.b, (1, stack)), 0, stack)
        return jl.LoraFactors(f.a @ g, b, f.scale, f.layout)

    others = [jl.Adapter({p: turned(f) for p, f in x.items()}) for x in adapters]
    want = jl.delta(jl.combine(adapters, W, **options(method, rank=ALL)).adapter)
    got = jl.delta(jl.combine(others, W, **options(method, rank=ALL)).adapter)
    for path in want:
        atol = 1e-5 * np.abs(want[path]).max()
        np.testing.assert_allclose(got[path], want[path], rtol=0, atol=atol)

    def fields(pair: list[jl.Adapter]) -> np.ndarray:  # both scales positive, as it needs
        one, two = (np.asarray(x["matrix"].a)[:, :1] for x in pair)
        b_one, b_two = (np.asarray(x["matrix"].b)[:1] for x in pair)
        return (one + two) @ (b_one + b_two)

    flipped = jl.Adapter(
        {p: jl.LoraFactors(-f.a, -f.b, f.scale, f.layout) for p, f in others[1].items()}
    )
    assert np.abs(fields([others[0], others[1]]) - fields([others[0], flipped])).max() > 0.1


@pytest.mark.parametrize("method", EXACT)
def test_exact_methods_are_linear_and_commute(adapters: Any, method: str) -> None:
    def update(weights: Any, order: Any = (0, 1, 2)) -> Any:
        chosen = [adapters[i] for i in order]
        return jl.delta(jl.combine(chosen, [weights[i] for i in order], method).adapter)

    v = [-0.3, 2.0, 1.0]
    both = update([2 * w + 3 * x for w, x in zip(W, v, strict=True)])
    one, two = update(W), update(v)
    for path in both:
        atol = 3e-6 * np.abs(both[path]).max()
        np.testing.assert_allclose(both[path], 2 * one[path] + 3 * two[path], rtol=0, atol=2 * atol)
        for order in itertools.permutations(range(3)):
            again = update(W, order)[path]
            np.testing.assert_allclose(again, one[path], rtol=0, atol=atol)


@pytest.mark.parametrize("method", ["svd", "magnitude_prune", "ties"])
def test_the_order_does_not_matter(adapters: Any, method: str) -> None:
    want = jl.delta(jl.combine(adapters, W, **options(method, rank=3)).adapter)
    got = jl.delta(jl.combine(adapters[::-1], W[::-1], **options(method, rank=3)).adapter)
    for path in want:
        atol = 1e-5 * np.abs(want[path]).max()
        np.testing.assert_allclose(got[path], want[path], rtol=0, atol=atol)


def test_an_adapter_of_weight_zero_is_at_lora_s_start(adapters: Any) -> None:
    got = jl.combine(adapters[:2], [1.0, 0.0]).adapter["stack"]
    np.testing.assert_array_equal(got.a[..., 2:], adapters[1]["stack"].a)
    assert not np.asarray(got.b[:, 2:]).any()


@pytest.mark.parametrize("method", METHODS)
def test_opposites_cancel(adapters: Any, method: str) -> None:
    """Nothing is left, and nothing is not a number."""
    pair = [adapters[0], jl.negate(adapters[0])]
    if method.startswith("dare"):
        pair = [jl.scale(x, 0.0) for x in pair]  # each drops elements of its own
    got = jl.combine(pair, **options(method, density=1.0))
    for path, update in jl.delta(got.adapter).items():
        assert np.abs(update).max() < 1e-5, path
        assert np.isfinite(got.errors[path])


def test_dare_is_reproducible_and_depends_on_key_path_and_place(adapters: Any) -> None:
    def update(pair: list[jl.Adapter], seed: int = 0) -> Any:
        key = jax.random.key(seed)
        got = jl.combine(pair, method="dare", density=0.5, key=key, rank=ALL)
        return {path: np.asarray(x) for path, x in jl.delta(got.adapter).items()}

    one, again, other = update(adapters), update(adapters), update(adapters, seed=1)
    for path in one:
        np.testing.assert_array_equal(one[path], again[path])
        assert not np.allclose(one[path], other[path], atol=1e-3)
    # What is dropped from one weight does not depend on which others there are.
    alone = update([jl.select(adapters[0], "heads"), *adapters[1:]])
    np.testing.assert_array_equal(alone["heads"], one["heads"])

    twins = jl.Adapter({"one": adapters[0]["matrix"], "two": adapters[0]["matrix"]})
    pair = update([twins])
    assert not np.allclose(pair["one"], pair["two"], atol=1e-3)
    nothing = jl.scale(twins, 0.0)
    assert not np.allclose(update([nothing, twins])["one"], pair["one"], atol=1e-3)


@pytest.mark.parametrize("density", [0.2, 0.7])
def test_dare_is_unbiased(adapters: Any, delta64: Any, density: float) -> None:
    """Over n keys the mean of x m / p has standard error |x| sqrt((1 - p) / (p n))."""
    n, p = 4000, density
    chosen = [jl.select(adapters[0], ("matrix", "interleaved"))]

    def update(key: Any) -> Any:
        got = jl.combine(chosen, method="dare", density=p, key=key, rank=5)
        return jl.delta(got.adapter)

    # jax.vmap would decompose stacks of matrices; see jax_lora/linalg.py.
    keys = jax.random.split(jax.random.key(11), n)
    drawn = jax.jit(lambda keys: jax.lax.map(update, keys))(keys)
    for path, f in chosen[0].items():
        x, samples = delta64(f), np.asarray(drawn[path], np.float64)
        error = np.abs(x) * np.sqrt((1 - p) / (p * n))
        # 60 elements, 5 standard errors: a chance of 4e-5 for a right program.
        assert (np.abs(samples.mean(0) - x) < 5 * error).all()
        # Without the division, or with nothing dropped, this or the next would be far off.
        variance = samples.var(0) / (x**2 * (1 - p) / p)
        assert (np.abs(variance - 1) < 0.2).all()
        assert (np.abs(p * samples.mean(0) - x) > 5 * error).any()


def loss_of(update: dict[str, Any], paths: list[str]) -> Any:
    """A function of the updates with a gradient of no symmetry."""
    total = 0.0
    for path in paths:
        x = update[path]
        # Python's own hash of a string differs from run to run.
        c = np.random.default_rng(zlib.crc32(path.encode())).normal(size=x.shape)
        total = total + (x * jnp.asarray(c, x.dtype)).sum() + 0.1 * (x**2).sum()
    return total


def loss64(updates: dict[str, np.ndarray]) -> float:
    total = 0.0
    for path, x in updates.items():
        c = np.random.default_rng(zlib.crc32(path.encode())).normal(size=x.shape)
        total += float((x * c.astype(np.float32)).sum() + 0.1 * (x**2).sum())
    return total


@pytest.mark.parametrize("method", [*EXACT, "svd", "magnitude_prune", "ties"])
def test_weights_can_be_trained(few: Any, update64: Any, method: str) -> None:
    """The gradient is that of the dense float64 computation, by central differences."""
    paths = sorted(FEW)

    @jax.jit
    def loss(w: Any) -> Any:
        got = jl.combine(few, w, **options(method, rank=2)).adapter
        return loss_of(jl.delta(got), paths)

    def oracle(w: np.ndarray) -> float:
        updates = {}
        for path in paths:
            layout = LAYOUTS[path]
            dense = [matrices64(update64(x, path), layout) for x in few]
            if method in SPARSE:
                dense = [trimmed64(x, 0.5) for x in dense]
            dense = [v * x for v, x in zip(w, dense, strict=True)]
            merged = elected64(dense) if method == "ties" else sum(dense)
            if method not in EXACT:
                merged, _ = truncated64(merged, 2)
            order = (*layout.stack_axes, *layout.in_axes, *layout.out_axes)
            shaped = merged.reshape([layout.shape[i] for i in order])
            updates[path] = shaped.transpose(np.argsort(order))
        return loss64(updates)

    w, step = np.array(W), 1e-6
    want = [(oracle(w + step * e) - oracle(w - step * e)) / (2 * step) for e in np.eye(3)]
    value, got = jax.value_and_grad(loss)(jnp.asarray(w, jnp.float32))
    np.testing.assert_allclose(value, oracle(w), rtol=1e-5)
    size = np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * size * (1 if method in EXACT else 5))
    assert np.abs(want).min() > 0.05


def test_training_weights_finds_the_mixture(few: Any) -> None:
    target = jl.delta(jl.combine(few, W).adapter)

    def loss(w: Any) -> Any:
        update = jl.delta(jl.combine(few, w).adapter)
        return sum(((update[p] - target[p]) ** 2).sum() for p in target)

    @jax.jit
    def trained(w: Any) -> Any:
        return jax.lax.fori_loop(0, 2000, lambda _, w: w - 4e-4 * jax.grad(loss)(w), w)

    w = trained(jnp.ones(3))
    np.testing.assert_allclose(w, W, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_no_gradient_is_nan_where_singular_values_coincide_or_vanish(
    entry: Any, method: str
) -> None:
    layout = jl.Layout((6, 5), (0,), (1,))
    eye = jl.Adapter({"w": jl.LoraFactors(jnp.eye(6, 4), jnp.eye(4, 5), jnp.float32(1), layout)})
    fresh = jl.Adapter(
        {"w": jl.LoraFactors(entry(layout, 4).a, jnp.zeros((4, 5)), jnp.float32(1), layout)}
    )
    full = jl.Adapter({"w": entry(layout, 4)})

    def loss(w: Any, group: Any) -> Any:
        got = jl.combine(group, w, **options(method, rank=2)).adapter
        return loss_of(jl.delta(got), ["w"])

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), compiler_options=QUICK)
    for group in ([eye, eye], [fresh], [fresh, fresh], [eye, fresh], [full, full], [full, eye]):
        grads = gradient(jnp.ones(len(group)), group)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_truncation_that_discards_nothing_has_the_gradient_of_the_sum(few: Any) -> None:
    """Also for duplicates, where half of the singular values are zero to rounding."""
    pair = [few[0], few[0], few[1]]

    def loss(w: Any, method: str, **kwargs: Any) -> Any:
        return loss_of(jl.delta(jl.combine(pair, w, method, **kwargs).adapter), sorted(FEW))

    w = jnp.array([0.5, 0.25, -1.0])
    want = jax.jit(jax.grad(lambda w: loss(w, "cat")))(w)
    got = jax.jit(jax.grad(lambda w: loss(w, "svd", rank=5)))(w)
    np.testing.assert_allclose(got, want, rtol=2e-5)


def test_the_derivative_of_truncation_in_every_direction() -> None:
    """Against central differences in float64, of a product with a repeated singular value."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, 4)))[0] for n in (7, 6))
    a, b = u * np.array([3.0, 3.0, 1.0, 1.0]), v.T
    da, db = rng.normal(size=a.shape), rng.normal(size=b.shape)

    def best(t: float) -> np.ndarray:
        return truncated64(((a + t * da) @ (b + t * db))[None], 2)[0][0]

    def product(a: Any, b: Any) -> Any:
        a, b, _ = truncate(a, b, 2)
        return a @ b

    want = (best(1e-6) - best(-1e-6)) / 2e-6
    point, direction = ((jnp.float32(x), jnp.float32(y)) for x, y in ((a, b), (da, db)))
    value, got = jax.jvp(product, point, direction)
    np.testing.assert_allclose(value, best(0.0), rtol=0, atol=1e-5)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    # Holding the kept subspace, as a naive rule would, is far off.
    held = u[:, :2] @ u[:, :2].T @ (da @ b + a @ db)
    assert np.abs(held - want).max() > 0.1


@pytest.mark.parametrize("method", METHODS)
def test_jit_and_vmap_over_weights(few: Any, method: str) -> None:
    def update(w: Any) -> Any:
        got = jl.combine(few, w, **options(method, rank=2))
        return jl.delta(got.adapter), got.errors

    eager = update(jnp.array(W))
    compiled = jax.jit(update, compiler_options=QUICK)(jnp.array(W))
    many = jax.jit(jax.vmap(update), compiler_options=QUICK)(jnp.array([[1.0, 1.0, 1.0], W]))
    for found in (compiled, jax.tree.map(lambda leaf: leaf[1], many)):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=5e-5), found, eager)
    listed = update([jnp.float32(w) for w in W])
    jax.tree.map(np.testing.assert_array_equal, listed, eager)


@pytest.mark.parametrize("method", METHODS)
def test_the_arguments_are_not_changed(adapters: Any, method: str) -> None:
    before = [bytes(np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(adapters)]
    structure = jax.tree.structure(adapters)
    jl.combine(adapters, W, **options(method, rank=2))
    assert [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(adapters)] == before
    assert jax.tree.structure(adapters) == structure


@pytest.mark.parametrize("method", METHODS)
def test_narrow_factors_are_rounded_once(entry: Any, delta64: Any, method: str) -> None:
    layout = LAYOUTS["interleaved"]
    narrow = [jl.Adapter({"w": entry(layout, 2, seed=k, dtype="bfloat16")}) for k in range(2)]
    wide = [
        jl.Adapter(
            {"w": jl.LoraFactors(*(x.astype(jnp.float32) for x in (f.a, f.b)), f.scale, layout)}
        )
        for f in (x["w"] for x in narrow)
    ]
    got, want = (jl.combine(x, [1.0, -0.5], **options(method, rank=5)) for x in (narrow, wide))
    assert got.adapter["w"].a.dtype == got.adapter["w"].b.dtype == jnp.bfloat16
    for name in ("a", "b"):
        rounded = getattr(want.adapter["w"], name).astype(jnp.bfloat16)
        np.testing.assert_array_equal(getattr(got.adapter["w"], name), rounded)
    mixed = jl.combine([narrow[0], wide[1]], [1.0, -0.5], **options(method, rank=5))
    assert mixed.adapter["w"].a.dtype == jnp.float32


def test_the_default_rank_is_the_largest_of_each_path(adapters: Any) -> None:
    got = jl.combine(adapters, method="svd").adapter
    assert {path: f.rank for path, f in got.items()} == {**dict.fromkeys(LAYOUTS, 3), "own": 1}


def test_truncated_columns_are_orthonormal_and_padded_with_zeros(adapters: Any) -> None:
    got = jl.combine(adapters, W, "svd", rank=ALL).adapter["stack"]
    gram = np.einsum("sir,sik->srk", got.a, got.a)
    want = np.broadcast_to(np.diag([1.0] * 5 + [0.0] * 5), gram.shape)
    np.testing.assert_allclose(gram, want, atol=1e-6)
    assert not np.asarray(got.b[:, 5:]).any()


BAD = {
    "none": (([],), {}, "expected a list of at least one adapter, got none"),
    "bare": (("one",), {}, "expected a list of at least one adapter, got a Adapter"),
    "not one": (([1.0],), {}, "expected adapters, got a float at place 0"),
    "too few": (("all", [1.0]), {}, r"each of the 3 adapters.*got shape \(1,\)"),
    "array": (("all", jnp.ones((3, 1))), {}, r"got shape \(3, 1\)"),
    "nested": (("all", [[1.0], [1.0], [1.0]]), {}, r"got \[\[1.0\]"),
    "number": (("all", 1.0), {}, "got 1.0"),
    "method": (("all", None, "tie"), {}, r"got 'tie' \(nearest: 'ties'"),
    "rank 0": (("all", None, "svd"), {"rank": 0}, "rank of at least 1, got rank=0"),
    "rank 1.5": (("all", None, "svd"), {"rank": 1.5}, "got rank=1.5"),
    "rank of cat": (("all",), {"rank": 2}, "expected no rank for 'cat'.*use 'svd'"),
    "no density": (("all", None, "ties"), {}, "expected a density for 'ties', got none"),
    "density 0": (("all", None, "ties"), {"density": 0.0}, r"density in \(0, 1\].*got 0.0"),
    "density 2": (("all", None, "magnitude_prune"), {"density": 1.5}, "got 1.5"),
    "density nan": (("all", None, "ties"), {"density": float("nan")}, "got nan"),
    "density of cat": (("all",), {"density": 0.5}, "expected no density for 'cat'"),
    "no key": (("all", None, "dare"), {"density": 0.5}, "expected a key for 'dare', got none"),
    "key of ties": (
        ("all", None, "ties"),
        {"density": 0.5, "key": 0},
        "expected no key for 'ties'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_mean_anything(adapters: Any, name: str) -> None:
    args, kwargs, message = BAD[name]
    first = {"all": adapters, "one": adapters[0]}
    args = tuple(first.get(x, x) if isinstance(x, str) else x for x in args)
    with pytest.raises(jl.ConfigError, match=message):
        jl.combine(*args, **kwargs)


def test_layouts_that_differ_are_all_named(adapters: Any, entry: Any) -> None:
    other = {
        "matrix": entry(jl.Layout((6, 5), (1,), (0,))),
        "heads": entry(jl.Layout((4, 2, 2), (0,), (1, 2))),
        "stack": adapters[0]["stack"],
    }
    with pytest.raises(jl.AdapterError) as error:
        jl.combine([adapters[0], jl.Adapter(other)])
    assert "matrix: expected Layout(shape=(6, 5), in_axes=(0,)" in str(error.value)
    assert "in adapter 0, got Layout(shape=(6, 5), in_axes=(1,)" in str(error.value)
    assert "heads: " in str(error.value)
    assert "stack: " not in str(error.value)
