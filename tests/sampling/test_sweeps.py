"""Sweeps: the noise of the robustness study, the product of lists, folders, scores."""

import json
import re

import click
import numpy as np
import PIL.Image
import pytest
import torch
from snapshots import write_snapshot

import fid
import generate
import generate_alpha
import generate_quant
import generate_steps
from checkpoints import checkpoint
from dnnlib.cli import UserError
from pfgmpp.samplers import SamplerConfig, StackedRandomGenerator, ablation_sampler, edm_sampler
from sampling.quantization import quantise_
from sampling.sweeps import SweepPoint, sweep_points


class Ideal:
    """The ideal denoiser of a point at y."""

    sigma_min, sigma_max, D, img_channels = 0.0, float("inf"), float("inf"), 1

    def __init__(self, y=0.3):
        self.y = y

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)

    def __call__(self, x, sigma, class_labels=None):
        return torch.full_like(x, self.y)


def record(shape, seed=0):
    """Returns (randn_like, what it drew)."""
    rng, drawn = torch.Generator().manual_seed(seed), []

    def randn_like(x):
        drawn.append(torch.randn(x.shape, generator=rng, dtype=x.dtype))
        return drawn[-1]
    return randn_like, drawn


def latents(shape=(2, 1, 3, 3)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(9))


# ------------------------------------------------------------------------------- noise_alpha


def test_the_noise_enters_before_each_step_in_proportion_to_its_level():
    """For a point y a step maps x - y to (x - y) sigma'/sigma: the solution has a closed form."""
    randn_like, drawn = record((2, 1, 3, 3))
    net, z, alpha, n = Ideal(), latents(), 0.2, 5
    seen = []
    edm_sampler(net, z, randn_like=randn_like, num_steps=n, noise_alpha=alpha,
                watch=lambda x, sigma: seen.append((x - net.y, sigma)))
    assert len(drawn) == n
    expected = z.double() * 80 - net.y
    for i, (state, sigma) in enumerate(seen):
        torch.testing.assert_close(state, expected, rtol=1e-9, atol=1e-9)
        if i + 1 < n:
            expected = (expected + alpha * sigma * drawn[i]) * seen[i + 1][1] / sigma


@pytest.mark.parametrize("scaling", ["none", "vp"])
@pytest.mark.parametrize("schedule", ["linear", "vp", "ve"])
def test_the_network_sees_the_same_noise_whatever_the_schedule_and_scaling(schedule, scaling):
    seen = []

    class Spy(Ideal):
        def __call__(self, x, sigma, class_labels=None):
            seen.append(x.clone())
            return super().__call__(x, sigma)

    randn_like, drawn = record((2, 1, 3, 3))
    z = latents()
    ablation_sampler(Spy(), z, randn_like=randn_like, num_steps=3, noise_alpha=0.1,
                     discretization="edm", solver="euler", schedule=schedule, scaling=scaling)
    expected = z.double() * 80 + 0.1 * 80 * drawn[0]
    torch.testing.assert_close(seen[0].double(), expected, rtol=1e-6, atol=1e-6)
    assert len(drawn) == 3


def test_no_noise_draws_nothing_and_changes_nothing():
    def fail(x):
        raise AssertionError("drew")

    plain = edm_sampler(Ideal(), latents(), randn_like=fail, num_steps=6)
    assert torch.equal(plain, edm_sampler(Ideal(), latents(), randn_like=fail, num_steps=6,
                                          noise_alpha=0.0))


def test_the_noise_is_drawn_before_churn():
    def run(**kwargs):
        randn_like, drawn = record((2, 1, 3, 3))
        edm_sampler(Ideal(), latents(), randn_like=randn_like, num_steps=3, **kwargs)
        return drawn

    both, alone = run(noise_alpha=0.1, S_churn=1), run(noise_alpha=0.1)
    assert len(both) == 6 and len(alone) == 3
    seen = []
    randn_like, drawn = record((2, 1, 3, 3))

    class Spy(Ideal):
        def __call__(self, x, sigma, class_labels=None):
            seen.append((x.clone(), sigma))
            return super().__call__(x, sigma)

    z = latents()
    edm_sampler(Spy(), z, randn_like=randn_like, num_steps=2, noise_alpha=0.1, S_churn=0.5)
    raised = seen[0][1]
    expected = z.double() * 80 + 0.1 * 80 * drawn[0] + (raised**2 - 80.0**2).sqrt() * drawn[1]
    torch.testing.assert_close(seen[0][0].double(), expected, rtol=1e-9, atol=1e-9)


def test_a_negative_strength_is_refused():
    with pytest.raises(ValueError, match="noise_alpha=-1: must be 0 or more"):
        SamplerConfig(noise_alpha=-1).check(Ideal())


# ------------------------------------------------------------------------------------ points


def test_points_are_the_product_with_names_in_the_published_order():
    points = sweep_points((10, 12), (0.0, 0.1), (5,))
    assert [point.suffix for point in points] == [
        "_alpha_0_steps_10_quant_5", "_alpha_0_steps_12_quant_5",
        "_alpha_0.1_steps_10_quant_5", "_alpha_0.1_steps_12_quant_5"]
    assert points[-1] == SweepPoint(12, 0.1, 5, "_alpha_0.1_steps_12_quant_5")
    assert sweep_points((18,)) == [SweepPoint(18, 0.0, 32, "")]
    assert sweep_points((18,), is_steps_sweep=True)[0].suffix == "_steps_18"


# ------------------------------------------------------------------------------ command lines


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    write_snapshot(root / "training-state-000200.pt")
    return root


def call(main, *args):
    main.main([*map(str, args), "--device=cpu"], standalone_mode=False)


def images(folder):
    return {path.name: np.asarray(PIL.Image.open(path)) for path in sorted(folder.rglob("*.png"))}


@pytest.mark.parametrize("script, names", [
    (generate_alpha, ["alpha_0", "alpha_0.1", "alpha_0.2"]),
    pytest.param(generate_steps, [f"steps_{n}" for n in (10, 12, 14, 16, 18, 20, 22, 24)],
                 marks=pytest.mark.slow),
    (generate_quant, [f"quant_{b}" for b in (5, 6, 7, 8, 9)]),
])
@pytest.mark.long
def test_presets_make_the_published_folders(run_dir, script, names):
    call(script.main, f"--outdir={run_dir}", "--seeds=0-1", "--ckpt=200", "--end_ckpt=200")
    for name in names:
        folder = run_dir / f"ckpt_000200_{name}"
        assert len(images(folder)) == 2
        settings = json.loads((folder / "generate.json").read_text())
        kind, value = name.split("_")
        key = {"alpha": "noise_alpha", "steps": "num_steps", "quant": "bits"}[kind]
        assert settings.get(key, 0) == float(value)


def test_a_preset_with_one_value_still_names_the_folder(run_dir, tmp_path):
    (tmp_path / "training-state-000007.pt").write_bytes(
        (run_dir / "training-state-000200.pt").read_bytes())
    call(generate_steps.main, f"--outdir={tmp_path}", "--seeds=0", "--steps=3")
    call(generate_alpha.main, f"--outdir={tmp_path}", "--seeds=50000", "--alpha=0.1", "--steps=2")
    assert sorted(path.name for path in tmp_path.glob("ckpt_*")) == [
        "ckpt_000007_steps_3", "ckpt_2_000007_alpha_0.1"]


@pytest.mark.long
def test_points_differ_from_plain_sampling_only_by_their_setting(run_dir, tmp_path):
    state = run_dir / "training-state-000200.pt"
    call(generate.main, f"--network={state}", f"--outdir={tmp_path / 'plain'}", "--seeds=0-1",
         "--steps=4")
    call(generate.main, f"--network={state}", f"--outdir={tmp_path / 'sweep'}", "--seeds=0-1",
         "--steps=4", "--alpha=0,0.3", "--bits=4,32")
    plain = images(tmp_path / "plain")
    found = {folder.name: images(folder) for folder in (tmp_path / "sweep").iterdir()}
    assert set(found) == {f"ckpt_000000_alpha_{a}_quant_{b}" for a in ("0", "0.3")
                          for b in (32, 4)}
    for name, pictures in found.items():
        same = all(np.array_equal(plain[k], pictures[k]) for k in plain)
        assert same == (name == "ckpt_000000_alpha_0_quant_32")


def test_quantised_images_are_those_of_the_rounded_network(run_dir, tmp_path):
    content = checkpoint.load(run_dir / "training-state-000200.pt")
    net = checkpoint.build_ema(content)
    quantise_(net, 4)
    rounded = {**content, "ema": dict(net.state_dict())}
    checkpoint.save(tmp_path / "rounded.pt", rounded)
    for name, args in (("a", [f"--network={tmp_path / 'rounded.pt'}"]),
                       ("b", [f"--network={run_dir / 'training-state-000200.pt'}", "--bits=4"])):
        call(generate.main, f"--outdir={tmp_path / name}", "--seeds=0-2", "--steps=2", *args)
    first, second = images(tmp_path / "a"), images(tmp_path / "b" / "ckpt_000000_quant_4")
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_images_of_another_draw_of_rounding_need_another_folder(run_dir, tmp_path, capsys):
    state = run_dir / "training-state-000200.pt"
    args = [f"--network={state}", "--seeds=0-1", "--steps=2", "--bits=3,32"]
    draws = {"nearest": [], "0": ["--rounding-seed=0"], "1": ["--rounding-seed=1"],
             "0 again": ["--rounding-seed=0"]}
    made, rounding = {}, "ckpt_000000_quant_3"
    for name, flags in draws.items():
        call(generate.main, *args, f"--outdir={tmp_path / name}", *flags)
        made[name] = images(tmp_path / name / rounding)
        for folder, seed in ((rounding, flags), ("ckpt_000000_quant_32", [])):
            settings = json.loads((tmp_path / name / folder / "generate.json").read_text())
            assert settings.get("rounding_seed") == (int(seed[0][-1]) if seed else None)
    same = {(a, b) for a in made for b in made if a < b and all(
        np.array_equal(made[a][key], made[b][key]) for key in made[a])}
    assert same == {("0", "0 again")}
    for name, then in (("nearest", None), ("0", 0)):
        words = rf"another setting \(rounding_seed: {then} there, 1 now\); remove it or name"
        with pytest.raises(click.ClickException, match=words):
            call(generate.main, *args, f"--outdir={tmp_path / name}", "--rounding-seed=1")


@pytest.mark.parametrize("command", [["generate"], ["fid", "gen"]])
@pytest.mark.parametrize("bits", [[], ["--bits=32"], ["--bits=32,32"]])
def test_a_seed_of_rounding_needs_weights_that_are_rounded(capsys, command, bits):
    main = {"generate": generate.main, "fid": fid.main}[command[0]]
    with pytest.raises(SystemExit) as caught:
        main([*command[1:], "--network=x.pt", "--outdir=y" if command == ["generate"] else
              "--ref=y.npz", "--rounding-seed=3", *bits])
    assert caught.value.code == 2
    assert "--rounding-seed=3: no weights are rounded; give --bits below 32, or leave " \
        "--rounding-seed out" in capsys.readouterr().err


def test_a_sweep_is_not_done_again(run_dir, tmp_path, capsys):
    args = [f"--network={run_dir / 'training-state-000200.pt'}", f"--outdir={tmp_path}",
            "--seeds=0-1", "--steps=2,3"]
    call(generate.main, *args)
    capsys.readouterr()
    call(generate.main, *args)
    assert capsys.readouterr().out.count("0 images made") == 2


@pytest.mark.parametrize("flag, words", [
    ("--steps=0", "'0' is not a list of whole numbers, each at least 1"),
    ("--steps=3,x", "is not a list of whole numbers"),
    ("--alpha=-1", "is not a list of numbers, each at least 0"),
    ("--alpha=inf", "is not a list of numbers"),
    ("--alpha=nan", "is not a list of numbers"),
    ("--bits=33", "each at least 1 and at most 32"),
    ("--rounding-seed=-1", "-1 is not in the range 0<=x<=4294967295"),
    ("--rounding-seed=4294967296", "4294967296 is not in the range 0<=x<=4294967295"),
    ("--pfgm=1", "--pfgm: not supported; PFGM is --pfgmpp=1 --aug_dim=1"),
])
def test_bad_lists_get_one_line(run_dir, tmp_path, capsys, flag, words):
    with pytest.raises(SystemExit) as caught:
        generate.main([f"--outdir={run_dir}", flag])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.long
def test_sweeps_are_scored_by_calc_and_gen_alike(run_dir, tmp_path, capsys):
    state = run_dir / "training-state-000200.pt"
    call(generate.main, f"--network={state}", f"--outdir={tmp_path / 'sweep'}", "--seeds=0-5",
         "--steps=2,3", "--alpha=0,0.5")
    real = tmp_path / "real"
    call(generate.main, f"--network={state}", f"--outdir={real}", "--seeds=10-19", "--steps=2")
    score = [f"--ref={real}", "--detector=pixels", "--workers=0"]
    call(fid.main, "calc", f"--images={tmp_path / 'sweep'}", "--num=6", "--alpha", "--steps",
         f"--out={tmp_path / 'calc.jsonl'}", *score)
    calc = capsys.readouterr().out
    call(fid.main, "gen", f"--network={state}", "--seeds=0-5", "--steps=2,3", "--alpha=0,0.5",
         f"--out={tmp_path / 'gen.jsonl'}", *score)
    gen = capsys.readouterr().out
    values = [[json.loads(line)["value"] for line in
               (tmp_path / f"{name}.jsonl").read_text().splitlines()] for name in ("calc", "gen")]
    assert len(values[0]) == 4 and len(set(values[0])) == 4
    assert values[0] == pytest.approx(values[1], rel=1e-9)
    assert re.search(r"alpha 0.5 steps 3 seeds 0-5 ", gen)
    assert "ckpt_000000_alpha_0.5_steps_3" in calc


def test_pickles_of_a_run_are_found_when_asked_for(tmp_path, run_dir):
    (tmp_path / "training-state-000009.pkl").write_bytes(
        (run_dir / "training-state-000200.pt").read_bytes())
    with pytest.raises(UserError, match="0 training states"):
        call(generate.main, f"--outdir={tmp_path}", "--seeds=0")
    call(generate.main, f"--outdir={tmp_path}", "--seeds=0", "--steps=2", "--use_pickle")
    assert len(images(tmp_path / "ckpt_000009")) == 1


def test_the_noise_of_a_seed_does_not_depend_on_its_batch():
    draws = [StackedRandomGenerator("cpu", seeds) for seeds in ([3, 4], [4])]
    config = SamplerConfig(num_steps=3, noise_alpha=0.2)
    z = latents((2, 1, 4, 4))
    both = config.sample(Ideal(), z, None, draws[0].randn_like)
    alone = config.sample(Ideal(), z[1:], None, draws[1].randn_like)
    assert torch.equal(both[1:], alone)
