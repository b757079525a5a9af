"""What all commands share: flag types, device, precision, processes, files that appear whole, errors in one line.

Used by train.py, sample.py and bench.py, and by data.py and fvd.py as commands, not as libraries.
"""
import argparse
import contextlib
import datetime
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

# on a CPU PyTorch raises a plain RuntimeError
OUT_OF_MEMORY = "out of memory|can't allocate memory|bad_alloc|ALLOC_FAILED|not create a primitive"


class UserError(ValueError):
    """What a person did wrong, in one line: the offending value, what was expected, what to do."""


def run(name, main, *told):
    """Run a script's main() and exit with the status it returns, or with one line on stderr.

    One line is for what a person did wrong (UserError and the classes in `told`), OSError, out of memory and Ctrl-C.
    Any other exception is a bug and keeps its traceback. Under torchrun both are its "Root Cause".
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold bytes that are no characters
    report, for_all = os.environ.get("TORCHELASTIC_ERROR_FILE"), False
    try:
        status = (record(main) if report else main)()
        if dist.is_initialized():  # not after an error: it would wait for the other processes
            time.sleep(0.1)  # lets gloo's threads end: before 2.8 PyTorch joins them with the GIL, which one may want
            dist.destroy_process_group()
        sys.exit(status)
    except KeyboardInterrupt:
        message = "interrupted; run the same command again"
    except (UserError, *told) as error:
        message, for_all = str(error), True
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or re.search(OUT_OF_MEMORY, str(error)):
            message = (f"out of memory ({gist(error)}); try a smaller --batch-size; of train.py, "
                       "which then trains the same, a larger --grad-accum or a smaller --memory-gb")
        elif re.search("Connection (reset|closed) by peer", str(error)):
            message = "another process of this run has ended; run the same command again"
        else:
            raise
    message = f"{name}: {' '.join(message.splitlines())}"  # file names may have several lines
    if report:  # in the place of the traceback that `record` has written there
        info = {"py_callstack": message, "timestamp": str(int(time.time()))}
        Path(report).write_text(json.dumps({"message": {"message": message, "extraInfo": info}}))
    sys.exit(1 if for_all and processes()[1] else message)  # the first process of each machine says it for all


def gist(error):
    """The first line of what an exception says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def plural(count, noun):
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


# ---------------------------------------------------------------------------------------- flags


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line: they raise UserError."""

    def error(self, message):
        raise UserError(message)


def number(kind, least, most, multiple_of=None, open_end=False):
    """-> an argparse type: int or float (`kind`) from `least`, or above it if `open_end`, to `most`."""
    wanted = f"a {'whole ' if kind is int else ''}number {'above' if open_end else 'of at least'} {least}"
    wanted = f"a multiple of {multiple_of}" if multiple_of else wanted
    wanted += f", at most {most}" if most < 2 ** 31 - 1 else ""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or open_end and value == least or multiple_of and value % multiple_of:
            several = "; put blanks between several" if "," in text else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}{several}")
        return value
    return parse


def shown(value):
    """A setting in words, as on the command line."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    if value is None or isinstance(value, bool):
        return {None: "unset", True: "on", False: "off"}[value]
    return str(value)


positive_int, non_negative_int = number(int, 1, 2 ** 31 - 1), number(int, 0, 2 ** 31 - 1)
positive_float, non_negative_float = number(float, 0, 1e30, open_end=True), number(float, 0, 1e30)
zero_to_one = number(float, 0, 1)


# ---------------------------------------------------------------------------------------- device, precision


def choose_device(name=None):
    """The torch.device that --device names, else the best; under torchrun this process's GPU. Raises UserError."""
    known, in_use = [f"cuda:{i}" for i in range(torch.cuda.device_count())], int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if known and name in (None, "cuda"):
        if in_use > len(known):
            raise UserError(f"{in_use} processes for {len(known)} GPUs; lower --nproc-per-node")
        name = known[processes()[1]]
    known += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    name = name or known[0]
    if name not in known:
        raise UserError(f"--device {name}: expected one of those here: {', '.join(known)}")
    if name.startswith("cuda"):
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


# ---------------------------------------------------------------------------------------- processes


def processes():
    """-> (rank, local rank, number of processes), as torchrun sets them; (0, 0, 1) without it."""
    return tuple(int(os.environ.get(*pair)) for pair in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))


def rank_zero_print(*words, **settings):
    """print, on rank 0 alone."""
    if processes()[0] == 0:
        print(*words, flush=True, **settings)


def join_processes(backend="gloo", hours=24):
    """Connect to torchrun's other processes, if there are any; collectives wait for them that long."""
    rank, _, world_size = processes()
    if world_size == 1:
        return
    store = next(dist.rendezvous("env://"))[0]
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # On one machine torchrun keeps its store when --max-restarts starts the processes again: they must not find
        # each other's old addresses there. (On several machines each start has a new store; the counts may differ.)
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size,
                            timeout=datetime.timedelta(hours=hours))


def barrier():
    """Wait for the other processes."""
    gather(None)


def gather(value):
    """-> the values of all processes, by rank."""
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
    result = error = None
    for turn in range(3):
        if turn == (2 if local_rank else 1 if rank else 0):
            try:
                result = action()
            except Exception as caught:
                error = caught
        problems = [problem for problem in gather(error and gist(error)) if problem]
        if problems:
            raise error or UserError(problems[0])
    return result


# ---------------------------------------------------------------------------------------- files


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
