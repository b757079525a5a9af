"""Draw videos from a checkpoint of train.py.

    python sample.py                                              # the newest checkpoint under out/
    python sample.py --ckpt out/minerl-400-ssm/ckpt.pt --num 1000 --batch-size 8 --out samples.npy
    torchrun --nproc-per-node 8 sample.py --num-samples 1000      # the same samples, shared among 8
    python sample.py --frames 800                                 # longer than the network was trained on
    python sample.py --condition clip.mp4 --given 0:8             # go on from the clip's first 8 frames
    python sample.py --condition clip.mp4 --given 0:4,12:16       # what may have been between
    python sample.py --frames 1000 --window 64 --overlap 16       # blocks of 64, each from the last 16 of the one before
    python sample.py --class Archery --guidance 2                 # of a class, from a checkpoint of train.py --classes
    python sample.py --sampler ddim --sampling-steps 50           # DDIM: 50 network calls instead of 256

Writes NAME.npy, uint8 (num, frames, height, width, 3), which data.py reads; NAME.npy.json, what it was drawn
from; NAME.gif and NAME.mp4, the first few side by side; NAME.png, frames of them in a row each. Given frames have a white
border there. Sample i is a function of (checkpoint, seed, i, its given frames): the number of processes does not enter, nor,
but for the last bits of floating-point sums, does the batch size. Stopped and started again by the same command, it goes on
where it was. On several machines --out must be in a folder that all share.
"""
import argparse
import contextlib
import datetime
import difflib
import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from data import read_whole_videos, to_float, to_uint8
from diffusion import Diffusion, sample_generators, with_guidance
from model import UNet3D, UNetConfig
from s4d import kernels_once

CONDITION_WEIGHT = 10.0


class CheckpointError(ValueError):
    """A file that is no checkpoint, or not one that can be used: one line for a person."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def non_negative_int(text):
    if not text.isdigit() or int(text) >= 2 ** 31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on, or too large")
    return int(text)


def positive_int(text):
    if non_negative_int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def non_negative_float(text, most=math.inf):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= most or value == math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 " + ("on" if most == math.inf else f"to {most}"))
    return value


def from_0_to_1(text):
    return non_negative_float(text, most=1)


def choose_device(name=None):
    """The device that --device names, else the best one there is; under torchrun, this process's own GPU."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if not re.fullmatch(r"cpu|mps|cuda:\d+", name):
        raise ValueError(f"--device {name}: expected cpu, cuda, cuda:N or mps")
    device = torch.device(name)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: there is no such device here")
    if device.type == "cuda":
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices here")
        torch.cuda.set_device(device)
    return device


def choose_precision(device, precision):
    """What --precision auto stands for on a device: "bf16" where it computes in it, else "float32"."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # not in every release, nor public
    return "bf16" if device.type == "cpu" and native and native() else "float32"


def autocast(device, precision):
    """The autocast context for a --precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=choose_precision(device, precision) == "bf16")


def load_checkpoint(path):
    """Read a checkpoint without running any code that might be in it -> dict (see train.py, `save_checkpoint`).

    Raises CheckpointError if it is missing, damaged, or something else.
    """
    return parse_checkpoint(read_bytes(path), path)


def read_bytes(path):
    if Path(path).is_fifo() or Path(path).is_char_device():  # they may never end
        raise CheckpointError(f"{path} cannot be read: it is not a regular file")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None


def parse_checkpoint(content, path):
    try:
        damaged = zipfile.ZipFile(io.BytesIO(content)).testzip()  # torch does not look at the check sums in there
        if damaged:
            raise zipfile.BadZipFile
        ckpt = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path} is refused: it holds more than tensors and settings, code perhaps") from None
    except Exception as error:  # torch raises all sorts for a damaged file
        raise CheckpointError(f"{path} is damaged or no checkpoint ({type(error).__name__}); "
                              "expected a ckpt.pt written by train.py") from None
    expected = {"step": int, "config": dict, "unet": dict, "model": dict, "ema": dict, "optimizer": dict,
                "interval": list}
    if not isinstance(ckpt, dict):
        ckpt = {}
    wrong = [name for name, kind in expected.items() if not isinstance(ckpt.get(name), kind)]
    wrong = wrong or [f"config.{name}" for name in ("frames", "size", "diffusion_steps", "ema_decay")
                      if not (isinstance(ckpt["config"].get(name), (int, float)) and ckpt["config"][name] > 0)]
    if wrong:
        raise CheckpointError(f"{path} is no checkpoint of train.py: it lacks {', '.join(wrong)}")
    return ckpt


def newest_checkpoint(root="out"):
    # for a moment while a checkpoint is written there is only the one before
    found = [path for name in ("ckpt_previous.pt", "ckpt.pt") for path in Path(root).glob(f"**/{name}")]
    found.sort(key=lambda path: path.stat().st_mtime)
    if not found:
        raise CheckpointError(f"no ckpt.pt under {Path(root).absolute()}; train one (python train.py --preset tiny) "
                              "or name it with --ckpt")
    return found[-1]


def load_network(ckpt, weights, device):
    """Rebuild the network of a checkpoint with its "ema" or "model" weights -> UNet3D in evaluation mode."""
    try:
        net = UNet3D(UNetConfig(**ckpt["unet"]))
        net.load_state_dict(ckpt[weights])
    except Exception as error:  # settings that no network has fail in all sorts of ways
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"the checkpoint does not fit this network: {reason}") from None
    return net.to(device).eval().requires_grad_(False)


def draw(net, diffusion, seed, indices, shape, precision="auto", progress=None, steps=None, eta=None,
         labels=None, guidance=1.0, given=(), clips=None, weight=1.0, blocks=None):
    """Draw the samples of the given indices, shape (c, f, h, w) -> uint8 array (len(indices), f, h, w, 3).

    steps, eta: of DDIM; none: ancestral sampling, see `Diffusion.sample`.
    labels, guidance: a class for each, of a network with classes, and the scale of `with_guidance`.
    given, clips: numbers of frames that are not drawn but taken from clips (len(indices), len(given), h, w, 3), uint8.
    weight: of reconstruction guidance, see `Diffusion.sample`.
    blocks: slices of frames, all of one length, drawn one after another, each with what is there already as given.
    """
    blocks = blocks or [slice(0, shape[1])]
    device = torch.device(diffusion.device)
    denoiser = net
    if labels is not None:
        denoiser = with_guidance(net, torch.tensor(labels, device=device), net.config.classes, guidance)
    x = torch.zeros(len(indices), *shape, device=device)
    there = torch.zeros(shape[1], dtype=torch.bool, device=device)
    if given:
        x[:, :, given] = to_float(torch.from_numpy(clips)).to(device)
        there[given] = True
    with autocast(device, precision), kernels_once(net, blocks[0].stop - blocks[0].start):
        generators = sample_generators(seed, indices, device)
        for block in blocks:
            known = (x[:, :, block], there[block]) if there[block].any() else None
            x[:, :, block] = diffusion.sample(denoiser, x[:, :, block].shape, generators, progress, steps, eta, known,
                                              weight)
            there[block] = True
    return to_uint8(x).cpu().numpy()


def fitting_batch_size(net, shape, precision, device, branches=1, gradient=False):
    """How many videos of `shape` (c, f, h, w) to draw at once: on CUDA as many as fit its free memory, up to 64.

    branches: calls of the network for each, in one batch: 2 with guidance. gradient: with reconstruction guidance.
    """
    if device.type != "cuda":
        return 8
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with autocast(device, precision), torch.set_grad_enabled(gradient):
        net(torch.zeros(branches, *shape, device=device, requires_grad=gradient),
            torch.zeros(branches, dtype=torch.long, device=device))
    per_video = torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()
    return max(1, min(64, int(0.8 * torch.cuda.mem_get_info()[0] / per_video)))


# ---------------------------------------------------------------------------------------- pictures


def replace_with(path, write):
    """Call write(temporary path), then give the file its name: what stands at `path` is always whole. Raises OSError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def enlarge(videos, given, pixels=96):
    """uint8 (n, f, h, w, 3) -> the same, enlarged to sides of about `pixels`, with a white border in the given frames."""
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
    """Write uint8 videos (n, f, h, w, 3) side by side as an endless GIF. given: numbers of the frames to be marked."""
    frames = [Image.fromarray(frame) for frame in grid(enlarge(videos, given))]

    def write(temporary):
        frames[0].save(temporary, "GIF", save_all=True, append_images=frames[1:], duration=1000 // fps, loop=0)

    replace_with(path, write)


def save_mp4(path, videos, given=(), fps=10):
    """Write uint8 videos (n, f, h, w, 3) side by side as H.264. given: numbers of the frames to be marked. Needs PyAV."""
    import av

    frames = grid(enlarge(videos, given))
    # without x264's macroblock tree, which makes other bytes of the same frames each time
    options = {"crf": "18", "x264-params": "mbtree=0"}

    def write(temporary):
        with av.open(str(temporary), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=fps, options=options)
            stream.codec_context.thread_count = 1  # other bytes with each number
            stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())

    replace_with(path, write)


def save_sheet(path, videos, given=(), columns=8):
    """Write uint8 videos (n, f, h, w, 3) as a contact sheet, a PNG: a row for each, of evenly spaced frames from the first
    to the last. given: numbers of the frames to be marked."""
    columns = min(columns, videos.shape[1])
    picked = np.linspace(0, videos.shape[1] - 1, columns).round().astype(int)
    frames = enlarge(videos[:, picked], [i for i, frame in enumerate(picked) if frame in given], pixels=64)
    [sheet] = grid(frames.reshape(-1, 1, *frames.shape[2:]), columns)
    replace_with(path, lambda temporary: Image.fromarray(sheet).save(temporary, "PNG", optimize=True))


# ---------------------------------------------------------------------------------------- the command


def parse_args():
    parser = Parser(prog="sample.py", description="Draw videos from a checkpoint of train.py.",
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ckpt", type=Path, help="checkpoint; none: the newest under out/")
    parser.add_argument("--num", "--num-samples", type=positive_int, default=16,
                        help="number of videos (under torchrun write --num-samples: --num is ambiguous to torchrun)")
    parser.add_argument("--batch-size", type=positive_int,
                        help="videos drawn at once by each process; none: 8, on CUDA up to 64, as memory allows")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="sample i is a function of the seed and i")
    parser.add_argument("--frames", type=positive_int, help="frames per video; none: as trained")
    parser.add_argument("--size", type=positive_int, help="height and width; none: as trained")
    parser.add_argument("--sampler", choices=("ddpm", "ddim"), default="ddpm", help="ancestral, all steps; or DDIM")
    parser.add_argument("--sampling-steps", type=positive_int, help="of ddim; none: 50, or all where there are fewer")
    parser.add_argument("--eta", type=from_0_to_1, help="of ddim; none: 0, deterministic; 1: with the posterior's noise")
    parser.add_argument("--class", dest="label", metavar="NAME",
                        help="class to draw, of a checkpoint with classes; none: sample i has the class i mod their number")
    parser.add_argument("--guidance", type=non_negative_float, default=1.0,
                        help="of classes: 1: the class as learned, more: more of it, at twice the time; 0: of no class")
    parser.add_argument("--condition", type=Path, metavar="CLIP",
                        help="video whose --given frames are kept; of a packed .npy sample i takes video i mod their number")
    parser.add_argument("--given", metavar="FRAMES", help="frames to keep: a Python slice, 0:8, or several, 0:8,20:24")
    parser.add_argument("--window", type=positive_int, help="draw so many frames at a time; none: all at once")
    parser.add_argument("--overlap", type=positive_int, help="frames of a window that are the last of the one before; "
                        "none: a quarter")
    parser.add_argument("--condition-method", choices=("reconstruction", "replacement"),
                        help="how given frames act on the others; none: reconstruction guidance")
    parser.add_argument("--condition-weight", type=non_negative_float, help="w_r of reconstruction guidance; none: "
                        f"{CONDITION_WEIGHT:g}")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="EMA weights or the latest")
    parser.add_argument("--precision", choices=("auto", "bf16", "float32"), default="auto", help="auto: bf16 if native")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network; a CUDA graph on CUDA")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; none: the best there is")
    parser.add_argument("--out", type=Path, help=".npy file to write; none: samples_STEP.npy beside the checkpoint")
    return parser.parse_args()


def sampler_settings(args, T):
    """-> (steps, eta) for `draw`, from the flags, for T diffusion steps. Raises ValueError for flags that do not fit."""
    if args.sampler == "ddim":
        if args.sampling_steps and args.sampling_steps > T:
            raise ValueError(f"--sampling-steps {args.sampling_steps}: the checkpoint has {T} diffusion steps; expected 1 "
                             f"to {T}")
        return args.sampling_steps or min(50, T), args.eta or 0.0
    for flag, value in (("--sampling-steps", args.sampling_steps), ("--eta", args.eta)):
        if value is not None:
            raise ValueError(f"{flag} {value} goes with --sampler ddim; ddpm takes all {T} steps")
    return None, None


def chosen_labels(args, classes):
    """-> the class number of each sample, from the flags and the class names of the checkpoint; None if it has none.

    Raises ValueError for flags that do not fit.
    """
    if not classes:
        for flag, value in (("--class", args.label), ("--guidance", args.guidance if args.guidance != 1 else None)):
            if value is not None:
                raise ValueError(f"{flag} {value}: the checkpoint was trained without classes; leave it out, or train one "
                                 "with train.py --classes")
        return None
    if args.label is None:
        return [i % len(classes) for i in range(args.num)]
    if args.label not in classes:
        lower = {name.lower(): name for name in classes}
        close = [lower[name] for name in difflib.get_close_matches(args.label.lower(), lower)] or classes[:10]
        raise ValueError(f"--class {args.label}: not one of the checkpoint's {len(classes)} classes, such as "
                         f"{', '.join(close)}")
    return [classes.index(args.label)] * args.num


def given_frames(text, frames):
    """A slice such as 0:8, or several with commas between, of so many frames -> the frames' numbers. Raises ValueError."""
    given = set()
    for part in text.split(","):
        bounds = re.fullmatch(r"\s*(-?\d+)?:(-?\d+)?(?::([1-9]\d*))?\s*", part)
        if not bounds:
            raise ValueError(f"--given {text}: expected a slice such as 0:8, or several, 0:8,20:24")
        start, stop, step = (int(bound) if bound else None for bound in bounds.groups())
        picked = range(frames)[start:stop:step]
        if not picked or any(bound is not None and not -frames <= bound <= frames for bound in (start, stop)):
            raise ValueError(f"--given {text}: expected frames of the {frames} that a video has here (see --frames)")
        given.update(picked)
    if len(given) == frames:
        raise ValueError(f"--given {text}: all {frames} frames are given, none is left to draw (see --frames)")
    return sorted(given)


def read_condition(args, frames, size):
    """-> (numbers of the given frames, those frames of each clip), from the flags. Raises ValueError."""
    if bool(args.condition) != bool(args.given):
        raise ValueError(f"--condition {args.condition} --given {args.given}: expected both or neither")
    if not args.condition:
        return [], []
    given, clips = given_frames(args.given, frames), read_whole_videos(args.condition, size)[:args.num]
    shortest = min(map(len, clips))
    if shortest <= given[-1]:
        raise ValueError(f"--given {args.given}: asks for frame {given[-1]}, but {args.condition} has {shortest} frames, "
                         f"0 to {shortest - 1}")
    return given, [np.stack([clip[i] for i in given]) for clip in clips]


def plan_blocks(args, frames, given):
    """-> the blocks of `draw`, from the flags; those whose frames are all given are left out. Raises ValueError."""
    window, overlap = args.window or frames, 0
    if args.window:
        overlap = args.overlap or max(1, window // 4)
    elif args.overlap:
        raise ValueError(f"--overlap {args.overlap} goes with --window")
    if window > frames:
        raise ValueError(f"--window {window}: expected --frames {frames} or fewer")
    if overlap >= window:
        raise ValueError(f"--overlap {overlap}: expected less than the window of {window} frames")
    # the last one begins earlier, so as to be whole
    starts = [min(start, frames - window) for start in range(0, frames - overlap, window - overlap)]
    return [slice(start, start + window) for start in starts if not {*range(start, start + window)} <= {*given}]


def reconstruction_weight(args, conditional):
    """-> w_r, from the flags; 0 for the replacement method. Raises ValueError for flags that do not fit."""
    for flag, value in (("--condition-method", args.condition_method), ("--condition-weight", args.condition_weight)):
        if value is not None and not conditional:
            raise ValueError(f"{flag} {value} goes with --condition, or with a --window of fewer frames than --frames")
    if args.condition_method == "replacement":
        if args.condition_weight is not None:
            raise ValueError(f"--condition-weight {args.condition_weight:g} goes with --condition-method reconstruction")
        return 0.0
    return CONDITION_WEIGHT if args.condition_weight is None else args.condition_weight


def conditioning(args, frames, size):
    """-> given frames' numbers, those frames of each clip, blocks and w_r, as `draw` takes them, and a record of what
    shapes the samples, from the flags. Raises ValueError."""
    given, clips = read_condition(args, frames, size)
    blocks = plan_blocks(args, frames, given)
    conditional = given or len(blocks) > 1
    weight = reconstruction_weight(args, conditional)
    record = {"condition_weight": weight} if conditional else {}
    if given:
        digest = hashlib.sha256(b"".join(clip.tobytes() for clip in clips)).hexdigest()
        record |= {"condition": args.condition.name, "condition_sha256": digest, "given": given}
    if blocks != [slice(0, frames)]:
        record["blocks"] = [[block.start, block.stop] for block in blocks]
    return given, clips, blocks, weight, record


def main():
    args = parse_args()
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(args.device)
    path = args.ckpt or newest_checkpoint()
    content = read_bytes(path)
    ckpt = parse_checkpoint(content, path)
    config = ckpt["config"]
    net = load_network(ckpt, args.weights, device)
    frames, size = args.frames or config["frames"], args.size or config["size"]
    factor = 2 ** (len(net.config.channel_mults) - 1)
    if size % factor:
        raise ValueError(f"--size {size}: this network needs a size divisible by {factor}")
    diffusion = Diffusion(config["diffusion_steps"], device, config.get("prediction", "eps"))
    steps, eta = sampler_settings(args, diffusion.T)
    sampling_steps = steps or diffusion.T
    classes = config.get("classes") or []
    if len(classes) != net.config.classes:
        raise CheckpointError(f"{path} has {len(classes)} names for {net.config.classes} classes; expected one each")
    labels = chosen_labels(args, classes)
    given, clips, blocks, weight, condition = conditioning(args, frames, size)
    window = blocks[0].stop - blocks[0].start
    shape = (net.config.video_channels, frames, size, size)

    out = args.out or path.with_name(f"samples_{ckpt['step']:07d}.npy")
    if out.suffix != ".npy":
        raise ValueError(f"--out {out}: expected a name that ends in .npy")
    about = out.with_name(out.name + ".json")
    pictures = {out.with_suffix(".gif"): save_gif, out.with_suffix(".mp4"): save_mp4, out.with_suffix(".png"): save_sheet}
    # everything that shapes the samples
    request = {"checkpoint_sha256": hashlib.sha256(content).hexdigest(), "step": ckpt["step"], "weights": args.weights,
               "num": args.num, "frames": frames, "size": size, "seed": args.seed,
               "sampler": args.sampler, "sampling_steps": sampling_steps, "device": device.type,
               "precision": choose_precision(device, args.precision)}
    if eta is not None:
        request["eta"] = eta
    if labels:
        request |= {"guidance": args.guidance, "labels": [classes[label] for label in labels]}
    request |= condition
    batch_size = args.batch_size
    if about.exists():
        recorded = None
        with contextlib.suppress(ValueError, RecursionError):
            recorded = json.loads(about.read_text(errors="replace"))
        # the same batches as before, unless others are asked for
        before = recorded.pop("batch_size", None) if isinstance(recorded, dict) else None
        batch_size = batch_size or (before if isinstance(before, int) and before > 0 else None)
        if recorded != request:
            raise ValueError(f"{about} belongs to other samples; delete it and {out.name}, or choose another --out")
    else:
        for file in (out, *pictures):
            if file.exists():
                raise ValueError(f"{file} exists already; delete it or name another file with --out")
    if out.exists():
        if rank == 0:
            print(f"{out} is there already, drawn by this same command; delete it to draw it again")
        return
    if world_size > 1:
        join_processes("gloo", hours=24)
        agree(request)
    # one batch size for all processes, which share the batches among them
    branches, gradient = 1 if args.guidance == 1 else 2, bool(condition) and weight > 0
    batch_size = torch.tensor(batch_size or fitting_batch_size(net, (shape[0], window, size, size), args.precision, device,
                                                               branches, gradient))
    if world_size > 1:
        dist.all_reduce(batch_size, dist.ReduceOp.MIN)
    batch_size = min(batch_size.item(), math.ceil(args.num / world_size))  # smaller if not all would have one
    if rank == 0:
        parts_of(out).mkdir(parents=True, exist_ok=True)
        about_samples = json.dumps(request | {"batch_size": batch_size}, indent=1)
        replace_with(about, lambda temporary: temporary.write_text(about_samples))
        decay = f", decay {config['ema_decay']}" if args.weights == "ema" else ""
        print(f"{path}: step {ckpt['step']}, {args.weights} weights{decay}; {args.num} videos of {frames} frames, "
              f"{size}x{size}, {args.sampler}, {sampling_steps} steps, seed {args.seed}, {world_size} x {device.type}")
        if window > config["frames"]:
            print(f"warning: the network was trained on {config['frames']} frames and is to draw {window} at once, of which "
                  f"it has learned nothing; --window {config['frames']} draws as many by blocks")
    if world_size > 1:
        dist.barrier()

    # Finished videos wait in a folder until all are there.
    parts = [parts_of(out) / f"{i:07d}.npy" for i in range(args.num)]
    # The processes take batches in turn. A batch that was stopped in the middle is drawn again whole, so that its sums
    # are rounded as they would have been.
    batches = [range(first, min(first + batch_size, args.num)) for first in range(0, args.num, batch_size)]
    mine = [batch for batch in batches[rank::world_size] if not all(is_whole(parts[i], shape) for i in batch)]
    if args.compile:
        # fixed shapes: the last batch, if smaller, is compiled too
        net = torch.compile(net, dynamic=False, mode="reduce-overhead" if device.type == "cuda" else None)
    with tqdm(total=len(mine) * len(blocks) * sampling_steps, unit="step", disable=True if rank else None) as bar:
        def progress(steps):
            for step in steps:
                yield step
                bar.update()

        for batch in mine:
            videos = draw(net, diffusion, args.seed, batch, shape, args.precision, progress, steps, eta,
                          [labels[i] for i in batch] if labels else None, args.guidance,
                          given, np.stack([clips[i % len(clips)] for i in batch]) if given else None, weight, blocks)
            for i, video in zip(batch, videos):
                replace_with(parts[i], lambda temporary, video=video: write_array(temporary, video.shape, [video]))
    if world_size > 1:
        dist.barrier()
    if rank == 0:
        first = np.stack([np.load(part, allow_pickle=False) for part in parts[:16]])
        for picture, save in pictures.items():
            save(picture, first, given)
        replace_with(out, lambda temporary: write_array(temporary, (args.num, frames, size, size, 3),
                                                        (np.load(part, allow_pickle=False) for part in parts)))
        shutil.rmtree(parts_of(out))
        print(f"wrote {out.absolute()} and, for looking at, .gif, .mp4 and .png beside it")
    if world_size > 1:
        dist.destroy_process_group()


def parts_of(out):
    return out.with_name(f".{out.name}.parts")


def join_processes(backend, hours):
    """Start talking to the other processes of torchrun, which are waited for that long."""
    store, rank, world_size = next(dist.rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # On one machine torchrun keeps its store when --max-restarts starts the processes again: they must not find
        # each other's old addresses there. Of several machines the counts may differ, but each start has a new store.
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size,
                            timeout=datetime.timedelta(hours=hours))


def is_whole(part, shape):
    """Whether a file holds a video of `shape` (c, f, h, w) as it should."""
    try:
        video = np.lib.format.open_memmap(part, mode="r")  # unlike np.load, it knows neither pickles nor archives
    except Exception:  # it is not there; or a damaged header makes numpy raise all kinds of them
        return False
    return video.shape == (*shape[1:], shape[0]) and video.dtype == np.uint8


def agree(request):
    """Raises ValueError unless all processes are to draw the same: a checkpoint may change while they start."""
    digest = hashlib.sha256(json.dumps(request).encode()).digest()
    digests = torch.tensor([list(digest), [-byte for byte in digest]])
    dist.all_reduce(digests, dist.ReduceOp.MAX)
    if (digests[0] != -digests[1]).any():
        raise ValueError("the processes read different checkpoints; start again once it is no longer being written")


def write_array(path, shape, arrays):
    """Write uint8 arrays one after another as one .npy file of the given shape."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for array in arrays:
            file.write(array.data)
        file.flush()
        os.fsync(file.fileno())


def run(name, main):
    """Run a script's main function: what a person did wrong is one line and a non-zero exit, not a traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold bytes that are no characters
    try:
        main()
    except KeyboardInterrupt:
        message = "interrupted; give the same command again to go on"
    except torch.OutOfMemoryError as error:
        message = (f"out of GPU memory ({str(error).split('. ')[0]}); try a smaller --batch-size, or for train.py "
                   "--grad-checkpoint or --grad-accum")
    except OSError as error:
        message = str(error)
    except (MemoryError, RuntimeError) as error:
        if re.search("Connection (reset|closed) by peer", str(error)):
            message = "another process of this run has ended; give the same command again to go on"
        elif isinstance(error, MemoryError) or re.search("can't allocate memory|overflowed", str(error)):
            message = "out of memory; try a smaller --batch-size, --frames or --size"
        else:
            raise
    except ValueError as error:
        if int(os.environ.get("LOCAL_RANK", 0)):  # the first process of each machine says it for all
            sys.exit(1)
        message = str(error)
    else:
        return
    sys.exit(f"{name}: " + " ".join(message.splitlines()))  # names of files may have several


if __name__ == "__main__":
    run("sample.py", main)
