"""The examples of docs/api.md run as they stand there."""

import re

import pytest
from scripts import ROOT
from tiny import write_dataset

TEXT = (ROOT / "docs/api.md").read_text(encoding="utf-8")
BLOCKS = [(section.partition("\n")[0], code) for section in re.split(r"^## ", TEXT, flags=re.M)
          for code in re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)]


@pytest.mark.long
def test_the_examples_run_in_their_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert len(BLOCKS) == 11 == TEXT.count("```python")
    values, printed = {}, {}
    small = str(write_dataset(tmp_path / "small.zip", num=200))  # 192 features instead of 3072
    faces = str(write_dataset(tmp_path / "faces.zip", num=5, side=16, classes=3))
    for title, code in BLOCKS:
        code = code.replace("examples/emoji-google-32.zip", small)
        code = code.replace("datasets/emoji-faces-16.zip", faces).replace("seeds=48", "seeds=5")
        code = code.replace("grid.png", str(tmp_path / "grid.png"))
        exec(compile(code, f"docs/api.md, {title}", "exec"), values)
        printed[title] = printed.get(title, "") + capsys.readouterr().out
    assert "128.0 (3, 16, 16) 3 0.5" in printed["Load a network"]
    assert "torch.Size([8, 3, 16, 16]) torch.float64" in printed["Sample"]
    assert values["pixels"].shape == (8, 3, 16, 16) and len(values["pictures"]) == 8
    assert (tmp_path / "grid.png").exists() and values["same"].seeds == (3, 5)
    clean, restored = values["clean"], values["restored"].images
    assert (restored - clean).square().mean() < (values["noisy"] - clean).square().mean() / 4
    assert (values["filled"].images - values["clean"])[:, :, 8:].abs().max() < 0.1  # known pixels
    assert (values["back"].images - values["clean"][:2]).abs().max() < 0.2
    assert len(values["way"]) == 8
    assert values["found"].unit == "bits/dim" and len(values["faces"].values) == 2
    assert set(values["scores"]) == {"frechet_distance", "precision", "recall"}
    assert (values["mean"] - values["data"][:8]).abs().max() < 1e-3
    steps = printed["Turn a denoiser into a few-step network"].splitlines()
    assert len(steps) == 2 and all(0 < float(line.split()[1]) < 100 for line in steps)
    losses = [float(line.split()[1]) for line in
              printed["Train on your own tensors"].splitlines()]
    assert len(losses) == 3 and losses[-1] < 10


@pytest.mark.long
def test_the_lines_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    [code] = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"),
                        re.M | re.S)
    exec(code.replace("samples.png", str(tmp_path / "samples.png")), {})
    assert (tmp_path / "samples.png").stat().st_size > 10_000
