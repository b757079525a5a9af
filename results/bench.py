"""Time and memory of the network with each temporal layer: against the number of frames, against the textbook.

    python results/bench.py --out bench.md                               # the layers of Table 2; table and figure
    python results/bench.py --preset tiny --frames 16 64 --temporal ssm lstm     # a small network
    python results/bench.py --what layer --size 8 --frames 16 64 200 400 800 1600 --out layers.md \
        --temporal ssm attention "attention --attention-impl math" linear-attention lstm                     # Table 1
    python results/bench.py --what train --temporal ssm --frames 200 --baseline  # against the textbook
    python results/bench.py --budget-gb 24 --frames 256 --batch-size 8           # the widest network that fits

Each row is measured in a process of its own: one step to warm up, then --repeats steps, whose median counts. Flags that
--help does not list are train.py's, for all rows or, in quotes with a temporal layer, for its rows; unless given, the
batch size is 1 and the precision float32. --budget-gb runs nothing: it goes by memory.step_memory.

Glossary
    train       a training step: forward, backward, fused Adam
    sample      the network in a denoising step, as sample.py calls it; SSM kernels are computed once for all steps
    layer       one temporal layer alone, forward and backward
    textbook    the same in plain operations (the functions below), all frames, positions and f x f logits at once, SSMs
                by two FFTs and two flips; never compiled, nothing recomputed. Equal to ours to 1e-10 (test_all.py)
    GB          2^30 bytes. On a CPU how far the process grows beyond its size before the first step, when it holds the
                parameters; on CUDA the most that the allocator held, parameters included
    per frame   what each frame beyond the same layer's previous row costs: constant if linear
    ratio       to the first row of the same frames that fits; with --baseline, to the layer's own textbook form
"""
import argparse
import bisect
import functools
import importlib.util
import itertools
import json
import shlex
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model
import train
from command import (Parser, UserError, atomic_write, autocast, choose_device, choose_precision, positive_float,
                     positive_int, run)
from data import DataError
from memory import peak_memory, step_memory
from s4d import TemporalSSM, cached_kernels
from sample import for_sampling

Row = namedtuple("Row", "what frames temporal form")  # form: "ours" or "textbook"
COLUMNS = "M parameters", "seconds", "GB", "ms per frame", "MB per frame", "ratio of seconds", "ratio of GB"
BUDGET_COLUMNS = "base channels", "M parameters", "GB", "GB of the next width"


# ---------------------------------------------------------------------------------------- the textbook


def textbook_temporal_ssm(layer, x):
    """As in the paper's Sec. 3.2."""
    H = layer.norm(x)
    X = rearrange(H, "b f h w c -> (b h w) f c")
    X = layer.apply_mlp(X) if layer.mlp_position == "pre" else X
    U = sum(textbook_s4d(ssm, X.flip(1)).flip(1) if ssm.reverse else textbook_s4d(ssm, X) for ssm in layer.directions)
    U = layer.apply_mlp(U) if layer.mlp_position == "post" else U
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
        x = x * (scale.mT[..., None, None] + 1) + shift.mT[..., None, None]
    return rearrange(F.silu(x), "b c f h w -> b f h w c")


TEXTBOOK = {TemporalSSM: textbook_temporal_ssm, model.SpatialLinearAttention: textbook_spatial_linear_attention,
            model.Block: textbook_block}


def use_textbook(module):
    """Let every layer in `module` compute by its textbook form -> module."""
    for layer in module.modules():
        if type(layer) in TEXTBOOK:
            layer.forward = functools.partial(TEXTBOOK[type(layer)], layer)
        elif isinstance(layer, model.TemporalAttention):
            layer.impl = "math"
    module.grad_checkpoint = False
    return module


# ---------------------------------------------------------------------------------------- measuring, and the command


def settings(row, others):
    """train.py's settings for a row: defaults, `others` of its flags, the row; out/bench holds no run to resume."""
    defaults = "--batch-size 1 --precision float32 --out out/bench" + " --channel-mults 1" * (row.what == "layer")
    return train.parse_args([*defaults.split(), *others, *f"--frames {row.frames} --temporal {row.temporal}".split()])


def build(row, args, channels):
    """-> the network of a row, or its layer, and the tuple of its inputs."""
    config = train.unet_config(args)
    if row.what == "layer":
        video = torch.randn(args.batch_size, row.frames, args.size, args.size, channels, requires_grad=True)
        bias = [model.RelativePositionBias(config.heads)(row.frames)] if args.temporal == "attention" else []
        net, inputs = model.make_temporal_layer(config, channels), (video, *bias)
    else:
        video = torch.randn(args.batch_size, 3, row.frames, args.size, args.size)
        net, inputs = model.UNet3D(config, args.grad_checkpoint), (video, torch.full((len(video),), 128))
    return use_textbook(net) if row.form == "textbook" else net, inputs


def measure(row, args, flags):
    """Run the steps of a row in this process -> the first three of COLUMNS."""
    device = choose_device(args.device)
    with device:
        net, inputs = build(row, args, flags.channels)
    network, ours = net, row.form == "ours"
    if row.what == "sample" and ours:
        network = for_sampling(net, device, choose_precision(device, args.precision), args.compile)
    elif args.compile and ours:
        model.compile_tails()
    target = torch.randn_like(inputs[0])
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, fused=True) if row.what == "train" else None

    def step():
        with autocast(device, args.precision), torch.set_grad_enabled(row.what != "sample"):
            y = network(*inputs)
        if row.what == "layer":
            torch.autograd.grad(y, [*inputs, *net.parameters()], target.to(y.dtype))
        elif row.what == "train":
            F.mse_loss(y.float(), target).backward()
            optimizer.step()
            optimizer.zero_grad()

    times, before = [], 0 if device.type == "cuda" else peak_memory(device)
    with cached_kernels(net, row.frames):  # neither training nor the textbook uses them
        for _ in range(1 + flags.repeats):
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        if flags.profile:
            with torch.profiler.profile() as profile:
                step()
            print(profile.key_averages().table(f"self_{device.type}_time_total", row_limit=40), file=sys.stderr)
    if device.type == "cuda":
        reserved = torch.cuda.max_memory_reserved(device) / 2**30
        print(f"first step: {times[0]:.1f} s; reserved: {reserved:.2f} GB", file=sys.stderr)
    memory = max(2**20, peak_memory(device) - before)  # never 0, for the ratios
    return model.count_parameters(net) / 1e6, sorted(times[1:])[flags.repeats // 2], memory / 2**30


def measure_in_a_process(row):
    """`measure` in another process, whose peak starts at this one's: here nothing is computed. None: out of memory."""
    child = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--row", json.dumps(row)], capture_output=True,
                           text=True)
    if child.returncode == -9 or child.returncode and "out of memory" in child.stderr:  # 9: killed
        return None
    if child.returncode:
        sys.exit(child.stderr.strip())
    sys.stderr.write(child.stderr)  # the profile; on CUDA the first step and the memory reserved
    return json.loads(child.stdout.splitlines()[-1])


def widest(row, budget, others):
    """The widest network whose training step takes at most `budget` GB -> BUDGET_COLUMNS; None: none is so small."""
    def args(base):
        return settings(row, [*others, *f"--base-channels {base} --heads {base // 8} --time-dim {32 * base}".split()])

    def gigabytes(base):
        net = args(base)
        device = choose_device(net.device)
        return step_memory(train.unet_config(net), (net.batch_size, 3, net.frames, net.size, net.size), device,
                                 choose_precision(device, net.precision), net.grad_checkpoint) / 2**30

    base = 8 * bisect.bisect_right(range(8, 1024, 8), budget, key=gigabytes)
    if base:
        with torch.device("meta"):
            net = model.UNet3D(train.unet_config(args(base)))
        return base, model.count_parameters(net) / 1e6, gigabytes(base), gigabytes(base + 8)


def draw(path, results):
    """Seconds and memory against frames, on log axes: two panels for each `what`, a curve per layer and form."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure((11, 4.5 * len(results)), layout="constrained")
    for (what, curves), panels in zip(results.items(), figure.subplots(len(results), 2, squeeze=False)):
        frames, first = sorted(set().union(*curves.values())), next(iter(curves.values()))
        for panel, column in zip(panels, (1, 2)):
            for name, curve in curves.items():
                style = "o--" if "textbook" in name else "o-"
                panel.plot(list(curve), [curve[f][column] for f in curve], style, label=", ".join(name))
            panel.plot(frames, [first[max(first)][column] * f / max(first) for f in frames], "k:", label="linear")
            panel.set(title=what, xlabel="frames", ylabel=COLUMNS[column], xscale="log", yscale="log")
            panel.set_xticks(frames, frames)
            panel.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
            panel.minorticks_off()
        panels[0].legend(fontsize="small")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def parse_args():
    """-> our own flags, and the list of those that are train.py's."""
    parser = Parser("bench.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                    epilog="All other flags are train.py's: --preset, --base-channels, --size, --device ...")
    add = parser.add_argument
    add("--what", nargs="+", choices=("train", "sample", "layer"), default=["train", "sample"],
        help="training steps, denoising steps, single layers")
    add("--temporal", nargs="+", default=["ssm", "attention", "linear-attention"],
        help="layers; quoted, with flags: 'ssm --skip norm'")
    add("--frames", nargs="+", type=positive_int, default=[16, 64, 200, 400], help="of the video")
    add("--channels", type=positive_int, default=64, help="width of the layer, for --what layer")
    add("--baseline", action="store_true", help="also the textbook form of each layer, and ratios to it")
    add("--repeats", type=positive_int, default=5, help="timed steps of each")
    add("--threads", type=positive_int, default=1, help="CPU threads")
    add("--budget-gb", type=positive_float, help="find the widest network whose training step fits, for each layer")
    add("--out", type=Path, help="Markdown file for the table; a figure, with matplotlib, goes beside it")
    add("--profile", action="store_true", help=argparse.SUPPRESS)
    add("--row", type=json.loads, help=argparse.SUPPRESS)
    flags, others = parser.parse_known_args()
    if flags.out and flags.out.suffix != ".md":
        parser.error(f"--out {flags.out}: expected a name that ends in .md")
    return flags, others


def main():
    flags, others = parse_args()
    torch.set_num_threads(flags.threads)
    if flags.row:
        return print(json.dumps(measure(row := Row(*flags.row), settings(row, others), flags)))

    whats, forms = ["train"] if flags.budget_gb else flags.what, ["textbook", "ours"] if flags.baseline else ["ours"]
    rows = [Row(*cells) for cells in itertools.product(whats, sorted({*flags.frames}), flags.temporal, forms)]
    for row in rows:  # all that is wrong with them shows here
        args = settings(row, others)
        if flags.baseline and args.temporal not in ("ssm", "attention", "linear-attention"):
            raise UserError(f"--baseline: {args.temporal} has no textbook form")
    device = choose_device(args.device)
    if device.type == "mps":
        raise UserError("--device mps: memory is measured on cpu and cuda only")
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    files = [sys.stdout, open(flags.out, "w")] if flags.out else [sys.stdout]

    def show(line):
        for file in files:
            print(line, file=file, flush=True)

    columns = [*Row._fields, *(BUDGET_COLUMNS if flags.budget_gb else COLUMNS)]
    show(f"{machine}, torch {torch.__version__}: `{shlex.join(['python', 'results/bench.py', *sys.argv[1:]])}`\n")
    show(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    results, firsts = {}, {}
    try:
        for row in rows:
            numbers = widest(row, flags.budget_gb, others) if flags.budget_gb else measure_in_a_process(row)
            if numbers and not flags.budget_gb:
                curve = results.setdefault(row.what, {}).setdefault((row.temporal, row.form), {})
                fewer = max(curve, default=0)
                _, *less = curve.get(fewer, (0, 0, 0))
                _, *first = firsts.setdefault((row.what, row.frames, flags.baseline and row.temporal), numbers)
                _, *these = curve[row.frames] = numbers
                s, g = ((b - a) / (row.frames - fewer) for a, b in zip(less, these))
                numbers = *numbers, 1000 * s, 1024 * g, *(b / a for a, b in zip(first, these))
            cells = [f"{number:.4g}" for number in numbers] if numbers else ["out of memory"]
            show(f"| {' | '.join(map(str, [*row, *cells]))} |")
    finally:
        if flags.out and results and importlib.util.find_spec("matplotlib"):
            draw(flags.out.with_suffix(".png"), results)


if __name__ == "__main__":
    run("bench.py", main, DataError)
