"""Run the blocks of one Markdown page in order: `python run_page.py PAGE`, in the current directory.

```python blocks share one namespace, as in a notebook; ```bash run blocks go to `bash -eu -o pipefail`.
Blocks with any other info string (```bash, ```text, ...) are for reading. The first block that fails ends the
page: its `PAGE:LINE` is printed last, and the exit status is 1.
"""

import linecache
import re
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<info>[^`]*)$")


class Block(NamedTuple):
    """A fenced block that is to be run."""

    language: str  # "python" | "bash"
    line: int  # of its first line of code, from 1
    code: str


def blocks(text: str) -> Iterator[Block]:
    """Yield the blocks of a page that are to be run, in order."""
    lines = iter(enumerate(text.splitlines(), start=1))
    for number, line in lines:
        fence = FENCE.match(line)
        if not fence:
            continue
        indent, body = len(fence["indent"]), []
        for _, inner in lines:
            if inner.strip() == fence["ticks"]:
                break
            body.append(inner[indent:] if not inner[:indent].strip() else inner)
        else:
            raise SyntaxError(f"line {number}: this block is never closed")
        language = {"python": "python", "bash run": "bash"}.get(fence["info"].strip())
        if language:
            yield Block(language, number + 1, "\n".join(body) + "\n")


def main(page: Path) -> int:
    """Run a page; 0 where every block ran."""
    # As in a notebook: a module without a file; each block a source of its own, numbered as the page's lines.
    module = ModuleType("__main__")
    sys.modules["__main__"] = module
    for block in blocks(page.read_text()):
        name, code = f"<{page.name}:{block.line}>", "\n" * (block.line - 1) + block.code
        linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
        try:
            if block.language == "bash":
                subprocess.run(["bash", "-eu", "-o", "pipefail", "-c", block.code], check=True)
            else:
                exec(compile(code, name, "exec"), module.__dict__)
        except (Exception, SystemExit):
            traceback.print_exc()
            print(f"{page}:{block.line}: this {block.language} block failed", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
