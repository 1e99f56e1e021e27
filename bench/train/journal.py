"""What a job says while it runs: progress for whoever watches, and every loss term for good."""

from __future__ import annotations

import json
import time
from pathlib import Path

from bench import distributed
from bench.method.interface import Phase
from bench.store.results import Store

REPORT_SECONDS = 1.0
"""At most one progress report in this time, besides the first and the last of a phase."""


class Journal:
    """Progress (progress.json) and losses (train.jsonl) of one job; only the first process writes.

    Attributes:
        lines: lines of train.jsonl that are on disk.
    """

    def __init__(self, store: Store, key: str) -> None:
        self.store, self.key = store, key
        self.path: Path = store.work(key) / "train.jsonl"
        self.started = time.time()
        self.lines = 0
        self._silent = distributed.rank() > 0
        self._pending: list[str] = []
        self._reported = 0.0
        self._pace: tuple[str, float, int] | None = None

    def say(
        self,
        phase: str,
        iteration: int = 0,
        iterations: int = 0,
        epoch: int = 0,
        epochs: int = 0,
        loss: float | None = None,
    ) -> None:
        """Report progress, with the time that is left by the pace since this phase began in this process."""
        now = time.time()
        begins = self._pace is None or self._pace[0] != phase
        if self._silent or (now - self._reported < REPORT_SECONDS and iteration < iterations and not begins):
            return
        self._reported = now
        if self._pace is None or begins:
            self._pace = (phase, now, iteration)
        _, since, first = self._pace
        eta = (now - since) / (iteration - first) * (iterations - iteration) if iteration > first else None
        self.store.report_progress(
            self.key, self.started, phase, iteration, iterations, epoch, epochs, loss, eta
        )

    def iteration(
        self, phase: Phase, epoch: int, iteration: int, total: int, terms: dict[str, float], rate: float
    ) -> None:
        """Log one iteration's loss terms."""
        line = {"phase": phase.name, "epoch": epoch, "iteration": iteration, "lr": rate, **terms}
        self._pending.append(json.dumps(line))
        self.say(phase.name, iteration + 1, total, epoch + 1, phase.length.epochs, sum(terms.values()))

    def flush(self) -> None:
        """Bring the log to disk; called with each checkpoint."""
        if self._silent:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in self._pending)
        self.lines += len(self._pending)
        self._pending = []

    def rewind(self, lines: int) -> None:
        """Keep the first `lines` of the log: what came after the checkpoint is trained, and logged, again."""
        if self._silent:
            return
        kept = (
            self.path.read_text(encoding="utf-8").splitlines(keepends=True)[:lines]
            if self.path.exists()
            else []
        )
        self.path.write_text("".join(kept), encoding="utf-8")
        self.lines = len(kept)
