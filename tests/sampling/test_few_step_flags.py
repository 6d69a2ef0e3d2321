"""Few-step networks on the command line: what is refused and warned of, in the user's words."""

import pytest
from snapshots import write_few_step, write_snapshot
from tiny import write_dataset

import generate


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A few-step network of each kind, the denoiser that they could be of, and images."""
    folder = tmp_path_factory.mktemp("few")
    write_few_step(folder / "cd.pt", label_dim=0)
    write_few_step(folder / "ipfm.pt", "ipfm", [2.0], label_dim=0)
    write_snapshot(folder / "denoiser.pt", label_dim=0)
    write_dataset(folder / "data.zip", num=4, classes=0)
    return folder


@pytest.fixture
def made(world, tmp_path, invoke):
    """Returns a function that runs generate.py on a network, and what it says."""
    def run(network, *flags):
        flags = [flag.replace("WORLD", str(world)) for flag in flags]
        return invoke(generate.main, f"--network={world / network}", "--seeds=0-1",
                      f"--outdir={tmp_path / 'out'}", "--device=cpu", *flags)
    return run


def lines(text, start):
    return [line for line in text.splitlines() if line.startswith(start)]


@pytest.mark.parametrize("network", ["cd.pt", "ipfm.pt"])
@pytest.mark.parametrize("flags, words", [
    (["--encode=WORLD/data.zip"], "a few-step network"),
    (["--measure=denoise", "--measure-sigma=0.1", "--init-image=WORLD/data.zip"],
     "a few-step network"),
    (["--sigma_max=5"], "a few-step network has its own noise levels; leave --sigma_max out"),
    (["--rho=5"], "a few-step network has its own noise levels; leave --rho out"),
    (["--disc=ve"], "a few-step network has its own noise levels; leave --disc out"),
    (["--S_churn=40"], "a few-step network solves no equation; leave --S_churn out"),
    (["--alpha=0.1"], "a few-step network solves no equation; leave --alpha out"),
    (["--schedule=vp"], "a few-step network solves no equation; leave --schedule out"),
    (["--solver=heun"], "is a few-step network"),
    (["--guidance=2", "--gnet=WORLD/denoiser.pt"], "is a few-step network")], ids=str)
def test_the_flag_that_was_typed_is_to_blame_and_no_other(made, tmp_path, network, flags, words):
    result = made(network, *flags)
    [line] = lines(result.output, "Error: ")
    assert result.exit_code == 2 and words in line
    assert line.startswith(f"Error: {flags[0].partition('=')[0]}=")
    assert "--solver" in line if "--solver=heun" in flags else "--solver" not in line
    assert not (tmp_path / "out").exists()


def test_a_solver_that_was_typed_is_named(made):
    [line] = lines(made("cd.pt", "--solver=consistency", "--S_churn=40").output, "Error: ")
    assert "--solver=consistency solves no equation" in line


def test_a_few_step_network_guides_nothing(made, tmp_path):
    result = made("denoiser.pt", "--guidance=2", "--gnet=WORLD/cd.pt")
    [line] = lines(result.output, "Error: ")
    assert result.exit_code == 1 and "--gnet=" in line
    assert "the guide is a few-step network (cd), not a denoiser" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("network, flags, level", [
    ("cd.pt", ["--sigmas=200"], "200, above 80"), ("cd.pt", ["--sigmas=80,3"], None),
    ("ipfm.pt", ["--sigmas=80"], "80, above 2"), ("ipfm.pt", ["--sigmas=2,1"], None),
    ("ipfm.pt", ["--init-image=WORLD/data.zip", "--init-sigma=2.2"], "2.2, above 2"),
    ("ipfm.pt", ["--init-image=WORLD/data.zip", "--init-sigma=2"], None),
    ("ipfm.pt", ["--steps=4"], None), ("denoiser.pt", ["--sigmas=200,1"], None)], ids=str)
def test_levels_above_those_of_training_are_warned_of(made, network, flags, level):
    result = made(network, *flags)
    assert result.exit_code == 0, result.output
    warned = lines(result.stderr, "Warning: ")
    if level is None:
        assert not warned
    else:
        [line] = warned
        assert f"{flags[-1].partition('=')[0]}: sampling starts at sigma {level}" in line


def test_a_guide_of_other_labels_is_refused(made, world, tmp_path):
    kinds = {"vectors": {"label_kind": "vectors"}, "classes": {"label_kind": "classes"}}
    for kind, record in kinds.items():
        write_snapshot(world / f"{kind}.pt", cond=True, dataset=record)
    result = made("classes.pt", "--guidance=2", "--gnet=WORLD/vectors.pt")
    [line] = lines(result.output, "Error: ")
    assert "vectors.pt: was trained on vectors" in line and "on classes; give a guide" in line
    assert made("classes.pt", "--guidance=2", "--gnet=WORLD/classes.pt").exit_code == 0
