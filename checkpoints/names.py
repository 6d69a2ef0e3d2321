"""Names of networks: files in a run directory, short names of published ones; needs no PyTorch.

    network-snapshot-000200.pt    the averaged network after 200 thousand images
    training-state-000200.pt      all that a run needs to continue from there

The number may have three decimals. Files of EDM, PFGM++, ECT and IDMD may end in .pkl; the numbers
of ECT's files are ticks, and its last ones are called 'latest'.
"""

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path

from dnnlib.util import is_url

KIMG = r"\d{6,}(?:\.\d+)?"  # thousands of images in a file's name
_NUMBERED = re.compile(rf"(?P<kind>network-snapshot|training-state)-(?P<kimg>{KIMG})")
_NETWORK = re.compile(rf"{_NUMBERED.pattern}\.(?:pt|pkl)")
_OF_RUN = re.compile(
    rf"(?:network-snapshot|training-state)-(?P<number>{KIMG}|latest)\.(?:pt|pkl)")
_WEIGHTS = (".pt", ".pth", ".pkl", ".safetensors", ".ckpt")  # extensions of anyone's networks
_MAX_NAMED = 5  # files in a message
_EDM = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/"
# Published files by short names. No source states their hashes: see `dnnlib.util.open_url`.
PUBLISHED = {
    f"edm-{data}-{model}": f"{_EDM}edm-{data}-{size}-{model}.pkl"
    for data, size, models in (
        ("cifar10", "32x32", ("cond-vp", "cond-ve", "uncond-vp", "uncond-ve")),
        ("ffhq", "64x64", ("uncond-vp", "uncond-ve")),
        ("afhqv2", "64x64", ("uncond-vp", "uncond-ve")),
        ("imagenet", "64x64", ("cond-adm",)))
    for model in models}


def newest_network(run_dir: str | os.PathLike) -> tuple[Path, str] | None:
    """Returns a run's last snapshot, or its last state if newer, and the number in its name.

    Snapshots of EDM (.pkl) precede all states, because its states lack the averaged weights.
    """
    found = []
    for path in Path(run_dir).glob("*-*.p*"):
        if match := _NETWORK.fullmatch(path.name):
            is_snapshot = match["kind"].startswith("network")
            found.append((is_snapshot and path.suffix == ".pkl", float(match["kimg"]), is_snapshot,
                          path, match["kimg"]))
    return max(found)[3:] if found else None


def kimg_of_network(name: str) -> str | None:
    """Returns the number in a network's file name, which may go on after it; None for others."""
    match = _NUMBERED.match(name)
    return match and match["kimg"]


def found_note(given: str | os.PathLike, found: str) -> str:
    """Returns what to print about the file that `find_network` found, with where it is from."""
    is_published = found == PUBLISHED.get(str(given))
    return f"{found} ({given})" if is_published else f"{found}, the newest of {given}"


def find_network(source: str | os.PathLike) -> str:
    """Returns the file that `source` names; for a run directory, its newest network.

    A short name in `PUBLISHED` stands for its URL, unless a file or folder has that name.

    Raises:
        OSError: there is no such file; the message says which networks there are.
    """
    path = Path(source)
    if is_url(str(source)) or path.is_file():
        return str(source)
    if str(source) in PUBLISHED and not path.is_dir():
        return PUBLISHED[str(source)]
    if path.is_dir():
        found = newest_network(path)
        if found is None:
            raise FileNotFoundError(f"{source}: no network-snapshot-*.pt or training-state-*.pt in "
                                    "this folder; name a run directory or a file")
        return str(found[0])
    there = sorted(other.name for other in path.parent.glob("*-*.p*")
                   if _NETWORK.fullmatch(other.name)) if path.parent.is_dir() else []
    more = f", {len(there) - _MAX_NAMED} earlier ones" if len(there) > _MAX_NAMED else ""
    hint = (f"{path.parent} has {', '.join(there[:-_MAX_NAMED - 1:-1])}{more}" if there else
            "name a run directory, a network-snapshot-*.pt, a training-state-*.pt, a published "
            f"file or its URL, or one of {', '.join(PUBLISHED)}"
            if str(source).startswith("edm") else
            "name a run directory, a network-snapshot-*.pt, a training-state-*.pt, or a published "
            "file or its URL")
    raise FileNotFoundError(f"{source}: no such file; {hint}")


def find_networks(sources: Iterable[str]) -> list[str]:
    """Returns the files that `sources` name, in order and each once; patterns are expanded.

    A pattern contains *, ? or [, such as 'RUN/network-snapshot-*.pt'; in the names of existing
    files and folders, these characters have no special meaning. A pattern matches files that are
    named like those of runs, and run directories, for their newest network, in the order of the
    numbers in the names. If there are none, it matches other files by their extensions. Other
    sources are as in `find_network`.

    Raises:
        OSError: nothing is found; the message says what there is.
    """
    found: list[str] = []
    for source in sources:
        if is_url(source) or os.path.exists(source) or not glob.has_magic(source):
            found.append(find_network(source))
        else:
            found += sorted(_networks_of_pattern(source), key=_place)
    return list(dict.fromkeys(found))


def _networks_of_pattern(pattern: str) -> list[str]:
    """Returns the network files that a pattern matches; raises OSError if there are none."""
    literal = os.path.dirname(pattern)
    while literal and not os.path.exists(literal):
        literal = os.path.dirname(literal)
    matches = glob.glob(glob.escape(literal) + pattern[len(literal):], recursive=True)
    networks = [path for path in matches
                if _OF_RUN.fullmatch(os.path.basename(path)) and os.path.isfile(path)]
    networks += [os.path.join(path, newest[0].name) for path in matches
                 if os.path.isdir(path) and (newest := newest_network(path))]
    networks = networks or [path for path in matches
                            if path.lower().endswith(_WEIGHTS) and os.path.isfile(path)]
    if not networks:
        others = ", ".join(sorted(matches)[:_MAX_NAMED])
        what = f"none of the {len(matches)} matches of this pattern is a network or a run " \
               f"directory with one ({others}{', ...' * (len(matches) > _MAX_NAMED)})" \
            if matches else "no file matches this pattern"
        raise FileNotFoundError(f"{pattern}: {what}; name network files, such as "
                                "'RUN/network-snapshot-*.pt', or run directories")
    return networks


def _place(path: str) -> tuple[str, float, str]:
    """Returns the sort key that puts the files of a run in the order of their numbers."""
    folder, name = os.path.split(path)
    return folder, float(kimg_of_network(name) or 0), name


def neighbouring_snapshot(state: str | os.PathLike) -> Path | None:
    """Returns EDM's or ECT's snapshot of the same number beside a state, if there is one."""
    match = _OF_RUN.fullmatch(Path(state).name)
    if match is None:
        return None
    snapshot = Path(state).with_name(f"network-snapshot-{match['number']}.pkl")
    return snapshot if snapshot.is_file() and snapshot != Path(state) else None
