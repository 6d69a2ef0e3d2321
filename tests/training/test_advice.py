"""Warnings at the start of a run: who gets which, and that they are shown once."""

import re

import pytest
import torch
from tiny import TINY_RUN

import train
from pfgmpp.networks import build_network
from torch_utils.misc import count_parameters
from training.advice import LARGE_FOR_CPU, Machine, advice, cpu_has_bf16
from training.config import PRECISIONS, TrainConfig
from training.presets import PRESETS

CPU, OLD_CPU = (Machine("cpu", has_bf16=has_bf16) for has_bf16 in (True, False))
V100, H100 = (Machine("cuda", name, capability) for name, capability in (
    ("Tesla V100", (7, 0)), ("NVIDIA H100", (9, 0))))
AMD = Machine("cuda", "AMD Instinct MI300X")


def lines(machine=H100, parameters=1000, **options):
    return advice(TrainConfig(data="none", **options), machine, parameters)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("machine", [H100, AMD], ids=lambda machine: machine.name)
def test_published_runs_on_a_gpu_get_none(name, machine):
    assert lines(machine, 300_000_000, **PRESETS[name]) == []


def test_the_example_for_the_cpu_gets_none_there():
    config = TrainConfig(data="none", **PRESETS["emoji32"])
    with torch.device("meta"):
        parameters = count_parameters(build_network(config.network(32, 3, 9)))
    assert advice(config, OLD_CPU, parameters) == []


@pytest.mark.parametrize("options, words", [
    ({"duration": 0.004}, ["--duration=0.004", "--lr-rampup=10:", " 0.04% of --lr=0.001",
                           "such as --lr-rampup=0.0002"]),
    ({"duration": 3, "lr_rampup": 4}, ["--duration=3", "--lr-rampup=4:", " 75% ",
                                       "such as --lr-rampup=0.15"]),
    ({"duration": 10}, []), ({"duration": 0.004, "lr_rampup": 0.004}, []),
    ({"duration": 0.004, "lr_rampup": 0}, [])], ids=str)
def test_a_run_that_ends_within_the_rampup_is_told_the_rate_that_it_reaches(options, words):
    found = lines(**options)
    assert len(found) == bool(words)
    assert all(word in found[0] for word in words)
    if words:  # what it advises is enough, and the share is that of the highest rate
        again = float(re.search(r"such as --lr-rampup=([\d.]+)$", found[0])[1])
        assert lines(**options | {"lr_rampup": again}) == []


def test_a_start_of_no_decay_is_named():
    [line] = lines(lr_decay_start=5)
    assert "--lr-decay-start=5 has no effect" in line
    assert lines(lr_decay_start=5, lr_decay="rsqrt") == []


@pytest.mark.parametrize("machine, parameters, expected", [
    (CPU, LARGE_FOR_CPU + 1, True), (CPU, LARGE_FOR_CPU, False), (H100, 10**9, False)])
def test_a_large_network_on_the_cpu_is_told_its_size_and_ways_out(machine, parameters, expected):
    found = lines(machine, parameters)
    assert len(found) == expected
    assert not found or all(word in found[0] for word in (
        "10,000,001 parameters", "--cbase", "--cres", "--preset=emoji32"))


@pytest.mark.parametrize("machine, precision, words", [
    (CPU, "fp16", ["fp16 is for GPUs", "fp32"]), (CPU, "tf32", ["no effect on the CPU"]),
    (OLD_CPU, "bf16", ["slow on this CPU", "AVX512_BF16", "--precision=fp32"]),
    (V100, "bf16", ["slow on Tesla V100", "7.0", "--precision=fp16"]),
    (V100, "tf32", ["no effect on Tesla V100", "7.0", "8.0"]),
    (Machine("cuda", "old", (7, 5)), "bf16", ["slow on old", "7.5"])])
def test_a_precision_that_gains_nothing_there_is_named(machine, precision, words):
    [line] = lines(machine, precision=precision)
    assert line.startswith(f"--precision={precision} ")
    assert all(word in line for word in words)


@pytest.mark.parametrize("machine, precisions", [
    (CPU, {"fp32", "bf16"}), (OLD_CPU, {"fp32"}), (Machine("cpu"), {"fp32", "bf16"}),
    (V100, {"fp32", "fp16"}), (Machine("cuda", "A100", (8, 0)), set(PRECISIONS)),
    (H100, set(PRECISIONS)), (AMD, set(PRECISIONS))])
def test_others_are_not(machine, precisions):
    assert {name for name in PRECISIONS if not lines(machine, precision=name)} == precisions


@pytest.mark.parametrize("cpuinfo, expected", [
    ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16\n", True),
    ("flags\t\t: fpu amx_bf16 amx_tile\n", True), ("flags\t\t: fpu avx2 avx512f\n", False),
    ("flags\t\t: fpu xavx512_bf16\n", False), ("Features\t: fp asimd bf16\n", True),
    ("Features\t: fp asimd\n", False), ("processor: 0\nmachine: s390\n", None), ("", None)])
def test_what_a_cpu_has_is_read_from_the_list_of_linux(cpuinfo, expected):
    assert cpu_has_bf16(cpuinfo) is expected


@pytest.mark.parametrize("hip, capability", [(None, (7, 0)), ("6.2", None)])
def test_a_gpu_is_asked_what_it_is(monkeypatch, hip, capability):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert Machine.of(torch.device("cuda", 3)) == Machine("cuda", "GPU 3", capability)
    assert Machine.of(torch.device("cpu")).kind == "cpu"


@pytest.mark.long
@pytest.mark.parametrize("flags", [[], ["-n"]], ids=str)
def test_a_run_and_a_dry_run_show_each_line_once(dataset_zip, tmp_path, invoke, monkeypatch, flags):
    monkeypatch.setattr("training.advice.LARGE_FOR_CPU", 1000)
    result = invoke(train.main, f"--outdir={tmp_path}", "--name=a", f"--data={dataset_zip}",
                    *TINY_RUN, "--device=cpu", "--duration=0.000016", "--lr-rampup=1",
                    "--precision=tf32", *flags)
    assert result.exit_code == 0, result.output
    said = result.output.splitlines()
    warnings = [line for line in said if line.startswith("Warning: ")]
    assert len(warnings) == 3
    assert "reaches only 0.0016% of --lr=0.01" in warnings[0]
    found = int(re.search(r"network of ([\d,]+) parameters", warnings[1])[1].replace(",", ""))
    others = "\n".join(line for line in said if line not in warnings)
    assert f"{found:,}" in others, "as the table of the network, or the plan, has it"
    assert "--precision=tf32" in warnings[2]


@pytest.mark.long
def test_a_run_that_is_meant_so_gets_no_warning(dataset_zip, tmp_path, invoke):
    result = invoke(train.main, f"--outdir={tmp_path}", "--name=a", f"--data={dataset_zip}",
                    *TINY_RUN, "--device=cpu", "--duration=0.000016")
    assert result.exit_code == 0 and "Warning" not in result.output, result.output


def test_an_average_that_keeps_what_was_transferred_is_told_of():
    """After one half-life, half is left; 0.1 of one leave 93.3%."""
    def said(duration, **more):
        return advice(TrainConfig(data="none", lr_rampup=0, ema=0.5, duration=duration, **more),
                      H100, 1000, has_ema_rampup=False)
    [line] = said(0.05)
    assert "still be 93.3% the transferred ones" in line and line.endswith("such as --ema=0.005")
    assert said(0.5) == said(5.0) == [] and len(said(0.499)) == 1
    assert lines(lr_rampup=0, ema=0.5, duration=0.05) == [], "with a ramp-up it is forgotten"
