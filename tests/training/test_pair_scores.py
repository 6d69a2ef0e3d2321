"""--eval-pairs: what is restored, its values, which state is the best, pairs that do not fit."""

import json
import math

import numpy as np
import pytest
import torch
from scripts import run_script
from tiny import TINY_RUN, write_dataset

import fid
import generate
import train
from checkpoints import checkpoint
from images.dataset import ImageFolderDataset
from reports.run_record import RunRecord
from reports.run_state import RunState
from training.config import TrainConfig
from training.pair_scores import PairEvaluator, open_pairs
from training.trainer import Trainer

HU = (-1024.0, 3071.0)
INF = math.inf
CPU = torch.device("cpu")
SCALE = {"center": [sum(HU) / 2], "spread": [(HU[1] - HU[0]) / 2]}
NETWORK = {"arch": "ncsnpp", "cbase": 8, "cres": (1, 2), "nblock": 1, "batch": 8, "workers": 0,
           "augment": 0.0}
RNG = np.random.default_rng


def write_pairs(folder, sizes, seed=0, noise=60.0, scale=SCALE, channels=1):
    """Writes ramps in HU with noisy copies as condition images; returns both."""
    (folder / "cond").mkdir(parents=True)
    rng, pairs = RNG(seed), []
    for i, (height, width) in enumerate(sizes):
        y = np.linspace(-900, 900, channels * height * width).reshape(channels, height, width)
        y = np.roll(y, 7 * i, axis=2).astype(np.float32)
        v = y + np.float32(noise) * rng.standard_normal(y.shape).astype(np.float32)
        np.save(folder / f"x{i}.npy", y)
        np.save(folder / f"cond/x{i}.npy", v)
        pairs.append((y, v))
    record = {} if scale is None else {"scale": scale, "cond_scale": scale}
    (folder / "dataset.json").write_text(json.dumps({"labels": None, **record}))
    return pairs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    write_pairs(root / "train", [(8, 8)] * 16)
    write_pairs(root / "same", [(8, 8)] * 5, seed=1)
    write_pairs(root / "other", [(12, 16), (9, 14), (12, 16)], seed=2)
    return root


def make_trainer(path, D=INF, **options):
    config = TrainConfig(data=str(path), pfgmpp=not math.isinf(D), aug_dim=D,
                         eval=1.0, **NETWORK | options)
    dataset = ImageFolderDataset(path, use_conditions=config.cond_image, use_labels=config.cond)
    trainer = Trainer(config, dataset, CPU)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():  # else it returns zeros at the start
        for p in trainer.ema.parameters():
            p.add_(torch.randn(p.shape, generator=rng) * 0.05)
    return trainer


def scores(trainer, tmp_path, **options):
    pairs = open_pairs(trainer.config, trainer.dataset)
    evaluator = PairEvaluator(trainer, pairs, tmp_path / "metrics.jsonl")
    with trainer.average_in_fp32():
        return evaluator()


def in_scale(values):
    return torch.from_numpy((values.astype(np.float64) - SCALE["center"][0]) / SCALE["spread"][0])


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ----------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("D", [2, 128, INF])
@pytest.mark.parametrize("batch_gpu", [None, 1])
def test_pairs_are_denoised_by_one_evaluation_at_their_noise(data, tmp_path, capsys, D, batch_gpu):
    trainer = make_trainer(data / "train", D, eval_pairs=str(data / "same"), batch_gpu=batch_gpu)
    found = scores(trainer, tmp_path)
    pairs = [(np.load(data / f"same/x{i}.npy"), np.load(data / f"same/cond/x{i}.npy"))
             for i in range(5)]
    sigma = math.sqrt(np.mean([(in_scale(v) - in_scale(y)).square().mean() for y, v in pairs]))
    psnrs, rmses = [], []
    for y, v in pairs:
        with torch.no_grad():
            x = trainer.ema(in_scale(v)[None].float(), torch.tensor(sigma))[0].double().numpy()
        error = np.sqrt(np.mean((x * SCALE["spread"][0] + SCALE["center"][0] - y) ** 2))
        rmses.append(error)
        psnrs.append(20 * math.log10(4095 / error))
    assert list(found) == ["psnr", "rmse"]  # the first decides which state is the best
    assert found["psnr"] == pytest.approx(np.mean(psnrs), abs=1e-5)
    assert found["rmse"] == pytest.approx(np.mean(rmses), rel=1e-5)
    psnr, rmse = lines_of(tmp_path / "metrics.jsonl")
    assert psnr["std"] == pytest.approx(np.std(psnrs, ddof=1), abs=1e-4)
    assert psnr | {"metric": "psnr", "value": found["psnr"], "num": 5, "range": list(HU),
                   "kimg": 0, "reference": str(data / "same")} == psnr
    assert psnr["sampler"]["sigmas"] == [pytest.approx(sigma)] and psnr["sampler"]["nfe"] == 1
    assert f"one evaluation at sigma {sigma:.4g}, the noise of" in capsys.readouterr().out


def test_pairs_of_any_size_are_restored_at_their_own(data, tmp_path):
    trainer = make_trainer(data / "train", eval_pairs=str(data / "other"))
    assert trainer.ema.img_resolution == 8
    found = scores(trainer, tmp_path)
    pairs = [(np.load(data / f"other/x{i}.npy"), np.load(data / f"other/cond/x{i}.npy"))
             for i in range(3)]
    numbers = np.concatenate([(in_scale(v) - in_scale(y)).numpy().ravel() for y, v in pairs])
    sigma = math.sqrt(np.mean(numbers**2))  # over all numbers of all pairs
    [line, _] = lines_of(tmp_path / "metrics.jsonl")
    assert line["sampler"]["sigmas"] == [pytest.approx(sigma)]
    errors = []
    for y, v in pairs:
        bottom = v.shape[1] % 2  # sides of which the network can't halve one are mirrored
        x = np.pad(v, [(0, 0), (0, bottom), (0, 0)], mode="reflect")
        with torch.no_grad():
            x = trainer.ema(in_scale(x)[None].float(), torch.tensor(sigma))[0].double().numpy()
        x = x[:, :v.shape[1]] * SCALE["spread"][0] + SCALE["center"][0]
        errors.append(np.sqrt(np.mean((x - y) ** 2)))
    assert found["rmse"] == pytest.approx(np.mean(errors), rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("D", [128, INF])
@pytest.mark.parametrize("name", ["same", "other"])
def test_conditional_scores_are_those_of_generate_and_pairs(data, tmp_path, capsys, D, name):
    flags = [] if math.isinf(D) else ["--pfgmpp=1", f"--aug_dim={D}"]
    train.main([f"--data={data / 'train'}", f"--outdir={tmp_path}", "--name=a", *TINY_RUN,
                "--duration=0.000016", "--tick=0.008", "--snap=1", "--cond-image=1", "--eval=0.008",
                f"--eval-pairs={data / name}", "--eval-steps=3", "--eval-solver=ipndm",
                "--device=cpu", *flags], standalone_mode=False)
    lines = lines_of(tmp_path / "a/metrics.jsonl")
    assert [(line["metric"], line["kimg"]) for line in lines] == [
        ("psnr", 0.008), ("rmse", 0.008), ("psnr", 0.016), ("rmse", 0.016)]
    for kimg in (0.008, 0.016):
        out = tmp_path / f"out{kimg}"
        generate.main([f"--network={tmp_path}/a/network-snapshot-{kimg:010.3f}.pt",
                       f"--outdir={out}", f"--cond-image={data / name}", "--steps=3",
                       "--solver=ipndm", "--device=cpu"], standalone_mode=False)
        fid.main(["pairs", f"--images={out}", f"--truth={data / name}", "--metrics=psnr,rmse"],
                 standalone_mode=False)
        for line in lines_of(out / "metrics.jsonl"):
            [own] = [other for other in lines
                     if (other["metric"], other["kimg"]) == (line["metric"], kimg)]
            assert own["value"] == pytest.approx(line["value"], rel=1e-6)
            assert own["std"] == pytest.approx(line["std"], rel=1e-4)
            assert own["range"] == line["range"] and own["num"] == line["num"]
    assert "samples given the measurements, 3 evaluations each" in capsys.readouterr().out


def test_of_more_pairs_a_fixed_part_is_used(data, tmp_path):
    found = []
    for seed in (0, 5):
        trainer = make_trainer(data / "train", eval_pairs=str(data / "train"), eval_num=4,
                               seed=seed)
        pairs = open_pairs(trainer.config, trainer.dataset)
        found.append([pairs.get_details(k).raw_idx for k in range(len(pairs))])
    assert found[0] == found[1] and len(found[0]) == 4 and found[0] != [0, 1, 2, 3]
    scores(trainer, tmp_path)
    assert lines_of(tmp_path / "metrics.jsonl")[0]["num"] == 4


@pytest.mark.long
def test_class_conditional_networks_are_told_the_labels_of_pairs(tmp_path):
    """Also where the pairs lack the last of the classes of training."""
    for name, num, classes in (("train", 12, 3), ("pairs", 4, 2)):
        source = write_dataset(tmp_path / f"{name}.zip", num=num, classes=classes)
        dataset = ImageFolderDataset(source, use_labels=True)
        folder = tmp_path / name
        (folder / "cond").mkdir(parents=True)
        labels = []
        for k in range(num):
            image = dataset.get_batch([k])[0][0]
            np.save(folder / f"{k}.npy", image.astype(np.uint8))
            np.save(folder / f"cond/{k}.npy", np.clip(image.astype(int) + 9, 0, 255).astype(
                np.uint8))
            labels.append([f"{k}.npy", k % classes])
        (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    trainer = make_trainer(tmp_path / "train", cond=True, eval_pairs=str(tmp_path / "pairs"))
    told = []
    trainer.ema.register_forward_pre_hook(lambda module, args: told.append(args[2]))
    found = scores(trainer, tmp_path)
    assert torch.equal(torch.cat(told), torch.eye(3)[[0, 1, 0, 1]])
    assert found["psnr"] == pytest.approx(20 * math.log10(255 / found["rmse"]), abs=1.0)


def test_restored_images_that_are_not_finite_have_no_score(data, tmp_path):
    from metrics.scoring import NonFiniteSamplesError
    trainer = make_trainer(data / "train", eval_pairs=str(data / "same"))
    with torch.no_grad():
        next(trainer.ema.parameters()).fill_(math.nan)
    with pytest.raises(NonFiniteSamplesError, match="5 of 5 restored images"):
        scores(trainer, tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


# ------------------------------------------------------------------------------------------- runs


def run(data, folder, *flags):
    train.main([f"--data={data / 'train'}", f"--outdir={folder}", "--name=a", *TINY_RUN,
                "--duration=0.000032", "--tick=0.008", "--snap=9", "--dump=1", "--eval=0.008",
                "--device=cpu", *flags], standalone_mode=False)
    return folder / "a"


REFERENCE = ["--eval-num=4", "--eval-detector=pixels"]


@pytest.mark.long
def test_the_state_of_the_highest_psnr_is_kept_unless_there_is_a_reference(data, tmp_path, capsys):
    pairs = f"--eval-pairs={data / 'same'}"
    folder = run(data, tmp_path / "pairs", pairs, "--eval-num=5")
    out = capsys.readouterr().out
    stats = lines_of(folder / "stats.jsonl")
    psnrs = {line["Progress/kimg"]["mean"]: line["Metrics/psnr"]["mean"] for line in stats}
    assert len(psnrs) == 4 and "PSNR " in out and "the highest so far: kept as" in out
    assert all("Metrics/rmse" in line for line in stats)
    best = checkpoint.load_state(folder / checkpoint.BEST_STATE)
    assert best["progress"]["best_score"] == max(psnrs.values())
    assert best["progress"]["cur_nimg"] == round(1000 * max(psnrs, key=psnrs.get))
    assert best["progress"]["best_score_of"]["metric"] == "psnr"

    both = run(data, tmp_path / "both", pairs, f"--eval-ref={data / 'same'}", *REFERENCE)
    metrics = [line["metric"] for line in lines_of(both / "metrics.jsonl")]
    assert metrics == ["frechet_distance", "psnr", "rmse"] * 4
    distances = {line["kimg"]: line["value"] for line in lines_of(both / "metrics.jsonl")
                 if line["metric"] == "frechet_distance"}
    best = checkpoint.load_state(both / checkpoint.BEST_STATE)
    assert best["progress"]["best_score"] == min(distances.values())
    assert capsys.readouterr().out.count("so far") == 4  # once each time

    record = RunRecord.read(both)
    assert record.notes == [] and len(record.scores) == 12
    (both / "metrics.jsonl").unlink()  # stats.jsonl has them too
    found = {score.metric: score.detector for score in RunRecord.read(both).scores}
    assert found == {"frechet_distance": "pixels", "psnr": "", "rmse": ""}
    assert RunState.read(folder, "a").score.value == max(psnrs.values())
    assert json.loads((both / "training_options.json").read_text())["pairs"]["size"] == 4


@pytest.mark.long
def test_training_does_not_see_pairs(data, tmp_path):
    digests = []
    for name, flags in (("without", ["--eval-num=4", f"--eval-ref={data / 'same'}", REFERENCE[1]]),
                        ("with", [f"--eval-pairs={data / 'other'}"])):
        state = checkpoint.load_state(
            run(data, tmp_path / name, *flags, "--pfgmpp=1") / "training-state-000000.032.pt")
        digests.append([checkpoint.digest(state[key]) for key in ("net", "ema", "optimizer")])
    assert digests[0] == digests[1]


@pytest.mark.long
def test_a_resumed_run_remembers_its_highest_psnr_and_may_change_its_pairs(data, tmp_path):
    flags = [f"--eval-pairs={data / 'same'}", "--lr=1e-6"]
    folder = run(data, tmp_path, *flags)
    before = checkpoint.load_state(folder / "training-state-000000.032.pt")["progress"]
    args = ["--resume=auto", "--duration=0.00004"]
    run(data, tmp_path, *flags, *args)
    after = checkpoint.load_state(folder / "training-state-000000.040.pt")["progress"]
    last = lines_of(folder / "metrics.jsonl")[-2]
    assert after["best_score"] == max(before["best_score"], last["value"])
    run(data, tmp_path, f"--eval-pairs={data / 'other'}", "--lr=1e-6", args[0],
        "--duration=0.000048")
    assert lines_of(folder / "metrics.jsonl")[-1]["num"] == 3


@pytest.mark.slow
@pytest.mark.scripts
def test_scores_of_pairs_are_the_same_on_two_ranks(data, tmp_path):
    found = []
    for processes in (0, 2):
        run_script("train.py", f"--data={data / 'train'}", f"--outdir={tmp_path}",
                   f"--name=run{processes}", *TINY_RUN, "--duration=0.000008", "--tick=0.008",
                   "--eval=0.008", f"--eval-pairs={data / 'other'}", "--device=cpu",
                   processes=processes)
        found.append(lines_of(tmp_path / f"run{processes}/metrics.jsonl"))
    for alone, together in zip(*found, strict=True):
        assert together["value"] == pytest.approx(alone["value"], rel=1e-5)
        assert together["num"] == alone["num"] == 3


# --------------------------------------------------------------------------- pairs that do not fit


def arrays(folder, **options):
    write_pairs(folder, [(8, 8)] * 3, **options)
    return folder


def without_conditions(folder):
    arrays(folder)
    for path in (folder / "cond").iterdir():
        path.unlink()
    return folder


def with_nan(folder):
    arrays(folder)
    image = np.load(folder / "cond/x2.npy")
    image[0, 3, 4] = math.nan
    np.save(folder / "cond/x2.npy", image)
    return folder


OTHER_SCALE = {"center": [0.0], "spread": [1000.0]}


@pytest.mark.parametrize("make, flags, words", [
    (lambda folder: folder, [], ["--eval-pairs=", "no such folder"]),
    (without_conditions, [], ["has no condition images"]),
    (lambda folder: arrays(folder, scale=OTHER_SCALE), [], ["its images have another scale"]),
    (lambda folder: arrays(folder, channels=2), [], ["its images have 2 channels", "data have 1"]),
    (lambda folder: arrays(folder, noise=0.0), [], ["condition images equal its images"]),
    (with_nan, [], ["cond/x2.npy", "nan"]),
    (lambda folder: arrays(folder, noise=20.0), ["--precond=ve"],
     ["the network knows levels from 100 to 0.02"]),
])
def test_pairs_that_do_not_fit_are_one_line_before_the_run(data, tmp_path, invoke, make, flags,
                                                           words):
    pairs = make(tmp_path / "x")
    args = [f"--data={data / 'train'}", f"--outdir={tmp_path / 'out'}", *TINY_RUN, "--eval=1",
            f"--eval-pairs={pairs}", "--duration=0.000008", "--device=cpu", *flags]
    result = invoke(train.main, *args)
    assert result.exit_code == 1, result.output
    [line] = [text for text in result.output.splitlines() if text.startswith("Error: ")]
    assert all(word in line for word in words), line
    assert "tick" not in result.output and "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_pairs_need_a_range_and_an_interval(data, tmp_path, invoke):
    write_pairs(tmp_path / "plain", [(8, 8)] * 3, scale=None)
    args = [f"--outdir={tmp_path / 'out'}", *TINY_RUN, f"--eval-pairs={tmp_path / 'plain'}"]
    result = invoke(train.main, f"--data={tmp_path / 'plain'}", *args, "--eval=1")
    assert result.exit_code == 1 and "training data, the floating-point images" in result.output
    for flags in ([], ["--eval=1", "--eval-pairs="]):
        result = invoke(train.main, f"--data={data / 'train'}", *args, *flags)
        assert result.exit_code == 2 and "--eval" in result.output
    assert not (tmp_path / "out").exists()


def test_generators_do_not_denoise(data):
    from training.distill_config import DistillConfig
    config = DistillConfig(data="x", method="ipfm", teacher="t", eval=1.0,
                           eval_pairs=str(data / "same"))
    dataset = ImageFolderDataset(data / "train")
    with pytest.raises(ValueError, match="--method=ipfm: a generator"):
        open_pairs(config, dataset)
