"""Time and memory of the network with each temporal layer: against the number of frames, against the textbook.

    python bench.py --frames 16 64 200 400 --out bench.md                # every layer of Table 2; table and figure
    python bench.py --what train --temporal ssm --frames 200 --baseline                  # against the textbook
    python bench.py --what layer --channels 512 --frames 400 --size 4 --baseline
    python bench.py --budget-gb 24 --frames 256 --batch-size 8                           # how wide a network fits
    python bench.py --gpu --out gpu.md                                   # all there is to know of a GPU, in ten minutes

Glossary
    train        a training step: forward, backward, fused Adam
    sample       a denoising step, without gradients; our SSM kernels are computed once for all steps
    layer        the temporal SSM layer alone, forward and backward
    textbook     the same network in plain operations (the functions below): each layer for all frames and positions at
                 once, the SSM kernel materialised and convolved by two FFTs and two flips, all f x f logits of
                 attention; never compiled, nothing recomputed. Equal to ours to 1e-10 (test_all.py)
    GB           2^30 bytes. On a CPU how far the process grows beyond its size before the first step, when it holds the
                 parameters; on CUDA the most that the allocator held, parameters included
    utilisation  operations per second as a share of the best rate of square matrix products; counted are the matrix
                 products and convolutions of the textbook's forward pass, for training three times, and no FFTs
    ratio        to the first row of the same frames that fits; with --baseline, to the layer's own textbook form

Each row is a process of its own: one step to warm up, then --repeats steps; seconds are their median. --budget-gb runs
nothing: train.step_memory estimates which is the widest network, in steps of 8 base channels, whose training step in
float32 takes at most that many GB, parameters included; heads and time embedding are base / 8 and 32 x base.
"""
import argparse
import bisect
import functools
import importlib.util
import json
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import model
from command import Parser, autocast, choose_device, peak_memory, positive_float, positive_int, run, whole_file
from diffusion import Diffusion, sample_generators
from model import TEMPORAL_LAYERS, UNet3D, UNetConfig, count_parameters, rotary_embedding
from s4d import TemporalSSM, cached_kernels
from train import step_memory

COLUMNS = "M parameters", "seconds", "GB", "utilisation, %", "ratio of seconds", "ratio of GB"
BUDGET_COLUMNS = "base channels", "M parameters", "GB", "GB of the next width"
Row = namedtuple("Row", "what frames temporal formulation")  # formulation: "ours" or "textbook"

STEP = "bench.py --batch-size 8 --precision bf16 --repeats 3 --frames 400 --temporal ssm --what train"  # of minerl-400
DRAW = STEP.replace("train", "sample")
TRAIN = "train.py --preset minerl-400 --eval-clips 0 --grid-samples 0 --grad-checkpoint --out out/gpu --steps"
COPY = ("import torch; from torch.utils.benchmark import Timer; a = torch.empty(2**28, device='cuda'); b = a.clone(); "
        "t = Timer('b.copy_(a)', globals=dict(a=a, b=b)).blocked_autorange().median; "
        "print(f'copy: {2 * a.nbytes / t / 1e12:.2f} TB/s')")
GPU_PLAN = (  # what --gpu runs, in the order that loses least if time runs out: seconds at most, command
    (30, "-m torch.utils.collect_env"), (30, f"-c {shlex.quote(COPY)}"), (120, "-m pytest -q test_all.py -k gpu"),
    (60, STEP), (60, f"{STEP} --grad-checkpoint"), (60, f"{STEP} --grad-checkpoint --profile"),
    (40, f"{DRAW} --batch-size 1"), (40, DRAW), (30, f"{STEP} --what layer --channels 64 --size 32"),
    (30, f"{STEP} --what layer --channels 512 --size 4"), (120, f"{STEP} --grad-checkpoint --compile"),
    (90, f"{DRAW} --compile"), (60, f"{TRAIN} 10"), (60, f"{TRAIN} 20"),
    (120, f"{STEP} --grad-checkpoint --frames 64 200 400 --temporal ssm attention linear-attention"))


# ---------------------------------------------------------------------------------------- the textbook


def textbook_temporal_ssm(layer, x):
    """As in the paper's Sec. 3.2."""
    def mlp(X):
        X = F.gelu(layer.mlp[0](X)) if len(layer.mlp) else X
        return layer.mlp[1](X) if len(layer.mlp) == 2 else X

    H = layer.norm(x)
    X = rearrange(H, "b f h w c -> (b h w) f c")
    X = mlp(X) if layer.mlp_position == "pre" else X
    U = sum(textbook_s4d(ssm, X.flip(1)).flip(1) if ssm.reverse else textbook_s4d(ssm, X) for ssm in layer.directions)
    U = mlp(U) if layer.mlp_position == "post" else U
    return (x if layer.skip == "input" else H) + rearrange(U, "(b h w) f c -> b f h w c", h=x.shape[2], w=x.shape[3])


def textbook_s4d(ssm, u):
    """As in the minimal S4D code: GLU(Linear(GELU(K * u + D u))), forward in time; u: (p, f, c) -> (p, f, c)."""
    u, L, k = u.mT, u.shape[1], ssm.kernel                                                  # p c f
    A = torch.complex(-k.log_A_real.exp(), k.A_imag)                                        # c n
    dtA = A * k.log_dt.exp()[:, None]
    CB = torch.view_as_complex(k.C) * (torch.exp(dtA) - 1) / A
    vandermonde = torch.exp(dtA[..., None] * torch.arange(L, device=u.device))              # c n f
    K = 2 * torch.einsum("cn,cnl->cl", CB, vandermonde).real                                # c f
    y = torch.fft.irfft(torch.fft.rfft(u.to(K.dtype), 2 * L) * torch.fft.rfft(K, 2 * L), 2 * L)[..., :L]
    y = F.gelu(y + u * ssm.D[:, None])                                                      # p c f
    y = F.conv1d(y, ssm.output_linear.weight[..., None], ssm.output_linear.bias)            # p 2c f
    return F.glu(y, dim=1).mT


def textbook_temporal_attention(layer, x, bias=None):
    X = rearrange(layer.norm(x), "b f h w c -> (b h w) f c")
    q, k, v = rearrange(layer.to_qkv(X), "p f (three heads d) -> three p heads f d", three=3, heads=layer.heads)
    q, k = rotary_embedding(q, layer.rotary_freqs), rotary_embedding(k, layer.rotary_freqs)
    if isinstance(layer, model.TemporalLinearAttention):
        context = torch.einsum("pnfd,pnfe->pnde", k.softmax(dim=-2), v)                     # p heads d e
        out = torch.einsum("pnde,pnfd->pnfe", context, q.softmax(dim=-1) * q.shape[-1] ** -0.5)
    else:
        logits = torch.einsum("pnid,pnjd->pnij", q * q.shape[-1] ** -0.5, k) + bias         # p heads f f
        out = torch.einsum("pnij,pnjd->pnid", logits.softmax(dim=-1), v)                    # p heads f d
    out = layer.to_out(rearrange(out, "p heads f d -> p f (heads d)"))
    return x + rearrange(out, "(b h w) f c -> b f h w c", h=x.shape[2], w=x.shape[3])


def textbook_spatial_linear_attention(layer, x):
    qkv = layer.to_qkv(layer.norm(x))
    q, k, v = rearrange(qkv, "b f h w (three n d) -> three b f n d (h w)", three=3, n=layer.heads)
    context = torch.einsum("bfndp,bfnep->bfnde", k.softmax(dim=-1), v)
    out = torch.einsum("bfnde,bfndp->bfnep", context, q.softmax(dim=-2) * q.shape[-2] ** -0.5)
    return x + layer.to_out(rearrange(out, "b f n e (h w) -> b f h w (n e)", h=x.shape[2]))


def textbook_block(layer, x, scale=None, shift=None):
    x = rearrange(x, "b f h w c -> b c f h w")
    x = layer.norm(F.conv3d(x, layer.conv.weight[:, :, None], layer.conv.bias, padding=(0, 1, 1)))
    if scale is not None:
        x = x * (scale[..., None, None, None] + 1) + shift[..., None, None, None]
    return rearrange(F.silu(x), "b c f h w -> b f h w c")


TEXTBOOK = {TemporalSSM: textbook_temporal_ssm, model.TemporalAttention: textbook_temporal_attention,
            model.TemporalLinearAttention: textbook_temporal_attention,
            model.SpatialLinearAttention: textbook_spatial_linear_attention, model.Block: textbook_block}


def use_textbook(module):
    """Let every layer in `module` compute by its textbook form -> module."""
    for layer in module.modules():
        if type(layer) in TEXTBOOK:
            layer.forward = functools.partial(TEXTBOOK[type(layer)], layer)
    module.grad_checkpoint = False
    return module


# ---------------------------------------------------------------------------------------- measuring, and the command


def unet_config(temporal, base, args):
    heads, time_dim = (base // 8, 32 * base) if args.budget_gb else (8, 16 * base)
    return UNetConfig(temporal, base_channels=base, heads=heads, time_dim=time_dim, state_size=args.state_size,
                      attention_impl=args.attention_impl, ssm=args.ssm if temporal == "mamba" else "s4d")


def build(row, args):
    """-> the network of a row, or its layer, and the tuple of its inputs."""
    if row.what == "layer":
        video = torch.randn(args.batch_size, row.frames, args.size, args.size, args.channels, requires_grad=True)
        net, inputs = TemporalSSM(args.channels, args.state_size or 512), (video,)
    else:
        video = torch.randn(args.batch_size, 3, row.frames, args.size, args.size)
        net = UNet3D(unet_config(row.temporal, args.base_channels, args), args.grad_checkpoint)
        inputs = video, torch.full((len(video),), 128)
    return use_textbook(net) if row.formulation == "textbook" else net, inputs


def measure(row, args, device):
    """Run the steps of a row in this process -> the first four of COLUMNS."""
    with device:
        net, inputs = build(row, args)
    if args.compile and row.formulation == "ours":
        model.compile_tails()
    noise, diffusion = torch.randn_like(inputs[0]), Diffusion(256, device)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, fused=True) if row.what == "train" else None

    def step():
        with autocast(device, args.precision):
            if row.what == "sample":
                generators = sample_generators(0, range(args.batch_size), device)
                return diffusion.sample(net, noise.shape, generators, steps=1, eta=0)
            if row.what == "layer":
                return torch.autograd.grad(net(*inputs), [*inputs, *net.parameters()], noise)
            loss = diffusion.loss(net, *inputs, noise).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    times, before = [], 0 if device.type == "cuda" else peak_memory(device)
    with cached_kernels(net, row.frames):  # neither training nor the textbook uses them
        for _ in range(1 + args.repeats):
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        if args.profile:
            with torch.profiler.profile() as profile:
                step()
            print(profile.key_averages().table(f"self_{device.type}_time_total", row_limit=40), file=sys.stderr)
            print(f"reserved: {torch.cuda.max_memory_reserved() / 2**30:.2f} GB", file=sys.stderr)
    seconds, memory = statistics.median(times[1:]), max(1, peak_memory(device) - before)
    return [count_parameters(net) / 1e6, seconds, memory / 2**30, 100 * utilisation(row, args, device, seconds)]


def utilisation(row, args, device, seconds):
    """See the glossary; of gss and mamba, which have no textbook form, the operations are their own."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        net, inputs = build(row._replace(formulation="textbook"), args)
        net(*inputs)
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if args.precision == "bf16" else torch.float32)
    product = min(Timer("a @ a", globals={"a": a}, num_threads=args.threads).blocked_autorange(min_run_time=1).times)
    return counter.get_total_flops() * (1 if row.what == "sample" else 3) / seconds / (2 * n**3 / product)


def measure_in_a_process(row):
    """`measure` in another process; []: out of memory. Its peak memory begins, on Linux, at that of this process, which
    therefore computes nothing."""
    flags = f"--what {row.what} --temporal {row.temporal} --frames {row.frames} --row {row.formulation}"
    # a new session: Ctrl-C is for this process, which then kills the other
    child = subprocess.run([sys.executable, __file__, *sys.argv[1:], *flags.split()], capture_output=True, text=True,
                           start_new_session=True)
    if child.returncode == -signal.SIGKILL or child.returncode and "out of memory" in child.stderr:
        return []
    if child.returncode:
        sys.exit(child.stderr.strip())
    if "--profile" in sys.argv:
        print(child.stderr)
    return json.loads(child.stdout.splitlines()[-1])


def widest(row, args):
    """The widest network whose training step fits --budget-gb, by bisection -> BUDGET_COLUMNS; [0]: none does."""
    def gigabytes(base):
        shape = args.batch_size, 3, row.frames, args.size, args.size
        return step_memory(unet_config(row.temporal, base, args), shape, args.grad_checkpoint) / 2**30

    base = 8 * bisect.bisect_right(range(8, 4096, 8), args.budget_gb, key=gigabytes)
    if base == 0:
        return [0]
    with torch.device("meta"):
        parameters = count_parameters(UNet3D(unet_config(row.temporal, base, args)))
    return [base, parameters / 1e6, gigabytes(base), gigabytes(base + 8)]


def parse_args():
    parser = Parser("bench.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--what", nargs="+", choices=("train", "sample", "layer"), default=["train", "sample"], help="see bench.py")
    add("--temporal", nargs="+", choices=TEMPORAL_LAYERS, default=["ssm", "attention", "linear-attention"])
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
    add("--repeats", type=positive_int, default=5, help="timed steps of each")
    add("--threads", type=positive_int, default=1, help="CPU threads")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")
    add("--budget-gb", type=positive_float, help="find the widest network whose training step fits, for each layer")
    add("--out", type=Path, help="Markdown file for the table; a figure, with matplotlib, goes beside it")
    add("--gpu", action="store_true", help="run all that there is to measure on a GPU; appended to --out (gpu.md)")
    add("--profile", action="store_true", help="the forty largest kernels of one more step, and the memory reserved")
    add("--row", choices=("ours", "textbook"), help="run the first row in this process and print its numbers")
    args = parser.parse_args()
    for wrong, message in (
            (args.baseline and {"gss", "mamba"} & {*args.temporal}, "--baseline: gss and mamba have no textbook form"),
            (args.size % 8 and (args.budget_gb or args.what != ["layer"]), f"--size {args.size}: not a multiple of 8"),
            (args.base_channels % 8, f"--base-channels {args.base_channels}: not a multiple of 8"),
            (args.ssm == "s4d" and (args.state_size or 2) % 2, f"--state-size {args.state_size}: not an even number"),
            (args.gpu and not torch.cuda.is_available(), "--gpu: there is no CUDA device here"),
            (args.device.startswith("mps"), "--device mps: memory is measured on cpu and cuda only"),
            (args.out and not (args.out.suffix == ".md" and args.out.parent.is_dir()),
             f"--out {args.out}: expected a name that ends in .md, in a folder that exists")):
        if wrong:
            parser.error(message)
    return args


def gpu_session(out, minutes=10):
    """Run GPU_PLAN, each command in a process of its own with a time limit; append what it prints to `out` at once."""
    end = time.monotonic() + 60 * minutes
    for limit, command in GPU_PLAN:
        left = min(limit, end - time.monotonic())
        text = f"\n## python {command}\n\n"
        try:
            done = subprocess.run([sys.executable, *shlex.split(command)], cwd=Path(__file__).parent, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=max(0.1, left))
            text += done.stdout[-12_000:] + (f"exit status {done.returncode}\n" if done.returncode else "")
        except subprocess.TimeoutExpired as error:
            text += (error.stdout or b"").decode()[-2_000:] + f"not finished in {left:.0f} s\n"
        print(text, flush=True)
        with open(out, "a") as file:
            file.write(text)


def draw(path, results):
    """Memory and seconds against frames, two panels for each `what`, a curve per layer and formulation."""
    from matplotlib.figure import Figure

    whats = list(dict.fromkeys(row.what for row in results))
    figure = Figure((11, 4.5 * len(whats)), layout="constrained")
    for what, panels in zip(whats, figure.subplots(len(whats), 2, squeeze=False)):
        for panel, column in zip(panels, (COLUMNS.index("GB"), COLUMNS.index("seconds"))):
            for curve in dict.fromkeys(row[2:] for row in results if row.what == what):
                points = [(row.frames, results[row][column]) for row in results if row == (what, row.frames, *curve)]
                panel.plot(*zip(*sorted(points)), "o--" if "textbook" in curve else "o-", label=", ".join(curve))
            panel.set(title=what, xlabel="frames", ylabel=COLUMNS[column], ylim=(0, None),
                      xticks=sorted({row.frames for row in results}))
        panels[0].legend()
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=120)


def main():
    args = parse_args()
    device = choose_device(args.device)
    if args.gpu:
        return gpu_session(args.out or Path("gpu.md"))
    torch.set_num_threads(args.threads)
    rows = [Row(what, frames, temporal, formulation) for what in (["train"] if args.budget_gb else args.what)
            for frames in args.frames for temporal in (["ssm"] if what == "layer" else args.temporal)
            for formulation in ([args.row] if args.row else ["textbook", "ours"] if args.baseline else ["ours"])]
    if args.row:
        return print(json.dumps(measure(rows[0], args, device)))

    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    setup = f"{args.threads} thread(s), {args.precision}, {args.size}x{args.size}, batch {args.batch_size}"
    lines = [f"{machine}, torch {torch.__version__}, {setup}: `{shlex.join(['python', 'bench.py', *sys.argv[1:]])}`\n"]
    print(lines[0])

    def show(cells):
        lines.append(f"| {' | '.join(map(str, cells))} |")
        print(lines[-1], flush=True)
        if args.out:
            with whole_file(args.out) as file:
                file.write("\n".join([*lines, ""]).encode())

    columns = [*Row._fields, *(BUDGET_COLUMNS if args.budget_gb else COLUMNS)]
    show(columns)
    show(["---"] * len(columns))
    results, references = {}, {}
    try:
        for row in rows:
            if args.budget_gb:
                numbers = widest(row, args)
            elif numbers := measure_in_a_process(row):
                first = references.setdefault((row.what, row.frames, args.baseline and row.temporal), numbers)
                results[row] = numbers = [*numbers, numbers[1] / first[1], numbers[2] / first[2]]
            show([*row, *(f"{number:.4g}" for number in numbers)] if numbers else [*row, "out of memory"])
    except KeyboardInterrupt:
        sys.exit("bench.py: interrupted; the table has what was measured until then")
    finally:
        if args.out and results and importlib.util.find_spec("matplotlib"):
            draw(args.out.with_suffix(".png"), results)


if __name__ == "__main__":
    run("bench.py", main)
