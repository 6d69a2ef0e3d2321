"""A data set on the device gives what it gives by itself."""

import numpy as np
import pytest
import torch
from tiny import TINY_RUN, write_dataset

import train
from checkpoints.checkpoint import digest, load
from images.dataset import ImageFolderDataset
from training import device_data
from training.device_data import DeviceData

CPU = torch.device("cpu")
ORDER = [[0, 5, 3], [11, 12, 23], [4, 4, 20]]  # with mirrored copies, from 12 on


@pytest.mark.parametrize("kind", ["labels", "vectors", "uint16", "float32"])
def test_batches_are_those_of_the_data_set(tmp_path, kind):
    options = {"use_labels": True, "xflip": True, "cache": True}
    if kind in ("labels", "vectors"):
        path = write_dataset(tmp_path / "data.zip", num=12)
        options["use_labels"] = kind == "labels"
    else:
        path, rng = tmp_path, np.random.default_rng(0)
        for name in ("x", "cond/x"):
            for i in range(12):
                file = tmp_path / f"{name}{i:02d}.npy"
                file.parent.mkdir(exist_ok=True)
                np.save(file, rng.integers(0, 60000, [2, 4, 6]).astype(kind))
        options |= {"use_labels": False, "use_conditions": True}
    dataset = ImageFolderDataset(path, **options)
    data = DeviceData(dataset, CPU)
    for indices in ORDER:
        found, expected = data.get_batch(indices), dataset.get_batch(indices)
        assert len(found) == len(expected)
        for tensor, array in zip(found, expected, strict=True):
            assert tensor.dtype == torch.from_numpy(array).dtype
            assert np.array_equal(tensor.numpy(), array)


@pytest.mark.long
def test_training_is_the_same_to_the_bit(dataset_zip, tmp_path, invoke):
    weights = []
    for name in ("0", "1"):
        result = invoke(train.main, f"--outdir={tmp_path}", f"--data={dataset_zip}", *TINY_RUN,
                        "--xflip=1", "--duration=0.00004", f"--data-on-device={name}",
                        f"--name={name}")
        assert result.exit_code == 0, result.output
        [*_, state] = sorted((tmp_path / name).glob("training-state-*.pt"))
        weights.append(digest(load(state)["net"]))
    assert weights[0] == weights[1]


def test_without_the_packed_file_there_is_nothing_to_copy(dataset_zip, tmp_path, invoke):
    result = invoke(train.main, f"--outdir={tmp_path / 'run'}", f"--data={dataset_zip}",
                    "--data-on-device=1", "--cache=0")
    assert result.exit_code == 2 and "--data-on-device=1 with --cache=0" in result.output


@pytest.mark.parametrize("device, memory, packed, expected", [
    ("cuda", 16 * 12 * 192, True, True), ("cuda", 16 * 12 * 192 - 16, True, False),
    ("cuda", 1 << 40, False, False), ("cpu", 1 << 40, True, False)])
def test_data_go_to_a_gpu_where_they_are_a_small_part_of_it(tmp_path, monkeypatch, device, memory,
                                                            packed, expected):
    class Properties:
        total_memory = memory
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    dataset = ImageFolderDataset(write_dataset(tmp_path / "data.zip", num=12), cache=packed)
    assert np.prod(dataset.image_shape) == 192
    assert device_data.fits_by_itself(dataset, torch.device(device)) == expected
