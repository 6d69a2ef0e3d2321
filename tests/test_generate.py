import json
import math

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import run_script

import generate
from training import checkpoint
from training.config import TrainConfig
from training.networks import build_network


def write_snapshot(path, *, label_dim=2, **options):
    """Writes a network snapshot with weights that are not those of initialisation."""
    config = TrainConfig(data="none", arch="ncsnpp", cbase=8, cres=(1, 2), nblock=1, **options)
    torch.manual_seed(0)
    net = build_network(config.network(8, 3, label_dim))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    checkpoint.save(path, {
        "format": checkpoint.SNAPSHOT_FORMAT, "network": net.config,
        "ema": dict(net.state_dict()), "progress": {"cur_nimg": 0}, "options": config.to_dict()})
    return path


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    return write_snapshot(tmp_path_factory.mktemp("net") / "network.pt", pfgmpp=True, aug_dim=2.5)


def read(folder):
    return {path.name: np.asarray(PIL.Image.open(path)).astype(int)
            for path in sorted(folder.rglob("*.png"))}


def difference(a, b):
    assert a.keys() == b.keys() and a
    return max(np.abs(a[name] - b[name]).max() for name in a)


def test_an_image_depends_on_its_seed_alone(snapshot, tmp_path, invoke):
    args = [f"--network={snapshot}", "--steps=3"]
    for name, more in (("whole", ["--seeds=0-9"]), ("small", ["--seeds=0-9", "--batch=3"]),
                       ("part", ["--seeds=9,4"])):
        result = invoke(generate.main, *args, *more, f"--outdir={tmp_path / name}")
        assert result.exit_code == 0, result.output
    whole = read(tmp_path / "whole")
    assert len(whole) == 10 and len({image.tobytes() for image in whole.values()}) == 10
    assert difference(whole, read(tmp_path / "small")) <= 1
    part = read(tmp_path / "part")
    assert difference({name: whole[name] for name in part}, part) <= 1


@pytest.mark.scripts
def test_the_number_of_processes_changes_no_image(snapshot, tmp_path):
    args = ["generate.py", f"--network={snapshot}", "--steps=3", "--seeds=0-8", "--device=cpu"]
    run_script(*args, f"--outdir={tmp_path / 'one'}")
    run_script(*args, f"--outdir={tmp_path / 'two'}", "--batch=2", "--subdirs", processes=2)
    assert difference(read(tmp_path / "one"), read(tmp_path / "two")) <= 1


def test_running_again_makes_only_what_is_missing_or_broken(snapshot, tmp_path, invoke):
    args = [f"--network={snapshot}", "--steps=2", f"--outdir={tmp_path}"]
    invoke(generate.main, *args, "--seeds=0-5")
    before = read(tmp_path)
    (tmp_path / "000001.png").unlink()
    (tmp_path / "000004.png").write_bytes((tmp_path / "000004.png").read_bytes()[:60])
    kept = (tmp_path / "000003.png").stat().st_mtime_ns
    result = invoke(generate.main, *args, "--seeds=0-6")
    assert "4 of 7 images are there" in result.output and "3 images made" in result.output
    assert (tmp_path / "000003.png").stat().st_mtime_ns == kept
    after = read(tmp_path)
    assert difference(before, {name: after[name] for name in before}) <= 1


def test_a_folder_of_other_settings_is_refused(snapshot, tmp_path, invoke):
    args = [f"--network={snapshot}", f"--outdir={tmp_path}", "--seeds=0"]
    assert invoke(generate.main, *args, "--steps=2").exit_code == 0
    result = invoke(generate.main, *args, "--steps=3")
    assert result.exit_code == 1 and "num_steps: 2 there, 3 now" in result.output


def test_one_step_is_the_denoised_prior(snapshot, tmp_path, invoke):
    from training.sampling import draw_latents, to_uint8
    invoke(generate.main, f"--network={snapshot}", "--steps=1", "--seeds=3", "--sigma_max=20",
           f"--outdir={tmp_path}")
    net = checkpoint.build_ema(checkpoint.load(snapshot))
    latents, labels, _ = draw_latents(net, [3], torch.device("cpu"))
    expected = to_uint8(net(latents * 20, torch.tensor(20.0), labels))[0].permute(1, 2, 0)
    assert np.abs(read(tmp_path)["000003.png"] - expected.numpy().astype(int)).max() <= 1


def test_class_overrides_the_class_and_nothing_else(snapshot, tmp_path, invoke):
    for name, more in (("own", []), ("0", ["--class=0"]), ("1", ["--class=1"])):
        invoke(generate.main, f"--network={snapshot}", "--steps=2", "--seeds=0-7", *more,
               f"--outdir={tmp_path / name}")
    own, zero, one = (read(tmp_path / name) for name in ("own", "0", "1"))
    picked = [difference({n: own[n]}, {n: zero[n]}) <= 1 for n in own]
    other = [difference({n: own[n]}, {n: one[n]}) <= 1 for n in own]
    assert all(a != b for a, b in zip(picked, other, strict=True)), "each image is of one class"
    assert any(picked) and any(other)


def test_every_training_state_of_a_run_gets_its_folder(snapshot, tmp_path, invoke):
    for tag in ("000000.320", "000012", "1234567"):
        (tmp_path / f"training-state-{tag}.pt").write_bytes(snapshot.read_bytes())
    args = [f"--outdir={tmp_path}", "--steps=1"]
    invoke(generate.main, *args, "--seeds=0,1000", "--ckpt=1")
    invoke(generate.main, *args, "--seeds=50000", "--end_ckpt=12")
    invoke(generate.main, *args, "--seeds=100001", "--end_ckpt=0")
    made = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")}
    assert made == {
        "ckpt_000012/000000/000000.png", "ckpt_000012/001000/001000.png",
        "ckpt_1234567/000000/000000.png", "ckpt_1234567/001000/001000.png",
        "ckpt_2_000000.320/050000/050000.png", "ckpt_2_000012/050000/050000.png",
        "ckpt_3_000000.320/100000/100001.png"}


def test_churn_changes_images_at_infinite_D_and_is_refused_at_finite_D(tmp_path, snapshot, invoke):
    network = write_snapshot(tmp_path / "edm.pt", label_dim=0)
    for churn in (0, 20):
        result = invoke(generate.main, f"--network={network}", "--steps=4", "--seeds=0",
                        f"--S_churn={churn}", f"--outdir={tmp_path / str(churn)}")
        assert result.exit_code == 0, result.output
    assert difference(read(tmp_path / "0"), read(tmp_path / "20")) > 1
    result = invoke(generate.main, f"--network={snapshot}", "--S_churn=20", "--seeds=0",
                    f"--outdir={tmp_path / 'no'}")
    assert result.exit_code == 1 and "S_churn=20 with D=2.5" in result.output
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("flags, code, words", [
    (["--network=nowhere.pt"], 1, "nowhere.pt"),
    (["--class=2"], 2, "between 0 and 1"),
    (["--class=-1"], 2, "between 0 and 1"),
    (["--aug_dim=128"], 1, "D = 128, but"),
    (["--pfgmpp=0"], 1, "D = inf, but"),
    (["--sigma_min=90"], 1, "sigma_min <= sigma_max"),
])
def test_bad_options_get_one_line(flags, code, words, snapshot, tmp_path, invoke):
    result = invoke(generate.main, f"--network={snapshot}", f"--outdir={tmp_path / 'out'}", *flags)
    assert result.exit_code == code, result.output
    [line] = [text for text in result.output.splitlines() if text.startswith("Error: ")]
    assert words in line
    assert not (tmp_path / "out").exists()


def test_agreeing_flags_are_accepted(snapshot, tmp_path, invoke):
    result = invoke(generate.main, f"--network={snapshot}", f"--outdir={tmp_path}", "--pfgmpp=1",
                    "--aug_dim=2.5", "--use_pickle=1", "--steps=1", "--seeds=0")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "generate.json").read_text())["D"] == 2.5


def test_an_unconditional_network_has_no_class_and_infinite_D(tmp_path, invoke):
    network = write_snapshot(tmp_path / "edm.pt", label_dim=0)
    result = invoke(generate.main, f"--network={network}", "--class=0", f"--outdir={tmp_path}/o")
    assert result.exit_code == 2 and "unconditional" in result.output
    assert math.isinf(checkpoint.build_ema(checkpoint.load(network)).D)


def test_a_run_directory_without_states_gets_one_line(tmp_path, invoke):
    result = invoke(generate.main, f"--outdir={tmp_path}")
    assert result.exit_code == 1 and "0 training states" in result.output
    result = invoke(generate.main, f"--outdir={tmp_path / 'nowhere'}")
    assert result.exit_code == 1 and "nowhere" in result.output
