"""Solvers and noise levels of one's own on the command line."""

import json

import numpy as np
import pytest
from snapshots import write_snapshot
from tiny import write_dataset

import fid
import generate
import generate_alpha


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return write_snapshot(tmp_path_factory.mktemp("net") / "net.pt", pfgmpp=True, aug_dim=2.5)


def images(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.png"))}


@pytest.mark.parametrize("flags, nfe", [
    ([], 35), (["--steps=5"], 9), (["--solver=ipndm", "--steps=7"], 7),
    (["--solver=ipndm", "--order=1", "--steps=7"], 7), (["--solver=dpmpp2m", "--steps=4"], 4),
    (["--solver=unipc", "--steps=4"], 4), (["--solver=euler", "--steps=4"], 4),
    (["--solver=heun", "--sigmas=80,9,1,0.1"], 7), (["--solver=unipc", "--sigmas=80,9,1"], 3)])
def test_evaluations_are_recorded(network, tmp_path, invoke, flags, nfe):
    args = [f"--network={network}", f"--outdir={tmp_path / 'out'}", "--seeds=0", *flags]
    for _ in range(2):  # the folder is its own
        assert invoke(generate.main, *args).exit_code == 0
    record = json.loads((tmp_path / "out/generate.json").read_text())
    assert record["nfe"] == nfe and len(images(tmp_path / "out")) == 1
    del record["nfe"]  # as in a folder of an earlier version
    (tmp_path / "out/generate.json").write_text(json.dumps(record))
    assert invoke(generate.main, *args).exit_code == 0


def test_ipndm_of_order_1_is_eulers_method(network, tmp_path, invoke):
    for name, flags in (("a", ["--solver=ipndm", "--order=1"]), ("b", ["--solver=euler"])):
        assert invoke(generate.main, f"--network={network}", f"--outdir={tmp_path / name}",
                      "--seeds=0-3", "--steps=6", *flags).exit_code == 0
    assert images(tmp_path / "a") == images(tmp_path / "b")


def test_levels_come_from_the_line_or_a_file(network, tmp_path, invoke):
    levels = [80.0, 8.5, 1.25, 0.05]
    (tmp_path / "levels.txt").write_text("80, 8.5\n1.25 0.05\n")
    np.save(tmp_path / "levels.npy", levels)
    made = []
    for source in ("80,8.5,1.25,0.05", tmp_path / "levels.txt", tmp_path / "levels.npy"):
        out = tmp_path / f"out{len(made)}"
        assert invoke(generate.main, f"--network={network}", f"--outdir={out}", "--seeds=0-2",
                      f"--sigmas={source}").exit_code == 0
        assert json.loads((out / "generate.json").read_text())["sigmas"] == levels
        made.append(images(out))
    assert made[0] == made[1] == made[2] and len(made[0]) == 3


@pytest.mark.parametrize("flags, words", [
    (["--sigmas=80,1", "--steps=3"], "--steps with --sigmas: both set the noise levels"),
    (["--sigmas=80,1", "--sigma_max=3"], "--sigma_max with --sigmas"),
    (["--sigmas=80,1", "--sigma_min=3"], "--sigma_min with --sigmas"),
    (["--sigmas=80,1", "--rho=3"], "--rho with --sigmas"),
    (["--sigmas=80,1", "--disc=vp"], "--disc with --sigmas"),
    (["--sigmas=80,1,0"], "the last step, to 0, is added"), (["--sigmas=1,80"], "falling"),
    (["--sigmas=nowhere.txt"], "must be an existing file, or noise levels such as"),
    (["--sigmas="], "noise levels"),
    (["--order=2"], "--order=2: only ipndm has orders; give --solver=ipndm"),
    (["--solver=ipndm", "--schedule=vp"], "--schedule=vp: --solver=ipndm solves the equation in"),
    (["--solver=unipc", "--scaling=vp"], "--scaling=vp: --solver=unipc solves the equation in"),
    (["--solver=dpmpp2m", "--S_churn=3"], "--S_churn=3.0: --solver=dpmpp2m uses earlier steps"),
    (["--solver=ipndm", "--alpha=0.1"], "--alpha=0.1: --solver=ipndm uses earlier steps")])
def test_what_does_not_go_together_is_refused_in_one_line(network, tmp_path, invoke, flags, words):
    for main, more in ((generate.main, [f"--outdir={tmp_path / 'out'}"]),
                       (fid.main, ["--metrics=is", f"--out={tmp_path / 'm.jsonl'}"])):
        command = ["gen"] if main is fid.main else []
        result = invoke(main, *command, f"--network={network}", "--seeds=0-1", *more, *flags)
        assert result.exit_code == 2 and words in result.stderr, result.stderr
        assert result.stderr.strip().splitlines()[-1].startswith("Error: ")
    assert not (tmp_path / "out").exists() and not (tmp_path / "m.jsonl").exists()


def test_init_images_start_at_the_first_of_the_levels(network, tmp_path, invoke):
    data = write_dataset(tmp_path / "data.zip", num=3, classes=0)
    args = [f"--network={network}", "--seeds=0-2", f"--init-image={data}"]
    for name, flags in (("a", ["--sigmas=2,0.5"]),
                        ("b", ["--init-sigma=2", "--sigma_min=0.5", "--steps=2"])):
        assert invoke(generate.main, *args, *flags, f"--outdir={tmp_path / name}").exit_code == 0
    assert images(tmp_path / "a") == images(tmp_path / "b")
    result = invoke(generate.main, *args, "--sigmas=2,0.5", "--init-sigma=2",
                    f"--outdir={tmp_path / 'c'}")
    assert result.exit_code == 2 and "leave --init-sigma out" in result.stderr


def test_scores_of_any_solver_are_those_of_its_images(network, tmp_path, invoke):
    data = write_dataset(tmp_path / "data.zip", num=8, classes=0)
    common = [f"--ref={data}", "--detector=pixels", "--device=cpu", "--workers=0"]
    sampling = [f"--network={network}", "--seeds=0-4", "--solver=unipc", "--steps=2,3"]
    assert invoke(generate.main, *sampling, f"--outdir={tmp_path / 'out'}").exit_code == 0
    done = invoke(fid.main, "gen", *sampling, *common, f"--out={tmp_path / 'm.jsonl'}")
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [line["sampler"]["nfe"] for line in lines] == [2, 3]
    for line, steps in zip(lines, (2, 3), strict=True):
        scored = invoke(fid.main, "calc", f"--images={tmp_path}/out/ckpt_000000_steps_{steps}",
                        "--count=5", *common)
        assert float(scored.stdout.split(": ")[1]) == pytest.approx(line["value"], rel=1e-4)


def test_a_default_that_is_spelled_out_is_no_other_setting(network, tmp_path, invoke):
    for name, first, second in (("a", [], ["--solver=heun", "--disc=edm", "--schedule=linear",
                                           "--scaling=none"]),
                                ("b", ["--solver=ipndm"], ["--solver=ipndm", "--order=3"])):
        for flags in (first, second, first):
            result = invoke(generate.main, f"--network={network}", f"--outdir={tmp_path / name}",
                            "--seeds=0", "--steps=3", *flags)
            assert result.exit_code == 0, result.output
    result = invoke(generate.main, f"--network={network}", f"--outdir={tmp_path / 'b'}",
                    "--seeds=0", "--steps=3", "--solver=ipndm", "--order=2")
    assert result.exit_code == 1 and "another setting (order: 3 there, 2 now)" in result.stderr


def test_noise_of_a_list_is_refused_before_anything_is_made(network, tmp_path, invoke):
    for command in (generate.main, generate_alpha.main):
        result = invoke(command, f"--network={network}", f"--outdir={tmp_path / 'o'}",
                        "--seeds=0", "--solver=ipndm", "--alpha=0,0.1")
        assert result.exit_code == 2 and "--alpha=0.1: --solver=ipndm uses" in result.stderr
        assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("name, content, words", [
    ("empty.npy", b"", "must be a text file of numbers"),
    ("matrix.npy", np.ones([2, 2]), "an array [n] of numbers"),
    ("text.npy", np.array(["80", "1"]), "an array [n] of numbers"),
    ("empty.txt", b"", "above 0 in falling order"), ("words.txt", b"eighty", "must be a text file"),
    ("big.txt", b"80 " + b" " * (1 << 20) + b"1", "at most 1 MiB"),
    ("utf16.txt", "80,1".encode("utf-16"), "must be a text file"),
    ("inf.txt", b"inf 1", "at most 1e+06"), ("huge.txt", b"1e39 1", "at most 1e+06")])
def test_files_that_hold_no_levels_are_refused(network, tmp_path, invoke, name, content, words):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        np.save(tmp_path / name, content)
    result = invoke(generate.main, f"--network={network}", f"--outdir={tmp_path / 'o'}",
                    "--seeds=0", f"--sigmas={tmp_path / name}")
    assert result.exit_code != 0 and words in result.stderr, result.stderr
    assert result.stderr.count("\n") <= 4 and not (tmp_path / "o").exists()


@pytest.mark.parametrize("content", [b"80,1\r\n0.1\r\n", b"\xef\xbb\xbf80 1 0.1",
                                     b"# published\n80 1 # first\n0.1\n"])
def test_files_of_levels_as_people_have_them(network, tmp_path, invoke, content):
    (tmp_path / "levels.txt").write_bytes(content)
    assert invoke(generate.main, f"--network={network}", f"--outdir={tmp_path / 'o'}", "--seeds=0",
                  f"--sigmas={tmp_path / 'levels.txt'}").exit_code == 0
    assert json.loads((tmp_path / "o/generate.json").read_text())["sigmas"] == [80, 1, 0.1]


def test_a_file_is_no_way_round_numbers(network, tmp_path, invoke, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "80").write_text("1000,1")
    assert invoke(generate.main, f"--network={network}", "--outdir=o", "--seeds=0",
                  "--sigmas=80").exit_code == 0
    assert json.loads((tmp_path / "o/generate.json").read_text())["sigmas"] == [80]


def test_a_long_list_is_not_repeated_in_the_error(network, tmp_path, invoke):
    result = invoke(generate.main, f"--network={network}", f"--outdir={tmp_path / 'o'}",
                    f"--sigmas={','.join(['1'] * 5000)}")
    assert result.exit_code == 2 and len(result.stderr) < 500


def test_a_start_below_the_lowest_level_is_named_by_its_flag(network, tmp_path, invoke,
                                                                dataset_zip):
    result = invoke(generate.main, f"--network={network}", f"--outdir={tmp_path / 'o'}",
                    "--seeds=0", f"--init-image={dataset_zip}", "--init-sigma=0.001")
    assert result.exit_code == 2 and "--init-sigma: starts at sigma 0.001" in result.stderr
    assert "below the lowest level, sigma 0.002" in result.stderr
