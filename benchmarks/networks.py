"""Training steps and network evaluations: ours, an older commit's, a reference checkout's.

All sides have the same weights and, for an evaluation, the same input. One network evaluation
represents sampling, because it takes all but a few thousandths of its time.

A training step includes everything: draws, augmentation, loss, gradients, Adam and the average of
the weights. Ours reads its images through the loader, as in training. The reference gets a tensor.
"""

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

# Settings of a step other than the network, with EDM's defaults.
_AUGMENT = {"p": 0.12, "xflip": 1e8, "yflip": 1, "scale": 1, "rotate_frac": 1, "aniso": 1,
            "translate_frac": 1}
_NUM_IMAGES = 256  # images of the data set
_PERTURBED = 0.02  # size of the perturbation of initial weights, some of which are nearly zero


# --------------------------------------------------------- cases, run inside a side's own process

class _Evaluation:
    """One evaluation D(x; sigma) without gradients."""

    def __init__(self, settings: dict[str, Any]):
        self._device = torch.device(settings["device"])
        self._net = self.build(settings["network"])
        self._net.load_state_dict(torch.load(f"{settings['folder']}/weights.pt", weights_only=True))
        self._net.eval().requires_grad_(False).to(self._device)
        self.prepare(settings)
        rng = torch.Generator().manual_seed(0)
        shape = [settings["batch"], settings["network"]["img_channels"],
                 *[settings["network"]["img_resolution"]] * 2]
        self._x = torch.randn(shape, generator=rng).to(self._device)
        self._sigma = torch.full([len(self._x)], 0.7, device=self._device)

    def prepare(self, settings: dict[str, Any]) -> None:
        """Applies the settings for the side's precision."""

    @torch.inference_mode()
    def run(self) -> None:
        self._output = self._net(self._x, self._sigma)

    def save(self, path: str) -> None:
        """Writes the output of the last run."""
        torch.save(self._output.clone().cpu(), path)


class OurEvaluation(_Evaluation):
    """An evaluation with pfgmpp/networks.py."""

    def build(self, config: dict[str, Any]) -> torch.nn.Module:
        from pfgmpp.networks import build_network
        return build_network(config)

    def prepare(self, settings: dict[str, Any]) -> None:
        from torch_utils.misc import compute_dtype, configure_backends
        configure_backends(settings["precision"])
        self._net.compute_dtype = compute_dtype(settings["precision"])
        if settings["compile"]:
            self._net.model.compile()


class TheirEvaluation(_Evaluation):
    """An evaluation with the reference's class of the same name and keywords."""

    def build(self, config: dict[str, Any]) -> torch.nn.Module:
        return _their_network(config)

    def prepare(self, settings: dict[str, Any]) -> None:
        self._net.use_fp16 = settings["precision"] == "fp16"
        torch.backends.cudnn.benchmark = True


class OurStep:
    """`Trainer.train_step` of ours or of an older commit."""

    def __init__(self, settings: dict[str, Any]):
        from images.dataset import ImageFolderDataset
        from torch_utils.misc import configure_backends
        from training.config import TrainConfig
        try:
            from training.trainer import Trainer
        except ImportError:  # older commits had no separate file for Trainer
            from training.training_loop import Trainer
        device, data = torch.device(settings["device"]), f"{settings['folder']}/data.zip"
        os.environ["PFGMPP_CACHE_DIR"] = settings["folder"]
        configure_backends(settings["precision"])
        config = TrainConfig(
            data=data, batch=settings["batch"], arch=settings["arch"], seed=0,
            precision=settings["precision"], compile="1" if settings["compile"] else "0",
            workers=1)
        self._trainer = Trainer(config, ImageFolderDataset(data, cache=True), device)
        weights = torch.load(f"{settings['folder']}/weights.pt", weights_only=True)
        for net in (self._trainer.net, self._trainer.ema):
            net.load_state_dict(weights)
        self._trainer.start()

    def run(self) -> None:
        self._trainer.train_step()

    def save(self, path: str) -> None:
        """Writes the gradients of the last step."""
        torch.save(torch.cat([p.grad.flatten().float().cpu()
                              for p in self._trainer.net.parameters()]), path)

    def close(self) -> None:
        """Releases what must end before the process group."""
        self._trainer.close()

    def busy(self, steps: int) -> float:
        """Returns the share of time in which the GPU computed during `steps` steps."""
        import time

        from torch.profiler import ProfilerActivity, profile
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            start = time.perf_counter()
            for _ in range(steps):
                self._trainer.train_step()
            torch.cuda.synchronize()
            wall = time.perf_counter() - start
        spent = sum(event.self_device_time_total for event in recorded.key_averages())
        return spent / 1e6 / wall


class TheirStep:
    """The body of the reference's training loop, copied because it is not a function of its own.

    It uses the reference's modules, under the names that they have in EDM.
    """

    def __init__(self, settings: dict[str, Any]):
        import copy

        from training.augment import AugmentPipe
        from training.loss import EDMLoss
        self._device = torch.device(settings["device"])
        torch.backends.cudnn.benchmark = True
        self._net = _their_network({**settings["network"],
                                    "use_fp16": settings["precision"] == "fp16"})
        self._net.load_state_dict(torch.load(f"{settings['folder']}/weights.pt", weights_only=True))
        self._net.train().requires_grad_(True).to(self._device)
        self._ema = copy.deepcopy(self._net).eval().requires_grad_(False)
        self._loss, self._augment = EDMLoss(), AugmentPipe(**_AUGMENT)
        self._adam = torch.optim.Adam(self._net.parameters(), lr=1e-3, betas=(0.9, 0.999),
                                      eps=1e-8)
        side = settings["network"]["img_resolution"]
        self._images = torch.randint(256, [settings["batch"], 3, side, side], dtype=torch.uint8)

    def run(self) -> None:
        self._adam.zero_grad(set_to_none=True)
        images = self._images.to(self._device).to(torch.float32) / 127.5 - 1
        labels = torch.zeros([len(images), 0], device=self._device)
        loss = self._loss(net=self._net, images=images, labels=labels,
                          augment_pipe=self._augment)
        (loss.sum() / len(images)).backward()
        for parameter in self._net.parameters():
            torch.nan_to_num(parameter.grad, nan=0, posinf=1e5, neginf=-1e5, out=parameter.grad)
        self._adam.step()
        with torch.no_grad():
            for mean, parameter in zip(self._ema.parameters(), self._net.parameters(),
                                       strict=True):
                mean.copy_(parameter.lerp(mean, 0.99))


def _their_network(config: dict[str, Any]) -> torch.nn.Module:
    """Returns the reference's network; keywords that it lacks must have its fixed values."""
    from training import networks
    kwargs = {key: value for key, value in config.items()
              if key not in ("class_name", "pfgmpp", "D")}
    return getattr(networks, config["class_name"])(**kwargs)


# ------------------------------------------------------------------------------- the measurement

# Architecture, image side.
GPU_NETWORKS = (("ncsnpp", 32), ("ddpmpp", 32), ("ddpmpp", 64), ("adm", 64))
CPU_NETWORKS = GPU_NETWORKS[:2]


def training_rows(options):
    """Yields the training steps of every architecture on every side."""
    for arch, side in _networks(options):
        yield from _rows("training", arch, side, options)


def sampling_rows(options):
    """Yields the evaluations of every architecture on every side."""
    for arch, side in _networks(options):
        yield from _rows("sampling", arch, side, options)


def _networks(options) -> Sequence[tuple[str, int]]:
    return options.networks or (GPU_NETWORKS if options.device.type == "cuda" else CPU_NETWORKS)


def _sides(kind, options) -> dict[str, tuple[Path, str, str, bool]]:
    """Returns root, case, precision and whether to compile, by name of the side."""
    from benchmarks.sides import ROOT

    case = {"training": "Step", "sampling": "Evaluation"}[kind]
    variants = [(precision, False) for precision in options.precisions]
    if options.compiled:
        variants += [(precision, True) for precision in options.precisions]
    places = [("ours", ROOT)] + ([options.commit] if options.commit else [])
    sides = {" ".join([name, precision, *["compiled"] * compiled]):
             (root, f"Our{case}", precision, compiled)
             for name, root in places for precision, compiled in variants}
    if options.reference:
        sides["reference fp32"] = options.reference, f"Their{case}", "fp32", False
        if options.device.type == "cuda":
            sides["reference fp16"] = options.reference, f"Their{case}", "fp16", False
    return sides


def _rows(kind, arch, side, options):
    """Returns the rows of one network; a side that can't run is reported and left out."""
    import contextlib

    from benchmarks.sides import Side, SideError
    from benchmarks.table import Row, relative_error, with_ratios
    from training.estimate import Estimate

    config = network(arch, side)
    estimate = Estimate.of_network(config)
    flops = options.batch * (estimate.training_flops if kind == "training" else
                             estimate.forward_flops)
    what = f"{kind}, {arch} {side}x{side}, batch {options.batch}"
    sides, rows = _sides(kind, options), []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        common = {"network": config, "arch": arch, "batch": options.batch, "folder": folder,
                  "device": options.device.type, "side": side}
        write_inputs(common)
        running = {}
        for name, (root, case, precision, compiled) in sides.items():
            settings = {**common, "precision": precision, "compile": compiled}
            try:
                start = time.perf_counter()
                process = Side(root, Path(__file__), case, settings, options.threads)
                stack.enter_context(process)
                process.run()  # warms up
                print(f"{what}, {name}: ready after {time.perf_counter() - start:.0f} s",
                      file=sys.stderr)
                if case != "TheirStep":  # its random draws differ
                    process.call("save", f"{folder}/{name}.out")
                process.run()
                running[name] = process
            except SideError as error:
                print(f"{what}, {name}: left out: {error}", file=sys.stderr)
        seconds = {name: [] for name in running}
        for _ in range(options.repeats):
            for name, process in running.items():
                seconds[name].append(process.run())
        for name, process in running.items():
            found, exact = Path(folder, f"{name}.out"), Path(folder, "ours fp32.out")
            row = Row(what, name, seconds[name], options.batch, flops, sides[name][2],
                      process.peak_mb())
            if found != exact and found.exists() and exact.exists():
                row.error = relative_error(*(torch.load(path, weights_only=True)
                                             for path in (found, exact)))
            if options.device.type == "cuda" and sides[name][1] == "OurStep":
                row.note = f"GPU busy {100 * process.call('busy', 5):.0f}%"
            rows.append(row)
    baseline = next((name for name in ("reference fp32", *reversed(sides))
                     if name in running), "")
    return with_ratios(rows, baseline)


def network(arch: str, side: int) -> dict[str, Any]:
    """Returns the configuration of a network."""
    from training.config import TrainConfig

    return TrainConfig(data="", arch=arch).network(side, 3, 0)


def write_inputs(common: dict[str, Any]) -> None:
    """Writes the initial weights of all sides, and a data set."""
    from benchmarks.reading import write_dataset
    from pfgmpp.networks import build_network

    torch.manual_seed(0)
    state = build_network(common["network"]).state_dict()
    for name, value in state.items():
        if not name.endswith(("resample_filter", "freqs")):
            value.add_(_PERTURBED * torch.randn_like(value))
    torch.save(state, f"{common['folder']}/weights.pt")
    write_dataset(Path(common["folder"], "data.zip"), _NUM_IMAGES, common["side"])
