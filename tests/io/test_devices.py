"""A training that goes on with other devices, and other shardings, than those it was saved on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import jax_lora as jl
from tests.io.small import CONFIG, adam, adam_state, adapter, base, same_bits, saved

FOUR_DEVICES = r"""
import json, re, sys
from pathlib import Path
import jax, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import jax_lora as jl
from jax_lora.io import fingerprint, fingerprints
from tests.io.small import CONFIG, adam, adam_state, adapter, base, same_bits, saved

folder = Path(sys.argv[1])
trained, state = jax.tree.map(np.array, (adapter(1), adam_state(adapter(1), 1)))
devices = np.array(jax.devices())

def on(mesh, stack, dense):
    specs = {"dense": {"w": dense}, "stack": stack}
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    return jax.device_put(base(), shardings)

# Saved with the factors split over four devices, by a step that reuses their memory.
line = on(Mesh(devices, ("x",)), P(None, None, "x"), P("x"))
placed = jax.device_put(trained, jl.adapter_shardings(trained, line))
overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
with jl.io.Checkpoints(folder / "four", base=line, config=CONFIG) as checkpoints:
    checkpoints.save(1, placed, state)
    overwrite(placed)

def spec(leaf):
    return [list(leaf.sharding.mesh.shape.items()), list(leaf.sharding.spec)]

out = {}
square = on(Mesh(devices.reshape(2, 2), ("x", "y")), P("x", None, "y"), P("y", None))
for name in ("four", "one"):
    checkpoints = jl.io.Checkpoints(folder / name, base=square, config=CONFIG)
    shapes = jax.eval_shape(lambda: (adapter(), adam().init(adapter())))
    found = checkpoints.restore(*shapes)
    moments = found.opt_state.inner_states["trained"].inner_state[0]
    out[name] = {
        "same": same_bits((found.trained, found.opt_state), (trained, state)),
        "a": spec(found.trained["stack"].a), "b": spec(found.trained["stack"].b),
        "mu": spec(moments.mu["stack"].a), "nu": spec(moments.nu["dense/w"].a),
        "count": spec(moments.count), "scale": spec(found.trained["stack"].scale),
    }
    # As fresh ones are, so that a compiled step takes them.
    expected = jl.adapter_shardings(found.trained, square)
    out[name]["as derived"] = all(jax.tree.leaves(
        jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), found.trained, expected)
    ))

# Parameters that are themselves trained go where their example is.
with jl.io.Checkpoints(folder / "params") as checkpoints:
    checkpoints.save(1, line, optax.adam(1e-3).init(line))
found = checkpoints.restore(square, optax.adam(1e-3).init(square))
out["params"] = {
    "same": same_bits(found.trained, base()),
    "stack": spec(found.trained["stack"]), "mu": spec(found.opt_state[0].mu["stack"]),
}

fingerprints._SMALL = -1  # as for parameters of some size
out["fingerprints"] = [fingerprint(tree) for tree in (line, square)]
text = fingerprints._on_device.lower(line["stack"]).compile().as_text()
moved = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-reduce)\(", text)
out["moved"] = [int(np.prod([int(n) for n in sizes.split(",")])) for sizes in moved]
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with a training saved on four devices, and what four devices made of two."""
    folder = tmp_path_factory.mktemp("devices")
    saved(folder / "one", steps=[1])
    root = str(Path(jl.__file__).parents[1])
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, "-W", "error", "-c", FOUR_DEVICES, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


@pytest.mark.parametrize("name", ["one", "four"])
def test_on_other_devices(four: tuple[Path, Any], name: str) -> None:
    """Derived by hand from the base: stack P("x", None, "y") of [2, 3, 4], dense P("y", None)."""
    found = four[1][name]
    mesh = [["x", 2], ["y", 2]]
    assert found["same"]
    assert found["as derived"]
    assert found["a"] == found["mu"] == [mesh, ["x", None, None]]
    assert found["b"] == [mesh, ["x", None, "y"]]
    assert found["nu"] == [mesh, ["y", None]]
    assert found["count"] == found["scale"] == [mesh, []]


def test_parameters_on_other_devices(four: tuple[Path, Any]) -> None:
    found = four[1]["params"]
    assert found["same"]
    assert found["stack"] == found["mu"] == [[["x", 2], ["y", 2]], ["x", None, "y"]]


def test_from_four_devices_to_this_one(four: tuple[Path, Any]) -> None:
    checkpoints = jl.io.Checkpoints(four[0] / "four", base=base(), config=CONFIG)
    found = checkpoints.restore(adapter(), adam().init(adapter()))
    assert same_bits(found.trained, adapter(1))
    assert same_bits(found.opt_state, adam_state(adapter(1), 1))


def test_the_fingerprint_is_that_of_one_device(four: tuple[Path, Any]) -> None:
    one = jl.io.fingerprint(base())
    assert four[1]["fingerprints"] == [one, one]
    assert one != jl.io.fingerprint(base(1))
    # Between the devices go the sums of their parts, and not the 24 numbers of the parameter.
    assert four[1]["moved"]
    assert max(four[1]["moved"]) <= 4
