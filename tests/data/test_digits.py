"""The digits: what they are, and that they are always the same."""

from typing import Any

import numpy as np
import pytest

from jax_lora.data import DatasetError, load

pytest.importorskip("sklearn")


def test_shapes_and_range() -> None:
    data = load("digits")
    assert data.train.images.shape == (1437, 8, 8, 1)
    assert data.test.images.shape == (360, 8, 8, 1)
    assert (data.train.images.dtype, data.train.labels.dtype) == (np.uint8, np.int32)
    assert (data.train.images.min(), data.train.images.max(), data.max_value) == (0, 16, 16)
    assert (data.num_classes, data.image_shape) == (10, (8, 8, 1))
    assert data.label_names == tuple("0123456789")


def test_both_splits_have_the_class_shares_of_the_whole() -> None:
    data = load("digits")
    counts = [np.bincount(split.labels, minlength=10) for split in (data.train, data.test)]
    share = sum(counts) * 360 / 1797
    assert np.abs(counts[1] - share).max() < 1
    # An ordered split, say the last 360, would not pass.
    labels = np.concatenate([data.train.labels, data.test.labels])
    assert np.abs(np.bincount(np.sort(labels)[-360:], minlength=10) - share).max() > 1


def test_the_splits_are_the_whole_without_overlap() -> None:
    from sklearn.datasets import load_digits

    data = load("digits")
    got = np.concatenate([data.train.images, data.test.images]).reshape(-1, 64)
    whole = load_digits().data
    np.testing.assert_array_equal(
        got[np.lexsort(got.T)], whole[np.lexsort(whole.T)].astype(np.uint8)
    )


def test_every_load_is_the_same() -> None:
    first, second = load("digits"), load("digits")
    np.testing.assert_array_equal(first.train.images, second.train.images)
    np.testing.assert_array_equal(first.test.labels, second.test.labels)


def test_images_carry_their_own_labels() -> None:
    # The nearest class mean finds about 90 % of digits; with shuffled labels it finds 10 %.
    data = load("digits")
    train = data.train.images.reshape(-1, 64).astype(float)
    test = data.test.images.reshape(-1, 64).astype(float)
    means = np.stack([train[data.train.labels == k].mean(0) for k in range(10)])
    found = ((test[:, None] - means) ** 2).sum(-1).argmin(1)
    assert (found == data.test.labels).mean() > 0.8


def test_without_scikit_learn_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    def missing(name: str, *_: Any) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(DatasetError, match="pip install scikit-learn"):
        load("digits")
