import hashlib
import re
import threading
import tracemalloc
import zipfile

import numpy as np
import pytest
import scipy.linalg
import torch

from metrics import distances, inception, statistics
from metrics.detectors import (
    MAX_PIXEL_FEATURES,
    Inception,
    Pixels,
    build_detector,
    describe_detector,
    detector_class,
)
from metrics.distances import frechet_distance
from metrics.metrics import dataset_features
from metrics.references import Reference, load_reference, save_reference
from metrics.statistics import FeatureStatistics

RNG = np.random.RandomState


def random_rotation(d, seed=0):
    return np.linalg.qr(RNG(seed).standard_normal([d, d]))[0]


def random_features(n, d, seed=0):
    """Correlated features whose scales span four decades."""
    rng = RNG(seed)
    return rng.standard_normal([n, d]) * np.logspace(-2, 2, d) @ random_rotation(d) + rng.rand(d)


def stats_of(features, splits=()):
    stats = FeatureStatistics()
    for part in np.split(features, splits):
        stats.append(torch.from_numpy(part))
    return stats


# Frechet distance

# What the quick way for full ranks may lose, in parts of the traces. Some eigenvalue solvers lose
# next to nothing: those that see the largest pivots of Cholesky's factorisation last.
QUICK_LOSS = np.finfo(float).eps / distances._WELL_CONDITIONED


@pytest.mark.parametrize("zeros", [0, 20, 39])
def test_frechet_distance_has_the_closed_form_where_covariances_commute(zeros):
    rng, q = RNG(0), random_rotation(40)
    a, b = rng.rand(2, 40) * np.logspace(-6, 2, 40)
    a[:zeros] = 0  # neither has full rank, and their null spaces differ
    b[len(b) - zeros // 2:] = 0
    mu1, mu2 = rng.rand(2, 40)
    expected = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    given = frechet_distance(mu1, q * a @ q.T, mu2, q * b @ q.T)
    lost = 0 if zeros else QUICK_LOSS * (a.sum() + b.sum())
    assert given == pytest.approx(expected, rel=1e-10, abs=lost)


def test_the_quick_way_of_full_rank_agrees_with_the_exact_one(monkeypatch):
    def full_rank(seed):
        return random_features(500, 50, seed=seed) + RNG(seed).standard_normal([500, 50])

    x, y = full_rank(1), full_rank(2)
    few = full_rank(3)[:20]  # of low rank
    statistics_of = {name: (z.mean(0), np.cov(z.T)) for name, z in
                     (("x", x), ("y", y), ("few", few))}
    pairs = [("x", "y"), ("y", "x"), ("x", "few"), ("few", "x")]
    usual = [frechet_distance(*statistics_of[a], *statistics_of[b]) for a, b in pairs]
    ways = []
    svdvals = torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda x: ways.append("svd") or svdvals(x))
    for a, b in pairs:
        frechet_distance(*statistics_of[a], *statistics_of[b])
        ways.append(None)
    assert ways == [None, None, "svd", None, "svd", None]  # quick for full rank on both sides alone
    monkeypatch.setattr(distances, "_WELL_CONDITIONED", np.inf)
    for (a, b), distance in zip(pairs, usual, strict=True):
        exact = frechet_distance(*statistics_of[a], *statistics_of[b])
        assert distance == pytest.approx(exact, rel=1e-9)


def test_frechet_distance_agrees_with_the_matrix_square_root(monkeypatch):
    x, y = random_features(100, 30, seed=1), random_features(90, 30, seed=2)
    s1, s2 = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(s1 @ s2).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * root)
    given = frechet_distance(x.mean(0), s1, y.mean(0), s2)
    # sqrtm's error: with 50 digits the distance is 527.714206141085.
    assert given == pytest.approx(expected, rel=1e-6)
    assert given == pytest.approx(527.714206141085, abs=QUICK_LOSS * np.trace(s1 + s2))
    monkeypatch.setattr(distances, "_WELL_CONDITIONED", np.inf)
    exact = frechet_distance(x.mean(0), s1, y.mean(0), s2)
    assert exact == pytest.approx(527.714206141085, rel=1e-11)


def test_frechet_distance_of_rank_one_covariances_is_exact():
    u, v = RNG(0).standard_normal([2, 300])
    zero = np.zeros(300)
    given = frechet_distance(zero, np.outer(u, u), zero, np.outer(v, v))
    assert given == pytest.approx(u @ u + v @ v - 2 * abs(u @ v), rel=1e-12)


@pytest.mark.parametrize("n", [5, 400])
def test_frechet_distance_to_itself_is_zero(n):
    x = random_features(n, 100)
    mu, sigma = x.mean(0), np.cov(x.T)
    assert 0 <= frechet_distance(mu, sigma, mu, sigma) < 1e-12 * np.trace(sigma)


def test_frechet_distance_is_symmetric_and_scales_with_the_square_of_the_features():
    a, b = stats_of(random_features(50, 60, seed=1)), stats_of(random_features(20, 60, seed=2))
    forth = frechet_distance(a.mean(), a.cov(), b.mean(), b.cov())
    back = frechet_distance(b.mean(), b.cov(), a.mean(), a.cov())
    scaled = frechet_distance(3 * a.mean(), 9 * a.cov(), 3 * b.mean(), 9 * b.cov())
    assert back == pytest.approx(forth, rel=1e-12)
    assert scaled == pytest.approx(9 * forth, rel=1e-12)


def test_statistics_of_other_features_are_refused():
    with pytest.raises(ValueError, match="of 2 features can't be compared with those of 3"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))


# Mean and covariance


@pytest.mark.parametrize("splits", [(), (1,), (1, 1, 8, 28), tuple(range(1, 40))])
def test_statistics_agree_with_numpy_however_they_are_batched(splits):
    x = random_features(40, 12)
    stats = stats_of(x, splits)
    assert stats.count == 40
    np.testing.assert_allclose(stats.mean(), x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(stats.cov(), np.cov(x.T), atol=1e-13 * np.cov(x.T).max())


def test_covariance_keeps_its_digits_under_a_mean_a_million_times_larger():
    x = np.round(RNG(0).standard_normal([64, 8]) * 2**20) / 2**20  # so that + 2^20 is exact
    x[:, 0] = 0
    stats = stats_of(x + 2**20, (10, 20, 21))
    np.testing.assert_allclose(stats.cov(), np.cov(x.T), atol=1e-9)
    assert stats.cov()[0].eq(0).all()


def test_features_of_low_precision_are_summed_in_double():
    x = torch.from_numpy(random_features(30, 5)).half()
    stats = FeatureStatistics()
    stats.append(x)
    assert stats.cov().dtype == torch.float64
    np.testing.assert_allclose(stats.cov(), np.cov(x.double().numpy().T), rtol=1e-12)


def test_one_image_has_a_mean_but_no_covariance():
    stats = stats_of(np.ones([1, 3]))
    assert stats.mean().eq(1).all()
    with pytest.raises(ValueError, match="1 images: at least 2"):
        stats.cov()


def test_ranks_merge_to_the_statistics_of_all_images(monkeypatch):
    x, splits = random_features(40, 12), (25, 25, 27)  # the second of four ranks has no images
    ranks = [stats_of(part) for part in np.split(x, splits)]
    barrier, tensors = threading.Barrier(len(ranks)), {}

    def all_reduce_sum_(tensor):
        tensors[threading.get_ident()] = tensor.clone()
        barrier.wait()
        tensor.copy_(sum(tensors.values()))
        barrier.wait()
        return tensor

    monkeypatch.setattr(statistics.dist, "all_reduce_sum_", all_reduce_sum_)
    threads = [threading.Thread(target=stats.all_reduce) for stats in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for stats in ranks:
        assert stats.count == 40
        np.testing.assert_allclose(stats.mean(), x.mean(0), rtol=1e-13)
        np.testing.assert_allclose(stats.cov(), np.cov(x.T), atol=1e-13 * np.cov(x.T).max())


class Noise:
    """Ten random images."""

    image_shape, scale = [3, 4, 4], None
    pixels = RNG(0).randint(0, 256, [10, 3, 4, 4], dtype=np.uint8)

    def __len__(self):
        return 10

    def get_scored(self, indices):
        return self.pixels[indices]


@pytest.mark.parametrize("batch, workers", [(1, 0), (3, 1), (4, 2), (64, 2)])
def test_statistics_of_images_cover_each_image_once(batch, workers):
    x = Noise.pixels.reshape(10, -1) / 127.5 - 1
    stats = dataset_features(Noise(), Pixels(), batch=batch, workers=workers).moments
    assert stats.count == 10
    np.testing.assert_allclose(stats.mean(), x.mean(0), atol=1e-6)  # features are float32
    np.testing.assert_allclose(stats.cov(), np.cov(x.T), atol=1e-6)


def test_an_error_while_reading_ahead_arrives():
    class Damaged(Noise):
        def get_scored(self, indices):
            if 7 in indices:
                raise ValueError("image 7 can't be read")
            return super().get_scored(indices)

    with pytest.raises(ValueError, match="^image 7 can't be read$"):
        dataset_features(Damaged(), Pixels(), batch=2, workers=2)


# Detectors


def test_pixels_are_scaled_to_minus_one_to_one():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 3, 1, 1)
    detector = build_detector("pixels")
    np.testing.assert_allclose(detector(images), [[-1, 51 / 127.5 - 1, 1]], atol=1e-7)
    assert detector.feature_dim == 3


def test_pixels_refuses_images_whose_covariance_does_not_fit():
    Pixels()(torch.zeros(0, MAX_PIXEL_FEATURES, 1, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="49152 values per image, at most 12288"):
        Pixels()(torch.zeros(0, 3, 128, 128, dtype=torch.uint8))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_pixels_of_a_factor_are_means_over_squares_and_bear_its_name(dtype):
    images = (RNG(0).rand(2, 3, 8, 12) * 255).astype(dtype)
    seen = images / 127.5 - 1 if dtype == np.uint8 else images
    means = np.array([[[[seen[n, c, i:i + 4, j:j + 4].mean() for j in range(0, 12, 4)]
                        for i in range(0, 8, 4)] for c in range(3)] for n in range(2)])
    detector = build_detector("pixels:4")
    np.testing.assert_allclose(detector(torch.from_numpy(images)), means.reshape(2, -1), rtol=1e-5)
    assert detector.name == "pixels:4" == describe_detector("pixels:4")[0]
    assert detector.distance_name == "pixels:4 Frechet distance" == describe_detector("pixels:4")[1]
    assert build_detector("pixels:1").name == "pixels"
    assert detector(torch.empty(0, 3, 8, 12)).shape == (0, 18)
    with pytest.raises(ValueError, match="12x9 images are not multiples of 4"):
        detector(torch.zeros(0, 3, 9, 12))


@pytest.mark.parametrize("shape, dtype", [
    ((3, 128, 128), torch.uint8), ((1, 512, 512), torch.float32), ((7, 96, 160), torch.float32),
    ((5, 256, 64), torch.uint8)])
def test_what_a_detector_advises_works(shape, dtype):
    images, specs = torch.zeros(0, *shape, dtype=dtype), ["pixels"]
    tried = set()
    while specs:
        spec = specs.pop()
        assert spec not in tried, f"{spec} is advised by one that it advises"
        tried.add(spec)
        if spec == "inception":
            Inception.check_kind(shape[0], dtype == torch.uint8)
            continue
        try:
            assert build_detector(spec)(images).shape[1] <= 3 * 32 * 32
        except ValueError as error:
            advice = re.findall(r"--detector=([\w:]+)", str(error))
            assert advice and ("inception" in advice) == (dtype == torch.uint8 and shape[0] == 3)
            specs += advice
    assert len(tried) > 1


def test_large_images_without_a_factor_are_sent_to_pairs():
    with pytest.raises(ValueError, match="use 'fid.py pairs', which compares"):
        Pixels()(torch.zeros(0, 1, 127, 131))
    with pytest.raises(ValueError, match=r"--detector=pixels \(pixels:K"):
        Inception.check_kind(1, is_8bit=False)


def test_only_the_published_inception_is_called_fid(tmp_path, monkeypatch):
    assert describe_detector("inception") == ("inception", "FID")
    assert "FID" not in describe_detector("pixels")[1]
    (tmp_path / "w.pth").write_bytes(b"weights")
    name, distance_name = describe_detector(str(tmp_path / "w.pth"))
    assert name.startswith("inception:") and "FID" not in distance_name
    monkeypatch.setattr(inception, "WEIGHTS_SHA256", hashlib.sha256(b"weights").hexdigest())
    assert describe_detector(str(tmp_path / "w.pth")) == ("inception", "FID")


def test_an_unknown_detector_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'clip': must be inception, dinov2, .*pixels:K .* or a "):
        build_detector("clip")


@pytest.mark.parametrize("spec", ["pixels:", "pixels:0", "pixels:-2", "pixels:2.5", "pixels:x",
                                  "pixel:2", "pixels:2:2"])
def test_a_factor_of_pixels_is_a_whole_positive_number(spec):
    for function in (build_detector, detector_class, describe_detector):
        with pytest.raises(ValueError, match=f"{spec}.*: must be inception"):
            function(spec)


# Files of reference statistics


def test_reference_statistics_survive_the_file_bit_for_bit(tmp_path):
    stats, path = stats_of(random_features(40, 12)), tmp_path / "new folder" / "ref.npz"
    features = torch.rand(40, 12)
    save_reference(path, Reference(stats.mean().numpy(), stats.cov().numpy(), "pixels", features,
                                   (3, 2, 2), 40))
    loaded = load_reference(str(path))
    assert np.array_equal(loaded.mu, stats.mean()) and np.array_equal(loaded.sigma, stats.cov())
    assert (loaded.detector, loaded.image_shape, loaded.count) == ("pixels", (3, 2, 2), 40)
    assert torch.equal(loaded.features, features)
    assert loaded.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [p.name for p in path.parent.iterdir()] == ["ref.npz"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_files_that_name_no_detector_are_inceptions(tmp_path, save, dtype):
    save(tmp_path / "edm.npz", mu=np.ones(3, dtype), sigma=np.eye(3, dtype=dtype))
    loaded = load_reference(str(tmp_path / "edm.npz"))
    assert loaded.detector == "inception"
    assert loaded.sigma.dtype == np.float64


GOOD = {"mu": np.zeros(2), "sigma": np.eye(2)}


@pytest.mark.parametrize("change, message", [
    ({"sigma": None}, "no item named 'sigma.npy'"),
    ({"mu": np.zeros([2, 2])}, r"mu has shape \[2, 2\] and sigma \[2, 2\], expected \[d\]"),
    ({"mu": np.zeros(0), "sigma": np.zeros([0, 0])}, r"mu has shape \[0\]"),
    ({"sigma": np.eye(3)}, r"mu has shape \[2\] and sigma \[3, 3\]"),
    ({"mu": np.zeros([1, 1, 2])}, r"mu has shape \[1, 1, 2\]"),
    ({"mu": np.array([0, np.nan])}, "not finite"),
    ({"sigma": np.diag([np.inf, 1])}, "not finite"),
    ({"sigma": np.array([[1, 2], [3, 4.0]])}, "not a covariance"),
    ({"sigma": np.diag([-1.0, 1])}, "not a covariance"),
    ({"mu": np.array([None, 1], dtype=object)}, "mu has type object, expected floats"),
    ({"mu": np.array([0, 1])}, "mu has type int64, expected floats"),
    ({"detector": np.array(3)}, "detector has type int64, expected text"),
    ({"detector": np.array("x" * 10**5)}, "detector has type <U100000, at most 16384 bytes"),
    ({"detector": np.array(["a", "b"])}, r"detector has shape \[2\], expected \[\]"),
    ({"features": np.zeros([4, 3], np.float32)}, r"features has shape \[4, 3\]"),
    ({"features": np.full([4, 2], np.nan)}, "not finite"),
    ({"image_shape": np.array([3, 8])}, r"image_shape has shape \[2\], expected \[3\]"),
    ({"count": np.array([1, 2])}, r"count has shape \[2\]"),
])
def test_damaged_reference_statistics_are_refused_in_one_line(tmp_path, change, message):
    path = tmp_path / "ref.npz"
    np.savez(path, **{k: v for k, v in (GOOD | change).items() if v is not None})
    with pytest.raises(ValueError, match=f"ref.npz: not reference statistics: .*{message}") as e:
        load_reference(str(path))
    assert "\n" not in str(e.value)


def write_npz(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def npy(shape, data=b"", dtype="<f8", version=b"\1\0"):
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header + data


@pytest.mark.parametrize("shape", ["(2**50,)", "(1125899906842624,)", "(16000, 16000)", "(-2, -8)"])
def test_a_header_that_claims_petabytes_allocates_nothing(tmp_path, shape):
    path = tmp_path / "huge.npz"
    write_npz(path, {"mu.npy": npy("(16,)", bytes(128)), "sigma.npy": npy(shape, bytes(128))})
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="huge.npz: not reference statistics: ") as caught:
            load_reference(str(path))
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [
    b"", b"<html>not found</html>", npy("(2,)", bytes(16)), b"PK\3\4" + bytes(100),
])
def test_other_files_are_not_taken_for_reference_statistics(tmp_path, data):
    (tmp_path / "page.npz").write_bytes(data)
    with pytest.raises(ValueError, match="page.npz: not reference statistics: "):
        load_reference(str(tmp_path / "page.npz"))


@pytest.mark.parametrize("member", [
    b"", b"\x93NUMPY", npy("(2,)", version=b"\7\0"), npy("(2,)", dtype="|O"), npy("oops"),
    npy("(2,)", bytes(15)), npy("(2,)", bytes(17)),
])
def test_broken_members_are_refused_in_one_line(tmp_path, member):
    path = tmp_path / "broken.npz"
    write_npz(path, {"mu.npy": member, "sigma.npy": npy("(2, 2)", bytes(32))})
    with pytest.raises(ValueError, match="broken.npz: not reference statistics: ") as caught:
        load_reference(str(path))
    assert "\n" not in str(caught.value)


def test_a_file_damaged_on_the_disk_is_refused(tmp_path):
    path = tmp_path / "ref.npz"
    np.savez_compressed(path, **GOOD)
    data = bytearray(path.read_bytes())
    data[40:60] = bytes(20)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="ref.npz: not reference statistics: "):
        load_reference(str(path))


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="none.npz"):
        load_reference(str(tmp_path / "none.npz"))
