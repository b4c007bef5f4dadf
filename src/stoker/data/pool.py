"""Worker processes that turn tasks into batches, in order, and say what happened when one does not come back.

Each worker has a socket: tasks and freed regions go in, encoded batches come out. The main process needs no threads and
no signal handler: it waits on the sockets and on the processes' ends at once, and only while it needs a batch.
"""

import contextlib
import faulthandler
import gc
import io
import multiprocessing
import os
import pickle
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from pathlib import Path
from types import FrameType
from typing import IO, Any, NamedTuple, Protocol

import torch

from stoker.data.collating import Allocate
from stoker.data.reader import Failure
from stoker.data.regions import MemoryReader, Writer, available
from stoker.errors import LIBRARIES, UserError

_HERE = str(Path(__file__).parent)
_LONG = 1 << 15  # bytes of a task that might not fit into a socket beside another
_AHEAD = 2  # tasks a worker has at hand: one it works on, one that waits
_FREEZING = threading.Lock()
_LOOK_S = 0.5  # between looks at workers that do not answer
_PASSED_ON = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)}
_LEAVE_S = 0.5  # that a worker is given to finish what it reads, when it is dismissed


class Work(Protocol):
    """What a worker does with a task."""

    def __call__(self, task: Any, allocate: Allocate, board: Any, /) -> Any:
        """Return the result; say on `board` (3 integers) what is being read: epoch, sample and how many so far."""
        ...


class _Inherited(NamedTuple):
    """What a forked worker has from its parent; a spawned one has none of it."""

    memory: int | None
    slots: list[int]
    others: list[Connection]  # which it must not keep open
    stacks: IO[bytes] | None


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    memory: MemoryReader
    board: Any
    stacks: IO[bytes]
    slots: list[int]  # memory files for long tasks, one for each that a worker has at hand
    given: int = 0  # tasks so far,
    tasks: int = 0  # and those of them that are not answered
    seen: int = -1  # the board's count when it was last looked at,
    stalled_s: float = 0.0  # and for how long the main process has since been waiting for nothing


@dataclass
class Pool:
    """Results of `work` on each task, in the tasks' order, whichever worker is free computing the next one.

    Args:
        work: runs in the workers; forked with everything it refers to.
        tasks: may be endless; read only as far ahead as the workers can hold.
        workers: how many processes.
        timeout_s: how long a worker may work on one sample.
        name: sample index -> words for messages.

    Raises:
        UserError: (in `next`) a worker raised, ended, or did not get on with a sample for `timeout_s`.
    """

    work: Work
    tasks: Iterator[Any]
    workers: int
    timeout_s: float
    name: Callable[[int], str]
    _team: list[_Worker] = field(default_factory=list)
    _done: dict[int, Any] = field(default_factory=dict)
    _issued: int = 0
    _taken: int = 0
    _exhausted: bool = False
    _finalizer: Any = None

    def __post_init__(self) -> None:
        for _ in range(self.workers):
            self._team.append(self._hire())
        # For whoever does not close it: daemons are joined at exit, and these wait for their parent to hang up.
        self._finalizer = Finalize(self, _dismiss, args=(self._team,), exitpriority=1)

    def _hire(self) -> _Worker:
        # Forked workers share the data set's memory with the main process, and start in milliseconds.
        context = multiprocessing.get_context("fork" if available() else None)
        ours, theirs = context.Pipe()
        fd = os.memfd_create("stoker batches") if available() else None
        board = context.RawArray("q", 3)
        stacks = os.fdopen(os.memfd_create("stoker stacks"), "w+b") if available() else io.BytesIO()
        others = [worker.connection for worker in self._team] + [ours]
        slots = [os.memfd_create("stoker tasks") for _ in range(_AHEAD if available() else 0)]
        inherited = _Inherited(fd, slots, others if available() else [], stacks if available() else None)
        arguments = (self.work, theirs, board, inherited)
        process = context.Process(target=_serve, args=arguments, daemon=True)
        with _unscanned(), _signals_held():
            process.start()
        theirs.close()
        return _Worker(process, ours, MemoryReader(fd), board, stacks, slots)

    def __iter__(self) -> "Pool":
        return self

    def __next__(self) -> Any:
        self._issue()
        while self._taken not in self._done:
            if self._taken == self._issued:
                raise StopIteration
            self._wait()
        result = self._done.pop(self._taken)
        self._taken += 1
        self._issue()
        if isinstance(result, Failure):
            raise result.raised()
        return result

    def _issue(self) -> None:
        """Keep every worker supplied, the least busy first; bounded by what was taken, so that memory is."""
        while not self._exhausted and self._issued - self._taken < self.workers * _AHEAD:
            worker = min(self._team, key=lambda w: w.tasks)
            task = next(self.tasks, None)
            if task is None:
                self._exhausted = True
                return
            with contextlib.suppress(BrokenPipeError):  # it has ended: told when its answer is waited for
                self._hand(worker, task)
            worker.given, worker.tasks = worker.given + 1, worker.tasks + 1
            self._issued += 1

    def _hand(self, worker: _Worker, task: Any) -> None:
        """Send a task; one that the socket might not hold, and block this process on, goes into a memory file."""
        data = pickle.dumps((task, worker.memory.released()), pickle.HIGHEST_PROTOCOL)
        slot = None
        if worker.slots and len(data) > _LONG:
            slot = worker.given % _AHEAD
            os.pwrite(worker.slots[slot], data, 0)
        worker.connection.send((self._issued, slot, len(data) if slot is not None else data))

    def _wait(self) -> None:
        by_connection = {worker.connection: worker for worker in self._team}
        look_s = min(_LOOK_S, self.timeout_s / 4)
        ready = wait(list(by_connection), timeout=look_s)
        for connection in ready:
            worker = by_connection[connection]  # type: ignore[index]
            try:
                number, data, regions = pickle.loads(worker.connection.recv_bytes())
            except (EOFError, OSError):
                raise self._ended(worker) from None
            self._done[number] = worker.memory.load(data, regions)
            worker.tasks -= 1
        for worker in self._team if not ready else ():
            # Only this process's waiting counts: while it was busy or stopped, its workers may have been stopped.
            count = worker.board[2]
            worker.stalled_s = worker.stalled_s + look_s if worker.tasks and count == worker.seen else 0.0
            worker.seen = count
            if worker.stalled_s > self.timeout_s:
                raise self._hangs(worker)

    def _ended(self, worker: _Worker) -> UserError:
        worker.process.join(5)
        code = worker.process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with {code}"
        fatal = code in (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT, -signal.SIGFPE)
        return UserError(
            f"a data worker (process {worker.process.pid}) {how} while reading {self._reading(worker)}",
            why=_stack_of(worker) or ("a SIGKILL is often the kernel's, for want of memory" if code == -9 else ""),
            remedy="Loader(on_error=...) cannot skip a crash: leave that sample out, or find it with --workers 0"
            if fatal
            else "fewer --workers need less memory; --workers 0 has none; the run goes on with the same command",
        )

    def _hangs(self, worker: _Worker) -> UserError:
        pid = worker.process.pid
        assert pid is not None
        reading = self._reading(worker)  # before the signal, which may wake it
        stopped = _state_of(pid) == "T"
        stack = "" if stopped else _ask_for_stack(worker, pid)
        return UserError(
            f"a data worker (process {pid}) has been reading {reading} for {self.timeout_s:g} s",
            why="the process is stopped, by a SIGSTOP" if stopped else stack,
            remedy="Loader(timeout_s=...) sets how long a sample may take; resume once the cause is mended",
        )

    def _reading(self, worker: _Worker) -> str:
        epoch, index, count = worker.board
        return f"{self.name(index)} in epoch {epoch}" if count else "nothing yet"

    def close(self) -> None:
        """Dismiss the workers; what they hold is of no use any more."""
        _dismiss(self._team)
        self._finalizer.cancel()  # after it: whoever interrupts this leaves the rest to the process's end


@contextlib.contextmanager
def _unscanned() -> Iterator[None]:
    """Fork in here: a collection in the child does not write to, and so copy, every page that holds a container."""
    with _FREEZING:
        frozen = gc.get_freeze_count() > 0  # by the user, who may want it to stay so
        gc.freeze()
        try:
            yield
        finally:
            if not frozen:
                gc.unfreeze()


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Start a process in here: a signal comes to it when it has its own handlers, not in between."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _dismiss(team: list[_Worker]) -> None:
    for worker in team:
        with contextlib.suppress(OSError):  # it has ended, or has no room for another word
            os.set_blocking(worker.connection.fileno(), False)
            worker.connection.send(None)  # to close is not enough: workers of younger pools hold the other end too
        worker.connection.close()
    deadline = time.monotonic() + _LEAVE_S
    for worker in list(team):
        worker.process.join(max(deadline - time.monotonic(), 0))
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.process.close()
        worker.stacks.close()
        worker.memory.close()
        for slot in worker.slots:
            os.close(slot)
        team.remove(worker)


def _serve(work: Work, connection: Connection, board: Any, inherited: _Inherited) -> None:
    """A worker's life: ends with its parent, or when the parent hangs up."""
    for other in inherited.others:
        other.close()
    _end_with_parent()
    _pass_signals_on()
    if inherited.stacks is not None:
        faulthandler.enable(inherited.stacks)
        faulthandler.register(signal.SIGUSR2, inherited.stacks)
    torch.set_num_threads(1)  # the workers are the parallelism
    writer = Writer(inherited.memory)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            message = connection.recv()
            if message is None:
                return
            number, slot, data = message
            task, released = pickle.loads(os.pread(inherited.slots[slot], data, 0) if slot is not None else data)
            writer.begin(released)
            try:
                result = writer.dump(work(task, writer.allocate, board))
            except BaseException as error:  # a data set may raise anything, SystemExit too
                result = writer.dump(Failure.of(error))
            connection.send_bytes(pickle.dumps((number, *result), pickle.HIGHEST_PROTOCOL))


def _end_with_parent() -> None:
    """End this process when its parent does, however that comes, and whatever a sample is waiting for."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    # Not the kernel's PR_SET_PDEATHSIG: it means the end of the thread that forked, which a run may outlive.
    threading.Thread(target=watch, daemon=True).start()


def _pass_signals_on() -> None:
    """Let a signal that reaches this process alone reach the main process, which needs its workers to finish the step.

    The second SIGTERM ends a worker: the first may be the scheduler's, a later one is meant.
    """
    parent = os.getppid()
    signal.set_wakeup_fd(-1)  # the parent's

    def pass_on(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getppid() == parent and _catches(parent, number):  # one that does not would end of it
            os.kill(parent, number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all
    signal.signal(signal.SIGTERM, pass_on)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, pass_on)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)  # held since before the fork


def _catches(pid: int, number: int) -> bool:
    """Whether a process handles a signal, by /proc; no, where there is none."""
    with contextlib.suppress(OSError):
        caught = re.search(r"SigCgt:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text())
        return caught is not None and bool(int(caught.group(1), 16) >> (number - 1) & 1)
    return False


def _state_of(pid: int) -> str:
    """Letter of a process's state in /proc, T for a stopped one; empty where there is no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _ask_for_stack(worker: _Worker, pid: int) -> str:
    if hasattr(signal, "SIGUSR2"):
        os.kill(pid, signal.SIGUSR2)
        time.sleep(0.2)  # for the handler, which needs no interpreter and so works inside any C function
    return _stack_of(worker)


def _stack_of(worker: _Worker) -> str:
    worker.stacks.seek(0)
    threads = worker.stacks.read().decode(errors="replace").split("(most recent call first)")
    serving = next((text for text in threads if f'{_HERE}/pool.py"' in text and "_serve" in text), "")
    frames = [line.strip() for line in serving.splitlines() if line.strip().startswith("File")]  # innermost first
    inner = list(takewhile(lambda line: _HERE not in line, frames))
    own = [line for line in inner[3:] if not any(place in line for place in LIBRARIES)]
    return "\n          ".join(inner[:3] + own[:5])
