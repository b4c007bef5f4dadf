"""In a notebook: a real kernel runs the cells, in which the recipe has no file."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="a notebook needs nbformat, nbclient and ipykernel")
nbclient = pytest.importorskip("nbclient", reason="a notebook needs nbformat, nbclient and ipykernel")
pytest.importorskip("ipykernel", reason="a notebook needs nbformat, nbclient and ipykernel")

RECIPE = """
import stoker, torch
from torch import nn

torch.set_num_threads(1)

def recipe(lr: float = 0.1) -> stoker.Recipe:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 4, generator=generator), torch.randint(0, 2, (64,), generator=generator)

    def slowly(model, batch):
        import time
        time.sleep(0.02)
        return {"loss": nn.functional.cross_entropy(model(batch[0]), batch[1])}

    return stoker.Recipe(
        model=lambda: nn.Linear(4, 2),
        step=slowly,
        optimizer=lambda params: torch.optim.SGD(params, lr=lr),
        train=stoker.Loader((x, y), 8, shuffle=True),
    )
"""


def test_a_notebook_trains_and_goes_on(tmp_path: Path) -> None:
    cells = [
        RECIPE,
        "run = stoker.fit(recipe(), epochs=12, log_every=5, out='nb', device='cpu')",
        "print('again', stoker.fit(recipe(), epochs=13, out='nb', device='cpu').step)",
        "print('resumed', stoker.resume('nb', recipe(), epochs=14).step)",
        "print('loaded', type(stoker.load('nb', recipe())).__name__)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()

    def text(cell: int) -> str:
        outputs = notebook.cells[cell].outputs
        return "".join(o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in outputs)

    assert "\r" in text(1) and "steps/s" in text(1), "progress rewrites one line"
    assert text(1).count("\n") < 20
    assert "finished at step 96" in text(1)
    assert "again 104" in text(2) and "resumed 112" in text(3) and "loaded Linear" in text(4)
    assert "def recipe" in (tmp_path / "nb" / "recipe.py").read_text()
