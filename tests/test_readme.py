"""The README's Python runs as it stands."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_lora as jl
from jax_lora.models import MLP

README = Path(__file__).parents[1] / "README.md"
# A context manager would hide the README's own lines; orbax closes its threads when collected.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


def test_the_python_blocks_run_and_do_what_they_say(tmp_path, monkeypatch):
    model = MLP((8, 8))
    x = jax.random.normal(jax.random.key(1), (5, 6))
    params = model.init(jax.random.key(0), x)
    names = {
        "model": model,
        "params": params,
        "x": x,
        "jl": jl,
        "y": jnp.array([0, 1, 2, 0, 1]),
        "loss_fun": lambda logits, y: optax.softmax_cross_entropy_with_integer_labels(
            logits, y
        ).mean(),
    }
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 7  # the last in tests/peft/test_readme.py
    # optax.adam itself mixes dtypes, which the strict promotion of these tests refuses.
    with jax.numpy_dtype_promotion("standard"):
        exec(blocks[0], names)
    trained = {name: names[name] for name in ("adapter", "plan", "opt_state")}
    adapter, plan = names["adapter"], names["plan"]
    assert set(plan.targets) == {"params/l1/kernel", "params/l2/kernel"}
    # Adam's first step moves each b by the learning rate, as every b has a gradient.
    assert all(float(jnp.abs(f.b).max()) > 0.9e-3 for f in adapter.values())

    adapter, config, _ = jl.io.load_adapter("my-adapter", params)
    jax.tree.map(np.testing.assert_array_equal, adapter, names["adapter"])
    assert config == plan.config
    np.testing.assert_allclose(
        model.apply(names["merged"], x),
        jl.apply(model.apply)(params, adapter, x),
        rtol=1e-5,
        atol=1e-6,
    )

    exec(blocks[1], names)
    np.testing.assert_array_equal(
        names["arrays"]["params/l1/kernel"]["a"], adapter["params/l1/kernel"].a
    )
    exec(blocks[2], names)
    plan, adapter = names["plan"], names["adapter"]
    found = {path: (t.variant, t.rank, t.dropout) for path, t in plan.targets.items()}
    assert found == {
        "params/l1/kernel": ("dora", 2, 0.1),
        "params/l1/bias": ("full", 0, 0.0),
        "params/l2/kernel": ("lora", 8, 0.0),
        "params/l2/bias": ("full", 0, 0.0),
    }
    check_sweep(names | trained, blocks[3])
    check_bank(names | trained, blocks[4])
    check_training(names | trained, blocks[5], tmp_path / "my-run")
    base = model.apply(params, x)
    for fresh in (adapter, names["noisy"]):
        np.testing.assert_array_equal(jl.apply(model.apply)(params, fresh, x), base)


def check_sweep(names, block):
    """All combinations were trained at the same time, and the best of them was saved."""
    with jax.numpy_dtype_promotion("standard"):  # for optax.adam, as above
        exec(block, names)
    results = names["results"]
    assert len(results) == 2 * 2 * 3
    assert results.compilations == 1
    last = [outcome.loss[-1] for outcome in results]
    assert results.best.loss[-1] == min(last) < max(last)
    found, config, _ = jl.io.load_adapter("best", names["params"])
    assert config.rank == results.best.trial["rank"]
    jax.tree.map(np.testing.assert_array_equal, found, results.best.adapter)


def check_bank(names, block):
    """Each row is that of its adapter; one comes from the folder."""
    own = names["adapter"]
    french, german, italian = (jl.scale(own, factor) for factor in (1.0, 300.0, 600.0))
    jl.io.save_adapter("adapters/italian", italian, base=names["params"])
    names |= {"french": french, "german": german}
    exec(block, names)

    def row(adapter, k):
        return jl.apply(names["model"].apply)(names["params"], adapter, names["x"])[k]

    for k, adapter in enumerate((french, german, jl.scale(own, 0.0))):
        np.testing.assert_allclose(names["y"][k], row(adapter, k), rtol=1e-5, atol=1e-6)
    for k, adapter in enumerate((french, italian, jl.scale(own, 0.0))):
        np.testing.assert_allclose(names["rows"][k], row(adapter, 0), rtol=1e-5, atol=1e-6)
    assert float(jnp.abs(row(italian, 0) - row(german, 0)).max()) > 1e-3


def check_training(names, block, folder):
    """It counts to 30, also when it is interrupted in between."""
    done = []

    def train(adapter, opt_state, step):
        done.append(step)
        if step == 25 and done.count(25) == 1:
            raise KeyboardInterrupt
        return jax.tree.map(lambda x: x * 0 + step, adapter), opt_state

    names["train"] = train
    with pytest.raises(KeyboardInterrupt):
        exec(block, dict(names))
    last = max(names["jl"].io.Checkpoints(folder).steps)
    assert last in (10, 20, 21, 22, 23, 24)
    exec(block, names)
    assert done == [*range(1, 26), *range(last + 1, 31)]
    found, config, _ = jl.io.load_adapter(folder / "30", names["params"])
    assert all((leaf == 30).all() for leaf in jax.tree.leaves(found))
    assert config == names["plan"].config


def test_the_tree_names_what_exists():
    tree = README.read_text().split("## Where things are")[1].split("## References")[0]
    named = set(re.findall(r"\b([a-z_]+\.py|[a-z_]+/)(?=\s)", tree))
    package = README.parent / "jax_lora"
    present = {p.name for p in package.glob("*.py")} | {
        f"{p.parent.name}/" for p in package.glob("*/__init__.py")
    }
    assert present - {"__init__.py", "tables.py"} <= named | {"structural.py"}
    for name in named:
        assert any(
            (root / name).exists() for root in (README.parent, package, package / "interpreter")
        ), name
