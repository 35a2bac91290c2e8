"""What an adapter is: a value beside the parameters, never inside them.

An `Adapter` maps the path of each adapted parameter to its `LoraFactors`: two trained arrays
``a`` and ``b`` and a ``scale``, together with the static `Layout` that says which axes of the
weight are its inputs, its outputs, and stacks of independent matrices (the layers of a scan, the
experts of a mixture). It is a pytree, so gradients, optimizer state and checkpoints are made of
the adapter alone, switching a task is passing another argument, and many adapters are one adapter
with a leading axis.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from jax_lora.errors import AdapterError, expect_type, near_misses

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

    def a_shape(self, rank: int) -> tuple[int, ...]:
        """The shape of ``a``: ``[*stack, *in, rank]``."""
        return tuple(rank if i == RANK else self.shape[i] for i in self.a_axes)

    def b_shape(self, rank: int) -> tuple[int, ...]:
        """The shape of ``b``: ``[*stack, rank, *out]``."""
        return tuple(rank if i == RANK else self.shape[i] for i in self.b_axes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraFactors:
    """The low-rank update of one weight, ``dW = scale * a b`` (Hu et al. 2021, arXiv:2106.09685).

    Attributes:
        a: ``[*stack, *in, rank]``, trained.
        b: ``[*stack, rank, *out]``, trained, zero at the start.
        scale: A scalar array. It is an argument of the compiled function like ``a`` and ``b``, so
            that changing it compiles nothing, but it is not trained.
        layout: Which axis of the weight each axis of ``a`` and ``b`` is (static).
    """

    a: jax.Array
    b: jax.Array
    scale: jax.Array
    layout: Layout = dataclasses.field(metadata={"static": True})

    @property
    def rank(self) -> int:
        """The number of columns of ``a``."""
        return int(self.a.shape[-1])


@jax.tree_util.register_pytree_with_keys_class
class Adapter(Mapping[str, LoraFactors]):
    """An immutable mapping from a parameter's path to its factors, and a pytree.

    Example:
        >>> import jax.numpy as jnp
        >>> layout = Layout(shape=(4, 3), in_axes=(0,), out_axes=(1,))
        >>> factors = LoraFactors(jnp.ones((4, 2)), jnp.zeros((2, 3)), jnp.asarray(1.0), layout)
        >>> adapter = Adapter({"l1/kernel": factors})
        >>> adapter["l1/kernel"].rank, adapter.trainable_params
        (2, 14)
        >>> jax.tree.map(jnp.shape, adapter)["l1/kernel"].a
        (4, 2)
    """

    __slots__ = ("_entries",)

    def __init__(self, entries: Mapping[str, LoraFactors]):
        self._entries = {path: entries[path] for path in sorted(entries)}

    def __getitem__(self, path: str) -> LoraFactors:
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
        rows = [f"  {path}: rank {entry.rank}" for path, entry in self._entries.items()]
        return "\n".join([f"Adapter({self.trainable_params:,} trainable parameters)", *rows])

    @property
    def trainable_params(self) -> int:
        """The number of elements of all ``a`` and ``b``."""
        return sum(math.prod(f.a.shape) + math.prod(f.b.shape) for f in self._entries.values())

    @property
    def nbytes(self) -> int:
        """The bytes of all arrays: ``a``, ``b`` and ``scale``."""
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


def param_key(key: jax.Array, path: str) -> jax.Array:
    """A PRNG key that depends on the parameter's path alone, not on which others there are."""
    digest = hashlib.sha256(path.encode()).digest()
    return jax.random.fold_in(key, int.from_bytes(digest[:4], "big"))


def check_fits(params: Any, adapter: Adapter) -> None:
    """Check that every entry of the adapter has a parameter of the shape it was made for.

    Raises:
        AdapterError: Names every entry that does not fit, with what was found instead.
    """
    expect_type("an adapter", adapter, Adapter)
    leaves = leaves_by_path(params)
    problems = []
    for path, factors in adapter.items():
        if path not in leaves:
            problems.append(f"{path}: no such parameter ({near_misses(path, leaves)})")
        elif tuple(leaves[path].shape) != factors.layout.shape:
            found = tuple(leaves[path].shape)
            problems.append(f"{path}: made for shape {factors.layout.shape}, found {found}")
        else:
            rank = factors.a.shape[-1]
            expected = (factors.layout.a_shape(rank), factors.layout.b_shape(rank))
            if (found_ab := (tuple(factors.a.shape), tuple(factors.b.shape))) != expected:
                problems.append(f"{path}: expected a, b of shapes {expected}, found {found_ab}")
    if problems:
        raise AdapterError(
            "the adapter does not fit these parameters; use the params (same tree, same nesting) "
            "it was planned for:\n  " + "\n  ".join(problems)
        )
