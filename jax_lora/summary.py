"""The table of a model: layers, shapes, parameters, what is trained, multiply-adds, sizes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jax_lora.adapter import Adapter, check_fits, leaves_by_path
from jax_lora.discover import Use, discover, low_rank_multiply_adds
from jax_lora.tables import count, format_table


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer, or the adapter beside one of its weights.

    Attributes:
        name: The path that the layer's parameters share, or ``+ lora`` below it.
        input_shape: What the layer's weight is multiplied with; None if it has no matrix product.
        output_shape: What comes out; None if the layer is never used.
        params: The number of elements.
        trained: Whether they are trained.
        multiply_adds: Multiply-adds of one forward pass.
        output_bytes: Bytes of the output.
        param_bytes: Bytes of the parameters.
    """

    name: str
    input_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...] | None
    params: int
    trained: bool
    multiply_adds: int
    output_bytes: int
    param_bytes: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """The outcome of `summary`; ``print`` it.

    Attributes:
        rows: The layers in the order of their first use, adapters below their layers.
        input_bytes: Bytes of the array arguments.
    """

    rows: tuple[Row, ...]
    input_bytes: int

    @property
    def total_params(self) -> int:
        """The elements of base and adapter."""
        return sum(row.params for row in self.rows)

    @property
    def trainable_params(self) -> int:
        """The elements that are trained."""
        return sum(row.params for row in self.rows if row.trained)

    @property
    def multiply_adds(self) -> int:
        """The multiply-adds of one forward pass."""
        return sum(row.multiply_adds for row in self.rows)

    @property
    def param_bytes(self) -> int:
        """The bytes of base and adapter."""
        return sum(row.param_bytes for row in self.rows)

    @property
    def trained_bytes(self) -> int:
        """The bytes of what is trained, which are also those of its gradients."""
        return sum(row.param_bytes for row in self.rows if row.trained)

    @property
    def pass_bytes(self) -> int:
        """The bytes of every row's output and of the gradient with respect to it."""
        return 2 * sum(row.output_bytes for row in self.rows)

    def __str__(self) -> str:
        rows = [
            (
                row.name,
                str(list(row.input_shape)) if row.input_shape is not None else "-",
                str(list(row.output_shape)) if row.output_shape is not None else "-",
                count(row.params),
                "trained" if row.trained else "frozen",
                count(row.multiply_adds),
            )
            for row in self.rows
        ]
        header = ("layer", "input shape", "output shape", "params", "", "multiply-adds")
        table = format_table(header, rows, right=(3, 5))
        line = "-" * max(map(len, table.splitlines()))
        total = self.input_bytes + self.pass_bytes + self.param_bytes
        frozen = self.total_params - self.trainable_params
        totals = format_table(
            ("total params", count(self.total_params)),
            [
                ("trained params", count(self.trainable_params)),
                ("frozen params", count(frozen)),
                ("multiply-adds (M)", f"{self.multiply_adds / 1e6:.2f}"),
                ("input size (MB)", f"{self.input_bytes / 1e6:.2f}"),
                ("forward/backward pass size (MB)", f"{self.pass_bytes / 1e6:.2f}"),
                ("params size (MB)", f"{self.param_bytes / 1e6:.2f}"),
                ("estimated total size (MB)", f"{total / 1e6:.2f}"),
            ],
            right=(1,),
        )
        return "\n".join([line, table, line, totals, line])


def summary(
    fun: Callable[..., Any],
    params: Any,
    *args: Any,
    adapter: Adapter | None = None,
    **kwargs: Any,
) -> Summary:
    """Summarise ``fun(params, *args, **kwargs)``, with or without an adapter.

    Everything is read from the traced function: parameters are grouped into layers by the path they
    share, and shapes and multiply-adds come from where the function uses them. A contraction costs
    one multiply-add for each output element and contracted index, an elementwise use such as a
    bias one for each output element; operations without parameters are not counted.

    Args:
        fun: A pure function whose first argument is a pytree of parameters.
        params: The parameters; arrays or `jax.ShapeDtypeStruct`.
        *args: Example arguments, likewise.
        adapter: The adapter, whose factors are then the trained parameters and the base frozen.
        **kwargs: Keyword arguments of ``fun``.

    Returns:
        The summary. Its sizes count in bytes: the array arguments; every row's output, twice, as a
        backward pass holds a gradient for each; all parameters.

    Raises:
        AdapterError: The adapter does not fit the parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"l1": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}}
        >>> model = lambda params, x: x @ params["l1"]["kernel"] + params["l1"]["bias"]
        >>> s = summary(model, params, jnp.ones((2, 6)))
        >>> s.rows[0].name, s.rows[0].output_shape, s.total_params, s.multiply_adds
        ('l1', (2, 4), 28, 56)
    """
    leaves = leaves_by_path(params)
    if adapter is not None:
        check_fits(params, adapter)
    uses = discover(fun, params, *args, **kwargs)
    layers: dict[str, list[str]] = {}
    for path in uses:
        layers.setdefault(path.rpartition("/")[0], []).append(path)
    rows = []
    for layer, paths in layers.items():
        rows.append(_layer_row(layer, paths, leaves, uses, trained=adapter is None))
        rows += [
            _adapter_row(path, adapter, uses[path]) for path in paths if path in (adapter or ())
        ]
    arrays = [x for x in jax.tree.leaves((args, kwargs)) if hasattr(x, "shape")]
    input_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
    return Summary(tuple(rows), input_bytes)


def _layer_row(
    layer: str,
    paths: list[str],
    leaves: dict[str, Any],
    uses: dict[str, tuple[Use, ...]],
    *,
    trained: bool,
) -> Row:
    found = [use for path in paths for use in uses[path]]
    matrix = next((use for use in found if use.in_axes), None)
    shown = matrix or (found[0] if found else None)
    return Row(
        name=layer or "(root)",
        input_shape=shown.input_shape if shown else None,
        output_shape=shown.output_shape if shown else None,
        params=sum(math.prod(leaves[path].shape) for path in paths),
        trained=trained,
        multiply_adds=sum(use.multiply_adds for use in found),
        output_bytes=shown.output_bytes if shown else 0,
        param_bytes=sum(math.prod(leaves[p].shape) * leaves[p].dtype.itemsize for p in paths),
    )


def _adapter_row(path: str, adapter: Any, uses: tuple[Use, ...]) -> Row:
    entry = adapter[path]
    settings, trained = entry.settings, entry.trained().values()
    rank, inner = entry.rank, entry.inner_rank(settings)
    extra = low_rank_multiply_adds(settings.layout, inner, uses) if inner else 0
    use = next((use for use in uses if use.in_axes), uses[0] if uses else None)
    return Row(
        name=f"  + {entry.NAME} {path.rpartition('/')[2]}" + (f", rank {rank}" if rank else ""),
        input_shape=use.input_shape if use else None,
        output_shape=use.output_shape if use else None,
        params=sum(math.prod(x.shape) for x in trained),
        trained=True,
        multiply_adds=extra + entry.multiply_adds(settings),
        output_bytes=use.output_bytes if use else 0,
        param_bytes=sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in trained),
    )
