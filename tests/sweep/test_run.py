"""Every trial of a sweep is the run of it alone, whatever runs beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_lora as jl
from jax_lora.sweep import Halving, Results, Settings, Trial, grid

Close = Callable[..., None]
EPOCHS = 3
SETTINGS = Settings(epochs=EPOCHS, batch_size=8, metric="margin", evaluation_batch=10)

#: Six trials that differ in everything that one program can hold.
MIXED = (
    Trial(seed=0, rank=1, alpha=2.0, learning_rate=0.1, weight_decay=0.0, init="kaiming"),
    Trial(seed=1, rank=3, alpha=2.0, learning_rate=0.1, weight_decay=0.0, init="kaiming"),
    Trial(seed=0, rank=3, alpha=0.5, learning_rate=0.2, weight_decay=0.1, init="gaussian"),
    Trial(seed=2, rank=2, alpha=1.0, learning_rate=0.05, weight_decay=0.01, init="article"),
    Trial(seed=3, rank=2, alpha=-1.0, learning_rate=0.0, weight_decay=0.0, init="orthogonal"),
    Trial(seed=4, rank=1, alpha=1.0, learning_rate=0.03, weight_decay=0.1, init="gaussian"),
)


@pytest.fixture(autouse=True)
def _standard_promotion() -> Any:
    with jax.numpy_dtype_promotion("standard"):  # optax.adam mixes dtypes
        yield


@pytest.fixture(scope="module")
def mixed(problem: Any) -> dict[str, Results]:
    """The six trials on the same batches and each on its own."""
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
    # The optimizers' start, an epoch, and the metrics.
    assert [results.compilations for results in mixed.values()] == [3, 3]
    assert mixed["same"].slot_epochs == len(MIXED) * EPOCHS


@pytest.mark.parametrize("slots", [2, 4])
def test_fewer_slots_than_trials(
    problem: Any, mixed: dict[str, Results], slots: int, close: Close
) -> None:
    """One program, run several times; what is empty at the end changes nothing."""
    results = jl.sweep.run(
        MIXED[:5],
        **problem.arguments,
        settings=dataclasses.replace(SETTINGS, slots=slots),
        order_key=jax.random.key(7),
    )
    assert results.compilations == 3
    assert results.slot_epochs == -(-5 // slots) * slots * EPOCHS
    for outcome, other in zip(results, mixed["same"], strict=False):
        close(outcome.adapter, other.adapter)
        np.testing.assert_allclose(outcome.metrics["margin"], other.metrics["margin"], rtol=1e-5)


@pytest.fixture(scope="module")
def halved(problem: Any) -> Results:
    """The six trials over two slots, some of them stopped on the way."""
    settings = dataclasses.replace(SETTINGS, slots=2, halving=Halving((1, 2), keep=0.4))
    return jl.sweep.run(
        MIXED, **problem.arguments, settings=settings, order_key=jax.random.key(7)
    )


class TestHalving:
    def test_those_stop_that_are_worse(self, halved: Results, mixed: dict[str, Results]) -> None:
        """Six, then ceil(2.4) = 3, then ceil(1.2) = 2; decided by the uninterrupted runs."""
        margins = np.array([outcome.metrics["margin"] for outcome in mixed["same"]])
        after_one = sorted(np.argsort(-margins[:, 1])[:3])
        after_two = sorted(after_one, key=lambda k: -margins[k, 2])[:2]
        epochs = [3 if k in after_two else 2 if k in after_one else 1 for k in range(6)]
        assert [outcome.epochs for outcome in halved] == epochs
        reasons = {1: "after epoch 1", 2: "after epoch 2", 3: ""}
        assert [outcome.stopped for outcome in halved] == [reasons[n] for n in epochs]

    def test_what_goes_on_is_as_if_nothing_had_stopped(
        self, halved: Results, mixed: dict[str, Results], close: Close
    ) -> None:
        for outcome, other in zip(halved, mixed["same"], strict=True):
            np.testing.assert_allclose(outcome.loss, other.loss[: outcome.epochs], rtol=1e-5)
            if not outcome.stopped:
                close(outcome.adapter, other.adapter)

    def test_what_stops_keeps_what_it_has(
        self, halved: Results, problem: Any, close: Close
    ) -> None:
        stopped = next(o for o in halved if o.epochs == 1 and o.trial.learning_rate)
        close(stopped.adapter, problem.alone(stopped.trial, 1, jax.random.key(7))[0])

    def test_what_it_saves(self, halved: Results) -> None:
        # Of 6 x 3: all six in three turns of two slots, three in two turns, two in one.
        assert halved.slot_epochs == 6 + 4 + 2
        assert halved.compilations == 3
        assert halved.best.stopped == ""


class TestPrograms:
    """What does not fit into one program makes several."""

    def run(self, problem: Any, trials: Any, pad: float = np.inf, **changes: Any) -> Results:
        settings = Settings(epochs=2, batch_size=8, pad=pad)
        arguments = problem.arguments | {"metric_fun": None} | changes
        return jl.sweep.run(trials, **arguments, settings=settings, order_key=jax.random.key(7))

    def test_variants(self, problem: Any, close: Close) -> None:
        trials = grid(
            variant=("lora", "dora"), rank=(1, 2), learning_rate=(0.1,), weight_decay=(0,)
        )
        results = self.run(problem, trials)
        assert results.compilations == 2 * 2
        for outcome in results:
            close(outcome.adapter, problem.alone(outcome.trial, 2, jax.random.key(7))[0])

    def test_ranks_apart(self, problem: Any) -> None:
        trials = grid(rank=(1, 2, 3), learning_rate=(0.1,), weight_decay=(0.0,))
        assert self.run(problem, trials, pad=2).compilations == 2 * 2
        assert self.run(problem, trials[:2], pad=1).compilations == 2 * 2

    def test_optimizers_by_name(self, problem: Any, close: Close) -> None:
        def optimizer(trial: Any) -> optax.GradientTransformation:
            if trial.name == "adam":
                return optax.adamw(trial.learning_rate, weight_decay=trial.weight_decay)
            return optax.sgd(trial.learning_rate, nesterov=trial.nesterov, momentum=0.5)

        trials = [
            Trial(name="adam", nesterov=False, rank=1, learning_rate=0.03, weight_decay=0.1),
            Trial(name="sgd", nesterov=True, rank=3, learning_rate=0.1, weight_decay=0.0),
            Trial(name="adam", nesterov=False, rank=3, learning_rate=0.01, weight_decay=0.0),
            Trial(name="sgd", nesterov=False, rank=3, learning_rate=0.1, weight_decay=0.0),
        ]
        results = self.run(problem, trials, optimizer=optimizer)
        assert results.compilations == 3 * 2
        for outcome, trial in zip(results, trials, strict=True):
            assert outcome.trial == trial
            alone, _ = problem.alone(trial, 2, jax.random.key(7), optimizer)
            close(outcome.adapter, alone, rtol=1e-4)  # Adam divides small numbers by small ones

    def test_starts_of_your_own(self, problem: Any) -> None:
        """What `init` returns is what is trained: here the halves of `jl.init`'s."""
        trials = grid(rank=(2,), learning_rate=(0.0,), weight_decay=(0.0,))

        def init(key: Any, params: Any, plan: jl.Plan) -> jl.Adapter:
            return jax.tree.map(lambda leaf: leaf / 2, jl.init(key, params, plan))

        (outcome,) = self.run(problem, trials, init=init)
        fresh, _ = problem.start(trials[0])
        np.testing.assert_array_equal(outcome.adapter["w1"].a, fresh["w1"].a / 2)

    def test_keys_of_your_own(self, problem: Any) -> None:
        trials = grid(rank=(2,), learning_rate=(0.0,), weight_decay=(0.0,), seed=(5,))
        (outcome,) = self.run(problem, trials, key=lambda trial: jax.random.key(trial.seed + 1))
        other, _ = problem.start(Trial(**{**trials[0], "seed": 6}))
        np.testing.assert_array_equal(outcome.adapter["w1"].a, other["w1"].a)


class TestMistakes:
    def run(self, problem: Any, trials: Any = MIXED[:1], **changes: Any) -> Results:
        return jl.sweep.run(trials, **problem.arguments | {"settings": SETTINGS} | changes)

    def test_a_trial_that_diverges_is_no_best_and_stops_the_others_not(
        self, problem: Any, close: Close
    ) -> None:
        wild = Trial(**{**MIXED[0], "learning_rate": 1e30})
        results = self.run(problem, (wild, MIXED[1]), order_key=jax.random.key(7))
        assert [outcome.stopped for outcome in results] == ["diverged", ""]
        assert results.best.trial == MIXED[1]
        close(results[1].adapter, problem.alone(MIXED[1], EPOCHS, jax.random.key(7))[0])
        assert "diverged" in str(results)

    def test_all_diverge(self, problem: Any) -> None:
        results = self.run(problem, [Trial(**{**MIXED[0], "learning_rate": 1e30})])
        with pytest.raises(jl.ConfigError, match="all diverged; lower the learning rates"):
            results.best  # noqa: B018

    def test_an_optimizer_that_moves_the_zeros(self, problem: Any) -> None:
        def noisy(trial: Any) -> optax.GradientTransformation:
            rate = optax.sgd(trial.learning_rate)
            return optax.chain(optax.add_noise(0.1, 0.5, key=jax.random.key(0)), rate)

        with pytest.raises(jl.ConfigError, match=r"they have moved.*Settings\(pad=1\)"):
            self.run(problem, MIXED[:2], optimizer=noisy)
        apart = Settings(epochs=1, batch_size=8, pad=1)
        results = self.run(
            problem, MIXED[:2], optimizer=noisy, settings=apart, metric_fun=None
        )
        assert len(results) == 2

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
            ({"test": {"x": np.ones((3, 6)), "y": np.ones(2)}}, r"examples, got \[2, 3\]"),
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
        with pytest.raises(jl.ConfigError, match="rank of at most 5"):
            self.run(problem, [Trial(**{**MIXED[0], "rank": 6})])


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
    assert results.compilations == 2
    assert [line.split("]")[0] for line in lines] == [f"[2 trials, epoch {k}" for k in (1, 2)]
