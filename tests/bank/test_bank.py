"""A bank: what goes in comes out, nothing is compiled or copied on the way, and what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lora as jl
from jax_lora import bank as bank_module
from tests.bank.small import World
from tests.conftest import QUICK


def _same(found: jl.Adapter, wanted: jl.Adapter) -> None:
    assert list(found) == list(wanted)
    for path, entry in wanted.items():
        assert type(found[path]) is jl.LoraFactors
        assert found[path].layout == entry.layout
        for name in ("a", "b", "scale"):
            np.testing.assert_array_equal(getattr(found[path], name), getattr(entry, name))


def test_what_goes_in_comes_out(world: World) -> None:
    """Of its own rank, and for the parameters that it adapts."""
    bank = world.bank()
    assert bank.names == ("a", "b", "c")
    for name, adapter in world.adapters.items():
        _same(bank.get(name), adapter)
    bank = bank.replace("a", world.adapters["b"]).remove("b")
    _same(bank.get("a"), world.adapters["b"])
    _same(bank.get("c"), world.adapters["c"])
    assert bank.names == ("a", "c")
    bank = bank.replace("a", world.adapters["a"], rename="z")
    assert (bank.names, bank.slot("z"), len(bank)) == (("c", "z"), 0, 2)
    _same(bank.get("z"), world.adapters["a"])


def test_slots_are_reused(world: World) -> None:
    bank = world.bank()
    assert [bank.slot(name) for name in "abc"] == [0, 2, 3]
    bank = bank.add("d", world.adapters["a"]).add("e", world.adapters["a"])
    assert (bank.slot("d"), bank.slot("e")) == (1, 4)
    with pytest.raises(jl.AdapterError, match="expected a free slot, but all 5 are taken"):
        bank.add("f", world.adapters["a"])
    assert bank.remove("b").add("f", world.adapters["c"]).slot("f") == 2


def test_a_free_slot_is_empty(world: World) -> None:
    bank = world.bank().remove("b")
    for slots in bank.entries.values():
        for array in slots.arrays().values():
            assert not np.asarray(array[np.array([1, 2, 4])]).any()
            assert np.asarray(array[0]).any()  # negative control: a slot that is not


def test_the_padding_is_zero(world: World) -> None:
    slots = world.bank().entries["head"]
    assert slots.rank == 3
    for factor in (slots.a, slots.b):  # [slots, rank, features]
        assert np.asarray(factor[0, :1]).all()
        assert not np.asarray(factor[0, 1:]).any()
        assert np.asarray(factor[2]).all()


def test_ids(world: World) -> None:
    bank = world.bank()
    ids = bank.ids(["c", None, "a"])
    assert ids.dtype == np.int32
    assert ids.tolist() == [3, -1, 0]
    assert bank.ids([["a", None], ["b", "b"]]).tolist() == [[0, -1], [2, 2]]
    assert bank.ids("b").shape == ()
    assert "b" in bank
    assert "d" not in bank


def test_writing_compiles_nothing(world: World, compiled_programs: Callable[[], int]) -> None:
    """From the first adapter on, of whatever rank, and for however many parameters."""
    bank = jl.Bank.empty(world.adapters["b"], 6)
    run = jax.jit(lambda bank: bank.entries["head"].a[0].sum(), compiler_options=QUICK)
    run(bank)
    before = compiled_programs()
    for name in "abc":
        bank = bank.add(name, world.adapters[name])
        run(bank)
    bank = bank.replace("a", world.adapters["c"]).remove("b").add("b", world.adapters["a"])
    run(bank)
    assert compiled_programs() == before
    # Negative control: a bank of other shapes.
    jl.Bank.empty(world.adapters["b"], 7)
    assert compiled_programs() > before


def test_writing_copies_one_adapter(world: World) -> None:
    """The new bank is in the memory of the old one, and there is no other of a bank's size."""
    bank = world.bank(slots=200)
    arrays = bank._blank()
    size = bank.nbytes
    write = bank_module._write.lower(bank.entries, np.int32(1), arrays).compile()
    memory = write.memory_analysis()
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < size / 100
    old = bank.entries["head"].a
    place = old.unsafe_buffer_pointer()
    new = bank.replace("a", world.adapters["b"]).entries["head"].a
    assert new.unsafe_buffer_pointer() == place
    assert old.is_deleted()
    # Negative control: without donation it is a copy.
    kept = jax.jit(bank_module._write.__wrapped__).lower(new_bank(world), np.int32(1), arrays)
    assert kept.compile().memory_analysis().alias_size_in_bytes == 0


def new_bank(world: World) -> Any:
    return jl.Bank.empty(world.adapters["b"], 200).entries


def test_a_refusal_leaves_the_bank_as_it_was(world: World) -> None:
    bank = world.bank()
    with pytest.raises(jl.AdapterError):
        bank.add("a", world.adapters["a"])
    _same(bank.get("b"), world.adapters["b"])


def test_names_do_not_matter_to_a_program(world: World) -> None:
    bank = world.bank()
    other = jl.Bank.empty(world.adapters["b"], 5)
    assert jax.tree.structure(bank) == jax.tree.structure(other)


def test_transformed_banks_have_no_names(world: World) -> None:
    bank = world.bank()
    double = jax.tree.map(lambda x: 2 * x, bank)
    assert repr(double).startswith("Bank(arrays of 5 slots, rank 3, 8 parameters, ")
    for use in (
        lambda: double.ids(["a"]),
        lambda: double.names,
        lambda: double.add("d", world.adapters["a"]),
    ):
        with pytest.raises(jl.AdapterError, match=r"got one out of a transformed function.*with_"):
            use()
    named = bank.with_arrays(double)
    assert named.names == bank.names
    np.testing.assert_array_equal(
        named.get("b")["head"].a, 2 * np.asarray(world.adapters["b"]["head"].a)
    )
    with pytest.raises(jl.AdapterError, match=r"expected the arrays of Bank\(3 of 5 slots.*6 slot"):
        bank.with_arrays(jl.Bank.empty(world.adapters["b"], 6))
    with pytest.raises(jl.AdapterError, match="expected a bank"):
        bank.with_arrays(world.adapters["b"])


def test_unknown_names(world: World) -> None:
    bank = world.bank().add("french", world.adapters["a"])
    for use in (bank.slot, bank.get, bank.remove, lambda name: bank.ids(["a", name])):
        with pytest.raises(jl.AdapterError, match=r"no adapter 'frnch' .*nearest: 'french'"):
            use("frnch")
    with pytest.raises(jl.AdapterError, match=r"no adapter 'frnch'"):
        bank.replace("frnch", world.adapters["a"])
    with pytest.raises(jl.AdapterError, match="expected a new name, but 'a' is in the bank"):
        bank.add("a", world.adapters["a"])
    with pytest.raises(jl.AdapterError, match="expected a new name, but 'b' is in the bank"):
        bank.replace("a", world.adapters["a"], rename="b")
    with pytest.raises(jl.AdapterError, match="a string that is not empty; got ''"):
        bank.add("", world.adapters["a"])


def test_all_that_does_not_fit_is_one_error(world: World, entry: Callable[..., Any]) -> None:
    bank = jl.Bank.empty(world.adapters["c"], 2, rank={"table": 4})
    assert (bank.entries["table"].rank, bank.entries["layers/up"].rank) == (4, 2)
    layout = world.adapters["c"]["table"].layout
    turned = dataclasses.replace(layout, in_axes=layout.out_axes, out_axes=layout.in_axes)
    odd = jl.Adapter(
        {
            "table": entry(turned),
            "layers/op": world.adapters["c"]["layers/up"],
            "layers/up": jax.tree.map(lambda x: x[None], world.adapters["c"]["layers/up"]),
        }
    )
    with pytest.raises(jl.AdapterError) as caught:
        bank.add("odd", odd)
    lines = str(caught.value).splitlines()
    assert lines[0] == "the adapter does not fit the bank:"
    assert lines[1].startswith("  layers/op: not a parameter of the bank (nearest: 'layers/up'")
    assert lines[2].startswith(
        "  layers/up: expected a, b of shapes ((2, 8, 2), (2, 2, 12)), found"
    )
    assert lines[3].startswith("  table: expected Layout(shape=(11, 8), in_axes=(0,)")
    with pytest.raises(jl.AdapterError, match="layers/up: expected rank 2 at most, got 3"):
        bank.add("large", jl.select(world.adapters["b"], ["table", "layers/up"]))
    bank.add("b", jl.select(world.adapters["b"], "table"))
    for odd in (jl.dropout(world.adapters["c"], jax.random.key(0), 0.5), {}):
        with pytest.raises(jl.AdapterError, match="expected"):
            bank.add("odd", odd)


def test_sizes_that_mean_nothing(world: World) -> None:
    like = world.adapters["b"]
    for slots in (0, -1, 2.0, True):
        with pytest.raises(jl.ConfigError, match="expected at least one slot"):
            jl.Bank.empty(like, slots)
    with pytest.raises(jl.ConfigError, match="expected a rank of at least 1"):
        jl.Bank.empty(like, 2, rank=0)
    with pytest.raises(jl.ConfigError, match=r"got 'heed' \(nearest: 'head'"):
        jl.Bank.empty(like, 2, rank={"heed": 3})


def test_made_from_shapes_and_of_another_dtype(world: World) -> None:
    like = jax.eval_shape(lambda: world.adapters["b"])
    bank = jl.Bank.empty(like, 2, dtype="bfloat16").add("a", world.adapters["a"])
    head = bank.get("a")["head"]
    assert head.a.dtype == jnp.bfloat16
    np.testing.assert_array_equal(head.a, world.adapters["a"]["head"].a.astype("bfloat16"))
    with pytest.raises(jl.AdapterError, match="expected an adapter"):
        jl.Bank.empty(bank, 2)


def test_a_bank_is_no_adapter(world: World) -> None:
    bank = world.bank()
    with pytest.raises(jl.AdapterError, match=r"expected an adapter .*got Bank"):
        jl.scale(bank, 2.0)
    with pytest.raises(jl.AdapterError, match=r"expected an adapter .*got Bank"):
        jl.dropout(bank, jax.random.key(0), 0.1)
    with pytest.raises(jl.AdapterError, match=r"expected one adapter, got 5 slots of rank 3"):
        jl.apply(lambda p: p["head"])(world.params, bank.entries)


@pytest.mark.parametrize("rank", [None, 5])
def test_bytes(world: World, rank: int | None) -> None:
    """Of what the slots hold, by a closed form."""
    bank = jl.Bank.empty(jl.select(world.adapters["b"], "head"), 4, rank=rank)
    assert bank.nbytes == 4 * 4 * ((rank or 3) * (8 + 3) + 1)
    assert repr(bank) == f"Bank(0 of 4 slots, rank {rank or 3}, 1 parameter, {bank.nbytes} bytes)"


def test_a_bank_whose_memory_is_gone(world: World) -> None:
    old = jl.Bank.empty(world.adapters["b"], 2)
    old.add("a", world.adapters["a"])
    with pytest.raises(jl.AdapterError, match="expected the newest bank"):
        old.add("b", world.adapters["b"])


def test_what_is_no_name(world: World) -> None:
    bank = world.bank()
    for names in (0, [0, 1], b"a"):
        with pytest.raises(jl.AdapterError, match="expected names, None, or sequences"):
            bank.ids(names)
    with pytest.raises(jl.AdapterError, match="sequences of one length"):
        bank.ids([["a"], ["a", "b"]])


def test_a_dtype_that_rounds_factors_to_integers(world: World) -> None:
    with pytest.raises(jl.ConfigError, match="floating-point numbers, got dtype='int8'"):
        jl.Bank.empty(world.adapters["b"], 2, dtype="int8")
    with pytest.raises(jl.AdapterError, match="got an empty one"):
        jl.Bank.empty(jl.Adapter({}), 2)
