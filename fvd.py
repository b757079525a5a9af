"""Fréchet Video Distance (Unterthiner et al. 2018, arXiv 1812.01717) that says exactly what it computed.

    python fvd.py --real ucf32.npy --fake samples.npy --i3d i3d_pretrained_400.pt --protocol paper
    python fvd.py --check --i3d i3d_pretrained_400.pt            # is this the metric that papers report?
    torchrun --nproc-per-node 8 fvd.py --real ucf32.npy --fake samples.npy --i3d download

    net = load_i3d("i3d_pretrained_400.pt", "cuda")
    features = i3d_features(net, videos)                         # uint8 (n, frames, h, w, 3) -> float32 (n, 400)
    frechet_distance(mu1, cov1, mu2, cov2)

Writes SAMPLES.fvd.json: the distance, its spread over resamples of the generated videos, its floor on the real ones,
and everything that shaped them. Stopped and started again by the same command, it goes on where it was.

Words used here:

    I3D        the video classifier of Carreira & Zisserman 2017 (arXiv 1705.07750), trained on Kinetics-400
    feature    its 400 logits, before the softmax, averaged over time: "RGB/inception_i3d/Mean:0" of the TF-Hub graph
               deepmind/i3d-kinetics-400 that the metric was defined with
    clip       `frames` frames of one video, `stride` apart; window: where in the video it is cut
    mu, cov    mean (400,) and covariance (400, 400), divided by N - 1, of the features of one set of clips
    FVD        |mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2))
    floor      FVD between two disjoint halves of the real set: what a perfect generator would get at that size

Needs torch and numpy; data.py beside it only to read folders of videos.
"""
import argparse
import dataclasses
import datetime
import hashlib
import http.client
import io
import json
import math
import os
import re
import resource
import shutil
import sys
import time
import urllib.error
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

I3D_URL = "https://github.com/songweige/TATS/raw/main/tats/fvd/i3d_pretrained_400.pt"
BLACK_AGAINST_WHITE = {16: 152.92, 24: 66.06}   # published FVD between all-black and all-white videos, by frames
SIZE, CLASSES, MIN_FRAMES = 224, 400, 9         # what the network takes and gives
PROTOCOLS = {                                   # what --protocol stands for; None: all
    None: dict(split="all", window="first", num_real=None, num_fake=None),
    "2048": dict(split="all", window="random", num_real=2048, num_fake=2048),
    "paper, UCF101": dict(split="all", window="first", num_real=None, num_fake=10_000),
    "paper, MineRL": dict(split="train", window="random", num_real=None, num_fake=1000)}
PUBLISHED_REAL = {"paper, UCF101": 13_320, "paper, MineRL": 961}


class FVDError(ValueError):
    """Bad input, told in one line that is meant for a person: what was given, what was expected, what to do."""


# ---------------------------------------------------------------------------------------- I3D


def pad_same(x, kernel, stride):
    """Zeros around (b, c, t, h, w) as TensorFlow's "SAME": ceil(size / stride) outputs, the odd zero at the end.

    The input's size decides: 3/2 pools take (0, 1) on even sizes and (1, 1) on odd ones; the 7/2 stem (2, 3) on even.
    """
    padding = []
    for size, k, s in zip(x.shape[:1:-1], kernel[::-1], stride[::-1]):      # F.pad begins with the last axis
        total = max((math.ceil(size / s) - 1) * s + k - size, 0)
        padding += [total // 2, total - total // 2]
    return F.pad(x, padding) if any(padding) else x


def max_pool(x, kernel, stride):
    # What comes in has been through a ReLU: a zero beside it never wins, as TensorFlow's -infinity never does.
    return F.max_pool3d(pad_same(x, kernel, stride), kernel, stride)


class Unit3D(nn.Module):
    """Convolution without bias, BatchNorm with its running statistics, ReLU."""

    def __init__(self, channels_in, channels_out, kernel=1, stride=1):
        super().__init__()
        self.conv3d = nn.Conv3d(channels_in, channels_out, kernel, stride, bias=False)
        # 1e-3 as in Sonnet; its BatchNorm has no learned scale: bn.weight is 1 in files made from the original.
        self.bn = nn.BatchNorm3d(channels_out, eps=1e-3)

    def forward(self, x):
        # BatchNorm goes into the convolution's weights: one large tensor in memory instead of two.
        gain = self.bn.weight * (self.bn.running_var + self.bn.eps).rsqrt()
        weight = self.conv3d.weight * gain[:, None, None, None, None]
        bias = self.bn.bias - self.bn.running_mean * gain
        x = pad_same(x, self.conv3d.kernel_size, self.conv3d.stride)
        return F.conv3d(x, weight, bias, self.conv3d.stride).relu_()


class Mixed(nn.Module):
    """An Inception block: four branches side by side; widths are those of b0, b1a, b1b, b2a, b2b and b3b."""

    def __init__(self, channels, b0, b1a, b1b, b2a, b2b, b3b):
        super().__init__()
        self.b0 = Unit3D(channels, b0)
        self.b1a, self.b1b = Unit3D(channels, b1a), Unit3D(b1a, b1b, 3)
        self.b2a, self.b2b = Unit3D(channels, b2a), Unit3D(b2a, b2b, 3)
        self.b3b = Unit3D(channels, b3b)

    def forward(self, x):
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)),
                          self.b3b(max_pool(x, (3, 3, 3), (1, 1, 1)))], 1)


class I3D(nn.Module):
    """Inflated 3D Inception-v1, RGB (Carreira & Zisserman 2017, Fig. 3): (b, 3, t, 224, 224) -> logits (b, 400).

    Always evaluates with the running statistics, whatever .train() says. Takes t >= 9.
    """

    def __init__(self, num_classes=CLASSES):
        super().__init__()
        self.Conv3d_1a_7x7 = Unit3D(3, 64, 7, stride=2)
        self.Conv3d_2b_1x1 = Unit3D(64, 64)
        self.Conv3d_2c_3x3 = Unit3D(64, 192, 3)
        self.Mixed_3b = Mixed(192, 64, 96, 128, 16, 32, 32)
        self.Mixed_3c = Mixed(256, 128, 128, 192, 32, 96, 64)
        self.Mixed_4b = Mixed(480, 192, 96, 208, 16, 48, 64)
        self.Mixed_4c = Mixed(512, 160, 112, 224, 24, 64, 64)
        self.Mixed_4d = Mixed(512, 128, 128, 256, 24, 64, 64)
        self.Mixed_4e = Mixed(512, 112, 144, 288, 32, 64, 64)
        self.Mixed_4f = Mixed(528, 256, 160, 320, 32, 128, 128)
        self.Mixed_5b = Mixed(832, 256, 160, 320, 32, 128, 128)
        self.Mixed_5c = Mixed(832, 384, 192, 384, 48, 128, 128)
        self.logits = nn.ModuleDict({"conv3d": nn.Conv3d(1024, num_classes, 1)})

    def blocks(self, x):
        """Everything before the average pool: (b, 3, t, h, w) -> (b, 1024, ceil(t / 8), ceil(h / 32), ceil(w / 32))."""
        x = self.Conv3d_1a_7x7(x)                                           # b 64 t/2 h/2 w/2
        x = max_pool(x, (1, 3, 3), (1, 2, 2))                               # b 64 t/2 h/4 w/4
        x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x))                       # b 192 t/2 h/4 w/4
        x = max_pool(x, (1, 3, 3), (1, 2, 2))                               # b 192 t/2 h/8 w/8
        x = self.Mixed_3c(self.Mixed_3b(x))                                 # b 480 t/2 h/8 w/8
        x = max_pool(x, (3, 3, 3), (2, 2, 2))                               # b 480 t/4 h/16 w/16
        for block in (self.Mixed_4b, self.Mixed_4c, self.Mixed_4d, self.Mixed_4e, self.Mixed_4f):
            x = block(x)                                                    # b 832 t/4 h/16 w/16
        x = max_pool(x, (2, 2, 2), (2, 2, 2))                               # b 832 t/8 h/32 w/32
        return self.Mixed_5c(self.Mixed_5b(x))                              # b 1024 t/8 h/32 w/32

    def head(self, x):
        """(b, 1024, ceil(t / 8), 7, 7) -> logits (b, 400, ceil(t / 8) - 1)."""
        # Two time steps at once, stride 1, no padding: inner steps count twice. A mean over time instead is the same at
        # 16 frames and several per cent off at 30.
        return self.logits["conv3d"](F.avg_pool3d(x, (2, 7, 7), stride=1)).squeeze(4).squeeze(3)

    def forward(self, x):
        return self.head(self.blocks(x)).mean(2)


class TorchScriptI3D(nn.Module):
    """StyleGAN-V's i3d_torchscript.pt behind I3D's interface."""

    def __init__(self, scripted):
        super().__init__()
        self.scripted = scripted

    def forward(self, x):
        return self.scripted(x, rescale=False, resize=False, return_features=True)


def load_i3d(path, device="cpu"):
    """I3D with the weights of a state dict such as i3d_pretrained_400.pt, in evaluation mode, on a device.

    The file is read without running any code that might be in it. Raises FVDError if it cannot be read, is damaged,
    or is no state dict of a 400-class RGB I3D.
    """
    return parse_i3d(read_bytes(path), path).to(device)


def read_bytes(path):
    try:
        if Path(path).is_fifo() or Path(path).is_char_device():
            raise OSError("it is not a regular file")  # they may never end
        return Path(path).read_bytes()
    except OSError as error:
        raise FVDError(f"{path} cannot be read ({error.strerror or error}); expected I3D weights: get "
                       f"i3d_pretrained_400.pt from {I3D_URL} (python fvd.py --check --i3d download does)") from None


def parse_i3d(content, path):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what it then refuses
            weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises all sorts for a damaged or foreign file
        raise FVDError(f"{path} holds no weights that can be read safely ({type(error).__name__}); expected a state "
                       "dict such as i3d_pretrained_400.pt; a TorchScript file goes with --i3d-torchscript") from None
    net = I3D()
    given = weights if isinstance(weights, dict) else {}
    given = {name: tuple(getattr(tensor, "shape", ())) for name, tensor in given.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    counters = {name for name in expected if name.endswith("num_batches_tracked")}  # left out by old files, and unused
    wrong = [name for name in {**expected, **given} if given.get(name) != expected.get(name)
             and not (name in counters and name not in given)]
    if wrong:
        raise FVDError(f"{path} is no I3D with {CLASSES} classes, such as i3d_pretrained_400.pt: {str(wrong[0])[:100]} "
                       f"has shape {given.get(wrong[0])}, expected {expected.get(wrong[0])} ({len(wrong)} differences)")
    try:
        net.load_state_dict(weights, strict=False)
    except Exception as error:  # the right shapes, but sparse, without data, no tensors, ...
        raise FVDError(f"{path} is no I3D: {' '.join(str(error).split())[:200]}") from None
    return net.eval().requires_grad_(False)


def parse_torchscript(content, path):
    try:
        scripted = torch.jit.load(io.BytesIO(content), map_location="cpu").eval()
        takes = {argument.name for argument in scripted.forward.schema.arguments}
    except Exception as error:  # as above
        raise FVDError(f"{path} is no TorchScript file ({type(error).__name__}); expected StyleGAN-V's "
                       "i3d_torchscript.pt; a state dict goes with --i3d") from None
    if not {"rescale", "resize", "return_features"} <= takes:
        raise FVDError(f"{path} is a TorchScript file, but not StyleGAN-V's i3d_torchscript.pt: it takes "
                       f"{sorted(takes)}, expected rescale, resize and return_features among them")
    return TorchScriptI3D(scripted)


# ---------------------------------------------------------------------------------------- video -> feature


def resize_axis(x, dim, half_pixel):
    """Linear interpolation of one axis of a float tensor to 224, without antialiasing."""
    n = x.shape[dim]
    if n == SIZE:
        return x
    # In whole numbers, so that no rounding moves a pixel: source index = i n / 224 in TensorFlow 1, where pixels are
    # points; (i + 1/2) n / 224 - 1/2 in PyTorch, where they are squares.
    i = torch.arange(SIZE, device=x.device)
    numerator, denominator = ((2 * i + 1) * n - SIZE).clamp(min=0) if half_pixel else i * n, SIZE * (1 + half_pixel)
    low = numerator // denominator
    shape = [1] * x.ndim
    shape[dim] = SIZE
    fraction = ((numerator - low * denominator) / denominator).to(x.dtype).view(shape)
    return x.index_select(dim, low).lerp_(x.index_select(dim, (low + 1).clamp(max=n - 1)), fraction)


def to_input(videos, resize="tf1", value_range="-11"):
    """uint8 tensor (n, frames, h, w, 3) -> float32 (n, 3, frames, 224, 224), what I3D takes.

    resize: "tf1", bilinear as tf.image.resize_bilinear of TensorFlow 1, which the metric was defined with, or
    "half-pixel", as PyTorch's interpolate. value_range: "-11" scales 0..255 to [-1, 1], "01" to [0, 1].
    """
    x = videos.movedim(-1, 1).contiguous().float()                          # n 3 f h w
    x = resize_axis(resize_axis(x, 4, resize == "half-pixel"), 3, resize == "half-pixel")
    return x.div_(255) if value_range == "01" else x.div_(127.5).sub_(1)


@torch.inference_mode()
def i3d_features(net, videos_uint8, resize="tf1", value_range="-11", batch_size=8):
    """Features of videos, uint8 tensor or array (n, frames >= 9, h, w, 3) -> float32 (n, 400) on the CPU.

    net: from `load_i3d`, on any device; `batch_size` videos are copied there at once and embedded in full float32.
    resize, value_range: see `to_input`. Raises FVDError for anything but uint8 videos of 9 frames or more.
    """
    videos = videos_uint8 if torch.is_tensor(videos_uint8) else np.asanyarray(videos_uint8)
    if str(videos.dtype).removeprefix("torch.") != "uint8" or videos.ndim != 5 or videos.shape[-1] != 3 \
            or 0 in videos.shape:
        raise FVDError(f"i3d_features got {videos.dtype} {tuple(videos.shape)}; expected uint8 (n, frames, h, w, 3)")
    check_frames(videos.shape[1])
    device = next(iter(net.state_dict().values()), torch.empty(0)).device
    features = []
    # TF32 and autocast would cost the third digit.
    with torch.autocast(device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for first in range(0, len(videos), batch_size):
            batch = videos[first:first + batch_size]
            batch = batch if torch.is_tensor(batch) else torch.from_numpy(np.array(batch))
            features.append(net(to_input(batch.to(device), resize, value_range)).float().cpu())
    features = torch.cat(features)
    if features.shape[1:] != (CLASSES,) or not features.isfinite().all():
        raise FVDError(f"the network gives features of shape {tuple(features.shape[1:])}, NaN or infinite in "
                       f"{int((~features.isfinite()).sum())} places; expected ({CLASSES},), finite: use other weights")
    return features


def check_frames(frames):
    if frames < MIN_FRAMES:
        raise FVDError(f"clips of {frames} frames cannot be embedded: I3D halves time three times and then averages "
                       f"two steps; expected {MIN_FRAMES} frames or more")


# ---------------------------------------------------------------------------------------- statistics


class Statistics:
    """Mean and covariance of vectors that come in batches, in float64.

    Sums of deviations, never of raw products: those lose everything when the mean is large.
    Attributes: n; mean (d,); scatter (d, d), the sum of (x - mean)(x - mean)^T.
    """

    def __init__(self, dim=CLASSES):
        self.n, self.mean, self.scatter = 0, np.zeros(dim), np.zeros((dim, dim))

    def update(self, x):
        """Take in vectors (n, d), none or more -> self."""
        x = np.asarray(x, np.float64)
        if len(x):
            mean = x.mean(0)
            self.merge(len(x), mean, (x - mean).T @ (x - mean))
        return self

    def merge(self, n, mean, scatter):
        """Take in what another one has seen. Chan, Golub & LeVeque 1983, eq. 2.1."""
        delta, total = mean - self.mean, self.n + n
        if n:
            self.scatter = self.scatter + scatter + np.outer(delta, delta) * (self.n * n / total)
            self.mean = self.mean + delta * (n / total)
            self.n = total

    def gather(self):
        """-> the Statistics of all processes together, merged in the same order on each: the same to the last bit."""
        if not dist.is_initialized():
            return self
        mine = torch.from_numpy(np.concatenate([[self.n], self.mean, self.scatter.ravel()]))
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        dim = len(self.mean)
        together = Statistics(dim)
        for flat in everyone:
            together.merge(int(flat[0]), flat[1:dim + 1].numpy(), flat[dim + 1:].view(dim, dim).numpy())
        return together

    @property
    def cov(self):
        """(d, d), divided by n - 1."""
        return self.scatter / (self.n - 1)


def frechet_distance(mu1, cov1, mu2, cov2):
    """Squared Fréchet distance between two Gaussians (Dowson & Landau 1982), in float64; never negative.

    mu: (d,). cov: (d, d), symmetric, singular or not. Raises FVDError for other shapes, NaN and infinity.
    """
    mu1, cov1, mu2, cov2 = (np.asarray(x, np.float64) for x in (mu1, cov1, mu2, cov2))
    d = mu1.size
    if not mu1.shape == mu2.shape == (d,) or not cov1.shape == cov2.shape == (d, d):
        raise FVDError(f"frechet_distance got means {mu1.shape}, {mu2.shape} and covariances {cov1.shape}, "
                       f"{cov2.shape}; expected (d,), (d,), (d, d), (d, d)")
    if not all(np.isfinite(x).all() for x in (mu1, cov1, mu2, cov2)):
        raise FVDError("frechet_distance got NaN or infinity")

    def root(cov):
        """L with L L^T = cov."""
        values, vectors = np.linalg.eigh(cov)
        # Rounding leaves +-d eps in the null space of a singular covariance, and roots of that are 1e-7 each.
        kept = values > d * np.finfo(np.float64).eps * values[-1]
        return vectors[:, kept] * np.sqrt(values[kept])

    # tr (cov1 cov2)^(1/2) is the sum of the singular values of L1^T L2: real numbers only, and no square root of a
    # matrix that is not symmetric, which goes complex where a covariance is singular.
    cross = np.linalg.svd(root(cov1).T @ root(cov2), compute_uv=False).sum()
    return max(float(((mu1 - mu2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross), 0.0)


# ---------------------------------------------------------------------------------------- sets of clips


@dataclasses.dataclass
class Clips:
    """Clips of videos that stay in their file: pixels (total frames, h, w, 3), memory-mapped; clip i begins at frame
    starts[i] and has `frames` frames, `stride` apart. about: what they are, for the result file and the cache."""
    pixels: np.ndarray
    starts: np.ndarray
    frames: int
    stride: int
    about: dict

    def __getitem__(self, indices):
        span = (self.frames - 1) * self.stride + 1
        return np.stack([self.pixels[start:start + span:self.stride] for start in self.starts[indices]])


def read_videos(path, size=None):
    """-> (file, pixels (total frames, h, w, 3), starts, lengths, splits of the videos). Raises FVDError.

    path: uint8 .npy of n videos (n, frames, h, w, 3); a packed file of data.py (frames, h, w, 3), its index beside it;
    or a folder of videos, which data.py packs at size x size.
    """
    path = Path(path)
    if path.is_dir():
        path = pack_folder(path, size)
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a regular file")  # a pipe may never end
        array = np.lib.format.open_memmap(path, mode="r")  # unlike np.load, it knows neither pickles nor archives
    except Exception as error:  # a damaged header makes numpy raise all kinds of them
        raise FVDError(f"{path} is no readable .npy file ({' '.join(str(error).split())[:200]}); expected uint8 (n, "
                       "frames, h, w, 3), a packed file of data.py, or a folder of videos") from None
    if array.dtype != np.uint8 or array.ndim not in (4, 5) or array.shape[-1] != 3 or 0 in array.shape \
            or not array.flags.c_contiguous:
        raise FVDError(f"{path} holds {array.dtype} {array.shape}; expected uint8 (n, frames, h, w, 3) in C order: the "
                       "0..255 that a video file has, not floats, whose range would have to be guessed")
    index_path = path.with_suffix(".json")
    if index_path.exists():
        try:
            if not index_path.is_file():
                raise ValueError
            videos = json.loads(index_path.read_text(encoding="utf-8"))["videos"]
            starts, lengths = (np.array([video[key] for video in videos], np.int64) for key in ("start", "length"))
            splits = np.array([str(video["split"]) for video in videos])
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise FVDError(f"{index_path} is no index of packed videos, but its name says so: move it away") from None
        if array.ndim != 4 or (lengths < 1).any() or (lengths > len(array)).any() or lengths.sum() != len(array) \
                or starts.tolist() != (np.cumsum(lengths) - lengths).tolist():
            raise FVDError(f"{index_path} describes {lengths.sum()} frames, but {path} holds {array.shape}; pack again")
    else:
        count, length = array.shape[:2] if array.ndim == 5 else (1, len(array))
        starts, lengths, splits = np.arange(count) * length, np.full(count, length), np.full(count, "train")
    return path, array.reshape(-1, *array.shape[-3:]), starts, lengths, splits


def pack_folder(folder, size):
    if size is None:
        raise FVDError(f"{folder} is a folder: give --size, the height and width to compare at")
    try:
        import data
    except ImportError as error:
        raise FVDError(f"{folder} is a folder, which needs data.py and its packages beside fvd.py ({error}); or give a "
                       ".npy file of uint8 (n, frames, h, w, 3)") from None
    try:
        return data.open_videos(folder, 1, size, "all").path
    except data.DataError as error:
        raise FVDError(str(error)) from None


def cut(videos, flag, frames, stride=1, window="first", split="all", num=None, seed=0, in_order=False):
    """One clip of each of `num` videos (none: all) of those from `read_videos` -> Clips. Raises FVDError.

    window: "first", or "random" by seed. Fewer than all: a random choice by seed, or the first ones if in_order.
    """
    path, pixels, starts, lengths, splits = videos
    span = (frames - 1) * stride + 1
    in_split = np.flatnonzero((splits == split) | (split == "all"))
    usable = in_split[lengths[in_split] >= span]
    if len(usable) < max(2, num or 0):
        raise FVDError(f"--{flag} {path}: {len(usable)} of {len(in_split)} videos (split {split}) have the {span} "
                       f"frames of --frames {frames} --stride {stride} (the longest has "
                       f"{max(lengths[in_split], default=0)}); expected {max(2, num or 0)} or more: add videos, or "
                       f"give another --num-{flag}, --frames, --stride or --split")
    rng = np.random.default_rng(seed)
    clip_starts = starts[usable] + (rng.integers(0, lengths[usable] - span + 1) if window == "random" else 0)
    if not in_order:
        clip_starts = clip_starts[np.sort(rng.permutation(len(usable))[:num])]
    clip_starts = clip_starts[:num]
    choice = "all" if len(clip_starts) == len(usable) else "the first" if in_order else "random by seed"
    about = {"file": str(path.resolve()), "bytes": path.stat().st_size, "modified_ns": path.stat().st_mtime_ns,
             "split": split, "videos": len(clip_starts), "choice": choice, "videos_in_split": len(in_split),
             "too_short": len(in_split) - len(usable), "frames": frames, "stride": stride, "window": window,
             "seed": seed, "resolution": list(pixels.shape[1:3]),
             "clips_sha256": hashlib.sha256(clip_starts.astype("<i8").tobytes()).hexdigest()}
    return Clips(pixels, clip_starts, frames, stride, about)


# ---------------------------------------------------------------------------------------- features, shared and resumed


def features_of(net, clips, settings, cache, name):
    """Features of clips, computed by all processes together, or read as far as the cache has them.

    settings: with clips.about all that shapes the features; both together name their file. The processes take batches
    in turn. A batch is always computed whole, so that neither their number nor a stop in the middle changes a digit.
    -> (features (n, 400), their Statistics)
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    about = {"clips": clips.about, **settings}
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:20]
    file, parts = cache / f"{key}.npy", cache / f".{key}.parts"
    n, size = len(clips.starts), settings["batch_size"]
    batches = [range(first, min(first + size, n)) for first in range(0, n, size)]
    part_of = {batch: parts / f"{batch.start:08d}.npy" for batch in batches}
    features = read_features(file, n)
    agree(f"{key} {features is None}")
    if features is None:
        missing = [batch for batch in batches if read_features(part_of[batch], len(batch)) is None]
        barrier()  # nobody writes a part while another one still looks
        start, done, total = time.perf_counter(), 0, sum(map(len, missing))
        for batch in missing[rank::world_size]:
            values = i3d_features(net, clips[batch.start:batch.stop], settings["resize"], settings["range"], size)
            write_features(part_of[batch], values.numpy())
            done += len(batch)
            if rank == 0:  # speaks for all: they go at about the same pace
                progress(name, min(done * world_size, total), total, start, "videos")
        barrier()
        seconds = time.perf_counter() - start
        found = [read_features(part, len(batch)) for batch, part in part_of.items()]
        if any(part is None for part in found):
            raise FVDError(f"{parts} lacks features that were written there; expected a --cache that all processes "
                           "share, and one run at a time")
        features = np.concatenate(found)
        barrier()
        if rank == 0:
            write_features(file, features)
            replace_with(file.with_suffix(".json"), lambda path: path.write_text(json.dumps(about, indent=1)))
            shutil.rmtree(parts, ignore_errors=True)
            print(f"{name}: {total} clips of {clips.frames} frames in {seconds:.1f} s, {total / seconds:.3g} videos/s, "
                  f"peak memory {peak_memory() / 1e6:.0f} MB" + (f"; {n - total} were there" if total < n else ""))
    statistics = Statistics()
    for batch in batches[rank::world_size]:
        statistics.update(features[batch.start:batch.stop])
    return features, statistics.gather()


def read_features(path, n):
    """The features in a file, or None if it is not there, or damaged."""
    try:
        features = np.array(np.lib.format.open_memmap(path, mode="r"))
    except Exception:  # as in `read_videos`
        return None
    right = features.shape == (n, CLASSES) and features.dtype == np.float32 and np.isfinite(features).all()
    return features if right else None


def write_features(path, features):
    def write(temporary):
        with open(temporary, "wb") as file:
            np.save(file, features)

    path.parent.mkdir(parents=True, exist_ok=True)
    replace_with(path, write)


def replace_with(path, write):
    """Call write(temporary path), then give the file its name: what stands at `path` is always whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def agree(key):
    """Raises FVDError unless all processes have the same key."""
    if dist.is_initialized():
        keys = [None] * dist.get_world_size()
        dist.all_gather_object(keys, key)
        if len(set(keys)) > 1:
            raise FVDError("the processes read different files; expected files that no longer change, and a --cache "
                           "that all machines share")


def first_process_first(action):
    """action() on the first process, which packs or fetches what the others then find; its error is everyone's."""
    if not dist.is_initialized():
        return action()
    problem, result = [None], None
    if dist.get_rank() == 0:
        try:
            result = action()
        except (FVDError, OSError) as error:
            problem = [str(error)]
    dist.broadcast_object_list(problem)
    if problem[0]:
        raise FVDError(problem[0])
    return result if dist.get_rank() == 0 else action()


def progress(name, done, total, start, unit):
    """A line that is written over and over, where somebody can watch it."""
    if sys.stderr.isatty():
        rate = done / (time.perf_counter() - start)
        print(f"\r{name}: {done:,} of {total:,} {unit}, {rate:,.3g} {unit}/s ", end="\n" if done >= total else "",
              file=sys.stderr, flush=True)


def peak_memory():
    """In bytes: of the allocator on CUDA, of the process elsewhere."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------------------------------- the result


def distance(a, b):
    return frechet_distance(a.mean, a.cov, b.mean, b.cov)


def summary(distances):
    return {"mean": float(np.mean(distances)), "std": float(np.std(distances, ddof=min(1, len(distances) - 1))),
            "repeats": len(distances)}


def floor(real, repeats, seed):
    """FVD between two disjoint halves of the real features (n >= 4, 400), for several ways of halving -> dict."""
    rng, half = np.random.default_rng([seed, 1]), len(real) // 2
    distances = []
    for _ in range(repeats):
        order = rng.permutation(len(real))
        distances.append(distance(Statistics().update(real[order[:half]]), Statistics().update(real[order[-half:]])))
    return {**summary(distances), "videos_in_each_half": half}


def resampled(real, fake, repeats, seed):
    """FVD of resamples, with replacement, of the generated features (n, 400) against Statistics `real` -> dict."""
    rng = np.random.default_rng([seed, 2])
    return summary([distance(real, Statistics().update(fake[rng.integers(0, len(fake), len(fake))]))
                    for _ in range(repeats)])


def black_against_white(net, frames, settings, cache):
    """FVD between all-black and all-white videos with this network; the covariances are 0."""
    pixels = np.zeros((2 * frames, 8, 8, 3), np.uint8)
    pixels[frames:] = 255
    clips = Clips(pixels, np.array([0, frames]), frames, 1, {"black_and_white": frames})
    settings = {**settings, "resize": "tf1", "range": "-11", "batch_size": 1}
    (black, white), _ = features_of(net, clips, settings, cache, "black and white")
    return float(((black.astype(np.float64) - white) ** 2).sum())


def notes_about(args, protocol, real, fake, black_white):
    """What to know before comparing the number with another -> (lines, whether it compares with published FVD)."""
    reasons = []
    if abs(black_white - BLACK_AGAINST_WHITE[16]) > 1:
        reasons.append("these are not the weights of the metric (but rgb_imagenet.pt, random ones, ...): black against "
                       f"white videos give {black_white:.2f}, not {BLACK_AGAINST_WHITE[16]}")
    if args.range == "01":
        reasons.append("--range 01 is what the authors' released evaluation feeds to I3D on UCF101, not the metric")
    if args.resize == "half-pixel":
        reasons.append("--resize half-pixel is that of PyTorch ports, not the metric")
    notes = [f"not comparable with published FVD: {reason}" for reason in reasons]
    wanted = {**PROTOCOLS[protocol], "stride": 1}
    wanted["num_real"] = wanted["num_real"] or PUBLISHED_REAL.get(protocol)
    used = {"split": args.split, "window": args.window, "num_real": len(real.starts), "num_fake": len(fake.starts),
            "stride": args.stride}
    if protocol:
        notes += [f"differs from --protocol {protocol}: {name} {used[name]}, not {value}"
                  for name, value in wanted.items() if used[name] != value]
    for name, clips in (("real", real), ("generated", fake)):
        if len(clips.starts) <= CLASSES:
            notes.append(f"only {len(clips.starts)} {name} videos: their covariance is singular, FVD biased upwards: "
                         "compare at the same numbers of videos only")
        if clips.about["too_short"]:
            notes.append(f"{clips.about['too_short']} {name} videos are too short and left out")
    if real.about["resolution"] != fake.about["resolution"]:
        notes.append(f"real frames are {real.about['resolution']}, generated ones {fake.about['resolution']}: the "
                     "difference in sharpness counts")
    return notes, not reasons


def download(url, path):
    """Fetch I3D weights to `path` unless they are there. Raises FVDError; whatever happens, no half file stays."""
    def write(temporary):
        with urllib.request.urlopen(url, timeout=60) as response, open(temporary, "wb") as file:
            total, done, start = int(response.headers.get("Content-Length") or 0), 0, time.perf_counter()
            while block := response.read(2 ** 20):
                file.write(block)
                done += len(block)
                progress(path.name, done, max(total, done), start, "bytes")
        if done < total:
            raise FVDError(f"{url}: the connection ended after {done:,} of {total:,} bytes; try again")
        content = temporary.read_bytes()
        if content.lstrip()[:1] == b"<" or content.startswith(b"version https://git-lfs"):
            raise FVDError(f"{url} answered with a page, not the file; fetch it with a browser and give its path")
        parse_i3d(content, url)

    if not path.exists():
        print(f"fetching {url} into {path}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            replace_with(path, write)
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            raise FVDError(f"{url} cannot be fetched ({error}); fetch it elsewhere and give its path") from None
    content = path.read_bytes()
    print(f"{path}: {len(content):,} bytes, SHA-256 {hashlib.sha256(content).hexdigest()}")


# ---------------------------------------------------------------------------------------- the command


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def whole_number(text):
    if not text.isdigit() or int(text) >= 2 ** 31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on, or too large")
    return int(text)


def positive_int(text):
    if whole_number(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def parse_args():
    parser = Parser(prog="fvd.py", description="Fréchet Video Distance between real and generated videos.")
    parser.add_argument("--real", type=Path, help=".npy of uint8 (n, frames, h, w, 3), packed file, folder of videos")
    parser.add_argument("--fake", type=Path, help="generated videos: the same, such as the .npy that sample.py writes")
    parser.add_argument("--i3d", help="i3d_pretrained_400.pt, or the word download")
    parser.add_argument("--i3d-torchscript", type=Path, help="StyleGAN-V's i3d_torchscript.pt; it runs code")
    parser.add_argument("--check", action="store_true", help="only compute the published constants with these weights")
    group = parser.add_argument_group("which clips")
    group.add_argument("--protocol", choices=("paper", "2048"), help="paper: 10,000 generated against all real videos "
                       "of UCF101 (16 frames), or 1,000 against those of MineRL (any other); 2048: as many of each")
    group.add_argument("--frames", type=positive_int, help="frames per clip; none: those of the generated videos")
    group.add_argument("--stride", type=positive_int, default=1, help="take every n-th frame of the real videos (1)")
    group.add_argument("--window", choices=("first", "random"), help="where clips are cut from real videos (first)")
    group.add_argument("--split", choices=("train", "test", "all"), help="real videos of a packed file (all)")
    group.add_argument("--num-real", type=positive_int, help="real videos, chosen by seed; none: all")
    group.add_argument("--num-fake", type=positive_int, help="generated videos, the first ones; none: all")
    group.add_argument("--seed", type=whole_number, default=0, help="of windows, choices, halves and resamples (0)")
    group.add_argument("--size", type=positive_int, help="height and width at which a folder of videos is read")
    group = parser.add_argument_group("how")
    group.add_argument("--resize", choices=("tf1", "half-pixel"), default="tf1",
                       help="to 224x224: as the metric was defined (tf1), or as PyTorch ports do")
    group.add_argument("--range", choices=("-11", "01"), default="-11",
                       help="what 0..255 is scaled to; 01 as the authors' released evaluation on UCF101")
    group.add_argument("--repeats", type=positive_int, default=10, help="resamples and halvings (10)")
    group.add_argument("--batch-size", type=positive_int, help="clips at once; none: 128 frames' worth")
    group.add_argument("--device", help="cpu, cuda, cuda:1; none: cuda if there is one")
    group.add_argument("--cache", type=Path, help="folder for features and weights; none: ~/.cache/fvd")
    group.add_argument("--out", type=Path, help="result file; none: .fvd.json beside the generated videos")
    args = parser.parse_args()
    if args.i3d and args.i3d_torchscript:
        parser.error(f"--i3d {args.i3d} and --i3d-torchscript {args.i3d_torchscript}: expected one of them")
    if not args.i3d and not args.i3d_torchscript:
        parser.error(f"no I3D weights: get i3d_pretrained_400.pt from {I3D_URL} and give --i3d PATH, or --i3d download")
    if not args.check and not (args.real and args.fake):
        parser.error("expected --real and --fake, or --check")
    return args


def choose_device(name):
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if not re.fullmatch(r"cpu|cuda:\d+", name):
        raise FVDError(f"--device {name}: expected cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda":
        if device.index >= torch.cuda.device_count():
            raise FVDError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices here")
        torch.cuda.set_device(device)
    return device


def open_network(args, cache):
    """-> (network, name of its file, what it contributes to the settings)."""
    path, parse = (args.i3d_torchscript, parse_torchscript) if args.i3d_torchscript else (Path(args.i3d), parse_i3d)
    if args.i3d == "download":
        path = cache / "i3d_pretrained_400.pt"
        download(I3D_URL, path)
    content = read_bytes(path)
    return parse(content, path), path.name, {"i3d_sha256": hashlib.sha256(content).hexdigest(),
                                             "network": "native" if parse is parse_i3d else "torchscript"}


def check(net, settings, cache, rank):
    """Compute the published constants -> exit status, 0 if they come out."""
    values = {frames: black_against_white(net, frames, settings, cache) for frames in BLACK_AGAINST_WHITE}
    right = all(abs(values[frames] - published) <= 1 for frames, published in BLACK_AGAINST_WHITE.items())
    if rank == 0:
        for frames, published in BLACK_AGAINST_WHITE.items():
            print(f"black against white videos, {frames} frames: {values[frames]:.2f}, published {published}")
        print("this file with this network is the standard metric" if right else
              "this file with this network is NOT the standard metric: its numbers compare with no published FVD")
    return 0 if right else 1


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def main():
    args = parse_args()
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(args.device)
    cache = args.cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fvd"
    if world_size > 1:
        # Gloo on GPUs too: only float64 statistics go between processes. Hours, since one may pack while others wait.
        dist.init_process_group("gloo", timeout=datetime.timedelta(hours=24))
    net, i3d_file, settings = first_process_first(lambda: open_network(args, cache))
    net.to(device)
    settings |= {"device": device.type, "resize": args.resize, "range": args.range}
    if args.check:
        return check(net, settings, cache, rank)

    # ---- everything that can be wrong with files and flags shows here, before any features
    fake = first_process_first(lambda: read_videos(args.fake, args.size))
    real = first_process_first(lambda: read_videos(args.real, args.size))
    lengths = fake[3]
    if args.frames is None and (lengths != lengths[0]).any():
        raise FVDError(f"--fake {args.fake} holds videos of {lengths.min()} to {lengths.max()} frames; give --frames")
    frames = args.frames or int(lengths[0])
    check_frames(frames)
    protocol = args.protocol
    if protocol == "paper":
        protocol = "paper, UCF101" if frames == 16 else "paper, MineRL"
    for name, value in PROTOCOLS[protocol].items():  # an explicit flag wins
        if getattr(args, name) is None:
            setattr(args, name, value)
    real = cut(real, "real", frames, args.stride, args.window, args.split, args.num_real, args.seed)
    fake = cut(fake, "fake", frames, num=args.num_fake, in_order=True)
    fake_path = args.fake.resolve()
    # sample.py writes there what the videos were drawn from: checkpoint, step, weights, sampler
    fake.about["sampled_from"] = read_json(fake_path.with_name(fake_path.name + ".json"))
    settings["batch_size"] = args.batch_size or max(1, 128 // frames)
    request = {"protocol": protocol, "real": real.about, "fake": fake.about, "i3d_file": i3d_file, **settings,
               "repeats": args.repeats, "seed": args.seed}
    out = args.out or fake_path.with_suffix(".fvd.json")
    previous = read_json(out)
    if out.exists() and not (isinstance(previous, dict) and previous.get("request") == request):
        raise FVDError(f"{out} holds a result of other files or flags; move it away, or give another --out")
    out.parent.mkdir(parents=True, exist_ok=True)

    # ---- features
    black_white = black_against_white(net, 16, settings, cache)
    notes, comparable = notes_about(args, protocol, real, fake, black_white)
    if rank == 0:
        print(*notes, sep="\n", end="\n" if notes else "")
        print(f"{len(fake.starts):,} generated against {len(real.starts):,} real clips of {frames} frames, "
              f"{world_size} x {device.type}, batches of {settings['batch_size']}")
    real_features, real_statistics = features_of(net, real, settings, cache, "real")
    fake_features, fake_statistics = features_of(net, fake, settings, cache, "generated")
    if rank:
        return 0

    # ---- distances
    value = distance(real_statistics, fake_statistics)
    spread = resampled(real_statistics, fake_features, args.repeats, args.seed)
    halves = floor(real_features, args.repeats, args.seed) if len(real_features) >= 4 else None
    result = {"fvd": value, "resampled": spread, "floor": halves, "comparable_with_published_fvd": comparable,
              "black_against_white_16_frames": black_white, "notes": notes, "request": request}
    replace_with(out, lambda temporary: temporary.write_text(json.dumps(result, indent=1)))
    print(f"FVD {value:.3f}" + ("" if comparable else "  (not comparable with published FVD: see above)"))
    print(f"  {args.repeats} resamples of the generated videos: {spread['mean']:.3f} ± {spread['std']:.3f}")
    if halves:
        half = halves["videos_in_each_half"]
        print(f"  floor, {half:,} real videos against {half:,} others: {halves['mean']:.3f} ± {halves['std']:.3f}")
    print(f"  real: {args.split} split, {args.window} windows, stride {args.stride}, seed {args.seed}, frames of "
          f"{'x'.join(map(str, real.about['resolution']))}; resize {args.resize}, range {args.range}\n"
          f"  {i3d_file}, SHA-256 {settings['i3d_sha256']}\nwrote {out.absolute()}")
    return 0


def run(command):
    """Run the command: what a person did wrong is one line and a non-zero exit, not a traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold bytes that are no characters
    try:
        status = command()
        if dist.is_initialized():  # not after an error: it would wait for the other processes
            dist.destroy_process_group()
        sys.exit(status)
    except KeyboardInterrupt:
        message = "interrupted; give the same command again to go on"
    except torch.OutOfMemoryError as error:
        message = f"out of GPU memory ({str(error).split('. ')[0]}); try a smaller --batch-size"
    except OSError as error:
        message = str(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        message = "out of memory; try a smaller --batch-size"
    except FVDError as error:
        if int(os.environ.get("LOCAL_RANK", 0)):  # the first process of each machine says it for all
            sys.exit(1)
        message = str(error)
    sys.exit("fvd.py: " + " ".join(message.splitlines()))  # names of files may have several


if __name__ == "__main__":
    run(main)
