"""The study of docs/results.md: its commands, records, tables and pages, and docs/off_level.py."""

import json
import math
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import scipy.stats
import torch
from click.testing import CliRunner
from run_dirs import score_line, write_lines, write_run
from scripts import ROOT, load_script

import dataset_tool
import distill
import fid
import generate
import sweep
from pfgmpp.kernel import PerturbationKernel
from reports.run_record import RunRecord

results, study = load_script("docs/results.py"), load_script("docs/study.py")
off_level = load_script("docs/off_level.py")
DIMS = (4, 16, 64, math.inf)
SEEDS = ("0", "1", "2")
NUDGE = {"0": -0.2, "1": 0.0, "2": 0.3}  # of all scores of a training seed


def score(D, seed, damage=0.0, metric="frechet_distance", **settings):
    """Returns a line of metrics.jsonl: 1, more for small D, and `damage` on top."""
    value = 1 + NUDGE[seed] + (0.0 if math.isinf(D) else 1 / D) + damage
    return score_line(D, value, "0-9", 120, metric=metric, **settings)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Records in which alpha = 0.4 adds 0.3 log2 D + 0.1 (seed), and rounding draws have a mean."""
    root = tmp_path_factory.mktemp("records")
    for D in DIMS:
        for k, seed in enumerate(SEEDS):
            size = 8.0 if math.isinf(D) else math.log2(D)
            lines = [score(D, seed), score(D, seed, 0.3 * size + 0.1 * k, noise_alpha=0.4),
                     *(score(D, seed, draw, bits=4, rounding_seed=n)
                       for n, draw in enumerate((1.0, 2.0, 6.0))),
                     score(D, seed, 50, bits=4), score(D, seed, 7.0) | {"seeds": "10-19"},
                     score(D, seed, 9.0) | {"network": "network-snapshot-000020.pt"}]
            write_run(root / f"digits-D{D:g}-seed{seed}", D, lines, seeds=(), seed=int(seed))
    return results.Records.read(root)


# ----------------------------------------------------------------------------------------- tables


def test_a_value_is_the_mean_over_seed_ranges_of_the_newest_network(records):
    found = records.values("frechet_distance")
    assert list(found) == list(DIMS)
    for D in DIMS:
        low = 1 + (0 if math.isinf(D) else 1 / D)
        assert found[D] == pytest.approx({s: low + NUDGE[s] + 3.5 for s in SEEDS})


def test_earlier_networks_are_values_of_their_own(records):
    assert records.values("frechet_distance", kimg=20)[math.inf]["1"] == pytest.approx(10)


def test_rounding_is_the_mean_of_random_draws_without_the_nearest(records):
    damage = records.damage("frechet_distance", bits=4)
    assert all(value == pytest.approx(3) for by_seed in damage.values()
               for value in by_seed.values())


def test_damage_is_over_the_same_seeds_and_its_trend_is_the_slope(records):
    damage = records.damage("frechet_distance", alpha=0.4)
    assert damage[16] == pytest.approx({"0": 1.2, "1": 1.3, "2": 1.4})
    slope = results.trend(damage)
    assert list(slope.by_seed.values()) == pytest.approx([0.3] * 3)


def test_trend_is_of_each_training_seed_and_of_finite_D_only():
    rng = np.random.default_rng(0)
    values = {D: dict(zip(SEEDS, rng.normal(size=3), strict=True)) for D in (2, *DIMS)}
    slope = results.trend(values)
    for seed in SEEDS:
        expected = scipy.stats.linregress(np.log2(DIMS[:3]), [values[D][seed] for D in DIMS[:3]])
        assert slope.by_seed[seed] == pytest.approx(expected.slope)


def test_differences_are_those_of_a_paired_t_test():
    rng = np.random.default_rng(1)
    values = {D: dict(zip(SEEDS, rng.normal(size=3), strict=True)) for D in DIMS}
    for D, difference in results.to_inf(values).items():
        test = scipy.stats.ttest_rel(list(values[D].values()), list(values[math.inf].values()))
        low, high = test.confidence_interval(0.95)
        assert (difference.mean - difference.half_width,
                difference.mean + difference.half_width) == pytest.approx((low, high))


def test_cells_are_mean_and_deviation_and_decided_differences_are_bold():
    assert results.cell({"0": 1.0, "1": 2.0, "2": 4.5}, 2) == "2.50 ± 1.80"
    one = {"0": 1.0, "1": 1.2, "2": 1.1}
    assert results.interval(results.Difference(one), 2) == "**+1.10 ± 0.25**"
    undecided = results.Difference({"0": -1.0, "1": 1.2, "2": 0.1})
    assert results.interval(undecided, 2) == "+0.10 ± 2.73"


@pytest.mark.parametrize("values, is_lower_better, answer", [
    ({4: (1.0, 1.1, 1.2), math.inf: (2.0, 2.1, 2.3)}, True, "yes"),
    ({4: (1.0, 1.1, 1.2), math.inf: (2.0, 2.1, 2.3)}, False, "no"),
    ({4: (1.0, 1.1, 1.2), math.inf: (2.0, 0.1, 1.3)}, True, "not decided")])
def test_the_best_finite_D_is_compared_with_inf(values, is_lower_better, answer):
    values = {D: dict(zip(SEEDS, each, strict=True)) for D, each in values.items()}
    row = results._best("q", "score", values, 2, is_lower_better)
    assert row[1] == "score, D = 4 minus inf" and row[-1] == answer


@pytest.mark.parametrize("slope, sign, answer", [
    (1, 1, "yes"), (1, -1, "no"), (-1, -1, "yes"), (-1, 1, "no"), (0, 1, "not decided")])
def test_damage_rises_where_the_slope_is_decided(slope, sign, answer):
    values = {D: {s: slope * math.log2(D) + NUDGE[s] * D for s in SEEDS} for D in (4, 8, 16)}
    values = {D: {s: v - NUDGE[s] * D * 0.9 for s, v in each.items()} for D, each in values.items()}
    assert results._rises("q", "damage", values, 2, sign)[-1] == answer


def test_a_question_is_named_once_and_its_rows_follow():
    rows = [["a", "1"], ["a", "2"], ["b", "3"], ["b", "4"], ["a", "5"]]
    assert [row[0] for row in results._named_once(rows)] == ["a", "", "b", "", "a"]


@pytest.fixture(scope="module")
def kept_records():
    return results.Records.read(ROOT / "docs/results")


@pytest.mark.parametrize("name, tables", results.PAGES.items())
def test_the_tables_of_the_pages_are_those_of_the_records(kept_records, name, tables):
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert results.written(page, tables, kept_records) == page


def test_the_number_of_intervals_and_of_bold_ones_is_that_of_the_tables():
    page = (ROOT / "docs/results/tables.md").read_text(encoding="utf-8")
    rows = [line for table in re.findall(r"_differences -->\n(.*?)<!-- end", page, re.S)
            for line in table.splitlines()]
    number = sum(line.count(" ± ") for line in rows[1:] if "D - inf" not in line)
    bold = sum(line.count("**") // 2 for line in rows)
    assert f"have {number} intervals, of which {bold} are bold" in page
    assert f"chance would make about {0.05 * number:.0f} of them" in page


def test_distances_of_few_steps_are_compared_by_their_logarithms(kept_records):
    [(title, found, _), *_] = results._few_steps_differences(kept_records)
    values = kept_records.values("frechet_distance", "digits-ect", steps=1, few_step="ect",
                                 solver="consistency")
    assert title == "log2 of the Frechet distance, 1 step"
    assert found[8]["2"] == pytest.approx(math.log2(values[8]["2"]))
    assert [results._few_steps(kept_records)[n] for n in (2, 3)] == \
        results._few_steps_differences(kept_records)[2:]


def test_restored_images_are_compared_by_their_psnr_and_without_the_kernels_noise(kept_records):
    """The noise of the kernel is larger at small D, so that its PSNRs can't be compared."""
    rows = results.TABLES["off_level_differences"](kept_records).splitlines()
    assert rows[0] == "| D - inf (± 95%) | gaussian | half | twice | uniform | blur |"
    raw = {error: values for error, values, _ in results._off_level(kept_records)}
    expected = [results.interval(results.to_inf(raw[error])[8], 2)
                for error in ("gaussian", "half", "twice", "uniform", "blur")]
    assert rows[3] == f"| 8 | {' | '.join(expected)} |"
    answers = [row for row in results.answers(kept_records) if row[0].startswith("e.")]
    assert [row[1] for row in answers] == ["half the noise", "twice the noise", "uniform noise",
                                           "blur"]
    assert answers[1][2] == results.interval(results.trend(raw["twice"]), 3)


def test_every_table_is_on_one_page():
    assert sorted(name for tables in results.PAGES.values() for name in tables) == sorted(
        results.TABLES)


@pytest.mark.parametrize("name, change, wrong", [
    ("results.md", lambda page: page.replace("table: answers", "table: base"), "answers, base"),
    ("results.md", lambda page: page.replace("<!-- end -->", ""), "answers"),
    ("results/tables.md", lambda page: page.replace("table: low", "low"), "low"),
    ("results/tables.md", lambda page: page + page[page.index("<!-- table: early_d"):],
     "early_differences"),
    ("results/tables.md", lambda page: page.replace("table: low", "table: lower"), "low, lower")])
def test_a_table_that_is_missing_or_repeated_is_named_and_no_page_changes(
        tmp_path, invoke, name, change, wrong):
    write_pages(tmp_path, {name: change})
    before = {page: (tmp_path / page).read_bytes() for page in results.PAGES}
    done = invoke(results.main, f"--out={tmp_path}", f"--records={ROOT / 'docs/results'}")
    assert done.exit_code == 1 and f"{tmp_path / name}: tables that are missing" in done.output
    assert f"unknown: {wrong}; each" in done.output
    assert before == {page: (tmp_path / page).read_bytes() for page in results.PAGES}


def write_pages(folder, changes):
    """Writes the pages with some of them changed, and without a number in their tables."""
    (folder / "results").mkdir()
    for name in results.PAGES:
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        text = re.sub(r" ± [\d.]+", "", text)
        (folder / name).write_text(changes.get(name, str)(text), encoding="utf-8")


def test_the_pages_and_pictures_are_made_from_the_records(tmp_path, invoke):
    pytest.importorskip("matplotlib")
    write_pages(tmp_path, {})
    done = invoke(results.main, f"--out={tmp_path}", f"--records={ROOT / 'docs/results'}")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "results/tables.md").read_bytes() == (
        ROOT / "docs/results/tables.md").read_bytes()
    assert PIL.Image.open(tmp_path / "results-scores.png").width > 800
    assert PIL.Image.open(tmp_path / "results-samples.png").height > 100


def test_no_records_and_no_page_get_one_line(tmp_path, invoke):
    done = invoke(results.main, f"--records={tmp_path}")
    assert done.exit_code == 1 and "make them with python docs/study.py" in done.output
    done = invoke(results.main, f"--out={tmp_path}", f"--records={ROOT / 'docs/results'}")
    assert done.exit_code == 1 and "results.md: no such file" in done.output
    (tmp_path / "results.md").write_bytes((ROOT / "docs/results.md").read_bytes())
    done = invoke(results.main, f"--out={tmp_path}", f"--records={ROOT / 'docs/results'}")
    assert done.exit_code == 1 and "results/tables.md: no such file" in done.output


# --------------------------------------------------------------------------- damaged records


RUN = "digits-D8-seed1"


def edit_scores(run, change):
    """Replaces the scores of a run by what `change` returns for their list."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, change(lines))


def edit_options(run, **options):
    path = run / "training_options.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"options": record["options"] | options}))


def changed(**entries):
    """Returns a change of the first score of a run."""
    return lambda run: edit_scores(run, lambda lines: [lines[0] | entries, *lines[1:]])


def without(*words):
    """Returns a change that removes the scores whose lines have one of the words, of all runs."""
    def change(run):
        for each in run.parent.glob("*-D*-seed*"):
            edit_scores(each, lambda lines: [line for line in lines if not any(
                word in json.dumps(line) for word in words)])
    return change


def remove(pattern):
    def change(run):
        for each in run.parent.glob(pattern):
            shutil.rmtree(each)
    return change


def write_fourth_seed(run):
    shutil.copytree(run, run.parent / "digits-D8-seed3")
    edit_options(run.parent / "digits-D8-seed3", seed=3)


def first_of(lines, metric):
    return next(line for line in lines if line["metric"] == metric)


DAMAGE = {
    "seed": (remove(RUN), "digits-D8-seed0: D = 8 has the training seeds 0, 2, but most others "
             "have 0, 1, 2"),
    "fourth": (write_fourth_seed, "digits-D8-seed0: D = 8 has the training seeds 0, 1, 2, 3, but"),
    "no scores": (lambda run: (run / "metrics.jsonl").unlink(), f"{RUN}: unlike most others, it "
                  "has no score of metric"),
    "empty": (lambda run: (run / "metrics.jsonl").write_text(""), f"{RUN}: unlike most others"),
    "half a line": (lambda run: (run / "metrics.jsonl").write_text(
        (run / "metrics.jsonl").read_text()[:-20]), f"{RUN}: metrics.jsonl: 1 line ignored"),
    "one score": (lambda run: edit_scores(run, lambda lines: lines[:-1]), f"{RUN}: unlike most"),
    "other D": (lambda run: edit_options(run, aug_dim=16.0),
                f"{RUN}: its options have D = 16 and the seed 1, but its name differs"),
    "other seed": (lambda run: edit_options(run, seed=2), f"{RUN}: its options have D = 8 and the "
                   "seed 2, but its name differs"),
    "other name": (lambda run: run.rename(run.parent / f"{RUN}.bak"), f"{RUN}.bak: its options"),
    "D of a score": (changed(sampler={"D": 16.0, "num_steps": 18}), f"{RUN}: metrics.jsonl has a "
                     "score of D = 16"),
    "no options": (lambda run: (run / "training_options.json").unlink(),
                   f"{RUN}: training_options.json is missing or damaged, or has no D and seed"),
    "bad options": (lambda run: (run / "training_options.json").write_text("{"),
                    f"{RUN}: training_options.json is missing or damaged"),
    "repeated": (lambda run: edit_scores(run, lambda lines: [
        *lines, first_of(lines, "frechet_distance") | {"value": 0.5}]),
        f"{RUN}: metrics.jsonl has 2 scores of metric frechet_distance, kimg"),
    "detector": (lambda run: edit_scores(run, lambda lines: [
        line | {"detector": "other"} for line in lines]), f"{RUN}: unlike most others"),
    "num": (changed(num=12), f"{RUN}: unlike most others"),
    "reference": (changed(reference="datasets/other.zip"), f"{RUN}: unlike most others"),
    "negative": (lambda run: edit_scores(run, lambda lines: [
        line | ({"value": -0.1} if line["metric"] == "frechet_distance" else {})
        for line in lines]), f"{RUN}: metrics.jsonl has a Frechet distance of -0.1"),
    "no ect": (remove("digits-ect-*"), "digits-ect-D*-seed*: needs runs of D = inf and of two"),
    "no small": (remove("digits-small-*"), "digits-small-D*-seed*: needs runs of D = inf"),
    "no inf": (remove("digits-Dinf-*"), "digits-D*-seed*: needs runs of D = inf and of two finite"),
    "no low": (remove("digits-D[12]-*"), "digits-D*-seed*: no scores of frechet_distance, D < 4"),
    "one D": (lambda run: [remove(f"digits-D{D}-*")(run) for D in (4, 16, 64, 256)],
              "digits-D*-seed*: needs runs of D = inf and of two finite D from 4 on"),
    "no alpha": (without('"noise_alpha": 0.4'), "no scores of class_accuracy, "
                 "alpha 0.4, seeds from 0; make them with python docs/study.py"),
    "other range": (lambda run: [edit_scores(each, lambda lines: [
        line | ({"seeds": "5-1028"} if line.get("seeds") == "0-1023" else {}) for line in lines])
        for each in run.parent.glob("*-D*-seed*")], "alpha 0.0, seeds from 0; make them"),
    "no bits": (without('"bits": 5'), "no scores of frechet_distance, bits 5"),
    "no solver": (without("ipndm"), "no scores of nearest_distance, steps 9, solver ipndm"),
    "no states": (without("off_level"), "no scores of psnr, steps 9, off_level gaussian, restored"),
    "no early": (without("network-snapshot-000020"), "no scores of frechet_distance, kimg 20"),
    "no likelihood": (without("bits_per_dim"), "no scores of bits_per_dim"),
    "samples": (lambda run: (run.parent / "samples.npz").write_bytes(b"PK\3\4 and no more"),
                "samples.npz: damaged; make it anew with python docs/study.py"),
    "half of samples": (lambda run: (run.parent / "samples.npz").write_bytes(
        (run.parent / "samples.npz").read_bytes()[:700]), "samples.npz: damaged"),
    "other samples": (lambda run: np.savez(run.parent / "samples.npz", D8=np.zeros(3, np.uint8)),
                      "samples.npz: must have uint8 images [B, C, H, W] of one shape for each D"),
}


@pytest.mark.parametrize("change, message", DAMAGE.values(), ids=DAMAGE)
def test_damaged_and_incomplete_records_get_one_line_and_nothing_is_written(
        tmp_path, invoke, change, message):
    shutil.copytree(ROOT / "docs/results", tmp_path / "records")
    change(tmp_path / "records" / RUN)
    out = tmp_path / "out"
    out.mkdir()
    write_pages(out, {})
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    done = invoke(results.main, f"--out={out}", f"--records={tmp_path / 'records'}")
    assert done.exit_code == 1 and message in done.output, done.output
    assert len(done.output.strip().splitlines()) == 1
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == before


def test_only_what_was_written_is_named_and_the_pages_are_those_of_any_order(tmp_path, invoke):
    """Scores of other seeds come first: the first range is that of the distances."""
    pytest.importorskip("matplotlib")
    shutil.copytree(ROOT / "docs/results", tmp_path / "records")
    (tmp_path / "records/samples.npz").unlink()
    for run in (tmp_path / "records").glob("*-D*-seed*"):
        edit_scores(run, lambda lines: lines[::-1])
    out = tmp_path / "out"
    out.mkdir()
    write_pages(out, {})
    done = invoke(results.main, f"--out={out}", f"--records={tmp_path / 'records'}")
    assert done.exit_code == 0, done.output
    assert done.output == f"{out}: wrote results.md, results/tables.md, results-scores.png\n"
    assert (out / "results/tables.md").read_bytes() == (
        ROOT / "docs/results/tables.md").read_bytes()
    assert {path.name for path in out.rglob("*.*")} == {
        "results.md", "tables.md", "results-scores.png"}


# --------------------------------------------------------------------------------------- commands


MAINS = {"sweep.py": sweep.main, "distill.py": distill.main, "generate.py": generate.main,
         "docs/off_level.py": off_level.main}


@pytest.mark.parametrize("size", [study.FULL, study.TINY], ids=["full", "tiny"])
def test_every_command_of_the_study_is_one_that_scripts_take(size):
    for line, _ in study.commands("runs", (0, 1), size):
        script, *words = shlex.split(line)
        if script == "fid.py":
            fid.main.commands[words[0]].make_context(words[0], words[1:])
        elif script == "dataset_tool.py":
            assert words.pop(0) == "split"
            dataset_tool.split.make_context("split", words)
        else:
            context = MAINS[script].make_context(script, words)
            if script == "sweep.py":
                sweep.train.main.make_context("train.py", [
                    *context.params["train_options"], "--outdir=a", "--data=b"])


@pytest.mark.parametrize("seeds, message", [
    ("x", "'x' is not a list of integers"), ("", "is not a list of integers"),
    ("0,1,0", "--train-seeds=0,1,0: names a seed twice"), ("0-2,1", "names a seed twice")])
def test_wrong_seeds_of_the_study_are_refused_before_any_command(
        tmp_path, monkeypatch, invoke, seeds, message):
    monkeypatch.chdir(tmp_path)
    done = invoke(study.main, f"--train-seeds={seeds}", "-n")
    assert done.exit_code != 0 and message in done.output and "$ python" not in done.output
    assert not list(tmp_path.iterdir())


def test_ranges_of_seeds_are_every_seed_of_the_study():
    lines = [command.line for command in study.commands("runs", (0, 1, 2), study.FULL)]
    assert sum("--train-seeds=0,1,2 " in line for line in lines) == 4
    assert sum(line.startswith("distill.py") for line in lines) == 3 * len(study.FEW_STEP_DIMS)


def test_the_kept_records_say_what_the_whole_ones_say(tmp_path):
    line = score(16, "1", 2.5, noise_alpha=0.1, solver="ipndm") | {
        "date": "2026-12-01", "detector_sha256": "ab", "stderr": 0.25}
    run = write_run(tmp_path / "runs/digits-D16-seed1", 16, [line, line], seeds=(), seed=1)
    nearest = {"metric": "c_t", "value": -1.23456789, "network": "network-snapshot-000120.pt",
               "sampler": line["sampler"]}
    (run / "nearest-found").mkdir()
    write_lines(run / "nearest-found/metrics.jsonl", [nearest])
    assert study.keep_records(tmp_path / "runs", tmp_path / "kept") == 1
    kept = RunRecord.read(tmp_path / "kept/digits-D16-seed1")
    whole, [first, second] = RunRecord.read(run).scores[0], kept.scores
    for name in ("metric", "kimg", "D", "num", "seeds", "num_steps", "noise_alpha", "bits",
                 "detector", "reference", "other"):
        assert getattr(first, name) == getattr(whole, name), name
    assert first.value == pytest.approx(whole.value, rel=1e-5)
    assert (second.metric, second.value) == ("c_t", -1.23457)
    assert kept.options == RunRecord.read(run).options
    text = (tmp_path / "kept/digits-D16-seed1/metrics.jsonl").read_text()
    assert len(text.splitlines()) == 2 and "date" not in text


@pytest.mark.slow
@pytest.mark.scripts
def test_the_study_runs_and_goes_on(tmp_path):
    """At a tiny size, from a folder that has the examples only."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    args = ["docs/study.py", "--tiny", "--train-seeds=0,1", "--records=kept"]
    def run():
        done = subprocess.run([sys.executable, ROOT / args[0], *args[1:]], cwd=tmp_path, text=True,
                              capture_output=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
        return done.stdout

    assert "kept: records of" in run()
    kept = results.Records.read(tmp_path / "kept")
    assert {kind: len(runs) for kind, runs in kept.runs.items()} == {
        "digits": 6, "digits-small": 4, "digits-ect": 4}
    assert kept.held_out["class_accuracy"] > 0.95
    for name, make in results.TABLES.items():
        # One finite D has no trend, and there are fewer bits.
        if name not in ("rounding", "answers") and not name.endswith("differences"):
            assert "| 8 |" in make(kept) or "| 2 |" in make(kept), name
    with np.load(tmp_path / "kept/samples.npz") as file:
        assert {name: file[name].shape for name in file.files} == {
            f"D{D}": (20, 1, 8, 8) for D in ("2", "8", "inf")}
    before = {path: path.read_bytes() for path in tmp_path.glob("runs/*/metrics.jsonl")}
    again = run()
    assert {path: path.read_bytes() for path in before} == before
    assert not re.search(r": (training|scores|alpha|steps|images|likelihood)$", again, re.M)


# -------------------------------------------------------------------------------------- off level


@pytest.fixture(scope="module")
def images():
    return 0.8 * torch.rand([400, 1, 8, 8], generator=torch.Generator().manual_seed(0)) - 0.4


@pytest.mark.parametrize("error, factor", [
    ("gaussian", 1.0), ("half", 0.5), ("twice", 2.0), ("uniform", 1.0)])
def test_errors_have_the_deviation_that_they_are_named_for(images, error, factor):
    x, S = off_level.disturbed(images, error, 0.5, 8, seed=3)
    found = (x - images).flatten()
    assert S == 0.5 and float(found.std()) == pytest.approx(factor * 0.5, rel=0.02)  # 25,600 values
    assert abs(float(found.mean())) < 4 * factor * 0.5 / math.sqrt(found.numel())
    if error == "uniform":
        assert float(found.abs().max()) <= 0.5 * math.sqrt(3)
        assert scipy.stats.kstest(found, "uniform", [-math.sqrt(0.75), math.sqrt(3)]).pvalue > 0.01
    else:
        assert scipy.stats.kstest(found / (0.5 * factor), "norm").pvalue > 0.01


@pytest.mark.parametrize("D", [4, math.inf])
def test_kernel_errors_have_the_law_of_the_kernel(images, D):
    x, _ = off_level.disturbed(images, "kernel", 0.5, D, seed=3)
    squared = ((x - images) / 0.5).square().flatten(1).sum(1).double()
    law = scipy.stats.chi2(64) if math.isinf(D) else scipy.stats.f(64, D, scale=64)
    assert scipy.stats.kstest(squared, law.cdf).pvalue > 0.01
    assert PerturbationKernel(D).D == D


def test_blur_keeps_constants_and_its_level_is_its_own_error(images):
    x, S = off_level.disturbed(images, "blur", 0.5, 8, seed=3)
    assert pytest.approx(float((x - images).square().mean().sqrt())) == S
    flat = torch.full([1, 2, 8, 8], 0.3)
    assert torch.allclose(off_level.disturbed(flat, "blur", 0.5, 8, seed=3)[0], flat, atol=1e-6)
    impulse = torch.zeros([1, 1, 5, 5])
    impulse[0, 0, 2, 2] = 16
    expected = torch.outer(*[torch.tensor([0.0, 1, 2, 1, 0])] * 2)
    assert torch.equal(off_level.disturbed(impulse, "blur", 0.5, 8, seed=3)[0][0, 0], expected)


def test_psnr_is_that_of_scikit_image(images):
    metrics = pytest.importorskip("skimage.metrics")
    x, _ = off_level.disturbed(images[:5], "gaussian", 0.5, 8, seed=3)
    expected = [metrics.peak_signal_noise_ratio(y.numpy(), each.numpy(), data_range=2.0)
                for y, each in zip(images, x, strict=False)]
    assert off_level.mean_psnr(x, images[:5]) == pytest.approx(np.mean(expected), rel=1e-6)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """The held-out digits of the study."""
    folder = tmp_path_factory.mktemp("data")
    done = CliRunner().invoke(dataset_tool.split, [
        str(ROOT / study.SOURCE), "--val=0.2", f"--dest={folder / 'train.zip'}",
        f"--val-dest={folder / 'val.zip'}"])
    assert done.exit_code == 0, done.output
    return folder / "val.zip"


@pytest.fixture
def run_dir(tmp_path):
    """A run directory with the network of the study at D = 8 and the training seed 0."""
    folder = tmp_path / "digits-D8-seed0"
    folder.mkdir()
    shutil.copy(ROOT / "examples/digits8-8.pt", folder / "network-snapshot-000120.pt")
    return folder


@pytest.mark.long
def test_the_networks_of_the_examples_have_the_scores_that_are_kept(run_dir, held_out, invoke):
    """The network takes labels, and begins at the blur's own level.

    Rounding of other CPUs changes the dB by far less than 0.02; without labels they change by 0.3,
    and the blur from the level 0.5 by more.
    """
    done = invoke(off_level.main, run_dir, f"--data={held_out}")
    assert done.exit_code == 0, done.output
    kept = RunRecord.read(ROOT / "docs/results/digits-D8-seed0").scores
    found = RunRecord.read(run_dir).scores
    assert [dict(score.other)["off_level"] for score in found] == [
        f"{error}, {state}" for error in off_level.ERRORS for state in ("input", "restored")]
    settings = {score.other: (score.value, score.num_steps, score.num) for score in kept
                if score.metric == "psnr"}
    for score in found:
        value, *others = settings[score.other]
        assert score.value == pytest.approx(value, abs=0.02), score.other
        assert [score.num_steps, score.num] == others
    assert [round(score.value, 1) for score in found if score.num_steps] == pytest.approx(
        [19.5, 19.1, 23.9, 15.3, 19.5, 18.8], abs=0.11)


def test_only_what_is_new_is_recorded(run_dir, held_out, invoke):
    def lines(*args):
        done = invoke(off_level.main, run_dir, f"--data={held_out}", "--steps=1", *args)
        assert done.exit_code == 0, done.output
        return (run_dir / "metrics.jsonl").read_text().splitlines()

    first = lines()
    assert lines() == first and len(first) == 2 * len(off_level.ERRORS)
    # The states are those of before; what is restored from them is new.
    new = [json.loads(line) for line in lines("--steps=2")[len(first):]]
    assert [record["what"] for record in new] == ["restored"] * len(off_level.ERRORS)
    cut = "".join(f"{line}\n" for line in first[:5]) + first[5][:60]
    (run_dir / "metrics.jsonl").write_text(cut)
    assert [json.loads(line)["sampler"] for line in lines()] == [
        json.loads(line)["sampler"] for line in first]


@pytest.mark.parametrize("labels, side, message", [
    (None, 8, "has no labels, but {network} needs 10; name images that are labelled"),
    ([0, 1, 2], 8, "has labels of 3 numbers, but {network} needs 10"),
    (range(10), 16, "its images are 1x16x16 (channels, height, width), but {network} makes 1x8x8")])
def test_images_of_another_kind_get_one_line_before_any_network_is_scored(
        tmp_path, run_dir, invoke, labels, side, message):
    images = np.random.default_rng(0).integers(0, 256, [10, side, side], np.uint8)
    data = tmp_path / "data"
    data.mkdir()
    names = [f"{n}.png" for n in range(10)]
    for name, image in zip(names, images, strict=True):
        PIL.Image.fromarray(image).save(data / name)
    if labels is not None:
        numbers = [[name, labels[n % len(labels)]] for n, name in enumerate(names)]
        (data / "dataset.json").write_text(json.dumps({"labels": numbers}))
    done = invoke(off_level.main, run_dir, f"--data={data}")
    network = run_dir / "network-snapshot-000120.pt"
    assert done.exit_code == 1 and message.format(network=network) in done.output
    assert len(done.output.strip().splitlines()) == 1
    assert not (run_dir / "metrics.jsonl").exists()


@pytest.mark.parametrize("line", ['{"off_level": ', '{"off_level": 1}', '["off_level"]'])
def test_damaged_scores_and_absent_runs_are_named_before_any_network_is_scored(
        tmp_path, run_dir, held_out, invoke, line):
    done = invoke(off_level.main, run_dir, tmp_path / "absent", f"--data={held_out}")
    assert done.exit_code == 1 and f"{tmp_path / 'absent'}: no such file" in done.output
    assert not (run_dir / "metrics.jsonl").exists()
    (run_dir / "metrics.jsonl").write_text(f'{{"metric": "fid"}}\n{line}\n')
    done = invoke(off_level.main, run_dir, f"--data={held_out}")
    assert done.exit_code == 1
    assert f"{run_dir / 'metrics.jsonl'}: line 2 is damaged; remove it" in done.output


def test_what_is_recorded_is_known_whatever_its_value(tmp_path):
    record = {"seeds": "0", "reference_sha256": "ab", "value": 3.0,
              "sampler": {"weights": "cd", "off_level": "blur, input", "level": 0.5,
                          "num_steps": 9}}
    path = tmp_path / "metrics.jsonl"
    assert not off_level.recorded(path)
    path.write_text(json.dumps(record | {"value": 4.0}) + "\n")
    assert off_level.recorded(path) == {off_level.key(record)}
    for change in ({"seeds": "1"}, {"reference_sha256": "x"},
                   {"sampler": record["sampler"] | {"weights": "x"}},
                   {"sampler": record["sampler"] | {"num_steps": 18}},
                   {"sampler": record["sampler"] | {"level": 1.0}}):
        assert off_level.key(record | change) not in off_level.recorded(path)


# -------------------------------------------------------------------------------------- samples


def test_the_kept_samples_are_those_of_generate_without_and_then_with_noise(
        tmp_path, run_dir, invoke):
    study.keep_samples(run_dir.parent, tmp_path / "kept", "8", 0)
    with np.load(tmp_path / "kept" / study.SAMPLES) as file:
        assert file.files == ["D8"]
        found = file["D8"].astype(int)
    with np.load(ROOT / "docs/results" / study.SAMPLES) as file:
        kept = file["D8"].astype(int)
    assert found.shape == (20, 1, 8, 8) and np.abs(found - kept).max() <= 2  # other CPUs round
    for first, args in ((0, []), (10, ["--alpha=0.4"])):
        out = tmp_path / f"images{first}"
        done = invoke(generate.main, f"--network={run_dir}", f"--outdir={out}", "--seeds=3",
                      "--class=3", "--device=cpu", *args)
        assert done.exit_code == 0, done.output
        [path] = out.rglob("000003.npy")
        image = (np.load(path) * 255 / 16).clip(0, 255)  # 17 levels
        assert np.abs(image - found[first + 3]).max() <= 2
        assert np.abs(image - found[13 - first]).max() > 20
