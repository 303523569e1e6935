"""The loop that steps the scheduler, and the way in and out of it for an event loop's thread."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from attending.engine.api import RequestError
from attending.engine.scheduler import Output, Request, Scheduler

Deliver = Callable[[Output], None]


@dataclass(eq=False, slots=True)
class Ticket:
    """A request on its way through the worker."""

    request: Request
    deliver: Deliver
    start: float
    handle: int = 0
    """Given by the scheduler; 0 before."""
    is_over: bool = False


class Worker:
    """Steps a scheduler while there is work; sleeps otherwise."""

    def __init__(self, scheduler: Scheduler, *, max_open: int) -> None:
        """`max_open`: most requests running and waiting."""
        self._scheduler, self._max_open = scheduler, max_open
        self.post: Callable[[Callable[[], None]], object] = lambda call: call()
        """Runs a function in the event loop's thread: set it to `loop.call_soon_threadsafe`."""
        self._open: set[Ticket] = set()
        self._orders: deque[tuple[str, Ticket]] = deque()
        self._bell = threading.Event()
        self._tickets: dict[int, Ticket] = {}
        self._seconds = 1.0  # a smoothed request's duration
        self._is_closed = False

    def submit(self, requests: Sequence[Request], deliver: Sequence[Deliver]) -> list[Ticket]:
        """Queue some requests, all or none; call this and `cancel` from the event loop.

        Raises:
            RequestError: 429, there is no room for all of them.
            ContextError: A prompt does not fit.
            UsageError: Ids that the vocabulary does not have.
        """
        for request in requests:
            self._scheduler.check(request)
        if len(self._open) + len(requests) > self._max_open:
            waits = self._seconds * len(self._open) / self._max_open
            after = min(60, max(1, round(waits)))
            message = f"too many requests are waiting; try again in about {after} s."
            raise RequestError(message, status=429, code="queue_full", after=after)
        now = time.monotonic()
        pairs = zip(requests, deliver, strict=True)
        tickets = [Ticket(request, receiver, now) for request, receiver in pairs]
        self._open.update(tickets)
        self._orders.extend(("submit", ticket) for ticket in tickets)
        self._bell.set()
        return tickets

    def cancel(self, ticket: Ticket) -> None:
        """Forget a request; nothing more is delivered for it."""
        if not ticket.is_over:
            self._end(ticket)
            self._orders.append(("cancel", ticket))
            self._bell.set()

    def close(self) -> None:
        """Let `run` return after the step under way."""
        self._is_closed = True
        self._bell.set()

    def run(self) -> None:
        """Step until closed, in the thread that loaded the model.

        In that one and no other: OpenMP keeps threads for every thread that computes, and with
        more of them than cores all of them wait longer.
        """
        while not self._is_closed:
            self._bell.clear()
            while self._orders:
                self._obey(*self._orders.popleft())
            outputs = self._scheduler.step()
            if outputs:
                found = [(self._tickets[output.handle], output) for output in outputs]
                for output in outputs:
                    if output.finish or output.error:
                        del self._tickets[output.handle]
                try:
                    self.post(partial(self._hand_out, found))
                except RuntimeError:  # the loop has ended, and with it whoever waited
                    return
            elif not self._scheduler.num_running:
                self._bell.wait()

    def _end(self, ticket: Ticket) -> None:
        ticket.is_over = True
        self._open.discard(ticket)

    def _obey(self, order: str, ticket: Ticket) -> None:
        """What the other thread asked for."""
        if order == "submit":
            ticket.handle = self._scheduler.submit(ticket.request)
            self._tickets[ticket.handle] = ticket
        elif self._tickets.pop(ticket.handle, None):
            self._scheduler.cancel(ticket.handle)

    def _hand_out(self, found: list[tuple[Ticket, Output]]) -> None:
        for ticket, output in found:
            if ticket.is_over:
                continue
            if output.finish or output.error:
                self._seconds += (time.monotonic() - ticket.start - self._seconds) / 8
                self._end(ticket)
            ticket.deliver(output)
