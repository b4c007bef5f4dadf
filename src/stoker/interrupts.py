"""Signals: the first asks the loop to finish its step and save, the second of SIGINT leaves at once."""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

REQUEUE_EXIT = 75  # EX_TEMPFAIL: try again later


class Interrupted(BaseException):
    """A signal came while the loop was waiting for a batch: its state is that of a completed step."""


class Interrupts:
    """Context in which SIGINT, SIGTERM and SIGUSR1 set `requested` to the signal's name.

    Outside the main thread, where Python cannot handle signals, it does nothing.

    Args:
        grace_s: the process ends that many seconds after the first signal, whatever it is doing then.

    Attributes:
        waiting: set by the loop while it waits for data, when a signal raises `Interrupted`.
        exit_code: with which the process ends when the grace is over.
        last_words: called before that.
    """

    SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")

    def __init__(self, grace_s: float | None = None) -> None:
        self.grace_s = grace_s
        self.requested: str | None = None
        self.waiting = False
        self.exit_code = requeue_exit()
        self.last_words: Any = lambda: None
        self._before: dict[int, Any] = {}
        self._timer: threading.Timer | None = None

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for name in self.SIGNALS:
                if number := getattr(signal, name, None):  # Windows has no SIGUSR1
                    self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        if self._timer is not None:
            self._timer.cancel()

    def _request(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested == "SIGINT":
            raise KeyboardInterrupt
        if self.requested is None and self.grace_s is not None:
            # A thread, since a step in C code, or a compiler, lets no handler of Python's run.
            self._timer = threading.Timer(self.grace_s, self._leave)
            self._timer.daemon = True
            self._timer.start()
        self.requested = signal.Signals(number).name
        if self.waiting:
            raise Interrupted(self.requested)

    def _leave(self) -> None:
        try:
            self.last_words()
            print(
                f"stoker: {self.requested}: the grace of {self.grace_s:g} s is over before the step and its save are; "
                "what was saved before is untouched",
                file=sys.stderr,
                flush=True,
            )
        finally:
            os._exit(self.exit_code)


def requeue_exit() -> int:
    """Exit code of a run that a signal stopped: 75 in a Slurm job, for whoever requeues it; else 0."""
    return REQUEUE_EXIT if "SLURM_JOB_ID" in os.environ else 0
