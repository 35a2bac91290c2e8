"""What a rule matches and what it does, as frozen data."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import jax.numpy as jnp

from jax_lora.errors import ConfigError, TargetError, near_misses
from jax_lora.tables import spans

Scaling = Literal["standard", "rslora", "alpha"]
Init = Literal["kaiming", "gaussian", "article", "orthogonal", "pissa", "olora"]
#: What a parameter can become, apart from rows of it that are trained; see `jax_lora.variants`.
Variant = Literal["lora", "lora-fa", "dora", "vera", "loha", "lokr", "full"]
#: What a product with an adapted weight does; see `jax_lora.apply`.
Mode = Literal["factored", "materialize", "auto"]
#: Of a parameter's path, its shape, and the function's uses of it.
Predicate = Callable[[str, tuple[int, ...], tuple[Any, ...]], bool]

_CHOICES = (("scaling", Scaling), ("init", Init), ("variant", Variant), ("mode", Mode))
_LARGEST_ALPHA = 3e38
#: The preset that selects every weight of a linear layer.
ALL_LINEAR = "all-linear"
#: The presets, and how the function uses the weights that each selects.
PRESETS = {
    ALL_LINEAR: "linear",
    "all-convolution": "convolution",
    "all-embedding": "embedding",
    "all": "",
}
#: What marks a pattern as a regular expression.
REGEX = "re:"


@dataclasses.dataclass(frozen=True)
class StoredPredicate:
    """The name of a predicate, which is all that JSON keeps of it; calling it is an error.

    Attributes:
        name: Module and qualified name of the function.
    """

    name: str

    def __call__(self, path: str, shape: tuple[int, ...], uses: tuple[Any, ...]) -> bool:
        """Refuses to choose.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            f"expected a function for the predicate {self.name!r}, got its name alone, which is "
            "what JSON keeps of it; put Rule(match=<the function>, ...) in its place"
        )


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which parameters are adapted, and how, where that differs from the configuration.

    A rule stands in ``LoraConfig.targets``, alone or among globs; the first rule that matches a
    parameter decides about it. What a rule leaves None is the configuration's, alpha too: a rule
    with twice the rank has half of the ``"standard"`` scale unless it also has twice the alpha.

    Attributes:
        match: One of

            - a glob over parameter paths such as ``"**/attn/*/kernel"``: ``*`` stays within one
              path component, ``**`` crosses components, ``{layer}`` is the number of a layer;
            - a regular expression after ``re:``, matched against the whole path, such as
              ``"re:.*/(q|v)/kernel"``; a group named ``layer`` is the number of a layer;
            - a preset: ``"all-linear"``, every weight that the function uses in matrix products and
              not otherwise as a matrix; ``"all-convolution"``; ``"all-embedding"``, whose rows are
              looked up, also if it is the head as well; or ``"all"`` of them;
            - a function ``(path, shape, uses) -> bool``, asked about the parameters that can be
              adapted. ``uses`` is what `discover` finds. JSON keeps its name alone.
        layers: The layers to which the rule is restricted, such as ``range(6)``. A parameter's
            layer is what ``{layer}`` stands for; without one, the number at the end of the first
            path component that ends in one (3 in ``layers_3/mlp/Dense_0/kernel`` and
            ``h/3/mlp/kernel``). A parameter without such a number is in no layer.
        rank: The rank r of the update.
        alpha: The strength of the update.
        scaling: What multiplies ``a b``, as in `LoraConfig`.
        init: How the factors start, as in `LoraConfig`.
        dtype: The dtype of what is trained.
        variant: What kind of update it is, as in `LoraConfig`. With ``"full"`` a glob or a regular
            expression may name any parameter: a bias, a norm, a head.
        dropout: The probability of dropout of the update's input, as in `LoraConfig`.
        mode: What a product with the adapted weight does, as in `LoraConfig`.
        rows: The rows that are trained, whole, and nothing else of the parameter, such as those of
            new tokens in an embedding.

    Raises:
        ConfigError: Names every value that cannot mean anything.

    Example:
        >>> import jax.numpy as jnp, jax_lora as jl
        >>> block = {"attn": jnp.zeros((8, 8)), "mlp": jnp.zeros((8, 8))}
        >>> params = {"h": [block] * 4, "head": jnp.zeros((8, 3))}
        >>> def model(params, x):
        ...     for block in params["h"]:
        ...         x = x @ block["attn"] @ block["mlp"]
        ...     return x @ params["head"]
        >>> config = jl.LoraConfig(rank=2, alpha=2, exclude="head", targets=(
        ...     jl.Rule("**/attn", rank=4, alpha=8),
        ...     jl.Rule("all-linear", layers=range(2, 4), init="gaussian"),
        ... ))
        >>> plan = jl.plan(model, params, jnp.ones((1, 8)), config=config)
        >>> print(plan)  # doctest: +ELLIPSIS, +NORMALIZE_WHITESPACE
        LoRA plan: float32, b zero
        adapted           shape   rank  scale  a         rule                     ...
        h/{0..3}/attn x4  [8, 8]  4     2      kaiming   **/attn                  ...
        h/{2,3}/mlp x2    [8, 8]  2     1      gaussian  all-linear, layers 2, 3  ...
        trained 320 beside 536 frozen parameters (59.7%), 1,304 bytes
        forward 536 multiply-adds + 320 (59.7%)
        <BLANKLINE>
        not adapted     because
        h/{0,1}/mlp x2  outside the layers of the targets that match it
        head            excluded by head
    """

    match: str | Predicate
    layers: tuple[int, ...] | range | None = None
    rank: int | None = None
    alpha: float | None = None
    scaling: Scaling | None = None
    init: Init | None = None
    dtype: str | None = None
    variant: Variant | None = None
    dropout: float | None = None
    mode: Mode | None = None
    rows: tuple[int, ...] | range | None = None

    def __post_init__(self) -> None:
        problems = []
        if isinstance(self.match, str):
            problems += pattern_problems(self.match)
        elif not callable(self.match):
            problems.append(
                "expected match to be a glob, 're:' and a regular expression, a preset, or a "
                f"function (path, shape, uses) -> bool; got match={self.match!r}"
            )
        if self.layers is not None:
            known = isinstance(self.layers, (range, tuple, list)) and len(self.layers) > 0
            if not known or any(type(k) is not int or k < 0 for k in self.layers):
                problems.append(
                    "expected layers to be numbers from 0 such as range(6) or (0, 5), got "
                    f"layers={self.layers!r}"
                )
            else:
                object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))
        if self.rows is not None:
            known = isinstance(self.rows, (range, tuple, list)) and len(self.rows) > 0
            if not known or any(type(k) is not int or k < 0 for k in self.rows):
                problems.append(
                    "expected rows to be numbers from 0 such as range(6) or (0, 5), got "
                    f"rows={self.rows!r}"
                )
            else:
                object.__setattr__(self, "rows", tuple(sorted(set(self.rows))))
            if self.variant is not None:
                problems.append(
                    f"expected rows or a variant, got both: rows={self.rows!r} are trained whole, "
                    f"variant={self.variant!r} is about the parameter"
                )
        for name, value in plain_values(self.overrides).items():
            object.__setattr__(self, name, value)
        problems += value_problems(self.overrides)
        if problems:
            raise ConfigError(f"Rule(match={self.match!r}): " + "\n  ".join(problems))

    @property
    def name(self) -> str:
        """The rule in a table and in an error."""
        name = self.match if isinstance(self.match, str) else f"predicate {_name(self.match)}"
        return name if self.layers is None else f"{name}, layers {spans(self.layers)}"

    @property
    def by_path(self) -> bool:
        """Whether it is a glob or a regular expression, and so names the parameters it means."""
        return isinstance(self.match, str) and self.match not in PRESETS

    @property
    def overrides(self) -> dict[str, Any]:
        """The values that it sets."""
        values = {name: getattr(self, name) for name in SETTINGS}
        return {name: value for name, value in values.items() if value is not None}

    def layer(self, path: str) -> int | None:
        """The layer of a parameter, or None.

        Example:
            >>> Rule("**").layer("params/h/3/mlp/Dense_0/kernel"), Rule("**").layer("head/kernel")
            (3, None)
            >>> Rule("**/layers_{layer}/**").layer("encoder1/layers_3/kernel")
            3
        """
        if isinstance(self.match, str) and "layer" in _pattern(self.match).groupindex:
            found = _pattern(self.match).fullmatch(path)
            number = found["layer"] if found else None
        else:
            ends = (re.search("[0-9]+$", component) for component in path.split("/"))
            number = next((end[0] for end in ends if end), None)
        return int(number) if number and re.fullmatch("[0-9]+", number) else None

    def to_json(self) -> dict[str, Any]:
        """The rule as JSON-able data, without the fields that are None.

        A predicate is kept as its name, so that an adapter can be saved whatever chose its
        parameters; it comes back as a `StoredPredicate`.
        """
        match: Any = self.match
        if not isinstance(match, str):
            match = {"predicate": _name(match, qualified=True)}
        lists = {name: getattr(self, name) for name in ("layers", "rows")}
        kept = {name: list(value) for name, value in lists.items() if value is not None}
        return {"match": match, **kept, **self.overrides}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Rule:
        """The rule that `to_json` wrote.

        Raises:
            ConfigError: An unknown field or an impossible value.
        """
        check_fields(cls, data)
        match = data.get("match")
        if isinstance(match, Mapping) and set(match) == {"predicate"}:
            match = StoredPredicate(str(match["predicate"]))
        return cls(**{**data, "match": match})


#: What a configuration sets for all targets and a rule for its own.
SETTINGS = ("rank", "alpha", "scaling", "init", "dtype", "variant", "dropout", "mode")


def plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers and dtypes of numpy and JAX as Python's; what is neither stays as it is."""

    def plain(name: str, value: Any) -> Any:
        if isinstance(value, (bool, str)) or value is None:
            return value
        if name == "rank" and isinstance(value, numbers.Integral):
            return int(value)
        if name in ("alpha", "dropout") and isinstance(value, numbers.Real):
            try:
                return float(value)
            except OverflowError:
                return value
        if name == "dtype":
            try:
                return jnp.dtype(value).name
            except TypeError:
                return value
        return value

    return {name: plain(name, value) for name, value in values.items()}


def value_problems(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with values of `SETTINGS`; empty if nothing is."""
    problems = []
    if "rank" in values:
        rank = values["rank"]
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            problems.append(f"expected a rank of at least 1, an integer; got rank={rank!r}")
    if "alpha" in values:
        alpha = values["alpha"]
        number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
        if not number or not abs(alpha) <= _LARGEST_ALPHA:
            problems.append(
                f"expected alpha to be a finite number that float32 can hold, got alpha={alpha!r}"
            )
    for name, kind in _CHOICES:
        choices = get_args(kind)
        if name in values and values[name] not in choices:
            problems.append(
                f"expected {name} to be one of {', '.join(choices)}; got {values[name]!r} "
                f"({near_misses(str(values[name]), choices)})"
            )
    if "dropout" in values:
        rate = values["dropout"]
        number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
        if not number or not 0 <= rate < 1:
            problems.append(f"expected dropout to be a probability in [0, 1), got dropout={rate!r}")
    if "dtype" in values and values["dtype"] not in (
        "float64",
        "float32",
        "bfloat16",
        "float16",
    ):
        problems.append(f"expected a floating-point dtype such as float32, got {values['dtype']!r}")
    return problems


def check_fields(cls: type, data: Mapping[str, Any]) -> None:
    """Check that JSON data has no fields but those of a dataclass.

    Raises:
        ConfigError: Names the others.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"expected a JSON object with named fields, got {data!r}")
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = [name for name in data if name not in known]
    if unknown:
        raise ConfigError(
            f"expected the fields {', '.join(sorted(known))}; got also {', '.join(unknown)}"
        )


def pattern_problems(pattern: str) -> list[str]:
    """What is wrong with a glob or a regular expression; empty if nothing is."""
    if pattern in ("", REGEX):
        return [f"expected a pattern over parameter paths, got {pattern!r}"]
    try:
        _pattern(pattern)
    except re.error as error:
        reason = "'{layer}' stands in it twice" if not pattern.startswith(REGEX) else str(error)
        return [f"expected a pattern over parameter paths, got {pattern!r}: {reason}"]
    return []


@functools.cache
def _pattern(pattern: str) -> re.Pattern[str]:
    """A pattern over paths as a regular expression, to be matched against the whole path.

    In a glob ``**`` matches any number of whole components, also none; ``*`` and ``?`` stay within
    one; ``{layer}`` matches a number.
    """
    if pattern.startswith(REGEX):
        return re.compile(pattern.removeprefix(REGEX))
    pieces = {"**/": "(?:.*/)?", "/**": "(?:/.*)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces["{layer}"] = "(?P<layer>[0-9]+)"
    parts = re.split(r"(^\*\*/|/\*\*$|\*\*/|\*\*|\*|\?|\{layer\})", pattern)
    return re.compile("".join(pieces.get(part, re.escape(part)) for part in parts))


def path_matches(pattern: str, path: str) -> bool:
    """Whether a glob, or a regular expression after ``re:``, matches a whole path.

    Example:
        >>> path_matches("**/kernel", "params/l1/kernel"), path_matches("*/kernel", "a/b/kernel")
        (True, False)
        >>> path_matches("re:.*/l[12]/kernel", "params/l1/kernel")
        True
    """
    return _pattern(pattern).fullmatch(path) is not None


def matching_paths(globs: str | Iterable[str], paths: Iterable[str]) -> set[str]:
    """The paths that at least one pattern matches.

    Raises:
        TargetError: Names every pattern that matches nothing, with the nearest paths.
        ConfigError: What is no pattern.

    Example:
        >>> sorted(matching_paths(("l1/*", "**/bias"), ["l1/kernel", "l2/kernel", "l2/bias"]))
        ['l1/kernel', 'l2/bias']
    """
    if not isinstance(globs, Iterable):
        raise ConfigError(f"expected globs over parameter paths, got {globs!r}")
    globs = (globs,) if isinstance(globs, str) else tuple(globs)
    if odd := [glob for glob in globs if not isinstance(glob, str)]:
        raise ConfigError(f"expected globs over parameter paths, got {odd[0]!r} among them")
    if bad := [problem for glob in globs for problem in pattern_problems(glob)]:
        raise ConfigError("; ".join(bad))
    paths = list(paths)
    found = {glob: {path for path in paths if path_matches(glob, path)} for glob in globs}
    problems = [f"{glob!r} ({meant(glob, paths)})" for glob in globs if not found[glob]]
    if problems:
        raise TargetError(
            "expected every glob to match at least one path; correct or leave out what matches "
            "nothing:\n  " + "\n  ".join(problems)
        )
    return set().union(*found.values())


def meant(pattern: str, paths: Iterable[str], names: Iterable[str] = ()) -> str:
    """What a pattern that matches no path was for, as the tail of an error message.

    The arrays of a Flax NNX state, for one, are a level below the names that its modules give.

    Args:
        pattern: The pattern.
        paths: The paths that there are.
        names: What else could have been meant.

    Example:
        >>> meant("**/kernel", ["l1/kernel/value", "l2/kernel/value"])
        "parameters are below; write '**/kernel/value'"
        >>> meant("l1", ["l1/kernel", "l1/bias"])
        "parameters are below; write 'l1/**'"
        >>> meant("**/kernal", ["l1/kernel"])
        "nearest: 'l1/kernel'"
    """
    paths = list(paths)
    anything = f"{pattern}/.*" if pattern.startswith(REGEX) else f"{pattern}/**"
    below = [path for path in paths if path_matches(anything, path)]
    if not below:
        return near_misses(pattern, (*paths, *names))
    last = f"{pattern}/{below[0].rpartition('/')[2]}"
    same = all(path_matches(last, path) for path in below)
    return f"parameters are below; write {(last if same else anything)!r}"


def _name(predicate: Any, qualified: bool = False) -> str:
    """The name of a function, or of the class of another callable."""
    if isinstance(predicate, StoredPredicate):
        return predicate.name
    named = predicate if hasattr(predicate, "__qualname__") else type(predicate)
    return f"{named.__module__}.{named.__qualname__}" if qualified else named.__name__
