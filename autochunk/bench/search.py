"""Search: the largest size that still fits, by doubling and bisecting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

FITS, TOO_LARGE, FAILED = "fits", "does not fit", "failed"


@dataclass(frozen=True)
class Probe:
    """One size that was tried.

    Attributes:
        size: The size.
        outcome: ``fits``, ``does not fit`` or ``failed``.
        reason: How it did not fit, or why it failed; what the method said where it fits.
        seconds: What trying took.
    """

    size: int
    outcome: str
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        largest: The largest size seen to fit; 0 if none did.
        too_large: The smallest size seen not to fit; None if all sizes up to the maximum fit.
        failure: What ended the search early, or nothing.
        probes: All tries in order.
    """

    largest: int
    too_large: int | None
    failure: str
    probes: tuple[Probe, ...]


def search(probe: Callable[[int], Probe], start: int, granularity: int, maximum: int) -> Found:
    """Doubles a size until it does not fit, then bisects.

    It assumes that all sizes below one that fits do as well. A probe that fails for any other
    reason than memory ends the search, with the largest size so far.

    Args:
        probe: Tries a size.
        start: The first size, rounded down to a multiple of ``granularity`` (up to one of it).
        granularity: Sizes are multiples of it; the search ends when ``largest`` and ``too_large``
            are this far apart.
        maximum: No size above it is tried; at least ``granularity``.
    """
    probes: list[Probe] = []
    fits, too_large = 0, None
    maximum -= maximum % granularity
    size = min(max(start // granularity, 1) * granularity, maximum)
    while True:
        tried = probe(size)
        probes.append(tried)
        if tried.outcome == FAILED:
            failure = f"at {size}: {tried.reason}"
            return Found(fits, too_large, failure, tuple(probes))
        if tried.outcome == FITS:
            fits = size
        else:
            too_large = size
        if too_large is None:
            if fits >= maximum:
                break
            size = min(2 * size, maximum)
        else:
            if too_large - fits <= granularity:
                break
            size = (fits + too_large) // granularity // 2 * granularity
    return Found(fits, too_large, "", tuple(probes))
