"""The main job on real images in a few minutes: convert, train, sample, score, look.

Runs the project's own scripts as a user would type them and stops at the first that fails. Run
again, it goes on where it was stopped. Everything it makes is under demo/.
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
CLASSES = {6: "Smileys", 1: "Animals", 3: "Food"}  # of examples/emoji-google-32.zip
NUM_IMAGES = 459  # of these classes
KIMG = 25.6  # 400 steps of 64 images
COLUMNS = 8
REAL_SEED = 1


def leave_busy_cores_alone() -> None:
    """Gives the scripts as many threads as other programs leave cores, if they leave too few.

    Threads that wait for one which does not get a core are slower than fewer threads.
    """
    import psutil

    loads = psutil.cpu_percent(interval=1.0, percpu=True)
    if hasattr(os, "sched_getaffinity"):  # only of the cores that this process may use
        loads = [loads[core] for core in os.sched_getaffinity(0) if core < len(loads)]
    cores, busy = len(loads), round(sum(loads) / 100)
    if busy and "OMP_NUM_THREADS" not in os.environ:
        threads = max(cores - busy, 1)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        print(f"Other programs keep {busy} of {cores} cores busy: using {threads} thread(s).")


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


def score(images: Path) -> float:
    """Returns the score that fid.py prints for a folder of images."""
    output = run(f"python fid.py calc --images={images} --ref={OUT}/ref-pixels.npz "
                 f"--num={NUM_IMAGES} --detector=pixels")
    return float(re.findall(r"[-+.\deE]+$", output.strip())[0])


def write_noise(folder: Path) -> None:
    """Writes as many images of Gaussian noise, of the data's mean and about its deviation."""
    import numpy as np
    import PIL.Image
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(NUM_IMAGES):
        pixels = np.clip(rng.normal(0, 0.5, [16, 16, 3]) * 127.5 + 128, 0, 255).astype(np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{i:06d}.png")


def write_grid(data: Path, network: Path, target: Path) -> None:
    """Writes real images at the left and samples at the right, one class a row."""
    import numpy as np
    import torch

    from checkpoints.checkpoint import build_ema, load
    from images.dataset import ImageFolderDataset
    from images.grid import image_grid, save_png
    from pfgmpp.samplers import SamplerConfig, generate_images, to_uint8
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = build_ema(load(network)).to(device)
    dataset = ImageFolderDataset(data, use_labels=True)
    rng = np.random.default_rng(REAL_SEED)
    rows = []
    for k in range(len(CLASSES)):
        members = [i for i in range(len(dataset)) if dataset.get_label(i)[k]]
        real, _ = dataset.get_batch(rng.choice(members, COLUMNS, replace=False))
        [batch] = generate_images(net, [range(COLUMNS)], sampler=SamplerConfig(), device=device,
                                  class_idx=k)
        rows.append([*real, *to_uint8(batch.images).cpu().numpy()])
    save_png(target, image_grid(rows, list(CLASSES.values()), split=COLUMNS))


def main() -> None:
    """Runs the demo."""
    start = time.time()
    leave_busy_cores_alone()
    data, run_dir = OUT / "emoji-faces-16.zip", OUT / "runs" / "pfgmpp-128"
    run(f"python dataset_tool.py --source=examples/emoji-google-32.zip --dest={data} "
        f"--resolution=16x16 --classes={','.join(map(str, CLASSES))}")
    run(f"python train.py --outdir={OUT}/runs --name=pfgmpp-128 --resume=auto --data={data} "
        "--cond=1 --arch=ncsnpp --pfgmpp=1 --aug_dim=128 --cbase=32 --cres=1,2 --nblock=2 "
        "--batch=64 --lr=1e-3 --lr-rampup=0.005 --dropout=0 --augment=0 --xflip=1 "
        f"--duration={KIMG / 1000:g} --tick=2 --snap=10 --dump=5 --seed=0")
    trained, untrained = (run_dir / f"network-snapshot-{int(kimg):06d}.pt" for kimg in (KIMG, 0))
    for network, folder in ((trained, "images"), (untrained, "images-untrained")):
        run(f"python generate.py --network={network} --outdir={OUT}/{folder} "
            f"--seeds=0-{NUM_IMAGES - 1} --batch=64 --steps=10")
    run(f"python fid.py ref --data={data} --dest={OUT}/ref-pixels.npz --detector=pixels")
    write_noise(ROOT / OUT / "noise")
    scores = {"samples of the trained network": score(OUT / "images"),
              "samples of the untrained network": score(OUT / "images-untrained"),
              "Gaussian noise": score(OUT / "noise")}
    write_grid(ROOT / data, ROOT / trained, ROOT / OUT / "grid.png")
    (ROOT / OUT / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")

    print(f"\nFrechet distance of raw pixels to the {NUM_IMAGES} real images (lower is better):")
    for name, value in scores.items():
        print(f"  {value:8.2f}  {name}")
    print(f"\nReal images (left) beside samples (right), one class a row: {OUT}/grid.png")
    print(f"Done in {time.time() - start:.0f} s.")


if __name__ == "__main__":
    main()
