"""Sources of images, and what dataset_tool.py makes of them."""

import io
import json
import zipfile

import numpy as np
import PIL.Image
from click.testing import CliRunner
from scripts import ROOT

from dataset_tool import main

EMOJI = ROOT / "examples/emoji-google-32.zip"


def random_pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encode(image, suffix="png", **kwargs):
    if isinstance(image, np.ndarray):
        image = PIL.Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, suffix, **kwargs)
    return file.getvalue()


def write_source(path, files):
    """Writes {name: bytes or pixels} as a folder, or as a ZIP if the path says so."""
    files = {name: data if isinstance(data, bytes) else encode(data)
             for name, data in files.items()}
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        path.mkdir(exist_ok=True)
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return path


def labels_json(labels):
    return json.dumps({"labels": labels}).encode()


def run(source, dest, *args):
    return CliRunner().invoke(main, [f"--source={source}", f"--dest={dest}", "--workers=1", *args])


def convert(source, dest, *args):
    """Returns ([(name, pixels)], labels) of a conversion that must succeed."""
    result = run(source, dest, *args)
    assert result.exit_code == 0, result.output
    with zipfile.ZipFile(dest) as archive:
        names = archive.namelist()
        assert names[-1] == "dataset.json"
        images = [(name, np.asarray(PIL.Image.open(archive.open(name)))) for name in names[:-1]]
        return images, json.loads(archive.read("dataset.json"))["labels"]


def assert_refused(result, tmp_path, *texts, exit_code=1, kept=()):
    """Checks exit code and message, and that nothing but `kept` was left in the `out` folder."""
    assert result.exit_code == exit_code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    line = result.output.strip().splitlines()[-1]
    assert line.startswith("Error: ")
    for text in texts:
        assert text in line
    out = tmp_path / "out"
    assert not out.exists() or sorted(path.name for path in out.iterdir()) == sorted(kept)


def flat(value, size=4):
    return np.full([size, size], value, np.uint8)


def gray_value(pixels):
    return int(pixels.flat[0])
