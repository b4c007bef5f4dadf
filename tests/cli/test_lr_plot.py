"""The plot of `stoker lr`, as a browser draws it."""

import shutil
import subprocess
from pathlib import Path

import pytest

from stoker.lr_range import RangeTest, plot

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --virtual-time-budget=10000 --dump-dom"
)


@pytest.mark.skipif(CHROMIUM is None, reason="no browser: as root, scripts/debian chromium")
def test_the_suggestion_stands_where_the_rate_is(tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="the plot needs stoker[plot]")
    rates = [10.0**exponent for exponent in range(-6, 1)]
    page = tmp_path / "range.html"
    assert plot(RangeTest(rates, [3.0, 3.0, 2.9, 2.0, 1.0, 2.0, 9.0], 1e-3), page) == str(page)
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    drawn = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    for text in ("learning rate", "loss (smoothed)", "steepest fall at lr=0.001"):
        assert f">{text}</text>" in drawn
    assert drawn.count('class="js-line"') == 1
