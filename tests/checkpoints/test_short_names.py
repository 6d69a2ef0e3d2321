"""Short names of published networks, wherever a network can be named."""

import pytest
from snapshots import write_snapshot

from checkpoints import checkpoint
from checkpoints.names import PUBLISHED, find_network, find_networks, found_note

CIFAR = "edm-cifar10-cond-vp"


def test_short_names_mean_the_addresses_of_edms_files():
    base = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/"
    assert {
        "edm-cifar10-cond-vp": f"{base}edm-cifar10-32x32-cond-vp.pkl",
        "edm-cifar10-cond-ve": f"{base}edm-cifar10-32x32-cond-ve.pkl",
        "edm-cifar10-uncond-vp": f"{base}edm-cifar10-32x32-uncond-vp.pkl",
        "edm-cifar10-uncond-ve": f"{base}edm-cifar10-32x32-uncond-ve.pkl",
        "edm-ffhq-uncond-vp": f"{base}edm-ffhq-64x64-uncond-vp.pkl",
        "edm-ffhq-uncond-ve": f"{base}edm-ffhq-64x64-uncond-ve.pkl",
        "edm-afhqv2-uncond-vp": f"{base}edm-afhqv2-64x64-uncond-vp.pkl",
        "edm-afhqv2-uncond-ve": f"{base}edm-afhqv2-64x64-uncond-ve.pkl",
        "edm-imagenet-cond-adm": f"{base}edm-imagenet-64x64-cond-adm.pkl"} == PUBLISHED
    assert find_network(CIFAR) == PUBLISHED[CIFAR]
    assert find_networks([CIFAR, PUBLISHED[CIFAR]]) == [PUBLISHED[CIFAR]]


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / CIFAR).write_bytes(b"x")
    assert find_network(CIFAR) == CIFAR
    assert found_note(CIFAR, PUBLISHED[CIFAR]) == f"{PUBLISHED[CIFAR]} ({CIFAR})"
    (tmp_path / CIFAR).unlink()
    (tmp_path / CIFAR).mkdir()
    (tmp_path / CIFAR / "network-snapshot-000001.pt").write_bytes(b"x")
    newest = f"{CIFAR}/network-snapshot-000001.pt"
    assert find_network(CIFAR) == newest
    assert found_note(CIFAR, newest) == f"{newest}, the newest of {CIFAR}"


def test_a_wrong_short_name_is_told_the_right_ones():
    with pytest.raises(FileNotFoundError, match=f"edm-cifar: no such file; .* one of {CIFAR}, "):
        find_network("edm-cifar")


def test_a_short_name_loads_what_its_address_holds(tmp_path, monkeypatch):
    path = write_snapshot(tmp_path / "network-snapshot-000007.pt")
    asked = []

    def open_url(source):
        asked.append(source)
        return open(path, "rb")

    monkeypatch.setattr(checkpoint, "open_url", open_url)
    assert checkpoint.load(CIFAR).keys() == checkpoint.load(PUBLISHED[CIFAR]).keys()
    assert asked == [PUBLISHED[CIFAR]] * 2
