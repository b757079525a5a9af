"""The paired study of temporal layers on mazes: which of the paper's claims show at small scale?

    OMP_NUM_THREADS=1 python results/study.py                     # trains, draws, measures, prints the tables
    python results/study.py --steps 3000 --seeds 0 1 2 3 4        # resumes what is there, and trains on
    python results/study.py --layers ssm ssm-unidirectional       # two layers; further flags go to train.py
    python results/study.py --size 16 --fvd --samples 512 --out out/study16     # and FVD, of networks for 16x16
    python results/study.py --streams s.npy --out out/study16     # what sample.py drew as streams of 16x16, by age

Runs of one seed see the same clips, timesteps and noise whatever their layer, and all runs the same held-out clips: so
the difference between two layers of one seed is far sharper than either. Each run is a folder OUT/LAYER/SEED and
resumes when the same command is given again. The tables' numbers are in OUT/study.jsonl, curves in OUT/study.png.

Glossary
    difference        a layer's number minus that of the pair's other layer, of one seed, in per cent of the latter
    quartile          of the diffusion step t: the first is nearly clean, the last nearly noise
    ±                 the standard error of a mean over seeds
    unexplained       of a frame, what is nowhere near the same place in the frame before, in grey levels of 255: the
                      mean over pixels of the least difference to the pixels at most as many columns away there as
                      mazes move: 1 at 8x8, 2 at 16x16. A still video has none: the yardstick is what mazes have.
    FVD               of a network's samples against `MAZES` held-out mazes, the same ones for all networks
"""
import functools
import importlib.util
import itertools
import json
import signal
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fvd
from command import Parser, atomic_write, positive_int, progress_bar, run
from data import DataError, read_videos, to_float, to_uint8
from diffusion import Diffusion, sample_generators, training_noise
from mazes import MazeVideos
from s4d import cached_kernels, streaming
from sample import draw, load_checkpoint, load_network
from train import parse_args, train

LAYERS = {"ssm": ["--temporal", "ssm"],
          "ssm-unidirectional": ["--temporal", "ssm", "--unidirectional"],
          "ssm-causal": ["--temporal", "ssm", "--causal"],  # its samples are streams
          "ssm-mlp-layers-0": ["--temporal", "ssm", "--mlp-layers", "0"],
          "attention": ["--temporal", "attention"],
          "linear-attention": ["--temporal", "linear-attention"],
          "mamba": ["--temporal", "mamba"],
          "mamba-unidirectional": ["--temporal", "mamba", "--unidirectional"]}
PAIRS = [(name, "ssm") for name in LAYERS if name != "ssm"] + [("mamba-unidirectional", "mamba")]
NETWORK = ("--preset tiny --prediction eps --size 8 --frames 16 --base-channels 16 --channel-mults 1 2 --batch-size 4 "
           "--ema-decay 0.98 --precision float32 --workers 0 --grad-accum 1 --grid-samples 0 --eval-clips 64 "
           "--eval-every 250 --save-every 250").split()
MAZES = 512
PLACES = {"first 2": slice(0, 2), "others": slice(2, -2), "last 2": slice(-2, None)}  # frames of a clip


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--layers", nargs="+", choices=LAYERS, default=[name for name in LAYERS if name != "ssm-causal"])
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(0 1 2); differences need two")
    add("--steps", type=positive_int, default=1000, help="of training (1000)")
    add("--samples", type=positive_int, default=32, help="videos drawn from each network (32)")
    add("--sampling-steps", type=positive_int, default=25, help="of DDIM, with eta 1 (25)")
    add("--fvd", action="store_true", help="FVD, too; wants 512 samples, and the weights that fvd.py asks for")
    add("--disturbed", type=positive_int, help="FVD of so many mazes, disturbed in several ways, too")
    add("--streams", type=Path, help="only this: FVD of clips that begin at frames 0, 64, ... of the streams in a .npy")
    add("--out", type=Path, default=Path("out/study"))
    flags, others = parser.parse_known_args()
    i3d = fvd.load_i3d() if flags.fvd or flags.disturbed or flags.streams else None
    if flags.streams:
        return report_fvd(stream_clips(flags.streams), flags.streams.stem, flags, i3d)
    records = []
    for seed in flags.seeds:
        for layer in flags.layers:
            records += measure(layer, seed, flags, others, i3d)
    with atomic_write(flags.out / "study.jsonl", "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    config = load_checkpoint(flags.out / flags.layers[0] / str(flags.seeds[0]) / "ckpt.pt")["config"]
    report(records, flags, config)
    if flags.disturbed:
        report_fvd(disturbed_mazes(config, flags.disturbed), f"mazes-{flags.disturbed}", flags, i3d)


def measure(layer, seed, flags, others, i3d):
    """Train, unless that is done -> a record for every held-out loss in the run's log; the last one also has what is
    measured on the trained network, unless it has been trained further since."""
    out = flags.out / layer / str(seed)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    train(parse_args([*NETWORK, *LAYERS[layer], "--seed", str(seed), "--steps", str(flags.steps), "--out", str(out),
                      *others]))
    for number, handler in handlers.items():  # train.py has its own
        signal.signal(number, handler)
    ckpt = load_checkpoint(out / "ckpt.pt")
    if ckpt["step"] < flags.steps:
        sys.exit("interrupted; the same command resumes")
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    records = [{"layer": layer, "seed": seed, "step": line["step"],
                "loss": [line["held_out_loss"], *line["held_out_quartiles"]]}
               for line in lines if "held_out_loss" in line and line["step"] <= flags.steps]
    numbers = f"{flags.steps}-{flags.samples}-{flags.sampling_steps}"
    path, samples = out / f"trained-{numbers}.json", out / f"samples-{numbers}.npy"
    if ckpt["step"] == flags.steps and not (path.exists() and (samples.exists() or not flags.fvd)):
        measured, videos = measure_network(ckpt, flags.samples, flags.sampling_steps)
        with atomic_write(samples) as file:
            np.save(file, videos)
        with atomic_write(path, "w") as file:
            json.dump(measured, file)
    if path.exists():
        records[-1] |= json.loads(path.read_text())
    if flags.fvd and samples.exists():
        real = mazes_features(i3d, flags.out, ckpt["config"]["frames"], ckpt["config"]["size"])
        records[-1]["fvd"] = fvd.fvd(real, features(i3d, samples))
    return records


@torch.no_grad()
def measure_network(ckpt, count, steps):
    """-> {"frames": held-out loss by quartile of t and frame, "unexplained": of `count` samples by frame}, samples."""
    net, config = load_network(ckpt), ckpt["config"]
    shape = 3, config["frames"], config["size"], config["size"]
    diffusion = Diffusion(config["diffusion_steps"], prediction=config["prediction"])
    videos = MazeVideos(*shape[1:3], "test")
    settings = {"steps": min(steps, diffusion.T), "eta": 1}
    losses, samples = torch.zeros(4, shape[1]), []
    with cached_kernels(net, shape[1]):
        for i in range(config["eval_clips"]):  # as in train.held_out_loss, but by frame
            x_0 = to_float(torch.from_numpy(videos.clip(i)))[None]
            for quartile in range(4):
                t, noise = training_noise(x_0.shape[1:], "held-out", quartile, [i], diffusion.T)
                t = (quartile * diffusion.T + t) // 4
                target = noise if diffusion.prediction == "eps" else diffusion.v(x_0, t, noise)
                error = net(diffusion.q_sample(x_0, t, noise), t) - target
                losses[quartile] += error.square().mean((0, 1, 3, 4)) / config["eval_clips"]
        for first in progress_bar(range(0, count, 16), desc=f"{count} samples", unit_scale=16):
            generators = sample_generators(config["seed"], range(first, min(first + 16, count)), "cpu")
            if config.get("causal"):
                with streaming(net, shape[1]) as advance:
                    frames = diffusion.stream(net, advance, (len(generators), 3, *shape[2:]), generators, **settings)
                    samples.append(to_uint8(torch.cat([*itertools.islice(frames, shape[1])], 2)).numpy())
            else:
                samples.append(draw(net, functools.partial(diffusion.sample, **settings), shape, generators))
    samples = np.concatenate(samples)
    return {"frames": losses.tolist(), "unexplained": unexplained(samples).tolist()}, samples


def unexplained(videos):
    """uint8 (n, f, h, w, 3) -> (f - 1,), see the glossary."""
    before, after, width = videos[:, :-1].astype(float), videos[:, 1:].astype(float), videos.shape[3]
    reach = max(1, width // 8)
    padded = np.pad(before, ((0, 0), (0, 0), (0, 0), (reach, reach), (0, 0)), mode="edge")
    shifted = [np.abs(after - padded[:, :, :, shift:shift + width]).mean(-1) for shift in range(2 * reach + 1)]
    return np.min(shifted, 0).mean((0, 2, 3))


def held_out_mazes(frames, size, count, key=1):
    """-> uint8 (count, f, h, w, 3), other walks for another key."""
    mazes = MazeVideos(frames, size, "test")
    return np.stack([mazes.clip(key, i) for i in range(count)])


def features(i3d, path, videos=None):
    """I3D's features (n, 400) of uint8 videos (n, f, h, w, 3), of those in the file at `path` if they are not given,
    else written to it; cached beside it by what they show, where `fvd.py --cache` finds them."""
    if videos is not None:
        with atomic_write(path) as file:
            np.save(file, videos)
    pixels, found = read_videos(path)
    settings = {"i3d_sha256": fvd.I3D_SHA256, "device": "cpu", "resize": "tf1", "range": "-11", "batch_size": 1}
    return fvd.features_of(i3d, pixels, *fvd.cut(pixels, found, "fake", found[0]["length"]), settings, path.parent)


def mazes_features(i3d, out, frames, size):
    return features(i3d, out / f"mazes-{MAZES}.npy", held_out_mazes(frames, size, MAZES))


def paired(records, pair, step, value):
    """-> the mean over seeds of the differences of value(record) between the layers of a pair, and ±; None if fewer
    than two seeds have both."""
    values = [{record["seed"]: np.array(value(record)) for record in records if record["step"] == step
               and record["layer"] == layer} for layer in pair]
    seeds = sorted(values[0].keys() & values[1].keys())
    if len(seeds) < 2:
        return None
    differences = np.array([100 * (values[0][seed] / values[1][seed] - 1) for seed in seeds])
    return differences.mean(0), differences.std(0, ddof=1) / len(seeds) ** 0.5


def report(records, flags, config):
    """Print the tables, in Markdown; draw the curves, if matplotlib is there."""
    pairs = [pair for pair in PAIRS if {*pair} <= {*flags.layers}]
    steps = sorted({record["step"] for record in records})
    trained = [record for record in records if "frames" in record]

    def rows(some, step, value, label):
        for pair in pairs:
            if found := paired(some, pair, step, value):
                cells = (f"{mean:+.1f} ± {error:.1f}" for mean, error in zip(*map(np.atleast_1d, found)))
                print(f"| {pair[0]} − {pair[1]} |{label} " + " | ".join(cells) + " |")

    print(f"\nseeds {flags.seeds}; differences in per cent")
    print("\n| held-out loss | step | all t | quartile 1 | 2 | 3 | 4 |\n" + "|---" * 7 + "|")
    for step in steps:
        rows(records, step, lambda record: record["loss"], f" {step} |")

    places = [(quartile, place) for quartile in (3, 4) for place in PLACES]
    print("\n| held-out loss by frame | " + " | ".join(f"quartile {quartile}: {place}" for quartile, place in places)
          + " |\n" + "|---" * 7 + "|")
    rows(trained, flags.steps, lambda record: [np.mean(record["frames"][quartile - 1][PLACES[place]])
                                               for quartile, place in places], "")

    real = held_out_mazes(config["frames"], config["size"], 128)
    print(f"\n| | unexplained, of 255 |\n|---|---|\n| mazes | {unexplained(real).mean():.2f} |\n"
          f"| their frames shuffled | {unexplained(shuffled(real)).mean():.2f} |")
    for layer in flags.layers:
        values = [np.mean(record["unexplained"]) for record in trained if record["layer"] == layer]
        if values:
            print(f"| {layer} | {np.mean(values):.2f} |")
    print("\n| unexplained | difference |\n|---|---|")
    rows(trained, flags.steps, lambda record: np.mean(record["unexplained"]), "")
    if flags.fvd:
        print(f"\n| FVD of {flags.samples} samples against {MAZES} mazes | mean over seeds | of each seed |\n"
              "|---|---|---|")
        for layer in flags.layers:
            values = [record["fvd"] for record in trained if record["layer"] == layer and "fvd" in record]
            error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.1f}" if len(values) > 1 else ""
            if values:
                print(f"| {layer} | {np.mean(values):.1f}{error} | {', '.join(f'{value:.1f}' for value in values)} |")
        print("\n| FVD | difference |\n|---|---|")
        rows([record for record in trained if "fvd" in record], flags.steps, lambda record: record["fvd"], "")
    if importlib.util.find_spec("matplotlib"):
        draw_curves(records, pairs, steps, flags.out / "study.png")


def shuffled(videos):
    order = np.random.default_rng(0).permuted(np.tile(np.arange(videos.shape[1]), (len(videos), 1)), axis=1)
    return np.take_along_axis(videos, order[:, :, None, None, None], 1)


def blurred(videos):
    """By the weights 1 2 1 along height and width."""
    for axis in (2, 3):
        padded = np.pad(videos.astype(np.uint16), [(int(i == axis),) * 2 for i in range(5)], mode="edge")
        before, here, after = (np.take(padded, np.arange(videos.shape[axis]) + i, axis) for i in range(3))
        videos = (before + 2 * here + after + 2) // 4
    return videos.astype(np.uint8)


def disturbed_mazes(config, count):
    """-> {name: uint8 (count, f, h, w, 3)}, other mazes than the held-out ones, as they are and disturbed."""
    mazes = held_out_mazes(config["frames"], config["size"], count, key=2)
    between = mazes.copy()
    between[:, 1::2] = np.roll(mazes, 1, 0)[:, 1::2]
    noise = np.random.default_rng(0).normal(size=mazes.shape)
    return {"as they are": mazes, "backwards": mazes[:, ::-1], "frames shuffled": shuffled(mazes),
            "every other frame from another": between,
            **{f"noise of {std} grey levels": (mazes + std * noise).round().clip(0, 255).astype(np.uint8)
               for std in (2, 5, 10)},
            "blurred by 1 2 1": blurred(mazes)}


def stream_clips(path):
    """-> {name: uint8 (n, 16, h, w, 3)}, clips of the n streams in a .npy file by their age, and as many mazes."""
    streams = np.load(path, mmap_mode="r")
    ages = [k for k in (0, 64, 256, 1024, 4096) if k + 16 <= streams.shape[1]]
    return {"mazes": held_out_mazes(16, streams.shape[2], len(streams), key=2),
            **{f"frames {k} to {k + 15}": streams[:, k:k + 16] for k in ages}}


def report_fvd(videos, stem, flags, i3d):
    """FVD of {name: uint8 (n, f, h, w, 3)} against the held-out mazes, and what else there is to say, as a table."""
    print(f"\n| {stem} against {MAZES} mazes | FVD | unexplained, of 255 | red, green, blue |\n|---|---|---|---|")
    real = mazes_features(i3d, flags.out, *next(iter(videos.values())).shape[1:3])
    for name, clips in videos.items():
        distance = fvd.fvd(real, features(i3d, flags.out / f"{stem}-{name.replace(' ', '-')}.npy", clips))
        colour = ", ".join(f"{mean:.0f}" for mean in clips.mean((0, 1, 2, 3)))
        print(f"| {name} | {distance:.1f} | {unexplained(clips).mean():.2f} | {colour} |", flush=True)


def draw_curves(records, pairs, steps, path):
    """A panel for each quartile, and one for all t: the differences against the step, with their standard errors."""
    from matplotlib.figure import Figure
    figure = Figure((15, 3.5), layout="constrained")
    panels = figure.subplots(1, 5, sharex=True)
    for i, (panel, title) in enumerate(zip(panels, ["all t", *(f"quartile {q} of t" for q in (1, 2, 3, 4))])):
        for pair in pairs:
            found = [(step, paired(records, pair, step, lambda record: record["loss"])) for step in steps]
            points = [(step, both[0][i], both[1][i]) for step, both in found if both]
            if points:
                panel.errorbar(*zip(*points), label=f"{pair[0]} − {pair[1]}", capsize=2, linewidth=1)
        panel.axhline(0, color="grey", linewidth=0.5)
        panel.set(title=title, xlabel="step", ylabel="% of held-out loss" if i == 0 else None)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)


if __name__ == "__main__":
    run("study.py", main, DataError, fvd.FVDError)
