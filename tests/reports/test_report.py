"""Reports: what is read of runs, what is compared, a page that is whole, escaped and offline."""

import base64
import html.parser
import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import PIL.Image
import pytest
from run_dirs import sampler, score_line, sweep_lines, tick, write_lines, write_picture, write_run
from scripts import run_script

import report
from checkpoints.names import newest_network
from reports import report_page
from reports.comparison import ScoreGroup, compare, over_kimg
from reports.report_plots import LOOKS, Axis, Line, look, plot
from reports.run_record import RunRecord, Score

DIMS = (1, 2, 128, math.inf)
NBSP = "\u00a0"
ROOM = Path(report_page.__file__).parent
STYLE = (ROOM / "report.css").read_text(encoding="utf-8")
HOSTILE = "<script>alert(1)</script>&\"'$\\frac{$"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [write_run(root / f"D{D}", D, sweep_lines(D, 10 * i)) for i, D in enumerate(DIMS)]


# ------------------------------------------------------------------------------- reading


def test_settings_say_D_architecture_data_and_versions(runs):
    records = [RunRecord.read(run) for run in runs]
    assert [record.D for record in records] == list(DIMS)
    assert [record.settings["D"] for record in records] == ["1", "2", "128", "inf"]
    shown = set(records[0].settings.values())
    assert {"ncsnpp", "32", "0.001", "bf16", "datasets/tiny.zip", "3x16x16", "2.13.0"} <= shown
    assert records[0].notes == []


def test_a_resumed_run_overwrites_the_ticks_it_repeats(tmp_path):
    run = write_run(tmp_path / "run")
    write_lines(run / "stats.jsonl", [tick(*numbers) for numbers in
                                      ((1, 9), (2, 9), (3, 9), (2, 5))])
    assert RunRecord.read(run).column("loss") == [(1, 9), (2, 5)]
    assert RunRecord.read(run).column("images_per_sec") == [(1, 500), (2, 500)]


def test_torn_lines_and_missing_keys_are_left_out(tmp_path):
    run = write_run(tmp_path / "run")
    lines = [json.dumps(line) for line in (tick(1), {"Progress/kimg": {"mean": 2}}, {"other": 1},
                                           {"Progress/kimg": {"mean": None}}, tick(3, None))]
    (run / "stats.jsonl").write_text("\n".join(lines) + '\n{"Loss/loss": {"num": 1, "me')
    record = RunRecord.read(run)
    assert record.column("kimg") == [(1, 1), (2, 2), (3, 3)] and record.column("loss") == [(1, 1.0)]
    assert record.notes == ["stats.jsonl: 1 line ignored, not JSON objects (a killed run may "
                            "leave half a line)"]


@pytest.mark.parametrize("line", [
    {}, {"metric": "fid"}, {"metric": "fid", "value": "3"}, {"metric": ["fid"], "value": 1.0},
    {"metric": "fid", "value": math.nan}, {"metric": "fid", "value": 10**400}])
def test_lines_without_a_score_are_none(tmp_path, line):
    run = write_run(tmp_path / "run", scores=[line, score_line(2, 1.5)])
    assert [score.value for score in RunRecord.read(run).scores] == [1.5]


def test_a_score_keeps_odd_settings_and_leaves_out_defaults(tmp_path):
    run = write_run(tmp_path / "run", scores=[
        score_line(2, 1.5, noise_alpha=0.1, bits=4, guidance=2, precision="fp16"),
        {"metric": "fid", "value": 2, "sampler": 3, "num": "x", "images": "runs/a/ckpt_2_000010"}])
    first, second = RunRecord.read(run).scores
    assert first == Score("fid", 1.5, 200, 2, 10, "0-9", 18, 0.1, 4, "inception", "ref.npz", "cd",
                          "network-snapshot-000200.pt", (("guidance", "2"), ("precision", "fp16")),
                          "ab")
    assert second == Score("fid", 2, 10, 128)


def test_the_seed_of_rounding_is_read_and_is_no_other_setting(tmp_path):
    lines = [score_line(2, 1.5, bits=4), score_line(2, 2.5, bits=4, rounding_seed=0),
             score_line(2, 3.5, bits=4, rounding_seed=7)]
    scores = RunRecord.read(write_run(tmp_path / "run", scores=lines)).scores
    assert [score.rounding_seed for score in scores] == [None, 0, 7]
    assert {score.other for score in scores} == {()} and not any(s.is_plain for s in scores)


def test_evaluations_are_shown_where_they_are_recorded_and_tell_no_scores_apart(tmp_path):
    lines = [score_line(2, 1.5, seeds="0-9"), score_line(2, 2.5, seeds="10-19", nfe=35),
             score_line(2, 3.5, seeds="0-9", solver="ipndm", num_steps=7, nfe=7),
             {**score_line(2, 4.5, metric="bits_per_dim", num_steps=32), "nfe": 192}]
    run = write_run(tmp_path / "run", scores=lines)
    scores = RunRecord.read(run).scores
    assert [score.nfe for score in scores] == [None, 35, 7, 192]
    assert ScoreGroup.of(scores[0]) == ScoreGroup.of(scores[1]) != ScoreGroup.of(scores[2])
    assert ScoreGroup.of(scores[3]).evaluations(32) == 192
    page = report_page.render([RunRecord.read(run)])
    cells = [row for row in rows_below(page, "Scores") if row[-1] in ("2.5", "3.5", "4.5")]
    assert [row[rows_below(page, "Scores")[0].index("NFE")] for row in cells] == ["35", "7", "192"]


def test_scores_of_stats_are_taken_where_metrics_jsonl_lacks_them(tmp_path):
    run = write_run(tmp_path / "run", scores=[
        {"metric": "fid", "value": 7.0, "kimg": 2, "sampler": sampler(128)}])
    write_lines(run / "stats.jsonl", [tick(2, **{"Metrics/fid": 7.0}),
                                      tick(4, **{"Metrics/fid": 6.0})])
    assert [(s.kimg, s.value) for s in RunRecord.read(run).scores] == [(2, 7.0), (4, 6.0)]


def test_the_newest_network_is_the_last_snapshot_or_a_later_state(tmp_path):
    """A stopped run has a state after its last snapshot; states of EDM have no average."""
    assert newest_network(tmp_path) is None
    for name, newest in (
            ("training-state-000009.pt", "training-state-000009.pt"),
            ("training-state-best.pt", "training-state-000009.pt"),
            ("network-snapshot-000002.000.pt", "training-state-000009.pt"),
            ("network-snapshot-000009.pt", "network-snapshot-000009.pt"),
            ("network-snapshot-000010.500.pt", "network-snapshot-000010.500.pt"),
            ("training-state-000010.600.pt", "training-state-000010.600.pt"),
            ("network-snapshot-000008.pkl", "network-snapshot-000008.pkl")):
        (tmp_path / name).touch()
        assert newest_network(tmp_path)[0].name == newest


# ----------------------------------------------------------------------------- comparing


def test_settings_vary_one_at_a_time_and_ranges_are_a_spread(runs):
    [comparison] = compare([RunRecord.read(run) for run in runs])
    assert (comparison.group.title, comparison.num_steps) == ("FID", 18)
    for i, (curve, D) in enumerate(zip(comparison.over_D, DIMS, strict=True)):
        spread = curve.points[D]
        assert (curve.run, curve.D, curve.kimg) == (i, D, 200)
        assert (spread.low, spread.mean, spread.high) == (10 * i, 10 * i + 1, 10 * i + 2)
        means = {axis: {x: point.mean - 10 * i for x, point in curves[i].points.items()}
                 for axis, curves in comparison.over.items()}
        assert means == {"noise_alpha": {0: 0, 0.1: 5, 0.2: 9}, "num_steps": {10: 4, 18: 0},
                         "bits": {5: 3, 32: 0}}


def test_a_run_is_as_old_as_its_scores_outside_of_sweeps(tmp_path):
    """A sweep of a newer network, without a score at its base point, hides no older score."""
    run = RunRecord.read(write_run(tmp_path / "run", 2, [
        score_line(2, 50, kimg=100), score_line(2, 9, kimg=200, noise_alpha=0.1),
        score_line(2, 8, kimg=200, bits=4)]))
    [comparison] = compare([run])
    [curve] = comparison.over_D
    assert curve.kimg == 100 and curve.points[2].values == (50,)


def over_alpha(tmp_path, *scores):
    """Returns the curves over alpha of runs, each of (alpha, seeds, value)."""
    runs = [RunRecord.read(write_run(tmp_path / str(i), D, [
        score_line(D, value, seeds, noise_alpha=alpha) for alpha, seeds, value in lines]))
        for i, (D, lines) in enumerate(zip(DIMS, scores, strict=False))]
    [comparison] = compare(runs)
    return comparison.over["noise_alpha"], report_page.render(runs)


@pytest.mark.long
def test_every_point_of_every_curve_is_over_the_ranges_that_all_share(tmp_path):
    curves, _ = over_alpha(
        tmp_path, [(a, seeds, 1) for a in (0, 0.1) for seeds in ("0-9", "10-19", "20-29")],
        [(a, seeds, 1) for a in (0, 0.1) for seeds in ("20-29", "10-19")])
    assert {tuple(sorted(spread.by_seeds)) for curve in curves
            for spread in curve.points.values()} == {("10-19", "20-29")}


@pytest.mark.long
def test_runs_without_common_ranges_keep_their_own_and_a_note_says_so(tmp_path):
    curves, text = over_alpha(tmp_path, [(0, "0-9", 1), (0.1, "0-9", 1)],
                              [(0, "10-19", 1), (0.1, "10-19", 1), (0, "20-29", 9)])
    assert [curve.seeds for curve in curves] == [("0-9",), ("10-19",)]
    assert curves[1].points[0].mean == 1
    assert re.search(r"The runs are scored over different seeds: \w+ \(D = 1\) over 1 seed range "
                     r"\(0-9\); \w+ \(D = 2\) over 1 seed range \(10-19\)",
                     text.replace(NBSP, " "))


@pytest.mark.long
def test_points_over_other_seeds_alone_are_left_out_and_a_note_says_so(tmp_path):
    curves, text = over_alpha(tmp_path, [(0, "0-9", 1), (0.1, "10-19", 5), (0.2, "0-9", 3)])
    assert list(curves[0].points) == [0, 0.2] and curves[0].left_out == (0.1,)
    assert "0: its points share no seed range; left out: alpha 0.1" in text


def test_scores_over_kimg_are_over_equal_seeds(tmp_path):
    run = RunRecord.read(write_run(tmp_path / "run", scores=[
        score_line(2, 50, kimg=100), score_line(2, 9), score_line(2, 1, "10-19")]))
    [(_, _, points)] = over_kimg(run)
    assert {x: point.values for x, point in points.items()} == {100: (50,), 200: (9,)}


def test_changes_are_paired_by_seeds(tmp_path):
    curves, _ = over_alpha(tmp_path, [(0, "0-9", 1), (0, "10-19", 5), (0.1, "0-9", 2),
                                      (0.1, "10-19", 8)])
    assert curves[0].change(0.1, 0).values == (1, 3)
    assert curves[0].change(0.2, 0) is None


@pytest.mark.parametrize("change", [
    {"num": 20}, {"metric": "kid"}, {"guidance": 2}, {"solver": "euler"}])
def test_scores_of_another_kind_are_never_compared(tmp_path, change):
    runs = [RunRecord.read(write_run(tmp_path / str(D), D, [score_line(D, 5, **kwargs)]))
            for D, kwargs in ((2, {}), (128, change))]
    assert [len(comparison.over_D) for comparison in compare(runs)] == [1, 1]


@pytest.mark.parametrize("key", ["detector", "reference_sha256"])
def test_detector_and_content_of_the_reference_set_kinds_apart(tmp_path, key):
    lines = [score_line(2, 5), {**score_line(128, 5), key: "other"}]
    runs = [RunRecord.read(write_run(tmp_path / str(i), scores=[line]))
            for i, line in enumerate(lines)]
    assert len(compare(runs)) == 2


def test_a_repeated_score_counts_once_and_the_newest_network_speaks_for_a_run(tmp_path):
    run = RunRecord.read(write_run(tmp_path / "run", scores=[
        score_line(2, 50, kimg=100), score_line(2, 9), score_line(2, 7)]))
    [comparison] = compare([run])
    assert comparison.over_D[0].points[2].values == (7,)
    [(_, steps, points)] = over_kimg(run)
    assert steps == 18 and {x: p.values for x, p in points.items()} == {100: (50,), 200: (7,)}


# ---------------------------------------------------------------------------- the page


class Page(html.parser.HTMLParser):
    """Collects elements, and checks that they close in order."""

    VOID = {"meta", "img", "br", "wbr"}

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def page(runs):
    return report_page.render([RunRecord.read(run) for run in runs])


def assert_offline(text):
    parsed = Page(text)
    assert not {tag for tag, _ in parsed.elements} & {"script", "link", "iframe", "object", "base"}
    for _, attrs in parsed.elements:
        for name, value in attrs.items():
            assert not name.startswith("on"), name
            if name in ("src", "href", "xlink:href", "srcset", "data", "poster", "action"):
                assert value.startswith(("#", "data:image/png;", "data:text/csv;")), value
    assert not re.search(r"https?:|url\((?!#)|@import", text)
    return parsed


@pytest.mark.long
def test_the_page_refers_to_nothing_outside(page):
    assert_offline(page)


@pytest.mark.long
def test_colours_of_plots_are_of_the_style_sheet_and_follow_the_mode(page):
    plots = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(plots) > 10
    for text in plots:
        assert not re.search(r"(?:stroke|fill): #", text)
        assert "var(--ink)" in text and "viewBox" in text and "<style" not in text
    assert "prefers-color-scheme: dark" in page and STYLE in page
    for name in ("ink", "grid", *(each.colour for each in LOOKS)):
        assert len(re.findall(rf"--{name}: #[0-9a-f]{{6}};", STYLE)) == 2


def test_numbers_are_in_tables_and_in_csv(page, runs):
    parsed = Page(page)
    assert {"Over D", "Noise before each step", "Steps", "Rounded weights", "10 (19)", "18 (35)",
            "training images", "8 kimg"} <= set(parsed.text)
    links = {attrs["download"]: base64.b64decode(attrs["href"].split(",")[1]).decode()
             for tag, attrs in parsed.elements if tag == "a" and "download" in attrs}
    assert len(links["scores.csv"].splitlines()) == 1 + 7 * len(runs)
    assert links["ticks.csv"].splitlines()[:2] == [
        "run,kimg,loss,lr,bad_steps,images_per_sec,cpu_mem_gb,gpu_mem_gb,val_loss",
        "D1,1.0,2.0,0.001,0.0,500.0,0.5,0.0,"]


def rows_below(page, heading):
    """Returns the cells of the table that follows a heading, a line in each."""
    text = page[page.index(f">{heading}</h"):]
    rows = re.findall(r"<tr>(.*?)</tr>", text[:text.index("</table>")], re.S)
    return [[re.sub(r"<span[^>]*>", "|", cell).replace("</span>", "").replace("<wbr>", "")
             for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]


def test_the_comparison_begins_with_scores_and_their_changes_over_equal_seeds(page):
    rows = rows_below(page, "Summary: FID, 10 images")
    assert rows[0] == ["run", "score", "seed ranges", "alpha 0.2", "10 steps", "5 bits"]
    assert rows[2] == ["D2 (D = 2)", "11.00|10.00..12.00", "3", "+9.00|+81.8%", "+4.00|+36.4%",
                       "+3.00|+27.3%"]
    assert page.index("Summary: ") < page.index("<h3>Runs") and "Lower is better." in page


def test_tables_say_how_many_ranges_a_value_is_of_and_align_their_decimals(page):
    assert page.count("Every value is over 1 seed range (0-9).") == 3
    rows = rows_below(page, "Noise before each step")
    assert [row[4] for row in rows[1:]] == ["30.00", "35.00", "39.00"]
    assert rows_below(page, "Runs")[0][-1] == "number of scores"


def test_ranges_in_cells_may_break(tmp_path):
    row = report_page._TEMPLATES.get_template("report_parts.html.jinja").module.row
    cells = row(["1", "5\n4.25..6.25"])
    assert '<span class="soft">4.25..<wbr>6.25</span>' in cells
    assert re.search(r"td .soft {[^}]*white-space: normal", STYLE)
    assert re.search(r"th {[^}]*white-space: normal", STYLE)


@pytest.mark.long
def test_cards_of_many_runs_are_wide(tmp_path, page):
    runs = [RunRecord.read(write_run(tmp_path / str(D), D, [score_line(D, 5)], seeds=()))
            for D in (1, 2, 3, 4, 5)]
    assert '<div class="cards wide">' in report_page.render(runs)
    assert '<div class="cards wide">' not in page


@pytest.mark.long
def test_kinds_of_scores_are_told_apart_by_their_headings(tmp_path):
    kinds = [{}, {"num": 20}, {"guidance": 2}]
    points = [score_line(2, 5, noise_alpha=alpha, **kind) for kind in kinds for alpha in (0, 0.1)]
    points += [{**line, "reference_sha256": "other"} for line in points[:2]]
    folders = [write_run(tmp_path / str(D), D, points if D == 2 else points[:1]) for D in (2, 128)]
    text = report_page.render([RunRecord.read(folder) for folder in folders]).replace(NBSP, " ")
    headings = re.findall("<h3>(FID.*?)</h3>", text)
    assert sorted(headings) == [
        "FID, 10 images, detector inception, reference ref.npz cd",
        "FID, 10 images, detector inception, reference ref.npz other",
        "FID, 10 images, guidance 2", "FID, 20 images"]
    for heading in headings:  # each names its runs, of which some have one
        below = text[text.index(f"<h3>{heading}</h3>"):]
        named = re.search('<p class="soft">(.*?) images', below)[1]
        assert named.startswith("2 (D = 2), 128 (D = 128), 10" if heading.endswith(" cd")
                                else "2 (D = 2), ")


@pytest.mark.long
def test_losses_at_different_D_and_scores_of_few_images_come_with_a_warning(page, tmp_path):
    assert page.count(report_page._NO_RANKING) == 1
    assert ("Scores of few images (10, fewer than 2,048): differences within"
            in " ".join(page.split()))
    folders = [write_run(tmp_path / name, 2, [score_line(2, 5, num=2048)]) for name in "ab"]
    text = report_page.render([RunRecord.read(folder) for folder in folders])
    assert report_page._NO_RANKING not in text and "few images" not in text


@pytest.mark.long
def test_no_skipped_steps_are_a_line_and_no_plot(tmp_path):
    run = write_run(tmp_path / "run")
    assert "<h4>Steps skipped</h4><svg" in report_page.render([RunRecord.read(run)])
    write_lines(run / "stats.jsonl", [tick(1), tick(2)])
    assert ('<h4>Steps skipped</h4><p class="soft">None; the gradients of all steps were finite.'
            in report_page.render([RunRecord.read(run)]))


def test_curves_that_coincide_differ_in_mark_dashes_and_size_as_in_the_legend():
    looks = [look(i) for i in range(len(LOOKS))]
    for values in zip(*((x.colour, x.glyph, x.dashes, x.width, x.size) for x in looks),
                      strict=True):
        assert len(set(values)) == len(LOOKS)
    assert [x.size for x in looks] == sorted((x.size for x in looks), reverse=True)
    svg = plot([Line([1, 2], [3, 4], series=i) for i in (0, 2)], Axis("x"), "y")
    assert svg.count("stroke-dasharray") == 1 and "fill: var(--c" not in svg


def test_pairs_are_the_same_seeds_of_every_run(page):
    alts = [attrs["alt"] for tag, attrs in Page(page).elements if tag == "img"]
    assert [alt for alt in alts if "seed" in alt] == [
        f"D{D:g} (D\u00a0=\u00a0{D:g}), seed {seed}" for D in DIMS for seed in range(4)]


@pytest.mark.long
def test_pairs_leave_out_other_settings_of_the_sampler(tmp_path):
    folders = [write_run(tmp_path / str(D), D) for D in (1, 2, 128)]
    (folders[1] / "ckpt_000200/generate.json").write_text(json.dumps(sampler(2, num_steps=5)))
    text = report_page.render([RunRecord.read(folder) for folder in folders])
    assert "2 (D\u00a0=\u00a02): left out, because its images were made with other" in text
    assert "D\u00a0=\u00a02), seed" not in text and "D\u00a0=\u00a0128), seed 3" in text


def test_few_of_many_grids_are_shown_and_the_latest_opens_the_page(page):
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page, re.S)
    first = captions.index("training images")
    assert [caption.split(",")[1].split("<")[0].strip() for caption in captions[:first]] == [
        "samples at 18 kimg"] * len(DIMS)
    shown = captions[first:captions.index("training images", first + 1)]
    assert len(shown) == 6 and shown[1] == "0 kimg" and "18 kimg" not in shown


def test_the_page_opens_with_samples_best_score_and_loss(page):
    head = page[:page.index("<nav>")].replace(NBSP, " ")
    for D in DIMS:
        assert f"<b>D{D:g}</b>, samples at 18 kimg" in head and f"<br>D = {D:g}" in head
    assert head.count('class="zoom" tabindex="0"') == len(DIMS)
    # The latest plain score, base + 4, is by 10 steps, and the only one of these.
    assert [float(value) for value in re.findall(r"best FID ([\d.]+) at 200 kimg", head)] == [
        4, 14, 24, 34]
    assert head.count("loss 0.66667 at 3 kimg") == len(DIMS)


@pytest.mark.long
def test_texts_of_files_are_escaped(tmp_path):
    line = {**score_line(2, 1, noise_alpha=0.1), "metric": HOSTILE, "detector": HOSTILE,
            "reference": HOSTILE, "reference_sha256": HOSTILE, "seeds": HOSTILE}
    line["sampler"][HOSTILE] = HOSTILE
    name = HOSTILE.replace("/", "")
    folders = [write_run(tmp_path / side / name, 2, [line, {**line, "sampler": sampler(2)}],
                         arch=HOSTILE, data=HOSTILE) for side in "ab"]
    (folders[0] / "ckpt_000200/generate.json").write_text(json.dumps({"class": HOSTILE}))
    text = report_page.render([RunRecord.read(folder) for folder in folders], HOSTILE)
    parsed = assert_offline(text)
    assert HOSTILE in parsed.text and name in parsed.text


def test_plots_alone_are_not_escaped():
    pages = "".join(path.read_text(encoding="utf-8") for path in ROOM.glob("*.jinja"))
    assert report_page._TEMPLATES.autoescape is True and "autoescape" not in pages
    assert re.findall(r"{{[^}]*\bsafe\b.*?}}", pages) == ["{{- card.svg | safe }}"]


def test_damage_becomes_notes(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "training_options.json").write_text("")
    (run / "stats.jsonl").write_text("")
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe[1]\n[[[\n")
    (run / "reals.png").write_bytes(b"\x89PNG\r\n\x1a\nnot")
    (run / "samples-000000.png").write_text("no picture")
    parsed = assert_offline(report_page.render([RunRecord.read(run)]))
    for note in ("training_options.json is missing, empty or damaged; the settings are unknown",
                 "stats.jsonl holds no ticks", "reals.png can't be read as a picture",
                 "samples-000000.png can't be read as a picture"):
        assert note in parsed.text
    assert any(text.startswith("metrics.jsonl: 2 lines ignored") for text in parsed.text)


def test_runs_with_hardly_anything_are_reported(tmp_path):
    for name in ("training_options.json", "stats.jsonl", "metrics.jsonl"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("{}")
    records = [RunRecord.read(tmp_path / name) for name in
               ("training_options.json", "stats.jsonl", "metrics.jsonl")]
    assert_offline(report_page.render(records))


def test_large_pictures_are_embedded_smaller(tmp_path):
    notes = []
    PIL.Image.new("P", (3000, 1500)).save(tmp_path / "large.png")
    picture = report_page._picture(tmp_path / "large.png", notes, "x")
    assert (picture["width"], picture["height"]) == (1024, 512) and notes == []
    PIL.Image.new("P", (3000, 1500)).save(write_run(tmp_path / "run", seeds=()) / "reals.png")
    assert 'width="1024" height="512"' in report_page.render([RunRecord.read(tmp_path / "run")])


# --------------------------------------------------------------------------- the command


@pytest.mark.long
def test_the_command_writes_one_file(runs, tmp_path, invoke):
    out = tmp_path / "r.html"
    done = invoke(report.main, runs[0], f"--out={out}", "--title=A & B")
    assert done.exit_code == 0 and f"{out}: 1 run, " in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]
    assert "<h1>A &amp; B</h1>" in out.read_text(encoding="utf-8")


@pytest.mark.long
def test_a_folder_of_runs_stands_for_them_all_and_each_counts_once(runs, tmp_path, invoke):
    folder = Path(runs[0]).parent
    done = invoke(report.main, runs[1], folder, runs[0], f"--out={tmp_path / 'r.html'}")
    each = len([path for path in folder.iterdir() if (path / "training_options.json").exists()])
    assert each > 2 and f"r.html: {each} runs, " in done.output


@pytest.mark.parametrize("name, words", [
    ("none", "none: No such file or directory"), ("empty", "empty: not a run directory (no"),
    ("file", "file: Not a directory")])
def test_what_is_no_run_gets_one_line(runs, tmp_path, invoke, name, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    done = invoke(report.main, runs[0], tmp_path / name, f"--out={tmp_path / 'r.html'}")
    assert done.exit_code == 1 and words in done.output and len(done.output.splitlines()) == 1
    assert not (tmp_path / "r.html").exists()


def test_a_folder_for_the_page_is_refused_by_its_own_name(runs, tmp_path, invoke):
    done = invoke(report.main, runs[0], f"--out={tmp_path}")
    assert (done.exit_code, done.output) == (
        1, f"Error: --out={tmp_path}: is a folder; name a file, such as {tmp_path}/report.html\n")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_there_is_one_line(runs, tmp_path, invoke, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = invoke(report.main, runs[0], f"--out={tmp_path / 'r.html'}")
    assert done.exit_code == 1 and done.output == (
        "Error: the plots of a report need matplotlib, which is not installed: pip install "
        "matplotlib\n")
    assert invoke(report.main, "--help").exit_code == 0


def test_without_jinja2_there_is_one_line(runs, tmp_path, invoke, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec",
                        lambda name, *args: None if name == "jinja2" else find_spec(name, *args))
    done = invoke(report.main, runs[0], f"--out={tmp_path / 'r.html'}")
    assert done.exit_code == 1 and done.output == (
        "Error: a report needs jinja2, which is not installed: pip install jinja2\n")


NO_TORCH = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
assert not {"torch", "matplotlib.pyplot"} & set(sys.modules)
"""


@pytest.mark.scripts
def test_a_report_needs_no_torch(runs, tmp_path):
    out = tmp_path / "r.html"
    done = run_script("-c", NO_TORCH, "report.py", runs[0], runs[1], f"--out={out}")
    assert "2 runs" in done.stdout and out.stat().st_size > 1e4


@pytest.mark.parametrize("metric, lower", [
    ("fid", True), ("kid", True), ("frechet_distance", True), ("kernel_distance", True),
    ("is", False), ("precision", False), ("recall", False), ("class_accuracy", False),
    ("a_new_one", None)])
def test_which_values_are_better_is_known_of_every_metric(metric, lower):
    group = ScoreGroup(metric, "inception", 10, "ref", ())
    assert group.is_lower_better is lower


def test_the_newest_network_and_images_go_by_their_number_not_by_their_text(tmp_path):
    write_run(tmp_path / "a", seeds=())
    for kimg in ("999999", "1000000", "000002.500"):
        (tmp_path / f"a/network-snapshot-{kimg}.pt").write_bytes(b"")
        write_picture(tmp_path / f"a/ckpt_{kimg}/000000/000003.png")
    (tmp_path / "a/training-state-900000.pt").write_bytes(b"")
    assert newest_network(tmp_path / "a")[1] == "1000000"
    folder = RunRecord.read(tmp_path / "a").sample_folder
    assert folder.kimg == 1_000_000 and "ckpt_1000000" in str(folder.paths[3])
