"""Several processes under accelerate: shares of the batches, sums that are equal in all, errors that end all.

Every process loads the same model and text; only the calibration batches are split. All communication is by
accelerate, on the process group that the launcher's variables describe or that the caller's `Accelerator` made. With
one process every function here is a no-op, and imports neither torch nor accelerate.

Before the processes exchange numbers, they exchange whether one of them failed ([`fail_together`][]): otherwise the
rest would wait for the numbers of a failed process.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from hf_context_prune.errors import ConfigError, ContextPruneError, DataError, LaunchWarning

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState


T = TypeVar("T")

# One process may measure or write for a long time while the rest wait; the death of a process ends the waiting at once.
_TIMEOUT = timedelta(days=1)
_MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_SHARED = "_hf_context_prune_shared"
"""Attribute that marks an error as raised in all processes."""
_CHUNK = 2**22
"""Elements of a tensor that are gathered at once, so that no process holds all copies of a large Gram matrix."""


# The processes


def _launched() -> int:
    """Return how many processes a launcher started, from its environment variables; 1 without a launcher."""
    names = ("WORLD_SIZE", *_MPI_SIZES) if "LOCAL_RANK" in os.environ else _MPI_SIZES
    sizes = [os.environ.get(name, "") for name in names]
    return max([int(size) for size in sizes if size.isdigit()], default=1)


def _has_group() -> bool:
    torch = sys.modules.get("torch")  # code that made a group has imported torch
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def _end_group() -> None:
    """End a gloo group while Python still runs.

    A thread of gloo may hold the last tensor a moment longer than the call that sent it. If Python ends in that moment,
    the process aborts ("terminate called without an active exception"). Ending the group joins those threads. An NCCL
    group is not ended here: its end waits for the other processes, of which one may have failed.
    """
    import torch

    if _has_group() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


def _accelerate() -> PartialState:
    """Return the state of accelerate; make it, with its process group, if the caller has not."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    # accelerate forms a group of CPU processes only with cpu=True. MPS has no collectives.
    on_cpu = _launched() > 1 and (accelerator is None or accelerator.type == "mps")
    callers = _has_group()
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or on_cpu, timeout=_TIMEOUT)
    if _has_group() and not callers:
        atexit.register(_end_group)
    return state


def _group() -> PartialState | None:
    """Return the processes that work together, or None for one process.

    Raises:
        ConfigError: Several processes were launched, but accelerate was set up for one.
    """
    launched = _launched()
    if launched < 2 and not _has_group():
        return None
    state = _accelerate()
    if state.num_processes > 1:
        return state
    if _has_group():
        import torch

        launched = torch.distributed.get_world_size()
    if launched < 2:
        return None
    raise ConfigError(
        f"{launched} processes were launched, but accelerate was set up in each for one process, so each would do all "
        f"the work and overwrite the files of the others. Without a GPU, set ACCELERATE_USE_CPU=true, or make your "
        f"own Accelerator(cpu=True) first."
    )


def num_processes() -> int:
    """Return how many processes work together; 1 without a launcher."""
    state = _group()
    return 1 if state is None else int(state.num_processes)


def process_index() -> int:
    """Return the number of this process among those that work together, from 0."""
    state = _group()
    return 0 if state is None else int(state.process_index)


def is_main_process() -> bool:
    """Return whether this process prints and writes."""
    state = _group()
    return state is None or bool(state.is_main_process)


def default_device() -> torch.device:
    """Return the device that accelerate gives this process."""
    return _accelerate().device


def warn_if_alone() -> None:
    """Warn if ``accelerate launch --cpu --num_processes N`` started one process, as it does without MPI.

    Warns:
        LaunchWarning: One process was started; the message has a command that starts several.
    """
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    # Without its --mpirun_hostfile it starts one process, but sets the address of a main process all the same.
    if on_cpu and "MASTER_ADDR" in os.environ and _launched() < 2 and not _has_group():
        warnings.warn(
            "accelerate launch --cpu starts one process whatever --num_processes says, unless it has MPI "
            "(--mpirun_hostfile). The result is the same; for several processes on the CPU: "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 ...",
            LaunchWarning,
            stacklevel=3,
        )


# Errors and small objects


def _exchange(error: Exception | None, value: T) -> list[T]:
    """Send this process's error or value to all processes; return all values in the order of the processes.

    Raises:
        ContextPruneError: Another process failed: the first such error, with its type. The caller raises its own error.
        RuntimeError: Another process failed with an error of another type.
    """
    state = _group()
    if state is None:
        return [value]
    from accelerate.utils import gather_object

    failure = None
    if error is not None:
        setattr(error, _SHARED, True)
        failure = (type(error) if isinstance(error, ContextPruneError) else None, type(error).__name__, str(error))
    reports = gather_object([(failure, value)])
    if error is None:
        for index, (other, _) in enumerate(reports):
            if other is not None:
                kind, name, message = other
                text = f"{message} (in process {index} of {state.num_processes})"
                raised = RuntimeError(f"{name}: {text}") if kind is None else kind(text)
                setattr(raised, _SHARED, True)
                raise raised
    return [other for _, other in reports]


def is_shared(error: BaseException | None) -> bool:
    """Return whether all processes raise this error or its cause, so that only the main process need show it."""
    while error is not None:
        if getattr(error, _SHARED, False):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def fail_together() -> Iterator[None]:
    """Let a block (or, as a decorator, a function) succeed in all processes or raise in all. Blocks may be nested.

    Raises:
        ContextPruneError: This process failed or, with the same type, the first process that did.
        RuntimeError: Another process failed with an error of another type.
    """
    try:
        yield
    except Exception as error:
        if not is_shared(error):
            _exchange(error, None)
        raise
    _exchange(None, None)


def on_main_process(function: Callable[[], T]) -> T:
    """Call a function only in the main process; all processes wait for its result or its error.

    Args:
        function: A function without arguments; its result is pickled.
    """
    value, failed = None, None
    if is_main_process():
        try:
            value = function()
        except Exception as error:
            failed = error
    values = _exchange(failed, value)
    if failed is not None:
        raise failed
    return values[0]  # type: ignore[return-value]


def broadcast_object(value: T) -> T:
    """Return the main process's value in all processes; for small objects, which are pickled."""
    return _exchange(None, value)[0]


# Batches and sums


def all_gather(value: T) -> list[T]:
    """Return the values of all processes, in the order of their ranks; every process has to call this function."""
    return _exchange(None, value)


def shard(batches: Iterable[dict[str, torch.Tensor]]) -> list[tuple[int, dict[str, torch.Tensor]]]:
    """Return this process's share of the batches, every n-th, with their numbers among all batches.

    Args:
        batches: The batches, the same in every process.

    Returns:
        [(number, batch), ...]; empty if there are more processes than batches.

    Raises:
        DataError: The processes were given different batches.
    """
    numbered = list(enumerate(batches))
    state = _group()
    if state is None:
        return numbered
    digests = _exchange(None, digest_batches([batch for _, batch in numbered]))
    if len(set(digests)) > 1:
        raise DataError(
            f"The {state.num_processes} processes were given different batches. Give all processes the same text and "
            f"seed: this package splits the batches."
        )
    return numbered[state.process_index :: state.num_processes]


def digest_batches(batches: Sequence[dict[str, torch.Tensor]]) -> str:
    """Return a hash of every tensor of every batch, 64 hexadecimal digits."""
    sha = hashlib.sha256()
    for batch in batches:
        for name, tensor in sorted(batch.items()):
            sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def gather_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors of all processes, in their order, on accelerate's device; all have one shape and dtype."""
    from accelerate.utils import gather

    rows = gather(tensor.detach().to(default_device()).reshape(1, -1))
    return [row.reshape(tensor.shape) for row in rows]


def all_reduce_(tensors: Iterable[torch.Tensor]) -> None:
    """Sum contiguous floating-point tensors over all processes, in place.

    The tensors are gathered and added in float64, in the order of the processes. A reduction by the backend would
    choose its order by topology and message size, and add float32 in float32; this sum is the same, bit for bit, in all
    processes and on any network.

    Args:
        tensors: The tensors; every process gives the same number of them, with the same shapes and dtypes.
    """
    if _group() is None:
        return
    for tensor in tensors:
        for chunk in tensor.view(-1).split(_CHUNK):
            total, *others = gather_tensors(chunk)
            total = total.double()
            for other in others:
                total += other
            chunk.copy_(total)


def sum_counts(*counts: int) -> list[int]:
    """Return the sums of integers over all processes."""
    return [sum(column) for column in zip(*_exchange(None, counts), strict=True)]
