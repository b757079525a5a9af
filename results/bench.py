"""Time and memory of the network with each temporal layer: against the number of frames, against the textbook.

    python results/bench.py --out bench.md                               # the layers of Table 2; table and figure
    python results/bench.py --what layer --size 8 --frames 16 64 200 400 800 1600 --out layers.md \
        --temporal ssm attention "attention --attention-impl math" linear-attention lstm                     # Table 1
    python results/bench.py --what train --temporal ssm --frames 200 --baseline  # against the textbook
    python results/bench.py --what stream windows whole --preset tiny --temporal ssm --frames 100 400 --repeats 1

Each row is measured in a process of its own: one step to warm up, then --repeats steps, whose median counts. Flags that
--help does not list are train.py's, for all rows or, in quotes with a temporal layer, for its rows; unless given, the
batch size is 1 and the precision float32.

Glossary
    train       a training step: forward, backward, fused Adam
    sample      the network in a denoising step, as sample.py calls it; SSM kernels are computed once for all steps
    layer       one temporal layer alone, forward and backward
    stream      a video drawn by --steps steps of DDIM, a frame at a time, by the causal network
    windows     the same by the bidirectional network in windows of 32 frames, 8 of them from the window before
    whole       the same, all frames at once
    textbook    temporal layers in plain operations: SSMs by two FFTs and two flips (below), attention with all f x f
                logits at once; never compiled, nothing recomputed. Equal to ours to 1e-10 (test_all.py)
    seconds     of the processor where the work is one CPU thread, else by the clock
    GB          2^30 bytes: on a CPU, what the process grows by during the steps; on CUDA, all that PyTorch held at once
    per frame   what each frame beyond the same layer's previous row costs: constant if linear
    ratio       to the first row of the same frames that fits; with --baseline, to the layer's own textbook form
"""
import argparse
import functools
import importlib.util
import itertools
import json
import math
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
from command import Parser, UserError, atomic_write, autocast, choose_device, choose_precision, positive_int, run
from data import DataError
from diffusion import Diffusion
from memory import peak_memory
from s4d import TemporalSSM, cached_kernels, streaming
from sample import for_sampling

Row = namedtuple("Row", "what frames temporal form")  # form: "ours" or "textbook"
COLUMNS = "M parameters", "seconds", "GB", "ms per frame", "MB per frame", "ratio of seconds", "ratio of GB"
VIDEOS = "stream", "windows", "whole"
WINDOW, OVERLAP = 32, 8
FLAGS = {"layer": ["--channel-mults", "1"], "stream": ["--causal"]}  # of train.py, that rows of this kind take


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


def use_textbook(module):
    """Let every temporal layer in `module` compute by its textbook form -> module."""
    for layer in module.modules():
        if isinstance(layer, TemporalSSM):
            layer.forward = functools.partial(textbook_temporal_ssm, layer)
        elif isinstance(layer, model.TemporalAttention):
            layer.impl = "math"
    module.grad_checkpoint = False
    return module


# ---------------------------------------------------------------------------------------- measuring, and the command


def settings(row, others):
    """train.py's settings for a row: defaults, `others` of its flags, the row; out/bench holds no run to resume."""
    defaults = "--batch-size 1 --precision float32 --out out/bench".split()
    return train.parse_args([*defaults, *FLAGS.get(row.what, []), *others,
                             *f"--frames {row.frames} --temporal {row.temporal}".split()])


def build(row, args, channels):
    """-> the network of a row, or its layer, and the tuple of its inputs."""
    config = train.unet_config(args)
    if row.what == "layer":
        video = torch.randn(args.batch_size, row.frames, args.size, args.size, channels, requires_grad=True)
        bias = [model.RelativePositionBias(config.heads)(row.frames)] if args.temporal == "attention" else []
        net, inputs = model.make_temporal_layer(config, channels), (video, *bias)
    else:
        frames = {"stream": 1, "windows": WINDOW}.get(row.what, row.frames)
        video = torch.randn(args.batch_size, 3, frames, args.size, args.size)
        net, inputs = model.UNet3D(config, args.grad_checkpoint), (video, torch.full((len(video),), 128))
    return use_textbook(net) if row.form == "textbook" else net, inputs


def draw_videos(what, net, diffusion, shape, steps):
    """Yields, without end, when the next frame of a stream is done, the next window, or the next whole video."""
    if what == "stream":
        b, c, _, h, w = shape
        with streaming(net) as advance:
            yield from diffusion.stream(net, advance, (b, c, h, w), steps=steps)
    known, given = None, torch.arange(shape[2], device=diffusion.device) < OVERLAP
    while True:
        x = diffusion.sample(net, shape, steps=steps, eta=0.5, known=known)
        if what == "windows":
            known = x.roll(OVERLAP, 2), given
        yield


def measure(row, args, flags):
    """Run the steps of a row in this process -> the first three of COLUMNS."""
    device = choose_device(args.device)
    with device:
        net, inputs = build(row, args, flags.channels)
    network, trains = net, row.what in ("train", "layer")
    if row.form == "ours" and not trains:
        precision = choose_precision(device, args.precision)
        network = for_sampling(net.requires_grad_(False), device, precision, args.compile)
    elif row.form == "ours" and args.compile:
        model.compile_tails()
    target = torch.randn_like(inputs[0])
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, fused=True) if row.what == "train" else None
    videos = draw_videos(row.what, network, Diffusion(args.diffusion_steps, device), target.shape, flags.steps)

    def step():
        with autocast(device, args.precision), torch.set_grad_enabled(trains):
            y = next(videos) if row.what in VIDEOS else network(*inputs)
        if row.what == "layer":
            torch.autograd.grad(y, [*inputs, *net.parameters()], target.to(y.dtype))
        elif row.what == "train":
            F.mse_loss(y.float(), target).backward()
            optimizer.step()
            optimizer.zero_grad()

    clock = time.process_time if device.type == "cpu" and flags.threads == 1 else time.perf_counter
    parts = row.frames / {"stream": 1, "windows": WINDOW - OVERLAP}.get(row.what, row.frames)  # of a video, a step each
    times, before = [], 0 if device.type == "cuda" else peak_memory(device)
    with cached_kernels(net, row.frames if row.what == "layer" else target.shape[2]):  # not for training, the textbook
        for _ in range(1 + math.ceil(flags.repeats * parts)):
            start = clock()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(clock() - start)
        if flags.profile:
            with torch.profiler.profile() as profile:
                step()
            print(profile.key_averages().table(f"self_{device.type}_time_total", row_limit=40), file=sys.stderr)
    if device.type == "cuda":
        reserved = torch.cuda.max_memory_reserved(device) / 2**30
        print(f"first step: {times[0]:.1f} s; reserved: {reserved:.2f} GB", file=sys.stderr)
    if row.what == "stream":
        tenth = math.ceil(parts / 10)
        begin, end = (1000 * sum(some) / tenth for some in (times[1:1 + tenth], times[-tenth:]))
        print(f"{row.frames} frames: {begin:.1f} ms each in the first tenth, {end:.1f} in the last", file=sys.stderr)
    memory = max(2**20, peak_memory(device) - before)  # never 0, for the ratios
    return model.count_parameters(net) / 1e6, sorted(times[1:])[len(times) // 2 - 1] * parts, memory / 2**30


def measure_in_a_process(row):
    """`measure` in another process, whose peak starts at this one's: here nothing is computed. None: out of memory."""
    child = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--row", json.dumps(row)], capture_output=True,
                           text=True)
    if child.returncode == -9 or child.returncode and "out of memory" in child.stderr:  # 9: killed
        return None
    if child.returncode:
        sys.exit(child.stderr.strip())
    sys.stderr.write(child.stderr)
    return json.loads(child.stdout.splitlines()[-1])


def draw(path, results):
    """Seconds (of videos: per frame) and memory against frames, on log axes: two panels for each kind of row."""
    from matplotlib.figure import Figure

    figure = Figure((11, 4.5 * len(results)), layout="constrained")
    for (what, curves), panels in zip(results.items(), figure.subplots(len(results), 2, squeeze=False)):
        frames = sorted(set().union(*curves.values()))
        for panel, column in zip(panels, (1, 2)):
            per_frame = what == "video" and COLUMNS[column] == "seconds"
            for name, curve in curves.items():
                values = [curve[f][column] / (f if per_frame else 1) for f in curve]
                panel.plot(list(curve), values, "o-", label=", ".join(name))
            panel.set(title=what, xlabel="frames", xscale="log", yscale="log",
                      ylabel="seconds per frame" if per_frame else COLUMNS[column])
            panel.set_xticks(frames, frames)
            panel.set_xticks([], minor=True)
        panels[0].legend(fontsize="small")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def parse_args():
    """-> this script's flags, and the list of those for train.py."""
    parser = Parser("bench.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                    epilog="All other flags are train.py's: --preset, --base-channels, --size, --device ...")
    add = parser.add_argument
    add("--what", nargs="+", choices=("train", "sample", "layer", *VIDEOS), default=["train", "sample"],
        help="training steps, denoising steps, single layers, videos drawn in three ways")
    add("--temporal", nargs="+", default=["ssm", "attention", "linear-attention"],
        help="layers; quoted, with flags: 'ssm --skip norm'")
    add("--frames", nargs="+", type=positive_int, default=[16, 64, 200, 400], help="of the video")
    add("--channels", type=positive_int, default=64, help="width of the layer, for --what layer")
    add("--steps", type=positive_int, default=8, help="of DDIM, for videos drawn")
    add("--baseline", action="store_true", help="also the textbook form of each layer, and ratios to it")
    add("--repeats", type=positive_int, default=5, help="timed steps, or videos drawn, of each")
    add("--most", type=positive_int, default=math.inf, help="frames of a row that is no stream")
    add("--threads", type=positive_int, default=1, help="CPU threads")
    add("--out", type=Path, help="NAME.md for the table; the figure, with matplotlib, is NAME.png")
    add("--profile", action="store_true", help=argparse.SUPPRESS)
    add("--row", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_known_args()


def main():
    flags, others = parse_args()
    torch.set_num_threads(flags.threads)
    if flags.row:
        row = Row(*flags.row)
        return print(json.dumps(measure(row, settings(row, others), flags)))

    forms = ["textbook", "ours"] if flags.baseline else ["ours"]
    rows = [Row(*cells) for cells in itertools.product(flags.what, sorted({*flags.frames}), flags.temporal, forms)]
    rows = [row for row in rows if row.what == "stream" or row.frames <= flags.most]
    for row in rows:  # all that is wrong with them shows here
        args = settings(row, others)
        if flags.baseline and args.temporal not in ("ssm", "attention"):
            raise UserError(f"--baseline: {args.temporal} has no textbook form")
    device = choose_device(args.device)
    if device.type == "mps":
        raise UserError("--device mps: memory is measured on cpu and cuda only")
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    files = [sys.stdout, open(flags.out.with_suffix(".md"), "w")] if flags.out else [sys.stdout]

    def show(line):
        for file in files:
            print(line, file=file, flush=True)

    show(f"{machine}, torch {torch.__version__}: `{shlex.join(['python', 'results/bench.py', *sys.argv[1:]])}`\n")
    show(f"| {' | '.join(Row._fields + COLUMNS)} |\n{'|---' * 11}|")
    results, firsts = {}, {}
    try:
        for row in rows:
            numbers = measure_in_a_process(row)
            if numbers:
                panel, name = ("video", row.what) if row.what in VIDEOS else (row.what, row.form)
                curve = results.setdefault(panel, {}).setdefault((row.temporal, name), {})
                fewer = max(curve, default=0)
                _, *less = curve.get(fewer, (0, 0, 0))
                _, *first = firsts.setdefault((panel, row.frames, row.temporal if flags.baseline else None), numbers)
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
