"""The tests of fvd.py, on the CPU, without a network: python -m pytest -q test_fvd_part.py"""
import http.server
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

# Processes with several threads each stall one another on a machine with few cores; those that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

import mpmath
import numpy as np
import pytest
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import fvd
import sample
import train

HERE = Path(__file__).resolve().parent


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


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
    context = multiprocessing.get_context("fork")
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


class Code:
    def __reduce__(self):
        return Path("executed").touch, ()


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


# ------------------------------------------------------------------------------------------------ the command


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
def command(scripted_file, tmp_path, monkeypatch):
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


def test_the_result_says_everything(command, scripted_file):
    request = {"checkpoint_sha256": "0", "step": 7, "weights": "ema", "sampler": "ddpm", "sampling_steps": 8}
    Path("fake.npy.json").write_text(json.dumps(request))
    result = command("--window", "random", "--seed", 3, "--num-real", 11, "--repeats", 3)
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


def test_the_number_is_that_of_the_features(command, scripted_file):
    result = command()
    net = fvd.parse_torchscript(scripted_file.read_bytes(), scripted_file)
    x, y = (fvd.i3d_features(net, np.load(name)).double().numpy() for name in ("real.npy", "fake.npy"))
    expected = fvd.frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    assert result["fvd"] == pytest.approx(expected, rel=1e-5) and result["fvd"] > 1
    same = command("--fake", "real.npy", "--out", "same.json", out="same.json")
    assert 0 <= same["fvd"] < 1e-9 * np.trace(np.cov(x, rowvar=False))


def test_labels(command):
    for flag, value, words in (("--range", "01", "released evaluation"), ("--resize", "half-pixel", "PyTorch ports")):
        result = command(flag, value, "--out", f"{value}.json", out=f"{value}.json")
        assert any("not comparable with published FVD" in note and words in note for note in result["notes"])


def test_the_metrics_weights_are_comparable(command, monkeypatch, capsys):
    monkeypatch.setitem(fvd.BLACK_AGAINST_WHITE, 16, command()["black_against_white_16_frames"] + 0.5)
    result = command()
    assert result["comparable_with_published_fvd"] and not any("published" in note for note in result["notes"])
    assert "not comparable" not in capsys.readouterr().out.rsplit("FVD", 1)[1]


def test_protocols(command, monkeypatch):
    monkeypatch.setitem(fvd.PROTOCOLS["2048"], "num_real", 8)
    monkeypatch.setitem(fvd.PROTOCOLS["2048"], "num_fake", 6)
    monkeypatch.setitem(fvd.PROTOCOLS["paper, MineRL"], "num_fake", 5)
    result = command("--protocol", "2048")
    assert result["request"]["real"]["videos"] == 8 and result["request"]["fake"]["videos"] == 6
    assert result["request"]["real"]["window"] == "random" and not any("differs" in note for note in result["notes"])
    result = command("--protocol", "paper", "--out", "paper.json", out="paper.json")
    assert result["request"]["protocol"] == "paper, MineRL" and result["request"]["fake"]["videos"] == 5
    assert (result["request"]["real"]["split"], result["request"]["real"]["window"]) == ("train", "random")
    assert "differs from --protocol paper, MineRL: num_real 12, not 961" in result["notes"]
    assert "--num-fake" in command("--protocol", "2048", "--num-fake", 100, "--out", "y.json")


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


def test_folders_are_read_through_data(command, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "packed")
    Path("folder").mkdir()
    for i, video in enumerate(np.load("fake.npy")):
        np.save(f"folder/{i}.npy", video)
    result = command("--fake", "folder", "--size", 16, out="folder.fvd.json")
    assert result["fvd"] == command()["fvd"]
    assert "--size" in command("--fake", "folder", "--out", "x.json")


@pytest.mark.parametrize("after", [1, 4])
def test_a_killed_run_goes_on_and_gives_the_same_digits(command, after, monkeypatch, capsys):
    expected = command("--cache", "other", "--out", "other.json", out="other.json")
    whole, write, parts = fvd.i3d_features, fvd.write_features, []

    def stop(path, features):
        if path.parent.name.endswith(".parts"):
            parts.append(path)
        if len(parts) > after + 2:      # two for black and white
            raise KeyboardInterrupt
        write(path, features)

    monkeypatch.setattr(fvd, "write_features", stop)
    assert "give the same command again" in command()
    assert not Path("fake.fvd.json").exists() and not list(Path("cache").glob("**/*.partial"))
    monkeypatch.setattr(fvd, "write_features", write)
    computed = []
    monkeypatch.setattr(fvd, "i3d_features", lambda net, videos, *rest: computed.append(len(videos))
                        or whole(net, videos, *rest))
    result = command()
    assert sum(computed) == 12 + 9 - 4 * after      # nothing twice
    assert result == expected
    computed.clear()
    assert command() == expected and not computed                            # all of it from the cache
    assert not list(Path("cache").glob(".*"))


def test_a_damaged_cache_is_computed_again(command):
    expected = command()
    for path in Path("cache").glob("*.npy"):
        path.write_bytes(path.read_bytes()[:100])
    assert command() == expected


@pytest.mark.parametrize("change", ["--window random --seed 5", "--resize half-pixel", "--range 01", "touch"])
def test_what_shapes_the_features_is_in_their_files_name(command, change, tmp_path):
    np.save("real.npy", videos_of("smooth", 12, 16, n=12, seed=1))
    before = command("--frames", 9)
    if change == "touch":
        np.save("real.npy", videos_of("smooth", 12, 16, n=12, seed=9))
    flags = [] if change == "touch" else change.split()
    after = command("--frames", 9, *flags, "--out", "new.json", out="new.json")
    assert after["fvd"] != before["fvd"]


def test_a_result_is_never_overwritten_by_another(command):
    before = command()
    assert "fake.fvd.json" in command("--seed", 1)
    assert json.loads(Path("fake.fvd.json").read_text()) == before
    Path("list.json").write_text("[1]")
    assert "list.json" in command("--out", "list.json") and Path("list.json").read_text() == "[1]"


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
def test_bad_input_is_one_line(command, flags, words, capfd):
    bad_files()
    before = {path: path.read_bytes() for path in Path().glob("*") if path.is_file()}
    network = () if not flags or "--i3d" in flags else None
    code = command(*flags.split(), **({"network": network} if network is not None else {}))
    assert not isinstance(code, dict), "this was accepted"
    error = capfd.readouterr().err + (code if isinstance(code, str) else "")
    assert re.search(words, error) and "Traceback" not in error and len(error.strip().splitlines()) == 1, error
    assert {path: path.read_bytes() for path in Path().glob("*") if path.is_file()} == before
    assert not Path("executed").exists() and not Path("fake.fvd.json").exists()


def test_another_torchscript_file_is_refused(command, tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save("linear.pt")
    assert "not StyleGAN-V's" in command(network=("--i3d-torchscript", "linear.pt"))


def test_check_says_whether_it_is_the_standard_metric(command, scripted_file, monkeypatch, capsys):
    assert command("--check") == 1
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


def test_random_i3d_tells_noise_from_video(weights_file, command):
    """The whole way with the real network, at random weights: nothing but the order of the numbers means anything."""
    walks = np.stack([data.maze_walk(0, i, 9, 16) for i in range(6)])
    for name, videos in (("real", walks[:4]), ("walks", walks[4:]), ("noise", videos_of("random", 9, 16, n=2))):
        np.save(f"{name}.npy", videos)
    near, far = (command("--fake", f"{name}.npy", "--real", "real.npy", network=("--i3d", weights_file),
                         out=f"{name}.fvd.json") for name in ("walks", "noise"))
    assert 0 < near["fvd"] < far["fvd"] / 2
    assert near["floor"] == far["floor"] and near["floor"]["mean"] > 0
    assert any("not the weights of the metric" in note for note in near["notes"])
    assert near["request"]["network"] == "native"


def test_two_processes_are_one(command, scripted_file):
    expected = command("--repeats", 3)
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


def test_works_alone_in_an_empty_folder(tmp_path, scripted_file):
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


def test_folders_need_data(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "data", None)  # as if it were not there
    Path("folder").mkdir()
    message = command("--real", "folder", "--size", 16)
    assert "needs data.py" in message and len(message.splitlines()) == 1


# ------------------------------------------------------------------------------------------------ in training

TRAIN = ["--device", "cpu", "--workers", 0, "--frames", 9, "--size", 8, "--diffusion-steps", 4, "--base-channels", 8,
         "--channel-mults", 1, 2, "--time-dim", 16, "--heads", 2, "--head-dim", 8, "--state-size", 8, "--mlp-dim", 12,
         "--batch-size", 2, "--precision", "float32", "--ema-every", 1, "--ema-start", 1, "--eval-clips", 0,
         "--grid-samples", 0]


def run_train(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, [*TRAIN, *flags])])
    train.main()


def fvds(out):
    return [(record["step"], record["fvd"]) for record in map(json.loads, (out / "log.jsonl").read_text().splitlines())
            if "fvd" in record]


def test_fvd_in_training(scripted_file, tmp_path, monkeypatch, capsys):
    i3d = fvd.parse_torchscript(scripted_file.read_bytes(), scripted_file)
    monkeypatch.setattr(fvd, "load_i3d", lambda path, device: i3d)
    flags = ["--out", tmp_path / "out", "--fvd-every", 2, "--fvd-videos", 3, "--i3d", "i3d.pt"]
    run_train(monkeypatch, *flags, "--steps", 3)
    (step, first), (last, _) = fvds(tmp_path / "out")
    assert (step, last) == (2, 3) and first > 0 and "FVD of 3 samples" in capsys.readouterr().out
    # a run that was stopped before it could
    log = tmp_path / "out" / "log.jsonl"
    before = fvds(tmp_path / "out")
    log.write_text("".join(line + "\n" for line in log.read_text().splitlines() if '{"step": 3, "fvd"' not in line))
    run_train(monkeypatch, *flags, "--steps", 3)
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
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, TRAIN), "--steps", "1", *flags.split()])
    with pytest.raises(SystemExit) as stopped:
        sample.run("train.py", train.main)
    assert re.search(words, stopped.value.code) and len(stopped.value.code.splitlines()) == 1
    assert not Path("out").exists()
