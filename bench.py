"""Time and peak memory of the network with each temporal layer, against the number of frames.

    python bench.py --what train sample --frames 16 64 200 400 --out bench.md            # every layer; table and figure
    python bench.py --what train --frames 200 --baseline                                 # against the textbook
    python bench.py --what train --temporal ssm --frames 400 --grad-checkpoint
    python bench.py --what train --temporal attention --frames 16 64 200 --attention-impl math
    python bench.py --what layer --channels 512 --frames 400 --size 4 --baseline
    python bench.py --what train sample --temporal attention --reference lucidrains      # and video-diffusion-pytorch
    python bench.py --budget-gb 24 --frames 256 --batch-size 8                           # how wide a network fits

Glossary
    train      one training step: forward, backward, fused Adam
    sample     one denoising step, without gradients; our SSM kernels are computed once for all steps
    layer      the temporal SSM layer alone, forward and backward
    ours       this implementation, with the flags given
    textbook   the same network with the same parameters in plain operations (the classes below): every layer for all
               frames and positions at once, the SSM kernel materialised and convolved by two FFTs and two flips, all
               f x f logits of attention; never compiled, nothing recomputed. test_all.py: equal to 1e-10.
    lucidrains the network of the package video-diffusion-pytorch, with as many attention heads, as wide; its time
               embedding is a quarter as wide
    memory     on the CPU how far the resident set of the formulation's own process grows from before its first step
               (when it holds the parameters) to its peak; on CUDA the most that its allocator held, parameters included
    videos/s   videos of a batch / seconds; for `sample` whole videos, of 256 denoising steps
    peak       share of the best rate of square matrix products in the same precision, measured first. Operations are
               those of the matrix products and convolutions of the textbook's forward pass, for training three times
               as many; FFTs, and all that is computed twice or only in another formulation, count nothing.

The formulations of one comparison (one `what`, one number of frames) take turns, one step each; seconds are medians.
The first turn only warms up, and on CUDA each turn begins with one more step, since the memory of those that wait is
given back. What does not fit stays in the table as "out of memory".

With --budget-gb each temporal layer has a row for the widest network, in steps of 8 base channels, whose training step takes
no more than so many GB (of 2^30 bytes), parameters included: networks as in the paper's later edition, with base / 8 heads
and a time embedding of 32 x base. On CUDA its allocator gets no more than the budget.
"""
import argparse
import contextlib
import ctypes
import functools
import gc
import importlib
import importlib.util
import math
import multiprocessing
import operator
import os
import platform
import re
import resource
import shlex
import signal
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import model
from diffusion import Diffusion
from model import TEMPORAL_LAYERS, UNet3D, UNetConfig, count_parameters, rotary_embedding
from s4d import TemporalSSM, kernels_once
from sample import Parser, autocast, choose_device, positive_int, replace_with, run
from train import peak_memory, positive_float

SAMPLING_STEPS = 256
OUT_OF_MEMORY = "out of memory"
COLUMNS = ("what", "frames", "temporal layer", "formulation", "parameters", "seconds", "memory", "videos/s", "peak",
           "time : textbook", "memory : textbook")
BUDGET_COLUMNS = ("frames", "temporal layer", "base channels", "parameters", "GB", "seconds", "the next takes")


# ---------------------------------------------------------------------------------------- the textbook


def layer_norm(norm, x):
    """LayerNorm over the channels of (b, c, f, h, w)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = x - x.mean(dim=1, keepdim=True)
    variance = x.square().mean(dim=1, keepdim=True)
    return x * torch.rsqrt(variance + norm.eps) * norm.gain.view(-1, 1, 1, 1)


class Textbook(nn.Module):
    """A layer's parameters in another formulation."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer


class TextbookTemporalSSM(Textbook):
    """As in the paper's Sec. 3.2 and the minimal S4D code."""

    def forward(self, x):
        layer, (h, w) = self.layer, x.shape[-2:]
        H = layer_norm(layer.norm, x)
        X = rearrange(H, "b c f h w -> (b h w) f c")
        X = self.mlp(X) if layer.mlp_position == "pre" else X
        U = 0
        for ssm in layer.directions:
            U = U + (self.s4d(ssm, X.flip(1)).flip(1) if ssm.reverse else self.s4d(ssm, X))
        U = self.mlp(U) if layer.mlp_position == "post" else U
        return (x if layer.skip == "input" else H) + rearrange(U, "(b h w) f c -> b c f h w", h=h, w=w)

    def mlp(self, x):
        if len(self.layer.mlp) == 1:
            return F.gelu(self.layer.mlp[0](x))
        if len(self.layer.mlp) == 2:
            return self.layer.mlp[1](F.gelu(self.layer.mlp[0](x)))
        return x

    def s4d(self, ssm, u):
        """u: (p, f, c) -> (p, f, c)."""
        y = F.gelu(textbook_ssm(ssm, u)).mT                                                 # p c f
        y = F.conv1d(y, ssm.output_linear.weight[..., None], ssm.output_linear.bias)        # p 2c f
        return F.glu(y, dim=1).mT


def textbook_ssm(ssm, u):
    """K * u + D u, forward in time; u: (p, f, c) -> (p, f, c)."""
    u, L = u.mT, u.shape[1]                                                                 # p c f
    k = ssm.kernel
    A = torch.complex(-k.log_A_real.exp(), k.A_imag)                                        # c n
    dtA = A * k.log_dt.exp()[:, None]
    CB = torch.view_as_complex(k.C) * (torch.exp(dtA) - 1) / A
    vandermonde = torch.exp(dtA[..., None] * torch.arange(L, device=u.device))              # c n f
    K = 2 * torch.einsum("cn,cnl->cl", CB, vandermonde).real                                # c f
    y = torch.fft.irfft(torch.fft.rfft(u.to(K.dtype), 2 * L) * torch.fft.rfft(K, 2 * L), 2 * L)[..., :L]
    return (y + u * ssm.D[:, None]).mT


class TextbookTemporalGSS(Textbook):
    """As in the paper's Appendix C."""

    def forward(self, x):
        layer, (h, w) = self.layer, x.shape[-2:]
        X = rearrange(layer_norm(layer.norm, x), "b c f h w -> (b h w) f c")
        product = 1
        for before, ssm, after in zip(layer.before, layer.directions, layer.after):
            y = after(textbook_ssm(ssm, F.gelu(before(X.flip(1) if ssm.reverse else X))))
            product = product * (y.flip(1) if ssm.reverse else y)
        out = layer.out(F.gelu(layer.up(product)) * F.gelu(layer.shortcut(X)))
        return x + rearrange(out, "(b h w) f c -> b c f h w", h=h, w=w)


class TextbookTemporalMamba(Textbook):
    """As in the paper's Appendix C; a selective SSM is computed as it is."""

    def forward(self, x):
        layer, (h, w) = self.layer, x.shape[-2:]
        X = rearrange(layer_norm(layer.norm, x), "b c f h w -> (b h w) f c")
        A, gate = layer.to_input(X), F.silu(layer.to_gate(X))
        out = 0
        for conv, ssm in zip(layer.convs, layer.directions):
            u = F.silu(conv(F.pad((A.flip(1) if ssm.reverse else A).mT, (3, 0)))).mT
            if layer.ssm == "s6":
                y = ssm.scan(u.permute(2, 0, 1)).permute(1, 2, 0)
            else:
                y = textbook_ssm(ssm, u)
            out = out + (y.flip(1) if ssm.reverse else y) * gate
        out = layer.out[0](out)
        out = layer.out[1](F.silu(out)) if len(layer.out) == 2 else out
        return x + rearrange(out, "(b h w) f c -> b c f h w", h=h, w=w)


class TextbookTemporalAttention(Textbook):
    def forward(self, x, bias=None):
        layer, (h, w) = self.layer, x.shape[-2:]
        X = rearrange(layer_norm(layer.norm, x), "b c f h w -> (b h w) f c")
        q, k, v = rearrange(layer.to_qkv(X), "p f (three heads d) -> three p heads f d", three=3, heads=layer.heads)
        q, k = rotary_embedding(q, layer.rotary_freqs), rotary_embedding(k, layer.rotary_freqs)
        out = layer.to_out(rearrange(self.attend(q, k, v, bias), "p heads f d -> p f (heads d)"))
        return x + rearrange(out, "(b h w) f c -> b c f h w", h=h, w=w)

    def attend(self, q, k, v, bias):
        """q, k, v: (p, heads, f, d) -> (p, heads, f, d)."""
        logits = torch.einsum("pnid,pnjd->pnij", q * q.shape[-1] ** -0.5, k) + bias         # p heads f f
        return torch.einsum("pnij,pnjd->pnid", logits.softmax(dim=-1), v)


class TextbookTemporalLinearAttention(TextbookTemporalAttention):
    def attend(self, q, k, v, bias):
        context = torch.einsum("pnfd,pnfe->pnde", k.softmax(dim=-2), v)                     # p heads d e
        return torch.einsum("pnde,pnfd->pnfe", context, q.softmax(dim=-1) * q.shape[-1] ** -0.5)


class TextbookSpatialLinearAttention(Textbook):
    def forward(self, x):
        layer, (h, w) = self.layer, x.shape[-2:]
        qkv = F.conv3d(layer_norm(layer.norm, x), layer.to_qkv.weight)
        q, k, v = rearrange(qkv, "b (three n d) f h w -> three b f n d (h w)", three=3, n=layer.heads)
        q = q.softmax(dim=-2) * q.shape[-2] ** -0.5
        context = torch.einsum("bfndp,bfnep->bfnde", k.softmax(dim=-1), v)
        out = torch.einsum("bfnde,bfndp->bfnep", context, q)
        out = rearrange(out, "b f n e (h w) -> b (n e) f h w", h=h, w=w)
        return x + F.conv3d(out, layer.to_out.weight, layer.to_out.bias)


class TextbookBlock(Textbook):
    def forward(self, x, scale_shift=None):
        conv, norm = self.layer.conv, self.layer.norm
        x = F.conv3d(x, conv.weight, conv.bias, padding=(0, 1, 1))
        x = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
        if scale_shift is not None:
            scale, shift = scale_shift
            x = x * (scale + 1) + shift
        return F.silu(x)


TEXTBOOK = {TemporalSSM: TextbookTemporalSSM, model.TemporalAttention: TextbookTemporalAttention,
            model.TemporalLinearAttention: TextbookTemporalLinearAttention,
            model.TemporalGSS: TextbookTemporalGSS, model.TemporalMamba: TextbookTemporalMamba,
            model.SpatialLinearAttention: TextbookSpatialLinearAttention, model.Block: TextbookBlock}


def use_textbook(module):
    """Put its textbook formulation, with the same parameters, in the place of every layer inside `module`."""
    for name, child in module.named_children():
        if type(child) in TEXTBOOK:
            setattr(module, name, TEXTBOOK[type(child)](child))
        else:
            use_textbook(child)
    if isinstance(module, UNet3D):
        module.grad_checkpoint = False
    return module


# ---------------------------------------------------------------------------------------- one row of the table


@dataclass
class Row:
    what: str               # train, sample or layer
    frames: int
    temporal: str           # temporal layer
    formulation: str        # ours, textbook or lucidrains
    operations: int = None  # of one step; None: not known
    parameters: int = 0
    steps: list = field(default_factory=list)   # (seconds, peak bytes) of each timed step
    out_of_memory: bool = False

    @property
    def seconds(self):
        return statistics.median(seconds for seconds, _ in self.steps)

    @property
    def memory(self):
        return max(peak for _, peak in self.steps)


def build(row, args):
    """The network of a row, or its layer."""
    if row.formulation == "lucidrains":
        from video_diffusion_pytorch import Unet3D
        return Unet3D(dim=args.base_channels, dim_mults=(1, 2, 4, 8), channels=3, attn_heads=8, attn_dim_head=64)
    if row.what == "layer":
        net = nn.Sequential(TemporalSSM(args.channels, args.state_size or 512))
    else:
        heads, time_ratio = (args.base_channels // 8, 32) if args.budget_gb else (8, 16)
        config = UNetConfig(temporal=row.temporal, base_channels=args.base_channels, heads=heads,
                            time_dim=time_ratio * args.base_channels, state_size=args.state_size,
                            attention_impl=args.attention_impl, ssm=args.ssm)
        net = UNet3D(config, grad_checkpoint=args.grad_checkpoint)
    return use_textbook(net) if row.formulation == "textbook" else net


def input_shape(row, args):
    channels = args.channels if row.what == "layer" else 3
    return args.batch_size, channels, row.frames, args.size, args.size


def count_operations(row, args):
    """Floating-point operations of a step (see `peak` above). Raises ValueError for settings that do not fit."""
    if row.formulation == "lucidrains":
        return None  # its forward pass looks at values, and a count looks at shapes alone
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        plain = build(Row(row.what, row.frames, row.temporal, "textbook"), args)
        x, t = torch.empty(input_shape(row, args)), torch.zeros(args.batch_size, dtype=torch.long)
        plain(*([x] if row.what == "layer" else [x, t]))
    return counter.get_total_flops() * (1 if row.what == "sample" else 3)


def make_step(row, args, net, device):
    """-> a function that runs one step."""
    x = torch.randn(input_shape(row, args), device=device)
    forward = net
    if args.compile and row.formulation == "ours":  # as train.py and sample.py do
        graph = row.what == "sample" and device.type == "cuda"
        forward = torch.compile(net, dynamic=False, mode="reduce-overhead" if graph else None)
    if row.what == "layer":
        weight = torch.randn_like(x)
        x.requires_grad_()

        def step():
            with autocast(device, args.precision):
                y = forward(x)
            y.backward(weight)
            net.zero_grad()
            x.grad = None

        return step

    diffusion = Diffusion(SAMPLING_STEPS, device)
    t = torch.full((args.batch_size,), SAMPLING_STEPS // 2, device=device)
    if row.what == "sample":
        net.eval().requires_grad_(False)

        @torch.no_grad()
        def step():
            with autocast(device, args.precision):
                x_0 = diffusion.predict_x0(x, t, forward(x, t).float()).clamp(-1, 1)
            mean, variance = diffusion.posterior(x_0, x, t)
            return mean + variance.sqrt() * torch.randn_like(x)

        return step

    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, fused=True)

    def step():
        with autocast(device, args.precision):
            loss = diffusion.loss(forward, x, t, torch.randn_like(x)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


# ---------------------------------------------------------------------------------------- the process of a row


def proc(name, path="/proc/self/status"):
    """A number of bytes that Linux tells about this process or the machine; None on other systems."""
    if os.path.exists(path):
        return int(re.search(rf"^{name}:\s*(\d+) kB", Path(path).read_text(), re.MULTILINE)[1]) * 1024


def give_memory_back(device):
    """Return freed memory to the system, so that a process that waits holds little more than its parameters."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif hasattr(ctypes.CDLL(None), "malloc_trim"):  # glibc
        ctypes.CDLL(None).malloc_trim(0)


def holds_much(device):
    """Whether others may need what this process has freed. (If not, it keeps it: mapping memory anew takes time.)"""
    if device.type == "cuda" or proc("VmRSS") is None:
        return True
    return proc("VmRSS") > 0.1 * proc("MemTotal", "/proc/meminfo")


def limit_memory(args, device, start):
    """Let allocations fail before the machine runs out: beyond --memory-gb, or 90 % of what is free now.

    start: the process's data before its first step, in bytes.
    """
    if device.type == "cuda":
        if args.memory_gb:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, args.memory_gb * 2**30 / total))
    elif start is not None:
        limit = proc("VmData") + 0.9 * proc("MemAvailable", "/proc/meminfo")
        if args.memory_gb:
            limit = min(limit, start + args.memory_gb * 2**30)
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (int(limit), hard))


def timed(step, device):
    """Run one step -> seconds, peak bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    else:
        with contextlib.suppress(OSError):  # Linux: the peak starts anew
            Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    peak = proc("VmHWM") if device.type == "cpu" else None
    return seconds, peak or peak_memory(device)


def serve(row, args, pipe):
    """Build the network of a row and tell its parameters; for every message that comes run a step and answer with
    (seconds, peak bytes). The answer "out of memory" is the last."""
    try:
        torch.set_num_threads(args.threads)
        torch.manual_seed(0)
        device = choose_device(args.device)
        net = build(row, args).to(device)
        step = make_step(row, args, net, device)
        give_memory_back(device)
        before = 0 if device.type == "cuda" else proc("VmRSS") or peak_memory(device)
        data = proc("VmData")
        keep = row.what == "sample" and row.formulation == "ours"
        with kernels_once(net, row.frames) if keep else contextlib.nullcontext():
            pipe.send(count_parameters(net))
            while pipe.recv():
                limit_memory(args, device, data)
                if device.type == "cuda":
                    step()  # asks for the memory again that was given back after the last turn
                seconds, peak = timed(step, device)
                if holds_much(device):
                    give_memory_back(device)
                pipe.send((seconds, peak - before))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not re.search(
                "can't allocate memory|emory allocation|bad_alloc|ALLOC_FAILED|out of memory|not create a primitive",
                str(error)):
            reason = " ".join(str(error).split())[:200]
            sys.exit(f"bench.py: {row.formulation} {row.temporal}, {row.frames} frames: {reason}")
        pipe.send(OUT_OF_MEMORY)


# ---------------------------------------------------------------------------------------- the comparison


def start(row, args):
    """-> the process of a row, and the pipe to it."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    work = functools.partial(serve, row, args, other)
    process = context.Process(target=run, args=("bench.py", work), daemon=True)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is for this process alone
    process.start()
    signal.signal(signal.SIGINT, handler)
    other.close()  # else the pipe of a process that failed would never end
    return process, pipe


def ask(process, pipe, message=None):
    """Send the message, if any -> what the process answers next."""
    try:
        if message:
            pipe.send(message)
        return pipe.recv()
    except (EOFError, ConnectionError):
        process.join()
        if process.exitcode == -signal.SIGKILL:  # by the system, for want of memory
            return OUT_OF_MEMORY
        # one that failed otherwise has said why
        sys.exit(1 if process.exitcode >= 0 else f"bench.py: a process ended with signal {-process.exitcode}")


def compare(rows, args, bar):
    """Measure the rows, each in a process of its own, by turns."""
    children = [start(row, args) for row in rows]
    try:
        for row, child in zip(rows, children):
            answer = ask(*child)
            row.out_of_memory = answer == OUT_OF_MEMORY
            row.parameters = 0 if row.out_of_memory else answer
        for turn in range(1 + args.repeats):
            for row, child in zip(rows, children):
                answer = OUT_OF_MEMORY if row.out_of_memory else ask(*child, "step")
                row.out_of_memory = answer == OUT_OF_MEMORY
                if turn > 0 and not row.out_of_memory:
                    row.steps.append(answer)
                bar.update()
        for row, (process, pipe) in zip(rows, children):
            if not row.out_of_memory:
                pipe.send(None)
            process.join(60)
    finally:
        for process, _ in children:
            process.kill()
            process.join()


def widest(row, args, device):
    """The widest network of the row's temporal layer whose training step fits --budget-gb, by bisection from
    --base-channels on -> the cells of its row, in the order of BUDGET_COLUMNS."""
    fits, too_wide = 0, None                    # in steps of 8 base channels
    gigabytes, measured = {}, {}
    while too_wide is None or too_wide - fits > 1:
        width = (fits + too_wide) // 2 if too_wide else 2 * fits or max(1, args.base_channels // 8)
        narrowed = argparse.Namespace(**vars(args) | {"base_channels": 8 * width})
        tried = Row("train", row.frames, row.temporal, "ours")
        with tqdm(total=1 + args.repeats, desc=f"{row.temporal}, base {8 * width}", leave=False, disable=None) as bar:
            compare([tried], narrowed, bar)
        if not tried.out_of_memory:
            parameters = 0 if device.type == "cuda" else 4 * tried.parameters  # what `memory` leaves out
            gigabytes[width], measured[width] = (tried.memory + parameters) / 2**30, tried
        if gigabytes.get(width, math.inf) <= args.budget_gb:
            fits = width
        else:
            too_wide = width
    beyond = f"{gigabytes[too_wide]:.2f} GB" if too_wide in gigabytes else OUT_OF_MEMORY
    if not fits:
        return [str(row.frames), row.temporal, "none", *["–"] * 3, f"{beyond} (base 8)"]
    best = measured[fits]
    return [str(row.frames), row.temporal, str(8 * fits), f"{best.parameters / 1e6:.2f} M", f"{gigabytes[fits]:.2f}",
            f"{best.seconds:.4g}", beyond]


def matmul_peak(device, precision):
    """-> operations per second of the fastest of ten square matrix products."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    return 2 * n**3 / min(timed(functools.partial(torch.mm, a, a), device)[0] for _ in range(10))


# ---------------------------------------------------------------------------------------- the table and the figure


def table_row(row, comparison, args, peak):
    """The cells of a row, in the order of COLUMNS."""
    cells = [row.what, str(row.frames), row.temporal, row.formulation, f"{row.parameters / 1e6:.2f} M"]
    if row.out_of_memory:
        return cells + [OUT_OF_MEMORY] + ["–"] * 5
    videos = args.batch_size / row.seconds / (SAMPLING_STEPS if row.what == "sample" else 1)
    share = f"{row.operations / row.seconds / peak:.1%}" if row.operations else "–"
    cells += [f"{row.seconds:.4g}", f"{row.memory / 2**20:.0f} MB", f"{videos:.3g}", share]
    for other in comparison:
        if other.formulation == "textbook" and other.temporal == row.temporal and not other.out_of_memory:
            memory = f"{row.memory / other.memory:.2f}" if other.memory > 0 else "–"
            return cells + [f"{row.seconds / other.seconds:.2f}", memory]
    return cells + ["–"] * 2


def markdown(cells):
    return f"| {' | '.join(cells)} |"


def draw(path, rows):
    """Memory and seconds against frames: two panels for each `what`, one curve per layer and formulation."""
    from matplotlib.figure import Figure

    whats = list(dict.fromkeys(row.what for row in rows))
    figure = Figure((11, 4.5 * len(whats)), layout="constrained")
    for what, panels in zip(whats, figure.subplots(len(whats), 2, squeeze=False)):
        curves = {}
        for row in sorted(rows, key=operator.attrgetter("frames")):
            if row.what == what:
                curves.setdefault((row.temporal, row.formulation), []).append(row)
        for i, ((temporal, formulation), curve) in enumerate(curves.items()):
            style = {"color": f"C{TEMPORAL_LAYERS.index(temporal)}", "label": f"{temporal}, {formulation}",
                     "linestyle": {"ours": "-", "textbook": "--", "lucidrains": ":"}[formulation], "marker": "o"}
            fits = [row for row in curve if not row.out_of_memory]
            panels[0].plot([row.frames for row in fits], [row.memory / 2**30 for row in fits], **style)
            panels[1].plot([row.frames for row in fits], [row.seconds for row in fits], **style)
            for row in curve:
                if row.out_of_memory:  # a cross at the top of both panels
                    for panel in panels:
                        panel.plot(row.frames, 0.97 - 0.03 * i, "x", color=style["color"], markersize=9,
                                   transform=panel.get_xaxis_transform())
        frames = sorted({row.frames for curve in curves.values() for row in curve})
        for panel, label in zip(panels, ("peak memory in GB", "seconds")):
            panel.set(xscale="log", yscale="log", xlabel="frames", ylabel=label, title=what)
            panel.set_xticks(frames, map(str, frames))
            panel.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
            panel.margins(y=0.2)  # room for the crosses
        panels[0].legend(title=f"x: {OUT_OF_MEMORY}")
    replace_with(path, functools.partial(figure.savefig, format="png", dpi=120))


def save(path, heading, rows, table):
    """Write the table so far and, with matplotlib, the figure."""
    text = "\n".join([*heading, "", *table, ""])
    if importlib.util.find_spec("matplotlib"):
        draw(path.with_suffix(".png"), rows)
        text += f"\n![memory and time against frames]({path.stem}.png)\n"
    replace_with(path, lambda temporary: temporary.write_text(text))


# ---------------------------------------------------------------------------------------- the command


def parse_args():
    parser = Parser(prog="bench.py", description="Time and memory of the network with each temporal layer.",
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--what", nargs="+", choices=("train", "sample", "layer"),
        help="training step; denoising step; the temporal SSM layer alone, forward and backward; none: the first two")
    add("--temporal", nargs="+", choices=TEMPORAL_LAYERS, default=["ssm", "attention", "linear-attention"],
        help="temporal layers of the network")
    add("--frames", nargs="+", type=positive_int, default=[16, 64, 200, 400])
    add("--size", type=positive_int, default=32, help="height and width")
    add("--batch-size", type=positive_int, default=1)
    add("--base-channels", type=positive_int, default=64, help="width of the network")
    add("--channels", type=positive_int, default=64, help="width of the layer, for --what layer")
    add("--state-size", type=positive_int, help="N of each SSM; none: 512, of s6 16")
    add("--ssm", choices=model.SSMS, default="s4d", help="of --temporal mamba")
    add("--attention-impl", choices=model.ATTENTION_IMPLS, default="sdpa", help="math: with all logits at once")
    add("--precision", choices=("float32", "bf16"), default="float32")
    add("--grad-checkpoint", action="store_true", help="recompute blocks in the backward pass")
    add("--compile", action="store_true", help="torch.compile")
    add("--baseline", action="store_true", help="also the textbook formulation of each, and ratios to it")
    add("--reference", choices=("lucidrains",), help="also the package video-diffusion-pytorch; none: without")
    add("--repeats", type=positive_int, default=5, help="timed steps of each")
    add("--threads", type=positive_int, default=1, help="CPU threads")
    add("--device", help="cpu, cuda, cuda:1; none: cuda if there is one")
    add("--memory-gb", type=positive_float, help="most that a step may take; none: on the CPU 90 %% of what is free")
    add("--budget-gb", type=positive_float, help="find the widest network whose training step fits, for each layer")
    add("--out", type=Path, help="Markdown file for the table; the figure, if any, goes beside it")
    args = parser.parse_args()
    if args.budget_gb and (args.what not in (None, ["train"]) or args.baseline or args.reference or args.memory_gb):
        parser.error("--budget-gb is about the training step of our networks; it does not go with --what, --baseline, "
                     "--reference or --memory-gb")
    args.what = args.what or (["train"] if args.budget_gb else ["train", "sample"])
    return args


def plan(args):
    """-> the comparisons, a list of rows each."""
    comparisons = []
    for what in args.what:
        for frames in args.frames:
            formulations = ("ours", "textbook") if args.baseline else ("ours",)
            rows = [Row(what, frames, temporal, formulation) for formulation in formulations
                    for temporal in (["ssm"] if what == "layer" else args.temporal)]
            if args.reference and what != "layer":
                rows.append(Row(what, frames, "attention", args.reference))
            comparisons.append(rows)
    return comparisons


def main():
    args = parse_args()
    device = choose_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "mps":
        raise ValueError("--device mps: memory is measured on cpu and cuda only")
    args.device = str(device)
    if args.out and (args.out.suffix != ".md" or not args.out.parent.is_dir()):
        raise ValueError(f"--out {args.out}: expected a name that ends in .md, in a folder that exists")
    if args.out and not args.budget_gb and not importlib.util.find_spec("matplotlib"):
        print("no figure: pip install matplotlib")
    if args.reference:
        try:
            importlib.import_module("video_diffusion_pytorch")
        except ImportError as error:
            print(f"no rows of lucidrains ({error}): pip install video-diffusion-pytorch")
            args.reference = None
    comparisons = plan(args)
    if args.budget_gb:
        return find_widest([row for comparison in comparisons for row in comparison], args, device)
    rows = [row for comparison in comparisons for row in comparison]
    for row in rows:
        row.operations = count_operations(row, args)

    torch.set_num_threads(args.threads)
    peak = matmul_peak(device, args.precision)
    give_memory_back(device)
    heading = [f"{settings(args, device)}, base {args.base_channels}: {asked()}", f"peak: {peak / 1e9:,.0f} GFLOP/s"]
    table = [markdown(COLUMNS), markdown(["---"] * len(COLUMNS))]
    print(*heading, "", *table, sep="\n", flush=True)
    measured = []
    try:
        with tqdm(total=len(rows) * (1 + args.repeats), unit="step", disable=None) as bar:
            for comparison in comparisons:
                try:
                    compare(comparison, args, bar)
                finally:  # whatever happened, what is measured counts
                    done = [row for row in comparison if row.out_of_memory or row.steps]
                    lines = [markdown(table_row(row, done, args, peak)) for row in done]
                    for text in lines:
                        bar.write(text)
                    sys.stdout.flush()
                    measured, table = measured + done, table + lines
                    if args.out and measured:
                        save(args.out, heading, measured, table)
    except KeyboardInterrupt:
        sys.exit("bench.py: interrupted; the table has what was measured until then")


def find_widest(rows, args, device):
    """Print, and write to --out, the table of --budget-gb."""
    if device.type == "cuda":
        args.memory_gb = args.budget_gb
    lines = [f"{settings(args, device)}, budget {args.budget_gb:g} GB: {asked()}", "", markdown(BUDGET_COLUMNS),
             markdown(["---"] * len(BUDGET_COLUMNS))]
    print(*lines, sep="\n", flush=True)
    for row in rows:
        lines.append(markdown(widest(row, args, device)))
        print(lines[-1], flush=True)
        if args.out:
            replace_with(args.out, lambda temporary: temporary.write_text("\n".join([*lines, ""])))


def settings(args, device):
    return (f"{describe(device)}, {args.threads} thread(s), torch {torch.__version__}, {args.precision}, "
            f"{args.size}x{args.size}, batch {args.batch_size}")


def asked():
    return f"`{shlex.join(['python', 'bench.py', *sys.argv[1:]])}`"


def describe(device):
    """The name of the GPU or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if os.path.exists("/proc/cpuinfo"):
        found = re.search(r"^model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    run("bench.py", main)
