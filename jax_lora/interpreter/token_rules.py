"""Where the tokens are after one operation, if it keeps each token's entries at its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from jax_lora.interpreter.core import is_literal
from jax_lora.interpreter.lookup import picked_axes
from jax_lora.interpreter.structural import reshape_groups

#: Entry by entry, of arrays of one shape and numbers.
_ELEMENTWISE = (
    *("abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh"),
    *("cbrt", "ceil", "clamp", "convert_element_type", "copy", "copy_p", "cos", "cosh", "digamma"),
    *("div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt"),
    *("integer_pow", "is_finite", "le", "lgamma", "log", "log1p", "logistic", "lt", "max"),
    *("mesh_cast", "min", "mul", "name", "ne", "neg", "nextafter", "not", "optimization_barrier"),
    *("or", "pcast", "pow", "pvary", "reduce_precision", "rem", "reshard", "round", "rsqrt"),
    *("select_n", "sharding_constraint", "sign", "sin", "sinh", "sqrt", "square"),
    *("stop_gradient", "sub", "tan", "tanh", "xor"),
)
_REDUCTIONS = (
    *("argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod"),
    *("reduce_sum", "reduce_xor"),
)


@dataclasses.dataclass(frozen=True)
class Tag:
    """Where the tokens are in an array that depends on them.

    Attributes:
        axes: The axes of tokens, with the tokens along each: all, or some of them in order.
        token: If there is no such axis, the one token that the array belongs to, or None.
        lost: If it is neither, the primitive behind which nothing is known.
    """

    axes: Mapping[int, range]
    token: int | None = None
    lost: str = ""

    def moved(self, name: str, axes: Mapping[int, int]) -> Tag:
        """The tag of an array whose axes are others now; ``name`` has done away with the rest."""
        kept = {axes[axis]: tokens for axis, tokens in self.axes.items() if axis in axes}
        gone = [tokens for axis, tokens in self.axes.items() if axis not in axes]
        if kept or not gone:
            return dataclasses.replace(self, axes=kept)
        alone = {tokens[0] if len(tokens) == 1 else None for tokens in gone}
        token = alone.pop() if len(alone) == 1 else None
        return Tag({}, token, lost="" if token is not None else name)

    def without(self, name: str, gone: Iterable[int]) -> Tag:
        """The tag without some of its axes, in which ``name`` has mixed or moved the tokens."""
        gone = set(gone)
        kept = {axis: tokens for axis, tokens in self.axes.items() if axis not in gone}
        if kept or not self.axes:
            return dataclasses.replace(self, axes=kept)
        return Tag({}, lost=name)

    def along(self, axis: int, tokens: range) -> Tag:
        """The tag with other tokens along one of its axes."""
        return dataclasses.replace(self, axes={**self.axes, axis: tokens})


#: Of all inputs or outputs of an equation; None for those that no token reaches.
Tags = Sequence[Any]
#: ``rule(eqn, tags, known)``: the tag of all outputs, or of each; ``known`` are values of scalars.
_Rule = Callable[[Any, Tags, Mapping[Any, Any]], Tag | list[Tag]]
_RULES: dict[str, _Rule] = {}


def tags_after(eqn: Any, tags: Tags, known: Mapping[Any, Any]) -> list[Tag]:
    """The tags of the outputs of an equation that has no inner jaxpr."""
    rule = _RULES.get(eqn.primitive.name)
    found = Tag({}, lost=eqn.primitive.name) if rule is None else rule(eqn, tags, known)
    return found if isinstance(found, list) else [found] * len(eqn.outvars)


def merged(name: str, tags: Iterable[Tag | None]) -> Tag:
    """The tag of what is made entry by entry of several arrays."""
    found = [tag for tag in tags if tag is not None]
    axes: dict[int, range] = {}
    for tag in found:
        for axis, tokens in tag.axes.items():
            if axes.setdefault(axis, tokens) != tokens:
                return Tag({}, lost=name)
    if axes:
        return Tag(axes)
    return found[0] if len({tag.token for tag in found}) == 1 else Tag({}, lost=name)


def _rule(*names: str) -> Callable[[_Rule], _Rule]:
    def register(rule: _Rule) -> _Rule:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


@_rule(*_ELEMENTWISE)
def _elementwise(eqn: Any, tags: Tags, known: Any) -> Tag:
    return merged(eqn.primitive.name, tags)


@_rule(*_REDUCTIONS)
def _reduction(eqn: Any, tags: Tags, known: Any) -> Tag:
    (tag,) = tags
    kept = [i for i in range(eqn.invars[0].aval.ndim) if i not in eqn.params["axes"]]
    return tag.moved(eqn.primitive.name, {old: new for new, old in enumerate(kept)})


@_rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulative(eqn: Any, tags: Tags, known: Any) -> Tag:
    # Entry t is of the entries up to t, as in causal attention.
    (tag,) = tags
    return tag


@_rule("sort")
def _sort(eqn: Any, tags: Tags, known: Any) -> Tag:
    return merged("sort", tags).without("sort", [eqn.params["dimension"]])


@_rule("top_k")
def _top_k(eqn: Any, tags: Tags, known: Any) -> Tag:
    return tags[0].without("top_k", [eqn.invars[0].aval.ndim - 1])


@_rule("transpose")
def _transpose(eqn: Any, tags: Tags, known: Any) -> Tag:
    order = eqn.params["permutation"]
    return tags[0].moved("transpose", {old: new for new, old in enumerate(order)})


@_rule("reshape", "squeeze")
def _reshape(eqn: Any, tags: Tags, known: Any) -> Tag:
    old, new = (tuple(v.aval.shape) for v in (eqn.invars[0], eqn.outvars[0]))
    groups = [] if 0 in old else reshape_groups(old, new)
    same = {i[0]: j[0] for i, j in groups if len(i) == len(j) == 1}
    return tags[0].moved(eqn.primitive.name, same)


@_rule("broadcast_in_dim")
def _broadcast(eqn: Any, tags: Tags, known: Any) -> Tag:
    (tag, *_), old, new = tags, eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    places = enumerate(eqn.params["broadcast_dimensions"])
    return tag.moved("broadcast_in_dim", {i: j for i, j in places if old[i] == new[j]})


@_rule("slice")
def _slice(eqn: Any, tags: Tags, known: Any) -> Tag:
    (tag,), params = tags, eqn.params
    for i, tokens in tag.axes.items():
        step = (params["strides"] or {i: 1})[i]
        tag = tag.along(i, tokens[params["start_indices"][i] : params["limit_indices"][i] : step])
    return tag


@_rule("dynamic_slice")
def _dynamic_slice(eqn: Any, tags: Tags, known: Mapping[Any, Any]) -> Tag:
    tag, (operand, *starts) = tags[0], eqn.invars
    if tag is None:
        return Tag({}, lost="dynamic_slice")
    for i, tokens in tag.axes.items():
        size, whole = eqn.params["slice_sizes"][i], operand.aval.shape[i]
        start: Any = starts[i].val if is_literal(starts[i]) else known.get(starts[i])
        if size != whole and start is None:
            return tag.without("dynamic_slice", [i])
        if size != whole:
            first = min(max(int(start), 0), whole - size)
            tag = tag.along(i, tokens[first : first + size])
    return tag


@_rule("rev")
def _rev(eqn: Any, tags: Tags, known: Any) -> Tag:
    (tag,) = tags
    for i in set(eqn.params["dimensions"]) & set(tag.axes):
        tag = tag.along(i, tag.axes[i][::-1])
    return tag


@_rule("split")
def _split(eqn: Any, tags: Tags, known: Any) -> list[Tag]:
    (tag,), axis, sizes = tags, eqn.params["axis"], eqn.params["sizes"]
    if axis not in tag.axes:
        return [tag] * len(sizes)
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    tokens = tag.axes[axis]
    return [tag.along(axis, tokens[k : k + n]) for k, n in zip(starts, sizes, strict=True)]


@_rule("concatenate")
def _concatenate(eqn: Any, tags: Tags, known: Any) -> Tag:
    axis = eqn.params["dimension"]
    parts = [None if tag is None else tag.axes.get(axis) for tag in tags]
    if not any(parts):
        return merged("concatenate", tags)
    rest = merged("concatenate", (t.without("concatenate", [axis]) for t in tags if t))
    if None in parts:
        return rest
    tokens = [token for part in parts for token in part or ()]
    steps = {later - token for token, later in pairwise(tokens)}
    if len(steps) > 1 or steps & {0}:
        return rest
    step = steps.pop() if steps else 1
    whole = range(tokens[0], tokens[0] + step * len(tokens), step)
    return Tag({**rest.axes, axis: whole})


@_rule("pad")
def _pad(eqn: Any, tags: Tags, known: Any) -> Tag:
    config = eqn.params["padding_config"]
    return merged("pad", tags).without("pad", [i for i, p in enumerate(config) if any(p)])


@_rule("dot_general")
def _dot_general(eqn: Any, tags: Tags, known: Any) -> Tag:
    contract, batch = eqn.params["dimension_numbers"]
    moved, place = [], len(batch[0])
    for k, tag in enumerate(tags):
        places = {i: j for j, i in enumerate(batch[k])}
        for i in range(eqn.invars[k].aval.ndim):
            if i not in (*contract[k], *batch[k]):
                places[i], place = place, place + 1
        moved.append(None if tag is None else tag.moved("dot_general", places))
    return merged("dot_general", moved)


@_rule("conv_general_dilated")
def _conv(eqn: Any, tags: Tags, known: Any) -> Tag:
    params, (x, _) = eqn.params, eqn.invars
    numbers = params["dimension_numbers"]
    if tags[0] is None or tags[1] is not None or params["batch_group_count"] != 1:
        return Tag({}, lost="conv_general_dilated")
    places = {numbers.lhs_spec[0]: numbers.out_spec[0]}
    plain = zip(params["window_strides"], params["lhs_dilation"], params["padding"], strict=True)
    for i, j, (*once, pad) in zip(numbers.lhs_spec[2:], numbers.out_spec[2:], plain, strict=True):
        # Position t of the result is a window that begins at t at the latest, and does not end
        # before it.
        same = x.aval.shape[i] == eqn.outvars[0].aval.shape[j]
        if once == [1, 1] and min(pad) >= 0 and same:
            places[i] = j
    return tags[0].moved("conv_general_dilated", places)


@_rule("gather")
def _gather(eqn: Any, tags: Tags, known: Any) -> Tag:
    numbers, (operand, indices) = eqn.params["dimension_numbers"], eqn.invars
    picked, paired = picked_axes(eqn)
    rank = eqn.outvars[0].aval.ndim
    batch = [i for i in range(rank) if i not in numbers.offset_dims]
    gone = {*numbers.collapsed_slice_dims, *paired}
    kept = [i for i in range(operand.aval.ndim) if i not in gone]
    whole = dict(zip(kept, numbers.offset_dims, strict=True))
    partners = getattr(numbers, "start_indices_batching_dims", ())
    of_operand = {i: j for i, j in whole.items() if i not in picked}
    of_operand |= {i: batch[k] for i, k in zip(paired, partners, strict=True)}
    of_indices = dict(enumerate(batch)) if indices.aval.ndim == len(batch) + 1 else {}
    places = (of_operand, of_indices)
    moved = [t and t.moved("gather", p) for t, p in zip(tags, places, strict=True)]
    return merged("gather", moved)
