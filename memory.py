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

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from command import UserError, autocast, choose_precision, gather, processes
from model import UNet3D, UNetConfig, count_parameters
from s4d import Recurrence, S6, chunk_size


def fit_memory(args, config, device):
    """Choose the fewest micro-batches whose step fits in memory and, only if single clips do not fit without it,
    recomputation: sets args.grad_accum and args.grad_checkpoint -> a line about it. A given --grad-accum stays; that of
    a resumed run is tried first, as others change the last bits of sums. Raises UserError."""
    world_size, precision, given = processes()[2], choose_precision(device, args.precision), "grad_accum" in args.given
    share, limit, about = args.batch_size // world_size, 0.9 * free_memory(device), ""
    if args.memory_gb:  # on a CPU it is that of the process, which has something already
        limit = max(0, args.memory_gb * 2**30 - (0 if device.type == "cuda" else peak_memory(device)))
    recomputing = [args.grad_checkpoint]
    if recomputing == [False] and "grad_checkpoint" not in args.given:
        recomputing = [False, True]
    choices = [(parts, recompute) for recompute in recomputing for parts in range(1, share + 1) if share % parts == 0]
    if args.grad_accum and share % args.grad_accum == 0:
        choices.insert(0, (args.grad_accum, args.grad_checkpoint))
    for parts, recompute in choices:
        if not given or args.dry_run:
            clips = share // parts, config.video_channels, args.frames, args.size, args.size
            takes = step_memory(config, clips, device, precision, recompute)
            about = f"{takes / 2**30:.1f} GB of {limit / 2**30:.1f}"
        if given or all(gather(takes <= limit)):  # on every process, or on none
            break
    else:
        raise UserError(f"a training step takes {about} that are free, with single clips; try a smaller --frames or "
                        "--base-channels")
    args.grad_accum, args.grad_checkpoint = parts, recompute
    return (f"global batch {args.batch_size} = {world_size} processes x {parts} micro-batches of {share // parts} clips"
            f"{', recomputing blocks' if recompute else ''}; {device.type}, {precision}"
            f"{about and '; each process takes about ' + about}")


def sampling_batch(net, shape, device, precision, gradient):
    """-> how many videos to draw at once: 8 on a CPU and 32 on a GPU, where more are not faster, or as many as fit in
    three quarters of what is free. shape: (b, c, f, h, w) of the network's input for one. gradient: whether a step
    takes the input's gradient."""
    fitting = 0.75 * free_memory(device) // step_peak(net.config, shape, device, precision, gradient)
    return max(1, min(8 if device.type == "cpu" else 32, int(fitting)))


def step_memory(config, clip_shape, device, precision="float32", grad_checkpoint=False):
    """-> bytes that a training step takes for clips of `clip_shape` (b, c, f, h, w): parameters, gradients, Adam's two
    moments and the EMA, as large each, and the most that the forward and backward pass holds besides. A tenth more
    stands for workspaces of PyTorch's kernels and fragmentation."""
    with torch.device("meta"):
        parameters = 4 * count_parameters(UNet3D(config))
    return 1.1 * (5 * parameters + step_peak(config, clip_shape, device, precision, True, grad_checkpoint))


def step_peak(config, shape, device, precision, backward, grad_checkpoint=False):
    """-> bytes that a step on videos of `shape` (b, c, f, h, w) holds at most, beside parameters and gradients. In each
    stage they grow evenly with the pixels of a frame: two small pictures are counted, and the lines extended."""
    b, c, f, h, w = shape
    count = functools.partial(counted_stages, dataclasses.astuple(config), device=device, precision=precision,
                              backward=backward, grad_checkpoint=grad_checkpoint)
    unit = 2 ** (len(config.channel_mults) - 1)  # the network halves a picture so often
    # large enough for several chunks at the first level (s4d.in_chunks) on a CPU; one fills a GPU
    width = unit * math.ceil((4 if device.type == "cpu" else 1) * chunk_size(device) / (f * unit**2))
    if b * h * w <= 2 * unit * width:
        return max(count(shape))
    stages = zip(count((1, c, f, unit, width)), count((1, c, f, unit, 2 * width)))
    return max(small + (b * h * w / (unit * width) - 1) * (large - small) for small, large in stages)


@functools.cache
def counted_stages(config, shape, device, precision, backward, grad_checkpoint):
    """-> what each stage of a step holds at most, from one block to the next, counted on tensors without data. The
    selective SSM does without its kernel, which needs data, and without its loop over the frames."""
    peaks = []

    def next_stage(*_):
        peaks.append(memory.peak)
        memory.peak = memory.live

    with FakeTensorMode(), torch.device("cuda" if device.type == "cuda" else "cpu"), LiveMemory() as memory, \
            torch.backends.cudnn.flags(enabled=False), mock.patch.object(S6, "has_kernel", False), \
            mock.patch.object(Recurrence, "apply", torch.mul):
        net = UNet3D(UNetConfig(*config), grad_checkpoint)
        for parameter in net.parameters():
            parameter.grad = torch.empty_like(parameter)
        for block in [block for level in (net, *net.down, *net.up) for block in level.children()]:
            block.register_forward_pre_hook(next_stage)  # recomputed blocks come once more
        x, t = torch.empty(shape), torch.empty(shape[0], dtype=torch.long)
        memory.live = memory.peak = 0
        with autocast(device, precision), torch.set_grad_enabled(backward):
            loss = (net(x, t).float() - x).square().mean()
        next_stage()
        if backward:
            loss.backward()
        next_stage()
    return peaks


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
