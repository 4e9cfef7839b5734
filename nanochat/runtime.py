"""Where we run: device, precision, memory, random state, signals, and how a script ends.

Weights are fp32 in training; `autocast` computes the large products in a shorter type. On GPUs
that is bf16 from compute capability 8.0 (Ampere), fp16 with a loss scaler before; on CPUs bf16
where a short probe finds it faster, else fp32.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from statistics import median

import torch

from nanochat import InputError, processes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# ------------------------------------------------------------------ device and precision


def pick_device(name: str = "auto") -> torch.device:
    """"auto" is CUDA where there is one, else the CPU; of several processes each has its own GPU.

    Raises InputError for an absent device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda:") and processes.world_size() > 1:
        raise InputError(f"--device {name}: under torchrun each process has its own GPU; leave it out")
    if name == "cuda" and processes.world_size() > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=name).cpu()  # which "meta" cannot do
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0][:100]}; try auto or cpu") from None
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of the large products: "auto", or one of DTYPES."""
    if name != "auto":
        if name == "float16" and device.type == "cpu":
            print("warning: --dtype float16 is emulated on a CPU, about 30 times slower", file=sys.stderr)
        return DTYPES[name]
    if device.type == "cuda":
        bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if bf16 else torch.float16
    speedup = bf16_speedup()
    dtype = torch.bfloat16 if speedup > 1.2 else torch.float32
    print(f"--dtype {str(dtype).removeprefix('torch.')}: bf16 products are {speedup:.1f} times as fast as fp32 here", file=sys.stderr)
    return dtype


def bf16_speedup() -> float:
    """How many times faster this CPU multiplies in bf16 than in fp32, in 0.1 s."""
    cpu = torch.device("cpu")
    return product_speed(cpu, torch.bfloat16, 512) / product_speed(cpu, torch.float32, 512)


def product_speed(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s of a product of two matrices of size × size, in well under a second: the peak that MFU is a share of."""
    size = size or (8192 if device.type == "cuda" else 1024)
    x = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    torch.nn.functional.linear(x, x)  # the first call sets up the kernel
    runs = []
    for _ in range(7):
        start = clock(device)
        torch.nn.functional.linear(x, x)
        runs.append(clock(device) - start)
    return 2 * size**3 / median(runs)


def clock(device: torch.device) -> float:
    """Seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The context in which forward passes run; it changes nothing for fp32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


# ------------------------------------------------------------------ memory and random state


def keep_freed_memory() -> None:
    """Let glibc keep large buffers for the next step instead of returning them to the kernel.

    Each step needs the same tens of megabytes for logits; mapping and zeroing them anew costs a
    CPU run 40 % of its time. Elsewhere than on Linux with glibc this does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held so far, on a GPU those of its tensors; 0 where nobody counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration):
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            return 1024 * int(next(line for line in file if line.startswith("VmHWM")).split()[1])
    return 0


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of torch's default generators, which only dropout and initialisation draw from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put back what rng_state gave."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


# ------------------------------------------------------------------ signals, and the end


class Stopped(Exception):
    """A signal ended the run in good order; the message says what was saved."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number


SIGNALS = (signal.SIGTERM, signal.SIGINT)
_received: list[int] = []


@contextmanager
def signals_wait() -> Iterator[None]:
    """While this is open, the first SIGINT (Ctrl-C) or SIGTERM only shows in signal_received(); the next one acts."""
    handlers: dict = {}

    def put_back() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def note(number: int, frame) -> None:
        _received.append(number)
        put_back()
        with suppress(OSError):  # the same Ctrl-C may have ended the reader of a pipe
            os.write(2, b"" if processes.rank() else b"\nfinishing this step, then saving; once more ends it at once\n")

    _received.clear()
    if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
        handlers |= {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield
    finally:
        put_back()


def signal_received() -> int | None:
    """The signal that came to any of the processes while signals_wait was open, if one did; all of them ask together."""
    counts = processes.sum_over_ranks(*(number in _received for number in SIGNALS))
    return next((number for number, count in zip(SIGNALS, counts) if count), None)


def run_as_script(main: Callable[[], None]) -> None:
    """Run main() and exit: 0 when done, 2 after one line on what the user can mend, 128 + n after signal n.

    130 is Ctrl-C, 143 SIGTERM; in training, both come after the step is finished and saved.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # UTF-8 whatever the terminal's locale says
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        processes.join()
        main()
        if sys.stdout:
            sys.stdout.flush()
        processes.leave(0)
    except BrokenPipeError:  # the reader of a pipe, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own flush would complain
        sys.exit(say("", 128 + 13))
    except SystemExit as end:  # of --help, or of a wrong flag
        sys.exit(say("", end.code if isinstance(end.code, int) else bool(end.code)))
    except InputError as error:
        sys.exit(say(f"error: {error}", 2))
    except OSError as error:
        sys.exit(say(f"error: {f'{error.filename}: {error.strerror}' if error.filename is not None else error}", 2))
    except Stopped as stop:
        sys.exit(say("" if processes.rank() else f"stopped: {stop}", 128 + stop.number))
    except KeyboardInterrupt:
        sys.exit(say("" if processes.rank() else "\ninterrupted", 130))
    except Exception as error:
        if processes.rank() and "gloo" in str(error):  # the first error is the one to read
            sys.exit(say("lost the other processes", 1))
        if not out_of_memory(error):
            sys.stderr = sys.__stderr__ if processes.rank() else sys.stderr
            raise
        sys.exit(say("error: out of memory: a smaller --batch-size with a larger --accumulate takes the same steps", 2))


def say(line: str, code: int) -> int:
    """Print the line; → the code. What all processes meet rank 0 alone says: torchrun ends the others meanwhile."""
    if processes.rank():
        time.sleep(5)
    if line:
        print(f"rank {processes.rank()}: {line}" if processes.rank() else line, file=sys.__stderr__ if processes.rank() else sys.stderr)
    processes.leave(code)
    return code


def argument_text(argument: str) -> str:
    """The text of a command-line argument, read as UTF-8 whatever the locale says (not for paths)."""
    return os.fsencode(argument).decode("utf-8", "replace")


def out_of_memory(error: Exception) -> bool:
    """Whether a GPU, or the CPU's allocator, had too little memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
