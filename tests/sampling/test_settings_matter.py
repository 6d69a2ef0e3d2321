"""Every option of sampling decides the images, and is recorded beside them where it does."""

import functools
import json

import pytest
import torch
from snapshots import write_snapshot
from tiny import write_dataset

import generate
from pfgmpp.samplers import SamplerConfig
from sampling.image_writer import ImageFolder
from sampling.network_sampler import NetworkSampler
from sampling.sampling_options import sampling_options
from sampling.sweeps import sweep_points

# Options of the sampler, by name: (what else is given, a value other than the default).
_CHURN = {"S_churn": 20.0}
_GUIDED = {"guidance": 3.0}
_STARTED = {"init_image": "IMAGES", "init_sigma": 1.0}
_MEASURED = {"init_image": "IMAGES", "measure": "denoise", "measure_sigma": 1.0}
OTHER = {
    "class_idx": ({}, 1),
    "num_steps": ({}, 4),
    "noise_alpha": ({}, 0.5),
    "bits": ({}, 3),
    "rounding_seed": ({"bits": 3, "rounding_seed": 0}, 1),
    "sigma_min": ({}, 0.5),
    "sigma_max": ({}, 5.0),
    "rho": ({}, 2.0),
    "S_churn": ({}, 20.0),
    "S_min": (_CHURN, 1.0),
    "S_max": (_CHURN, 1.0),
    "S_noise": (_CHURN, 1.2),
    "solver": ({}, "euler"),
    "order": ({"solver": "ipndm"}, 1),
    "sigmas": ({}, (80.0, 2.0, 0.1)),
    "discretization": ({}, "vp"),
    "schedule": ({"discretization": "edm"}, "vp"),
    "scaling": ({"schedule": "vp"}, "vp"),
    "guidance": ({}, 3.0),
    "gnet": (_GUIDED, "GUIDE"),
    "guidance_interval": (_GUIDED, (0.5, 5.0)),
    "init_image": (_STARTED, "OTHER_IMAGES"),
    "init_sigma": (_STARTED, 2.0),
    "init_level": ({"init_image": "IMAGES", "init_level": 127.5}, 255.0),
    "init_noise": (_STARTED, 0.0),
    "blend": (_STARTED, 0.5),
    "last": ({"init_image": "IMAGES", "last": 2}, 1),
    "stop_sigma": ({}, 0.001),
    "measure": (_MEASURED, "downsample:2"),
    "measure_sigma": (_MEASURED, 0.1),
    "measure_level": ({"init_image": "IMAGES", "measure": "denoise", "measure_level": 127.5}, 15.0),
    "measure_by": (_MEASURED, "projection"),
    "average": (_STARTED, 3),
    "tile": ({}, 4),
    "precision": ({}, "bf16"),
}
# Those that decide no image, with the reason.
NOT_HERE = {
    "pfgmpp": "for files that do not record D; else it has to agree",
    "aug_dim": "likewise",
    "cond_image": "the next test: only networks with a condition image take it",
    "label_source": "for labels by seed; test_labels.py",
    "key": "for files of several networks, of which the record has the weights",
    "compiled": "the same images but for rounding; test_generate.py",
}
NAMES_OF_SWEEPS = {"steps": "num_steps", "alpha": "noise_alpha", "bits": "bits"}
RECORDED_AS = {"class_idx": {"class"}, "init_sigma": {"sigma_max"}, "init_level": {"sigma_max"},
               "measure_level": {"measure_sigma"}, "measure": {"measure", "measure_factor"},
               "gnet": {"gnet", "gnet_network"}}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    return {"NETWORK": write_snapshot(root / "net.pt", pfgmpp=True, aug_dim=2.5),
            "GUIDE": write_snapshot(root / "guide.pt", pfgmpp=True, aug_dim=2.5, seed=1),
            "IMAGES": write_dataset(root / "images.zip"),
            "OTHER_IMAGES": write_dataset(root / "other.zip", num=7, classes=0),
            "CONDITIONAL": write_snapshot(root / "cond.pt", cond_channels=3)}


def sample(files, network="NETWORK", **options):
    """Returns the images of three seeds, and what is recorded of them."""
    options = {"num_steps": 3} | {
        name: str(files[value]) if value in files else value for name, value in options.items()}
    return _sample(str(files[network]), tuple(options.items()))


@functools.cache
def _sample(network, options):
    sampler = NetworkSampler.open(network, torch.device("cpu"), **dict(options))
    return next(sampler.images([[0, 1, 2]])).images, sampler.settings


def test_every_option_is_looked_at():
    names = {param.name for param in sampling_options(lambda: None).__click_params__}
    assert {NAMES_OF_SWEEPS.get(name, name) for name in names} == OTHER.keys() | NOT_HERE.keys()


@pytest.mark.long
@pytest.mark.parametrize("name", OTHER)
def test_an_option_changes_the_images_and_the_record(name, files):
    base, other = OTHER[name]
    images, settings = sample(files, **base)
    other_images, other_settings = sample(files, **base | {name: other})
    assert images.shape != other_images.shape or not torch.allclose(
        images, other_images, atol=1e-4)
    changed = {key for key in settings | other_settings
               if settings.get(key) != other_settings.get(key)}
    assert changed - {"nfe"} == RECORDED_AS.get(name, {name})
    config = SamplerConfig(other_settings["num_steps"], solver=other_settings["solver"],
                           last=other_settings.get("last"))
    assert other_settings["nfe"] == config.nfe


def test_the_condition_images_change_the_images_and_the_record(files):
    images, settings = sample(files, "CONDITIONAL", cond_image="IMAGES")
    other_images, other_settings = sample(files, "CONDITIONAL", cond_image="OTHER_IMAGES")
    assert not torch.allclose(images, other_images, atol=1e-3)
    assert {key for key in settings if settings[key] != other_settings[key]} == {"cond_image"}


def test_a_record_that_differs_in_any_key_is_refused_by_name(files, tmp_path, invoke):
    args = [f"--network={files['NETWORK']}", f"--outdir={tmp_path / 'out'}", "--seeds=0",
            "--steps=2", "--guidance=2", f"--gnet={files['GUIDE']}", "--guidance-interval=0.5,5",
            "--bits=8", "--rounding-seed=3", "--alpha=0.1",
            f"--init-image={files['IMAGES']}", "--init-sigma=1"]
    assert invoke(generate.main, *args).exit_code == 0
    [path] = tmp_path.rglob("generate.json")
    record = json.loads(path.read_text())
    folder = ImageFolder(path.parent, (3, 8, 8), subdirs=False)
    folder.open(record)
    assert len(record) >= 20
    folder.open({**record, "nfe": 99})  # which follows from the others
    for key, value in record.items():
        if key == "nfe":
            continue
        without = {k: v for k, v in record.items() if k != key}
        words = "of another network" if key == "weights" else rf"with another setting \({key}: "
        for changed in ({**record, key: "another"}, without):
            if changed is without and value is None:  # absent says the same as None
                folder.open(changed)
                continue
            if key in ("network", "gnet_network"):  # which old records lack
                path.write_text(json.dumps(without))
                folder.open(record)
                path.write_text(json.dumps(record))
                if changed is without:
                    continue
            for then, now in ((changed, record), (record, changed)):
                if key == "weights" and now is without:
                    continue  # no sampler is without weights
                path.write_text(json.dumps(then))
                with pytest.raises(ValueError, match=words):
                    folder.open(now)
                path.write_text(json.dumps(record))


def test_lists_become_each_combination_once():
    points = sweep_points((2, 3), (0.0, 0.5), (8, 32))
    asked = [(p.settings["num_steps"], p.settings["noise_alpha"], p.settings["bits"])
             for p in points]
    assert sorted(asked) == sorted(
        (s, a, b) for s in (2, 3) for a in (0.0, 0.5) for b in (8, 32))
    assert len({p.suffix for p in points}) == len(points) and all(p.suffix for p in points)
