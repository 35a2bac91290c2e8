"""Conversions between files of every format, and what is refused; no PyTorch is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.errors import CheckpointError, ConfigError, JaxLoraError
from jax_lora.peft.bases import open_base, read_rules, torch_names
from jax_lora.peft.convert import ToCheckpoint, ToPeft, ToWeights, convert
from jax_lora.peft.tensors import StoredArray, write_tensors
from jax_lora.peft.weights import open_weights
from tests.peft.small import NAMES, P, World, write

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # of orbax, when collected
TARGETS = {"target_modules": ["head", "fc"]}
#: What the rules say without the function.
RULES = [
    {"path": "table", "name": "embed.weight", "kind": "embedding"},
    {"path": "layers/w", "name": "layers.{layer}.fc.weight", "kind": "linear", "axes": "io"},
    {"path": "layers/b", "name": "layers.{layer}.fc.bias"},
    {"path": "conv/kernel", "name": "conv.weight", "kind": "conv", "axes": "wio"},
    {"path": "head/kernel", "name": "head.weight", "kind": "linear", "axes": "io"},
    {"path": "head/bias", "name": "head.bias"},
]


@pytest.fixture
def files(world: World, tensors: dict[str, np.ndarray], tmp_path: Path) -> Path:
    """A folder with the base in both formats, rules for one of them, and an adapter of PEFT."""
    jl.io.save_params(tmp_path / "base", world.params)
    jl.peft.save_weights(tmp_path / "torch", world.params, NAMES, world.uses, shard_bytes=200)
    (tmp_path / "names.json").write_text(json.dumps(RULES))
    write(tmp_path / "theirs", TARGETS | {"task_type": "X"}, tensors)
    return tmp_path


def test_a_checkpoint_of_ours(
    world: World, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {"base": files / "base", "names": files / "names.json"}
    convert(ToCheckpoint(adapter=files / "theirs", out=files / "ours", **given))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:3]] == [
        ["head.weight", "head/kernel", "rank", "2", "1.5"],
        ["layers.{0,1}.fc.weight", "layers/w", "rank", "2", "1.5"],
    ]
    assert lines[3].startswith(f"3 parameters of torch, {2 * (6 + 3 + 4 * 4)} trained numbers")
    adapter, _, metadata = jl.io.load_adapter(files / "ours", world.params)
    expected = world.load(files / "theirs")
    assert jax.tree.structure(adapter) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, adapter, expected)
    assert metadata["names"] == [RULES[1], RULES[4]]
    # Back, with nothing but the checkpoint.
    convert(ToPeft(adapter=files / "ours", out=files / "again"))
    config = json.loads((files / "again" / "adapter_config.json").read_text())
    assert config["task_type"] == "X"
    again = world.load(files / "again")
    for path, update in jl.delta(expected).items():
        np.testing.assert_allclose(jl.delta(again)[path], update, rtol=1e-6)
    # And merged, from either.
    merged = jl.merge(world.params, expected)
    jl.peft.save_weights(files / "expected", merged, NAMES, world.uses)
    for name in ("theirs", "ours"):
        out = files / f"merged {name}"
        convert(ToWeights(adapter=files / name, out=out, shard_gb=1e-7, **given))
        assert len(list(out.iterdir())) > 3
        found = open_weights(out)
        for tensor, value in open_weights(files / "expected").items():
            np.testing.assert_array_equal(found[tensor], value)


def test_weights_of_torch(world: World, files: Path) -> None:
    """Paths and shapes of the checkpoint are torch's own."""
    convert(ToCheckpoint(adapter=files / "theirs", base=files / "torch", out=files / "ours"))
    adapter, _, _ = jl.io.load_adapter(files / "ours")
    expected = jl.delta(world.load(files / "theirs"))
    found = jl.delta(adapter)
    assert set(found) == {"head.weight", "layers.0.fc.weight", "layers.1.fc.weight"}
    np.testing.assert_array_equal(found["head.weight"], expected["head/kernel"].T)
    np.testing.assert_array_equal(found["layers.1.fc.weight"], expected["layers/w"][1].T)
    convert(ToWeights(adapter=files / "theirs", base=files / "torch", out=files / "merged"))
    merged = open_weights(files / "merged")
    base = open_weights(files / "torch")
    assert set(merged) == set(base)
    for name, x in base.items():
        update = np.asarray(found[name]) if name in found else 0
        np.testing.assert_allclose(merged[name], np.asarray(x) + update, rtol=1e-6, atol=1e-6)
    # Without an adapter it is the base.
    convert(ToWeights(base=files / "torch", out=files / "plain"))
    for name, x in open_weights(files / "plain").items():
        np.testing.assert_array_equal(x, base[name])


def test_a_file_of_kohya(world: World, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    down, up = np.ones((2, 6), np.float32), np.ones((3, 2), np.float32)
    file = files / "x.safetensors"
    tensors = {"p_head.lora_down.weight": down, "p_head.lora_up.weight": up}
    write_tensors(file, tensors)
    given: dict[str, Any] = {"adapter": file, "base": files / "torch", "prefix": "p_"}
    convert(ToCheckpoint(out=files / "ours", **given))
    assert "1 parameters of torch" in capsys.readouterr().out
    convert(ToPeft(adapter=files / "ours", out=files / "peft"))
    np.testing.assert_array_equal(
        jl.delta(world.load(files / "peft"))["head/kernel"], 2 * (up @ down).T / 2
    )


def test_tables_and_square_matrices(files: Path) -> None:
    """What the shapes alone do not tell is told by PEFT's keys, or asked for."""
    shapes = {"e.weight": (7, 4), "a.weight": (4, 4), "b.weight": (4, 6), "c.weight": (4, 5)}

    def kinds(turned: bool, rules: Any = (), **ranks: Any) -> dict[str, Any]:
        tensors = {}
        for module, (fan_in, fan_out) in ranks.items():
            ends = ("embedding_A", "embedding_B") if module == "e" else ("A.weight", "B.weight")
            tensors[f"{P}{module}.lora_{ends[0]}"] = np.ones((2, fan_in), np.float32)
            tensors[f"{P}{module}.lora_{ends[1]}"] = np.ones((fan_out, 2), np.float32)
        folder = write(files / "kinds", {"fan_in_fan_out": turned}, tensors)
        names = torch_names(shapes, rules, folder)
        return {name.name[0]: (name.kind, name.axes) for name in names}

    linear, conv1d = ("linear", "oi"), ("conv1d", "io")
    assert kinds(False, e=(7, 4), a=(4, 4), b=(6, 4)) == {
        "e": ("embedding", "io"),
        "a": linear,
        "b": linear,
        "c": linear,
    }
    # GPT-2's: seen in one that is not square, or from PEFT's own word.
    assert kinds(True, a=(4, 4), b=(4, 6)) == {"e": linear, "a": conv1d, "b": conv1d, "c": linear}
    assert kinds(True, a=(4, 4))["a"] == conv1d
    for turned in (False, True):
        with pytest.raises(CheckpointError, match=r"cannot be told: a\.weight; give --names"):
            kinds(turned, a=(4, 4), b=(4, 6), c=(5, 4))
    rule = jl.peft.Name("a.weight", "a.weight", "conv1d", "io")
    assert kinds(False, [rule], a=(4, 4), b=(4, 6), c=(5, 4))["a"] == conv1d


def test_a_note_about_tables(world: World, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = world.adapter(targets=("table",))
    world.save(files / "table", adapter)
    convert(ToCheckpoint(adapter=files / "table", base=files / "torch", out=files / "ours"))
    assert "note: embed.weight is adapted where its rows are looked up" in capsys.readouterr().out
    found = jl.io.load_adapter(files / "ours")[0]["embed.weight"]
    np.testing.assert_allclose(found.a @ found.b, jl.delta(adapter)["table"], rtol=1e-6, atol=1e-6)


def test_rules_in_files(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(
        '[[names]]\npath = "a"\nname = "b.{k}.{p}"\nparts = {p = ["x", "y"]}\n'
    )
    assert read_rules(tmp_path / "x.toml")[0].parts == {"p": ["x", "y"]}
    for name, text, error, message in (
        ("none.toml", None, CheckpointError, "cannot be read"),
        ("bad.toml", "[[names", CheckpointError, "cannot be read"),
        ("bad.json", "[", CheckpointError, "cannot be read as JSON"),
        ("empty.json", "[]", CheckpointError, "expected a list of rules"),
        ("object.json", "{}", CheckpointError, "expected a list of rules, found dict"),
        ("field.json", '[{"path": "a", "name": "b", "x": 1}]', ConfigError, "got also x"),
        ("rule.json", "[1]", ConfigError, "expected a rule to be path, name"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(error, match=message):
            read_rules(tmp_path / name)


def test_what_is_refused(world: World, files: Path) -> None:
    theirs, base, torch = files / "theirs", files / "base", files / "torch"
    convert(ToCheckpoint(adapter=theirs, base=torch, out=files / "ours"))
    jl.io.save_adapter(files / "fresh", world.load(theirs))
    cases: list[tuple[Any, str]] = [
        (ToCheckpoint(adapter=theirs, base=base, out=files / "x"), "give --names"),
        (ToCheckpoint(adapter=torch, base=torch, out=files / "x"), "found whole weights"),
        (ToCheckpoint(adapter=theirs, base=theirs, out=files / "x"), "expected the base parameter"),
        (ToCheckpoint(adapter=files / "no", base=torch, out=files / "x"), "no: expected a folder"),
        (ToCheckpoint(adapter=files, base=torch, out=files / "x"), "names.json"),
        (ToCheckpoint(adapter=theirs, base=torch, out=base), "it holds something"),
        (ToPeft(adapter=files / "fresh", out=files / "x"), "which this checkpoint does not hold"),
        (ToPeft(adapter=files / "ours", out=theirs), "it holds something"),
        (ToPeft(adapter=base, out=files / "x"), "expected the format 'jax_lora.adapter'"),
        (ToWeights(base=torch, out=torch), "it holds something"),
        (ToWeights(base=torch, out=files / "x", shard_gb=0), "expected --shard-gb above 0"),
    ]
    for options, message in cases:
        with pytest.raises(JaxLoraError) as caught:
            convert(options)
        assert message in str(caught.value), options
    assert not (files / "x").exists()


class TestIndex:
    """An index of shards cannot name anything but files beside it."""

    @pytest.mark.parametrize(
        "name", ["../out.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 3, "x.bin", None]
    )
    def test_that_points_elsewhere(self, files: Path, name: Any) -> None:
        write_tensors(files / "out.safetensors", {"head.bias": np.ones(3, np.float32)})
        index = files / "torch" / "model.safetensors.index.json"
        document = json.loads(index.read_text())
        document["weight_map"]["head.bias"] = name
        index.write_text(json.dumps(document))
        with pytest.raises(CheckpointError, match="names files of this folder"):
            open_weights(files / "torch")

    def test_that_does_not_fit(self, files: Path) -> None:
        index = files / "torch" / "model.safetensors.index.json"
        good = json.loads(index.read_text())
        names = sorted(set(good["weight_map"].values()))
        for change in (
            {"more": names[0]},
            {next(iter(good["weight_map"])): names[-1]},
        ):
            index.write_text(json.dumps(good | {"weight_map": good["weight_map"] | change}))
            with pytest.raises(CheckpointError, match="is in only one of the index and"):
                open_weights(files / "torch")
        index.write_text(json.dumps({"weight_map": []}))
        with pytest.raises(CheckpointError, match="expected a weight_map"):
            open_weights(files / "torch")


def test_only_what_is_asked_for_is_read(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For factors the shapes of the base are enough: none of its values is read."""

    def read(self: Any, dtype: Any = None, copy: Any = None) -> Any:
        raise AssertionError("a value was read")

    monkeypatch.setattr(StoredArray, "__array__", read)
    convert(ToCheckpoint(adapter=files / "theirs", base=files / "torch", out=files / "ours"))
    with pytest.raises(AssertionError, match="a value was read"):  # the control
        convert(ToWeights(base=files / "torch", out=files / "out"))


def test_a_base_of_another_dtype(files: Path) -> None:
    """What is no number of a layer is kept as it is."""
    tensors = {
        "head.weight": np.ones((3, 6), jnp.bfloat16),
        "positions": np.arange(3),
        "mask": np.array([True, False]),
        "small": np.ones(2, jnp.float8_e4m3fn),
    }
    write_tensors(files / "x.safetensors", tensors)
    base = open_base(files / "x.safetensors", (), None)
    assert base.params["head.weight"].dtype == jnp.bfloat16
    convert(ToWeights(base=files / "x.safetensors", out=files / "again"))
    again = open_weights(files / "again")
    for name, x in tensors.items():
        assert again[name].dtype == x.dtype
        np.testing.assert_array_equal(again[name], x)
