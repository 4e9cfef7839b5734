"""docs/nanochat.ipynb: a sound notebook whose cells run, in order, and whose stored outputs are what they gave.

    python tests/test_notebook.py         run it, and store what its cells give

Its cells are plain Python, so that a page of our own can run them: Jupyter is not needed. What is stored is
what Jupyter would store: printed text, the value of a last expression, the figures that a cell leaves open.
"""

import ast
import base64
import contextlib
import io
import json
import os
import re
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATH = ROOT / "docs" / "nanochat.ipynb"
SAME = "same everywhere"  # the tag of cells whose output depends on no machine and no training


def run(cell: dict, names: dict, number: int) -> None:
    """Run a code cell in `names`, and put number and outputs into it."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    tree = ast.parse("".join(cell["source"]))
    last = ast.Expression(tree.body.pop().value) if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(told):
        exec(compile(tree, f"<cell {number}>", "exec"), names)
        value = eval(compile(last, f"<cell {number}>", "eval"), names) if last else None
    outputs = [{"output_type": "stream", "name": name, "text": lines(shown)}
               for name, shown in (("stderr", as_a_terminal_shows(told.getvalue())), ("stdout", printed.getvalue())) if shown]
    if value is not None:
        outputs.append({"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": {"text/plain": lines(repr(value))}})
    for figure in map(plt.figure, plt.get_fignums()):
        image = io.BytesIO()
        figure.savefig(image, format="png", bbox_inches="tight", metadata={"Software": None})
        outputs.append({"output_type": "display_data", "metadata": {},
                        "data": {"image/png": base64.b64encode(image.getvalue()).decode() + "\n", "text/plain": [f"<Figure with {len(figure.axes)} axes>"]}})
        plt.close(figure)
    cell["execution_count"], cell["outputs"] = number, outputs


def lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def as_a_terminal_shows(text: str) -> str:
    """A carriage return writes over its line: of a progress bar only the last state stays."""
    return re.sub(r"[^\n]*\r(?!\n)", "", text).rstrip("\r")


def read() -> dict:
    return json.loads(PATH.read_text(encoding="utf-8"))


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_it_is_valid_nbformat_4():
    """By the rules of nbformat 4.5's schema for the parts that it has; by nbformat itself where that is installed."""
    notebook = read()
    assert set(notebook) == {"nbformat", "nbformat_minor", "metadata", "cells"}
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"] == {"display_name": "Python 3", "language": "python", "name": "python3"}
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9-_]{1,64}", name) for name in ids)
    for cell in notebook["cells"]:
        rest = {"code": {"execution_count", "outputs"}, "markdown": set()}[cell["cell_type"]]
        assert set(cell) == {"id", "cell_type", "metadata", "source"} | rest
        assert all(isinstance(line, str) and line.endswith("\n") for line in cell["source"][:-1])
        for output in cell.get("outputs", []):
            fields = {"stream": {"name", "text"}, "display_data": {"data", "metadata"}, "execute_result": {"data", "metadata", "execution_count"}}
            assert set(output) == {"output_type"} | fields[output["output_type"]]
            if "image/png" in output.get("data", {}):
                assert base64.b64decode(output["data"]["image/png"]).startswith(b"\x89PNG")
    with contextlib.suppress(ImportError):
        import nbformat

        nbformat.validate(nbformat.read(PATH, as_version=4))


def test_every_cell_was_run_in_order_and_calls_the_package_instead_of_writing_it_anew():
    cells = code_cells(read())
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells[1:]:
        assert cell["outputs"] and "class " not in "".join(cell["source"])
    source = "\n".join("".join(cell["source"]) for cell in cells)
    for room in ("tokenizer", "dialogue", "corpus", "model", "training", "explore", "generate", "evaluate"):
        assert re.search(rf"from nanochat(\.{room} import| import .*\b{room}\b)", source), room
    assert not re.search(r"/(tmp|home|root|work|Users)/", json.dumps(read(), ensure_ascii=False)), "a path of one machine"


def test_cells_that_are_the_same_everywhere_give_the_stored_outputs(monkeypatch):
    monkeypatch.chdir(ROOT)
    names, stored = {}, code_cells(read())
    for cell, again in zip(stored, code_cells(read())):
        if SAME in cell["metadata"].get("tags", []):
            run(again, names, cell["execution_count"])
            assert again["outputs"] == cell["outputs"]
    assert len(names) > 10


@pytest.mark.slow
def test_all_cells_run_in_order(monkeypatch):
    monkeypatch.chdir(ROOT / "docs")  # where Jupyter begins
    names = {}
    for number, (cell, stored) in enumerate(zip(code_cells(read()), code_cells(read())), start=1):
        run(cell, names, number)
        kinds, expected = ([output["output_type"] for output in one["outputs"] if output.get("name") != "stderr"]  # bars show when it is slow
                           for one in (cell, stored))
        assert kinds == expected, f"cell {number}"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    os.chdir(PATH.parent)
    notebook, names = read(), {}
    for number, cell in enumerate(code_cells(notebook), start=1):
        started = time.perf_counter()
        run(cell, names, number)
        print(f"cell {number}: {time.perf_counter() - started:.1f} s")
    PATH.write_text(json.dumps(notebook, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
