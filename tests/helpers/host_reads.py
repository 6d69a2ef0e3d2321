"""Which operations of a program wait for the device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_NAMES = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique",
          "_unique", "repeat_interleave", "histc", "bincount", "_linalg_check_errors")


def waits_for_device(func, args) -> bool:
    """Whether the host can't go on before the device has told it a value or a size."""
    name = func.overloadpacket.__name__
    by_mask = name in ("index", "index_put", "index_put_") and any(
        index is not None and index.dtype == torch.bool for index in args[1])
    return by_mask or name.startswith(_NAMES)


class HostReads(TorchDispatchMode):
    """Collects the operations that wait for a device to tell the host a value or a size."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if waits_for_device(func, args):
            self.found.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
