"""A data set in the memory of the training device, from which batches are taken by index.

Nothing is read ahead. In a step, only image indices and labels are sent to the device.
"""

from collections.abc import Sequence

import numpy as np
import torch

from images.dataset import ImageFolderDataset

_SHARE = 1 / 16  # of a GPU's memory that data may take by default


def fits_by_itself(dataset: ImageFolderDataset, device: torch.device) -> bool:
    """Says whether a data set is packed and takes a small part of a GPU's memory."""
    if device.type != "cuda" or not dataset.is_packed:
        return False
    size = sum(array.nbytes for array in dataset.arrays)
    return size <= _SHARE * torch.cuda.get_device_properties(device).total_memory


class DeviceData:
    """Batches of a packed data set, equal to those that the data set itself reads."""

    def __init__(self, dataset: ImageFolderDataset, device: torch.device):
        self._dataset, self._device = dataset, device
        # 16-bit data use a signed type, which every operation supports.
        arrays = [array.view(np.int16) if array.dtype == np.uint16 else array
                  for array in dataset.arrays]
        self._arrays = [torch.from_numpy(np.array(array)).to(device) for array in arrays]
        self._dtypes = [torch.from_numpy(array[:0].copy()).dtype for array in dataset.arrays]

    def get_batch(self, indices: Sequence[int], offsets: np.ndarray | None = None
                  ) -> tuple[torch.Tensor, ...]:
        """Returns what the data set's own `get_batch` does, as tensors on the device."""
        rows, mirrored = self._dataset.locate(indices)
        if self._dataset.patch is None:
            chosen = self._send(rows)
            images, *conditions = (array.index_select(0, chosen) for array in self._arrays)
        else:
            places = self._send(np.stack([rows, *self._dataset.corners(mirrored, offsets).T]))
            images, *conditions = (self._patches(array, *places) for array in self._arrays)
        if mirrored.any():
            flips = self._send(mirrored)[:, None, None, None]
            images, *conditions = (torch.where(flips, array.flip(3), array)
                                   for array in (images, *conditions))
        images, *conditions = map(torch.Tensor.view, (images, *conditions), self._dtypes)
        return images, self._send(self._dataset.labels_of(rows)), *conditions

    def _patches(self, array: torch.Tensor, rows: torch.Tensor, y: torch.Tensor, x: torch.Tensor
                 ) -> torch.Tensor:
        """Returns patches [B, C, P, P] whose top left corners are at row y and column x."""
        along = torch.arange(self._dataset.patch, device=self._device)
        channels = torch.arange(array.shape[1], device=self._device)
        return array[rows[:, None, None, None], channels[:, None, None],
                     (y[:, None] + along)[:, None, :, None], (x[:, None] + along)[:, None, None]]

    def _send(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)
