"""Walks through mazes: an endless data set of videos in one file, drawn on the spot.

    videos = MazeVideos(frames=64, size=32)
    video, label = videos.clip_and_label(0, 17)            # uint8 (64, 32, 32, 3), and its walls' main colour, "red"

Every key, a few non-negative integers, is a maze and a walk of its own. Needs numpy alone.

Glossary
    place, heading   where one stands, in cells, and looks to: complex numbers
    direction        0 east, 1 north, 2 west, 3 south: turning left adds one
    walls            bool (2, CELLS + 1, CELLS): walls[axis, line, cell] says whether one stands on the grid line x =
                     line (axis 0) or y = line (axis 1), along the given cell of that line
A maze has CELLS x CELLS unit squares with thin walls of many colours, and is walked through at eye level.
"""
import math

import numpy as np

CELLS = 5               # small, so that a long walk comes back to where it was
SHORTCUTS = 3           # walls taken out of the perfect maze, so that there are ways round, too
FRAMES_PER_CELL = 8     # one cell forward, or a quarter turn, in 8 frames: 2 pixels a frame at 16x16
FIELD_OF_VIEW = 84      # degrees
WALL_HEIGHT = 0.75      # in cells; seen from half of it, so that sky and floor stay in view even before a wall
DIM_SIDE = 0.78         # brightness of walls along x against those along y: corners show between equal colours
DIMMING = 0.22          # brightness falls as 1 / (1 + DIMMING * distance)
MOST_COMMON = 0.45      # share of walls that have the maze's main colour, its label: the others are its landmarks
STEPS = 1, 1j, -1, -1j  # by direction
WALL_COLOURS = np.array([(214, 64, 52), (232, 150, 40), (222, 206, 70), (74, 168, 76),
                         (56, 162, 190), (66, 88, 200), (158, 76, 188), (226, 120, 160)], np.float32)
COLOUR_NAMES = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SKY, HAZE, FLOOR = np.array([(104, 164, 236), (196, 208, 220), (112, 100, 88)], np.float32)[..., None, None]


class MazeVideos:
    """An endless supply of first-person walks through random mazes; every key is a maze of its own.

    A longer walk begins with the frames of a shorter one, and the same place seen in the same direction is the same
    picture, byte for byte, however long ago it was seen before. Test walks are never training ones; there is no end to
    either, so "all" is just "train". Raises ValueError for clips that are too small or too large.
    """

    splits, fingerprint, stride = ("train", "test"), "maze", 1

    def __init__(self, frames, size, split="train"):
        if frames < 1 or size < 8 or frames * size**2 > 2**34:
            raise ValueError(f"--frames {frames} --size {size}: mazes have 1 frame or more, of 8x8 pixels or more, and "
                            "at most 2^34 pixels in a clip")
        self.frames, self.size, self.split = frames, size, split

    def clip_and_label(self, *key):
        """key: non-negative integers -> uint8 (frames, size, size, 3), the main colour of the maze's walls, one of
        COLOUR_NAMES. (A short clip may well show more of another.)"""
        rng = random_generator(int(self.split == "test"), *key)
        walls = random_walls(rng)
        main_colour = rng.integers(len(WALL_COLOURS))
        colours = np.where(rng.random(walls.shape) < MOST_COMMON, main_colour,
                           rng.integers(len(WALL_COLOURS), size=walls.shape))
        # The path comes last: it draws as many numbers as it has turns, and a longer one must not move the rest.
        path = random_path(rng, walls, self.frames)
        return render(path, walls, WALL_COLOURS[colours], self.size), COLOUR_NAMES[main_colour]

    def clip(self, *key):
        return self.clip_and_label(*key)[0]


def random_generator(*key):
    """A random generator that is a function of non-negative integers; (1, 2) and (1, 2, 0) give different ones."""
    # SeedSequence takes trailing zeros for padding, hence the length in front.
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((len(key), *key))))


def wall_at(cell, direction):
    """Where in `walls` the wall stands that closes a cell in a direction."""
    axis, place = direction % 2, (int(cell.real), int(cell.imag))
    return axis, place[axis] + (direction < 2), place[1 - axis]


def random_walls(rng):
    """A maze in which every cell can be reached: bool (2, CELLS + 1, CELLS)."""
    walls, unvisited = np.ones((2, CELLS + 1, CELLS), bool), {complex(*cell) for cell in np.ndindex(CELLS, CELLS)}

    def visit(cell):  # depth-first: long corridors, few short dead ends
        unvisited.remove(cell)
        while ahead := [direction for direction, step in enumerate(STEPS) if cell + step in unvisited]:
            direction = ahead[rng.integers(len(ahead))]
            walls[wall_at(cell, direction)] = False
            visit(cell + STEPS[direction])

    visit(0)
    for i, j, direction in rng.integers((CELLS - 1, CELLS - 1, 2), size=(SHORTCUTS, 3)):
        walls[wall_at(complex(i, j), direction)] = False
    return walls


def moves():
    """The four ways through a cell entered eastwards, by the direction one leaves in (0 straight on, 1 left, 2 back,
    3 right): complex (2, frames), place around the cell's centre and heading, the first frame at the cell's edge."""
    along = np.arange(FRAMES_PER_CELL) / FRAMES_PER_CELL
    cos, sin = np.cos(along * np.pi / 2), np.sin(along * np.pi / 2)
    straight = np.stack([along - 0.5, 0 * along + 1 + 0j])
    left = np.stack([sin / 2 - 0.5 + 1j * (0.5 - cos / 2), cos + 1j * sin])
    spin = np.arange(2 * FRAMES_PER_CELL) / FRAMES_PER_CELL * np.pi / 2
    halfway = straight[:, :FRAMES_PER_CELL // 2]
    back = np.hstack([halfway, [0 * spin, np.cos(spin) + 1j * np.sin(spin)], -halfway - [[0.5], [0]]])
    return straight, left, back, left.conj()


def random_path(rng, walls, frames):
    """A walk that never stands still, turns at random and goes back only at dead ends: complex (2, frames), place in
    cells and heading."""
    cell = complex(*rng.integers(CELLS, size=2))
    direction = next(d for d in range(4) if not walls[wall_at(cell, (d + 2) % 4)])  # there must be a way in
    start = int(rng.integers(FRAMES_PER_CELL))
    pieces, total, ways = [], -start, moves()
    while total < frames:
        open_turns = [turn for turn in (0, 1, 3) if not walls[wall_at(cell, (direction + turn) % 4)]]
        turn = open_turns[rng.integers(len(open_turns))] if open_turns else 2
        # Turned by a multiple of 90 degrees with integers, so that coming back gives the same numbers to the last bit.
        pieces.append(ways[turn] * STEPS[direction] + [[cell + 0.5 + 0.5j], [0]])
        total += ways[turn].shape[1]
        direction = (direction + turn) % 4
        cell += STEPS[direction]
    return np.hstack(pieces)[:, start:start + frames]


def render(path, walls, colours, size):
    """path (2, frames), walls (2, CELLS + 1, CELLS), their colours (..., 3) -> uint8 (frames, size, size, 3)."""
    tan = math.tan(math.radians(FIELD_OF_VIEW / 2))
    from_horizon = np.abs(np.arange(size, dtype=np.float32) + 0.5 - size / 2)[:, None]     # pixels, (size, 1)
    nearness = from_horizon / (size / 2)
    is_sky = np.arange(size)[:, None] < size / 2
    background = np.where(is_sky, HAZE + nearness * (SKY - HAZE), FLOOR * (0.4 + 0.6 * nearness))   # (3, size, 1)
    colours = colours.reshape(-1, 3).T
    brightness = np.repeat(np.array([1, DIM_SIDE], np.float32), walls[0].size)
    out = np.empty((path.shape[1], size, size, 3), np.uint8)
    block = max(1, 2**15 // size**2)  # as many frames at once as the processor's cache likes
    for first in range(0, len(out), block):
        place, heading = path[:, first:first + block, None].astype(np.complex64)                     # (block, 1) each
        image = 0
        for part in (0.25, 0.75):  # two rays per pixel column soften the walls' vertical edges
            across = (tan * (2 * (np.arange(size) + part) / size - 1)).astype(np.float32)
            # Rays have length 1 along the heading: distances are perpendicular ones, and straight walls look straight.
            ray = np.stack([heading.real + heading.imag * across, heading.imag - heading.real * across]).reshape(2, -1)
            ray[ray == 0] = 1e-9
            eye = np.stack([place.real, place.imag]).repeat(size, 2).reshape(2, -1)                  # (2, rays)
            depth, wall = cast(eye, ray, walls)
            colour = colours.take(wall, 1) * (brightness.take(wall) / (1 + DIMMING * depth))         # (3, rays)
            # The share of each pixel that the wall covers, not just yes or no: edges move smoothly at any size.
            cover = np.clip(WALL_HEIGHT / 2 * size / (2 * tan) / depth - from_horizon + 0.5, 0, 1)   # (size, rays)
            image += background + cover * (colour[:, None] - background)                             # (3, size, rays)
        out[first:first + block] = (image / 2 + 0.5).astype(np.uint8).reshape(3, size, -1, size).transpose(2, 1, 3, 0)
    return out


def cast(eye, ray, walls):
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
