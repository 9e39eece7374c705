"""What a residency has done and holds, tier by tier."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TierStats:
    """One tier at one moment; counts are from the start.

    `hits` and `misses` count leases whose prompt was there or was not; `promotions` prompts that came in from
    the tier below, `evictions` those that left for want of room. `budget` is None where there is no limit.
    """

    prompts: int
    bytes: int
    budget: int | None
    hits: int
    misses: int
    promotions: int
    evictions: int


@dataclass(frozen=True)
class DiskStats:
    """The registry's prompts and what was read of them.

    `failures` counts prompts that could not be read, compiled or taken in; `seconds` is time spent in reading and
    converting, `compile_seconds` in turning embedding prompts into prefixes.
    """

    prompts: int
    loads: int
    bytes: int
    failures: int
    seconds: float
    compile_seconds: float


@dataclass(frozen=True)
class ResidencyStats:
    """All tiers; `loading` prompts are on their way, `pinned` names stay on the device, `leased`
    versions are in use."""

    device: TierStats
    host: TierStats
    disk: DiskStats
    loading: int
    pinned: int
    leased: int


@dataclass(frozen=True)
class LoadedStats:
    """An encoder's prompts in the model and beside it, and counts from the start.

    `bytes` are of the files of those in the model; `hits` found theirs there, `host_hits` in host memory, and `loads`
    read it from disk.
    """

    prompts: int
    bytes: int
    max_prompts: int
    max_bytes: int
    hits: int
    loads: int
    evictions: int
    failures: int
    host_prompts: int
    host_bytes: int
    host_hits: int


@dataclass
class Counts:
    """The running counts behind `ResidencyStats`."""

    device_hits: int = 0
    promotions: int = 0
    host_hits: int = 0
    host_misses: int = 0
    loads: int = 0
    bytes_read: int = 0
    failures: int = 0
    read_seconds: float = 0.0
    compile_seconds: float = 0.0
