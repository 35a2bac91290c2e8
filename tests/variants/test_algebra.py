"""The algebra, extraction and checkpoints on entries of every variant."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.initializers import FROM_WEIGHT
from jax_lora.variants import VARIANTS

CASES = [
    name if init is None else f"{name} {init}"
    for name, variant in VARIANTS.items()
    for init in (None, *(i for i in FROM_WEIGHT if i in variant.INITS))
]
ROOT = Path(__file__).parents[2]


def _model(p: Any, ids: Any) -> Any:
    x = p["table"][ids]
    x = jax.lax.scan(lambda x, w: (x @ w, None), x, p["stack"])[0]
    return jnp.einsum("td,dhk->thk", x, p["heads"]), x @ p["table"].T


@pytest.fixture(scope="module")
def params() -> Any:
    rng = np.random.default_rng(0)
    shapes = {"table": (7, 4), "stack": (2, 4, 4), "heads": (4, 2, 3)}
    return {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}


@pytest.fixture(scope="module")
def made(params: Any, started: Any, stirred: Any) -> Callable[..., jl.Adapter]:
    """An adapter off its start, of all the parameters that the variant can adapt."""
    held: dict[Any, jl.Adapter] = {}

    def make(case: str, seed: int = 0) -> jl.Adapter:
        if case not in held:
            variant, _, init = case.partition(" ")
            settings: Any = {"variant": variant, "targets": ("table", "stack", "heads")}
            settings |= {"init": init} if init else {}
            if variant == "rows":
                settings = {"targets": jl.Rule("table", rows=(1, 5))}
            held[case] = started(_model, params, jnp.arange(3), **settings)
        return stirred(held[case], seed=seed)

    return make


def _updates(adapter: Any, params: Any, oracle: Any) -> dict[str, np.ndarray]:
    """``W' - W`` in float64, by the formulas."""
    new, _ = oracle(adapter, params)
    return {path: new[path] - np.asarray(params[path], np.float64) for path in adapter}


def _close(found: Any, want: Any, tol: float = 3e-6) -> None:
    assert set(found) == set(want)
    for path, value in want.items():
        size = np.abs(value).max()
        np.testing.assert_allclose(found[path], value, rtol=0, atol=tol * size, err_msg=path)


@pytest.mark.parametrize("case", CASES)
def test_delta_merge_and_strength(case: str, made: Any, params: Any, oracle: Any) -> None:
    adapter = made(case)
    want = _updates(adapter, params, oracle)
    _close(jl.delta(adapter, params), want)
    linear = all(entry.LINEAR for entry in adapter.values())
    assert linear == (case.split()[0] not in ("dora", "full", "rows"))
    if linear:
        _close(jl.delta(adapter), want)
        _close(jl.delta(jl.scale(adapter, -0.5)), {p: -0.5 * u for p, u in want.items()})
        _close(jl.delta(jl.negate(adapter)), {p: -u for p, u in want.items()})
        back = jl.unmerge(jl.merge(params, adapter), adapter)
        for path in adapter:
            np.testing.assert_allclose(back[path], params[path], rtol=0, atol=2e-6)
        return
    for use in (lambda a: jl.scale(a, 2.0), jl.negate, lambda a: jl.unmerge(params, a)):
        with pytest.raises(jl.AdapterError, match=r"in proportion to its scale.*use combine\("):
            use(adapter)
    with pytest.raises(jl.AdapterError, match=r"depends on the parameter.*pass params="):
        jl.delta(adapter)
    with pytest.raises(jl.AdapterError, match=r"depends on the parameter.*pass params="):
        jl.combine([adapter])


@pytest.mark.parametrize("case", CASES)
def test_select_and_drop_keep_entries(case: str, made: Any) -> None:
    adapter = made(case)
    assert jl.select(adapter, "table")["table"] is adapter["table"]
    assert list(jl.drop(adapter, "table")) == sorted(set(adapter) - {"table"})


#: What the methods see of a variant is its update as a product; "cat" is tried with all of them.
SUMS = [(case, "cat") for case in CASES]
SUMS += [(case, method) for case in ("dora", "full", "lokr") for method in ("linear", "svd")]


@pytest.mark.parametrize(("case", "method"), SUMS)
def test_combined_with_another_variant_it_is_the_sum(
    case: str, method: str, made: Any, params: Any, oracle: Any
) -> None:
    """Of LoRA, and of whole values with their own kind: ``0.75 dW_1 - 0.5 dW_2``."""
    other = "full" if case == "full" else "lora"
    adapters = [made(case), made(other, seed=1)]
    if case == "rows":
        adapters[1] = jl.select(adapters[1], "table")
    options = {"rank": 7} if method == "svd" else {}  # of matrices up to 7 by 6: exact
    both, errors = jl.combine(adapters, [0.75, -0.5], method, params=params, **options)
    one, two = (_updates(a, params, oracle) for a in adapters)
    _close(jl.delta(both, params), {p: 0.75 * one[p] - 0.5 * two[p] for p in one}, 5e-6)
    assert all(float(error) < 1e-6 for error in errors.values())
    kinds = {entry.NAME for entry in both.values()}
    assert kinds == ({"full"} if case == "full" else {"lora"})
    assert {p: jnp.shape(w) for p, w in jl.merge(params, both).items()} == {
        p: w.shape for p, w in params.items()
    }


def test_a_whole_value_and_an_update_are_not_added(made: Any, params: Any) -> None:
    with pytest.raises(jl.AdapterError, match="got a value trained whole in 1"):
        jl.combine([made("lora"), made("full")], params=params)


@pytest.mark.parametrize("method", ["ties", "dare", "magnitude_prune"])
@pytest.mark.parametrize("case", ["dora", "vera", "full", "rows"])
def test_methods_that_thin_out_work_on_the_updates(
    case: str, method: str, made: Any, params: Any, oracle: Any
) -> None:
    """With density 1 nothing is left out, and of one adapter the result is its update."""
    key = {"key": jax.random.key(0)} if method == "dare" else {}
    rank = {} if case == "full" else {"rank": 7}
    got, _ = jl.combine([made(case)], None, method, density=1.0, params=params, **rank, **key)
    _close(jl.delta(got, params), _updates(made(case), params, oracle), 5e-6)


@pytest.mark.parametrize("case", CASES)
def test_resize_keeps_the_update_where_the_rank_suffices(
    case: str, made: Any, params: Any, oracle: Any
) -> None:
    adapter = made(case)
    same, errors = jl.resize(adapter, 16)
    _close(jl.delta(same, params), _updates(adapter, params, oracle), 5e-6)
    assert all(float(error) == 0 for error in errors.values())
    variant = case.split()[0]
    kept = variant in ("lora", "lora-fa", "dora", "full", "rows")
    assert {e.NAME for e in same.values()} == {variant if kept else "lora"}
    assert {e.NAME for e in jl.resize(adapter, 1).adapter.values()} == {variant if kept else "lora"}
    # The best approximation of rank 1 of what is a product of factors; DoRA's norms follow.
    if variant not in ("dora", "full", "rows"):
        u, s, vt = np.linalg.svd(_updates(adapter, params, oracle)["stack"])
        want = (u[..., :1] * s[:, None, :1]) @ vt[:, :1]
        _close({"stack": jl.delta(jl.resize(adapter, 1).adapter)["stack"]}, {"stack": want}, 2e-5)


def test_extraction_of_a_plan_with_whole_values(params: Any, made: Any) -> None:
    config = jl.LoraConfig(
        rank=4,
        targets=(jl.Rule("table", variant="full"), jl.Rule("heads", rank=2), "stack"),
    )
    plan = jl.plan(_model, params, jnp.arange(3), config=config)
    tuned = jl.merge(params, made("full"))
    for layouts in (plan.targets, jl.init(jax.random.key(0), params, plan)):
        adapter, errors = jl.extract(params, tuned, layouts, rank=4)
        assert {p: e.NAME for p, e in adapter.items()} == {
            "heads": "lora",
            "stack": "lora",
            "table": "full",
        }
        np.testing.assert_array_equal(adapter["table"].value, tuned["table"])
        assert float(errors["table"]) == 0
        for path, w in jl.merge(params, adapter).items():
            np.testing.assert_allclose(w, tuned[path], rtol=0, atol=2e-6)
    other = tuned | {"table": tuned["table"][:5]}
    with pytest.raises(jl.AdapterError, match=r"table: expected shape \(7, 4\)"):
        jl.extract(params, other, plan.targets, rank=4)


def test_delta_keeps_the_width_of_a_wider_value(x64: Any) -> None:
    with x64(True):
        base = {"w": jnp.ones(3, jnp.float32)}
        value = jnp.asarray([1 + 1e-12, 2, 3], jnp.float64)
        delta = jl.delta(jl.Adapter({"w": jl.FullValue(value, (3,))}), base)["w"]
        assert delta.dtype == jnp.float64
        np.testing.assert_allclose(delta, [1e-12, 1, 2], rtol=1e-3)


class TestCheckpoints:
    @pytest.mark.parametrize("case", CASES)
    def test_round_trip(self, case: str, made: Any, params: Any, tmp_path: Path) -> None:
        adapter = made(case)
        if case == "dora":
            adapter = jl.cache_norms(params, adapter)
        jl.io.save_adapter(tmp_path / "a", adapter)
        found, _, _ = jl.io.load_adapter(tmp_path / "a", params)
        assert jax.tree.structure(found) == jax.tree.structure(adapter)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(adapter), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)

    def test_configurations_with_variants(self, made: Any, tmp_path: Path) -> None:
        config = jl.LoraConfig(
            variant="dora",
            dropout=0.1,
            targets=(jl.Rule("table", rows=(1, 5)), jl.Rule("x", variant="full"), "stack"),
        )
        jl.io.save_adapter(tmp_path / "a", made("rows"), config)
        assert jl.io.load_adapter(tmp_path / "a")[1] == config

    def test_version_1_still_loads(self) -> None:
        folder = ROOT / "checkpoints" / "cifar10-mlp" / "adapter"
        document = json.loads((folder / "config" / "metadata").read_text())
        assert document["version"] == 1
        adapter, config, _ = jl.io.load_adapter(folder)
        assert {type(entry) for entry in adapter.values()} == {jl.LoraFactors}
        assert adapter.trainable_params == 115_008
        assert config.variant == "lora"

    def changed(self, folder: Path, change: Callable[[Any], None]) -> None:
        """Rewrite the document with a valid checksum, as another version might have."""
        from jax_lora.io.files import checksum

        path = folder / "config" / "metadata"
        document = json.loads(path.read_text())
        del document["crc32"]
        change(document)
        path.write_text(json.dumps(document | {"crc32": checksum(document)}))

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (
                lambda e: e.update(variant="lora-xs"),
                "table: expected a variant out of lora, .*, rows; found 'lora-xs'",
            ),
            (lambda e: e.pop("variant"), "table: expected a variant .* found None"),
            (lambda e: e.update(variant="vera"), "table: expected the fields of 'vera', a, b, d, "),
            (lambda e: e.update(more=1), "table: expected the fields of 'lora', .*more"),
            (lambda e: e.pop("layout"), "table: expected the fields of 'lora', .*found a, b, sc"),
            (lambda e: e["layout"].update(in_axes=[1]), "table: expected every axis of a weight"),
            (lambda e: e["layout"].pop("in_axes"), "table: .*in_axes"),
        ],
    )
    def test_what_the_arrays_do_not_make(
        self, change: Any, match: str, made: Any, tmp_path: Path
    ) -> None:
        jl.io.save_adapter(tmp_path / "a", made("lora"))
        self.changed(tmp_path / "a", lambda d: change(d["entries"]["table"]))
        with pytest.raises(jl.CheckpointError, match=match) as caught:
            jl.io.load_adapter(tmp_path / "a")
        assert "stack:" not in str(caught.value)

    def test_entries_without_arrays_and_arrays_without_entries(
        self, made: Any, tmp_path: Path
    ) -> None:
        jl.io.save_adapter(tmp_path / "a", made("lora"))

        def rename(document: Any) -> None:
            document["entries"]["other"] = document["entries"].pop("table")

        self.changed(tmp_path / "a", rename)
        with pytest.raises(jl.CheckpointError) as caught:
            jl.io.load_adapter(tmp_path / "a")
        assert "other: only in the item config" in str(caught.value)
        assert "table: only in the item arrays" in str(caught.value)

    def test_a_configuration_of_a_newer_version(self, made: Any, tmp_path: Path) -> None:
        jl.io.save_adapter(tmp_path / "a", made("lora"), jl.LoraConfig())
        self.changed(tmp_path / "a", lambda d: d["lora"].update(colour="red"))
        with pytest.raises(jl.CheckpointError, match=r"configuration cannot be read.*colour"):
            jl.io.load_adapter(tmp_path / "a")


def test_an_anchor_has_both_halves(made: Any, params: Any) -> None:
    adapter = made("lora pissa")
    half = jl.Adapter({"table": dataclasses.replace(adapter["table"], b0=None)})
    with pytest.raises(jl.AdapterError, match="table: expected a0 and b0, or none of them"):
        jl.merge(params, half)
