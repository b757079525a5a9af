"""Memory: what a training step takes, what it may take, and the micro-batches that follow."""
import functools
import math
import os
import resource
import sys
import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from command import UserError, autocast, choose_precision, gather, processes
from model import UNet3D, count_parameters
from s4d import S6, chunk_size


def fit_memory(args, net, device):
    """Choose the fewest micro-batches whose step fits in memory and, only if single clips do not fit without it,
    recomputation: sets args.grad_accum and args.grad_checkpoint -> a line about it. A given --grad-accum stays; that of
    a resumed run is tried first, as others change the last bits of sums. Raises UserError."""
    world_size, precision, given = processes()[2], choose_precision(device, args.precision), "grad_accum" in args.given
    share, about = args.batch_size // world_size, ""
    # --memory-gb is for the whole process, which has something already; the least of all: they must choose alike
    limit = min(gather(args.memory_gb * 2**30 - peak_memory(device) if args.memory_gb else 0.9 * free_memory(device)))
    recomputing = [args.grad_checkpoint] if args.grad_checkpoint or "grad_checkpoint" in args.given else [False, True]
    choices = [(parts, recompute) for recompute in recomputing for parts in range(1, share + 1) if share % parts == 0]
    known = [(args.grad_accum, args.grad_checkpoint)] if args.grad_accum and share % args.grad_accum == 0 else []
    for parts, recompute in known + choices:
        if not given or args.dry_run:
            clips = share // parts, net.config.video_channels, args.frames, args.size, args.size
            takes = step_memory(net, clips, device, precision, recompute)
            about = f"about {takes / 2**30:.1f} GB of {max(0, limit) / 2**30:.1f}"
        if given or takes <= limit:
            break
    else:
        raise UserError(f"a step takes {about}, with single clips; try a smaller --frames, or more with --memory-gb")
    args.grad_accum, args.grad_checkpoint = parts, recompute
    return (f"global batch {args.batch_size} = {world_size} processes x {parts} micro-batches of {share // parts} clips"
            f"{', recomputing blocks' if recompute else ''}; {device.type}, {precision}"
            f"{f'; each process takes {about}' if about else ''}")


def step_memory(net, shape, device, precision="float32", grad_checkpoint=False):
    """-> bytes that a training step takes for clips of `shape` (b, c, f, h, w): parameters, gradients, Adam's two
    moments and the EMA, as large each, and the most that the forward and backward pass holds besides. A tenth more
    stands for workspaces of PyTorch's kernels and fragmentation."""
    (b, c, f, h, w), config = shape, net.config
    unit = 2 ** (len(config.channel_mults) - 1)  # the network halves a picture so often
    # large enough for several chunks at the first level (s4d.in_chunks) on a CPU; one fills a GPU
    width = unit * math.ceil((4 if device.type == "cpu" else 1) * chunk_size(device) / (f * unit**2))
    # Each stage grows evenly with the pixels of a frame: two small pictures are counted, and the lines extended.
    shapes = [(1, c, f, unit, n * width) for n in (1, 2)] if b * h * w > 2 * unit * width else [shape, shape]
    smaller, larger = (counted_stages(one, config, device, precision, grad_checkpoint) for one in shapes)
    further = b * h * w / (unit * width) - 1
    peak = max(small + further * (large - small) for small, large in zip(smaller, larger))
    return 1.1 * (5 * 4 * count_parameters(net) + peak)


@functools.cache
def counted_stages(shape, config, device, precision, grad_checkpoint):
    """-> what each stage of a step holds at most, from one block to the next, counted on tensors without data."""
    with FakeTensorMode(), torch.device("cuda" if device.type == "cuda" else "cpu"), LiveMemory() as memory, \
            torch.backends.cudnn.flags(enabled=False):
        net = UNet3D(config, grad_checkpoint)
        for s6 in [module for module in net.modules() if isinstance(module, S6)]:
            s6.has_kernel, s6.recurrence = False, torch.mul  # one needs data, the other would take minutes
        for parameter in net.parameters():
            parameter.grad = torch.empty_like(parameter)
        for block in [block for level in (net, *net.down, *net.up) for block in level.children()]:
            block.register_forward_pre_hook(lambda *_: memory.peaks.append(memory.live))  # also when it is recomputed
        x, t = torch.empty(shape), torch.empty(shape[0], dtype=torch.long)
        memory.live, memory.peaks = 0, [0]
        with autocast(device, precision):
            loss = (net(x, t).float() - x).square().mean()
        memory.peaks.append(memory.live)
        loss.backward()
    return memory.peaks


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations in this context make and keep: `live`, and at most `peaks[-1]`
    since a value was last appended to `peaks`."""

    def __init__(self):
        super().__init__()
        self.live, self.peaks, self.known = 0, [0], weakref.WeakSet()

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
        self.peaks[-1] = max(self.peaks[-1], self.live)


def peak_memory(device):
    """In bytes, so far: of the allocator on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory(device):
    """In bytes, for this process: what a GPU has left; elsewhere its part of three quarters of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return 0.75 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
