"""Reads weights without their network's configuration, as the content of our own snapshots.

    {name: tensor}                              a state_dict by torch.save, or safetensors
    {'model': ..., 'ema': ..., ...}             several of them by name, nested or not
    {'state_dict': ..., 'hyper_parameters': ...}  a checkpoint of Lightning
    {..., 'shadow_params': [tensor, ...]}       an average of the parameters in their order

The configuration comes from the training_options.json of a run of this project, EDM, PFGM++ or ECT.
That network is built without memory, and the weights in the file are found by its names: whatever
stands before them (`net.`, `model.`) is a prefix, and the parts that wrappers insert (`module`,
`_orig_mod`) are removed. The `model.` of our preconditioners may be missing. Then every tensor must
fit. Files are read by `torch_utils.safe_pickle`, which runs nothing in them, and only the tensors
that are used are read into memory.

If there are several sets of weights, the set whose name says that it is averaged is used. An
average of parameters takes its buffers from the plain weights beside it.
"""

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from checkpoints import published
from dnnlib.cli import flag_errors
from dnnlib.util import require, shown
from images.image_files import error_prefix
from pfgmpp.networks import MODELS, PRECONDS, Precond, build_network
from torch_utils import safe_pickle
from torch_utils.safe_pickle import Opaque, StoredTensor

FORMAT = "bare-weights"
CONVERT = ("make a snapshot of it: checkpoint_tool.py convert FILE DEST.pt "
           "--config=training_options.json")

_MODEL = "model."  # of the model in a preconditioner
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_COUNTERS = {"n_averaged", "num_updates", "decay", "step", "initted"}  # that averages keep
_AVERAGED = re.compile(r"(?:^|[^a-z])(?:ema|avg|swa|polyak)(?:[^a-z]|$)|averag|shadow", re.I)
_ONLINE = re.compile(r"online", re.I)  # the plain weights that ema-pytorch keeps with the average
_OPTIMIZER = re.compile(r"optim", re.I)  # whose moments have the shapes of weights
_DETERMINED = {"u", "resample_filter"}  # buffers that follow from the configuration
_SIDE = re.compile(r"(?:^|\.)(enc\.(\d{1,5})x(\d{1,5})_conv\.weight)$")
_MAX_DEPTH = 6  # of dictionaries in dictionaries
_MAX_NAMED = 5  # in a message
_STRANGERS = {  # by names that no other network has
    ("time_embed.0.weight", "input_blocks.0.0.weight"): "a guided-diffusion UNet",
    ("time_embedding.linear_1.weight", "conv_in.weight"): "a UNet of diffusers",
    ("all_modules.0.weight",): "a network of score_sde",
    ("unet.emb_fourier.freqs",): "a network of EDM2",
    ("x_embedder.proj.weight", "t_embedder.mlp.0.weight"): "a diffusion transformer (DiT)",
    ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight"): "a vision transformer of timm",
}

_Tensor = torch.Tensor | StoredTensor
_Groups = dict[tuple[str, ...], dict[str, Any] | list]  # tensors below keys, by name or in order


class RunOptions(NamedTuple):
    """A training_options.json: its name in errors, and its content."""

    name: str
    values: dict[str, Any]


class _Weights(NamedTuple):
    """A set of weights in the file that may be the network's."""

    name: str  # where they are: keys and prefix, with dots
    tensors: dict[str, Any]  # under the network's names
    extra: list[str]  # names among them that the network does not have
    is_averaged: bool


def load(file: IO[bytes], head: bytes) -> Any:
    """Returns the content of a file with weights that begins with `head`.

    Raises:
        OSError: it can't be read.
        ValueError: it is not a torch.save, pickle or safetensors file, or is damaged or harmful.
    """
    if head[8:9] != b"{":
        return safe_pickle.load_loosely(file)
    library = safetensors()
    from safetensors import SafetensorError
    file.seek(0)
    try:
        return library.load(file.read())
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(f"damaged ({' '.join(str(error).split())})") from None


def safetensors():
    """Returns the module safetensors.torch; raises ValueError if the package is missing."""
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError("safetensors files need an extra package: pip install safetensors"
                         ) from None
    return safetensors.torch


def description(content: Any) -> str | None:
    """Returns what kind of file `load` has read, and what to do; None if it holds no weights."""
    groups = _groups(content)
    if not groups:
        values = content.values() if isinstance(content, dict) else [content]
        module = next((one for one in values if type(one) is Opaque and one.is_module), None)
        return module and (f"holds a pickled module of the class {shown(module.class_name)}, whose "
                           "code is not in the file; save its state_dict() with torch.save")
    if stranger := _stranger(groups):
        return stranger
    if list(groups) == [()]:
        what = f"a plain state_dict of {len(groups[()])} tensors"
    else:
        most = max(map(len, groups.values()))
        large = [f"{shown('.'.join(path))} of {len(group)} tensors"
                 for path, group in groups.items() if 2 * len(group) >= most]
        is_lightning = "pytorch-lightning_version" in content
        what = (f"{'a Lightning checkpoint: ' if is_lightning else ''}state_dicts by name "
                f"({', '.join(large[:_MAX_NAMED])})")
    return f"{what}, without the network's configuration; {CONVERT}"


def read_options(path: str | Path) -> RunOptions:
    """Returns the content of the training_options.json that --config names.

    Raises:
        OSError: it can't be read.
        ValueError: it is not a JSON object.
    """
    name = f"--config={path}"
    with flag_errors("--config", path):
        text = Path(path).read_bytes()
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not a JSON file ({error})") from None
    require(isinstance(values, dict), f"{name}: not a JSON object, as training_options.json is")
    return RunOptions(name, values)


def read(content: Any, name: str, options: RunOptions, key: str | None = None) -> dict[str, Any]:
    """Returns weights in the form of our own content, see checkpoints/checkpoint.py.

    Args:
        content: what `load` returned.
        name: the file's name in errors.
        options: of the run that the weights are from.
        key: the name of the weights to use, or one of its parts; None to use the averaged ones, or
            the only ones.

    Returns:
        What `published.read` does, with the weights as `ema`, and in addition `is_averaged` (True,
        or None if nothing says so) and `notes` (texts that say which weights these are). For a run
        of this project it also has its `dataset`.

    Raises:
        ValueError: the weights don't fit the network, there are several sets to choose from, or the
            options don't say enough.
    """
    with error_prefix(f"{name}: "):
        groups = _groups(content)
        if not groups or _stranger(groups):
            raise ValueError(description(content) or "holds no weights under a network's names")
    described = _ours if isinstance(options.values.get("network"), dict) else _theirs
    net, told = described(options, _facts(groups))
    swapped = published.swapped_weights(net) if described is _theirs else ()
    with error_prefix(f"{name}: "):
        found = _weights(groups, net)
        chosen = _chosen(found, key)
        tensors = _with_buffers(chosen, found, net)
        _check_fit(chosen, tensors, net, [one.name for one in found if one is not chosen])
        weights = {one: published.in_our_order(_read(tensors[one]).float(), one in swapped)
                   for one in net.state_dict()}
    return {"format": FORMAT, "network": net.config, "ema": weights,
            "progress": {"cur_nimg": None}, **told,
            "is_averaged": chosen.is_averaged or None,
            "notes": [_choice_in_words(chosen, found), *_left_out(groups, found)]}


# ------------------------------------------------------------------------------- what a file holds


def _groups(content: Any) -> _Groups:
    """Returns the tensors of each dictionary whose names look like those of modules."""
    groups: _Groups = {}
    waiting, seen = [((), content)], set()
    for path, value in waiting:  # it grows during the loop
        if id(value) in seen or len(path) > _MAX_DEPTH:
            continue
        seen.add(id(value))
        if isinstance(value, list):
            if value and path and _AVERAGED.search(path[-1]) and all(map(_is_tensor, value)):
                groups[path] = value
        elif isinstance(value, dict):
            named = {name: one for name, one in value.items()
                     if type(name) is str and (_is_tensor(one) or type(one) is Opaque)}
            if any("." in name and _is_tensor(one) for name, one in named.items()):
                groups[path] = _dotted(_unwrapped(named))
            waiting += [((*path, name), one) for name, one in value.items()
                        if type(name) is str and isinstance(one, dict | list)
                        and not _OPTIMIZER.search(name)]
    if {("state_dict",), ("current_model_state",)} <= groups.keys() \
            and "averaging_state" in content:  # of Lightning's WeightAveraging
        groups[("state_dict", "averaged")] = groups.pop(("state_dict",))
    return groups


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor | StoredTensor)


def _read(tensor: _Tensor) -> torch.Tensor:
    return tensor.read() if isinstance(tensor, StoredTensor) else tensor


def _unwrapped(named: dict[str, Any]) -> dict[str, Any]:
    """Returns tensors under names without the parts of wrappers, if the names stay different."""
    names = {name: ".".join(part for part in name.split(".") if part not in _WRAPPERS)
             for name in named}
    if len(set(names.values())) < len(names):
        return named
    return {names[name]: one for name, one in named.items()}


def _dotted(named: dict[str, Any]) -> dict[str, Any]:
    """Returns tensors with the dots in their names that CompVis's LitEma removes.

    LitEma keeps `decay` and `num_updates` beside the average, and is stored beside the model.
    """
    roots = tuple(name.removesuffix("num_updates") for name in named
                  if f".{name}".endswith(".num_updates")
                  and name.removesuffix("num_updates") + "decay" in named)
    if not roots:
        return named
    dotted = {}
    for name in named:
        parts = () if name.startswith(roots) else name.split(".")
        for i in range(len(parts)):
            dotted.setdefault("".join(parts[i:]), ".".join(parts[i:]))

    def renamed(name: str) -> str:
        root = next((root for root in roots if name.startswith(root)), None)
        tail = name.removeprefix(root or "")
        return name if root is None else root + dotted.get(tail, tail)

    renames = {name: renamed(name) for name in named}
    if len(set(renames.values())) < len(renames):
        return named
    return {renames[name]: one for name, one in named.items()}


def _by_name(groups: _Groups) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
    """Returns (path, tensors) of the groups that are not lists."""
    return [(path, group) for path, group in groups.items() if isinstance(group, dict)]


def _stranger(groups: _Groups) -> str | None:
    """Says whose weights these are, if they are of a known network that is not supported."""
    for _, group in _by_name(groups):
        for names, whose in _STRANGERS.items():
            if all(any(f".{name}".endswith(f".{known}") for name in group) for known in names):
                return (f"weights of {whose}, which is not among the supported networks "
                        f"({', '.join(MODELS)})")
    return None


# ------------------------------------------------------------------------ which network they are of


class _Facts(NamedTuple):
    """What the names and shapes of tensors tell about a network."""

    size: tuple[int, int]  # height and width of its images
    out_channels: int
    label_dim: int


def _facts(groups: _Groups) -> _Facts | None:
    """Returns what all networks in a file have in common; None if that is not certain."""
    found = set()
    for _, group in _by_name(groups):
        for name in group:
            if match := _SIDE.search(name):
                prefix = name.removesuffix(match[1])
                size = f"{match[2]}x{match[3]}"
                last = (_shape(group, f"{prefix}out_conv.weight")
                        or _shape(group, f"{prefix}dec.{size}_aux_conv.weight"))
                label = _shape(group, f"{prefix}map_label.weight")
                found.add(((int(match[2]), int(match[3])), last[:1], label[1:] or (0,)))
    if len(found) != 1:
        return None
    [(size, out, label)] = found
    return _Facts(size, *out, *label) if len(out) == len(label) == 1 else None


def _shape(group: dict[str, Any], name: str) -> tuple[int, ...]:
    return tuple(group[name].shape) if _is_tensor(group.get(name)) else ()


def _ours(options: RunOptions, facts: _Facts | None) -> tuple[Precond, dict[str, Any]]:
    """Returns the network of a run of this project, without memory, and what else is known."""
    config = {key: math.inf if value == "inf" else value  # as JSON holds it
              for key, value in options.values["network"].items()}
    with error_prefix(f"{options.name}: 'network' "):
        net = published.checked_skeleton(config)
    _check_size(net, options, facts)
    run, dataset = options.values.get("options"), options.values.get("dataset")
    recorded = config.get("pfgmpp") is False or {"pfgmpp", "D"} <= config.keys()
    told = {"options": run if isinstance(run, dict) else {}, "D_recorded": recorded}
    return net, told | ({"dataset": dataset} if isinstance(dataset, dict) else {})


def _theirs(options: RunOptions, facts: _Facts | None) -> tuple[Precond, dict[str, Any]]:
    """Returns the network of a run of EDM, PFGM++ or ECT, as `_ours` does."""
    values, given = options.values, options.values.get("network_kwargs")
    require(isinstance(given, dict), f"{options.name}: not the training_options.json of a run of "
            "this project, EDM or PFGM++: it has neither 'network' nor 'network_kwargs'")
    given = dict(given)
    class_name = str(given.pop("class_name", "")).rpartition(".")[2]
    known = PRECONDS.get(class_name, Precond)
    for key in ("pfgmpp", "D"):  # PFGM++ keeps them beside 'network_kwargs'
        if key in values:
            given.setdefault(key, values[key])
    data = values.get("dataset_kwargs")
    if isinstance(data, dict) and data.get("resolution") is not None:
        given.setdefault("img_resolution", data["resolution"])
    if facts is not None:
        height, width = facts.size
        for key, value in (("img_resolution", height if height == width else [height, width]),
                           ("img_channels", facts.out_channels // known.out_mult),
                           ("label_dim", facts.label_dim)):
            given.setdefault(key, value)
    for key in ("img_resolution", "img_channels", "label_dim"):
        require(key in given, f"{options.name}: has no {key}, and the tensors don't determine it; "
                "add it to 'network_kwargs'")
    model = given.get("model_type", known.default_model_type)
    with error_prefix(f"{options.name}: 'network_kwargs' "):
        config, recorded = published.configuration(class_name, model, given)
        net = published.checked_skeleton(config)
    _check_size(net, options, facts)
    if recorded is None:  # what EDM wrote has no such keys; early runs of PFGM++ had others
        recorded = "loss_kwargs" in values and not any(
            key == "D" or key.startswith("pfgm") for key in values)
    run = values.get("opts")
    lsun = {"lsun": True} if isinstance(run, dict) and run.get("lsun") is True else {}
    return net, {"options": published.known_options(config, recorded) | lsun,
                 "D_recorded": recorded}


def _check_size(net: Precond, options: RunOptions, facts: _Facts | None) -> None:
    """Raises ValueError if the tensors are named for images of another size."""
    if facts is not None and facts.size != net.image_shape[1:]:
        ours, theirs = ("{}x{}".format(*size) for size in (net.image_shape[1:], facts.size))
        raise ValueError(f"{options.name}: describes a network for {ours} images, but the tensors "
                         f"are named for {theirs}; give the file of the run that they are from")


# -------------------------------------------------------------------------- which weights are taken


def _weights(groups: _Groups, net: Precond) -> list[_Weights]:
    """Returns the sets of weights that have at least half of a network's names, or the nearest."""
    own, parameters = list(net.state_dict()), [name for name, _ in net.named_parameters()]
    inner = {name.removeprefix(_MODEL) for name in own if name.startswith(_MODEL)}
    found, fewer = [], []
    for path, group in groups.items():
        if isinstance(group, list):
            surplus = [f"number {i}" for i in range(len(parameters), len(group))]
            found.append(_Weights(".".join(path), dict(zip(parameters, group, strict=False)),
                                  surplus, is_averaged=True))
            continue
        counts = _prefixes(group, inner)
        most = sorted(prefix for prefix, count in counts.items() if 2 * count >= len(inner))
        found += [_under(path, group, prefix, most, own) for prefix in most]
        fewer += [_under(path, group, prefix, [], own) for prefix in counts]
    if not found and not fewer:
        name = next(name for _, group in _by_name(groups) for name in group)
        raise ValueError(f"holds weights of an unknown network: they have names such as "
                         f"{shown(name)}, but the network of --config such as {shown(own[-1])}")
    return found or [max(fewer, key=lambda one: len(one.tensors))]


def _prefixes(names: Collection[str], inner: Collection[str]) -> Counter[str]:
    """Returns the prefixes before a network's own names, and how many names have each."""
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in inner:
                counts["".join(f"{part}." for part in parts[:i])] += 1
    return counts


def _under(path: tuple[str, ...], group: dict[str, Any], prefix: str, prefixes: list[str],
           own: list[str]) -> _Weights:
    """Returns the weights below `prefix` that are not below a longer one in `prefixes`."""
    outer = prefix.removesuffix(_MODEL) if f".{prefix}".endswith(f".{_MODEL}") else prefix
    keys = {name: prefix + name.removeprefix(_MODEL) if name.startswith(_MODEL) else outer + name
            for name in own}
    used = set(keys.values())
    below = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
    extra = [name for name in group
             if name.startswith(prefix) and name not in used and not _is_counter(name)
             and not (below and name.startswith(below))]
    name = ".".join((*path, *filter(None, outer.split("."))))
    is_averaged = f"{outer}n_averaged" in group or (
        _AVERAGED.search(name) and not _ONLINE.search(name.rpartition(".")[2]))
    return _Weights(name, {one: group[key] for one, key in keys.items() if key in group}, extra,
                    bool(is_averaged))


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] in _COUNTERS


def _without_copies(found: list[_Weights]) -> list[_Weights]:
    """Returns weights without duplicates, whose tensors are the same parts of the file."""
    kept: list[_Weights] = []
    for one in found:
        if not any(_are_same(one.tensors, other.tensors) for other in kept):
            kept.append(one)
    return kept


def _are_same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return one.keys() == two.keys() and all(
        type(a) is type(two[name]) is StoredTensor and a.is_at_place_of(two[name])
        for name, a in one.items())


def _chosen(found: list[_Weights], key: str | None) -> _Weights:
    """Returns the weights that `key` names; without one, the averaged or the only ones."""
    if key is None:
        several = _without_copies([one for one in found if one.is_averaged] or found)
        problem, what = "holds several networks", several
    else:
        several = [one for one in found if one.name == key] or [
            one for one in found if key in one.name.split(".")]
        problem = f"--key={key}: " + ("several weights have" if several else "no weights have")
        problem, what = f"{problem} this name", several or found
    if len(several) == 1:
        return several[0]
    names = ", ".join(shown(one.name) for one in what[:_MAX_NAMED])
    raise ValueError(f"{problem}; give --key=NAME with one of {names}")


def _with_buffers(chosen: _Weights, found: list[_Weights], net: Precond) -> dict[str, Any]:
    """Returns tensors with the buffers that averages of parameters lack."""
    tensors, rebuilt = dict(chosen.tensors), functools.cache(
        lambda: build_network(net.config).state_dict())
    for name, _ in net.named_buffers():
        if name in tensors:
            continue
        plain = next((one.tensors[name] for one in found
                      if not one.is_averaged and name in one.tensors), None)
        if plain is not None:
            tensors[name] = plain
        elif name.rpartition(".")[2] in _DETERMINED:
            tensors[name] = rebuilt()[name]
    return tensors


def _check_fit(chosen: _Weights, tensors: dict[str, Any], net: Precond, others: list[str]) -> None:
    """Raises ValueError unless all tensors fit; gives each problem's count and first tensor."""
    own = net.state_dict()
    missing = [shown(name) for name in own if name not in tensors]
    wrong = [f"{name}, which is {problem}" for name, one in tensors.items()
             if name in own and (problem := _misfit(one, own[name]))]
    problems = [f"{what}: {len(names)}{of}, the first {names[0]}" for what, names, of in (
        ("missing", missing, f" of {len(own)} tensors"),
        ("unknown to it", list(map(shown, chosen.extra)), ""),
        ("of another shape or type", wrong, "")) if names]
    if problems:
        what = f"the weights {shown(chosen.name)}" if chosen.name else "its weights"
        hint = f"; --key=NAME selects other weights: {', '.join(map(shown, others[:_MAX_NAMED]))}" \
            if others else ""
        raise ValueError(f"{what} don't fit the network of --config; {'; '.join(problems)}{hint}")


def _misfit(one: Any, own: torch.Tensor) -> str | None:
    """Says what is wrong with a tensor, if anything is."""
    if type(one) is Opaque:
        return f"an object of {shown(one.class_name)}"
    if tuple(one.shape) != tuple(own.shape):
        return f"{list(one.shape)}, must be {list(own.shape)}"
    return None if one.dtype.is_floating_point else f"of {one.dtype}, must be of real numbers"


# ----------------------------------------------------------------------------- what is said of them


def _choice_in_words(chosen: _Weights, found: list[_Weights]) -> str:
    others = ", ".join([_named(one) for one in found if one is not chosen][:_MAX_NAMED])
    taken = f"Read as {_named(chosen)}" + (f", not {others}" if others else "")
    if chosen.is_averaged:
        return f"{taken}: averaged weights"
    return (f"{taken}. The file does not say whether they are averaged (EMA); plain weights give "
            "worse samples")


def _named(one: _Weights) -> str:
    return f"the weights {shown(one.name)}" if one.name else "one set of weights"


def _left_out(groups: _Groups, found: list[_Weights]) -> Iterator[str]:
    """Yields a text if there are tensors beside the weights that belong to no set."""
    used = {id(tensor) for one in found for tensor in one.tensors.values()}
    left = [".".join((*path, name)) for path, group in _by_name(groups)
            if any(id(tensor) in used for tensor in group.values())
            for name, tensor in group.items() if id(tensor) not in used and not _is_counter(name)]
    if left:
        yield f"leaves out tensors beside them: {len(left)}, the first {shown(left[0])}"
