"""Draw videos from a checkpoint of train.py.

    python sample.py                                              # the newest under out/, or the one in assets/
    torchrun --nproc-per-node 8 sample.py --num-samples 1000      # the same samples, shared among 8
    python sample.py --ckpt out/minerl-400-ssm --frames 800       # longer than the network was trained on
    python sample.py --condition clip.mp4 --given 0:8             # continue from the clip's first 8 frames
    python sample.py --condition clip.mp4 --given 0:4,12:16       # what may have happened in between
    python sample.py --frames 1000 --window 64 --overlap 16       # blocks of 64, each from the 16 frames before it
    python sample.py --class Archery --guidance 2                 # of a class, from a checkpoint of train.py --classes
    python sample.py --sampling-steps 50                          # DDIM: 50 network calls instead of 256

Writes NAME.npy, uint8 (num, frames, height, width, 3), which data.py reads; NAME.npy.json, what it was drawn from;
NAME.gif and NAME.mp4, the first 16 side by side; NAME.png, a row of frames of each; given frames have a white border
there. Sample i is a function of (checkpoint, seed, i, its given frames): neither the number of processes nor, but for
the last bits of floating-point sums, the batch size matters. The same command resumes an interrupted one.

Glossary
    b, c, f, h, w   batch, channels, frames, height, width
    x               videos inside the network, float (b, c, f, h, w) in [-1, 1]
    given           numbers of the frames that are not drawn but taken from a clip, or from the block before
    x_a             those frames
    block           frames that are drawn at once
"""
import functools
import gc
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from einops import rearrange
from PIL import Image, ImageDraw
from tqdm import tqdm

from command import (Parser, UserError, agree, atomic_write, autocast, barrier, choose_device, choose_precision, gather,
                     gist, join_processes, non_negative_float, non_negative_int, positive_int, processes,
                     rank_zero_first, rank_zero_print, run, zero_to_one)
from data import DataError, read_json, read_whole_videos, to_float, to_uint8
from diffusion import Diffusion, sample_generators, with_guidance
from memory import sampling_batch
from model import UNet3D, UNetConfig, compile_tails
from s4d import S6, cached_kernels

ASSET = Path(__file__).resolve().with_name("assets") / "maze64.pt"  # drawn from while there is no run of one's own
PICTURES = ".gif", ".mp4", ".png"


def draw(net, sample, shape, generators, labels=None, guidance=1.0, known=None, blocks=None):
    """Draw one video per generator -> uint8 array (b, f, h, w, 3).

    sample: `Diffusion.sample`, or a functools.partial of it with settings. shape: (c, f, h, w) of a video.
    labels, guidance: (b,) int, of a network with classes, and the scale of `with_guidance`.
    known: frames that are not drawn: x_a (b, c, k, h, w) in [-1, 1], and their k numbers.
    blocks: slices of frames, all of one length, drawn one after another, each with what is there already as given.
    The caller chooses the precision (`autocast`) and may enter `cached_kernels`.
    """
    denoiser = net if labels is None else with_guidance(net, labels, net.config.classes, guidance)
    device = generators[0].device
    x, given = torch.zeros(len(generators), *shape, device=device), torch.zeros(shape[1], device=device).bool()
    if known is not None:
        x_a, numbers = known
        x[:, :, numbers], given[numbers] = x_a.to(device), True
    for block in blocks or [slice(0, shape[1])]:
        part = (x[:, :, block], given[block]) if given[block].any() else None
        x[:, :, block] = sample(denoiser, x[:, :, block].shape, generators, known=part)
        given[block] = True
    return to_uint8(x).cpu().numpy()


# ---------------------------------------------------------------------------------------- checkpoint to network


def load_checkpoint(path):
    """Map a checkpoint, or a run's folder's, into memory, without running any code that might be in it -> dict, as
    train.py saved it. Raises UserError, or OSError if it cannot be read."""
    path = Path(path)
    if path.is_dir():
        path /= "ckpt.pt"
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if {"step", "config", "unet", "ema"} <= ckpt.keys():
            return ckpt
    except Exception as error:  # torch raises all sorts for other files
        if isinstance(error, OSError):
            raise
    spare = path.with_name("ckpt_previous.pt")
    raise UserError(f"{path} is no checkpoint of train.py, is damaged, or holds code, which is never run"
                    + (f"; the one before it is {spare}" if spare.is_file() and spare != path else ""))


def load_network(ckpt, device="cpu", *, weights="ema"):
    """Rebuild a network with its "ema" or "model" weights -> UNet3D in eval mode. Raises UserError.
    ckpt: what `load_checkpoint` returns or takes."""
    ckpt = ckpt if isinstance(ckpt, dict) else load_checkpoint(ckpt)
    if weights not in ckpt:
        raise UserError(f"--weights {weights}: this checkpoint was made for sampling and has its EMA weights only")
    try:
        net = UNet3D(UNetConfig(**ckpt["unet"]))
        net.load_state_dict(ckpt[weights])
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"the checkpoint does not fit this network: {gist(error)}") from None
    return net.to(device).eval().requires_grad_(False)


def for_sampling(net, device, precision, compiled=False):
    """-> what to call in the place of `net`, which is changed. In bf16 weights of linear layers and convolutions are
    cast: autocast caches its casts only while they need gradients, and would repeat them in every call."""
    for module in net.modules() if precision == "bf16" else ():
        for child in module.children():
            if isinstance(child, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)) and not isinstance(module, S6):
                child.to(torch.bfloat16)
    if compiled:
        compile_tails()
    return cuda_graphs(net) if compiled and device.type == "cuda" else net


def cuda_graphs(net):
    """A network (x_t, t, labels) -> output that replays a CUDA graph of `net`, captured at the first call of each
    shape; where gradients are asked for it is `net` itself. To be used while weights and S4D kernels stay."""
    graphs = {}

    def replay(x, t, labels=None):
        inputs = (x, t) if labels is None else (x, t, labels)
        if torch.is_grad_enabled():
            return net(*inputs)
        if x.shape not in graphs:
            graphs.clear()  # the last batch may be smaller, and each graph keeps the memory of a batch
            gc.collect()
            torch.set_autocast_cache_enabled(False)  # graphs do not go with it; autocast restores it at its end
            static = tuple(value.clone() for value in inputs)
            graphs[x.shape] = torch.cuda.make_graphed_callables(functools.partial(net), static)
        return graphs[x.shape](*inputs).clone()

    replay.config = net.config
    return replay


# ---------------------------------------------------------------------------------------- pictures


def grid(videos, given, columns=None, pixels=96):
    """uint8 (n, f, h, w, 3) -> (f, H, W, 3): side by side in rows, enlarged to about `pixels`, 4 black ones around and
    between them. The frames numbered in `given` get a white border."""
    scale = max(1, round(pixels / videos.shape[2]))
    videos = videos.repeat(scale, axis=2).repeat(scale, axis=3)
    for i in given:
        videos[:, i, :2] = videos[:, i, -2:] = videos[:, i, :, :2] = videos[:, i, :, -2:] = 255
    columns = columns or math.ceil(math.sqrt(len(videos)))
    tiles = np.pad(videos, ((0, -len(videos) % columns), (0, 0), (4, 0), (4, 0), (0, 0)))
    canvas = rearrange(tiles, "(rows columns) f h w rgb -> f (rows h) (columns w) rgb", columns=columns)
    return np.pad(canvas, ((0, 0), (0, 4), (0, 4), (0, 0)))


def save_gif(path, videos, given=(), fps=10):
    """Write uint8 videos (n, f, h, w, 3) side by side as an endless GIF; the frames numbered in `given` are marked."""
    frames = [Image.fromarray(frame) for frame in grid(videos, given)]
    with atomic_write(path) as file:
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=1000 // fps, loop=0)


def save_mp4(path, videos, given=(), fps=10):
    """The same as H.264."""
    import av  # here, so that train.py and bench.py work without it

    frames = grid(videos, given)
    height, width = (side // 2 * 2 for side in frames.shape[1:3])  # H.264 wants even ones
    with atomic_write(path) as file, av.open(file, "w", format="mp4") as container:
        # without x264's macroblock tree, and in one thread: else the same frames give other bytes each time
        stream = container.add_stream("libx264", rate=fps, height=height, width=width,
                                      options={"crf": "18", "x264-params": "mbtree=0:threads=1"})
        for frame in frames[:, :height, :width]:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def save_sheet(path, videos, given, captions):
    """Write them as a contact sheet, a PNG: a row for each, its caption beside it, of eight evenly spaced frames from
    the first to the last, under their numbers."""
    picked = np.linspace(0, videos.shape[1] - 1, min(8, videos.shape[1])).round().astype(int)
    tiles = grid(videos[:, picked], np.flatnonzero(np.isin(picked, given)), columns=1, pixels=64)[:, :, :-4]
    text_box = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox
    left, top = 4 + max(int(text_box((0, 0), caption)[2]) for caption in captions), 12
    sheet = Image.fromarray(np.pad(np.hstack(tiles), ((top, 0), (left, 4), (0, 0))))
    pen, side = ImageDraw.Draw(sheet), tiles.shape[2]
    for i, frame in enumerate(picked):
        pen.text((left + 4 + i * side, 2), str(frame))
    for i, caption in enumerate(captions):
        pen.multiline_text((4, top + 2 + i * side), caption)
    with atomic_write(path) as file:
        sheet.save(file, "PNG", optimize=True)


# ---------------------------------------------------------------------------------------- flags


def parse_args(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--ckpt", type=Path, help="checkpoint, or a run's folder (the newest under out/, else the one in assets/)")
    add("--num", "--num-samples", type=positive_int, help="videos (16, of assets/ 4); under torchrun: --num-samples")
    add("--batch-size", type=positive_int, help="videos drawn at once by each process (as memory allows)")
    add("--seed", type=non_negative_int, default=0, help="sample i is a function of the seed and i (0)")
    add("--frames", type=positive_int, help="frames per video (as trained)")
    add("--size", type=positive_int, help="height and width (as trained)")
    add("--sampler", choices=("ddpm", "ddim"), help="ancestral, all steps; or DDIM (ddpm; of assets/, and with "
        "one of the next two, ddim)")
    add("--sampling-steps", type=positive_int, help="of ddim (50, of assets/ 25; at most all)")
    add("--eta", type=zero_to_one, help="of ddim: 0, deterministic, to 1, with the posterior's noise (0, of assets/ 1)")
    add("--class", dest="label", metavar="NAME", help="class to draw (sample i has class i mod their number)")
    add("--guidance", type=non_negative_float, default=1.0, help="1: none; above 1: stronger "
        "class, at twice the time; 0: unconditional (1)")
    add("--condition", type=Path, metavar="CLIP", help="video whose --given frames are kept; of a packed .npy sample i "
        "takes video i mod their number")
    add("--condition-start", type=non_negative_int, default=0, metavar="N", help="the clip's frame that is frame 0 (0)")
    add("--given", metavar="FRAMES", help="frames to keep: a Python slice, 0:8, or several, 0:8,20:24")
    add("--condition-weight", type=non_negative_float, default=10.0, help="w_r of reconstruction guidance towards "
        "given frames; 0: the replacement method, in half the time (10)")
    add("--window", type=positive_int, help="draw so many frames at a time (all at once)")
    add("--overlap", type=positive_int, help="frames that each window shares with the one before (a quarter)")
    add("--weights", choices=("ema", "model"), default="ema", help="EMA weights or the latest (ema)")
    add("--precision", choices=("auto", "bf16", "float32"), default="auto", help="auto: bf16 if native (auto)")
    add("--compile", action="store_true", help="torch.compile the elementwise work; a CUDA graph on CUDA")
    add("--device", help="cpu, cuda, cuda:1, mps (the best there is)")
    add("--out", type=Path, help=".npy file to write, in a folder that all machines share "
        "(samples_STEP.npy beside the checkpoint, or with a number; of assets/ in out/)")
    args = parser.parse_args(argv)
    if args.ckpt is None:
        args.ckpt = max(Path("out").glob("**/ckpt.pt"), key=os.path.getmtime, default=ASSET)
    elif args.ckpt.is_dir():
        args.ckpt /= "ckpt.pt"
    args.asset = args.ckpt.resolve().parent == ASSET.parent
    if args.sampler == "ddpm" and (args.sampling_steps or args.eta is not None):
        parser.error("--sampling-steps and --eta go with --sampler ddim; ddpm takes all steps")
    for flag, needs in [("condition", "given"), ("given", "condition"), ("condition_start", "condition"),
                        ("overlap", "window")]:
        if getattr(args, flag) and not getattr(args, needs):
            parser.error(f"--{flag.replace('_', '-')} {getattr(args, flag)} goes with --{needs}")
    if args.out and args.out.suffix != ".npy":
        parser.error(f"--out {args.out}: expected a name that ends in .npy")
    return args


def complete(args, ckpt, net):
    """Give the flags that were left out the values that the checkpoint decides. Raises UserError for what it cannot."""
    config, factor = ckpt["config"], 2 ** len(net.config.channel_mults) // 2
    args.frames, args.size, args.num = (args.frames or config["frames"], args.size or config["size"],
                                        args.num or (4 if args.asset else 16))
    if args.sampler is None:
        ddim = args.asset or args.sampling_steps or args.eta is not None
        args.sampler = "ddim" if ddim else "ddpm"
    if args.sampler == "ddim":
        steps, eta = (25, 1.0) if args.asset else (50, 0.0)
        args.sampling_steps = min(args.sampling_steps or steps, config["diffusion_steps"])
        args.eta = eta if args.eta is None else args.eta
    if args.size % factor:
        raise UserError(f"--size {args.size}: this network needs a size divisible by {factor}")
    classes = config["classes"] or []
    if args.label and args.label not in classes or args.guidance != 1 and not classes:
        flag = f"--class {args.label}" if args.label else f"--guidance {args.guidance:g}"
        raise UserError(f"{flag}: expected a class of {args.ckpt}, "
                        + (f"such as {', '.join(classes[:10])}" if classes else "which has none (train.py --classes)"))


def read_condition(args):
    """--condition and --given -> the given frames' numbers, sorted, and these frames of each clip, uint8 (given, h, w,
    3). Raises UserError or DataError."""
    numbers = set()
    try:
        for part in args.given.split(","):
            start, stop, *step = (int(bound) if bound else None for bound in part.split(":"))
            numbers.update(range(args.frames)[slice(start, stop, *step)])
    except (TypeError, ValueError):
        numbers.clear()
    if not 0 < len(numbers) < args.frames:
        raise UserError(f"--given {args.given}: expected a slice such as 0:8, or several, 0:8,20:24, of some, but not "
                        f"all, of the {args.frames} frames that a video has here (see --frames)")
    clips = [clip[args.condition_start:] for clip in read_whole_videos(args.condition, args.size)[:args.num]]
    if min(map(len, clips)) <= max(numbers):
        raise UserError(f"--given {args.given}: {args.condition} has only {min(map(len, clips))} frames from "
                        f"--condition-start {args.condition_start} on")
    return sorted(numbers), [torch.from_numpy(clip[sorted(numbers)]) for clip in clips]


def plan_blocks(args, given):
    """-> the blocks of `draw`, without those whose frames are all given. Raises UserError."""
    window = args.window or args.frames
    overlap = args.overlap or min(max(1, window // 4), window - 1)
    if window > args.frames:
        raise UserError(f"--window {window}: expected at most the {args.frames} frames of a video (see --frames)")
    if overlap >= window:
        raise UserError(f"--overlap {overlap}: expected fewer than the {window} frames of --window")
    # the last one begins earlier, so as to be whole
    starts = [min(start, args.frames - window) for start in range(0, args.frames - overlap, window - overlap)]
    return [slice(start, start + window) for start in starts if not {*range(start, start + window)} <= {*given}]


# ---------------------------------------------------------------------------------------- the command


def main():
    # ---- the checkpoint, and what is asked of it: all that can be wrong shows before anything is written
    args = parse_args()
    rank, _, world_size = processes()
    device = choose_device(args.device)
    args.precision = choose_precision(device, args.precision)
    ckpt = load_checkpoint(args.ckpt)
    net = load_network(ckpt, device, weights=args.weights)
    complete(args, ckpt, net)
    classes = ckpt["config"]["classes"]
    labels = [args.label or classes[i % len(classes)] for i in range(args.num)] if classes else None
    given, clips = read_condition(args) if args.given else ([], [])
    blocks = plan_blocks(args, given)

    # ---- NAME.npy.json says all that shapes the samples, and so whose they are
    free = "ckpt", "asset", "batch_size", "compile", "out"
    request = {name: value for name, value in vars(args).items() if name not in free} | {
        "step": ckpt["step"], "device": device.type, "weights_sha256": digest(net.state_dict().values()),
        "labels": labels, "condition": args.condition and args.condition.name, "condition_sha256": digest(clips)}
    request = json.dumps(request, indent=1).encode()
    join_processes()
    agree(request, "the processes read different checkpoints; start again once it is no longer being written")
    out, parts = rank_zero_first(functools.partial(claim_output, args, ckpt["step"], request))
    if out.exists():
        return rank_zero_print(f"{out} is there already, drawn by this same command; delete it to draw it again")

    # ---- the processes take batches in turn; an interrupted one is drawn again whole
    window = blocks[0].stop - blocks[0].start
    by_gradient = args.condition_weight > 0 and bool(given or len(blocks) > 1)
    shape = 1 if args.guidance == 1 else 2, 3, window, args.size, args.size
    size = args.batch_size or min(gather(sampling_batch(net, shape, device, args.precision, by_gradient)))
    size = min(size, math.ceil(args.num / world_size))
    files = [parts / f"{i:07d}" for i in range(args.num)]
    batches = [range(first, min(first + size, args.num)) for first in range(0, args.num, size)]
    mine = [batch for batch in batches[rank::world_size] if not all(files[i].exists() for i in batch)]
    announce(args, ckpt, blocks, f"{size} at a time by {world_size} x {device.type}")

    network = for_sampling(net, device, args.precision, args.compile)
    # where there is no terminal the bars, which tell the time left, come once a minute
    bar = functools.partial(tqdm, disable=rank > 0, mininterval=0.1 if sys.stderr.isatty() else 60)
    diffusion = Diffusion(ckpt["config"]["diffusion_steps"], device, ckpt["config"]["prediction"])
    sample = functools.partial(diffusion.sample, progress=functools.partial(bar, unit="step", leave=False),
                               steps=args.sampling_steps, eta=args.eta, weight=args.condition_weight)
    with autocast(device, args.precision), cached_kernels(net, window):
        for batch in bar(mine, unit="batch"):
            generators = sample_generators(args.seed, batch, device)
            numbers = torch.tensor([classes.index(labels[i]) for i in batch], device=device) if classes else None
            known = (to_float(torch.stack([clips[i % len(clips)] for i in batch])), given) if given else None
            videos = draw(network, sample, (3, args.frames, args.size, args.size), generators, numbers, args.guidance,
                          known, blocks)
            for i, video in zip(batch, videos):
                with atomic_write(files[i]) as file:
                    file.write(video.data)
    barrier()
    if rank == 0:
        captions = [f"sample {i}" + (f"\n{labels[i]}" if labels else "") + (f"\ngiven {args.given}" if given else "")
                    for i in range(min(16, args.num))]
        write_files(out, files, (args.frames, args.size, args.size, 3), given, captions)
        shutil.rmtree(parts)
        rank_zero_print(f"wrote {out.absolute()}, and beside it pictures: {', '.join(PICTURES)}")


def claim_output(args, step, request):
    """-> the .npy file to write, and a folder for its samples until all are drawn. The file is --out, or the first of
    samples_STEP.npy, samples_STEP_2.npy, ... that no other samples have; from now on its NAME.npy.json says that it is
    this request's. Raises UserError."""
    folder, stem = Path("out") / args.ckpt.stem if args.asset else args.ckpt.parent, f"samples_{step:07d}"
    for number in itertools.count(1):
        out = args.out or folder / (f"{stem}.npy" if number == 1 else f"{stem}_{number}.npy")
        about, parts = out.with_name(f"{out.name}.json"), out.with_name(f".{out.name}.parts")
        taken = [file for file in (about, out, *map(out.with_suffix, PICTURES)) if file.exists()]
        if not taken:
            shutil.rmtree(parts, ignore_errors=True)  # whatever it holds is older
            parts.mkdir(parents=True)
            with atomic_write(about) as file:
                file.write(request)
        if not taken or about.exists() and about.read_bytes() == request:
            parts.mkdir(exist_ok=True)
            return out, parts
        if args.out:
            raise UserError(f"{taken[0]} belongs to other samples; delete it or choose another --out")


def announce(args, ckpt, blocks, batches):
    """Print what is drawn from what, and warn of what the network was not trained for."""
    config, window = ckpt["config"], blocks[0].stop - blocks[0].start
    if args.asset:
        rank_zero_print("drawing from the small network that comes with the code; python train.py --preset tiny trains "
                        "your own")
    rank_zero_print(f"{args.ckpt}: step {ckpt['step']}, {args.weights} weights; {plural(args.num, 'video')} of "
        f"{plural(args.frames, 'frame')}, {args.size}x{args.size}, {batches}; "
        f"{args.sampler}, {plural(args.sampling_steps or config['diffusion_steps'], 'step')}, seed {args.seed}"
        + (f"; class {args.label or 'in turn'}, guidance {args.guidance:g}" if config["classes"] else "")
        + (f"; frames {args.given} of {args.condition} given" if args.given else "")
        + (f"; {len(blocks)} blocks of {window} frames" if len(blocks) > 1 else ""))
    if window > config["frames"] or args.size != config["size"]:
        rank_zero_print(f"warning: trained on {config['frames']} frames, {config['size']}x{config['size']}, to draw "
            f"{window}, {args.size}x{args.size}, at once"
            + (f"; --window {config['frames']} draws long videos by blocks" if window > config["frames"] else ""))
    if args.condition:
        trained = config.get("data_stride", 1)
        is_array = args.condition.suffix.lower() == ".npy"  # without an index it may be of any stride
        stride = read_json(args.condition.with_suffix(".json")).get("stride", trained) if is_array else 1
        if stride != trained:
            rank_zero_print(f"warning: trained on clips of --stride {trained}, to continue {args.condition} of stride "
                            f"{stride}; python data.py --stride packs a clip like those")


def plural(number, noun):
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def digest(tensors):
    """-> SHA-256 of the tensors' bytes."""
    return hashlib.sha256(b"".join(tensor.cpu().numpy().tobytes() for tensor in tensors)).hexdigest()


def write_files(out, files, shape, given, captions):
    """Make the array and its pictures of the samples' files, each with the frames of one video of this shape."""
    videos = np.stack([np.memmap(file, np.uint8, "r", shape=shape) for file in files[:16]])
    save_gif(out.with_suffix(".gif"), videos, given)
    save_mp4(out.with_suffix(".mp4"), videos, given)
    save_sheet(out.with_suffix(".png"), videos, given, captions)
    with atomic_write(out) as array:  # comes last: that it exists says that all is there
        np.lib.format.write_array_header_1_0(array, {"descr": "|u1", "fortran_order": False,
                                                     "shape": (len(files), *shape)})
        for file in files:
            with open(file, "rb") as video:
                shutil.copyfileobj(video, array)


if __name__ == "__main__":
    run("sample.py", main, DataError)
