"""Writes docs/*-help.txt: the output of the scripts for --help, 100 columns wide."""

import importlib
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

WIDTH = 100
SCRIPTS = ("train", "distill", "generate", "fid", "likelihood", "dataset_tool", "checkpoint_tool",
           "sweep", "report", "runs")


def help_texts() -> dict[str, str]:
    """Returns the text of each file under docs/ by its name."""
    return {f"{script.replace('_', '-')}-help.txt": "\n\n".join(_helps(script)) + "\n"
            for script in SCRIPTS}


def _helps(script: str) -> list[str]:
    """Returns the help of a script and of its subcommands."""
    command = importlib.import_module(script).main
    context = command.make_context(f"{script}.py", [], resilient_parsing=True,
                                   terminal_width=WIDTH)
    parts = [command.get_help(context)]
    for name, child in getattr(command, "commands", {}).items():
        own = child.make_context(name, [], parent=context, resilient_parsing=True)
        parts.append(child.get_help(own))
    return ["\n".join(line.rstrip() for line in part.splitlines()) for part in parts]


def main() -> None:
    """Writes the files."""
    for name, text in help_texts().items():
        (DOCS / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
