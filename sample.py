"""Draw videos from a checkpoint of train.py.

    python sample.py                                              # the newest checkpoint under out/
    python sample.py --ckpt out/minerl-400-ssm/ckpt.pt --num 1000 --batch-size 8 --out samples.npy
    torchrun --nproc-per-node 8 sample.py --num-samples 1000      # the same samples, shared among 8
    python sample.py --frames 800                                 # longer than the network was trained on

Writes NAME.npy, uint8 (num, frames, height, width, 3), which data.py and fvd.py read; NAME.npy.json, what it was drawn
from; NAME.gif and NAME.mp4, the first few side by side. Sample i is a function of (checkpoint, seed, i): the number of
processes does not enter, nor, but for the last bits of floating-point sums, does the batch size. Stopped and started
again by the same command, it goes on where it was.
"""
import argparse
import hashlib
import json
import math
import os
import pickle
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data import to_uint8
from diffusion import Diffusion, sample_generators
from model import UNet3D, UNetConfig


class CheckpointError(ValueError):
    """A file that is no checkpoint, or not one that can be used: one line for a person."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def non_negative_int(text):
    if not text.isdigit() or int(text) >= 2 ** 63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on, or too large")
    return int(text)


def positive_int(text):
    if non_negative_int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


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
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path} is refused: it holds more than tensors and settings, code perhaps") from None
    except Exception as error:  # torch raises all sorts for a damaged file
        raise CheckpointError(f"{path} is damaged or no checkpoint ({type(error).__name__}); "
                              "expected a ckpt.pt written by train.py") from None
    missing = {"step", "config", "unet", "model", "ema", "optimizer"} - set(ckpt if isinstance(ckpt, dict) else ())
    if missing:
        raise CheckpointError(f"{path} is no checkpoint of train.py: it lacks {', '.join(sorted(missing))}")
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
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the checkpoint does not fit this network: {' '.join(str(error).split())[:200]}") from None
    return net.to(device).eval().requires_grad_(False)


def draw(net, diffusion, seed, indices, shape, precision="auto", progress=None):
    """Draw the samples of the given indices, shape (c, f, h, w) -> uint8 array (len(indices), f, h, w, 3)."""
    device = torch.device(diffusion.device)
    with autocast(device, precision):
        x = diffusion.sample(net, (len(indices), *shape), sample_generators(seed, indices, device), progress)
    return to_uint8(x).cpu().numpy()


# ---------------------------------------------------------------------------------------- pictures


def replace_with(path, write):
    """Call write(temporary path), then give the file its name: what stands at `path` is always whole."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def grid(videos, pixels=96):
    """uint8 (n, f, h, w, 3) -> (f, H, W, 3): side by side in rows, each enlarged to about `pixels`, a gap between."""
    n, f, h, w, _ = videos.shape
    scale = max(1, round(pixels / h))
    videos = videos.repeat(scale, axis=2).repeat(scale, axis=3)
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    h, w, gap = h * scale, w * scale, 4
    # even sides, which H.264 wants
    canvas = np.zeros((f, (rows * (h + gap) + 1) // 2 * 2, (columns * (w + gap) + 1) // 2 * 2, 3), np.uint8)
    for i, video in enumerate(videos):
        y, x = i // columns * (h + gap), i % columns * (w + gap)
        canvas[:, y:y + h, x:x + w] = video
    return canvas


def save_gif(path, videos, fps=10):
    """Write uint8 videos (n, f, h, w, 3) side by side as an endless GIF."""
    frames = [Image.fromarray(frame) for frame in grid(videos)]

    def write(temporary):
        frames[0].save(temporary, "GIF", save_all=True, append_images=frames[1:], duration=1000 // fps, loop=0)

    replace_with(path, write)


def save_mp4(path, videos, fps=10):
    """Write uint8 videos (n, f, h, w, 3) side by side as H.264. Needs PyAV."""
    import av

    frames = grid(videos)

    def write(temporary):
        with av.open(str(temporary), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=fps, options={"crf": "18"})
            stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())

    replace_with(path, write)


# ---------------------------------------------------------------------------------------- the command


def parse_args():
    parser = Parser(prog="sample.py", description="Draw videos from a checkpoint of train.py.",
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ckpt", type=Path, help="checkpoint; none: the newest under out/")
    parser.add_argument("--num", "--num-samples", type=positive_int, default=16,
                        help="number of videos (under torchrun write --num-samples: --num is ambiguous to torchrun)")
    parser.add_argument("--batch-size", type=positive_int, default=8, help="videos drawn at once by each process")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="sample i is a function of the seed and i")
    parser.add_argument("--frames", type=positive_int, help="frames per video; none: as trained")
    parser.add_argument("--size", type=positive_int, help="height and width; none: as trained")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="averaged or latest weights")
    parser.add_argument("--precision", choices=("auto", "bf16", "float32"), default="auto", help="auto: bf16 if native")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; none: the best there is")
    parser.add_argument("--out", type=Path, help=".npy file to write; none: samples_STEP.npy beside the checkpoint")
    return parser.parse_args()


def main():
    args = parse_args()
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(args.device)
    path = args.ckpt or newest_checkpoint()
    ckpt = load_checkpoint(path)
    config = ckpt["config"]
    net = load_network(ckpt, args.weights, device)
    frames, size = args.frames or config["frames"], args.size or config["size"]
    factor = 2 ** (len(net.config.channel_mults) - 1)
    if size % factor:
        raise ValueError(f"--size {size}: this network needs a size divisible by {factor}")
    diffusion = Diffusion(config["diffusion_steps"], device)

    out = args.out or path.with_name(f"samples_{ckpt['step']:07d}.npy")
    if out.suffix != ".npy":
        raise ValueError(f"--out {out}: expected a name that ends in .npy")
    # everything that shapes the samples
    request = {"checkpoint_sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "step": ckpt["step"],
               "weights": args.weights, "num": args.num, "frames": frames, "size": size, "seed": args.seed,
               "sampler": "ddpm", "sampling_steps": diffusion.T, "device": device.type,
               "precision": choose_precision(device, args.precision)}
    about = out.with_name(out.name + ".json")
    if out.exists():
        if about.exists() and json.loads(about.read_text()) == request:
            if rank == 0:
                print(f"{out} is there already, drawn by this same command; delete it to draw it again")
            return
        raise ValueError(f"{out} exists already and holds something else; delete it or name another file with --out")

    shape = (net.config.video_channels, frames, size, size)
    if rank == 0:
        decay = f", decay {config['ema_decay']}" if args.weights == "ema" else ""
        print(f"{path}: step {ckpt['step']}, {args.weights} weights{decay}; {args.num} videos of {frames} frames, "
              f"{size}x{size}, {diffusion.T} steps, seed {args.seed}, {world_size} x {device.type}")
        if frames > config["frames"]:
            print(f"note: the network was trained on {config['frames']} frames, not {frames}")

    # Finished videos wait in a folder of their own, named after the request, until all are there.
    parts = out.with_name(f".{out.name}.{hashlib.sha256(json.dumps(request).encode()).hexdigest()[:12]}")
    parts.mkdir(parents=True, exist_ok=True)

    def part(i):
        return parts / f"{i:07d}.npy"

    # The processes take batches in turn; small ones if there would not be one for each.
    batch_size = min(args.batch_size, math.ceil(args.num / world_size))
    batches = [range(first, min(first + batch_size, args.num)) for first in range(0, args.num, batch_size)]
    mine = [batch for batch in batches[rank::world_size] if not all(part(i).exists() for i in batch)]
    with tqdm(total=len(mine) * diffusion.T, unit="step", disable=True if rank else None) as bar:
        def progress(steps):
            for step in steps:
                yield step
                bar.update()

        for batch in mine:
            videos = draw(net, diffusion, args.seed, batch, shape, args.precision, progress)
            for i, video in zip(batch, videos):
                replace_with(part(i), lambda temporary, video=video: write_array(temporary, video))

    if rank == 0:
        while not all(part(i).exists() for i in range(args.num)):  # the other processes' share
            time.sleep(0.2)
        merge(out, [part(i) for i in range(args.num)], (args.num, frames, size, size, 3))
        replace_with(about, lambda temporary: temporary.write_text(json.dumps(request, indent=1)))
        for file in parts.iterdir():
            file.unlink()
        parts.rmdir()
        first = np.load(out, mmap_mode="r")[:16]
        save_gif(out.with_suffix(".gif"), first)
        save_mp4(out.with_suffix(".mp4"), first)
        print(f"wrote {out.absolute()} and, for looking at, .gif and .mp4 beside it")


def write_array(path, array):
    with open(path, "wb") as file:
        np.save(file, array)


def merge(out, parts, shape):
    """Write the arrays of `parts` as one memory-mapped array."""
    def write(temporary):
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        for i, part in enumerate(parts):
            array[i] = np.load(part, allow_pickle=False)
        array.flush()

    replace_with(out, write)


def run(name, main):
    """Run a script's main function: what a person did wrong is one line and a non-zero exit, not a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        message = "interrupted; the same command goes on from here"
    except torch.OutOfMemoryError as error:
        message = (f"out of GPU memory ({str(error).split('. ')[0]}); try a smaller --batch-size, or for train.py "
                   "--grad-checkpoint or --grad-accum")
    except OSError as error:
        message = str(error)
    except ValueError as error:
        if int(os.environ.get("LOCAL_RANK", 0)):  # the first process of each machine says it for all
            sys.exit(1)
        message = str(error)
    else:
        return
    sys.exit(f"{name}: {message}")


if __name__ == "__main__":
    run("sample.py", main)
