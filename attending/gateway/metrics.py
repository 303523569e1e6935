"""Counts and times for Prometheus; every app has a registry of its own."""

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
KINDS = ("prompt", "output", "cached")


class Metrics:
    """All names begin with `attending_`; the engine's own begin with `attending_engine_`."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        by = ["route", "status"]
        self.requests = Counter("attending_requests", "Requests answered.", by, registry=own)
        self.in_flight = Gauge("attending_in_flight", "Requests under way.", registry=own)
        self.cancelled = Counter("attending_cancelled", "Clients that went away.", registry=own)
        self.restarts = Counter("attending_engine_restarts", "Engine restarts.", registry=own)
        self.tokens = {
            kind: Counter(f"attending_{kind}_tokens", f"{kind.title()} tokens.", registry=own)
            for kind in KINDS
        }
        self.seconds, self.first, self.each = (
            Histogram(f"attending_{name}_seconds", text, labels, registry=own, buckets=SECONDS)
            for name, text, labels in (
                ("request", "From request to end of answer.", ["route"]),
                ("time_to_first_token", "Of streamed answers.", []),
                ("time_per_output_token", "Of streamed answers, after the first.", []),
            )
        )

    def answered(self, route: str, status: int, seconds: float) -> None:
        """A request has ended."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def text(self, in_flight: int) -> str:
        """In Prometheus' text form."""
        self.in_flight.set(in_flight)
        return generate_latest(self.registry).decode()


class Meter:
    """Follows one answer."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._began = metrics, time.perf_counter()
        self._first = self._last = 0.0
        self.has_ended = False
        """Whether the answer came to an end, be it by an error."""

    def see(self, event: dict[str, Any]) -> None:
        """An event of a stream, or a whole answer."""
        if any(_has_words(choice) for choice in event.get("choices") or ()):
            self._last = time.perf_counter()
            if not self._first:
                self._first = self._last
                self._metrics.first.observe(self._first - self._began)
        if isinstance(usage := event.get("usage"), dict):
            self._count(usage)

    def _count(self, usage: dict[str, Any]) -> None:
        details = usage.get("prompt_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, dict) else 0
        counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"), cached)
        for kind, count in zip(KINDS, counts, strict=True):
            if isinstance(count, int) and count > 0:
                self._metrics.tokens[kind].inc(count)
        if isinstance(counts[1], int) and counts[1] > 1 and self._last > self._first:
            self._metrics.each.observe((self._last - self._first) / (counts[1] - 1))


def _has_words(choice: Any) -> bool:
    """A whole answer's choice has a message instead: when its first token came is not known."""
    if not isinstance(choice, dict) or "message" in choice:
        return False
    delta = choice.get("delta")
    parts = delta if isinstance(delta, dict) else choice
    names = ("content", "reasoning_content", "tool_calls", "text")
    return any(parts.get(name) for name in names)
