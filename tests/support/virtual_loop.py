"""An event loop and a thread pool on a virtual clock, so that simulations take no time and repeat exactly."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from concurrent import futures
from typing import Any


class JumpingSelector(selectors.SelectSelector):
    """A selector that advances the clock instead of waiting. ``before_jump`` is called before each advance."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.before_jump: Callable[[], None] = lambda: None

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        self.before_jump()
        assert timeout is not None, "all tasks wait for ever"
        self.now += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer as soon as no callback is left to run."""

    def __init__(self) -> None:
        self.selector = JumpingSelector()
        self.on_advance: Callable[[float, float], None] = lambda before, after: None
        super().__init__(self.selector)

    def time(self) -> float:
        return self.selector.now

    def advance(self, seconds: float) -> None:
        """Advance the clock within a callback, as a computation on the event loop does."""
        before = self.selector.now
        self.selector.now += seconds
        self.on_advance(before, self.selector.now)


class VirtualPool(futures.Executor):
    """A pool of one thread. A job ends ``seconds()`` after its start, and its function runs at the end."""

    def __init__(self, loop: VirtualLoop, seconds: Callable[[], float]) -> None:
        self._loop, self._seconds = loop, seconds
        self.busy = False

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> futures.Future[Any]:
        assert not self.busy, "the thread has one job at a time"
        self.busy = True
        future: futures.Future[Any] = futures.Future()
        future.set_running_or_notify_cancel()
        self._loop.call_later(self._seconds(), self._end, future, lambda: function(*args, **kwargs))
        return future

    def _end(self, future: futures.Future[Any], function: Callable[[], Any]) -> None:
        try:
            result = function()
        except Exception as error:
            self.busy = False
            future.set_exception(error)
        else:
            self.busy = False
            future.set_result(result)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None: ...
