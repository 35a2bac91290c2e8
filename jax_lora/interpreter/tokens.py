"""Whose each row is: the axis of the tokens in the input of every product.

Where each token selects an adapter of its own, a product with an adapted weight has to know which
row of its input is which token's. In the arguments that is given. From there the tokens are
followed through the function's jaxpr, without evaluating anything, by operations that are known to
keep each token's entries at its place along an axis. Behind others it is not known, nor guessed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy as np

from jax_lora.errors import MaterializeError
from jax_lora.interpreter.core import CALLS, is_literal, open_jaxpr
from jax_lora.interpreter.token_rules import Tag, Tags, tags_after
from jax_lora.virtual import LoraWeight


class TokenAxes:
    """The axis of the tokens in the input of every product of one traced function.

    Args:
        axes: That in the function's inputs, by their index; others do not depend on tokens.
        count: The number of tokens.
    """

    def __init__(self, axes: Mapping[int, int], count: int):
        self._axes, self._all = axes, range(count)
        self._found: dict[int, Tags] = {}

    def follow(self, jaxpr: Any, inputs: Iterable[int]) -> None:
        """Follow the tokens through a jaxpr whose inputs have these indices."""
        tags = [Tag({self._axes[i]: self._all}) if i in self._axes else None for i in inputs]
        _Walk(self._found).run(jaxpr, tags)

    def place(
        self, weight: LoraWeight, eqn: Any, index: int, summed: Set[int] = frozenset()
    ) -> tuple[LoraWeight, int | None]:
        """Whose the rows are that a weight meets.

        Args:
            weight: A weight whose factors each token selects.
            eqn: A product.
            index: Which of its inputs the weight meets.
            summed: The axes of that input that it sums over.

        Returns:
            The weight with factors for the tokens in that input, and the axis along which these
            are; None if all of the input belongs to one token.

        Raises:
            MaterializeError: It is not known whose they are.
        """
        tags = self._found.get(id(eqn))
        tag = tags[index] if tags else None
        if tag is not None and len(tag.axes) == 1 and not summed & tag.axes.keys():
            ((axis, tokens),) = tag.axes.items()
            return (weight if tokens == self._all else _of(weight, tokens)), axis
        if tag is not None and tag.token is not None:
            return _of(weight, tag.token), None
        if tag is None:
            found = "that does not depend on the tokens"
        elif summed & tag.axes.keys():
            found = "whose tokens it sums over"
        elif tag.axes:
            found = f"with several axes of tokens, {', '.join(str(i) for i in sorted(tag.axes))}"
        else:
            found = f"whose rows are no token's any more, behind `{tag.lost}`"
        raise MaterializeError(
            f"{weight.path}: `{eqn.primitive.name}` has an input of shape "
            f"{tuple(eqn.invars[index].aval.shape)} {found}; expected one row for each token, "
            "which selects its adapter. Give one id for each example, or leave this parameter out "
            "of the bank"
        )


def _of(weight: LoraWeight, tokens: range | int) -> LoraWeight:
    """A weight with factors for some of the tokens, or for one of them."""
    at = np.asarray(tokens)
    a, b = (dataclasses.replace(f, slot=f.slot[at]) for f in (weight.a, weight.b))
    return dataclasses.replace(weight, a=a, b=b, scale=weight.scale[at])


class _Walk:
    """The tags of every value of a jaxpr, from those of its inputs.

    Args:
        found: Where to note the tags of each equation's inputs, by the equation's id.
    """

    def __init__(self, found: dict[int, Tags]):
        self._found = found

    def run(self, jaxpr: Any, tags: Tags) -> list[Tag | None]:
        """The tags of the outputs."""
        env = {v: tag for v, tag in zip(jaxpr.invars, tags, strict=True) if tag is not None}
        known: dict[Any, Any] = {}
        for eqn in jaxpr.eqns:
            of_inputs = [None if is_literal(v) else env.get(v) for v in eqn.invars]
            if not any(of_inputs):
                _fold(eqn, known)
                continue
            if self._found.setdefault(id(eqn), of_inputs) != of_inputs:
                # One function that is called with the tokens at one place and at another.
                of_inputs = [t and Tag({}, lost="jit") for t in of_inputs]
                self._found[id(eqn)] = of_inputs
            outs = self._follow(eqn, of_inputs, known)
            env.update({v: tag for v, tag in zip(eqn.outvars, outs, strict=True) if tag})
        return [None if is_literal(v) else env.get(v) for v in jaxpr.outvars]

    def _follow(
        self, eqn: Any, tags: list[Tag | None], known: Mapping[Any, Any]
    ) -> list[Tag | None]:
        name, params = eqn.primitive.name, eqn.params
        if name in CALLS:
            keys = ("jaxpr", "call_jaxpr", "fun_jaxpr")
            return self.run(open_jaxpr(next(params[k] for k in keys if k in params))[0], tags)
        if name == "scan":
            return self._scan(eqn, tags)
        if name == "while":
            return self._while(eqn, tags)
        if name == "cond":
            outs = [self.run(open_jaxpr(branch)[0], tags[1:]) for branch in params["branches"]]
            return [_either(found) for found in zip(*outs, strict=True)]
        return list(tags_after(eqn, tags, known))

    def _scan(self, eqn: Any, tags: list[Tag | None]) -> list[Tag | None]:
        body = open_jaxpr(eqn.params["jaxpr"])[0]
        scanned = [_added(*pair) for pair in zip(eqn.invars, body.invars, strict=True)]
        stacked = [_added(*pair) for pair in zip(eqn.outvars, body.outvars, strict=True)]
        carried = stacked.count(False)
        inner = [_shifted(t, -1) if s else t for t, s in zip(tags, scanned, strict=True)]
        outs = self._loop(body, inner, scanned.count(False) - carried, carried)
        return [_shifted(t, 1) if s else t for t, s in zip(outs, stacked, strict=True)]

    def _while(self, eqn: Any, tags: list[Tag | None]) -> list[Tag | None]:
        params = eqn.params
        first, constant = params["cond_nconsts"], params["body_nconsts"]
        body, cond = (open_jaxpr(params[name])[0] for name in ("body_jaxpr", "cond_jaxpr"))
        outs = self._loop(body, tags[first:], constant, len(tags) - first - constant)
        self.run(cond, [*tags[:first], *outs])
        return outs

    def _loop(self, body: Any, tags: list[Tag | None], first: int, count: int) -> list[Tag | None]:
        """The outputs of a loop's body that carries ``count`` values, its inputs from ``first``."""
        carry = slice(first, first + count)
        while True:
            outs = _Walk({}).run(body, tags)
            either = [_either(pair) for pair in zip(tags[carry], outs[:count], strict=True)]
            if either == tags[carry]:
                return self.run(body, tags)
            tags[carry] = either


def _fold(eqn: Any, known: dict[Any, Any]) -> None:
    """Note the value of an index that is arithmetic on numbers: older versions' ``x[:, -1]``."""
    values: list[Any] = [v.val if is_literal(v) else known.get(v) for v in eqn.invars]
    if any(value is None or np.ndim(value) for value in values):
        return
    name, (out, *_) = eqn.primitive.name, eqn.outvars
    if name == "lt":
        known[out] = values[0] < values[1]
    elif name == "add":
        known[out] = values[0] + values[1]
    elif name == "select_n":
        known[out] = values[1 + int(values[0])]


def _added(outer: Any, inner: Any) -> bool:
    return len(outer.aval.shape) == len(inner.aval.shape) + 1


def _shifted(tag: Tag | None, by: int) -> Tag | None:
    """A tag with one axis in front less, of which each step has one entry, or with one more."""
    if tag is None or not tag.axes:
        return tag
    axes = {axis: axis + by for axis in tag.axes if axis + by >= 0}
    return tag.without("scan", set(tag.axes) - set(axes)).moved("scan", axes)


def _either(tags: Iterable[Tag | None]) -> Tag | None:
    """The tag of a value that is one of several; those that no token reaches say nothing."""
    found = [tag for tag in tags if tag is not None]
    if any(tag != found[0] for tag in found):
        return Tag({}, lost="loop or branch")
    return found[0] if found else None
