"""Reads checkpoints of other projects, checked and renamed, as the content of our own.

    EDM      network-snapshot-*.pkl    edm-snapshot            EMA network
    EDM      training-state-*.pt       edm-training-state      network, optimizer
    PFGM++   training-state-*.pt/.pkl  pfgmpp-foreign-state    network, EMA, optimizer, progress
    its forks for CT images            the same                the same
    ECT      network-snapshot-*.pkl    ect-snapshot            EMA network
    ECT      training-state-*.pt       ect-training-state      network
    IDMD     network-snapshot-*.pkl    idmd-snapshot           one of several networks, progress
    EDM2     network-snapshot-*.pkl    recognised and refused
    PFCM     model*.pt, ema_*.pt       recognised and refused

They are pickles of the authors' classes with their source code. `torch_utils.safe_pickle` reads
them as inert records. Here, a record's class name and constructor arguments, each checked against
the tables below, become the configuration of a network of ours. That network is built without
memory (on the "meta" device), and its names and shapes are compared strictly with the file's
tensors, so that building it afterwards needs no more memory than the file's tensors take.

Networks that sample in a few evaluations become ours with `few_step` (pfgmpp/few_steps.py). ECT's
consistency functions are EDM's network with a boundary at their sigma_min, in evaluation only
(Geng et al. 2024, arXiv 2406.14548). The optimizer of ECT's states is left out: the file does not
say which of PyTorch's it is, and RAdam's moments look like Adam's.

The forks for CT images (Hein et al. 2023, arXiv 2309.01553 and 2312.09754) also have conditional
networks. With v the condition, which has as many channels as the image,

    theirs   c_skip x + c_out F(c_in [v, x]; c_noise)
    ours     c_skip x + c_out F(c_in [x, v]; c_noise)      with `cond_c_in`

so the weights of the layers that see [v, x], and their moments, are reordered.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

import torch

from dnnlib.util import require
from pfgmpp.few_steps import FewStep
from pfgmpp.networks import MODELS, PRECONDS, Precond, build_network
from torch_utils import safe_pickle
from torch_utils.safe_pickle import ZIP_MAGIC, Record, shown

EDM_SNAPSHOT_FORMAT = "edm-snapshot"
EDM_STATE_FORMAT = "edm-training-state"
PFGMPP_STATE_FORMAT = "pfgmpp-foreign-state"
ECT_SNAPSHOT_FORMAT = "ect-snapshot"
ECT_STATE_FORMAT = "ect-training-state"
IDMD_FORMAT = "idmd-snapshot"
STUDENT = "student"  # of IDMD: denoises what its generator makes, and is not a generator itself
KEYS = ("ema_0_9900", "ema_0_9950", "ema_0_9990", "ema_0_9999", "generator", STUDENT)
DEFAULT_KEY = "ema_0_9990"
HEAD_BYTES = 512  # how much of a file `is_published` needs to see

_MAX_MODULES = 10_000  # the largest published network has about 700
_MAX_MODULE_DEPTH = 16
_MAX_NAME = 64
_SUPPORTED = "only those of EDM, PFGM++, ECT and IDMD are supported"
_EDM2 = f"an EDM2 network; {_SUPPORTED}"
_UNET = ("weights of a guided-diffusion UNet (OpenAI's, as in PFCM), which is not among the "
         f"supported networks; {_SUPPORTED}")
_IDMD_OPTIMIZERS = ("generator_optimizer_state", "student_optimizer_state")
_ECT_SIGMA_MIN = 0.003  # if a file of ECT does not record it
_GUIDED_DIFFUSION = (b"time_embed.0.weight", b"input_blocks.0.0.weight")  # among its first names
_FIRST_NAMES_BYTES = 8192


def is_published(first_bytes: bytes) -> bool:
    """Says whether a file with these first bytes is a pickle or torch.save ZIP that is not ours.

    Our files name their format first, within `HEAD_BYTES`.
    """
    head = bytes(first_bytes[:HEAD_BYTES])
    if head[:4] == ZIP_MAGIC:
        return b"X\x06\x00\x00\x00format" not in head
    return head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")


class UnreadableError(ValueError):
    """A file is of none of the kinds that are read here; it may still hold weights."""


class _UnsupportedError(ValueError):
    """A file is of a known kind, but its network is not supported."""


class _LeftOutError(Exception):
    """A needed tensor was not read, because it also belongs to a part that was left out."""


def read(file: IO[bytes], name: str, key: str | None = None) -> dict[str, Any]:
    """Returns a foreign checkpoint in the form of our own, see checkpoints/checkpoint.py.

    Args:
        file: a binary file that can seek.
        name: the file's name in errors.
        key: which of KEYS to read, for files of IDMD; None is DEFAULT_KEY.

    Returns:
        format: one of those above.
        network: configuration for `networks.build_network`.
        ema: state dict of float32 tensors in the order of our network, or None.
        net, optimizer: state dicts; absent where the file has none.
        progress: cur_nimg, None if it isn't recorded.
        options: what is known of the run, named as in TrainConfig.
        D_recorded: False if a PFGM++ file doesn't say which D it was trained with; `network` then
            stands for D = inf.
        key, keys: for a file of IDMD, which of its networks was read, as `ema`, and which it has.

    Raises:
        OSError: it can't be read.
        UnreadableError: it is damaged, of another kind, or asks for something unknown. One line
            with `name`.
        ValueError: it is recognised and refused, or has no network `key`.
    """
    wanted = DEFAULT_KEY if key is None else key
    others = {*KEYS, *_IDMD_OPTIMIZERS} - {wanted}
    with _calling_it(name):
        _refuse_known(file)
        top = safe_pickle.load(file, leave_out=others)
        require(type(top) is dict, f"holds {shown(top)}, not a dictionary of networks")
    keys = [] if {"ema", "net"} & top.keys() else [
        one for one in KEYS if type(top.get(one)) not in (dict, type(None))]
    if keys and wanted not in keys:
        problem = f"{name} has no network {DEFAULT_KEY}" if key is None else \
            f"--key={key}: {name} has no network of this name"
        raise ValueError(f"{problem}; give --key=NAME with one of {', '.join(keys)}")
    content_of = functools.partial(_chosen, key=wanted, keys=keys) if keys else _content
    with _calling_it(name):
        try:
            content = content_of(top)
        except _LeftOutError:  # networks share tensors
            content = content_of(safe_pickle.load(file))
    check_key(content, key, name)
    return content


def check_key(content: dict[str, Any], key: str | None, name: str) -> None:
    """Raises ValueError if a key is given, but the file, called `name`, holds only one network."""
    if key is not None and "keys" not in content:
        raise ValueError(f"--key={key}: {name} holds only one network; leave --key out")


@contextmanager
def _calling_it(name: str) -> Iterator[None]:
    """Names the file in errors."""
    try:
        yield
    except _UnsupportedError as error:
        raise ValueError(f"{name}: {error}") from None
    except ValueError as error:
        raise UnreadableError(f"{name}: not a training state or network snapshot that can be "
                              f"read: {error}") from None


def _refuse_known(file: IO[bytes]) -> None:
    """Raises ValueError for a file that begins like those of EDM2 or PFCM, without reading on."""
    file.seek(0)
    head = file.read(_FIRST_NAMES_BYTES)
    if head[:1] == b"\x80" and b"EasyDict" in head[:64] and b"encoder" in head[:128]:
        raise _UnsupportedError(_EDM2)
    if all(len(name).to_bytes(4, "little") + name in head for name in _GUIDED_DIFFUSION):
        raise _UnsupportedError(_UNET)


def _chosen(top: dict[str, Any], key: str, keys: list[str]) -> dict[str, Any]:
    """Returns the content of a file of IDMD with one of its networks."""
    network = _read_network(top[key], key)
    few_step = {} if key == STUDENT else {"few_step": FewStep.of("ipfm").to_dict()}
    recorded = network.D_recorded is not False  # EDM's networks record no D: theirs is inf
    cur_nimg = top.get("cur_nimg")
    return {
        "format": IDMD_FORMAT, "network": network.config | few_step, "ema": network.tensors,
        "progress": {"cur_nimg": None if cur_nimg is None
                     else _checked("cur_nimg", cur_nimg, _STEP_RULE)},
        "options": known_options(network.config, recorded), "D_recorded": recorded, "key": key,
        "keys": keys}


def _content(top: dict[str, Any]) -> dict[str, Any]:
    has = {key for key in ("ema", "net", "optimizer_state", "step") if top.get(key) is not None}
    require(has & {"ema", "net"}, "holds no network (neither 'ema' nor 'net')")
    records = {key: _read_network(top[key], key) for key in ("ema", "net") if key in has}
    first = next(iter(records.values()))
    for other in records.values():
        require(other.config == first.config and other.D_recorded == first.D_recorded,
                "'net' and 'ema' are different networks")
    if "few_step" in first.config:
        kind = ECT_STATE_FORMAT if "net" in has else ECT_SNAPSHOT_FORMAT
    elif has & {"net", "optimizer_state", "step"}:
        kind = PFGMPP_STATE_FORMAT if has & {"ema", "step"} else EDM_STATE_FORMAT
    else:
        snapshot = "loss_fn" in top or "dataset_kwargs" in top or first.D_recorded is None
        kind = EDM_SNAPSHOT_FORMAT if snapshot else PFGMPP_STATE_FORMAT
    recorded = first.D_recorded is True or first.D_recorded is None and kind != PFGMPP_STATE_FORMAT
    content = {"format": kind, "network": first.config, "ema": None,
               **{key: record.tensors for key, record in records.items()}}
    if "optimizer_state" in has and kind != ECT_STATE_FORMAT:
        content["optimizer"] = _optimizer(top["optimizer_state"], records.get("net", first))
    content["progress"] = {"cur_nimg": _checked("step", top["step"], _STEP_RULE)
                           if "step" in has else None}
    content["options"] = known_options(first.config, recorded)
    content["D_recorded"] = recorded
    return content


def known_options(config: dict, recorded: bool) -> dict:
    """Returns what a network's configuration says about the run, named as in TrainConfig."""
    options = {"cond": config["label_dim"] > 0}
    if config.get("cond_c_in"):
        options |= {"cond_image": True, "cond_c_in": True}
    if "dropout" in config:
        options["dropout"] = config["dropout"]
    if recorded:
        options["pfgmpp"] = config["pfgmpp"]
        options |= {"aug_dim": config["D"]} if config["pfgmpp"] else {}
    return options


class _Rule(NamedTuple):
    allowed: str
    holds: Callable[[Any], bool]
    convert: Callable[[Any], Any] = lambda value: value


def _whole(low: int, high: int) -> _Rule:
    return _Rule(f"a whole number from {low} to {high}",
                 lambda value: type(value) is int and low <= value <= high)


def _real(low: float, high: float, *, above: bool = False) -> _Rule:
    return _Rule(f"a number {'above' if above else 'from'} {low:g} to {high:g}",
                 lambda value: type(value) in (int, float) and low <= value <= high
                 and not (above and value == low))


def _choice(*names: str) -> _Rule:
    return _Rule(f"one of {', '.join(names)}", lambda value: type(value) is str and value in names)


def _several(rule: _Rule, least: int, most: int) -> _Rule:
    return _Rule(f"a list of {least} to {most}, each {rule.allowed}",
                 lambda value: type(value) in (list, tuple) and least <= len(value) <= most
                 and all(map(rule.holds, value)), list)


def _either(first: _Rule, second: _Rule) -> _Rule:
    return _Rule(f"{first.allowed}, or {second.allowed}",
                 lambda value: first.holds(value) or second.holds(value),
                 lambda value: (first if first.holds(value) else second).convert(value))


def _is_few_step(value: Any) -> bool:
    try:
        FewStep.from_dict(value)
    except ValueError:
        return False
    return True


_SIDE = _whole(1, 1 << 14)
_FLAG = _Rule("true or false", lambda value: type(value) in (bool, int) and value in (0, 1), bool)
_BASE_RULES = {
    "img_resolution": _either(_SIDE, _several(_SIDE, 2, 2)),
    "img_channels": _whole(1, 1 << 16), "cond_channels": _whole(0, 1 << 16),
    "label_dim": _whole(0, 100_000), "use_fp16": _FLAG,
    "model_type": _Rule("the name of the model", lambda value: type(value) is str),
    "pfgmpp": _FLAG, "D": _real(0, math.inf, above=True),
}
_OWN_RULES = {  # of our files only
    "few_step": _Rule("a method and its levels", _is_few_step), "cond_c_in": _FLAG,
    "boundary": _real(0, 1e6), "boundary_in_training": _FLAG,
}
_EDM_RULES = {"sigma_min": _real(0, 1e6), "sigma_max": _real(0, math.inf, above=True),
              "sigma_data": _real(0, 1e6, above=True)}
_PRECOND_RULES = {
    "EDMPrecond": _EDM_RULES,
    "ECMPrecond": _EDM_RULES,  # of ECT; not a class of ours
    "VEPrecond": {"sigma_min": _real(0, 1e6), "sigma_max": _real(0, 1e6, above=True)},
    "VPPrecond": {"beta_d": _real(0, 1000, above=True), "beta_min": _real(0, 1000),
                  "M": _whole(2, 10_000), "epsilon_t": _real(0, 0.5, above=True)},
    "iDDPMPrecond": {"C_1": _real(0, 1, above=True), "C_2": _real(0, 1, above=True),
                     "M": _whole(2, 10_000)},
}
_COMMON_RULES = {
    "augment_dim": _whole(0, 64), "model_channels": _whole(1, 1024),
    "channel_mult": _several(_whole(1, 16), 1, 8), "channel_mult_emb": _whole(1, 16),
    "num_blocks": _whole(1, 16), "attn_resolutions": _several(_SIDE, 0, 16),
    "dropout": _real(0, 1), "label_dropout": _real(0, 1),
}
_CONDITIONAL = {"cSongUNet": "SongUNet", "cDhariwalUNet": "DhariwalUNet"}  # of the CT forks
_MODEL_RULES = {
    "SongUNet": _COMMON_RULES | {
        "embedding_type": _choice("positional", "fourier"), "channel_mult_noise": _whole(1, 8),
        "encoder_type": _choice("standard", "skip", "residual"),
        "decoder_type": _choice("standard", "skip"),
        "resample_filter": _several(_real(0, 1e3), 1, 8)},
    "DhariwalUNet": _COMMON_RULES,
}  # of the published classes; classes added to MODELS or PRECONDS check their own keywords
_STEP_RULE = _whole(0, 1 << 48)


def _checked(key: str, value: Any, rule: _Rule) -> Any:
    require(rule.holds(value), f"{key}={shown(value)}: must be {rule.allowed}")
    return rule.convert(value)


def check_network(config: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Checks what a file says about its network before anything is built from it.

    Raises:
        ValueError: a keyword or value that is not allowed, or tensors of another network.
    """
    _compare(checked_skeleton(config).state_dict(), tensors)


def checked_skeleton(config: Any) -> Precond:
    """Returns the network that a file describes, without memory for its tensors.

    Raises:
        ValueError: a keyword or value that is not allowed.
    """
    require(type(config) is dict, f"describes its network by {shown(config)}, not by keywords")
    for key, known in (("class_name", PRECONDS), ("model_type", MODELS)):
        require(type(config.get(key)) is str and config[key] in known,
                f"asks for the {key} {shown(config.get(key))}, which is not known (known are "
                f"{', '.join(known)}); if a plugin defines it, give --plugin=FILE")
    published = config["class_name"] in _PRECOND_RULES and config["model_type"] in _MODEL_RULES
    rules = (_BASE_RULES | _OWN_RULES | _PRECOND_RULES.get(config["class_name"], {})
             | _MODEL_RULES.get(config["model_type"], {}))
    for key, value in config.items():
        if key in rules:
            _checked(key, value, rules[key])
        else:
            require(key == "class_name" or not published, f"unknown argument {shown(key)}")
    return _skeleton(config)


class _Network(NamedTuple):
    config: dict
    tensors: dict[str, torch.Tensor]  # in the order of our network
    stored_order: list[str]  # of the parameters
    own_order: list[str]
    swapped: frozenset[str]  # weights that are stored for [condition, x], ours for [x, condition]
    D_recorded: bool | None  # None: neither pfgmpp nor D is mentioned, as in EDM's own files


def _read_network(record: Any, key: str) -> _Network:
    require(type(record) is Record, f"{key!r} is {shown(record)}, not a network")
    if record.class_name in ("Precond", "UNet"):
        raise _UnsupportedError(_EDM2)
    require(record.class_name in _PRECOND_RULES,
            f"asks for the network class {shown(record.class_name)}; "
            f"known are {', '.join(_PRECOND_RULES)}")
    config, recorded = _configuration(record)
    skeleton = _skeleton(config)
    stored = dict(_stored_tensors(record))
    parameters = [name for name, (_, is_parameter) in stored.items() if is_parameter]
    own = [name for name, _ in skeleton.named_parameters()]
    _compare(skeleton.state_dict(), {name: tensor for name, (tensor, _) in stored.items()})
    require(set(parameters) == set(own), "stores a buffer as a parameter, or a parameter as a "
            "buffer")
    swapped = swapped_weights(skeleton)
    tensors = {name: in_our_order(stored[name][0].float(), name in swapped)
               for name in skeleton.state_dict()}
    return _Network(skeleton.config, tensors, parameters, own, swapped, recorded)


def swapped_weights(net: Precond) -> frozenset[str]:
    """Returns the names of weights that a network of the CT forks has for [condition, x]."""
    names = net.model.image_weights if net.cond_c_in else ()
    return frozenset(f"model.{name}" for name in names)


def in_our_order(weight: torch.Tensor, is_swapped: bool) -> torch.Tensor:
    """Returns a weight [O, 2 C, k, k], reordered for [x, condition] if it is for [condition, x]."""
    return weight.roll(weight.shape[1] // 2, dims=1) if is_swapped else weight


def _configuration(record: Record) -> tuple[dict, bool | None]:
    """Returns checked keywords for `build_network`, and whether D is recorded."""
    model = _dict(record.state, "_modules").get("model")
    require(type(model) is Record, f"has {shown(model)} in place of a model")
    given = _arguments(record) or _arguments(model, skip=("in_channels", "out_channels"))
    own_rules = _BASE_RULES | _PRECOND_RULES[record.class_name]
    # The network computes with its attributes, whatever arguments it was constructed with.
    given |= {key: record.state[key] for key in own_rules if key in record.state}
    return configuration(record.class_name, model.class_name, given)


def configuration(class_name: str, model_class: str, given: dict[str, Any]
                  ) -> tuple[dict, bool | None]:
    """Returns keywords for `build_network` of a network of EDM, PFGM++, ECT or the CT forks.

    Args:
        class_name: of the network.
        model_class: of the model in it.
        given: keywords, as those projects name them.

    Returns:
        The keywords, and whether they record D: None if they mention neither pfgmpp nor D.

    Raises:
        ValueError: a class, a keyword or a value that is not allowed, or too few keywords.
    """
    known = [*_MODEL_RULES, *_CONDITIONAL]
    for kind, name, names in (("network", class_name, _PRECOND_RULES),
                              ("model", model_class, known)):
        require(type(name) is str and name in names, f"asks for the {kind} class {shown(name)}; "
                f"known are {', '.join(names)}")
    model_type = _CONDITIONAL.get(model_class, model_class)
    rules = _BASE_RULES | _PRECOND_RULES[class_name] | _MODEL_RULES[model_type]
    for key in given:
        require(key in rules, f"{class_name}: unknown argument {shown(key)}")
    config = {key: _checked(key, value, rules[key]) for key, value in given.items()}
    require(config.setdefault("model_type", model_class) == model_class,
            f"model_type={shown(config['model_type'])}, but the model is {model_class}")
    for key in ("img_resolution", "img_channels"):
        require(key in config, f"does not record {key}")
    recorded = (not config["pfgmpp"] or "D" in config) if "pfgmpp" in config else None
    if recorded is not True or not config["pfgmpp"]:
        config.pop("D", None)  # the PFGM++ code stores a D in plain EDM networks too
        config["pfgmpp"] = False
    config = {"class_name": class_name, **config}
    if model_type != model_class:
        require(class_name == "EDMPrecond",
                f"has a conditional network in {class_name}, must be in EDMPrecond")
        config |= {"model_type": model_type, "cond_channels": config["img_channels"],
                   "cond_c_in": True}
    return _consistency(config) if class_name == "ECMPrecond" else config, recorded


def _consistency(config: dict) -> dict:
    """Returns our configuration of a consistency function of ECT.

    Its sigma_min becomes the boundary and our sigma_min: the network was never trained below it.
    """
    boundary = config.get("sigma_min", _ECT_SIGMA_MIN)
    return config | {"class_name": "EDMPrecond", "sigma_min": boundary, "boundary": boundary,
                     "boundary_in_training": False, "few_step": FewStep.of("ect").to_dict()}


_POSITIONAL = ("img_resolution", "img_channels", "label_dim")  # alike in EDM and PFGM++


def _arguments(record: Record, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """Returns the arguments that an object was constructed with, by name.

    After the third, positions mean different things in EDM and PFGM++, but those arguments are also
    attributes.
    """
    args, kwargs = record.state.get("_init_args") or (), record.state.get("_init_kwargs") or {}
    require(type(args) in (tuple, list) and type(kwargs) is dict,
            f"{shown(record.class_name)} has arguments in an unknown form")
    given = dict(zip(_POSITIONAL, args, strict=False))
    return given | {key: value for key, value in kwargs.items() if key not in skip}


def _dict(state: dict, key: str) -> dict:
    value = state.get(key)
    require(type(value) is dict, f"has a module whose {key} is {shown(value)}")
    return value


def _skeleton(config: dict) -> Precond:
    """Returns the network without memory for its tensors."""
    with torch.device("meta"):
        return build_network(config)


def _stored_tensors(record: Record) -> Iterator[tuple[str, tuple[torch.Tensor, bool]]]:
    """Yields (name, (tensor, whether a parameter)) in the order of registration."""
    waiting, modules = [("", record)], 0
    while waiting:
        prefix, module = waiting.pop()
        modules += 1
        require(type(module) is Record and type(module.state) is dict,
                f"has {shown(module)} in place of a module")
        require(modules <= _MAX_MODULES and prefix.count(".") <= _MAX_MODULE_DEPTH,
                "has too many modules")
        for kind in ("_parameters", "_buffers"):
            for key, tensor in _dict(module.state, kind).items():
                _check_key(key)
                if tensor is not None:
                    require(type(tensor) is torch.Tensor, f"{prefix}{key} is {shown(tensor)}")
                    _check_read(tensor)
                    yield prefix + key, (tensor, kind == "_parameters")
        inner = _dict(module.state, "_modules")
        for key in inner:
            _check_key(key)
        waiting += [(f"{prefix}{key}.", child) for key, child in reversed(inner.items())
                    if child is not None]


def _check_read(tensor: torch.Tensor) -> None:
    """Raises _LeftOutError for a tensor whose content was not read."""
    if tensor.is_meta:
        raise _LeftOutError


def _check_key(key: Any) -> None:
    require(type(key) is str and len(key) <= _MAX_NAME and key.isascii() and key.isprintable()
            and "." not in key, f"has a module or tensor named {shown(key)}")


def _compare(ours: dict[str, torch.Tensor], stored: dict[str, torch.Tensor]) -> None:
    """Raises ValueError at the first name, shape or type of tensor that differs."""
    for name in ours:
        require(name in stored, f"lacks the tensor {name}")
    for name, tensor in stored.items():
        require(name in ours, f"has the tensor {shown(name)}, which its network does not have")
        require(tensor.shape == ours[name].shape,
                f"tensor {name} is {list(tensor.shape)}, must be {list(ours[name].shape)}")
        require(tensor.dtype in (torch.float32, torch.float16, torch.bfloat16),
                f"tensor {name} is of {tensor.dtype}, must be float32 or float16")


_GROUP_RULES = {
    "lr": _real(0, 1e3), "eps": _real(0, 1), "weight_decay": _real(0, 1e3),
    "betas": _several(_real(0, 1), 2, 2), "amsgrad": _Rule("false", lambda v: v is False),
    "maximize": _Rule("false", lambda v: v is False),
}


def _optimizer(stored: Any, network: _Network) -> dict[str, Any]:
    """Returns Adam's state dict for our order of parameters."""
    require(type(stored) is dict, f"'optimizer_state' is {shown(stored)}")
    groups, state, names = stored.get("param_groups"), _dict(stored, "state"), network.stored_order
    require(type(groups) is list and len(groups) == 1 and type(groups[0]) is dict,
            "has an optimizer that does not have exactly one group of parameters")
    params = groups[0].get("params")
    require(type(params) is list and len(params) == len(names)
            and all(type(one) is int and one == i for i, one in enumerate(params)),
            f"has an optimizer that does not match the network's {len(names)} parameters")
    group = {key: _checked(key, groups[0][key], rule)
             for key, rule in _GROUP_RULES.items() if key in groups[0]}
    group["betas"] = tuple(group.get("betas", (0.9, 0.999)))
    group["params"] = params
    own_index = {name: i for i, name in enumerate(network.own_order)}
    mapped = {}
    for i, moments in state.items():
        require(type(i) is int and 0 <= i < len(names),
                f"has an optimizer state for the unknown parameter {shown(i)}")
        name = names[i]
        mapped[own_index[name]] = _moments(moments, name, network.tensors[name].shape,
                                           name in network.swapped)
    return {"state": dict(sorted(mapped.items())), "param_groups": [group]}


def _moments(stored: Any, name: str, shape: torch.Size, is_swapped: bool
             ) -> dict[str, torch.Tensor]:
    require(type(stored) is dict and {"step", "exp_avg", "exp_avg_sq"} == set(stored),
            f"the optimizer's state of {name} is not Adam's")
    for value in stored.values():
        if type(value) is torch.Tensor:
            _check_read(value)
    step = stored["step"]
    if type(step) is torch.Tensor and step.numel() == 1:
        step = step.item()
    require(_real(0, 1e12).holds(step), f"the optimizer's step of {name} is {shown(step)}")
    for key in ("exp_avg", "exp_avg_sq"):
        moment = stored[key]
        require(type(moment) is torch.Tensor and moment.shape == shape
                and moment.dtype.is_floating_point,
                f"the optimizer's {key} of {name} does not fit")
    return {"step": torch.tensor(float(step)),
            **{key: in_our_order(stored[key].float(), is_swapped)
               for key in ("exp_avg", "exp_avg_sq")}}
