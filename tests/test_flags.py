"""Flags as users and torchrun see them."""

import contextlib
import importlib
import io

import click
import pytest
from scripts import load_script
from torch.distributed.run import get_args_parser

SCRIPTS = ["train", "distill", "generate", "generate_alpha", "generate_steps", "generate_quant",
           "fid", "likelihood", "dataset_tool", "checkpoint_tool", "report",
           "runs"]  # sweep.py starts torchrun itself
# Names that torchrun takes for its own.
EARLIER = {"train": {"--log"}, "distill": {"--log"}, "fid": {"--num"}}


def commands(command, words=()):
    yield words, command
    for name, other in getattr(command, "commands", {}).items():
        yield from commands(other, (*words, name))


def goes_through_torchrun(words):
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            found = get_args_parser().parse_args(["--standalone", "--nproc_per_node=2", *words])
        except SystemExit:
            return False
    return [found.training_script, *found.training_script_args] == list(words)


@pytest.mark.parametrize("script", SCRIPTS)
def test_torchrun_hands_every_flag_to_the_script(script):
    lost = set()
    for words, command in commands(importlib.import_module(script).main):
        flags = {"-h", "--help"} | {opt for param in command.params if isinstance(
            param, click.Option) for opt in (*param.opts, *param.secondary_opts)}
        lost |= {flag for flag in flags for form in ([f"{flag}=1"], [flag, "1"], [flag])
                 if not goes_through_torchrun([f"{script}.py", *words, *form])}
    assert lost == EARLIER.get(script, set())


@pytest.mark.parametrize("script, earlier, name", [("train", "--log", "--log-to"),
                                                   ("distill", "--log", "--log-to"),
                                                   ("fid", "--num", "--count")])
def test_what_torchrun_takes_has_another_name(script, earlier, name):
    main = importlib.import_module(script).main
    [param] = [param for _, command in commands(main) for param in command.params
               if earlier in param.opts]
    assert name in param.opts


@pytest.mark.parametrize("script", [*SCRIPTS, "sweep"])
def test_h_is_help(script, invoke):
    main = importlib.import_module(script).main
    for words, _ in commands(main):
        short, long = (invoke(main, *words, flag) for flag in ("-h", "--help"))
        assert short.exit_code == 0 and short.stdout == long.stdout and "Usage:" in long.stdout


@pytest.mark.parametrize("path", ["docs/off_level.py", "docs/phantoms.py", "docs/phases.py",
                                  "docs/results.py", "docs/study.py", "docs/toy.py"])
def test_h_is_help_of_the_scripts_of_the_pages(path, invoke):
    main = load_script(path).main
    short, long = (invoke(main, flag) for flag in ("-h", "--help"))
    assert short.exit_code == 0 and short.stdout == long.stdout and "Usage:" in long.stdout
