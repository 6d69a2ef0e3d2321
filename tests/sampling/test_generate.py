import dataclasses
import itertools
import json
import math

import numpy as np
import PIL.Image
import pytest
import torch
from scripts import run_script
from snapshots import write_snapshot
from tiny import write_dataset

import generate
from checkpoints import checkpoint
from pfgmpp.networks import build_network
from sampling.image_writer import ImageFolder, ImageWriter
from sampling.network_sampler import NetworkSampler
from training.config import TrainConfig


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


def test_short_batches_are_filled_up_for_a_network_of_one_size(snapshot):
    sampler = NetworkSampler.open(str(snapshot), torch.device("cpu"), num_steps=2)
    sizes, batches = [], [[4, 5, 6], [], [7]]
    sampler.net.register_forward_pre_hook(lambda net, args: sizes.append(len(args[0])))
    plain = list(sampler.images(batches))
    del sizes[:]
    filled = list(dataclasses.replace(sampler, one_size=True).images(batches))
    assert set(sizes) == {3}
    for a, b in zip(filled, plain, strict=True):
        assert a.seeds == b.seeds and a.class_labels.equal(b.class_labels)
        torch.testing.assert_close(a.images, b.images, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("precision", ["tf32", "fp32"])
def test_the_precision_of_a_sampler_holds_without_a_script(snapshot, precision):
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = precision == "fp32"
        NetworkSampler.open(str(snapshot), torch.device("cpu"), precision=precision)
        assert all(backend.allow_tf32 == (precision == "tf32") for backend in backends)
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_images_and_is_compiled_once(snapshot, tmp_path, invoke):
    from torch._dynamo.utils import counters
    args = [f"--network={snapshot}", "--steps=3", "--seeds=0-6", "--batch=3"]  # the last is alone
    invoke(generate.main, *args, f"--outdir={tmp_path / 'plain'}")
    counters.clear()
    result = invoke(generate.main, *args, "--compile=1", f"--outdir={tmp_path / 'compiled'}")
    assert result.exit_code == 0, result.output
    # Of c_noise [1]; every batch was filled up to three.
    assert counters["stats"]["unique_graphs"] == 1
    assert difference(read(tmp_path / "plain"), read(tmp_path / "compiled")) <= 1
    record = json.loads((tmp_path / "compiled/generate.json").read_text())
    assert record["compile"] is True


@pytest.mark.scripts
@pytest.mark.slow
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
    for text, words in (("{", "line 1, column 2"), ("[1]", "not a record of settings")):
        (tmp_path / "generate.json").write_text(text)
        result = invoke(generate.main, *args, "--steps=2")
        assert result.exit_code == 1 and f"generate.json: {words}" in result.output


def test_a_folder_of_another_network_is_refused_in_few_words(snapshot, tmp_path, invoke):
    other = write_snapshot(tmp_path / "other.pt", pfgmpp=True, aug_dim=2.5, seed=1)
    args = [f"--outdir={tmp_path / 'out'}", "--seeds=0", "--steps=2"]
    assert invoke(generate.main, f"--network={snapshot}", *args).exit_code == 0
    result = invoke(generate.main, f"--network={other}", *args)
    assert result.exit_code == 1 and "holds images of another network" in result.output
    assert len(result.output) < 300


@pytest.mark.long
@pytest.mark.parametrize("name, flags", [
    ("000001.png", []), ("000123 copy.png", []), ("000007.npy", []),
    ("000000/000001.png", ["--subdirs"]),
])
def test_images_of_unknown_making_are_neither_kept_nor_replaced(name, flags, snapshot, tmp_path,
                                                                invoke):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"mine")
    result = invoke(generate.main, f"--network={snapshot}", f"--outdir={tmp_path}", "--seeds=0-2",
                    "--steps=2", *flags)
    assert result.exit_code == 1 and f"holds {name}, but no generate.json" in result.output
    assert path.read_bytes() == b"mine" and not (tmp_path / "generate.json").exists()


def test_other_files_in_the_folder_are_left_alone(snapshot, tmp_path, invoke):
    (tmp_path / "holiday.png").write_bytes(b"mine")
    result = invoke(generate.main, f"--network={snapshot}", f"--outdir={tmp_path}", "--seeds=0-2",
                    "--steps=2")
    assert result.exit_code == 0 and "3 images made" in result.output
    assert (tmp_path / "holiday.png").read_bytes() == b"mine"


@pytest.mark.parametrize("flag, words", [
    ("--network=nowhere.pt", "nowhere.pt: no such file; name a run directory, a network-snap"),
    ("--outdir=FILE", "is a file; name a folder instead"),
])
def test_paths_that_cannot_be_are_told_with_a_way_out(flag, words, snapshot, tmp_path, invoke):
    (tmp_path / "file").write_text("text")
    result = invoke(generate.main, f"--network={snapshot}", f"--outdir={tmp_path / 'out'}",
                    "--seeds=0", flag.replace("FILE", str(tmp_path / "file")))
    assert result.exit_code == 1 and words in result.output
    assert (tmp_path / "file").read_text() == "text" and not (tmp_path / "out").exists()


def test_one_step_is_the_denoised_prior(snapshot, tmp_path, invoke):
    from pfgmpp.samplers import draw_latents, to_uint8
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
    for last in (49_999, 99_999):  # of each set of fifty thousand
        invoke(generate.main, *args, f"--seeds={last}", "--ckpt=1000000")
    made = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")}
    assert made == {
        "ckpt_000012/000000/000000.png", "ckpt_000012/001000/001000.png",
        "ckpt_1234567/000000/000000.png", "ckpt_1234567/001000/001000.png",
        "ckpt_2_000000.320/050000/050000.png", "ckpt_2_000012/050000/050000.png",
        "ckpt_3_000000.320/100000/100001.png",
        "ckpt_1234567/049000/049999.png", "ckpt_2_1234567/099000/099999.png"}


@pytest.mark.long
@pytest.mark.parametrize("D", [2.5, math.inf])
def test_churn_changes_images_at_every_D_and_is_recorded(D, tmp_path, snapshot, invoke):
    plain = write_snapshot(tmp_path / "edm.pt", label_dim=0)
    network = plain if math.isinf(D) else snapshot
    for churn in (0, 20):
        result = invoke(generate.main, f"--network={network}", "--steps=4", "--seeds=0",
                        f"--S_churn={churn}", f"--outdir={tmp_path / str(churn)}")
        assert result.exit_code == 0, result.output
    assert difference(read(tmp_path / "0"), read(tmp_path / "20")) > 1
    settings = json.loads((tmp_path / "20/generate.json").read_text())
    assert settings["S_churn"] == 20


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


# ---- shapes, guidance, given images -------------------------------------------------------------

def test_images_that_are_not_square_come_out_as_they_are(tmp_path, invoke):
    network = write_snapshot(tmp_path / "wide.pt", label_dim=0, shape=(1, 4, 12))
    args = [f"--network={network}", "--steps=2", "--seeds=0-2", f"--outdir={tmp_path / 'out'}"]
    result = invoke(generate.main, *args, "--save_images")
    assert result.exit_code == 0, result.output
    assert {image.shape for name, image in read(tmp_path / "out").items()
            if name != "grid.png"} == {(4, 12)}
    grid = np.asarray(PIL.Image.open(tmp_path / "out/vis/grid.png"))
    images = read(tmp_path / "out")
    for i in range(3):  # enlarged 16 times, three columns, gaps of 2 pixels
        y, x = 2, 2 + i * 194
        shown = grid[y:y + 64:16, x:x + 192:16, 0].astype(int)
        assert np.abs(shown - images[f"00000{i}.png"]).max() <= 1
    assert "3 of 3 images are there" in invoke(generate.main, *args).output


def test_the_movie_begins_with_noise_and_rests_on_the_images(snapshot, tmp_path, invoke):
    args = [f"--network={snapshot}", "--steps=5", "--seeds=0-8", f"--outdir={tmp_path / 'out'}"]
    assert invoke(generate.main, *args, "--save_images").exit_code == 0
    with PIL.Image.open(tmp_path / "out/vis/movie.gif") as movie:
        assert movie.info["loop"] == 0 and movie.n_frames == 6  # each level, and the images
        frames, times = [], []
        for number in range(6):
            movie.seek(number)
            times.append(movie.info["duration"])
            frames.append(np.asarray(movie.convert("RGB")).astype(int))
    assert times == [100] * 5 + [2000]
    grid = np.asarray(PIL.Image.open(tmp_path / "out/vis/grid.png")).astype(int)
    # A GIF has 256 colours; none is far off.
    assert np.abs(frames[-1] - grid).max() < 64
    assert np.abs(frames[-1] - grid).mean() < 12 < np.abs(frames[0] - grid).mean()
    noise = frames[0][2:66:8, -66:-2:8] / 127.5 - 1  # of one image, shown at deviation 0.5
    assert 0.3 < noise.std() < 0.7


def test_8_bit_images_that_no_png_holds_become_arrays_and_are_continued(tmp_path, invoke):
    network = write_snapshot(tmp_path / "five.pt", label_dim=0, shape=(5, 8, 8))
    args = [f"--network={network}", "--steps=2", "--seeds=0-2", f"--outdir={tmp_path / 'out'}"]
    assert "3 images made" in invoke(generate.main, *args, "--save_images").output
    images = [np.load(tmp_path / f"out/00000{i}.npy") for i in range(3)]
    assert {(image.dtype.name, image.shape) for image in images} == {("uint8", (5, 8, 8))}
    whole = (tmp_path / "out/000001.npy").read_bytes()
    (tmp_path / "out/000001.npy").write_bytes(whole[:-1])
    result = invoke(generate.main, *args)
    assert "2 of 3 images are there" in result.output
    assert (tmp_path / "out/000001.npy").read_bytes() == whole
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "000000.npy", "000001.npy", "000002.npy", "generate.json", "vis"]


def test_guidance_of_one_changes_neither_images_nor_the_record(snapshot, tmp_path, invoke):
    args = [f"--network={snapshot}", "--steps=2", "--seeds=0-3"]
    invoke(generate.main, *args, f"--outdir={tmp_path / 'plain'}")
    result = invoke(generate.main, *args, "--guidance=1", f"--outdir={tmp_path / 'one'}")
    assert result.exit_code == 0, result.output
    plain, one = tmp_path / "plain", tmp_path / "one"
    assert all(path.read_bytes() == (one / path.name).read_bytes() for path in plain.iterdir())
    record = json.loads((plain / "generate.json").read_text())
    assert not {"guidance", "gnet", "guidance_interval", "cond_image", "init_image"} & set(record)


@pytest.mark.long
def test_guidance_is_recorded_and_changes_images(snapshot, tmp_path, invoke):
    gnet = write_snapshot(tmp_path / "gnet.pt", seed=1, pfgmpp=True, aug_dim=2.5, label_dim=0)
    other = write_snapshot(tmp_path / "other.pt", seed=2, pfgmpp=True, aug_dim=2.5)
    runs = {"plain": [], "free": ["--guidance=2"], "auto": ["--guidance=2", f"--gnet={gnet}"],
            "inside": ["--guidance=2", "--guidance-interval=0.1,inf"],
            "other": ["--guidance=2", f"--gnet={other}"],
            "nowhere": ["--guidance=2", "--guidance-interval=500,inf"]}
    base = [f"--network={snapshot}", "--steps=3", "--seeds=0-3"]
    for name, flags in runs.items():
        result = invoke(generate.main, *base, *flags, f"--outdir={tmp_path / name}")
        assert result.exit_code == 0, result.output
        is_warned = "trained without --label-dropout" in result.stderr
        assert is_warned == ("--guidance=2" in flags and not any("gnet" in f for f in flags)), name
    images = {name: read(tmp_path / name) for name in runs}
    assert difference(images["plain"], images["nowhere"]) == 0
    for a, b in (("plain", "free"), ("free", "auto"), ("auto", "other"), ("free", "inside")):
        assert difference(images[a], images[b]) > 1, (a, b)
    record = json.loads((tmp_path / "inside/generate.json").read_text())
    assert record["guidance"] == 2 and record["guidance_interval"] == [0.1, "inf"]
    names = list(runs)  # every folder is continued by its own flags alone
    for name, other_name in [*zip(names, names, strict=True), *itertools.pairwise(names),
                             *itertools.pairwise(names[::-1])]:
        result = invoke(generate.main, *base, *runs[other_name], f"--outdir={tmp_path / name}")
        assert result.exit_code == (0 if other_name == name else 1), (name, other_name)


def test_guidance_after_label_dropout_needs_no_warning(tmp_path, invoke):
    path = write_snapshot(tmp_path / "net.pt", cond=True, label_dropout=0.1)
    result = invoke(generate.main, f"--network={path}", "--steps=2", "--seeds=0", "--guidance=2",
                    f"--outdir={tmp_path / 'out'}")
    assert result.exit_code == 0 and result.stderr == ""


def test_guidance_keeps_an_image_a_function_of_its_seed(snapshot, tmp_path, invoke):
    args = [f"--network={snapshot}", "--steps=3", "--guidance=3"]
    invoke(generate.main, *args, "--seeds=0-5", f"--outdir={tmp_path / 'whole'}")
    invoke(generate.main, *args, "--seeds=4,1", "--batch=1", f"--outdir={tmp_path / 'part'}")
    whole, part = read(tmp_path / "whole"), read(tmp_path / "part")
    assert difference({name: whole[name] for name in part}, part) <= 1


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    return write_snapshot(tmp_path_factory.mktemp("cond") / "cond.pt", label_dim=0,
                          cond_channels=1, pfgmpp=True, aug_dim=2.5)


@pytest.fixture(scope="module")
def gray(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("gray") / "gray.zip", num=3, channels=1)


def test_seed_k_is_sampled_for_condition_k_mod_n(conditional, gray, tmp_path, invoke):
    from images.dataset import ImageFolderDataset
    from pfgmpp.samplers import draw_latents, to_uint8
    result = invoke(generate.main, f"--network={conditional}", f"--cond-image={gray}", "--steps=1",
                    "--seeds=0-6", f"--outdir={tmp_path / 'out'}", "--batch=4")
    assert result.exit_code == 0, result.output
    net, data = checkpoint.build_ema(checkpoint.load(conditional)), ImageFolderDataset(gray)
    for seed in range(7):
        latents, _, _ = draw_latents(net, [seed], torch.device("cpu"))
        condition = torch.from_numpy(data.get_batch([seed % 3])[0]).float() / 127.5 - 1
        expected = to_uint8(net(latents * 80, torch.tensor(80.0), condition=condition))[0]
        image = read(tmp_path / "out")[f"{seed:06d}.png"]
        assert np.abs(image - expected.permute(1, 2, 0).numpy().astype(int)).max() <= 1
    record = json.loads((tmp_path / "out/generate.json").read_text())
    assert record["cond_image"] == data.fingerprint


@pytest.mark.long
def test_a_folder_of_other_given_images_is_refused(snapshot, conditional, gray, tmp_path, invoke):
    other = write_dataset(tmp_path / "other.zip", num=4, channels=1)
    rgb = write_dataset(tmp_path / "rgb.zip", num=2)
    args = ["--steps=1", "--seeds=0"]
    for network, first, second in (
            (conditional, [f"--cond-image={gray}"], [f"--cond-image={other}"]),
            (snapshot, [f"--init-image={rgb}", "--init-sigma=1"], ["--sigma_max=1"]),
            (snapshot, ["--sigma_max=1"], [f"--init-image={rgb}", "--init-sigma=1"])):
        folder = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        base = [f"--network={network}", *args, f"--outdir={folder}"]
        assert invoke(generate.main, *base, *first).exit_code == 0
        result = invoke(generate.main, *base, *second)
        assert result.exit_code == 1 and "_image:" in result.output
        assert invoke(generate.main, *base, *first).exit_code == 0


def test_starting_from_images_with_little_noise_returns_them(tmp_path, dataset_zip, invoke):
    # An untrained network denoises by c_skip x to within 1e-3, which is 1 to 1e-4 at level 0.005.
    config = TrainConfig(data="none", arch="ncsnpp", cbase=8, cres=(1, 2), nblock=1)
    net = build_network(config.network(8, 3, 0))
    checkpoint.save(tmp_path / "new.pt", {
        "format": checkpoint.SNAPSHOT_FORMAT, "network": net.config,
        "ema": dict(net.state_dict()), "progress": {"cur_nimg": 0}, "options": config.to_dict()})
    result = invoke(generate.main, f"--network={tmp_path / 'new.pt'}", "--seeds=0-2,41",
                    f"--init-image={dataset_zip}", "--init-sigma=0.005", "--steps=4",
                    f"--outdir={tmp_path / 'out'}")
    assert result.exit_code == 0, result.output
    from images.dataset import ImageFolderDataset
    data, images = ImageFolderDataset(dataset_zip), read(tmp_path / "out")
    assert len(data) == 40
    for seed in (0, 1, 2, 41):  # noise of 0.005 is 0.64 of a gray level; four deviations and more
        expected = data[seed % 40][0].transpose(1, 2, 0).astype(int)
        assert np.abs(images[f"{seed:06d}.png"] - expected).max() <= 4


@pytest.mark.long
@pytest.mark.parametrize("which, flags, code, words", [
    ("classes", ["--guidance=-1"], 2, "-1"),
    ("classes", ["--guidance=inf"], 1, "guidance=inf"),
    ("classes", ["--guidance=2", "--guidance-interval=3,1"], 2, "LO < HI"),
    ("classes", ["--guidance=2", "--guidance-interval=3"], 2, "LO < HI"),
    ("classes", ["--guidance-interval=1,3"], 2, "without --guidance"),
    ("classes", ["--gnet=x.pt"], 2, "without --guidance"),
    ("classes", ["--guidance=2", "--gnet=nowhere.pt"], 1, "nowhere.pt"),
    ("classes", ["--guidance=2", "--gnet=EDM"], 1, "D inf, the network 2.5"),
    ("plain", ["--guidance=2"], 2, "--gnet"),
    ("plain", ["--cond-image=GRAY"], 2, "takes no condition"),
    ("conditional", [], 2, "--cond-image=DIR|ZIP"),
    ("conditional", ["--cond-image=RGB"], 1, "3 channels, but the network takes 1"),
    ("conditional", ["--cond-image=nowhere.zip"], 1, "nowhere.zip"),
    ("plain", ["--init-image=RGB"], 2, "give --init-sigma, --init-level, --sigmas or --last"),
    ("plain", ["--init-sigma=1"], 2, "--init-sigma without --init-image"),
    ("plain", ["--init-image=GRAY", "--init-sigma=1"], 1, "1 channel, but the network takes 3"),
    ("plain", ["--init-image=RGB", "--init-sigma=1", "--sigma_max=2"], 2, "leave --sigma_max out"),
    ("plain", ["--init-image=RGB", "--init-sigma=0.001"], 2, "--init-sigma: starts at sigma 0.001"),
], ids=str)
def test_flags_that_do_not_fit_the_network_get_one_line(which, flags, code, words, snapshot, gray,
                                                        conditional, tmp_path, invoke):
    rgb = write_dataset(tmp_path / "rgb.zip", num=2)
    edm = write_snapshot(tmp_path / "edm.pt", label_dim=0)
    network = {"classes": snapshot, "conditional": conditional, "plain": edm}[which]
    flags = [flag.replace("GRAY", str(gray)).replace("RGB", str(rgb)).replace("EDM", str(edm))
             for flag in flags]
    result = invoke(generate.main, f"--network={network}", f"--outdir={tmp_path / 'out'}", *flags)
    assert result.exit_code == code, result.output
    [line] = [text for text in result.output.splitlines() if text.startswith("Error: ")]
    assert words in line
    assert not (tmp_path / "out").exists()


def test_an_image_that_could_not_be_written_stops_the_next_batch(tmp_path):
    folder = ImageFolder(tmp_path / "out", (3, 4, 4), False, True)
    folder.open({"weights": "x"})
    (tmp_path / "out/000001.png").mkdir()  # a folder has the image's name
    (tmp_path / "out/000001.png/x").write_text("")
    with pytest.raises(OSError), ImageWriter(folder) as writer:
        writer.write([0, 1], np.zeros([2, 3, 4, 4], np.uint8))
        with pytest.raises(OSError):
            writer.write([2], np.zeros([1, 3, 4, 4], np.uint8))
        raise OSError("seen")
    assert not (tmp_path / "out/000002.png").exists()


@pytest.mark.parametrize("class_idx", [None, 0, 1])
def test_settings_record_the_class(snapshot, class_idx):
    sampler = NetworkSampler.open(str(snapshot), torch.device("cpu"), class_idx=class_idx)
    assert sampler.settings["class"] == class_idx


@pytest.mark.long
@pytest.mark.parametrize("options, expected", [
    ({}, 380.0), ({"sigma_max": 50.0}, 50.0), ({"solver": "euler"}, 380.0),
    ({"discretization": "edm"}, 380.0), ({"discretization": "vp"}, None)])
def test_networks_of_large_images_start_from_380_on_the_edm_grid(tmp_path, options, expected):
    path = write_snapshot(tmp_path / "lsun.pt", lsun=True)
    assert NetworkSampler.open(str(path), torch.device("cpu"),
                               **options).sampler.sigma_max == expected
    plain = write_snapshot(tmp_path / "plain.pt")
    assert NetworkSampler.open(str(plain), torch.device("cpu"),
                               **options).sampler.sigma_max == options.get("sigma_max")


def test_without_a_network_a_folder_that_is_no_run_is_told_what_is_missing(tmp_path, invoke):
    for more in ([], ["--seeds=0-3"], ["--edm=1"], ["--use_pickle=1"]):
        result = invoke(generate.main, f"--outdir={tmp_path / 'new'}", *more)
        assert result.exit_code == 1
        assert result.output == (
            f"Error: --outdir={tmp_path / 'new'}: no such run directory; without --network, "
            "generate.py samples the training states of a run; name one, or a --network\n")
    assert list(tmp_path.iterdir()) == []
