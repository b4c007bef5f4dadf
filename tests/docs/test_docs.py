"""Every block of code in README.md and docs/ runs, page by page, as a reader would run it.

A page gets a process and an empty working directory of its own, in which `examples/` is the repository's (a
link) and `stoker` is on PATH. run_page.py says which blocks are run.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def run_page(page: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a page with `folder` as working directory."""
    (folder / "examples").symlink_to(ROOT / "examples")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, str(Path(__file__).with_name("run_page.py")), str(page)]
    environment = {**os.environ, "PATH": path}
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page(page: Path, tmp_path: Path) -> None:
    done = run_page(page, tmp_path)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"


GOOD = """
```python
value = 1
```
```python
import inspect, pathlib
def double(x): return 2 * x
assert double(value) == 2 and "2 * x" in inspect.getsource(double)
pathlib.Path("here").touch()
```
- in a list:
  ```bash run
  test -e here
  test -d examples
  ```
```bash
false
```
````text
```python
raise AssertionError("only shown")
```
````
"""


def test_blocks_share_a_page_and_its_folder(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(GOOD)
    done = run_page(page, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "here").exists()


@pytest.mark.parametrize(
    ("info", "code", "line"),
    [("python", "x = 1\nassert x == 2", 3), ("bash run", "echo fine\nfalse | cat", 3), ("python", "def", 3)],
)
def test_a_failing_block_is_named(tmp_path: Path, info: str, code: str, line: int) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"Text\n```{info}\n{code}\n```\n```bash run\ntouch later\n```\n")
    done = run_page(page, tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"{page}:{line}: this ")
    assert not (tmp_path / "later").exists()


def test_an_open_block_is_an_error(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n")
    assert "line 1: this block is never closed" in run_page(page, tmp_path).stderr
