"""Memory: what a training or denoising step takes, what is free, and the micro-batches that follow."""
import contextlib
import dataclasses
import functools
import math
import os
import re
import resource
import sys
import weakref
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import s4d
from command import UserError, autocast, choose_precision, gather, processes
from model import UNet3D, UNetConfig, count_parameters


def fit_memory(args, config, device):
    """Choose the fewest micro-batches whose step fits in memory and, only if single clips do not fit without it,
    recomputation: sets args.grad_accum and args.grad_checkpoint -> a line about it. A given --grad-accum stays; that of
    a resumed run is tried first, as others change the last bits of sums. Raises UserError."""
    world_size, precision, fixed = processes()[2], choose_precision(device, args.precision), "grad_accum" in args.given
    share, limit, about = args.batch_size // world_size, 0.9 * free_memory(device), ""
    if args.memory_gb:  # on a CPU it is that of the process, which has something already
        limit = max(0, args.memory_gb * 2**30 - (0 if device.type == "cuda" else peak_memory(device)))
    may_recompute = args.grad_checkpoint or "grad_checkpoint" not in args.given
    choices = [(parts, recompute) for recompute in sorted({bool(args.grad_checkpoint), bool(may_recompute)})
               for parts in range(1, share + 1) if share % parts == 0]
    if args.grad_accum and share % args.grad_accum == 0:
        choices.insert(0, (args.grad_accum, bool(args.grad_checkpoint)))
    for parts, recompute in choices:
        if not fixed or args.dry_run:
            takes = step_memory(config, (share // parts, config.video_channels, args.frames, args.size, args.size),
                                device, precision, recompute)
            # the gradients of the micro-batches before are there, and DDP has a copy of them
            takes += ((parts > 1) + (world_size > 1)) * 4 * number_of_parameters(config)
            about = f"{takes / 2**30:.1f} GB of {limit / 2**30:.1f}"
        if fixed or all(gather(takes <= limit)):  # on every process, or on none
            break
    else:
        raise UserError(f"a training step takes {about} that are free, even with single clips"
                        f"{' and recomputation' if recompute else ''}; try a smaller --frames or --base-channels")
    args.grad_accum, args.grad_checkpoint = parts, recompute
    return (f"global batch {args.batch_size} = {world_size} processes x {parts} micro-batches of {share // parts} clips"
            f"{', recomputing blocks' if recompute else ''}; {device.type}, {precision}"
            f"{about and '; each process takes about ' + about}")


def step_memory(config, clip_shape, device, precision="float32", grad_checkpoint=False):
    """-> bytes that a training step takes for clips of `clip_shape` (b, c, f, h, w): parameters, Adam's two moments and
    the EMA, as large each, and the most that the forward and backward pass holds, gradients included; a tenth more and
    1/4 GB stand for workspaces of PyTorch's kernels and fragmentation."""
    peak = step_peak(config, clip_shape, device, precision, grad_checkpoint=grad_checkpoint)
    return 1.1 * (4 * 4 * number_of_parameters(config) + peak) + 2**28


def sampling_batch(net, shape, device, precision, gradient):
    """-> how many videos to draw at once: 8 on a CPU and 32 on a GPU, where more are not faster, or as many as fit in
    three quarters of what is free. shape: (b, c, f, h, w) of the network's input for one. gradient: whether a step
    takes the input's gradient."""
    fitting = 0.75 * free_memory(device) // step_peak(net.config, shape, device, precision, gradient)
    return max(1, min(8 if device.type == "cpu" else 32, int(fitting)))


def step_peak(config, shape, device, precision, backward=True, grad_checkpoint=False):
    """-> bytes that a step on a video of `shape` (b, c, f, h, w) holds at most, beside the parameters.

    Each stage of a step grows evenly with the frames once the first level has several chunks of them (s4d.in_chunks),
    so a short video and one of twice its frames are counted, and the lines through them extended. What grows with the
    frames' square: Toeplitz matrices, added by their size, and the logits of `attention_impl` "math", for which a third
    video is counted.
    """
    b, c, f, h, w = shape
    short = max(16, counted_rows(device) // (h * w))                                        # frames
    videos = [(math.ceil(n / f), min(n, f)) for n in (short, 2 * short, 3 * short)]         # clips, frames
    videos = [(b, f)] if b * f <= 2 * short else videos[:3 if config.attention_impl == "math" else 2]
    terms = np.array([[1, n * frames, n * frames**2] for n, frames in [*videos, (b, f)]])[:, :max(2, len(videos))]
    counts = [count_stages(dataclasses.astuple(config), (n, c, frames, h, w), f, device, precision, backward,
                           grad_checkpoint) for n, frames in videos]
    matrices = counts[0][1]
    even = np.array([peaks for peaks, _ in counts]) - matrices * np.array([[frames**2] for _, frames in videos])
    return (terms[-1] @ np.linalg.lstsq(terms[:-1], even, rcond=None)[0]).max() + matrices * f**2


def counted_rows(device):
    """Several chunks on a CPU; on a GPU one fills it."""
    return (8 if device.type == "cpu" else 1) * s4d.chunk_size(device)


@functools.cache
def count_stages(config, shape, frames, device, precision, backward, grad_checkpoint):
    """-> the peaks of a step's stages, each from one block to the next, if videos are convolved as those of so many
    `frames`; and the bytes of all Toeplitz matrices that exist at once, per frame²."""
    peaks, matrices, pays = [], [0], s4d.toeplitz_pays

    def next_stage(*_):
        peaks.append(memory.peak)
        memory.peak = memory.live

    def pays_then(_, positions, d, device):
        matrices.append(4 * d * (1 + net.config.bidirectional) if pays(frames, positions, d, device) else 0)
        return matrices[-1] > 0

    with counted_memory(device) as memory, mock.patch.object(s4d, "toeplitz_pays", pays_then):
        net = UNet3D(UNetConfig(*config), grad_checkpoint)
        for block in [block for level in (net, *net.down, *net.up) for block in level.children()]:
            block.register_forward_pre_hook(next_stage)
        x, t = torch.empty(shape), torch.empty(shape[0], dtype=torch.long)
        memory.live = memory.peak = 0
        with autocast(device, precision), torch.set_grad_enabled(backward):
            loss = (net(x, t).float() - x).square().mean()
        next_stage()
        if backward:
            loss.backward()
        next_stage()
    # every layer's, where they are kept for the backward pass; else one layer's, with a copy and the gradient
    return peaks, sum(matrices) if backward and not grad_checkpoint else 3 * max(matrices)


@contextlib.contextmanager
def counted_memory(device):
    """A context whose tensors have no data: in seconds its LiveMemory tells what a step would take on this device. The
    selective SSM does without its kernel, which needs data, and without its loop over the frames."""
    device = "cuda" if device.type == "cuda" else "cpu"
    with FakeTensorMode(), torch.device(device), torch.backends.cudnn.flags(enabled=False), LiveMemory() as memory, \
            mock.patch.object(s4d.S6, "has_kernel", False), mock.patch.object(s4d.Recurrence, "apply", torch.mul):
        yield memory


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations in this context make and keep, `live` now and `peak` at most."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for storage in [leaf.untyped_storage() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]:
            if storage not in self.known:
                self.known.add(storage)
                weakref.finalize(storage, self.add, -storage.nbytes())
                self.add(storage.nbytes())
        return out

    def add(self, size):
        self.live += size
        self.peak = max(self.peak, self.live)


def number_of_parameters(config):
    with torch.device("meta"):
        return count_parameters(UNet3D(config))


def peak_memory(device):
    """In bytes, so far: of the allocator on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory(device):
    """In bytes, for this process: what a GPU has left; or its part of what the machine has, or the control group (of a
    container, of a Slurm job) that it is in."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not Path("/proc/meminfo").exists():  # macOS
        free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2]
    else:
        free = [1024 * int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1])]
        group = Path("/sys/fs/cgroup", Path("/proc/self/cgroup").read_text().split(":")[-1].strip().lstrip("/"))
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # not version 2 of control groups, or "max"
                used = re.search(r"anon (\d+)", (folder / "memory.stat").read_text())[1]  # files can be dropped
                free.append(int((folder / "memory.max").read_text()) - int(used))
    return min(free) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
