"""DINOv2's class token: the network written out, resizing and positions, names, where weights lie.

The network is a small one with random weights, saved by transformers as the published one is.
"""

import hashlib
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from scripts import ROOT
from tiny import write_dataset

import dnnlib.util
import fid
from images.dataset import ImageFolderDataset
from metrics import dinov2
from metrics.detectors import build_detector, describe_detector, detector_class
from metrics.evaluator import Evaluator
from metrics.score_names import title
from metrics.scoring import check_scoring

if importlib.util.find_spec("transformers") is None:
    pytest.skip("needs transformers", allow_module_level=True)
from safetensors.torch import load_file, save_file  # noqa: E402 - comes with transformers

CONFIG = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
          "image_size": 518, "patch_size": 14}


def write_network(folder, seed=0, **changes):
    """Saves a network whose every part matters to its output; returns the folder."""
    from transformers import Dinov2Config, Dinov2Model  # late: it takes seconds
    network = Dinov2Model(Dinov2Config(**CONFIG | changes))
    rng = torch.Generator().manual_seed(seed)
    for name, value in network.named_parameters():
        spread = 1 / math.sqrt(value[0].numel()) if value.ndim > 1 else 0.3
        if "position" in name or "cls" in name:
            spread = 1.0
        value.data = torch.randn(value.shape, generator=rng) * spread + (value.ndim == 1)
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_network(tmp_path_factory.mktemp("dinov2") / "weights")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture(autouse=True)
def _no_cache_of_others(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv(dnnlib.util.CACHE_DIR_ENV, str(tmp_path / "cache"))


def random_images(*shape):
    return torch.from_numpy(np.random.RandomState(1).randint(0, 256, shape, dtype=np.uint8))


def relative_error(given, expected):
    return np.linalg.norm(np.asarray(given) - expected) / np.linalg.norm(expected)


# The network, written out


def cubic(x, a):
    """The cubic convolution kernel of Keys 1981."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def position_weights(size, sides, step):
    """Row i reads position (i + 1/2) step - 1/2 of `size` values, of which the ends go on."""
    weights = np.zeros([sides, size])
    for i in range(sides):
        position = (i + 0.5) * step - 0.5
        for tap in range(math.floor(position) - 1, math.floor(position) + 3):
            weights[i, min(max(tap, 0), size - 1)] += cubic(position - tap, -0.75)
    return weights


def resized(images):
    """What Pillow, an independent program, makes of floating-point images: not clipped."""
    return np.array([[PIL.Image.fromarray(channel.astype(np.float32)).resize(
        (224, 224), PIL.Image.Resampling.BICUBIC) for channel in image]
        for image in np.asarray(images)], dtype=np.float64)


def layer_norm(x, state, name):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def expected_features(folder, images):
    """The features in float64, by the names of the published file."""
    state = {name: value.double().numpy()
             for name, value in load_file(folder / "model.safetensors").items()}
    pixels = resized(images)
    pixels = np.broadcast_to(pixels, [len(pixels), 3, 224, 224]) / 255
    mean, deviation = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    patches = ((pixels - mean) / deviation).reshape(len(pixels), 3, 16, 14, 16, 14)
    patches = patches.transpose(0, 2, 4, 1, 3, 5).reshape(len(pixels), 256, -1)
    kernel = state["embeddings.patch_embeddings.projection.weight"]
    x = patches @ kernel.reshape(len(kernel), -1).T
    x += state["embeddings.patch_embeddings.projection.bias"]
    trained = state["embeddings.position_embeddings"][0]
    weights = position_weights(37, 16, 37 / 16.1)
    grid = np.einsum("iy,jx,yxd->ijd", weights, weights, trained[1:].reshape(37, 37, -1))
    x += grid.reshape(256, -1)
    first = state["embeddings.cls_token"][0] + trained[:1]
    x = np.concatenate([np.broadcast_to(first, [len(x), *first.shape]), x], axis=1)
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"encoder.layer.{i}."
        y = layer_norm(x, state, f"{layer}norm1")
        q, k, v = (linear(y, state, f"{layer}attention.attention.{name}")
                   .reshape(*y.shape[:2], CONFIG["num_attention_heads"], -1)
                   for name in ("query", "key", "value"))
        logits = np.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        attention = np.exp(logits - logits.max(-1, keepdims=True))
        attention /= attention.sum(-1, keepdims=True)
        y = np.einsum("bhqk,bkhd->bqhd", attention, v).reshape(x.shape)
        y = linear(y, state, f"{layer}attention.output.dense")
        x = x + y * state[f"{layer}layer_scale1.lambda1"]
        y = linear(layer_norm(x, state, f"{layer}norm2"), state, f"{layer}mlp.fc1")
        y = y * (1 + torch.erf(torch.from_numpy(y) / math.sqrt(2)).numpy()) / 2
        y = linear(y, state, f"{layer}mlp.fc2")
        x = x + y * state[f"{layer}layer_scale2.lambda1"]
    return layer_norm(x, state, "layernorm")[:, 0]


@pytest.mark.long
@pytest.mark.parametrize("shape", [(2, 3, 20, 28), (2, 1, 250, 300), (1, 3, 224, 224)])
def test_features_are_those_of_the_network_written_out(folder, shape):
    images = random_images(*shape)
    expected = expected_features(folder, images)
    detector = build_detector(f"dinov2:{folder}")
    assert relative_error(detector(images), expected) < 1e-5
    # transformers' own positions are another network.
    from transformers import Dinov2Model
    theirs = Dinov2Model.from_pretrained(folder).eval()
    mean, deviation = (torch.tensor(values)[:, None, None]
                       for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    x = torch.from_numpy(resized(images)).float().expand(-1, 3, -1, -1)
    with torch.no_grad():
        assert relative_error(theirs((x / 255 - mean) / deviation).pooler_output, expected) > 1e-3


@pytest.mark.long
def test_features_do_not_depend_on_the_batch(folder):
    images, detector = random_images(3, 3, 16, 16), build_detector(f"dinov2:{folder}")
    together = detector(images)
    assert together.dtype == torch.float32 and together.shape == (3, 32)
    alone = torch.cat([detector(image[None]) for image in images])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
    grey = images[:, :1]
    assert torch.equal(detector(grey), detector(grey.repeat(1, 3, 1, 1)))
    assert detector(images[:0]).shape == (0, 32) and detector.feature_dim == 32


@pytest.mark.long
def test_tf32_is_off_while_features_are_computed_and_as_before_after_it(folder, monkeypatch):
    matmul, cudnn, seen = torch.backends.cuda.matmul, torch.backends.cudnn, []
    network = dinov2.DinoV2(dinov2.find_weights(str(folder)))

    def watch(pixels):
        seen.append((matmul.allow_tf32, cudnn.allow_tf32))
        raise OSError("stop")

    monkeypatch.setattr(network, "_network", watch)
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        for given in (True, False):
            matmul.allow_tf32 = cudnn.allow_tf32 = given
            with pytest.raises(OSError, match="stop"):
                network(random_images(1, 3, 8, 8))
            assert (matmul.allow_tf32, cudnn.allow_tf32) == (given, given)
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
    assert seen == [(False, False)] * 2


# Resizing and positions


@pytest.mark.parametrize("height, width", [
    (32, 32), (512, 512), (100, 300), (224, 224), (1, 2)])
def test_images_are_resized_as_pillow_resizes_floats(height, width):
    images = random_images(2, 2, height, width)
    given = dinov2.resize(images.float())
    np.testing.assert_allclose(given, resized(images), atol=5e-3)  # weights in float32, of 255
    if (height, width) == (32, 32):
        assert given.min() < -1 and given.max() > 256 and (given % 1 != 0).any()


@pytest.mark.parametrize("trained, side", [(37, 16), (14, 16), (37, 14), (4, 7)])
def test_positions_are_read_by_a_scale_of_a_tenth_more(trained, side):
    embedding = torch.randn(1, 1 + trained**2, 5, generator=torch.Generator().manual_seed(0))
    given = dinov2.position_embedding(embedding, side)
    weights = position_weights(trained, side, trained / (side + 0.1))
    grid = np.einsum("iy,jx,yxd->ijd", weights, weights,
                     embedding[0, 1:].reshape(trained, trained, 5))
    np.testing.assert_allclose(given[0, 1:], grid.reshape(side**2, 5), atol=1e-5)
    assert torch.equal(given[:, 0], embedding[:, 0])


def test_an_embedding_of_ramps_tells_the_positions_that_are_read():
    y, x = np.mgrid[:37, :37]
    ramps = torch.from_numpy(np.stack([y, x], axis=-1).reshape(1, -1, 2).astype(np.float32))
    given = dinov2.position_embedding(torch.cat([torch.zeros(1, 1, 2), ramps], dim=1), 16)
    read = (np.arange(16) + 0.5) * 37 / 16.1 - 0.5
    # By the kernel, the value of a ramp at t between two pixels is t - (2a + 1) t (1 - t) (1 - 2t).
    off = 0.5 * math.sqrt(3) / 18
    inside = slice(1, 15)  # where no tap lies beyond the edge
    grid = given[0, 1:].reshape(16, 16, 2).numpy()
    assert 0.9 * off < abs(grid[inside, 0, 0] - read[inside]).max() < 1.001 * off
    np.testing.assert_allclose(grid[0, :, 1], grid[:, 0, 0], rtol=1e-6)


def test_an_embedding_of_the_right_size_is_taken_as_it_is():
    trained = torch.randn(1, 257, 3)
    assert torch.equal(dinov2.position_embedding(trained, 16), trained)


# Names


@pytest.mark.long
def test_other_weights_are_called_by_their_hash(folder, tmp_path):
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    detector = build_detector(f"dinov2:{folder}")
    assert detector.weights_sha256 == digest and detector.name == f"dinov2:{digest[:16]}"
    assert (detector.name, detector.distance_name) == describe_detector(f"dinov2:{folder}")
    assert detector.distance_name == "Frechet distance by other DINOv2 weights"
    other = write_network(tmp_path / "other", seed=1)
    assert describe_detector(f"dinov2:{other}")[0] != detector.name


@pytest.mark.long
def test_the_published_weights_are_known_wherever_they_lie(copy, monkeypatch):
    digest = hashlib.sha256((copy / "model.safetensors").read_bytes()).hexdigest()
    usual = build_detector(f"dinov2:{copy}")
    monkeypatch.setattr(dinov2, "WEIGHTS_SHA256", digest)
    monkeypatch.setattr(dinov2, "_CONFIG", CONFIG)
    (copy / "config.json").unlink()
    detector = build_detector(f"dinov2:{copy}")
    assert describe_detector(f"dinov2:{copy}") == ("dinov2", "FD-DINOv2")
    assert describe_detector("dinov2") == ("dinov2", "FD-DINOv2")
    assert (detector.name, detector.distance_name) == ("dinov2", "FD-DINOv2")
    images = random_images(1, 3, 8, 8)
    assert torch.equal(detector(images), usual(images))


@pytest.mark.long
def test_the_settings_of_the_published_network_are_those_of_a_vit_l():
    from transformers import Dinov2Config, Dinov2Model
    config = Dinov2Config(**dinov2._CONFIG)
    with torch.device("meta"):
        network = Dinov2Model(config)
    # The file's 1,217,522,888 bytes are float32 numbers, and names and shapes before them.
    numbers = sum(value.numel() for value in network.state_dict().values())
    assert 0 < 1_217_522_888 - 4 * numbers < 200 * len(network.state_dict())
    assert (config.hidden_act, config.layer_norm_eps, config.qkv_bias, config.use_swiglu_ffn
            ) == ("gelu", 1e-6, True, False)
    assert config.hidden_size // config.num_attention_heads == 64  # in all published sizes


def test_only_the_published_dinov2_has_an_fd_dinov2():
    assert title("frechet_distance", "dinov2") == "FD-DINOv2"
    assert title("kernel_distance", "dinov2") == "DINOv2 kernel distance"
    other = "dinov2:0123456789abcdef"
    assert title("frechet_distance", other) == "Frechet distance by other DINOv2 weights"
    assert title("kernel_distance", other) == "kernel distance by other DINOv2 weights"


# Which images


@pytest.mark.parametrize("channels, is_8bit", [(3, False), (1, False), (2, True), (4, True)])
def test_images_other_than_8_bit_grey_and_rgb_are_refused(channels, is_8bit):
    with pytest.raises(ValueError, match="^detector dinov2: takes 8-bit images of 1 or 3 channels"):
        detector_class("dinov2").check_kind(channels, is_8bit)
    for good in (1, 3):
        detector_class("dinov2").check_kind(good, True)


@pytest.mark.long
def test_images_of_floats_are_refused_where_features_are_computed(folder):
    with pytest.raises(ValueError, match="floating-point"):
        build_detector(f"dinov2:{folder}")(torch.zeros(1, 3, 8, 8))


# Where weights come from


@pytest.fixture
def refused(capsys, tmp_path):
    """Returns the one line that fid.py says of a detector."""
    data = write_dataset(tmp_path / "data.zip", num=3)

    def refused(detector):
        with pytest.raises(SystemExit) as caught:
            fid.main(["ref", f"--data={data}", f"--dest={tmp_path / 'ref.npz'}",
                      f"--detector={detector}", "--device=cpu"])
        out, err = capsys.readouterr()
        assert caught.value.code == 1 and out == "" and not (tmp_path / "ref.npz").exists()
        [line] = err.strip().splitlines()
        assert line.startswith("Error: ") and "Traceback" not in line
        return line
    return refused


def test_a_missing_package_is_named_before_anything_is_downloaded(refused, monkeypatch):
    monkeypatch.setattr(dnnlib.util, "open_url", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs transformers: pip install transformers" in refused("dinov2")


@pytest.mark.parametrize("place", ["nowhere", "./no/where", "a/b/c", "0123456789abcdef", "/no/w"])
def test_a_place_that_is_none_is_refused(refused, place):
    assert f"dinov2:{place}: no such folder; must be a folder with model.safetensors and " \
        "config.json, or a name on the Hugging Face hub, such as facebook/dinov2-large" \
        in refused(f"dinov2:{place}")


def test_no_place_is_no_detector(refused):
    assert "'dinov2:': must be inception, dinov2, pixels, dinov2:FOLDER or" in refused("dinov2:")


@pytest.mark.long
def test_a_damaged_folder_is_refused_in_one_line(refused, copy):
    weights, config = copy / "model.safetensors", copy / "config.json"
    good, settings = load_file(weights), json.loads(config.read_text())

    def given(state=good, **changes):
        save_file(state, weights)
        config.write_text(json.dumps(settings | changes))
        return refused(f"dinov2:{copy}")

    name = "layernorm.weight"
    assert "model.safetensors: layernorm.weight has values that are not finite" in given(
        good | {name: good[name] / 0})
    tensors = "not the weights of the DINOv2 in config.json: tensors are "
    assert f"{tensors}0 missing, 0 unexpected, 1 mismatched" in given(
        good | {name: good[name][1:].clone()})
    assert f"{tensors}1 missing, 1 unexpected, 0 mismatched" in given(
        {f"x.{key}" if key == name else key: value for key, value in good.items()})
    kernel = "embeddings.patch_embeddings.projection.weight"
    positions = "embeddings.position_embeddings"
    assert "patches of 15x15 pixels; must be square and divide 224" in given(
        good | {kernel: torch.zeros(32, 3, 15, 15), positions: torch.zeros(1, 34**2 + 1, 32)},
        patch_size=15)
    assert "positions of 74 patches, which do not form a square" in given(
        good | {positions: torch.zeros(1, 75, 32)}, image_size=[28, 518])
    assert f"Error: {weights}: " in given(num_attention_heads=5)
    assert "config.json does not describe a DINOv2: " in given(hidden_size="wide")
    assert "config.json does not describe a DINOv2: " in given(hidden_act="no such function")
    assert "the model has type 'dinov2_with_registers', but must have 'dinov2'" in given(
        model_type="dinov2_with_registers")
    for text in ("{", "[]"):
        config.write_text(text)
        assert "config.json: " in refused(f"dinov2:{copy}")
    config.write_text(json.dumps(settings))
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "not a complete safetensors file" in refused(f"dinov2:{copy}")
    config.unlink()
    assert "other weights need a config.json beside them" in refused(f"dinov2:{copy}")


def test_pickles_are_not_read(refused, tmp_path):
    (tmp_path / "pickled").mkdir()
    torch.save({"x": math.sqrt}, tmp_path / "pickled/pytorch_model.bin")
    assert "pickled: holds no model.safetensors; put the published file of facebook/dinov2-large " \
        "here, or write other weights with save_pretrained() of transformers (pickles" in refused(
            f"dinov2:{tmp_path / 'pickled'}")


def test_weights_without_a_configuration_are_compared_with_the_published_file(refused, tmp_path):
    line = refused(f"dinov2:{tmp_path}")
    assert f"{tmp_path}: holds no model.safetensors; put the published file of facebook/dinov2-l" \
        "arge here, or write other weights with save_pretrained()" in line
    (tmp_path / "model.safetensors").write_bytes(b"<!doctype html>")
    digest = hashlib.sha256(b"<!doctype html>").hexdigest()
    assert f"{tmp_path}/model.safetensors: not the published file of facebook/dinov2-large " \
        f"(sha256 {digest[:16]}..., expected 399fba97a95f22c3...)" in refused(f"dinov2:{tmp_path}")


@pytest.fixture
def hub(folder, monkeypatch):
    """Files of the hub by their addresses, in place of a download; what was asked for."""
    asked = []

    def open_url(url, sha256=None):
        asked.append((url, sha256))
        return open(folder / url.rpartition("/")[2], "rb")

    monkeypatch.setattr(dnnlib.util, "open_url", open_url)
    return asked


PUBLISHED_URL = (f"https://huggingface.co/facebook/dinov2-large/resolve/{dinov2.HUB_REVISION}/"
                 "model.safetensors")


@pytest.mark.long
def test_weights_of_the_hub_are_downloaded_by_name(folder, hub):
    detector = build_detector("dinov2:someone/dinov2-tiny")
    base = "https://huggingface.co/someone/dinov2-tiny/resolve/main/"
    assert hub == [(f"{base}model.safetensors", None), (f"{base}config.json", None)]
    images = random_images(1, 3, 8, 8)
    assert torch.equal(detector(images), build_detector(f"dinov2:{folder}")(images))
    assert detector.name == describe_detector(f"dinov2:{folder}")[0]


@pytest.mark.long
@pytest.mark.parametrize("spec", ["dinov2", "dinov2:facebook/dinov2-large"])
def test_the_published_weights_are_of_one_revision_and_hash(folder, hub, monkeypatch, spec):
    with pytest.raises(ValueError, match="not the published model.safetensors of facebook/dinov2"):
        build_detector(spec)
    assert hub == [(PUBLISHED_URL, dinov2.WEIGHTS_SHA256)]
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    monkeypatch.setattr(dinov2, "WEIGHTS_SHA256", digest)
    monkeypatch.setattr(dinov2, "_CONFIG", CONFIG)
    assert build_detector(spec).name == "dinov2"


@pytest.mark.long
def test_files_in_the_hub_s_own_cache_are_not_downloaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(dnnlib.util, "open_url", None)
    kept = tmp_path / "hub/models--someone--dinov2-tiny"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs/main").write_text("ab" * 20)
    shutil.copytree(folder, kept / "snapshots" / ("ab" * 20))
    found = dinov2.find_weights("someone/dinov2-tiny")
    assert found.path.startswith(str(kept)) and found.config["hidden_size"] == 32


@pytest.mark.parametrize("offline", [False, True])
def test_without_a_network_an_error_says_what_to_put_where(refused, monkeypatch, offline):
    def open_url(url, sha256=None):
        raise OSError(f"{url}: {'asked all the same' if offline else 'no network'}")

    monkeypatch.setattr(dnnlib.util, "open_url", open_url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    reason = "not downloaded, because HF_HUB_OFFLINE is set" if offline else "no network"
    line = refused("dinov2")
    assert "Error: DINOv2 weights: download model.safetensors with 'hf download " \
        f"facebook/dinov2-large model.safetensors --revision {dinov2.HUB_REVISION} " \
        "--local-dir dinov2' on another machine, and give the folder as the detector " \
        f"dinov2:FOLDER ({PUBLISHED_URL}: {reason})" in line
    line = refused("dinov2:downloads/nothere")
    assert line.startswith("Error: detector dinov2:downloads/nothere: there is no such folder, and "
                           "it can't be read from the Hugging Face hub; give an existing folder "
                           "with model.safetensors and config.json (")
    assert line.endswith(f"{reason})")


@pytest.mark.scripts
def test_a_hub_that_does_not_answer_is_one_line_and_no_wait(tmp_path):
    data = write_dataset(tmp_path / "data.zip", num=3)
    done = subprocess.run(
        [sys.executable, ROOT / "fid.py", "ref", f"--data={data}", f"--dest={tmp_path / 'x.npz'}",
         "--detector=dinov2", "--device=cpu"], capture_output=True, text=True, timeout=120,
        env=os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)})
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("Error: DINOv2 weights: download model.safetensors with 'hf download ")
    assert line.endswith(f"/{dinov2.HUB_REVISION}/model.safetensors: [Errno 111] Connection "
                         "refused)")
    assert done.returncode == 1


# What is refused before a run


def test_training_is_checked_without_a_download(tmp_path, monkeypatch):
    data = write_dataset(tmp_path / "data.zip", num=3)
    dataset = ImageFolderDataset(str(data))
    monkeypatch.setattr(dnnlib.util, "open_url", None)
    for spec in ("dinov2", "dinov2:someone/dinov2-tiny"):
        check_scoring(spec, str(data), ["fid"], dataset, "the data")
        with pytest.raises(ValueError, match="the data: detector dinov2: has no classes"):
            check_scoring(spec, str(data), ["fid", "is"], dataset, "the data")
        with pytest.raises(ValueError, match="detector dinov2: has no classes"):
            Evaluator(spec, None, ["is"], torch.device("cpu"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OSError, match="pip install transformers"):
        check_scoring("dinov2", str(data), ["fid"], dataset, "the data")


# Scores


@pytest.mark.long
def test_scores_by_two_networks_are_kept_apart(folder, tmp_path, capsys):
    other = write_network(tmp_path / "other", seed=1)
    images = write_dataset(tmp_path / "images.zip", num=30, side=8)
    data = write_dataset(tmp_path / "data.zip", num=40, side=8, classes=1)

    def run(command, weights, *args):
        fid.main([command, f"--detector=dinov2:{weights}", "--device=cpu", "--workers=0",
                  *map(str, args)], standalone_mode=False)
        return capsys.readouterr().out

    def score(weights, ref, out):
        return run("calc", weights, f"--images={images}", f"--ref={ref}", "--num=30",
                   "--metrics=fid,kid,pr", f"--out={tmp_path / out}")

    for weights, name in ((folder, "a"), (other, "b")):
        run("ref", weights, f"--data={data}", f"--dest={tmp_path / name}.npz", "--features")
        text = score(weights, data, f"{name}.jsonl")  # whose statistics go to the cache folder
        assert text.startswith("Frechet distance by other DINOv2 weights: ")
        score(weights, tmp_path / f"{name}.npz", f"{name}-file.jsonl")
    found = {}
    for path in tmp_path.glob("*.jsonl"):
        lines = list(map(json.loads, path.read_text().splitlines()))
        found[path.stem] = {line["metric"]: line["value"] for line in lines}
        weights = folder if path.stem[0] == "a" else other
        digest = hashlib.sha256((weights / "model.safetensors").read_bytes()).hexdigest()
        assert {line["detector_sha256"] for line in lines} == {digest}
        assert {line["detector"] for line in lines} == {f"dinov2:{digest[:16]}"}
    assert found["a"].keys() == {"frechet_distance", "kernel_distance", "kernel_distance_std",
                                 "precision", "recall"}
    for name in "ab":
        assert found[name] == pytest.approx(found[f"{name}-file"], rel=1e-6)
    assert found["a"]["frechet_distance"] != pytest.approx(found["b"]["frechet_distance"], rel=0.01)
    with pytest.raises(SystemExit):
        fid.main(["calc", f"--detector=dinov2:{other}", f"--images={images}", "--num=30",
                  f"--ref={tmp_path / 'a.npz'}", "--device=cpu"])
    [line] = [line for line in capsys.readouterr().err.splitlines() if "Warning" not in line]
    names = [describe_detector(f"dinov2:{weights}")[0] for weights in (folder, other)]
    assert line.endswith(f"a.npz: made with the detector {names[0]}; give the weights that have "
                         f"this hash (--detector=dinov2:{other} is {names[1]})")
