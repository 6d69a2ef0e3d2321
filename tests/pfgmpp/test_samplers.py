"""Seeds to images: what a seed determines, in which order it draws, and nothing else."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from host_reads import HostReads

from images.scaling import default_scaling
from pfgmpp.kernel import PerturbationKernel
from pfgmpp.networks import EDMPrecond
from pfgmpp.samplers import (
    SamplerConfig,
    StackedRandomGenerator,
    draw_latents,
    edm_sampler,
    generate_images,
    to_uint8,
)

INF = math.inf
SHORT = (1, 2, 128, INF)
CPU = torch.device("cpu")
CLASSES = 3


class PixelModel(torch.nn.Module):
    """Pixel by pixel and without matrix products: its rounding does not depend on the batch."""

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        if class_labels is None or class_labels.shape[1] == 0:
            return 0.25 * x
        number = (class_labels * torch.arange(1.0, CLASSES + 1)).sum(1)
        return 0.25 * x + number.reshape(-1, 1, 1, 1)


def network(D, label_dim=CLASSES, pixelwise=True):
    torch.manual_seed(0)
    net = EDMPrecond(8, 3, label_dim=label_dim, pfgmpp=not math.isinf(D), D=D,
                     model_type="SongUNet", model_channels=8, channel_mult=[1, 2], num_blocks=1,
                     attn_resolutions=[4]).eval()
    if pixelwise:
        net.model = PixelModel()
    return net


def generator(seed):
    return torch.Generator().manual_seed(seed)


def images_of(net, batches, class_idx=None, **settings):
    settings = {"num_steps": 4, **settings}
    found = {}
    for batch in generate_images(net, batches, sampler=SamplerConfig(**settings), device=CPU,
                                 class_idx=class_idx):
        for seed, image in zip(batch.seeds, batch.images, strict=True):
            assert seed not in found
            found[seed] = image
    return found


# ---- generators ---------------------------------------------------------------------------------

def test_rows_are_the_draws_of_each_seeds_own_generator():
    seeds = [5, 0, 123456]
    stack, singles = StackedRandomGenerator(CPU, seeds), [generator(s) for s in seeds]
    for _ in range(2):  # the streams go on
        drawn = stack.randn([3, 2, 4])
        assert torch.equal(drawn, torch.stack([torch.randn([2, 4], generator=g) for g in singles]))
        drawn = stack.randint(10, size=[3, 5])
        assert torch.equal(
            drawn, torch.stack([torch.randint(10, size=[5], generator=g) for g in singles]))
        drawn = stack.randn_like(torch.zeros(3, 7, dtype=torch.float64))
        assert torch.equal(drawn, torch.stack(
            [torch.randn([7], generator=g, dtype=torch.float64) for g in singles]))


def test_rows_do_not_depend_on_their_neighbours():
    together = StackedRandomGenerator(CPU, [3, 9, 4]).randn([3, 2, 2])
    for row, seed in zip(together, [3, 9, 4], strict=True):
        assert torch.equal(StackedRandomGenerator(CPU, [seed]).randn([1, 2, 2])[0], row)
    repeated = StackedRandomGenerator(CPU, [7, 7]).randn([2, 4])
    assert torch.equal(repeated[0], repeated[1])


def test_seeds_count_modulo_two_to_the_32():
    large = StackedRandomGenerator(CPU, [2**32 + 5, 3 * 2**32 + 1]).randn([2, 6])
    assert torch.equal(large, StackedRandomGenerator(CPU, [5, 1]).randn([2, 6]))
    # The CPU's generator looks at 32 bits anyway; CUDA's does not.
    stack = StackedRandomGenerator(CPU, [2**32 + 5, 2**32 - 1])
    assert [rng.initial_seed() for rng in stack.generators] == [5, 2**32 - 1]


@pytest.mark.parametrize("D", SHORT)
def test_stacked_scales_are_those_of_the_kernel(D):
    kernel = PerturbationKernel(D)
    scale = StackedRandomGenerator(CPU, [8, 2]).kernel_scale(kernel)
    assert scale.dtype == torch.float64
    expected = torch.cat([kernel.scale(1, generator(8)), kernel.scale(1, generator(2))])
    assert torch.equal(scale, expected)


# ---- latents ------------------------------------------------------------------------------------

@pytest.mark.parametrize("label_dim", [0, CLASSES])
@pytest.mark.parametrize("D", SHORT)
def test_a_seed_draws_z_then_its_class_then_chi_square_then_noise(D, label_dim):
    seeds = [11, 4, 2**32 + 4]
    latents, labels, stack = draw_latents(network(D, label_dim), seeds, CPU)
    noise = stack.randn_like(latents.double())
    for i, seed in enumerate(seeds):
        rng = generator(seed % 2**32)
        z = torch.randn([3, 8, 8], generator=rng)
        if label_dim:
            k = torch.randint(label_dim, size=[], generator=rng)
            assert torch.equal(labels[i], torch.eye(label_dim)[k])
        scale = PerturbationKernel(D).scale(1, rng)
        torch.testing.assert_close(latents[i].double(), z.double() * scale, rtol=1e-7, atol=0)
        assert torch.equal(
            noise[i], torch.randn([3, 8, 8], generator=rng, dtype=torch.float64))
    assert label_dim or labels is None or labels.shape == (3, 0)


def test_latents_at_D_inf_are_randn_of_the_seed_bit_for_bit():
    latents, _, _ = draw_latents(network(INF), range(5), CPU)
    expected = torch.stack([torch.randn([3, 8, 8], generator=generator(s)) for s in range(5)])
    assert torch.equal(latents.double(), expected.double())


def test_latents_at_finite_D_follow_the_kernels_prior():
    N, D, count = 192, 2, 2000
    latents, _, _ = draw_latents(network(D), range(count), CPU)
    ratio = latents.double().square().sum([1, 2, 3]).numpy() / D
    assert scipy.stats.kstest(ratio, scipy.stats.betaprime(N / 2, D / 2).cdf).pvalue > 1e-3


def test_one_seed_shows_one_class_and_direction_at_every_D():
    reference, labels, _ = draw_latents(network(INF), range(20), CPU)
    flat = reference.double().flatten(1)
    for D in (1, 2, 128):
        latents, paired, _ = draw_latents(network(D), range(20), CPU)
        assert torch.equal(paired, labels)
        cosine = torch.nn.functional.cosine_similarity(latents.double().flatten(1), flat)
        assert (cosine > 1 - 1e-6).all()


def test_classes_are_uniform_over_seeds():
    _, labels, _ = draw_latents(network(INF), range(900), CPU)
    assert ((labels == 0) | (labels == 1)).all() and (labels.sum(1) == 1).all()
    assert scipy.stats.chisquare(labels.sum(0).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("D", SHORT)
def test_an_overridden_class_leaves_all_else_of_a_seed(D):
    net = network(D)
    latents, _, stack = draw_latents(net, range(6), CPU)
    chosen, labels, chosen_stack = draw_latents(net, range(6), CPU, class_idx=2)
    assert torch.equal(labels, torch.eye(3)[2].expand(6, 3))
    assert torch.equal(latents, chosen)
    assert torch.equal(stack.randn([6, 4]), chosen_stack.randn([6, 4]))


# ---- images -------------------------------------------------------------------------------------

@pytest.mark.parametrize("D", SHORT)
def test_an_image_depends_on_its_seed_alone(D):
    net = network(D)
    whole = images_of(net, [range(6)])
    for batches in ([[0], [1], [2], [3], [4], [5]], [[5, 3, 1], [], [0, 2, 4]]):
        split = images_of(net, batches)
        assert split.keys() == whole.keys()
        assert all(torch.equal(split[seed], whole[seed]) for seed in whole)
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("D", SHORT)
def test_an_image_depends_on_its_seed_alone_with_churn(D):
    net = network(D)
    settings = {"S_churn": 2.0, "S_min": 0.01, "S_max": 50.0}
    whole = images_of(net, [range(4)], **settings)
    split = images_of(net, [[3], [1, 0], [2]], **settings)
    assert all(torch.equal(split[seed], whole[seed]) for seed in whole)
    quiet = images_of(net, [range(4)])
    assert not torch.equal(quiet[0], whole[0])


@pytest.mark.parametrize("D", SHORT)
def test_a_seed_draws_noise_then_chi_square_at_every_step_of_churn(D):
    net, seed, states = network(D, label_dim=0), 5, []
    sampler = SamplerConfig(num_steps=4, S_churn=1, S_min=0.01, S_max=10)
    [batch] = generate_images(net, [[seed]], sampler=sampler, device=CPU,
                              watch=lambda x, sigma: states.append((x, sigma)))
    rng = generator(seed)
    torch.randn([3, 8, 8], generator=rng)
    kernel = PerturbationKernel(D)
    kernel.scale(1, rng)
    x_hat = []
    for i, (x, sigma) in enumerate(states):
        z = torch.randn([3, 8, 8], generator=rng, dtype=torch.float64)
        gamma = 0.25 if 0.01 <= sigma <= 10 else 0  # the second and third of the levels
        assert gamma == (0.25 if i in (1, 2) else 0)
        residual = x - net(x, sigma).double() if gamma else x
        scale = kernel.posterior_scale(residual, sigma, rng)
        x_hat.append(x + scale * sigma * math.sqrt((1 + gamma) ** 2 - 1) * z)
    # The last step is Euler's to 0, so it returns D(x; sigma_min).
    last = net(x_hat[-1], states[-1][1]).double()
    torch.testing.assert_close(batch.images, last, rtol=1e-6, atol=1e-6)
    step = states[2][1] - 1.25 * states[1][1]
    raised = 1.25 * states[1][1]
    first = (x_hat[1] - net(x_hat[1], raised).double()) / raised
    middle = x_hat[1] + step * first
    second = (middle - net(middle, states[2][1]).double()) / states[2][1]
    torch.testing.assert_close(states[2][0], x_hat[1] + step * (first + second) / 2,
                               rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("D", SHORT)
def test_churn_at_no_level_changes_nothing(D):
    net = network(D)
    quiet, none = images_of(net, [range(3)]), images_of(net, [range(3)], S_churn=5, S_min=1e9)
    assert all(torch.equal(quiet[seed], none[seed]) for seed in quiet)


@pytest.mark.long
@pytest.mark.parametrize("D", SHORT)
def test_a_real_network_gives_one_image_a_seed_whatever_the_batch(D):
    net = network(D, pixelwise=False)
    whole, split = images_of(net, [range(5)]), images_of(net, [[4], [0, 1], [3, 2]])
    for seed in whole:
        # Sums over channels may be ordered differently for another batch size.
        torch.testing.assert_close(split[seed], whole[seed], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("D", SHORT)
def test_images_are_the_sampler_applied_to_the_seeds_latents(D):
    net = network(D)
    settings = {"num_steps": 5, "sigma_min": 0.01, "sigma_max": 20.0, "rho": 5.0}
    images = images_of(net, [range(4)], **settings)
    latents, labels, _ = draw_latents(net, range(4), CPU)
    expected = edm_sampler(net, latents, labels, **settings)
    for seed in range(4):
        assert torch.equal(images[seed].double(), expected[seed])


def test_a_chosen_class_changes_images_and_is_recorded():
    net = network(INF)
    batch, = generate_images(net, [[0, 1]], sampler=SamplerConfig(num_steps=3), device=CPU,
                             class_idx=1)
    assert batch.seeds == [0, 1]
    assert torch.equal(batch.class_labels, torch.eye(3)[1].expand(2, 3))
    one, two = (images_of(net, [[0]], class_idx=k)[0] for k in (0, 2))
    assert (one - two).abs().max() > 0.01


def test_images_carry_no_graph():
    assert not any(image.requires_grad for image in images_of(network(2), [[0]]).values())


# ---- pixels -------------------------------------------------------------------------------------

def test_uint8_is_the_clipped_scaled_value_truncated():
    x = torch.linspace(-1.5, 1.5, 30_011, dtype=torch.float64)
    expected = np.clip(x.numpy() * 127.5 + 128, 0, 255).astype(int)
    pixels = to_uint8(x.reshape(1, 1, 1, -1))
    assert pixels.dtype == torch.uint8
    np.testing.assert_array_equal(pixels.flatten(), expected)
    ends = torch.tensor([-1e30, -1.0, 0.0, 1.0, 1e30]).reshape(1, 1, 1, 5)
    assert to_uint8(ends).flatten().tolist() == [0, 0, 128, 255, 255]


def test_uint8_undoes_the_training_scale():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_uint8(pixels.float() / 127.5 - 1), pixels)


@pytest.mark.parametrize("settings", [
    {"num_steps": 0}, {"sigma_min": 3.0, "sigma_max": 2.0}, {"sigma_min": 0.0},
    {"sigma_max": math.nan}], ids=str)
def test_settings_that_make_no_grid_are_refused_before_any_sampling(settings):
    with pytest.raises(ValueError) as error:
        SamplerConfig(**settings).check(network(INF))
    assert "\n" not in str(error.value) and str(error.value)


def test_stacked_generators_take_the_device_as_the_references_give_it():
    rnd = StackedRandomGenerator("cpu", [1, 2])
    z = rnd.randn([2, 3], device="cpu")
    k = rnd.randint(10, size=[2], device="cpu")
    again = StackedRandomGenerator("cpu", [1, 2])
    assert torch.equal(z, again.randn([2, 3])) and torch.equal(k, again.randint(10, size=[2]))


# ---- shapes, and starting from an image ---------------------------------------------------------

@pytest.mark.parametrize("size, channels", [([4, 8], 3), ([8, 4], 1), (4, 5)])
def test_latents_and_samples_have_the_networks_shape(size, channels):
    net = EDMPrecond(size, channels, pfgmpp=True, D=2, model_type="SongUNet", model_channels=8,
                     channel_mult=[1, 2], num_blocks=1, attn_resolutions=[]).eval()
    latents, _, _ = draw_latents(net, [5], CPU)
    z = torch.randn(list(net.image_shape), generator=(rng := generator(5)))
    expected = z.double() * PerturbationKernel(2).scale(1, rng)
    torch.testing.assert_close(latents[0], expected, rtol=1e-7, atol=0)
    assert images_of(net, [[5]])[5].shape == net.image_shape


ABLATIONS = [{}, {"solver": "euler", "discretization": "ve"},
             {"schedule": "vp", "scaling": "vp"}, {"discretization": "vp", "schedule": "ve"}]


@pytest.mark.parametrize("settings", ABLATIONS, ids=str)
@pytest.mark.parametrize("D", SHORT)
def test_sampling_starts_at_the_given_image_plus_noise_of_the_kernel(D, settings):
    net, seeds, states = network(D), [7, 3], []
    given = torch.rand(2, 3, 8, 8, generator=generator(1)) * 2 - 1
    sampler = SamplerConfig(num_steps=4, sigma_max=2.5, **settings)
    [_] = generate_images(net, [seeds], sampler=sampler, device=CPU, inits=lambda seeds: given,
                          watch=lambda x, sigma: states.append((x, sigma)))
    latents, _, _ = draw_latents(net, seeds, CPU)
    x, sigma = states[0]
    assert float(sigma) == pytest.approx(2.5, rel=1e-6)
    # Relative to the noise: the schedules invert sigma to t and back.
    torch.testing.assert_close(x, given.double() + 2.5 * latents, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("D", SHORT)
def test_a_start_of_zeros_is_the_prior(D):
    net = network(D)
    zeros = [batch.images for batch in generate_images(
        net, [[0, 1]], sampler=SamplerConfig(num_steps=4), device=CPU,
        inits=lambda seeds: torch.zeros(len(seeds), 3, 8, 8))]
    plain = images_of(net, [[0, 1]])
    assert torch.equal(zeros[0][0], plain[0]) and torch.equal(zeros[0][1], plain[1])


class TwoPoints:
    """The ideal denoiser of two images."""

    sigma_min, sigma_max, label_dim, image_shape = 0.0, INF, 0, (1, 4, 4)
    round_sigma = staticmethod(torch.as_tensor)

    def __init__(self, D):
        self.D, self.points = D, torch.stack([torch.full([1, 4, 4], s) for s in (-1.0, 1.0)])

    def __call__(self, x, sigma, class_labels=None):
        return PerturbationKernel(self.D).posterior_mean(x, sigma, self.points.double())


@pytest.mark.parametrize("settings", ABLATIONS[:2], ids=str)
@pytest.mark.parametrize("D", (2, 128, INF))
def test_little_noise_keeps_the_given_image_and_much_forgets_it(D, settings):
    # The points are 8 apart. Noise of level 0.3 has |n| of 0.3 |z| sqrt(D/c), 1.2 at D = inf and
    # with D = 2 beyond 4 for 13% of seeds at most; at level 80 it hides which one was given.
    net, seeds = TwoPoints(D), range(40)

    def kept(level):
        [batch] = generate_images(
            net, [seeds], sampler=SamplerConfig(num_steps=30, sigma_max=level, **settings),
            device=CPU, inits=lambda seeds: net.points[[k % 2 for k in seeds]])
        ends = (batch.images.mean([1, 2, 3]) > 0).long()
        return (ends == torch.arange(40) % 2).float().mean().item()
    assert kept(0.3) > 0.8
    assert 0.2 < kept(80.0) < 0.8


def test_images_of_a_data_set_are_scaled_by_their_type():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    seen = default_scaling(pixels.dtype).to_network(torch.from_numpy(pixels))
    assert torch.equal(to_uint8(seen), torch.from_numpy(pixels))
    assert seen.flatten()[[0, -1]].tolist() == [-1, 1]
    for dtype in (np.float32, np.float64):
        values = np.linspace(-3, 3, 12, dtype=dtype).reshape(1, 3, 2, 2)
        seen = default_scaling(dtype).to_network(torch.from_numpy(values))
        assert seen.dtype == torch.float32
        np.testing.assert_allclose(seen, values, rtol=1e-7)


@pytest.mark.long
@pytest.mark.parametrize("settings", [{}, {"solver": "euler", "discretization": "vp",
                                           "schedule": "vp", "scaling": "vp"}])
def test_a_longer_sampling_reads_nothing_more_from_the_device(settings):
    """What is read is of the grid, on the host; steps add nothing."""
    counts = []
    for steps in (3, 6):
        net = network(128, pixelwise=False)
        sampler = SamplerConfig(num_steps=steps, S_churn=5, noise_alpha=0.1, **settings)
        latents, labels, rnd = draw_latents(net, [0, 1], CPU)
        with HostReads() as reads, torch.no_grad():  # inference mode hides reads
            sampler.sample(net, latents, labels, rnd.randn_like,
                           posterior_scale=rnd.posterior_scale)
        counts.append(len(reads.found))
    assert counts[0] == counts[1]
