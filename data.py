"""
Video in: mazes drawn on the spot, or real videos packed once into one memory-mapped array.

    python data.py UCF-101 --size 32 --out ucf.npy                        # a folder of videos, nested or not
    python data.py navigate --size 32 --min-frames 500 --out minerl.npy   # holding train/*.mp4 and test/*.mp4
    python data.py maze --size 32 --frames 500 --num 100 --out maze.npy   # the embedded walks, as a file

    videos = open_videos("ucf.npy", frames=16, size=32)    # or a folder of videos, or None for endless mazes
    for batch in batches(videos, sample_indices=range(64), seed=0):
        x = to_float(batch)                                # (64, 3, 16, 32, 32), in [-1, 1]

Words used here:

    video    uint8 (frames, height, width, 3), RGB, 0..255. That is a video's shape everywhere outside the network;
             inside it is float32 (b, c, f, h, w) in [-1, 1]. `to_float` and `to_uint8` are the only two ways across.
    clip     `frames` consecutive frames of one video: what the network is trained on
    window   a place where a clip can be cut: a video of n frames has n - frames + 1 of them
    key      non-negative integers that name a clip, such as (seed, step, sample index). A clip is a function of its
             key alone, so neither the number of processes, nor of workers, nor a restart changes what is trained on.
    packed   name.npy: the frames of all videos, one after another, uint8 (total, size, size, 3);
             name.json: {"size", "videos": [{"name", "start", "length", "label", "split"}, ...],
                         "skipped": [{"name", "reason"}, ...]}
    split    "train" or "test"; "all" is both

Needs torch, numpy and Pillow; PyAV (14.2 or later) to decode video files, tqdm to pack.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import signal
import stat
import struct
import sys
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence
from torch.utils.data import DataLoader, Dataset, Sampler


class DataError(ValueError):
    """Bad input, told in one line that is meant for a person: what was given, what was expected, what to do."""


# ---------------------------------------------------------------------------------------------------------------
# The one conversion each way


def to_float(video):
    """uint8 (..., f, h, w, 3) -> float32 (..., 3, f, h, w), 0..255 -> [-1, 1]. Raises TypeError or ValueError."""
    if not isinstance(video, torch.Tensor) or video.dtype != torch.uint8:
        raise TypeError(f"to_float takes a uint8 tensor, not {getattr(video, 'dtype', type(video).__name__)}")
    if video.ndim < 4 or video.shape[-1] != 3:
        raise ValueError(f"to_float takes (..., frames, height, width, 3), not {tuple(video.shape)}")
    return video.movedim(-1, -4).float().div(127.5).sub(1).contiguous()


def to_uint8(x):
    """float (..., 3, f, h, w), clamped to [-1, 1] -> uint8 (..., f, h, w, 3). Raises TypeError or ValueError.

    Undoes `to_float` exactly for all 256 values. NaN and infinity are refused: they have no colour.
    """
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        raise TypeError(f"to_uint8 takes a floating-point tensor, not {getattr(x, 'dtype', type(x).__name__)}")
    if x.ndim < 4 or x.shape[-4] != 3:
        raise ValueError(f"to_uint8 takes (..., 3, frames, height, width), not {tuple(x.shape)}")
    if not x.isfinite().all():
        raise ValueError(f"to_uint8 got {int((~x.isfinite()).sum())} values of {x.numel()} that are NaN or infinite")
    return x.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).movedim(-4, -1).contiguous()


def _generator(*key):
    """A random generator that is a function of non-negative integers; (1, 2) and (1, 2, 0) give different ones."""
    # SeedSequence takes trailing zeros for padding, hence the length in front.
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((len(key), *key))))


def _check_clip_settings(frames, size, split, smallest_size):
    if frames < 1:
        raise DataError(f"--frames {frames}: a clip has 1 frame or more")
    if size < smallest_size:
        raise DataError(f"--size {size}: expected {smallest_size} or more")
    if frames * size * size * 3 > 2**36:
        raise DataError(f"--frames {frames} --size {size}: one such clip would take more than 64 GB")
    if split not in ("train", "test", "all"):
        raise DataError(f"split {split!r}: expected 'train', 'test' or 'all'")


# ---------------------------------------------------------------------------------------------------------------
# Mazes: CELLS x CELLS unit squares with thin walls of many colours, walked through at eye level.
#
# Directions are 0 east, 1 north, 2 west, 3 south; turning left adds one. walls[axis, line, cell] says whether a wall
# stands on the grid line x = line (axis 0) or y = line (axis 1), along the given cell of that line.

CELLS = 5               # small, so that a long walk comes back to where it was
SHORTCUTS = 3           # walls taken out of the perfect maze, so that there are ways round, too
FRAMES_PER_CELL = 8     # one cell forward, or a quarter turn, in 8 frames: 2 pixels a frame at 16x16
FIELD_OF_VIEW = 84      # degrees
WALL_HEIGHT = 0.75      # in cells; seen from half of it, so that sky and floor stay in view even before a wall
DIM_SIDE = 0.78         # brightness of walls along x against those along y: corners show between equal colours
DIMMING = 0.22          # brightness falls as 1 / (1 + DIMMING * distance)
MOST_COMMON = 0.45      # share of walls that have the maze's main colour, its label: the others are its landmarks
STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))
WALL_COLOURS = np.array([(214, 64, 52), (232, 150, 40), (222, 206, 70), (74, 168, 76),
                         (56, 162, 190), (66, 88, 200), (158, 76, 188), (226, 120, 160)], np.float32)
COLOUR_NAMES = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SKY, HAZE, FLOOR = np.array([(104, 164, 236), (196, 208, 220), (112, 100, 88)], np.float32)


def maze_walk(seed, index, frames, size):
    """A first-person walk through a random maze: uint8 (frames, size, size, 3), a function of (seed, index).

    A longer walk begins with the frames of a shorter one, and the same place seen in the same direction is the same
    picture, byte for byte, however long ago it was seen before. Raises DataError unless frames >= 1 and size >= 8.
    """
    return MazeVideos(frames, size).clip(seed, index)


class MazeVideos:
    """An endless supply of maze walks; every key is a maze of its own. Raises DataError for a bad setting.

    Test walks are never training ones. There is no end to either, so "all" is just "train".
    """

    splits = ("train", "test")

    def __init__(self, frames, size, split="train"):
        _check_clip_settings(frames, size, split, smallest_size=8)
        self.frames, self.size, self.split = frames, size, split

    def clip(self, *key):
        """key: non-negative integers -> uint8 (frames, size, size, 3)."""
        rng, walls, main_colour = self._walls(*key)
        colours = np.where(rng.random(walls.shape) < MOST_COMMON, main_colour,
                           rng.integers(len(WALL_COLOURS), size=walls.shape))
        # The path comes last: it draws as many numbers as it has turns, and a longer one must not move the rest.
        return _render(_maze_path(rng, walls, self.frames), walls, WALL_COLOURS[colours], self.size)

    def label(self, *key):
        """The label of clip(*key): the main colour of the maze's walls, one of COLOUR_NAMES. (It need not be the one
        that a short clip shows most of: see `wall_colour`.)"""
        return COLOUR_NAMES[self._walls(*key)[2]]

    def _walls(self, *key):
        """-> the maze's generator, after its walls and the number of their main colour, which follow it."""
        rng = _generator(int(self.split == "test"), *key)
        return rng, _maze(rng), rng.integers(len(WALL_COLOURS))


def wall_colour(video):
    """uint8 maze video (frames, h, w, 3) -> the name of the wall colour that most of its pixels have.

    A pixel has the hue that is nearest by angle, so that neither distance nor side matters; sky and floor do not count.
    """
    hues = np.concatenate([WALL_COLOURS, [SKY, HAZE, FLOOR]])
    hues = hues / np.linalg.norm(hues, axis=1, keepdims=True)
    nearest = (video.reshape(-1, 3) @ hues.T).argmax(1)
    return COLOUR_NAMES[np.bincount(nearest, minlength=len(hues))[:len(COLOUR_NAMES)].argmax()]


def _wall(cell, direction):
    """Where in `walls` the wall stands that closes the cell (i, j) in a direction."""
    axis = direction % 2
    return axis, cell[axis] + (direction < 2), cell[1 - axis]


def _maze(rng):
    """A maze in which every cell can be reached: bool (2, CELLS + 1, CELLS)."""
    walls = np.ones((2, CELLS + 1, CELLS), bool)
    trail = [(0, 0)]
    visited = {(0, 0)}
    while trail:  # depth-first: long corridors, few short dead ends
        i, j = trail[-1]
        ahead = [(direction, (i + dx, j + dy)) for direction, (dx, dy) in enumerate(STEPS)
                 if 0 <= i + dx < CELLS and 0 <= j + dy < CELLS and (i + dx, j + dy) not in visited]
        if not ahead:
            trail.pop()
            continue
        direction, cell = ahead[rng.integers(len(ahead))]
        walls[_wall((i, j), direction)] = False
        visited.add(cell)
        trail.append(cell)
    for i, j, direction in rng.integers((CELLS - 1, CELLS - 1, 2), size=(SHORTCUTS, 3)):
        walls[_wall((i, j), direction)] = False
    return walls


def _moves():
    """The four ways through a cell entered eastwards, by the direction one leaves in (0 straight on, 1 left, 2 back,
    3 right): poses (x, y, cos heading, sin heading) around the cell's centre, one per frame, the first at its edge."""
    along = np.arange(FRAMES_PER_CELL) / FRAMES_PER_CELL
    angle = along * np.pi / 2
    zero = np.zeros_like(along)
    straight = np.stack([along - 0.5, zero, zero + 1, zero], 1)
    left = np.stack([np.sin(angle) / 2 - 0.5, 0.5 - np.cos(angle) / 2, np.cos(angle), np.sin(angle)], 1)
    spin = np.arange(2 * FRAMES_PER_CELL) / FRAMES_PER_CELL * np.pi / 2
    halfway = straight[:FRAMES_PER_CELL // 2]
    back = np.concatenate([halfway, np.stack([0 * spin, 0 * spin, np.cos(spin), np.sin(spin)], 1),
                           (halfway + (0.5, 0, 0, 0)) * (-1, 1, -1, 1)])
    return straight, left, back, left * (1, -1, 1, -1)


MOVES = _moves()


def _maze_path(rng, walls, frames):
    """A walk that never stands still, turns at random and goes back only at dead ends: poses (frames, 4), that is
    x, y in cells and the heading's cosine and sine."""
    i, j = (int(n) for n in rng.integers(CELLS, size=2))
    direction = next(d for d in range(4) if not walls[_wall((i, j), (d + 2) % 4)])  # there must be a way in
    start = int(rng.integers(FRAMES_PER_CELL))
    pieces, total = [], -start
    while total < frames:
        open_turns = [turn for turn in (0, 1, 3) if not walls[_wall((i, j), (direction + turn) % 4)]]
        turn = open_turns[rng.integers(len(open_turns))] if open_turns else 2
        x, y, cos, sin = MOVES[turn].T
        # Turned by a multiple of 90 degrees with integers, so that coming back gives the same numbers to the last bit.
        c, s = STEPS[direction]
        place = [i + 0.5 + c * x - s * y, j + 0.5 + s * x + c * y]
        pieces.append(np.stack([*place, c * cos - s * sin, s * cos + c * sin], 1))
        total += len(x)
        direction = (direction + turn) % 4
        i, j = i + STEPS[direction][0], j + STEPS[direction][1]
    return np.concatenate(pieces)[start:start + frames]


def _render(poses, walls, colours, size):
    """poses (frames, 4), walls (2, CELLS + 1, CELLS), their colours (..., 3) -> uint8 (frames, size, size, 3)."""
    tan = math.tan(math.radians(FIELD_OF_VIEW / 2))
    from_horizon = np.abs(np.arange(size, dtype=np.float32) + 0.5 - size / 2)[:, None]     # pixels, (size, 1)
    nearness = from_horizon / (size / 2)
    is_sky = np.arange(size)[:, None] < size / 2
    sky, haze, floor = SKY[:, None, None], HAZE[:, None, None], FLOOR[:, None, None]
    background = np.where(is_sky, haze + nearness * (sky - haze), floor * (0.4 + 0.6 * nearness))   # (3, size, 1)
    colours = colours.reshape(-1, 3).T
    brightness = np.repeat(np.array([1, DIM_SIDE], np.float32), walls[0].size)
    out = np.empty((len(poses), size, size, 3), np.uint8)
    block = max(1, 2**15 // size**2)  # as many frames at once as the processor's cache likes
    for first in range(0, len(poses), block):
        x, y, cos, sin = poses[first:first + block, :, None].astype(np.float32).transpose(1, 0, 2)  # (block, 1) each
        image = np.zeros((3, size, len(x) * size), np.float32)
        for part in (0.25, 0.75):  # two rays per pixel column soften the walls' vertical edges
            across = (tan * (2 * (np.arange(size) + part) / size - 1)).astype(np.float32)
            # Rays have length 1 along the heading: distances are perpendicular ones, and straight walls look straight.
            ray = np.stack([cos + sin * across, sin - cos * across]).reshape(2, -1)                  # (2, rays)
            ray[ray == 0] = 1e-9
            eye = np.stack([x, y]).repeat(size, 2).reshape(2, -1)
            depth, wall = _cast(eye, ray, walls)
            colour = colours.take(wall, 1) * (brightness.take(wall) / (1 + DIMMING * depth))        # (3, rays)
            # The share of each pixel that the wall covers, not just yes or no: edges move smoothly at any size.
            cover = np.clip(WALL_HEIGHT / 2 * size / (2 * tan) / depth - from_horizon + 0.5, 0, 1)  # (size, rays)
            image += background + cover * (colour[:, None] - background)
        pixels = (image / 2 + 0.5).astype(np.uint8).reshape(3, size, len(x), size)
        out[first:first + block] = pixels.transpose(2, 1, 3, 0)
    return out


def _cast(eye, ray, walls):
    """eye, ray (2, rays) -> the distance to the first wall that each ray meets, and which of walls.ravel() that is."""
    depth = np.full(ray.shape[1], np.inf, np.float32)
    first_wall = np.zeros(ray.shape[1], np.intp)
    for axis, line in np.ndindex(2, CELLS + 1):
        distance = (line - eye[axis]) / ray[axis]
        cell = np.clip(eye[1 - axis] + distance * ray[1 - axis], 0, CELLS - 0.5).astype(np.intp)
        nearer = walls[axis, line].take(cell) & (distance > 1e-4) & (distance < depth)
        np.copyto(depth, distance, where=nearer)
        np.copyto(first_wall, (axis * (CELLS + 1) + line) * CELLS + cell, where=nearer)
    return depth, first_wall


# ---------------------------------------------------------------------------------------------------------------
# Reading packed videos


def open_videos(path, frames, size, split="train"):
    """Opens whatever --data names, for clips of `frames` frames of size x size.

    path: None or "maze" (endless mazes), a packed or plain .npy file, or a folder of videos or one video file, which
    is packed once into $XDG_CACHE_HOME/ssm-video-diffusion (~/.cache/... by default) and found there the next time.
    Of several processes let one come first; a second one that has to pack the same folder meanwhile is refused.
    Raises DataError.
    """
    if path is None or str(path) == "maze":
        return MazeVideos(frames, size, split)
    path = Path(path)
    if path.is_file() and path.suffix.lower() == ".npy":
        return PackedVideos(path, frames, size, split)
    _check_clip_settings(frames, size, split, smallest_size=1)
    found, _ = _find_videos(path)
    digest = _digest(str(path.resolve()), size, *_stamps(found))[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssm-video-diffusion"
    name = path.resolve().name.encode(errors="ignore")[:100].decode(errors="ignore")  # file systems count bytes
    packed = cache / f"{name}-{size}-{digest}.npy"
    if not packed.exists():
        print(f"packing {path} at {size}x{size}, once, into {packed}")
        pack(path, packed, size)
    return PackedVideos(packed, frames, size, split)


def _stamps(found):
    """Of each file of the videos that `_find_videos` found what changes when the file does: name, bytes, time."""
    for _, video in found:
        for file in _frame_files(video) if video.is_dir() else [video]:
            try:
                yield str(file), os.stat(file).st_size, os.stat(file).st_mtime_ns
            except OSError:  # a link to nowhere: for `pack` to skip and report
                yield str(file), None, None


def _digest(*values):
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def class_names(path):
    """The labels in whatever --data names, sorted: see `open_videos`. Empty if it has none. Raises DataError."""
    if path is None or str(path) == "maze":
        return sorted(COLOUR_NAMES)
    path = Path(path)
    if path.is_file() and path.suffix.lower() == ".npy":
        labels = [video["label"] for video in _read_videos(path, _open_array(path).shape)]
    else:
        labels = [_label_and_split(name, {})[0] for name, _ in _find_videos(path)[0]]
    return sorted(set(labels) - {None})


class PackedVideos:
    """Clips from a packed .npy file, memory-mapped; every window of every video of the split is equally likely.

    A .npy without an index beside it is read, too: (n, frames, h, w, 3) is n videos, as sample.py writes them, and
    (frames, h, w, 3) is one; all of them count as "train". Labels are those of "labels" in NAME.npy.json, if any.

    Attributes: path, frames, size, split as given; splits, the splits the file has; videos, the index entries of the
    split's videos that are long enough; num_too_short, how many are not; num_windows. Raises DataError when the file
    is no such file, does not fit its index, has another size, or has nothing for this split and number of frames.
    """

    def __init__(self, path, frames, size, split="train"):
        _check_clip_settings(frames, size, split, smallest_size=1)
        self.path, self.frames, self.size, self.split = Path(path), frames, size, split
        array = _open_array(self.path)
        height, width = array.shape[-3:-1]
        if height != width:
            raise DataError(f"{path} holds frames of {height}x{width}, which are not square; pack it to crop them")
        if height != size:
            raise DataError(f"--size {size}: {path} holds frames of {height}x{width}; use --size {height}, "
                            f"or pack the videos again with --size {size}")
        self._pixels = array.reshape(-1, size, size, 3)
        videos = _read_videos(self.path, array.shape)
        self.splits = tuple(sorted({video["split"] for video in videos}))
        chosen = [video for video in videos if split in (video["split"], "all")]
        if not chosen:
            raise DataError(f"split {split!r}: {path} has no such videos, only {' and '.join(map(repr, self.splits))}")
        self.videos = [video for video in chosen if video["length"] >= frames]
        self.num_too_short = len(chosen) - len(self.videos)
        if not self.videos:
            longest = max(video["length"] for video in chosen)
            raise DataError(f"--frames {frames}: the longest of the {len(chosen)} videos in {path} has {longest} "
                            f"frames; use --frames {longest} or fewer")
        windows = np.array([video["length"] - frames + 1 for video in self.videos])
        self.num_windows = int(windows.sum())
        self._first_windows = np.cumsum(windows) - windows  # of each video, counted over all of them
        self._starts = np.array([video["start"] for video in self.videos], np.int64)

    def clip(self, *key):
        """key: non-negative integers -> uint8 (frames, size, size, 3)."""
        video, window = self._video_and_window(*key)
        start = self._starts[video] + window
        return np.array(self._pixels[start:start + self.frames])

    def label(self, *key):
        """The label of the video that clip(*key) is cut from, or None."""
        return self.videos[self._video_and_window(*key)[0]]["label"]

    def _video_and_window(self, *key):
        window = _generator(*key).integers(self.num_windows)
        video = np.searchsorted(self._first_windows, window, side="right") - 1
        return video, window - self._first_windows[video]

    def video(self, i):
        """-> all frames of self.videos[i], uint8 (length, size, size, 3)."""
        start, length = self.videos[i]["start"], self.videos[i]["length"]
        return self._pixels[start:start + length]

    def __getstate__(self):
        # A memory map pickles as a copy of all its data; worker processes open the file themselves instead.
        return {**self.__dict__, "_pixels": None}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._pixels = _open_array(self.path).reshape(-1, self.size, self.size, 3)


def _open_array(path):
    """The memory map of a uint8 (..., frames, h, w, 3) .npy file; never runs code from it. Raises DataError."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # unlike np.load, it knows neither pickles nor archives
    except Exception as error:  # a damaged header makes numpy raise all kinds of them
        raise DataError(f"{path} is not a readable .npy file of uint8 frames: {_one_line(error)}") from None
    if array.dtype != np.uint8 or array.ndim not in (4, 5) or array.shape[-1] != 3 or 0 in array.shape \
            or not array.flags.c_contiguous:
        raise DataError(f"{path} holds {array.dtype} {array.shape}; expected uint8 (frames, height, width, 3), or the "
                        f"same with the number of videos in front, in C order")
    return array


def _read_index(path):
    """The index in a .json file: a dictionary with "size" and "videos". Raises DataError if it is anything else."""
    try:
        if not path.is_file():
            raise ValueError("it is not a regular file")
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a readable index of packed videos: {_one_line(error)}") from None
    if not isinstance(index, dict) or not isinstance(index.get("videos"), list) or "size" not in index:
        raise DataError(f"{path} is not an index of packed videos, but its name says so: move it elsewhere")
    return index


def _read_videos(path, shape):
    """The index entries of the packed or plain file `path`, whose array has `shape`. Raises DataError."""
    index_path = path.with_suffix(".json")
    if not index_path.exists():
        count, length = shape[:2] if len(shape) == 5 else (1, shape[0])
        labels = _sample_labels(path.with_name(path.name + ".json"), count)
        return [{"name": f"{path.name}[{i}]", "start": i * length, "length": length, "label": label, "split": "train"}
                for i, label in enumerate(labels)]
    index = _read_index(index_path)
    end = 0
    for number, video in enumerate(index["videos"]):
        if not isinstance(video, dict) or not isinstance(video.get("name"), str) or video.get("start") != end \
                or type(video.get("length")) is not int or video["length"] < 1 \
                or video.get("split") not in ("train", "test") or not isinstance(video.get("label"), (str, type(None))):
            raise DataError(f"{index_path} is damaged at video {number}; delete it and {path}, and pack again")
        end += video["length"]
    if (end, index["size"], index["size"], 3) != shape:
        raise DataError(f"{index_path} describes {end} frames of size {index['size']}, but {path} holds {shape}; "
                        f"delete both and pack again")
    return index["videos"]


def _sample_labels(path, count):
    """The labels that sample.py noted of `count` videos in NAME.npy.json; None for each if it did not."""
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))["labels"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return [None] * count
    if not isinstance(labels, list) or len(labels) != count or not all(isinstance(label, str) for label in labels):
        raise DataError(f"{path} has labels that do not fit the {count} videos; move it away to read them without")
    return labels


def batches(videos, sample_indices, seed, first_step=0, workers=2, pin_memory=False):
    """Endless iterator over the batches of steps first_step, first_step + 1, ...

    Each is a uint8 tensor (len(sample_indices), f, h, w, 3), whose row for sample index i at step s is
    videos.clip(seed, s, i). So of a global batch each process names its own sample indices, and any number of
    processes together see the same. `workers` processes of one thread each prefetch, and end with this one; 0 reads
    in this one.
    """
    if len(sample_indices) == 0:
        raise ValueError("batches needs at least one sample index")
    loader = DataLoader(_Clips(videos, seed), batch_sampler=_Schedule(sample_indices, first_step), num_workers=workers,
                        pin_memory=pin_memory, worker_init_fn=_leave_signals_to_main,
                        generator=torch.Generator())  # else it would draw a number from the global generator
    return iter(loader)


class _Clips(Dataset):
    def __init__(self, videos, seed):
        self.videos, self.seed = videos, seed

    def __getitem__(self, step_and_index):
        return torch.from_numpy(self.videos.clip(self.seed, *step_and_index))


class _Schedule(Sampler):
    def __init__(self, sample_indices, first_step):
        self.sample_indices, self.first_step = list(sample_indices), first_step

    def __iter__(self):
        for step in itertools.count(self.first_step):
            yield [(step, index) for index in self.sample_indices]


def _leave_signals_to_main(_worker):
    # Ctrl-C goes to every process of the terminal, a scheduler's SIGTERM to every one of the job. What they mean is the
    # main process's to decide, which still needs its data then; when it ends the workers it sends a SIGTERM again.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


# ---------------------------------------------------------------------------------------------------------------
# Packing: finding videos, decoding them, writing one array

VIDEO_FILES = {".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".gif", ".webp", ".npy", ".pt"}
FRAME_FILES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".tif", ".tiff"}
SPLIT_FOLDERS = {"train": "train", "training": "train",
                 "test": "test", "testing": "test", "val": "test", "valid": "test", "validation": "test"}
AHEAD = 4  # videos per worker that may be decoded, or on their way, before they are written: bounds the memory


def pack(source, out, size, workers=None, min_frames=1):
    """Packs every video in the folder `source` (or the one file) into `out` and its index; returns the index.

    Shorter side resized to `size` with antialiasing, then cropped around the centre. Sub-folders included, symbolic
    links followed, hidden files left out; sorted by name, whatever the number of `workers` (default: all cores).
    A video's label is its folder's name; its split is UCF101's official one (trainlist01.txt, testlist01.txt in or
    beside the source) or else that of a folder called train or test above it, or else "train". Videos that cannot be
    decoded to their very end, and those shorter than `min_frames`, are skipped and listed with the reason.

    `out` appears when it is complete, and never replaces a file; a stopped pack goes on where it was when it is asked
    for again. Raises DataError, also when nothing is usable.
    """
    if size < 1 or min_frames < 1 or (workers is not None and workers < 1):
        raise DataError(f"--size {size} --min-frames {min_frames} --workers {workers}: expected numbers from 1 on")
    _check_clip_settings(min_frames, size, "all", smallest_size=1)
    source = Path(source)
    found, skipped = _find_videos(source)
    if workers is None:  # the cores this process may use, where the system tells, are often fewer than there are
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    official = _official_splits(source)
    about = [(name, *_label_and_split(name, official)) for name, _ in found]

    def videos(first):
        results = _decode_all([path for _, path in found[first:]], size, workers)
        for (name, label, split), (video, reason) in zip(about[first:], results):
            if video is not None and len(video) < min_frames:
                video, reason = None, f"has {len(video)} frames, fewer than {min_frames}"
            yield name, label, split, video, reason

    job = _digest(size, min_frames, about, *_stamps(found))
    return _write_packed(out, size, videos, len(found), skipped, job)


def _find_videos(source):
    """[(name, path), ...] sorted by name, and [{"name", "reason"}, ...] for folders that could not be read.

    A path is a video file, or a folder of numbered frames: one with pictures and neither videos nor folders in it.
    """
    if not source.exists():
        raise DataError(f"{source} does not exist; expected a folder of videos, a video, a packed .npy file, or maze")
    if not source.is_dir():
        if source.suffix.lower() not in VIDEO_FILES or not source.is_file():
            raise DataError(f"{source} is not a video; expected a folder or one of {' '.join(sorted(VIDEO_FILES))}")
        if _is_packed(source):
            raise DataError(f"{source} is packed already; use it as it is, or pack what it was made from")
        return [(source.name, source)], []
    found, errors, entered = [], [], set()
    for folder, subfolders, files in os.walk(source, followlinks=True, onerror=errors.append):
        folder = Path(folder)
        identity = folder.stat().st_dev, folder.stat().st_ino
        if identity in entered:  # links that lead round in a circle
            subfolders.clear()
            continue
        entered.add(identity)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        paths = [folder / name for name in files if not name.startswith(".")]
        videos = [path for path in paths if path.suffix.lower() in VIDEO_FILES and not _is_packed(path)]
        if not videos and not subfolders and any(path.suffix.lower() in FRAME_FILES for path in paths):
            videos = [folder]
        found += [(path.relative_to(source).as_posix() if path != source else source.resolve().name, path)
                  for path in videos]
    if not found:
        problem = f"cannot be read ({errors[0].strerror})" if errors else "holds no videos"
        raise DataError(f"{source} {problem}; expected {' '.join(sorted(VIDEO_FILES))}, or folders of numbered frames")
    unreadable = [{"name": os.path.relpath(error.filename, source), "reason": error.strerror} for error in errors]
    return sorted(found), unreadable


def _is_packed(path):
    """Whether a .npy file is itself a packed one: its videos must not be taken for a single long one."""
    try:
        return path.suffix.lower() == ".npy" and bool(_read_index(path.with_suffix(".json")))
    except DataError:
        return False


def _frame_files(folder):
    """The pictures in a folder in the order of their numbers: frame2.png comes before frame10.png."""

    def number_order(path):
        pieces = re.split(r"([0-9]+)", path.name)
        return [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)]

    paths = sorted(folder.iterdir())
    return sorted([path for path in paths if path.suffix.lower() in FRAME_FILES and not path.name.startswith(".")],
                  key=number_order)


def _official_splits(source):
    """{"v_ApplyEyeMakeup_g08_c01": "train", ...} from UCF101's lists of split 01; empty if there are none."""
    splits = {}
    for folder, below, split in itertools.product((source, source.resolve().parent), ("", "ucfTrainTestlist"),
                                                  ("train", "test")):
        file = folder / below / f"{split}list01.txt"
        if file.is_file():  # lines such as "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1"
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
            splits.update({Path(line.split()[0]).stem: split for line in lines if line.strip()})
    return splits


def _label_and_split(name, official):
    *folders, file = name.split("/")
    by_folder = [SPLIT_FOLDERS[folder.lower()] for folder in folders if folder.lower() in SPLIT_FOLDERS]
    split = official.get(Path(file).stem) or (by_folder[-1] if by_folder else "train")
    return folders[-1] if folders and folders[-1].lower() not in SPLIT_FOLDERS else None, split


def decode(path, size):
    """A video file or folder of frames -> uint8 (frames, size, size, 3). Raises all sorts of errors for a bad file.

    Frames are resized as they are decoded: a long HD video is never in memory at its full size.
    """
    path = Path(path).absolute()  # else FFmpeg takes what stands before a colon for a protocol
    for file in _frame_files(path) if path.is_dir() else [path]:
        if not stat.S_ISREG(file.stat().st_mode):  # reading a pipe would wait for ever
            raise ValueError(f"{file.name} is not a regular file")
    if path.is_dir():
        images = _picture_images(path)
    elif path.suffix.lower() == ".npy":
        video = _open_array(path)
        if video.ndim != 4:
            raise ValueError(f"holds {video.shape}; expected one video, (frames, height, width, 3)")
        images = map(Image.fromarray, video)
    elif path.suffix.lower() == ".pt":
        images = map(Image.fromarray, _read_tensor(path))
    elif path.suffix.lower() in (".gif", ".webp"):
        images = _animation_images(path)
    else:
        images = _video_images(path, size)
    # `fit` takes the largest square around the centre; bicubic in Pillow widens its filter as it shrinks: no aliasing.
    small = [ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC) for image in images]
    if not small:
        raise ValueError("has no frames")
    return np.stack(small)


def read_whole_videos(path, size):
    """The videos of a packed or plain .npy file, or another kind of video file -> list of uint8 (frames, size, size, 3).

    Raises DataError.
    """
    path = Path(path)
    if path.is_file() and path.suffix.lower() == ".npy":
        packed = PackedVideos(path, 1, size, "all")
        return [packed.video(i) for i in range(len(packed.videos))]
    video, reason = _decode_or_reason(path, size)
    if reason:
        raise DataError(f"{path} cannot be read as a video: {reason}")
    return [video]


def _read_tensor(path):
    """The uint8 (frames, h, w, 3) tensor in a file of torch.save as an array; never runs code from it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what it then refuses
            video = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError("is refused: it holds more than a tensor, code perhaps") from None
    except Exception as error:  # torch raises all sorts for a damaged file
        raise ValueError(f"is damaged, or no file of torch.save ({type(error).__name__})") from None
    if not isinstance(video, torch.Tensor):
        raise ValueError(f"holds a {type(video).__name__}; expected a uint8 tensor (frames, height, width, 3)")
    if video.dtype != torch.uint8 or video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise ValueError(f"holds {video.dtype} {tuple(video.shape)}; expected torch.uint8 (frames, height, width, 3)")
    return video.contiguous().numpy()


def _picture_images(folder):
    for file in _frame_files(folder):
        with Image.open(file) as image:
            if image.mode[0] in "IF":  # Pillow would cut these off at 255, not scale them
                raise ValueError(f"{file.name} has more than 8 bits per channel")
            yield ImageOps.exif_transpose(image)


def _animation_images(path):
    with Image.open(path) as image:  # Pillow puts partial frames on top of those before
        if image.format == "GIF" and path.read_bytes().rstrip(b"\0")[-1:] != b";":  # Pillow would not mind
            raise ValueError("is cut off")
        yield from ImageSequence.Iterator(image)


def _video_images(path, size):
    import av  # here, so that everything but decoding works without it

    av.logging.set_level(av.logging.PANIC)  # what FFmpeg has to say about a bad file comes as an exception
    if _matroska_is_cut_off(path):
        raise ValueError("is cut off")
    with av.open(str(path)) as container:
        if not container.streams.video or container.streams.video[0].codec_context is None:
            raise ValueError("has no video stream that can be decoded")
        stream = container.streams.video[0]
        if "mp4" in container.format.name and _packets(path) < stream.frames:
            raise ValueError(f"lacks some of its {stream.frames} frames")
        stream.codec_context.thread_count = 1  # there is one process per core already
        missing = 0
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise ValueError("is cut off or damaged")
            missing += packet.size > 0 and not packet.is_discard
            for frame in packet.decode():
                if frame.is_corrupt:  # FFmpeg has made up what it could not decode
                    raise ValueError("has damaged frames")
                missing -= 1
                # Down to twice the size while converting to RGB: five times faster for HD. `decode` does the rest.
                scale = min(1, 2 * size / min(frame.width, frame.height))
                width, height = round(frame.width * scale), round(frame.height * scale)
                image = frame.reformat(width, height, "rgb24", interpolation="AREA").to_image()
                yield image.rotate(round(frame.rotation / 90) * 90, expand=True)
        # In other containers than MP4 a packet may rightly hold no frame that is shown.
        if missing > 0 and "mp4" in container.format.name:
            raise ValueError(f"has {missing} frames that cannot be decoded")


def _packets(path):
    """How many packets of a video file FFmpeg can find, those that the file's edit list leaves out among them."""
    import av

    with av.open(str(path), options={"ignore_editlist": "1"}) as container:
        return sum(packet.size > 0 for packet in container.demux(container.streams.video[0]))


def _matroska_is_cut_off(path):
    """Whether a .mkv or .webm file ends before its one large element, the segment, does: FFmpeg would not mind."""

    def size_at(position):  # RFC 8794: the leading zeros of the first byte tell the length -> (size, where it ends)
        width = 9 - data[position].bit_length()
        size = int.from_bytes(data[position:position + width], "big") & (1 << 7 * width) - 1
        return 0 if size == (1 << 7 * width) - 1 else size, position + width    # all ones: unknown, a live recording

    with open(path, "rb") as file:
        data = file.read(100).ljust(100, b"\1")
    if not data.startswith(b"\x1a\x45\xdf\xa3"):
        return False
    size, end = size_at(4)
    if data[end + size:end + size + 4] != b"\x18\x53\x80\x67":
        return False
    size, end = size_at(end + size + 4)
    return end + size > path.stat().st_size


def _decode_or_reason(path, size):
    """(video, None), or (None, why not). Runs in a worker process."""
    try:
        return decode(path, size), None
    except Exception as error:  # whatever a bad file does to a decoder, it is one bad file
        return None, _one_line(error)


def _one_line(error):
    return " ".join(str(error).split())[:200] or type(error).__name__


def _decode_all(paths, size, workers):
    """`_decode_or_reason` of every path, in order, by `workers` processes. One that dies costs one video."""
    done = 0
    while done < len(paths):
        try:
            for result in _decode_together(paths[done:], size, workers):
                done += 1
                yield result
        except concurrent.futures.process.BrokenProcessPool:
            # Which of the files on their way killed a worker is not known: each is tried in a process of its own.
            for path in paths[done:done + AHEAD * workers]:
                try:
                    result, = _decode_together([path], size, 1)
                except concurrent.futures.process.BrokenProcessPool:
                    result = None, "the decoder crashed"
                done += 1
                yield result


def _decode_together(paths, size, workers):
    pool = concurrent.futures.ProcessPoolExecutor(min(workers, len(paths)), initializer=_start_decoder)
    waiting = collections.deque()
    try:
        for path in paths:
            waiting.append(pool.submit(_decode_or_reason, path, size))
            if len(waiting) == AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_decoder():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, and without a traceback
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)  # the main process was killed: nobody is left to tell


def _write_packed(out, size, videos, count, skipped, job):
    """Writes the `count` items of videos(0), each (name, label, split, video, None) or (..., None, reason), to `out`
    and its index, which is returned. The same `job`, a string, asked for again goes on with videos(first).

    Everything goes to temporary names first. The index takes its place before the array does, because an array
    without an index would pass for one long video.
    """
    from tqdm import tqdm

    out = Path(out)
    index_path = out.with_suffix(".json")
    partial, index_partial = (path.with_name(f".{path.name}.partial") for path in (out, index_path))
    journal, records = out.with_name(f".{out.name}.journal"), []
    if out.suffix != ".npy":
        raise DataError(f"--out {out}: expected a name that ends in .npy")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"{out} is being written by another process; wait until it is done") from None
            except OSError:
                pass  # a file system without locks, as clusters have: two runs at once are then not noticed
            try:
                if out.exists():
                    raise DataError(f"{out} exists already; delete it or choose another name")
                if index_path.exists():
                    _read_index(index_path)  # one of ours that lost its array may be replaced, nothing else
                records = _finished(file, journal, job, size)
                if records:
                    print(f"{out}: going on after {len(records)} of {count} videos")
                with open(journal, "w", encoding="utf-8") as log:
                    log.writelines(json.dumps(line) + "\n" for line in [job, *records])
                    bar = tqdm(videos(len(records)), total=count, initial=len(records), unit="video", disable=None)
                    for name, label, split, video, reason in bar:
                        if video is None:
                            records.append({"name": name, "reason": reason})
                        else:
                            file.write(video.data)
                            file.flush()
                            records.append({"name": name, "length": len(video), "label": label, "split": split,
                                            "crc32": zlib.crc32(video)})
                        log.write(json.dumps(records[-1]) + "\n")
                        log.flush()
                entries, total = [], 0
                for record in records:
                    if "reason" in record:
                        skipped.append(record)
                    else:
                        entries.append({"name": record["name"], "start": total, "length": record["length"],
                                        "label": record["label"], "split": record["split"]})
                        total += record["length"]
                if not entries:
                    reasons = "; ".join(f"{video['name']}: {video['reason']}" for video in skipped[:3])
                    raise DataError(f"none of the {count} videos is usable: {reasons}")
                file.seek(0)
                file.write(_npy_header((total, size, size, 3)))
                file.flush()
                os.fsync(file.fileno())
                index = {"size": size, "videos": entries, "skipped": skipped}
                index_partial.write_text(json.dumps(index, indent=1), encoding="utf-8")
                os.replace(index_partial, index_path)
                os.replace(partial, out)
                journal.unlink(missing_ok=True)
            except BaseException as error:
                if isinstance(error, DataError) or not records:  # nothing to go on with
                    for file in (partial, index_partial, journal):
                        file.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror or error}") from None
    splits = collections.Counter(video["split"] for video in entries)
    print(f"packed {len(entries)} videos ({', '.join(f'{splits[split]} {split}' for split in sorted(splits))}), "
          f"{total} frames of {size}x{size}, into {out} ({total * size**2 * 3 / 1e6:.1f} MB)")
    if skipped:
        print(f"skipped {len(skipped)}:")
        for video in skipped[:10]:
            print(f"  {video['name']!r}: {video['reason']}")
        if len(skipped) > 10:
            print(f"  and {len(skipped) - 10} more, all of them in {index_path}")
    return index


def _finished(file, journal, job, size):
    """What a stopped run of the same job got done -> its records; `file` is cut off behind their videos."""
    records, end = [], len(_npy_header(()))
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # there is none, or it is cut off
        first, *lines = journal.read_text(encoding="utf-8").splitlines()
        for line in lines if json.loads(first) == job else ():
            record = json.loads(line)
            if "reason" not in record:
                file.seek(end)
                pixels = file.read(record["length"] * size * size * 3)
                if zlib.crc32(pixels) != record["crc32"]:  # after a power failure
                    break
                end += len(pixels)
            records.append(record)
    file.seek(0)
    file.write(_npy_header((0, size, size, 3)))
    file.truncate(end)
    file.seek(end)
    return records


def _npy_header(shape):
    """The header of a .npy file (format 1.0) of uint8 in 128 bytes, however many frames there turn out to be."""
    description = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + description.ljust(117).encode() + b"\n"


def _pack_mazes(out, size, frames, num, seed):
    if num < 1 or seed < 0:
        raise DataError(f"--num {num} --seed {seed}: expected 1 or more videos, and a seed from 0 on")
    walks = MazeVideos(frames, size)

    def videos(first):
        return ((f"walk{i:05d}", walks.label(seed, i), "train", walks.clip(seed, i), None) for i in range(first, num))

    _write_packed(out, size, videos, num, [], _digest("maze", size, frames, num, seed))


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it."""

    def error(self, message):
        self.exit(2, f"data.py: {message}\n")


def main():
    parser = _Parser(description="Packs videos into one .npy file that train.py reads.")
    parser.add_argument("source", help="a folder of videos, one video, or the word maze for the embedded walks")
    parser.add_argument("--size", type=int, required=True, help="height and width of the packed frames, in pixels")
    parser.add_argument("--out", required=True, help="the .npy file to write; its index goes beside it as .json")
    parser.add_argument("--workers", type=int, help="processes that decode (default: one per core)")
    parser.add_argument("--min-frames", type=int, default=1, help="skip videos shorter than this (default: 1)")
    maze = parser.add_argument_group("maze only")
    maze.add_argument("--frames", type=int, default=500, help="frames per walk (default: 500)")
    maze.add_argument("--num", type=int, default=100, help="number of walks (default: 100)")
    maze.add_argument("--seed", type=int, default=0, help="another seed, other walks (default: 0)")
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold bytes that are no characters
    args = parser.parse_args()
    try:
        if args.source == "maze":
            _pack_mazes(args.out, args.size, args.frames, args.num, args.seed)
        else:
            pack(args.source, args.out, args.size, args.workers, args.min_frames)
    except (DataError, OSError) as error:
        sys.exit("data.py: " + " ".join(str(error).splitlines()))  # names of files may have several
    except MemoryError:
        sys.exit(f"data.py: out of memory with --size {args.size} and {args.frames} frames; try fewer")
    except KeyboardInterrupt:
        print("data.py: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
