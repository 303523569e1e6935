"""What the parts of the gateway share: keys, sessions, the way upstream, and how things stand."""

from dataclasses import dataclass, field
from typing import Literal

from attending.engine.api import RequestError
from attending.gateway.keys import SESSION_SECONDS, TOKEN_SECONDS, Keys, Tickets
from attending.gateway.metrics import Metrics
from attending.gateway.upstream import Upstream

Phase = Literal["starting", "ready", "draining", "engine down"]


@dataclass(slots=True)
class Status:
    """How things stand."""

    phase: Phase = "starting"
    in_flight: int = 0

    def check(self) -> None:
        """Raise RequestError unless requests can be answered."""
        if self.phase != "ready":
            raise refusal(503, f"the server is not ready ({self.phase}): ask again soon.", after=5)


@dataclass(slots=True)
class House:
    """One gateway."""

    keys: Keys
    upstream: Upstream
    hosts: tuple[str, ...] = ()
    """Names under which it is reached, beside those of loopback."""
    max_body_bytes: int = 10_000_000
    tokens: Tickets = field(default_factory=lambda: Tickets(TOKEN_SECONDS, 16))
    sessions: Tickets = field(default_factory=lambda: Tickets(SESSION_SECONDS, 1000))
    metrics: Metrics = field(default_factory=Metrics)
    status: Status = field(default_factory=Status)


def refusal(
    status: int, message: str, code: str | None = None, after: int | None = None
) -> RequestError:
    """An error with the seconds `after` which to ask again."""
    return RequestError(message, status=status, code=code, after=after)
