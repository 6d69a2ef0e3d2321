"""Puts one-line mistakes into a copy of the code, one at a time, and says which the tests notice.

    python tests/mutate.py tests/data/mutants.json
    python tests/mutate.py tests/data/mutants.json --only=loss-draw-order --tests="tests/pfgmpp -x"

FILE.json is a list of {"id", "file", "old", "new", "note", "tests"}: `old`, which must stand in
`file` exactly once, becomes `new`. `tests` are arguments of pytest that should notice it; without
them the tests of the file's room run, those that need no other process. A mutant is killed by a
failing or unending test. The exit code is 1 where one survives.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KILLED, SURVIVED, INVALID = "killed", "SURVIVED", "INVALID"
_FAILED, _NO_TESTS = 1, 5  # exit codes of pytest


def copy_tree(target: Path) -> None:
    """Copies the files that git knows or would add, as they are in the working tree."""
    names = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                           cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def tests_for(mutant: dict) -> str:
    """Returns the arguments of pytest for a mutant."""
    if "tests" in mutant:
        return mutant["tests"]
    room = ROOT / "tests" / Path(mutant["file"]).parts[0]
    where = f"tests/{room.name}" if room.is_dir() else "tests"
    return f'{where} -m "not slow and not scripts and not gpu"'


def run_tests(tree: Path, tests: str, timeout: float) -> tuple[int | None, str]:
    """Returns pytest's exit code, None if it ran out of time, and the last lines it printed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
               *shlex.split(tests)]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=tree, env=environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, start_new_session=True) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, f"no end within {timeout:g} s"
    failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return process.returncode, (failed or output.strip().splitlines() or [""])[-1]


def try_mutant(tree: Path, mutant: dict, tests: str, timeout: float) -> tuple[str, str]:
    """Returns the verdict on one mutant, and what it rests on; the tree is as before then."""
    path = tree / mutant["file"]
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if text.count(mutant["old"]) != 1 or mutant["old"] == mutant["new"]:
        return INVALID, f"`old` stands {text.count(mutant['old'])} times in {mutant['file']}"
    path.write_text(text.replace(mutant["old"], mutant["new"]), encoding="utf-8")
    try:
        code, line = run_tests(tree, tests, timeout)
    finally:
        path.write_text(text, encoding="utf-8")
    if code in (None, _FAILED):
        return KILLED, line
    return (SURVIVED, line) if code == 0 else (INVALID, f"pytest exits {code}: {line}")


def main() -> None:
    """Tries the mutants of a file and prints the verdicts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", metavar="FILE.json")
    parser.add_argument("--only", metavar="ID,ID", help="only these mutants")
    parser.add_argument("--tests", metavar="ARGS", help="arguments of pytest, for all mutants")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="SEC",
                        help="for the tests of one mutant (default: 300)")
    args = parser.parse_args()
    mutants = json.loads(Path(args.file).read_text(encoding="utf-8"))
    if args.only:
        wanted = args.only.split(",")
        unknown = sorted(set(wanted) - {mutant["id"] for mutant in mutants})
        if unknown:
            sys.exit(f"Error: --only={unknown[0]}: {args.file} has no such mutant")
        mutants = [mutant for mutant in mutants if mutant["id"] in wanted]
    verdicts = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        for mutant in mutants:
            start = time.monotonic()
            verdict, line = try_mutant(tree, mutant, args.tests or tests_for(mutant), args.timeout)
            verdicts.append(verdict)
            print(f"{verdict:8s}  {mutant['id']:24s} {time.monotonic() - start:5.0f} s  {line}",
                  flush=True)
    counts = {verdict: verdicts.count(verdict) for verdict in (KILLED, SURVIVED, INVALID)}
    print(", ".join(f"{count} {verdict.lower()}" for verdict, count in counts.items()))
    sys.exit(0 if counts[KILLED] == len(verdicts) else 1)


if __name__ == "__main__":
    main()
