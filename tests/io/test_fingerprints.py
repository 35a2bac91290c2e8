"""Fingerprints against a plain loop over words, wherever they are computed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_lora.io import fingerprint, fingerprints
from jax_lora.io.fingerprints import differences

SEEDS = (0x9E3779B9, 0x85EBCA6B)


def by_hand(words: Any) -> str:
    """The definition, in Python's integers."""

    def mix(x: int) -> int:
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        return x ^ (x >> 16)

    def total(seed: int) -> int:
        pairs = enumerate(int(word) for word in words)
        return sum(mix(word ^ mix((i + seed) % 2**32)) for i, word in pairs) % 2**32

    return "".join(f"{total(seed):08x}" for seed in SEEDS)


@pytest.fixture(params=["host", "device"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small trees are summed by numpy, large ones by a compiled program."""
    if request.param == "device":
        monkeypatch.setattr(fingerprints, "_SMALL", -1)
    return str(request.param)


NORMAL = np.random.default_rng(0).normal(size=(3, 2, 5)).astype(np.float32)
CASES = {
    "float32": (NORMAL, NORMAL.view(np.uint32)),
    "bfloat16": (
        NORMAL.astype(ml_dtypes.bfloat16),
        NORMAL.astype(ml_dtypes.bfloat16).view(np.uint16),
    ),
    "int8": (NORMAL.astype(np.int8), NORMAL.astype(np.int8).view(np.uint8)),
    "bool": (NORMAL > 0, NORMAL > 0),
    "int4": (NORMAL.astype(ml_dtypes.int4), NORMAL.astype(np.int8) & 15),
    "float64": (NORMAL.astype(np.float64) + 1e-12, None),
    "complex64": (NORMAL + 1j * NORMAL, np.stack([NORMAL, NORMAL], -1).view(np.uint32)),
}


@pytest.mark.parametrize("name", CASES)
def test_is_the_definition(where: str, name: str) -> None:
    values, words = CASES[name]
    if words is None:
        words = (NORMAL.astype(np.float64) + 1e-12).view(np.uint32)  # little-endian
    expected = {"shape": [3, 2, 5], "dtype": name, "hash": by_hand(np.ravel(words))}
    assert fingerprint({"w": values}) == {"w": expected}
    if name != "float64":  # which JAX would round
        assert fingerprint({"w": jnp.asarray(values)}) == {"w": expected}


def test_of_what_is_no_matrix(where: str) -> None:
    key = jax.random.key(7)
    found = fingerprint({"scalar": jnp.float32(1), "none": jnp.zeros((0, 3)), "key": key, "f": min})
    assert found["scalar"]["hash"] == by_hand([0x3F800000])
    assert found["none"]["hash"] == by_hand([])
    assert found["key"]["hash"] == by_hand(np.asarray(jax.random.key_data(key)))
    assert "f" not in found


def test_any_bit_and_any_place_matters(where: str) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    changed = [values.copy() for _ in range(values.size)]
    for index, other in enumerate(changed):
        other.reshape(-1).view(np.uint32)[index] ^= 1
    swapped = values.copy()
    swapped[0, [0, 1]] = values[0, [1, 0]]
    hashes = {fingerprint([x])["0"]["hash"] for x in (values, swapped, values.T.copy(), *changed)}
    assert len(hashes) == 3 + values.size
    # What a comparison of values would not see.
    zeros = [fingerprint([np.float32(x)])["0"]["hash"] for x in (0.0, -0.0)]
    assert zeros[0] != zeros[1]


def test_needs_no_memory_on_the_device() -> None:
    """One pass: nothing of the parameter's size is written."""
    leaf = jax.ShapeDtypeStruct((256, 1024), jnp.bfloat16)
    program = fingerprints._on_device.lower(leaf).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2**12


def test_differences_are_named() -> None:
    then = {"a": NORMAL, "b": {"c": NORMAL, "d": NORMAL}, "e": NORMAL, "gone": NORMAL}
    now = {"a": NORMAL, "b": {"c": NORMAL + 1, "d": NORMAL.astype(np.float16)}, "new": NORMAL}
    now["e"] = NORMAL[:2]
    saved = fingerprint(then)
    assert differences(saved, then) == []
    assert differences(saved, now) == [
        "b/c: other values",
        "b/d: then float32(3, 2, 5), now float16(3, 2, 5)",
        "e: then float32(3, 2, 5), now float32(2, 2, 5)",
        "gone: no such parameter now",
        "new: no such parameter then",
    ]


def test_of_shapes_the_values_are_not_compared() -> None:
    shapes = {"w": jax.ShapeDtypeStruct((3, 2, 5), jnp.float32)}
    assert fingerprint(shapes) == {"w": {"shape": [3, 2, 5], "dtype": "float32"}}
    assert differences(fingerprint({"w": NORMAL}), shapes) == []
    assert differences(fingerprint(shapes), {"w": NORMAL}) == []
    assert differences(fingerprint({"w": NORMAL[1:]}), shapes) == [
        "w: then float32(2, 2, 5), now float32(3, 2, 5)"
    ]
