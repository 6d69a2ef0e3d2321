"""The main workflow on real images in a few minutes: split, train, sample, score, view.

It runs the project's scripts as a user would type them, and stops at the first one that fails. If
it is run again, it continues where it stopped. All its output is in demo/.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

OUT = Path("demo")
SOURCE, JUDGE = "examples/digits8.zip", "examples/digits8-judge.npz"
SHIPPED = {"inf": "examples/digits8-inf.pt", "8": "examples/digits8-8.pt"}
MIMG = 0.08  # 625 steps of 128 images
NUM = 359  # images that are scored, as many as are held out
NOISE = 0.4  # alpha
COLUMNS = 8
SIDE = 48  # side of a digit in the pictures, in pixels


def leave_busy_cores_alone() -> None:
    """Limits the threads of the scripts to the free cores if other programs keep some busy.

    Fewer threads are faster than threads that wait for one without a core.
    """
    import psutil

    loads = psutil.cpu_percent(interval=1.0, percpu=True)
    if hasattr(os, "sched_getaffinity"):  # only cores that this process may use
        loads = [loads[core] for core in os.sched_getaffinity(0) if core < len(loads)]
    cores, busy = len(loads), round(sum(loads) / 100)
    if busy and "OMP_NUM_THREADS" not in os.environ:
        threads = max(cores - busy, 1)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        print(f"Other programs keep {busy} of {cores} cores busy; using {threads} thread(s).")


def run(command: str) -> str:
    """Prints and runs `python ...`; returns its output."""
    print(f"\n$ {command}", flush=True)
    words = shlex.split(command)
    assert words[0] == "python"
    process = subprocess.Popen([sys.executable, *words[1:]], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE)
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    if process.wait():
        sys.exit(f"demo: the command above failed with exit code {process.returncode}")
    return "".join(lines)


def scores(command: str) -> tuple[float, float]:
    """Returns Frechet distance and class accuracy, the last columns of a command's table."""
    row = run(f"{command} --metrics=fid,ca --detector={JUDGE}").strip().splitlines()[-1]
    distance, accuracy = re.findall(r"[-+.\deE]+", row)[-2:]
    return float(distance), float(accuracy)


def write_grid(data: Path, network: Path, target: Path) -> None:
    """Writes a grid of real digits (left) and samples (right), one class per row."""
    import numpy as np
    import torch

    from images.dataset import ImageFolderDataset
    from images.grid import image_grid, save_png
    dataset = ImageFolderDataset(data, use_labels=True)
    rows = []
    for k in range(10):
        members = np.flatnonzero(dataset.class_numbers == k)[:COLUMNS]
        real = dataset.scaling.to_network(torch.from_numpy(dataset.get_batch(members)[0]))
        rows.append([*_shown(real), *_digits(network, range(COLUMNS), k)])
    save_png(target, image_grid(rows, [str(k) for k in range(10)], split=COLUMNS, min_side=SIDE,
                                halves=["real", "sampled"]))


def write_noise(target: Path) -> None:
    """Writes digits of the same seeds for D = inf and 8, without and with noise in every step."""
    from images.grid import image_grid, save_png
    rows = [[image for alpha in (0.0, NOISE) for k in range(10)
             for image in _digits(ROOT / network, [k], k, alpha)] for network in SHIPPED.values()]
    save_png(target, image_grid(rows, [f"D = {D}" for D in SHIPPED], split=10, min_side=SIDE,
                                halves=["as usual", f"with noise in every step, alpha = {NOISE}"]))


def _digits(network: Path, seeds, k: int, alpha: float = 0.0) -> list:
    """Returns pictures of samples of one class."""
    import torch

    from checkpoints.checkpoint import build_ema, load
    from pfgmpp.samplers import SamplerConfig, generate_images
    [batch] = generate_images(build_ema(load(network)), [seeds], class_idx=k,
                              sampler=SamplerConfig(noise_alpha=alpha), device=torch.device("cpu"))
    return _shown(batch.images)


def _shown(images) -> list:
    from pfgmpp.samplers import to_uint8
    return list(to_uint8(images).cpu().numpy())


def main() -> None:
    """Runs the demo."""
    start = time.time()
    leave_busy_cores_alone()
    data, held_out = OUT / "digits-train.zip", OUT / "digits-held-out.zip"
    run(f"python dataset_tool.py split {SOURCE} --val=0.2 --dest={data} --val-dest={held_out}")
    run(f"python train.py --outdir={OUT}/runs --name=digits-8 --resume=auto --data={data} "
        f"--preset=digits8 --pfgmpp=1 --aug_dim=8 --duration={MIMG:g} --seed=0 --device=cpu")
    network = OUT / "runs" / "digits-8" / f"network-snapshot-{int(MIMG * 1e3):06d}.pt"
    found = {
        "samples of the trained network": scores(
            f"python fid.py gen --network={network} --ref={data} --seeds=0-{NUM - 1} "
            "--device=cpu"),
        "held-out real digits": scores(
            f"python fid.py calc --images={held_out} --ref={data} --count={NUM} "
            "--device=cpu")}
    noisy = {D: scores(
        f"python fid.py gen --network={shipped} --ref={data} --seeds=0-{NUM - 1} --alpha={NOISE} "
        f"--out={OUT}/noise-{D}.jsonl --device=cpu") for D, shipped in SHIPPED.items()}
    write_grid(ROOT / held_out, ROOT / network, ROOT / OUT / "grid.png")
    write_noise(ROOT / OUT / "noise.png")
    for D, each in noisy.items():
        found[f"shipped network of D = {D}, noise in every step"] = each
    (ROOT / OUT / "scores.json").write_text(json.dumps(found, indent=2) + "\n")

    print("\nShare of images in which a classifier recognises the requested digit, and the\n"
          "Frechet distance of its features from those of the training digits:")
    for name, (distance, accuracy) in found.items():
        print(f"  {accuracy:7.1%}  {distance:8.3f}  {name}")
    print(f"\nReal digits (left) and samples (right), one class per row: {OUT}/grid.png")
    print(f"D = inf and D = 8, without and with noise in every step: {OUT}/noise.png")
    print("\nNext, a model of your own photos (minutes), and a page about this one:")
    print("  python dataset_tool.py --source=PHOTOS --dest=datasets/photos-32x32.zip "
          "--resolution=32x32 --transform=center-crop")
    print("  python train.py --preset=emoji32 --outdir=runs --name=photos "
          "--data=datasets/photos-32x32.zip --pfgmpp=1 --aug_dim=128 "
          "--transfer=examples/emoji16-128.pt --lr=5e-4 --lr-rampup=0 --duration=0.01")
    print(f"  python report.py {OUT}/runs/digits-8 --out={OUT}/report.html")
    print(f"\nDone in {time.time() - start:.0f} s.")


if __name__ == "__main__":
    main()
