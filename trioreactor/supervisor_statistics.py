"""What a supervisor can say of itself and its workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trioreactor.server_statistics import ServerStatistics


@dataclass(frozen=True, kw_only=True, slots=True)
class SupervisorStatistics:
    """The counters of all workers, and those of the supervisor, at one moment."""

    total: ServerStatistics
    """Summed over all workers, ended ones too. Of one that was killed, what it had counted when it
    was last asked; what was open then counts as closed."""
    workers: Mapping[int, ServerStatistics]
    """Of each worker that serves or drains now, by its process number."""
    started: int
    """Processes started."""
    died: int
    """Workers that ended without having been told to."""
    hung: int
    """Those of them that were ended because they answered no ping."""
    replaced: int
    """Workers that were told to drain when another had taken their place."""
