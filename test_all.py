"""The tests, on the CPU, without a network: python -m pytest -q test_all.py"""
import contextlib
import copy
import faulthandler
import hashlib
import http.server
import importlib.util
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

# Processes with several threads each stall one another on a machine with few cores; those that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import bench
import data
import diffusion
import fvd
import model
import s4d
import sample
import train
from bench import TextbookTemporalSSM
from data import MazeVideos
from diffusion import Diffusion, label_dropped, sample_generators, training_noise, with_guidance
from model import UNet3D, UNetConfig
from s4d import S4D, S4DKernel, TemporalSSM
from sample import draw, run

HERE = Path(__file__).resolve().parent
REFERENCE = HERE / "assets" / "reference"
TINY = dict(base_channels=8, channel_mults=(1, 2), time_dim=32, heads=2, head_dim=8, state_size=8, mlp_dim=12)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def randomise(module):
    """Parameters that initialisation leaves at 0 or 1 hide mistakes."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module


# ------------------------------------------------------------------------------------------------ the authors' numbers

SSM_NAMES = [("s4d_rev.", "directions.1."), ("s4d.", "directions.0."), ("output_linear.0", "output_linear"),
             ("fc1", "mlp.0"), ("fc2", "mlp.1")]
RESNET_NAMES = [("mlp.1", "to_scale_shift"), (".proj", ".conv"), ("res_conv", "shortcut")]
LEVEL_NAMES = dict(zip("01234", ("res1", "res2", "spatial", "temporal", "resample")))


def replace_all(name, pairs):
    for old, new in pairs:
        name = name.replace(old, new)
    return name


def load_reference(module, archive, tag="", rename=lambda name: name):
    """Copy the authors' parameters into `module`; every parameter of it must be given."""
    prefix = f"{tag}param/"
    given = {rename(name[len(prefix):]): torch.from_numpy(archive[name]) for name in archive.files
             if name.startswith(prefix)}
    module.load_state_dict({name: given[name].reshape(p.shape) for name, p in module.state_dict().items()})
    return module


@pytest.mark.parametrize("tag, settings", [
    ("ssm", {}), ("ssm_unidirectional", {"bidirectional": False}), ("ssm_mlp_pre", {"mlp_position": "pre"}),
    ("ssm_mlp_1_layer", {"mlp_layers": 1}), ("ssm_mlp_0_layers", {"mlp_layers": 0})])
def test_reference_ssm(tag, settings):
    archive = np.load(REFERENCE / "layers.npz")
    layer = TemporalSSM(8, state_size=16, mlp_dim=12, **settings)
    layer.norm = torch.nn.Identity()  # the reference leaves the normalisation out
    load_reference(layer, archive, f"{tag}/", lambda name: replace_all(name, SSM_NAMES))
    x, y = (torch.from_numpy(archive[f"{tag}/{key}"]).transpose(1, 2) for key in ("in", "out"))     # b c f
    assert relative(layer.mix(x), y) < 1e-5
    assert relative(layer(x), x + y) < 1e-5
    as_video = x.permute(1, 2, 0)[None, ..., None]                                                  # 1 c f b 1
    assert relative(layer.mix(as_video), y.permute(1, 2, 0)[None, ..., None]) < 1e-5


@pytest.mark.parametrize("frames", [20, 70])
def test_reference_attention(frames):
    archive = np.load(REFERENCE / "layers.npz")
    tag = f"attention_{frames}_frames/"
    bias = model.RelativePositionBias(heads=2)
    bias.table.weight.data = torch.from_numpy(archive[tag + "bias_table"])
    assert relative(bias(frames), torch.from_numpy(archive[tag + "bias"])) < 1e-6
    layer = model.TemporalAttention(8, heads=2, head_dim=64)
    layer.norm = torch.nn.Identity()
    load_reference(layer, archive, tag)
    x, y = (torch.from_numpy(archive[tag + key]).permute(0, 3, 2, 1)[..., None] for key in ("in", "out"))
    assert relative(layer.mix(x, bias(frames)), y) < 1e-5


def test_reference_linear_attention():
    archive = np.load(REFERENCE / "layers.npz")
    layer = model.TemporalLinearAttention(8, heads=2, head_dim=64)
    layer.norm = torch.nn.Identity()
    load_reference(layer, archive, "linear_attention/")
    x, y = (torch.from_numpy(archive[f"linear_attention/{key}"]).permute(0, 3, 2, 1)[..., None]
            for key in ("in", "out"))
    assert relative(layer.mix(x), y) < 1e-5


def test_reference_spatial_layers():
    archive = np.load(REFERENCE / "layers.npz")
    layer = model.SpatialLinearAttention(8, heads=2)
    layer.norm = torch.nn.Identity()
    load_reference(layer, archive, "spatial_linear_attention/")
    x, y = (torch.from_numpy(archive[f"spatial_linear_attention/{key}"]) for key in ("in", "out"))
    assert relative(layer.mix(x), y) < 1e-5
    block = load_reference(model.ResNetBlock(8, 16, time_dim=10, groups=4), archive, "resnet_block/",
                           lambda name: replace_all(name, RESNET_NAMES))
    x, t, y = (torch.from_numpy(archive[f"resnet_block/{key}"]) for key in ("in", "time_emb", "out"))
    assert relative(block(x, t), y) < 1e-5


def network_name(name):
    """The authors' name of a network's parameter -> ours."""
    name = re.sub(r"^(down|up)s\.(\d)\.(\d)\.", lambda match: f"{match[1]}.{match[2]}.{LEVEL_NAMES[match[3]]}.", name)
    if not name.startswith("time_mlp"):
        name = replace_all(name, RESNET_NAMES)
    return replace_all(name, [
        ("time_mlp.1", "time_mlp.0"), ("time_mlp.3", "time_mlp.2"), ("init_conv", "stem"),
        ("time_rel_pos_bias.relative_attention_bias", "position_bias.table"), ("init_temporal_layer", "stem_temporal"),
        ("mid_block", "mid_res"), ("mid_temporal_layer", "mid_temporal"), ("mid_spatial_attn", "mid_spatial"),
        ("final_conv.0", "final_res"), ("final_conv.1", "final_conv"), ("fn.norm.gamma", "norm.gain"), ("fn.", ""),
        *SSM_NAMES])


@pytest.mark.parametrize("temporal", ["ssm", "attention", "linear-attention"])
def test_reference_network(temporal):
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
    net.grad_checkpoint = True
    assert relative(net(x, t), y) < 1e-5


def test_reference_schedule():
    archive = np.load(REFERENCE / "schedule_256.npz")
    process = Diffusion(256)
    for ours, theirs in [("betas", "betas"), ("alphas_cumprod", "alphas_cumprod"),
                         ("posterior_mean_x0", "posterior_mean_coef1"), ("posterior_mean_xt", "posterior_mean_coef2"),
                         ("posterior_variance", "posterior_variance")]:
        np.testing.assert_allclose(getattr(process, ours), archive[theirs], rtol=1e-5, atol=1e-9)


# ------------------------------------------------------------------------------------------------ S4D


def recurrence(ssm, u):
    """s_k = Ā s_{k-1} + B̄ u_k, y_k = 2 Re(C s_k) + D u_k, step by step. u: (d, L, p) -> (d, L, p)."""
    kernel = ssm.kernel
    A = torch.complex(-kernel.log_A_real.exp(), kernel.A_imag)
    A_bar = torch.exp(kernel.log_dt.exp()[:, None] * A)
    B_bar = (A_bar - 1) / A
    C = torch.view_as_complex(kernel.C)
    s = torch.zeros(*A.shape, u.shape[2], dtype=A.dtype)                                            # d n p
    steps = range(u.shape[1])
    ys = {}
    for k in reversed(steps) if ssm.reverse else steps:
        s = A_bar[..., None] * s + B_bar[..., None] * u[:, None, k]
        ys[k] = 2 * torch.einsum("dn,dnp->dp", C, s).real + ssm.D[:, None] * u[:, k]
    return torch.stack([ys[k] for k in steps], 1)


@pytest.mark.parametrize("L", [1, 2, 16, 64, 200, 400])
@pytest.mark.parametrize("reverse", [False, True])
def test_s4d_is_the_state_recurrence(L, reverse):
    torch.manual_seed(L)
    ssm = S4D(3, state_size=8, reverse=reverse).double()
    u, weight = torch.randn(2, 3, L, 2, dtype=torch.float64)
    u.requires_grad_()
    parameters = [u, *ssm.kernel.parameters(), ssm.D]
    expected = recurrence(ssm, u)
    gradients = torch.autograd.grad((expected * weight).sum(), parameters)
    assert relative(ssm(u.mT).mT.flatten(1), ssm.output(expected.flatten(1))) < 1e-10
    kernel = [(ssm.impulse_response(L), reverse)]
    for [y] in (s4d.toeplitz_conv(u, kernel), [y.mT for y in s4d.fft_conv(u.mT, kernel)]):
        assert relative(y, expected) < 1e-10
        for ours, plain in zip(torch.autograd.grad((y * weight).sum(), parameters, retain_graph=True), gradients):
            assert relative(ours, plain) < 1e-9


def test_one_input_fft_serves_both_directions():
    torch.manual_seed(0)
    u, K1, K2 = torch.randn(4, 50, 3), torch.randn(4, 50), torch.randn(4, 50)
    together = s4d.fft_conv(u.mT, [(K1, False), (K2, True)])
    for y, kernel in zip(together, [(K1, False), (K2, True)]):
        assert torch.equal(y, s4d.fft_conv(u.mT, [kernel])[0])
        assert relative(y.mT, s4d.toeplitz_conv(u, [kernel])[0]) < 1e-5


class LargestTensor(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that is made."""
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and function.__name__.split(".")[0] != "expand":
                self.numel = max(self.numel, tensor.numel())
        return out


def test_the_vandermonde_tensor_is_never_made():
    kernel = S4DKernel(4, state_size=64)
    with LargestTensor() as largest:
        kernel(400).sum().backward()
    assert largest.numel < 4 * 32 * 400 / 4


@pytest.mark.parametrize("frames", [16, 200, 400])
@pytest.mark.parametrize("positions", [2, 1024])  # by FFT, and (up to 1024 frames) by Toeplitz matrix
def test_bfloat16_autocast(frames, positions):
    torch.manual_seed(0)
    layer = TemporalSSM(4, state_size=16, mlp_dim=8)
    x = torch.randn(1, 4, frames, positions)
    K = layer.directions[0].kernel(frames)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.directions[0].kernel(frames), K), "float32 all the way"
        y = layer(x)
    assert relative(y, layer(x)) < 2e-2


ABLATIONS = [{}, {"bidirectional": False}, {"mlp_layers": 0}, {"mlp_layers": 1}, {"mlp_position": "pre"},
             {"mlp_position": "pre", "mlp_layers": 1}, {"skip": "norm"}]


def use_chunks_of(columns, monkeypatch):
    for module in (s4d, model):
        monkeypatch.setattr(module, "chunk_size", lambda device: columns)


@pytest.mark.parametrize("settings", ABLATIONS)
@pytest.mark.parametrize("shape", [(2, 6, 5, 4, 2), (1, 6, 9, 2, 2), (2, 6, 1, 1, 1)])
@pytest.mark.parametrize("columns", [7, 4096])
def test_temporal_ssm_is_the_textbook_layer(settings, shape, columns, monkeypatch):
    use_chunks_of(columns, monkeypatch)
    torch.manual_seed(0)
    layer = randomise(TemporalSSM(6, state_size=10, mlp_dim=7, **settings)).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    y, expected = layer(x), TextbookTemporalSSM(layer)(x)
    assert relative(y, expected) < 1e-10
    weight = torch.randn_like(y)
    for ours, plain in zip(torch.autograd.grad(y, inputs, weight), torch.autograd.grad(expected, inputs, weight)):
        assert relative(ours, plain) < 1e-9


def test_wide_hidden_layers_never_exist_whole(monkeypatch):
    use_chunks_of(64, monkeypatch)
    x = torch.randn(1, 4, 20, 8, 8, requires_grad=True)
    for layer in (TemporalSSM(4, state_size=4, mlp_dim=64), model.SpatialLinearAttention(4, heads=2),
                  model.TemporalAttention(4, heads=2, head_dim=32)):
        args = [x, torch.randn(2, 20, 20, requires_grad=True)] if isinstance(layer, model.TemporalAttention) else [x]
        with LargestTensor() as largest:
            layer(*args).square().sum().backward()
        assert largest.numel < 64 * 20 * 8 * 8 / 4, layer  # each has a layer of 64 channels or more


@pytest.mark.parametrize("impl, power", [("sdpa", 1), ("math", 2)])
def test_memory_of_attention_against_frames(impl, power):
    layer = model.TemporalAttention(4, heads=2, head_dim=32, impl=impl)
    kept = []
    for frames in (128, 256):
        bias = torch.randn(2, frames, frames, requires_grad=True)
        x = torch.randn(1, 4, frames, 8, 8, requires_grad=True)
        storages = {}

        def note(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, note):
            layer(x, bias)
        kept.append(max(storages.values()))
    assert kept[1] == kept[0] * 2 ** power


def test_kernels_are_computed_once_and_dropped(monkeypatch):
    torch.manual_seed(0)
    net = UNet3D(UNetConfig(**TINY)).eval()
    calls = []
    kernel_of = S4DKernel.forward
    monkeypatch.setattr(S4DKernel, "forward", lambda self, L: calls.append(self) or kernel_of(self, L))
    kernels = {id(module) for module in net.modules() if isinstance(module, S4DKernel)}
    videos = draw(net, Diffusion(5), 0, [0], (3, 6, 8, 8))
    assert len(calls) == len(kernels) == len({id(kernel) for kernel in calls})

    ssm = net.mid_temporal.directions[0]
    with s4d.kernels_once(net, 6), torch.no_grad():
        K = ssm.impulse_response(6)
        assert ssm.impulse_response(6) is K and ssm.impulse_response(7).shape[1] == 7
        with torch.enable_grad():
            assert ssm.impulse_response(6).requires_grad
    with torch.no_grad():
        ssm.D.add_(1)
    with s4d.kernels_once(net, 6), torch.no_grad():
        assert torch.allclose(ssm.impulse_response(6)[:, 0], K[:, 0] + 1)
    assert all(module.kept is None for module in net.modules() if isinstance(module, s4d.DiagonalSSM))
    net.requires_grad_(False)
    with s4d.kernels_once(net, 6):
        assert ssm.impulse_response(6) is ssm.kept, "for gradients of the video alone, as in reconstruction guidance"
    monkeypatch.setattr("sample.kernels_once", lambda net, frames: contextlib.nullcontext())
    with torch.no_grad():
        ssm.D.sub_(1)
    assert np.array_equal(draw(net, Diffusion(5), 0, [0], (3, 6, 8, 8)), videos)


@pytest.mark.parametrize("settings", [{"mlp_layers": 3}, {"mlp_position": "middle"}, {"skip": "x"}, {"state_size": 7}])
def test_temporal_ssm_refuses(settings):
    [(name, value)] = settings.items()
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        TemporalSSM(4, **settings)


# ------------------------------------------------------------------------------------------------ GSS, Mamba, S6

GSS_NAMES = [("s4d_rev.", "directions.1."), ("s4d.", "directions.0."), ("fc_shortcut", "shortcut"),
             ("fc_rev1", "before.1"), ("fc_rev2", "after.1"), ("fc1", "before.0"), ("fc2", "after.0"), ("fc3", "up"),
             ("fc_out", "out")]
MAMBA_NAMES = [("s4d_rev.", "directions.1."), ("s4d.", "directions.0."), ("conv_rev", "convs.1"), ("conv.", "convs.0."),
               ("fc_out_1", "out.0"), ("fc_out_2", "out.1"), ("fc_out", "out.0")]


@pytest.mark.parametrize("tag, layer, bidirectional, mlp_dim", [
    ("gss", model.TemporalGSS, False, None), ("bigs", model.TemporalGSS, True, None),
    ("bigs_mlp_dim", model.TemporalGSS, True, 12), ("mamba", model.TemporalMamba, False, None),
    ("bimamba", model.TemporalMamba, True, None), ("bimamba_mlp_dim", model.TemporalMamba, True, 12)])
def test_reference_rivals(tag, layer, bidirectional, mlp_dim):
    archive = np.load(REFERENCE / "layers.npz")
    layer = layer(8, state_size=16, mlp_dim=mlp_dim, bidirectional=bidirectional)
    layer.norm = torch.nn.Identity()  # the reference leaves the normalisation out
    given = {name.removeprefix(f"{tag}/param/"): torch.from_numpy(archive[name]) for name in archive.files
             if name.startswith(f"{tag}/param/")}
    for kind in ("weight", "bias"):  # ours are two layers
        if f"fc_init.{kind}" in given:
            given[f"to_input.{kind}"], given[f"to_gate.{kind}"] = given.pop(f"fc_init.{kind}").chunk(2)
    names = GSS_NAMES if isinstance(layer, model.TemporalGSS) else MAMBA_NAMES
    layer.load_state_dict({replace_all(name, names): value for name, value in given.items()})
    x, y = (torch.from_numpy(archive[f"{tag}/{key}"]).transpose(1, 2) for key in ("in", "out"))     # b c f
    assert relative(layer.mix(x), y) < 1e-5
    assert relative(layer(x), x + y) < 1e-5
    x, y = (z.permute(1, 2, 0)[None].repeat(1, 1, 1, 7)[..., None] for z in (x, y))                 # 1 c f 7b 1
    assert relative(layer.mix(x), y) < 1e-5  # as many positions as frames: by Toeplitz matrix


RIVALS = [(model.TemporalGSS, {}), (model.TemporalGSS, {"mlp_dim": 5}), (model.TemporalMamba, {}),
          (model.TemporalMamba, {"mlp_dim": 5}), (model.TemporalMamba, {"ssm": "s6"})]


@pytest.mark.parametrize("layer, settings", RIVALS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("shape", [(2, 6, 5, 4, 2), (1, 6, 9, 2, 2), (2, 6, 1, 1, 1)])
@pytest.mark.parametrize("columns", [7, 4096])
def test_rivals_are_the_textbook_layers(layer, settings, bidirectional, shape, columns, monkeypatch):
    use_chunks_of(columns, monkeypatch)
    torch.manual_seed(0)
    layer = randomise(layer(6, state_size=4, bidirectional=bidirectional, **settings)).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    y, expected = layer(x), bench.TEXTBOOK[type(layer)](layer)(x)
    assert relative(y, expected) < 1e-10
    weight = torch.randn_like(y)
    ours, plain = (torch.autograd.grad(out, inputs, weight) for out in (y, expected))
    scale = max(gradient.norm() for gradient in plain)
    for our, gradient in zip(ours, plain):  # with one frame, that of the state matrix is nothing but rounding
        assert (our - gradient).norm() < 1e-9 * gradient.norm() + 1e-13 * scale
        assert gradient.any() or shape[2] == 1


@pytest.mark.parametrize("layer, settings", [(TemporalSSM, settings) for settings in (
    {}, {"mlp_position": "pre"}, {"mlp_layers": 1}, {"mlp_layers": 0}, {"skip": "norm"})] + RIVALS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("positions", [1, 3])  # on a side: by FFT, by Toeplitz matrix
def test_which_frames_a_frame_sees(layer, settings, bidirectional, positions):
    torch.manual_seed(0)
    layer = randomise(layer(4, state_size=8, bidirectional=bidirectional, **settings)).double()
    x = torch.randn(1, 4, 7, positions, positions, dtype=torch.float64, requires_grad=True)
    for frame in range(7):
        [gradient] = torch.autograd.grad(layer(x)[:, :, frame, 0, 0].square().sum(), x)
        seen = gradient.abs().amax(dim=(0, 1))                                                      # f h w
        assert (seen[:frame + 1, 0, 0] > 1e-12).all(), "the past"
        later = seen[frame + 1:, 0, 0]
        assert (later > 1e-12).all() if bidirectional else (later < 1e-14).all(), "the future"
        seen[:, 0, 0] = 0
        assert not (seen > 1e-14).any(), "other positions"


@pytest.mark.parametrize("temporal", ["ssm", "gss", "mamba"])
def test_what_of_an_unidirectional_network_is_not_causal(temporal, monkeypatch):
    """Its group norms, whose statistics are of all frames, and nothing else."""
    torch.manual_seed(0)
    net = randomise(UNet3D(UNetConfig(temporal=temporal, bidirectional=False, **TINY))).double()
    net.time_mlp.register_forward_pre_hook(lambda module, args: args[0].double())

    def later_frames():
        x = torch.randn(1, 3, 5, 4, 4, dtype=torch.float64, requires_grad=True)
        [gradient] = torch.autograd.grad(net(x, torch.tensor([3]))[:, :, 2].square().sum(), x)
        return gradient.abs().amax(dim=(0, 1, 3, 4))[3:]

    assert (later_frames() > 1e-8).all()
    group_norm = F.group_norm
    monkeypatch.setattr(F, "group_norm", lambda x, *settings: torch.stack(
        [group_norm(frame, *settings) for frame in x.unbind(2)], dim=2))
    assert (later_frames() < 1e-14).all()


def selective_recurrence(ssm, u):
    """h_k = exp(Δ_k A) h_{k-1} + Δ_k B_k u_k, y_k = C_k h_k + D u_k, step by step. u: (d, p, L) -> (d, p, L)."""
    rank, N, _ = ssm.sizes
    h = torch.zeros(u.shape[1], u.shape[0], N, dtype=u.dtype)                                       # p d N
    steps = range(u.shape[2])
    ys = {}
    for k in reversed(steps) if ssm.reverse else steps:
        u_k = u[:, :, k].T                                                                          # p d
        numbers = u_k @ ssm.x_proj.weight.T
        dt = torch.log1p(torch.exp(numbers[:, :rank] @ ssm.dt_proj.weight.T + ssm.dt_proj.bias))    # p d
        B, C = numbers[:, None, rank:rank + N], numbers[:, None, rank + N:]                         # p 1 N
        h = torch.exp(-dt[..., None] * ssm.A_log.exp()) * h + (dt * u_k)[..., None] * B
        ys[k] = (h * C).sum(-1) + ssm.D * u_k
    return torch.stack([ys[k].T for k in steps], 2)


@pytest.mark.parametrize("L", [1, 2, 33])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("chunks", [1, 3])
def test_s6_is_the_selective_recurrence(L, reverse, chunks, monkeypatch):
    torch.manual_seed(0)
    ssm = randomise(s4d.S6(5, state_size=4, dt_rank=2, reverse=reverse)).double()
    u, weight = torch.randn(2, 5, 6, L, dtype=torch.float64)
    u.requires_grad_()
    if chunks > 1:
        in_chunks = s4d.in_chunks
        monkeypatch.setattr(s4d, "in_chunks", lambda scan, u, dim, size, keep: in_chunks(scan, u, dim=1, size=2,
                                                                                         keep=1))
    inputs = [u, *ssm.parameters()]
    y, expected = ssm(u), selective_recurrence(ssm, u)
    assert relative(y, expected) < 1e-10
    for ours, plain in zip(*(torch.autograd.grad((out * weight).sum(), inputs) for out in (y, expected))):
        assert (ours - plain).norm() <= 1e-10 * plain.norm()
    assert relative(ssm.float()(u.float()), expected) < 1e-5


def test_s6_starts_as_mamba_does():
    ssm = s4d.S6(4096, dt_rank=3)
    dt = torch.nn.functional.softplus(ssm.dt_proj.bias)
    assert dt.min() > 0.999e-3 and dt.max() < 0.1001 and abs(dt.log().mean() - math.log(1e-2)) < 0.1
    assert torch.allclose(-torch.exp(ssm.A_log[7]), -torch.arange(1.0, 17.0)) and (ssm.D == 1).all()
    assert model.TemporalMamba(40, state_size=16, ssm="s6").directions[0].dt_proj.in_features == 3  # 40 / 16, up


def test_s6_states_never_exist_whole():
    ssm = s4d.S6(64, dt_rank=1)
    u = torch.randn(64, 64, 64, requires_grad=True)
    with LargestTensor() as largest:
        ssm(u).square().sum().backward()
    assert largest.numel <= 2 ** 19 < u.numel() * 16 / 7


def test_s6_by_the_kernel_of_mamba_ssm(monkeypatch):
    """Against a stand-in with its published signature and formula: the layout is what is tested."""
    def selective_scan_fn(u, delta, A, B, C, D, delta_bias, delta_softplus):
        assert delta_softplus and A.dtype == D.dtype == delta_bias.dtype == torch.float32
        assert all(x.is_contiguous() and x.dtype == u.dtype for x in (delta, B, C)) and u.is_contiguous()
        delta = torch.nn.functional.softplus(delta + delta_bias[:, None])                           # p d L
        h, ys = torch.zeros(*u.shape[:2], A.shape[1]), []
        for k in range(u.shape[2]):
            h = torch.exp(delta[:, :, k, None] * A) * h + (delta * u)[:, :, k, None] * B[:, None, :, k]
            ys.append((h * C[:, None, :, k]).sum(-1))
        return (torch.stack(ys, -1) + D[:, None] * u).to(u.dtype)

    torch.manual_seed(0)
    ssm, u = randomise(s4d.S6(6, state_size=4, dt_rank=2)), torch.randn(6, 3, 11)
    monkeypatch.setattr(s4d, "fused_selective_scan", lambda: selective_scan_fn)
    assert relative(ssm.fused(u), ssm.scan(u)) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert ssm.fused(u.bfloat16()).dtype == torch.bfloat16 == ssm(u.bfloat16()).dtype


def test_mamba_refuses_an_unknown_ssm():
    with pytest.raises(ValueError, match="'s5'.*s4d, s6"):
        model.TemporalMamba(4, ssm="s5")


# ------------------------------------------------------------------------------------------------ the network


def rotate_slowly(x, freqs):
    """Rotary embedding of x (f, d) pair by pair, as complex numbers."""
    x = x.clone()
    for i, freq in enumerate(freqs):
        pair = torch.complex(x[:, 2 * i], x[:, 2 * i + 1]) * torch.exp(1j * freq * torch.arange(len(x)))
        x[:, 2 * i], x[:, 2 * i + 1] = pair.real, pair.imag
    return x


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("impl", model.ATTENTION_IMPLS)
def test_temporal_attention_is_the_plain_formula(linear, impl, monkeypatch):
    monkeypatch.setattr(model, "MAX_SEQUENCES", 3)  # of 4 here
    torch.manual_seed(0)
    heads, d, f = 2, 40, 6  # features 32 .. 39 are not rotated
    layer = (model.TemporalLinearAttention if linear else model.TemporalAttention)(5, heads, d, impl).double()
    layer.norm = torch.nn.Identity()
    bias = torch.randn(heads, f, f, dtype=torch.float64)
    x = torch.randn(2, 5, f, 1, 2, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for b, w in np.ndindex(2, 2):
        qkv = layer.to_qkv(x[b, :, :, 0, w].T).view(f, 3, heads, d)
        out = []
        for h in range(heads):
            q, k = (rotate_slowly(qkv[:, i, h], layer.rotary_freqs) for i in (0, 1))
            v = qkv[:, 2, h]
            if linear:
                q, k = q.exp() / q.exp().sum(1, keepdim=True) / math.sqrt(d), k.exp() / k.exp().sum(0, keepdim=True)
                out.append(q @ (k.T @ v))
            else:
                weights = torch.exp(q @ k.T / math.sqrt(d) + bias[h])
                out.append(weights / weights.sum(1, keepdim=True) @ v)
        expected[b, :, :, 0, w] = layer.to_out(torch.cat(out, 1)).T
    assert relative(layer.mix(x) if linear else layer.mix(x, bias), expected) < 1e-7  # the angles are float32


@pytest.mark.parametrize("temporal", model.TEMPORAL_LAYERS)
def test_every_parameter_has_a_gradient(temporal):
    torch.manual_seed(0)
    for checkpointed in (False, True):
        net = UNet3D(UNetConfig(temporal, **TINY), grad_checkpoint=checkpointed)
        net(torch.randn(2, 3, 5, 8, 8), torch.tensor([3, 200])).square().mean().backward()
        without = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
        assert not without


@pytest.mark.parametrize("temporal", ["ssm", "attention"])
def test_compiled_network_is_one_graph_and_stays_it(temporal):
    """With a backend that compiles nothing: what is tested is that torch.compile can follow the whole network."""
    torch.manual_seed(0)
    net = UNet3D(UNetConfig(temporal, **TINY | {"channel_mults": (1,)}), grad_checkpoint=True)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(net, backend=backend, fullgraph=True, dynamic=False)
    for seed in range(3):
        torch.manual_seed(seed)
        x, t = torch.randn(1, 3, 4, 8, 8), torch.tensor([seed])
        ours = torch.autograd.grad(compiled(x, t).square().mean(), list(net.parameters()))
        plain = torch.autograd.grad(net(x, t).square().mean(), list(net.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(ours, plain))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(1.01)
    torch.compiler.reset()
    assert len(graphs) == 1


def test_bfloat16_training_tracks_float32():
    videos = MazeVideos(4, 16)
    losses = {}
    for precision in ("float32", "bf16"):
        torch.manual_seed(0)
        net = UNet3D(UNetConfig(**TINY))
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
        diffusion = Diffusion(64)
        losses[precision] = []
        for step in range(50):
            x_0 = data.to_float(torch.from_numpy(np.stack([videos.clip(0, step, i) for i in range(4)])))
            t, noise = training_noise(x_0.shape[1:], 0, step, range(4), diffusion.T)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = diffusion.loss(net, x_0, t, noise).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[precision].append(loss.item())
    ours, plain = np.array(losses["bf16"]), np.array(losses["float32"])
    assert plain[-10:].mean() < plain[:10].mean() * 0.8
    assert np.abs(ours / plain - 1).max() < 0.03


def test_grad_checkpoint_changes_no_gradient():
    torch.manual_seed(0)
    net = UNet3D(UNetConfig(**TINY))
    x, t = torch.randn(1, 3, 4, 8, 8), torch.tensor([9])
    plain = torch.autograd.grad(net(x, t).square().mean(), list(net.parameters()))
    net.grad_checkpoint = True
    again = torch.autograd.grad(net(x, t).square().mean(), list(net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, again))


@pytest.mark.parametrize("temporal", model.TEMPORAL_LAYERS)
@pytest.mark.parametrize("shape", [(1, 3, 1, 8, 8), (2, 3, 3, 4, 6), (1, 3, 40, 2, 2)])
def test_network_shapes(temporal, shape):
    net = UNet3D(UNetConfig(temporal, **TINY))
    assert net(torch.randn(shape), torch.zeros(shape[0], dtype=torch.long)).shape == shape


@pytest.mark.parametrize("shape, t, words", [
    ((1, 3, 4, 9, 8), (1,), "9x8.*divisible by 2"), ((1, 4, 4, 8, 8), (1,), r"\(1, 4, 4, 8, 8\).*3"),
    ((3, 4, 8, 8), (1,), "expected"), ((2, 3, 4, 8, 8), (1,), r"t has shape \(1,\)"), ((1, 3, 0, 8, 8), (1,), "0")])
def test_network_refuses(shape, t, words):
    with pytest.raises(ValueError, match=words):
        UNet3D(UNetConfig(**TINY))(torch.randn(shape), torch.zeros(t, dtype=torch.long))


def test_classes_are_added_and_change_no_other_first_weight():
    nets = []
    for classes in (0, 3):
        torch.manual_seed(0)
        nets.append(UNet3D(UNetConfig(**TINY, classes=classes)))
    plain, net = nets
    weights = net.state_dict()
    assert list(weights)[:-1] == list(plain.state_dict()) and list(weights)[-1] == "class_embedding.weight"
    assert all(torch.equal(weights[name], value) for name, value in plain.state_dict().items())
    x, t = torch.randn(2, 3, 4, 8, 8), torch.tensor([3, 7])
    outputs = [net(x, t, torch.tensor([label, label])) for label in range(4)]
    assert all((outputs[i] - outputs[j]).abs().max() > 1e-3 for i in range(4) for j in range(i))
    assert torch.equal(net(x, t), outputs[3]), "no labels: no class"
    with torch.no_grad():
        net.class_embedding.weight[1] = 0
    assert torch.equal(net(x, t, torch.tensor([1, 1])), plain(x, t))
    assert train.parts(net)["time"] - train.parts(plain)["time"] == 4 * TINY["time_dim"]
    for network, labels in [(plain, torch.tensor([0, 0])), (net, torch.tensor([0]))]:
        with pytest.raises(ValueError, match="labels have shape .* expected"):
            network(x, t, labels)


def test_an_unknown_temporal_layer_is_refused_with_the_names():
    with pytest.raises(ValueError, match="'lstm'.*ssm, attention, linear-attention, gss, mamba, none"):
        UNet3D(UNetConfig("lstm"))


def test_parameter_counts_at_the_papers_width():
    with torch.device("meta"):
        counts = {name: model.count_parameters(UNet3D(UNetConfig(name))) for name in model.TEMPORAL_LAYERS}
    widths = [64, *(64, 128, 256, 512), 512, *(256, 128, 64, 64)]  # stem, down, middle, up
    attention = sum(c + 4 * c * 8 * 64 for c in widths)
    direction = sum(c * (1 + 4 * 256) + c + 2 * c * c + 2 * c for c in widths)  # Δ, A, C; D; GLU
    ssm = 2 * direction + sum(c + 2 * c * 512 + 512 + c for c in widths)
    s4d = sum(c * (1 + 4 * 256) + c for c in widths)
    gss = 2 * s4d + sum(c + 4 * (c * c + c) + 2 * (3 * c * c + 3 * c) + 3 * c * c + c for c in widths)
    mamba = 4 * s4d + sum(c + 4 * c * c + 4 * c + 2 * (2 * c * 4 + 2 * c) + 2 * c * c + c for c in widths)
    assert counts == {"none": 40_743_427, "linear-attention": 40_743_427 + attention,
                      "attention": 40_743_427 + attention + 32 * 8, "ssm": 40_743_427 + ssm,
                      "gss": 40_743_427 + gss, "mamba": 40_743_427 + mamba}


# ------------------------------------------------------------------------------------------------ diffusion


def test_schedule_and_posterior_identities():
    for T in (1, 10, 256, 1000):
        process = Diffusion(T)
        a = process.alphas_cumprod
        assert ((process.betas > 0) & (process.betas <= 0.9999)).all() and (a.diff() < 0).all()
        assert process.posterior_variance[0] == 0 and process.posterior_mean_x0[0] == 1
        # q(x_{t-1} | x_0) = ∫ q(x_{t-1} | x_t, x_0) q(x_t | x_0) dx_t: the means and the variances must agree
        previous = torch.cat([torch.ones(1), a[:-1]])
        mean = process.posterior_mean_x0 + process.posterior_mean_xt * a.sqrt()
        variance = process.posterior_variance + process.posterior_mean_xt ** 2 * (1 - a)
        assert torch.allclose(mean, previous.sqrt(), atol=1e-5) and torch.allclose(variance, 1 - previous, atol=1e-5)


def test_q_sample_and_predict_x0_are_inverse():
    process = Diffusion(256)
    x_0, noise = torch.rand(4, 3, 2, 4, 4) * 2 - 1, torch.randn(4, 3, 2, 4, 4)
    t = torch.tensor([0, 10, 100, 200])
    assert torch.allclose(process.predict_x0(process.q_sample(x_0, t, noise), t, noise), x_0, atol=1e-4)


def test_an_oracle_denoiser_recovers_x0():
    for T in (1, 20, 256):
        process = Diffusion(T)
        x_0 = torch.rand(2, 3, 4, 8, 8) * 2 - 1

        def oracle(x_t, t):
            a = process.alphas_cumprod[t].view(-1, 1, 1, 1, 1)
            return (x_t - a.sqrt() * x_0) / (1 - a).sqrt()

        assert torch.allclose(process.sample(oracle, x_0.shape, sample_generators(0, [0, 1])), x_0, atol=1e-4)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("T, steps", [(1, 1), (20, 1), (20, 7), (256, 2), (256, 50), (256, 256), (1000, 3)])
def test_an_oracle_denoiser_recovers_x0_by_ddim_at_any_number_of_steps(T, steps, prediction):
    process = Diffusion(T, prediction=prediction)
    x_0, calls = torch.rand(2, 3, 4, 8, 8) * 2 - 1, []

    def oracle(x_t, t):
        calls.append(t[0].item())
        a = process.alphas_cumprod[t].view(-1, 1, 1, 1, 1)
        eps = (x_t - a.sqrt() * x_0) / (1 - a).sqrt()
        return eps if prediction == "eps" else process.v(x_0, t, eps)

    for eta in (0, 0.5, 1):
        drawn = process.sample(oracle, x_0.shape, sample_generators(0, [0, 1]), steps=steps, eta=eta)
        # in one step, x_0 is what is left of ε's rounding
        assert torch.allclose(drawn, x_0, atol=1e-4 if steps > 1 or prediction == "v" else 2e-3)
    assert calls[:steps] == sorted(set(calls), reverse=True)
    assert calls[0] == T - 1 and (steps == 1 or calls[-1] == 0), "the timesteps include T - 1 and 0"


def test_ddim_at_eta_1_with_all_steps_is_the_posterior(monkeypatch):
    process = Diffusion(20)
    x_t, x_0 = torch.randn(50, 4), torch.rand(50, 4)
    for t, s in process.timesteps():
        mean, variance = process.posterior(x_0, x_t, torch.full((50,), t))
        for z in (0, 1):
            monkeypatch.setattr(diffusion, "randn_each", lambda shape, generators, z=z: torch.full((50, *shape), z))
            x_s = process.step(x_t, x_0, t, s, None, eta=1)
            assert torch.allclose(x_s, mean + z * variance.sqrt(), atol=1e-5)
    monkeypatch.undo()

    def net(x, t):
        return 0.9 * x + 0.1 * torch.sin(3 * x + t.view(-1, 1, 1, 1, 1))

    def sampled(seed, **settings):
        return process.sample(net, (2, 3, 2, 4, 4), sample_generators(seed, [0, 1]), **settings)

    assert torch.allclose(sampled(0, eta=1), sampled(0), atol=1e-4)
    assert not torch.allclose(sampled(0, eta=1, steps=19), sampled(0), atol=1e-2)


def test_ddim_at_eta_0_draws_noise_once():
    process, generators = Diffusion(20), sample_generators(0, [0])
    first = process.sample(lambda x, t: x, (1, 3, 2, 4, 4), generators, steps=5, eta=0)
    [expected] = sample_generators(0, [0])
    torch.randn(3, 2, 4, 4, generator=expected)
    assert torch.equal(generators[0].get_state(), expected.get_state()), "x_T is all that is random"
    assert torch.equal(first, process.sample(lambda x, t: x, (1, 3, 2, 4, 4), sample_generators(0, [0]), steps=5, eta=0))


@pytest.mark.parametrize("settings", [dict(eta=1.5), dict(eta=-0.1), dict(eta=0, steps=21), dict(eta=0, steps=0),
                                      dict(steps=10)])
def test_sampling_refuses(settings):
    with pytest.raises(ValueError, match="expected"):
        Diffusion(20).sample(lambda x, t: x, (1, 3, 2, 4, 4), sample_generators(0, [0]), **settings)


def test_v_x0_and_eps_are_each_others():
    process = Diffusion(256, prediction="v")
    x_0, noise, t = torch.rand(4, 3, 2, 4, 4), torch.randn(4, 3, 2, 4, 4), torch.tensor([0, 10, 128, 255])
    x_t, v = process.q_sample(x_0, t, noise), process.v(x_0, t, noise)
    a = process.alphas_cumprod[t].view(-1, 1, 1, 1, 1)
    assert torch.allclose(a.sqrt() * x_t - (1 - a).sqrt() * v, x_0, atol=1e-5)
    assert torch.allclose((1 - a).sqrt() * x_t + a.sqrt() * v, noise, atol=1e-5)
    assert torch.allclose(x_t.square() + v.square(), x_0.square() + noise.square(), atol=1e-4), "a rotation"
    for step in (0, 128, 255):
        t = torch.full((4,), step)
        x_t, v = process.q_sample(x_0, t, noise), process.v(x_0, t, noise)
        assert torch.allclose(process.denoise(lambda x, t: v, x_t, step), x_0, atol=1e-5)
    assert torch.allclose(process.loss(lambda x, t: v + 2, x_0, t, noise), torch.full((4,), 4.0), atol=1e-4)
    with pytest.raises(ValueError, match="'x0'"):
        Diffusion(8, prediction="x0")


def test_losses():
    process = Diffusion(16)
    x_0, noise, t = torch.zeros(3, 3, 2, 4, 4), torch.randn(3, 3, 2, 4, 4), torch.tensor([0, 5, 15])
    assert torch.allclose(process.loss(lambda x, t: noise + 2, x_0, t, noise), torch.full((3,), 4.0))
    assert torch.allclose(process.loss(lambda x, t: noise - 2, x_0, t, noise, "l1"), torch.full((3,), 2.0))
    with pytest.raises(ValueError, match="'huber'"):
        process.loss(lambda x, t: noise, x_0, t, noise, "huber")


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
    args = SimpleNamespace(classes=data.class_names("maze"), seed=0)
    labels = train.training_labels(MazeVideos(2, 8), args, 7, range(40), "cpu")
    for rank in range(2):
        mine = range(20 * rank, 20 * rank + 20)
        assert torch.equal(train.training_labels(MazeVideos(2, 8), args, 7, mine, "cpu"), labels[mine])
    for i, label in enumerate(labels):
        name = MazeVideos(2, 8).label(0, 7, i)
        assert label == (8 if dropped[7, i] else args.classes.index(name))
    assert train.training_labels(MazeVideos(2, 8), SimpleNamespace(classes=None), 7, range(4), "cpu") is None


def test_training_noise_is_a_function_of_seed_step_and_index():
    t, noise = training_noise((3, 2, 4, 4), seed=1, step=5, indices=range(8), T=256)
    for rank in range(2):
        part_t, part_noise = training_noise((3, 2, 4, 4), 1, 5, range(4 * rank, 4 * rank + 4), 256)
        assert torch.equal(part_t, t[4 * rank:4 * rank + 4]) and torch.equal(part_noise, noise[4 * rank:4 * rank + 4])
    assert len({n.sum().item() for n in noise}) == 8
    assert not torch.equal(noise, training_noise((3, 2, 4, 4), 1, 6, range(8), 256)[1])
    many, _ = training_noise((1,), 0, 0, range(4000), T=4)
    assert torch.bincount(many, minlength=4).min() > 900


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("frames", [6, 24])  # at 4x4, more than the positions of a video, fewer than those of a batch
def test_sample_i_does_not_depend_on_its_batch(precision, frames):
    torch.manual_seed(0)
    net, process = randomise(UNet3D(UNetConfig(**TINY))), Diffusion(32)
    shape = (3, frames, 8, 8)
    together = sample.draw(net, process, 0, range(3), shape, precision)
    assert together.shape == (3, frames, 8, 8, 3) and together.dtype == np.uint8
    assert len({video.tobytes() for video in together}) == 3
    for i in range(3):
        alone = sample.draw(net, process, 0, [i], shape, precision)[0]
        difference = np.abs(alone.astype(int) - together[i])
        assert difference.max() <= 1 and difference.mean() < 1e-3  # sums in another order may round otherwise


# ------------------------------------------------------------------------------------------------ given frames


class MixFrames(torch.nn.Module):
    """x_t -> the ε of x̂_0 = M x_t, M a matrix over the frames for every t, scaled so that M is E[x_0 | x_t] of videos
    whose frames are all one picture of standard normal numbers."""

    def __init__(self, diffusion, frames):
        super().__init__()
        self.diffusion, self.frames, self.seen = diffusion, frames, []

    def matrix(self, t):
        alpha_bar = self.diffusion.alpha_bars[t]
        return torch.full((self.frames,) * 2, alpha_bar ** 0.5 / (alpha_bar * self.frames + 1 - alpha_bar))

    def forward(self, x_t, t):
        self.seen.append(x_t.detach())
        alpha_bar = self.diffusion.alpha_bars[t[0]]
        x_0 = torch.einsum("ij,bcjhw->bcihw", self.matrix(t[0]).to(x_t.dtype), x_t)
        return (x_t - alpha_bar ** 0.5 * x_0) / (1 - alpha_bar) ** 0.5


def test_reconstruction_guidance_is_the_papers_equation():
    diffusion, given = Diffusion(16), torch.tensor([True, False, False, True, False])
    net = MixFrames(diffusion, 5)
    x_t, x_a = torch.randn(2, 2, 3, 5, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t in (0, 7, 12):
        alpha, M = diffusion.alpha_bars[t] ** 0.5, net.matrix(t).double()
        x_hat = torch.einsum("ij,bcjhw->bcihw", M, x_t)
        # ∇ ‖x^a - x̂^a‖² = -2 M_aᵀ (x^a - x̂^a)
        pull = torch.einsum("af,bchwa->bchwf", M[given],
                            (x_a - x_hat)[:, :, given].permute(0, 1, 3, 4, 2)).permute(0, 1, 4, 2, 3)
        for weight in (0.0, 1.0, 3.0):
            x_0 = diffusion.denoise_given(net, x_t, t, x_a, given, weight)
            expected = torch.where(given[:, None, None], x_a, x_hat + weight * alpha * pull)
            assert (x_0 - expected).abs().max() < 1e-4 and not x_0.requires_grad


@pytest.mark.parametrize("settings", [{}, {"steps": 20, "eta": 0.0}, {"steps": 20, "eta": 1.0}])
def test_given_frames_stay_and_draw_the_others(settings):
    diffusion, given = Diffusion(64), torch.arange(6) < 2
    x_a = 0.5 * torch.randn(4, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0)).clamp(-2, 2).expand(-1, -1, 6, -1, -1)
    errors = []
    for weight in (0.0, 1.0):
        net = MixFrames(diffusion, 6)
        x = diffusion.sample(net, (4, 3, 6, 4, 4), sample_generators(0, range(4)), known=(x_a, given), weight=weight,
                             **settings)
        assert torch.equal(x[:, :, given], x_a[:, :, given])
        errors.append((x - x_a)[:, :, ~given].square().mean().sqrt().item())
        for (t, _), x_t in zip(diffusion.timesteps(settings.get("steps")), net.seen):
            noise = (x_t - diffusion.alpha_bars[t] ** 0.5 * x_a)[:, :, given] / (1 - diffusion.alpha_bars[t]) ** 0.5
            assert 0.85 < noise.std() < 1.15, "given frames have the noise of the forward process"
    free = diffusion.sample(MixFrames(diffusion, 6), (4, 3, 6, 4, 4), sample_generators(0, range(4)), **settings)
    assert errors[1] < 0.7 * errors[0] < 0.7 * (free - x_a).square().mean().sqrt(), "x^b is to be x^a here"


# ------------------------------------------------------------------------------------------------ training


TRAIN = ("--frames 5 --size 8 --base-channels 8 --channel-mults 1 2 --time-dim 16 --heads 1 "
         "--state-size 8 --mlp-dim 8 "
         "--diffusion-steps 8 --batch-size 4 --workers 0 --log-every 1 --eval-every 3 --sample-every 100 "
         "--save-every 2 --ema-every 2 --ema-start 3 --lr 1e-2 --precision float32 --device cpu").split()


@pytest.fixture
def run_train(monkeypatch):
    """Run train.py's main function with flags in this process; restores the signal handlers."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it takes longer than such a run
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *TRAIN, *map(str, flags)])
        train.main()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out):
    return [(record["step"], record["loss"], record.get("held_out_loss")) for record in read_log(out)]


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for item, other in zip(a, b):
            assert_same(item, other)
    else:
        assert a == b


def test_resumed_training_is_the_same_bit_for_bit(run_train, tmp_path, capsys):
    run_train("--steps", 6, "--out", tmp_path / "once")
    run_train("--steps", 3, "--out", tmp_path / "twice", "--log-every", 2)
    run_train("--steps", 6, "--out", tmp_path / "twice", "--log-every", 2)
    printed = capsys.readouterr().out
    assert "changed: --steps 3 -> 6" in printed and printed.count("no loss.png: pip install matplotlib") == 3
    once, twice = (sample.load_checkpoint(tmp_path / name / "ckpt.pt") for name in ("once", "twice"))
    for part in ("step", "model", "ema", "optimizer", "unet"):
        assert_same(once[part], twice[part])
    assert any(not torch.equal(once["model"][name], once["ema"][name]) for name in once["model"]), "the average lags"
    assert losses(tmp_path / "twice")[-1][2] == losses(tmp_path / "once")[-1][2]
    assert (tmp_path / "once" / "samples" / "step_0000006.gif").read_bytes() == \
        (tmp_path / "twice" / "samples" / "step_0000006.gif").read_bytes()
    run_train("--steps", 6, "--out", tmp_path / "once")
    assert "nothing to do" in capsys.readouterr().out


def test_a_signal_stops_after_the_step_and_nothing_is_lost(run_train, tmp_path, monkeypatch, capsys):
    run_train("--steps", 6, "--out", tmp_path / "once", "--log-every", 4)
    clip, calls = data.MazeVideos.clip, []

    def clip_and_signal(self, *key):
        calls.append(key)
        if key[:2] == (0, 2):  # while the third step's batch is read
            os.kill(os.getpid(), signal.SIGTERM) if not any(k[:2] == (0, 2) for k in calls[:-1]) else None
        return clip(self, *key)

    monkeypatch.setattr(data.MazeVideos, "clip", clip_and_signal)
    run_train("--steps", 6, "--out", tmp_path / "stopped", "--log-every", 4)
    assert "stopped at step 3" in capsys.readouterr().out
    assert sample.load_checkpoint(tmp_path / "stopped" / "ckpt.pt")["step"] == 3
    monkeypatch.setattr(data.MazeVideos, "clip", clip)
    with open(tmp_path / "stopped" / "log.jsonl", "a") as log:  # as if killed later, in the middle of a line
        log.write('null\n{"step": 5, "loss": 1}\n{"step": 6, "lo')
    run_train("--steps", 6, "--out", tmp_path / "stopped", "--log-every", 4)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "once")
    assert_same(*(sample.load_checkpoint(tmp_path / name / "ckpt.pt")["model"] for name in ("once", "stopped")))


def test_a_signal_to_the_whole_process_group_loses_nothing(run_train, tmp_path):
    process = subprocess.Popen([sys.executable, HERE / "train.py", *TRAIN, "--workers", "2", "--steps", "100000",
                                "--out", tmp_path / "run"], start_new_session=True, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 3/"):
            os.killpg(process.pid, signal.SIGTERM)  # the data loading processes get it too
            break
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    stopped = int(re.search(r"stopped at step (\d+)", rest)[1])
    assert stopped >= 3 and sample.load_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] == stopped
    for name in ("run", "undisturbed"):
        run_train("--steps", stopped + 1, "--out", tmp_path / name)
    assert losses(tmp_path / "run") == losses(tmp_path / "undisturbed")


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the process may touch a file any more."""


def test_a_kill_at_any_file_operation_loses_nothing(run_train, tmp_path, monkeypatch):
    flags = ["--steps", 2, "--save-every", 1, "--eval-clips", 0, "--grid-samples", 0]
    run_train(*flags, "--steps", 1, "--out", tmp_path / "begun")
    shutil.copytree(tmp_path / "begun", tmp_path / "whole")
    run_train(*flags, "--out", tmp_path / "whole")
    countdown = -1

    def killing(function, half=None):
        def wrapped(*args, **kwargs):
            nonlocal countdown
            if countdown == 0:
                raise Killed
            countdown -= 1
            if countdown == 0 and half:
                half(*args)
            if countdown == 0:
                raise Killed
            return function(*args, **kwargs)
        return wrapped

    whole = sample.load_checkpoint(tmp_path / "whole" / "ckpt.pt")
    for name in ("replace", "fsync", "unlink"):
        monkeypatch.setattr(os, name, killing(getattr(os, name)))
    monkeypatch.setattr(Path, "unlink", killing(Path.unlink))
    monkeypatch.setattr(torch, "save", killing(torch.save, lambda ckpt, file: file.write(b"half a checkpoint")))
    kills = 0
    while True:
        out = shutil.copytree(tmp_path / "begun", tmp_path / str(kills))
        countdown = kills + 1
        try:
            run_train(*flags, "--out", out)
        except Killed:
            kills += 1
        else:
            break
        countdown = -1
        run_train(*flags, "--out", out)
        assert losses(out) == losses(tmp_path / "whole")
        ckpt = sample.load_checkpoint(out / "ckpt.pt")
        assert_same({**ckpt, "config": None}, {**whole, "config": None})
        assert sorted(os.listdir(out)) == sorted(os.listdir(tmp_path / "whole"))
    assert kills >= 7


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(run_train, tmp_path, capsys):
    run_train("--steps", 4, "--out", tmp_path)
    good = sample.load_checkpoint(tmp_path / "ckpt.pt")
    whole = (tmp_path / "ckpt.pt").read_bytes()
    (tmp_path / "ckpt.pt").write_bytes(whole[:len(whole) // 2])
    run_train("--steps", 4, "--out", tmp_path)
    assert "ckpt.pt is damaged" in capsys.readouterr().out
    assert (tmp_path / "ckpt_damaged.pt").read_bytes() == whole[:len(whole) // 2]
    assert_same(sample.load_checkpoint(tmp_path / "ckpt.pt")["model"], good["model"])
    for name in ("ckpt.pt", "ckpt_previous.pt"):
        (tmp_path / name).write_bytes(whole[:1000])
    with pytest.raises(sample.CheckpointError, match="ckpt.pt is damaged.*move it away"):
        run_train("--steps", 4, "--out", tmp_path)
    assert (tmp_path / "ckpt.pt").read_bytes() == whole[:1000]


def test_a_different_model_is_not_resumed(run_train, tmp_path):
    run_train("--steps", 1, "--out", tmp_path)
    before = (tmp_path / "ckpt.pt").read_bytes()
    for flags, words in [(["--frames", 6], "--frames 5, not 6"), (["--temporal", "gss"], "--temporal ssm, not gss"),
                         (["--frames", 7, "--lr", 1, "--heads", 2], "--frames 5, not 7; --heads 1, not 2: give"),
                         (["--batch-size", 2], "--batch-size 4, not 2"), (["--seed", 1], "--seed 0, not 1")]:
        with pytest.raises(ValueError, match=words):
            run_train("--steps", 2, "--out", tmp_path, *flags)
    assert (tmp_path / "ckpt.pt").read_bytes() == before


def test_a_folder_is_one_runs_alone(run_train, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"mine": 1}')
    with pytest.raises(ValueError, match="config.json that is not a run's"):
        run_train("--steps", 1, "--out", tmp_path / "other")
    assert (tmp_path / "other" / "config.json").read_text() == '{"mine": 1}'
    (tmp_path / "run").mkdir()
    hold = "import fcntl; lock = open('.lock', 'w'); fcntl.lockf(lock, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold], cwd=tmp_path / "run", stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="in use by another training"):
            run_train("--steps", 1, "--out", tmp_path / "run")
        other.kill()
    run_train("--steps", 1, "--out", tmp_path / "run")


def test_a_checkpoint_from_before_a_flag_is_resumed(run_train, tmp_path):
    run_train("--steps", 1, "--out", tmp_path)
    ckpt = sample.load_checkpoint(tmp_path / "ckpt.pt")
    assert ckpt["config"]["mlp_dim"] == 8 and ckpt["config"]["state_size"] == 8  # never None for this layer
    del ckpt["config"]["skip"], ckpt["unet"]["skip"], ckpt["config"]["ssm"], ckpt["unet"]["ssm"]
    torch.save(ckpt, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="--skip input, not norm"):
        run_train("--steps", 2, "--out", tmp_path, "--skip", "norm")
    run_train("--steps", 2, "--out", tmp_path)


def test_a_missing_last_grid_is_drawn_when_asked_again(run_train, tmp_path, capsys):
    run_train("--steps", 1, "--out", tmp_path)
    grid = tmp_path / "samples" / "step_0000001.gif"
    picture = grid.read_bytes()
    grid.unlink()
    run_train("--steps", 1, "--out", tmp_path)
    assert grid.read_bytes() == picture and "nothing to do" in capsys.readouterr().out


def test_a_non_finite_loss_stops_before_the_checkpoint(run_train, tmp_path, monkeypatch):
    run_train("--steps", 2, "--out", tmp_path)
    before = (tmp_path / "ckpt.pt").read_bytes()
    with pytest.raises(train.NotFinite, match="step 3: .*norm of the weights (inf|nan) at --lr 1e[+]30 "):
        run_train("--steps", 4, "--out", tmp_path, "--lr", 1e30)  # the loss itself is finite at first
    loss = Diffusion.loss

    def poisoned(self, net, x_0, t, noise, kind):
        return loss(self, net, x_0, t, noise, kind) * (math.nan if torch.is_grad_enabled() else 1)

    monkeypatch.setattr(Diffusion, "loss", poisoned)
    with pytest.raises(train.NotFinite, match="step 3: loss nan.*--lr 0.01.*--precision"):
        run_train("--steps", 6, "--out", tmp_path)
    assert (tmp_path / "ckpt.pt").read_bytes() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_ends_no_run(run_train, tmp_path, capsys):
    run_train("--steps", 6, "--out", tmp_path / "once", "--eval-every", 2)
    out = tmp_path / "full"
    run_train("--steps", 2, "--out", out, "--eval-every", 2)
    before = (out / "ckpt.pt").read_bytes()
    (out / ".ckpt.pt.partial").symlink_to("/dev/full")  # the first checkpoint, and then it is gone
    log = train.append_lines

    def full(path, lines):
        if '"step": 5,' in lines[-1]:
            raise OSError(f"{path} cannot be written (No space left on device)")
        log(path, lines)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "append_lines", full)
        run_train("--steps", 6, "--out", out, "--eval-every", 2)
    error = capsys.readouterr().err
    assert re.search("step 4: .*ckpt.pt cannot be written .*; earlier checkpoints are untouched; training goes on", error)
    assert "log.jsonl cannot be written (No space left on device); training goes on" in error
    assert losses(out) == losses(tmp_path / "once")
    assert_same(*(sample.load_checkpoint(path / "ckpt.pt")["model"] for path in (out, tmp_path / "once")))
    assert (out / "ckpt_previous.pt").read_bytes() == before
    (out / ".ckpt.pt.partial").symlink_to("/dev/full")
    last = (out / "ckpt.pt").read_bytes()
    with pytest.raises(OSError, match="step 7: .*cannot be written"):  # at its end it is an error
        run_train("--steps", 7, "--out", out)
    assert (out / "ckpt.pt").read_bytes() == last


def test_lines_are_appended_all_or_none(tmp_path, monkeypatch):
    lines = ["whole\n"]
    train.append_lines(tmp_path / "log", lines)
    assert lines == []

    class Full(io.FileIO):
        def write(self, content):
            return super().write(content[:3])

    monkeypatch.setattr(train, "open", lambda path, *_, **__: Full(path, "ab"), raising=False)
    with pytest.raises(OSError, match="No space left"):
        train.append_lines(tmp_path / "log", ["part\n"])
    assert (tmp_path / "log").read_text() == "whole\n"


def test_grad_accum_gives_the_same_losses(run_train, tmp_path):
    run_train("--steps", 4, "--out", tmp_path / "1")
    run_train("--steps", 4, "--out", tmp_path / "4", "--grad-accum", 4)
    for (_, loss, _), (_, other, _) in zip(losses(tmp_path / "1"), losses(tmp_path / "4")):
        assert math.isclose(loss, other, rel_tol=1e-5)


def test_the_average_is_a_copy_first_and_then_lags(run_train, tmp_path):
    run_train("--steps", 2, "--out", tmp_path)  # --ema-every 2 --ema-start 3
    ckpt = sample.load_checkpoint(tmp_path / "ckpt.pt")
    assert_same(ckpt["ema"], ckpt["model"])
    run_train("--steps", 4, "--out", tmp_path)
    after = sample.load_checkpoint(tmp_path / "ckpt.pt")
    for name in ckpt["ema"]:
        assert torch.allclose(after["ema"][name], 0.995 * ckpt["ema"][name] + 0.005 * after["model"][name], atol=1e-6)


def test_a_run_shorter_than_the_first_update_draws_from_trained_weights(run_train, tmp_path):
    run_train("--steps", 3, "--out", tmp_path, "--ema-every", 10, "--ema-start", 2000)
    ckpt = sample.load_checkpoint(tmp_path / "ckpt.pt")
    assert_same(ckpt["ema"], ckpt["model"])


def test_a_picture_never_costs_the_run(run_train, tmp_path, monkeypatch, capsys):
    def draw_curves(log_path, path):
        raise OSError("no space")

    monkeypatch.setattr(train, "draw_curves", draw_curves)
    run_train("--out", tmp_path / "run", "--grid-samples", 0, "--steps", 1)
    assert re.search(r"no loss.png \(OSError: no space\)\n.*done", capsys.readouterr().out, re.DOTALL)


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="matplotlib is not installed")
@pytest.mark.parametrize("lines, curves", [
    (['{"step": 1, "loss": 1.0}'], 1),
    (['{"step": 1, "loss": 1.0}', '{"step": 1, "fvd": 9.0}',
      '{"step": 2, "loss": 0.5, "held_out_loss": 0.4, "held_out_quartiles": [0.7, 0.5, 0.3, 0.1]}'], 6)])
def test_loss_curves(lines, curves, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: (saved.append(self), Path(path).write_bytes(b"png")))
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    train.draw_curves(tmp_path / "log.jsonl", tmp_path / "loss.png")
    assert len(saved[0].axes[0].lines) == curves and (tmp_path / "loss.png").read_bytes() == b"png"


def test_one_clip_is_overfitted(run_train, tmp_path, monkeypatch):
    clip = data.maze_walk(0, 0, 5, 8)
    monkeypatch.setattr(data.MazeVideos, "clip", lambda self, *key: clip)
    run_train("--steps", 100, "--out", tmp_path, "--log-every", 50, "--eval-clips", 0, "--save-every", 100,
              "--grid-samples", 0, "--diffusion-steps", 64, "--base-channels", 16)
    log = losses(tmp_path)
    assert log[0][1] > 0.2 > 0.1 > log[-1][1]


def torchrun(processes, *command, **settings):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes),
                           *map(str, command)], capture_output=True, text=True, cwd=HERE, **settings)


def test_two_processes_are_one(run_train, tmp_path):
    run_train("--steps", 5, "--out", tmp_path / "one")
    finished = torchrun(2, "train.py", *TRAIN, "--steps", 5, "--out", tmp_path / "two", "--grad-accum", 2)
    assert finished.returncode == 0 and "Warning" not in finished.stderr, finished.stderr
    for record, other in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two")):  # Adam would hide a wrong scale
        assert math.isclose(record["grad_norm"], other["grad_norm"], rel_tol=1e-4)
    both = zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True)
    for (_, loss, held_out), (_, other, other_held_out) in both:
        assert math.isclose(loss, other, rel_tol=1e-5)
        assert held_out is None or math.isclose(held_out, other_held_out, rel_tol=1e-5)
    finished = torchrun(2, "sample.py", "--ckpt", tmp_path / "one" / "ckpt.pt", "--num-samples", 5, "--batch-size", 2,
                        "--out", tmp_path / "two.npy", "--device", "cpu")
    assert finished.returncode == 0, finished.stderr
    net = sample.load_network(sample.load_checkpoint(tmp_path / "one" / "ckpt.pt"), "ema", "cpu")
    expected = sample.draw(net, Diffusion(8), 0, range(5), (3, 5, 8, 8))
    assert np.abs(expected.astype(int) - np.load(tmp_path / "two.npy")).max() <= 1


def test_presets_and_explicit_flags():
    for flags, preset, lr, steps in [
            ("", "ucf101-32", 3e-4, 92_000), ("--frames 16 --size 64", "ucf101-64", 1e-4, 106_000),
            ("--frames 64", "minerl-64", 3e-4, 174_000), ("--frames 200", "minerl-200", 3e-4, 255_000),
            ("--frames 400", "minerl-400", 5e-5, 246_000), ("--frames 350", "minerl-400", 5e-5, 246_000),
            ("--preset minerl-400 --frames 64 --lr 1e-3", "minerl-400", 1e-3, 246_000)]:
        args = train.parse_args(flags.split())
        assert (args.preset, args.lr, args.steps) == (preset, lr, steps)
        assert (args.base_channels, args.time_dim, args.state_size, args.mlp_dim) == (64, 1024, 512, 512)
        assert (args.ema_decay, args.ema_every, args.ema_start) == (0.995, 10, 2000)
    assert train.parse_args("--frames 350".split()).frames == 350
    assert train.parse_args("--preset minerl-400 --frames 64".split()).frames == 64
    assert train.parse_args("--frames 64".split()).batch_size == 8
    assert train.unet_config(train.parse_args([])) == UNetConfig()


@pytest.mark.parametrize("flags, state_size, mlp_dim", [
    ("", 512, 512), ("--temporal attention", 512, 512), ("--temporal gss", 512, None), ("--temporal mamba", 512, None),
    ("--temporal mamba --mlp-dim 512", 512, 512), ("--temporal mamba --ssm s6", 16, None),
    ("--temporal mamba --ssm s6 --state-size 32", 32, None), ("--preset tiny", 64, 64),
    ("--preset tiny --temporal mamba", 64, None), ("--preset tiny --temporal gss --mlp-dim 24", 64, 24)])
def test_the_layers_own_widths(flags, state_size, mlp_dim):
    """As checkpoints from before these layers have them for the others: 512."""
    args = train.parse_args(flags.split())
    assert (args.state_size, args.mlp_dim) == (state_size, mlp_dim)
    config = train.unet_config(args)
    assert (config.state_size, config.mlp_dim) == (state_size, mlp_dim)


@pytest.mark.parametrize("flags, line", [
    ("--temporal attention --mlp-layers 1", "--mlp-layers does not go with --temporal attention, which takes "
     "--head-dim, --attention-impl"),
    ("--temporal none --unidirectional", "--unidirectional .* --temporal none, which takes no such flags"),
    ("--ssm s6", "--ssm does not go with --temporal ssm, which takes --state-size, --mlp-dim, --mlp-layers, "
     "--mlp-position, --unidirectional, --skip"),
    ("--temporal linear-attention --attention-impl math", "--attention-impl .* which takes --head-dim"),
    ("--temporal gss --ssm s6", "--ssm does not go with --temporal gss"), ("--head-dim 32", "--head-dim"),
    ("--temporal mamba --mlp-layers 1", "--mlp-layers .* takes --state-size, --mlp-dim, --unidirectional, --ssm"),
    ("--mlp-layers 1 --mlp-dim 8", "--mlp-dim does not go with --temporal ssm --mlp-layers 1, which takes"),
    ("--mlp-layers 0 --mlp-position pre", "--mlp-position does not go with --temporal ssm --mlp-layers 0"),
    ("--preset tiny --temporal gss --skip norm", "--skip")])
def test_contradictory_flags_are_refused_in_one_line(flags, line, capsys):
    with pytest.raises(SystemExit):
        train.parse_args(flags.split())
    error = capsys.readouterr().err
    assert re.match(f"train.py: {line}", error) and len(error.splitlines()) == 1


def test_every_flag_of_training_refuses_what_it_cannot_take(capsys):
    wrong = {train.positive_int: "0 -1 1.5 x nan 99999999999", train.non_negative_int: "-1 1.5 x 99999999999 \u00b2",
             train.positive_float: "0 -1e-3 x nan inf", train.fraction: "0 1 -1 x nan inf", int: "-1 3 x 1.5"}
    for action in train.make_parser()._actions:
        values = "lstm -1" if action.choices and action.type is None else wrong.get(action.type, "")
        for value in values.split():
            with pytest.raises(SystemExit):
                train.parse_args([f"{action.option_strings[0]}={value}"])
            error = capsys.readouterr().err
            assert re.match(f"train.py: argument {action.option_strings[0]}: .*{re.escape(value)}", error), error
            assert len(error.splitlines()) == 1
        if action.nargs != 0 and action.option_strings != ["-h", "--help"]:  # nothing after it
            with pytest.raises(SystemExit):
                train.parse_args([action.option_strings[0]])
            assert "expected" in capsys.readouterr().err


def test_a_preset_never_contradicts():
    for preset in train.PRESETS:
        for temporal in model.TEMPORAL_LAYERS:
            train.parse_args(["--preset", preset, "--temporal", temporal])
    train.parse_args("--preset tiny --mlp-layers 1".split())


@pytest.mark.parametrize("base, heads, time_dim, parameters", [(32, 4, 1024, 14_083_459), (112, 14, 3584, 172_286_019)])
def test_sizes_of_the_later_edition(base, heads, time_dim, parameters):
    """14.08 M and 172.3 M in print: every parameter of the network with attention, 172.29 M rounded once more."""
    for preset in ("minerl-256", "gqn-mazes-256", "carla-256"):
        args = train.parse_args(f"--preset {preset} --base-channels {base} --temporal attention".split())
        assert (args.frames, args.size, args.batch_size, args.diffusion_steps, args.loss) == (256, 32, 8, 256, "l2")
        assert (args.steps, args.lr, args.ema_decay, args.head_dim) == (100_000, 1e-4, 0.9999, 64)
        assert (args.heads, args.time_dim) == (heads, time_dim)
        with torch.device("meta"):
            assert model.count_parameters(UNet3D(train.unet_config(args))) == parameters
    args = train.parse_args("--preset carla-256 --heads 3 --time-dim 64".split())
    assert (args.heads, args.time_dim, args.base_channels) == (3, 64, 32)


# ------------------------------------------------------------------------------------------------ README's commands


def readme_rows(heading):
    """The cells of the rows below a heading of README.md, without the tables' heads."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    section = re.split("\n##+ ", text.split(f"# {heading}\n")[1])[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines()
            if line.startswith("| ") and "`" in line]


ROWS = [(cells[2].strip("`").removeprefix("train.py "), cells[3]) for cells in readme_rows("Reproduce the paper")]
STUDY = [cells[1].strip("`") for cells in readme_rows("At small scale")]
SMALL = "--base-channels 8 --heads 1 --time-dim 16 --channel-mults 1 --frames 3 --size 4 --batch-size 2"


def test_the_tables_have_every_row_of_the_paper():
    flags = [row.split("--data ")[1].split(" ", 1)[1:] for row, _ in ROWS if "ucf101-32" in row]
    assert sorted(sum(flags, [])) == sorted(
        ["--temporal attention", "--temporal linear-attention", "--temporal ssm", "--unidirectional",
         "--mlp-position pre", "--mlp-layers 1", "--mlp-layers 0", "--temporal gss --unidirectional", "--temporal gss",
         "--temporal gss --mlp-dim 512", "--temporal mamba --unidirectional", "--temporal mamba",
         "--temporal mamba --mlp-dim 512"])
    for preset in train.PRESETS:
        layers = {row.split("--temporal ")[1] for row, _ in ROWS if f"{preset} " in row and "--temporal" in row}
        if preset != "tiny":
            assert layers >= {"attention", "mamba --ssm s6" if "256" in preset else "ssm"}, preset


STEP_MEMORY = {}


def step_memory_once(args, world_size, step_memory=train.step_memory):
    """The same, once for each kind of temporal layer: it takes a quarter of a second."""
    kind = args.temporal, args.ssm
    if kind not in STEP_MEMORY:
        STEP_MEMORY[kind] = step_memory(args, world_size)
    return STEP_MEMORY[kind]


@pytest.mark.parametrize("flags, parameters", ROWS + [(f"--preset tiny {flags}", None) for flags in STUDY])
def test_every_command_of_the_tables_runs(flags, parameters, capsys, monkeypatch):
    monkeypatch.setattr(train, "step_memory", step_memory_once)
    if parameters:
        with torch.device("meta"):
            full = UNet3D(train.unet_config(train.parse_args(flags.split())))
        assert f"{model.count_parameters(full) / 1e6:.2f} M" == parameters
    torch.manual_seed(0)
    args = train.parse_args(f"{flags} {SMALL} --dry-run --device cpu".split())
    train.train(args)
    printed = capsys.readouterr().out
    net = UNet3D(train.unet_config(args))
    assert re.search(rf"^{model.count_parameters(net):,} parameters, temporal layer {args.temporal}: ", printed,
                     re.MULTILINE) and re.search(r"a step takes about 0\.\d\d GB", printed)
    net(torch.randn(1, 3, 3, 4, 4), torch.tensor([5])).square().mean().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def test_the_loop_of_the_study_has_the_rows_of_its_table():
    text = (HERE / "README.md").read_text(encoding="utf-8")
    assert text.split("<<'ROWS'\n")[1].split("\nROWS\n")[0].splitlines() == STUDY


@pytest.mark.parametrize("temporal", ["ssm", "attention", "gss", "none"])
def test_parts_of_a_network(temporal):
    net = UNet3D(UNetConfig(temporal, **TINY))
    counts = train.parts(net)
    plain = train.parts(UNet3D(UNetConfig("none", **TINY)))
    assert sum(counts.values()) == model.count_parameters(net)
    assert (counts["spatial"], counts["time"], plain["temporal"]) == (plain["spatial"], plain["time"], 0)
    assert counts["temporal"] > 0 or temporal == "none"


def test_live_memory_counts_what_is_kept():
    with train.LiveMemory() as memory:
        a = torch.empty(1000, device="meta")
        b = a * 2
        view = b[:10]
        assert memory.live == memory.peak == 8000
        del b
        assert memory.live == 8000, "the view holds it"
        del view
        assert (memory.live, memory.peak) == (4000, 8000)
        a.add_(1)
        assert memory.peak == 8000


def test_step_memory_is_that_of_a_step():
    """Against the same count of a step on the CPU: shapes are the same without data, where chunks are."""
    args = train.parse_args(f"{SMALL} --batch-size 4 --grad-accum 2 --device cpu".split())
    net = UNet3D(train.unet_config(args))
    x, t = torch.randn(2, 3, 3, 4, 4), torch.tensor([3, 4])
    with train.LiveMemory() as memory:
        (net(x, t) - x).square().mean().backward()
    expected = memory.peak + 16 * model.count_parameters(net)
    assert abs(train.step_memory(args, 1) / expected - 1) < 0.02
    assert train.step_memory(args, 2) < train.step_memory(args, 1)


# ------------------------------------------------------------------------------------------------ sampling

CLASSES = ["Archery", "Bowling", "YoYo"]


@pytest.fixture
def trained(run_train, tmp_path):
    run_train("--steps", 1, "--out", tmp_path / "out" / "run")
    return tmp_path / "out" / "run" / "ckpt.pt"


def run_sample(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, flags)])
    sample.main()


def test_sample_writes_what_data_reads(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_sample(monkeypatch, "--num", 3, "--batch-size", 2, "--frames", 9, "--size", 16)
    assert "step 1, ema weights, decay 0.995" in capsys.readouterr().out
    path = trained.with_name("samples_0000001.npy")
    videos = np.load(path, allow_pickle=False)
    assert videos.shape == (3, 9, 16, 16, 3) and videos.dtype == np.uint8
    assert data.PackedVideos(path, frames=9, size=16).num_windows == 3
    assert data.decode(path.with_suffix(".gif"), 16).shape[0] == data.decode(path.with_suffix(".mp4"), 16).shape[0] == 9
    assert {file.name for file in path.parent.iterdir() if "samples_" in file.name} == {
        path.name, path.name + ".json", *(path.with_suffix(suffix).name for suffix in (".gif", ".mp4", ".png"))}
    # the contact sheet: 3 rows of 8 of the 9 frames, four times as large, with a gap of 4
    with Image.open(path.with_suffix(".png")) as image:
        sheet = np.asarray(image)
    assert sheet.shape == (3 * 68, 8 * 68, 3)
    for row, column, frame in ((0, 0, 0), (1, 3, 3), (1, 4, 5), (2, 7, 8)):
        assert np.array_equal(sheet[68 * row:, 68 * column:][:64:4, :64:4], videos[row, frame])
    run_sample(monkeypatch, "--num", 3, "--batch-size", 2, "--frames", 9, "--size", 16)
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(ValueError, match="belongs to other samples"):
        run_sample(monkeypatch, "--num", 4)


def test_class_conditional_by_the_commands(run_train, tmp_path, monkeypatch):
    for number, (name, split) in enumerate([("Archery", "train"), ("Bowling", "train"), ("YoYo", "test")]):
        folder = tmp_path / "videos" / split / name
        folder.mkdir(parents=True)
        np.save(folder / "a.npy", np.full((6, 8, 8, 3), 40 * number, np.uint8))
    index = data.pack(tmp_path / "videos", tmp_path / "packed.npy", size=8, workers=1)
    assert [video["label"] for video in index["videos"]] == ["YoYo", "Archery", "Bowling"]
    assert data.class_names(tmp_path / "packed.npy") == data.class_names(tmp_path / "videos") == CLASSES
    videos = data.PackedVideos(tmp_path / "packed.npy", 5, 8, "all")
    assert all(videos.clip(0, i)[0, 0, 0, 0] == 40 * CLASSES.index(videos.label(0, i)) for i in range(20))

    flags = ["--data", tmp_path / "packed.npy", "--classes", "--grid-samples", 2, "--out", tmp_path / "run"]
    run_train(*flags, "--steps", 1, "--grad-accum", 2)
    ckpt = sample.load_checkpoint(tmp_path / "run" / "ckpt.pt")
    assert ckpt["config"]["classes"] == CLASSES and ckpt["unet"]["classes"] == 3
    for classes, words in [(None, r"--classes \(3: Archery, Bowling, YoYo\), not no --classes"),
                           (["blue"], r"YoYo\), not --classes \(1: blue\)")]:
        with pytest.raises(ValueError, match=words):
            train.check_resume({"classes": classes}, ckpt["config"], tmp_path)
    with pytest.raises(ValueError, match="has no labels"):
        run_train("--classes", "--data", write_npy(tmp_path / "plain.npy", 6))

    flags, out = ["--ckpt", tmp_path / "run" / "ckpt.pt", "--sampler", "ddim", "--num", 4], tmp_path / "turns.npy"
    run_sample(monkeypatch, *flags, "--batch-size", 2, "--out", out)
    assert json.loads((tmp_path / "turns.npy.json").read_text())["labels"] == [*CLASSES, "Archery"]
    assert [video["label"] for video in data.PackedVideos(out, 5, 8).videos] == [*CLASSES, "Archery"]
    assert data.class_names(out) == CLASSES
    run_sample(monkeypatch, *flags, "--out", tmp_path / "b.npy", "--class", "Bowling", "--guidance", 2)
    about = json.loads((tmp_path / "b.npy.json").read_text())
    assert about["labels"] == ["Bowling"] * 4 and about["guidance"] == 2
    net = sample.load_network(ckpt, "ema", torch.device("cpu"))
    for name, labels, guidance in [("b.npy", [1] * 4, 2), ("turns.npy", [0, 1, 2, 0], 1)]:
        settings = dict(steps=8, eta=0, labels=labels, guidance=guidance)
        expected = draw(net, Diffusion(8), 0, range(4), (3, 5, 8, 8), **settings)
        assert np.abs(np.load(tmp_path / name).astype(int) - expected).max() <= 1
    (tmp_path / "turns.npy.json").write_text('{"labels": ["Archery"]}')
    with pytest.raises(data.DataError, match="do not fit the 4 videos"):
        data.PackedVideos(out, 5, 8)


@pytest.mark.parametrize("flags, classes, labels", [
    ("", [], None), ("--num 4", CLASSES, [0, 1, 2, 0]), ("--class YoYo --num 2", CLASSES, [2, 2]),
    ("--class yoyoo", CLASSES, "--class yoyoo: not one of the checkpoint's 3 classes, such as YoYo$"),
    ("--class x", CLASSES, "such as Archery, Bowling, YoYo$"),
    ("--class YoYo", [], "--class YoYo: the checkpoint was trained without classes"),
    ("--guidance 2", [], "--guidance 2.0: the checkpoint was trained without classes")])
def test_chosen_labels(flags, classes, labels, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sample.py", *flags.split()])
    args = sample.parse_args()
    if isinstance(labels, str):
        with pytest.raises(ValueError, match=labels):
            sample.chosen_labels(args, classes)
    else:
        assert sample.chosen_labels(args, classes) == labels


def test_ddim_and_v_by_the_command(trained, run_train, tmp_path, monkeypatch, capsys):
    flags, out = ["--ckpt", trained, "--num", 2, "--sampler", "ddim", "--sampling-steps", 3], tmp_path / "ddim.npy"
    run_sample(monkeypatch, *flags, "--out", out)
    assert "ddim, 3 steps" in capsys.readouterr().out
    about = json.loads((tmp_path / "ddim.npy.json").read_text())
    assert (about["sampler"], about["sampling_steps"], about["eta"]) == ("ddim", 3, 0)
    net = sample.load_network(sample.load_checkpoint(trained), "ema", torch.device("cpu"))
    assert np.array_equal(np.load(out), draw(net, Diffusion(8), 0, range(2), (3, 5, 8, 8), steps=3, eta=0))
    with pytest.raises(ValueError, match="belongs to other samples"):
        run_sample(monkeypatch, *flags, "--out", out, "--eta", 0.5)

    run_train("--steps", 1, "--out", tmp_path / "v", "--prediction", "v", "--grid-samples", 0)
    assert losses(tmp_path / "v") != losses(trained.parent)
    ckpt = sample.load_checkpoint(tmp_path / "v" / "ckpt.pt")
    with pytest.raises(ValueError, match="--prediction v, not eps"):
        train.check_resume({"prediction": "eps"}, ckpt["config"], tmp_path)
    run_sample(monkeypatch, "--ckpt", tmp_path / "v" / "ckpt.pt", "--num", 1, "--out", tmp_path / "v.npy")
    net = sample.load_network(ckpt, "ema", torch.device("cpu"))
    assert np.array_equal(np.load(tmp_path / "v.npy"), draw(net, Diffusion(8, "cpu", "v"), 0, [0], (3, 5, 8, 8)))


@pytest.mark.parametrize("flags, settings", [
    ("", (None, None)), ("--sampler ddim", (8, 0)), ("--sampler ddim --sampling-steps 3 --eta 0.5", (3, 0.5)),
    ("--sampling-steps 8", "--sampling-steps 8 goes with --sampler ddim"), ("--eta 0", "--eta 0.0 goes with --sampler"),
    ("--sampler ddim --sampling-steps 9", "--sampling-steps 9: the checkpoint has 8 diffusion steps")])
def test_sampler_settings(flags, settings, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sample.py", *flags.split()])
    args = sample.parse_args()
    if isinstance(settings, tuple):
        assert sample.sampler_settings(args, 8) == settings
    else:
        with pytest.raises(ValueError, match=settings):
            sample.sampler_settings(args, 8)


def test_stopped_sampling_goes_on(trained, tmp_path, monkeypatch):
    flags = ["--ckpt", trained, "--num", 5, "--batch-size", 2]
    run_sample(monkeypatch, *flags, "--out", tmp_path / "whole.npy")
    draw, calls = sample.draw, []
    (tmp_path / "foreign.gif").write_bytes(b"mine")
    with pytest.raises(ValueError, match="foreign.gif exists already"):
        run_sample(monkeypatch, *flags, "--out", tmp_path / "foreign.npy")

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(sample, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_sample(monkeypatch, *flags, "--out", tmp_path / "stopped.npy")
    assert not (tmp_path / "stopped.npy").exists()
    run_sample(monkeypatch, *flags, "--out", tmp_path / "stopped.npy")
    assert len(calls) == 4, "what was drawn before is not drawn again"
    assert (tmp_path / "stopped.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert not [file for file in os.listdir(tmp_path) if file.startswith(".")]


@pytest.mark.parametrize("text, frames", [
    ("0:3", [0, 1, 2]), (":2,-2:", [0, 1, 6, 7]), ("0:8:3", [0, 3, 6]), ("3:5,4:6", [3, 4, 5]), ("-1:", [7]),
    ("0:9", None), ("-9:2", None), ("3:3", None), ("3", None), ("", None), ("0:3,", None), ("a:b", None), ("0:8:0", None),
    (":", None)])
def test_given_is_a_slice_or_several(text, frames):
    if frames:
        assert sample.given_frames(text, 8) == frames
    else:
        with pytest.raises(ValueError, match=f"--given {text}: "):
            sample.given_frames(text, 8)


def test_prediction_and_infilling(trained, tmp_path, monkeypatch, capsys):
    """Given frames are the clip's byte for byte, whatever the video file, and stopped drawing goes on."""
    clips = np.random.default_rng(0).integers(256, size=(2, 4, 8, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "clips.npy", clips)
    write_mp4(tmp_path / "clip.mp4", 5)
    monkeypatch.chdir(tmp_path)
    sampler = ["--ckpt", trained, "--num", 3, "--batch-size", 2, "--sampler", "ddim", "--sampling-steps", 3]
    flags = [*sampler, "--condition", "clips.npy", "--given", "0:2,3:4"]
    run_sample(monkeypatch, *flags, "--out", "whole.npy")
    drawn = np.load("whole.npy")
    assert all(np.array_equal(drawn[i, [0, 1, 3]], clips[i % 2, [0, 1, 3]]) for i in range(3))
    assert not np.array_equal(drawn[0, 2], drawn[2, 2]), "as each sample has its own noise"
    about = json.loads(Path("whole.npy.json").read_text())
    assert about["given"] == [0, 1, 3] and about["condition"] == "clips.npy" and about["condition_weight"] > 0
    with Image.open("whole.png") as sheet:
        marked = [(np.asarray(sheet)[0, 68 * i:][:64] == 255).all() for i in range(5)]
    assert marked == [True, True, False, True, False]

    draw, calls = sample.draw, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sample, "draw", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_sample(monkeypatch, *flags, "--out", "stopped.npy")
    run_sample(monkeypatch, *flags, "--out", "stopped.npy")
    assert Path("stopped.npy").read_bytes() == Path("whole.npy").read_bytes()
    with pytest.raises(ValueError, match="belongs to other samples"):
        run_sample(monkeypatch, *flags, "--condition-weight", 1, "--out", "whole.npy")

    run_sample(monkeypatch, *sampler, "--condition", "clip.mp4", "--given=-2:", "--condition-method", "replacement",
               "--out", "end.npy")
    assert np.array_equal(np.load("end.npy")[:, -2:], [data.decode("clip.mp4", 8)[-2:]] * 3)
    assert json.loads(Path("end.npy.json").read_text())["condition_weight"] == 0


def test_long_videos_by_blocks(trained, tmp_path, monkeypatch):
    """Every block has the length of the window and what was drawn before as given frames; none is drawn twice."""
    draw_block, seen = Diffusion.sample, []

    def spy(self, net, shape, *args):
        x = draw_block(self, net, shape, *args)
        seen.append((shape[2], args[4] and [part.clone() for part in args[4]], x))
        return x

    monkeypatch.setattr(Diffusion, "sample", spy)
    flags = ["--ckpt", trained, "--num", 2, "--sampler", "ddim", "--sampling-steps", 2, "--frames", 10]
    run_sample(monkeypatch, *flags, "--window", 4, "--overlap", 1, "--out", tmp_path / "long.npy")
    video = torch.cat([seen[0][2], seen[1][2][:, :, 1:], seen[2][2][:, :, 1:]], dim=2)
    assert [length for length, *_ in seen] == [4, 4, 4] and seen[0][1] is None
    for (_, _, before), (_, (x_a, given), x) in zip(seen, seen[1:]):
        assert given.tolist() == [True, False, False, False]
        assert torch.equal(x[:, :, 0], before[:, :, -1]) and torch.equal(x_a[:, :, 0], before[:, :, -1])
    assert np.array_equal(np.load(tmp_path / "long.npy"), data.to_uint8(video).numpy())
    assert json.loads((tmp_path / "long.npy.json").read_text())["blocks"] == [[0, 4], [3, 7], [6, 10]]
    # the last block begins earlier to be whole; a block whose frames are all given is not drawn
    seen.clear()
    write_npy(tmp_path / "clip.npy", 4)
    run_sample(monkeypatch, *flags, "--window", 4, "--overlap", 2, "--condition", tmp_path / "clip.npy", "--given", "0:4",
               "--frames", 9, "--out", tmp_path / "more.npy")
    assert [given.tolist() for _, (_, given), _ in seen] == [[True, True, False, False]] * 2 + [[True] * 3 + [False]]
    assert np.array_equal(np.load(tmp_path / "more.npy")[1, :4, 0, 0, 0], [0, 1, 2, 3])


@pytest.mark.parametrize("flags, words", [
    ("--given 0:2", "expected both or neither"), ("--condition clip.npy", "expected both or neither"),
    ("--condition clip.npy --given 0:6", "--given 0:6: expected frames of the 5"),
    ("--condition clip.npy --given 0:4", "asks for frame 3, but clip.npy has 3 frames, 0 to 2"),
    ("--condition clip.npy --given 0:5", "none is left to draw"),
    ("--condition text.mp4 --given 0:2", "text.mp4 cannot be read as a video"),
    ("--condition missing.mp4 --given 0:2", "missing.mp4 cannot be read as a video"),
    ("--condition wide.npy --given 0:2", "frames of 16x16"),
    ("--window 6", "--window 6: expected --frames 5 or fewer"), ("--overlap 2", "--overlap 2 goes with --window"),
    ("--window 4 --overlap 4", "--overlap 4: expected less than the window of 4"),
    ("--window 1", "--overlap 1: expected less than the window of 1"),
    ("--condition-method replacement", "goes with --condition"), ("--window 5 --condition-weight 1", "goes with"),
    ("--window 4 --condition-method replacement --condition-weight 1", "goes with --condition-method recon")])
def test_given_frames_and_blocks_refuse(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_npy(tmp_path / "clip.npy", 3)
    np.save("wide.npy", np.zeros((5, 16, 16, 3), np.uint8))
    Path("text.mp4").write_text("text")
    monkeypatch.setattr(sys, "argv", ["sample.py", *flags.split()])
    with pytest.raises(ValueError, match=words) as error:
        sample.conditioning(sample.parse_args(), 5, 8)
    assert len(str(error.value).splitlines()) == 1


# ------------------------------------------------------------------------------------------------ hostile input


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def save_objects(content, path):
    with open(path, "wb") as file:  # np.save would append .npy
        np.save(file, np.array([content, None]), allow_pickle=True)


@pytest.mark.parametrize("save", [
    torch.save, lambda content, path: torch.save({"model": content}, path, _use_new_zipfile_serialization=False),
    lambda content, path: path.write_bytes(pickle.dumps(content)), save_objects])
def test_no_file_that_is_loaded_runs_code(save, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Code()))
    Path("executed").rmdir()  # so it would work
    for name, load in [
            ("ckpt.pt", sample.load_checkpoint), ("ckpt.pt", lambda path: train.load_newest(Path())),
            ("ckpt_previous.pt", lambda path: train.load_newest(Path())), ("weights.pt", fvd.load_i3d),
            ("config.json", lambda path: train.take_folder(Path())), ("log.jsonl", lambda path: train.trim_log(path, 9)),
            ("video.pt", lambda path: data.decode(path, 8)), ("video.npy", lambda path: data.decode(path, 8)),
            ("packed.npy", lambda path: data.open_videos(path, 2, 8)), ("packed.npy", fvd.read_videos),
            ("index.json", lambda path: data.open_videos(write_npy(tmp_path / "index.npy", 6), 2, 8)),
            ("index.json", lambda path: fvd.read_videos("index.npy")), ("samples.npy.json", fvd.read_json),
            ("part.npy", lambda path: sample.is_whole(path, (3, 2, 8, 8))),
            ("features.npy", lambda path: fvd.read_features(path, 2)),
            ("journal", lambda path: data._finished(open("array", "w+b"), path, "job", 8))]:
        save(Code(), Path(name))
        with contextlib.suppress(data.DataError, fvd.FVDError, ValueError):
            assert not load(Path(name)), name
        assert not Path("executed").exists(), name
        Path(name).unlink(missing_ok=True)


def test_a_checkpoint_with_foreign_contents_is_refused(run_train, tmp_path):
    flags = ["--out", tmp_path, "--grid-samples", 0, "--eval-clips", 0]
    run_train("--steps", 1, *flags)
    path, original = tmp_path / "ckpt.pt", sample.load_checkpoint(tmp_path / "ckpt.pt")
    for where, value, words in [
            (("optimizer", "state", 0, "exp_avg"), torch.zeros(1), "does not fit"),  # would be read beyond its end
            (("interval",), [1], "does not fit"), (("model", 5), torch.zeros(1), "does not fit"),
            (("config", "frames"), "x", "lacks config.frames"), (("unet",), None, "lacks unet")]:
        content = copy.deepcopy(original)
        part = content
        for name in where[:-1]:
            part = part[name]
        part[where[-1]] = value
        torch.save(content, path)
        with pytest.raises(sample.CheckpointError, match=words) as refused:
            run_train("--steps", 2, *flags)
        assert len(str(refused.value).splitlines()) == 1
    original["unet"]["base_channels"] = -8
    with pytest.raises(sample.CheckpointError, match="does not fit"):
        sample.load_network(original, "ema", "cpu")


def mutated(content, rng):
    """Bytes with a few bits flipped, or a piece cut out, zeroed, doubled or put in; more often near either end."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        place = min(int(len(content) * rng.random() ** 3), len(content) - 1)
        place = place if rng.random() < 0.7 else len(content) - 1 - place
        piece, kind = slice(place, place + int(rng.choice([1, 4, 30, 300]))), rng.integers(6)
        if kind < 2:
            content[place] ^= 1 << int(rng.integers(8))
        else:
            old = content[piece]
            content[piece] = (b"", bytes(len(old)), old + old, rng.bytes(len(old)))[kind - 2]
    return bytes(content) or b"\0"


def test_damaged_files_are_refused_or_read_whole(run_train, three_videos, tmp_path):
    """A few random mutations; whatever is accepted has the form that it should have."""
    import av

    run_train("--steps", 1, "--out", tmp_path, "--grid-samples", 0, "--eval-clips", 0)
    mp4 = write_mp4(tmp_path / "video.mp4", 12, colour_of=noise)
    tensor = tmp_path / "video.pt"
    torch.save(torch.randint(256, (12, 8, 8, 3), dtype=torch.uint8), tensor)
    ckpt, whole = tmp_path / "ckpt.pt", sample.load_checkpoint(tmp_path / "ckpt.pt")

    def read_packed(path):
        assert data.open_videos(three_videos, 4, 8).clip(1).shape == (4, 8, 8, 3)
        assert len({len(part) for part in fvd.read_videos(three_videos)[2:]}) == 1

    def read_video(path):
        video, reason = data._decode_or_reason(path, 8)
        if video is None:
            raise data.DataError(reason)
        assert video.shape[1:] == (8, 8, 3)
        if path == mp4:
            with av.open(str(path)) as container:  # an edit list may leave frames out
                assert len(video) + sum(packet.is_discard for packet in container.demux(video=0)) == 12

    for path, read, number in [(three_videos, read_packed, 30), (three_videos.with_suffix(".json"), read_packed, 30),
                               (mp4, read_video, 40), (tensor, read_video, 30),
                               (ckpt, lambda path: assert_same(sample.load_checkpoint(path), whole), 30)]:
        content, refused = path.read_bytes(), 0
        for seed in range(number):
            path.write_bytes(mutated(content, np.random.default_rng(seed)))
            try:
                read(path)
            except (data.DataError, fvd.FVDError, sample.CheckpointError) as error:
                assert len(str(error).splitlines()) == 1
                refused += 1
        assert refused > number // 4
        path.write_bytes(content)
        read(path)
    flipped = bytearray(ckpt.read_bytes())  # in a weight, where torch would not notice
    flipped[flipped.index(max(whole["model"].values(), key=torch.numel).numpy().tobytes())] ^= 1
    ckpt.write_bytes(flipped)
    with pytest.raises(sample.CheckpointError, match="damaged"):
        sample.load_checkpoint(ckpt)


@pytest.mark.parametrize("script, flags, words", [
    ("train", "--temporal lstm", "lstm"), ("train", "--frames 0", "'0'"), ("train", "--lr -1", "'-1'"),
    ("train", "--lr x", "'x'"), ("train", "--ema-decay 1.5", "1.5"), ("train", "--preset big", "big"),
    ("train", "--size 12 --channel-mults 1 2 4 8", "--size 12 is not divisible by 8"),
    ("train", "--batch-size 5 --grad-accum 2", "--batch-size 5 .*divisible by 1 processes x --grad-accum 2"),
    ("train", "--base-channels 12", "--base-channels 12"), ("train", "--workers -1", "'-1'"),
    ("train", "--state-size 7", "state_size is 7"), ("train", "--data missing", "missing does not exist"),
    ("train", "--data empty", "empty holds no videos"), ("train", "--data text.mp4", "text.mp4"),
    ("train", "--data short.npy --frames 9", "--frames 9: the longest of the 1 videos in short.npy has 6"),
    ("train", "--data short.npy --frames 2 --size 16", "--size 16: short.npy holds frames of 8x8"),
    ("train", "--device gpu", "--device gpu: expected cpu"), ("train", "--device mps", "mps"),
    ("train", "--preset tiny --temporal attention --head-dim 7", "head_dim is 7"),
    ("train", "--seed 99999999999999999999", "too large"),
    ("train", "--out file", "file"), ("train", "--frames 999999999", "--frames 999999999 .*64 GB"),
    ("train", "--frames 2147483648", "too large"), ("train", "--split val", "val"),
    ("train", "--data short.npy --frames 6 --split test", "split 'test': short.npy has no such videos"),
    ("train", "--data short.npy --size 8 --frames 6 --batch-size 3 --grad-accum 4", "--grad-accum 4 = 4"),
    ("train", "--data code.pt", "code.pt.*refused|refused.*code"), ("train", "--data other.pt", "other.pt"),
    ("train", "--channel-mults", "expected at least one"), ("train", "--mlp-layers 3", "3"),
    ("train", "--device cuda:77", "cuda:77"), ("train", "--nonsense", "--nonsense"),
    ("sample", "--ckpt missing.pt", "missing.pt cannot be read"), ("sample", "", "no ckpt.pt under"),
    ("sample", "--ckpt text.mp4", "text.mp4 is damaged or no checkpoint"), ("sample", "--num 0", "'0'"),
    ("sample", "--ckpt code.pt", "code.pt is refused"), ("sample", "--ckpt other.pt", "lacks config"),
    ("sample", "--ckpt short.npy", "short.npy"), ("sample", "--weights best", "best"),
    ("sample", "--ckpt empty", "empty cannot be read: Is a directory"), ("sample", "--seed -1", "'-1'"),
    ("sample", "--frames 0", "'0'"), ("sample", "--size x", "'x'"), ("sample", "--batch-size 0", "'0'"),
    ("sample", "--device tpu", "--device tpu: expected cpu"), ("sample", "--precision fp8", "fp8"),
    ("sample", "--num", "expected one argument"), ("sample", "extra", "extra"),
    ("sample", "--eta 1.5", "'1.5'"), ("sample", "--guidance -1", "'-1'"), ("sample", "--sampler euler", "euler"),
    ("train", "--prediction x0", "x0"),
    ("data", "empty --size 8 --out x.npy", "empty holds no videos"),
    ("data", "missing --size 8 --out x.npy", "missing"),
    ("data", "text.mp4 --size 8 --out x.npy", "none of the 1 videos is usable"),
    ("data", "empty --size 0 --out x.npy", "--size 0"), ("data", "empty --size x --out x.npy", "'x'"),
    ("data", "maze --size 8 --seed -1 --out x.npy", "--seed -1"), ("data", "maze --size 8 --out x.txt", "x.txt"),
    ("data", "maze --size 1000000 --out x.npy", "--size 1000000: .*more than 64 GB"),
    ("data", "maze --size 8 --frames 999999999999999 --out x.npy", "--frames 999999999999999 .*64 GB"),
    ("data", "maze --size 7 --out x.npy", "--size 7"), ("data", "maze --size 8 --num 0 --out x.npy", "--num 0"),
    ("data", "maze --size 8 --frames 0 --out x.npy", "--frames 0"), ("data", "maze --out x.npy", "--size"),
    ("data", "maze --size 8", "--out"), ("data", "maze --size 8 --out file/x.npy", "file/x.npy cannot be written"),
    ("data", "maze --size 8 --out short.npy", "short.npy exists already"), ("data", "", "source"),
    ("data", "short.npy --size 999999999 --out x.npy", "--size 999999999"),
    ("data", "short.npy --size 8 --min-frames 7 --out x.npy", "has 6 frames, fewer than 7"),
    ("data", "short.npy --size 8 --workers 0 --out x.npy", "--workers 0"),
    ("data", "short.npy --size 8 --min-frames 0 --out x.npy", "--min-frames 0"),
    ("data", "empty --size 8 --min-frames x --out x.npy", "'x'"), ("data", "empty --size 8 --out x.npy --fps 3", "--fps"),
])
def test_bad_input_is_one_line(script, flags, words, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("empty").mkdir()
    for name in ("file", "text.mp4"):
        Path(name).write_text("text")
    np.save("short.npy", np.zeros((6, 8, 8, 3), np.uint8))
    torch.save({"step": Code()}, "code.pt")
    torch.save({"step": 1}, "other.pt")
    before = {path: path.read_bytes() for path in Path().glob("*") if path.is_file()}
    defaults = TRAIN if script == "train" and "--preset" not in flags else []
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *defaults, *flags.split()])
    with pytest.raises(SystemExit) as stopped:
        if script == "data":
            data.main()
        else:
            sample.run(f"{script}.py", {"train": train, "sample": sample}[script].main)
    error = capfd.readouterr().err
    if isinstance(stopped.value.code, str):
        error += stopped.value.code
    assert stopped.value.code and re.search(words, error) and "Traceback" not in error
    assert len(error.strip().splitlines()) == 1
    assert {path: path.read_bytes() for path in Path().glob("*") if path.is_file()} == before
    assert not Path("executed").exists() and not list(Path().glob("out/*/ckpt.pt"))


def write_mp4(path, frames, colour_of=None, height=48, width=64):
    """A video whose frame i is one grey level, 16 + 10 i, or colour_of(i)."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(frames):
            picture = np.full((height, width, 3), colour_of(i) if colour_of else 16 + 10 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def noise(i):
    return np.random.default_rng(i).integers(256, size=(48, 64, 3))


def write_npy(path, frames, size=8, first=0):
    """A video whose frame i is filled with first + i."""
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.arange(first, first + frames, dtype=np.uint8)
    np.save(path, np.broadcast_to(levels[:, None, None, None], (frames, size, size, 3)))
    return path


def command(*arguments, **settings):
    return subprocess.run([sys.executable, data.__file__, *map(str, arguments)], capture_output=True, text=True,
                          **settings)


# ------------------------------------------------------------------------------------------------ data.py: conversions


def test_all_256_values_survive_the_round_trip():
    video = torch.arange(256, dtype=torch.uint8).view(1, 4, 8, 8, 1).expand(2, 4, 8, 8, 3).contiguous()
    x = data.to_float(video)
    assert x.shape == (2, 3, 4, 8, 8) and x.dtype == torch.float32
    assert x.min() == -1 and x.max() == 1
    assert torch.equal(data.to_uint8(x), video)
    assert torch.equal(data.to_uint8(x * 3), torch.where(x.movedim(1, -1) * 3 >= 1, 255,
                       torch.where(x.movedim(1, -1) * 3 <= -1, 0, data.to_uint8((x * 3).clamp(-1, 1)))).byte())


@pytest.mark.parametrize("function, wrong, word", [
    (data.to_float, torch.zeros(2, 4, 4, 3), "float32"), (data.to_float, np.zeros((2, 4, 4, 3), np.uint8), "uint8"),
    (data.to_float, torch.zeros(2, 3, 4, 4, dtype=torch.uint8), r"\(2, 3, 4, 4\)"),
    (data.to_uint8, torch.zeros(3, 2, 4, 4, dtype=torch.uint8), "uint8"),
    (data.to_uint8, torch.zeros(2, 4, 4, 3), r"\(2, 4, 4, 3\)"),
    (data.to_uint8, torch.full((3, 1, 2, 2), float("nan")), "12 values of 12"),
])
def test_conversions_refuse_what_is_no_video(function, wrong, word):
    with pytest.raises((TypeError, ValueError), match=word):
        function(wrong)


# ------------------------------------------------------------------------------------------------ data.py: mazes


def test_maze_walks_are_a_function_of_seed_and_index():
    walk = data.maze_walk(3, 5, frames=40, size=16)
    assert walk.shape == (40, 16, 16, 3) and walk.dtype == np.uint8
    assert np.array_equal(walk, data.maze_walk(3, 5, 40, 16))
    assert np.array_equal(walk[:7], data.maze_walk(3, 5, 7, 16)), "a shorter walk is the beginning of a longer one"
    assert not np.array_equal(walk, data.maze_walk(3, 6, 40, 16))
    assert not np.array_equal(walk, data.maze_walk(5, 3, 40, 16))
    assert np.array_equal(walk, data.MazeVideos(40, 16).clip(3, 5))
    assert not np.array_equal(walk, data.MazeVideos(40, 16, "test").clip(3, 5))
    assert not np.array_equal(data.MazeVideos(40, 16).clip(3), data.MazeVideos(40, 16).clip(3, 0))


def maze_and_path(index, frames):
    rng = data._generator(0, index)
    walls = data._maze(rng)
    return walls, data._maze_path(rng, walls, frames)


def test_long_walks_come_back_and_see_the_same_walls():
    for index in range(4):
        walls, path = maze_and_path(index, 400)
        colours = np.random.default_rng(index).integers(256, size=(*walls.shape, 3)).astype(np.float32)
        video = data._render(path, walls, colours, 16)
        seen = {}
        again = [(seen[tuple(pose)], i) for i, pose in enumerate(path) if seen.setdefault(tuple(pose), i) < i - 20]
        assert len(again) > 20, "a walk of 400 frames passes the same places again"
        assert all(np.array_equal(video[i], video[j]) for i, j in again)
        assert all((video[i] != video[i + 1]).any() for i in range(399)), "the walk never stands still"


def test_walks_are_smooth_and_never_pass_through_walls():
    for index in range(10):
        walls, path = maze_and_path(index, 300)
        assert walls[:, [0, -1]].all(), "the outer walls stand"
        step = np.linalg.norm(np.diff(path[:, :2], axis=0), axis=1)
        assert step.max() <= 1 / data.FRAMES_PER_CELL + 1e-9
        cos_of_turn = (path[1:, 2:] * path[:-1, 2:]).sum(1)
        assert np.degrees(np.arccos(np.clip(cos_of_turn, -1, 1))).max() < 90 / data.FRAMES_PER_CELL + 0.01
        for (x, y, _, _), (x2, y2, _, _) in zip(path, path[1:]):
            if int(x) != int(x2):
                assert not walls[0, max(int(x), int(x2)), int(y2)]
            if int(y) != int(y2):
                assert not walls[1, max(int(y), int(y2)), int(x2)]


def test_maze_pictures_have_sky_above_walls_above_floor():
    video = data.maze_walk(0, 0, 60, 16).astype(int)
    assert (video[:, 0, :, 2] - video[:, 0, :, 0] > 60).mean() > 0.5, "blue at the top"
    assert (np.ptp(video[:, -1], axis=-1) < 40).mean() > 0.7, "grey at the bottom"
    assert (np.ptp(video[:, 7:9], axis=-1) > 60).mean() > 0.7, "bright colours in the middle"


def test_mazes_have_labels_and_the_same_pictures():
    digest = hashlib.sha256(data.maze_walk(3, 5, 40, 16).tobytes()).hexdigest()
    assert digest == "846c1ec5378d7026fa69af54cd1208c36bb67875801417ad65bf08d440873bfc", "as before there were labels"
    videos = MazeVideos(16, 16)
    labels = [videos.label(0, i) for i in range(100)]
    assert set(labels) == set(data.class_names(None)) == set(data.COLOUR_NAMES) and len(set(data.COLOUR_NAMES)) == 8
    agreed = [data.wall_colour(videos.clip(0, i)) == label for i, label in enumerate(labels)]
    assert 0.5 < np.mean(agreed) < 0.9, "a short clip may see more of other colours"
    for name, colour in zip(data.COLOUR_NAMES, data.WALL_COLOURS):
        walls = np.broadcast_to(np.stack([colour, colour * data.DIM_SIDE / 2, data.SKY, data.FLOOR]), (2, 5, 4, 3))
        assert data.wall_colour(walls.astype(np.uint8)) == name


@pytest.mark.parametrize("frames, size", [(1, 8), (3, 9), (2, 200)])
def test_mazes_have_any_length_and_size(frames, size):
    assert data.maze_walk(1, 1, frames, size).shape == (frames, size, size, 3)


# ---------------------------------------------------------------------------------------- data.py: packed videos


@pytest.fixture
def three_videos(tmp_path):
    """Videos of 3, 10 and 5 frames, filled with 0.., 50.., 100.."""
    for name, frames, first in (("a", 3, 0), ("b", 10, 50), ("c", 5, 100)):
        write_npy(tmp_path / "source" / f"{name}.npy", frames, first=first)
    data.pack(tmp_path / "source", tmp_path / "packed.npy", size=8, workers=1)
    return tmp_path / "packed.npy"


def test_every_window_is_equally_likely_and_none_crosses_a_boundary(three_videos):
    videos = data.PackedVideos(three_videos, frames=4, size=8)
    assert videos.num_windows == 7 + 2 and videos.num_too_short == 1
    counts = {}
    for i in range(1800):
        clip = videos.clip(0, i)
        assert (np.diff(clip[:, 0, 0, 0].astype(int)) == 1).all(), "consecutive frames of one video"
        counts[int(clip[0, 0, 0, 0])] = counts.get(int(clip[0, 0, 0, 0]), 0) + 1
    assert sorted(counts) == [50, 51, 52, 53, 54, 55, 56, 100, 101]
    assert min(counts.values()) > 150 and max(counts.values()) < 250  # 200 expected, standard deviation 13
    assert np.array_equal(videos.clip(1, 2, 3), videos.clip(1, 2, 3))
    assert videos.clip(0).flags.writeable


def test_packed_videos_pickle_small(three_videos):
    np.save(three_videos.with_name("large.npy"), np.zeros((500, 8, 8, 3), np.uint8))
    videos = data.PackedVideos(three_videos.with_name("large.npy"), frames=4, size=8)
    copy = pickle.dumps(videos)
    assert len(copy) < 2000
    assert np.array_equal(pickle.loads(copy).clip(5), videos.clip(5))


def test_plain_arrays_are_read_without_an_index(tmp_path):
    samples = np.random.default_rng(0).integers(256, size=(3, 6, 8, 8, 3)).astype(np.uint8)
    np.save(tmp_path / "samples.npy", samples)
    videos = data.open_videos(tmp_path / "samples.npy", frames=6, size=8)
    assert len(videos.videos) == videos.num_windows == 3
    assert {videos.clip(i).tobytes() for i in range(40)} == {sample.tobytes() for sample in samples}
    np.save(tmp_path / "one.npy", samples[0])
    assert data.open_videos(tmp_path / "one.npy", frames=2, size=8).num_windows == 5


def test_batches_do_not_depend_on_world_size_first_step_or_workers(three_videos):
    for videos in (data.PackedVideos(three_videos, 4, 8), data.MazeVideos(4, 8)):
        whole = data.batches(videos, range(4), seed=7, workers=0)
        ranks = [data.batches(videos, range(rank, 4, 2), seed=7, workers=0) for rank in range(2)]
        steps = [next(whole) for _ in range(4)]
        assert steps[0].shape == (4, 4, 8, 8, 3) and steps[0].dtype == torch.uint8
        assert not torch.equal(steps[0], steps[1])
        for step in steps:
            for rank in range(2):
                assert torch.equal(next(ranks[rank]), step[rank::2])
        resumed = data.batches(videos, range(4), seed=7, first_step=2, workers=2)
        assert all(torch.equal(next(resumed), step) for step in steps[2:])
        assert torch.equal(steps[3][1], torch.from_numpy(videos.clip(7, 3, 1)))


def test_batches_leave_the_global_random_numbers_alone(three_videos):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(data.batches(data.PackedVideos(three_videos, 4, 8), [0], seed=0, workers=0))
    assert torch.equal(before, torch.get_rng_state())


# ------------------------------------------------------------------------------------------------ data.py: packing


def test_pack_reads_every_kind_of_video(tmp_path, capfd):
    source = tmp_path / "source"
    write_mp4(source / "jump" / "clip one ü.mp4", 6)
    for i in range(1, 13):  # without leading zeros: frame10 must not come before frame2
        (source / "run" / "frames").mkdir(parents=True, exist_ok=True)
        Image.new("L", (20, 12), 10 * i).save(source / "run" / "frames" / f"frame{i}.png")
    gif = [Image.new("RGB", (10, 10), (60 * i, 0, 0)) for i in range(4)]
    gif[0].save(source / "loop.gif", save_all=True, append_images=gif[1:], duration=40)
    gif[0].save(source / "loop.webp", save_all=True, append_images=gif[1:], duration=40, lossless=True)
    write_npy(source / "test" / "walk.npy", 5, size=8)
    (source / "notes.txt").write_text("not a video")
    (source / ".hidden.mp4").write_text("not a video either")
    (source / "fake.mp4").write_text("text " * 100)
    (source / "empty.avi").write_text("")
    whole = write_mp4(tmp_path / "whole.mp4", 30, colour_of=noise)
    (source / "truncated.mp4").write_bytes(whole.read_bytes()[:whole.stat().st_size // 2])
    np.save(source / "objects.npy", np.array([{"code": 1}], dtype=object), allow_pickle=True)
    os.symlink(source, source / "run" / "round")

    index = data.pack(source, tmp_path / "packed.npy", size=8, workers=2, min_frames=2)
    output = capfd.readouterr()
    assert index == json.loads((tmp_path / "packed.json").read_text())
    got = [(video["name"], video["length"], video["label"], video["split"]) for video in index["videos"]]
    assert got == [("jump/clip one ü.mp4", 6, "jump", "train"), ("loop.gif", 4, None, "train"),
                   ("loop.webp", 4, None, "train"), ("run/frames", 12, "run", "train"),
                   ("test/walk.npy", 5, None, "test")]
    assert [video["name"] for video in index["skipped"]] == ["empty.avi", "fake.mp4", "objects.npy", "truncated.mp4"]
    assert all(video["reason"] and "\n" not in video["reason"] for video in index["skipped"])
    assert "packed 5 videos (1 test, 4 train), 31 frames" in output.out and "skipped 4:" in output.out
    assert "moov" not in output.err, "FFmpeg's own messages stay off the terminal"

    frames = np.load(tmp_path / "packed.npy", mmap_mode="r", allow_pickle=False)
    assert frames.shape == (31, 8, 8, 3) and frames.dtype == np.uint8
    middle = frames[:, 4, 4].astype(int)
    assert np.abs(middle[:6] - (16 + 10 * np.arange(6))[:, None]).max() <= 3, "the mp4, lossy"
    assert np.array_equal(middle[6:14, 0], [0, 60, 120, 180] * 2) and middle[6:14, 1:].max() == 0
    assert np.array_equal(middle[14:26], np.repeat(10 * np.arange(1, 13), 3).reshape(12, 3))
    assert np.array_equal(frames[26:], np.load(source / "test" / "walk.npy")), "right size already: not a byte changes"
    assert data.PackedVideos(tmp_path / "packed.npy", 5, 8, "test").videos[0]["name"] == "test/walk.npy"
    assert data.PackedVideos(tmp_path / "packed.npy", 5, 8, "all").splits == ("test", "train")


def test_pack_crops_the_centre_of_the_shorter_side(tmp_path):
    wide = np.zeros((2, 40, 120, 3), np.uint8)
    wide[:, :, 40:80] = (200, 100, 50)
    np.save(tmp_path / "wide.npy", wide)
    np.save(tmp_path / "tall.npy", wide.transpose(0, 2, 1, 3).copy())
    checkerboard = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    np.save(tmp_path / "fine.npy", np.broadcast_to(checkerboard[None, :, :, None], (2, 64, 64, 3)).copy())
    for name in ("wide", "tall"):
        inner = data.decode(tmp_path / f"{name}.npy", 10)[:, 2:-2, 2:-2]  # at the edge the filter sees beyond the crop
        assert (inner == (200, 100, 50)).all()
    assert np.abs(data.decode(tmp_path / "fine.npy", 8).astype(int) - 127).max() < 8, "antialiased: grey, no pattern"


def test_a_video_that_ends_within_a_frame_is_not_trusted(tmp_path):
    whole = write_mp4(tmp_path / "whole.avi", 30, colour_of=noise).read_bytes()
    assert data.decode(tmp_path / "whole.avi", 8).shape == (30, 8, 8, 3)
    (tmp_path / "cut.avi").write_bytes(whole[:len(whole) * 2 // 3])  # FFmpeg decodes what there is, without an error
    with pytest.raises(ValueError, match="cut off"):
        data.decode(tmp_path / "cut.avi", 8)


def test_pack_honours_ucf101_lists(tmp_path):
    for number in (1, 8, 9):
        write_npy(tmp_path / "UCF-101" / "YoYo" / f"v_YoYo_g{number:02}_c01.npy", 2)
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "trainlist01.txt").write_text("YoYo/v_YoYo_g08_c01.avi 101\nYoYo/v_YoYo_g09_c01.avi 101\n")
    (lists / "testlist01.txt").write_text("YoYo/v_YoYo_g01_c01.avi\r\n")
    for source in (tmp_path / "UCF-101", tmp_path):
        index = data.pack(source, tmp_path / f"{source.name}.npy", size=8, workers=1)
        assert [(video["split"], video["label"]) for video in index["videos"]] == [
            ("test", "YoYo"), ("train", "YoYo"), ("train", "YoYo")]
        (tmp_path / f"{source.name}.npy").unlink()


def test_pack_does_not_depend_on_workers_and_replaces_leftovers(tmp_path):
    for i in range(12):
        write_npy(tmp_path / "source" / f"{i:02}.npy", 2 + i % 3, first=10 * i)
    (tmp_path / ".one.npy.partial").write_bytes(b"half a file of a killed run" * 10000)
    (tmp_path / "one.json").write_text('{"size": 4, "videos": []}')  # killed between the two renames
    data.pack(tmp_path / "source", tmp_path / "one.npy", size=8, workers=1)
    data.pack(tmp_path / "source", tmp_path / "two.npy", size=8, workers=2)
    assert (tmp_path / "one.npy").read_bytes() == (tmp_path / "two.npy").read_bytes()
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["one.json", "one.npy", "source", "two.json", "two.npy"]


def encode(path, frames=6, codec="ffv1", pixels="yuv420p", height=16, width=32, times=None):
    """A video whose frame i is one grey level, 40 + 20 i, at the given times (none: one after another)."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        container.start_encoding()
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), 40 + 20 * (i % 6), np.uint8), format="rgb24")
            frame = frame.reformat(format=pixels)
            frame.pts = times[i] if times else i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def odd_videos(folder):
    """Unusual but good videos, whose frames are those of `encode`."""
    encode(folder / "10 bits.mp4", codec="libx264", pixels="yuv420p10le")
    for pixels in ("gray", "gray16le", "yuva420p", "gbrp16le"):
        encode(folder / f"{pixels}.mkv", pixels=pixels)
    encode(folder / "alpha.mov", codec="png", pixels="rgba")
    encode(folder / "odd size.mkv", pixels="yuv444p", height=17, width=31)
    encode(folder / "thin.mkv", pixels="yuv444p", height=3, width=101)
    encode(folder / "rate.mp4", codec="libx264", times=[0, 1, 9, 10, 50, 51])
    small, large = (encode(folder / "x.h264", codec="libx264", height=side, width=side).read_bytes() for side in (16, 32))
    (folder / "x.h264").unlink()
    (folder / "resolution.mkv").write_bytes(small + large)
    shutil.copy(folder / "rate.mp4", folder / ("\N{CJK UNIFIED IDEOGRAPH-65E5}" * 83 + ".mp4"))
    shutil.copy(folder / "rate.mp4", folder / "%03d co:lon 'ü'\n.mp4")
    if sys.platform == "linux":  # elsewhere names are text
        (folder / os.fsdecode(b"latin-\xe9")).mkdir()
        encode(folder / os.fsdecode(b"latin-\xe9/\xe9.mp4"), codec="mpeg4")


def bad_videos(folder):
    """-> {name: words of the reason}"""
    def cut(name, share, **settings):
        content = encode(folder / name, **settings).read_bytes()
        (folder / name).write_bytes(content[:int(len(content) * share)])

    for name in ("none.mp4", "none.mkv"):
        encode(folder / name, frames=0, codec="mpeg4")
    encode(folder / "lost.mp4", codec="mpeg4")
    content = (folder / "lost.mp4").read_bytes()
    place = content.index(b"stsz") + 12
    (folder / "lost.mp4").write_bytes(content[:place] + struct.pack(">I", 4) + content[place + 4:])
    content = write_mp4(folder / "damaged.mp4", 9, colour_of=noise).read_bytes()
    (folder / "damaged.mp4").write_bytes(content[:5000] + b"\xff" * 200 + content[5200:])
    content = encode(folder / "hidden.mp4", codec="libvpx-vp9").read_bytes()
    (folder / "hidden.mp4").write_bytes(content.replace(b"\x82\x49\x83\x42", b"\x80\x49\x83\x42", 1))  # show_frame off
    cut("cut.mkv", 0.8, frames=30)
    cut("cut.webm", 0.8, frames=30, codec="libvpx-vp9")
    cut("cut.mov", 0.5, codec="mpeg4")
    frames = [Image.effect_noise((20, 20), 50) for _ in range(8)]
    for name in ("cut.gif", "cut.webp"):
        frames[0].save(folder / name, save_all=True, append_images=frames[1:])
        (folder / name).write_bytes((folder / name).read_bytes()[:-700])
    for name in ("text.mp4", "text.gif", "text.npy", "text.pt"):
        (folder / name).write_text("text\n" * 100)
    for name in ("empty.mkv", "empty.webp", "empty.pt"):
        (folder / name).touch()
    for name, array in [("float", np.zeros((2, 4, 4, 3))), ("one frame", np.zeros((4, 4, 3), np.uint8)), ("object", np.array(
            [Code()])), ("alpha", np.zeros((2, 4, 4, 4), np.uint8)), ("several", np.zeros((1, 2, 4, 4, 3), np.uint8))]:
        np.save(folder / f"{name}.npy", array, allow_pickle=True)
    os.symlink("loop.mp4", folder / "loop.mp4")
    os.symlink("nowhere.mp4", folder / "dangling.mp4")
    os.symlink("/dev/zero", folder / "device.npy")
    os.mkfifo(folder / "pipe.mp4")
    for name in ("pictures cut", "pictures pipe"):
        (folder / name).mkdir()
        Image.effect_noise((20, 20), 50).save(folder / name / "0.png")
    os.mkfifo(folder / "pictures pipe" / "1.png")
    (folder / "pictures cut" / "1.png").write_bytes((folder / "pictures cut" / "0.png").read_bytes()[:200])
    (folder / "gone.npy").touch()
    (folder / "folder.mp4").mkdir()
    reasons = {"none.mp4": "no video stream", "none.mkv": ".", "lost.mp4": "lacks some of its 6 frames", "cut.mov": ".",
               "damaged.mp4": "damaged frames", "hidden.mp4": "1 frames that cannot",
               "cut.mkv": "is cut off", "cut.webm": "is cut off", "cut.gif": "is cut off", "cut.webp": ".",
               "text.mp4": "Invalid data", "text.gif": "cannot identify", "text.npy": "not a readable", "text.pt": "damaged",
               "empty.mkv": "Invalid data", "empty.webp": "cannot identify", "empty.pt": "damaged", "float.npy": "float64",
               "one frame.npy": r"\(4, 4, 3\)", "object.npy": "object", "alpha.npy": r"\(2, 4, 4, 4\)",
               "several.npy": "expected one video", "loop.mp4": "symbolic links", "dangling.mp4": "No such file",
               "device.npy": "not a regular file", "pipe.mp4": "not a regular file", "pictures cut": "truncated",
               "pictures pipe": "1.png is not a regular file", "gone.npy": "No such file"}
    if Path("/proc/self/mem").exists():  # nobody can read its beginning, root included
        os.symlink("/proc/self/mem", folder / "unreadable.mp4")
        reasons["unreadable.mp4"] = "Input/output error"
    return reasons


def test_bad_videos_are_skipped_with_the_reason_and_odd_ones_are_read(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good").mkdir()
    (tmp_path / "bad").mkdir()
    odd_videos(tmp_path / "good")
    reasons = bad_videos(tmp_path / "bad")
    for name in reasons:
        assert data._decode_or_reason(tmp_path / "bad" / name, 8)[0] is None or name == "gone.npy", name
    stamps = data._stamps

    def vanish(found):
        yield from stamps(found)
        (tmp_path / "bad" / "gone.npy").unlink(missing_ok=True)

    monkeypatch.setattr(data, "_stamps", vanish)
    index = data.pack(tmp_path, "packed.npy", size=8, workers=1)
    printed = capfd.readouterr()
    assert {entry["name"] for entry in index["skipped"]} == {f"bad/{name}" for name in reasons}
    for entry in index["skipped"]:
        assert re.search(reasons[entry["name"][4:]], entry["reason"]) and "\n" not in entry["reason"], entry
    assert "Traceback" not in printed.err and "Warning" not in printed.err and not Path("executed").exists()
    frames = np.load("packed.npy").astype(int)
    for entry in index["videos"]:
        video = frames[entry["start"]:entry["start"] + entry["length"]]
        levels = 40 + 20 * np.arange(6)
        levels = np.tile(levels, 2) if "resolution" in entry["name"] else levels
        assert np.abs(video - levels[:, None, None, None]).max() <= 6, (entry["name"], "frames lost, padded or in disorder")
    assert len(index["videos"]) == 12 + (sys.platform == "linux")


def test_a_rotated_video_is_upright(tmp_path):
    dark_left = np.repeat(np.where(np.arange(64) < 32, 40, 200)[None, :, None], 48, 0)
    content = write_mp4(tmp_path / "video.mp4", 3, colour_of=lambda i: dark_left).read_bytes()
    upright, clockwise = (struct.pack(">9i", a, b, 0, -b, a, 0, 0, 0, 2**30) for a, b in ((2**16, 0), (0, 2**16)))
    (tmp_path / "video.mp4").write_bytes(clockwise.join(content.rsplit(upright, 1)))
    video = data.decode(tmp_path / "video.mp4", 8)
    assert video.shape == (3, 8, 8, 3) and video[:, :3].max() < 60 and video[:, 5:].min() > 180


def crash(path, size):
    if path.name == "b.npy":
        os.kill(os.getpid(), signal.SIGKILL)
    if path.name == "d.npy":
        os._exit(0)
    if path.name == "e.npy":
        faulthandler.disable()  # pytest's, which would tell about it
        os.kill(os.getpid(), signal.SIGABRT)
    return np.full((2, size, size, 3), ord(path.name[0]), np.uint8)


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="the replaced decoder must reach the workers")
def test_a_decoder_that_dies_costs_one_video(tmp_path, monkeypatch):
    for name in "abcdef":
        write_npy(tmp_path / "source" / f"{name}.npy", 2)
    monkeypatch.setattr(data, "decode", crash)
    index = data.pack(tmp_path / "source", tmp_path / "packed.npy", size=8, workers=2)
    assert [video["name"] for video in index["videos"]] == ["a.npy", "c.npy", "f.npy"]
    assert index["skipped"] == [{"name": f"{name}.npy", "reason": "the decoder crashed"} for name in "bde"]
    assert np.load(tmp_path / "packed.npy")[::2, 0, 0, 0].tobytes() == b"acf"


def test_a_folder_is_packed_once_into_the_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    videos = tmp_path / ("\N{CJK UNIFIED IDEOGRAPH-65E5}" * 80)  # 240 bytes
    write_npy(videos / "a.npy", 6)
    first = data.open_videos(videos, frames=4, size=8)
    assert "packing" in capsys.readouterr().out
    again = data.open_videos(videos, frames=4, size=8)
    assert capsys.readouterr().out == "" and again.path == first.path
    assert first.path.parent == tmp_path / "cache" / "ssm-video-diffusion"
    assert np.array_equal(first.clip(1), again.clip(1))
    write_npy(videos / "b.npy", 6)
    assert len(data.open_videos(videos, frames=4, size=8).videos) == 2, "a changed folder is packed again"
    data.pack(videos, videos / "packed.npy", size=8, workers=1)
    assert len(data.open_videos(videos, frames=4, size=8).videos) == 2, "a packed file is not a video"
    assert isinstance(data.open_videos(None, 4, 8), data.MazeVideos)


def test_tensors_are_packed_as_arrays_are(tmp_path):
    video = torch.randint(256, (7, 12, 16, 3), dtype=torch.uint8)
    (tmp_path / "pt" / "test").mkdir(parents=True)
    torch.save(video, tmp_path / "pt" / "video_1.pt")
    torch.save(video[:, :, ::2], tmp_path / "pt" / "test" / "video_2.pt")  # not contiguous
    torch.save(video, tmp_path / "pt" / "video_3.pt", _use_new_zipfile_serialization=False)  # as old files are
    index = data.pack(tmp_path / "pt", tmp_path / "packed.npy", size=8, workers=1)
    assert [(entry["name"], entry["length"], entry["split"]) for entry in index["videos"]] == [
        ("test/video_2.pt", 7, "test"), ("video_1.pt", 7, "train"), ("video_3.pt", 7, "train")]
    np.save(tmp_path / "video.npy", video.numpy())
    packed, expected = np.load(tmp_path / "packed.npy"), data.decode(tmp_path / "video.npy", 8)
    assert np.array_equal(packed[7:14], expected) and np.array_equal(packed[14:], expected)


def test_what_is_no_tensor_of_frames_is_skipped_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("videos").mkdir()
    for name, content in [("good", torch.zeros(2, 4, 4, 3, dtype=torch.uint8)), ("float", torch.zeros(2, 4, 4, 3)),
                          ("grey", torch.zeros(2, 4, 4, dtype=torch.uint8)), ("dict", {"video": torch.zeros(1)}),
                          ("none", torch.zeros(0, 4, 4, 3, dtype=torch.uint8)), ("code", Code()),
                          ("code_inside", [torch.zeros(1), Code()])]:
        torch.save(content, f"videos/{name}.pt")
    Path("videos/pickle.pt").write_bytes(pickle.dumps(Code()))
    Path("videos/cut.pt").write_bytes(Path("videos/good.pt").read_bytes()[:300])
    Path("videos/empty.pt").write_bytes(b"")
    index = data.pack("videos", "packed.npy", size=4, workers=1)
    assert [entry["name"] for entry in index["videos"]] == ["good.pt"]
    reasons = {entry["name"]: entry["reason"] for entry in index["skipped"]}
    assert len(reasons) == 9 and all(reason and "\n" not in reason for reason in reasons.values())
    for name, words in [("float", r"float32 \(2, 4, 4, 3\)"), ("grey", r"\(2, 4, 4\)"), ("dict", "holds a dict"),
                        ("none", r"\(0, 4, 4, 3\)"), ("code", "refused"), ("code_inside", "refused"),
                        ("pickle", "refused")]:
        assert re.search(words, reasons[f"{name}.pt"]), reasons
    assert not Path("executed").exists()


# ------------------------------------------------------------------------------------------------ data.py: refusals


def damage(path, change):
    index = json.loads(path.with_suffix(".json").read_text())
    change(index)
    path.with_suffix(".json").write_text(json.dumps(index))


def test_reading_refuses_in_one_line_with_the_value(three_videos, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.mp4").write_text("text")
    (tmp_path / "notes.txt").write_text("text")
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "floats.npy", np.zeros((4, 8, 8, 3), np.float32))
    np.save(tmp_path / "grey.npy", np.zeros((4, 8, 8), np.uint8))
    np.save(tmp_path / "zero.npy", np.zeros((0, 8, 8, 3), np.uint8))
    (tmp_path / "short.npy").write_bytes(three_videos.read_bytes()[:-1])
    (tmp_path / "garbage.npy").write_bytes(b"\x93NUMPY\x01\x00garbage")
    with open(tmp_path / "archive.npy", "wb") as file:
        np.savez(file, a=np.zeros(3))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for path, frames, size, split, words in [
        (three_videos, 500, 8, "train", "--frames 500: the longest of the 3 videos .* has 10 frames; use --frames 10"),
        (three_videos, 4, 16, "train", "--size 16: .* 8x8; use --size 8, or pack .* --size 16"),
        (three_videos, 4, 8, "test", "'test': .* only 'train'"), (three_videos, 4, 8, "held", "'held'"),
        (three_videos, 0, 8, "train", "--frames 0"), (None, 4, 4, "train", "--size 4"),
        (tmp_path / "missing", 4, 8, "train", "missing does not exist"),
        (tmp_path / "empty", 4, 8, "train", "empty holds no"),
        (tmp_path / "notes.txt", 4, 8, "train", "notes.txt is not a video"),
        (tmp_path / "text.mp4", 4, 8, "train", "none of the 1 videos is usable: text.mp4: "),
        (tmp_path / "objects.npy", 4, 8, "train", "objects"), (tmp_path / "floats.npy", 4, 8, "train", "float32"),
        (tmp_path / "grey.npy", 4, 8, "train", r"\(4, 8, 8\)"), (tmp_path / "zero.npy", 4, 8, "train", r"\(0, 8"),
        (tmp_path / "short.npy", 4, 8, "train", "short"), (tmp_path / "garbage.npy", 4, 8, "train", "garbage"),
        (tmp_path / "archive.npy", 4, 8, "train", "archive"),
    ]:
        with pytest.raises(data.DataError, match=words) as refusal:
            data.open_videos(path, frames, size, split)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("change", [
    lambda index: index.pop("size"), lambda index: index.update(size=16), lambda index: index.update(videos={}),
    lambda index: index["videos"].pop(), lambda index: index["videos"][1].update(start=0),
    lambda index: index["videos"][1].update(length=-1), lambda index: index["videos"][0].update(split="x"),
    lambda index: index["videos"].append("video"), lambda index: index["videos"][2].update(length=10**12),
])
def test_an_index_that_does_not_fit_is_refused(three_videos, change):
    damage(three_videos, change)
    with pytest.raises(data.DataError, match="packed.json"):
        data.PackedVideos(three_videos, frames=4, size=8)


def test_packing_never_overwrites(three_videos, tmp_path):
    before = three_videos.read_bytes()
    with pytest.raises(data.DataError, match="packed.npy is packed already"):  # not one long video
        data.pack(three_videos, tmp_path / "again.npy", size=8)
    with pytest.raises(data.DataError, match="packed.npy exists already"):
        data.pack(tmp_path / "source", three_videos, size=8)
    (tmp_path / "mine.json").write_text('["not an index"]')
    with pytest.raises(data.DataError, match="mine.json is not an index"):
        data.pack(tmp_path / "source", tmp_path / "mine.npy", size=8)
    with pytest.raises(data.DataError, match="ends in .npy"):
        data.pack(tmp_path / "source", tmp_path / "mine.npz", size=8)
    (tmp_path / "file").write_text("")
    with pytest.raises(data.DataError, match="cannot be written: Not a directory|cannot be written: File exists"):
        data.pack(tmp_path / "source", tmp_path / "file" / "packed.npy", size=8)
    assert three_videos.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["file", "mine.json", "packed.json", "packed.npy", "source"]


@pytest.mark.parametrize("harm", [None, "journal", "array", "source"])
def test_a_stopped_pack_goes_on(tmp_path, monkeypatch, capsys, harm):
    for i in range(5):
        write_npy(tmp_path / "source" / f"{i}.npy", 2 + i)
    (tmp_path / "source" / "1.npy").write_text("text")
    decode_all, decoded = data._decode_all, []

    def interrupted(paths, size, workers):
        for number, result in enumerate(decode_all(paths, size, workers)):
            if number == 3:
                raise KeyboardInterrupt
            yield result

    def counted(paths, size, workers):
        decoded.extend(paths)
        return decode_all(paths, size, workers)

    monkeypatch.setattr(data, "_decode_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.pack(tmp_path / "source", tmp_path / "packed.npy", size=8, workers=1)
    assert not (tmp_path / "packed.npy").exists()
    journal, array = tmp_path / ".packed.npy.journal", tmp_path / ".packed.npy.partial"
    if harm == "journal":  # killed within a line
        journal.write_bytes(journal.read_bytes()[:-5])
    elif harm == "array":  # a power failure
        array.write_bytes(array.read_bytes()[:-100] + bytes(100))
    elif harm == "source":
        write_npy(tmp_path / "source" / "0.npy", 4)
    monkeypatch.setattr(data, "_decode_all", counted)
    data.pack(tmp_path / "source", tmp_path / "packed.npy", size=8, workers=1)
    data.pack(tmp_path / "source", tmp_path / "whole.npy", size=8, workers=1)
    assert len(decoded) - 5 == {None: 2, "journal": 3, "array": 3, "source": 5}[harm], "only what was not done"
    assert (tmp_path / "packed.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert (tmp_path / "packed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_command_line(tmp_path):
    out = tmp_path / (os.fsdecode(b"maze-\xe9.npy") if sys.platform == "linux" else "maze.npy")  # no UTF-8
    done = command("maze", "--size", 8, "--frames", 5, "--num", 2, "--out", out,
                   env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
    assert done.returncode == 0 and "packed 2 videos (2 train), 10 frames of 8x8" in done.stdout, done.stderr
    assert np.array_equal(np.load(out)[5:], data.maze_walk(0, 1, 5, 8))
    refused = command(tmp_path / "missing", "--size", 8, "--out", tmp_path / "out.npy")
    assert refused.returncode == 1 and refused.stdout == ""
    assert refused.stderr.count("\n") == 1 and refused.stderr.startswith("data.py: ") and "missing" in refused.stderr


# ------------------------------------------------------------------------------------------------ I3D, written again


def random_weights(seed=0):
    """A state dict of I3D that keeps the signal's size through all layers, with statistics that are not 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    weights = fvd.I3D().state_dict()
    for name, tensor in weights.items():
        if name.endswith("conv3d.weight"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * (2 / tensor[0].numel()) ** 0.5)
        elif name.endswith(("running_var", "bn.weight")):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        elif tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return weights


@pytest.fixture(scope="module")
def weights():
    return random_weights()


@pytest.fixture(scope="module")
def weights_file(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random.pt"
    torch.save(weights, path)
    return path


@pytest.fixture(scope="module")
def net(weights_file):
    return fvd.load_i3d(weights_file)


def tf_windows(n, kernel, stride):
    """Where TensorFlow's SAME windows lie on an axis of n: [(first, end), ...], clipped to it, and the zeros around."""
    outputs = -(-n // stride)
    before = max((outputs - 1) * stride + kernel - n, 0) // 2
    after = max((outputs - 1) * stride + kernel - n, 0) - before
    return [(max(i * stride - before, 0), min(i * stride - before + kernel, n)) for i in range(outputs)], before, after


def plain_conv(x, w, prefix, stride=1):
    kernel = w[f"{prefix}.conv3d.weight"].shape[-1]
    pads = [tf_windows(n, kernel, stride)[1:] for n in x.shape[2:]]
    x = F.pad(x, (*pads[2], *pads[1], *pads[0]))
    x = F.conv3d(x, w[f"{prefix}.conv3d.weight"], stride=stride)
    mean, var, shift, gain = (w[f"{prefix}.bn.{name}"].view(-1, 1, 1, 1)
                              for name in ("running_mean", "running_var", "bias", "weight"))
    return torch.clamp((x - mean) / torch.sqrt(var + 0.001) * gain + shift, min=0)


def plain_pool(x, kernels, strides):
    """One axis at a time, each window by itself: no padding whatever."""
    for axis, (kernel, stride) in enumerate(zip(kernels, strides), start=2):
        windows, _, _ = tf_windows(x.shape[axis], kernel, stride)
        x = torch.stack([x.narrow(axis, a, b - a).amax(axis) for a, b in windows], axis)
    return x


def plain_mixed(x, w, name):
    return torch.cat([
        plain_conv(x, w, f"{name}.b0"),
        plain_conv(plain_conv(x, w, f"{name}.b1a"), w, f"{name}.b1b"),
        plain_conv(plain_conv(x, w, f"{name}.b2a"), w, f"{name}.b2b"),
        plain_conv(plain_pool(x, (3, 3, 3), (1, 1, 1)), w, f"{name}.b3b")], 1)


@torch.no_grad()
def plain_i3d(x, w, head=True):
    """b 3 t h w -> logits (b, 400), or without the head what goes into it."""
    x = plain_conv(x, w, "Conv3d_1a_7x7", stride=2)
    x = plain_pool(x, (1, 3, 3), (1, 2, 2))
    x = plain_conv(plain_conv(x, w, "Conv3d_2b_1x1"), w, "Conv3d_2c_3x3")
    x = plain_pool(x, (1, 3, 3), (1, 2, 2))
    for name in ("3b", "3c", "4a", "4b", "4c", "4d", "4e", "4f", "5a", "5b", "5c"):
        if name == "4a":
            x = plain_pool(x, (3, 3, 3), (2, 2, 2))
        elif name == "5a":
            x = plain_pool(x, (2, 2, 2), (2, 2, 2))
        else:
            x = plain_mixed(x, w, f"Mixed_{name}")
    if not head:
        return x
    pairs = [x[:, :, i:i + 2].mean((2, 3, 4)) for i in range(x.shape[2] - 1)]
    logits = [pair @ w["logits.conv3d.weight"].flatten(1).T + w["logits.conv3d.bias"] for pair in pairs]
    return sum(logits) / len(logits)


def videos_of(kind, frames, size, n=1, seed=0):
    """uint8 (n, frames, size, size, 3): "random" pixels, or "smooth" ones that drift."""
    rng = np.random.default_rng(seed)
    if kind == "random":
        return rng.integers(0, 256, (n, frames, size, size, 3), dtype=np.uint8)
    t, y, x = np.meshgrid(np.arange(frames) / 16, *[np.arange(size) / size] * 2, indexing="ij")
    phase = rng.random((n, 3, 1, 1, 1)) * 6
    waves = np.sin(2 * np.pi * (x + t) + phase) + np.cos(2 * np.pi * (y - t) + 2 * phase)
    return (127.5 + 60 * waves).astype(np.uint8).transpose(0, 2, 3, 4, 1)


def test_i3d_has_the_published_structure(weights):
    net = fvd.I3D()
    assert sum(p.numel() for p in net.parameters()) == 12_697_264
    names = list(net.state_dict())
    assert len(names) == 344 and sum(not name.endswith("num_batches_tracked") for name in names) == 287
    assert {"Conv3d_1a_7x7.conv3d.weight", "Mixed_3b.b1a.bn.running_mean", "Mixed_5c.b3b.bn.bias",
            "logits.conv3d.weight", "logits.conv3d.bias"} <= set(names)
    assert sum(isinstance(m, torch.nn.Conv3d) for m in net.modules()) == 58
    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm3d)]
    assert len(norms) == 57 and {norm.eps for norm in norms} == {1e-3}


def test_i3d_has_13_max_pools(net, monkeypatch):
    calls = []
    monkeypatch.setattr(fvd.F, "max_pool3d", lambda x, *args, pool=F.max_pool3d: calls.append(1) or pool(x, *args))
    with torch.inference_mode():
        net.blocks(torch.zeros(1, 3, 9, 32, 32))
    assert len(calls) == 13


@pytest.mark.parametrize("frames, positions", [(9, 1), (16, 1), (17, 2), (40, 4), (64, 7)])
@torch.inference_mode()
def test_time_positions(net, frames, positions):
    x = net.blocks(torch.zeros(1, 3, frames, 32, 32))
    assert x.shape == (1, 1024, positions + 1, 1, 1)
    assert net.head(x.expand(1, 1024, positions + 1, 7, 7)).shape == (1, 400, positions)


@pytest.mark.parametrize("size, kernel, stride, pads", [
    (224, 7, 2, (2, 3)), (225, 7, 2, (3, 3)), (112, 3, 2, (0, 1)), (113, 3, 2, (1, 1)), (8, 3, 1, (1, 1)),
    (8, 2, 2, (0, 0)), (9, 2, 2, (0, 1)), (5, 1, 1, (0, 0))])
def test_same_padding_is_tensorflows(size, kernel, stride, pads):
    x = torch.ones(1, 1, 1, 1, size)
    padded = fvd.pad_same(x, (1, 1, kernel), (1, 1, stride))[0, 0, 0, 0]
    assert padded.tolist() == [0.] * pads[0] + [1.] * size + [0.] * pads[1]


@pytest.mark.parametrize("frames, size", [(9, 64), (15, 64), (16, 57), (30, 64), (40, 64)])
@pytest.mark.parametrize("kind", ["random", "smooth"])
@torch.inference_mode()
def test_an_independent_port_agrees(net, weights, kind, frames, size):
    x = torch.from_numpy(videos_of(kind, frames, size)).permute(0, 4, 1, 2, 3) / 127.5 - 1
    ours, plain = net.blocks(x), plain_i3d(x, weights, head=False)
    assert ours.shape == plain.shape and plain.std() > 0.1
    assert relative(ours, plain) < 1e-5


def test_the_head_counts_inner_steps_twice(net, weights):
    x = torch.randn(2, 1024, 4, 7, 7, generator=torch.Generator().manual_seed(0))
    w, b = weights["logits.conv3d.weight"].flatten(1), weights["logits.conv3d.bias"]
    steps = x.mean((3, 4))
    pooled = (steps[:, :, 0] + 2 * steps[:, :, 1] + 2 * steps[:, :, 2] + steps[:, :, 3]) / 6
    with torch.inference_mode():
        assert relative(net.head(x).mean(2), pooled @ w.T + b) < 1e-5
    assert relative(steps.mean(2) @ w.T + b, pooled @ w.T + b) > 1e-2


def test_features_at_full_size(net, weights):
    frames = videos_of("smooth", 3, 32)[0]
    features = fvd.i3d_features(net, np.concatenate([frames] * 3)[None])
    assert features.shape == (1, 400) and features.dtype == torch.float32
    wide = np.concatenate([[tf1_loop(frame) for frame in frames]] * 3)                      # 9 224 224 3
    x = torch.from_numpy(wide).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    assert relative(features, plain_i3d(x, weights)) < 1e-5


@torch.inference_mode()
def test_the_batch_size_changes_nothing(net):
    x = torch.from_numpy(videos_of("smooth", 17, 64, n=3)).permute(0, 4, 1, 2, 3) / 127.5 - 1
    together, alone = (torch.cat([net.blocks(part) for part in x.split(n)]) for n in (3, 1))
    logits = [net.head(y.mean((3, 4), keepdim=True).expand(-1, -1, -1, 7, 7)).mean(2) for y in (together, alone)]
    assert logits[0].shape == (3, 400) and relative(*logits) < 1e-6


def test_i3d_is_always_in_evaluation_mode(net):
    x = torch.randn(1, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with torch.inference_mode():
        expected = net.blocks(x)
        assert torch.equal(net.train().blocks(x), expected)
    net.eval()
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


# ------------------------------------------------------------------------------------------------ resize and range


def tf1_loop(image):
    """(h, w, 3) -> float (224, 224, 3), tf.image.resize_bilinear of TensorFlow 1, pixel by pixel."""
    h, w, _ = image.shape
    image = image.astype(np.float64)
    ys, xs = ([(int(i * n / 224), min(int(i * n / 224) + 1, n - 1), i * n / 224 - int(i * n / 224)) for i in range(224)]
              for n in (h, w))
    out = np.empty((224, 224, 3))
    for i, (y0, y1, fy) in enumerate(ys):
        for j, (x0, x1, fx) in enumerate(xs):
            top = image[y0, x0] + (image[y0, x1] - image[y0, x0]) * fx
            bottom = image[y1, x0] + (image[y1, x1] - image[y1, x0]) * fx
            out[i, j] = top + (bottom - top) * fy
    return out


def test_tf1_resize_of_two_pixels(monkeypatch):
    monkeypatch.setattr(fvd, "SIZE", 3)
    x = torch.tensor([[1., 2.], [3., 4.]])
    expected = torch.tensor([[1, 5 / 3, 2], [7 / 3, 3, 10 / 3], [3, 11 / 3, 4]])
    assert torch.allclose(fvd.resize_axis(fvd.resize_axis(x, 0, False), 1, False), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("h, w", [(32, 32), (64, 64), (48, 300)])
def test_tf1_resize_is_the_plain_loop(h, w):
    image = np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8)
    x = fvd.to_input(torch.from_numpy(image)[None, None])
    assert x.shape == (1, 3, 1, 224, 224)
    expected = tf1_loop(image) / 127.5 - 1
    assert np.abs(x[0, :, 0].permute(1, 2, 0).numpy() - expected).max() < 1e-6


@pytest.mark.parametrize("size", [32, 64, 100, 256])
def test_half_pixel_resize_is_interpolate(size):
    videos = torch.from_numpy(videos_of("random", 2, size))
    expected = F.interpolate(videos[0].permute(0, 3, 1, 2).double(), size=224, mode="bilinear", align_corners=False)
    half, tf1 = (fvd.to_input(videos, resize)[0].transpose(0, 1) for resize in ("half-pixel", "tf1"))
    assert (half - (expected / 127.5 - 1)).abs().max() < 1e-5
    assert (half - tf1).abs().max() > 0.1


def test_range_is_scaled_once():
    videos = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1, 1).expand(1, 3, 224, 224, 3)
    assert torch.allclose(fvd.to_input(videos)[0, 0, :, 0, 0], torch.tensor([-1, -0.6, 1]), atol=1e-6)
    assert torch.allclose(fvd.to_input(videos, value_range="01")[0, 0, :, 0, 0], torch.tensor([0, 0.2, 1]), atol=1e-6)


@pytest.mark.parametrize("videos, words", [
    (np.zeros((2, 16, 8, 8, 3), np.float32), "float32"), (torch.zeros(2, 16, 8, 8, 3), "torch.float32"),
    (np.zeros((16, 8, 8, 3), np.uint8), r"\(16, 8, 8, 3\)"), (np.zeros((2, 16, 3, 8, 8), np.uint8), "8, 8"),
    (np.zeros((0, 16, 8, 8, 3), np.uint8), r"\(0, 16"), (np.zeros((2, 8, 8, 8, 3), np.uint8), "8 frames")])
def test_features_refuse_what_is_no_video(net, videos, words):
    with pytest.raises(fvd.FVDError, match=words) as refused:
        fvd.i3d_features(net, videos)
    assert len(str(refused.value).splitlines()) == 1


class FloatNet(torch.nn.Module):
    """Reports the settings it runs under instead of features."""

    def forward(self, x):
        flags = torch.backends.cudnn.allow_tf32, torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()
        return torch.tensor([*flags, x.dtype == torch.float32] + [0] * 396).expand(len(x), 400).float()


def test_features_are_computed_in_full_float32():
    assert torch.backends.cudnn.allow_tf32
    with torch.autocast("cpu", torch.bfloat16):
        settings = fvd.i3d_features(FloatNet(), np.zeros((1, 9, 8, 8, 3), np.uint8))[0, :4]
    assert settings.tolist() == [0, 0, 1, 1] and torch.backends.cudnn.allow_tf32


def test_features_that_are_not_finite_are_refused():
    class Broken(torch.nn.Module):
        def forward(self, x):
            return torch.full((len(x), 400), math.nan)

    with pytest.raises(fvd.FVDError, match="800 places"):
        fvd.i3d_features(Broken(), np.zeros((2, 9, 8, 8, 3), np.uint8))


# ------------------------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize("offset, tolerance", [(0, 1e-12), (1e3, 1e-11), (1e6, 1e-8)])
@pytest.mark.parametrize("split", [[600], [1] * 600, [0, 599, 1], [7] * 85 + [5]])
def test_streaming_statistics_are_those_of_all_at_once(split, offset, tolerance):
    x = np.random.default_rng(0).normal(size=(600, 20)) @ np.random.default_rng(1).normal(size=(20, 20))
    x += offset * x.std(0)
    statistics = fvd.Statistics(20)
    for batch in np.split(x, np.cumsum(split)[:-1]):
        statistics.update(batch)
    exact = np.cov(x - x.mean(0), rowvar=False)
    assert statistics.n == 600
    assert np.abs(statistics.mean - x.mean(0)).max() <= 1e-14 * max(1, offset) * np.abs(x).max()
    assert np.linalg.norm(statistics.cov - exact) <= tolerance * np.linalg.norm(exact)
    if offset == 1e6:  # what the tolerance is about: raw second moments
        raw = (x.T @ x - 600 * np.outer(x.mean(0), x.mean(0))) / 599
        assert np.linalg.norm(raw - exact) > 1e-6 * np.linalg.norm(exact)


def gather_in_process(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for name in ("near", "far"):
        x = np.load(folder / f"{name}.npy")
        statistics = fvd.Statistics(x.shape[1]).update(x[:17] if rank == 0 else x[17:]).gather()
        np.savez(folder / f"{name}_{rank}.npz", n=statistics.n, mean=statistics.mean, cov=statistics.cov)
    dist.destroy_process_group()


def test_two_gloo_processes_have_the_statistics_of_one(tmp_path):
    x = np.random.default_rng(0).normal(size=(500, 30)) * np.logspace(-3, 0, 30)
    np.save(tmp_path / "near.npy", x)
    np.save(tmp_path / "far.npy", x + 1e6 * x.std(0))
    context = multiprocessing.get_context("spawn")  # a fork may inherit locks that other tests' threads hold
    processes = [context.Process(target=gather_in_process, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    for name, tolerance in (("near", 1e-12), ("far", 1e-8)):
        x = np.load(tmp_path / f"{name}.npy")
        ours, other = (np.load(tmp_path / f"{name}_{rank}.npz") for rank in range(2))
        exact = np.cov(x - x.mean(0), rowvar=False)
        assert ours["n"] == 500 and all(np.array_equal(ours[key], other[key]) for key in ours.files)
        assert np.linalg.norm(ours["cov"] - exact) <= tolerance * np.linalg.norm(exact)


# ------------------------------------------------------------------------------------------------ Fréchet distance


def rotation(d, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


def scale(cov1, cov2):
    return np.trace(cov1) + np.trace(cov2)


@pytest.mark.parametrize("d", [5, 50, 400])
@pytest.mark.parametrize("unit", [1e-6, 1, 1e6])
def test_commuting_gaussians_over_twelve_decades(d, unit):
    q, rng = rotation(d), np.random.default_rng(1)
    a, b = (10 ** rng.uniform(-12, 0, d) * unit ** 2 for _ in range(2))
    mu1, mu2 = rng.normal(size=(2, d)) * unit
    cov1, cov2 = (q * a) @ q.T, (q * b) @ q.T
    exact = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    ours = fvd.frechet_distance(mu1, cov1, mu2, cov2)
    assert abs(ours - exact) <= 1e-9 * scale(cov1, cov2)
    assert abs(fvd.frechet_distance(mu2, cov2, mu1, cov1) - ours) <= 1e-12 * (scale(cov1, cov2) + ours)


def precise_distance(cov1, cov2):
    """With 60 digits: 2 tr (C1^1/2 C2 C1^1/2)^1/2 by eigenvalues."""
    mpmath = pytest.importorskip("mpmath")  # comes with torch
    with mpmath.workdps(60):
        def root(matrix):
            values, vectors = mpmath.eigsy(matrix)
            return vectors * mpmath.diag([mpmath.sqrt(max(value, 0)) for value in values]) * vectors.T

        c1, c2 = (mpmath.matrix(cov.tolist()) for cov in (cov1, cov2))
        half = root(c1)
        inner = half * c2 * half
        cross = sum(mpmath.sqrt(max(value, 0)) for value in mpmath.eigsy((inner + inner.T) / 2, eigvals_only=True))
        return float(sum(c1[i, i] + c2[i, i] for i in range(c1.rows)) - 2 * cross)


@pytest.mark.parametrize("decades", [1, 6, 12])
def test_against_a_high_precision_reference(decades):
    d, rng = 10, np.random.default_rng(decades)
    cov1, cov2 = ((q * values) @ q.T for q, values in
                  ((rotation(d, seed), np.logspace(0, -decades, d) * rng.uniform(1, 2, d)) for seed in (1, 2)))
    cov1, cov2 = (cov1 + cov1.T) / 2, (cov2 + cov2.T) / 2
    ours = fvd.frechet_distance(np.zeros(d), cov1, np.zeros(d), cov2)
    assert abs(ours - precise_distance(cov1, cov2)) <= 1e-9 * scale(cov1, cov2)


def test_fewer_videos_than_features():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 400)) + 3, rng.normal(size=(90, 400)) * np.linspace(0.1, 2, 400)
    xc, yc = x - x.mean(0), y - y.mean(0)
    # from the data, without any covariance: C1^1/2 C2^1/2 has the singular values of X Y^T / sqrt((n - 1)(m - 1))
    cross = np.linalg.svd(xc @ yc.T, compute_uv=False).sum() / math.sqrt(59 * 89)
    exact = ((x.mean(0) - y.mean(0)) ** 2).sum() + (xc ** 2).sum() / 59 + (yc ** 2).sum() / 89 - 2 * cross
    for unit in (1e-6, 1, 1e6):
        a, b = fvd.Statistics().update(x * unit), fvd.Statistics().update(y * unit)
        assert abs(fvd.distance(a, b) / unit ** 2 - exact) <= 1e-9 * exact
        assert abs(fvd.distance(b, a) - fvd.distance(a, b)) <= 1e-12 * fvd.distance(a, b)
        assert 0 <= fvd.distance(a, a) <= 1e-9 * np.trace(a.cov)


def test_the_textbook_formula_where_it_works():
    d, rng = 40, np.random.default_rng(0)
    cov1, cov2 = (np.cov(rng.normal(size=(300, d)) @ rng.normal(size=(d, d)), rowvar=False) for _ in range(2))
    mu1, mu2 = rng.normal(size=(2, d))
    root = scipy.linalg.sqrtm(cov1 @ cov2).real
    exact = ((mu1 - mu2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * root)
    assert abs(fvd.frechet_distance(mu1, cov1, mu2, cov2) - exact) <= 1e-9 * scale(cov1, cov2)


def test_rank_one_and_zero_covariances():
    rng = np.random.default_rng(0)
    u, v, mu = rng.normal(size=(3, 400))
    zero, mean = np.zeros((400, 400)), np.zeros(400)
    rank1, rank2 = np.outer(u, u), np.outer(v, v)
    assert fvd.frechet_distance(mu, zero, mean, zero) == pytest.approx((mu ** 2).sum(), rel=1e-14)
    assert fvd.frechet_distance(mu, zero, mu, zero) == 0
    assert fvd.frechet_distance(mu, zero, mu, rank1) == pytest.approx(u @ u, rel=1e-12)
    exact = u @ u + v @ v - 2 * abs(u @ v)      # the singular value of (u u^T)^1/2 (v v^T)^1/2 is |u . v|
    assert fvd.frechet_distance(mu, rank1, mu, rank2) == pytest.approx(exact, rel=1e-9)
    assert 0 <= fvd.frechet_distance(mu, rank1, mu, rank1) <= 1e-9 * (u @ u)


@pytest.mark.parametrize("change, words", [
    ({"mu1": np.zeros(3)}, r"\(3,\)"), ({"cov2": np.zeros((4, 3))}, r"\(4, 3\)"),
    ({"cov1": np.full((4, 4), np.nan)}, "NaN")])
def test_frechet_distance_refuses(change, words):
    given = {"mu1": np.zeros(4), "cov1": np.eye(4), "mu2": np.zeros(4), "cov2": np.eye(4)}
    with pytest.raises(fvd.FVDError, match=words):
        fvd.frechet_distance(**{**given, **change})


# ------------------------------------------------------------------------------------------------ weights


def test_load_i3d_takes_344_entries_and_287(net, weights, tmp_path):
    old = {name: tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")}
    assert len(old) == 287
    torch.save(old, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    loaded = fvd.load_i3d(tmp_path / "old.pt")
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in old.items())


def without(name, weights):
    return {key: tensor for key, tensor in weights.items() if key != name}


@pytest.mark.parametrize("make, words", [
    (lambda weights: {**weights, "logits.conv3d.weight": torch.zeros(600, 1024, 1, 1, 1)}, r"\(600, 1024, 1, 1, 1\)"),
    (lambda weights: without("Mixed_4d.b2b.bn.running_var", weights), "Mixed_4d.b2b.bn.running_var has shape None"),
    (lambda weights: {**weights, "module.x": torch.zeros(1)}, "module.x"),
    (lambda weights: {"state_dict": weights}, "Conv3d_1a_7x7.conv3d.weight"), (lambda weights: [1, 2], "400 classes"),
    (lambda weights: {"x": Code()}, "UnpicklingError")])
def test_other_weights_are_refused_in_one_line(weights, make, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(make(weights), "other.pt")
    with pytest.raises(fvd.FVDError, match=words) as refused:
        fvd.load_i3d("other.pt")
    assert len(str(refused.value).splitlines()) == 1 and "other.pt" in str(refused.value)
    assert not Path("executed").exists()


def test_damaged_and_missing_weights(weights_file, tmp_path):
    (tmp_path / "cut.pt").write_bytes(weights_file.read_bytes()[:1_000_000])
    (tmp_path / "page.pt").write_text("<html>")
    for name, words in (("cut.pt", "cut.pt holds no"), ("page.pt", "page.pt holds no"), ("no.pt", "No such file")):
        with pytest.raises(fvd.FVDError, match=words) as refused:
            fvd.load_i3d(tmp_path / name)
        assert len(str(refused.value).splitlines()) == 1


# ------------------------------------------------------------------------------------------------ download


class Server(http.server.BaseHTTPRequestHandler):
    """/good, /short (fewer bytes than announced), /page (HTML), /other (not I3D); anything else is not found."""
    requests = []

    def do_GET(self):
        self.requests.append(self.path)
        body = self.bodies.get(self.path)
        self.send_response(200 if body else 404)
        self.send_header("Content-Length", str(len(body or b"") + (1000 if self.path == "/short" else 0)))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *_):
        pass


@pytest.fixture
def server(weights_file):
    content = weights_file.read_bytes()
    Server.bodies = {"/good": content, "/short": content[:5000], "/page": b"\n<!DOCTYPE html>", "/other": b"text"}
    Server.requests.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.handle_error = lambda *_: None   # a client that goes away
        thread = threading.Thread(target=server.serve_forever, args=[0.01], daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_download(server, weights_file, tmp_path, capsys):
    path = tmp_path / "cache" / "i3d.pt"
    fvd.download(f"{server}/good", path)
    assert path.read_bytes() == weights_file.read_bytes() and os.listdir(path.parent) == ["i3d.pt"]
    shown = capsys.readouterr().out
    assert f"{path.stat().st_size:,} bytes" in shown and re.search("SHA-256 [0-9a-f]{64}", shown)
    fvd.download(f"{server}/good", path)
    assert Server.requests == ["/good"]  # found there the second time


@pytest.mark.parametrize("address, words", [
    ("/short", "of 6,000 bytes"), ("/page", "page"), ("/other", "no weights"), ("/missing", "404")])
def test_a_failed_download_leaves_nothing(server, address, words, tmp_path):
    with pytest.raises(fvd.FVDError, match=words) as refused:
        fvd.download(server + address, tmp_path / "i3d.pt")
    assert len(str(refused.value).splitlines()) == 1 and not list(tmp_path.iterdir())


def test_an_interrupted_or_impossible_download_leaves_nothing(server, tmp_path, monkeypatch):
    with pytest.raises(fvd.FVDError, match="cannot be fetched"):
        fvd.download("http://127.0.0.1:9/i3d.pt", tmp_path / "i3d.pt")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fvd, "progress", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fvd.download(f"{server}/good", tmp_path / "i3d.pt")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ fvd.py as a command


class Scripted(torch.nn.Module):
    """In the place of I3D where its cost would tell nothing: 400 numbers from a thumbnail of the clip."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mix", torch.randn(3 * 64, 400, generator=torch.Generator().manual_seed(0)))

    def forward(self, x, rescale: bool = True, resize: bool = True, return_features: bool = False):
        if rescale or resize or not return_features:
            raise RuntimeError("called the wrong way")
        return torch.nn.functional.adaptive_avg_pool3d(x, (1, 8, 8)).flatten(1).matmul(self.mix)


@pytest.fixture(scope="module")
def scripted_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("scripted") / "scripted.pt"
    torch.jit.script(Scripted()).save(str(path))
    return path


@pytest.fixture
def fvd_command(scripted_file, tmp_path, monkeypatch):
    """Run fvd.py in an empty folder on real.npy (12 clips) and fake.npy (9) -> what it wrote."""
    monkeypatch.chdir(tmp_path)
    np.save("real.npy", videos_of("smooth", 9, 16, n=12, seed=1))
    np.save("fake.npy", videos_of("smooth", 9, 16, n=9, seed=2))

    def run(*flags, network=("--i3d-torchscript", scripted_file), out="fake.fvd.json"):
        defaults = {"--real": "real.npy", "--fake": "fake.npy", "--cache": "cache", "--device": "cpu",
                    "--batch-size": 4, "--repeats": 1}
        given = [str(flag) for flag in flags]
        unless = [str(part) for flag, value in defaults.items() if flag not in given for part in (flag, value)]
        monkeypatch.setattr(sys, "argv", ["fvd.py", *map(str, network), *unless, *given])
        with pytest.raises(SystemExit) as stopped:
            fvd.run(fvd.main)
        if stopped.value.code:
            return stopped.value.code
        return json.loads(Path(out).read_text())

    return run


def test_the_result_says_everything(fvd_command, scripted_file):
    request = {"checkpoint_sha256": "0", "step": 7, "weights": "ema", "sampler": "ddpm", "sampling_steps": 8}
    Path("fake.npy.json").write_text(json.dumps(request))
    result = fvd_command("--window", "random", "--seed", 3, "--num-real", 11, "--repeats", 3)
    real, fake = result["request"]["real"], result["request"]["fake"]
    assert real.items() >= {"split": "all", "videos": 11, "videos_in_split": 12, "choice": "random by seed",
                            "frames": 9, "stride": 1, "window": "random", "seed": 3, "resolution": [16, 16]}.items()
    assert fake["videos"] == 9 and fake["choice"] == "all" and fake["sampled_from"] == request
    assert result["request"]["i3d_file"] == scripted_file.name and result["request"]["network"] == "torchscript"
    assert re.fullmatch("[0-9a-f]{64}", result["request"]["i3d_sha256"])
    assert result["request"]["resize"] == "tf1" and result["request"]["range"] == "-11"
    assert result["floor"]["videos_in_each_half"] == 5 and result["floor"]["repeats"] == 3
    assert result["resampled"]["std"] > 0 and result["resampled"]["mean"] > 0
    assert not result["comparable_with_published_fvd"]
    assert sum("covariance is singular" in note for note in result["notes"]) == 2
    assert any("not the weights of the metric" in note for note in result["notes"])


def test_the_number_is_that_of_the_features(fvd_command, scripted_file):
    result = fvd_command()
    net = fvd.parse_torchscript(scripted_file.read_bytes(), scripted_file)
    x, y = (fvd.i3d_features(net, np.load(name)).double().numpy() for name in ("real.npy", "fake.npy"))
    expected = fvd.frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    assert result["fvd"] == pytest.approx(expected, rel=1e-5) and result["fvd"] > 1
    same = fvd_command("--fake", "real.npy", "--out", "same.json", out="same.json")
    assert 0 <= same["fvd"] < 1e-9 * np.trace(np.cov(x, rowvar=False))


def test_labels(fvd_command):
    for flag, value, words in (("--range", "01", "released evaluation"), ("--resize", "half-pixel", "PyTorch ports")):
        result = fvd_command(flag, value, "--out", f"{value}.json", out=f"{value}.json")
        assert any("not comparable with published FVD" in note and words in note for note in result["notes"])


def test_the_metrics_weights_are_comparable(fvd_command, monkeypatch, capsys):
    monkeypatch.setitem(fvd.BLACK_AGAINST_WHITE, 16, fvd_command()["black_against_white_16_frames"] + 0.5)
    result = fvd_command()
    assert result["comparable_with_published_fvd"] and not any("published" in note for note in result["notes"])
    assert "not comparable" not in capsys.readouterr().out.rsplit("FVD", 1)[1]


def test_protocols(fvd_command, monkeypatch):
    monkeypatch.setitem(fvd.PROTOCOLS["2048"], "num_real", 8)
    monkeypatch.setitem(fvd.PROTOCOLS["2048"], "num_fake", 6)
    monkeypatch.setitem(fvd.PROTOCOLS["paper, MineRL"], "num_fake", 5)
    result = fvd_command("--protocol", "2048")
    assert result["request"]["real"]["videos"] == 8 and result["request"]["fake"]["videos"] == 6
    assert result["request"]["real"]["window"] == "random" and not any("differs" in note for note in result["notes"])
    result = fvd_command("--protocol", "paper", "--out", "paper.json", out="paper.json")
    assert result["request"]["protocol"] == "paper, MineRL" and result["request"]["fake"]["videos"] == 5
    assert (result["request"]["real"]["split"], result["request"]["real"]["window"]) == ("train", "random")
    assert "differs from --protocol paper, MineRL: num_real 12, not 961" in result["notes"]
    assert "--num-fake" in fvd_command("--protocol", "2048", "--num-fake", 100, "--out", "y.json")


def test_paper_presets_are_the_papers():
    assert fvd.PROTOCOLS["paper, UCF101"] == dict(split="all", window="first", num_real=None, num_fake=10_000)
    assert fvd.PROTOCOLS["paper, MineRL"] == dict(split="train", window="random", num_real=None, num_fake=1000)
    assert fvd.PROTOCOLS["2048"] == dict(split="all", window="random", num_real=2048, num_fake=2048)
    assert fvd.PUBLISHED_REAL == {"paper, UCF101": 13_320, "paper, MineRL": 961}


def test_clips_are_cut_where_the_result_says(tmp_path):
    """Every pixel holds its video's number and frame: what is cut can be read off."""
    lengths = [12, 9, 30, 20]
    pixels = np.concatenate([np.array([[v * 50 + i for i in range(n)]], np.uint8).T for v, n in enumerate(lengths)])
    np.save(tmp_path / "x.npy", np.broadcast_to(pixels[:, :, None, None], (71, 1, 1, 3)).copy())
    starts = np.cumsum(lengths) - lengths
    index = [{"name": str(i), "start": int(s), "length": n, "label": None, "split": "test" if i == 3 else "train"}
             for i, (s, n) in enumerate(zip(starts, lengths))]
    (tmp_path / "x.json").write_text(json.dumps({"size": 1, "videos": index}))
    videos = fvd.read_videos(tmp_path / "x.npy")
    first = fvd.cut(videos, "real", 9)
    assert first[0:4][:, :, 0, 0, 0].tolist() == [list(range(50 * v, 50 * v + 9)) for v in range(4)]
    train_only = fvd.cut(videos, "real", 9, split="train")
    assert train_only.about["videos"] == 3 and train_only.about["too_short"] == 0
    strided = fvd.cut(videos, "real", 9, stride=2, window="random", seed=1)
    assert strided.about["videos"] == 2 and strided.about["too_short"] == 2
    for clip, v in zip(strided[0:2][:, :, 0, 0, 0].astype(int), (2, 3)):
        assert (np.diff(clip) == 2).all() and clip[0] >= 50 * v and clip[-1] < 50 * v + lengths[v]
    seeds = [fvd.cut(videos, "real", 9, window="random", seed=seed).starts.tolist() for seed in (1, 1, 2)]
    assert seeds[0] == seeds[1] != seeds[2]
    chosen = [fvd.cut(videos, "real", 9, num=2, seed=seed).starts.tolist() for seed in range(20)]
    assert {len(c) for c in chosen} == {2} and len({tuple(c) for c in chosen}) > 3
    assert fvd.cut(videos, "fake", 9, num=2, in_order=True).starts.tolist() == [0, 12]


def test_folders_are_read_through_data(fvd_command, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "packed")
    Path("folder").mkdir()
    for i, video in enumerate(np.load("fake.npy")):
        np.save(f"folder/{i}.npy", video)
    result = fvd_command("--fake", "folder", "--size", 16, out="folder.fvd.json")
    assert result["fvd"] == fvd_command()["fvd"]
    assert "--size" in fvd_command("--fake", "folder", "--out", "x.json")


@pytest.mark.parametrize("after", [1, 4])
def test_a_killed_run_goes_on_and_gives_the_same_digits(fvd_command, after, monkeypatch, capsys):
    expected = fvd_command("--cache", "other", "--out", "other.json", out="other.json")
    whole, write, parts = fvd.i3d_features, fvd.write_features, []

    def stop(path, features):
        if path.parent.name.endswith(".parts"):
            parts.append(path)
        if len(parts) > after + 2:      # two for black and white
            raise KeyboardInterrupt
        write(path, features)

    monkeypatch.setattr(fvd, "write_features", stop)
    assert "give the same command again" in fvd_command()
    assert not Path("fake.fvd.json").exists() and not list(Path("cache").glob("**/*.partial"))
    monkeypatch.setattr(fvd, "write_features", write)
    computed = []
    monkeypatch.setattr(fvd, "i3d_features", lambda net, videos, *rest: computed.append(len(videos))
                        or whole(net, videos, *rest))
    result = fvd_command()
    assert sum(computed) == 12 + 9 - 4 * after      # nothing twice
    assert result == expected
    computed.clear()
    assert fvd_command() == expected and not computed                            # all of it from the cache
    assert not list(Path("cache").glob(".*"))


def test_a_damaged_cache_is_computed_again(fvd_command):
    expected = fvd_command()
    for path in Path("cache").glob("*.npy"):
        path.write_bytes(path.read_bytes()[:100])
    assert fvd_command() == expected


@pytest.mark.parametrize("change", ["--window random --seed 5", "--resize half-pixel", "--range 01", "touch"])
def test_what_shapes_the_features_is_in_their_files_name(fvd_command, change, tmp_path):
    np.save("real.npy", videos_of("smooth", 12, 16, n=12, seed=1))
    before = fvd_command("--frames", 9)
    if change == "touch":
        np.save("real.npy", videos_of("smooth", 12, 16, n=12, seed=9))
    flags = [] if change == "touch" else change.split()
    after = fvd_command("--frames", 9, *flags, "--out", "new.json", out="new.json")
    assert after["fvd"] != before["fvd"]


def test_a_result_is_never_overwritten_by_another(fvd_command):
    before = fvd_command()
    assert "fake.fvd.json" in fvd_command("--seed", 1)
    assert json.loads(Path("fake.fvd.json").read_text()) == before
    Path("list.json").write_text("[1]")
    assert "list.json" in fvd_command("--out", "list.json") and Path("list.json").read_text() == "[1]"


def bad_files():
    np.save("float.npy", np.zeros((4, 9, 8, 8, 3), np.float32))
    np.save("first.npy", np.zeros((4, 9, 3, 8, 8), np.uint8))
    np.save("short.npy", np.zeros((4, 8, 8, 8, 3), np.uint8))
    np.save("single.npy", np.zeros((9, 8, 8, 3), np.uint8))
    np.save("empty.npy", np.zeros((0, 9, 8, 8, 3), np.uint8))
    np.save("objects.npy", np.array([Code(), None]), allow_pickle=True)
    np.save("damaged.npy", np.zeros((12, 8, 8, 3), np.uint8))
    np.save("uneven.npy", np.zeros((20, 8, 8, 3), np.uint8))
    entries = [{"start": 0, "length": 9, "split": "train"}, {"start": 9, "length": 11, "split": "train"}]
    for name in ("damaged", "uneven"):
        Path(f"{name}.json").write_text(json.dumps({"size": 8, "videos": entries}))
    np.save("noindex.npy", np.zeros((12, 8, 8, 3), np.uint8))
    Path("noindex.json").write_text("[]")
    Path("text.npy").write_text("text")
    Path("empty").mkdir()
    torch.save({"x": 1}, "other.pt")
    Path("code.pt").write_bytes(pickle.dumps(Code()))


@pytest.mark.parametrize("flags, words", [
    ("--real float.npy", r"float32 \(4, 9, 8, 8, 3\).*uint8"), ("--fake first.npy", r"\(4, 9, 3, 8, 8\)"),
    ("--fake short.npy", "8 frames cannot be embedded.*9 frames or more"), ("--frames 8", "clips of 8 frames"),
    ("--real short.npy", "0 of 4 videos.*9 frames.*longest has 8"), ("--real single.npy", "1 of 1 videos"),
    ("--real empty.npy", r"\(0, 9"), ("--real objects.npy", "objects.npy"), ("--real text.npy", "text.npy is no"),
    ("--real none.npy", "none.npy.*No such file"), ("--real empty --size 8", "holds no"), ("--real empty", "--size"),
    ("--real damaged.npy", r"describes 20 frames.*\(12, 8, 8, 3\)"), ("--real noindex.npy", "noindex.json is no index"),
    ("--fake uneven.npy", "9 to 11 frames; give --frames"), ("--split test", "0 of 0 videos .split test."),
    ("--num-fake 10", "9 of 9 videos.*--num-fake"), ("--num-real 1000", "12 of 12"), ("--stride 2", "17 frames"),
    ("--protocol 2048", "2048 or more"), ("--frames x", "'x'"), ("--repeats 0", "'0'"), ("--seed -1", "'-1'"),
    ("--resize pil", "'pil'"), ("--range 255", "'255'"), ("--device tpu", "--device tpu"), ("--device cuda:7", "CUDA"),
    ("--out fake.npy", "fake.npy holds"), ("--i3d none.pt", "none.pt cannot be read.*fvd.py --check --i3d download"),
    ("--i3d other.pt", "other.pt is no I3D"), ("--i3d code.pt", "code.pt holds no weights that can be read safely"),
    ("--i3d-torchscript other.pt", "other.pt is no TorchScript"), ("--i3d a.pt --i3d-torchscript b.pt", "one of them"),
    ("", "no I3D weights: get i3d_pretrained_400.pt from https://.*--i3d download")])
def test_fvd_bad_input_is_one_line(fvd_command, flags, words, capfd):
    bad_files()
    before = {path: path.read_bytes() for path in Path().glob("*") if path.is_file()}
    network = () if not flags or "--i3d" in flags else None
    code = fvd_command(*flags.split(), **({"network": network} if network is not None else {}))
    assert not isinstance(code, dict), "this was accepted"
    error = capfd.readouterr().err + (code if isinstance(code, str) else "")
    assert re.search(words, error) and "Traceback" not in error and len(error.strip().splitlines()) == 1, error
    assert {path: path.read_bytes() for path in Path().glob("*") if path.is_file()} == before
    assert not Path("executed").exists() and not Path("fake.fvd.json").exists()


def test_another_torchscript_file_is_refused(fvd_command, tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save("linear.pt")
    assert "not StyleGAN-V's" in fvd_command(network=("--i3d-torchscript", "linear.pt"))


def test_check_says_whether_it_is_the_standard_metric(fvd_command, scripted_file, monkeypatch, capsys):
    assert fvd_command("--check") == 1
    shown = capsys.readouterr().out
    assert "NOT the standard metric" in shown and "published 152.92" in shown and "published 66.06" in shown
    values = re.findall(r"(\d+) frames: ([\d.]+), published", shown)
    monkeypatch.setattr(fvd, "BLACK_AGAINST_WHITE", {int(frames): float(value) for frames, value in values})
    monkeypatch.setattr(sys, "argv", ["fvd.py", "--check", "--i3d-torchscript", str(scripted_file), "--cache", "cache"])
    assert fvd.main() == 0
    assert "is the standard metric" in capsys.readouterr().out


@pytest.mark.skipif("I3D_WEIGHTS" not in os.environ, reason="I3D_WEIGHTS does not name i3d_pretrained_400.pt")
@pytest.mark.parametrize("frames, published", [(16, 152.92), (24, 66.06)])
def test_published_constants(frames, published):
    net = fvd.load_i3d(os.environ["I3D_WEIGHTS"])
    videos = np.zeros((2, frames, 64, 64, 3), np.uint8)
    videos[1] = 255
    black, white = fvd.i3d_features(net, videos, batch_size=1).double()
    assert abs(((black - white) ** 2).sum().item() - published) <= 1


def test_random_i3d_tells_noise_from_video(weights_file, fvd_command):
    """The whole way with the real network, at random weights: nothing but the order of the numbers means anything."""
    walks = np.stack([data.maze_walk(0, i, 9, 16) for i in range(6)])
    for name, videos in (("real", walks[:4]), ("walks", walks[4:]), ("noise", videos_of("random", 9, 16, n=2))):
        np.save(f"{name}.npy", videos)
    near, far = (fvd_command("--fake", f"{name}.npy", "--real", "real.npy", network=("--i3d", weights_file),
                         out=f"{name}.fvd.json") for name in ("walks", "noise"))
    assert 0 < near["fvd"] < far["fvd"] / 2
    assert near["floor"] == far["floor"] and near["floor"]["mean"] > 0
    assert any("not the weights of the metric" in note for note in near["notes"])
    assert near["request"]["network"] == "native"


def test_fvd_of_two_processes_is_that_of_one(fvd_command, scripted_file):
    expected = fvd_command("--repeats", 3)
    finished = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(HERE / "fvd.py"),
         "--real", "real.npy", "--fake", "fake.npy", "--i3d-torchscript", str(scripted_file), "--cache", "cache2",
         "--device", "cpu", "--batch-size", "4", "--repeats", "3", "--out", "two.json"],
        capture_output=True, text=True, timeout=100)
    assert finished.returncode == 0 and "2 x cpu" in finished.stdout, finished.stderr
    result = json.loads(Path("two.json").read_text())
    assert result["request"] == expected["request"]
    assert result["fvd"] == pytest.approx(expected["fvd"], rel=1e-12)
    assert result["floor"] == expected["floor"]
    assert result["resampled"]["mean"] == pytest.approx(expected["resampled"]["mean"], rel=1e-12)


def test_fvd_works_alone_in_an_empty_folder(tmp_path, scripted_file):
    shutil.copy(HERE / "fvd.py", tmp_path)
    lines = (HERE / "fvd.py").read_text().splitlines()
    imports = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert not imports - set(sys.stdlib_module_names) - {"torch", "numpy"}
    for name, seed in (("real", 1), ("fake", 2)):
        np.save(tmp_path / f"{name}.npy", videos_of("smooth", 9, 16, n=5, seed=seed))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = subprocess.run([sys.executable, "fvd.py", "--i3d-torchscript", str(scripted_file), "--cache", "cache",
                               "--device", "cpu", "--real", "real.npy", "--fake", "fake.npy"], cwd=tmp_path,
                              env=environment, capture_output=True, text=True, timeout=100)
    assert finished.returncode == 0 and re.search(r"FVD [\d.]+", finished.stdout), finished.stderr


def test_folders_need_data(fvd_command, monkeypatch):
    monkeypatch.setitem(sys.modules, "data", None)  # as if it were not there
    Path("folder").mkdir()
    message = fvd_command("--real", "folder", "--size", 16)
    assert "needs data.py" in message and len(message.splitlines()) == 1


# ------------------------------------------------------------------------------------------------ in training


FVD_TRAIN = ["--device", "cpu", "--workers", 0, "--frames", 9, "--size", 8, "--diffusion-steps", 4,
             "--base-channels", 8, "--channel-mults", 1, 2, "--time-dim", 16, "--heads", 2,
             "--state-size", 8, "--mlp-dim", 12, "--batch-size", 2, "--precision", "float32", "--ema-every", 1,
             "--ema-start", 1, "--eval-clips", 0, "--grid-samples", 0]


def train_with_fvd(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, [*FVD_TRAIN, *flags])])
    train.main()


def fvds(out):
    return [(record["step"], record["fvd"]) for record in map(json.loads, (out / "log.jsonl").read_text().splitlines())
            if "fvd" in record]


def test_fvd_in_training(scripted_file, tmp_path, monkeypatch, capsys):
    i3d = fvd.parse_torchscript(scripted_file.read_bytes(), scripted_file)
    monkeypatch.setattr(fvd, "load_i3d", lambda path, device: i3d)
    flags = ["--out", tmp_path / "out", "--fvd-every", 2, "--fvd-videos", 3, "--i3d", "i3d.pt"]
    train_with_fvd(monkeypatch, *flags, "--steps", 3)
    (step, first), (last, _) = fvds(tmp_path / "out")
    assert (step, last) == (2, 3) and first > 0 and "FVD of 3 samples" in capsys.readouterr().out
    # a run that was stopped before it could
    log = tmp_path / "out" / "log.jsonl"
    before = fvds(tmp_path / "out")
    log.write_text("".join(line + "\n" for line in log.read_text().splitlines() if '{"step": 3, "fvd"' not in line))
    train_with_fvd(monkeypatch, *flags, "--steps", 3)
    assert fvds(tmp_path / "out") == before
    # the same by hand
    net = sample.load_network(sample.load_checkpoint(tmp_path / "out" / "ckpt.pt"), "ema", "cpu")
    drawn = sample.draw(net, train.Diffusion(4), 0, range(2), (3, 9, 8, 8), "float32")
    drawn = np.concatenate([drawn, sample.draw(net, train.Diffusion(4), 0, range(2, 3), (3, 9, 8, 8), "float32")])
    real = np.stack([data.MazeVideos(9, 8).clip(i) for i in range(3)])
    x, y = (fvd.i3d_features(i3d, videos).double().numpy() for videos in (real, drawn))
    expected = fvd.frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    assert before[1][1] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("flags, words", [
    ("--fvd-every 2", "--i3d None: expected both"), ("--i3d x.pt", "--fvd-every 0.*expected both"),
    ("--fvd-every 2 --i3d x.pt", "x.pt cannot be read"), ("--fvd-every 2 --i3d x.pt --frames 8", "8 frames"),
    ("--fvd-every 2 --i3d x.pt --fvd-videos 1", "--fvd-videos 1")])
def test_training_refuses_early(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, FVD_TRAIN), "--steps", "1", *flags.split()])
    with pytest.raises(SystemExit) as stopped:
        sample.run("train.py", train.main)
    assert re.search(words, stopped.value.code) and len(stopped.value.code.splitlines()) == 1
    assert not Path("out").exists()


# ------------------------------------------------------------------------------------------------ bench.py


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
    assert re.search(r"^.+, 1 thread\(s\), torch .+, float32, 1x1, batch 1, base 64: `python bench.py .+`$", printed,
                     re.MULTILINE)
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
    (["--device", "tpu"], "--device tpu"), (["--budget-gb", 0], "above 0"),
    (["--budget-gb", 1, "--what", "sample"], "--budget-gb is about the training step")])
def test_bench_refuses_in_one_line(flags, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        bench_command(monkeypatch, "--base-channels", 8, "--frames", 2, *flags)
    said = str(stop.value.code) if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert said.startswith("bench.py: ") and message in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("first", [8, 40, 200])
def test_the_widest_network_within_a_budget(first, monkeypatch, capsys, tmp_path):
    """Memory that grows by 0.1 GB a base channel; the allocator fails above 100."""
    def compare(rows, args, bar):
        [row], base = rows, args.base_channels
        tried.append((row, args))
        row.parameters, row.out_of_memory = 2**27, base > 100                                       # 0.5 GB
        row.steps = [] if base > 100 else [(base / 2, (base / 10 - 0.5) * 2**30)]

    tried = []
    monkeypatch.setattr(bench, "compare", compare)
    for budget, cells in ((0.7, "none | – | – | – | 0.80 GB (base 8)"), (4.7, "40 | 134.22 M | 4.00 | 20 | 4.80 GB"),
                          (24, "96 | 134.22 M | 9.60 | 48 | out of memory")):
        bench_command(monkeypatch, "--budget-gb", budget, "--frames", 2, "--size", 8, "--base-channels", first,
                      "--temporal", "ssm", "attention", "--out", tmp_path / "budget.md")
        printed = capsys.readouterr().out
        assert [f"| 2 | {temporal} | {cells} |" for temporal in ("ssm", "attention")] == printed.splitlines()[-2:]
        assert (tmp_path / "budget.md").read_text() == printed
    with torch.device("meta"):
        config = bench.build(*tried[0]).config
    assert (config.temporal, config.base_channels, config.heads, config.time_dim) == ("ssm", first, first // 8, 32 * first)


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


# ------------------------------------------------------------------------------------------------ files that travel


class TransformerTemporalModel(torch.nn.Module):
    """The conventions of diffusers' class of this name."""

    def __init__(self, channels):
        super().__init__()
        self.proj_in, self.proj_out = torch.nn.Linear(channels, 2 * channels), torch.nn.Linear(2 * channels, channels)
        self.transformer_blocks = torch.nn.ModuleList([torch.nn.Identity()] * 2)

    def forward(self, x, num_frames):
        """(batch·frames, c, h, w) -> the same."""
        b, c, h, w = x.shape[0] // num_frames, *x.shape[1:]
        hidden = x.view(b, num_frames, c, h, w).permute(0, 3, 4, 1, 2).reshape(b * h * w, num_frames, c)
        hidden = self.proj_in(hidden)
        for block in self.transformer_blocks:
            hidden = block(hidden, encoder_hidden_states=None, timestep=None)
        return x + self.proj_out(hidden).view(b, h, w, num_frames, c).permute(0, 3, 4, 1, 2).reshape(x.shape)


def test_the_readmes_drop_in_runs_as_printed():
    [snippet] = [block for block in re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
                 if "(batch·h·w, frames, channels)" in block]
    assert len(snippet.strip().splitlines()) <= 15
    names = {}
    exec(snippet, names)
    torch.manual_seed(0)
    net = torch.nn.Sequential(TransformerTemporalModel(4))
    names["use_ssm"](net)
    assert [type(block).__name__ for block in net[0].transformer_blocks] == ["SSMBlock"]
    for frames in (5, 9):
        x = torch.randn(2 * frames, 4, 2, 3, requires_grad=True)
        y = net[0](x, frames)
        [gradient] = torch.autograd.grad(y[1, :, 0, 0].square().sum(), x)
        seen = gradient.abs().amax(1) > 0                                                           # b·f h w
        assert y.shape == x.shape and seen[:frames, 0, 0].all(), "all frames of the same video and position"
        seen[:frames, 0, 0] = False
        assert not seen.any()


@pytest.mark.parametrize("files, packages, code", [
    (["s4d.py"], ["torch"], "import torch, s4d; assert s4d.TemporalSSM(4)(torch.randn(1, 4, 9, 2, 2)).shape[2] == 9"),
    (["diffusion.py"], ["torch"], "import diffusion; diffusion.Diffusion(8)"),
    (["data.py"], ["torch", "numpy", "PIL"], "import data; assert data.maze_walk(0, 0, 3, 8).shape == (3, 8, 8, 3)"),
    (["model.py", "s4d.py"], ["torch", "einops"], "import model; model.UNet3D(model.UNetConfig(base_channels=8))"),
])
def test_files_work_alone_in_an_empty_folder(files, packages, code, tmp_path):
    for file in files:
        shutil.copy(HERE / file, tmp_path)
    others = {"torch", "numpy", "einops", "PIL", "scipy", "av", "tqdm", "tensorboard", "matplotlib"} - set(packages)
    imports = {line.split()[1].split(".")[0] for file in files for line in (HERE / file).read_text().splitlines()
               if line.startswith(("import ", "from "))}
    assert not imports & others
    finished = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                              env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"})
    assert finished.returncode == 0, finished.stderr
