"""Time and peak memory of the temporal SSM layer and of whole training steps, against the textbook formulation.

    python bench.py layer --channels 512 --frames 400 --size 4
    python bench.py layer --channels 64 --frames 64 --size 32
    python bench.py step --frames 200 --size 32                     # forward, backward, Adam; paper's width
    python bench.py step --frames 400 --base-channels 16 --grad-checkpoint

"Textbook" is the same network with the layer written as in the paper's Sec. 3.2 and the minimal S4D code: the kernel's
Vandermonde tensor materialised, an FFT of the input for each direction, and flips. Both share their parameters' values
and compute the same function (test_all.py says so to 1e-10).

Each formulation runs in a process of its own. The processes take turns, one step each, and the median is reported.
Memory is the growth of the resident set from before the first step to its peak; on CUDA the allocator's peak.
"""
import functools
import multiprocessing
import os
import resource
import statistics
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from diffusion import Diffusion
from model import TEMPORAL_LAYERS, UNet3D, UNetConfig, count_parameters
from s4d import TemporalSSM
from sample import Parser, choose_device, positive_int, run
from train import peak_memory


class TextbookTemporalSSM(nn.Module):
    """TemporalSSM's parameters in the textbook formulation."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        layer, (h, w) = self.layer, x.shape[-2:]
        H = layer.norm(x)
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
        u, L = u.mT, u.shape[1]                                                             # p c f
        k = ssm.kernel
        A = torch.complex(-k.log_A_real.exp(), k.A_imag)                                    # c n
        dtA = A * k.log_dt.exp()[:, None]
        CB = torch.view_as_complex(k.C) * (torch.exp(dtA) - 1) / A
        vandermonde = torch.exp(dtA[..., None] * torch.arange(L, device=u.device))          # c n f
        K = 2 * torch.einsum("cn,cnl->cl", CB, vandermonde).real                            # c f
        y = torch.fft.irfft(torch.fft.rfft(u.to(K.dtype), 2 * L) * torch.fft.rfft(K, 2 * L), 2 * L)[..., :L]
        y = F.gelu(y + u * ssm.D[:, None])                                                  # p c f
        y = F.conv1d(y, ssm.output_linear.weight[..., None], ssm.output_linear.bias)        # p 2c f
        return F.glu(y, dim=1).mT


def use_textbook(module):
    """Put `TextbookTemporalSSM` in the place of every TemporalSSM inside `module`."""
    for name, child in module.named_children():
        if isinstance(child, TemporalSSM):
            setattr(module, name, TextbookTemporalSSM(child))
        else:
            use_textbook(child)
    return module


def make_step(args, textbook):
    """-> (function that runs one step, number of parameters)."""
    torch.manual_seed(0)
    if args.what == "layer":
        net = nn.Sequential(TemporalSSM(args.channels, args.state_size))
        x = torch.randn(args.batch_size, args.channels, args.frames, args.size, args.size)
    else:
        net = UNet3D(UNetConfig(temporal=args.temporal, base_channels=args.base_channels,
                                time_dim=16 * args.base_channels), grad_checkpoint=args.grad_checkpoint)
        x = torch.rand(args.batch_size, 3, args.frames, args.size, args.size) * 2 - 1
    net = (use_textbook(net) if textbook else net).to(args.device)
    x = x.to(args.device).requires_grad_(args.what == "layer")
    diffusion = Diffusion(256, args.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)
    t = torch.full((args.batch_size,), 128, device=args.device)

    def step():
        with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"):
            if args.what == "layer":
                loss = net(x).square().mean()
            else:
                loss = diffusion.loss(net, x, t, torch.randn_like(x)).mean()
        loss.backward()
        if args.what == "step":
            optimizer.step()
        net.zero_grad()
        x.grad = None

    return step, count_parameters(net)


def resident_bytes():
    """What the process holds in memory now; where the system does not tell, the most it ever held."""
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    return peak_memory(torch.device("cpu"))


def serve(args, textbook, pipe):
    """Run a step for every message that comes, and answer with (seconds, peak bytes so far, parameters)."""
    torch.set_num_threads(args.threads)
    step, parameters = make_step(args, textbook)
    cuda = args.device == "cuda"
    before = 0 if cuda else resident_bytes()
    pipe.send("ready")
    while pipe.recv() == "step":
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        pipe.send((seconds, peak_memory(torch.device(args.device)) - before, parameters))


def main():
    parser = Parser(prog="bench.py", description="Time and memory of this implementation against the textbook one.")
    parser.add_argument("what", choices=("layer", "step"), help="the temporal SSM layer alone, or a training step")
    parser.add_argument("--channels", type=positive_int, default=64, help="layer: its width (default 64)")
    parser.add_argument("--state-size", type=positive_int, default=512, help="layer: N (default 512)")
    parser.add_argument("--base-channels", type=positive_int, default=64, help="step: network's width (default 64)")
    parser.add_argument("--temporal", choices=TEMPORAL_LAYERS, default="ssm", help="step: temporal layer (default ssm)")
    parser.add_argument("--grad-checkpoint", action="store_true", help="step: recompute blocks in the backward pass")
    parser.add_argument("--frames", type=positive_int, default=64)
    parser.add_argument("--size", type=positive_int, default=32, help="height and width (default 32)")
    parser.add_argument("--batch-size", type=positive_int, default=1)
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--repeats", type=positive_int, default=5, help="timed steps, after one more (default 5)")
    parser.add_argument("--threads", type=positive_int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--only", choices=("ours", "textbook"), help="run one formulation, not both")
    args = parser.parse_args()
    args.device = choose_device(args.device).type

    context = multiprocessing.get_context("spawn")
    pipes, results = {}, {}
    for name in [args.only] if args.only else ["textbook", "ours"]:
        pipes[name], other = context.Pipe()
        work = functools.partial(serve, args, name == "textbook", other)
        context.Process(target=run, args=("bench.py", work), daemon=True).start()
        other.close()  # else the pipe of a process that failed would never end
        results[name] = []
    try:
        for pipe in pipes.values():
            pipe.recv()
        for _ in range(1 + args.repeats):
            for name, pipe in pipes.items():
                pipe.send("step")
                results[name].append(pipe.recv())
        for pipe in pipes.values():
            pipe.send("stop")
    except EOFError:
        sys.exit(1)  # the process that failed has said why

    size = f"{args.channels} channels" if args.what == "layer" else f"base {args.base_channels}, {args.temporal}"
    flags = ", grad-checkpoint" if args.grad_checkpoint else ""
    print(f"{args.what}: {size}, {args.frames} frames, {args.size}x{args.size}, batch {args.batch_size}, "
          f"{args.precision}, {args.device}, {args.threads} thread(s){flags}")
    summary = {}
    for name, steps in results.items():
        summary[name] = statistics.median(s for s, _, _ in steps[1:]), max(m for _, m, _ in steps)
        print(f"  {name:8s} {summary[name][0]:8.3f} s   {summary[name][1] / 2**20:8.0f} MB peak   "
              f"{steps[0][2] / 1e6:.2f} M parameters")
    if len(summary) == 2:
        print(f"  ratio    {summary['ours'][0] / summary['textbook'][0]:8.3f}     "
              f"{summary['ours'][1] / summary['textbook'][1]:8.3f}")


if __name__ == "__main__":
    run("bench.py", main)
