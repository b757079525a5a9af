"""What all commands share: errors in one line, flag types, device, precision, processes, files that appear whole."""
import argparse
import contextlib
import math
import os
import re
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm


class UserError(ValueError):
    """What a person did wrong, in one line: the offending value, what was expected, what to do."""


def run(name, main, *told):
    """Run a script's main() and exit with its status, or with one line for what a person did wrong (UserError, the
    classes in `told`), OSError, out of memory and Ctrl-C. Any other exception is a bug and keeps its traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold bytes that are no characters
    try:
        status = main()
        if dist.is_initialized():  # not after an error: it would wait for the other processes
            time.sleep(0.1)  # lets gloo's threads end: before 2.8 PyTorch joins them with the GIL, which one may want
            dist.destroy_process_group()
        sys.exit(status)
    except KeyboardInterrupt:
        message = "interrupted; run the same command again"
    except (UserError, *told) as error:
        if processes()[1]:  # the first process of each machine says it for all
            sys.exit(1)
        message = str(error)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    except (MemoryError, RuntimeError) as error:  # on a CPU PyTorch raises a plain RuntimeError
        known = "out of memory|can't allocate memory|bad_alloc|ALLOC_FAILED|not create a primitive"
        if isinstance(error, RuntimeError) and not re.search(known, str(error)):
            raise
        message = f"out of memory ({gist(error)}); try a smaller --batch-size or, with train.py, a larger --grad-accum"
    sys.exit(f"{name}: {' '.join(message.splitlines())}")  # file names may have several lines


def gist(error):
    """The first line of what an exception says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def plural(count, noun):
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line: they raise UserError."""

    def error(self, message):
        raise UserError(message)


def number(kind, wanted, fits):
    """-> an argparse type: int or float (`kind`), if `fits` is true of it; `wanted` says in words when it is."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if fits(kind(text)):
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return parse


positive_int = number(int, "a whole number of at least 1", lambda n: 1 <= n < 2 ** 31)
non_negative_int = number(int, "a whole number of at least 0", lambda n: 0 <= n < 2 ** 31)
positive_float = number(float, "a number above 0", lambda x: 0 < x < math.inf)
non_negative_float = number(float, "a number of at least 0", lambda x: 0 <= x < math.inf)
zero_to_one = number(float, "a number from 0 to 1", lambda x: 0 <= x <= 1)


def shown(value):
    """A setting in words, as on the command line."""
    words = {"None": "unset", "True": "on", "False": "off"}
    return " ".join(words.get(str(one), str(one)) for one in (value if isinstance(value, (list, tuple)) else [value]))


def choose_device(name=None):
    """The torch.device that --device names, else the best; under torchrun this process's GPU. Raises UserError."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    known = [*gpus, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]
    if gpus and name in (None, "cuda"):
        if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > len(gpus):
            raise UserError(f"there are more processes than GPUs here, {len(gpus)}; lower --nproc-per-node")
        name = gpus[processes()[1]]
    name = name or known[0]
    if name not in known:
        raise UserError(f"--device {name}: expected one of those here: {', '.join(known)}")
    if name in gpus:
        torch.cuda.set_device(name)
    return torch.device(name)


def choose_precision(device, precision="auto"):
    """-> "bf16" or "float32". "auto": bf16 where the device computes in it natively."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # not in every release, nor public
    return "bf16" if device.type == "cpu" and native and native() else "float32"


def autocast(device, precision="auto"):
    """The autocast context for a --precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=choose_precision(device, precision) == "bf16")


def processes():
    """-> (rank, local rank, number of processes), as torchrun sets them; (0, 0, 1) without it."""
    return tuple(int(os.environ.get(*pair)) for pair in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))


def rank_zero_print(*words, **settings):
    """print, on rank 0 alone."""
    if processes()[0] == 0:
        print(*words, flush=True, **settings)


def progress_bar(iterable, **settings):
    """tqdm, on rank 0 alone; in a log file it prints a line a minute."""
    return tqdm(iterable, disable=processes()[0] > 0, mininterval=0.1 if sys.stderr.isatty() else 60, **settings)


def join_processes(backend="gloo"):
    """Connect to torchrun's other processes, if there are any; collectives wait for them for a day."""
    if processes()[2] == 1:
        return
    store, rank, world_size = next(dist.rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # on one machine torchrun keeps its store over --max-restarts: processes must not find old addresses there
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(days=1))


def gather(value):
    """-> the values of all processes, by rank; waits for them."""
    values = [value] * processes()[2]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def agree(value, problem):
    """Raises UserError(problem) unless all processes have the same value."""
    if any(other != value for other in gather(value)):
        raise UserError(problem)


def rank_zero_first(action):
    """action() on rank 0, then on each further machine's first process, then on the rest: what the first one packs or
    downloads the others find. An error is raised on all ranks. -> what action() returns."""
    rank, local_rank, _ = processes()
    for turn in range(3):
        error = None
        if turn == (2 if local_rank else 1 if rank else 0):
            try:
                result = action()
            except Exception as caught:
                error = caught
        for problem in gather("" if error is None else gist(error)):
            if problem:
                raise UserError(problem) if error is None else error
    return result


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """`with atomic_write(path) as file:` writes to a temporary file, then renames it: whenever it is interrupted,
    `path` is complete or as it was before. Raises OSError."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
