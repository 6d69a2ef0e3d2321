"""Images that a network has made, in memory: in its scale, in the data's units, or as pictures."""

import dataclasses
import io
import math
from collections.abc import Sequence

import numpy as np
import PIL.Image
import torch

from images.grid import square_grid
from images.scaling import Scaling, display_window
from pfgmpp.samplers import SampleBatch

_MAX_SHOWN = 64  # images in the picture that a notebook shows


@dataclasses.dataclass(frozen=True)
class Samples:
    """Images by seed, all of one size.

    Attributes:
        seeds: the seed of each image.
        images: images in the network's scale, about [-1, 1], [B, C, H, W] float64 on the CPU.
        labels: labels given to the network, [B, label_dim] float32; None without labels.
        scaling: of the data that the network was trained on.
        classes: class number of each image; None if labels are not classes.
        class_names: names of the classes; () without names.
        deviations: standard deviations, in the form of `images`, if images are means of samples;
            otherwise None.
    """

    seeds: tuple[int, ...]
    images: torch.Tensor
    labels: torch.Tensor | None
    scaling: Scaling
    classes: tuple[int, ...] | None = None
    class_names: tuple[str, ...] = ()
    deviations: torch.Tensor | None = None

    @classmethod
    def of_batches(cls, batches: Sequence[SampleBatch], scaling: Scaling, *, have_classes: bool,
                   class_names: Sequence[str]) -> "Samples":
        """Returns the images of all batches, in their order."""
        def joined(name: str) -> torch.Tensor | None:
            parts = [getattr(batch, name) for batch in batches]
            return None if parts[0] is None else torch.cat([part.cpu() for part in parts])

        labels = joined("class_labels")
        classes = tuple(labels.argmax(dim=1).tolist()) if have_classes else None
        seeds = tuple(seed for batch in batches for seed in batch.seeds)
        return cls(seeds, joined("images"), labels, scaling, classes, tuple(class_names),
                   joined("deviations"))

    def __len__(self) -> int:
        return len(self.images)

    def data(self) -> torch.Tensor:
        """Returns the images as generate.py writes them: uint8, or float32 in the data's units."""
        return self.scaling.to_data(self.images)

    def uint8(self, window: tuple[float, float] | None = None) -> torch.Tensor:
        """Returns the images for display, [B, C, H, W] from black to white.

        Args:
            window: center and width, in the data's units, of the values from black to white. None
                shows what the network sees as -1 to 1.
        """
        shown = self.scaling if window is None else _window(window)
        return torch.from_numpy(shown.to_picture(self.data().numpy()))

    def pil(self, window: tuple[float, float] | None = None) -> list[PIL.Image.Image]:
        """Returns `uint8` as pictures: RGB for three channels, else the first channel in gray."""
        return [PIL.Image.fromarray(np.ascontiguousarray(
            image.transpose(1, 2, 0) if len(image) == 3 else image[0]))
            for image in self.uint8(window).numpy()]

    def grid(self, window: tuple[float, float] | None = None) -> PIL.Image.Image:
        """Returns all images in one picture.

        If all of up to 16 classes have equally many images, each class has rows of its own, which
        are labelled. Otherwise, the class is below each image.

        Raises:
            ValueError: there are no images.
        """
        if not len(self):
            raise ValueError("there are no images to show; give a slice that holds some")
        return square_grid(self.uint8(window).numpy(), self.classes, self.class_names)

    def __getitem__(self, part: slice) -> "Samples":
        """Returns a slice of the images."""
        if not isinstance(part, slice):
            raise TypeError(f"samples[{part!r}]: must be a slice, such as samples[:8]; get one "
                            "image with samples.images[0] or samples.pil()[0]")
        names = "seeds", "images", "labels", "classes", "deviations"
        rows = {name: values[part] for name in names
                if (values := getattr(self, name)) is not None}
        return dataclasses.replace(self, **rows)

    def _repr_png_(self) -> bytes | None:
        """Returns the picture for a notebook, a grid of the first 64 images; None without any."""
        if not len(self):
            return None
        file = io.BytesIO()
        self[:_MAX_SHOWN].grid().save(file, "PNG")
        return file.getvalue()

    def __repr__(self) -> str:
        count, *shape = self.images.shape
        return f"Samples({count} images {'x'.join(map(str, shape))})"


def _window(window: tuple[float, float]) -> Scaling:
    """Returns the scaling that shows a window. Raises ValueError unless it is one."""
    try:
        center, width = map(float, window)
    except (TypeError, ValueError):
        center = width = math.nan
    if not (math.isfinite(center) and 0 < width < math.inf):
        raise ValueError(f"window={window!r}: must be two numbers, a center and a width above 0")
    return display_window(center, width)
