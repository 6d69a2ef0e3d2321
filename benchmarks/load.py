"""Memory, open files and speed of long jobs over time, to check that they stay constant.

    python -m benchmarks.load images [--num 50000]     generate.py, then fid.py calc
    python -m benchmarks.load data [--num 1000000]     train.py on a ZIP of tiny images

The scripts run on the CPU in the way users run them. Memory is that of the script and all its child
processes, with shared pages counted once (proportional set size), and is sampled twice a second.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SIDE = 8


def write_data(path: Path, num: int, side: int, classes: int) -> None:
    """Writes a ZIP of gray images with four different contents, as dataset_tool.py stores them."""
    import PIL.Image

    from dnnlib.stored_zip import StoredZip

    rng = np.random.default_rng(0)
    contents = []
    for _ in range(4):
        buffer = io.BytesIO()
        PIL.Image.fromarray(rng.integers(0, 256, [side, side], np.uint8)).save(buffer, "PNG")
        contents.append(buffer.getvalue())
    names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(num)]
    with open(path, "wb") as file:
        archive = StoredZip(file)
        for i, name in enumerate(names):
            archive.write(name, contents[i % 4])
        labels = [[name, i % classes] for i, name in enumerate(names)]
        archive.write("dataset.json", json.dumps({"labels": labels}).encode())
        archive.close()


def write_network(path: Path) -> None:
    """Writes a snapshot of a small untrained network for gray images."""
    from checkpoints import checkpoint
    from pfgmpp.networks import build_network
    from training.config import TrainConfig

    config = TrainConfig(data="none", cbase=8, cres=(1,), nblock=1, augment=0.0)
    net = build_network(config.network(SIDE, 1, 0))
    checkpoint.save(path, {
        "format": checkpoint.SNAPSHOT_FORMAT, "network": net.config,
        "ema": dict(net.state_dict()), "progress": {"cur_nimg": 0}, "options": config.to_dict()})


def tree_of(pid: int) -> list[int]:
    """Returns a process and its descendants."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def usage(pid: int) -> tuple[float, int]:
    """Returns (proportional memory in MB, open files) of a process and its descendants."""
    kilobytes = files = 0
    for each in tree_of(pid):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{each}/smaps_rollup").read_text()
            kilobytes += int(text.split("\nPss:")[1].split()[0])
            files += len(os.listdir(f"/proc/{each}/fd"))
    return kilobytes / 1e3, files


def watch(title: str, *args: object) -> None:
    """Runs a script and prints its memory and open files."""
    start, samples = time.perf_counter(), []
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([sys.executable, *map(str, args)], cwd=ROOT, stdout=log,
                                   stderr=log)
        while process.poll() is None:
            samples.append(usage(process.pid))
            time.sleep(0.5)
        log.seek(0)
        if process.returncode:
            raise click.ClickException(log.read().decode())
    seconds = time.perf_counter() - start
    samples = samples[:-1]  # the last one may be of a terminating process
    quarter = max(len(samples) // 4, 1)
    means = [np.mean(samples[quarter * i:quarter * (i + 1)], axis=0) for i in range(4)]
    most = np.max(samples, axis=0)
    for i, what in enumerate(("MB of memory", "open files")):
        print(f"{title}, {seconds:.0f} s: {what} by quarters of the time "
              f"{', '.join(f'{mean[i]:.0f}' for mean in means)}, most {most[i]:.0f}", flush=True)


@click.group()
def main() -> None:
    """Measures long jobs."""


@main.command()
@click.option("--num", default=50_000)
def images(num: int) -> None:
    """Generates and scores a large number of small images."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_network(root / "network.pt")
        write_data(root / "ref.zip", 1000, SIDE, 1)
        watch("generate", "generate.py", f"--network={root / 'network.pt'}", "--steps=1",
              f"--outdir={root / 'out'}", "--subdirs", f"--seeds=0-{num - 1}", "--batch=500",
              "--device=cpu")
        ends = sorted(path.stat().st_mtime for path in (root / "out").glob("*000"))
        rates = 1000 / np.maximum(np.diff(ends), 1e-9)
        print("images/s, mean of each quarter: "
              + ", ".join(f"{len(part) * 1000 / (1000 / part).sum():.0f}"
                          for part in np.array_split(rates, 4)))
        watch("calc", "fid.py", "calc", f"--images={root / 'out'}", f"--ref={root / 'ref.zip'}",
              "--detector=pixels", f"--num={num}", "--batch=500", "--device=cpu")


@main.command()
@click.option("--num", default=1_000_000)
@click.option("--kimg", default=20)
def data(num: int, kimg: int) -> None:
    """Opens and trains on a large number of tiny images."""
    from images.dataset import ImageFolderDataset

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["PFGMPP_CACHE_DIR"] = str(root / "cache")
        write_data(root / "data.zip", num, 4, 10)
        print(f"ZIP of {num} images, {(root / 'data.zip').stat().st_size / 1e6:.0f} MB")
        for when in ("packing", "packed"):
            start = time.perf_counter()
            dataset = ImageFolderDataset(root / "data.zip", use_labels=True, cache=True)
            print(f"opening, {when}: {time.perf_counter() - start:.1f} s", flush=True)
        dataset.close()
        watch("train", "train.py", f"--data={root / 'data.zip'}", f"--outdir={root / 'runs'}",
              "--cond=1", "--cbase=8", "--cres=1", "--nblock=1", "--batch=64", "--device=cpu",
              f"--duration={kimg / 1e3}", "--tick=2", "--samples=0", "--workers=1")


if __name__ == "__main__":
    main()
