"""Prometheus metrics of one app, counted as requests come to their end."""

from __future__ import annotations

from collections import deque
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from starlette.types import Scope

from fastprompt.serving.http.face import Finished

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE"})
RECENT = 1024  # finished requests that the quantiles of /v1/stats are taken over


class Metrics:
    """The metrics of an app: a `CollectorRegistry` of its own, labels only where their values are few.

    No label names a prompt or a key, of which there may be 100,000. Numbers by prompt are in /v1/stats.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._recent: deque[Finished] = deque(maxlen=RECENT)
        own: dict[str, Any] = {"namespace": "fastprompt", "registry": self.registry}
        timed = own | {"buckets": SECONDS}
        self._http = Counter("http_requests", "Answers by route and status.", ["method", "route", "status"], **own)
        self._http_seconds = Histogram("http_first_byte_seconds", "Time until an answer began.", ["route"], **timed)
        self._ended = Counter("requests", "Requests that came to their end, by its reason.", ["reason"], **own)
        self._text = Counter("text_tokens", "Tokens of the texts that came, the virtual ones not counted.", **own)
        self._first = Histogram("time_to_first_token_seconds", "Time from a request to its first token.", **timed)
        self._seconds = Histogram("request_seconds", "Time from a request to its end.", **timed)

    def answered(self, scope: Scope, status: int, seconds: float) -> None:
        """Count an answer under its route's pattern, never under what stood in the path."""
        route = getattr(scope.get("route"), "path", "none")
        method = scope["method"] if scope["method"] in METHODS else "other"
        self._http.labels(method, route, str(status)).inc()
        self._http_seconds.labels(route).observe(seconds)

    def finished(self, finished: Finished) -> None:
        """Count a request that the engine has come to the end of."""
        self._recent.append(finished)
        self._ended.labels(finished.finish_reason).inc()
        self._text.inc(finished.prompt_tokens)
        self._seconds.observe(finished.seconds)
        if finished.time_to_first_token is not None:
            self._first.observe(finished.time_to_first_token)

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)

    def recent(self) -> dict[str, Any]:
        """Quantiles over the last requests, in seconds."""
        first = sorted(f.time_to_first_token for f in self._recent if f.time_to_first_token is not None)
        whole = sorted(f.seconds for f in self._recent)
        return {
            "requests": len(self._recent),
            "time_to_first_token": _quantiles(first),
            "seconds": _quantiles(whole),
        }


def _quantiles(ordered: list[float]) -> dict[str, float | None]:
    points = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    return {n: ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else None for n, q in points.items()}
