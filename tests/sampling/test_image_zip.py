"""generate.py --outdir=X.zip: one file that holds what a folder would, however it came about."""

import errno
import json
import math
import signal
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from scripts import ROOT, run_ranks
from snapshots import write_snapshot

import dataset_tool
import fid
import generate
from checkpoints import checkpoint
from images.dataset import ImageFolderDataset
from sampling.image_zip import ImageZip

ARGS = ["--steps=1", "--batch=1"]  # alone in its batch, an image is the same to the last bit


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("zips")
    write_snapshot(root / "net.pt", pfgmpp=True, aug_dim=128)
    write_snapshot(root / "edm.pt", label_dim=0)
    write_snapshot(root / "five.pt", label_dim=0, shape=(5, 8, 8), pfgmpp=True, aug_dim=2)
    return root


@pytest.fixture
def make(root, invoke):
    """Returns a function that runs generate.py, in a process of its own for `processes`."""
    def run(out, *flags, network="net", code=0):
        result = invoke(generate.main, f"--network={root / network}.pt", f"--outdir={out}", *ARGS,
                        *flags)
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        return result.output
    return run


def of_folder(path):
    return {file.relative_to(path).as_posix(): file.read_bytes()
            for file in path.rglob("*") if file.is_file()}


def of_zip(path):
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.namelist() == sorted(set(archive.namelist()))
        return {name: archive.read(name) for name in archive.namelist()}


def damage(path, name):
    """Changes a byte in the middle of a member."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(name)
        at = info.header_offset + 30 + len(name) + info.file_size // 2
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def alone(path):
    """Whether a file is there, and no parts of it."""
    return path.is_file() and not list(path.parent.glob(f"{path.name}?*"))


# ------------------------------------------------------------------------------ what it holds

@pytest.mark.parametrize("network, flags", [
    ("net", ["--seeds=0-5"]), ("edm", ["--seeds=2,1000", "--subdirs"]),
    ("five", ["--seeds=0-2"])], ids=str)
def test_a_zip_holds_what_the_folder_holds_byte_for_byte(network, flags, make, tmp_path):
    make(tmp_path / "folder", *flags, network=network)
    make(tmp_path / "one.ZIP", *flags, network=network)
    expected = of_folder(tmp_path / "folder")
    assert of_zip(tmp_path / "one.ZIP") == expected and len(expected) > 2
    assert ("dataset.json" in expected) == (network == "net")
    assert alone(tmp_path / "one.ZIP")


@pytest.fixture
def inputs(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "in/a").mkdir(parents=True)
    for name in ("a/one", "a/two", "b"):
        np.save(tmp_path / f"in/{name}.npy", rng.integers(0, 255, [3, 8, 8]).astype(np.uint8))
    return [f"--init-image={tmp_path / 'in'}", "--init-sigma=0.5"]


def test_names_of_inputs_and_deviations_of_means_are_in_the_zip(inputs, make, tmp_path):
    flags = [*inputs, "--average=2"]
    make(tmp_path / "folder", *flags)
    make(tmp_path / "one.zip", *flags)
    assert of_zip(tmp_path / "one.zip") == of_folder(tmp_path / "folder")
    assert {"a/one.png", "std/a/one.npy", "std/b.npy"} <= set(of_zip(tmp_path / "one.zip"))
    assert len(ImageFolderDataset(tmp_path / "one.zip")) == 3
    before = (tmp_path / "one.zip").read_bytes()
    damage(tmp_path / "one.zip", "std/b.npy")
    assert "2 of 3 images are there" in make(tmp_path / "one.zip", *flags)
    assert (tmp_path / "one.zip").read_bytes() == before


def test_a_finished_zip_is_left_as_it_is_and_grows_with_the_seeds(make, tmp_path):
    path = tmp_path / "one.zip"
    make(path, "--seeds=2-4")
    status = path.stat()
    output = make(path, "--seeds=2,3,4")
    assert "3 of 3 images are there" in output and "0 images made" in output
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (status.st_mtime_ns, status.st_ino)
    output = make(path, "--seeds=0-5")
    assert "3 of 6 images are there" in output and "3 images made" in output
    make(tmp_path / "whole.zip", "--seeds=0-5")
    assert path.read_bytes() == (tmp_path / "whole.zip").read_bytes()
    output = make(path, "--seeds=9")  # the others stay
    assert "1 image made" in output and len(of_zip(path)) == 7 + 2 and alone(path)


def test_files_of_the_user_stay_in_a_zip_that_grows(make, tmp_path):
    path = tmp_path / "one.zip"
    make(path, "--seeds=0-1")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("notes/größe.txt", "mine")
    make(path, "--seeds=0-2")
    assert of_zip(path)["notes/größe.txt"] == b"mine" and "000002.png" in of_zip(path)


def test_a_damaged_member_is_made_again(make, tmp_path):
    path = tmp_path / "one.zip"
    make(path, "--seeds=0-4")
    before = path.read_bytes()
    damage(path, "000003.png")
    damage(path, "000001.png")
    output = make(path, "--seeds=0-4")
    assert "3 of 5 images are there" in output and "2 images made" in output
    assert path.read_bytes() == before


def test_a_damaged_member_that_is_not_made_again_gets_a_line_and_nothing_is_lost(make, tmp_path):
    path = tmp_path / "one.zip"
    make(path, "--seeds=0-2")
    damage(path, "000001.png")
    damaged = path.read_bytes()
    output = make(path, "--seeds=5-6", code=1)
    assert "000001.png: damaged" in output and "with --seeds=1" in output
    assert path.read_bytes() == damaged
    output = make(path, "--seeds=1,5,6")
    assert "2 of 3 images are there" in output and alone(path)
    make(tmp_path / "whole.zip", "--seeds=0-2,5-6")
    assert path.read_bytes() == (tmp_path / "whole.zip").read_bytes()


def test_images_that_are_not_finite_are_recorded_in_the_zip(root, make, tmp_path, invoke):
    content = checkpoint.load(root / "edm.pt")
    for value in content["ema"].values():
        if value.is_floating_point():
            value.fill_(math.nan)
    checkpoint.save(root / "nan.pt", {key: content[key] for key in (
        "format", "network", "ema", "progress", "options")})
    path = tmp_path / "one.zip"
    for _ in range(2):  # the record of the first start stays
        assert "2 of 2 images have values that are not finite" in make(
            path, "--seeds=3-4", network="nan", code=1)
        assert json.loads(of_zip(path)["generate.json"])["not_finite"] == [3, 4]
    make(path, "--seeds=5", network="nan", code=1)
    assert json.loads(of_zip(path)["generate.json"])["not_finite"] == [3, 4, 5] and alone(path)


# -------------------------------------------------------------------------- what is refused

def test_other_settings_are_refused_as_for_folders(root, make, tmp_path):
    path = tmp_path / "one.zip"
    make(path, "--seeds=0-1")
    before = path.read_bytes()
    assert f"{path} holds images made with another setting (S_churn: 0.0 there, 5.0 now)" in make(
        path, "--seeds=0-5", "--S_churn=5", code=1)
    assert "holds images of another network" in make(path, "--seeds=0-1", network="edm", code=1)
    assert "(subdirs: False there, True now)" in make(path, "--seeds=0", "--subdirs", code=1)
    assert path.read_bytes() == before and alone(path)


@pytest.mark.parametrize("content, words", [
    ({"000000.png": b"mine"}, "holds no generate.json"),
    ({"generate.json": b"{"}, "generate.json: line 1, column 2"),
    ({"generate.json": b"[1]"}, "not a record of settings"),
    (zipfile.ZIP_DEFLATED, "compresses or encrypts the ZIP member"),
    (b"no ZIP at all", "not a ZIP, or damaged"), (b"", "not a ZIP, or damaged"),
    (None, "a folder, but a ZIP of this name would be written")], ids=str)
def test_what_is_no_zip_of_ours_is_neither_used_nor_replaced(content, words, make, tmp_path):
    path = tmp_path / "one.zip"
    if content is None:
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in content.items():
                archive.writestr(name, data)
    else:
        make(tmp_path / "stored.zip", "--seeds=0")
        with zipfile.ZipFile(path, "w", content) as archive:
            for name, data in of_zip(tmp_path / "stored.zip").items():
                archive.writestr(name, data)
        (tmp_path / "stored.zip").unlink()
    before = None if content is None else path.read_bytes()
    output = make(path, "--seeds=0", code=1)
    assert words in output and len(output.strip().splitlines()) == 1
    assert before is None or path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("flags, words", [
    (["--save_images"], "--save_images: writes pictures"), (["--alpha=0,0.1"], "--alpha"),
    (["--radii=0.5"], "--radii: writes a picture"), (["--interpolate=0,1"], "--interpolate"),
    (["--encode=x"], "--encode: writes latents.npz"), (["--bits=6,8"], "lists of --steps")])
def test_what_a_zip_has_no_place_for_is_refused_in_one_line(flags, words, make, tmp_path):
    output = make(tmp_path / "one.zip", *flags, code=2)
    [line] = [text for text in output.splitlines() if text.startswith("Error: ")]
    assert words in line and "name a folder" in line and not list(tmp_path.iterdir())


def test_a_run_directory_is_no_zip(tmp_path, invoke):
    result = invoke(generate.main, f"--outdir={tmp_path / 'run.zip'}")
    assert result.exit_code == 2 and "without --network" in result.output


@pytest.mark.long
def test_two_runs_do_not_write_one_zip(make, tmp_path):
    path = tmp_path / "one.zip"
    (tmp_path / "one.zip.parts").mkdir()
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from dnnlib.run_lock import run_lock\n"
            "with run_lock(sys.argv[2]): print('held', flush=True); sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", code, ROOT, tmp_path / "one.zip.parts"],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        assert f"in use by process {other.pid}" in make(path, "--seeds=0", code=1)
        assert (tmp_path / "one.zip.parts/.lock").exists()
        other.stdin.close()
    make(path, "--seeds=0")
    assert alone(path)


# --------------------------------------------------------------------------- kills and ranks

# What one rank does instead: the third image is torn, the ZIP is half packed, or it has its name.
KILLS = {
    "torn image": """
import itertools
count, write = itertools.count(1), image_zip._Part.write
def torn(self, name, data):
    write(self, name, data)
    if next(count) == 3:
        os.truncate(self._path, os.path.getsize(self._path) - 7)
        os.kill(os.getpid(), signal.SIGKILL)
image_zip._Part.write = torn
""", "packing": """
read = image_zip.ImageZip._read
def half(self, name, place):
    if name == "000003.png":
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, name, place)
image_zip.ImageZip._read = half
""", "packed": """
remove = image_zip.ImageZip._remove
def late(self):
    if self.path.exists():
        os.kill(os.getpid(), signal.SIGKILL)
    remove(self)
image_zip.ImageZip._remove = late
"""}


def run(root, out, *codes, seeds="0-7"):
    """Runs generate.py on ranks that run these codes first; returns what they said."""
    own = [[f"python:import os, signal\nfrom sampling import image_zip\n{code}"] for code in codes]
    return run_ranks("tests/helpers/ranked.py", json.dumps(own), ROOT / "generate.py",
                     f"--network={root / 'net.pt'}", f"--outdir={out}", f"--seeds={seeds}", *ARGS,
                     "--device=cpu", processes=len(codes))


@pytest.mark.scripts
@pytest.mark.long
@pytest.mark.parametrize("kill, ranks", [
    *((kill, 1) for kill in KILLS), pytest.param("torn image", 2, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_and_its_zip_is_that_of_one_that_was_not(kill, ranks, root, make,
                                                                      tmp_path):
    make(tmp_path / "whole.zip", "--seeds=0-7")
    path = tmp_path / "one.zip"
    victim = ranks - 1 if kill == "torn image" else 0
    codes = [KILLS[kill] if rank == victim else "" for rank in range(ranks)]
    done = run(root, path, *codes)
    assert done[victim].returncode == -signal.SIGKILL, done[victim].stderr
    assert path.exists() == (kill == "packed") and (tmp_path / "one.zip.parts").is_dir()
    assert len(list((tmp_path / "one.zip.parts").glob("*.part"))) == ranks
    stale = list(tmp_path.glob("one.zip.*.tmp"))
    assert len(stale) == (kill == "packing")
    if ranks == 1:
        output = make(path, "--seeds=0-7")
    else:
        done = run(root, path, *[""] * ranks)
        assert not any(rank.returncode for rank in done), [rank.stderr for rank in done]
        output = done[0].stdout
    [there] = [line for line in output.splitlines() if "images are there" in line]
    if kill == "torn image":  # the victim had written two, the other rank no more than its four
        assert 2 <= int(there.split(": ")[1].split(" ")[0]) <= (2 if ranks == 1 else 6)
    else:
        assert "8 of 8 images are there" in there and "0 images made" in output
    assert path.read_bytes() == (tmp_path / "whole.zip").read_bytes()
    assert alone(path)


@pytest.mark.scripts
@pytest.mark.long
def test_the_number_of_ranks_may_change_and_does_not_change_the_zip(root, make, tmp_path):
    path = tmp_path / "one.zip"
    run(root, path, KILLS["torn image"], "")
    parts = {part: part.read_bytes() for part in (tmp_path / "one.zip.parts").glob("*.part")}
    first = min(parts)  # of its images the first is damaged on the disk, behind its head
    first.write_bytes(parts[first][:60] + bytes([parts[first][60] ^ 1]) + parts[first][61:])
    output = make(path, "--seeds=0-7")
    assert "of 8 images are there" in output and "8 of 8" not in output
    make(tmp_path / "whole.zip", "--seeds=0-7")
    assert path.read_bytes() == (tmp_path / "whole.zip").read_bytes() and alone(path)


def test_parts_of_other_settings_are_refused_and_kept(make, tmp_path, monkeypatch):
    path, parts = tmp_path / "one.zip", tmp_path / "one.zip.parts"
    full = OSError(errno.ENOSPC, "No space left on device")

    def pack(*args):
        raise full
    with monkeypatch.context() as patch:
        patch.setattr(ImageZip, "_pack", pack)
        output = make(path, "--seeds=0-2", code=1)
    assert f"{path}: can't be written (No space left on device)" in output
    assert f"kept in {parts}" in output and not path.exists()
    before = of_folder(parts)
    assert f"{parts} holds images made with another setting" in make(
        path, "--seeds=0", "--S_churn=5", code=1)
    assert of_folder(parts) == before
    assert "1 of 1 images are there" in make(path, "--seeds=1")
    assert set(of_zip(path)) == {f"00000{i}.png" for i in range(3)} | {"dataset.json",
                                                                       "generate.json"}
    assert alone(path)


def test_a_failure_before_the_first_image_leaves_nothing(make, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("no network today")
    monkeypatch.setattr("sampling.network_sampler.NetworkSampler.images", fail)
    assert "no network today" in make(tmp_path / "out/one.zip", "--seeds=0", code=1)
    assert not list((tmp_path / "out").iterdir())


def test_images_of_another_rank_that_are_not_seen_are_no_finished_zip(make, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageZip, "_parts", lambda self: [])
    output = make(tmp_path / "one.zip", "--seeds=0-2", code=1)
    assert "3 of the 3 images written are not visible" in output
    assert not (tmp_path / "one.zip").exists()


# ----------------------------------------------------------------------------------- readers

def test_readers_say_of_a_zip_that_is_not_finished_how_it_goes_on(make, tmp_path, monkeypatch,
                                                                  invoke):
    path = tmp_path / "one.zip"
    with monkeypatch.context() as patch:
        patch.setattr(ImageZip, "_pack", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        make(path, "--seeds=0-2", code=1)
    parts = tmp_path / "one.zip.parts"
    for given in (path, parts):
        for main, *args in (
                (fid.main, "calc", f"--images={given}", "--ref=none.npz", "--detector=pixels"),
                (fid.main, "pairs", f"--images={given}", f"--truth={given}"),
                (dataset_tool.main, f"--source={given}", f"--dest={tmp_path / 'data.zip'}"),
                (dataset_tool.main, "check", given)):
            result = invoke(main, *args)
            assert result.exit_code != 0 and (
                f"{given}: not all of its images have been made (some are in one.zip.parts); run "
                "the same generate.py command again to make the rest and write one.zip"
            ) in result.output, result.output
    make(path, "--seeds=0-2")
    assert invoke(dataset_tool.main, "check", path).exit_code == 0
    parts.mkdir()
    (parts / "generate.json").write_text("{}")  # of more images, which are being added
    assert invoke(dataset_tool.main, "check", path).exit_code == 0


def test_readers_take_the_zip_as_they_take_the_folder(root, make, tmp_path, invoke):
    for name in ("folder", "one.zip"):
        make(tmp_path / name, "--seeds=0-11")
    scores, data, pairs = [], [], []
    for name in ("folder", "one.zip"):
        out = tmp_path / f"{name}.jsonl"
        result = invoke(fid.main, "calc", f"--images={tmp_path / name}", "--count=12",
                        f"--ref={tmp_path / 'folder'}", "--detector=pixels", "--device=cpu",
                        "--workers=0", f"--out={out}")
        assert result.exit_code == 0, result.output
        record = json.loads(out.read_text())
        assert record["seeds"] == "0-11" and record["sampler"]["num_steps"] == 1
        scores.append({key: value for key, value in record.items()
                       if key not in ("images", "date", "time", "seconds")})
        dest = tmp_path / f"of-{name}.zip"
        result = invoke(dataset_tool.main, f"--source={tmp_path / name}", f"--dest={dest}")
        assert result.exit_code == 0 and "Left out" not in result.output, result.output
        data.append(dest.read_bytes())
        start = tmp_path / f"start-{len(pairs)}"
        assert "12 images made" in make(start, f"--init-image={tmp_path / name}",
                                        "--init-sigma=0.5")
        pairs.append(of_folder(start))
    assert scores[0] == scores[1] and data[0] == data[1]
    records = [json.loads(pair.pop("generate.json")) for pair in pairs]
    fingerprints = [record.pop("init_image") for record in records]
    assert pairs[0] == pairs[1] and records[0] == records[1]
    assert fingerprints[0] == fingerprints[1]


def test_images_that_are_not_of_the_record_in_the_zip_have_no_score(make, tmp_path, invoke):
    path = tmp_path / "one.zip"
    make(path, "--seeds=0-3")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("holiday.png", archive.read("000000.png"))
    result = invoke(fid.main, "calc", f"--images={path}", "--count=5", "--ref=none.npz",
                    "--detector=pixels", "--device=cpu")
    assert result.exit_code == 1 and "does not describe: holiday.png (1 in total)" in result.output


# ------------------------------------------------------------------------------- verifying

VERIFY = """
import os, sys, json
sys.path.insert(0, {root!r})
import pathlib
from sampling.image_writer import ImageFolder
from torch_utils import distributed
looked = []
whole = ImageFolder._is_whole
def look(self, seed, deviations):
    looked.append(seed)
    return whole(self, seed, deviations)
ImageFolder._is_whole = look
with distributed.process_group("cpu"):
    folder = ImageFolder(pathlib.Path({path!r}), (3, 8, 8), False)
    print(json.dumps([folder.missing(range(8)), sorted(looked)]))
    def fail(path):
        if os.environ["RANK"] == "1":
            raise OSError("the disk of rank 1 is gone")
        return False
    folder._is_there = fail
    try:
        folder.missing(range(8))
    except OSError as error:
        print(json.dumps(str(error)))
"""


@pytest.mark.scripts
@pytest.mark.long
def test_each_rank_verifies_a_share_and_all_hear_the_same(make, tmp_path):
    folder = tmp_path / "out"
    make(folder, "--seeds=0-7")
    (folder / "000006.png").unlink()
    for name in ("000002.png", "000005.png"):
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)
    script = tmp_path / "verify.py"
    script.write_text(VERIFY.format(root=str(ROOT), path=str(folder)))
    ranks = run_ranks(script, processes=2)
    found = [list(map(json.loads, rank.stdout.splitlines())) for rank in ranks]
    assert [one[0][0] for one in found] == [[2, 5, 6]] * 2, ranks
    assert [one[0][1] for one in found] == [[0, 2, 4], [1, 3, 5, 7]]
    assert [one[1] for one in found] == ["the disk of rank 1 is gone"] * 2
