import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dnnlib.util
from metrics import inception
from metrics.detectors import build_detector

WEIGHTS_BYTES = 95_628_359  # of the published file

# Every 512th feature of the images in the test below under `random_state`, as torch-fidelity 0.4.0,
# an independent program, computes it; all features agreed to 2.2e-7.
GOLDEN = [[0.3807327, 0.0, 0.1854435, 0.0113277],
          [0.3920735, 0.0, 0.1889108, 0.0078572]]


def random_state():
    """Weights that keep activations at unit scale, so that no layer's error is hidden."""
    rng, state = np.random.RandomState(0), {}
    for name, shape in inception.state_shapes().items():
        values = rng.standard_normal(shape).astype(np.float32)
        if name.endswith("conv.weight"):
            values *= math.sqrt(2 / math.prod(shape[1:]))
        elif name.endswith("bn.weight"):
            values = 1 + 0.1 * values
        elif name.endswith("running_var"):
            values = 1 + 0.3 * np.abs(values)
        else:
            values *= 0.1
        state[name] = torch.from_numpy(values)
    return state


def random_images(*shape):
    return torch.from_numpy(np.random.RandomState(1).randint(0, 256, shape, dtype=np.uint8))


@pytest.fixture(scope="module")
def state():
    return random_state()


@pytest.fixture(scope="module")
def network(state):
    return inception.InceptionV3(state)


def relative_error(given, expected):
    return ((given.double() - expected.double()).norm() / expected.double().norm()).item()


def test_table_holds_the_94_units_and_the_bytes_of_the_published_file():
    assert len(inception.conv_shapes()) == 94
    numbers = sum(math.prod(shape) for shape in inception.state_shapes().values())
    overhead = WEIGHTS_BYTES - 4 * numbers
    assert 0 < overhead < 200 * len(inception.state_shapes())  # names and shapes of the tensors


def test_blocks_pool_by_mean_except_for_the_last():
    pools = {block.name: block.branches[-1][0] for block in inception.NETWORK
             if isinstance(block, inception.Fork)}
    assert pools.pop("Mixed_7c") is inception._max3x3
    assert pools.pop("Mixed_6a") is pools.pop("Mixed_7a") is inception._halve
    assert set(pools.values()) == {inception._mean3x3}
    assert len(pools) == 8


def test_mean_pooling_leaves_the_padding_out():
    x = torch.arange(12.0).reshape(1, 1, 3, 4)
    y = inception._mean3x3(x)
    assert y[0, 0, 0, 0] == (0 + 1 + 4 + 5) / 4
    assert y[0, 0, 1, 1] == x[0, 0, :3, :3].mean()
    assert inception._mean3x3(torch.ones(1, 1, 5, 5)).eq(1).all()


@pytest.mark.parametrize("size", [(1, 1), (7, 32), (32, 7), (299, 299), (598, 400)])
def test_resize_samples_at_j_w_over_299_without_half_pixel_shift(size):
    x = np.random.RandomState(0).uniform(0, 255, size)
    positions = [np.arange(299) * n / 299 for n in size]
    rows = np.stack([np.interp(positions[1], np.arange(size[1]), row) for row in x])
    expected = np.stack([np.interp(positions[0], np.arange(size[0]), col) for col in rows.T]).T
    given = inception.resize(torch.tensor(x, dtype=torch.float32)[None, None], 299)
    np.testing.assert_allclose(given[0, 0], expected, atol=1e-4)  # float32, values to 255


@pytest.mark.long
def test_folding_batch_norm_keeps_the_features(state, network):
    def unfolded(x, name, conv):
        x = F.conv2d(x, state[f"{name}.conv.weight"], None, conv.stride, conv.pad)
        bn = [state[f"{name}.bn.{key}"]
              for key in ("running_mean", "running_var", "weight", "bias")]
        return F.relu(F.batch_norm(x, *bn, eps=1e-3))

    images = random_images(2, 3, 32, 32)
    x = (inception.resize(images.float(), 299) - 128) / 128
    expected = inception.run(inception.NETWORK, x, unfolded).mean([2, 3])
    assert relative_error(network(images), expected) < 1e-6


@pytest.mark.long
def test_features_are_those_of_an_independent_program(network):
    images = random_images(2, 3, 32, 32)
    images[1] //= 4
    features = network(images)
    assert features.shape == (2, 2048)
    np.testing.assert_allclose(features[:, ::512], GOLDEN, atol=1e-5)


@pytest.mark.long
def test_an_image_has_the_same_features_alone_and_in_a_batch(network):
    images = random_images(3, 3, 20, 20)
    assert relative_error(network(images[1:2]), network(images)[1:2]) < 1e-6


def test_gray_is_repeated_over_the_channels(network):
    gray = random_images(1, 1, 16, 16)
    assert network(gray).equal(network(gray.repeat(1, 3, 1, 1)))


def test_no_images_have_no_features(network):
    assert network(random_images(0, 3, 16, 16)).shape == (0, 2048)


def test_counters_of_batch_norm_are_allowed(state):
    counters = {f"{name}.bn.num_batches_tracked": torch.tensor(0)
                for name in inception.conv_shapes()}
    inception._check_state(state | counters)


@pytest.mark.parametrize("change, message", [
    ({"fc.bias": None}, "1 names missing"),
    ({"AuxLogits.fc.bias": torch.zeros(1)}, "1 unknown"),
    ({"fc.weight": torch.zeros(1000, 2048)}, r"fc.weight is \[1000, 2048\], expected \[1008, 2048"),
    ({"fc.bias": torch.full([1008], math.nan)}, "fc.bias has values that are not finite"),
])
def test_weights_of_another_network_are_refused(state, change, message):
    changed = {k: v for k, v in (state | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        inception.InceptionV3(changed)


def test_a_local_file_of_other_content_is_refused(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="other.pth: not the Inception weights: 472 names missing"):
        build_detector(str(path))


@pytest.mark.long
def test_a_local_file_of_other_weights_is_used_under_another_name(tmp_path, state, network):
    path = tmp_path / "other.pth"
    torch.save(state, path)
    detector = build_detector(str(path))
    assert detector.name.startswith("inception:") and detector.distance_name != "FID"
    images = random_images(1, 3, 32, 32)
    assert torch.equal(detector(images), network(images))


def test_other_weights_in_the_place_of_the_published_ones_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(dnnlib.util.CACHE_DIR_ENV, str(tmp_path))
    torch.save({"x": torch.zeros(1)}, tmp_path / inception.WEIGHTS_FILE)
    with pytest.raises(ValueError, match="not pt_inception-2015.*expected 6726825d"):
        build_detector("inception")


def test_offline_error_says_which_file_to_put_where(tmp_path, monkeypatch):
    def offline(url, sha256=None):
        raise OSError(f"{url}: no network")

    monkeypatch.setenv(dnnlib.util.CACHE_DIR_ENV, str(tmp_path))
    monkeypatch.setattr(dnnlib.util, "open_url", offline)
    with pytest.raises(OSError) as caught:
        build_detector("inception")
    message = str(caught.value)
    assert message.startswith(f"Inception weights: download {inception.WEIGHTS_FILE} on another ")
    assert "\n" not in message and message.endswith(": no network)")
    for part in (inception.WEIGHTS_URL, str(tmp_path / inception.WEIGHTS_FILE), "pixels"):
        assert part in message


def save_as_weights(state, path, monkeypatch):
    torch.save(state, path)
    digest = inception.hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(inception, "WEIGHTS_SHA256", digest)


def test_weights_put_into_the_cache_by_hand_are_used(tmp_path, monkeypatch):
    monkeypatch.setenv(dnnlib.util.CACHE_DIR_ENV, str(tmp_path))
    save_as_weights({"x": torch.ones(3)}, tmp_path / inception.WEIGHTS_FILE, monkeypatch)
    assert inception.load_weights()["x"].equal(torch.ones(3))


def test_weight_files_are_never_unpickled(tmp_path, monkeypatch):
    save_as_weights({"x": math.sqrt}, tmp_path / "w.pth", monkeypatch)
    with pytest.raises(ValueError, match="w.pth: "):
        inception.load_weights(str(tmp_path / "w.pth"))
