"""What Prometheus is told of the engine and its bank: read when somebody looks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fastprompt.serving.http.face import Engine
from fastprompt.serving.http.state import Server

Fields = Mapping[str, tuple[str, str]]  # field of the stats: its metric, what it says; names in _total are counters

ENGINE: Fields = {
    "waiting": ("requests_waiting", "Rows that wait to run."),
    "running": ("requests_running", "Rows that run."),
    "mix": ("batch_prompts", "Distinct prompts, the bare backbone included, in the last step."),
    "rows": ("batch_rows", "Rows in the last step."),
    "blocks": ("kv_blocks", "Blocks of the rows' own keys and values."),
    "blocks_free": ("kv_blocks_free", "Blocks that no row holds."),
    "blocks_shared": ("kv_blocks_cached", "Blocks kept for texts that begin alike under the same prompt."),
    "asked_tokens": ("cache_asked_tokens_total", "Tokens looked up among the kept blocks."),
    "hit_tokens": ("cache_hit_tokens_total", "Tokens found there, and so not computed."),
    "preemptions": ("preemptions_total", "Rows put back to wait for lack of blocks."),
    "steps": ("steps_total", "Batches that ran."),
    "computed_tokens": ("computed_tokens_total", "Tokens that went through the backbone."),
    "padded_tokens": ("padded_tokens_total", "Tokens that batches were as wide as."),
    "generated_tokens": ("generated_tokens_total", "Tokens answered with."),
}
BANK: Fields = {
    "loading": ("bank_loading", "Prompts on their way to the device."),
    "pinned": ("bank_pinned", "Prompts that stay on the device."),
    "leased": ("bank_leased", "Prompts that rows read now."),
}
TIER: Fields = {
    "prompts": ("bank_prompts", "Prompts in a tier."),
    "bytes": ("bank_bytes", "Bytes of prompts in a tier."),
    "budget": ("bank_budget_bytes", "Bytes a tier may hold."),
    "hits": ("bank_hits_total", "Prompts asked for and found in a tier."),
    "misses": ("bank_misses_total", "Prompts asked for and not found in a tier."),
    "evictions": ("bank_evictions_total", "Prompts that left a tier to make room."),
    "promotions": ("bank_promotions_total", "Prompts that came into a tier from the one below."),
}
DISK: Fields = {
    "loads": ("bank_disk_loads_total", "Prompts read from disk."),
    "bytes": ("bank_disk_read_bytes_total", "Bytes of prompts read from disk."),
    "failures": ("bank_failures_total", "Prompts that could not be read, compiled or taken in."),
    "seconds": ("bank_disk_seconds_total", "Time spent in reading and converting prompts."),
    "compile_seconds": ("bank_compile_seconds_total", "Time spent in turning embeddings into prefixes."),
}
LOADED: Fields = {
    "prompts": ("loaded_prompts", "Prompts in the model."),
    "bytes": ("loaded_bytes", "Bytes of their files."),
    "hits": ("loaded_hits_total", "Prompts asked for and found in the model."),
    "loads": ("loaded_loads_total", "Prompts read from disk."),
    "evictions": ("loaded_evictions_total", "Prompts that left the model to make room."),
    "failures": ("loaded_failures_total", "Prompts that could not be read."),
    "host_prompts": ("loaded_host_prompts", "Prompts kept in host memory."),
    "host_bytes": ("loaded_host_bytes", "Bytes of prompts in host memory."),
    "host_hits": ("loaded_host_hits_total", "Prompts asked for and found in host memory, not in the model."),
}


class EngineCollector:
    """The engine's stats as metrics; without any while it loads."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        server = self._server
        yield _family("ready", "Whether requests are taken.", {(): int(server.ready)})
        if not server.started:
            return
        yield _family("prompts", "Prompts that can be named.", {(): len(server.engine.registry)})
        stats = stats_of(server.engine)
        bank = stats.get("residency", {})
        for values, fields in (
            (stats, ENGINE), (bank, BANK), (bank.get("disk", {}), DISK), (stats.get("loaded", {}), LOADED),
        ):  # fmt: skip
            for field, (name, said) in fields.items():
                if field in values:
                    yield _family(name, said, {(): values[field]})
        for field, (name, said) in TIER.items():
            found = {(tier,): bank[tier].get(field) for tier in ("device", "host") if tier in bank}
            yield _family(name, said, {tier: n for tier, n in found.items() if n is not None}, ["tier"])


def stats_of(engine: Engine) -> dict[str, Any]:
    """An engine's counts by name, those of its tiers under "residency"."""
    stats = asdict(engine.stats())
    if "loaded" not in stats:  # encoders say there what is in memory
        stats["residency"] = asdict(engine.residency.stats())
    return stats


def _family(name: str, said: str, samples: Mapping[tuple[str, ...], float], labels: list[str] | None = None) -> Metric:
    made = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    family = made(f"fastprompt_{name.removesuffix('_total')}", said, labels=labels or [])
    for values, sample in samples.items():
        family.add_metric(list(values), sample)
    return family
