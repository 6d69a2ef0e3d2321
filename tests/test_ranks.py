"""What one process does for all: it writes, prints and measures, and no other does."""

import collections
import re

import pytest
from scripts import ROOT, run_ranks
from snapshots import write_snapshot
from tiny import TINY_RUN, write_dataset

pytestmark = [pytest.mark.scripts, pytest.mark.long]


@pytest.fixture
def two_ranks(tmp_path):
    """Returns a function that runs a script on two ranks in `tmp_path`.

    It returns (changed, called, printed) of each rank: the names in `tmp_path` that it changed, a
    Counter of what it called, and its lines on standard output.
    """
    def run(script, *args):
        logs = tmp_path.parent / f"{tmp_path.name}-logs"
        logs.mkdir()
        ranks = run_ranks("tests/helpers/rank_recorder.py", logs, ROOT / script, *args,
                          processes=2, cwd=tmp_path)
        assert not any(rank.returncode for rank in ranks), [rank.stderr for rank in ranks]
        found = []
        for i, rank in enumerate(ranks):
            lines = [line.partition(" ")[::2]
                     for line in (logs / f"rank{i}.txt").read_text().splitlines()]
            found.append((
                {path.removeprefix(f"{tmp_path}/") for kind, path in lines
                 if kind == "changed" and path.startswith(f"{tmp_path}/")},
                collections.Counter(value for kind, value in lines if kind == "called"),
                rank.stdout.splitlines()))
        return found
    return run


@pytest.fixture
def files(tmp_path):
    write_dataset(tmp_path / "data.zip")
    write_snapshot(tmp_path / "net.pt")
    return tmp_path


def test_rank_0_alone_writes_a_run_and_scores_it(files, two_ranks):
    args = [arg for arg in TINY_RUN if not arg.startswith("--seed")]  # rank 0 draws it for all
    (changed, called, printed), other = two_ranks(
        "train.py", "--data=data.zip", *args, "--outdir=runs", "--name=run", "--cond=1",
        "--duration=0.000032", "--tick=0.016", "--snap=1", "--dump=1", "--sigma-data=auto",
        "--samples=1", "--eval=1", "--eval-ref=data.zip", "--eval-num=20",
        "--eval-detector=pixels", "--keep=2", "--device=cpu", "--cache-dir=cache")
    there = {str(path.relative_to(files)) for path in files.rglob("runs/**/*")}
    made = {name for name in changed if name.startswith("runs/")}
    assert there and there <= made
    assert {"runs/run/log.txt", "runs/run/stats.jsonl", "runs/run/metrics.jsonl",
            "runs/run/training_options.json", "runs/run/samples-000000.032.png"} <= there
    assert not [name for name in other[0] if name.startswith("runs/")]
    assert printed and other[2] == []
    assert called["images.dataset:ImageFolderDataset.measure"] == 1
    assert called["dnnlib.run_lock:run_lock"] == 1
    assert called["checkpoints.checkpoint:save"] == len(
        [name for name in made if re.fullmatch(r".*/(training-state|network-snapshot)-[^/]*\.pt",
                                               name)])
    assert called["metrics.score_log:ScoreLog.record"] == 1
    assert called["metrics.evaluator:Evaluator._evaluate"] == 1
    assert len((files / "runs/run/metrics.jsonl").read_text().splitlines()) == 1
    assert set(other[1]) == set()


@pytest.mark.slow
def test_each_rank_writes_its_own_images_and_rank_0_all_else(files, two_ranks):
    (changed, called, printed), other = two_ranks(
        "generate.py", "--network=net.pt", "--outdir=out", "--seeds=0-7", "--batch=2", "--steps=2",
        "--save_images", "--device=cpu")
    images = [{name for name in names if re.fullmatch(r"out/\d{6}\.png", name)}
              for names in (changed, other[0])]
    assert len(images[0] | images[1]) == 8 and not images[0] & images[1]
    assert len(images[1]) == 4
    rest = {name for name in other[0] if not name.startswith("out/0")}  # and their temporaries
    assert rest == set()
    assert {"out/generate.json", "out/vis/grid.png", "out/vis/movie.gif"} <= changed
    assert called["images.grid:save_png"] == called["images.grid:save_gif"] == 1
    assert called["sampling.image_writer:ImageFolder.open"] == 1
    assert called["checkpoints.checkpoint:load"] == 1
    assert printed and other[2] == [] and set(other[1]) == set()


@pytest.mark.slow
def test_rank_0_alone_reads_the_reference_and_records_scores(files, two_ranks):
    (changed, called, printed), other = two_ranks(
        "fid.py", "gen", "--network=net.pt", "--ref=data.zip", "--seeds=0-9", "--ranges=2",
        "--metrics=fid,kid", "--steps=2", "--detector=pixels", "--device=cpu", "--workers=0")
    assert "metrics.jsonl" in changed and other[0] == set()
    assert called["metrics.evaluator:Evaluator._evaluate"] == 2
    assert called["metrics.references:save_reference"] == 1  # into the cache
    assert len((files / "metrics.jsonl").read_text().splitlines()) == 2 * 3
    assert printed and other[2] == [] and set(other[1]) == set()


@pytest.mark.slow
def test_rank_0_alone_writes_a_reference(files, two_ranks):
    (changed, called, printed), other = two_ranks(
        "fid.py", "ref", "--data=data.zip", "--dest=ref.npz", "--detector=pixels", "--device=cpu",
        "--workers=0")
    assert "ref.npz" in changed and other[0] == set()
    assert called["metrics.references:save_reference"] == 1
    assert printed == ["ref.npz: statistics of 40 images by pixels"] and other[2] == []
    assert set(other[1]) == set()
