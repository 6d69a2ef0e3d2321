"""Settings of runs by name, in the units of the flags; no PyTorch is needed.

Presets of published runs set every hyperparameter, even those equal to train.py's defaults, so that
all are in one place. D is not part of a preset: --pfgmpp and --aug_dim choose it, and everything
else stays the same.

    cifar10-*, ffhq64-*, afhqv2-*, imagenet64-adm    EDM (Karras et al. 2022) and PFGM++ (Xu et al.
                                                     2023); no score is published for PFGM++ on
                                                     AFHQv2 and ImageNet
    cifar10-cond-vp, afhqv2-ve                       of these, EDM only; vp and ve are its names for
                                                     the architectures DDPM++ and NCSN++
    lsun256, emoji32, digits8                        this project's own, as starting points; the
                                                     scores of digits8 are in docs/results.md

The presets of distill.py do not set D either:

    cifar10-ect     Geng et al. 2024, arXiv 2406.14548 (ECT), 8 stages
    cifar10-cd      Song et al. 2023, arXiv 2303.01469, and its code, with the pseudo-Huber distance
                    of Song and Dhariwal 2023, arXiv 2310.14189, in place of LPIPS
    cifar10-ipfm    the public code of inverse flow matching distillation (IDMD), with alpha = 1 of
                    Zhou et al. 2024, arXiv 2404.04057
"""

from typing import Any

_CIFAR10 = {"batch": 512, "lr": 1e-3, "lr_rampup": 10, "duration": 200, "ema": 0.5,
            "dropout": 0.13, "augment": 0.12}
_FACES64 = {"cond": False, "arch": "ddpmpp", "batch": 256, "cres": (1, 2, 2, 2), "lr": 2e-4,
            "lr_rampup": 10, "duration": 200, "ema": 0.5, "augment": 0.15}

PRESETS: dict[str, dict[str, Any]] = {
    "cifar10-ncsnpp": {"cond": False, "arch": "ncsnpp", **_CIFAR10},
    "cifar10-ddpmpp": {"cond": False, "arch": "ddpmpp", **_CIFAR10},
    "cifar10-cond": {"cond": True, "arch": "ncsnpp", **_CIFAR10},
    "cifar10-cond-vp": {"cond": True, "arch": "ddpmpp", **_CIFAR10},
    "ffhq64-ddpmpp": {**_FACES64, "dropout": 0.05},
    "ffhq64-ncsnpp": {**_FACES64, "arch": "ncsnpp", "dropout": 0.05},
    "afhqv2-64": {**_FACES64, "dropout": 0.25},
    "afhqv2-ve": {**_FACES64, "arch": "ncsnpp", "dropout": 0.25},
    "imagenet64-adm": {
        "cond": True, "arch": "adm", "batch": 4096, "batch_gpu": 32, "lr": 1e-4, "lr_rampup": 10,
        "duration": 2500, "ema": 50, "dropout": 0.10, "augment": 0, "precision": "fp16", "ls": 100,
        "tick": 200},
    "lsun256": {
        "cond": False, "arch": "ddpmpp", "batch": 256, "batch_gpu": 8, "cres": (1, 1, 2, 2, 4, 4),
        "lr": 2e-4, "lr_rampup": 10, "duration": 200, "ema": 0.5, "dropout": 0, "augment": 0,
        "lsun": True, "precision": "bf16"},
    "emoji32": {  # examples/emoji-google-32.zip on the CPU: takes minutes, not for a good model
        "cond": True, "arch": "ncsnpp", "batch": 64, "cbase": 32, "cres": (1, 2), "nblock": 2,
        "lr": 1e-3, "lr_rampup": 0.005, "duration": 0.02, "ema": 0.5, "dropout": 0, "augment": 0,
        "xflip": False, "tick": 1, "snap": 10, "dump": 10},
    "digits8": {  # examples/digits8.zip on the CPU: minutes, good digits
        "cond": True, "arch": "ncsnpp", "batch": 128, "cbase": 32, "cres": (1,), "nblock": 2,
        "lr": 2e-3, "lr_rampup": 0.005, "duration": 0.12, "ema": 0.005, "dropout": 0, "augment": 0,
        "sigma_data": None, "xflip": False, "tick": 10, "snap": 2, "dump": 4},
}

_ECT_HALFLIFE = 0.887  # Mimg, for a decay of 0.9999 per step of 128 images
DISTILL_PRESETS: dict[str, dict[str, Any]] = {
    "cifar10-ect": {
        "method": "ect", "batch": 128, "lr": 1e-4, "lr_rampup": 0, "optim": "radam",
        "duration": 25.6, "ema": _ECT_HALFLIFE, "dropout": 0.2, "P_mean": -1.1, "P_std": 2.0,
        "ect_q": 2, "ect_k": 8, "ect_b": 1, "ect_c": 0, "ect_double": 3.2},
    "cifar10-cd": {
        "method": "cd", "batch": 512, "lr": 4e-4, "lr_rampup": 10, "optim": "radam",
        "duration": 409.6, "ema": 3.55, "dropout": 0, "cd_scales": 18, "cd_decay": 0,
        "cd_metric": "huber"},
    "cifar10-ipfm": {
        "method": "ipfm", "batch": 512, "lr": 1e-5, "lr_rampup": 0.512, "optim": "adam",
        "duration": 10.24, "ema": 0.355, "dropout": 0, "P_mean": -1.2, "P_std": 1.2,
        "ipfm_steps": 5, "aux_lr": 1e-3, "ipfm_alpha": 1},
}
