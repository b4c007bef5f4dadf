"""Worker processes: order, memory that is used again, and what is said of every way in which a worker can end."""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch._tensor_str import printoptions
from torchvision import tv_tensors

from stoker import Loader, UserError
from stoker.data.collating import Allocate, ragged
from stoker.data.pool import Pool
from stoker.data.reader import Portion, Skipped
from tests.laws.runs import wait

_LIBC = ctypes.PyDLL(None)  # does not release Python's lock


def forked(function: Callable[[], Any], log: Path) -> Any:
    """Start a function in a process group of its own, with its output in a file."""

    def child() -> None:
        os.setpgid(0, 0)
        descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
        function()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def run(function: Callable[[], Any], log: Path) -> None:
    code = wait(forked(function, log), log)
    if code == 77:
        pytest.skip("this system allows no mount namespace")
    assert code == 0, log.read_text()


def awaited(path: Path) -> Path:
    while not path.exists():
        time.sleep(0.01)
    return path


@contextlib.contextmanager
def pool(work: Callable[..., Any], tasks: Iterable[Any], workers: int = 2, timeout_s: float = 60) -> Iterator[Pool]:
    found = Pool(work, iter(tasks), workers, timeout_s, lambda index: f"sample {index}")
    try:
        yield found
    finally:
        found.close()


def stacked(task: Any, allocate: Allocate, board: Any) -> torch.Tensor:
    """Work: (number, size) -> that many times the number, in the memory that is offered."""
    return allocate((task[1],), torch.float32).fill_(task[0])


def gently(result: Any, seconds: float) -> Any:
    """Take that long, not counting the time that the process is stopped."""
    for _ in range(round(seconds / 0.01)):
        time.sleep(0.01)
    return result


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_order_whoever_is_slow(workers: int) -> None:
    waits = [random.Random(workers).choice([0, 0, 0.001, 0.02]) for _ in range(60)]
    for count in (60, 0, 1):
        with pool(lambda task, *_: gently(task, waits[task]), range(count), workers) as results:
            assert list(results) == list(range(count))


DTYPES = [torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.float64]


def value(number: int) -> Any:
    """A batch with everything in it, the same whenever it is asked for."""
    base = torch.randn(6, 5, generator=torch.Generator().manual_seed(number))
    image = tv_tensors.Image((base.view(5, 2, 3) * 50).to(torch.uint8))
    boxes = tv_tensors.BoundingBoxes(base[:, :4], format="CXCYWH", canvas_size=(9, 9))
    return {
        "dtypes": [base.to(dtype) for dtype in DTYPES] + [base.to(torch.complex64), base.to(torch.complex128).conj()],
        "shapes": (base[0, 0], base[:0], torch.empty(0), base.t(), base[::2, 1::3], base[0].expand(1000, 5)),
        "views": [base, base[1:3], base.view(-1)[7:], base.diagonal()],
        "containers": [Portion(base.clone().requires_grad_()), Skipped(1, 2, "é\ud800\0"), {"a": [2.5, b"\xff", None]}],
        "images": [image, boxes, image[:, 1:]],
        "jagged": ragged()([{"ids": list(range(n + 1))} for n in range(number % 4 + 1)]),
        "others": [base.relu().to_sparse(), base.numpy()],
        "text": [str(number) * 500_000, "x"] if number % 3 == 0 else [],
    }


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch 2.11, of its own unpickling
def test_batches_are_what_the_main_process_would_read() -> None:
    def work(task: int, allocate: Allocate, board: Any) -> Any:
        whole = allocate((4, 6), torch.int32).copy_(torch.arange(24).view(4, 6) + task)
        return value(task), views(whole)

    def views(x: torch.Tensor) -> list[torch.Tensor]:
        return [x.t(), x[1:, ::2], x[3, 5], x.view(-1)[3:7].view(torch.int16)]

    with pool(work, range(12)) as results, printoptions(precision=18, threshold=10**9):
        for number, (found, parts) in enumerate(results):
            expected = value(number)
            ragged_ids = found.pop("jagged")["ids"], expected.pop("jagged")["ids"]
            assert torch.equal(*(ids.values() for ids in ragged_ids))
            assert torch.equal(*(ids.offsets() for ids in ragged_ids))
            assert repr(found) == repr(expected)
            assert repr(parts) == repr(views(torch.arange(24, dtype=torch.int32).view(4, 6) + number))


def test_what_is_kept_is_never_overwritten() -> None:
    """Thousands of batches of all sizes, many larger than any before; whole ones, slices, graphs and views are kept."""
    draw, weight = random.Random(5), torch.ones((), requires_grad=True)
    sizes = [draw.choice([1, 10, 1000, 20 * i + 1]) for i in range(3000)]
    kept: list[tuple[int, Any]] = []
    with pool(stacked, enumerate(sizes)) as results:
        for number, batch in enumerate(results):
            assert batch.shape == (sizes[number],) and bool((batch == number).all())
            if number % 97 == 0:
                kept.append((number, [batch, batch[-1:], batch.numpy()[::2], (weight * batch)[0]][number % 4]))
            else:
                batch.fill_(-1)  # it is the consumer's: nobody else may see this
    gc.collect()
    for number, part in kept:
        assert (part == number).all()
        if number % 4 == 3:
            assert torch.autograd.grad(part, weight)[0].item() == number


@pytest.mark.parametrize("labels", [False, True])
def test_memory_is_used_again(labels: bool, tmp_path: Path) -> None:
    """Also where the labels of every batch are kept, as metrics keep them, beside images that are not."""

    def work(task: int, allocate: Allocate, board: Any) -> Any:
        return allocate((1 << 18,), torch.float32).fill_(task), allocate((16,), torch.int64).fill_(task)

    def child() -> None:
        kept, places, before = [], set(), 0
        with pool(work, range(400 if labels else 2000)) as results:
            processes = [psutil.Process(), *(psutil.Process(worker.process.pid) for worker in results._team)]
            for number, (images, targets) in enumerate(results):
                places.add(images.data_ptr())
                kept += [targets] if labels else []
                before = sum(p.memory_info().rss for p in processes) if number == 50 else before
            grown = sum(p.memory_info().rss for p in processes) - before
        assert grown < 100 << 20, f"{grown >> 20} MiB more"
        assert labels or len(places) < 16
        assert all(bool((label == i).all()) for i, label in enumerate(kept))

    run(child, tmp_path / "log")


@pytest.mark.parametrize("what", ["batches", "tensors"])
def test_few_file_descriptors_hold_many_batches(what: str, tmp_path: Path) -> None:
    """Predictions that keep every batch; batches that are lists of large tensors."""

    def tensors(task: int, allocate: Allocate, board: Any) -> Any:
        return [torch.full((20_000,), task + i) for i in range(400)]

    def child() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        with pool(
            *((stacked, [(i, 50) for i in range(1000)]) if what == "batches" else (tensors, range(3)))
        ) as results:
            kept = list(results)
        assert [batch[0].flatten()[0].item() for batch in kept] == list(range(len(kept)))

    run(child, tmp_path / "log")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small /dev/shm")
@pytest.mark.parametrize("full", [False, True])
def test_shared_memory_is_not_needed(full: bool, tmp_path: Path) -> None:
    """In a mount namespace of its own, with a /dev/shm of 64 kB, or a full one."""

    def child() -> None:
        newns, private = 0x00020000, (1 << 14) | (1 << 18)
        if _LIBC.unshare(newns) or _LIBC.mount(b"none", b"/", None, private, None):
            os._exit(77)
        if _LIBC.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=64k"):
            os._exit(77)
        with contextlib.suppress(OSError), open("/dev/shm/filler", "wb", buffering=0) as file:
            while full:
                file.write(bytes(512))
        before = os.listdir("/dev/shm")
        with pool(stacked, [(i, 100_000) for i in range(20)]) as results:
            for number, batch in enumerate(results):
                assert bool((batch == number).all()) and os.listdir("/dev/shm") == before

    run(child, tmp_path / "log")


@pytest.mark.parametrize("closed", [True, False])
def test_nothing_is_left_behind(closed: bool) -> None:
    """File descriptors and processes, once the feed is closed, or nobody holds it any more."""

    def use() -> torch.Tensor:
        feed = reading(lambda index: torch.full((40_000,), index), 4).feed(0, workers=2)
        batches = feed.epoch(0)
        kept = [next(batches)[0] for _ in range(5)][2]
        for _ in range(2 if closed else 0):
            feed.close()
        return kept

    use()  # Python's own helpers are there from now on
    gc.collect()
    descriptors, children = len(os.listdir("/proc/self/fd")), psutil.Process().children()
    for _ in range(2):
        assert use()[:, 0].tolist() == [8, 9, 10, 11]
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert psutil.Process().children() == children


def test_a_program_that_never_closes_its_feed_ends_silently() -> None:
    lines = (
        "import stoker",
        "batches = stoker.Loader(list(range(100)), 4).feed(0, workers=2).epoch(0)",
        "print(next(batches)[0].tolist())",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0, 1, 2, 3]\n", "")


class Numbers(list[int]):
    """Number 5 is from "image-5.jpg"."""

    def file_of(self, index: int) -> str:
        return f"image-{index}.jpg"


def reading(function: Callable[[int], Any], batch_size: int = 2, **options: Any) -> Loader:
    return Loader(Numbers(range(64)), batch_size, augment=function, **options)


class OddError(Exception):
    def __init__(self, one: int, *, two: Callable[[], int]) -> None:
        self.one, self.two, self.lock = one, two, threading.Lock()  # nothing that could be pickled


class MuteError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class AnnouncedEnd(BaseException):
    pass


def throw(error: BaseException) -> None:
    raise error


def spin() -> None:
    while True:
        pass


PORT = 0  # of a server that never answers
RAISING: dict[str, Callable[[], Any]] = {
    "OddError": lambda: throw(OddError(1, two=lambda: 2)),
    "MuteError": lambda: throw(MuteError()),
    "AnnouncedEnd: over": lambda: throw(AnnouncedEnd("over")),
    "SystemExit": lambda: sys.exit(3),
    "KeyboardInterrupt": lambda: throw(KeyboardInterrupt()),
}
ENDING: dict[str, Callable[[], Any]] = {
    "SIGSEGV": lambda: ctypes.string_at(0),
    "SIGABRT": lambda: os.abort(),
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "ended with 7": lambda: os._exit(7),
}
HANGING: dict[str, Callable[[], Any]] = {
    "asleep": lambda: time.sleep(1000),
    "busy": lambda: spin(),
    "stuck in C": lambda: _LIBC.sleep(1000),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "beside a thread": lambda: (threading.Thread(target=spin, daemon=True).start(), time.sleep(1000)),
    "deep in a library": lambda: urllib.request.urlopen(f"http://127.0.0.1:{PORT}/"),
}


def message_of(act: Callable[[], None], timeout_s: float = 60) -> str:
    """What a run is told when `act` happens to a worker that reads sample 5."""
    feed = reading(lambda index: act() if index == 5 else index, timeout_s=timeout_s).feed(0, workers=2)
    try:
        batches = feed.epoch(3)
        assert [next(batches)[0].tolist() for _ in range(2)] == [[0, 1], [2, 3]]
        with pytest.raises(UserError) as caught:
            next(batches)
    finally:
        feed.close()
    return str(caught.value)


def assert_names(text: str, act: Callable[[], Any], line: bool = True) -> None:
    number = act.__code__.co_firstlineno
    assert "sample 5 (image-5.jpg)" in text and "epoch 3" in text
    assert not line or f"test_pool.py:{number}" in text or f'test_pool.py", line {number}' in text, text


@pytest.mark.parametrize("word", [*RAISING, *ENDING])
def test_a_worker_that_raises_or_ends(word: str, capfd: pytest.CaptureFixture[str]) -> None:
    act = (RAISING | ENDING)[word]
    text = message_of(act)
    assert word in text
    assert_names(text, act, line=word not in ("SIGKILL", "ended with 7"))
    assert capfd.readouterr().err == "" and psutil.Process().children() == []


@pytest.fixture(scope="module")
def hangs() -> dict[str, str]:
    """What is told of each hang; all at once, since it takes a while."""
    global PORT
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor(len(HANGING)) as threads:
        PORT = silent.getsockname()[1]
        found = threads.map(lambda act: message_of(act, timeout_s=0.9), HANGING.values())
        return dict(zip(HANGING, found, strict=True))


@pytest.mark.parametrize("how", HANGING)
def test_a_worker_that_hangs(how: str, hangs: dict[str, str]) -> None:
    assert "0.9 s" in hangs[how] and ("is stopped" in hangs[how]) == (how == "stopped")
    assert_names(hangs[how], HANGING[how], line=how != "stopped")


def test_a_hang_is_noticed_also_by_who_hands_out_more_work(tmp_path: Path) -> None:
    """Tasks that are larger than what fits into a socket: a whole epoch's indices as one batch, say."""

    def child() -> None:
        signal.alarm(10)
        with pool(lambda *_: time.sleep(20), [bytes(3 << 20)] * 3, 1, 0.6) as results, pytest.raises(UserError):
            next(results)

    run(child, tmp_path / "log")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_that_failed_is_not_passed_over(workers: int, tmp_path: Path) -> None:
    mended = tmp_path / "mended"
    loader = reading(lambda i: throw(OSError("no disk")) if i == 5 and not mended.exists() else i)
    feed = loader.feed(0, workers=workers)
    try:
        batches = feed.epoch(0)
        assert [next(batches)[0].tolist() for _ in range(2)] == [[0, 1], [2, 3]]
        with pytest.raises((OSError, UserError), match="no disk"):
            next(batches)
        mended.touch()
        assert [batch.tolist() for batch, _ in feed.epoch(0, 2)] == [[i, i + 1] for i in range(4, 64, 2)]
    finally:
        feed.close()


def test_a_job_that_was_stopped_and_goes_on_is_no_hang(tmp_path: Path) -> None:
    def child() -> None:
        with pool(lambda task, *_: gently(task, 0.5), range(4), timeout_s=1.2) as results:
            (tmp_path / "begun").touch()
            assert list(results) == [0, 1, 2, 3]

    process = forked(child, tmp_path / "log")
    awaited(tmp_path / "begun")
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(1.6)
    os.killpg(process.pid, signal.SIGCONT)
    assert wait(process, tmp_path / "log") == 0, (tmp_path / "log").read_text()


def test_a_job_that_was_stopped_during_a_step_is_no_hang() -> None:
    """The stop comes after a look at the workers, while the main process is not waiting for them."""

    def work(task: int, allocate: Allocate, board: Any) -> int:
        board[2] += 1
        return int(gently(task, [0.7, 1.3, 0][task]))

    with pool(work, range(3), timeout_s=1.5) as results:
        assert next(results) == 0
        for number, wait_s in ((signal.SIGSTOP, 1.5), (signal.SIGCONT, 0)):
            for worker in results._team:
                os.kill(worker.process.pid, number)
            time.sleep(wait_s)
        assert list(results) == [1, 2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_whole_job_leaves_the_workers_at_work(number: signal.Signals, tmp_path: Path) -> None:
    def child() -> None:
        got = []
        signal.signal(number, lambda *_: got.append(number))
        with pool(lambda task, *_: gently(task, 0.02), range(16)) as results:
            assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
            os.killpg(0, number)
            assert list(results) == list(range(4, 16)) and set(got) == {number}  # workers pass theirs on

    run(child, tmp_path / "log")


def test_workers_outlive_the_thread_that_first_asked() -> None:
    feed = reading(lambda index: gently(index, 0.01)).feed(0, workers=2)
    batches = feed.epoch(0)
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(next, batches).result()[0].tolist() == [0, 1]
    assert [batch.tolist() for batch, _ in batches] == [[i, i + 1] for i in range(2, 64, 2)]
    feed.close()


def test_workers_go_when_the_main_process_is_killed(tmp_path: Path) -> None:
    """Also the older ones of two pools, whose sockets the younger ones have inherited."""

    def child() -> None:
        with pool(stacked, [(i, 10) for i in range(90)]) as one, pool(stacked, [(i, 10) for i in range(90)]) as two:
            next(one), next(two)
            pids = [worker.process.pid for worker in one._team + two._team]
            (tmp_path / "part").write_text(" ".join(map(str, pids)))
            os.rename(tmp_path / "part", tmp_path / "pids")
            time.sleep(60)

    process = forked(child, tmp_path / "log")
    pids = [int(pid) for pid in awaited(tmp_path / "pids").read_text().split()]
    process.kill()
    stop, left = time.monotonic() + 12, pids
    while left and time.monotonic() < stop:
        time.sleep(0.05)
        left = [pid for pid in left if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
    assert len(pids) == 4 and left == []
    assert wait(process, tmp_path / "log") == -signal.SIGKILL
