"""`load`: from a name to a data set, and what happens when CIFAR-10 cannot be had."""

import difflib
import sys
import textwrap
from pathlib import Path

from jax_lora.data.cifar10 import load_cifar10
from jax_lora.data.dataset import Dataset, DatasetError, DatasetUnavailableError
from jax_lora.data.digits import load_digits

NAMES = ("auto", "cifar10", "digits")


def load(
    name: str,
    *,
    data_dir: str | Path | None = None,
    archive: str | Path | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> Dataset:
    """Loads a data set into memory.

    Args:
        name: One of `NAMES`. "auto" is CIFAR-10 where it is prepared or can be prepared, otherwise
            digits, after a notice on stderr. It never hides a mistake: an archive with the wrong
            checksum, or a damaged copy of CIFAR-10, is an error under "auto" too.
        data_dir: The tensorflow-datasets folder that holds CIFAR-10 or is to receive it; by default
            `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`. Not used by digits.
        archive: A copy of the official `cifar-10-binary.tar.gz` to prepare from instead of
            downloading it. Not used by digits.
        cache_dir: Where decoded images are kept between runs; by default the user's cache folder.
        progress: Whether to show progress bars on stderr.

    Returns:
        The data set.

    Raises:
        DatasetError: If the name is unknown, or the data cannot be had or is damaged.

    Example:
        >>> data = load("digits")
        >>> data.train.images.shape, data.test.images.shape, data.max_value
        ((1437, 8, 8, 1), (360, 8, 8, 1), 16)
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name.lower().replace("-", ""), NAMES, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DatasetError(f"expected a data set among {', '.join(NAMES)}, got {name!r}{hint}")
    if name == "digits":
        return load_digits()
    try:
        return load_cifar10(
            data_dir=data_dir, archive=archive, cache_dir=cache_dir, progress=progress
        )
    except DatasetUnavailableError as error:
        if name == "cifar10":
            raise
        # Loaded first, so that the notice does not announce digits that are not there either.
        digits = load_digits()
        print(_fallback_notice(str(error)), file=sys.stderr, flush=True)
        return digits


def _fallback_notice(reason: str) -> str:
    """The notice shown when "auto" goes on without CIFAR-10."""
    rule = "=" * 88
    wrapped = textwrap.fill(
        reason, 84, initial_indent="    ", subsequent_indent="    ", break_long_words=False
    )
    return "\n".join(
        (
            rule,
            "NOTE: CIFAR-10 is not available, so scikit-learn's small DIGITS are used instead.",
            "The comparison with the article, which is about CIFAR-10, is left out.",
            "Why:",
            wrapped,
            rule,
        )
    )
