"""The structure of the U-Nets, held by numbers that the published code gives.

tests/data/published-unets.json was computed by the U-Nets of github.com/NVlabs/edm (commit 008a4e5,
PyTorch 2.13, float64, AMD EPYC, 2026-11-29) on the networks, weights and inputs that stand here:
three outputs, the norms of outputs, of gradients and of the input's gradient. In float64 only the
softmax of the published attention and the frequencies of the embedding are float32, so that every
machine agrees to 1e-6; ours was within 2e-7 of them, and gradients within 6e-7.
"""

import json
import math

import pytest
import torch
from scripts import ROOT

from pfgmpp.unets import DhariwalUNet, SongUNet

FACTS = json.loads((ROOT / "tests/data/published-unets.json").read_text())
BASE = {"img_resolution": 8, "in_channels": 3, "out_channels": 3, "label_dim": 3, "augment_dim": 9,
        "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 2, "attn_resolutions": [4],
        "dropout": 0}
NCSNPP = {"embedding_type": "fourier", "encoder_type": "residual"}
NO_LABELS = {"label_dim": 0, "augment_dim": 0, "num_blocks": 1}
ADM = {**BASE, "model_channels": 64, "num_blocks": 1}
NETWORKS = {
    "ddpmpp": (SongUNet, BASE),
    "ncsnpp": (SongUNet, {**BASE, **NCSNPP, "channel_mult_noise": 2,
                          "resample_filter": [1, 3, 3, 1]}),
    "skip-skip": (SongUNet, {**BASE, "encoder_type": "skip", "decoder_type": "skip",
                             "resample_filter": [1, 3, 3, 1]}),
    "standard-skip": (SongUNet, {**BASE, "decoder_type": "skip"}),
    "skip-standard": (SongUNet, {**BASE, "encoder_type": "skip"}),
    "residual-skip": (SongUNet, {**BASE, **NCSNPP, "decoder_type": "skip"}),
    "three-levels": (SongUNet, {**BASE, **NO_LABELS, "img_resolution": 16,
                                "channel_mult": [1, 2, 2], "attn_resolutions": [16, 4]}),
    "adm": (DhariwalUNet, ADM),
    "adm-three-levels": (DhariwalUNet, {**ADM, **NO_LABELS, "channel_mult": [1, 1, 2],
                                        "attn_resolutions": [8, 2]}),
}


def wave(shape, phase):
    """Numbers that are the same on every machine and under every version of PyTorch."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(0.7 * i + phase).reshape(shape)


def filled(net):
    net.double()
    with torch.no_grad():
        for k, (name, p) in enumerate(net.named_parameters()):
            if p.ndim > 1:
                p.copy_(wave(p.shape, k) * math.sqrt(2 / p[0].numel()))
            else:
                p.copy_(0.3 * wave(p.shape, k) + ("norm" in name and name.endswith("weight")))
        for name, buffer in net.named_buffers():
            if name.endswith("freqs"):
                buffer.copy_(2 * wave(buffer.shape, 0.5))
    return net


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients_are_those_of_the_published_network(name):
    cls, kwargs = NETWORKS[name]
    facts, net = FACTS[name], filled(cls(**kwargs)).train()
    size = kwargs["img_resolution"]
    x = wave([2, 3, size, size], 1.0).requires_grad_()
    labels = wave([2, kwargs["label_dim"]], 2.0) if kwargs["label_dim"] else None
    augment = wave([2, kwargs["augment_dim"]], 3.0) if kwargs["augment_dim"] else None
    output = net(x, torch.tensor([-0.8, 0.6], dtype=torch.float64), labels, augment)
    (output * wave(output.shape, 4.0)).sum().backward()
    flat, scale = output.detach().flatten(), facts["output_norm"]
    ends = [flat[i].item() for i in (0, len(flat) // 3, len(flat) - 1)]
    assert ends == pytest.approx(facts["output"], abs=1e-6 * scale)
    assert flat.norm().item() == pytest.approx(scale, rel=1e-6)
    assert x.grad.norm().item() == pytest.approx(facts["input_grad"], rel=2e-6)
    norms = {key: p.grad.norm().item() for key, p in net.named_parameters() if p.grad is not None}
    assert len(norms) == facts["num_gradients"]
    total = math.hypot(*norms.values())
    assert total == pytest.approx(facts["all_gradients"], rel=2e-6)
    for key, norm in facts["gradients"].items():
        assert norms[key] == pytest.approx(norm, rel=2e-6, abs=1e-6 * total), key
