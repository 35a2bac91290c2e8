"""The article's PyTorch program, on its own: sizes, initialisation, freezing, data, a tiny run."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("PIL")

ROOT = Path(__file__).parents[2]
PROGRAM = "benchmarks.peers.article_pytorch"


@pytest.fixture(scope="module")
def article() -> ModuleType:
    """The program as a module, imported only where PyTorch is."""
    return importlib.import_module(PROGRAM)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def random_arrays(n_train: int = 64, n_test: int = 40) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "train_images": rng.integers(0, 256, (n_train, 32, 32, 3), np.uint8),
        "train_labels": rng.integers(0, 10, n_train, np.int32),
        "test_images": rng.integers(0, 256, (n_test, 32, 32, 3), np.uint8),
        "test_labels": rng.integers(0, 10, n_test, np.int32),
    }


def random_batches(n: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.rand(32, 3, 32, 32) * 2 - 1, torch.randint(0, 10, (32,))) for _ in range(n)]


def count(parameters) -> int:
    return sum(p.numel() for p in parameters)


def test_parameter_counts(article):
    base = article.build_base_model()
    lora = article.build_lora_model(base.state_dict())
    assert count(base.parameters()) == 411_146
    assert count(p for p in lora.parameters() if p.requires_grad) == 115_008
    assert count(lora.parameters()) == 526_154
    trained = {name for name, p in lora.named_parameters() if p.requires_grad}
    assert trained == {f"l{i}_lora.{m}" for i in (1, 2, 3) for m in "AB"}


def test_a_is_uniform_by_the_rank_and_b_is_zero(article):
    lora = article.build_lora_model(article.build_base_model().state_dict())
    bound = 1 / math.sqrt(32)
    for i, fan_in in ((1, 3072), (2, 128), (3, 128)):
        adapter = getattr(lora, f"l{i}_lora")
        a = adapter.A.detach().double()
        assert a.shape == (fan_in, 32)
        assert a.abs().max() <= bound * (1 + 1e-6)
        # Of n uniform draws the farthest lies about 1/n short of the bound.
        assert a.abs().max() >= bound * (1 - 20 / a.numel())
        # A uniform variable's standard deviation; the sample's own error is 0.447/sqrt(n) of it.
        assert a.std().item() == pytest.approx(
            bound / math.sqrt(3), rel=5 * 0.447 / math.sqrt(a.numel())
        )
        assert adapter.B.count_nonzero() == 0


@pytest.mark.parametrize("factored", [False, True])
def test_lora_model_is_the_base_at_init_and_not_after_b_moves(article, factored):
    base = article.build_base_model()
    lora = article.build_lora_model(base.state_dict(), factored=factored)
    x = random_batches(1)[0][0]
    with torch.no_grad():
        assert torch.equal(lora(x), base(x))
        lora.l3_lora.B.add_(1.0)
        assert not torch.allclose(lora(x), base(x))


def test_factored_is_the_same_function_and_alpha_scales_it(article):
    base = article.build_base_model().double()
    plain = article.build_lora_model(base.state_dict()).double()
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if name.endswith(".B"):
                p.uniform_(-0.1, 0.1)
    factored = article.build_lora_model(base.state_dict(), factored=True).double()
    factored.load_state_dict(plain.state_dict())
    x = random_batches(1)[0][0].double()
    torch.testing.assert_close(factored(x), plain(x), rtol=1e-12, atol=1e-12)

    # Against the merged weights, with a scale of alpha and not alpha / rank.
    for alpha in (1, 3):
        plain.alpha = alpha
        merged = article.CifarModel().double()
        with torch.no_grad():
            for name in ("l1", "l2", "l3"):
                adapter = getattr(plain, f"{name}_lora")
                weight = getattr(base, name).weight + alpha * (adapter.A @ adapter.B).T
                getattr(merged, name).weight.copy_(weight)
                getattr(merged, name).bias.copy_(getattr(base, name).bias)
        torch.testing.assert_close(plain(x), merged(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fused", [False, True])
def test_two_batches_train_the_base(article, fused):
    model = article.build_base_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = article.train_steps(model, article.build_optimizer(model, fused), random_batches())
    # Near log(10), as an untrained classifier's over ten classes is.
    assert losses == pytest.approx([math.log(10)] * 2, abs=0.3)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("fused", [False, True])
def test_lora_steps_leave_the_base_alone(article, fused):
    base = article.build_base_model()
    lora = article.build_lora_model(base.state_dict())
    before = {name: p.detach().clone() for name, p in lora.named_parameters()}
    losses = article.train_steps(lora, article.build_optimizer(lora, fused), random_batches(3))
    assert np.isfinite(losses).all()
    for name, p in lora.named_parameters():
        # A moves too, from the second step on, once B is no longer zero.
        assert torch.equal(p, before[name]) != ("lora" in name), name


def test_sgd_with_momentum_against_the_formula(article):
    model = article.build_base_model()
    optimizer = article.build_optimizer(model)
    weight = model.l3.weight
    velocity, expected = torch.zeros_like(weight), weight.detach().clone()
    for batch in random_batches(3):
        article.train_steps(model, optimizer, [batch])
        velocity = 0.9 * velocity + weight.grad
        expected = expected - 0.001 * velocity
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-6, atol=1e-8)


def test_dataset_item_is_scaled_and_channel_first(article):
    arrays = random_arrays()
    dataset = article.CifarDataset(arrays["train_images"], arrays["train_labels"])
    assert len(dataset) == 64
    for i in (0, 63):
        x, label = dataset[i]
        expected = arrays["train_images"][i].transpose(2, 0, 1).astype(np.float64) / 127.5 - 1
        assert x.dtype == torch.float32
        assert tuple(x.shape) == (3, 32, 32)
        # Two float32 roundings of values up to 1, doubled by the division by 0.5.
        np.testing.assert_allclose(x.numpy(), expected, rtol=0, atol=2.5e-7)
        assert label == arrays["train_labels"][i]


def test_in_memory_data_are_the_dataset_s(article):
    arrays = article.Arrays(**random_arrays())
    run = article.InMemoryRun(arrays)
    dataset = article.CifarDataset(arrays.train_images, arrays.train_labels)
    items = torch.stack([dataset[i][0].flatten() for i in range(len(dataset))])
    torch.testing.assert_close(run.train_images, items, rtol=0, atol=2.5e-7)
    assert run.train_labels.tolist() == dataset.targets


def test_in_memory_epoch_visits_every_image_once(article):
    arrays = article.Arrays(**random_arrays(n_train=70))
    run = article.InMemoryRun(arrays)
    batches = list(run.batches())
    assert [len(labels) for _, labels in batches] == [32, 32, 6]
    seen = torch.cat([images for images, _ in batches])
    assert not torch.equal(seen, run.train_images)
    # Rows are random, so their first entries and sums tell them apart.
    assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, run.train_images.tolist()))


def test_losses_are_printed_and_kept_per_500_steps(article, capsys):
    phase = article.Phase()
    losses = [1.0] * 500 + [2.0] * 500 + [9.0] * 63
    phase.record(losses, 0.5)
    assert phase.loss == [1.0, 2.0]
    assert phase.epoch_loss == [pytest.approx(sum(losses) / 1063)]
    assert phase.accuracy == [0.5]
    assert "[1,  1000] loss: 2.000" in capsys.readouterr().out


def test_accuracy_of_both_variants_is_the_fraction_that_is_right(article, monkeypatch):
    # Worker processes are left to the test in a subprocess: this process may have threads.
    monkeypatch.setattr(article, "WORKERS", 0)
    arrays = article.Arrays(**random_arrays())
    model = article.build_base_model()
    with torch.no_grad():
        model.l3.weight.zero_()
        model.l3.bias.copy_(torch.arange(10) == 3)
    expected = (arrays.test_labels == 3).mean()
    assert 0 < expected < 1
    for run in (article.ArticleRun(arrays), article.InMemoryRun(arrays)):
        assert run.accuracy(model) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("variant", ["article", "in_memory"])
@pytest.mark.parametrize("form", ["npz", "folder"])
def test_program_end_to_end(tmp_path, variant, form):
    data = tmp_path / ("data.npz" if form == "npz" else "data")
    if form == "npz":
        np.savez(data, **random_arrays())
    else:
        data.mkdir()
        for name, array in random_arrays().items():
            np.save(data / f"{name}.npy", array)
    out = tmp_path / "new" / "results.json"
    options = ["--data", data, "--out", out, "--epochs", "2", "--seed", "3", "--variant", variant]
    command = [sys.executable, "-m", PROGRAM, *map(str, options)]
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    results = json.loads(out.read_text())
    for phase in ("base", "lora"):
        assert len(results[phase]["accuracy"]) == len(results[phase]["epoch_loss"]) == 2
        assert all(0 <= a <= 1 for a in results[phase]["accuracy"])
        assert results[phase]["loss"] == []  # two steps an epoch, never 500
        assert results[phase]["seconds"] > 0
    phases = results["base"]["seconds"] + results["lora"]["seconds"]
    assert phases <= results["seconds_total"] <= results["seconds_process"]
    assert results["torch"] == torch.__version__
    assert results["variant"] == variant
    assert results["threads"] >= 1


def test_bad_arrays_are_all_named(article, tmp_path):
    arrays = random_arrays()
    arrays["train_images"] = arrays["train_images"].astype(np.float32)
    arrays["test_labels"] = arrays["test_labels"][:-1]
    del arrays["train_labels"]
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match="train_labels: expected an array") as error:
        article.load_arrays(tmp_path / "bad.npz")
    assert "train_images: expected uint8 [n, 32, 32, 3], got float32" in str(error.value)
    assert "test_labels: expected int [40], got int32 [39]" in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"expected an \.npz file"):
        article.load_arrays(tmp_path / "nowhere")
