"""Every trial of a sweep is the run of it alone, whatever runs beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_lora as jl
from jax_lora.sweep import Halving, Results, Settings, Trial, grid
from jax_lora.sweep.group import Run, grouped

Close = Callable[..., None]
EPOCHS = 3
SETTINGS = Settings(epochs=EPOCHS, batch_size=8, metric="margin", evaluation_batch=10)

#: Trials that differ in everything that one program can hold.
MIXED = (
    Trial(seed=0, rank=1, alpha=2.0, learning_rate=0.1, weight_decay=0.0, init="kaiming"),
    Trial(seed=1, rank=3, alpha=2.0, learning_rate=0.1, weight_decay=0.0, init="kaiming"),
    Trial(seed=0, rank=3, alpha=0.5, learning_rate=0.2, weight_decay=0.1, init="gaussian"),
    Trial(seed=2, rank=1, alpha=1.0, learning_rate=0.05, weight_decay=0.01, init="article"),
    Trial(seed=3, rank=1, alpha=-1.0, learning_rate=0.0, weight_decay=0.0, init="orthogonal"),
)


@pytest.fixture(autouse=True)
def _standard_promotion() -> Any:
    with jax.numpy_dtype_promotion("standard"):  # optax.adam mixes dtypes
        yield


@pytest.fixture(scope="module")
def mixed(problem: Any) -> dict[str, Results]:
    """The trials on the same batches and each on its own."""
    return {
        order: jl.sweep.run(
            MIXED,
            **problem.arguments,
            settings=dataclasses.replace(SETTINGS, order=order),
            order_key=jax.random.key(7),
        )
        for order in ("same", "own")
    }


@pytest.mark.parametrize("order", ["same", "own"])
@pytest.mark.parametrize("number", range(len(MIXED)))
def test_each_trial_is_the_run_of_it_alone(
    problem: Any, mixed: dict[str, Results], order: str, number: int, close: Close
) -> None:
    """Not bitwise: XLA sums the products of a stack in another order than those of one adapter."""
    outcome = mixed[order][number]
    key = jax.random.key(7) if order == "same" else None
    adapter, losses = problem.alone(MIXED[number], EPOCHS, key)
    close(outcome.adapter, adapter)
    np.testing.assert_allclose(outcome.loss, losses, rtol=1e-5)
    # The metrics are those of the adapter before and after each epoch.
    first = problem.metrics(problem.start(MIXED[number])[0], problem.params, problem.test)
    last = problem.metrics(adapter, problem.params, problem.test)
    for name in problem.metric_names:
        values = outcome.metrics[name]
        assert len(values) == EPOCHS + 1
        assert values[0] == pytest.approx(float(jnp.mean(first[name])), rel=1e-5)
        assert values[-1] == pytest.approx(float(jnp.mean(last[name])), rel=1e-5)


def test_the_trials_learned_different_things(mixed: dict[str, Results]) -> None:
    """Negative control of the above: no two runs are close, but where nothing is learned."""
    losses = [o.loss[-1] for results in mixed.values() for o in results if o.trial.learning_rate]
    apart = np.abs(np.subtract.outer(losses, losses))[np.triu_indices(len(losses), 1)]
    assert apart.min() > 1e-4


def test_it_starts_as_jl_init_has_it(problem: Any, mixed: dict[str, Results]) -> None:
    """Bit for bit: what does not learn is what `jl.init` draws at the true rank."""
    outcome = mixed["same"][4]
    assert outcome.trial.learning_rate == 0
    fresh, _ = problem.start(outcome.trial)
    for found, expected in zip(*map(jax.tree.leaves, (outcome.adapter, fresh)), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_it_is_one_program(mixed: dict[str, Results]) -> None:
    # An epoch, and the metrics.
    assert [results.compilations for results in mixed.values()] == [2, 2]
    assert mixed["same"].slot_epochs == len(MIXED) * EPOCHS


def test_what_is_random_in_the_loss(problem: Any, close: Close) -> None:
    """Dropout: each trial has the masks that it has alone, in the second epoch too."""
    arguments = problem.arguments | {"loss_fun": problem.noisy_loss, "metric_fun": None}
    settings = Settings(epochs=2, batch_size=8)
    results = jl.sweep.run(
        MIXED[:2], **arguments, noisy=True, settings=settings, order_key=jax.random.key(7)
    )
    for outcome in results:
        alone, losses = problem.alone(outcome.trial, 2, jax.random.key(7), noisy=True)
        close(outcome.adapter, alone)
        np.testing.assert_allclose(outcome.loss, losses, rtol=1e-5)
        quiet, _ = problem.alone(outcome.trial, 2, jax.random.key(7))
        assert np.abs(outcome.adapter["w1"].b - quiet["w1"].b).max() > 1e-3


@pytest.fixture(scope="module")
def halved(problem: Any) -> Results:
    """The trials over two slots, one of which is empty at times, some stopped on the way."""
    settings = dataclasses.replace(SETTINGS, slots=2, halving=Halving((1, 2), keep=0.5))
    return jl.sweep.run(MIXED, **problem.arguments, settings=settings, order_key=jax.random.key(7))


class TestHalving:
    def test_those_stop_that_are_worse(self, halved: Results, mixed: dict[str, Results]) -> None:
        """Five, then ceil(2.5) = 3, then ceil(1.5) = 2; decided by the uninterrupted runs."""
        margins = np.array([outcome.metrics["margin"] for outcome in mixed["same"]])
        after_one = sorted(np.argsort(-margins[:, 1])[:3])
        after_two = sorted(after_one, key=lambda k: -margins[k, 2])[:2]
        epochs = [3 if k in after_two else 2 if k in after_one else 1 for k in range(5)]
        assert [outcome.epochs for outcome in halved] == epochs
        reasons = {1: "after epoch 1", 2: "after epoch 2", 3: ""}
        assert [outcome.stopped for outcome in halved] == [reasons[n] for n in epochs]
        assert halved.best.stopped == ""

    def test_what_goes_on_is_as_if_nothing_had_stopped(
        self, halved: Results, mixed: dict[str, Results], close: Close
    ) -> None:
        for outcome, other in zip(halved, mixed["same"], strict=True):
            np.testing.assert_allclose(outcome.loss, other.loss[: outcome.epochs], rtol=1e-5)
            margins = other.metrics["margin"][: outcome.epochs + 1]
            np.testing.assert_allclose(outcome.metrics["margin"], margins, rtol=1e-5)
            if not outcome.stopped:
                close(outcome.adapter, other.adapter)

    def test_what_stops_keeps_what_it_has(
        self, halved: Results, problem: Any, close: Close
    ) -> None:
        stopped = next(o for o in halved if o.epochs == 1 and o.trial.learning_rate)
        close(stopped.adapter, problem.alone(stopped.trial, 1, jax.random.key(7))[0])

    def test_what_it_saves_and_that_nothing_is_compiled_for_it(self, halved: Results) -> None:
        # All five in three turns of two slots, three in two turns, two in one; 15 without halving.
        assert halved.slot_epochs == 6 + 4 + 2
        assert halved.compilations == 2


class TestPrograms:
    """What does not fit into one program makes several."""

    def run(self, problem: Any, trials: Any, **changes: Any) -> Results:
        arguments = problem.arguments | {"metric_fun": None} | changes
        settings = Settings(epochs=2, batch_size=8)
        return jl.sweep.run(trials, **arguments, settings=settings, order_key=jax.random.key(7))

    def test_variants_and_optimizers_by_name(self, problem: Any, close: Close) -> None:
        def optimizer(trial: Any) -> optax.GradientTransformation:
            if trial.name == "adam":
                return optax.adamw(trial.learning_rate, weight_decay=trial.weight_decay)
            return optax.sgd(trial.learning_rate, nesterov=trial.nesterov, momentum=0.5)

        adam: dict[str, Any] = {"name": "adam", "nesterov": False, "learning_rate": 0.03}
        sgd: dict[str, Any] = {"name": "sgd", "nesterov": True, "learning_rate": 0.1}
        trials = [
            Trial(variant="lora", rank=1, weight_decay=0.1, **adam),
            Trial(variant="dora", rank=2, weight_decay=0, **sgd),
            Trial(variant="lora", rank=3, weight_decay=0.0, **adam),
        ]
        results = self.run(problem, trials, optimizer=optimizer)
        assert results.compilations == 2
        for outcome, trial in zip(results, trials, strict=True):
            assert outcome.trial == trial
            alone, _ = problem.alone(trial, 2, jax.random.key(7), optimizer)
            close(outcome.adapter, alone, rtol=1e-4)  # Adam divides small numbers by small ones

    @pytest.mark.parametrize(("pad", "groups"), [(np.inf, [3]), (2, [2, 1]), (1, [1, 1, 1])])
    def test_ranks_apart(self, problem: Any, pad: float, groups: list[int]) -> None:
        trials = grid(rank=(1, 2, 3), learning_rate=(0.1,), weight_decay=(0.0,))
        runs = [Run(trial, trial.config(problem.config), *problem.start(trial)) for trial in trials]
        assert [len(group) for group in grouped(runs, pad)] == groups

    def test_starts_and_keys_of_your_own(self, problem: Any) -> None:
        """What `init` returns is what is trained: here the halves of `jl.init`'s."""
        trials = grid(rank=(1,), learning_rate=(0.0,), weight_decay=(0.0,), seed=(5,))

        def init(key: Any, params: Any, plan: jl.Plan) -> jl.Adapter:
            return jax.tree.map(lambda leaf: leaf / 2, jl.init(key, params, plan))

        def key(trial: Trial) -> jax.Array:
            return jax.random.key(trial.seed + 1)

        (outcome,) = self.run(problem, trials, init=init, key=key)
        fresh, _ = problem.start(Trial(**{**trials[0], "seed": 6}))
        np.testing.assert_array_equal(outcome.adapter["w1"].a, fresh["w1"].a / 2)

    def test_whole_and_fractional_numbers_in_turns(self, problem: Any) -> None:
        """A learning rate of 0 alone in its turn is a number of the same kind as 0.1."""
        trials = grid(learning_rate=(0, 0.1), weight_decay=(0,))
        arguments = problem.arguments | {"metric_fun": None}
        settings = Settings(epochs=1, batch_size=8, slots=1)
        results = jl.sweep.run(trials, **arguments, settings=settings)
        assert results.compilations == 1
        assert results[0].loss != results[1].loss


def test_an_adapter_is_saved_at_its_true_rank(
    problem: Any, mixed: dict[str, Results], tmp_path: Any
) -> None:
    outcome = mixed["same"][0]  # trained with zeros up to rank 3
    outcome.save(tmp_path / "saved", base=problem.params)
    adapter, config, metadata = jl.io.load_adapter(tmp_path / "saved", problem.params)
    for found, expected in zip(*map(jax.tree.leaves, (adapter, outcome.adapter)), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert adapter["w1"].a.shape == (11, 1)
    assert config == outcome.trial.config(problem.config)
    assert metadata["trial"] == dict(outcome.trial)
    assert metadata["margin"] == outcome.final("margin")
    other = jax.tree.map(lambda leaf: leaf + 1, problem.params)
    with pytest.raises(jl.AdapterError):
        jl.io.load_adapter(tmp_path / "saved", other)


class TestMistakes:
    loss_decides: ClassVar[dict[str, Any]] = {
        "metric_fun": None,
        "settings": dataclasses.replace(SETTINGS, metric=None),
    }

    def run(self, problem: Any, trials: Any = MIXED[:1], **changes: Any) -> Results:
        return jl.sweep.run(trials, **problem.arguments | {"settings": SETTINGS} | changes)

    def test_a_trial_that_diverges_is_no_best_and_stops_the_others_not(
        self, problem: Any, close: Close
    ) -> None:
        wild = Trial(**{**MIXED[0], "learning_rate": 1e30})
        results = self.run(
            problem, (wild, MIXED[1]), order_key=jax.random.key(7), **self.loss_decides
        )
        assert [outcome.stopped for outcome in results] == ["diverged", ""]
        assert results.best.trial == MIXED[1]
        close(results[1].adapter, problem.alone(MIXED[1], EPOCHS, jax.random.key(7))[0])
        assert "diverged" in str(results)
        with pytest.raises(jl.ConfigError, match="all diverged; lower the learning rates"):
            dataclasses.replace(results, outcomes=results[:1]).best  # noqa: B018

    @pytest.mark.parametrize("name", ["plan", "optimizer", "loss_fun"])
    def test_what_is_no_function(self, problem: Any, name: str) -> None:
        with pytest.raises(jl.ConfigError, match=f"expected {name} to be a function.*got dict"):
            self.run(problem, **{name: {}})

    def test_a_misspelt_field(self, problem: Any) -> None:
        """It is not taken for a hyperparameter, unless the optimizer uses it."""
        trial = Trial(**{**MIXED[0], "rnak": 1})
        with pytest.raises(jl.ConfigError, match=r"'rnak'.*did you mean 'rank'"):
            self.run(problem, (trial,))

        def used(values: Any) -> optax.GradientTransformation:
            return optax.sgd(0.1 * values.rnak)

        assert len(self.run(problem, (trial,), optimizer=used)) == 1
        label = Trial(**{**MIXED[0], "label": "first"})
        assert len(self.run(problem, (label,))) == 1

    def test_an_optimizer_that_moves_the_zeros(self, problem: Any) -> None:
        def noisy(trial: Any) -> optax.GradientTransformation:
            rate = optax.sgd(trial.learning_rate)
            return optax.chain(optax.add_noise(0.1, 0.5, key=jax.random.key(0)), rate)

        changes: dict[str, Any] = {**self.loss_decides, "optimizer": noisy}
        with pytest.raises(jl.ConfigError, match=r"it moves others otherwise.*Settings\(pad=1\)"):
            self.run(problem, MIXED[:2], **changes)
        settings = dataclasses.replace(changes["settings"], pad=1)
        results = self.run(problem, MIXED[:1], **{**changes, "settings": settings})
        assert len(results) == 1

    def test_a_hyperparameter_that_is_not_there(self, problem: Any) -> None:
        with pytest.raises(AttributeError, match=r"no 'learning_rat' \(nearest: 'learning_rate'"):
            self.run(problem, optimizer=lambda trial: optax.sgd(trial.learning_rat))

    def test_a_string_that_differs_in_a_program(self, problem: Any) -> None:
        trials = (MIXED[0], Trial(**{**MIXED[0], "init": "gaussian"}))
        with pytest.raises(AttributeError, match="no 'init'"):
            self.run(problem, trials, optimizer=lambda trial: optax.sgd(len(trial.init)))

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"settings": dataclasses.replace(SETTINGS, metric=None)}, "accuracy, margin; set"),
            ({"settings": dataclasses.replace(SETTINGS, metric="margn")}, "nearest: 'margin'"),
            ({"test": {"x": np.ones((3, 11)), "y": np.ones(2)}}, r"examples, got \[2, 3\]"),
            ({"settings": 3}, "expected settings"),
        ],
    )
    def test_what_cannot_be_measured(self, problem: Any, changes: Any, words: str) -> None:
        with pytest.raises(jl.JaxLoraError, match=words):
            self.run(problem, **changes)

    def test_a_metric_with_the_name_of_the_loss(self, problem: Any) -> None:
        def metrics(adapter: Any, params: Any, batch: Any) -> Any:
            return {"training_loss": problem.loss(adapter, params, batch)}

        with pytest.raises(jl.ConfigError, match="other names than 'training_loss'"):
            self.run(problem, metric_fun=metrics)

    def test_a_rank_that_no_weight_has(self, problem: Any) -> None:
        with pytest.raises(jl.ConfigError, match="rank of at most 11"):
            self.run(problem, [Trial(**{**MIXED[0], "rank": 12})])


def test_without_metrics_the_loss_decides(problem: Any) -> None:
    lines: list[str] = []
    arguments = problem.arguments | {"metric_fun": None, "test": None}
    trials = grid(learning_rate=(0.0, 0.2), weight_decay=(0.0,))
    results = jl.sweep.run(
        trials, **arguments, settings=Settings(epochs=2, batch_size=8), log=lines.append
    )
    assert (results.metric, results.mode) == ("training_loss", "min")
    assert results.best.trial.learning_rate == 0.2
    assert results[0].loss[-1] > results[1].loss[-1]
    assert results.compilations == 1
    assert [line.split("]")[0] for line in lines] == [f"[2 trials, epoch {k}" for k in (1, 2)]
