"""Guidance: its identities, what it costs, and where it leads samplers."""

import itertools
import math

import pytest
import torch

from pfgmpp.guidance import guided
from pfgmpp.kernel import PerturbationKernel
from pfgmpp.networks import EDMPrecond, VEPrecond
from pfgmpp.samplers import SamplerConfig, generate_images

INF = math.inf
SHORT = (1, 2, 128, INF)
CLASSES = 3
CPU = torch.device("cpu")
CD = {"method": "cd", "levels": [80.0, 0.821]}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


def network(D=INF, label_dim=CLASSES, seed=0, cls=EDMPrecond, side=8, **kwargs):
    torch.manual_seed(seed)
    net = cls(side, 3, label_dim=label_dim, pfgmpp=not math.isinf(D), D=D, model_type="SongUNet",
              model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], **kwargs)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net.eval().requires_grad_(False)


class Ideal:
    """The ideal denoiser of one point per class, and of all points together without a label."""

    sigma_min, sigma_max = 0.0, INF
    cond_channels = 0

    def __init__(self, points, D, label_dim=None):
        self.points, self.D = points, D
        self.image_shape = tuple(points.shape[1:])
        self.label_dim = len(points) if label_dim is None else label_dim
        self.kernel, self.batches = PerturbationKernel(D), []

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)

    def __call__(self, x, sigma, class_labels=None):
        self.batches.append(len(x))
        sigma = torch.as_tensor(sigma, dtype=torch.float64).expand(len(x))
        return torch.cat([
            self.kernel.posterior_mean(x[i:i + 1], sigma[i],
                                       self.points[class_labels[i].bool()] if self.label_dim
                                       and class_labels[i].any() else self.points)
            for i in range(len(x))])


def counted(net):
    """Returns the list of the batch sizes at which the network will be evaluated."""
    sizes = []
    net.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    return sizes


LABELS = torch.eye(CLASSES)[[0, 2, 1, 1]]

# ---- identities ---------------------------------------------------------------------------------


@pytest.mark.parametrize("with_gnet", [False, True])
@pytest.mark.parametrize("D", SHORT)
def test_guidance_of_one_is_the_network_itself_at_no_cost(D, with_gnet):
    net, gnet = network(D), network(D, seed=1) if with_gnet else None
    x, expected = 3 * randn(4, 3, 8, 8), None
    expected = net(x, 3.0, LABELS)
    sizes, others = counted(net), counted(gnet) if gnet else []
    assert torch.equal(guided(net, guidance=1, gnet=gnet)(x, 3.0, LABELS), expected)
    assert sizes == [4] and others == []


@pytest.mark.parametrize("D", SHORT)
def test_guidance_of_zero_is_the_guide(D):
    net, gnet, x = network(D), network(D, seed=1), 3 * randn(4, 3, 8, 8)
    # The two halves of one batch of 8 may round otherwise than a batch of 4.
    torch.testing.assert_close(guided(net, guidance=0)(x, 3.0, LABELS), net(x, 3.0),
                               rtol=1e-4, atol=1e-5)
    assert torch.equal(guided(net, guidance=0, gnet=gnet)(x, 3.0, LABELS), gnet(x, 3.0, LABELS))


@pytest.mark.long
@pytest.mark.parametrize("w", [0.5, 2.0, 7.0])
@pytest.mark.parametrize("D", SHORT)
def test_guidance_extrapolates_from_the_guide_through_the_network(D, w):
    net, gnet, x = network(D), network(D, label_dim=0, seed=1), 3 * randn(4, 3, 8, 8)
    for denoise, guide in ((guided(net, guidance=w), net(x, 3.0)),
                           (guided(net, guidance=w, gnet=gnet), gnet(x, 3.0))):
        expected = (1 - w) * guide.double() + w * net(x, 3.0, LABELS).double()
        torch.testing.assert_close(denoise(x, 3.0, LABELS).double(), expected,
                                   rtol=1e-4, atol=1e-4 * w)


def test_one_batch_of_twice_the_size_serves_network_and_guide():
    net, gnet, x = network(), network(seed=1), randn(4, 3, 8, 8)
    sizes = counted(net)
    guided(net, guidance=2)(x, 1.0, LABELS)
    assert sizes == [8]
    others = counted(gnet)
    guided(net, guidance=2, gnet=gnet)(x, 1.0, LABELS)
    assert sizes == [8, 4] and others == [4]


@pytest.mark.parametrize("shape", [[], [4], [4, 1, 1, 1]])
@pytest.mark.parametrize("sigma, inside", [(0.5, False), (0.51, True), (2.0, True), (2.01, False)])
def test_the_interval_is_open_below_and_closed_above(sigma, inside, shape):
    net, x = network(), randn(4, 3, 8, 8)
    sigma = torch.full(shape, sigma, dtype=torch.float64)
    plain, everywhere = net(x, sigma, LABELS), guided(net, guidance=3)(x, sigma, LABELS)
    sizes = counted(net)
    result = guided(net, guidance=3, interval=(0.5, 2.0))(x, sigma, LABELS)
    assert sizes == ([8] if inside else [4])
    assert torch.equal(result, everywhere if inside else plain)
    assert (plain - everywhere).abs().max() > 1e-3


@pytest.mark.parametrize("gnet_labels", [None, 0, CLASSES])
def test_each_image_is_guided_by_its_own_noise_level(gnet_labels):
    net = network(cond_channels=1)
    gnet = None if gnet_labels is None else network(label_dim=gnet_labels, seed=1)
    x, condition = randn(4, 3, 8, 8), randn(4, 1, 8, 8, seed=2)
    sigma = torch.tensor([0.1, 1.0, 5.0, 1.5])
    denoise = guided(net, guidance=3, gnet=gnet, interval=(0.5, 2.0))
    for levels in (sigma, sigma.reshape(4, 1, 1, 1)):
        sizes = counted(net)
        together = denoise(x, levels, LABELS, condition=condition)
        assert sum(sizes) == (6 if gnet is None else 4), "no image is evaluated needlessly"
        for i in range(4):
            rows = slice(i, i + 1)
            alone = denoise(x[rows], sigma[i], LABELS[rows], condition=condition[rows])
            torch.testing.assert_close(together[rows], alone, rtol=1e-4, atol=1e-5)


# ---- where samples go ---------------------------------------------------------------------------

SAMPLERS = [{}, {"solver": "euler"}, {"discretization": "vp", "schedule": "vp", "scaling": "vp"},
            {"discretization": "ve", "schedule": "ve"}]


@pytest.mark.parametrize("settings", SAMPLERS, ids=str)
@pytest.mark.parametrize("D", SHORT)
def test_samples_end_on_the_line_from_the_guide_through_the_network(D, settings):
    # A denoiser of one point is that point at every D, sigma and x; so is the guided one, at
    # guide + w (main - guide). A step to 0 ends there exactly where time is sigma; with another
    # schedule it goes as far as with that one point for data.
    main, guide = randn(2, 1, 3, 2, 2).double()
    net, gnet = Ideal(main, D, label_dim=0), Ideal(guide, D, label_dim=0)
    end = guide + 2.5 * (main - guide)
    results = []
    for denoise in (guided(net, guidance=2.5, gnet=gnet), Ideal(end, D, label_dim=0)):
        [batch] = generate_images(denoise, [range(3)], device=CPU,
                                  sampler=SamplerConfig(num_steps=5, **settings))
        results.append(batch.images)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
    if "schedule" not in settings:
        torch.testing.assert_close(results[0], end.expand(3, -1, -1, -1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("D", SHORT)
def test_classifier_free_guidance_moves_samples_from_the_mean_of_all_towards_the_class(D):
    # At large sigma the denoiser without a label is the mean of all points (at finite D too, as
    # |x - y| / sigma loses its differences), that with one is the class's point.
    points = randn(3, 1, 2, 2, seed=5).double()
    net, labels, x = Ideal(points, D), torch.eye(3, dtype=torch.float64), 1e4 * randn(3, 1, 2, 2)
    denoised = guided(net, guidance=2)(x.double(), 1e4, labels)
    torch.testing.assert_close(denoised, 2 * points - points.mean(0), rtol=1e-2, atol=1e-2)
    [batch] = generate_images(guided(net, guidance=3), [range(4)], device=CPU, class_idx=1,
                              sampler=SamplerConfig(num_steps=20))
    # At sigma_min a sample that is near its point sees that point alone, with label or without.
    others = (batch.images[:, None] - points).flatten(2).norm(dim=2)
    assert (others.argmin(1) == 1).all()


def test_at_infinite_D_the_guided_denoiser_is_that_of_the_product_density():
    # Gaussian data Normal(m, s^2): p(x; sigma) = Normal(m, s^2 + sigma^2). Tweedie's formula for
    # p_main^w p_guide^(1-w), differentiated by autograd, against the guided ideal denoisers.
    w, sigma = 2.0, 0.7
    laws = {"main": (0.8, 0.3), "guide": (-0.2, 1.1)}

    class Gaussian(Ideal):
        def __call__(self, x, sigma, class_labels=None):
            m, s = self.law
            return (s**2 * x + sigma**2 * m) / (s**2 + sigma**2)

    nets = {}
    for name, law in laws.items():
        nets[name] = Gaussian(torch.zeros(1, 1, 2, 2), INF, label_dim=0)
        nets[name].law = law
    x = randn(3, 1, 2, 2).double().requires_grad_()
    log_density = sum(
        weight * torch.distributions.Normal(m, math.hypot(s, sigma)).log_prob(x).sum()
        for weight, (m, s) in ((w, laws["main"]), (1 - w, laws["guide"])))
    score, = torch.autograd.grad(log_density, x)
    denoised = guided(nets["main"], guidance=w, gnet=nets["guide"])(x, sigma)
    torch.testing.assert_close(denoised, x + sigma**2 * score)


def evaluations(interval, settings):
    """Returns the batch sizes of a run over one seed, and the noise levels of its evaluations."""
    levels = []

    class Recorded(Ideal):
        def __call__(self, x, sigma, class_labels=None):
            levels.append(float(sigma))
            return super().__call__(x, sigma, class_labels)
    net = Recorded(randn(2, 1, 2, 2).double(), INF)
    denoise = guided(net, guidance=2, interval=interval)
    [_] = generate_images(denoise, [[0]], sampler=SamplerConfig(num_steps=6, **settings),
                          device=CPU)
    return net.batches, levels


@pytest.mark.parametrize("settings", SAMPLERS, ids=str)
def test_every_evaluation_of_a_solver_is_decided_by_its_own_level(settings):
    sizes, levels = evaluations((0.3, 5.0), settings)
    assert len(sizes) == (6 if settings.get("solver") == "euler" else 11)
    assert sizes == [2 if 0.3 < level <= 5.0 else 1 for level in levels]
    assert {1, 2} == set(sizes)
    if not settings:  # a step of Heun's straddles each end
        pairs = list(itertools.pairwise(sizes))
        assert (1, 2) in pairs and (2, 1) in pairs


# ---- what samplers see, what is refused ---------------------------------------------------------

def test_a_guided_network_has_the_attributes_of_its_network_and_the_shared_range():
    net = network(128, cls=VEPrecond, sigma_min=0.01, sigma_max=50.0)
    gnet = network(128, cls=VEPrecond, sigma_min=0.1, sigma_max=70.0, seed=1)
    denoise = guided(net, guidance=2, gnet=gnet)
    assert (denoise.sigma_min, denoise.sigma_max) == (0.1, 50.0)
    assert (denoise.D, denoise.N, denoise.label_dim) == (128, 192, CLASSES)
    assert denoise.image_shape == (3, 8, 8)
    assert float(denoise.round_sigma(torch.tensor(3.0))) == 3.0
    with pytest.raises(AttributeError):
        denoise.no_such_name  # noqa: B018


@pytest.mark.parametrize("arguments, words", [
    ({"guidance": -1}, "guidance=-1"),
    ({"guidance": math.nan}, "guidance=nan"),
    ({"guidance": INF}, "guidance=inf"),
    ({"guidance": 2, "interval": (2.0, 2.0)}, "LO < HI"),
    ({"guidance": 2, "interval": (-1.0, 2.0)}, "0 <= LO"),
    ({"guidance": 2, "interval": (math.nan, 2.0)}, "0 <= LO"),
    ({"guidance": 2, "gnet": network(64)}, "D 64.0, the network 128.0"),
    ({"guidance": 2, "gnet": network(128, side=16)}, "(3, 16, 16), the network (3, 8, 8)"),
    ({"guidance": 2, "gnet": network(128, label_dim=2)}, "label_dim 2, the network 3"),
    ({"guidance": 2, "gnet": network(128, cond_channels=1)}, "cond_channels 1, the network 0"),
    ({"guidance": 2, "gnet": network(128, few_step=CD)}, "the guide is a few-step network (cd)"),
], ids=str)
def test_what_does_not_fit_is_refused_in_one_line(arguments, words):
    with pytest.raises(ValueError) as error:
        guided(network(128), **arguments)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_an_unconditional_network_needs_a_second_one():
    net = network(label_dim=0)
    with pytest.raises(ValueError, match="gnet"):
        guided(net, guidance=2)
    guided(net, guidance=2, gnet=network(label_dim=0, seed=1))
    guided(net, guidance=1)


def test_a_few_step_network_is_not_guided():
    with pytest.raises(ValueError, match="the network is a few-step network"):
        guided(network(few_step=CD), guidance=2)


def test_guidance_towards_no_label_is_refused():
    with pytest.raises(ValueError, match="class_labels"):
        guided(network(), guidance=2)(randn(2, 3, 8, 8), 1.0)
