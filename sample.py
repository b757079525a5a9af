"""Draw videos from a checkpoint of train.py.

    python sample.py                                              # the newest checkpoint under out/
    python sample.py --ckpt out/minerl-400-ssm/ckpt.pt --num 1000 --batch-size 8 --out samples.npy
    torchrun --nproc-per-node 8 sample.py --num-samples 1000      # the same samples, shared among 8
    python sample.py --frames 800                                 # longer than the network was trained on
    python sample.py --condition clip.mp4 --given 0:8             # continue from the clip's first 8 frames
    python sample.py --condition clip.mp4 --given 0:4,12:16       # what may have happened in between
    python sample.py --frames 1000 --window 64 --overlap 16       # blocks of 64, each from the 16 frames before it
    python sample.py --class Archery --guidance 2                 # of a class, from a checkpoint of train.py --classes
    python sample.py --sampler ddim --sampling-steps 50           # DDIM: 50 network calls instead of 256

Writes NAME.npy, uint8 (num, frames, height, width, 3), which data.py reads; NAME.npy.json, what it was drawn from;
NAME.gif and NAME.mp4, the first 16 side by side; NAME.png, a row of frames of each; in these, given frames have a
white border. Sample i is a function of (checkpoint, seed, i, its given frames): neither the number of processes nor,
but for the last bits of floating-point sums, the batch size matters. The same command resumes an interrupted one. On
several machines --out must be in a folder that all of them share.

Glossary
    b, c, f, h, w   batch, channels, frames, height, width
    x               videos inside the network, float (b, c, f, h, w) in [-1, 1]
    given           frames that are not drawn but taken from a clip, or from the block before
    block           frames that are drawn at once
"""
import argparse
import contextlib
import functools
import hashlib
import json
import math
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from tqdm import tqdm

from command import (Parser, UserError, agree, autocast, barrier, choose_device, choose_precision, gist,
                     join_processes, non_negative_float, non_negative_int, positive_int, processes, run, say,
                     whole_file, zero_to_one)
from data import DataError, read_whole_videos, to_float, to_uint8
from diffusion import Diffusion, sample_generators, with_guidance
from model import UNet3D, UNetConfig, compile_tails
from s4d import S6, kernels_once


def draw(net, sample, shape, generators, labels=None, guidance=1.0, known=None, blocks=None):
    """Draw one video per generator -> uint8 array (b, f, h, w, 3).

    sample: `Diffusion.sample`, or a functools.partial of it with settings. shape: (c, f, h, w) of a video.
    labels, guidance: (b,) int, of a network with classes, and the scale of `with_guidance`.
    known: frames that are not drawn: x_a (b, c, f, h, w) in [-1, 1], and given (f,), whether a frame is that of x_a.
    blocks: slices of frames, all of one length, drawn one after another, each with what is there already as given.
    The caller chooses the precision (`autocast`) and may enter `kernels_once`.
    """
    denoiser = net if labels is None else with_guidance(net, labels, net.config.classes, guidance)
    if known is None:
        device = generators[0].device
        known = torch.zeros(len(generators), *shape, device=device), torch.zeros(shape[1], device=device).bool()
    x, given = known[0].clone(), known[1].clone()
    for block in blocks or [slice(0, shape[1])]:
        part = (x[:, :, block], given[block]) if given[block].any() else None
        x[:, :, block] = sample(denoiser, x[:, :, block].shape, generators, known=part)
        given[block] = True
    return to_uint8(x).cpu().numpy()


# ---------------------------------------------------------------------------------------- checkpoint to network


def newest_checkpoint(root="out"):
    """-> the path of the ckpt.pt under `root` that was written last. Raises UserError."""
    found = sorted(Path(root).glob("**/ckpt.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"no ckpt.pt under {Path(root).absolute()}; train one (python train.py --preset tiny) or name "
                        "one with --ckpt")
    return found[-1]


def load_checkpoint(path):
    """Map a checkpoint into memory, without running any code that might be in it -> dict, as train.py saved it.

    Raises UserError if it is missing, damaged, or something else.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} is not a file; expected a ckpt.pt written by train.py")
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} is refused: it holds more than tensors and settings, code perhaps") from None
    except Exception as error:  # torch raises all sorts for a damaged file
        raise UserError(f"{path} is damaged or no checkpoint ({gist(error)}); expected a ckpt.pt written by "
                        "train.py") from None
    if not isinstance(ckpt, dict) or not {"step", "config", "unet", "ema"} <= ckpt.keys():
        raise UserError(f"{path} is no checkpoint of train.py")
    return ckpt


def load_network(ckpt, weights="ema", device="cpu"):
    """Rebuild the network of a checkpoint with its "ema" or "model" weights -> UNet3D in evaluation mode.

    Raises UserError if they do not fit.
    """
    try:
        net = UNet3D(UNetConfig(**ckpt["unet"]))
        net.load_state_dict(ckpt[weights])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"the checkpoint does not fit this network: {gist(error)}") from None
    return net.to(device).eval().requires_grad_(False)


def cast_weights(net):
    """Turn the weights of linear layers and convolutions into bf16, in place: autocast caches its casts of weights only
    while they need gradients, and would repeat them in every call."""
    for module in net.modules():
        for child in module.children():
            if isinstance(child, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)) and not isinstance(module, S6):
                child.to(torch.bfloat16)


def cuda_graphs(net):
    """A network (x_t, t, labels) -> output that replays a CUDA graph of `net`, captured at the first call of each
    shape; where gradients are asked for it is `net` itself. To be used while weights and S4D kernels stay."""
    captured = {}

    def replay(x, t, labels=None):
        if torch.is_grad_enabled():
            return net(x, t, labels)
        if x.shape not in captured:
            inputs = [x.clone(), t.clone(), *([] if labels is None else [labels.clone()])]
            stream = torch.cuda.Stream()  # PyTorch wants the warm-up on a stream of its own
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    net(*inputs)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = net(*inputs)
            captured[x.shape] = graph, inputs, output
        graph, inputs, output = captured[x.shape]
        for static, new in zip(inputs, (x, t, labels)):
            static.copy_(new)
        graph.replay()
        return output.clone()

    replay.config = net.config
    return replay


# ---------------------------------------------------------------------------------------- pictures


def enlarge(videos, given, pixels=96):
    """uint8 (n, f, h, w, 3) -> the same with sides of about `pixels`, and a white border in the given frames."""
    scale = max(1, round(pixels / videos.shape[2]))
    videos = videos.repeat(scale, axis=2).repeat(scale, axis=3)
    for i in given:
        videos[:, i, :2] = videos[:, i, -2:] = videos[:, i, :, :2] = videos[:, i, :, -2:] = 255
    return videos


def grid(videos, columns=None):
    """uint8 (n, f, h, w, 3) -> (f, H, W, 3): side by side in rows, a gap between."""
    n, f, h, w, _ = videos.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows, gap = math.ceil(n / columns), 4
    # even sides, which H.264 wants
    canvas = np.zeros((f, (rows * (h + gap) + 1) // 2 * 2, (columns * (w + gap) + 1) // 2 * 2, 3), np.uint8)
    for i, video in enumerate(videos):
        y, x = i // columns * (h + gap), i % columns * (w + gap)
        canvas[:, y:y + h, x:x + w] = video
    return canvas


def save_gif(path, videos, given=(), fps=10):
    """Write uint8 videos (n, f, h, w, 3) side by side as an endless GIF; the frames numbered in `given` are marked."""
    frames = [Image.fromarray(frame) for frame in grid(enlarge(videos, given))]
    with whole_file(path) as file:
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=1000 // fps, loop=0)


def save_mp4(path, videos, given=(), fps=10):
    """The same as H.264. Needs PyAV."""
    import av

    frames = grid(enlarge(videos, given))
    with whole_file(path) as file, av.open(file, "w", format="mp4") as container:
        # without x264's macroblock tree, and in one thread: else the same frames give other bytes each time
        stream = container.add_stream("libx264", rate=fps, options={"crf": "18", "x264-params": "mbtree=0"})
        stream.codec_context.thread_count = 1
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def save_sheet(path, videos, given=(), columns=8):
    """Write them as a contact sheet, a PNG: a row for each, of evenly spaced frames from the first to the last."""
    picked = np.linspace(0, videos.shape[1] - 1, min(columns, videos.shape[1])).round().astype(int)
    frames = enlarge(videos[:, picked], [i for i, frame in enumerate(picked) if frame in given], pixels=64)
    [sheet] = grid(frames.reshape(-1, 1, *frames.shape[2:]), len(picked))
    with whole_file(path) as file:
        Image.fromarray(sheet).save(file, "PNG", optimize=True)


PICTURES = {".gif": save_gif, ".mp4": save_mp4, ".png": save_sheet}


# ---------------------------------------------------------------------------------------- flags


def parse_args(argv=None):
    parser = Parser(prog="sample.py", description="Draw videos from a checkpoint of train.py.",
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--ckpt", type=Path, help="checkpoint (the newest under out/)")
    add("--num", "--num-samples", type=positive_int, default=16, help="videos; under torchrun write --num-samples")
    add("--batch-size", type=positive_int, default=8, help="videos drawn at once by each process")
    add("--seed", type=non_negative_int, default=0, help="sample i is a function of the seed and i")
    add("--frames", type=positive_int, help="frames per video (as trained)")
    add("--size", type=positive_int, help="height and width (as trained)")
    add("--sampler", choices=("ddpm", "ddim"), default="ddpm", help="ancestral, all steps; or DDIM")
    add("--sampling-steps", type=positive_int, help="of ddim (50, or all where there are fewer)")
    add("--eta", type=zero_to_one, help="of ddim: 0, deterministic, to 1, with the posterior's noise (0)")
    add("--class", dest="label", metavar="NAME", help="class to draw (sample i has class i mod their number)")
    add("--guidance", type=non_negative_float, default=1.0, help="1: the class as learned; more: more of it, at twice "
        "the time; 0: of no class")
    add("--condition", type=Path, metavar="CLIP", help="video whose --given frames are kept; of a packed .npy sample i "
        "takes video i mod their number")
    add("--given", metavar="FRAMES", help="frames to keep: a Python slice, 0:8, or several, 0:8,20:24")
    add("--condition-weight", type=non_negative_float, default=10.0, help="w_r of reconstruction guidance towards "
        "given frames; 0: the replacement method, in half the time")
    add("--window", type=positive_int, help="draw so many frames at a time (all at once)")
    add("--overlap", type=positive_int, help="frames of a window that are the last of the one before (a quarter)")
    add("--weights", choices=("ema", "model"), default="ema", help="EMA weights or the latest")
    add("--precision", choices=("auto", "bf16", "float32"), default="auto", help="auto: bf16 if native")
    add("--compile", action="store_true", help="torch.compile the elementwise work; a CUDA graph on CUDA")
    add("--device", help="cpu, cuda, cuda:1, mps (the best there is)")
    add("--out", type=Path, help=".npy file to write (samples_STEP.npy beside the checkpoint)")
    args = parser.parse_args(argv)
    if args.sampler == "ddpm" and (args.sampling_steps or args.eta is not None):
        parser.error("--sampling-steps and --eta go with --sampler ddim; ddpm takes all steps")
    if bool(args.condition) != bool(args.given):
        parser.error(f"--condition {args.condition} --given {args.given}: expected both or neither")
    if args.overlap and args.overlap >= (args.window or 0):
        parser.error(f"--overlap {args.overlap}: expected a larger --window")
    if args.out and args.out.suffix != ".npy":
        parser.error(f"--out {args.out}: expected a name that ends in .npy")
    return args


def choose_labels(args, classes):
    """-> the class number of each sample, (num,), or None if the checkpoint has no classes. Raises UserError."""
    if not classes and (args.label is not None or args.guidance != 1):
        raise UserError("--class, --guidance: the checkpoint was trained without classes; leave them out, or train "
                        "with train.py --classes")
    if args.label is not None and args.label not in classes:
        raise UserError(f"--class {args.label}: expected one of the checkpoint's {len(classes)} classes, such as "
                        f"{', '.join(classes[:10])}")
    if not classes:
        return None
    number = None if args.label is None else classes.index(args.label)
    return torch.tensor([i % len(classes) if number is None else number for i in range(args.num)])


def given_frames(text, frames):
    """Slices such as 0:8 or 0:8,20:24 of so many frames -> the frames' numbers, sorted. Raises UserError."""
    given = set()
    for part in text.split(","):
        if not re.fullmatch(r"-?\d*:-?\d*(:[1-9]\d*)?", part.strip()):
            raise UserError(f"--given {text}: expected a slice such as 0:8, or several, 0:8,20:24")
        bounds = [int(bound) if bound else None for bound in part.strip().split(":")]
        picked = range(frames)[slice(*bounds)]
        if not picked or max(abs(bound or 0) for bound in bounds[:2]) > frames:
            raise UserError(f"--given {text}: expected frames of the {frames} that a video has here (see --frames)")
        given.update(picked)
    if len(given) == frames:
        raise UserError(f"--given {text}: all {frames} frames are given, none is left to draw (see --frames)")
    return sorted(given)


def plan_blocks(args, frames, given):
    """-> the blocks of `draw`, without those whose frames are all given. Raises UserError."""
    window = args.window or frames
    overlap = args.overlap or (max(1, window // 4) if args.window else 0)
    if window > frames or overlap >= window:
        raise UserError(f"--window {window}: expected at most --frames {frames}, and more than the overlap, {overlap}")
    # the last one begins earlier, so as to be whole
    starts = [min(start, frames - window) for start in range(0, frames - overlap, window - overlap)]
    return [slice(start, start + window) for start in starts if not {*range(start, start + window)} <= {*given}]


# ---------------------------------------------------------------------------------------- the command


def main():
    # ---- the checkpoint and what is asked of it: all that can be wrong with either shows here
    args = parse_args()
    rank, _, world_size = processes()
    device = choose_device(args.device)
    path = args.ckpt or newest_checkpoint()
    ckpt = load_checkpoint(path)
    config, classes = ckpt["config"], ckpt["config"]["classes"] or []
    net = load_network(ckpt, args.weights, device)
    frames, size = args.frames or config["frames"], args.size or config["size"]
    factor = 2 ** (len(net.config.channel_mults) - 1)
    if size % factor:
        raise UserError(f"--size {size}: this network needs a size divisible by {factor}")
    diffusion = Diffusion(config["diffusion_steps"], device, config["prediction"])
    steps = diffusion.T if args.sampler == "ddpm" else args.sampling_steps or min(50, diffusion.T)
    if steps > diffusion.T:
        raise UserError(f"--sampling-steps {steps}: expected 1 to {diffusion.T}, the checkpoint's diffusion steps")
    eta = None if args.sampler == "ddpm" else args.eta or 0.0
    labels = choose_labels(args, classes)
    given = given_frames(args.given, frames) if args.given else []
    if given:
        clips = read_whole_videos(args.condition, size)[:args.num]
        if min(map(len, clips)) <= given[-1]:
            raise UserError(f"--given {args.given}: {args.condition} has {min(map(len, clips))} frames only")
        clips = np.stack([clip[given] for clip in clips])                                   # clips given h w 3
    blocks = plan_blocks(args, frames, given)
    window = blocks[0].stop - blocks[0].start

    # ---- NAME.npy.json records all that shapes the samples: the same request resumes, another one is refused
    request = {"weights_sha256": digest(*net.state_dict().values()), "step": ckpt["step"], "weights": args.weights,
               "num": args.num, "frames": frames, "size": size, "seed": args.seed, "sampler": args.sampler,
               "sampling_steps": steps, "eta": eta, "device": device.type,
               "precision": choose_precision(device, args.precision)}
    if classes:
        request |= {"guidance": args.guidance, "labels": [classes[label] for label in labels]}
    if given or len(blocks) > 1:
        request |= {"given": given, "condition": args.condition and args.condition.name,
                    "condition_sha256": digest(torch.from_numpy(clips)) if given else None,
                    "condition_weight": args.condition_weight, "blocks": [[b.start, b.stop] for b in blocks]}
    out = args.out or path.with_name(f"samples_{ckpt['step']:07d}.npy")
    about, parts = out.with_name(out.name + ".json"), out.with_name(f".{out.name}.parts")
    recorded = None
    with contextlib.suppress(FileNotFoundError, ValueError):
        recorded = json.loads(about.read_text())
    taken = [file for file in (about, out, *map(out.with_suffix, PICTURES)) if file.exists()]
    if taken and recorded != request:
        raise UserError(f"{taken[0]} belongs to other samples; delete it or choose another --out")
    if out.exists():
        return say(f"{out} is there already, drawn by this same command; delete it to draw it again")
    join_processes()
    if recorded != request and rank == 0:
        shutil.rmtree(parts, ignore_errors=True)  # another request's
    agree(request, "the processes read different checkpoints; start again once it is no longer being written")
    if rank == 0:
        parts.mkdir(parents=True, exist_ok=True)
        with whole_file(about, "w") as file:
            json.dump(request, file, indent=1)
    say(f"{path}: step {ckpt['step']}, {args.weights} weights; {args.num} videos of {frames} frames, {size}x{size}, "
        f"{args.sampler}, {steps} steps, seed {args.seed}, {world_size} x {device.type}")
    if window > config["frames"]:
        say(f"warning: the network was trained on {config['frames']} frames and is to draw {window} at once, which "
            f"it has never seen; --window {config['frames']} draws as many by blocks")
    barrier()

    # ---- the processes take batches in turn; an interrupted one is drawn again whole
    batch_size = min(args.batch_size, math.ceil(args.num / world_size))
    batches = [range(first, min(first + batch_size, args.num)) for first in range(0, args.num, batch_size)]
    mine = [batch for batch in batches[rank::world_size] if not all(part(parts, i).exists() for i in batch)]
    kernels = kernels_once(net, window)  # of the modules that a CUDA graph hides; entered below
    if choose_precision(device, args.precision) == "bf16":
        cast_weights(net)
    if args.compile:
        compile_tails()
        net = cuda_graphs(net) if device.type == "cuda" else net
    bar = tqdm(total=len(mine) * len(blocks) * steps, unit="step", disable=True if rank else None)
    with bar, autocast(device, args.precision), kernels:
        def progress(times):
            for time in times:
                yield time
                bar.update()

        sample = functools.partial(diffusion.sample, progress=progress, steps=steps, eta=eta,
                                   weight=args.condition_weight)
        for batch in mine:
            known = None
            if given:
                x_a, is_given = torch.zeros(len(batch), 3, frames, size, size), torch.zeros(frames, dtype=torch.bool)
                x_a[:, :, given] = to_float(torch.from_numpy(clips[[i % len(clips) for i in batch]]))
                is_given[given] = True
                known = x_a.to(device), is_given.to(device)
            videos = draw(net, sample, (3, frames, size, size), sample_generators(args.seed, batch, device),
                          labels[batch].to(device) if classes else None, args.guidance, known, blocks)
            for i, video in zip(batch, videos):
                with whole_file(part(parts, i)) as file:
                    np.save(file, video)
    barrier()
    if rank == 0:
        assemble(out, parts, args.num, given)
        print(f"wrote {out.absolute()}, and previews beside it: .gif, .mp4, .png")


def digest(*tensors):
    """-> SHA-256 of the tensors' bytes."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.cpu().contiguous().numpy())
    return sha.hexdigest()


def part(parts, i):
    """Where sample i waits until all are drawn."""
    return parts / f"{i:07d}.npy"


def assemble(out, parts, num, given):
    """Pictures of the first samples, then the array of all: that it exists says that everything is there."""
    videos = [np.load(part(parts, i), allow_pickle=False) for i in range(min(num, 16))]
    for suffix, save in PICTURES.items():
        save(out.with_suffix(suffix), np.stack(videos), given)
    with whole_file(out) as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (num, *videos[0].shape)}
        np.lib.format.write_array_header_1_0(file, header)
        for i in range(num):
            file.write(np.load(part(parts, i), allow_pickle=False).data)
    shutil.rmtree(parts)


if __name__ == "__main__":
    run("sample.py", main, DataError)
