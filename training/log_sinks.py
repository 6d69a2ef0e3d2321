"""Where a run's numbers and pictures go besides its own files: TensorBoard, Weights & Biases.

    tensorboard   RUN_DIR/tensorboard, in which one step is one image
    wandb         a run of project $WANDB_PROJECT or 'pfgmpp'. A resumed run continues it, by the id
                  in RUN_DIR/wandb-id.txt. WANDB_MODE=offline needs no network

Only rank 0 has sinks. A sink that fails is given up with one warning, and training continues:
everything it would receive is in stats.jsonl and samples-*.png.
"""

import contextlib
import importlib.util
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import PIL.Image

from dnnlib import console
from torch_utils import distributed
from training.config import TrainConfig


class Sink(Protocol):
    """A destination for the numbers and pictures of one run."""

    def scalars(self, values: dict[str, float], nimg: int) -> None:
        """Takes the numbers of a tick, by their names in stats.jsonl, after `nimg` images."""

    def picture(self, name: str, image: PIL.Image.Image, nimg: int) -> None:
        """Takes a picture."""

    def close(self) -> None:
        """Waits until everything is written."""


class _TensorBoard:
    def __init__(self, run_dir: Path, config: TrainConfig, nimg: int):
        from torch.utils.tensorboard import SummaryWriter
        # Discards what a killed run wrote after the state from which it continues.
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=nimg + 1)

    def scalars(self, values: dict[str, float], nimg: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, nimg)
        self._writer.flush()

    def picture(self, name: str, image: PIL.Image.Image, nimg: int) -> None:
        import numpy as np
        pixels = np.asarray(image.convert("RGB"))
        self._writer.add_image(name, pixels, nimg, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run_dir: Path, config: TrainConfig, nimg: int):
        import wandb
        if console.is_quiet():
            os.environ.setdefault("WANDB_SILENT", "true")
        id_file = run_dir / "wandb-id.txt"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
        self._picture = wandb.Image
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "pfgmpp"), name=run_dir.name, dir=str(run_dir),
            id=id_file.read_text(encoding="utf-8").strip(), resume="allow",
            config=config.to_dict())
        # wandb's own steps can't go back, but a killed run does when it resumes.
        self._run.define_metric("*", step_metric="Progress/kimg")

    def scalars(self, values: dict[str, float], nimg: int) -> None:
        self._run.log({"Progress/kimg": nimg / 1e3, **values})

    def picture(self, name: str, image: PIL.Image.Image, nimg: int) -> None:
        self._run.log({"Progress/kimg": nimg / 1e3, name: self._picture(image)})

    def close(self) -> None:
        self._run.finish()


_SINKS: dict[str, Callable[[Path, TrainConfig, int], Sink]] = {
    "tensorboard": _TensorBoard, "wandb": _Wandb}


def check_available(names: Sequence[str]) -> None:
    """Raises ValueError if the package of a sink is not installed, without importing it."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"--log={','.join(names)}: not installed; run pip install "
                         f"{' '.join(missing)}, or give --log= for none")


class LogSinks:
    """The sinks that `config.log` names, for a run that has seen `nimg` images; only on rank 0."""

    def __init__(self, config: TrainConfig, run_dir: Path, nimg: int):
        self._sinks: dict[str, Sink] = {}
        for name in config.log if distributed.get_rank() == 0 else ():
            with self._given_up_on_error(name):
                self._sinks[name] = _SINKS[name](run_dir, config, nimg)

    def scalars(self, values: dict[str, float], nimg: int) -> None:
        """Sends the numbers of a tick."""
        self._each(lambda sink: sink.scalars(values, nimg))

    def picture(self, name: str, image: PIL.Image.Image, nimg: int) -> None:
        """Sends a picture."""
        self._each(lambda sink: sink.picture(name, image, nimg))

    def close(self) -> None:
        """Waits until everything is written."""
        self._each(lambda sink: sink.close())
        self._sinks = {}

    def _each(self, send: Callable[[Sink], Any]) -> None:
        for name, sink in list(self._sinks.items()):
            with self._given_up_on_error(name):
                send(sink)

    @contextlib.contextmanager
    def _given_up_on_error(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # third-party code may raise anything; training continues
            self._sinks.pop(name, None)
            words = " ".join(f"{type(error).__name__}: {error}".split())
            distributed.warn0(f"--log={name} given up: {words}; training continues, and its "
                              "numbers are in stats.jsonl")
