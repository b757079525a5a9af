"""What all commands share: flag types, device and precision, processes, whole files, errors in one line.

Used by train.py, sample.py and bench.py, and by the commands (not the libraries) data.py and fvd.py. Nothing here knows
about video, diffusion or networks.
"""
import argparse
import contextlib
import datetime
import math
import os
import re
import resource
import sys
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class UserError(ValueError):
    """What a person did wrong, in one line: the offending value, what was expected, what to do."""


def run(name, main, *told):
    """Run a script's main() and exit with the status it returns, or with 1 and one line on stderr.

    One line is for what a person did wrong (UserError and the classes in `told`), OSError, out of memory and Ctrl-C. Every
    other exception is a bug and keeps its traceback.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold bytes that are no characters
    try:
        status = main()
        if dist.is_initialized():  # not after an error: it would wait for the other processes
            dist.destroy_process_group()
        sys.exit(status)
    except KeyboardInterrupt:
        message = "interrupted; the same command resumes"
    except (UserError, *told) as error:
        if int(os.environ.get("LOCAL_RANK", 0)):  # the first process of each machine says it for all
            sys.exit(1)
        message = str(error)
    except OSError as error:
        message = str(error)
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if re.search("Connection (reset|closed) by peer", str(error)):
            message = "another process of this run has ended; the same command resumes"
        elif isinstance(error, (MemoryError, torch.OutOfMemoryError)) or is_out_of_memory(error):
            message = (f"out of memory ({first_line(error)}); try a smaller --batch-size, --frames or --size, or for "
                       "train.py --grad-accum or --grad-checkpoint")
        else:
            raise
    sys.exit(f"{name}: " + " ".join(message.splitlines()))  # names of files may have several lines


def is_out_of_memory(error):
    """Whether a RuntimeError of PyTorch's CPU side says that memory ran out."""
    return bool(re.search("can't allocate memory|bad_alloc|ALLOC_FAILED|not create a primitive", str(error)))


def first_line(error):
    """The gist of an exception, for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# ---------------------------------------------------------------------------------------- flags


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def non_negative_int(text):
    if not re.fullmatch("[0-9]+", text) or int(text) >= 2 ** 31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2,147,483,647")
    return int(text)


def positive_int(text):
    if non_negative_int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def non_negative_float(text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return value


def positive_float(text):
    if non_negative_float(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return float(text)


def zero_to_one(text):
    if non_negative_float(text) > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return float(text)


# ---------------------------------------------------------------------------------------- device, precision, memory


def choose_device(name=None):
    """The torch.device that --device names, else the best there is; under torchrun this process's own GPU.

    Raises UserError.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if not re.fullmatch(r"cpu|mps|cuda:\d+", name):
        raise UserError(f"--device {name}: expected cpu, cuda, cuda:N or mps")
    device = torch.device(name)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: there is no such device here")
    if device.type == "cuda":
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices here")
        torch.cuda.set_device(device)
    return device


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


def peak_memory(device):
    """In bytes, so far: of the allocator on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations in this context make and keep: `live` now, `peak` at most. On
    tensors without data it tells in seconds what a step would take."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage not in self.known:
                self.known.add(storage)
                weakref.finalize(storage, self.release, storage.nbytes())
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
        return out

    def release(self, size):
        self.live -= size


# ---------------------------------------------------------------------------------------- processes


def processes():
    """-> (rank, local rank, number of processes) as torchrun set them; (0, 0, 1) without it."""
    return tuple(int(os.environ.get(name, default)) for name, default in
                 (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))


def join_processes(backend="gloo", hours=24):
    """Connect to the other processes of torchrun, if there are any; collectives wait for them that long."""
    rank, _, world_size = processes()
    if world_size == 1:
        return
    store = next(dist.rendezvous("env://"))[0]
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # On one machine torchrun keeps its store when --max-restarts starts the processes again: they must not find
        # each other's old addresses there. Of several machines the counts may differ, but each start has a new store.
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size,
                            timeout=datetime.timedelta(hours=hours))


def barrier():
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))  # a CPU tensor: gloo, on GPU machines too


def agree(value, problem):
    """Raises UserError(problem) unless all processes have the same value."""
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        if any(other != value for other in values):
            raise UserError(problem)


def first_then_all(action):
    """action() on rank 0, then on the first process of each further machine, then on the rest: what the first one packs
    or downloads the others find. An error is raised on all ranks. -> what action() returns."""
    rank, local_rank, _ = processes()
    result, turn = None, 0 if rank == 0 else 1 if local_rank == 0 else 2
    for now in range(3 if dist.is_initialized() else 1):
        problem = None
        if now == turn or not dist.is_initialized():
            try:
                result = action()
            except Exception as error:
                problem = error
        if dist.is_initialized():
            problems = [None] * dist.get_world_size()
            dist.all_gather_object(problems, problem and str(problem))
            if problem is None and any(problems):
                raise UserError(next(filter(None, problems)))
        if problem:
            raise problem
    return result


# ---------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def whole_file(path, mode="wb"):
    """`with whole_file(path) as file:` writes to a temporary file and renames it to `path` at the end: whatever
    interrupts it, `path` is complete or as it was before. Raises OSError."""
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
