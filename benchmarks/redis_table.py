"""What redis-benchmark prints with ``--csv``."""

from __future__ import annotations

import csv
import io
import math


def read_table(output: str) -> tuple[float, float, float] | None:
    """Requests a second, and the 50th and 99th percentile in microseconds.

    None where redis-benchmark is older than 6.2: it names no columns, and has no percentiles.
    `RuntimeError` if this is no table at all.
    """
    start = output.find('"test"')
    if start < 0 and '"PING_INLINE"' in output:
        return None
    try:
        # What it says before (that there is no CONFIG) is no part of the table.
        (row,) = csv.DictReader(io.StringIO(output[start:] if start >= 0 else ""))
        rate = float(row["rps"])
        p50, p99 = (float(row[f"{name}_latency_ms"]) * 1000 for name in ("p50", "p99"))
    except (ValueError, KeyError, TypeError):
        raise RuntimeError(f"redis-benchmark printed {output.strip()[-200:]!r}") from None
    if not (rate > 0 and math.isfinite(rate)):
        raise RuntimeError(f"redis-benchmark tells of {rate:g} requests a second")
    return rate, p50, p99
