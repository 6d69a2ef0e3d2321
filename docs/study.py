"""The study of docs/results.md in one command, from the data to the records that the pages show.

It runs the project's scripts as a user would type them. Each script skips what is already done, so
the same command continues after a failure or a stop. -n makes the data set only. It shows the
commands, and what the studies among them will take.
"""

import dataclasses
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dnnlib.atomic import atomic_write  # noqa: E402 - the path above
from dnnlib.cli import HELP_NAMES, IntList, UserError, run, user_errors  # noqa: E402
from metrics.score_names import SCORES_FILE  # noqa: E402
from reports.run_record import SAMPLER_DEFAULTS  # noqa: E402
from training.config import OPTIONS_FILE  # noqa: E402

SOURCE, JUDGE = "examples/digits8.zip", "examples/digits8-judge.npz"
DATA, HELD_OUT = "datasets/digits8-train.zip", "datasets/digits8-val.zip"
NUM_HELD_OUT = 359
NOISE = (0.1, 0.2, 0.4)  # alpha
SAMPLES = "samples.npz"
FEW_STEP_DIMS = ("8", "16", "64", "inf")
NETWORK = "--preset=digits8 --dump=100 --samples=16"
# Entries of a score that the repository keeps; it keeps no hashes of weights and no dates.
_KEPT = ("metric", "value", "kimg", "num", "seeds", "detector", "reference", "of_class", "stderr",
         "range", "held_out", "nearest_num")
_NOT_KEPT = ("weights", "network", "device", "scale", "class_counts", "nfe", "levels")
_DIGITS = 6


@dataclasses.dataclass(frozen=True)
class Size:
    """The size of the study: training lengths in Mimg, samples per score, and the sweeps."""

    train: float = 0.12
    small: float = 0.06
    few_step: float = 0.04
    num: int = 1024
    ranges: int = 3
    dims: str = "4,8,16,64,256,inf"
    low_dims: str = "1,2"
    bits: str = "4,5,6,8"
    likelihood: int = NUM_HELD_OUT
    early: str = "0000[24]0"  # pattern of the numbers in the names of earlier networks


FULL = Size()
TINY = Size(0.002, 0.002, 0.002, 16, 1, "8,inf", "2", "4", 2, "000000")  # to try the commands


class Command(NamedTuple):
    """A line of words after `python`, and a file that shows that it is done, if it can't itself."""

    line: str
    done: str = ""


def commands(outdir: str, seeds: Sequence[int], size: Size) -> Iterator[Command]:
    """Yields the commands of the study for some training seeds."""
    scores = (f"--data={DATA} --outdir={outdir} --train-seeds={','.join(map(str, seeds))} "
              f"--detector={JUDGE} "
              f"--metrics=fid,kid,ca --seeds=0-{size.num - 1} --device=cpu")
    kept = f"--val-data={HELD_OUT} --likelihood={size.likelihood}"
    noise = f"--alpha={','.join(f'{alpha:g}' for alpha in NOISE)}"
    usual = f"-- {NETWORK} --duration={size.train:g} --val-data={HELD_OUT}"
    small = f"-- {NETWORK} --cbase=8 --nblock=1 --duration={size.small:g} --val-data={HELD_OUT}"
    yield Command(f"dataset_tool.py split {SOURCE} --val=0.2 --dest={DATA} --val-dest={HELD_OUT}",
                  HELD_OUT)
    of_real = f"{outdir}/held-out/{SCORES_FILE}"
    yield Command(
        f"fid.py calc --images={HELD_OUT} --ref={DATA} --metrics=fid,kid,ca --detector={JUDGE} "
        f"--count={NUM_HELD_OUT} --out={of_real} --device=cpu", of_real)
    yield Command(
        f"sweep.py {scores} --name=digits --aug_dims={size.dims} --ranges={size.ranges} {noise} "
        f"--steps=3,4,5,7 --bits={size.bits} --rounding-seeds=0,1,2 {kept} "
        f"--report={outdir}/digits.html {usual}")
    yield Command(
        f"sweep.py {scores} --name=digits --aug_dims={size.low_dims} --ranges={size.ranges} "
        f"{noise} {kept} --report={outdir}/digits-low.html {usual}")
    yield Command(
        f"sweep.py {scores} --name=digits --aug_dims={size.dims} --solver=ipndm --base-steps=9 "
        f"--steps=5,7,13,35 --images=0 --report={outdir}/digits-ipndm.html {usual}")
    yield Command(
        f"sweep.py {scores} --name=digits-small --aug_dims={size.dims} --images=0 "
        f"--report={outdir}/digits-small.html {small}")
    yield from _early_and_few_steps(outdir, seeds, size)


def _early_and_few_steps(outdir: str, seeds: Sequence[int], size: Size) -> Iterator[Command]:
    runs = [f"{outdir}/digits-D{D}-seed{seed}" for seed in seeds for D in size.dims.split(",")]
    of_snapshots = " ".join(f"'--network={each}/network-snapshot-{size.early}.pt'"
                            for each in runs)
    yield Command(
        f"fid.py gen {of_snapshots} --ref={DATA} --metrics=fid,kid,ca --detector={JUDGE} "
        f"--seeds=0-{size.num - 1} --device=cpu")
    for seed in seeds:
        for D in [D for D in FEW_STEP_DIMS if D in size.dims.split(",")]:
            yield Command(
                f"distill.py --method=ect --teacher={outdir}/digits-D{D}-seed{seed} "
                f"--data={DATA} --outdir={outdir} --name=digits-ect-D{D}-seed{seed} "
                f"--duration={size.few_step:g} --batch=128 --lr=1e-3 --ema=0.004 --dropout=0 "
                f"--ect-double={size.few_step / 5:g} --lr-decay=cosine --seed={seed} --tick=10 "
                "--snap=100 --dump=100 --samples=16 --device=cpu --resume=auto")
    few_step = ",".join(f"{outdir}/digits-ect-D{D}-seed{seed}" for seed in seeds
                        for D in FEW_STEP_DIMS if D in size.dims.split(","))
    yield Command(
        f"sweep.py --runs={few_step} --ref={DATA} --metrics=fid,kid,ca --detector={JUDGE} "
        f"--seeds=0-{size.num - 1} --steps=1 --device=cpu --report={outdir}/digits-ect.html")
    for each in runs:
        images, found = f"{each}/nearest", f"{each}/nearest-found"
        yield Command(
            f"generate.py --network={each} --outdir={images} --seeds=0-{NUM_HELD_OUT - 1} "
            "--solver=ipndm --steps=9 --device=cpu", f"{found}/nearest.csv")
        yield Command(
            f"fid.py nearest --images={images} --data={DATA} --held-out={HELD_OUT} "
            f"--detector=pixels --device=cpu --out={found}", f"{found}/nearest.csv")
    yield Command(f"docs/off_level.py {' '.join(runs)} --data={HELD_OUT} --level=0.5")


def keep_samples(outdir: Path, dest: Path, dims: str, seed: int) -> None:
    """Writes digits of the networks of one training seed, uint8 [20, 1, 8, 8] for each D.

    Seed k shows the digit k: first without noise in the steps, then with the strongest noise.
    """
    import numpy as np
    import torch

    from checkpoints import checkpoint
    from checkpoints.names import find_network
    from pfgmpp.samplers import SamplerConfig, generate_images, to_uint8
    found = {}
    for D in dims.split(","):
        net = checkpoint.build_ema(checkpoint.load(find_network(
            outdir / f"digits-D{D}-seed{seed}")))
        found[f"D{D}"] = np.concatenate([
            to_uint8(batch.images).numpy() for alpha in (0.0, NOISE[-1]) for k in range(10)
            for batch in generate_images(net, [[k]], sampler=SamplerConfig(noise_alpha=alpha),
                                         device=torch.device("cpu"), class_idx=k)])
    dest.mkdir(parents=True, exist_ok=True)
    with atomic_write(dest / SAMPLES) as file:
        np.savez_compressed(file, **found)


def keep_records(outdir: Path, dest: Path) -> int:
    """Writes what the pages need of each run to a folder of its name; returns their number."""
    runs = sorted(path.parent for path in outdir.glob(f"*/{SCORES_FILE}"))
    for run_dir in runs:
        files = [run_dir / SCORES_FILE, run_dir / "nearest-found" / SCORES_FILE]
        lines = [json.loads(line) for file in files if file.exists()
                 for line in file.read_text().splitlines()]
        kept = dict.fromkeys(json.dumps(_slim(line)) for line in lines
                             if not line["metric"].endswith("_std"))
        folder = dest / run_dir.name
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / SCORES_FILE) as file:
            file.write("".join(f"{line}\n" for line in kept).encode())
        options = run_dir / OPTIONS_FILE
        if options.exists():
            record = json.loads(options.read_text())
            record = {key: record[key] for key in ("options", "dataset", "network")
                      if key in record}
            with atomic_write(folder / OPTIONS_FILE) as file:
                file.write((json.dumps(record) + "\n").encode())
    return len(runs)


def _slim(line: dict) -> dict:
    """Returns the record of a score without entries that the tables do not need."""
    value = line["value"]
    found = {key: line[key] for key in _KEPT if line.get(key) is not None}
    found["value"] = float(f"{value:.{_DIGITS}g}")
    if line.get("network"):
        found["network"] = Path(line["network"]).name
    settings = {key: setting for key, setting in (line.get("sampler") or {}).items()
                if setting is not None and key not in _NOT_KEPT
                and (key, setting) not in SAMPLER_DEFAULTS}
    return found | ({"sampler": settings} if settings else {})


@click.command(context_settings=HELP_NAMES)
@click.option("--outdir", metavar="DIR", default="runs", show_default=True, help="Where the run directories are made.")
@click.option("--train-seeds", metavar="LIST", type=IntList(unique=False), default="0,1,2", show_default=True, help="Training seeds of every network.")
@click.option("--records", metavar="DIR", type=click.Path(path_type=Path), default="docs/results", show_default=True, help="Where the records for docs/results.py are kept.")
@click.option("--tiny", is_flag=True, help="Use far too little of everything, to try the commands.")
@click.option("-n", "--dry-run", is_flag=True, help="Make the data set only; print the commands and what studies will take, and stop.")
def main(outdir: str, train_seeds: tuple[int, ...], records: Path, tiny: bool, dry_run: bool) -> None:
    """Runs the study of docs/results.md; if it was stopped, the same command continues it."""
    with user_errors():
        if len(set(train_seeds)) < len(train_seeds):
            raise UserError(f"--train-seeds={','.join(map(str, train_seeds))}: names a seed twice; "
                            "name each one once")
        for command in commands(outdir, train_seeds, TINY if tiny else FULL):
            print(f"\n$ python {command.line}", flush=True)
            words = shlex.split(command.line)
            if command.done and Path(command.done).exists():
                print("already done")
                continue
            if dry_run and words[0] == "sweep.py" and "--data" in command.line:
                words.insert(1, "-n")
            elif dry_run and command.done != HELD_OUT:
                continue
            script = str(ROOT / words[0])
            code = subprocess.run([sys.executable, script, *words[1:]], check=False).returncode
            if code:
                raise UserError(f"the command above failed with exit code {code}; run this command "
                                "again to continue", max(code, 1))
        if not dry_run:
            size = TINY if tiny else FULL
            keep_samples(Path(outdir), records, f"{size.low_dims},{size.dims}", train_seeds[0])
            count = keep_records(Path(outdir), records)
            print(f"\n{records}: records of {count} runs; python docs/results.py draws them")


if __name__ == "__main__":
    run(main)
