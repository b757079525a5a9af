"""Memory: what a training or denoising step takes, what is free, and the micro-batches that follow."""
import contextlib
import functools
import os
import re
import resource
import sys
import weakref
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from command import UserError, autocast, choose_precision, gather, processes, rank_zero_print
from model import UNet3D, count_parameters


def step_memory(config, clip_shape, device, precision="float32", grad_checkpoint=False):
    """-> bytes that a training step takes for clips of `clip_shape` (b, c, f, h, w): parameters, Adam's two moments and
    the EMA, as large each, and what the forward and backward pass holds at its peak, gradients included, counted on
    tensors without data; a tenth more and 1/4 GB stand for workspaces of PyTorch's kernels and fragmentation."""
    with counted_memory(device) as memory:
        net = UNet3D(config, grad_checkpoint)
        memory.live = memory.peak = 4 * 4 * count_parameters(net)
        x, t = torch.empty(clip_shape), torch.empty(clip_shape[0], dtype=torch.long)
        with autocast(device, precision):
            loss = (net(x, t).float() - x).square().mean()
        loss.backward()
    return 1.1 * memory.peak + 2**28


def fit_memory(args, config, device):
    """Choose the fewest micro-batches whose step fits in memory and, only if single clips do not fit without it,
    recomputation: sets args.grad_accum and args.grad_checkpoint -> a line about it. --grad-accum stays as given; that
    of the run that is resumed stays if it fits, since others would change the last bits of sums. Raises UserError."""
    world_size, precision = processes()[2], choose_precision(device, args.precision)
    share, limit = args.batch_size // world_size, 0.9 * free_memory(device)
    if args.memory_gb:  # on a CPU it is that of the process, which has something already
        limit = max(0, args.memory_gb * 2**30 - (0 if device.type == "cuda" else peak_memory(device)))
    with torch.device("meta"):
        gradients = 4 * count_parameters(UNet3D(config))

    @functools.cache
    def count(clips, recompute):
        shape = clips, config.video_channels, args.frames, args.size, args.size
        return step_memory(config, shape, device, precision, recompute)

    def takes(clips, recompute):
        memory, earlier = count(share, recompute), clips < share
        if earlier:  # what a step takes is nearly linear in its clips
            one = count(1, recompute)
            memory = one + (memory - one) * (clips - 1) / (share - 1)
        # the gradients of the micro-batches before are there, and DDP has a copy of them
        return memory + (earlier + (world_size > 1)) * gradients

    fixed, may_recompute = "grad_accum" in args.fixed, args.grad_checkpoint or "grad_checkpoint" not in args.fixed
    choices = [(parts, recompute) for recompute in sorted({bool(args.grad_checkpoint), may_recompute})
               for parts in range(1, share + 1) if share % parts == 0]
    if args.grad_accum and share % args.grad_accum == 0:
        choices.insert(0, (args.grad_accum, args.grad_checkpoint))
    for parts, recompute in choices:
        expected = None if fixed and not args.dry_run else takes(share // parts, recompute)
        if fixed or all(gather(expected <= limit)):  # on every process, or on none
            break
    else:
        raise UserError(f"a training step takes {expected / 2**30:.1f} GB even with single clips"
                        f"{' and recomputation' * recompute}; {limit / 2**30:.1f} GB are free; try a smaller --frames, "
                        "--size or --base-channels")
    if args.grad_accum not in (None, parts):
        rank_zero_print("the micro-batches of this run do not fit here: others give the same sums but for their "
                        "last bits")
    args.grad_accum, args.grad_checkpoint = parts, recompute
    return (f"global batch {args.batch_size} = {world_size} processes x {parts} micro-batches of {share // parts} clips"
            + (", recomputing blocks" if recompute else "") + f"; {device.type}, {precision}"
            + (f"; each process takes about {expected / 2**30:.1f} GB of {limit / 2**30:.1f}" if expected else ""))


def sampling_batch(net, shape, device, precision, gradient):
    """-> how many videos to draw at once: 8 on a CPU and 32 on a GPU, where more are not faster, or as many as there is
    free memory for, counted on tensors without data; a quarter is left for the workspaces of PyTorch's kernels.

    shape: (b, c, f, h, w) of the network's input for one of them. gradient: whether a step takes the input's gradient.
    """
    with counted_memory(device) as memory, autocast(device, precision), torch.set_grad_enabled(gradient):
        network = UNet3D(net.config).requires_grad_(False)
        parameters = memory.live  # are there already
        x, t = torch.empty(shape, requires_grad=gradient), torch.empty(shape[0], dtype=torch.long)
        y = network(x, t)
        if gradient:
            y.sum().backward()
    fitting = 0.75 * free_memory(device) / (memory.peak - parameters)
    return max(1, min(8 if device.type == "cpu" else 32, int(fitting)))


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


@contextlib.contextmanager
def counted_memory(device):
    """A context whose tensors have no data: in seconds its LiveMemory tells what a step would take on this device."""
    device = "cuda" if device.type == "cuda" else "cpu"
    with FakeTensorMode(), torch.device(device), torch.backends.cudnn.flags(enabled=False), LiveMemory() as memory:
        yield memory


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations in this context make and keep, `live` now and `peak` at most."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = weakref.WeakSet()

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
