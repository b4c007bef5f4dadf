"""What a training step costs: stoker and its peers beside a loop written by hand, in one run.

    python benchmarks/overhead.py [--rounds 9] [--only stoker,ignite] [--json FILE]

Each contestant trains the same tiny MLP in a fresh process, one after the other, in rounds, so that a machine
that slows down slows all of them. The method and its reasons are in `benchmarks/README.md`.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from contestants import BATCH_SIZE, CONTESTANTS, STEPS_PER_EPOCH, make_job
from rich import box
from rich.console import Console
from rich.table import Table

# No accelerator, no network, one thread also in libraries that do not ask torch.
CHILD_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
}


@dataclass(frozen=True)
class Sample:
    """One contestant in one round."""

    step_s: float  # mean over the window of whole epochs: everything, epoch ends too
    step_cpu_s: float  # CPU time of the whole process over the same window, background threads too
    typical_step_s: float  # median interval between two forwards inside an epoch
    epoch_end_s: float  # median interval across an epoch's end
    tail_s: float  # from the last forward until training returned
    steps: int
    accuracy: float


def measure(name: str, epochs: int, optimizer_name: str) -> Sample:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="overhead-") as out:
        job, stopwatch = make_job(epochs, Path(out), optimizer_name)
        model = CONTESTANTS[name].train(job)
        returned_s = time.perf_counter()
    marks, first, last = stopwatch.wall_s, stopwatch.first_step, stopwatch.last_step
    if len(marks) != epochs * STEPS_PER_EPOCH:
        raise SystemExit(f"{name}: {len(marks)} training forwards, expected {epochs * STEPS_PER_EPOCH}")
    if optimizer_name == "adamw":
        taken = {int(state["step"]) for optimizer in job.optimizers for state in optimizer.state.values()}
        if taken != {len(marks)}:
            raise SystemExit(f"{name}: optimizer took {sorted(taken)} steps, expected {len(marks)}")
    if torch.get_num_threads() != 1:
        raise SystemExit(f"{name}: torch uses {torch.get_num_threads()} threads, expected 1")
    gaps = [later - sooner for sooner, later in pairwise(marks)]
    inside = [gap for step, gap in enumerate(gaps, 1) if step % STEPS_PER_EPOCH and first <= step < last]
    model.eval()
    with torch.inference_mode():
        accuracy = (model(job.x).argmax(dim=1) == job.y).float().mean().item()
    return Sample(
        step_s=(marks[last] - marks[first]) / (last - first),
        step_cpu_s=(stopwatch.cpu_s[1] - stopwatch.cpu_s[0]) / (last - first),
        typical_step_s=statistics.median(inside),
        epoch_end_s=statistics.median(gaps[STEPS_PER_EPOCH - 1 :: STEPS_PER_EPOCH]),
        tail_s=returned_s - marks[-1],
        steps=len(marks),
        accuracy=accuracy,
    )


def measure_in_fresh_process(name: str, options: argparse.Namespace) -> Sample:
    command = [sys.executable, __file__, "--child", name, "--epochs", str(options.epochs)]
    command += ["--optimizer", options.optimizer] + (["--pin"] if options.pin else [])
    search = [os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    with tempfile.TemporaryDirectory(prefix="overhead-cwd-") as cwd:
        result = Path(cwd, "sample.json")
        child = subprocess.run(
            [*command, "--json", str(result)],
            cwd=cwd,
            env=os.environ | CHILD_ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(search)},
            capture_output=True,
            text=True,
        )
        if child.returncode or not result.exists():
            raise SystemExit(f"{name} failed (exit {child.returncode}):\n{child.stdout[-2000:]}{child.stderr[-4000:]}")
        return Sample(**json.loads(result.read_text()))


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def version_of(name: str) -> str:
    package = CONTESTANTS[name].package
    if package is None:
        return ""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "from source"  # found on PYTHONPATH


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def machine() -> dict[str, Any]:
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load_average_1min": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": 1,
    }


def select(only: str | None, console: Console) -> list[str]:
    names = list(CONTESTANTS) if only is None else [name.strip() for name in only.split(",") if name.strip()]
    unknown = sorted(set(names) - set(CONTESTANTS))
    if unknown:
        raise SystemExit(f"--only: no contestant {', '.join(unknown)}; there are {', '.join(CONTESTANTS)}")
    present = []
    for name in dict.fromkeys(["hand", *names]):  # ratios need the hand-written loop of the same round
        module = CONTESTANTS[name].module
        if module is None or importlib.util.find_spec(module):
            present.append(name)
        elif name == "stoker":
            raise SystemExit("stoker is not importable: pip install -e '.[bench]'")
        else:
            console.print(f"{name} is not installed, left out: pip install 'stoker[bench]' brings it", markup=False)
    return present


def summarise(samples: dict[str, list[Sample]]) -> list[dict[str, Any]]:
    rows = []
    for name, mine in samples.items():
        rounds = list(zip(mine, samples["hand"], strict=True))
        rows.append(
            {
                "name": name,
                "version": version_of(name),
                "step_s_quartiles": quartiles([s.step_s for s in mine]),
                "ratio_quartiles": quartiles([s.step_s / by_hand.step_s for s, by_hand in rounds]),
                "cpu_ratio_quartiles": quartiles([s.step_cpu_s / by_hand.step_cpu_s for s, by_hand in rounds]),
                "rounds": [asdict(s) for s in mine],
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    view = Table(title="Cost of a training step", title_justify="left", box=box.SIMPLE_HEAD)
    view.add_column("contestant")
    for heading in ("us/step", "quartiles", "ratio", "quartiles", "CPU ratio", "in-epoch us", "epoch end ms"):
        view.add_column(heading, justify="right")
    for row in rows:
        low, middle, high = row["step_s_quartiles"]
        ratio_low, ratio, ratio_high = row["ratio_quartiles"]
        typical_s = statistics.median(sample["typical_step_s"] for sample in row["rounds"])
        epoch_end_s = statistics.median(sample["epoch_end_s"] for sample in row["rounds"])
        view.add_row(
            f"{CONTESTANTS[row['name']].label} {row['version']}".strip(),
            f"{middle * 1e6:.1f}",
            f"{low * 1e6:.1f}-{high * 1e6:.1f}",
            f"{ratio:.3f}x",
            f"{ratio_low:.3f}-{ratio_high:.3f}",
            f"{row['cpu_ratio_quartiles'][1]:.3f}x",
            f"{typical_s * 1e6:.1f}",
            f"{epoch_end_s * 1e3:.2f}",
        )
    return view


def compare(options: argparse.Namespace) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140)
    names = select(options.only, console)
    host = machine()
    console.print(
        f"{host['cpu']}, {host['cores']} cores, load {host['load_average_1min']:.2f}; "
        f"Python {host['python']}, torch {host['torch']}, 1 thread"
        f"{', pinned to one core' if options.pin else ''}\n"
        f"MLP 64-128-128-10, batch {BATCH_SIZE}, {options.optimizer}, {STEPS_PER_EPOCH} steps an epoch, "
        f"{options.epochs} epochs of which {options.epochs - 2} measured, {options.rounds} rounds",
        highlight=False,
    )
    if host["load_average_1min"] > 0.3 * (host["cores"] or 1):
        console.print("The machine is busy: read ratios with care, or run again when it is quiet.")
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for number in range(options.rounds):
        # each round starts with another contestant, so that none always follows the same neighbour's heat
        for name in names[number % len(names) :] + names[: number % len(names)]:
            samples[name].append(measure_in_fresh_process(name, options))
        latest = ", ".join(f"{n} {samples[n][-1].step_s / samples['hand'][-1].step_s:.2f}x" for n in names)
        print(f"round {number + 1}/{options.rounds}: {latest}", file=sys.stderr, flush=True)
    rows = summarise(samples)
    console.print(table(rows))
    print(f"Every contestant took {options.epochs * STEPS_PER_EPOCH} optimizer steps in every round.")
    if options.json:
        settings = {"rounds": options.rounds, "epochs": options.epochs, "optimizer": options.optimizer}
        settings |= {"batch_size": BATCH_SIZE, "steps_per_epoch": STEPS_PER_EPOCH, "pinned": options.pin}
        options.json.write_text(
            json.dumps({"machine": host, "settings": settings, "contestants": rows}, indent=1) + "\n"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="fresh processes per contestant (default 9)")
    parser.add_argument("--epochs", type=int, default=22, help="first and last are not measured (default 22)")
    parser.add_argument("--only", help=f"comma-separated, of {', '.join(CONTESTANTS)}; hand always runs")
    parser.add_argument("--optimizer", choices=["adamw", "sgd"], default="adamw")
    parser.add_argument("--pin", action="store_true", help="each contestant's threads on one core")
    parser.add_argument("--json", type=Path, help="also write every sample here")
    parser.add_argument("--child", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.epochs < 3 or options.rounds < 1:
        parser.error("needs at least 3 epochs and 1 round")
    return options


def main() -> None:
    options = parse()
    if options.pin and hasattr(os, "sched_setaffinity") and options.child:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if options.child:
        options.json.write_text(json.dumps(asdict(measure(options.child, options.epochs, options.optimizer))))
    else:
        compare(options)


if __name__ == "__main__":
    main()
