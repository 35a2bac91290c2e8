"""Checkpoints of a training: what comes back, what is kept, and what is refused."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import jax_lora as jl
from jax_lora.io import files, folders, manager
from tests.io.small import (
    CONFIG,
    adam,
    adam_state,
    adapter,
    base,
    files_of,
    random,
    same_bits,
    saved,
)


class TestRoundTrip:
    def test_of_everything(self, tmp_path: Path) -> None:
        trained, state = adapter(1), adam_state(adapter(1), 2)
        position = jl.io.Position(epoch=2, step=3, batch_size=8, examples=37)
        keys = {"run": jax.random.key(5), "other": jax.random.key(6, impl="rbg")}
        run = {"learning_rate": 0.1, "data": ["digits", 37]}
        options: dict[str, Any] = {"base": base(), "config": CONFIG, "run": run}
        with jl.io.Checkpoints(tmp_path / "new" / "run", **options) as checkpoints:
            checkpoints.save(
                13,
                trained,
                state,
                position=position,
                keys=keys,
                metrics={"accuracy": np.float32(0.5), "loss": np.nan},
                metadata={"losses": [1.5, 0.1]},
            )
        again = jl.io.Checkpoints(tmp_path / "new" / "run", **options)
        shapes = jax.eval_shape(lambda: (adapter(), adam().init(adapter())))
        for example in (shapes, (adapter(), adam().init(adapter()))):
            found = again.restore(*example)
            assert same_bits((found.trained, found.opt_state), (trained, state))
            assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(found.opt_state))
            assert (found.step, found.position) == (13, position)
            assert found.metrics == {"accuracy": 0.5, "loss": None}
            assert found.metadata == {"losses": [1.5, 0.1]}
            assert found.keys.keys() == keys.keys()
            for name, key in keys.items():
                assert found.keys[name].dtype == key.dtype
                assert (jax.random.bits(found.keys[name]) == jax.random.bits(key)).all()

    def test_of_parameters_with_an_optimizer_without_state(self, tmp_path: Path) -> None:
        state = optax.sgd(0.1).init(base())
        with jl.io.Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, base(), state)
        found = checkpoints.restore(base(1), state)
        assert same_bits((found.trained, found.opt_state), (base(), state))
        assert same_bits(jl.io.load_params(tmp_path / "1")[0], base())

    def test_of_a_key_in_the_optimizers_state(self, tmp_path: Path) -> None:
        state = (optax.ScaleByAdamState(jnp.int32(3), {}, {}), {"key": jax.random.key(1)}, ())
        empty = {"none": jnp.zeros((0, 2)), "typed": jax.random.split(jax.random.key(2), 3)}
        with jl.io.Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, base(), (state, empty))
        found = checkpoints.restore(base(), (state, empty)).opt_state
        assert jax.tree.structure(found) == jax.tree.structure((state, empty))
        assert (found[0][1]["key"], found[0][0].count) == (jax.random.key(1), 3)
        assert found[1]["none"].shape == (0, 2)
        assert (found[1]["typed"] == empty["typed"]).all()
        other = (state[0], {"key": jax.random.key(1, impl="unsafe_rbg")}, ())
        with pytest.raises(jl.CheckpointError) as caught:
            checkpoints.restore(base(), (other, empty))
        assert "0/1/key: saved uint32[2], now uint32[4]" in str(caught.value)

    def test_without_this_library(self, tmp_path: Path) -> None:
        """What the README shows."""
        saved(tmp_path)
        expected = {path: entry.arrays() for path, entry in adapter(20).items()}
        moments = adam_state(adapter(20), 20).inner_states["trained"].inner_state[0]
        with ocp.StandardCheckpointer() as checkpointer:
            assert same_bits(checkpointer.restore(tmp_path / "20" / "arrays"), expected)
            training = checkpointer.restore(tmp_path / "20" / "training")
        prefix = "inner_states/trained/inner_state/0"
        assert same_bits(training["optimizer"][f"{prefix}/mu/dense/w/a"], moments.mu["dense/w"].a)
        assert len(training["optimizer"]) == 9  # two moments of a and b of two, and a count
        with ocp.CheckpointManager(tmp_path) as plain:
            assert plain.all_steps() == [10, 20]
            items = ocp.args.Composite(arrays=ocp.args.StandardRestore(expected))
            assert same_bits(plain.restore(plain.latest_step(), args=items)["arrays"], expected)

    def test_the_adapter_alone(self, tmp_path: Path) -> None:
        checkpoints = saved(tmp_path)
        found, config, _ = jl.io.load_adapter(checkpoints.path(20), base())
        assert same_bits(found, adapter(20))
        assert config == CONFIG
        # The optimizer's state is not read for it.
        for file in (tmp_path / "20" / "training").rglob("*"):
            if file.is_file():
                file.write_bytes(b"")
        assert same_bits(jl.io.load_adapter(checkpoints.path(20), base())[0], adapter(20))

    def test_an_earlier_step(self, tmp_path: Path) -> None:
        checkpoints = saved(tmp_path)
        example = adapter(), adam().init(adapter())
        assert same_bits(checkpoints.restore(*example, step=10).trained, adapter(10))
        with pytest.raises(jl.CheckpointError, match=r"no checkpoint of step 11; nearest: '10'"):
            checkpoints.restore(*example, step=11)


class TestAsync:
    """A save that is held up shows what waits for it."""

    @pytest.fixture
    def gate(self, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
        gate, write = threading.Event(), files.write

        def held_up(*args: Any, **items: Any) -> None:
            assert gate.wait(30)
            write(*args, **items)

        monkeypatch.setattr(files, "write", held_up)
        return gate

    def test_save_does_not_wait_but_the_next_one_does(
        self, tmp_path: Path, gate: threading.Event
    ) -> None:
        checkpoints = jl.io.Checkpoints(tmp_path, every_steps=1)
        state = adam_state(adapter())
        checkpoints.save(1, adapter(1), state)
        assert checkpoints.busy
        assert not checkpoints.due(2)
        assert checkpoints.steps == []
        second = threading.Thread(target=lambda: checkpoints.save(2, adapter(2), state))
        second.start()
        second.join(0.1)
        assert second.is_alive()
        gate.set()
        second.join()
        checkpoints.wait()
        assert (checkpoints.busy, checkpoints.steps) == (False, [1, 2])
        assert checkpoints.due(3)
        checkpoints.close()

    def test_memory_may_be_reused_while_it_is_written(
        self, tmp_path: Path, gate: threading.Event
    ) -> None:
        """The arrays are donated, and metadata and host arrays changed, before it is written."""
        trained, state = adapter(1), adam_state(adapter(1), 1)
        expected = jax.tree.map(np.array, (trained, state))
        metadata, host = {"losses": [1.0]}, np.ones(3, np.float32)
        overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
        checkpoints = jl.io.Checkpoints(tmp_path)
        checkpoints.save(1, trained, (state, host), metadata=metadata)
        for _ in range(3):
            trained, state = jax.block_until_ready(overwrite((trained, state)))
        host += 1
        metadata["losses"].append(2.0)
        gate.set()
        checkpoints.close()
        found = checkpoints.restore(adapter(), (adam().init(adapter()), host))
        assert same_bits((found.trained, found.opt_state[0]), expected)
        assert (np.asarray(found.opt_state[1]) == 1).all()
        assert found.metadata == {"losses": [1.0]}

    @staticmethod
    def interrupted(checkpoints: jl.io.Checkpoints, error: BaseException) -> None:
        with checkpoints:
            checkpoints.save(1, adapter(), adam_state(adapter()))
            raise error

    def test_leaving_the_block_waits(self, tmp_path: Path, gate: threading.Event) -> None:
        threading.Timer(0.1, gate.set).start()
        checkpoints = jl.io.Checkpoints(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            self.interrupted(checkpoints, KeyboardInterrupt())
        assert folders.leftovers(tmp_path) == []
        assert checkpoints.steps == [1]

    def test_who_begins_again_waits(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """As in a notebook, where the cell that makes the checkpoints is run once more."""
        write = files.write

        def slow(*args: Any, **items: Any) -> None:
            time.sleep(0.1)
            write(*args, **items)

        monkeypatch.setattr(files, "write", slow)
        for expected in ([], [1], [1, 2]):
            checkpoints = jl.io.Checkpoints(tmp_path)
            assert checkpoints.steps == expected
            if expected:
                checkpoints.restore({"w": jnp.ones(1)}, ())
            checkpoints.save(len(expected) + 1, {"w": jnp.ones(1)}, ())
        other = jl.io.Checkpoints(tmp_path)
        checkpoints.wait()
        other.restore({"w": jnp.ones(1)}, ())
        with pytest.raises(jl.CheckpointError, match="but this process does through others"):
            other.claim()
        checkpoints.close()
        assert capsys.readouterr() == ("", "")


class TestErrorsOfTheThread:
    @pytest.fixture
    def failing(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
        def fail() -> None:
            def write(folder: Path, *args: Any, **items: Any) -> None:
                raise jl.CheckpointError(f"{folder}: cannot be written: no space")

            monkeypatch.setattr(files, "write", write)

        return fail

    def test_come_out_of_the_next_call_once(
        self, tmp_path: Path, failing: Callable[[], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        state = adam_state(adapter())
        with jl.io.Checkpoints(tmp_path) as checkpoints:
            with monkeypatch.context():
                checkpoints.save(1, adapter(), state)
                checkpoints.wait()
                failing()
                for step in (2, 4, 6):
                    checkpoints.save(step, adapter(), state)
                    call = checkpoints.wait if step == 2 else checkpoints.close
                    if step == 4:
                        with pytest.raises(jl.CheckpointError) as caught:
                            checkpoints.save(5, adapter(), state)
                    else:
                        with pytest.raises(jl.CheckpointError) as caught:
                            call()
                    assert str(caught.value) == (
                        f"{tmp_path / str(step)}: cannot be written: no space; the last good step "
                        "is 1"
                    )
                    call()
            monkeypatch.undo()
            # It goes on after the last good one.
            checkpoints.save(2, adapter(2), state)
        assert checkpoints.steps == [1, 2]

    def test_of_the_first_save(self, tmp_path: Path, failing: Callable[[], None]) -> None:
        failing()
        with (
            pytest.raises(jl.CheckpointError, match="there is no good step"),
            jl.io.Checkpoints(tmp_path) as checkpoints,
        ):
            checkpoints.save(1, adapter(), adam_state(adapter()))

    def test_are_printed_where_nobody_can_ask(
        self, tmp_path: Path, failing: Callable[[], None], capsys: pytest.CaptureFixture[str]
    ) -> None:
        failing()
        checkpoints = jl.io.Checkpoints(tmp_path)
        checkpoints.save(1, adapter(), adam_state(adapter()))
        checkpoints._finalizer()  # as at the end of the program
        expected = f"error: {tmp_path / '1'}: cannot be written: no space\n"
        assert capsys.readouterr().err == expected

    def test_do_not_hide_another(self, tmp_path: Path, failing: Callable[[], None]) -> None:
        failing()
        with pytest.raises(ZeroDivisionError) as caught:
            TestAsync.interrupted(jl.io.Checkpoints(tmp_path), ZeroDivisionError())
        assert "cannot be written: no space" in caught.value.__notes__[0]


class TestWhatIsKept:
    def run(self, folder: Path, accuracies: list[float | None], **options: Any) -> list[int]:
        with jl.io.Checkpoints(folder, **options) as checkpoints:
            for step, accuracy in enumerate(accuracies, start=1):
                metrics = None if accuracy is None else {"accuracy": accuracy, "x": 0.0}
                checkpoints.save(step, {"w": jnp.ones(2)}, (), metrics=metrics)
        assert sorted(path.name for path in folder.iterdir()) == sorted(
            [".lock", *map(str, checkpoints.steps)]
        )
        return checkpoints.steps

    def test_the_last(self, tmp_path: Path) -> None:
        assert self.run(tmp_path / "2", [None] * 4, keep=2) == [3, 4]
        assert self.run(tmp_path / "3", [None] * 2) == [1, 2]

    @pytest.mark.parametrize(("mode", "best"), [("max", 2), ("min", 3)])
    def test_and_the_best(self, tmp_path: Path, mode: Any, best: int) -> None:
        accuracies = [0.2, 0.9, 0.1, np.nan, None, 0.5]
        options: dict[str, Any] = {"keep": 1, "best": "accuracy", "mode": mode}
        assert self.run(tmp_path, accuracies, **options) == [best, 6]
        assert jl.io.Checkpoints(tmp_path, **options).best == best
        assert jl.io.Checkpoints(tmp_path).best is None

    def test_when_it_goes_on(self, tmp_path: Path) -> None:
        """The metrics of earlier processes count."""
        options: dict[str, Any] = {"keep": 1, "best": "accuracy"}
        self.run(tmp_path, [0.9, 0.2], **options)
        with jl.io.Checkpoints(tmp_path, **options) as checkpoints:
            checkpoints.restore({"w": jnp.ones(2)}, ())
            checkpoints.save(3, {"w": jnp.ones(2)}, (), metrics={"accuracy": 0.3})
        assert checkpoints.steps == [1, 3]

    def test_the_rules(self) -> None:
        assert folders.kept({1: None, 2: None}, 3, "max") == {1, 2}
        assert folders.kept({1: 0.5, 2: 0.5, 3: None, 4: 0.1}, 1, "max") == {2, 4}
        assert folders.best_of({1: np.inf, 2: -1.0}, "max") == 2

    def test_metrics_without_the_one_that_counts(self, tmp_path: Path) -> None:
        checkpoints = jl.io.Checkpoints(tmp_path / "new", best="accuracy")
        with pytest.raises(jl.ConfigError, match=r"metrics with 'accuracy'.*got 'loss'"):
            checkpoints.save(1, base(), (), metrics={"loss": 1})
        assert not (tmp_path / "new").exists()


class TestWhenItIsDue:
    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        now = [0.0]
        monkeypatch.setattr(manager.time, "monotonic", lambda: now[0])
        return now

    def test_by_steps(self, tmp_path: Path) -> None:
        with jl.io.Checkpoints(tmp_path, every_steps=4) as checkpoints:
            assert [step for step in range(10) if checkpoints.due(step)] == [4, 5, 6, 7, 8, 9]
            checkpoints.save(5, {"w": jnp.ones(1)}, ())
            checkpoints.wait()
            assert [step for step in range(14) if checkpoints.due(step)] == [8, 9, 10, 11, 12, 13]
        again = jl.io.Checkpoints(tmp_path, every_steps=4)
        again.restore({"w": jnp.ones(1)}, ())
        assert [step for step in range(10) if again.due(step)] == [8, 9]

    def test_by_minutes(self, tmp_path: Path, clock: list[float]) -> None:
        with jl.io.Checkpoints(tmp_path, every_minutes=0.5) as checkpoints:
            assert not checkpoints.due(1)
            clock[0] = 29.0
            assert not checkpoints.due(1)
            clock[0] = 30.0
            assert checkpoints.due(1)
            checkpoints.save(1, {"w": jnp.ones(1)}, ())
            checkpoints.wait()
            clock[0] = 59.0
            assert not checkpoints.due(2)
            clock[0] = 60.0
            assert checkpoints.due(2)
            assert not checkpoints.due(1)

    def test_never_without_either(self, tmp_path: Path) -> None:
        assert not jl.io.Checkpoints(tmp_path).due(10**9)


class TestAnotherRun:
    """One error that names all that differs, and changes nothing."""

    def refused(self, folder: Path, *example: Any, **options: Any) -> list[str]:
        before = files_of(folder)
        checkpoints = jl.io.Checkpoints(folder, **{"base": base(), "config": CONFIG} | options)
        with pytest.raises((jl.CheckpointError, jl.AdapterError)) as caught:
            checkpoints.restore(*example)
        assert files_of(folder) == before
        return str(caught.value).splitlines()

    def test_another_optimizer(self, tmp_path: Path) -> None:
        saved(tmp_path, steps=[10])
        sgd = jl.optim.lora_optimizer(optax.sgd(0.1, momentum=0.9))
        head, *lines = self.refused(tmp_path, adapter(), sgd.init(adapter()))
        assert head.startswith(f"{tmp_path / '10'}: expected a checkpoint of the same run")
        state = "  optimizer state inner_states/trained/inner_state/0"
        assert lines == [
            f"{state}/count: only saved, an array",
            f"{state}/mu: only saved, 4 arrays",
            f"{state}/nu: only saved, 4 arrays",
            f"{state}/trace: only now, 4 arrays",
        ]

    def test_another_rank(self, tmp_path: Path) -> None:
        saved(tmp_path, steps=[10])
        other = adapter(rank=1)
        _, *lines = self.refused(tmp_path, other, adam().init(other), config=None)
        assert lines[0] == "  dense/w/a: saved float32[4, 2], now float32[4, 1]"
        moment = "inner_states/trained/inner_state/0/mu/stack/b"
        assert (
            f"  optimizer state {moment}: saved bfloat16[2, 2, 4], now bfloat16[2, 1, 4]" in lines
        )
        assert len(lines) == 4 + 2 * 4

    def test_another_configuration_and_setting(self, tmp_path: Path) -> None:
        """What follows from it in the arrays is not listed."""
        saved(tmp_path, steps=[10], run={"seed": 0, "batch": 8, "data": "digits"})
        config = jl.LoraConfig(rank=1, alpha=3, targets=("**",))
        run = {"seed": 1, "data": "digits", "decay": 0.1}
        other = adapter(rank=1)
        _, *lines = self.refused(tmp_path, other, adam().init(other), config=config, run=run)
        assert lines == [
            "  batch: saved 8, now 'nothing'",
            "  decay: saved 'nothing', now 0.1",
            "  seed: saved 0, now 1",
            "  config.alpha: saved 8.0, now 3.0",
            "  config.rank: saved 2, now 1",
        ]

    def test_what_is_the_same(self, tmp_path: Path) -> None:
        saved(tmp_path, steps=[10], run={"limit": np.nan, "rate": 1, "sizes": (1, 2)})
        run = {"sizes": [1, 2], "rate": 1.0, "limit": float("nan")}
        again = jl.io.Checkpoints(tmp_path, base=base(), config=CONFIG, run=run)
        assert again.restore(adapter(), adam().init(adapter())).step == 10

    def test_another_layout_of_the_same_shapes(self, tmp_path: Path) -> None:
        square = {"w": jnp.ones((3, 3))}
        entries = [
            jl.Adapter({"w": jl.LoraFactors(jnp.ones((3, 2)), jnp.ones((2, 3)), jnp.float32(1), x)})
            for x in (jl.Layout((3, 3), (0,), (1,)), jl.Layout((3, 3), (1,), (0,)))
        ]
        with jl.io.Checkpoints(tmp_path, base=square) as checkpoints:
            checkpoints.save(1, entries[0], ())
        _, line = self.refused(tmp_path, entries[1], (), base=square, config=None)
        assert line.startswith(
            "  w: saved {'variant': 'lora', 'layout': {'shape': [3, 3], 'in_axes'"
        )

    def test_an_adapter_for_parameters(self, tmp_path: Path) -> None:
        saved(tmp_path, steps=[10])
        _, line = self.refused(tmp_path, base(), ())
        assert line == "  saved an adapter, now parameters"

    def test_another_base(self, tmp_path: Path) -> None:
        saved(tmp_path, steps=[10])
        other = base() | {"stack": base(1)["stack"]}
        example = adapter(), adam().init(adapter())
        head, line = self.refused(tmp_path, *example, base=other)
        assert "differs in 1 of 2 parameters" in head
        assert line == "  stack: other values"
        # Its adapter can still be taken, by those who know.
        with pytest.raises(jl.AdapterError, match="stack: other values"):
            jl.io.load_adapter(tmp_path / "10", other)
        assert same_bits(jl.io.load_adapter(tmp_path / "10", other, force=True)[0], adapter(10))

    def test_no_training(self, tmp_path: Path) -> None:
        jl.io.save_adapter(tmp_path / "7", adapter())
        (line,) = self.refused(tmp_path, adapter(), ())
        assert "7: expected a checkpoint of a training, found 'jax_lora.adapter' alone" in line


class TestOneFolderOneTraining:
    def test_a_used_folder_is_not_begun_again(self, tmp_path: Path) -> None:
        saved(tmp_path)
        before = files_of(tmp_path)
        for call in ("claim", "save"):
            checkpoints = jl.io.Checkpoints(tmp_path)
            arguments = () if call == "claim" else (30, adapter(), adam_state(adapter()))
            with pytest.raises(jl.CheckpointError, match=r"found the steps 10, 20; restore one"):
                getattr(checkpoints, call)(*arguments)
        assert files_of(tmp_path) == before

    def test_two_at_a_time(self, tmp_path: Path) -> None:
        first, second = jl.io.Checkpoints(tmp_path), jl.io.Checkpoints(tmp_path)
        first.claim()
        with pytest.raises(jl.CheckpointError, match="expected to be the only one"):
            second.claim()
        first.close()
        second.claim()
        del second  # nobody closes it
        gc.collect()
        first.claim()
        first.close()

    def test_leftovers_go_when_the_next_begins(self, tmp_path: Path) -> None:
        saved(tmp_path)
        names = ("30.orbax-checkpoint-tmp", "30.orbax-checkpoint-tmp-17", "5.deleted")
        for name in names:
            (tmp_path / name / "arrays").mkdir(parents=True)
            (tmp_path / name / "arrays" / "half").write_bytes(b"half")
        (tmp_path / "mine").mkdir()
        (tmp_path / "007").mkdir()
        checkpoints = jl.io.Checkpoints(tmp_path, base=base(), config=CONFIG)
        checkpoints.restore(adapter(), adam().init(adapter()))
        assert checkpoints.steps == [10, 20]
        assert all((tmp_path / name).exists() for name in names)
        checkpoints.claim()
        present = {path.name for path in tmp_path.iterdir()}
        assert present == {"10", "20", "mine", "007", ".lock"}
        checkpoints.close()

    def test_steps_go_up(self, tmp_path: Path) -> None:
        with jl.io.Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(3, {"w": jnp.ones(1)}, ())
            for step in (3, 2):
                with pytest.raises(jl.CheckpointError, match=f"a step after 3.*, got {step}"):
                    checkpoints.save(step, {"w": jnp.ones(1)}, ())

    def test_going_on_from_an_earlier_step_sets_the_later_aside(self, tmp_path: Path) -> None:
        checkpoints = saved(tmp_path, steps=(10, 20, 30))
        content = files_of(tmp_path / "20")
        with jl.io.Checkpoints(tmp_path, base=base(), config=CONFIG, keep=2) as again:
            again.restore(adapter(), adam().init(adapter()), step=10)
            assert again.steps == [10, 20, 30]
            again.save(20, adapter(0), adam_state(adapter()))
        assert checkpoints.steps == [10, 20]
        assert files_of(tmp_path / "20.aside") == content
        assert (tmp_path / "30.aside").is_dir()
        assert same_bits(jl.io.load_adapter(tmp_path / "20")[0], adapter(0))
        with jl.io.Checkpoints(tmp_path, base=base(), config=CONFIG) as again:
            again.restore(adapter(), adam().init(adapter()), step=10)
            again.save(15, adapter(0), adam_state(adapter()))
        assert (tmp_path / "20.aside-1").is_dir()


class TestOptions:
    def test_out_of_range(self, tmp_path: Path) -> None:
        with pytest.raises(jl.ConfigError) as caught:
            jl.io.Checkpoints(
                tmp_path,
                keep=0,
                mode="best",  # type: ignore[arg-type]
                every_steps=0,
                every_minutes=-1.0,
            )
        assert str(caught.value) == (
            "expected keep of at least 1, got 0; mode 'min' or 'max', got 'best'; "
            "every_steps of at least 1, got 0; every_minutes above 0, got -1.0"
        )

    @pytest.mark.parametrize(
        ("state", "what"),
        [({"x": "text"}, "optimizer/x"), ({"x": 1.5}, "optimizer/x"), ({"x": object()}, "/x")],
    )
    def test_what_is_no_array(self, tmp_path: Path, state: Any, what: str) -> None:
        checkpoints = jl.io.Checkpoints(tmp_path / "new")
        with pytest.raises(jl.CheckpointError, match=f"found other leaves at .*{what}"):
            checkpoints.save(1, base(), state)
        with pytest.raises(jl.ConfigError, match="metadata/x: object"):
            checkpoints.save(1, base(), (), metadata={"x": object()})
        with pytest.raises(jl.ConfigError, match=r"numbers as metrics, got 'x': 'high', 'y': "):
            checkpoints.save(1, base(), (), metrics={"x": "high", "y": np.ones(1), "z": True})
        for step in (1.0, -1, "1", None):
            with pytest.raises(jl.CheckpointError, match="expected a number of steps"):
                checkpoints.save(step, base(), ())  # type: ignore[arg-type]
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("step", [np.int64(7), jnp.int32(7)])
    def test_the_steps_of_other_libraries(self, tmp_path: Path, step: Any) -> None:
        with jl.io.Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(step, {"w": jnp.ones(1)}, ())
        assert checkpoints.restore({"w": jnp.ones(1)}, (), step=step).step == 7

    def test_an_adapter_that_does_not_fit(self, tmp_path: Path) -> None:
        checkpoints = jl.io.Checkpoints(tmp_path, base={"dense": {"w": random((3, 3), 0)}})
        with pytest.raises(jl.AdapterError, match="dense/w: made for shape"):
            checkpoints.save(1, adapter(), adam_state(adapter()))


def test_nothing_there(tmp_path: Path) -> None:
    checkpoints = jl.io.Checkpoints(tmp_path / "new")
    assert (checkpoints.steps, checkpoints.best) == ([], None)
    with pytest.raises(jl.CheckpointError, match="expected checkpoints of a training, found none"):
        checkpoints.restore(adapter(), ())
    checkpoints.close()
    assert not (tmp_path / "new").exists()
