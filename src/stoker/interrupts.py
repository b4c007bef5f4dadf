"""Signals: the first asks the loop to finish its step and save, the second of SIGINT leaves at once."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
        self._wakeup: tuple[int, int, int] | None = None  # read end, write end, what was there before
        self._over = threading.Event()
        self._watcher = threading.Thread()

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for name in self.SIGNALS:
                if number := getattr(signal, name, None):  # Windows has no SIGUSR1
                    self._before[number] = signal.signal(number, self._request)
            if self.grace_s is not None:
                self._watch()
        return self

    def _watch(self) -> None:
        """Have a thread learn of signals from their C handler: one of Python's waits for a step in C code to end."""
        ours, theirs = os.pipe()
        os.set_blocking(theirs, False)
        self._wakeup = ours, theirs, signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
        self._over.clear()
        self._watcher = threading.Thread(target=self._wait_for_signal, args=(ours,), daemon=True)
        self._watcher.start()

    def _wait_for_signal(self, descriptor: int) -> None:
        while (number := os.read(descriptor, 1)[0]) not in self._before and number:
            pass
        if number and not self._over.wait(self.grace_s):
            self._leave(signal.Signals(number).name)
        os.close(descriptor)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._wakeup is not None:
            _, theirs, before = self._wakeup
            signal.set_wakeup_fd(before)
            os.write(theirs, b"\0")  # before the thread may close its end
            self._over.set()
            self._watcher.join()
            os.close(theirs)
            self._wakeup = None
        self._before = {}

    def _request(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested == "SIGINT":
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
        if self.waiting:
            self.waiting = False  # once: while that unwinds, workers are dismissed, which nothing must interrupt
            raise Interrupted(self.requested)

    @contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """Context in which the loop waits for data that long at most, if signals are handled here."""
        if not self._before or not hasattr(signal, "setitimer"):
            yield
            return
        before = signal.signal(signal.SIGALRM, self._alarm)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _alarm(self, number: int, frame: FrameType | None) -> None:
        if self.waiting:
            self.waiting = False
            raise Interrupted("SIGALRM")

    def _leave(self, name: str) -> None:
        code = self.exit_code if name != "SIGINT" else 0
        hard = threading.Timer(1, os._exit, [code])  # if the last words wait for a lock
        hard.daemon = True
        hard.start()
        try:
            self.last_words()
            print(
                f"stoker: {name}: the grace of {self.grace_s:g} s is over before the step and its save are; "
                "what was saved before is untouched",
                file=sys.stderr,
                flush=True,
            )
        finally:
            os._exit(code)


def requeue_exit() -> int:
    """Exit code of a run that a signal stopped: 75 in a Slurm job, for whoever requeues it; else 0."""
    return REQUEUE_EXIT if "SLURM_JOB_ID" in os.environ else 0
