"""Draw videos from a checkpoint of train.py.

    python sample.py                                              # the newest under out/, or the one in assets/
    torchrun --nproc-per-node 8 sample.py --num-samples 1000      # the same samples, shared among 8
    python sample.py --condition clip.mp4 --given 0:4,12:16       # what may have happened between these frames
    python sample.py --frames 1000 --window 64 --overlap 16       # blocks of 64, each from the 16 frames before it
    python sample.py --sampling-steps 50                          # DDIM: 50 network calls instead of 256

Writes NAME.npy, uint8 (num, frames, height, width, 3), which data.py reads; NAME.npy.json, what it was drawn from; and,
of the first 16 videos, NAME.mp4, NAME.gif (256 frames at most) and NAME.png, all with white borders of given frames.
Sample i is a function of (checkpoint, seed, i, its given frames), whatever the number of processes and, up to rounding,
the batch size. The same command resumes an interrupted one. A causal network (train.py --causal) streams: its frames
are written as they come, however many.

Glossary
    b, c, f, h, w   batch, channels, frames, height, width
    given, x_a      the numbers of frames that are not drawn but taken from a clip or the block before, and these frames
    block           frames that are drawn at once, `window` of them
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
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw

from command import (Parser, UserError, agree, atomic_write, autocast, choose_device, choose_precision, gather,
                     gist, join_processes, non_negative_float, non_negative_int, plural, positive_int, processes,
                     progress_bar, rank_zero_first, rank_zero_print, run, zero_to_one)
from data import DataError, PackedVideos, read_json, to_float, to_uint8
from diffusion import Diffusion, sample_generators, with_guidance
from model import UNet3D, UNetConfig, compile_tails
from s4d import S6, cached_kernels, streaming

PICTURES = ".gif", ".mp4", ".png"
ASSET = Path(__file__).resolve().with_name("assets") / "stream.pt"  # drawn from while there is no run of one's own


def draw(net, sampler, shape, generators, x_a=None, given=(), window=None, overlap=0):
    """Draw one video per generator -> uint8 array (b, f, h, w, 3).

    net: (x_t, t) -> output. sampler: `Diffusion.sample`, or a functools.partial of it. shape: (c, f, h, w) of a video.
    x_a, given: frames that are not drawn, (b, c, k, h, w) in [-1, 1], and their k numbers.
    window, overlap: the frames of a block, and how many of them are those of the block before. None: one block.
    The caller chooses the precision (`autocast`) and may enter `cached_kernels`.
    """
    frames, window, device = shape[1], window or shape[1], generators[0].device
    x, there = torch.zeros(len(generators), *shape, device=device), torch.zeros(frames, device=device).bool()
    if x_a is not None:
        x[:, :, given], there[given] = x_a, True
    for start in range(0, frames - overlap, window - overlap):
        start = min(start, frames - window)  # the last block begins earlier, so as to be whole
        block = slice(start, start + window)
        if not there[block].all():
            known = (x[:, :, block], there[block]) if there[block].any() else None
            x[:, :, block] = sampler(net, x[:, :, block].shape, generators, known=known)
            there[block] = True
    return to_uint8(x).cpu().numpy()


def load_checkpoint(path):
    """Map a checkpoint, or that of a run's folder, into memory; never runs code -> dict. Raises UserError, OSError."""
    path = Path(path, "ckpt.pt") if Path(path).is_dir() else Path(path)
    with open(path, "rb"), contextlib.suppress(Exception):  # torch raises all sorts for other files
        ckpt = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if {"step", "config", "unet", "ema"} <= ckpt.keys():
            return ckpt
    raise UserError(f"{path} is no checkpoint of train.py, holds code, which is never run, or is damaged; try another")


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
    kinds = torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.ConvTranspose2d
    for module in net.modules() if precision == "bf16" else ():
        for child in module.children():
            if isinstance(child, kinds) and not isinstance(module, S6):
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
            graphs[x.shape] = torch.cuda.make_graphed_callables(functools.partial(net), tuple(map(torch.clone, inputs)))
        return graphs[x.shape](*inputs).clone()

    return replay


# ---------------------------------------------------------------------------------------- pictures


def grid(videos, numbers, given=(), columns=None, pixels=96):
    """The frames `numbers` of n videos, uint8 (f, h, w, 3) each -> (H, W, 3): side by side in rows, enlarged to about
    `pixels`, 4 black ones around and between them. Frames whose numbers are in `given` get a white border."""
    images = np.concatenate([video[numbers] for video in videos])
    scale = max(1, round(pixels / images.shape[1]))
    tiles = images.repeat(scale, axis=1).repeat(scale, axis=2)
    for i in np.flatnonzero([*np.isin(numbers, given)] * len(videos)):
        tiles[i, :2] = tiles[i, -2:] = tiles[i, :, :2] = tiles[i, :, -2:] = 255
    columns = columns or math.ceil(math.sqrt(len(images)))
    tiles = np.pad(tiles, ((0, -len(tiles) % columns), (4, 0), (4, 0), (0, 0)))
    canvas = rearrange(tiles, "(rows columns) h w rgb -> (rows h) (columns w) rgb", columns=columns)
    return np.pad(canvas, ((0, 4), (0, 4), (0, 0)))


def save_gif(path, videos, given=(), fps=10):
    """Write n videos, uint8 (f, h, w, 3), side by side as an endless GIF of 256 frames at most. given: see `grid`."""
    frames = (Image.fromarray(grid(videos, [i], given)) for i in range(min(256, len(videos[0]))))
    with atomic_write(path) as file:
        next(frames).save(file, "GIF", save_all=True, append_images=frames, duration=1000 // fps, loop=0)


def save_mp4(path, videos, given=(), fps=10):
    """The same as H.264, all frames."""
    import av  # here, so that train.py and bench.py work without it
    height, width = (side // 2 * 2 for side in grid(videos, [0]).shape[:2])  # H.264 wants even ones
    with atomic_write(path) as file, av.open(file, "w", format="mp4") as container:
        # without x264's macroblock tree, and in one thread: else the same frames give other bytes each time
        stream = container.add_stream("libx264", rate=fps, height=height, width=width,
                                      options={"crf": "18", "x264-params": "mbtree=0:threads=1"})
        for i in range(len(videos[0])):
            frame = grid(videos, [i], given)[:height, :width]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def save_sheet(path, videos, given=()):
    """The same as a PNG: of each video a row of eight frames, evenly spaced from first to last, under their numbers."""
    numbers = np.unique(np.linspace(0, len(videos[0]) - 1, 8).round().astype(int))
    canvas = grid(videos, numbers, given, columns=len(numbers), pixels=64)
    sheet = Image.fromarray(np.pad(canvas, ((12, 0), (0, 0), (0, 0))))
    for x, number in zip(range(4, sheet.width, (sheet.width - 4) // len(numbers)), numbers):
        ImageDraw.Draw(sheet).text((x, 2), str(number))
    with atomic_write(path) as file:
        sheet.save(file, "PNG", optimize=True)


# ---------------------------------------------------------------------------------------- the command


def parse_args(argv=None):
    newest = max(Path("out").glob("**/ckpt.pt"), key=os.path.getmtime, default=ASSET)
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--ckpt", type=Path, default=newest, help="checkpoint, or its folder (newest in out/, else assets/stream.pt)")
    add("--num", "--num-samples", type=positive_int, help="videos (16, of assets/ 4); under torchrun: --num-samples")
    add("--batch-size", type=positive_int, help="videos drawn at once by each process (up to 8, on a GPU 32)")
    add("--seed", type=non_negative_int, default=0, help="sample i is a function of the seed and i (0)")
    add("--frames", type=positive_int, help="frames per video (as trained)")
    add("--size", type=positive_int, help="height and width (as trained)")
    add("--sampler", choices=("ddpm", "ddim"), help="ancestral, in all steps (ddpm; of streams ddim)")
    add("--sampling-steps", type=positive_int, help="of DDIM, which they imply (50, of streams 16)")
    add("--eta", type=zero_to_one, help="of DDIM: from 0, no noise, to 1 (0, of streams 0.5)")
    add("--class", dest="label", metavar="NAME", help="class to draw (sample i has class i mod their number)")
    add("--guidance", type=non_negative_float, default=1.0, help="above 1: more like the class; 0: of no class (1)")
    add("--condition", type=Path, metavar="CLIP", help="packed file, video or folder, read as by train.py --data")
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
    args.ckpt = args.ckpt / "ckpt.pt" if args.ckpt.is_dir() else args.ckpt
    args.num = args.num or (4 if args.ckpt.resolve() == ASSET else 16)
    if args.sampler == "ddpm" and (args.sampling_steps or args.eta is not None):
        parser.error("--sampling-steps and --eta go with --sampler ddim; ddpm takes all steps")
    for flag, needs in [("condition", "given"), ("given", "condition"), ("condition_start", "condition"),
                        ("overlap", "window")]:
        if getattr(args, flag) and not getattr(args, needs):
            parser.error(f"--{flag.replace('_', '-')} {getattr(args, flag)} goes with --{needs}")
    if args.out and args.out.suffix != ".npy":
        parser.error(f"--out {args.out}: expected a name that ends in .npy")
    return args


def fill_in(args, config, unet):
    """Give flags that were left out the values that go with a checkpoint's config and UNetConfig -> `window`, the
    frames that the network sees at once, and `overlap`. Raises UserError for values that do not go with them."""
    args.frames, args.size = args.frames or config["frames"], args.size or config["size"]
    if args.sampler is None:
        args.sampler = "ddim" if unet.causal or args.sampling_steps or args.eta is not None else "ddpm"
    if args.sampler == "ddim":
        steps, eta = (16, 0.5) if unet.causal else (50, 0.0)
        args.sampling_steps = min(args.sampling_steps or steps, config["diffusion_steps"])
        args.eta = eta if args.eta is None else args.eta
    divisor, classes = 2 ** (len(unet.channel_mults) - 1), config["classes"] or []
    if args.size % divisor:
        raise UserError(f"--size {args.size}: this network needs a size divisible by {divisor}")
    if args.label and args.label not in classes:
        raise UserError(f"--class {args.label}: this network has {', '.join(classes) or 'no classes'}")
    if args.guidance != 1 and not classes:
        raise UserError(f"--guidance {args.guidance:g} is towards a class; this network was trained without classes")
    if unet.causal and args.window:
        raise UserError(f"--window {args.window}: a causal network draws frame by frame; leave it out")
    window = 1 if unet.causal else args.window or args.frames
    overlap = args.overlap or min(max(1, window // 4), window - 1)
    if not overlap < window <= args.frames:
        raise UserError(f"--window {window}, --overlap {overlap}: expected overlap < window <= {args.frames} frames")
    return window, overlap


def read_condition(args, config, causal):
    """--condition and --given -> the given frames' numbers, sorted, and these frames of each clip, uint8 (given, h, w,
    3). Every n-th frame counts, as in training (config["data_stride"]). Raises UserError, DataError."""
    try:
        slices = [[int(bound) if bound else None for bound in part.split(":")] for part in args.given.split(",")]
        numbers = sorted({i for start, stop, *step in slices for i in range(args.frames)[slice(start, stop, *step)]})
    except (TypeError, ValueError):
        numbers = []
    if not 0 < len(numbers) < args.frames or causal and numbers != [*range(len(numbers))]:
        raise UserError(f"--given {args.given}: expected slices such as 0:8 or 0:8,20:24, of some, but not all, of the "
                        f"{args.frames} frames of a video (see --frames); a causal network takes the first ones only")
    packed, trained_stride = PackedVideos(args.condition, 1, args.size, "all"), config.get("data_stride", 1)
    stride = packed.stride or trained_stride  # unknown, as sample.py writes it: as trained
    if trained_stride % stride:
        raise UserError(f"--condition {args.condition} has stride {stride}, training had {trained_stride}")
    videos, frames = packed.videos[:args.num], args.condition_start + trained_stride // stride * np.array(numbers)
    shortest = min(video["length"] for video in videos)
    if shortest <= frames[-1]:
        raise UserError(f"--given {args.given}, from --condition-start {args.condition_start} on: {args.condition} has "
                        f"{shortest} frames, none of number {frames[-1]}")
    return numbers, [torch.from_numpy(packed.pixels[video["start"] + frames]) for video in videos]


def main():
    # ---- the checkpoint, and what is asked of it: all that can be wrong shows before anything is written
    args = parse_args()
    rank, _, world_size = processes()
    device = choose_device(args.device)
    args.precision = choose_precision(device, args.precision)
    ckpt = load_checkpoint(args.ckpt)
    net = load_network(ckpt, device, weights=args.weights)
    config, classes, causal = ckpt["config"], ckpt["config"]["classes"], net.config.causal
    window, overlap = fill_in(args, config, net.config)
    labels = [args.label or classes[i % len(classes)] for i in range(args.num)] if classes else None
    join_processes()
    given, clips = rank_zero_first(functools.partial(read_condition, args, config, causal)) if args.given else ([], [])

    # ---- NAME.npy.json says all that shapes the samples: by it the same command finds its file
    request = {key: value for key, value in vars(args).items() if key not in ("ckpt", "batch_size", "compile", "out")}
    request |= {"step": ckpt["step"], "device": device.type, "weights_sha256": digest(net.state_dict().values()),
                "condition": args.condition.name if args.condition else None, "condition_sha256": digest(clips),
                "labels": labels}
    agree(request, "the processes read different checkpoints; start again once it is no longer being written")
    out, parts = rank_zero_first(functools.partial(claim_output, args, request))
    if out.exists():
        return rank_zero_print(f"{out} is there already, drawn by this same command; delete it to draw it again")
    rank_zero_print(f"{args.ckpt} at step {ckpt['step']:,}, trained on {config['frames']} frames of size "
                    f"{config['size']}: {plural(args.num, 'video')} of {args.frames} frames of size {args.size}, by "
                    f"{args.sampler} in {args.sampling_steps or 'all'} steps, to {out}")

    # ---- process r of n takes the samples r, r + n, ...; an interrupted batch is drawn again whole
    largest, rows = (8, 2 ** 15) if device.type == "cpu" else (32, 2 ** 18)  # more are hardly faster
    batch_size = args.batch_size or max(1, min(largest, rows // (window * args.size ** 2)))
    files, mine = [parts / f"{i:07d}" for i in range(args.num)], range(rank, args.num, world_size)
    batches = [mine[first:first + batch_size] for first in range(0, len(mine), batch_size)]
    batches = [batch for batch in batches if not all(files[i].exists() for i in batch)]

    # ---- the loop over batches
    denoiser = for_sampling(net, device, args.precision, args.compile)
    diffusion = Diffusion(config["diffusion_steps"], device, config["prediction"])
    sampler = functools.partial(diffusion.sample, progress=functools.partial(progress_bar, unit="step", leave=False),
                                steps=args.sampling_steps, eta=args.eta, weight=args.condition_weight)
    with autocast(device, args.precision), cached_kernels(net, window):
        for batch in progress_bar(batches, unit="batch"):
            generators = sample_generators(args.seed, batch, device)
            numbers = torch.tensor([classes.index(labels[i]) for i in batch], device=device) if classes else None
            guided = with_guidance(denoiser, numbers, len(classes), args.guidance) if classes else denoiser
            x_a = to_float(torch.stack([clips[i % len(clips)] for i in batch])).to(device) if given else None
            if causal:
                # of the past half a clip counts, as on average in training: with more of it streams drift
                with streaming(net, (config["frames"] + 1) // 2) as advance:
                    frames = diffusion.stream(guided, advance, (len(batch), 3, args.size, args.size), generators,
                                              args.sampling_steps, args.eta, x_a)
                    frames = progress_bar(itertools.islice(frames, args.frames), total=args.frames, unit="frame",
                                          leave=False)
                    write_samples([files[i] for i in batch], (to_uint8(frame).cpu().numpy() for frame in frames))
            else:
                videos = draw(guided, sampler, (3, args.frames, args.size, args.size), generators, x_a, given, window,
                              overlap)
                write_samples([files[i] for i in batch], [videos])
    gather("done")
    if rank == 0:
        write_results(out, files, (args.frames, args.size, args.size, 3), given)


def digest(tensors):
    """-> SHA-256 of the tensors' bytes."""
    return hashlib.sha256(b"".join(tensor.cpu().numpy().tobytes() for tensor in tensors)).hexdigest()


def claim_output(args, request):
    """-> the .npy file to write, --out or the first of samples_STEP.npy, samples_STEP_2.npy, ... that no other samples
    have, and a folder for single samples. From now on its NAME.npy.json is the request. Raises UserError."""
    folder = Path("out", ASSET.stem) if args.ckpt.resolve() == ASSET else args.ckpt.parent
    for number in itertools.count(1):
        suffix = f"_{number}" if number > 1 else ""
        out = args.out or folder / f"samples_{request['step']:07d}{suffix}.npy"
        about, parts = out.with_name(f"{out.name}.json"), out.with_name(f".{out.name}.parts")
        if read_json(about) == request:
            return out, parts
        taken = [path for path in (about, out, *map(out.with_suffix, PICTURES)) if path.exists()]
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
        array.writelines(file.read_bytes() for file in files)
    shutil.rmtree(files[0].parent)
    rank_zero_print(f"wrote {out.absolute()}, and beside it pictures: {', '.join(PICTURES)}")


if __name__ == "__main__":
    run("sample.py", main, DataError)
