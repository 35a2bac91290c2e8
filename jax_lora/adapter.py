"""What an adapter is: a value beside the parameters, never inside them.

An `Adapter` maps the path of each adapted parameter to an `Entry`. In the variant that is called
LoRA that is two trained arrays ``a`` and ``b`` and a ``scale``, together with the static `Layout`
that says which axes of the weight are its inputs, its outputs, and stacks of independent matrices
(the layers of a scan, the experts of a mixture). It is a pytree, so gradients, optimizer state and
checkpoints are made of the adapter alone, switching a task is passing another argument, and many
adapters are one adapter with a leading axis.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import hashlib
import math
import numbers
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.errors import AdapterError, ConfigError, expect_type, near_misses

#: The label of a factor's rank axis; the other labels are axes of the weight.
RANK = -1


@dataclasses.dataclass(frozen=True)
class Layout:
    """The role of each axis of a weight.

    For a weight ``W`` with stack axes S, in-axes I and out-axes O the factors have the shapes
    ``a: [*S, *I, rank]`` and ``b: [*S, rank, *O]``, and the update is
    ``dW[s, i, o] = scale * sum_r a[s, i, r] b[s, r, o]`` with its axes in the order of ``W``.

    Attributes:
        shape: The weight's shape.
        in_axes: Axes that are contracted with the input.
        out_axes: Axes that the output keeps.
        stack_axes: Axes over which the weight holds independent matrices.

    Example:
        >>> layout = Layout(shape=(3072, 128), in_axes=(0,), out_axes=(1,))
        >>> layout.a_shape(rank=32), layout.b_shape(rank=32)
        ((3072, 32), (32, 128))
    """

    shape: tuple[int, ...]
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    stack_axes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        axes = (*self.stack_axes, *self.in_axes, *self.out_axes)
        if sorted(axes) != list(range(len(self.shape))) or not self.in_axes or not self.out_axes:
            raise AdapterError(
                f"expected every axis of a weight of shape {self.shape} to be exactly one of in, "
                "out and stack, with at least one in-axis and one out-axis; got "
                f"in={self.in_axes}, out={self.out_axes}, stack={self.stack_axes}"
            )

    @property
    def a_axes(self) -> tuple[int, ...]:
        """The weight's axis behind each axis of ``a``."""
        return (*self.stack_axes, *self.in_axes, RANK)

    @property
    def b_axes(self) -> tuple[int, ...]:
        """The weight's axis behind each axis of ``b``."""
        return (*self.stack_axes, RANK, *self.out_axes)

    @property
    def fan_in(self) -> int:
        """The number of inputs of one matrix of the stack."""
        return math.prod(self.shape[i] for i in self.in_axes)

    @property
    def fan_out(self) -> int:
        """The number of outputs of one matrix of the stack."""
        return math.prod(self.shape[i] for i in self.out_axes)

    @property
    def stack(self) -> tuple[int, ...]:
        """The sizes of the stack-axes."""
        return tuple(self.shape[i] for i in self.stack_axes)

    @property
    def column_axes(self) -> tuple[int, ...]:
        """The weight's axes of what there is one of for each output: ``[*stack, *out]``."""
        return (*self.stack_axes, *self.out_axes)

    @property
    def column_shape(self) -> tuple[int, ...]:
        """The shape of what there is one of for each output: ``[*stack, *out]``."""
        return tuple(self.shape[i] for i in self.column_axes)

    def matrices(self, weight: jax.Array) -> jax.Array:
        """A weight as ``[*stack, in, out]``."""
        weight = jnp.transpose(weight, (*self.stack_axes, *self.in_axes, *self.out_axes))
        return weight.reshape(*self.stack, self.fan_in, self.fan_out)

    def weight(self, matrices: jax.Array) -> jax.Array:
        """The inverse of `matrices`."""
        order = (*self.stack_axes, *self.in_axes, *self.out_axes)
        weight = matrices.reshape([self.shape[i] for i in order])
        return jnp.transpose(weight, [order.index(i) for i in range(len(order))])

    def a_shape(self, rank: int) -> tuple[int, ...]:
        """The shape of ``a``: ``[*stack, *in, rank]``."""
        return tuple(rank if i == RANK else self.shape[i] for i in self.a_axes)

    def b_shape(self, rank: int) -> tuple[int, ...]:
        """The shape of ``b``: ``[*stack, rank, *out]``."""
        return tuple(rank if i == RANK else self.shape[i] for i in self.b_axes)


class Entry(abc.ABC):
    """What an adapter holds for one parameter: arrays, and what the parameter becomes with them.

    An entry is a frozen dataclass, registered as a pytree, whose fields are arrays apart from
    static ones. All else in the library (the engine, optimizer labels, checkpoints, the algebra)
    works through this contract.

    Attributes:
        TRAINED: The names of the trained fields.
        LINEAR: Whether the update depends on the entry alone, in proportion to its ``scale``. If
            not, it depends on the parameter too, and the algebra has to be given that.
        WHOLE: Whether values of the parameter itself are trained, so that it has no strength and no
            dropout.
    """

    TRAINED: ClassVar[frozenset[str]] = frozenset()
    LINEAR: ClassVar[bool] = True
    WHOLE: ClassVar[bool] = False

    layout: Layout

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        return self.layout.shape

    @property
    @abc.abstractmethod
    def rank(self) -> int:
        """The rank that the configuration sets; 0 if there is none."""

    @abc.abstractmethod
    def virtual(self, w: jax.Array, path: str) -> Any:
        """What the parameter ``w`` becomes: a `LoraWeight`, or an ordinary array."""

    @abc.abstractmethod
    def update(self, w: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """The update ``dW`` as a product: ``a: [*stack, *in, k]`` and ``b: [*stack, k, *out]``.

        The scale is in ``b``. An entry that is not ``LINEAR`` needs the parameter ``w``.
        """

    @abc.abstractmethod
    def problems(self) -> list[str]:
        """What is wrong with the arrays' shapes; empty if nothing is."""

    def arrays(self) -> dict[str, Any]:
        """The arrays by name, without those that are not there."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        names = [field.name for field in fields if not field.metadata.get("static")]
        return {name: x for name in names if (x := getattr(self, name)) is not None}

    def trained(self) -> dict[str, Any]:
        """The trained arrays by name."""
        return {name: x for name, x in self.arrays().items() if name in self.TRAINED}


class Variant(Entry):
    """A kind of entry that a configuration can ask for, one file in `jax_lora.variants`.

    Attributes:
        NAME: The variant in rules, tables and checkpoints.
        MAX_RANK: Whether a rank above min(in, out) only repeats itself.
        INITS: How it can start, as in `LoraConfig`; empty if it has one way of its own.
    """

    NAME: ClassVar[str]
    MAX_RANK: ClassVar[bool] = True
    INITS: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @abc.abstractmethod
    def create(cls, key: jax.Array, w: jax.Array, settings: Settings) -> Self:
        """A fresh entry, with which the parameter is what it was, bit for bit."""

    @classmethod
    @abc.abstractmethod
    def shapes(cls, settings: Settings) -> dict[str, tuple[int, ...]]:
        """The shape of each array, scalars left out."""

    @abc.abstractmethod
    def axes(self) -> dict[str, tuple[int, ...]]:
        """For each array, the parameter's axis behind each axis, or ``RANK``; scalars left out."""

    @classmethod
    def inner_rank(cls, settings: Settings) -> int:
        """The rank of the update as a product ``a b``, which is what it costs to apply it."""
        return settings.rank

    @classmethod
    def multiply_adds(cls, settings: Settings) -> int:
        """Multiply-adds of each evaluation, apart from those of each row of the input."""
        return 0

    @property
    def settings(self) -> Settings:
        """As far as it can be told from the entry: what it has been made from."""
        return Settings(self.shape, getattr(self, "layout", None), self.rank)

    def problems(self) -> list[str]:
        """What is wrong with the arrays' shapes; empty if nothing is."""
        settings = self.settings
        found = {name: tuple(x.shape) for name, x in self.arrays().items()}
        expected = {name: x for name, x in self.shapes(settings).items() if name in found}
        shapes = tuple(found[name] for name in expected)
        if shapes == tuple(expected.values()):
            return []
        names = ", ".join(expected)
        return [f"expected {names} of shapes {tuple(expected.values())}, found {shapes}"]

    def __str__(self) -> str:
        return f"rank {self.rank}" if self.NAME == "lora" else f"{self.NAME}, rank {self.rank}"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an entry is made from, apart from the parameter itself.

    Attributes:
        shape: The parameter's shape.
        layout: The roles of its axes; None if it is trained whole and they play no role.
        rank: The rank of the update.
        scale: What multiplies the update.
        init: How the factors start.
        dtype: The dtype of the trained arrays.
        rows: The rows that are trained, if only these are.
    """

    shape: tuple[int, ...]
    layout: Layout | None
    rank: int = 0
    scale: float = 1.0
    init: str = "kaiming"
    dtype: str = "float32"
    rows: tuple[int, ...] = ()

    @property
    def matrix(self) -> Layout:
        """The layout, for variants that have to have one."""
        assert self.layout is not None
        return self.layout


@jax.tree_util.register_pytree_with_keys_class
class Adapter(Mapping[str, Entry]):
    """An immutable mapping from a parameter's path to its `Entry`, and a pytree.

    Example:
        >>> import jax.numpy as jnp, jax_lora as jl
        >>> layout = Layout(shape=(4, 3), in_axes=(0,), out_axes=(1,))
        >>> factors = jl.LoraFactors(jnp.ones((4, 2)), jnp.zeros((2, 3)), jnp.asarray(1.0), layout)
        >>> adapter = Adapter({"l1/kernel": factors})
        >>> adapter["l1/kernel"].rank, adapter.trainable_params
        (2, 14)
        >>> jax.tree.map(jnp.shape, adapter)["l1/kernel"].a
        (4, 2)
    """

    __slots__ = ("_entries",)

    def __init__(self, entries: Mapping[str, Entry]):
        expect_type("entries by path", entries, Mapping)
        for path, entry in entries.items():
            expect_type("the path of a parameter", path, str)
            expect_type(f"an entry for {path!r}", entry, Entry)
        self._entries = {path: entries[path] for path in sorted(entries)}

    def __getitem__(self, path: str) -> Any:
        try:
            return self._entries[path]
        except KeyError:
            raise KeyError(f"{path!r} is not adapted; {near_misses(path, self._entries)}") from None

    def __contains__(self, path: object) -> bool:
        # Mapping's own would look for near misses.
        return path in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        if not all(hasattr(leaf, "shape") for leaf in jax.tree.leaves(self)):
            return f"Adapter({self._entries!r})"  # a tree of labels, or of anything else
        rows = [f"  {path}: {entry}" for path, entry in self._entries.items()]
        return "\n".join([f"Adapter({self.trainable_params:,} trainable parameters)", *rows])

    @property
    def trainable_params(self) -> int:
        """The number of elements of all trained arrays."""
        trained = (x for entry in self._entries.values() for x in entry.trained().values())
        return sum(math.prod(x.shape) for x in trained)

    @property
    def nbytes(self) -> int:
        """The bytes of all arrays, ``scale`` and others that are not trained among them."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def tree_flatten_with_keys(self) -> tuple[Any, tuple[str, ...]]:
        """For JAX: the entries with their paths as keys."""
        keys = [(jax.tree_util.DictKey(path), entry) for path, entry in self._entries.items()]
        return keys, tuple(self._entries)

    @classmethod
    def tree_unflatten(cls, paths: tuple[str, ...], entries: Any) -> Adapter:
        """For JAX: the adapter with other entries."""
        # No checks here: JAX unflattens with arbitrary leaves (None, labels, shapes).
        adapter = object.__new__(cls)
        adapter._entries = dict(zip(paths, entries, strict=True))
        return adapter


def path_of(key_path: tuple[Any, ...]) -> str:
    """The path of a leaf as one string, e.g. ``params/l1/kernel``."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def leaves_by_path(params: Any) -> dict[str, Any]:
    """All leaves of a pytree, keyed by their path.

    Raises:
        AdapterError: Two leaves have the same path (a key that itself contains ``/``).
    """
    leaves: dict[str, Any] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = path_of(key_path)
        if path in leaves:
            raise AdapterError(
                f"two parameters have the path {path!r}; expected different ones: rename one, or "
                "nest the parameters instead of writing '/' into a key"
            )
        leaves[path] = leaf
    return leaves


def check_key(key: Any) -> None:
    """Refuse what is no single PRNG key, of either kind that JAX has.

    Raises:
        ConfigError: Says what came instead.
    """
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if shape != () if typed else dtype != jnp.uint32 or len(shape or ()) != 1:
        got = type(key).__name__ if dtype is None else f"an array {dtype}{list(shape or ())}"
        raise ConfigError(f"expected a JAX PRNG key such as jax.random.key(0), got {got}")


def real_array(what: str, value: Any) -> jax.Array:
    """A real number, or an array of them, as an array.

    Raises:
        ConfigError: Names ``what`` was expected to be one.
    """
    array = None
    if not isinstance(value, numbers.Real) or math.isfinite(value):
        with contextlib.suppress(TypeError, ValueError):
            array = jnp.asarray(value)
    if array is None or jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise ConfigError(f"expected {what} to be a finite real number, got {value!r}")
    return array


def param_key(key: jax.Array, path: str) -> jax.Array:
    """A PRNG key that depends on the parameter's path alone, not on which others there are."""
    check_key(key)
    digest = hashlib.sha256(path.encode()).digest()
    return jax.random.fold_in(key, int.from_bytes(digest[:4], "big"))


def check_plain(adapter: Adapter) -> None:
    """Refuse an adapter for a single call, such as one with dropout.

    Raises:
        AdapterError: Names its entries.
    """
    expect_type("an adapter", adapter, Adapter)
    odd = [path for path, entry in adapter.items() if not isinstance(entry, Variant)]
    if odd:
        raise AdapterError(
            f"expected the adapter itself, got one for a single call: {adapter[odd[0]]} at "
            f"{', '.join(odd)}; use the adapter that went into `dropout`"
        )


def is_inexact(leaf: Any) -> bool:
    """Whether a parameter holds what can be adapted: integers would round an update away."""
    return bool(jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.inexact))


def check_fits(params: Any, adapter: Adapter) -> None:
    """Check that every entry of the adapter has a parameter of the shape it was made for.

    Raises:
        AdapterError: Names every entry that does not fit, with what was found instead.
    """
    expect_type("an adapter", adapter, Adapter)
    leaves = leaves_by_path(params)
    problems = []
    for path, entry in adapter.items():
        if path not in leaves:
            problems.append(f"{path}: no such parameter ({near_misses(path, leaves)})")
        elif (found := tuple(np.shape(leaves[path]))) != entry.shape:
            problems.append(f"{path}: made for shape {entry.shape}, found {found}")
        elif not is_inexact(leaves[path]):
            problems.append(f"{path}: expected floats, found {getattr(leaves[path], 'dtype', int)}")
        else:
            problems += [f"{path}: {problem}" for problem in entry.problems()]
    if problems:
        raise AdapterError(
            "the adapter does not fit these parameters; use the params (same tree, same nesting) "
            "it was planned for:\n  " + "\n  ".join(problems)
        )
