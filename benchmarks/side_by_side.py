"""Two or more callables measured in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def measure(what: Mapping[str, Callable[[], object]], rounds: int = 5) -> dict[str, list[float]]:
    """Seconds of each callable in each round, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in what}
    for number in range(rounds + 1):
        for name, run in what.items():
            begin = time.perf_counter()
            run()
            if number:
                times[name].append(time.perf_counter() - begin)
    return times


def ratios(times: Mapping[str, list[float]], to: str) -> dict[str, tuple[float, float, float]]:
    """Of each name: (least, median, greatest) ratio to `to`, round by round."""
    out = {}
    for name, values in times.items():
        shares = [a / b for a, b in zip(values, times[to], strict=True)]
        out[name] = (min(shares), statistics.median(shares), max(shares))
    return out


def show(times: Mapping[str, list[float]], to: str) -> None:
    """Print a row a name."""
    for name, (low, middle, high) in ratios(times, to).items():
        print(
            f"{name:28s} {statistics.median(times[name]) * 1000:10.1f} ms   {middle:6.2f} x {to}  ({low:.2f} "
            f"to {high:.2f})"
        )
