"""Metrics for Prometheus."""

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """The counters, histograms and gauges of one server.

    Args:
        load: Number of running sequences, and of waiting requests.
    """

    def __init__(self, load: Callable[[], tuple[int, int]]) -> None:
        self.registry = CollectorRegistry()
        options: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter(
            "controlprefix_requests", "Responses by path and status.", ["path", "status"], **options
        )
        self.prompt_tokens = Counter("controlprefix_prompt_tokens", "Prompt tokens.", **options)
        self.completion_tokens = Counter(
            "controlprefix_completion_tokens", "Generated tokens.", **options
        )
        self.first_text_s = Histogram(
            "controlprefix_first_token_seconds",
            "Seconds from request to first streamed text.",
            **options,
        )
        self.request_s = Histogram(
            "controlprefix_request_seconds", "Seconds from request to completion.", **options
        )
        running = Gauge(
            "controlprefix_running_sequences",
            "Occupied rows of the batch; requests, with vLLM.",
            **options,
        )
        running.set_function(lambda: load()[0])
        waiting = Gauge("controlprefix_waiting_requests", "Requests waiting for a row.", **options)
        waiting.set_function(lambda: load()[1])
