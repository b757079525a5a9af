"""Tests of bench.py: python -m pytest -q test_bench_part.py"""
import importlib.util
import multiprocessing
import os
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

import bench
import model
from model import UNet3D, UNetConfig
from sample import run

HERE = Path(__file__).resolve().parent
TINY = dict(base_channels=8, channel_mults=(1, 2), time_dim=32, heads=2, head_dim=8, state_size=8, mlp_dim=12)


def randomise(module):
    """Parameters that initialisation leaves at 0 or 1 hide mistakes."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module


def bench_command(monkeypatch, *flags):
    """`python bench.py` with these flags, for a CPU, in this process."""
    monkeypatch.setattr(sys, "argv", ["bench.py", "--device", "cpu", *map(str, flags)])
    run("bench.py", bench.main)


def output_and_gradients(net, x):
    """The gradients: of every parameter, and of the input."""
    y = net(x, torch.arange(len(x)))
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return y, torch.autograd.grad(y, [*net.parameters(), x], weight)


@pytest.mark.parametrize("grad_checkpoint", [False, True])
@pytest.mark.parametrize("temporal", model.TEMPORAL_LAYERS)
def test_the_network_is_the_textbook_network(temporal, grad_checkpoint):
    torch.manual_seed(0)
    net = randomise(UNet3D(UNetConfig(temporal=temporal, **TINY), grad_checkpoint)).double()
    net.time_mlp.register_forward_pre_hook(lambda module, args: args[0].double())  # the embedding of t is float32
    x = torch.randn(2, 3, 5, 4, 4, dtype=torch.float64, requires_grad=True)
    ours, our_gradients = output_and_gradients(net, x)
    bench.use_textbook(net)
    layers = sum(type(module) in bench.TEXTBOOK for module in net.modules())
    assert layers == sum(isinstance(module, bench.Textbook) for module in net.modules()) > 20
    assert not net.grad_checkpoint
    plain, plain_gradients = output_and_gradients(net, x)
    assert (ours - plain).norm() < 1e-10 * plain.norm()
    scale = torch.stack([gradient.norm() for gradient in plain_gradients]).max()
    for our, gradient in zip(our_gradients, plain_gradients):
        assert (our - gradient).norm() < 1e-10 * torch.maximum(gradient.norm(), 1e-3 * scale)


@pytest.mark.parametrize("what, temporal, formulation", [
    ("train", "ssm", "ours"), ("train", "attention", "textbook"), ("sample", "ssm", "ours"), ("layer", "ssm", "ours")])
def test_a_bench_process_tells_parameters_and_steps(what, temporal, formulation, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--base-channels", "8", "--channels", "8", "--size", "8",
                                      "--state-size", "8", "--precision", "bf16", "--device", "cpu"])
    args = bench.parse_args()
    monkeypatch.setattr(bench, "limit_memory", lambda *_: None)  # this process lives on
    row = bench.Row(what, 2, temporal, formulation)
    assert bench.count_operations(row, args) > 1e5
    questions, child = multiprocessing.Pipe()
    for message in ("step", "step", None):
        questions.send(message)
    bench.serve(row, args, child)
    assert questions.recv() == bench.count_parameters(bench.build(row, args))
    for _ in range(2):
        seconds, peak = questions.recv()
        assert 0 < seconds < 60 and peak < 2**30


def test_operations_are_those_of_the_plain_network(monkeypatch):
    """By hand, for the layer: two S4D output products, the MLP, and the kernels; thrice for training."""
    monkeypatch.setattr(sys, "argv", ["bench.py", "--channels", "8", "--size", "4", "--state-size", "6"])
    args = bench.parse_args()
    columns = 5 * 4 * 4
    expected = 3 * 2 * (2 * 8 * 16 * columns + 2 * 8 * 512 * columns + 2 * 8 * 3 * 5)
    assert bench.count_operations(bench.Row("layer", 5, "ssm", "ours"), args) == expected


def test_bench_compares_and_keeps_what_does_not_fit(monkeypatch, capsys, tmp_path):
    # the textbook's kernel is (64, 256, 400) complex numbers, 50 MB, several times over
    out = tmp_path / "bench.md"
    bench_command(monkeypatch, "--what", "layer", "--frames", 400, "--size", 1, "--baseline", "--repeats", 2,
                  "--memory-gb", 0.2, "--out", out)
    printed = capsys.readouterr().out
    assert re.match(r".+, 1 thread\(s\), torch .+, float32, 1x1, batch 1, base 64: `python bench.py .+`\n", printed)
    number = r"[0-9.e+-]+"
    for row in (rf"ours \| 0\.21 M \| {number} \| \d+ MB \| {number} \| {number}% \| – \| –",
                r"textbook \| 0\.21 M \| out of memory \| – \| – \| – \| – \| –"):
        assert re.search(rf"^\| layer \| 400 \| ssm \| {row} \|$", printed, re.MULTILINE), printed
    assert out.read_text().startswith(printed[printed.index(bench.describe(torch.device("cpu"))):].rstrip("\n"))
    if importlib.util.find_spec("matplotlib"):
        assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG") and "(bench.png)" in out.read_text()
    assert set(os.listdir(tmp_path)) <= {"bench.md", "bench.png"}


@pytest.mark.parametrize("flags, message", [
    (["--size", 12], "needs height and width divisible by 8"), (["--state-size", 7], "state_size is 7"),
    (["--out", "missing/bench.md"], "missing/bench.md"), (["--out", "bench.txt"], "ends in .md"),
    (["--temporal", "lstm"], "lstm"), (["--frames", 0], "from 1 on"), (["--memory-gb", "-1"], "above 0"),
    (["--device", "tpu"], "--device tpu")])
def test_bench_refuses_in_one_line(flags, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        bench_command(monkeypatch, "--base-channels", 8, "--frames", 2, *flags)
    said = str(stop.value.code) if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert said.startswith("bench.py: ") and message in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("exitcode, outcome", [
    (-signal.SIGKILL, "out of memory"), (1, 1), (-signal.SIGSEGV, "bench.py: a process ended with signal 11")])
def test_bench_process_that_ends_without_an_answer(exitcode, outcome):
    pipe, child = multiprocessing.Pipe()
    child.close()
    process = SimpleNamespace(join=lambda: None, exitcode=exitcode)
    if exitcode == -signal.SIGKILL:
        assert bench.ask(process, pipe, "step") == outcome
    else:
        with pytest.raises(SystemExit) as stop:
            bench.ask(process, pipe)
        assert stop.value.code == outcome


def test_ctrl_c_leaves_what_was_measured(monkeypatch, tmp_path):
    def compare(rows, args, bar):
        if rows[0].frames == 4:
            raise KeyboardInterrupt
        rows[0].steps = [(2.0, 2**20), (1.0, 2**21), (4.0, 2**20)]
        rows[1].steps = [(4.0, 2**23), (8.0, 2**22), (3.0, 2**22)]

    monkeypatch.setattr(bench, "compare", compare)
    monkeypatch.setattr(bench, "matmul_peak", lambda *_: 1e9)
    with pytest.raises(SystemExit, match="interrupted"):
        bench_command(monkeypatch, "--what", "layer", "--frames", 2, 4, "--baseline", "--out", tmp_path / "bench.md")
    rows = [line.split(" | ") for line in (tmp_path / "bench.md").read_text().splitlines() if "layer | 2" in line]
    assert [row[3] for row in rows] == ["ours", "textbook"] and [row[5:8] for row in rows] == [
        ["2", "2 MB", "0.5"], ["4", "8 MB", "0.25"]]
    assert [row[-2:] for row in rows] == [["0.50", "0.25 |"], ["1.00", "1.00 |"]]
    assert "layer | 4" not in (tmp_path / "bench.md").read_text()


def test_a_reference_that_is_not_installed_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "video_diffusion_pytorch", None)
    monkeypatch.setattr(bench, "compare", lambda rows, args, bar: None)
    monkeypatch.setattr(bench, "matmul_peak", lambda *_: 1e9)
    bench_command(monkeypatch, "--base-channels", 8, "--size", 8, "--frames", 2, "--temporal", "none",
                  "--reference", "lucidrains")
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("no rows of lucidrains") and "pip install video-diffusion-pytorch" in first
