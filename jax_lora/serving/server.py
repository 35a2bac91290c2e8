"""A server of requests, each with an adapter of its own, in batches; without a network."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora.adapter import Adapter, path_of
from jax_lora.apply_bank import apply_bank
from jax_lora.bank import Bank
from jax_lora.errors import AdapterError, ConfigError, expect_callable, expect_type, near_misses
from jax_lora.serving.residents import Residents


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """How requests become batches.

    Attributes:
        batch_sizes: The sizes of a batch. Fewer requests than that are filled up. Each size is
            compiled once, at the start.
        max_wait: How many seconds a request waits at most for others to fill the largest batch;
            `math.inf` for as long as it takes, or until the server is closed.
        loaders: How many adapters are loaded at the same time, beside the batches.
    """

    batch_sizes: tuple[int, ...] = (1, 4, 16, 64)
    max_wait: float = 0.002
    loaders: int = 2

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ConfigError: Names what cannot mean anything.
        """
        sizes = self.batch_sizes
        if not sizes or any(not isinstance(n, int) or n < 1 for n in sizes):
            raise ConfigError(f"expected batch_sizes of one or more numbers from 1, got {sizes!r}")
        if not self.max_wait >= 0 or self.loaders < 1:
            raise ConfigError(
                "expected max_wait of 0 seconds or more and at least one loader, got "
                f"max_wait={self.max_wait!r}, loaders={self.loaders!r}"
            )


@dataclasses.dataclass
class Stats:
    """What a server has done.

    Attributes:
        requests: Requests that were computed.
        batches: Batches that were computed.
        padding: Examples that filled batches up.
        loads: Adapters that were put into a slot.
        evictions: Adapters that had to go for another one.
    """

    requests: int = 0
    batches: int = 0
    padding: int = 0
    loads: int = 0
    evictions: int = 0


@dataclasses.dataclass(frozen=True)
class _Request:
    """One example that waits.

    Attributes:
        name: Its adapter, or None for the base.
        leaves: Its arrays.
        future: Its result.
        arrived: When it came, by `time.monotonic`.
    """

    name: str | None
    leaves: list[np.ndarray]
    future: Future[Any]
    arrived: float


class Server:
    """Compute requests for many adapters of one base in common batches.

    Requests come from any thread and are one example each. They are gathered into batches of fixed
    sizes, for which everything is compiled at the start; nothing is compiled afterwards. Adapters
    that are not in the bank are loaded when they are asked for, beside the batches, and take the
    slot of the least recently used one that the batch at hand does not need. What is wrong with a
    request, or with its adapter, is the error of that request alone.

    It lives in this process and opens no port. Use it in a ``with`` statement, or call `close`.

    Args:
        fun: A function of parameters and batches, such as Flax's ``model.apply``; see `apply_bank`.
        params: The base parameters, on the device.
        bank: The bank, which belongs to the server from now on. The adapters in it stay in it.
        *example: The arguments of one request, without the axis of the batch: arrays, or trees of
            them, of which the shapes and dtypes count.
        load: What loads an adapter by its name, such as an `AdapterFolder`; it is called in threads
            of its own. Without it, there are those in the bank.
        config: How requests become batches.

    Raises:
        ConfigError: There is ``load``, but no slot that is free; or it is no function.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, jax_lora as jl
        >>> model = lambda params, x: x @ params["w"]
        >>> params, x = {"w": jnp.ones((4, 3))}, np.ones(4, np.float32)
        >>> plan = jl.plan(model, params, x[None], config=jl.LoraConfig(rank=2))
        >>> french = jl.init(jax.random.key(0), params, plan)
        >>> bank = jl.Bank.empty(french, slots=8).add("french", french)
        >>> with jl.serving.Server(model, params, bank, x) as server:
        ...     futures = [server.submit(name, x) for name in ("french", None)]
        ...     print([future.result().tolist() for future in futures])
        [[4.0, 4.0, 4.0], [4.0, 4.0, 4.0]]
    """

    def __init__(
        self,
        fun: Callable[..., Any],
        params: Any,
        bank: Bank,
        *example: Any,
        load: Callable[[str], Adapter] | None = None,
        config: ServerConfig | None = None,
    ):
        expect_type("a bank", bank, Bank)
        if load is not None:
            expect_callable("load to be a function from a name to its adapter", load)
        self._config = ServerConfig() if config is None else config
        self._residents = Residents(bank)
        if load is not None and not self._residents.lendable:
            raise ConfigError(
                f"expected a free slot to load adapters into, got {bank!r}; make it with more slots"
            )
        self._sizes = sorted(set(self._config.batch_sizes))
        leaves, self._treedef = jax.tree.flatten(example)
        self._expected = [x if hasattr(x, "shape") else np.asarray(x) for x in leaves]
        self._load, self._params = load, jax.tree.map(_on_device, params)
        run = jax.jit(apply_bank(fun))
        # Programs, and not functions: the worker's thread has none of this thread's contexts, such
        # as a precision or a mesh, and would compile anew.
        self._programs = {
            size: run.lower(self._params, bank, *self._filled(size, [])).compile()
            for size in self._sizes
        }
        self._stats = Stats()

        # All of these change under the lock alone.
        self._changed = threading.Condition()
        self._closed = False
        self._ready: deque[_Request] = deque()
        self._waiting: dict[str, list[_Request]] = {}  # for their adapter to be loaded
        self._loaded: dict[str, Adapter] = {}  # for a slot

        # A daemon, so that a server that nobody closes keeps no process alive.
        self._worker = threading.Thread(target=self._work, name="jax_lora-server", daemon=True)
        self._threads = {self._worker}  # in which the callbacks of futures run
        self._loaders = ThreadPoolExecutor(
            self._config.loaders,
            "jax_lora-loader",
            initializer=lambda: self._threads.add(threading.current_thread()),
        )
        self._worker.start()

    def submit(self, name: str | None, *args: Any) -> Future[Any]:
        """Ask for one example to be computed.

        Args:
            name: The adapter, or None for the plain base.
            *args: The arguments, of the shapes and dtypes of the server's example.

        Returns:
            A future of the outputs for this example, as numpy arrays. Its exception is an
            `AdapterError` if there is no such adapter, it does not fit, or the arguments are others
            than expected; or whatever loading the adapter or running the batch raises.

        Raises:
            RuntimeError: The server is closed.
        """
        future: Future[Any] = Future()
        try:
            leaves = self._checked(args)
            if not isinstance(name, str | None):
                raise AdapterError(f"expected an adapter's name or None, got {name!r}")
            if self._load is None and name is not None and name not in self._residents:
                near = near_misses(str(name), self._residents.permanent)
                raise AdapterError(f"no adapter {name!r} in the bank ({near})")
        except AdapterError as error:
            future.set_exception(error)
            return future
        with self._changed:
            if self._closed:
                raise RuntimeError("expected an open server, got one that is closed")
            self._enter(_Request(name, leaves, future, time.monotonic()))
            self._changed.notify()
        return future

    @property
    def stats(self) -> Stats:
        """What it has done so far."""
        return dataclasses.replace(self._stats)

    def close(self, *, cancel: bool = False) -> None:
        """Take no more requests, and return when all are answered; at once in a future's callback.

        Args:
            cancel: Cancel the requests that no batch has yet.
        """
        with self._changed:
            self._closed = True
            left = self._leave_all() if cancel else []
            self._changed.notify()
        for request in left:
            request.future.cancel()
        if threading.current_thread() not in self._threads:
            self._worker.join()
            self._loaders.shutdown(wait=not cancel, cancel_futures=cancel)

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close it; after an error, without computing what still waits."""
        self.close(cancel=error is not None)

    def _checked(self, args: tuple[Any, ...]) -> list[np.ndarray]:
        """The arrays of a request.

        Raises:
            AdapterError: Names everything that is not as in the example.
        """
        found, treedef = jax.tree_util.tree_flatten_with_path(args)
        expected: Any = self._treedef
        if treedef != expected:
            raise AdapterError(f"expected arguments like {expected}, got {treedef}")
        leaves, problems = [], []
        for (key_path, leaf), expected in zip(found, self._expected, strict=True):
            try:
                # A copy, as the caller may reuse the memory before the batch is computed.
                array = np.array(leaf)
            except Exception as error:
                raise AdapterError(f"argument {path_of(key_path)}: no array, {error}") from error
            if (array.shape, array.dtype) != (tuple(expected.shape), expected.dtype):
                problems.append(
                    f"argument {path_of(key_path)}: expected {expected.dtype} of shape "
                    f"{tuple(expected.shape)}, got {array.dtype} of shape {array.shape}"
                )
            leaves.append(array)
        if problems:
            raise AdapterError("; ".join(problems))
        return leaves

    def _enter(self, request: _Request) -> None:
        """Let a request wait for a batch, or else for its adapter. Under the lock."""
        name = request.name
        if name is None or name in self._residents or name in self._loaded:
            self._ready.append(request)
        elif name in self._waiting:
            self._waiting[name].append(request)
        else:
            self._waiting[name] = [request]
            self._loaders.submit(self._fetch, name)

    def _leave_all(self) -> list[_Request]:
        """All requests that no batch has yet, which wait no longer. Under the lock."""
        left = [*self._ready, *(r for requests in self._waiting.values() for r in requests)]
        self._ready.clear()
        self._waiting.clear()
        return left

    def _fetch(self, name: str) -> None:
        """Load an adapter for those that wait for it. In a thread of the loaders."""
        assert self._load is not None
        failure: BaseException | None = None
        try:
            adapter = self._load(name)
            expect_type(f"an adapter from load({name!r})", adapter, Adapter)
        except BaseException as error:  # whatever it is, it concerns these requests alone
            failure = error
        with self._changed:
            requests = self._waiting.pop(name, [])
            if failure is None and requests:
                self._loaded[name] = adapter
                self._ready.extend(requests)
            self._changed.notify()
        if failure is not None:
            _fail(requests, failure)

    def _work(self) -> None:
        """Compute batches until there is nothing more to come. The worker's thread."""
        batch: list[_Request] | None = []
        try:
            while (batch := self._next_batch()) is not None:
                self._compute(self._placed(batch))
        except BaseException as error:  # a mistake of ours; nobody shall wait for ever
            with self._changed:
                self._closed = True
                left = [*(batch or []), *self._leave_all()]
            _fail((request for request in left if not request.future.done()), error)
            raise
        finally:
            self._loaders.shutdown(wait=False)

    def _next_batch(self) -> list[_Request] | None:
        """The requests of the next batch, when it is time; None when there will be none."""
        with self._changed:
            while True:
                if self._ready:
                    wait = self._ready[0].arrived + self._config.max_wait - time.monotonic()
                    if wait <= 0 or self._closed or len(self._ready) >= self._sizes[-1]:
                        return self._take()
                    self._changed.wait(min(wait, threading.TIMEOUT_MAX))
                elif self._closed and not self._waiting:
                    return None
                else:
                    self._changed.wait()

    def _take(self) -> list[_Request]:
        """Requests in order, as many as the largest batch has, and as there are slots for."""
        batch: list[_Request] = []
        lent: set[str] = set()
        postponed: list[_Request] = []
        while self._ready and len(batch) < self._sizes[-1]:
            request = self._ready.popleft()
            name = request.name
            if name is not None and name not in self._residents.permanent:
                if name not in self._residents and name not in self._loaded:
                    self._enter(request)  # it had to go for another one in the meantime
                    continue
                if name not in lent and len(lent) == self._residents.lendable:
                    postponed.append(request)
                    continue
                lent.add(name)
            batch.append(request)
        self._ready.extendleft(reversed(postponed))
        return batch

    def _placed(self, batch: list[_Request]) -> list[_Request]:
        """The requests of a batch whose adapters are in the bank, as they all should be now."""
        names = {request.name for request in batch if request.name is not None}
        for name in names:
            if name in self._residents:
                continue
            with self._changed:
                adapter = self._loaded.pop(name)
            try:
                self._stats.evictions += self._residents.lend(name, adapter, names)
                self._stats.loads += 1
            except Exception as error:  # it does not fit
                _fail((r for r in batch if r.name == name), error)
                batch = [r for r in batch if r.name != name]
        return batch

    def _compute(self, batch: list[_Request]) -> None:
        batch = [r for r in batch if r.future.set_running_or_notify_cancel()]
        if not batch:
            return
        size = next(n for n in self._sizes if n >= len(batch))
        try:
            outputs = self._computed(size, batch)
        except Exception as error:
            _fail(batch, error)
            return
        self._stats.requests += len(batch)
        self._stats.batches += 1
        self._stats.padding += size - len(batch)
        for k, request in enumerate(batch):
            own = [np.array(output[k]) for output in outputs[0]]
            request.future.set_result(jax.tree.unflatten(outputs[1], own))

    def _computed(self, size: int, batch: list[_Request]) -> tuple[list[np.ndarray], Any]:
        """The outputs for a batch, and their structure."""
        inputs = self._filled(size, batch)
        out = self._programs[size](self._params, self._residents.bank, *inputs)
        leaves, structure = jax.tree.flatten(out)
        return [np.asarray(leaf) for leaf in leaves], structure

    def _filled(self, size: int, batch: list[_Request]) -> tuple[Any, ...]:
        """The ids and the arguments of a batch, filled up with zeros for the base."""
        names = [request.name for request in batch] + [None] * (size - len(batch))
        arrays = [np.zeros((size, *x.shape), x.dtype) for x in self._expected]
        for k, request in enumerate(batch):
            for array, own in zip(arrays, request.leaves, strict=True):
                array[k] = own
        return self._residents.ids(names), *jax.tree.unflatten(self._treedef, arrays)


def _fail(requests: Iterable[_Request], error: BaseException) -> None:
    for request in requests:
        future = request.future
        if future.running() or future.set_running_or_notify_cancel():
            future.set_exception(error)


def _on_device(leaf: Any) -> Any:
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf
