"""Augmentation: the warp does what the draws say, the labels tell it, and draws keep their laws."""

import dataclasses
import math

import pytest
import torch

from pfgmpp.augment import LABEL_DIM, SYM6, AugmentDraws, AugmentPipe

# Bounds of the interpolation error on the scene below. Bilinear reads at 2x leave 0.001. sym6, not
# quite symmetric, shifts content by 0.05 pixels; the way down shifts it back, fully where nothing
# turned in between, while a half turn doubles the shift: 0.003 measured up to 35 degrees, 0.01 at
# random. Content shrunk by s varies 1/s times faster, and so does a scene on fewer pixels.
WARP_ATOL = 0.005
TURNED_ATOL = 0.012
SHAPE = (40, 56)


def make_draws(batch=1, **values):
    """Draws with the given numbers for every image and zero for the rest."""
    return AugmentDraws(
        *(
            torch.full(
                [batch],
                values.get(field.name, 0),
                dtype=torch.bool if "flip" in field.name else torch.float32,
            )
            for field in dataclasses.fields(AugmentDraws)
        )
    )


def pixel_positions(height, width):
    """Pixel centres as x + iy about the image's centre, x right and y up, [H, W] complex."""
    y, x = torch.meshgrid(
        (height - 1) / 2 - torch.arange(height, dtype=torch.float64),
        torch.arange(width, dtype=torch.float64) - (width - 1) / 2,
        indexing="ij",
    )
    return torch.complex(x, y)


def scene(z, height, width):
    """A smooth image, as a function of position, that is its own continuation by reflection.

    Cosines that have their extrema at the outermost pixels, without any symmetry of the square.
    """
    u = math.pi * (z.real / (width - 1) + 0.5)
    v = math.pi * (z.imag / (height - 1) + 0.5)
    return 0.5 * u.cos() - 0.3 * v.cos() + 0.3 * (2 * u).cos() * v.cos() + 0.2 * (2 * v).cos()


def source_position(z, draws, height, width):
    """Where image 0 of `draws` brings the content at z from, in complex arithmetic."""
    value = {f.name: getattr(draws, f.name)[0].item() for f in dataclasses.fields(draws)}
    z = z - 0.125 * complex(value["tx"] * width, -value["ty"] * height)
    stretch = 2 ** (0.2 * value["aniso"])
    axis = torch.polar(torch.tensor(1.0).double(), torch.tensor(value["aniso_angle"]).double())
    z = z / axis
    z = torch.complex(z.real / stretch, z.imag * stretch) * axis
    z = z * torch.polar(torch.tensor(1.0).double(), -torch.tensor(value["theta"]).double())
    z = z / 2 ** (0.2 * value["scale"])
    x = -z.real if value["xflip"] else z.real
    y = -z.imag if value["yflip"] else z.imag
    return torch.complex(x, y)


def warp_error(draws, shape=SHAPE):
    z = pixel_positions(*shape)
    expected = scene(source_position(z, draws, *shape), *shape)
    image = scene(z, *shape).float()[None, None]
    output, _ = AugmentPipe.standard(1)(image, draws)
    return (output[0, 0] - expected).abs().max().item()


def random_images(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "values",
    [
        dict(scale=1.5),
        dict(theta=0.6),
        dict(aniso=2),
        dict(aniso=2, aniso_angle=0.7),
        dict(tx=1.3),
        dict(ty=1.3),
    ],
    ids=lambda values: "+".join(values),
)
def test_each_transform_moves_content_by_its_formula(values, sign):
    draws = make_draws(**{name: sign * value for name, value in values.items()})
    assert warp_error(draws) < WARP_ATOL


@pytest.mark.parametrize("shape", [(32, 32), (33, 24), SHAPE])
def test_transforms_compose_as_flips_scale_rotation_anisotropy_translation(shape):
    draws = make_draws(
        xflip=1, scale=0.7, theta=2.1, aniso=-1.2, aniso_angle=-0.5, tx=0.8, ty=-1.1
    )
    assert warp_error(draws, shape) < TURNED_ATOL * min(SHAPE) / min(shape)


@pytest.mark.parametrize("values", [dict(tx=37), dict(ty=-29, theta=1), dict(scale=-10)], ids=str)
def test_reflection_goes_on_without_end(values):
    shrinking = 2 ** (-0.2 * values.get("scale", 0))
    assert warp_error(make_draws(**values)) < WARP_ATOL * shrinking


@pytest.mark.parametrize("name, axis", [("xflip", 3), ("yflip", 2)])
def test_flips_mirror_pixels_exactly(name, axis):
    images = random_images(3, 2, 8, 10)
    output, labels = AugmentPipe(xflip=1, yflip=1)(images, make_draws(3, **{name: 1}))
    assert torch.equal(output, images.flip(axis))
    assert labels[0].tolist() == [name == "xflip", name == "yflip"] + [0] * 7


def test_labels_are_the_nine_numbers_in_order():
    draws = make_draws(
        xflip=1, scale=1.5, theta=math.pi / 6, aniso=-2, aniso_angle=math.pi / 3, tx=0.25, ty=-0.75
    )
    _, labels = AugmentPipe.standard(1)(random_images(1, 1, 8, 8), draws)
    expected = [1, 0, 1.5, math.sqrt(3) / 2 - 1, 0.5, -1, -math.sqrt(3), 0.25, -0.75]
    assert labels.dtype == torch.float32 and labels.shape == (1, LABEL_DIM)
    assert labels[0].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_labels_alone_reproduce_the_image(seed):
    pipe, z = AugmentPipe.standard(1), pixel_positions(*SHAPE)
    image = scene(z, *SHAPE).float()[None, None]
    drawn = pipe.draw(1, rng(seed))
    output, labels = pipe(image, drawn)
    xflip, yflip, scale, cos1, sin, aniso_x, aniso_y, tx, ty = labels[0].tolist()
    # (w, r) and (-w, r + pi) share a label: EDM's choice. The sign of w is looked up.
    w = math.copysign(math.hypot(aniso_x, aniso_y), drawn.aniso.item())
    told = make_draws(
        xflip=xflip, yflip=yflip, scale=scale, theta=math.atan2(sin, cos1 + 1), aniso=w,
        aniso_angle=math.atan2(aniso_y / w, aniso_x / w), tx=tx, ty=ty,
    )  # fmt: skip
    expected = scene(source_position(z, told, *SHAPE), *SHAPE)
    assert (output[0, 0] - expected).abs().max() < TURNED_ATOL


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 32, 32), (3, 64, 64), (2, 20, 36), (5, 3, 2)])
def test_closed_gates_give_zero_labels_and_the_image_itself(shape):
    images = random_images(4, *shape)
    output, labels = AugmentPipe.standard(0)(images, rng=rng())
    assert not labels.any()
    assert output.dtype == torch.float32 and output.shape == images.shape
    # float32 sampling positions are off by up to 1e-7 of the fine image's length
    assert (output - images).abs().max() < 5e-5


@pytest.mark.parametrize(
    "strength, values",
    [
        ("scale_std", dict(scale=1.2)),
        ("aniso_std", dict(aniso=1.2, aniso_angle=1)),
        ("translate_frac_std", dict(tx=1.2, ty=-0.4)),
    ],
)
def test_strengths_multiply_their_draws(strength, values):
    images = random_images(1, 3, 16, 16)
    switches = dict(scale=1, aniso=1, translate_frac=1)
    strong = AugmentPipe(**switches, **{strength: 2 * getattr(AugmentPipe(), strength)})
    output, labels = strong(images, make_draws(**values))
    doubled = {name: value * (1 if name == "aniso_angle" else 2) for name, value in values.items()}
    expected, doubled_labels = AugmentPipe(**switches)(images, make_draws(**doubled))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    assert not torch.equal(labels, doubled_labels)  # labels are the draws before their strengths


def test_rotate_frac_max_narrows_the_circle():
    theta = AugmentPipe(rotate_frac=1, rotate_frac_max=0.25).draw(1000, rng()).theta
    assert 0.24 * math.pi < theta.abs().max() <= 0.25 * math.pi


def test_images_are_not_resampled_when_no_warp_is_on():
    images = random_images(4, 3, 16, 16)
    output, _ = AugmentPipe(p=0.1, xflip=1, yflip=1)(images, make_draws(4))
    assert torch.equal(output, images)


def test_shrinking_fades_what_the_smaller_image_cannot_hold():
    x = torch.arange(64.0)
    image = torch.cos(0.9 * math.pi * x).expand(1, 1, 64, 64)
    halved, _ = AugmentPipe.standard(1)(image, make_draws(scale=-5))
    assert halved.abs().max() < 0.1  # plain reads of every second pixel would alias to amplitude 1


def test_sym6_is_orthonormal_with_six_vanishing_moments_and_a_centred_peak():
    h = torch.tensor(SYM6, dtype=torch.float64)
    k = torch.arange(len(h), dtype=torch.float64)
    for shift in range(0, len(h), 2):
        product = (h[shift:] * h[: len(h) - shift]).sum()
        assert product == pytest.approx(float(shift == 0), abs=1e-10)
    for power in range(6):
        moment = ((-1) ** k * (k - 5.5) ** power * h).sum()
        assert moment == pytest.approx(0, abs=1e-7)
    # Tells it from Daubechies' least-delay filter of the same order, and from its own mirror.
    assert (k * h).sum() / h.sum() == pytest.approx(5, abs=0.1)


def gates(draws):
    """Which gates are open, [B, 4]: scale, rotation, anisotropy, translation."""
    return torch.stack([draws.scale, draws.theta, draws.aniso, draws.tx], dim=1) != 0


def within(count, probability, n, deviations=5):
    """Whether a binomial count is near its mean; misses one in a million at 5 deviations."""
    return abs(count - n * probability) <= deviations * math.sqrt(
        n * probability * (1 - probability)
    )


@pytest.mark.parametrize("p", [0.12, 0.5])
def test_gates_open_independently_with_probability_p(p):
    n = 40_000
    draws = AugmentPipe.standard(p).draw(n, rng())
    opened = torch.cat(
        [gates(draws), draws.yflip[:, None], draws.xflip[:, None], draws.aniso_angle[:, None] != 0],
        dim=1,
    ).double()
    probability = [p] * 4 + [p / 2, 0.5, 0.5]
    together = opened.T @ opened
    for i in range(len(probability)):
        assert within(together[i, i], probability[i], n)
        for j in range(i):
            assert within(together[i, j], probability[i] * probability[j], n)
    assert torch.equal(draws.tx != 0, draws.ty != 0)


def test_half_of_the_images_are_x_flipped_at_any_positive_p():
    n = 10_000
    assert within(AugmentPipe.standard(1e-3).draw(n, rng()).xflip.sum(), 0.5, n)
    assert not AugmentPipe.standard(0).draw(n, rng()).xflip.any()


def test_multipliers_scale_the_gates():
    n = 40_000
    pipe = AugmentPipe(
        0.5, xflip=1, yflip=0.4, scale=0.2, rotate_frac=0.6, aniso=1, translate_frac=2
    )
    draws = pipe.draw(n, rng())
    assert within(draws.xflip.sum(), 0.25, n) and within(draws.yflip.sum(), 0.1, n)
    for count, probability in zip(gates(draws).sum(dim=0), [0.1, 0.3, 0.5, 1], strict=True):
        assert within(count, probability, n)


def test_open_gates_give_standard_normal_strengths_and_uniform_angles():
    n = 40_000
    draws = AugmentPipe.standard(1).draw(n, rng())
    normal = torch.stack([draws.scale, draws.aniso, draws.tx, draws.ty]).double()
    error = 5 / math.sqrt(n)  # 5 standard errors
    assert (normal @ normal.T / n - torch.eye(4)).abs().max() < error * math.sqrt(2)
    assert normal.mean(dim=1).abs().max() < error
    for angle in (draws.theta, draws.aniso_angle[draws.aniso_angle != 0]):
        level = (angle.double().sort().values / math.pi + 1) / 2  # uniform on [0, 1)
        steps = torch.arange(1, len(level) + 1) / len(level)
        assert level.min() >= 0 and level.max() < 1
        assert (level - steps).abs().max() < 2.5 / math.sqrt(len(level))  # Kolmogorov, 1 in 1e5


def test_a_slice_of_draws_does_to_a_slice_of_images_what_the_whole_does():
    images, pipe = random_images(12, 3, 32, 32), AugmentPipe.standard(0.5)
    draws = pipe.draw(len(images), rng())
    output, labels = pipe(images, draws)
    for part in (slice(0, 1), slice(3, 4), slice(4, 12), slice(0, 12, 3)):
        part_output, part_labels = pipe(images[part], draws[part])
        # Matrix products of another size may sum in another order, and move float32 sampling
        # positions by 1e-7 of the fine image's length; sines and cosines may round otherwise.
        torch.testing.assert_close(part_output, output[part], rtol=0, atol=5e-5)
        torch.testing.assert_close(part_labels, labels[part], rtol=1e-6, atol=5e-7)


def test_one_seed_gives_one_result_however_it_is_passed():
    images, pipe = random_images(8, 1, 16, 16), AugmentPipe.standard(0.5)
    output, labels = pipe(images, rng=rng(7))
    for again in (pipe(images, rng=rng(7)), pipe(images, pipe.draw(8, rng(7)))):
        assert torch.equal(again[0], output) and torch.equal(again[1], labels)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(7)
        assert torch.equal(pipe(images)[1], labels)
    assert not torch.equal(pipe(images, rng=rng(8))[1], labels)


def test_draws_depend_on_the_seed_alone_not_on_images_or_settings():
    pipe = AugmentPipe.standard(0.5)
    _, labels = pipe(random_images(8, 3, 16, 16), rng=rng())
    _, others = pipe(torch.zeros(8, 1, 20, 12), rng=rng())
    assert torch.equal(labels, others)
    # A wider gate opens on more images, and never changes what it lets through.
    many, few = AugmentPipe.standard(1).draw(200, rng()), pipe.draw(200, rng())
    opened = gates(few)
    assert opened.any() and not opened.all()
    for column, name in enumerate(["scale", "theta", "aniso", "tx"]):
        at = opened[:, column]
        assert torch.equal(getattr(few, name)[at], getattr(many, name)[at])


def test_the_images_given_are_left_as_they_were():
    images = random_images(8, 3, 16, 16)
    before = images.clone()
    AugmentPipe.standard(1)(images, rng=rng())
    assert torch.equal(images, before)


def test_no_number_of_a_tensor_is_needed_on_the_host():
    # Meta tensors have no numbers: reading one, or a shape that depends on one, raises.
    output, labels = AugmentPipe.standard(0.5)(torch.zeros(4, 3, 32, 32, device="meta"))
    assert output.shape == (4, 3, 32, 32) and labels.shape == (4, LABEL_DIM)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_is_never_waited_for():
    images = random_images(4, 3, 32, 32).cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    AugmentPipe.standard(0.5)(images, rng=generator)  # starts cuBLAS
    torch.cuda.set_sync_debug_mode("error")
    try:
        AugmentPipe.standard(0.5)(images[:, :, :, :30], rng=generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("prob", [0.0, 0.2, 1.0])
def test_the_stretched_axis_is_turned_with_its_probability(prob):
    draws = AugmentPipe(1.0, aniso=1, aniso_rotate_prob=prob).draw(2000, rng())
    assert within((draws.aniso_angle != 0).sum(), prob, 2000)


def test_a_seed_draws_eleven_uniform_then_four_normal_rows():
    # What a step of a seed trains on is part of what a run can be resumed from.
    draws = AugmentPipe.standard(1.0).draw(6, rng(3))
    source = rng(3)
    uniform = torch.rand([11, 6], generator=source)
    normal = torch.randn([4, 6], generator=source)
    torch.testing.assert_close(draws.theta, (uniform[9] * 2 - 1) * math.pi)
    assert torch.equal(draws.xflip, uniform[6] < 0.5)
    assert torch.equal(draws.yflip, uniform[7] < 0.5)
    for name, row in (("scale", 0), ("aniso", 1), ("tx", 2), ("ty", 3)):
        assert torch.equal(getattr(draws, name), normal[row]), name
