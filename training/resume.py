"""What a run starts from: a training state to continue, the weights of another run, or nothing.

    open_state      the state that --resume names
    settle_options  the run's seed, and whether its options may differ from the state's
    settle_data     whether its data are the state's
    open_weights    the weights that --transfer names, as far as they fit
    restore_        loads a state into a trainer

Rank 0 finds and reads the files and sends the content to every rank; the other ranks do not look at
their own file systems. No PyTorch is needed to import this file.

Adam's moments have the scale of the gradients they were computed from: a loss scale of `ls` makes
the first moment ls times and the second ls^2 times larger. They are converted to this run's scale.
Those of RAdam do not depend on it.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Container, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnnlib.cli import BAD_USAGE, UserError
from training.config import OPTIONS_FILE, TrainConfig, flag_name

if TYPE_CHECKING:
    import torch

    from images.dataset import ImageFolderDataset
    from pfgmpp.networks import Precond
    from training.trainer import Trainer

# What a resumed run may change without --override-options, with the reason. Everything else,
# including options added later, affects what is computed from the resumed step on.
RESUME_MAY_CHANGE = {
    "data": "a data set may move: its content is compared by its fingerprint",
    "seed": "taken from the state; a different one is refused",
    "transfer": "decides where a run begins, not how it continues",
    "teacher": "a file may move: its weights are compared",
    "plugin": "a file may move: its content is compared",
    "preset": "only a name: the options that it sets are compared",
    "duration": "how long, not how: training for longer is a reason to resume; compared with "
                "--lr-decay=cosine, which ends there",
    "batch_gpu": "the split over rounds and processes changes only rounding",
    "checkpoint_blocks": "what is kept for the backward pass, not its result",
    "bench": "which kernels run, which also depends on the machine",
    "compile": "likewise",
    "deterministic": "likewise",
    "cache": "where the pixels come from, not which",
    "workers": "likewise",
    "data_on_device": "likewise",
    "max_bad_steps": "when to give up, not what is trained",
    "tick": "when to report and to write",
    "snap": "likewise",
    "dump": "likewise",
    "keep": "likewise",
    "log": "where else numbers and pictures go",
    "samples": "pictures use seeds of their own",
    "window": "how pictures are shown",
    "eval": "scores use seeds of their own, and training does not see them",
    "eval_ref": "likewise",
    "eval_pairs": "likewise",
    "eval_num": "likewise",
    "eval_detector": "likewise",
    "eval_solver": "likewise",
    "eval_steps": "likewise",
    "val_data": "training does not see held-out images",
    "val_num": "likewise",
}
# Options recorded in the network's configuration, which is compared with the state's key by key.
NETWORK_OPTIONS = {"arch", "precond", "pfgmpp", "aug_dim", "cond", "cond_image", "cond_c_in",
                   "label_dropout", "sigma_data", "cbase", "cres", "nblock", "ares", "boundary",
                   "sigma_init", "teacher_network"}
LOSS_SCALE_KEY = "loss_scaling"  # in the training_options.json of EDM and PFGM++
_MAX_LISTED = 8  # tensors left out of a transfer
# Network keywords that are named differently from the flags of train.py that set them.
_FLAGS = {"attn_resolutions": "--ares", "model_channels": "--cbase", "channel_mult": "--cres",
          "num_blocks": "--nblock", "img_resolution": "--data or --patch", "label_dim": "--cond",
          "cond_channels": "--cond-image", "cond_c_in": "--cond-c-in", "D": "--aug_dim",
          "class_name": "--precond", "model_type": "--arch", "augment_dim": "--augment",
          "label_dropout": "--label-dropout",
          "sigma_data": "--sigma-data", "few_step": "--method or --sigma-init",
          "boundary": "--boundary"}
_SMALL_SHARE = 0.5  # of the parameters: less is probably a mistake
_LEVEL_SIZE = re.compile(r"(?<=[.])\d+x\d+(?=_)")  # in the names of the weights of U-Nets
_STATE_TAG = re.compile(r"training-state-(\d+)")


@dataclasses.dataclass(frozen=True)
class State:
    """A training state to continue: what `checkpoint.load_state` read from `source`.

    `changed` lists the options of the run that differ from the state's, `notes` any assumptions.
    """

    source: str
    content: dict[str, Any]
    changed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_ours(self) -> bool:
        """Whether this project wrote it, so that it holds all that a run needs."""
        from checkpoints.checkpoint import STATE_FORMAT
        return self.content["format"] == STATE_FORMAT

    def release(self) -> None:
        """Frees the tensors, once the trainer has them: 16 bytes per parameter."""
        for part in ("net", "ema", "optimizer", "target", "auxiliary", "auxiliary_optimizer"):
            self.content.pop(part, None)


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights to start from: those of `source` that fit, and a line for each tensor left out.

    `share` is the fraction of the network's parameters that they are.
    """

    source: str
    tensors: dict[str, "torch.Tensor"]
    left_out: tuple[str, ...]
    share: float = 1.0

    def release(self) -> None:
        """Frees the tensors, once the trainer has them."""
        self.tensors.clear()


def describe_start(start: State | Weights | None) -> list[str]:
    """Returns lines that say what a run starts from, none for a new run."""
    if isinstance(start, State):
        changed = [f"Changed        {', '.join(start.changed)}"] if start.changed else []
        return [f"Resuming from  {start.source}", *changed, *start.notes]
    if start is None:
        return []
    rest = (f"; {len(start.left_out)} do not fit, new ones start at random:" if start.left_out
            else "")
    return [f"Transferred    {len(start.tensors)} tensors of {start.source}, "
            f"{100 * start.share:.3g}% of the network's parameters{rest}",
            *(f"               {line}" for line in start.left_out[:_MAX_LISTED]),
            *([f"               ... and {len(start.left_out) - _MAX_LISTED} more"]
              if len(start.left_out) > _MAX_LISTED else [])]


# ---------------------------------------------------------------------------- which state


def open_state(resume: str, run_dir: Path | None) -> State | None:
    """Returns the state that `resume` names; None if it is 'auto' and `run_dir` has none.

    Raises:
        ValueError: it is damaged, or no state in `run_dir` can be resumed.
        UserError: it is a snapshot.
        OSError: it can't be read.
    """
    from checkpoints.checkpoint import SnapshotGivenError
    from torch_utils import distributed
    try:
        found, problems = distributed.run_on_rank0(read_state, resume, run_dir)
    except SnapshotGivenError as error:
        raise UserError(str(error), BAD_USAGE) from error
    for problem in problems:
        distributed.warn0(f"skipped {problem}")
    if found is None and problems:
        raise ValueError(f"--resume=auto: no training state in {run_dir} can be resumed; the "
                         "warnings say why")
    if found is None and distributed.run_on_rank0((run_dir / OPTIONS_FILE).exists):
        distributed.print0(f"Resume     {run_dir} has no training state yet, so the run starts "
                           "from the beginning; --dump sets how often states are written")
    return found


def read_state(resume: str, run_dir: Path | None) -> tuple[State | None, list[str]]:
    """Returns the state that `resume` names, and what was wrong with newer ones.

    For 'auto' it is the intact state in `run_dir` that records the most images, if any.
    """
    if resume != "auto":
        return _read_state(Path(resume)), []
    from checkpoints import checkpoint
    assert run_dir is not None, "train.py asks for --name or --nosubdir"
    problems: list[str] = []
    paths = checkpoint.training_states(run_dir) if run_dir.is_dir() else []
    for path in sorted(paths, key=checkpoint.recorded_nimg, reverse=True):
        try:
            return _read_state(path), problems
        except (OSError, ValueError) as error:
            problems.append(str(error))
    return None, problems


def _read_state(path: Path) -> State:
    from checkpoints import checkpoint
    state = State(str(path), checkpoint.load_state(path))
    return state if state.is_ours else _with_neighbours(state)


def _with_neighbours(state: State) -> State:
    """Returns a state of EDM or PFGM++, completed from the files beside it.

    EDM's states lack the averaged weights, which are in the network-snapshot of the same number.
    Both projects write the loss scale to training_options.json.
    """
    from checkpoints import checkpoint
    path = Path(state.source)
    content = checkpoint.with_average(state.content, path)
    try:
        options = json.loads(path.with_name(OPTIONS_FILE).read_text(encoding="utf-8"))
        scale = options.get(LOSS_SCALE_KEY)
    except (OSError, ValueError, AttributeError, RecursionError):
        scale = None
    if isinstance(scale, int | float) and 0 < scale < float("inf"):
        content = content | {"options": {**content["options"], "ls": float(scale)}}
    return dataclasses.replace(state, content=content)


# ---------------------------------------------------------------------------- which options


def settle_options(
    config: TrainConfig, seed: int | None, state: State | None, *, override: bool,
    typed: Container[str] = (),
) -> tuple[TrainConfig, State | None]:
    """Returns the run's options with its seed, and the state with the options that differ.

    The seed is the one given, else that of the state, else a random one, the same on every rank.
    `typed` are the options that the command line sets.

    Raises:
        ValueError: the seed given is not that of the state.
        UserError: options that affect what is computed differ, and `override` is not set; or the
            loss scale of another project's state is not known.
    """
    from torch_utils import distributed
    recorded = state.content["options"].get("seed") if state else None  # foreign states have none
    if recorded is not None and seed not in (None, recorded):
        raise ValueError(f"--seed={seed}: the run to resume has seed {recorded}; leave --seed out")
    seed = recorded if seed is None else seed
    if seed is None:
        seed = distributed.broadcast_object(int.from_bytes(os.urandom(4), "big") >> 1)
    config = dataclasses.replace(config, seed=seed)
    if state is None:
        return config, None
    _check_command(config, state)
    if not state.is_ours:  # these do not record options
        return config, _with_loss_scale(config, state)
    changed = [*changed_options(config, state.content["options"], typed),
               *_changed_draws(state)]
    if changed and not override:
        raise UserError(
            f"{state.source}: the run to resume has other options: {', '.join(changed)}; give the "
            "state's options, or --override-options to change them", BAD_USAGE)
    return config, dataclasses.replace(state, changed=tuple(changed))


def _check_command(config: TrainConfig, state: State) -> None:
    """Raises UserError if train.py resumes a state of distill.py, or the other way round."""
    method = state.content["options"].get("method")
    if (method is None) != (config.method is None):
        command = "train.py" if method is None else f"distill.py --method={method}"
        raise UserError(f"{state.source}: was written by {command}; resume it with that", BAD_USAGE)


def changed_options(now: TrainConfig, then: dict[str, Any], typed: Container[str] = ()
                    ) -> list[str]:
    """Returns '--lr=0.01 (0.001 in the state)' for each option that would change the run.

    If the new value is a default that was not typed, the text says so. Defaults of a method that
    differs from the state's are left out, because the method itself is listed.

    Args:
        now: the options of the run that is resumed.
        then: what `TrainConfig.to_dict` wrote to the state; an option that it lacks had its
            default.
        typed: names of options that were typed.
    """
    changed, free = [], {*RESUME_MAY_CHANGE, *NETWORK_OPTIONS}
    if now.lr_decay == "cosine":
        free.remove("duration")  # it determines how the learning rate falls
    unused = now.unused_options - {"teacher_sha256"}
    defaults = {field.name: field.default for field in dataclasses.fields(now)}
    given, before = now.to_dict(), defaults | then
    of_method = now.method_defaults if now.method != before.get("method") else {}
    usual = defaults | now.method_defaults
    for name in defaults:
        if name not in free | unused and _in_effect(name, given) != _in_effect(name, before):
            if name == "ls" and given[name] is None and before[name] is None:
                continue  # the default follows --precision, which differs and is listed
            if name == "teacher_sha256":
                changed.append(f"--teacher={now.teacher or 'none'} (other weights in the state)")
                continue
            if name == "plugin_sha256":
                other = "none" if before[name] is None else "other content"
                changed.append(f"--plugin={now.plugin or 'none'} ({other} in the state)")
                continue
            is_default = name not in typed and given[name] == usual[name]
            if is_default and name in of_method:
                continue
            default = ", the default" if is_default and given[name] is not None else ""
            changed.append(f"--{flag_name(name)}={_shown(given[name])}{default} "
                           f"({_shown(before[name])} in the state)")
    return changed


def _in_effect(name: str, options: dict[str, Any]) -> Any:
    """Returns the value of an option, or the value that leaving it out stands for."""
    value = options[name]
    if name == "ls" and options["precision"] != "fp16":
        return value or 1.0
    return options["lr_rampup"] if name == "lr_decay_start" and value is None else value


def _changed_draws(state: State) -> list[str]:
    """Returns a text if the state's run drew random numbers differently from this code."""
    from training.trainer import DRAWS_VERSION
    then = state.content["progress"].get("draws", 1)  # states that record none have version 1
    return [] if then == DRAWS_VERSION else [
        f"random draws of version {DRAWS_VERSION} ({then} in the state, from another version of "
        "the code)"]


def _shown(value: object) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _with_loss_scale(config: TrainConfig, state: State) -> State:
    """Returns a state of EDM or PFGM++ with the loss scale of its moments, as 'ls'.

    Raises:
        UserError: it is neither recorded nor given, and the network was trained in float16.
    """
    options = state.content["options"]
    if "ls" in options:
        return state
    if config.ls is None and state.content["network"].get("use_fp16"):
        raise UserError(
            f"{state.source}: trained in float16 with a loss scale that is not recorded; give the "
            "--ls it was trained with (100 for EDM's ImageNet), or put its training_options.json "
            "beside it", BAD_USAGE)
    note = (f"Note: {state.source} does not record its loss scale; it is assumed to be "
            f"{config.ls or 1:g}, " + ("as given by --ls" if config.ls else "the default"))
    return dataclasses.replace(
        state, content={**state.content, "options": {**options, "ls": config.ls or 1.0}},
        notes=(note,))


def settle_data(
    config: TrainConfig, dataset: "ImageFolderDataset", state: State, *, override: bool,
) -> State:
    """Returns the state, which records the run's data if --data changed and `override` is set.

    Raises:
        ValueError: the content of the same --data has changed since the run began.
        UserError: --data changed, and `override` is not set.
    """
    from training.trainer import dataset_record
    if not state.is_ours:
        return state
    record, then = dataset_record(dataset), state.content["dataset"]
    if record["fingerprint"] == then["fingerprint"]:
        return state
    named_then = state.content["options"].get("data")
    if config.data == named_then:
        raise ValueError(f"{state.source}: the data set has changed since the run began "
                         f"({then['size']} images then, {record['size']} now)")
    if not override:
        raise UserError(
            f"{state.source}: the run to resume has other data: --data={config.data} "
            f"({named_then} in the state; {then['size']} images then, {record['size']} now); give "
            "the state's data, or --override-options to change them", BAD_USAGE)
    return dataclasses.replace(state, content={**state.content, "dataset": record})


# ---------------------------------------------------------------------------- which weights


def open_weights(source: str, net: "Precond", dataset: "ImageFolderDataset | None" = None
                 ) -> Weights:
    """Returns the averaged weights of a snapshot or state whose names and shapes `net` also has.

    `net` may be on the "meta" device. Weights that do not fit start as in a new run. If the file
    records another scale than that of the training data, a warning is printed.

    Raises:
        ValueError: not a checkpoint, no parameter fits, or the condition is scaled differently.
        OSError: it can't be read.
    """
    from checkpoints import checkpoint
    from torch_utils import distributed
    theirs = distributed.run_on_rank0(lambda: checkpoint.as_snapshot(checkpoint.load(source)))
    _check_condition(source, theirs["network"], net)
    if dataset is not None:
        _warn_of_scale(source, theirs, dataset)
    return fitting_weights(source, theirs["ema"], net)


def _check_condition(source: str, theirs: dict[str, Any], net: "Precond") -> None:
    """Raises ValueError if only one of the networks multiplies conditions by c_in."""
    is_scaled = theirs.get("cond_c_in", False)
    if theirs.get("cond_channels") and net.cond_channels and is_scaled != net.cond_c_in:
        how, what = ("multiplied by c_in", "give --cond-c-in=1") if is_scaled else (
            "without c_in", "leave --cond-c-in out")
        raise ValueError(f"--transfer={source}: its network sees the condition {how}; {what}")


def _warn_of_scale(source: str, theirs: dict[str, Any], dataset: "ImageFolderDataset") -> None:
    """Warns if a network was trained on data of another scale."""
    from sampling.network_sampler import recorded_scaling
    from torch_utils import distributed
    for name, flag, key, channels, ours in (
            ("images", "--scale", "scale", "img_channels", dataset.scaling),
            ("condition images", "--cond-scale", "cond_scale", "cond_channels",
             dataset.cond_scaling)):
        count = theirs["network"].get(channels)
        known = recorded_scaling(theirs, source, key, count) if count else None
        if known and ours and not (known.is_8bit or ours.is_8bit or known == ours):
            distributed.warn0(f"--transfer={source}: {known} in the {name} that it was trained on, "
                              f"but {ours} in those of --data; if both are the same kind of data, "
                              f"convert them with the same {flag} of dataset_tool.py")


def fitting_weights(source: str, theirs: dict[str, "torch.Tensor"], net: "torch.nn.Module"
                    ) -> Weights:
    """Returns those of the weights `theirs` whose names and shapes `net` also has.

    U-Nets name weights by the image size of their level. If both have the same number of levels,
    levels are matched by position, because a network for larger patches has the same weights.

    Raises:
        ValueError: no parameter fits.
    """
    from torch_utils import distributed
    ours = net.state_dict()
    theirs = _with_sizes_of(theirs, ours)
    left_out = []
    for name in ours | theirs:
        there, here = (f"{list(t[name].shape)}" if name in t else "none" for t in (theirs, ours))
        if there != here:
            left_out.append(f"{name} ({there} there, {here} here)")
    fitting = {name: tensor for name, tensor in theirs.items()
               if name in ours and tensor.shape == ours[name].shape}
    sizes = {name: p.numel() for name, p in net.named_parameters()}
    share = sum(size for name, size in sizes.items() if name in fitting) / sum(sizes.values())
    if not share:
        raise ValueError(f"--transfer={source}: none of its weights fits this network (first: "
                         f"{left_out[0]}); give the options of its architecture")
    if share < _SMALL_SHARE:
        distributed.warn0(f"--transfer={source}: only {100 * share:.2g}% of this network's "
                          "parameters are transferred; the others start at random")
    return Weights(source, fitting, tuple(left_out), share)


def _with_sizes_of(theirs: dict[str, "torch.Tensor"], ours: Iterable[str]
                   ) -> dict[str, "torch.Tensor"]:
    """Returns weights under the names that their levels have in a network of another size."""
    sizes = [sorted({found[0] for name in names if (found := _LEVEL_SIZE.search(name))},
                    key=lambda size: math.prod(map(int, size.split("x"))))
             for names in (theirs, ours)]
    if len(sizes[0]) != len(sizes[1]):
        return theirs
    renamed = dict(zip(*sizes, strict=True))
    return {_LEVEL_SIZE.sub(lambda found: renamed[found[0]], name): tensor
            for name, tensor in theirs.items()}


# ---------------------------------------------------------------------------- into the trainer


def restore_(trainer: "Trainer", state: State) -> None:
    """Continues from a training state; call it before `trainer.start`.

    Raises:
        ValueError: it belongs to another network; names the first difference.
    """
    check_network(trainer.net, state)
    content = state.content
    if not state.is_ours:
        _restore_foreign_(trainer, state)
        return
    trainer.net.load_state_dict(content["net"])
    trainer.ema.load_state_dict(content["ema"])
    _load_moments_(trainer.optimizer, content["optimizer"],
                   _moments_scale(trainer.config.to_dict()),
                   then=_moments_scale(content["options"]))
    trainer.objective.load_networks(content)
    if trainer.objective.auxiliary:
        _load_moments_(trainer.objective.auxiliary.optimizer, content["auxiliary_optimizer"],
                       trainer.config.ls, then=content["options"].get("ls"))
    progress = content["progress"]
    trainer.cur_nimg = progress["cur_nimg"]
    trainer.ema_rampup = progress["ema_rampup"]
    trainer.best_score = progress.get("best_score")
    trainer.best_score_of = progress.get("best_score_of")
    trainer.unfinished = progress.get("unfinished")
    counters = {name: value.to(trainer.device) for name, value in progress["counters"].items()}
    if trainer.dynamic_scale:
        if type(trainer.config).from_dict(content["options"]).has_dynamic_scale:
            trainer.loss_scale = progress["loss_scale"].to(trainer.device)
        else:  # the scale starts as in a new run
            counters["good_since_change"].zero_()
    trainer.counters = counters


def _moments_scale(options: dict[str, Any]) -> float | None:
    """Returns the loss scale of the moments of the network that is sampled; RAdam's have none."""
    return None if options.get("optim") == "radam" else options.get("ls")


def check_network(net: "torch.nn.Module", state: State) -> None:
    """Raises ValueError if a state does not belong to `net`, which may be on "meta"."""
    from checkpoints import checkpoint
    # The dtype follows --precision of this run, not of the one that wrote the state.
    skip = {"use_fp16"}
    if not state.content.get("D_recorded", True):
        skip |= {"pfgmpp", "D"}
    ours, theirs = net.config, state.content["network"]
    if state.is_ours:
        skip.add("dropout")  # an option without weights, see `changed_options`
    else:
        # Foreign files spell out what ours leave at its default, and vice versa. Keywords of
        # conditions are always spelled out.
        skip |= (set(ours) ^ set(theirs)) - {"cond_channels", "cond_c_in"}
    difference = checkpoint.first_difference(
        *({k: v for k, v in config.items() if k not in skip} for config in (ours, theirs)))
    if difference:
        flag = _FLAGS.get(difference.partition(":")[0])
        difference = f"{flag}; {difference}" if flag else difference
        raise ValueError(
            f"{state.source}: the state is of another network ({difference}); give the options "
            "that it was trained with, or start a new run under another --name")
    if not state.is_ours:  # its configuration may lack keywords of ours
        weights = state.content.get("net") or state.content["ema"]
        shapes = ({name: list(t.shape) for name, t in tensors.items()}
                  for tensors in (net.state_dict(), weights))
        if difference := checkpoint.first_difference(*shapes):
            raise ValueError(
                f"{state.source}: the weights are of another network ({difference}); give the "
                "options that it was trained with, such as --augment and --ares")


def _restore_foreign_(trainer: "Trainer", state: State) -> None:
    """Continues from a state of EDM or PFGM++, and says what can't be restored."""
    from torch_utils import distributed
    from training.ema import RAMPUP_RATIO
    content, source = state.content, state.source
    weights = content.get("net") or content["ema"]
    trainer.net.load_state_dict(weights)
    trainer.ema.load_state_dict(content["ema"] or weights)
    _load_moments_(trainer.optimizer, content["optimizer"], trainer.config.ls,
                   then=content["options"].get("ls"))
    nimg, tag = content["progress"]["cur_nimg"], _STATE_TAG.match(Path(source).name)
    trainer.cur_nimg = nimg if nimg is not None else int(tag[1]) * 1000 if tag else 0
    trainer.ema_rampup = RAMPUP_RATIO  # as in EDM and PFGM++, by the images seen
    lost = ["random state", "data position"] + ([] if content["ema"] else ["averaged weights"])
    distributed.print0(
        f"Note: {source} does not hold {', '.join(lost)}; the run continues at "
        f"{trainer.cur_nimg / 1000:g} kimg with the draws and data order of its own seed")
    if "ema_source" in content:
        distributed.print0(f"Note: the averaged weights are those of {content['ema_source']}")
    elif not content["ema"]:
        distributed.print0("Note: there is no network-snapshot of the same number beside it, so "
                           "the average restarts from the plain weights")


def _load_moments_(
    optimizer: "torch.optim.Optimizer", stored: dict[str, Any], now: float | None, *,
    then: float | None,
) -> None:
    """Loads an optimizer's state, each moment in its parameter's layout and this run's loss scale.

    Fused Adam pairs elements by their place in memory, and files may hold other strides than those
    of the channels-last weights. `then` and `now` are the loss scales of the stored moments and of
    this run; None stands for unscaled gradients, as with a dynamic scale.
    """
    import torch
    optimizer.load_state_dict(optimizer.state_dict() | {"state": stored["state"]})
    ratio = (now or 1.0) / (then or 1.0)
    for parameter, moments in optimizer.state.items():
        for name, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
            moments[name] = torch.empty_like(parameter).copy_(moments[name]).mul_(ratio**power)
