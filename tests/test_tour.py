"""docs/tour.ipynb runs from top to bottom, and what it shows is what is stored in it."""

import base64
import io
import json
import re

import numpy as np
import PIL.Image
import pytest
from scripts import ROOT, load_script

make_tour = load_script("docs/make_tour.py")
NUMBER = re.compile(r"-?\d+\.\d+")
STORED = json.loads(make_tour.TOUR.read_text(encoding="utf-8"))


def shown(notebook):
    """Returns the text of all outputs, and their pictures."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    texts = ["".join(output.get("text") or output["data"]["text/plain"]) for output in outputs]
    pictures = [PIL.Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"])))
                for output in outputs if "image/png" in output.get("data", {})]
    return "".join(texts), [np.asarray(picture.convert("RGB"), float) for picture in pictures]


def test_the_notebook_is_small_and_was_run_in_order():
    assert make_tour.TOUR.stat().st_size < 200_000
    code = [cell for cell in STORED["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert all(cell["outputs"] for cell in code) and STORED["nbformat"] == 4
    text, pictures = shown(STORED)
    assert len(pictures) == 5 and "Warning" not in text
    ids = [cell["id"] for cell in STORED["cells"]]
    assert len(set(ids)) == len(ids)
    assert f"{ROOT}" not in json.dumps(STORED)


@pytest.mark.slow
def test_what_the_notebook_shows_is_what_its_cells_give():
    """Another machine may round differently: numbers to 3% or a digit, some pixels."""
    text, pictures = shown(make_tour.executed(STORED))
    stored_text, stored_pictures = shown(STORED)
    assert NUMBER.sub("x", text) == NUMBER.sub("x", stored_text)
    np.testing.assert_allclose(*(list(map(float, NUMBER.findall(words)))
                                 for words in (text, stored_text)),
                               rtol=0.03, atol=0.01)
    for found, stored in zip(pictures, stored_pictures, strict=True):
        assert found.shape == stored.shape and np.abs(found - stored).mean() < 1
    likelier, rarer = (float(re.search(rf"{name}: ([\d.]+)", text)[1])
                       for name in ("smileys", "upside down"))
    assert likelier < rarer
