"""Regular expressions from a file: which are run, and for how long."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Sequence

from jax_lora.errors import CheckpointError

_LITERAL = re.compile(r"\^?(?:[\w.-]|\\\.)*")
_MAX_LENGTH, _MAX_QUANTIFIERS = 2000, 5
#: What a file's expressions may take in all; those of a large model take milliseconds.
_MAX_SECONDS = 10.0
_BLOCK = 64


def is_literal(pattern: str) -> bool:
    """Whether an expression is a module's name, of which a large model has one for each module."""
    return _LITERAL.fullmatch(pattern) is not None


def pattern_problem(pattern: str) -> str:
    r"""Why a regular expression from a file is not run; empty if it is.

    Python's engine takes exponential time for a repeated group that has a repetition or a choice
    in it, so these are refused, as are long ones and those with many repetitions. With few it is
    polynomial in the length of a module's name, which `Expressions` bounds.

    Example:
        >>> pattern_problem(r".*layers\.(0|1)\..*_proj"), bool(pattern_problem(r"(a+)+b"))
        ('', True)
    """
    if is_literal(pattern):
        return ""
    limit = _MAX_LENGTH if re.search(r"[*+?{]", pattern) else 100 * _MAX_LENGTH
    if len(pattern) > limit:
        return f"a regular expression of more than {limit:,} characters"
    if re.search(r"\(\?[a-zA-Z]+\)", pattern):
        return "no regular expression that can be part of another, as it sets flags"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of what another Python would read otherwise
            re.compile(pattern)
    except (re.error, Warning, OverflowError, RecursionError) as error:
        return f"no regular expression ({error})"
    plain = re.sub(r"\\.", "x", pattern, flags=re.S)
    plain = re.sub(r"\[\^?\]?[^\]]*\]", "x", plain)
    repeated = re.findall(r"[*+]|\{", plain)
    if len(repeated) > _MAX_QUANTIFIERS:
        return f"a regular expression with more than {_MAX_QUANTIFIERS} repetitions"
    opened: list[bool] = []
    for k, letter in enumerate(plain):
        if letter == "(":
            opened.append(False)
        elif letter == ")" and opened:
            inside = opened.pop()
            if inside and plain[k + 1 : k + 2] in ("*", "+", "{"):
                return "a regular expression that repeats a repetition, which can take for ever"
            if opened:
                opened[-1] = opened[-1] or inside
        elif letter in "*+?{|" and opened and plain[k - 1 : k] != "(":
            opened[-1] = True
    return ""


class Expressions:
    """Runs the regular expressions of one file, until they took too long.

    A single match of a name of 70 letters takes up to 40 ms with five repetitions, so that a file
    could make a model of a thousand modules take minutes.
    """

    def __init__(self) -> None:
        self._compiled: dict[str, re.Pattern[str]] = {}
        self._seconds = 0.0

    def match(self, pattern: str, name: str, *, whole: bool = False) -> re.Match[str] | None:
        """The match at the start of a name, or of the whole name; None if there is none.

        Raises:
            CheckpointError: All matches together took too long.
        """
        self._check()
        start = time.perf_counter()
        compiled = self._of(pattern)
        found = compiled.fullmatch(name) if whole else compiled.match(name)
        self._seconds += time.perf_counter() - start
        return found

    def first(self, patterns: Sequence[str], name: str) -> int | None:
        """The place of the first that matches the start of a name; None if there is none.

        Raises:
            CheckpointError: All matches together took too long.
        """
        for begin in range(0, len(patterns), _BLOCK):
            self._check()
            start = time.perf_counter()
            block = patterns[begin : begin + _BLOCK]
            found = next((k for k, x in enumerate(block) if self._of(x).match(name)), None)
            self._seconds += time.perf_counter() - start
            if found is not None:
                return begin + found
        return None

    def _of(self, pattern: str) -> re.Pattern[str]:
        # Python keeps a few hundred itself, and a model may have more.
        compiled = self._compiled.get(pattern)
        if compiled is None:
            compiled = self._compiled[pattern] = re.compile(pattern)
        return compiled

    def _check(self) -> None:
        if self._seconds > _MAX_SECONDS:
            raise CheckpointError(
                f"the regular expressions of the configuration took more than {_MAX_SECONDS:.0f} "
                "seconds; expected such as name modules, found such as make Python search for "
                "ever: write the modules' names instead"
            )
