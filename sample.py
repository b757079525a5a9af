"""Draw videos from a checkpoint of train.py.

    python sample.py                                              # the newest under out/, or the one in assets/
    torchrun --nproc-per-node 8 sample.py --num-samples 1000      # the same samples, shared among 8
    python sample.py --ckpt out/minerl-400-ssm --frames 800       # longer than the network was trained on
    python sample.py --condition clip.mp4 --given 0:8             # continue from the clip's first 8 frames
    python sample.py --condition clip.mp4 --given 0:4,12:16       # what may have happened in between
    python sample.py --frames 1000 --window 64 --overlap 16       # blocks of 64, each from the 16 frames before it
    python sample.py --class Archery --guidance 2                 # of a class, from a checkpoint of train.py --classes
    python sample.py --sampling-steps 50                          # DDIM: 50 network calls instead of 256

Writes NAME.npy, uint8 (num, frames, height, width, 3), which data.py reads; NAME.npy.json, what it was drawn from; of
the first 16 side by side NAME.mp4 and NAME.gif (256 frames at most), and NAME.png, a row of frames of each; given
frames have a white border there. Sample i is a function of (checkpoint, seed, i, its given frames): neither the number
of processes nor, but for the last bits of floating-point sums, the batch size matters. The same command resumes an
interrupted one. A causal network (train.py --causal) streams: its frames are written as they come, however many.

Glossary
    b, c, f, h, w   batch, channels, frames, height, width
    x               videos inside the network, float (b, c, f, h, w) in [-1, 1]
    given, x_a      frames that are not drawn but taken from a clip or the block before: their numbers, and themselves
    block           frames that are drawn at once
"""
import contextlib
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
                     gist, join_processes, non_negative_float, non_negative_int, plural, positive_int, processes,
                     rank_zero_first, rank_zero_print, run, zero_to_one)
from data import DataError, read_json, read_whole_videos, to_float, to_uint8
from diffusion import Diffusion, sample_generators, with_guidance
from memory import sampling_batch
from model import UNet3D, UNetConfig, compile_tails
from s4d import S6, cached_kernels, streaming

ASSET = Path(__file__).resolve().with_name("assets") / "stream.pt"  # drawn from while there is no run of one's own
PICTURES = ".gif", ".mp4", ".png"


def draw(net, sample, shape, generators, x_a=None, given=(), blocks=None):
    """Draw one video per generator -> uint8 array (b, f, h, w, 3).

    net: (x_t, t) -> output. sample: `Diffusion.sample`, or a functools.partial of it. shape: (c, f, h, w) of a video.
    x_a, given: frames that are not drawn, (b, c, k, h, w) in [-1, 1], and their k numbers.
    blocks: slices of frames, all of one length, drawn one after another, each with what is there already as given.
    The caller chooses the precision (`autocast`) and may enter `cached_kernels`.
    """
    device = generators[0].device
    x, there = torch.zeros(len(generators), *shape, device=device), torch.zeros(shape[1], device=device).bool()
    if x_a is not None:
        x[:, :, given], there[given] = x_a, True
    for block in blocks or [slice(0, shape[1])]:
        known = (x[:, :, block], there[block]) if there[block].any() else None
        x[:, :, block] = sample(net, x[:, :, block].shape, generators, known=known)
        there[block] = True
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
    except OSError:
        raise
    except Exception:  # torch raises all sorts for other files
        pass
    raise UserError(f"{path} is no checkpoint of train.py, holds code, which is never run, or is damaged; "
                    "train.py keeps the one before as ckpt_previous.pt")


def load_network(ckpt, device="cpu", *, weights="ema"):
    """Rebuild a network with its "ema" or "model" weights -> UNet3D in eval mode. Raises UserError.
    ckpt: what `load_checkpoint` returns or takes."""
    ckpt = ckpt if isinstance(ckpt, dict) else load_checkpoint(ckpt)
    try:
        net = UNet3D(UNetConfig(**ckpt["unet"]))
        net.load_state_dict(ckpt[weights])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"--weights {weights}: the checkpoint has none that fit this network ({gist(error)})") from None
    return net.to(device).eval().requires_grad_(False)


def for_sampling(net, device, precision, compiled=False):
    """-> what to call in the place of `net`, which is changed. In bf16 weights of linear layers and convolutions are
    cast: autocast caches its casts only while they need gradients, and would repeat them in every call."""
    for module in net.modules() if precision == "bf16" else ():
        for child in module.children():
            if isinstance(child, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)) and not isinstance(module, S6):
                child.to(torch.bfloat16)
    if not compiled:
        return net
    compile_tails()  # no graphs of a stream, whose state changes from call to call
    return cuda_graphs(net) if device.type == "cuda" and not net.config.causal else net


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

    return replay


# ---------------------------------------------------------------------------------------- pictures


def grid(images, marked, columns=None, pixels=96):
    """uint8 (n, h, w, 3) -> (H, W, 3): side by side in rows, enlarged to about `pixels`, 4 black ones around and
    between them. marked: n bools, which of them get a white border."""
    scale = max(1, round(pixels / images.shape[1]))
    tiles = images.repeat(scale, axis=1).repeat(scale, axis=2)
    for i in np.flatnonzero(marked):
        tiles[i, :2] = tiles[i, -2:] = tiles[i, :, :2] = tiles[i, :, -2:] = 255
    columns = columns or math.ceil(math.sqrt(len(images)))
    tiles = np.pad(tiles, ((0, -len(tiles) % columns), (4, 0), (4, 0), (0, 0)))
    canvas = rearrange(tiles, "(rows columns) h w rgb -> (rows h) (columns w) rgb", columns=columns)
    return np.pad(canvas, ((0, 4), (0, 4), (0, 0)))


def grids(videos, given):
    """One after another the grids of the frames of n videos, uint8 (f, h, w, 3) each; those in `given` are marked."""
    for i in range(len(videos[0])):
        yield grid(np.stack([video[i] for video in videos]), [i in given] * len(videos))


def save_gif(path, videos, given=(), fps=10):
    """Write videos, n of uint8 (f, h, w, 3), side by side as an endless GIF of their first 256 frames; the frames
    numbered in `given` are marked."""
    frames = map(Image.fromarray, itertools.islice(grids(videos, given), 256))
    with atomic_write(path) as file:
        next(frames).save(file, "GIF", save_all=True, append_images=frames, duration=1000 // fps, loop=0)


def save_mp4(path, videos, given=(), fps=10):
    """The same as H.264, all frames."""
    import av  # here, so that train.py and bench.py work without it

    height, width = (side // 2 * 2 for side in next(grids(videos, given)).shape[:2])  # H.264 wants even ones
    with atomic_write(path) as file, av.open(file, "w", format="mp4") as container:
        # without x264's macroblock tree, and in one thread: else the same frames give other bytes each time
        stream = container.add_stream("libx264", rate=fps, height=height, width=width,
                                      options={"crf": "18", "x264-params": "mbtree=0:threads=1"})
        for frame in grids(videos, given):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame[:height, :width], format="rgb24")))
        container.mux(stream.encode())


def save_sheet(path, videos, given=()):
    """The same as a PNG: of each video a row of eight frames, evenly spaced from first to last, under their numbers."""
    length = len(videos[0])
    picked = np.linspace(0, length - 1, min(8, length)).round().astype(int)
    tiles = np.concatenate([video[picked] for video in videos])
    tiles = grid(tiles, [*np.isin(picked, given)] * len(videos), columns=len(picked), pixels=64)
    sheet = Image.fromarray(np.pad(tiles, ((12, 0), (0, 0), (0, 0))))
    for x, number in zip(range(4, sheet.width, (sheet.width - 4) // len(picked)), picked):
        ImageDraw.Draw(sheet).text((x, 2), str(number))
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
    add("--sampler", choices=("ddpm", "ddim"), help="ancestral, all steps (ddpm); or DDIM (of assets/, and streams)")
    add("--sampling-steps", type=positive_int, help="of DDIM, which they imply (50, of assets/ 25, of streams 16)")
    add("--eta", type=zero_to_one, help="of DDIM: from 0, no noise, to 1 (0, of assets/ 1, of streams 0.5)")
    add("--class", dest="label", metavar="NAME", help="class to draw (sample i has class i mod their number)")
    add("--guidance", type=non_negative_float, default=1.0, help="above 1: more like the class; 0: of no class (1)")
    add("--condition", type=Path, metavar="CLIP", help="video, or packed ones, of which --given frames are kept")
    add("--condition-start", type=non_negative_int, default=0, metavar="N", help="the clip's frame that is frame 0 (0)")
    add("--given", metavar="FRAMES", help="frames to keep: a Python slice, 0:8, or several, 0:8,20:24")
    add("--condition-weight", type=non_negative_float, default=10.0, metavar="W",
        help="w_r of reconstruction guidance towards given frames; 0: the replacement method, in half the time (10)")
    add("--window", type=positive_int, help="draw long videos by blocks of so many frames (all at once)")
    add("--overlap", type=positive_int, help="frames that each window shares with the one before (a quarter)")
    add("--weights", choices=("ema", "model"), default="ema", help="EMA weights or the latest (ema)")
    add("--precision", choices=("auto", "bf16", "float32"), default="auto", help="auto: bf16 if native (auto)")
    add("--compile", action="store_true", help="torch.compile the elementwise work; a CUDA graph on CUDA")
    add("--device", help="cpu, cuda, cuda:1, mps (the best there is)")
    add("--out", type=Path, help=".npy file to write, on a disk that all machines share (samples_STEP.npy beside CKPT)")
    args = parser.parse_args(argv)
    if args.ckpt is None:
        args.ckpt = max(Path("out").glob("**/ckpt.pt"), key=os.path.getmtime, default=ASSET)
    elif args.ckpt.is_dir():
        args.ckpt /= "ckpt.pt"
    args.asset = args.ckpt.resolve().parent == ASSET.parent
    args.num = args.num or (4 if args.asset else 16)
    if args.sampler == "ddpm" and (args.sampling_steps or args.eta is not None):
        parser.error("--sampling-steps and --eta go with --sampler ddim; ddpm takes all steps")
    for flag, needs in [("condition", "given"), ("given", "condition"), ("condition_start", "condition"),
                        ("overlap", "window")]:
        if getattr(args, flag) and not getattr(args, needs):
            parser.error(f"--{flag.replace('_', '-')} {getattr(args, flag)} goes with --{needs}")
    if args.out and args.out.suffix != ".npy":
        parser.error(f"--out {args.out}: expected a name that ends in .npy")
    return args


def complete(args, config, network):
    """Give flags that were left out the values that go with a checkpoint's config and its network's -> the samples'
    classes by name, or None. Raises UserError."""
    args.frames, args.size = args.frames or config["frames"], args.size or config["size"]
    implied = args.asset or network.causal or args.sampling_steps or args.eta is not None
    args.sampler = args.sampler or ("ddim" if implied else "ddpm")
    if args.sampler == "ddim":
        steps, eta = (16, 0.5) if network.causal else (25, 1.0) if args.asset else (50, 0.0)
        args.sampling_steps = min(args.sampling_steps or steps, config["diffusion_steps"])
        args.eta = eta if args.eta is None else args.eta
    if network.causal and (args.window or args.sampler == "ddpm"):
        raise UserError("a causal network draws frame by frame, by DDIM: leave out --sampler ddpm and --window")
    divisor, classes = 2 ** (len(network.channel_mults) - 1), config["classes"]
    if args.size % divisor:
        raise UserError(f"--size {args.size}: this network needs a size divisible by {divisor}")
    if args.size != config["size"]:
        rank_zero_print(f"warning: trained on frames of size {config['size']}, to draw those of size {args.size}")
    if args.label and args.label not in (classes or ()):
        raise UserError(f"--class {args.label}: this network's are {', '.join(classes or ['none'])}")
    if args.guidance != 1 and not classes:
        raise UserError(f"--guidance {args.guidance:g} is towards a class; this network was trained without classes")
    return [args.label or classes[i % len(classes)] for i in range(args.num)] if classes else None


def read_condition(args, trained_stride):
    """--condition and --given -> the given frames' numbers, sorted, and these frames of each clip, uint8 (given, h, w,
    3). Raises UserError or DataError."""
    try:
        slices = [[int(bound) if bound else None for bound in part.split(":")] for part in args.given.split(",")]
        numbers = sorted({i for start, stop, *step in slices for i in range(args.frames)[slice(start, stop, *step)]})
    except (TypeError, ValueError):
        numbers = []
    if not 0 < len(numbers) < args.frames:
        raise UserError(f"--given {args.given}: expected a slice such as 0:8, or several, 0:8,20:24, of some, but not "
                        f"all, of the {args.frames} frames that a video has here (see --frames)")
    clips = [clip[args.condition_start:] for clip in read_whole_videos(args.condition, args.size)[:args.num]]
    if min(map(len, clips)) <= max(numbers):
        raise UserError(f"--given {args.given}: {args.condition} has only {min(map(len, clips))} frames from "
                        f"--condition-start {args.condition_start} on")
    is_array = args.condition.suffix.lower() == ".npy"  # without an index it may be of any stride
    stride = read_json(args.condition.with_suffix(".json")).get("stride", trained_stride) if is_array else 1
    if stride != trained_stride:
        rank_zero_print(f"warning: trained on stride {trained_stride}, the clip has {stride}; see data.py --stride")
    return numbers, [torch.from_numpy(clip[numbers]) for clip in clips]


def plan_blocks(args, given, trained_frames, causal):
    """-> the blocks of `draw`, or of a stream's single frames, without those that are given. Raises UserError."""
    window = 1 if causal else args.window or args.frames
    overlap = args.overlap or min(max(1, window // 4), window - 1)
    if not overlap < window <= args.frames:
        raise UserError(f"--window {window} and --overlap {overlap}: expected windows longer than their overlap, but "
                        f"no longer than a video of {args.frames} frames")
    if causal and given != [*range(len(given))]:
        raise UserError(f"--given {args.given}: a causal network continues what is given, from frame 0 on, as in 0:8")
    if window > trained_frames:
        rank_zero_print(f"warning: trained on {trained_frames} frames, to draw {window} at once; see --window")
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
    config, classes, causal = ckpt["config"], ckpt["config"]["classes"], net.config.causal
    labels = complete(args, config, net.config)
    given, clips = read_condition(args, config.get("data_stride", 1)) if args.given else ([], [])
    blocks = plan_blocks(args, given, config["frames"], causal)

    # ---- NAME.npy.json says all that shapes the samples: by it the same command finds its file
    free = "ckpt", "asset", "batch_size", "compile", "out"
    request = {name: value for name, value in vars(args).items() if name not in free} | {
        "step": ckpt["step"], "device": device.type, "weights_sha256": digest(net.state_dict().values()),
        "labels": labels, "condition": args.condition and args.condition.name, "condition_sha256": digest(clips)}
    join_processes()
    agree(request, "the processes read different checkpoints; start again once it is no longer being written")
    out, parts = rank_zero_first(functools.partial(claim_output, args, request))
    if out.exists():
        return rank_zero_print(f"{out} is there already, drawn by this same command; delete it to draw it again")
    rank_zero_print(f"{args.ckpt} at step {ckpt['step']:,}: {plural(args.num, 'video')} of {args.frames} frames, "
                    f"{args.size}x{args.size}, by {args.sampler} in {args.sampling_steps or 'all'} steps, to {out}")
    if args.ckpt == ASSET:
        rank_zero_print("there is no run under out/ yet: python train.py --preset tiny trains your own")

    # ---- the processes take batches in turn; an interrupted one is drawn again whole
    window = blocks[0].stop - blocks[0].start
    shape = 1 if args.guidance == 1 else 2, 3, window, args.size, args.size
    by_gradient = args.condition_weight > 0 and not causal and (given or len(blocks) > 1)
    size = args.batch_size or min(gather(sampling_batch(net, shape, device, args.precision, bool(by_gradient))))
    batches = torch.arange(args.num).split(min(size, math.ceil(args.num / world_size)))
    files = [parts / f"{i:07d}" for i in range(args.num)]
    mine = [batch.tolist() for batch in batches[rank::world_size] if not all(files[i].exists() for i in batch)]

    network = for_sampling(net, device, args.precision, args.compile)
    bar = functools.partial(tqdm, disable=rank > 0, mininterval=0.1 if sys.stderr.isatty() else 60)  # a log's: seldom
    diffusion = Diffusion(config["diffusion_steps"], device, config["prediction"])
    sample = functools.partial(diffusion.sample, progress=functools.partial(bar, unit="step", leave=False),
                               steps=args.sampling_steps, eta=args.eta, weight=args.condition_weight)
    with autocast(device, args.precision), cached_kernels(net, window):
        for batch in bar(mine, unit="batch"):
            generators = sample_generators(args.seed, batch, device)
            numbers = torch.tensor([classes.index(labels[i]) for i in batch], device=device) if classes else None
            denoiser = with_guidance(network, numbers, len(classes), args.guidance) if classes else network
            x_a = to_float(torch.stack([clips[i % len(clips)] for i in batch])).to(device) if given else None
            if causal:
                with streaming(net, config["frames"]) as advance:  # as far back as it was trained: else streams drift
                    frames = diffusion.stream(denoiser, advance, (len(batch), 3, args.size, args.size), generators,
                                              args.sampling_steps, args.eta, x_a)
                    frames = bar(itertools.islice(frames, args.frames), total=args.frames, unit="frame", leave=False)
                    write_samples([files[i] for i in batch], (to_uint8(frame).cpu().numpy() for frame in frames))
            else:
                videos = draw(denoiser, sample, (3, args.frames, args.size, args.size), generators, x_a, given, blocks)
                write_samples([files[i] for i in batch], [videos])
    barrier()
    if rank == 0:
        write_results(out, files, (args.frames, args.size, args.size, 3), given)


def digest(tensors):
    """-> SHA-256 of the tensors' bytes."""
    return hashlib.sha256(b"".join(tensor.cpu().numpy().tobytes() for tensor in tensors)).hexdigest()


def claim_output(args, request):
    """-> the .npy file to write, and a folder for its samples until all are drawn. The file is --out, or the first of
    samples_STEP.npy, samples_STEP_2.npy, ... that no other samples have; its NAME.npy.json is the request from now on.
    Raises UserError."""
    folder = Path("out") / args.ckpt.stem if args.asset else args.ckpt.parent
    for number in itertools.count(1):
        name = f"samples_{request['step']:07d}" + (f"_{number}" if number > 1 else "")
        out = args.out or folder / f"{name}.npy"
        about, parts = out.with_name(f"{out.name}.json"), out.with_name(f".{out.name}.parts")
        if read_json(about) == request:
            return out, parts
        taken = [file for file in (about, out, *map(out.with_suffix, PICTURES)) if file.exists()]
        if not taken:
            shutil.rmtree(parts, ignore_errors=True)  # of samples that were deleted
            out.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(about, "w") as file:
                json.dump(request, file, indent=1)
            return out, parts
        if args.out:
            raise UserError(f"{taken[0]} belongs to other samples; delete it or choose another --out")


def write_samples(files, blocks):
    """Write each sample to its file, as the blocks of their frames come, uint8 (b, f, h, w, 3) each."""
    files[0].parent.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        samples = [stack.enter_context(atomic_write(file)) for file in files]
        for block in blocks:
            for sample, frames in zip(samples, block):
                sample.write(frames.data)


def write_results(out, files, shape, given):
    """Make the array and its pictures of the samples' files. shape: (f, h, w, 3) of each."""
    videos = [np.memmap(file, np.uint8, "r", shape=shape) for file in files[:16]]
    for save, suffix in zip((save_gif, save_mp4, save_sheet), PICTURES):
        save(out.with_suffix(suffix), videos, given)
    with atomic_write(out) as array:  # comes last: that it exists says that all is there
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(files), *shape)}
        np.lib.format.write_array_header_1_0(array, header)
        for file in files:
            array.write(file.read_bytes())
    shutil.rmtree(files[0].parent)
    rank_zero_print(f"wrote {out.absolute()}, and beside it pictures: {', '.join(PICTURES)}")


if __name__ == "__main__":
    run("sample.py", main, DataError)
