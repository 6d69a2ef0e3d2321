"""Which operations of a program wait for the device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class HostReads(TorchDispatchMode):
    """Collects the operations that wait for a device to tell the host a value or a size."""

    NAMES = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique",
             "repeat_interleave", "histc", "bincount")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1])
        if by_mask or name.startswith(self.NAMES):
            self.found.append(name)
        return func(*args, **(kwargs or {}))
