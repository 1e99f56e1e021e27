"""Signals that end a job, answered when the current iteration is over and its checkpoint is written."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR2") if hasattr(signal, name))
"""Ctrl-C and cancelling; the end a machine announces; the one by which a cluster asks for a checkpoint."""


class Stop:
    """As a context: a signal that arrives while `iterating` is remembered, and answered by `act`; a second
    one, and one at any other time, is answered at once. The answer is whatever it was before.

    Attributes:
        iterating: set while iterations run, which end soon and leave something worth keeping.
        asked: the signal that was remembered, or None.
    """

    def __init__(self) -> None:
        self.iterating = False
        self.asked: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # signals go to the main thread alone
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.iterating and self.asked is None:
            self.asked = number
        else:
            self._answer(number, frame)

    def act(self) -> None:
        """Answer the signal that was remembered, if there is one."""
        number, self.asked = self.asked, None
        if number is not None:
            self._answer(number, None)

    def _answer(self, number: int, frame: FrameType | None) -> None:
        before = self._before[number]
        if callable(before):
            before(number, frame)
        else:  # the system's own answer
            signal.signal(number, before)
            os.kill(os.getpid(), number)
