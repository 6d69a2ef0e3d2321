"""Stopping and killing: the run that goes on is the one that was never stopped."""

import json
import os
import random
import signal
import time

import pytest
from faults import Script, end_scripts, run_to_end, wait_until  # noqa: F401 - a fixture
from run_dirs import newest_state
from tiny import TINY_RUN

from checkpoints.checkpoint import digest, load
from dnnlib.run_lock import run_lock
from dnnlib.signals import LAUNCHER_SEC

STEPS = 700
LIMIT_SEC = 60  # within which torchrun ends when a process is gone
RUN = ["train.py", "--name=run", "--cond=1", "--pfgmpp=1", *TINY_RUN, "--tick=0.08", "--dump=1",
       "--snap=1000", "--device=cpu"]
LOADERS = ["--cache=0", "--workers=2"]


def command(data, outdir, *more, steps=STEPS):
    return [*RUN, f"--data={data}", f"--outdir={outdir}", f"--duration={steps * 8e-6}", *more]


def weights(run_dir, nimg=None):
    """Returns the digests of the newest state, which must be the last one."""
    path, problems = newest_state(run_dir)
    assert not problems
    content = load(path)
    assert nimg in (None, content["progress"]["cur_nimg"])
    return [digest(content[part]) for part in ("net", "ema", "optimizer")]


def rows(run_dir):
    """Returns the lines of stats.jsonl by thousands of images; later ones count."""
    lines = (run_dir / "stats.jsonl").read_text().splitlines()
    stats = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    return {row["Progress/kimg"]["mean"]: row["Loss/loss"] for row in stats}


@pytest.fixture(scope="module")
def undisturbed(dataset_zip, tmp_path_factory):
    """The run of one process, by its number of steps."""
    found = {}

    def get(steps):
        if steps not in found:
            folder = tmp_path_factory.mktemp("undisturbed")
            script = run_to_end(*command(dataset_zip, folder, *LOADERS, steps=steps),
                                folder=folder)
            assert script.wait() == 0, script.output
            found[steps] = folder / "run"
        return found[steps]
    return get


@pytest.fixture(scope="module")
def undisturbed_pair(dataset_zip, tmp_path_factory):
    """The run of two processes."""
    folder = tmp_path_factory.mktemp("pair")
    script = run_to_end(*command(dataset_zip, folder, *LOADERS), folder=folder, processes=2)
    assert script.wait() == 0, script.output
    return folder / "run"


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.scripts
@pytest.mark.parametrize("number, code", [
    slow(signal.SIGTERM, 143), slow(signal.SIGINT, 130), slow(signal.SIGUSR1, 143)])
def test_a_stopped_run_goes_on_as_if_nothing_had_been(number, code, undisturbed, dataset_zip,
                                                      tmp_path):
    args = command(dataset_zip, tmp_path, *LOADERS, steps=100)
    first = Script(*args, folder=tmp_path)
    first.wait_for("^tick 2 ")
    first.signal_group(number)  # the loader's processes get it too
    assert first.wait() == code
    assert "Traceback" not in first.output and not first.errors
    path, _ = newest_state(tmp_path / "run")
    nimg = load(path)["progress"]["cur_nimg"]
    assert nimg < 800 and nimg % 8 == 0
    assert f"Stopped at {nimg / 1e3:g} kimg, saved in {path}:" in first.output
    first.assert_left_nothing(tmp_path)
    second = run_to_end(*args, "--resume=auto", folder=tmp_path)
    assert second.wait() == 0, second.output
    assert weights(tmp_path / "run", 800) == weights(undisturbed(100), 800)
    mine, theirs = rows(tmp_path / "run"), rows(undisturbed(100))
    assert mine.keys() == theirs.keys()
    for kimg, loss in mine.items():  # the tick that was cut in two counts all its images
        assert loss == {"num": theirs[kimg]["num"], "mean": pytest.approx(theirs[kimg]["mean"]),
                        "std": pytest.approx(theirs[kimg]["std"])}


@pytest.mark.scripts
@pytest.mark.slow
def test_torchrun_passes_a_stop_on_and_all_ranks_agree(dataset_zip, tmp_path):
    script = Script(*command(dataset_zip, tmp_path, *LOADERS), folder=tmp_path, processes=2)
    script.wait_for("^tick 1 ")
    script.signal(signal.SIGTERM)
    assert script.wait() == 1  # torchrun's, whatever the ranks' are
    path, problems = newest_state(tmp_path / "run")
    assert f"saved in {path}: continue with --resume" in script.output and not problems
    script.assert_left_nothing(tmp_path)


@pytest.mark.slow
def test_one_rank_told_to_stop_stops_all(dataset_zip, tmp_path):
    script = Script(*command(dataset_zip, tmp_path, *LOADERS), folder=tmp_path, processes=2)
    script.wait_for("^tick 1 ")
    os.kill(script.ranks()[1], signal.SIGUSR1)
    script.wait()
    assert "continue with --resume" in script.output
    assert "exitcode  : 143" in script.output
    script.assert_left_nothing(tmp_path)


@pytest.mark.slow
def test_a_second_signal_ends_the_process_at_once(dataset_zip, tmp_path):
    # A step of a thousand micro-batches takes a minute.
    args = [arg for arg in command(dataset_zip, tmp_path) if not arg.startswith("--batch=")]
    script = Script(*args, "--batch=8000", "--batch-gpu=8", folder=tmp_path)
    script.wait_for("^Training ")
    time.sleep(2)
    script.signal(signal.SIGTERM)
    time.sleep(0.5)
    script.signal(signal.SIGTERM)  # the same stop by another way
    time.sleep(2)
    assert script.process.poll() is None
    script.signal(signal.SIGTERM)
    assert script.wait(5) == 143
    script.assert_left_nothing(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.7, 2.0, 3.0])
def test_a_stop_during_the_start_leaves_nothing(delay, dataset_zip, tmp_path):
    script = Script(*command(dataset_zip, tmp_path), folder=tmp_path)
    time.sleep(delay)
    script.signal(signal.SIGTERM)
    assert script.wait() in (143, -signal.SIGTERM)  # -15: before Python has read the script
    assert "Traceback" not in script.output
    script.assert_left_nothing(tmp_path)


@pytest.mark.slow
def test_a_stop_during_scoring_keeps_the_state_and_scores_when_resumed(dataset_zip, tmp_path):
    args = command(dataset_zip, tmp_path, "--eval=0.08", f"--eval-ref={dataset_zip}",
                   "--eval-detector=pixels", "--eval-num=3000", steps=20)
    script = Script(*args, folder=tmp_path, processes=2)
    script.wait_for("^tick 0 ")
    time.sleep(3)  # tick 1 is ten steps later, and its scoring takes a minute or more
    script.signal(signal.SIGTERM)
    script.wait(LIMIT_SEC)
    path, _ = newest_state(tmp_path / "run")
    assert load(path)["progress"]["unfinished"]["is_due"], script.output
    script.assert_left_nothing(tmp_path)
    args[args.index("--eval-num=3000")] = "--eval-num=10"
    again = run_to_end(*args, "--resume=auto", folder=tmp_path)
    assert again.wait() == 0, again.output
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    scored = [json.loads(line)["kimg"] for line in lines]
    assert 0.088 in scored and all(row["num"] for row in rows(tmp_path / "run").values())


@pytest.mark.slow
@pytest.mark.parametrize("loaders, kills", [(LOADERS, 20), (["--cache=1", "--workers=2"], 6)])
def test_twenty_random_kills_change_no_bit(loaders, kills, undisturbed_pair, dataset_zip,
                                           tmp_path):
    rng, run_dir = random.Random(len(loaders) + kills), tmp_path / "run"
    args = command(dataset_zip, tmp_path, *loaders, "--resume=auto", "--keep=3")
    for kill in range(kills):
        how = rng.choice(["stop", "stop group", "power", "rank 0", "rank 1"])
        script = Script(*args, folder=tmp_path, processes=2)
        if kill % 5 == 4:
            time.sleep(rng.uniform(0.5, 4))  # somewhere in the start
        else:
            script.wait_for("^tick ")
            time.sleep(rng.uniform(0, 0.4))
        if script.process.poll() is not None:
            break
        if how == "stop":
            script.signal(signal.SIGTERM)
        elif how == "stop group":  # by the scheduler and, again, by torchrun
            for pid in script.processes():
                os.kill(pid, signal.SIGTERM)
        elif how == "power" or not script.ranks():
            script.kill_all()
        else:
            os.kill(script.ranks().get(int(how[-1]), script.process.pid), signal.SIGKILL)
        script.wait(LIMIT_SEC)
        script.wait_for_all()
    assert kill > kills * 0.7, "the run ended before it was killed often enough"
    last = run_to_end(*args, folder=tmp_path, processes=2)
    assert last.wait() == 0, last.output
    last.assert_left_nothing(tmp_path)
    assert weights(run_dir, STEPS * 8) == weights(undisturbed_pair, STEPS * 8)
    assert len(list(run_dir.glob("training-state-*.pt"))) == 3
    assert rows(run_dir).keys() >= rows(undisturbed_pair).keys()


@pytest.mark.slow
def test_a_kill_during_a_save_costs_that_state_alone(undisturbed, dataset_zip, tmp_path):
    args = command(dataset_zip, tmp_path, "--resume=auto", steps=100)
    run_dir = tmp_path / "run"
    for _ in range(3):
        script = Script(*args, folder=tmp_path)
        while not list(run_dir.glob("training-state-*.tmp")) and script.process.poll() is None:
            time.sleep(0.0005)
        script.kill_all()
    assert list(run_dir.glob("*.tmp")), "no kill has hit a save"
    last = run_to_end(*args, folder=tmp_path)
    assert last.wait() == 0 and "left by a process that was killed" in last.output
    last.assert_left_nothing(tmp_path)
    assert weights(run_dir, 800) == weights(undisturbed(100), 800)


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_rank_was_killed(undisturbed_pair, dataset_zip, tmp_path):
    script = Script(*command(dataset_zip, tmp_path, *LOADERS, "--resume=auto"), folder=tmp_path,
                    processes=2, launch=("--standalone", "--max-restarts=2"))
    for tick, rank in (("3", 1), ("15", 0)):
        script.wait_for(f"^tick {tick} ")
        os.kill(script.ranks()[rank], signal.SIGKILL)
    assert script.wait() == 0, script.output
    assert script.output.count("Resuming from") == 2
    script.assert_left_nothing(tmp_path)
    assert weights(tmp_path / "run", STEPS * 8) == weights(undisturbed_pair, STEPS * 8)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_a_rank_that_dies_or_hangs_ends_the_run_within_a_minute(number, dataset_zip, tmp_path):
    script = Script(*command(dataset_zip, tmp_path, *LOADERS, steps=20_000), folder=tmp_path,
                    processes=2, PFGMPP_TIMEOUT="10")
    script.wait_for("^tick 2 ")
    before = time.monotonic()
    states = sorted((tmp_path / "run").glob("training-state-*.pt"))
    os.kill(script.ranks()[1], number)
    assert script.wait() == 1
    assert time.monotonic() - before < LIMIT_SEC
    assert len(script.errors) == 1 and "lost another process" in script.errors[0], script.output
    after = sorted((tmp_path / "run").glob("training-state-*.pt"))
    assert len(after) - len(states) <= 2 and newest_state(tmp_path / "run")[1] == []
    script.assert_left_nothing(tmp_path)


@pytest.mark.scripts
@pytest.mark.slow
def test_ranks_whose_torchrun_is_killed_save_and_end(dataset_zip, tmp_path):
    args = command(dataset_zip, tmp_path, *LOADERS, steps=100_000)
    script = Script(*args, folder=tmp_path, processes=2)
    script.wait_for("^tick 1 ")
    script.signal(signal.SIGKILL)
    script.wait()
    script.assert_left_nothing(tmp_path)
    path, problems = newest_state(tmp_path / "run")
    assert f"saved in {path}: continue with --resume" in script.output and not problems
    with run_lock(tmp_path / "run"):
        assert not script.errors


@pytest.mark.scripts
@pytest.mark.parametrize("nproc", [[], slow(["--nproc=2"])], ids=["python", "torchrun"])
@pytest.mark.slow
def test_a_study_that_is_stopped_stops_its_script(nproc, dataset_zip, tmp_path):
    pytest.importorskip("matplotlib")
    script = Script("sweep.py", "--aug_dims=2", f"--data={dataset_zip}", f"--outdir={tmp_path}",
                    "--name=study", "--detector=pixels", "--device=cpu", *nproc, "--", *TINY_RUN,
                    "--tick=0.08", "--duration=1", folder=tmp_path)
    script.wait_for("^tick 1 ")
    script.signal(signal.SIGTERM)
    assert script.wait() == 143
    path, problems = newest_state(tmp_path / "study-D2")
    assert f"saved in {path}: continue with --resume" in script.output and not problems
    script.assert_left_nothing(tmp_path)


@pytest.mark.slow
def test_a_rank_that_hangs_without_torchrun_ends_too(dataset_zip, tmp_path):
    # A step of a thousand micro-batches takes a minute.
    args = [arg for arg in command(dataset_zip, tmp_path) if not arg.startswith("--batch=")]
    script = Script(*args, "--batch=16000", "--batch-gpu=8", folder=tmp_path, processes=2)
    script.wait_for("^Training ")
    script.signal(signal.SIGKILL)
    wait_until(lambda: not script.processes(), LAUNCHER_SEC + 5)
    script.assert_left_nothing(tmp_path)


@pytest.mark.slow
def test_other_numbers_of_processes_and_batches_continue_the_run(dataset_zip, tmp_path):
    args = [arg for arg in command(dataset_zip, tmp_path, "--dropout=0", "--tick=0.008", steps=1)
            if not arg.startswith(("--duration", "--name"))]
    whole = run_to_end(*args, "--name=whole", "--duration=0.000128", folder=tmp_path)
    assert whole.wait() == 0, whole.output
    for i, (processes, micro) in enumerate(((1, 8), (2, 2), (4, 1), (0, 4)), start=1):
        part = run_to_end(*args, "--name=parts", f"--duration={i * 32e-6}", "--resume=auto",
                          f"--batch-gpu={micro}", folder=tmp_path, processes=processes)
        assert part.wait() == 0, part.output
    expected = {kimg: loss["mean"] for kimg, loss in rows(tmp_path / "whole").items()}
    found = {kimg: loss["mean"] for kimg, loss in rows(tmp_path / "parts").items()}
    # Another start of a part would change losses by tens of percent; rounding, which doubles with
    # each step of Adam, by up to 1e-3.
    assert len(expected) == 16 and found == pytest.approx(expected, rel=1e-2)


@pytest.mark.slow
def test_a_node_that_is_killed_and_started_again_goes_on(undisturbed_pair, dataset_zip, tmp_path):
    """Two agents of torchrun are two nodes; the rendezvous is on loopback."""
    import socket
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(node):
        launch = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}",
                  "--rdzv-id=test", "--max-restarts=3", "--local-addr=127.0.0.1",
                  f"--rdzv-conf=is_host={int(node == 0)}"]
        return Script(*command(dataset_zip, tmp_path, *LOADERS, "--resume=auto"),
                      folder=tmp_path, processes=1, launch=launch, GLOO_SOCKET_IFNAME="lo",
                      TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")  # see docs/cluster.md

    first, second = start(0), start(1)
    wait_until(lambda: "\ntick 3 " in first.output + second.output)
    second.kill_all()
    again = start(1)
    assert first.wait(240) == 0, first.output
    assert again.wait(60) == 0, again.output
    assert "Resuming from" in first.output + again.output
    assert weights(tmp_path / "run", STEPS * 8) == weights(undisturbed_pair, STEPS * 8)
