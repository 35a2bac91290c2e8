"""The article's values agree with each other."""

from jax_lora import report
from jax_lora.experiments.article_values import ARTICLE


def test_shape() -> None:
    for phase in report.PHASES:
        assert len(ARTICLE[phase]["accuracy"]) == 5
        assert len(ARTICLE[phase]["loss"]) == 5 * (1563 // 500)


def test_counts_follow_from_the_model() -> None:
    sizes = [(3072, 128), (128, 128), (128, 10)]
    base = sum(n_in * n_out + n_out for n_in, n_out in sizes)
    adapter = sum(32 * (n_in + n_out) for n_in, n_out in sizes)
    assert ARTICLE["base"]["params"] == base
    assert ARTICLE["lora"]["trainable_params"] == adapter
    assert ARTICLE["lora"]["total_params"] == base + adapter
    for phase, number in (("base", base), ("lora", base + adapter)):
        summary = ARTICLE[phase]["summary"]
        assert summary["params size (MB)"] == round(4 * number / 1e6, 2)
        assert summary["total mult-adds (M)"] == round(32 * base / 1e6, 2)
