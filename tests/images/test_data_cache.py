"""The cache folder: who packs, where and whether there is room; what is found out once."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from scripts import ROOT, run_ranks
from tiny import TINY_RUN, write_dataset

import dataset_tool
import train
from checkpoints import checkpoint
from dnnlib import progress
from dnnlib.stored_zip import StoredZip
from images import data_cache, image_files, uniform_images
from images.dataset import ImageFolderDataset
from images.scaling import Scaling, Spread, image_means
from torch_utils.loading import read_in_processes
from training import sigma_data
from training.config import TrainConfig
from training.sigma_data import settle_sigma_data


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PFGMPP_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def full_disk(monkeypatch):
    """A disk with 1000 bytes left."""
    monkeypatch.setattr(data_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))


@pytest.fixture
def folder(tmp_path):
    """A data set as a folder whose files nobody has touched for an hour."""
    image_files.zipfile.ZipFile(write_dataset(tmp_path / "a.zip")).extractall(tmp_path / "folder")
    return tmp_path / "folder"


@pytest.fixture
def settled(monkeypatch):
    """Lets files count as settled at once: the time they were made is the test's own."""
    monkeypatch.setattr(data_cache, "_SETTLED_NS", -10**12)


def count_reads(monkeypatch):
    reads, stamp = [], image_files.Folder.stamp
    monkeypatch.setattr(image_files.Folder, "stamp",
                        lambda self, name: reads.append(name) or stamp(self, name))
    return reads


# ------------------------------------------------------------------------------------ room

def test_place_and_size_are_told_before_packing_begins(dataset_zip, cache, capsys, monkeypatch):
    written = []
    monkeypatch.setattr(uniform_images.UniformImages, "write_packed",
                        lambda self, path, title: written.append(capsys.readouterr().out))
    ImageFolderDataset(dataset_zip, cache=True)
    [said] = written
    assert re.fullmatch(rf"Packing {dataset_zip}: 7\.81 kB into {cache}/packed, where [\d.]+ .?B "
                        "are free\n", said)


def test_without_room_nothing_is_decoded_or_written(dataset_zip, cache, full_disk, monkeypatch,
                                                    capsys):
    monkeypatch.setattr(uniform_images.UniformImages, "_decode", None)  # to fail if it is called
    dataset = ImageFolderDataset(dataset_zip, cache=True)
    assert not dataset.is_packed and list((cache / "packed").iterdir()) == []
    [warning] = capsys.readouterr().err.splitlines()
    assert "needs 7.81 kB, but 1 kB are free" in warning


def test_a_packed_file_is_used_on_a_disk_that_has_become_full(dataset_zip, request):
    ImageFolderDataset(dataset_zip, cache=True)
    request.getfixturevalue("full_disk")
    assert ImageFolderDataset(dataset_zip, cache=True).is_packed


def test_what_a_killed_packing_left_is_removed_before_room_is_looked_for(dataset_zip, cache):
    (cache / "packed").mkdir(parents=True)
    left = cache / "packed" / f"x.npy.{'0' * 16}.tmp"  # which nobody has locked
    left.write_bytes(b"x")
    ImageFolderDataset(dataset_zip, cache=True)
    assert not left.exists()


def test_a_disk_that_fills_while_packing_leaves_nothing(dataset_zip, cache, monkeypatch, capsys):
    def decode_all(self, title):
        yield np.zeros([8, 3, 8, 8], np.uint8)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(uniform_images.UniformImages, "_decode_all", decode_all)
    dataset = ImageFolderDataset(dataset_zip, cache=True)
    assert not dataset.is_packed and list((cache / "packed").iterdir()) == []
    [warning] = capsys.readouterr().err.splitlines()
    assert "No space left on device" in warning


@pytest.mark.parametrize("flags", [[], ["--cond=1"]])
def test_a_run_trains_from_the_files_where_they_can_not_be_packed(dataset_zip, tmp_path, invoke,
                                                                   flags, monkeypatch, cache):
    args = [f"--data={dataset_zip}", *TINY_RUN, "--duration=0.000016", "--device=cpu", *flags]
    packed = invoke(train.main, f"--outdir={tmp_path}", "--name=a", *args)
    assert packed.exit_code == 0, packed.output
    shutil.rmtree(cache)
    monkeypatch.setattr(data_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    result = invoke(train.main, f"--outdir={tmp_path}", "--name=b", *args)
    assert result.exit_code == 0 and result.stderr.count("is not packed") == 1
    a, b = (checkpoint.load(max((tmp_path / name).glob("network-snapshot-*.pt")))["ema"]
            for name in "ab")
    assert all(map(torch.equal, a.values(), b.values()))


def test_data_on_the_device_need_the_packed_file(dataset_zip, tmp_path, invoke, full_disk):
    result = invoke(train.main, f"--outdir={tmp_path / 'runs'}", f"--data={dataset_zip}", *TINY_RUN,
                    "--device=cpu", "--data-on-device=1")
    assert result.exit_code == 1 and "Error: --data-on-device=1: " in result.stderr
    assert not list((tmp_path / "runs").glob("*"))


@pytest.mark.long
@pytest.mark.parametrize("free, word", [(10**9, "1 GB is free there\n"), (1000, "too little")])
def test_a_dry_run_says_where_data_would_be_packed_and_whether_they_fit(
        dataset_zip, tmp_path, invoke, monkeypatch, cache, free, word):
    monkeypatch.setattr(data_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    args = [f"--outdir={tmp_path}", f"--data={dataset_zip}", *TINY_RUN, "-n"]
    said = invoke(train.main, *args).stdout
    key = ImageFolderDataset(dataset_zip).content_key
    assert f"Cache      {cache}/packed/{key}.npy, 7.81 kB, to be packed by the first run\n" in said
    assert word in said and not cache.exists()
    elsewhere = invoke(train.main, *args, f"--cache-dir={tmp_path / 'other'}").stdout
    assert f"Cache      {tmp_path}/other/packed/{key}.npy" in elsewhere
    if free > 1000:
        ImageFolderDataset(dataset_zip, cache=True)
        assert f"Cache      {cache}/packed/{key}.npy, 7.81 kB, packed already\n" in invoke(
            train.main, *args).stdout
    assert "Cache" not in invoke(train.main, *args, "--cache=0").stdout


def test_the_cache_is_where_a_flag_says(dataset_zip, tmp_path, invoke, cache):
    result = invoke(train.main, f"--outdir={tmp_path}", f"--data={dataset_zip}", *TINY_RUN,
                    "--duration=0.000008", "--device=cpu", f"--cache-dir={tmp_path / 'other'}")
    assert result.exit_code == 0, result.output
    assert [path.suffix for path in (tmp_path / "other" / "packed").iterdir()] == [".npy"]
    assert not cache.exists() and os.environ["PFGMPP_CACHE_DIR"] == str(cache)
    for bad in ("", str(dataset_zip)):
        result = invoke(train.main, f"--outdir={tmp_path}", f"--data={dataset_zip}",
                        f"--cache-dir={bad}")
        assert result.exit_code == 2 and "must name a folder" in result.stderr


# ----------------------------------------------------------------------------- fingerprints

def test_a_folder_is_read_once(folder, settled, monkeypatch):
    reads = count_reads(monkeypatch)
    first = ImageFolderDataset(folder).fingerprint
    assert len(reads) == 41
    assert ImageFolderDataset(folder).fingerprint == first and len(reads) == 41
    assert ImageFolderDataset(folder).known_fingerprint == first
    assert first == ImageFolderDataset(folder.with_name("a.zip")).fingerprint


@pytest.mark.parametrize("change", [
    lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"),
    lambda path: os.utime(path),
    lambda path: path.rename(path.with_name("z.png")),
    # Another content of the same size and time: only the change time and the inode tell.
    lambda path: (shutil.copy2(path, path.with_suffix(".tmp")),
                  path.with_suffix(".tmp").replace(path)),
])
def test_a_folder_that_was_touched_is_read_again(folder, settled, change, monkeypatch):
    first = ImageFolderDataset(folder).fingerprint
    path = folder / "00000" / "img00000003.png"
    change(path)
    reads = count_reads(monkeypatch)
    assert ImageFolderDataset(folder).known_fingerprint is None and not reads
    again = ImageFolderDataset(folder).fingerprint
    assert len(reads) == 41
    image_files.zipfile.ZipFile(folder.with_name("a.zip")).extractall(folder.with_name("other"))
    if path.exists() and path.read_bytes() == (
            folder.with_name("other") / "00000" / path.name).read_bytes():
        assert again == first
    else:
        assert again != first


def test_a_folder_that_was_just_written_is_not_trusted_to_be_finished(folder, monkeypatch):
    # Within a tick of the file system's clock a file may change and keep its time.
    ImageFolderDataset(folder).fingerprint  # noqa: B018
    assert ImageFolderDataset(folder).known_fingerprint is None
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - 3600,) * 2)  # the change time tells still
    assert ImageFolderDataset(folder).known_fingerprint is None


def test_a_note_that_is_damaged_is_none(folder, settled, cache):
    first = ImageFolderDataset(folder).fingerprint
    [note] = (cache / "notes").glob("fingerprint-*.json")
    for text in ("", "[]", '{"fingerprint": 3}', "[" * 100_000, '{"fingerprint"'):
        note.write_text(text)
        assert ImageFolderDataset(folder).fingerprint == first


@pytest.mark.slow
@pytest.mark.scripts
@pytest.mark.long
def test_rank_0_reads_a_folder_for_all(folder, tmp_path):
    # Two nodes of two ranks; the second has a copy with the same times, or with others.
    copies = [shutil.copytree(folder, tmp_path / name) for name in ("same", "later")]
    os.utime(copies[1] / "00000" / "img00000003.png")
    for copy, readers in zip(copies, ["0"], strict=False):
        assert readers_of(folder, copy, tmp_path / "reads") == readers
    assert readers_of(folder, copies[1], tmp_path / "more") == "02"
    (copies[1] / "00000" / "img00000003.png").write_bytes(
        (copies[1] / "00000" / "img00000005.png").read_bytes())
    ranks = nodes(folder, copies[1], tmp_path / "most", "--name=other")
    words = "rank 2 was started with --data=40 images with fingerprint "
    assert any(words in rank.stderr for rank in ranks)


COUNT = """python:
import os, pathlib
import images.image_files as module
from images.uniform_images import UniformImages
rank = os.environ["RANK"]
node = int(rank) // 2
os.environ.update(LOCAL_RANK=str(int(rank) % 2), LOCAL_WORLD_SIZE="2")
os.environ["PFGMPP_CACHE_DIR"] = CACHES[node]
stamp = module.Folder.stamp
def counted(self, name):
    pathlib.Path(LOG + "-reads" + rank).touch()
    return stamp(self, name)
module.Folder.stamp = counted
write = UniformImages.write_packed
def packed(self, path, title):
    with open(LOG + "-packed" + rank, "a") as file:
        file.write(str(path) + chr(10))
    return write(self, path, title)
UniformImages.write_packed = packed
check = UniformImages.check_uniform
def checked(self):
    pathlib.Path(LOG + "-checked" + rank).touch()
    return check(self)
UniformImages.check_uniform = checked
"""


def nodes(first, second, log, *flags, caches=None):
    """Trains on two "nodes" of two ranks, each with its data and cache; returns the ranks."""
    log.mkdir(exist_ok=True)
    caches = caches or [log / "cache0", log / "cache1"]
    code = COUNT.replace("CACHES", repr(list(map(str, caches)))).replace("LOG", repr(f"{log}/x"))
    own = [[code, f"--data={first if rank < 2 else second}"] for rank in range(4)]
    return run_ranks("tests/helpers/ranked.py", json.dumps(own), ROOT / "train.py",
                     f"--outdir={log}", "--name=run", *TINY_RUN, "--device=cpu",
                     "--duration=0.000016", *flags, processes=4)


def readers_of(first, second, log):
    ranks = nodes(first, second, log)
    assert not any(rank.returncode for rank in ranks), [rank.stderr for rank in ranks]
    return "".join(sorted(path.name[-1] for path in log.glob("x-reads*")))


def packers(log):
    return {path.name[-1]: path.read_text().splitlines() for path in log.glob("x-packed*")}


@pytest.mark.slow
@pytest.mark.scripts
@pytest.mark.long
def test_each_node_packs_once(dataset_zip, tmp_path):
    ranks = nodes(dataset_zip, dataset_zip, tmp_path / "log")
    assert not any(rank.returncode for rank in ranks), [rank.stderr for rank in ranks]
    key = ImageFolderDataset(dataset_zip).content_key
    assert packers(tmp_path / "log") == {
        rank: [f"{tmp_path}/log/cache{node}/packed/{key}.npy"] for node, rank in enumerate("02")}
    assert f"Packing {dataset_zip}: 7.81 kB into {tmp_path}/log/cache0" in ranks[0].stdout
    assert f"{tmp_path}/log/cache1/packed on {os.uname().nodename}" in ranks[2].stdout
    assert ranks[1].stdout == ranks[3].stdout == ""
    assert not list((tmp_path / "log").glob("x-checked*"))
    assert [path.name for path in (tmp_path / "log/cache1/packed").iterdir()] == [f"{key}.npy"]


@pytest.mark.slow
@pytest.mark.scripts
@pytest.mark.long
def test_nodes_that_share_a_cache_pack_once(dataset_zip, tmp_path):
    shared = [tmp_path / "cache"] * 2
    ranks = nodes(dataset_zip, dataset_zip, tmp_path / "log", caches=shared)
    assert not any(rank.returncode for rank in ranks), [rank.stderr for rank in ranks]
    assert list(packers(tmp_path / "log")) == ["0"]
    assert len(list((tmp_path / "cache/packed").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.scripts
@pytest.mark.long
def test_a_node_without_room_reads_files_and_says_so_once(dataset_zip, tmp_path):
    (tmp_path / "file").write_text("")
    ranks = nodes(dataset_zip, dataset_zip, tmp_path / "log",
                  caches=[tmp_path / "cache", tmp_path / "file"])
    assert not any(rank.returncode for rank in ranks), [rank.stderr for rank in ranks]
    assert list(packers(tmp_path / "log")) == ["0"]
    assert [rank.stderr.count("is not packed") for rank in ranks] == [0, 0, 1, 0]
    assert {path.name[-1] for path in (tmp_path / "log").glob("x-checked*")} == {"2"}


# ------------------------------------------------------------------------------- sigma_data

def test_means_of_images_are_those_of_what_networks_see():
    rng = np.random.default_rng(0)
    values = rng.normal(7, 3, [5, 2, 4, 6])
    scaling = Scaling((1.0, 9.0), (2.0, 5.0))
    x = scaling.to_network(torch.from_numpy(values)).double().numpy().reshape(5, -1)
    assert np.allclose(image_means(values, scaling),
                       np.stack([x.mean(1), (x**2).mean(1)], 1), rtol=1e-6)


@pytest.mark.parametrize("count", [200, 3000])  # of 3000 of 4000 the error is half
def test_the_standard_error_is_that_of_repeated_samples(count):
    # 4000 images whose brightness and contrast differ; 500 samples of some of them.
    rng = np.random.default_rng(1)
    x = rng.normal(rng.normal(0.3, 0.4, [4000, 1]), rng.gamma(4, 0.1, [4000, 1]), [4000, 32])
    means = np.stack([x.mean(1), (x**2).mean(1)], 1)
    found, errors = [], []
    for _ in range(500):
        chosen = means[rng.choice(4000, count, replace=False)]
        found.append(np.sqrt(chosen[:, 1].mean() - chosen[:, 0].mean()**2))
        spread = Spread()
        spread.add(chosen[:50])
        spread.add(chosen[50:])
        errors.append(spread.relative_error(4000))
    # 500 samples give a deviation to 3 %, a standard error by 200 images is good to some 10 %.
    assert np.mean(errors) == pytest.approx(np.std(found) / x.std(), rel=0.12)


@pytest.mark.parametrize("max_images", [None, 40, 30])
def test_what_is_measured_in_processes_is_what_numpy_says(dataset_zip, monkeypatch, max_images):
    monkeypatch.setattr("images.dataset._MEASURE_ALONE", 1)
    monkeypatch.setattr("images.dataset._MEASURE_BYTES", 8 * 192)
    dataset = ImageFolderDataset(dataset_zip)
    moments, spread = dataset.measure(max_images)
    x = dataset.get_batch(range(40))[0] / 127.5 - 1
    std = moments.scaled(dataset.scaling).overall_std()
    if max_images == 30:
        assert std == pytest.approx(x.std(), rel=0.1) and std != x.std()
        assert 0 < spread.relative_error(40) < 0.1
    else:
        assert std == pytest.approx(x.std(), rel=1e-12) and spread.relative_error(40) == 0


def settle(dataset, state=None, **options):
    return settle_sigma_data(TrainConfig(data="x", sigma_data=None), dataset, state,
                             **options).sigma_data


def test_sigma_data_is_measured_once_and_told_with_its_error(dataset_zip, monkeypatch, capsys,
                                                             cache):
    monkeypatch.setattr(sigma_data, "SAMPLE_SIZE", 30)
    dataset = ImageFolderDataset(dataset_zip)
    assert settle(dataset, may_measure=False) is None and capsys.readouterr().out == ""
    value = settle(dataset)
    line = capsys.readouterr().out
    assert re.fullmatch(rf"sigma_data     {value:.6g}, measured on 30 of 40 images "
                        r"\(relative standard error 0\.0\d\)\n", line)
    monkeypatch.setattr(ImageFolderDataset, "measure", None)  # to fail if it is called
    assert settle(ImageFolderDataset(dataset_zip)) == value
    assert capsys.readouterr().out == line.replace("\n", " by an earlier run\n")
    assert settle(dataset, may_measure=False) == value
    monkeypatch.undo()
    [note] = (cache / "notes").glob("sigma_data-*.json") if cache.exists() else []
    note.write_text('{"value": -1.0, "relative_error": 0.0, "images": 1, "of": 1}')
    monkeypatch.setenv("PFGMPP_CACHE_DIR", str(cache))
    assert settle(ImageFolderDataset(dataset_zip)) > 0


def test_a_resumed_run_takes_sigma_data_from_its_state(dataset_zip, monkeypatch, tmp_path, invoke,
                                                       cache):
    args = [f"--outdir={tmp_path}", f"--data={dataset_zip}", *TINY_RUN, "--device=cpu",
            "--name=run", "--sigma-data=auto"]
    first = invoke(train.main, *args, "--duration=0.000008")
    assert first.exit_code == 0 and "measured on 40 of 40 images\n" in first.stdout
    shutil.rmtree(cache)
    monkeypatch.setattr(ImageFolderDataset, "measure", None)  # to fail if it is called
    again = invoke(train.main, *args, "--duration=0.000016", "--resume=auto")
    assert again.exit_code == 0, again.output
    assert re.search(r"^sigma_data     0\.\d+, as in the state$", again.stdout, re.M)


# ---------------------------------------------------------------------------- what is told

@pytest.mark.parametrize("work", ["fingerprint", "check_uniform", "measure"])
def test_long_work_on_data_tells_soon_what_it_does(work, folder, monkeypatch, capsys):
    def slow(self, *args):
        time.sleep(0.02)
        return before(self, *args)

    owner, name = (image_files.Folder, "stamp") if work == "fingerprint" else (
        uniform_images.UniformImages, "_read_format" if work == "check_uniform" else "get")
    before = getattr(owner, name)
    dataset = ImageFolderDataset(folder)
    monkeypatch.setattr(owner, name, slow)
    monkeypatch.setattr("images.dataset._MEASURE_BYTES", 192)
    for module in (data_cache, uniform_images, progress):
        monkeypatch.setattr(module, "FIRST_LINE_SEC", 0.02)
    monkeypatch.setattr("images.dataset.FIRST_LINE_SEC", 0.02)
    found = getattr(dataset, work)
    if callable(found):
        found()
    title = {"fingerprint": f"Reading {folder} for its fingerprint", "measure":
             f"Measuring {folder}", "check_uniform": "Checking images"}[work]
    assert re.search(rf"^{re.escape(title)}: \d+ of \d+ ", capsys.readouterr().out, re.M)


def test_opening_a_zip_tells_soon_what_it_does(dataset_zip, monkeypatch, capsys):
    before = image_files.zipfile.ZipFile

    def slow(path):
        time.sleep(0.3)
        return before(path)

    monkeypatch.setattr(image_files.zipfile, "ZipFile", slow)
    monkeypatch.setattr(progress, "FIRST_LINE_SEC", 0.02)
    ImageFolderDataset(dataset_zip)
    assert capsys.readouterr().out == f"Opening {dataset_zip}: 0 s so far\n"


def test_a_cached_folder_is_known_by_its_place(folder, settled, tmp_path):
    first = ImageFolderDataset(folder).fingerprint
    other = shutil.copytree(folder, tmp_path / "copy")
    assert ImageFolderDataset(other).known_fingerprint is None
    (tmp_path / "link").symlink_to(folder)
    assert ImageFolderDataset(Path(tmp_path / "link")).known_fingerprint == first


def test_loader_processes_do_not_read_the_list_of_a_zip_again(dataset_zip, monkeypatch):
    dataset = ImageFolderDataset(dataset_zip, use_labels=True)
    expected = dataset.get_batch(range(40))[0]
    monkeypatch.setattr(image_files.zipfile, "ZipFile", None)  # to fail if it is called
    parts = [range(i, i + 4) for i in range(0, 40, 4)]
    found = [images for images, _ in read_in_processes(dataset, parts, workers=2)]
    assert np.array_equal(torch.cat(found).numpy(), expected)
    assert np.array_equal(dataset.get_batch(range(40))[0], expected)


MILLION = 1_000_000
SOON_SEC, GAP_SEC = 5, 15
SLACK_SEC = 3  # of a machine that has other work, at which threads wake up late


@pytest.mark.slow
@pytest.mark.scripts
def test_a_run_of_a_million_images_is_never_silent_before_step_0(tmp_path, capsys):
    data = io.BytesIO()
    PIL.Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(data, "png")
    with open(tmp_path / "million.zip", "wb") as file:
        archive = StoredZip(file)
        for i in range(MILLION):
            archive.write(f"{i // 1000:05d}/img{i:08d}.png", data.getvalue())
        archive.close()
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "train.py", f"--outdir={tmp_path}", f"--data={tmp_path / 'million.zip'}",
         *TINY_RUN, "--device=cpu", "--duration=0.000008", "--sigma-data=auto"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    for line in process.stdout:
        lines.append((time.monotonic() - start, line))
        if line.startswith("tick 0"):
            break
    process.stdout.read()
    assert process.wait() == 0, lines
    with capsys.disabled():
        print("", *(f"{sec:6.1f} s  {line.rstrip()}" for sec, line in lines), sep="\n")
    times = [sec for sec, _ in lines]
    assert times[0] < SOON_SEC + SLACK_SEC
    assert max(np.diff(times)) < GAP_SEC + SLACK_SEC
    assert lines[-1][1].startswith("tick 0")


# -------------------------------------------------------------------------------- contents

def test_the_cache_is_listed_and_emptied(dataset_zip, folder, settled, cache, invoke):
    ImageFolderDataset(dataset_zip, cache=True)
    ImageFolderDataset(folder, max_size=7, cache=True)
    (cache / "references").mkdir()
    (cache / "references" / "x.npz").write_bytes(b"1234")
    (cache / "mine.txt").write_text("not of the cache")
    (cache / "compiled").mkdir()  # PyTorch makes it before there is anything in it
    listed = invoke(dataset_tool.main, "cache", "list")
    head, *lines, end = listed.stdout.splitlines()
    assert listed.exit_code == 0 and re.match(r"entry +size +days$", head) and len(lines) == 4
    packed = [line for line in lines if line.startswith("packed/")]
    assert any(line.endswith(f"40 images of {dataset_zip}") for line in packed)
    assert any(line.endswith(f"7 images of {folder}") for line in packed)
    assert re.match(rf"{cache}: [\d.]+ kB in 4 entries, [\d.]+ .?B free$", end)
    name = packed[0].split()[0]
    for given in (name, Path(name).name[:70]):
        ImageFolderDataset(dataset_zip, cache=True)
        ImageFolderDataset(folder, max_size=7, cache=True)
        removed = invoke(dataset_tool.main, "cache", "remove", given)
        assert removed.exit_code == 0 and removed.stdout.startswith(f"Removed {name}, ")
        assert not (cache / name).exists() and len(list((cache / "packed").iterdir())) == 1
    assert invoke(dataset_tool.main, "cache", "remove", "--all").exit_code == 0
    assert [path for path in cache.rglob("*") if path.is_file()] == [cache / "mine.txt"]
    assert ImageFolderDataset(dataset_zip, cache=True).is_packed


@pytest.mark.parametrize("words, code, message", [
    (["nothing"], 1, "Error: 'nothing' is no entry of "),
    (["p"], 1, "begins the names of 2 entries"), ([""], 1, "is no entry"),
    (["../a.zip"], 1, "is no entry"), ([], 2, "or give --all"),
    (["x", "--all"], 2, "or give --all"),
])
def test_what_is_no_entry_removes_nothing(words, code, message, dataset_zip, cache, invoke):
    ImageFolderDataset(dataset_zip, cache=True)
    ImageFolderDataset(dataset_zip, max_size=3, cache=True)
    before = sorted(cache.rglob("*"))
    result = invoke(dataset_tool.main, "cache", "remove", *words)
    assert result.exit_code == code and message in result.stderr, result.output
    assert sorted(cache.rglob("*")) == before and dataset_zip.exists()


def test_an_empty_cache_is_listed_too(cache, invoke, tmp_path):
    assert re.fullmatch(rf"{cache}: 0 B in 0 entries, [\d.]+ .?B free\n",
                        invoke(dataset_tool.main, "cache", "list").stdout)
    other = invoke(dataset_tool.main, "cache", "list", f"--cache-dir={tmp_path / 'other'}")
    assert other.stdout.startswith(f"{tmp_path}/other: ") and not cache.exists()
    assert invoke(dataset_tool.main, "cache", "remove", "--all").exit_code == 0
