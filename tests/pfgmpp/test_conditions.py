"""Condition images: what the network sees of them, and that they are moved like their images."""

import json
import math

import pytest
import torch

from checkpoints import checkpoint
from pfgmpp.augment import AugmentPipe
from pfgmpp.loss import EDMLoss, VELoss, VPLoss
from pfgmpp.networks import EDMPrecond, VEPrecond, VPPrecond, build_network, iDDPMPrecond
from pfgmpp.samplers import SamplerConfig, generate_images

INF = math.inf
SHORT = (1, 2, 128, INF)
PRECONDS = (EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond)
SONG = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1,
        "attn_resolutions": [4], "augment_dim": 9}
MODELS = {
    "ddpmpp": SONG,
    "ncsnpp": {**SONG, "embedding_type": "fourier", "encoder_type": "residual",
               "channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1]},
    "skip": {**SONG, "encoder_type": "skip", "decoder_type": "skip"},
    "adm": {**SONG, "model_type": "DhariwalUNet", "model_channels": 64},
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


def network(arch="ddpmpp", cls=EDMPrecond, size=(8, 12), cond_channels=2, **kwargs):
    torch.manual_seed(0)
    net = cls(list(size), 3, cond_channels=cond_channels, **MODELS[arch], **kwargs)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net.eval().requires_grad_(False)


class Recorder(torch.nn.Module):
    """Stands in for the network or for F: keeps what it is given, returns a function of it."""

    def __init__(self, function):
        super().__init__()
        self.function, self.calls = function, []

    def forward(self, x, sigma, class_labels=None, augment_labels=None, **told):
        self.calls.append((x, sigma, told))
        return self.function(x, **told)


# ---- the network --------------------------------------------------------------------------------

@pytest.mark.parametrize("cond_c_in", [False, True])
@pytest.mark.parametrize("cls", PRECONDS)
def test_the_model_sees_the_condition_beside_the_scaled_image(cls, cond_c_in):
    net = network(cls=cls, cond_c_in=cond_c_in)
    outputs = 6 if cls is iDDPMPrecond else 3
    net.model = Recorder(lambda x: torch.zeros(len(x), outputs, *x.shape[2:]))
    x, condition, sigma = randn(4, 3, 8, 12), randn(4, 2, 8, 12, seed=1), torch.arange(1.0, 5)
    net(x, sigma, condition=condition)
    [(seen, _, _)] = net.model.calls
    c_in = {EDMPrecond: (sigma**2 + 0.25).rsqrt(), VEPrecond: torch.ones(4)}.get(
        cls, (sigma**2 + 1).rsqrt())
    c_in = c_in.reshape(4, 1, 1, 1)
    torch.testing.assert_close(seen[:, :3], c_in * x)
    torch.testing.assert_close(seen[:, 3:], c_in * condition if cond_c_in else condition,
                               rtol=1.3e-6 * cond_c_in, atol=0)


@pytest.mark.parametrize("arch", MODELS)
def test_each_image_is_denoised_by_its_own_condition(arch):
    net, x = network(arch), randn(3, 3, 8, 12)
    condition = randn(3, 2, 8, 12, seed=1)
    before = net(x, 1.0, condition=condition)
    changed = condition.clone()
    changed[1] += 1
    after = net(x, 1.0, condition=changed)
    moved = (after - before).abs().amax([1, 2, 3])
    assert moved[1] > 1e-3 and moved[0] == moved[2] == 0


@pytest.mark.parametrize("arch", MODELS)
def test_a_condition_widens_the_first_layers_and_nothing_else(arch):
    plain, told = (
        {name: tuple(value.shape) for name, value in network(arch, cond_channels=c).state_dict(
            ).items()} for c in (0, 2))
    assert plain.keys() == told.keys()
    changed = {name.removeprefix("model.enc.") for name in plain if plain[name] != told[name]}
    beside = {"ncsnpp": {"4x6_aux_residual.weight"}, "skip": {"4x6_aux_skip.weight"}}
    assert changed == {"8x12_conv.weight"} | beside.get(arch, set())


@pytest.mark.parametrize("arch", MODELS)
def test_the_weights_of_the_image_are_those_that_its_channels_are_counted_in(arch):
    """Channels and these weights in another order give the same image; any fewer weights do not."""
    model, order = network(arch).model, [3, 0, 4, 1, 2]
    x, c_noise = randn(2, 5, 8, 12), torch.zeros(2)
    before = model(x, c_noise, None)
    parameters = dict(model.named_parameters())
    for name in model.image_weights:
        assert (model(x[:, order], c_noise, None) - before).abs().max() > 1e-3
        parameters[name].data = parameters[name].data[:, order]
    torch.testing.assert_close(model(x[:, order], c_noise, None), before, rtol=1e-4, atol=1e-5)


def test_without_conditions_there_is_nothing_to_multiply():
    with pytest.raises(ValueError, match="cond_c_in=True: the network has no condition"):
        network(cond_channels=0, cond_c_in=True)
    assert "cond_c_in" not in network().config


def test_without_condition_channels_a_network_is_as_it_always_was():
    config = network(cond_channels=0).config
    assert "cond_channels" not in config
    torch.manual_seed(0)
    explicit = build_network({**config, "cond_channels": 0})
    torch.manual_seed(0)
    assert checkpoint.digest(dict(build_network(config).state_dict())) == (
        checkpoint.digest(dict(explicit.state_dict())))
    assert explicit.config == config


@pytest.mark.long
@pytest.mark.parametrize("cls", PRECONDS)
def test_a_conditional_network_comes_back_from_its_file(cls, tmp_path):
    net = network(cls=cls, **({"sigma_data": 0.8, "cond_c_in": True} if cls is EDMPrecond else {}))
    config = json.loads(json.dumps(net.config))
    assert config["cond_channels"] == 2 and config["img_resolution"] == [8, 12]
    checkpoint.save(tmp_path / "net.pt", {
        "format": checkpoint.SNAPSHOT_FORMAT, "network": config, "ema": dict(net.state_dict()),
        "progress": {"cur_nimg": 0}, "options": {}})
    copy = checkpoint.build_ema(checkpoint.load(tmp_path / "net.pt"))
    x, condition = randn(2, 3, 8, 12), randn(2, 2, 8, 12, seed=1)
    # Weights that lie otherwise in memory may be summed in another order.
    torch.testing.assert_close(copy(x, 1.0, condition=condition),
                               net(x, 1.0, condition=condition), rtol=1e-4, atol=1e-5)
    assert checkpoint.digest(dict(copy.state_dict())) == checkpoint.digest(dict(net.state_dict()))
    assert getattr(copy, "sigma_data", None) == getattr(net, "sigma_data", None)


@pytest.mark.parametrize("cond_channels, shape, words", [
    (2, None, "needs a condition image of 2 channels"),
    (0, [2, 2, 8, 12], "takes none"),
    (2, [2, 1, 8, 12], "must be [2, 2, 8, 12]"),
    (2, [1, 2, 8, 12], "must be [2, 2, 8, 12]"),
    (2, [2, 2, 12, 8], "must be [2, 2, 8, 12]"),
])
def test_a_condition_that_does_not_fit_is_refused_in_one_line(cond_channels, shape, words):
    net = network(cond_channels=cond_channels)
    with pytest.raises(ValueError) as error:
        net(randn(2, 3, 8, 12), 1.0, condition=None if shape is None else torch.zeros(shape))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("change, words", [
    ({"img_resolution": [8]}, "img_resolution=a list"),
    ({"img_resolution": [8, 1 << 20]}, "img_resolution=a list"),
    ({"img_resolution": [8, True]}, "img_resolution=a list"),
    ({"img_resolution": [8, 13]}, "nearest width 12 or 14"),
    ({"img_resolution": [16, 24]}, "lacks the tensor"),
    ({"cond_channels": -1}, "cond_channels=-1"),
    ({"cond_channels": 3}, "must be [8, 6, 3, 3]"),
], ids=str)
def test_a_file_that_claims_another_shape_is_refused_before_it_is_built(change, words):
    net = network()
    with pytest.raises(ValueError) as error:
        checkpoint.build_ema({"network": {**net.config, **change}, "ema": dict(net.state_dict())})
    assert words in str(error.value) and "\n" not in str(error.value)


# ---- the loss -----------------------------------------------------------------------------------

def loss_of(cls, D):
    return cls(pfgmpp=not math.isinf(D), D=D)


@pytest.mark.parametrize("D", SHORT)
@pytest.mark.parametrize("cls", [EDMLoss, VELoss, VPLoss])
def test_noise_is_on_the_image_alone(cls, D):
    loss_fn, y, condition = loss_of(cls, D), randn(4, 3, 8, 12), randn(4, 2, 8, 12, seed=1)
    draws = loss_fn.draw(y.shape, seeded(2))
    told, bare = Recorder(lambda x, condition: x), Recorder(lambda x: x)
    with_condition = loss_fn(told, y, draws=draws, condition=condition)
    assert torch.equal(with_condition, loss_fn(bare, y, draws=draws))
    [(x, _, seen)], [(plain, _, _)] = told.calls, bare.calls
    assert torch.equal(x, plain) and torch.equal(seen["condition"], condition)


@pytest.mark.parametrize("size", [(8, 8), (8, 14)])
@pytest.mark.parametrize("D", SHORT)
def test_image_and_condition_are_augmented_alike(D, size):
    # The condition is a copy of the image. Moved alike, it is the target of the loss, and the
    # network that returns it has none. The warp is a matrix product: float32 rounding.
    y, loss_fn, pipe = randn(6, 3, *size), loss_of(EDMLoss, D), AugmentPipe.standard(1.0)
    draws = loss_fn.draw(y.shape, seeded(3), pipe)
    net = Recorder(lambda x, condition: condition)
    loss = loss_fn(net, y, None, pipe, draws=draws, condition=y.clone())
    [(_, sigma, told)] = net.calls
    assert (loss <= loss_fn.weight(sigma) * 1e-10).all()
    moved, labels = pipe(y, draws.augment)
    torch.testing.assert_close(told["condition"], moved, rtol=1e-5, atol=1e-5)
    assert (moved - y).abs().max() > 0.1 and labels.abs().max() > 0.1


def test_a_condition_changes_nothing_of_what_the_image_sees():
    y, loss_fn, pipe = randn(6, 3, 8, 8), EDMLoss(), AugmentPipe.standard(1.0)
    draws = loss_fn.draw(y.shape, seeded(3), pipe)
    told, bare = Recorder(lambda x, condition: x), Recorder(lambda x: x)
    loss_fn(told, y, None, pipe, draws=draws, condition=randn(6, 1, 8, 8, seed=1))
    loss_fn(bare, y, None, pipe, draws=draws)
    torch.testing.assert_close(told.calls[0][0], bare.calls[0][0], rtol=1e-5, atol=1e-5)


def test_stable_targets_with_a_condition_are_refused():
    y = randn(4, 3, 8, 8)
    with pytest.raises(ValueError, match="stable targets with a condition image"):
        EDMLoss()(Recorder(lambda x, condition: x), y, reference=y, condition=y)


def test_the_loss_of_a_network_without_its_condition_is_refused():
    with pytest.raises(ValueError, match="needs a condition"):
        EDMLoss()(network(), randn(2, 3, 8, 12))


# ---- sampling -----------------------------------------------------------------------------------

class Told(torch.nn.Module):
    """A denoiser that knows the answer: the condition's first channels."""

    sigma_min, sigma_max, label_dim, image_shape = 0.0, INF, 0, (1, 2, 3)
    round_sigma = staticmethod(torch.as_tensor)

    def __init__(self, D):
        super().__init__()
        self.D = D

    def forward(self, x, sigma, class_labels=None, *, condition):
        return condition.to(x.dtype)


@pytest.mark.parametrize("settings", [{}, {"solver": "euler"}], ids=str)
@pytest.mark.parametrize("D", SHORT)
def test_each_seed_is_sampled_for_its_own_condition(D, settings):
    conditions = randn(5, 1, 2, 3)
    batches = generate_images(Told(D), [[7, 3], [0]], device=torch.device("cpu"),
                              sampler=SamplerConfig(num_steps=3, **settings),
                              conditions=lambda seeds: conditions[[seed % 5 for seed in seeds]])
    images = torch.cat([batch.images for batch in batches])
    torch.testing.assert_close(images, conditions[[2, 3, 0]].double(), rtol=1e-6, atol=1e-6)
