"""scikit-learn's handwritten digits: small, real, and always there: the package ships them."""

import numpy as np

from jax_lora.data.dataset import Dataset, Split, import_optional

_TEST_SIZE = 360
_SEED = 0


def load_digits() -> Dataset:
    """Loads the 1,797 digits of 8x8 pixels, split 1,437 to 360 with the same class shares in both.

    The split is drawn with a fixed seed: every call, on every machine, gives the same arrays.

    Returns:
        The data set; pixels are 0..16.

    Raises:
        DatasetError: If scikit-learn is not installed.
    """
    install = "pip install scikit-learn"
    datasets = import_optional("sklearn.datasets", purpose="digits", install=install)
    selection = import_optional("sklearn.model_selection", purpose="digits", install=install)
    raw = datasets.load_digits()
    images = np.asarray(raw.images, np.uint8)[..., np.newaxis]
    labels = np.asarray(raw.target, np.int32)
    train, test = selection.train_test_split(
        np.arange(len(labels)), test_size=_TEST_SIZE, stratify=labels, random_state=_SEED
    )
    return Dataset(
        name="digits",
        train=Split(images[train], labels[train]),
        test=Split(images[test], labels[test]),
        label_names=tuple(str(name) for name in raw.target_names),
        max_value=16,
        source="scikit-learn's load_digits (8x8 grey digits, stratified split with a fixed seed)",
    )
