"""What a data set is: two splits of uint8 images with labels, and where they came from."""

import dataclasses
import importlib
from typing import Any

import numpy as np


class DatasetError(Exception):
    """A data set cannot be loaded; the message says what was expected, found, and what to do."""


class DatasetUnavailableError(DatasetError):
    """Nothing the caller named is wrong, but the data is not to be had: another set may do."""


@dataclasses.dataclass(frozen=True)
class Split:
    """One split, held in memory.

    Attributes:
        images: uint8 [n, height, width, channels], C-contiguous, unscaled.
        labels: int32 [n].
    """

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        """Checks the types, which everything downstream relies on."""
        images, labels = self.images, self.labels
        if images.ndim != 4 or images.dtype != np.uint8 or not images.flags.c_contiguous:
            raise DatasetError(
                "expected images as C-contiguous uint8 [n, h, w, c], got "
                f"{images.dtype} {list(images.shape)}; convert with np.ascontiguousarray"
            )
        if labels.shape != images.shape[:1] or labels.dtype != np.int32:
            raise DatasetError(
                f"expected labels as int32 [{len(images)}], one per image, "
                f"got {labels.dtype} {list(labels.shape)}"
            )

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A classification data set.

    Attributes:
        name: "cifar10" or "digits".
        train: The training split.
        test: The test split.
        label_names: The name of each class, in the order of the label numbers.
        max_value: The largest value a pixel can take; `x / (max_value / 2) - 1` maps pixels to
            [-1, 1].
        source: One sentence saying where the data came from.
    """

    name: str
    train: Split
    test: Split
    label_names: tuple[str, ...]
    max_value: int
    source: str

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.label_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of one image."""
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels


def import_optional(module: str, *, purpose: str, install: str) -> Any:
    """Imports a package that `import jax_lora.data` does not need.

    Args:
        module: The dotted name to import.
        purpose: What needs it, as the subject of the error's sentence.
        install: The command that installs it.

    Returns:
        The module.

    Raises:
        DatasetUnavailableError: If it, or something it needs, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = error.name or module
        raise DatasetUnavailableError(
            f"{purpose} needs the package {missing!r}, which cannot be imported ({error}); "
            f"install it with: {install}"
        ) from error


def import_for_cifar10(module: str) -> Any:
    """Imports a package of the `cifar10` extra; see `import_optional`."""
    return import_optional(module, purpose="CIFAR-10", install="pip install 'jax_lora[cifar10]'")
