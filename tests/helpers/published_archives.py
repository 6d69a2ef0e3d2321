"""Makes archives in the formats in which CIFAR-10, MNIST and LSUN are published, of any size."""

import gzip
import io
import struct
import tarfile

import numpy as np

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
                   "truck"]
FOLDER = "cifar-10-batches-py"


def pickle_of_python2(value):
    """Returns a pickle of protocol 2 as Python 2 wrote it: texts are bytes, arrays hold a text."""
    return b"\x80\x02" + _python2(value) + b"."


def _python2(value):
    if isinstance(value, str):
        return b"U" + bytes([len(value)]) + value.encode()
    if isinstance(value, int):
        return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(_python2, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(_python2(x) for item in value.items() for x in item) + b"u"
    assert isinstance(value, np.ndarray) and value.dtype == np.uint8
    shape = b"(" + b"".join(map(_python2, value.shape)) + b"t"
    dtype = (b"cnumpy\ndtype\n" + b"U\x02u1" + b"K\x00K\x01\x87R"
             b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb")
    data = value.tobytes()
    return (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
            b"(K\x01" + shape + dtype + b"\x89T" + struct.pack("<i", len(data)) + data + b"tb")


def write_tar(path, members):
    """Writes {name: bytes or TarInfo} as a .tar.gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wb", 1) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members.items():
            info = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(data, bytes):
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data) if isinstance(data, bytes) else None)
    return path


def cifar10_members(images, labels, dump=pickle_of_python2):
    """Returns the members of CIFAR-10's archive, in the order in which it has them."""
    batches = zip(np.array_split(images, 5), np.array_split(labels, 5), strict=True)
    members = {f"data_batch_{i}": dump({
        "batch_label": f"training batch {i} of 5", "labels": numbers.tolist(),
        "data": pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1),
        "filenames": [f"{k}.png" for k in range(len(pixels))],
    }) for i, (pixels, numbers) in enumerate(batches, 1)}
    members["test_batch"] = b"not looked at"
    members["readme.html"] = b"<meta>"
    members["batches.meta"] = dump({"num_cases_per_batch": 10000, "num_vis": 3072,
                                    "label_names": CIFAR10_CLASSES})
    order = ["data_batch_4", "readme.html", "test_batch", "data_batch_3", "batches.meta",
             "data_batch_2", "data_batch_5", "data_batch_1"]
    return {f"{FOLDER}/{name}": members[name] for name in order}


def write_cifar10(path, images, labels):
    """Writes images [n, 32, 32, 3] and class numbers as cifar-10-python.tar.gz."""
    folder = tarfile.TarInfo(FOLDER)
    folder.type = tarfile.DIRTYPE
    return write_tar(path, {FOLDER: folder, **cifar10_members(images, labels)})


def idx(values):
    """Returns an array of bytes as an IDX file."""
    header = struct.pack(f">{1 + values.ndim}I", 0x800 + values.ndim, *values.shape)
    return header + values.tobytes()


def write_mnist(folder, images, labels):
    """Writes images [n, 28, 28] and class numbers; returns the path of the images."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx(images), 1))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress(idx(labels.astype(np.uint8)), 1))
    return path


def write_lmdb(path, values):
    """Writes {key: bytes} as an LMDB database."""
    import lmdb

    path.parent.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(path), map_size=1 << 26) as database, database.begin(write=True) as writer:
        for key, value in values.items():
            writer.put(key.encode(), value)
    return path
