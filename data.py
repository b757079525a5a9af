"""Video in: real videos packed once into one memory-mapped array, or mazes drawn on the spot.

    python data.py UCF-101 --size 32 --out ucf.npy                        # a folder of videos, nested or not
    python data.py navigate --size 32 --min-frames 500 --out minerl.npy   # holding train/*.mp4 and test/*.mp4
    python data.py maze --size 32 --frames 500 --num 100 --out maze.npy   # the embedded walks, as a file

    videos = open_videos("ucf.npy", frames=16, size=32)    # or a folder of videos, or None for endless mazes
    for clips, labels in batches(videos, sample_indices=range(64), seed=0):
        x = to_float(clips)                                # (64, 3, 16, 32, 32), in [-1, 1]

Glossary
    video    uint8 (frames, height, width, 3), RGB, 0..255. That is a video's shape everywhere outside the network;
             inside it is float32 (b, c, f, h, w) in [-1, 1]. `to_float` and `to_uint8` are the only two ways across.
    clip     `frames` consecutive frames of one video, from anywhere in it: what the network is trained on
    key      non-negative integers that name a clip, such as (seed, step, sample index). A clip is a function of its
             key alone, so neither the number of processes, nor of workers, nor a restart changes what is trained on.
    label    what a video shows, in words: the name of its class folder, a maze's main colour; None if it has none
    split    "train" or "test", by UCF101's official lists, a folder's name or --test-fraction; "all" is both
    packed   name.npy: the frames of all videos, one after another, uint8 (total, size, size, 3);
             name.json, its index: {"size", "stride", ..., "videos": [{"name", "start", "length", "label", "split"},
             ...], "skipped": [{"name", "reason"}, ...]}, where start and length count the frames in name.npy

Needs torch, numpy and Pillow; PyAV (17 or later) to decode video files, tqdm to pack.
"""
import contextlib
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence


class DataError(ValueError):
    """What a person did wrong, in one line: the offending value, what was expected, what to do."""


def to_float(video):
    """uint8 (..., f, h, w, 3) -> float32 (..., 3, f, h, w), 0..255 -> [-1, 1]. Raises ValueError."""
    if video.dtype != torch.uint8 or video.ndim < 4 or video.shape[-1] != 3:
        raise ValueError(f"to_float takes uint8 (..., frames, height, width, 3), got {video.dtype} {video.shape}")
    return video.movedim(-1, -4).float().div(127.5).sub(1).contiguous()


def to_uint8(x):
    """float (..., 3, f, h, w), clamped to [-1, 1] -> uint8 (..., f, h, w, 3): undoes `to_float` exactly for all 256
    values. Raises ValueError, also for NaN and infinity: they have no colour."""
    if not x.is_floating_point() or x.ndim < 4 or x.shape[-4] != 3:
        raise ValueError(f"to_uint8 takes floats (..., 3, frames, height, width), not {x.dtype} {tuple(x.shape)}")
    if not x.isfinite().all():
        raise ValueError(f"to_uint8 got {int((~x.isfinite()).sum())} values of {x.numel()} that are NaN or infinite")
    return x.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).movedim(-4, -1).contiguous()


# ---------------------------------------------------------------------------------------- clips by key, batches


def open_videos(path, frames, size, split="train"):
    """-> MazeVideos if path is None or "maze", else PackedVideos of what `read_videos` takes. Raises DataError."""
    if path is not None and str(path) != "maze":
        return PackedVideos(path, frames, size, split)
    from mazes import MazeVideos  # here, so that this file alone reads videos
    try:
        return MazeVideos(frames, size, split)
    except ValueError as error:
        raise DataError(error) from None


class PackedVideos:
    """Clips of packed videos, memory-mapped; every clip of every video of the split is equally likely.

    path: what `read_videos` takes. Attributes: splits, those that the file has; videos, the index entries of the
    split's long enough videos; num_too_short; num_clips; stride, every how many frames one was packed, or None.
    Raises DataError if there are none, or of another size.
    """

    def __init__(self, path, frames, size, split="train"):
        self.frames, self.size, self.split = frames, size, split
        self.pixels, self.all_videos = read_videos(path, size)
        if self.pixels.shape[1:3] != (size, size):
            raise DataError(f"--size {size}: {path} holds frames of {self.pixels.shape[1:3]}; give theirs or pack anew")
        self.splits = tuple(sorted({video["split"] for video in self.all_videos}))
        chosen = [video for video in self.all_videos if split in (video["split"], "all")]
        self.videos = [video for video in chosen if video["length"] >= frames]
        self.num_too_short = len(chosen) - len(self.videos)
        if not self.videos:
            longest = max([video["length"] for video in chosen], default=0)
            raise DataError(f"--split {split} --frames {frames}: of the videos in {path} ({' and '.join(self.splits)}) "
                            f"{len(chosen)} are in this split, the longest with {longest} frames; try fewer --frames")
        self.stride = read_index(Path(self.pixels.filename)).get("stride")
        clips = np.array([video["length"] - frames + 1 for video in self.videos])
        self.num_clips = int(clips.sum())
        self.first_clips = np.cumsum(clips) - clips  # the number of each video's first one, counted over all of them

    @functools.cached_property
    def fingerprint(self):
        """A hash of all videos' lengths, labels and splits and of 256 frames: the same wherever the file lies."""
        about = [[video["length"], video["label"], video["split"]] for video in self.all_videos]
        frames = self.pixels[np.linspace(0, len(self.pixels) - 1, 256).astype(int)]
        return hashlib.sha256(json.dumps([frames.shape, about]).encode() + frames.tobytes()).hexdigest()[:16]

    def clip_and_label(self, *key):
        """key: non-negative integers -> uint8 (frames, size, size, 3), and the label of the video it is cut from."""
        clip = random_generator(*key).integers(self.num_clips)
        number = np.searchsorted(self.first_clips, clip, side="right") - 1
        start = self.videos[number]["start"] + clip - self.first_clips[number]
        return np.array(self.pixels[start:start + self.frames]), self.videos[number]["label"]

    def clip(self, *key):
        return self.clip_and_label(*key)[0]

    def __reduce__(self):  # a memory map is pickled as a copy of its data: worker processes open the file instead
        return PackedVideos, (self.pixels.filename, self.frames, self.size, self.split)


def random_generator(*key):
    """A random generator that is a function of non-negative integers; (1, 2) and (1, 2, 0) give different ones."""
    # SeedSequence takes trailing zeros for padding, hence the length in front.
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((len(key), *key))))


def batches(videos, sample_indices, seed, first_step=0, workers=2, pin_memory=False, stop=None):
    """Endless iterator over the batches of steps first_step, first_step + 1, ...: a uint8 tensor (b, f, h, w, 3), whose
    row for sample index i at step s is videos.clip(seed, s, i), and the list of the b labels, each a str or None.
    `workers` processes read one batch ahead each; 0: this one reads. See `in_processes` about `stop` and errors."""
    make_batch, steps = functools.partial(batch_of_step, videos, sample_indices, seed), range(first_step, 2**62)
    for clips, labels in in_processes(make_batch, steps, workers, stop) if workers else map(make_batch, steps):
        clips = torch.from_numpy(clips)
        yield clips.pin_memory() if pin_memory else clips, labels


def batch_of_step(videos, sample_indices, seed, step):
    clips, labels = zip(*[videos.clip_and_label(seed, step, i) for i in sample_indices])
    return np.stack(clips), list(labels)


def in_processes(function, items, workers, stop=None):
    """Yield function(item) for each of `items`, in order, computed by `workers` processes. Once `stop` (an object whose
    truth says that a signal came, None: signals end the process at once) is true, nothing is waited for any more. The
    death of a worker, or of this process, closes the worker's own pipe: the other side notices at once, even in the
    middle of a result. (DataLoader's workers share a pipe, which then blocks.) Raises DataError if a worker dies."""
    receivers = []
    for first in range(workers):
        pipe = receiver, sender = multiprocessing.Pipe(duplex=False)
        arguments = function, items[first::workers], *pipe, stop is not None
        process = multiprocessing.Process(target=work, args=arguments, daemon=True)
        process.start()
        multiprocessing.util.Finalize(receiver, process.kill, exitpriority=0)  # Python's exit waits for frozen ones
        sender.close()
        receivers.append(receiver)
    for item, receiver in zip(items, itertools.cycle(receivers)):
        while not receiver.poll(0.5):
            if stop:
                return
        try:
            yield receiver.recv()
        except (EOFError, OSError):
            if stop:  # of which the worker has died, before it ignored signals
                return
            raise DataError(f"a worker process died at {item}; if memory ran out, try fewer --workers") from None


def work(function, items, receiver, sender, ignores_signals):
    torch.set_num_threads(1)  # a forked process lacks the main process's threads, and would wait for them
    receiver.close()  # the main process's end, of which a forked process has a copy
    # Signals may go to all processes of a terminal or a job; what they mean is the main process's to decide.
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if ignores_signals else (signal.SIGINT,):
        signal.signal(kind, signal.SIG_IGN)
    with contextlib.suppress(BrokenPipeError):  # nobody wants the rest
        for item in items:
            sender.send(function(item))


# ---------------------------------------------------------------------------------------- reading


def read_videos(path, size=None):
    """-> the memory map of all frames, uint8 (total frames, h, w, 3), and the index's list of videos. Raises DataError.

    path: a packed .npy file; or one without an index, where (n, frames, h, w, 3) is n videos, as sample.py writes them
    (with labels in NAME.npy.json), and (frames, h, w, 3) is one, all of them "train"; or a folder of videos or a video
    file, which `pack_into_cache` packs once.
    """
    path = Path(path)
    if path.suffix.lower() != ".npy":
        path = pack_into_cache(path, size)
    array = open_array(path)
    pixels = array.reshape(-1, *array.shape[-3:])
    videos = read_index(path).get("videos")
    if videos is None:
        count, length = array.shape[:2] if array.ndim == 5 else (1, len(array))
        labels = read_json(path.with_name(path.name + ".json")).get("labels")
        if not isinstance(labels, list) or [type(label) for label in labels] != [str] * count:
            labels = [None] * count
        videos = [{"name": f"{path.name}[{i}]", "start": i * length, "length": length, "label": label, "split": "train"}
                  for i, label in enumerate(labels)]
    if [video["start"] for video in videos] + [len(pixels)] != [0, *itertools.accumulate(v["length"] for v in videos)]:
        raise DataError(f"the .json file beside {path} does not describe its {len(pixels)} frames; move it away")
    return pixels, videos


def read_index(path):
    """-> the index of a packed file, or {}: a .json beside it that `write_packed` did not write is not one."""
    index = read_json(path.with_suffix(".json"))
    return index if {"size", "skipped"} <= index.keys() and isinstance(index.get("videos"), list) else {}


def read_json(path):
    """-> the dict in a file; empty if it holds anything else, or is not there."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (TypeError, ValueError):
        return {}


def open_array(path):
    """The uint8 (..., frames, h, w, 3) in a .npy (memory-mapped) or .pt file; never runs its code. Raises DataError."""
    if not path.is_file():  # opening a pipe would wait for ever
        raise DataError(f"{path} is not a file")
    try:
        if path.suffix.lower() == ".pt":
            array = torch.load(path, map_location="cpu", weights_only=True).contiguous().numpy()
        else:
            array = np.lib.format.open_memmap(path, mode="r")  # unlike np.load, it knows neither pickles nor archives
    except Exception as error:  # both raise all kinds of them for a damaged file
        raise DataError(f"{path} is damaged, or holds no array or tensor ({type(error).__name__})") from None
    if array.dtype != np.uint8 or array.ndim not in (4, 5) or array.shape[-1] != 3 or not array.flags.c_contiguous:
        raise DataError(f"{path} holds {array.dtype} {array.shape}; expected uint8 (frames, height, width, 3)")
    return array


def class_names(path):
    """The labels in what `open_videos` takes, sorted; those of a folder before it is packed. Raises DataError."""
    if path is None or str(path) == "maze":
        from mazes import COLOUR_NAMES
        return sorted(COLOUR_NAMES)
    videos = read_videos(path)[1] if Path(path).suffix.lower() == ".npy" else find_videos(Path(path))
    return sorted({video["label"] for video in videos} - {None})


# ---------------------------------------------------------------------------------------- packing

ANIMATIONS = {".gif", ".webp", ".apng"}
VIDEO_FILES = ANIMATIONS | {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".m2v", ".vob", ".ts",
                            ".mts", ".m2ts", ".wmv", ".asf", ".flv", ".3gp", ".ogv", ".mxf", ".y4m", ".npy", ".pt"}
FRAME_FILES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".jp2", ".avif", ".heic"}
SPLIT_FOLDERS = {"train": "train", "training": "train",
                 **dict.fromkeys(("test", "testing", "val", "valid", "validation"), "test")}


def pack_into_cache(source, size):
    """Pack a folder of videos or a video file unless that was done since it changed -> the .npy. Raises DataError."""
    videos = find_videos(source)
    if size is None:
        raise DataError(f"{source} is not a packed .npy file: give --size, the height and width to pack it at")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssm-video-diffusion"
    packed = cache / f"{source.resolve().name[:50]}-{size}-{hash_of_files(videos)}.npy"
    if not packed.exists():
        print(f"packing {source} at {size}x{size}, once, into {packed}")
        pack(source, packed, size)
    return packed


def pack(source, out, size, workers=None, min_frames=1, stride=1, test_fraction=0):
    """Pack every video in the folder `source` (or the one file) into `out` and its index -> the index.

    Every `stride`-th frame; shorter side resized to `size`, then cropped around the centre. What cannot be decoded, or
    has fewer than `min_frames` frames, is listed with the reason. Where there are no test videos, `test_fraction` makes
    those whose names have the lowest hashes such: videos that are added later move hardly any. workers: processes that
    decode (two per core, as results are taken in order). Raises OSError and DataError, also if no video is usable.
    """
    found = find_videos(Path(source))
    if test_fraction and not any(video["split"] == "test" for video in found):
        hashes = [int(hashlib.sha256(os.fsencode(video["name"])).hexdigest()[:8], 16) / 2**32 for video in found]
        for video, value in zip(found, hashes):  # one at least
            video["split"] = "test" if value <= max(test_fraction, min(hashes)) else "train"
    settings = {"size": size, "stride": stride, "min_frames": min_frames}
    decoded = in_processes(functools.partial(decode, **settings), [video["path"] for video in found],
                           min(workers or 2 * cpus(), len(found)))
    about = settings | {"test_fraction": test_fraction, "files": hash_of_files(found)}
    return write_packed(out, about, len(found), zip(found, decoded))


def cpus():
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def hash_of_files(videos):
    """A hash of what `find_videos` found: names, labels, splits, and the files' sizes and times of change."""
    stamps = [[video["name"], video["label"], video["split"],
               *[(file.name, file.stat().st_size, file.stat().st_mtime_ns) if file.exists() else None
                 for file in files_of(video["path"])]] for video in videos]
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:16]


def write_packed(out, about, count, videos):
    """Write `count` videos, pairs of {"name", "label", "split"} and what `decode` returns -> the index.

    about: what shapes the file, for the index. A file made from the same stays as it is, any other is refused. Both are
    written to a temporary folder, then renamed, the index first: an array without one would pass for one long video.
    """
    from tqdm import tqdm
    out, index_path = Path(out), Path(out).with_suffix(".json")
    if out.suffix != ".npy":
        raise DataError(f"--out {out}: expected a name that ends in .npy")
    index, size, entries, skipped, total = read_json(index_path), about["size"], [], [], 0
    if (out.exists() or index_path.exists()) and not about.items() <= index.items():
        raise DataError(f"--out: {out} or {index_path.name} was made from other videos or flags; move both away")
    if out.exists():
        print(f"{out} is there already, made by this same command; delete it to make it again")
        return index
    try:  # a folder with a name of its own: two runs may pack the same videos at once
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent)
    except OSError as error:
        raise OSError(f"{out} cannot be written: {error.strerror}") from None
    with folder, open(Path(folder.name, out.name), "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (0, size, size, 3)}
        np.lib.format.write_array_header_1_0(file, header)  # leaves room for what the first axis will be
        for video, (frames, fps) in tqdm(videos, total=count, unit="video", disable=None):
            if isinstance(frames, str):
                skipped.append({"name": video["name"], "reason": frames})
                tqdm.write(f"skipped {video['name']!r}: {frames}")
            else:
                file.write(frames.data)
                entries.append({"name": video["name"], "start": total, "length": len(frames),
                                "label": video["label"], "split": video["split"], "fps": fps})
                total += len(frames)
        if not entries:
            raise DataError(f"there is no usable video; {skipped[0]['name']}: {skipped[0]['reason']}")
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header | {"shape": (total, size, size, 3)})
        file.flush()
        os.fsync(file.fileno())
        index = about | {"videos": entries, "skipped": skipped}
        Path(folder.name, index_path.name).write_text(json.dumps(index, indent=1), encoding="utf-8")
        for path in (index_path, out):
            os.replace(Path(folder.name, path.name), path)
    tests, classes = sum(video["split"] == "test" for video in entries), {video["label"] for video in entries} - {None}
    rates = sorted({round(video["fps"]) for video in entries if video["fps"]})
    differ = f"; frame rates differ: {', '.join(map(str, rates))}" if len(rates) > 1 else ""
    print(f"packed {out}: {len(entries) - tests} for training, {tests} for tests, {len(skipped)} skipped; "
          f"{total} frames of {size}x{size} ({total * size**2 * 3 / 1e6:.1f} MB); classes: {len(classes)}{differ}")
    return index


def find_videos(source):
    """[{"name", "path", "label", "split"}, ...] sorted by name. Raises DataError.

    A path is a video file, or a folder of numbered frames: one with pictures and no videos in it. There are also those
    that cannot be read, and pictures beside videos: `decode` gives the reason.
    """
    paths = []

    def not_a_folder(error):
        if not isinstance(error, (NotADirectoryError, PermissionError)):  # such as links round in a circle
            raise DataError(f"{error.filename} cannot be read as videos: {error.strerror}")
        paths.append(Path(error.filename))

    for folder, subfolders, names in os.walk(source, followlinks=True, onerror=not_a_folder):
        subfolders[:] = [name for name in subfolders if name[0] != "." and name != "@eaDir"]  # a NAS's thumbnails
        files = [Path(folder, name) for name in names if name[0] != "."]
        videos = [file for file in files if file.suffix.lower() in VIDEO_FILES]
        pictures = [file for file in files if file.suffix.lower() in FRAME_FILES]
        paths += videos + pictures if videos or not pictures else [Path(folder)]
    if not paths:
        raise DataError(f"{source} holds no videos; expected {' '.join(sorted(VIDEO_FILES))}, or folders of pictures")
    # UCF101's lists of split 01 have lines such as "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1".
    official = {Path(line.split()[0]).stem: split for split in ("train", "test")
                for folder in (source, source.resolve().parent)
                for file in (*folder.glob(f"{split}list01.txt"), *folder.glob(f"ucfTrainTestlist/{split}list01.txt"))
                for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()}
    found = []
    for path in paths:
        name = path.relative_to(source).as_posix() if path != source else source.resolve().name
        folders = name.split("/")[:-1]
        splits = [SPLIT_FOLDERS[folder.lower()] for folder in folders if folder.lower() in SPLIT_FOLDERS]
        found.append({"name": name, "path": path, "split": official.get(path.stem) or (splits or ["train"])[-1],
                      "label": folders[-1] if folders and folders[-1].lower() not in SPLIT_FOLDERS else None})
    return sorted(found, key=lambda video: video["name"])


def files_of(path):
    """The file of a video; of a folder of frames the pictures in the order of their numbers: 2.png before 10.png."""
    if not path.is_dir() or not os.access(path, os.R_OK):
        return [path]
    pictures = [file for file in path.iterdir() if file.suffix.lower() in FRAME_FILES and file.name[0] != "."]
    return sorted(pictures, key=lambda file: ([int(part) if part.isdecimal() else part
                                               for part in re.split(r"(\d+)", file.name)], file.name))


# ---------------------------------------------------------------------------------------- decoding


def decode(path, size, min_frames=1, stride=1):
    """A video file or folder of frames -> uint8 (frames, size, size, 3), and the file's frames per second, or None; of
    a video that cannot be used, or has too few frames, the reason, a str, and None."""
    # `fit` takes the largest square around the centre; bicubic in Pillow widens its filter as it shrinks: no aliasing.
    # Frames are resized as they are decoded: a long HD video is never in memory at its full size.
    small, duration = [], None
    try:
        images = read_images(Path(path).absolute(), size)  # FFmpeg takes the "a" of "a:b.mp4" for a protocol
        for image in itertools.islice(images, 0, None, stride):
            duration = image.info.get("duration")  # in milliseconds
            if image.has_transparency_data:  # over black, as in video players: pixels may hide any colour
                image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
            small.append(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC))
    except Exception as error:  # whatever a bad file does to a decoder, it is one bad file
        reason = re.sub(r"\[Errno \d+\] ", "", " ".join(str(error).split()))
        return reason[:200] or type(error).__name__, None
    if len(small) < min_frames:
        return f"has fewer than {min_frames} frames: {len(small)}", None
    return np.stack(small), round(1000 / duration, 2) if duration else None


def read_images(path, size):
    """The frames of a video as PIL images, scaled down to no less than twice `size`, or not at all."""
    files, is_folder, kind = files_of(path), path.is_dir(), path.suffix.lower()
    if not all(file.is_file() for file in files):  # reading a pipe would wait for ever
        raise DataError("is not there, may not be read, or is not a regular file")
    if is_folder or kind in FRAME_FILES | ANIMATIONS:
        for file in files:
            with Image.open(file) as image:
                animated = getattr(image, "is_animated", False) and image.format != "MPO"  # a JPEG and its preview
                if animated == is_folder:
                    raise DataError(f"{file.name} is {'several pictures' if animated else 'one picture, no video'}")
                if image.mode[0] in "IF":  # Pillow would cut these off at 255, not scale them
                    raise DataError(f"{file.name} has more than 8 bits per channel")
                frames = ImageSequence.Iterator(image) if animated else [image]  # partial ones on top of those before
                yield from map(ImageOps.exif_transpose, frames)
    elif kind in (".npy", ".pt"):
        if read_index(path):
            raise DataError("is packed already: there is an index beside it")
        yield from map(Image.fromarray, open_array(path))
    else:
        yield from read_film(path, size)


def read_film(path, size):
    import av  # here, so that everything but decoding works without it
    if int(av.__version__.split(".")[0]) < 17:
        raise DataError(f"PyAV {av.__version__} mixes up the colours of HD video; expected 17 or later")
    av.logging.set_level(av.logging.PANIC)  # what FFmpeg has to say about a bad file comes as an exception
    with av.open(str(path)) as container:
        stream = next((stream for stream in container.streams.video if stream.codec_context is not None
                       and not stream.disposition & av.stream.Disposition.attached_pic), None)  # the cover of music
        if stream is None:
            raise DataError("has no video stream that can be decoded")
        stream.codec_context.thread_count = 1  # there is one process per core already
        for packet in container.demux(stream):
            frames = packet.decode()
            if packet.is_corrupt or any(frame.is_corrupt for frame in frames):  # FFmpeg makes up what it cannot decode
                raise DataError("is cut off or damaged")
            for frame in frames:
                alpha = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
                # Down to twice the size while converting to RGB: five times faster for HD. `decode` does the rest, and
                # all of it where pixels may be transparent: the colours that they hide must not be mixed with others.
                width = frame.width * (stream.sample_aspect_ratio or 1)  # pixels need not be square
                scale = 1 if alpha else min(1, 2 * size / min(width, frame.height))
                width, height = round(width * scale), round(frame.height * scale)
                frame = frame.reformat(width, height, "rgba" if alpha else "rgb24", interpolation="AREA", threads=1)
                image = Image.fromarray(upright(frame.to_ndarray(), frame.side_data.get("DISPLAYMATRIX")))
                image.info["duration"] = float(1000 / (stream.average_rate or math.inf))
                yield image


def upright(pixels, matrix):
    """(h, w, c) as a player shows it, turned by quarters and mirrored. matrix: FFmpeg's AVDisplayMatrix, or None."""
    if matrix is not None:
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].astype(float)  # (x, y) is shown at (a x + c y, b x + d y)
        if abs(b) + abs(c) > abs(a) + abs(d):
            pixels, a, d = pixels.swapaxes(0, 1), c, b
        pixels = pixels[::-1 if d < 0 else 1, ::-1 if a < 0 else 1]
    return np.ascontiguousarray(pixels)


def main():
    from command import Parser, non_negative_int, positive_int, zero_to_one
    parser = Parser(description="Packs videos into one .npy file. train.py --data FOLDER does so, too, into ~/.cache.")
    add = parser.add_argument
    add("source", help="a folder of videos, one video, or the word maze for the embedded walks")
    add("--size", type=positive_int, required=True, help="height and width of packed frames, in pixels")
    add("--out", required=True, help="the .npy file to write; its index goes beside it as .json")
    add = parser.add_argument_group("videos only").add_argument
    add("--workers", type=positive_int, help="processes that decode (two per core)")
    add("--stride", type=positive_int, default=1, help="keep every n-th frame only (1)")
    add("--min-frames", type=positive_int, default=1, help="skip videos with fewer frames to keep (1)")
    add("--test-fraction", type=zero_to_one, default=0, help="share to hold out where there are no test videos (0)")
    add = parser.add_argument_group("maze only").add_argument
    add("--frames", type=positive_int, default=500, help="frames per walk (500)")
    add("--num", type=positive_int, default=100, help="number of walks (100)")
    add("--seed", type=non_negative_int, default=0, help="another seed, other walks (0)")
    args = parser.parse_args()
    is_maze = args.source == "maze"
    for name in ("workers", "stride", "min_frames", "test_fraction") if is_maze else ("frames", "num", "seed"):
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: not a flag for {args.source}; see --help")
    if not is_maze:
        pack(args.source, args.out, args.size, args.workers, args.min_frames, args.stride, args.test_fraction)
        return
    mazes = open_videos("maze", args.frames, args.size)
    about = {"source": "maze", **{name: getattr(args, name) for name in ("size", "frames", "num", "seed")}}
    walks = (mazes.clip_and_label(args.seed, i) for i in range(args.num))
    write_packed(args.out, about, args.num, (({"name": f"walk{i:05d}", "label": label, "split": "train"}, (clip, None))
                                             for i, (clip, label) in enumerate(walks)))


if __name__ == "__main__":
    from command import run
    run("data.py", main, DataError)
