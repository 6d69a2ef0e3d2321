"""The examples of docs/api.md run as they stand there."""

import re

import pytest
from scripts import ROOT
from tiny import write_dataset

TEXT = (ROOT / "docs/api.md").read_text(encoding="utf-8")
SECTIONS = re.findall(r"^## (.*?)\n.*?^```python\n(.*?)^```", TEXT, re.M | re.S)


@pytest.mark.long
def test_the_examples_run_in_their_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert len(SECTIONS) == 8
    values, printed = {}, {}
    small = str(write_dataset(tmp_path / "small.zip", num=200))  # 192 features instead of 3072
    faces = str(write_dataset(tmp_path / "faces.zip", num=3, side=16, classes=3))
    for title, code in SECTIONS:
        code = code.replace("examples/emoji-google-32.zip", small)
        code = code.replace("datasets/emoji-faces-16.zip", faces).replace('"noisy"', repr(faces))
        exec(compile(code, f"docs/api.md, {title}", "exec"), values)
        printed[title] = capsys.readouterr().out
    assert "EDMPrecond 128.0 3 torch.Size([4, 3, 16, 16])" in printed["Load a network"]
    assert "[8, 9, 10, 11, 12, 13, 14, 15] torch.Size([8, 3, 16, 16]) torch.uint8" in \
        printed["Sample"]
    assert values["restored"].shape == (3, 3, 16, 16)
    assert (values["mean"] - values["data"][:8]).abs().max() < 1e-3
    assert float(printed["Compute a score"]) > 0
    assert len(values["bits"]) == 2 and min(values["bits"]) > 0
    steps = printed["Make a few-step network of a denoiser"].splitlines()
    assert len(steps) == 2 and all(0 < float(line.split()[1]) < 100 for line in steps)
    losses = [float(line.split()[1]) for line in
              printed["Train on your own tensors"].splitlines()]
    assert len(losses) == 3 and losses[-1] < 10
