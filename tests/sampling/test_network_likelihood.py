"""likelihood.py: bits a dimension of data sets, their units, and what is refused."""

import csv
import errno
import json
import math
import re

import numpy as np
import PIL.Image
import pytest
import torch
from image_sources import EMOJI, labels_json, random_pixels, write_source
from scripts import ROOT, run_script
from snapshots import write_snapshot
from tiny import write_dataset

import likelihood
from checkpoints import checkpoint
from images.dataset import ImageFolderDataset
from images.scaling import EIGHT_BIT, Scaling
from pfgmpp.likelihood import exact_trace, hutchinson
from sampling.network_likelihood import LikelihoodData, NetworkLikelihood, bin_width

CPU = torch.device("cpu")
LAST = re.compile(r"(bits|nats)/dim: (-?[\d.]+)(?: \+- ([\d.]+))? \((\d+) images?\)\n\Z")
SHORT = ["--steps=2", "--count=4"]


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return write_snapshot(tmp_path_factory.mktemp("net") / "net.pt", pfgmpp=True, aug_dim=2.5)


def measured(invoke, *args):
    result = invoke(likelihood.main, *args)
    assert result.exit_code == 0, result.output
    return LAST.search(result.stdout)


def rows_of(path):
    with open(path, newline="") as file:
        return {row["image"]: float(row["bits_per_dim"]) for row in csv.DictReader(file)}


def table_in(folder):
    """Returns the rows of the only table of a folder."""
    [path] = folder.glob("likelihood-*.csv")
    return rows_of(path)


class Gaussian:
    """The ideal denoiser of independent Gaussian pixels: their density is known."""

    label_dim = cond_channels = 0
    sigma_min, sigma_max, D = 0.0, math.inf, math.inf

    def __init__(self, std, shape=(1, 4, 4)):
        self.std, self.image_shape, self.img_channels = std, shape, shape[0]

    def __call__(self, x, sigma, class_labels=None):
        return x * self.std**2 / (self.std**2 + sigma**2)


def of_gaussian(std, scaling=EIGHT_BIT, *, dequantize=None, shape=(1, 4, 4)):
    levels = torch.linspace(0.002 ** (1 / 7), 80 ** (1 / 7), 41, dtype=torch.float64) ** 7
    return NetworkLikelihood(
        Gaussian(std, shape), CPU, tuple(levels.tolist()), scaling, None, None, uses_labels=False,
        probes=1, dequantize=dequantize, seed=0, settings={})


def entropy(std):
    return math.log(2 * math.pi * math.e * std**2) / 2


# ---------------------------------------------------------------------------------------- units

@pytest.mark.long
@pytest.mark.parametrize("width", [1, 17])
def test_bits_are_those_of_a_code_for_gaussian_pixels(tmp_path, width):
    std, rng = 30 / 127.5, np.random.default_rng(0)
    values = np.round(rng.normal(127.5, 30, [200, 4, 4]) / width) * width
    data = write_source(tmp_path / "data.zip", {
        f"{i:03d}.png": v.clip(0, 255).astype(np.uint8) for i, v in enumerate(values)})
    measure = of_gaussian(std)
    images = LikelihoodData(data, measure, 200)
    assert bin_width(images.levels()) == width
    found, _ = measure(images, range(200), width)
    # The entropy of a Gaussian in units of a level; the noise of a level adds to its variance.
    spread = math.hypot(30 / width, math.sqrt(1 / 12)) if width > 1 else 30
    expected = (math.log(2 * math.pi * math.e * (30 / width)**2) / 2
                + ((spread * width / 30)**2 - 1) / 2) / math.log(2)
    assert np.mean(found) == pytest.approx(expected, abs=4 * 0.72 * 1.45 / math.sqrt(16 * 200))


def test_data_of_other_kinds_have_nats_per_unit(tmp_path):
    rng, scaling = np.random.default_rng(0), Scaling((300.0,), (40.0,))
    values = rng.normal(300, 20, [100, 1, 4, 4]).astype(np.float32)
    (tmp_path / "data").mkdir()
    for i, value in enumerate(values):
        np.save(tmp_path / f"data/{i:03d}.npy", value)
    record = {"scale": scaling.to_dict(), "labels": None}
    (tmp_path / "data/dataset.json").write_text(json.dumps(record))
    measure = of_gaussian(0.5, scaling)
    data = LikelihoodData(tmp_path / "data", measure, 100)
    found, _ = measure(data, range(100))
    assert measure.unit_of(data) == "nats/dim" and data.width == 1
    assert measure.settings_of(data)["dequantize"] == "none"
    assert np.mean(found) == pytest.approx(entropy(20), abs=4 * 0.72 / 40)


def arrays_in(folder, values, scaling=None):
    """Writes arrays [C, H, W] as a data set with a recorded scaling; returns the folder."""
    folder.mkdir()
    for i, value in enumerate(values):
        np.save(folder / f"{i:03d}.npy", value)
    record = {"labels": None} | ({} if scaling is None else {"scale": scaling.to_dict()})
    (folder / "dataset.json").write_text(json.dumps(record))
    return folder


@pytest.mark.long
@pytest.mark.parametrize("width", [1, 4])
def test_16_bit_numbers_have_the_bits_of_a_code_for_their_own_levels(tmp_path, width):
    """As values of CT in HU from -1024 on; the channels have spreads of their own."""
    stds, rng = np.array([300.0, 60.0]), np.random.default_rng(0)
    scaling = Scaling((1024.0, 900.0), tuple(2 * stds))
    values = rng.normal(size=[150, 2, 4, 4]) * stds[:, None, None] + [[[1024.0]], [[900.0]]]
    levels = np.clip(np.round(values / width) * width, 0, 65535).astype(np.uint16)
    measure = of_gaussian(0.5, scaling, shape=(2, 4, 4))
    data = LikelihoodData(arrays_in(tmp_path / "data", levels, scaling), measure, 150)
    assert data.width == width and measure.unit_of(data) == "bits/dim"
    found, _ = measure(data, range(150))
    expected = np.mean([entropy(std / width) for std in stds]) / math.log(2)
    assert np.mean(found) == pytest.approx(expected, abs=4 * 0.72 * 1.45 / math.sqrt(32 * 150))
    # The same numbers as floats have a density, in nats per unit.
    floats = LikelihoodData(arrays_in(tmp_path / "floats", levels.astype(np.float32), scaling),
                            measure, 150)
    assert measure.unit_of(floats) == "nats/dim" and floats.width == 1
    expected = np.mean([entropy(std) for std in stds])
    assert np.mean(measure(floats, range(150))[0]) == pytest.approx(expected, abs=4 * 0.72 / 69)


@pytest.fixture(scope="module")
def stored_twice(tmp_path_factory):
    """Returns what makes one network and the same images, 8-bit and of 16 bits with a scale."""
    def make(levels, scaling):
        root, rng = tmp_path_factory.mktemp("twice"), np.random.default_rng(0)
        k = rng.integers(0, len(levels), [6, 1, 8, 8])
        sets = [arrays_in(root / "8", levels[k]),
                arrays_in(root / "16", k.astype(np.uint16), scaling)]
        found = []
        for data, dataset in zip(sets, (None, {"scale": scaling.to_dict()}), strict=True):
            network = write_snapshot(data.with_suffix(".pt"), shape=(1, 8, 8), label_dim=0,
                                     dataset=dataset)
            measure = NetworkLikelihood.open(str(network), CPU, steps=4)
            found.append((measure, LikelihoodData(data, measure, 6)))
        return found
    return make


@pytest.mark.long
@pytest.mark.parametrize("levels, scaling, error", [
    (np.arange(18) * 15, Scaling((8.5,), (8.5,)), 1e-6),  # 15 k / 127.5 - 1 = (k - 8.5) / 8.5
    (np.rint(np.arange(17) * 15.9375), Scaling((8.0,), (8.0,)), 0.02)],  # but for rounding
    ids=["exact", "rounded"])
def test_bits_do_not_depend_on_how_levels_are_stored(stored_twice, levels, scaling, error):
    (one, eight), (other, sixteen) = stored_twice(levels.astype(np.uint8), scaling)
    assert eight.width == pytest.approx(127.5 / scaling.spread[0]) and sixteen.width == 1
    assert one.unit_of(eight) == other.unit_of(sixteen) == "bits/dim"
    for first, second in zip(one(eight, range(6)), other(sixteen, range(6)), strict=True):
        assert first == pytest.approx(second, abs=error)


def test_numbers_without_noise_have_the_density_of_floats(tmp_path):
    scaling, rng = Scaling((8.0,), (8.0,)), np.random.default_rng(0)
    levels = rng.integers(0, 17, [3, 1, 4, 4])
    found = []
    for dtype in (np.uint16, np.float32):
        measure = of_gaussian(0.5, scaling, dequantize="none")
        data = LikelihoodData(arrays_in(tmp_path / dtype.__name__, levels.astype(dtype), scaling),
                              measure, 3)
        assert measure.unit_of(data) == "nats/dim"
        assert measure.settings_of(data)["dequantize"] == "none"
        found.append(measure(data, range(3))[0])
    assert found[0] == found[1]


def test_dequantisation_is_uniform_noise_of_one_bin(tmp_path):
    data = write_source(tmp_path / "data.zip", {f"{i}.png": np.full([4, 4], 100, np.uint8)
                                                for i in range(50)})
    measure = of_gaussian(0.5)
    images = LikelihoodData(data, measure, 50)
    stored, *_ = images.get(range(50))
    for width in (1, 16):
        noise = (measure._state(stored, range(50), width) + 1) * 127.5 - 100
        assert -width / 2 <= noise.min() < -0.48 * width and 0.48 * width < noise.max() < width / 2
        assert noise.mean() == pytest.approx(0, abs=4 * width / math.sqrt(12 * 800))
    plain = measure._state(stored, range(50), 0)
    assert plain.unique().tolist() == [100 / 127.5 - 1]


@pytest.mark.parametrize("levels, width", [
    (range(256), 1), ([0, 255], 255), (range(0, 256, 17), 17), (range(0, 241, 16), 16),
    ([round(255 * k / 16) for k in range(17)], 255 / 16), ([3], 1), ([], 1), ([0, 128, 255], 127.5),
    ([int(255 * k / 31) for k in range(32)], 255 / 31), ([0, 1, 4, 9, 250], 1),
    (sorted(set(range(256)) - {7, 90}), 1)])
def test_the_width_of_a_bin(levels, width):
    assert bin_width(np.array(list(levels), int)) == pytest.approx(width)


@pytest.mark.parametrize("levels", [
    [127, 128], [254, 255], [100, 101], [0, 127, 128, 255], [0, 64, 128, 191, 192, 255],
    [0, 3, 8, 20, 250]])  # the last lie on some grid, as so few of any kind do
def test_levels_of_no_even_grid_are_8_bit(levels):
    assert bin_width(np.array(levels)) == 1


@pytest.mark.parametrize("made", [
    np.rint, np.floor, lambda x: np.floor(x + 0.5), lambda x: np.linspace(0, 255, len(x))],
    ids=["rounded", "down", "half up", "linspace"])
def test_every_even_grid_of_2_to_128_levels_is_recognised(made):
    for m in range(1, 128):
        levels = made(np.arange(m + 1) * 255 / m).astype(np.uint8)
        assert bin_width(levels) == pytest.approx(255 / m), m


@pytest.mark.parametrize("bits", range(1, 8))
def test_repeated_bits_are_recognised(bits):
    repeated = [int((f"{k:0{bits}b}" * 8)[:8], 2) for k in range(1 << bits)]
    assert bin_width(np.array(repeated)) == pytest.approx(255 / ((1 << bits) - 1))


def test_no_bin_holds_two_levels():
    rng = np.random.default_rng(0)
    for number in np.repeat(range(2, 129), 2):
        grid = rng.choice([256, 128, 86, 52])  # of few levels some lie on a grid
        places = np.sort(rng.choice(grid, min(number, grid), replace=False))
        levels = np.rint(places * 255 / (grid - 1)).astype(int)
        assert 1 <= bin_width(levels) <= np.diff(levels).min() + 1


@pytest.mark.parametrize("levels, width", [
    (range(17), 1), (range(0, 65536, 257), 257), (range(5, 4096, 16), 16), ([0, 65535], 65535),
    (range(65536), 1), (sorted({*range(0, 65536, 3)} | {1}), 1), ([0, 3, 70, 4000, 60000], 1)])
def test_the_width_of_a_bin_of_16_bits(levels, width):
    assert bin_width(np.array(levels), 65535) == width


@pytest.mark.parametrize("m", [2, 16, 100, 511, 1023, 4095, 30000])
@pytest.mark.parametrize("made", [np.rint, np.floor], ids=["rounded", "down"])
def test_even_grids_of_16_bits_are_recognised(m, made):
    levels = made(np.arange(m + 1) * 65535 / m).astype(np.uint16)
    some = np.random.default_rng(0).choice(levels, max(3, len(levels) // 2), replace=False)
    for seen in (levels, some):
        assert bin_width(seen, 65535) == pytest.approx(65535 / m)


@pytest.mark.long
def test_few_numbers_of_16_bits_lie_on_no_grid_by_chance():
    rng, looked_at = np.random.default_rng(0), 0
    for count in np.repeat([4, 5, 6], 10):
        levels = np.sort(rng.choice(65536, count, replace=False))
        if np.gcd.reduce(np.diff(levels)) == 1:
            assert bin_width(levels, 65535) == 1
            looked_at += 1
    assert looked_at > 20


@pytest.mark.parametrize("bits", range(1, 16))
def test_bits_repeated_to_16_are_recognised(bits):
    repeated = [int((f"{k:0{bits}b}" * 16)[:16], 2) for k in range(1 << bits)]
    assert bin_width(np.array(repeated), 65535) == pytest.approx(65535 / ((1 << bits) - 1))


def levels_zip(path, levels, num=8):
    rng = np.random.default_rng(0)
    return write_source(path, {f"{i}.png": rng.choice(levels, [8, 8, 3]).astype(np.uint8)
                               for i in range(num)})


def test_the_default_width_is_that_of_the_command(tmp_path, invoke):
    network = write_snapshot(tmp_path / "net.pt", label_dim=0)
    data = levels_zip(tmp_path / "four.zip", np.arange(16) * 17)
    measured(invoke, f"--network={network}", f"--data={data}", "--steps=2", "--count=1")
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["bin_width"] == 17
    measure = NetworkLikelihood.open(str(network), CPU, steps=2)
    images = LikelihoodData(data, measure, 1)
    found, _ = measure(images, [0])
    assert found == pytest.approx(list(table_in(tmp_path).values()))
    assert found != pytest.approx(measure(images, [0], 1.0)[0])
    raw = NetworkLikelihood.open(str(network), CPU, steps=2, dequantize="none")
    assert raw.width_of(images) == 1


def test_data_of_other_levels_cannot_be_compared(tmp_path, invoke):
    network = write_snapshot(tmp_path / "net.pt", label_dim=0)
    four = levels_zip(tmp_path / "four.zip", np.arange(16) * 17)
    args = [f"--network={network}", f"--data={four}", "--steps=2", "--count=1"]
    result = invoke(likelihood.main, *args, f"--val-data={four}")
    assert result.exit_code == 0 and "Warning" not in result.stderr
    two = levels_zip(tmp_path / "two.zip", [0, 255])
    result = invoke(likelihood.main, *args, f"--val-data={two}")
    [line] = result.stderr.splitlines()
    assert result.exit_code == 0 and "17 of 256 apart in --data, but 255 in --val-data" in line
    assert "can't be compared" in line


# ----------------------------------------------------------------------------------- the command

def test_the_last_line_the_table_and_the_record(network, dataset_zip, tmp_path, invoke):
    last = measured(invoke, f"--network={network}", f"--data={dataset_zip}", *SHORT, "--batch=3",
                    f"--out={tmp_path}/m.jsonl")
    rows = table_in(tmp_path)
    values = list(rows.values())
    assert len(rows) == 4 and all(name.startswith("00000/img") for name in rows)
    assert last[1] == "bits" and float(last[2]) == pytest.approx(np.mean(values), abs=6e-4)
    stderr = np.std(values, ddof=1) / 2
    assert float(last[3]) == pytest.approx(stderr, abs=6e-4) and last[4] == "4"
    line = json.loads((tmp_path / "m.jsonl").read_text())
    assert line["metric"] == "bits_per_dim" and line["num"] == 4 and line["nfe"] == 12
    assert line["value"] == pytest.approx(np.mean(values))
    assert line["stderr"] == pytest.approx(stderr)
    assert re.fullmatch(r"likelihood-net-tiny-[0-9a-f]{12}\.csv", line["table"])
    assert (tmp_path / line["table"]).exists() and not line["held_out"]
    assert line["sampler"]["D"] == 2.5 and line["sampler"]["sigma_max"] == 80
    assert line["reference"] == str(dataset_zip) and line["sampler"]["num_steps"] == 2


def test_evaluations_are_counted_as_they_are(network, dataset_zip):
    measure = NetworkLikelihood.open(str(network), CPU, steps=4)
    seen = []
    measure(LikelihoodData(dataset_zip, measure, 5), range(5), watch=seen.append)
    assert sum(seen) == 5 * measure.nfe == 5 * 24


@pytest.mark.long
def test_the_value_of_an_image_is_its_own(network, dataset_zip, tmp_path, invoke):
    found = []
    for name, more in (("a", ["--count=40", "--batch=16"]), ("b", ["--count=6", "--batch=1"])):
        measured(invoke, f"--network={network}", f"--data={dataset_zip}", "--steps=2", *more,
                 f"--out={tmp_path}/{name}/m.jsonl")
        found.append(table_in(tmp_path / name))
    many, few = found
    assert len(many) == 40 and len(few) == 6
    for name, value in few.items():
        assert value == pytest.approx(many[name], rel=1e-5)
    measured(invoke, f"--network={network}", f"--data={dataset_zip}", *SHORT, "--seed=1",
             f"--out={tmp_path}/c/m.jsonl")
    assert not set(table_in(tmp_path / "c").values()) & set(many.values())


def test_exact_traces_are_what_probes_estimate(tmp_path):
    # Of one batch at one level: the whole command would take thousands of probes.
    network = write_snapshot(tmp_path / "net.pt", shape=(1, 8, 8), label_dim=0)
    data = write_dataset(tmp_path / "data.zip", channels=1)
    measure = NetworkLikelihood.open(str(network), CPU, exact=True)
    stored, *_ = LikelihoodData(data, measure, 2).get(range(2))
    x = EIGHT_BIT.to_network(stored).double()
    x, sigma, probes = x[:1].expand(500, -1, -1, -1), torch.tensor(0.5), []
    exact = exact_trace(measure.net, x[:1], sigma)[1].item()
    measure = NetworkLikelihood.open(str(network), CPU, probes=2)
    probes.extend(measure._probes(range(500), 0, x))
    trace = hutchinson(lambda place: probes)
    found = trace(measure.net, x, sigma, 0)[1]
    assert set(probes[0].unique().tolist()) == {-1.0, 1.0} and not probes[0].equal(probes[1])
    error = found.std().item() / math.sqrt(500)
    assert found.mean().item() == pytest.approx(exact, abs=4 * error) and error < 0.1 * abs(exact)


def test_held_out_images_stand_beside_those_of_training(network, dataset_zip, tmp_path, invoke):
    held_out = write_dataset(tmp_path / "tiny.zip", num=10)  # of the same name
    result = invoke(likelihood.main, f"--network={network}", f"--data={dataset_zip}", *SHORT,
                    f"--val-data={held_out}", f"--out={tmp_path}/m.jsonl")
    assert len(re.findall(r"^bits/dim: ", result.stdout, re.M)) == 2
    first, second = map(json.loads, (tmp_path / "m.jsonl").read_text().splitlines())
    assert (first["held_out"], second["held_out"]) == (False, True)
    assert rows_of(tmp_path / second["table"]) != rows_of(tmp_path / first["table"])


@pytest.mark.long
def test_a_table_is_replaced_only_by_its_own(network, dataset_zip, tmp_path, invoke):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    here, other = dataset_zip, write_dataset(folders[1] / "tiny.zip", num=9)
    args = [f"--network={network}", f"--out={tmp_path}/m.jsonl", "--steps=2", "--count=1"]
    runs = [[f"--data={here}"], [f"--data={other}"], [f"--data={here}", "--probes=2"],
            [f"--data={here}", "--count=3"]]
    names, contents = [], {}
    for more in [*runs, runs[0]]:
        measured(invoke, *args, *more)
        names.append(json.loads((tmp_path / "m.jsonl").read_text().splitlines()[-1])["table"])
        content = (tmp_path / names[-1]).read_bytes()
        assert contents.setdefault(names[-1], content) == content
    assert names[0] == names[4] and len(contents) == 4 == len(set(contents.values()))


def test_long_names_of_data_fit_in_that_of_the_table(network, tmp_path, invoke):
    data = write_dataset(tmp_path / f"{'ä' * 120}.zip", num=2)
    measured(invoke, f"--network={network}", f"--data={data}", *SHORT, f"--out={tmp_path}/m.jsonl")
    assert len(table_in(tmp_path)) == 2


def test_one_image_has_no_error_of_a_mean(network, dataset_zip, tmp_path, invoke):
    last = measured(invoke, f"--network={network}", f"--data={dataset_zip}", "--steps=2",
                    "--count=1", f"--out={tmp_path}/m.jsonl")
    assert last[3] is None and last[0].endswith("(1 image)\n")
    assert json.loads((tmp_path / "m.jsonl").read_text())["stderr"] is None


@pytest.mark.scripts
def test_two_processes_find_what_one_does(network, dataset_zip, tmp_path):
    found = []
    for processes in (0, 2):
        run_script("likelihood.py", f"--network={network}", f"--data={dataset_zip}", "--steps=2",
                   "--count=5", "--batch=2", f"--out={tmp_path}/{processes}/m.jsonl",
                   processes=processes)
        found.append(table_in(tmp_path / str(processes)))
    assert list(found[0]) == list(found[1])
    assert list(found[0].values()) == pytest.approx(list(found[1].values()), rel=1e-5)


@pytest.mark.long
def test_images_are_likelier_than_shuffled_ones_and_than_noise(tmp_path):
    emoji = ImageFolderDataset(EMOJI)
    faces = [np.array(PIL.Image.fromarray(emoji.get_batch([i])[0][0].transpose(1, 2, 0)).resize(
        (16, 16), PIL.Image.Resampling.BOX)) for i in range(3)]
    rng = np.random.default_rng(0)
    shuffled = [rng.permutation(face.reshape(256, 3)).reshape(16, 16, 3) for face in faces]
    means = []
    measure = NetworkLikelihood.open(str(ROOT / "examples/emoji16-128.pt"), CPU, steps=4)
    for name, images in (("faces", faces), ("shuffled", shuffled),
                         ("noise", random_pixels(3, 16, 16, 3))):
        data = write_source(tmp_path / f"{name}.zip", {
            **{f"{i}.png": image for i, image in enumerate(images)},
            "dataset.json": labels_json([[f"{i}.png", 0] for i in range(3)])})
        means.append(np.mean(measure(LikelihoodData(data, measure, 3), range(3))[0]))
    assert means[0] < means[1] - 1 and means[1] < means[2] and means[0] < 5


# ------------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize("flags, words", [
    (["--steps=3"], "--steps=3: must be an even number"),
    (["--steps=0"], "--steps=0: must be an even number"),
    (["--guidance=2"], "--guidance: the density of guided sampling is"),
    (["--cond=0"], "--cond=0: .* trained without --label-dropout"),
    (["--val-data="], "--val-data=: must be a data set"),
    (["--data="], "--data=: must be a data set"), (["--out="], "--out=: must be a file"),
    (["--network="], "--network=: must be a network"),
    (["--exact", "--probes=1"], "--exact with --probes=1: .*leave one of them out"),
    (["--probes=0"], "--probes"), (["--count=0"], "--count")])
def test_flags_that_cannot_be_are_refused(network, dataset_zip, tmp_path, invoke, flags, words):
    result = invoke(likelihood.main, f"--network={network}", f"--data={dataset_zip}",
                    f"--out={tmp_path}/m.jsonl", *flags)
    assert result.exit_code == 2 and re.search(words, result.stderr), result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_data_that_do_not_fit_the_network_are_refused(network, tmp_path, invoke):
    (tmp_path / "floats").mkdir()
    np.save(tmp_path / "floats/a.npy", np.zeros([3, 8, 8], np.float32))
    for name, data, words in (
            ("size", write_dataset(tmp_path / "size.zip", side=16), "images are 3x16x16"),
            ("gray", write_dataset(tmp_path / "gray.zip", channels=1), "images are 1x8x8"),
            ("plain", write_dataset(tmp_path / "plain.zip", classes=0), "has no labels"),
            ("many", write_dataset(tmp_path / "many.zip", classes=3), "labels are 3 classes"),
            ("vectors", write_dataset(tmp_path / "vectors.zip", vectors=True), "numbers each"),
            ("floats", tmp_path / "floats", "floating-point"),
            ("none", tmp_path / "none.zip", "none.zip")):
        for flag in ("--data", "--val-data"):
            other = write_dataset(tmp_path / "good.zip")
            given = {"--data": other, flag: data}
            result = invoke(likelihood.main, f"--network={network}", *SHORT,
                            *(f"{key}={value}" for key, value in given.items()),
                            f"--out={tmp_path}/m.jsonl")
            assert result.exit_code == 1 and words in result.stderr, (name, result.stderr)
            assert f"{flag}=" in result.stderr and len(result.stderr.splitlines()) == 1
            assert not (tmp_path / "m.jsonl").exists()


@pytest.mark.parametrize("place, words", [
    ("folder", "--out=.*folder: is a folder; name another file"),
    ("file/m.jsonl", "--out=.*m.jsonl: .*file is not a folder; name another file"),
    ("/proc/none/m.jsonl", "--out=/proc/none/m.jsonl: can't be written in /proc ")])
def test_where_results_go_is_checked_first(network, dataset_zip, tmp_path, invoke, monkeypatch,
                                           place, words):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(NetworkLikelihood, "open", None)  # nothing is computed
    result = invoke(likelihood.main, f"--network={network}", f"--data={dataset_zip}",
                    f"--out={tmp_path / place}")
    [line] = result.stderr.splitlines()
    assert result.exit_code == 1 and re.search(words, line), line
    assert sorted(tmp_path.rglob("*")) == before


def test_results_that_are_not_recorded_end_with_an_error(network, dataset_zip, tmp_path, invoke,
                                                         monkeypatch):
    def full(path, line):
        path.touch()  # as the one does that finds the disk full at the first byte
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dnnlib.atomic.append_line", full)
    result = invoke(likelihood.main, f"--network={network}", f"--data={dataset_zip}", *SHORT,
                    f"--out={tmp_path}/m.jsonl")
    [line] = result.stderr.splitlines()
    assert result.exit_code == 1 and "could not be recorded (No space left on device)" in line
    assert LAST.search(result.stdout) and not list(tmp_path.iterdir())


def test_python_refuses_what_the_command_does(network, dataset_zip):
    for settings, words in (({"probes": 0}, "--probes=0"), ({"dequantize": "foo"}, "uniform or "),
                            ({"steps": 2.0}, "--steps=2.0"), ({"probes": 1.5}, "--probes=1.5")):
        with pytest.raises(ValueError, match=words):
            NetworkLikelihood.open(str(network), CPU, **settings)
    measure = NetworkLikelihood.open(str(network), CPU, steps=2)
    with pytest.raises(ValueError, match="count=0"):
        LikelihoodData(dataset_zip, measure, 0)
    with pytest.raises(ValueError, match="width=0: must be a positive"):
        measure(LikelihoodData(dataset_zip, measure, 1), [0], 0)


@pytest.mark.long
def test_dequantize_is_for_whole_numbers(tmp_path, invoke):
    scaling, rng = Scaling((8.0,), (8.0,)), np.random.default_rng(0)
    network = write_snapshot(tmp_path / "net.pt", label_dim=0, dataset={"scale": scaling.to_dict()})
    levels = 2 * rng.integers(0, 9, [2, 3, 8, 8])
    floats, whole = (arrays_in(tmp_path / dtype.__name__, levels.astype(dtype), scaling)
                     for dtype in (np.float32, np.uint16))
    args = [f"--network={network}", "--steps=2"]
    for sets in ([f"--data={floats}"], [f"--data={whole}", f"--val-data={floats}"]):
        result = invoke(likelihood.main, *args, *sets, "--dequantize=uniform")
        assert result.exit_code == 2 and f"{sets[-1]} holds floating-point" in result.stderr
        assert "leave --dequantize out" in result.stderr and not list(tmp_path.glob("*.jsonl"))
    for flags, unit in (([], "bits"), (["--dequantize=uniform"], "bits"),
                        (["--dequantize=none"], "nats")):
        result = invoke(likelihood.main, *args, f"--data={whole}", *flags)
        assert LAST.search(result.stdout)[1] == unit, result.output
        assert ("Levels     2 of 65536 apart" in result.stdout) == (unit == "bits")
    assert measured(invoke, *args, f"--data={floats}")[1] == "nats"
    lines = list(map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()))
    assert [(line["metric"], line["bin_width"], line["sampler"]["dequantize"]) for line in lines] \
        == [("bits_per_dim", 2, "uniform")] * 2 + [("nats_per_dim", 1, "none")] * 2
    assert lines[0]["value"] == lines[1]["value"] and lines[2]["value"] == lines[3]["value"]


def test_bits_and_nats_cannot_be_compared(tmp_path, invoke):
    network = write_snapshot(tmp_path / "net.pt", label_dim=0, dataset={
        "scale": {"center": [8.0], "spread": [8.0]}})
    sets = [arrays_in(tmp_path / dtype.__name__, np.ones([1, 3, 8, 8], dtype),
                      Scaling((8.0,), (8.0,))) for dtype in (np.uint16, np.float32)]
    result = invoke(likelihood.main, f"--network={network}", "--steps=2", f"--data={sets[0]}",
                    f"--val-data={sets[1]}")
    [line] = result.stderr.splitlines()
    assert "--data is measured in bits/dim and --val-data in nats/dim, because only" in line
    assert result.exit_code == 0 and "can't be compared" in line


def test_a_network_that_has_diverged_has_no_likelihood(tmp_path, invoke, dataset_zip):
    content = checkpoint.load(write_snapshot(tmp_path / "net.pt"))
    content["ema"] = {name: value * math.nan for name, value in content["ema"].items()}
    checkpoint.save(tmp_path / "net.pt", content)
    result = invoke(likelihood.main, f"--network={tmp_path}/net.pt", f"--data={dataset_zip}",
                    *SHORT)
    assert result.exit_code == 1 and "4 of 4 images are not finite" in result.stderr
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("given, is_refused", [
    (Scaling((8.0,), (8.0,)), False), (Scaling((8.0,) * 3, (8.0,) * 3), False), (None, True),
    (Scaling((8.0,), (4.0,)), True), (Scaling((7.5,), (8.0,)), True),
    (Scaling((8.0,) * 3, (8.0, 8.0, 9.0)), True)])
def test_data_of_another_recorded_scale_are_refused(tmp_path, given, is_refused):
    """They would be measured in units that the network does not know; None is 0 to 65535."""
    measure = of_gaussian(0.5, Scaling((8.0,), (8.0,)), shape=(3, 4, 4))
    data = arrays_in(tmp_path / "data", np.ones([2, 3, 4, 4], np.uint16), given)
    if is_refused:
        with pytest.raises(ValueError, match="its values .* map to -1 to 1, but .* give data that"):
            LikelihoodData(data, measure, 2)
    else:
        assert LikelihoodData(data, measure, 2).are_whole
