"""Run directories as train.py, fid.py and generate.py leave them."""

import json
import math
from pathlib import Path

import numpy as np
import PIL.Image


def sampler(D, **settings):
    """Settings as fid.py gen records them."""
    return {"weights": "ab", "class": None, "precision": "fp32", "device": "cpu",
            "D": "inf" if math.isinf(D) else D, "num_steps": 18, "sigma_min": None,
            "sigma_max": None, "rho": 7.0, "S_churn": 0.0, "S_min": 0.0, "S_max": "inf",
            "S_noise": 1.0, "solver": None, "discretization": None, "schedule": None,
            "scaling": None, **settings}


def score_line(D, value, seeds="0-9", kimg=200, num=10, metric="fid", **settings):
    return {"metric": metric, "value": value, "num": num, "seeds": seeds,
            "network": f"runs/a/network-snapshot-{kimg:06d}.pt", "detector": "inception",
            "reference": "ref.npz", "reference_sha256": "cd", "sampler": sampler(D, **settings)}


def tick(kimg, loss=1.0, bad=0, **extra):
    values = {"Loss/loss": loss, "Progress/kimg": kimg, "Progress/lr": 1e-3,
              "Progress/bad_steps": bad, "Timing/sec_per_kimg": 2.0,
              "Resources/cpu_mem_gb": 0.5, "Resources/peak_gpu_mem_gb": 0.0, **extra}
    return {key: {"num": 1, "mean": value, "std": 0} for key, value in values.items()}


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_picture(path, shade=90):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.full([16, 16, 3], shade, np.uint8)).save(path)


def write_run(folder, D=128, scores=(), seeds=range(4), **options):
    """Writes what train.py, fid.py and generate.py leave in a run directory."""
    folder.mkdir(parents=True)
    (folder / "training_options.json").write_text(json.dumps({
        "options": {"data": "datasets/tiny.zip", "arch": "ncsnpp", "batch": 32, "lr": 1e-3,
                    "pfgmpp": not math.isinf(D), "aug_dim": 128 if math.isinf(D) else D,
                    "precision": "bf16", **options},
        "dataset": {"size": 40, "image_shape": [3, 16, 16]}, "network": {},
        "provenance": {"torch": "2.13.0", "commit": "abc"}}))
    write_lines(folder / "stats.jsonl", [tick(kimg, 2 / kimg, kimg // 2) for kimg in (1, 2, 3)])
    if scores:
        write_lines(folder / "metrics.jsonl", scores)
    write_picture(folder / "reals.png")
    for kimg in range(0, 20, 2):
        write_picture(folder / f"samples-{kimg:06d}.png")
    for seed in seeds:
        write_picture(folder / f"ckpt_000200/000000/{seed:06d}.png", seed)
    if seeds:
        (folder / "ckpt_000200/generate.json").write_text(json.dumps(sampler(D, subdirs=True)))
    return folder


def sweep_lines(D, base):
    """Three seed ranges at the default point, one at four others."""
    return [*(score_line(D, base + i, seeds) for i, seeds in enumerate(("0-9", "10-19", "20-29"))),
            score_line(D, base + 5, noise_alpha=0.1), score_line(D, base + 9, noise_alpha=0.2),
            score_line(D, base + 4, num_steps=10), score_line(D, base + 3, bits=5)]


def newest_state(run_dir):
    """Returns the path of the state that --resume=auto would take, or None, and what was wrong."""
    from training.resume import read_state
    state, problems = read_state("auto", Path(run_dir))
    return Path(state.source) if state else None, problems
