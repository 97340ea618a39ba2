"""What the server counts, in Prometheus' format."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from qlora.inference.batcher import Batcher

BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # seconds


class ServerMetrics:
    """The metrics of one server.

    Args:
        batcher: whose running and waiting requests are counted.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, batcher: Batcher):
        self.registry = CollectorRegistry()
        shared: dict[str, Any] = {"namespace": "chatglm", "registry": self.registry}
        self.requests = Counter("requests", "Requests by their end.", ["model", "outcome"], **shared)
        self.refused = Counter("refused_requests", "Requests that were not answered.", ["status"], **shared)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of the prompts.", ["model"], **shared)
        self.new_tokens = Counter("generated_tokens", "Tokens of the answers.", ["model"], **shared)
        self.first_token = Histogram(
            "time_to_first_token_seconds", "From a request to the first token.", buckets=BUCKETS, **shared
        )
        self.duration = Histogram("request_seconds", "From a request to its end.", buckets=BUCKETS, **shared)
        slots = Gauge("slots", "Answers that can be generated at a time.", **shared)
        slots.set(batcher.slots.count)
        running = Gauge("running_requests", "Answers in generation.", **shared)
        running.set_function(lambda: len(batcher.running))
        waiting = Gauge("waiting_requests", "Requests that wait for a slot.", **shared)
        waiting.set_function(lambda: len(batcher.waiting))

    def text(self) -> bytes:
        """All metrics."""
        return generate_latest(self.registry)

    @contextlib.contextmanager
    def observe(self, model: str, prompt_tokens: int) -> Iterator["Observation"]:
        """Counts a request when it ends, however it ends."""
        observation = Observation(self)
        try:
            yield observation
        except Exception:
            observation.outcome = "failed"
            raise
        finally:
            self.requests.labels(model, observation.outcome).inc()
            self.prompt_tokens.labels(model).inc(prompt_tokens)
            self.new_tokens.labels(model).inc(observation.count)
            self.duration.observe(time.perf_counter() - observation.started)


class Observation:
    """A request that is being answered."""

    def __init__(self, metrics: ServerMetrics):
        self.metrics, self.started, self.count, self.outcome = metrics, time.perf_counter(), 0, "cancelled"

    def received(self, count: int):
        """Notes that the answer has `count` tokens now."""
        if not self.count:
            self.metrics.first_token.observe(time.perf_counter() - self.started)
        self.count = count
