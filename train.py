"""Train a video diffusion model.

    python train.py --preset tiny                                         # embedded mazes, minutes on a laptop CPU
    torchrun --nproc-per-node 8 train.py --temporal ssm --frames 400      # the paper's 400-frame column, on mazes
    torchrun --nproc-per-node 8 train.py --preset minerl-64 --data minerl.npy --temporal attention
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py --frames 200
    python train.py --preset tiny --classes                               # class-conditional: mazes by wall colour
    python train.py --preset minerl-400 --dry-run                         # what would be trained

--out DIR (default out/PRESET-TEMPORAL) gets config.json, log.jsonl, samples/, ckpt.pt (ckpt_previous.pt is the one before)
and, at the end, loss.png. Stop it at any time; the same command goes on from the last checkpoint, exactly. Without
--preset, the column of the paper's Table 5 is chosen by --frames and --size. An explicit flag always wins.
"""
import argparse
import contextlib
import dataclasses
import datetime
import errno
import fcntl
import functools
import json
import math
import os
import re
import resource
import signal
import sys
import textwrap
import time
import weakref
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import fvd
from data import DataError, MazeVideos, batches, class_names, open_videos, to_float
from diffusion import PREDICTIONS, Diffusion, label_dropped, training_noise
from model import ATTENTION_IMPLS, SSMS, TEMPORAL_LAYERS, UNet3D, UNetConfig, count_parameters
from s4d import kernels_once
from sample import (CheckpointError, Parser, autocast, choose_device, draw, join_processes, load_checkpoint,
                    non_negative_int, positive_int, replace_with, run, save_gif)

# Table 5, a row per column; the settings that all of them share are the flags' defaults.
PRESETS = {
    "ucf101-32": dict(split="all", frames=16, size=32, diffusion_steps=256, lr=3e-4, batch_size=64, steps=92_000),
    "ucf101-64": dict(split="all", frames=16, size=64, diffusion_steps=1000, lr=1e-4, batch_size=64, steps=106_000),
    "minerl-64": dict(split="train", frames=64, size=32, diffusion_steps=256, lr=3e-4, batch_size=8, steps=174_000),
    "minerl-200": dict(split="train", frames=200, size=32, diffusion_steps=256, lr=3e-4, batch_size=8, steps=255_000),
    "minerl-400": dict(split="train", frames=400, size=32, diffusion_steps=256, lr=5e-5, batch_size=8, steps=246_000),
    # the later edition; heads and time_dim of None: base_channels / 8 and 32 x base_channels
    **{name: dict(split="train", frames=256, size=32, diffusion_steps=256, lr=1e-4, batch_size=8, steps=100_000,
                  base_channels=32, heads=None, time_dim=None, ema_decay=0.9999)
       for name in ("minerl-256", "gqn-mazes-256", "carla-256")},
    # not the paper's: the quick start, sized for a laptop CPU
    "tiny": dict(split="train", frames=16, size=16, diffusion_steps=256, lr=1e-3, batch_size=8, steps=560,
                 base_channels=24, channel_mults=(1, 2, 4), time_dim=128, heads=2, head_dim=32, state_size=64,
                 mlp_dim=64, ema_start=100, ema_every=5, ema_decay=0.9, log_every=25, eval_every=50, save_every=50),
}

# The flags that each temporal layer takes, of those that not all of them do.
TAKES = {"ssm": ("state_size", "mlp_dim", "mlp_layers", "mlp_position", "unidirectional", "skip"),
         "attention": ("head_dim", "attention_impl"),
         "linear-attention": ("head_dim",),
         "gss": ("state_size", "mlp_dim", "unidirectional"),
         "mamba": ("state_size", "mlp_dim", "unidirectional", "ssm"),
         "none": ()}

# What may be different when a run goes on: none of it shapes the network or the data.
MAY_CHANGE = {"preset", "steps", "log_every", "eval_every", "sample_every", "save_every", "lr", "workers", "precision",
              "compile", "grad_checkpoint", "grad_accum", "grad_clip", "tensorboard", "device", "eval_clips",
              "grid_samples", "attention_impl", "fvd_every", "fvd_videos", "i3d"}

LABEL_DROPOUT = 0.1  # share of the labels that training hides, so that the network learns to do without, too


class NotFinite(ValueError):
    """The loss or the gradient became NaN or infinite."""


# ---------------------------------------------------------------------------------------- flags


def positive_float(text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def fraction(text):
    value = positive_float(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 1")
    return value


def make_parser():
    parser = Parser(prog="train.py", description="Train a video diffusion model. Defaults: --preset ucf101-32.",
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, help="none: the paper's column for --frames and --size")

    group = parser.add_argument_group("data")
    group.add_argument("--data", default="maze", help="packed .npy file, folder of videos, or the embedded maze walks")
    group.add_argument("--split", choices=("train", "test", "all"), default="train", help="videos to train on")
    group.add_argument("--classes", action="store_const", const=True,
                       help="class-conditional, by the data's labels: class folders, the mazes' main wall colour")
    group.add_argument("--frames", type=positive_int, default=16, help="frames per clip")
    group.add_argument("--size", type=positive_int, default=32, help="height and width")
    group.add_argument("--workers", type=non_negative_int, default=2, help="data loader workers of each process")

    group = parser.add_argument_group("network")
    group.add_argument("--temporal", choices=TEMPORAL_LAYERS, default="ssm", help="temporal layer")
    group.add_argument("--base-channels", type=positive_int, default=64, help="width of the first level")
    group.add_argument("--channel-mults", type=positive_int, nargs="+", default=(1, 2, 4, 8), metavar="M",
                       help="width of each level, in base channels")
    group.add_argument("--time-dim", type=positive_int, default=1024, help="width of the time embedding")
    group.add_argument("--heads", type=positive_int, default=8, help="attention heads, spatial ones too")
    group.add_argument("--head-dim", type=positive_int, default=64, help="width of a temporal attention head")

    group.add_argument("--attention-impl", choices=ATTENTION_IMPLS, default="sdpa",
                       help="sdpa: fused attention, memory linear in the frames; math: the paper's, quadratic")

    group = parser.add_argument_group("temporal layers with SSMs")
    group.add_argument("--ssm", choices=SSMS, default="s4d", help="of --temporal mamba: the paper's, or selective")
    group.add_argument("--state-size", type=positive_int, help="N, the paper's SSM hidden dims; none: 512, of s6 16")
    group.add_argument("--mlp-dim", type=positive_int,
                       help="hidden width; none: 512, of gss 3 x channels, of mamba no MLP")
    group.add_argument("--mlp-layers", type=int, choices=(0, 1, 2), default=2, help="layers of the MLP (Table 3)")
    group.add_argument("--mlp-position", choices=("post", "pre"), default="post", help="MLP after or before the SSM")
    group.add_argument("--unidirectional", action="store_true", help="leave the backward SSM out (Table 3)")
    group.add_argument("--skip", choices=("input", "norm"), default="input", help="skip from X, or from LayerNorm(X)")

    group = parser.add_argument_group("diffusion")
    group.add_argument("--diffusion-steps", type=positive_int, default=256, help="T")
    group.add_argument("--prediction", choices=PREDICTIONS, default="eps", help="what the network predicts: noise, or v")
    group.add_argument("--loss", choices=("l2", "l1"), default="l2", help="of what the network predicts")

    group = parser.add_argument_group("optimisation")
    group.add_argument("--steps", type=positive_int, default=92_000, help="training steps in all")
    group.add_argument("--batch-size", type=positive_int, default=64, help="clips per step, over all processes")
    group.add_argument("--grad-accum", type=positive_int, default=1, help="micro-batches per step of each process")
    group.add_argument("--lr", type=positive_float, default=3e-4, help="learning rate of Adam, constant")
    group.add_argument("--grad-clip", type=positive_float, help="largest gradient norm; none: not clipped")
    group.add_argument("--ema-decay", type=fraction, default=0.995, help="decay of the EMA weights, per update")
    group.add_argument("--ema-every", type=positive_int, default=10, help="steps between EMA updates")
    group.add_argument("--ema-start", type=non_negative_int, default=2000, help="until this step the EMA is a copy")
    group.add_argument("--seed", type=non_negative_int, default=0, help="of first weights, clips, timesteps and noise")

    group = parser.add_argument_group("speed and memory")
    group.add_argument("--device", help="cpu, cuda, mps; none: the best there is")
    group.add_argument("--precision", choices=("auto", "bf16", "float32"), default="auto",
                       help="bf16 autocast or float32; auto: bf16 where the device computes in it")
    group.add_argument("--compile", action="store_true", help="torch.compile the network")
    group.add_argument("--grad-checkpoint", action="store_true", help="less memory: recompute blocks in backward")

    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, help="folder of the run; none: out/PRESET-TEMPORAL")
    group.add_argument("--log-every", type=positive_int, default=100, help="steps between log lines")
    group.add_argument("--eval-every", type=positive_int, default=1000, help="steps between held-out losses")
    group.add_argument("--sample-every", type=positive_int, default=10_000, help="steps between sample grids")
    group.add_argument("--save-every", type=positive_int, default=1000, help="steps between checkpoints")
    group.add_argument("--eval-clips", type=non_negative_int, default=16, help="clips of the held-out loss; 0: none")
    group.add_argument("--grid-samples", type=non_negative_int, default=9, help="videos in a sample grid; 0: none")
    group.add_argument("--fvd-every", type=non_negative_int, default=0, help="steps between FVDs of samples; 0: none")
    group.add_argument("--fvd-videos", type=positive_int, default=64, help="samples, and clips to compare them with")
    group.add_argument("--i3d", help="I3D weights for --fvd-every, i3d_pretrained_400.pt (see fvd.py)")
    group.add_argument("--tensorboard", action="store_true", help="log to TensorBoard too")
    group.add_argument("--dry-run", action="store_true", help="print what would be trained, and exit")
    return parser


def choose_preset(frames, size):
    """The column of Table 5 for a clip's shape; any other number of frames takes the nearest MineRL column."""
    if frames == 16:
        return "ucf101-64" if size == 64 else "ucf101-32"
    return min(("minerl-64", "minerl-200", "minerl-400"), key=lambda name: abs(PRESETS[name]["frames"] - frames))


def parse_args(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    preset = args.preset or choose_preset(args.frames, args.size)
    parser.set_defaults(**PRESETS[preset])  # an explicit flag wins over a default
    args = parser.parse_args(argv)
    unset = object()  # what the parser leaves as it is was not on the command line
    given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset)))
    explicit = {name for name, value in vars(given).items() if value is not unset}
    if "mlp_dim" not in explicit and args.temporal in ("gss", "mamba"):
        args.mlp_dim = None
    if "state_size" not in explicit and args.ssm == "s6":
        args.state_size = None
    refused = unused_flags(args, explicit)
    if refused:
        parser.error(refused)
    args.heads = args.heads or max(1, args.base_channels // 8)
    args.time_dim = args.time_dim or 32 * args.base_channels
    if args.classes:
        args.classes = class_names(args.data)  # from here on the names; None without --classes
        if not args.classes:
            raise ValueError(f"--classes: {args.data} has no labels; expected videos in class folders, or leave it out")
    config = unet_config(args)
    args.mlp_dim, args.state_size = config.mlp_dim, config.state_size
    args.preset = preset
    args.channel_mults = list(args.channel_mults)
    args.out = args.out or Path("out") / f"{preset}-{args.temporal}"
    return args


def unused_flags(args, explicit):
    """-> a line about a flag of the command line that the chosen temporal layer does not use, or None."""
    choice, taken = f"--temporal {args.temporal}", list(TAKES[args.temporal])
    if args.temporal == "ssm" and args.mlp_layers < 2:
        choice += f" --mlp-layers {args.mlp_layers}"
        taken.remove("mlp_dim")
        if args.mlp_layers == 0:
            taken.remove("mlp_position")
    unused = [name for names in TAKES.values() for name in names if name in explicit and name not in taken]
    if unused:
        flags = ["--" + name.replace("_", "-") for name in [unused[0], *taken]]
        return f"{flags[0]} does not go with {choice}, which takes {', '.join(flags[1:]) or 'no such flags'}"
    return None


def unet_config(args):
    return UNetConfig(temporal=args.temporal, base_channels=args.base_channels, channel_mults=tuple(args.channel_mults),
                      time_dim=args.time_dim, heads=args.heads, head_dim=args.head_dim,
                      attention_impl=args.attention_impl, state_size=args.state_size, mlp_dim=args.mlp_dim,
                      mlp_layers=args.mlp_layers, mlp_position=args.mlp_position,
                      bidirectional=not args.unidirectional, skip=args.skip, ssm=args.ssm,
                      classes=len(args.classes or []))


def check_args(args, world_size):
    """Raises ValueError for flags that do not go together."""
    if args.batch_size % (world_size * args.grad_accum):
        raise ValueError(f"--batch-size {args.batch_size} is not divisible by {world_size} processes x --grad-accum "
                         f"{args.grad_accum} = {world_size * args.grad_accum}; the batch size is the global one")
    factor = 2 ** (len(args.channel_mults) - 1)
    if args.size % factor:
        raise ValueError(f"--size {args.size} is not divisible by {factor}, as {len(args.channel_mults)} levels need")
    if args.base_channels % 8:
        raise ValueError(f"--base-channels {args.base_channels}: expected a multiple of 8, the groups of GroupNorm")
    if bool(args.fvd_every) != bool(args.i3d):
        raise ValueError(f"--fvd-every {args.fvd_every} --i3d {args.i3d}: expected both or neither; the weights: "
                         "python fvd.py --check --i3d download")
    if args.fvd_every:
        fvd.check_frames(args.frames)
        if args.fvd_videos < 2:
            raise ValueError(f"--fvd-videos {args.fvd_videos}: expected 2 or more")


# ---------------------------------------------------------------------------------------- checkpoints and logs


def save_checkpoint(out, step, config, net, ema, optimizer, interval):
    """Write everything that is needed to go on to out/ckpt.pt; the one before stays as ckpt_previous.pt.

    step: steps done. interval: the losses and gradient norms since the last log line, which will be averaged there.
    """
    ckpt = {"step": step, "config": config, "unet": dataclasses.asdict(net.config), "model": net.state_dict(),
            "ema": ema.state_dict(), "optimizer": optimizer.state_dict(), "interval": interval}
    path, temporary = out / "ckpt.pt", out / ".ckpt.pt.partial"
    try:
        with open(temporary, "wb") as file:
            torch.save(ckpt, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.replace(path, out / "ckpt_previous.pt")
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch wraps some errors of a full disk
        temporary.unlink(missing_ok=True)
        reason = isinstance(error, OSError) and error.strerror or "no space left?"
        raise OSError(f"step {step}: {path} cannot be written ({reason}); earlier checkpoints are untouched") from None


def take_folder(out):
    """Make the folder of a run, see that it is one, and lock it against a second training -> the lock file.

    Raises OSError or ValueError.
    """
    try:
        (out / "samples").mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, its children do not hold it after its death
    except BlockingIOError:
        raise ValueError(f"--out {out} is in use by another training; wait for it or choose another folder") from None
    except OSError as error:
        raise OSError(f"--out {out} cannot be used ({error.strerror}); choose another folder") from None
    config = out / "config.json"
    if config.exists():
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            if {"temporal", "frames"} <= set(json.loads(config.read_text(errors="replace"))):
                return lock
        raise ValueError(f"--out {out} has a config.json that is not a run's; choose another folder")
    if (out / "log.jsonl").exists():
        raise ValueError(f"--out {out} has a log.jsonl but no config.json; choose another folder")
    return lock


def load_newest(out):
    """-> (the checkpoint to go on from, or None for a new run; a line about a damaged one that was passed over)."""
    problems = []
    for path in (out / "ckpt.pt", out / "ckpt_previous.pt"):
        if path.exists():
            try:
                return load_checkpoint(path), "".join(f"{problem}; kept as ckpt_damaged.pt, going on from {path.name}"
                                                      for problem in problems)
            except CheckpointError as error:
                problems.append(str(error))
    if problems:
        raise CheckpointError(f"{problems[0]}; there is no other to go on from: move it away or choose another --out")
    return None, ""


def check_resume(config, saved, out):
    """-> lines about settings that changed since the checkpoint. Raises ValueError for those that must not change."""
    lines, refused = [], []
    for name, new in config.items():
        old = saved.get(name, make_parser().get_default(name))  # a checkpoint may be older than a flag
        if old == new:
            continue
        flag = "--" + name.replace("_", "-")
        if name == "classes":
            refused.append(f"{some_names(old)}, not {some_names(new)} (of the same --data)")
        elif name in MAY_CHANGE:
            lines.append(f"changed: {flag} {old} -> {new}")
        else:
            refused.append(f"{flag} {old}, not {new}")
    if refused:
        raise ValueError(f"{out} holds a run with {'; '.join(refused)}: give it as it was to go on, or another --out "
                         "for a new run")
    return lines


def append_lines(path, lines):
    """Append lines to a file, all of them or none, and empty the list. Raises OSError."""
    content = "".join(lines).encode()
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        if content and file.write(content) < len(content):  # the last bytes of a disk
            file.truncate(end)
            raise OSError(f"{path} cannot be written ({os.strerror(errno.ENOSPC)})")
        os.fsync(file.fileno())
    lines.clear()


def some_names(classes):
    return f"--classes ({len(classes)}: {textwrap.shorten(', '.join(classes), 60)})" if classes else "no --classes"


def trim_log(path, step):
    """Drop the lines of log.jsonl that were written after the checkpoint: those steps will be done again."""
    if path.exists():
        lines = []
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):  # the last line of a killed run may be cut off
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] <= step:
                    lines.append(line + "\n")
        replace_with(path, lambda temporary: temporary.write_text("".join(lines)))


def draw_curves(log_path, path):
    """Draw the losses in a log.jsonl, and the held-out loss in each quartile of t, against steps. Needs matplotlib."""
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in log_path.read_text().splitlines()]
    curves = {"training loss": [(record["step"], record["loss"]) for record in records if "loss" in record]}
    held_out = [record for record in records if "held_out_loss" in record]
    if held_out:
        curves["held-out loss"] = [(record["step"], record["held_out_loss"]) for record in held_out]
        for i in range(4):
            curves[f"held-out, quartile {i + 1} of t"] = [(record["step"], record["held_out_quartiles"][i])
                                                          for record in held_out]
    figure = Figure((8, 5), layout="constrained")
    panel = figure.subplots()
    for label, points in curves.items():
        panel.plot(*zip(*points), label=label, linewidth=1 if "quartile" in label else 2)
    panel.set(yscale="log", xlabel="step", ylabel="loss")
    panel.legend()
    replace_with(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def peak_memory(device):
    """In bytes: of the allocator on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------------------------------- what a step takes


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations in this context make and keep: `live` now, `peak` at most."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage not in self.known:
                self.known.add(storage)
                weakref.finalize(storage, self.release, storage.nbytes())
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
        return out

    def release(self, size):
        self.live -= size


def step_memory(args, world_size):
    """-> bytes that a training step takes in float32: parameters, Adam's two moments and the EMA, as large each, and
    what the forward and backward pass of a micro-batch keeps at its peak, gradients included, on tensors without data.
    """
    b = args.batch_size // world_size // args.grad_accum
    with torch.device("meta"):
        net = UNet3D(unet_config(args), args.grad_checkpoint)
        x, t = torch.empty(b, 3, args.frames, args.size, args.size), torch.empty(b, dtype=torch.long)
        with LiveMemory() as memory:
            (net(x, t) - x).square().mean().backward()
    return 4 * 4 * count_parameters(net) + memory.peak


def parts(net):
    """-> the numbers of parameters of the temporal layers, of the time embedding, and of all the rest."""
    counts = {"temporal": 0, "time": 0, "spatial": 0}
    for name, parameter in net.named_parameters():
        part = "temporal" if re.search("temporal|position_bias", name) else \
            "time" if re.search("time_mlp|to_scale_shift|class_embedding", name) else "spatial"
        counts[part] += parameter.numel()
    return counts


# ---------------------------------------------------------------------------------------- training


def label_indices(labels, classes, device):
    """Labels, names or None, -> (b,) int: what the network takes, len(classes) standing for no class."""
    numbers = {name: i for i, name in enumerate(classes)}
    return torch.tensor([numbers.get(label, len(classes)) for label in labels], device=device)


def training_labels(videos, args, step, indices, device):
    """-> the labels (b,) of a training step's clips, LABEL_DROPOUT of them hidden; None for a network without classes."""
    if not args.classes:
        return None
    return label_indices([None if label_dropped(LABEL_DROPOUT, args.seed, step, i) else videos.label(args.seed, step, i)
                          for i in indices], args.classes, device)


def sample_labels(args, indices):
    """-> labels for `draw`: sample i has class i mod n; None for a network without classes."""
    return [i % len(args.classes) for i in indices] if args.classes else None


@torch.no_grad()
def held_out_loss(net, diffusion, videos, args, device, rank, world_size):
    """The loss on fixed clips with fixed noise, one timestep in each quartile of t -> (4,) means per quartile.

    The same for every seed, world size and step, so that its curve is smooth where the training loss is noisy.
    """
    losses = torch.zeros(args.eval_clips, 4, device=device)
    with autocast(device, args.precision), kernels_once(net, args.frames):
        for i in range(rank, args.eval_clips, world_size):
            x_0 = to_float(torch.from_numpy(videos.clip(i))).to(device)                     # c f h w
            draws = [training_noise(x_0.shape, "held-out", quartile, [i], diffusion.T) for quartile in range(4)]
            t = torch.cat([(quartile * diffusion.T + t) // 4 for quartile, (t, _) in enumerate(draws)]).to(device)
            noise = torch.cat([noise for _, noise in draws]).to(device)                     # 4 c f h w
            labels = label_indices([videos.label(i)] * 4, args.classes, device) if args.classes else None
            losses[i] = diffusion.loss(functools.partial(net, labels=labels), x_0.expand_as(noise), t, noise, args.loss)
    if world_size > 1:
        dist.all_reduce(losses)
    return losses.mean(0)


def sample_grid(net, diffusion, args, path, rank, world_size):
    """Write the first samples side by side to `path`; the processes share the work."""
    videos = torch.zeros(args.grid_samples, args.frames, args.size, args.size, 3, dtype=torch.uint8,
                         device=diffusion.device)
    indices = range(rank, args.grid_samples, world_size)
    if indices:
        def progress(steps):
            return tqdm(steps, desc="sampling", leave=False, disable=True if rank else None)

        shape = (net.config.video_channels, args.frames, args.size, args.size)
        drawn = draw(net, diffusion, args.seed, indices, shape, args.precision, progress,
                     labels=sample_labels(args, indices))
        videos[list(indices)] = torch.from_numpy(drawn).to(videos.device)
    if world_size > 1:
        dist.all_reduce(videos)
    if rank == 0:
        try:
            save_gif(path, videos.cpu().numpy())
        except OSError as error:  # no reason to end a run
            tqdm.write(str(error), file=sys.stderr)


def sampled_fvd(net, i3d, diffusion, videos, args, rank, world_size):
    """FVD between the first samples and as many training clips; the processes share the work. Biased upwards, as they
    are few: it shows the trend, fvd.py the number."""
    real, fake = fvd.Statistics(), fvd.Statistics()
    share = args.batch_size // world_size
    mine = range(rank, args.fvd_videos, world_size)
    for first in tqdm(range(0, len(mine), share), desc="FVD", leave=False, disable=True if rank else None):
        indices = mine[first:first + share]
        shape = (net.config.video_channels, args.frames, args.size, args.size)
        drawn = draw(net, diffusion, args.seed, indices, shape, args.precision, labels=sample_labels(args, indices))
        fake.update(fvd.i3d_features(i3d, drawn))
        real.update(fvd.i3d_features(i3d, np.stack([videos.clip(i) for i in indices])))
    return fvd.distance(real.gather(), fake.gather())


def check_finite(pending, first_step, weights_norm, args):
    """pending: (n, 2) losses and gradient norms of the steps from first_step on, after which the weights have the norm
    weights_norm. Raises NotFinite."""
    for i, (loss, grad_norm) in enumerate(pending):
        weights = "" if math.isfinite(weights_norm) or i < len(pending) - 1 else f", norm of the weights {weights_norm}"
        if weights or not math.isfinite(loss + grad_norm):
            raise NotFinite(f"step {first_step + i}: loss {loss}, gradient norm {grad_norm}{weights} at --lr {args.lr} "
                            f"--precision {args.precision}; checkpoint and EMA are as before. Try a lower --lr, "
                            "--grad-clip 1, or --precision float32")


def wait_for_all(world_size):
    if world_size > 1:
        dist.all_reduce(torch.zeros(1))  # a CPU tensor: gloo, on GPU machines too


def open_data(args, rank, local_rank, world_size):
    """-> (training videos, held-out videos, a line about both)."""
    # A folder is packed by one process while the others wait; on further machines by one each, unless they share the
    # cache.
    for mine in [rank == 0, local_rank == 0, True] if world_size > 1 else [True]:
        if mine:
            videos = open_videos(args.data, args.frames, args.size, args.split)
        wait_for_all(world_size)
    about = "embedded maze walks"
    if not isinstance(videos, MazeVideos):
        about = (f"{args.data}: {videos.num_windows} clips of {args.frames} frames from {len(videos.videos)} videos, "
                 f"{videos.num_too_short} too short left out")
    if isinstance(videos, MazeVideos) or args.split == "train" and "test" in videos.splits:
        with contextlib.suppress(DataError):  # test videos may all be too short
            held_out = open_videos(args.data, args.frames, args.size, "test")
            return videos, held_out, f"{about}; held-out loss on the test split"
    return videos, videos, f"{about}; no videos are held out: the held-out loss is that of fixed training clips"


def describe(args, net, device, world_size):
    """The resolved configuration in a few lines."""
    b = args.batch_size // world_size // args.grad_accum
    counts = parts(net)
    flags = ", ".join(f"{name}={value}" for name, value in sorted(vars(args).items()) if name not in ("out", "dry_run"))
    with autocast(device, args.precision):
        precision = "bf16 autocast" if torch.is_autocast_enabled(device.type) else "float32"
    return "\n".join([
        f"preset {args.preset}: {flags}",
        f"{count_parameters(net):,} parameters, temporal layer {args.temporal}: {counts['temporal']:,} in temporal "
        f"layers, {counts['spatial']:,} in spatial ones, {counts['time']:,} in the time embedding",
        f"global batch {args.batch_size} = {world_size} processes x {args.grad_accum} micro-batches x {b} clips; each: "
        f"uint8 {(b, args.frames, args.size, args.size, 3)} -> x and noise {(b, 3, args.frames, args.size, args.size)} "
        f"in [-1, 1], t {(b,)}",
        f"{device.type}, {precision}; output in {args.out.absolute()}"])


def train(args):
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    check_args(args, world_size)
    device = choose_device(args.device)
    torch.manual_seed(args.seed)
    net = UNet3D(unet_config(args), args.grad_checkpoint)
    if rank == 0:
        print(describe(args, net, device, world_size))
    if args.dry_run:
        if rank == 0:
            gigabytes = step_memory(args, world_size) / 2**30
            print(f"a step takes about {gigabytes:.2f} GB in each process in float32, beside "
                  "PyTorch itself, the workspaces of its kernels and fragmentation; in bf16 autocast less")
        return
    if world_size > 1:
        # Gloo too on GPUs: whether to stop is agreed on without waiting for the device. Hours, since one process may
        # pack a large folder while the others wait; torchrun notices sooner than a timeout when one dies.
        join_processes("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", hours=6)

    i3d = fvd.load_i3d(args.i3d, device) if args.fvd_every else None

    # ---- everything that can be wrong with the data, the folder or the checkpoint shows here, before any training
    videos, held_out, about_data = open_data(args, rank, local_rank, world_size)
    config = {name: value for name, value in vars(args).items() if name not in ("out", "dry_run")}
    if args.data != "maze":
        config["data"] = str(Path(args.data).resolve())
    if rank == 0:
        lock = take_folder(args.out)  # noqa: F841, held until this process ends
    wait_for_all(world_size)
    ckpt, notice = load_newest(args.out)
    changes = check_resume(config, ckpt["config"], args.out) if ckpt else []
    first_step = ckpt["step"] if ckpt else 0
    if world_size > 1:
        steps = torch.tensor([first_step, -first_step])
        dist.all_reduce(steps, dist.ReduceOp.MAX)
        if steps[0] != -steps[1]:
            raise ValueError(f"--out {args.out} holds different checkpoints on different machines; expected a folder "
                             "that all of them share")
    log_path = args.out / "log.jsonl"
    if rank == 0:
        print("\n".join([about_data, *filter(None, [notice]), *changes]))
        if ckpt:
            print(f"going on from step {first_step} of {args.steps}")
        if notice:
            os.replace(args.out / "ckpt.pt", args.out / "ckpt_damaged.pt")
        replace_with(args.out / "config.json", lambda temporary: temporary.write_text(json.dumps(config, indent=1)))
        trim_log(log_path, first_step)

    # ---- network, EMA, optimiser
    diffusion = Diffusion(args.diffusion_steps, device, args.prediction)
    net.to(device)
    ema = UNet3D(net.config).to(device).requires_grad_(False).eval()
    ema.load_state_dict(net.state_dict())
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr, fused=device.type in ("cpu", "cuda"))
    interval = []
    if ckpt:
        try:
            net.load_state_dict(ckpt["model"])
            ema.load_state_dict(ckpt["ema"])
            # into tensors of the right shape: the fused kernels would read beyond the end of others
            state = {i: {name: torch.empty(shape).copy_(ckpt["optimizer"]["state"][i][name].view(shape))
                         for name, shape in (("step", ()), ("exp_avg", p.shape), ("exp_avg_sq", p.shape))}
                     for i, p in enumerate(net.parameters())}
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
            interval = [[float(loss), float(grad_norm)] for loss, grad_norm in ckpt["interval"]]
        except Exception as error:  # torch raises all sorts for what is not its own
            raise CheckpointError(f"the checkpoint in {args.out} does not fit this network "
                                  f"({' '.join(str(error).split())[:200]}); choose another --out") from None
        del ckpt, state

    def samples_due(step):
        return args.grid_samples and step > 0 and (step % args.sample_every == 0 or step == args.steps)

    def grid_path(step):
        return args.out / "samples" / f"step_{step:07d}.gif"

    if samples_due(first_step) and not grid_path(first_step).exists():  # the last run was stopped before it could
        sample_grid(ema, diffusion, args, grid_path(first_step), rank, world_size)

    def fvd_due(step):
        return args.fvd_every and step > 0 and (step % args.fvd_every == 0 or step == args.steps)

    log_lines = []                              # not yet in log.jsonl

    def log_fvd(step):
        value = sampled_fvd(ema, i3d, diffusion, videos, args, rank, world_size)
        if rank == 0:
            log_lines.append(json.dumps({"step": step, "fvd": value, "fvd_videos": args.fvd_videos}) + "\n")
            tqdm.write(f"step {step}/{args.steps}  FVD of {args.fvd_videos} samples {value:.2f}")

    logged = log_path.read_text() if log_path.exists() else ""
    if fvd_due(first_step) and f'{{"step": {first_step}, "fvd":' not in logged:  # likewise
        log_fvd(first_step)
        if rank == 0:
            append_lines(log_path, log_lines)
    if first_step >= args.steps:
        if rank == 0:
            print(f"nothing to do: {args.out} is at step {first_step}; raise --steps to train longer")
        return

    forward = net
    if args.compile:
        # DDP's own splitting of compiled graphs knows no checkpoints
        torch._dynamo.config.optimize_ddp = False
        forward = torch.compile(net, dynamic=False)
    if world_size > 1:
        forward = DistributedDataParallel(forward, device_ids=[device.index] if device.type == "cuda" else None,
                                          gradient_as_bucket_view=True)
    parameters, ema_parameters = list(net.parameters()), list(ema.parameters())
    tensorboard = None
    if args.tensorboard and rank == 0:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
        tensorboard = SummaryWriter(args.out / "tensorboard", purge_step=first_step)

    # ---- Ctrl-C and kill: the first finishes the step and saves, a second of the same kind exits at once
    stop_signals = set()

    def on_signal(number, frame):
        if number in stop_signals:
            sys.exit(1)
        stop_signals.add(number)
        if rank == 0:
            print("stopping after this step; again to stop at once", file=sys.stderr)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, on_signal)

    def stop_asked():
        if world_size == 1:
            return bool(stop_signals)
        asked = torch.tensor(len(stop_signals))
        dist.all_reduce(asked)
        return asked.item() > 0

    # ---- the loop: step counts the steps done
    share = args.batch_size // world_size
    indices = range(rank * share, (rank + 1) * share)
    loader = batches(videos, indices, args.seed, first_step, args.workers, pin_memory=device.type == "cuda")
    bar = tqdm(total=args.steps, initial=first_step, unit="step", disable=True if rank else None)
    pending = []                                # losses and gradient norms not yet looked at, on the device
    unsaved = False                             # whether a checkpoint is due that could not be written yet
    timer, timed_steps = time.perf_counter(), 0
    for step, batch in enumerate(loader, start=first_step + 1):
        x_0 = to_float(batch.to(device, non_blocking=True))                                 # share c f h w
        t, noise = training_noise(x_0.shape[1:], args.seed, step - 1, indices, diffusion.T, device)
        labels = training_labels(videos, args, step - 1, indices, device)
        loss_sum = torch.zeros((), device=device)
        micro_batches = list(zip(*(tensor.chunk(args.grad_accum) for tensor in (x_0, t, noise))))
        micro_labels = labels.chunk(args.grad_accum) if args.classes else [None] * args.grad_accum
        for micro_batch, labels in zip(micro_batches, micro_labels):
            last = micro_batch is micro_batches[-1]
            with contextlib.nullcontext() if last or world_size == 1 else forward.no_sync():
                with autocast(device, args.precision):
                    denoiser = functools.partial(forward, labels=labels)
                    loss = diffusion.loss(denoiser, *micro_batch, kind=args.loss).mean() / args.grad_accum
                loss.backward()
            loss_sum += loss.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        pending.append(torch.stack([loss_sum, grad_norm]))
        timed_steps += 1
        bar.update()

        end, stop = step == args.steps, stop_asked()
        log_due = step % args.log_every == 0 or end
        eval_due = args.eval_clips and (step % args.eval_every == 0 or end)
        save_due = step % args.save_every == 0 or end or stop
        ema_due = step % args.ema_every == 0
        if not (log_due or eval_due or save_due or samples_due(step) or fvd_due(step) or ema_due):
            continue

        # the only places where the host waits for the device
        values = torch.stack(pending)
        if world_size > 1:
            dist.all_reduce(values)  # the gradient norm is the same on all of them
            values /= world_size
        weights_norm = torch.stack(torch._foreach_norm(parameters)).norm().item()
        check_finite(values.tolist(), step - len(pending) + 1, weights_norm, args)
        interval += values.tolist()
        pending = []
        next_update = math.ceil(step / args.ema_every) * args.ema_every
        if next_update < args.ema_start:  # a copy then, so a copy now, for whatever is due, changes nothing later
            torch._foreach_copy_(ema_parameters, parameters)
        elif ema_due:
            torch._foreach_lerp_(ema_parameters, parameters, 1 - args.ema_decay)

        record = None
        if log_due or eval_due:
            seconds = (time.perf_counter() - timer) / timed_steps
            record = {"step": step, "loss": sum(loss for loss, _ in interval) / len(interval),
                      "grad_norm": sum(norm for _, norm in interval) / len(interval), "lr": args.lr,
                      "seconds_per_step": seconds, "clips_per_second": args.batch_size / seconds,
                      "peak_memory_mb": peak_memory(device) / 2**20}
            interval = []
        if eval_due:
            quartiles = held_out_loss(ema, diffusion, held_out, args, device, rank, world_size).tolist()
            record |= {"held_out_loss": sum(quartiles) / 4, "held_out_quartiles": quartiles}
        if record and rank == 0:
            log_lines.append(json.dumps(record) + "\n")
            eta = datetime.timedelta(seconds=round((args.steps - step) * record["seconds_per_step"]))
            held_out_text = f"  held-out {record['held_out_loss']:.4f}" if eval_due else ""
            bar.write(f"step {step}/{args.steps}  loss {record['loss']:.4f}{held_out_text}  grad norm "
                      f"{record['grad_norm']:.3f}  {record['seconds_per_step']:.3f} s/step  "
                      f"{record['clips_per_second']:.1f} clips/s  {record['peak_memory_mb']:.0f} MB  ETA {eta}")
            if tensorboard:
                for name in ("loss", "grad_norm", "seconds_per_step", "held_out_loss"):
                    if name in record:
                        tensorboard.add_scalar(name, record[name], step)
        unsaved = unsaved or save_due
        if rank == 0 and (log_due or eval_due or save_due):
            # A full disk does not end a run, whose weights would be lost, unless this is its end anyway.
            try:
                append_lines(log_path, log_lines)
                if unsaved:
                    save_checkpoint(args.out, step, config, net, ema, optimizer, interval)
                    unsaved = False
            except OSError as error:
                if end or stop:
                    raise
                bar.write(f"{error}; training goes on and tries again", file=sys.stderr)
        if samples_due(step) and not stop:
            sample_grid(ema, diffusion, args, grid_path(step), rank, world_size)
        if fvd_due(step) and not stop:
            log_fvd(step)
            if end and rank == 0:
                append_lines(log_path, log_lines)
        if record or samples_due(step) or fvd_due(step):
            timer, timed_steps = time.perf_counter(), 0
        if end or stop:
            break

    bar.close()
    if rank == 0:
        try:
            draw_curves(log_path, args.out / "loss.png")
        except ImportError:
            print("no loss.png: pip install matplotlib")
        except Exception as error:  # the run is saved; it must not end in an error for want of a picture
            print(f"no loss.png ({type(error).__name__}: {error})")
        if step < args.steps:
            print(f"stopped at step {step}, saved in {args.out}; the same command goes on from there")
        else:
            print(f"done; pictures in {args.out / 'samples'}; python sample.py --ckpt {args.out / 'ckpt.pt'} for more")
    if tensorboard:
        tensorboard.close()


def main():
    train(parse_args())
    if dist.is_initialized():  # not after an error: it would wait for the other processes
        dist.destroy_process_group()


if __name__ == "__main__":
    run("train.py", main)
