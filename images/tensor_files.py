"""Images in a file of `torch.save`: one tensor [n, H, W], [n, C, H, W] or [n, H, W, C].

Only tensors and plain data are unpickled. The file is memory-mapped if its format allows it, so
that only one image at a time is in memory. PyTorch is imported when a file is opened.
"""

import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from images import array_files

if TYPE_CHECKING:
    import torch

SUFFIXES = (".pt", ".pth")
_TYPES = ("uint8", "uint16", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32",
          "float64")
_HOW = "save one tensor [n, H, W], [n, C, H, W] or [n, H, W, C] with torch.save"
_MAX_KEYS = 5  # in a message
# Exceptions that PyTorch has been seen to raise for damaged files, besides OSError.
_DAMAGE = (zipfile.BadZipFile, RuntimeError, MemoryError, EOFError, KeyError, IndexError,
           AttributeError, ValueError, TypeError, OverflowError, AssertionError,
           NotImplementedError, struct.error)


def open_stack(path: Path, layout: str | None = None) -> tuple[int, Callable[[int], np.ndarray]]:
    """Returns the number of images in a file, and a function that reads one of them as [C, H, W].

    Args:
        path: the file.
        layout: 'chw' or 'hwc', for images with three axes. None infers it from the shape.

    Raises:
        OSError: the file can't be read.
        ValueError: it does not hold one tensor of images, or their shape is ambiguous.
    """
    import torch

    tensor = _only_tensor(_load(path), path)
    if tensor.dtype == torch.bfloat16:  # the upper half of float32; NumPy has no such type
        halves = array_files.as_stack(tensor.view(torch.int16).numpy(), layout)
        return len(halves), lambda i: (halves[i].astype(np.int32) << 16).view(np.float32)
    stack = array_files.as_stack(tensor.numpy(), layout)
    return len(stack), lambda i: stack[i]


def _load(path: Path) -> Any:
    """Returns a file's content. Raises ValueError if it is damaged, or more than plain data."""
    import torch

    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"
    try:
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                if any(info.compress_type for info in archive.infolist()):
                    raise ValueError("is compressed, which torch would map as if it were not")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"holds {name[1]}, which is refused because it might run code" if name else \
            "is damaged, or not a file of torch.save"
        raise ValueError(f"{what}; {_HOW}") from error
    except _DAMAGE as error:
        raise ValueError(f"is damaged, or not a file of torch.save; {_HOW}") from error


def _only_tensor(content: Any, path: Path) -> "torch.Tensor":
    """Returns the tensor in a file. Raises ValueError if it holds anything else."""
    import torch

    if not isinstance(content, torch.Tensor):
        raise ValueError(f"holds {_shown(content)}; {_HOW}")
    name = str(content.dtype).removeprefix("torch.")
    if name not in _TYPES or content.layout != torch.strided:
        kind = name if content.layout == torch.strided else f"{name} ({content.layout})"
        raise ValueError(f"holds a tensor of {kind}; images must be of {', '.join(_TYPES)}")
    if content.numel() * content.element_size() > path.stat().st_size:
        raise ValueError(f"holds a tensor of shape {list(content.shape)}, but the file is "
                         "too small for it; save a copy: torch.save(x.clone(), ...)")
    return content.detach()


def _shown(content: Any) -> str:
    """Describes the content of a file in a few words."""
    if isinstance(content, dict):
        items = [f"{key!r} ({_kind(value)})" for key, value in content.items()]
    elif isinstance(content, list | tuple):
        items = [_kind(value) for value in content]
    else:
        return f"not a tensor but a value of type {type(content).__name__}"
    more = f" and {len(items) - _MAX_KEYS} more" if len(items) > _MAX_KEYS else ""
    return (f"not a tensor but a {type(content).__name__} of {len(items)}: "
            f"{', '.join(items[:_MAX_KEYS])}{more}")[:400]


def _kind(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"tensor {list(shape)}"
