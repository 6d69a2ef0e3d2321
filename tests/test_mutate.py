"""tests/mutate.py: its verdicts, and that the project's own list of mistakes fits the code."""

import json
import re

import pytest
from scripts import ROOT, load_script

mutate = load_script("tests/mutate.py")
MUTANTS = json.loads((ROOT / "tests/data/mutants.json").read_text(encoding="utf-8"))
CODE = "def double(x):\n    return 2 * x\n\n\ndef loop(x):\n    while x < 0:\n        x += 1\n"
TESTS = ("from code_under_test import double, loop\n\n\n"
         "def test_double():\n    assert double(2) == 4\n    loop(-3)\n")


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "code_under_test.py").write_text(CODE)
    (tmp_path / "test_code.py").write_text(TESTS)
    return tmp_path


@pytest.mark.scripts
@pytest.mark.parametrize("old, new, verdict", [
    ("2 * x", "3 * x", "killed"),
    ("2 * x", "x + x", "SURVIVED"),
    pytest.param("2 * x", "x + 2", "SURVIVED", marks=pytest.mark.slow),  # no test of a law
    pytest.param("x += 1", "x += 0", "killed", marks=pytest.mark.slow),  # without an end
    ("return 2", "return 2 2", "INVALID"),  # is noticed by no test
    ("not there", "whatever", "INVALID"), ("x", "y", "INVALID"), ("2 * x", "2 * x", "INVALID")])
def test_a_mutant_is_killed_by_a_failing_or_endless_test_and_nothing_stays(tree, old, new, verdict):
    mutant = {"id": "m", "file": "code_under_test.py", "old": old, "new": new}
    limit = 5 if new == "x += 0" else 60
    found, line = mutate.try_mutant(tree, mutant, "test_code.py", limit)
    assert found == verdict, line
    assert (tree / "code_under_test.py").read_text() == CODE


@pytest.mark.scripts
def test_a_run_without_tests_is_no_verdict(tree):
    mutant = {"id": "m", "file": "code_under_test.py", "old": "2 * x", "new": "3 * x"}
    assert mutate.try_mutant(tree, mutant, "test_code.py -k nothing", 60)[0] == "INVALID"


def test_the_list_of_mutants_fits_the_code():
    assert len({mutant["id"] for mutant in MUTANTS}) == len(MUTANTS) > 80
    for mutant in MUTANTS:
        text = (ROOT / mutant["file"]).read_text(encoding="utf-8")
        assert text.count(mutant["old"]) == 1, f"{mutant['id']}: {mutant['file']}"
        for word in re.split(" -[mk] ", mutant["tests"])[0].split():
            assert (ROOT / word).exists(), f"{mutant['id']}: {word}"
