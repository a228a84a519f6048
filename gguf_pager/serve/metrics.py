"""Prometheus metrics, by the official client: with vLLM's and llama.cpp's names where they mean the same."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from gguf_pager.memory import probe
from gguf_pager.serve.answers import Answer
from gguf_pager.serve.batcher import Batcher, Load, Totals
from gguf_pager.serve.joules import Joules

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5)

_HISTOGRAMS = (
    ("vllm:time_to_first_token_seconds", "From a request to its first token.", _SECONDS),
    ("vllm:time_per_output_token_seconds", "Between two tokens of an answer.", _PER_TOKEN),
    ("vllm:request_queue_time_seconds", "From a request to its place in a batch.", _SECONDS),
    ("vllm:e2e_request_latency_seconds", "From a request to its last token.", _SECONDS),
)

Metric = CounterMetricFamily | GaugeMetricFamily


class Metrics:
    """What `/metrics` shows. Counters are read where they are counted, when somebody asks.

    Attributes:
        joules: what is drawn since the start.
    """

    def __init__(self, batcher: Batcher, model: str) -> None:
        pager = batcher.llm.pager
        self.joules = Joules(lambda: None if pager is None else pager.stats().bytes_read)
        self._registry = CollectorRegistry()
        self._registry.register(_Counters(batcher, model, self.joules))
        self._first, self._each, self._queue, self._whole = (
            Histogram(name, text, ("model_name",), registry=self._registry, buckets=buckets).labels(model)
            for name, text, buckets in _HISTOGRAMS)
        batcher.on_end.append(self._note)

    def _note(self, answer: Answer) -> None:
        if answer.begun_s is not None:
            self._queue.observe(answer.begun_s - answer.asked_s)
        if answer.first_s is None or answer.last_s is None:
            return
        self._first.observe(answer.first_s - answer.asked_s)
        self._whole.observe(answer.last_s - answer.asked_s)
        if answer.n_generated > 1:
            self._each.observe((answer.last_s - answer.first_s) / (answer.n_generated - 1))

    def text(self) -> bytes:
        """Return the metrics in Prometheus's text format."""
        return generate_latest(self._registry)


class _Counters(Collector):
    def __init__(self, batcher: Batcher, model: str, joules: Joules) -> None:
        self._batcher, self._model, self._joules = batcher, model, joules

    def collect(self) -> Iterator[Metric]:
        """Yield the state of everything that is counted elsewhere."""
        totals, load = self._batcher.totals, self._batcher.load()
        yield self._counter("vllm:prompt_tokens", "Tokens of prompts, also those that were known.",
                            totals.prompt_tokens + totals.cached_tokens)
        yield self._counter("vllm:generation_tokens", "Tokens of answers.", totals.generated_tokens)
        yield self._counter("gguf_pager_prompt_tokens_cached", "Tokens of prompts that were not computed again.", totals.cached_tokens)
        yield self._counter("gguf_pager_batches", "Batches that were computed.", totals.batches)
        yield self._counter("gguf_pager_batch_tokens", "Tokens in those batches.", totals.batch_tokens)
        yield self._counter("gguf_pager_computing_seconds", "Time in llama_decode.", totals.computing_s)
        yield self._counter("gguf_pager_answers", "Answers that came to their end.", totals.answers)
        yield self._counter("gguf_pager_answers_failed", "Answers that were ended by an error.", totals.failures)
        yield self._counter("gguf_pager_answers_given_up", "Answers whose client had gone.", totals.given_up)
        yield self._gauge("vllm:num_requests_running", "Answers being computed.", load.n_running)
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait for a sequence.", load.n_waiting)
        yield self._gauge("gguf_pager_sequences", "Answers that can be computed at once.", load.n_sequences)
        held = sum(sequence.n_ids for sequence in self._batcher.sequences)
        yield self._gauge("vllm:kv_cache_usage_perc", "Part of the cache that holds tokens, 0 to 1.",
                          held / (self._batcher.n_ctx * load.n_sequences))
        yield self._gauge("process_resident_memory_bytes", "Resident memory of this process.",
                          probe.process_memory().resident_bytes)
        yield from self._as_llama_server(totals, load)
        yield from self._energy()
        yield from self._paging()

    @staticmethod
    def _as_llama_server(totals: Totals, load: Load) -> Iterator[Metric]:
        """Under the names of llama.cpp's server and without labels, as it has them, for what reads those."""
        yield CounterMetricFamily("llamacpp:prompt_tokens", "Tokens of prompts that were computed.", totals.prompt_tokens)
        yield CounterMetricFamily("llamacpp:tokens_predicted", "Tokens of answers.", totals.generated_tokens)
        yield CounterMetricFamily("llamacpp:n_decode", "Batches that were computed.", totals.batches)
        yield GaugeMetricFamily("llamacpp:requests_processing", "Answers being computed.", load.n_running)
        yield GaugeMetricFamily("llamacpp:requests_deferred", "Requests that wait for a sequence.", load.n_waiting)

    def _energy(self) -> Iterator[Metric]:
        drawn = self._joules.now()
        if drawn.joules is None:
            return
        found = CounterMetricFamily("gguf_pager_joules", "Energy since the start, idle time included: measured, of a part of the "
                                    "machine (partial), or modelled.", labels=("model_name", "status"))
        found.add_metric((self._model, drawn.status), drawn.joules)
        yield found

    def _paging(self) -> Iterator[Metric]:
        pager = self._batcher.llm.pager
        if pager is None:
            return
        stats = pager.stats()
        yield self._counter("gguf_pager_expert_hits", "Experts of a batch that were in memory.", stats.hits)
        yield self._counter("gguf_pager_expert_misses", "Experts of a batch that had to be read.", stats.misses)
        yield self._counter("gguf_pager_expert_evictions", "Experts that gave up their slot.", stats.evictions)
        yield self._counter("gguf_pager_read_bytes", "Bytes of experts read.", stats.bytes_read)
        yield self._counter("gguf_pager_wasted_bytes", "Bytes of those that were read ahead in vain.", stats.bytes_wasted)
        yield self._counter("gguf_pager_foreseen_misses", "Misses that had begun to be read before they were chosen.", stats.foreseen)
        yield self._counter("gguf_pager_reads_in_vain", "Experts that were read so, and not chosen.", stats.in_vain)
        yield self._counter("gguf_pager_stall_seconds", "Time that computing waited for reads.", stats.stall_ns / 1e9)
        yield self._gauge("gguf_pager_arena_bytes", "Memory for experts.", stats.arena_bytes)
        yield self._gauge("gguf_pager_resident_expert_bytes", "Experts in it.", stats.resident_bytes)

    def _counter(self, name: str, text: str, value: float) -> CounterMetricFamily:
        found = CounterMetricFamily(name, text, labels=("model_name",))
        found.add_metric((self._model,), value)
        return found

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        found = GaugeMetricFamily(name, text, labels=("model_name",))
        found.add_metric((self._model,), value)
        return found
