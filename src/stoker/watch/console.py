"""The terminal: one live line where there is one, a line every 30 s where there is none, a table at the end."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console as Terminal
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from stoker.errors import plain

if TYPE_CHECKING:
    from stoker.plan import Plan
    from stoker.state import Progress, TrainState
    from stoker.train import Limits

_LINE_EVERY_S = 30.0


class Console(Protocol):
    """What a run shows of itself."""

    def begin(
        self,
        path: Path,
        state: "TrainState",
        limits: "Limits",
        epoch_steps: int | None,
        plan: "Plan",
    ) -> None:
        """Show where the run starts."""
        ...

    def observe(self, progress: "Progress", metrics: Mapping[str, Any]) -> None:
        """Take note of new values."""
        ...

    def note(self, text: str) -> None:
        """Say something that the user must not miss."""
        ...

    def stop(self) -> None:
        """End whatever is live."""
        ...

    def end(self, path: Path, progress: "Progress", metrics: Mapping[str, Any], signal: str | None) -> None:
        """Show how the run ended."""
        ...


class _Plain(Terminal):
    """Shows texts as they are: names in a run may be a stranger's, and hold markup or commands for the terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Make what is printed of a string."""
        return super().render_str(plain(text), **{**options, "markup": False, "emoji": False})


def terminal() -> Terminal:
    """Return standard output; a pipe, which has no width of its own, gets one that cuts no name off."""
    found = _Plain(soft_wrap=True, highlight=False)
    return found if found.is_terminal or found.is_jupyter else _Plain(soft_wrap=True, highlight=False, width=200)


def console_for(quiet: bool) -> Console:
    """Quiet, live (a terminal or a notebook), or plain lines (a pipe)."""
    return Quiet() if quiet else Lines(terminal())


class Quiet:
    """Only what must not be missed, on stderr."""

    def begin(
        self,
        path: Path,
        state: "TrainState",
        limits: "Limits",
        epoch_steps: int | None,
        plan: "Plan",
    ) -> None:
        for note in plan.notes:
            self.note(note)

    def observe(self, progress: "Progress", metrics: Mapping[str, Any]) -> None:
        pass

    def note(self, text: str) -> None:
        print(f"stoker: {plain(text)}", file=sys.stderr)

    def stop(self) -> None:
        pass

    def end(self, path: Path, progress: "Progress", metrics: Mapping[str, Any], signal: str | None) -> None:
        if signal is not None:
            self.note(f"{signal}: saved at step {progress.step}; go on with: stoker resume {path}")
        if progress.skipped_samples:
            self.note(left_out(progress))


class Lines:
    """Progress on a terminal, refreshed by a thread that only reads; in a notebook, one line written over and over;
    elsewhere lines, at most one in 30 s."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._live: Live | None = None
        self._metrics: Mapping[str, Any] = {}
        self._began_s = self._line_s = time.monotonic()
        self._began_step: int | None = None

    def begin(
        self,
        path: Path,
        state: "TrainState",
        limits: "Limits",
        epoch_steps: int | None,
        plan: "Plan",
    ) -> None:
        self._progress, self._limits, self._epoch_steps = state.progress, limits, epoch_steps
        self._began_s = self._line_s = time.monotonic()
        self._began_step = state.progress.step
        where = f"going on at step {state.progress.step}" if state.progress.step else "training"
        count = sum(p.numel() for p in state.model.parameters())
        self._terminal.print(f"{where} in {path}")
        self._terminal.print(f"plan: {plan}; {count:,} parameters")
        for note in plan.notes:
            self.note(note)
        if self._terminal.is_terminal and not self._terminal.is_jupyter:
            self._live = Live(console=self._terminal, get_renderable=self._render, refresh_per_second=4, transient=True)
            self._live.start()

    def observe(self, progress: "Progress", metrics: Mapping[str, Any]) -> None:
        self._metrics = metrics
        every_s = 1.0 if self._terminal.is_jupyter else _LINE_EVERY_S
        if self._live is None and time.monotonic() - self._line_s >= every_s:
            self._line_s = time.monotonic()
            if self._terminal.is_jupyter:
                print("\r" + self._text(), end="", flush=True)
            else:
                self._terminal.print(self._text())

    def note(self, text: str) -> None:
        self._terminal.print(Text(f"note: {plain(text)}", style="yellow"))

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _total_steps(self) -> int | None:
        limits = self._limits
        by_epochs = limits.epochs * self._epoch_steps if limits.epochs and self._epoch_steps else None
        return min((n for n in (by_epochs, limits.steps) if n is not None), default=None)

    def _text(self) -> str:
        progress, total = self._progress, self._total_steps()
        rate = (progress.step - (self._began_step or 0)) / max(time.monotonic() - self._began_s, 1e-9)
        epochs = f"/{self._limits.epochs}" if self._limits.epochs else ""
        parts = [f"epoch {progress.epoch}{epochs}", f"step {progress.step}" + (f"/{total}" if total else "")]
        parts += [f"{name} {value:.4g}" for name, value in shown(self._metrics).items()]
        if progress.best:
            value, step = progress.best[0]
            parts.append(f"best {value:.4g} at {step}" + (" *" if step == progress.evaluated_step else ""))
        parts.append(f"{rate:.1f} steps/s")
        if total is not None and rate > 0:
            parts.append(f"ETA {duration((total - progress.step) / rate)}")
        if "system/memory_bytes" in self._metrics:
            parts.append(f"{self._metrics['system/memory_bytes'] / 2**30:.2f} GiB")
        return "  ".join(parts)

    def _render(self) -> Table:
        row = Table.grid(padding=(0, 1))
        total = self._total_steps()
        bar = ProgressBar(total=total, completed=self._progress.step, width=24, pulse=total is None)
        row.add_row(bar, Text(self._text(), overflow="ellipsis", no_wrap=True))
        return row

    def end(self, path: Path, progress: "Progress", metrics: Mapping[str, Any], signal: str | None) -> None:
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        for name, value in shown(metrics, limit=40).items():
            table.add_row(name, f"{value:.5g}")
        if progress.best:
            table.add_row("best", f"{progress.best[0][0]:.5g} at step {progress.best[0][1]}")
        if signal is not None and not progress.finished:
            headline = f"{signal}: saved at step {progress.step}, epoch {progress.epoch}"
            commands = [f"stoker resume {path}"]
        else:
            why = {"epochs": "all epochs", "steps": "all steps"}.get(progress.finished or "", progress.finished)
            already = "already " if self._began_step is None else ""
            headline = f"{already}finished at step {progress.step}, epoch {progress.epoch}: {why}"
            commands = [f"stoker show {path}", f"stoker eval {path}", f"stoker predict {path}"]
        self._terminal.print(headline)
        if progress.skipped_samples:
            self.note(left_out(progress))
        if table.row_count:
            self._terminal.print(table)
        self._terminal.print("next: " + "\n      ".join(commands))


def shown(metrics: Mapping[str, Any], limit: int = 6) -> dict[str, float]:
    """The numbers that a reader follows."""
    hidden = ("time/", "system/", "train/lr", "train/skipped")
    numbers = {k: v for k, v in metrics.items() if isinstance(v, float) or (isinstance(v, int) and abs(v) < 1 << 1023)}
    found = {k: v for k, v in numbers.items() if not k.startswith(hidden)}
    return dict(list(found.items())[:limit])


def left_out(progress: "Progress") -> str:
    """The samples that could not be read, the first of them by name."""
    lines = [f"{progress.skipped_samples} samples could not be read and were left out", *progress.skipped_first]
    more = progress.skipped_samples - len(progress.skipped_first)
    return "\n      ".join(lines + ([f"and {more} more"] if more else []))


def duration(seconds: float) -> str:
    """Spell seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
