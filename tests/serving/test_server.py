"""The server: batches of requests, adapters that come and go, errors that stay where they are."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

import jax
import numpy as np
import pytest

import jax_lora as jl
from jax_lora.serving.residents import Residents
from tests.serving.small import World, model

Serve = Callable[..., jl.serving.Server]
LONG = 60.0  # seconds, after which a test has failed


class Shelf:
    """Loads adapters, and remembers which; may be told to wait before."""

    def __init__(self, adapters: dict[str, Any]):
        self.adapters, self.loaded = adapters, []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, name: str) -> Any:
        assert self.gate.wait(LONG)
        self.loaded.append(name)
        return self.adapters[name]


@pytest.fixture
def shelf(world: World) -> Shelf:
    return Shelf(world.adapters)


class TestBatches:
    def test_each_request_has_its_adapter(self, world: World, serve: Serve) -> None:
        """Of 64 requests from four threads, in whatever batches."""
        names = [None, "a", "b", "c"] * 16
        futures: dict[int, Future[Any]] = {}

        def send(part: range) -> None:
            for k in part:
                futures[k] = server.submit(names[k], world.examples[k])

        with serve(world.bank(3, "a", "b", "c"), max_wait=0.01) as server:
            senders = [threading.Thread(target=send, args=(range(i, 64, 4),)) for i in range(4)]
            for sender in senders:
                sender.start()
            for sender in senders:
                sender.join()
        for k, future in futures.items():
            world.check(future.result(0), names[k], k)
        # Otherwise the above would hold with adapters that do nothing.
        base, other = world.expected(None, 1)["y"], world.expected("a", 1)["y"]
        assert np.abs(base - other).max() > 0.1
        assert server.stats.requests == 64

    def test_as_many_as_there_are(self, world: World, serve: Serve) -> None:
        """Four at once without waiting for more; the rest when it is closed, filled up."""
        server = serve(world.bank(3, "a", "b"), max_wait=LONG)
        four = [server.submit("ab"[k % 2], world.examples[k]) for k in range(4)]
        assert not wait(four, LONG).not_done
        assert server.stats == jl.serving.Stats(requests=4, batches=1)
        three = [server.submit("a", world.examples[k]) for k in range(4, 7)]
        server.close()
        assert server.stats == jl.serving.Stats(requests=7, batches=2, padding=1)
        for k, future in enumerate([*four, *three]):
            world.check(future.result(0), "a" if k >= 4 else "ab"[k % 2], k)

    def test_one_alone_waits_no_longer_than_asked(self, world: World, serve: Serve) -> None:
        with serve(world.bank(1, "a"), max_wait=0.001, batch_sizes=(4, 1)) as server:
            world.check(server.submit("a", world.examples[0]).result(LONG), "a", 0)
            assert server.stats == jl.serving.Stats(requests=1, batches=1)

    def test_one_program_for_each_size(
        self, world: World, serve: Serve, shelf: Shelf, compiled_programs: Callable[[], int]
    ) -> None:
        """Compiled at the start; other adapters, in and out of the bank, compile nothing."""
        traced: list[int] = []

        def watched(params: Any, x: Any) -> Any:
            traced.append(1)
            return model(params, x)

        bank = world.bank(2)
        before = compiled_programs()
        with serve(bank, shelf, fun=watched, batch_sizes=(4, 1)) as server:
            assert compiled_programs() - before == 2
            # The tests are strict about dtypes in this thread alone, and what writes into a bank
            # compiles once more in the worker's, for that.
            server.submit("a", world.examples[0]).result(LONG)
            before, calls = compiled_programs(), len(traced)
            futures = [server.submit("abcdef"[k % 6], world.examples[k]) for k in range(24)]
            for k, future in enumerate(futures):
                world.check(future.result(LONG), "abcdef"[k % 6], k)
        assert compiled_programs() == before
        assert len(traced) == calls
        assert server.stats.evictions > 0

    def test_trees_and_several_arguments(self, world: World) -> None:
        """Arguments and outputs may be trees, outputs also scalars of each example."""

        def fun(params: Any, both: Any, shift: Any) -> Any:
            y = model(params, both["x"])["y"] + shift[:, None]
            return [y, {"sum": y.sum(-1)}]

        x, shift = world.examples, np.arange(64, dtype=np.float32)
        config = jl.serving.ServerConfig(batch_sizes=(2,), max_wait=0.0)
        bank, example = world.bank(1, "a"), ({"x": x[0]}, shift[0])
        with jl.serving.Server(fun, world.params, bank, *example, config=config) as server:
            futures = [server.submit("a", {"x": x[k]}, shift[k]) for k in range(3)]
            for k, future in enumerate(futures):
                y, rest = future.result(LONG)
                expected = world.expected("a", k)["y"] + k
                np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6)
                np.testing.assert_allclose(rest["sum"], expected.sum(), rtol=0, atol=4e-6)


class TestSlots:
    def test_the_least_recently_used_goes(self, world: World, serve: Serve, shelf: Shelf) -> None:
        with serve(world.bank(2), shelf) as server:
            for k, name in enumerate("abacab"):
                world.check(server.submit(name, world.examples[k]).result(LONG), name, k)
            assert shelf.loaded == ["a", "b", "c", "b"]
            stats = server.stats
        assert (stats.requests, stats.loads, stats.evictions) == (6, 4, 2)

    def test_what_came_with_the_bank_stays(self, world: World, serve: Serve, shelf: Shelf) -> None:
        with serve(world.bank(2, "a"), shelf) as server:
            for k, name in enumerate("bcda"):
                world.check(server.submit(name, world.examples[k]).result(LONG), name, k)
        assert shelf.loaded == ["b", "c", "d"]
        assert server.stats.evictions == 2

    @pytest.mark.parametrize("slots", [1, 3])
    def test_more_adapters_at_once_than_slots(
        self, world: World, serve: Serve, shelf: Shelf, slots: int
    ) -> None:
        """All are loaded before any is needed; no batch has more of them than there are slots."""
        shelf.gate.clear()
        with serve(world.bank(slots), shelf, loaders=6) as server:
            names = ["abcdef"[k % 6] for k in range(36)]
            futures = [server.submit(name, world.examples[k]) for k, name in enumerate(names)]
            shelf.gate.set()
            for k, future in enumerate(futures):
                world.check(future.result(LONG), names[k], k)
        stats = server.stats
        assert stats.requests == 36
        assert stats.loads >= 6
        assert stats.evictions == stats.loads - slots

    def test_an_adapter_of_the_batch_at_hand_stays(self, world: World) -> None:
        """Also when it is the least recently used one."""
        residents = Residents(world.bank(2))
        assert not residents.lend("a", world.adapters["a"], {"a"})
        assert not residents.lend("b", world.adapters["b"], {"b"})
        assert residents.lend("c", world.adapters["c"], {"a", "c"})
        assert set(residents.bank.names) == {"a", "c"}
        residents.ids(["a"])
        assert residents.lend("d", world.adapters["d"], {"d"})  # negative control: c is the older
        assert set(residents.bank.names) == {"a", "d"}

    def test_one_that_is_asked_for_many_times_is_loaded_once(
        self, world: World, serve: Serve, shelf: Shelf
    ) -> None:
        shelf.gate.clear()
        with serve(world.bank(2), shelf) as server:
            futures = [server.submit("a", world.examples[k]) for k in range(9)]
            shelf.gate.set()
            for k, future in enumerate(futures):
                world.check(future.result(LONG), "a", k)
        assert shelf.loaded == ["a"]


class TestErrors:
    """Each is the error of one request; the others do not notice."""

    def others_are_right(self, world: World, server: jl.serving.Server) -> None:
        world.check(server.submit("a", world.examples[5]).result(LONG), "a", 5)

    def test_what_is_wrong_with_a_request(self, world: World, serve: Serve) -> None:
        four, right = np.ones(4, np.float32), world.examples[5]
        cases: list[tuple[Any, tuple[Any, ...], str]] = [
            ("aa", (right,), "no adapter 'aa' in the bank"),
            (3, (right,), "an adapter's name or None, got 3"),
            (
                "a",
                (four[:3],),
                "argument 0: expected float32 of shape (4,), got float32 of shape (3,)",
            ),
            ("a", (four[None],), "got float32 of shape (1, 4)"),
            ("a", (four.astype(int),), "got int64 of shape (4,)"),
            ("a", ("four",), "got <U4"),
            ("a", (), "expected arguments like"),
            ("a", ([four],), "expected arguments like"),
        ]
        with serve(world.bank(1, "a")) as server:
            for name, args, words in cases:
                error = server.submit(name, *args).exception(LONG)
                assert isinstance(error, jl.AdapterError)
                assert words in str(error)
                self.others_are_right(world, server)
        assert server.stats.requests == len(cases)

    def test_an_adapter_that_cannot_be_loaded(
        self, world: World, serve: Serve, shelf: Shelf
    ) -> None:
        """Whatever is raised; and it is tried again when it is asked for again."""
        shelf.adapters = world.adapters | {"odd": world.params}
        with serve(world.bank(2), shelf) as server:
            futures = [server.submit(name, world.examples[0]) for name in ("lost", "odd", "lost")]
            lost, odd, _ = (future.exception(LONG) for future in futures)
            assert isinstance(lost, KeyError)
            assert isinstance(odd, jl.AdapterError)
            assert "'odd'" in str(odd)
            shelf.adapters = world.adapters | {"lost": world.adapters["b"]}
            found = server.submit("lost", world.examples[2]).result(LONG)
            world.check(found, "b", 2)
            self.others_are_right(world, server)

    def test_an_adapter_that_does_not_fit(self, world: World, serve: Serve, shelf: Shelf) -> None:
        """One of a larger rank than the bank's, into a free slot and into one that is taken."""
        large = {
            path: jl.LoraFactors(
                np.ones((f.a.shape[0], 3)), np.ones((3, f.b.shape[1])), f.scale, f.layout
            )
            for path, f in world.adapters["a"].items()
        }
        shelf.adapters = world.adapters | {"large": jl.Adapter(large)}
        with serve(world.bank(1), shelf, max_wait=0.05) as server:
            for _ in range(2):
                futures = [server.submit(n, world.examples[5]) for n in ("large", "a", None)]
                error = futures[0].exception(LONG)
                assert isinstance(error, jl.AdapterError)
                assert "expected rank 2 at most, got 3" in str(error)
                world.check(futures[1].result(LONG), "a", 5)
                world.check(futures[2].result(LONG), None, 5)
        assert server.stats.loads == 1
        assert server.stats.evictions == 0

    def test_what_the_model_raises_reaches_its_batch(self, world: World, serve: Serve) -> None:
        def refuse(x: Any) -> Any:
            if (x == 7).any():
                raise ValueError("seven")
            return x

        def fun(params: Any, x: Any) -> Any:
            shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
            return model(params, jax.pure_callback(refuse, shape, x, vmap_method="expand_dims"))

        with serve(world.bank(1, "a"), fun=fun, max_wait=LONG) as server:
            seven = np.full(4, 7, np.float32)
            batch = [*world.examples[:3], seven]
            futures = [server.submit("a", x) for x in batch]
            assert all("seven" in str(future.exception(LONG)) for future in futures)
            assert server.stats.batches == 0
            again = [server.submit("a", world.examples[k]) for k in range(4)]
            for k, future in enumerate(again):
                world.check(future.result(LONG), "a", k)

    def test_a_model_that_cannot_be_compiled(self, world: World, serve: Serve) -> None:
        with pytest.raises(TypeError, match="dot_general"):
            serve(world.bank(1, "a"), fun=lambda params, x: x @ params["down"]["kernel"])

    def test_a_loader_that_is_none(self, world: World, serve: Serve) -> None:
        with pytest.raises(jl.ConfigError, match=r"expected load to be a function.*got str"):
            serve(world.bank(1, "a"), "adapters")

    def test_no_slot_to_load_into(self, world: World, serve: Serve, shelf: Shelf) -> None:
        with pytest.raises(jl.ConfigError, match="free slot"):
            serve(world.bank(1, "a"), shelf)

    @pytest.mark.parametrize(
        "wrong",
        [{"batch_sizes": ()}, {"batch_sizes": (0,)}, {"max_wait": float("nan")}, {"loaders": 0}],
    )
    def test_configurations_without_a_meaning(self, wrong: Any) -> None:
        with pytest.raises(jl.ConfigError, match=next(iter(wrong))):
            jl.serving.ServerConfig(**wrong)


class TestTheEnd:
    def test_closing_answers_all(self, world: World, serve: Serve, shelf: Shelf) -> None:
        """Those too whose adapter is only being loaded; and nothing comes after it."""
        shelf.gate.clear()
        server = serve(world.bank(1), shelf, max_wait=LONG)
        futures = [server.submit("abc"[k % 3], world.examples[k]) for k in range(6)]
        threading.Timer(0.05, shelf.gate.set).start()
        server.close()
        for k, future in enumerate(futures):
            world.check(future.result(0), "abc"[k % 3], k)
        with pytest.raises(RuntimeError, match="closed"):
            server.submit("a", world.examples[0])
        server.close()  # once more does nothing

    def test_an_error_cancels_what_waits(self, world: World, serve: Serve, shelf: Shelf) -> None:
        shelf.gate.clear()
        futures: list[Future[Any]] = []

        def interrupted(server: jl.serving.Server) -> None:
            with server:
                futures.extend(server.submit(name, world.examples[0]) for name in ("a", "b", None))
                raise KeyboardInterrupt

        server = serve(world.bank(2, "b"), shelf, max_wait=LONG)
        with pytest.raises(KeyboardInterrupt):
            interrupted(server)
        assert len(futures) == 3
        assert all(future.cancelled() for future in futures)
        shelf.gate.set()
        assert server.stats.requests == 0

    def test_a_request_may_be_cancelled(self, world: World, serve: Serve, shelf: Shelf) -> None:
        shelf.gate.clear()
        with serve(world.bank(1), shelf) as server:
            futures = [server.submit("a", world.examples[k]) for k in range(3)]
            assert futures[1].cancel()
            shelf.gate.set()
            for k in (0, 2):
                world.check(futures[k].result(LONG), "a", k)
        assert server.stats.requests == 2

    @pytest.mark.parametrize("name", ["a", "lost"])
    def test_a_callback_may_close(
        self, world: World, serve: Serve, shelf: Shelf, name: str
    ) -> None:
        """In the worker's thread after a result, in a loader's after an error."""
        shelf.gate.clear()
        server = serve(world.bank(1), shelf, loaders=1)
        first = server.submit(name, world.examples[0])
        second = server.submit("b", world.examples[1])
        returned = threading.Event()
        first.add_done_callback(lambda _: (server.close(), returned.set()))
        shelf.gate.set()
        assert returned.wait(LONG)
        world.check(second.result(LONG), "b", 1)
        server.close()

    def test_a_mistake_of_the_server_leaves_nobody_waiting(
        self, world: World, serve: Serve, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[Any] = []
        monkeypatch.setattr(threading, "excepthook", seen.append)
        server = serve(world.bank(1, "a"))
        monkeypatch.setattr(server, "_take", lambda: 1 / 0)
        future = server.submit("a", world.examples[0])
        assert isinstance(future.exception(LONG), ZeroDivisionError)
        server.close()
        assert [args.exc_type for args in seen] == [ZeroDivisionError]


def test_the_memory_of_a_request_may_be_reused(world: World, serve: Serve) -> None:
    buffer = world.examples[3].copy()
    with serve(world.bank(1, "a"), max_wait=LONG) as server:
        future = server.submit("a", buffer)
        buffer[:] = 9
    world.check(future.result(0), "a", 3)


def test_to_wait_for_a_full_batch(world: World, serve: Serve) -> None:
    with serve(world.bank(1, "a"), max_wait=float("inf")) as server:
        futures = [server.submit("a", world.examples[k]) for k in range(4)]
        for k, future in enumerate(futures):
            world.check(future.result(LONG), "a", k)


def test_a_loader_that_exits(world: World, serve: Serve) -> None:
    def leave(name: str) -> Any:
        raise SystemExit(name)

    with serve(world.bank(1), leave) as server:
        with pytest.raises(SystemExit, match="z"):
            server.submit("z", world.examples[0]).result(LONG)
        world.check(server.submit(None, world.examples[1]).result(LONG), None, 1)
