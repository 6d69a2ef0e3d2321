"""Runs docs/tour.ipynb from top to bottom and stores the output of its cells, without Jupyter."""

import ast
import base64
import contextlib
import io
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

TOUR = DOCS / "tour.ipynb"


def executed(notebook: dict[str, Any]) -> dict[str, Any]:
    """Returns a notebook with the outputs of its code cells, which run in the folder docs/."""
    values: dict[str, Any] = {"__name__": "__main__"}
    count, cells = 0, []
    before = os.getcwd()
    os.chdir(DOCS)
    try:
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                count += 1
                outputs = _outputs("".join(cell["source"]), values, count)
                cell = cell | {"execution_count": count, "outputs": outputs}
            cells.append(cell)
    finally:
        os.chdir(before)
    return notebook | {"cells": cells}


def _outputs(code: str, values: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Runs a cell; returns its printed output, then the value of its last line if it has one."""
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        exec(compile(tree, f"{TOUR.name}, cell {count}", "exec"), values)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), f"cell {count}", "eval"), values)
    outputs = []
    if text := printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": _lines(text)})
    if value is not None:
        data = {"text/plain": _lines(re.sub(r" at 0x[0-9A-F]+", "", repr(value)))}
        if picture := getattr(value, "_repr_png_", lambda: None)():
            data["image/png"] = base64.b64encode(picture).decode()
        outputs.append({"output_type": "execute_result", "execution_count": count, "data": data,
                        "metadata": {}})
    return outputs


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main() -> None:
    """Updates the notebook."""
    from dnnlib import progress

    progress.LINE_SEC = math.inf  # no progress lines, which depend on the machine
    notebook = executed(json.loads(TOUR.read_text(encoding="utf-8")))
    TOUR.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
