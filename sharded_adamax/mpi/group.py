# mypy: disable-error-code="override"
# torch's stubs describe what C++ callers may write; a group in Python is only ever called in one of these ways.
"""The face that torch.distributed sees. See the notes in `sharded_adamax.mpi`."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor

from sharded_adamax.mpi.transport import COMBINES, MAX_MESSAGE_BYTES, Reduction, Transport, messages
from sharded_adamax.mpi.work import Attendance, Message, MpiWork, Task, Threads

BACKEND = "mpi4py"


class MpiProcessGroup(dist.ProcessGroup):
    """The ranks of an MPI communicator as a torch.distributed process group for CPU tensors.

    Tensors must be contiguous. A collective that was called belongs to the group until `wait` returns: its tensors must
    not be changed before.

    Args:
        communicator: Nobody else may use it; `shutdown` frees it.
        timeout: How long a `wait` may take; the collective itself cannot be taken back.
        attendance: Tells the others when this rank leaves.
    """

    def __init__(self, communicator: MPI.Intracomm, timeout: timedelta, attendance: Attendance) -> None:
        super().__init__(communicator.rank, communicator.size)  # type: ignore[call-arg]
        self._transport = Transport(communicator)
        self._threads = Threads()
        self._rank, self._size = communicator.rank, communicator.size
        self._timeout = timeout
        self._attendance = attendance
        self._num_collectives = 0
        self._group_name = self._group_desc = ""
        self._closed = False

    # --- Who we are. A group in Python has no torch Backend inside, and answers for one itself.

    def getBackendName(self) -> str:  # noqa: N802
        return BACKEND

    name = getBackendName

    def _get_backend(self, device: torch.device) -> MpiProcessGroup:
        if torch.device(device).type != "cpu":
            raise RuntimeError(f"No backend type associated with device type {torch.device(device).type}")
        return self

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

    def _set_group_name(self, name: str) -> None:
        self._group_name = name

    def _set_group_desc(self, desc: str) -> None:
        self._group_desc = desc

    def getGroupName(self) -> str:  # noqa: N802
        return self._group_name

    def getGroupDesc(self) -> str:  # noqa: N802
        return self._group_desc

    @property
    def group_name(self) -> str:
        return self._group_name

    @property
    def group_desc(self) -> str:
        return self._group_desc

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout = timeout

    _set_default_timeout = set_timeout

    def shutdown(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._attendance.leave(self._num_collectives)
        # A thread that is still inside MPI waits for a rank that failed: freeing what it uses would crash this one too.
        if self._threads.stop():
            self._transport.communicator.Free()

    abort = shutdown

    # --- Messages

    def send(self, tensors: list[Tensor], dstRank: int, tag: int = 0) -> MpiWork:  # noqa: N803
        return self._start_message("send", tensors, dstRank, tag, self._transport.communicator.Isend)

    def recv(self, tensors: list[Tensor], srcRank: int, tag: int = 0) -> MpiWork:  # noqa: N803
        return self._start_message("recv", tensors, srcRank, tag, self._transport.communicator.Irecv)

    def recv_anysource(self, tensors: list[Tensor], tag: int = 0) -> MpiWork:
        if tensors[0].nbytes > MAX_MESSAGE_BYTES:  # its second message might come from another rank
            raise NotImplementedError(
                f"expected at most {MAX_MESSAGE_BYTES} bytes from any rank, got {tensors[0].nbytes}: name the sender"
            )
        return self._start_message("recv", tensors, MPI.ANY_SOURCE, tag, self._transport.communicator.Irecv)

    def _start_message(
        self, kind: str, tensors: list[Tensor], peer: int, tag: int, start: Callable[..., MPI.Request]
    ) -> MpiWork:
        tensor = _only(tensors)
        if not 0 <= tag < self._transport.largest_tag:
            raise ValueError(f"expected a tag in [0, {self._transport.largest_tag}), got {tag}")
        self._check_open(kind)
        work = MpiWork(f"rank {self._rank} of {self._size}: {kind}", tensors, self._timeout)
        self._threads.watch(Message([start(memory, peer, tag) for memory in messages(tensor)], work, tensor))
        return work

    # --- Collectives

    def barrier(self, opts: Any = None) -> MpiWork:
        return self._queue("barrier", [], self._transport.communicator.Barrier)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> MpiWork:
        tensor, root = _only(tensors), opts.rootRank
        return self._queue("broadcast", tensors, lambda: self._transport.broadcast(tensor, root))

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> MpiWork:
        tensor, reduction = _only(tensors), self._reduction(opts)
        return self._queue("all_reduce", tensors, lambda: self._transport.all_reduce(tensor, reduction))

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> MpiWork:
        checked, reduction = [_only([tensor]) for tensor in tensors], self._reduction(opts)

        def action() -> None:
            for tensor in checked:
                self._transport.all_reduce(tensor, reduction)

        return self._queue("all_reduce_coalesced", tensors, action)

    def reduce(self, tensors: list[Tensor], opts: Any) -> MpiWork:
        tensor, root, reduction = _only(tensors), opts.rootRank, self._reduction(opts)

        def action() -> None:
            total = tensor.clone()
            self._transport.all_reduce(total, reduction)
            if self._rank == root:
                tensor.copy_(total)

        return self._queue("reduce", tensors, action)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> MpiWork:
        return self.all_gather_single_coalesced([output], [input], opts)

    _allgather_base = all_gather_single  # its name before torch 2.13

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> MpiWork:
        pairs = [(_only([whole]), _only([mine])) for whole, mine in zip(outputs, inputs, strict=True)]
        for whole, mine in pairs:
            self._check_rows("all_gather", whole, mine)

        def action() -> None:
            for whole, mine in pairs:
                self._transport.all_gather(whole, mine)

        return self._queue("all_gather", outputs, action)

    allgather_into_tensor_coalesced: Any = all_gather_single_coalesced

    def allgather(self, output_tensors: list[list[Tensor]], input_tensors: list[Tensor], opts: Any = None) -> MpiWork:
        mine, outputs = _only(input_tensors), output_tensors[0]
        self._check_list("all_gather", outputs, mine)

        def action() -> None:
            whole = mine.new_empty(self._size, mine.numel())
            self._transport.all_gather(whole, mine)
            for output, row in zip(outputs, whole, strict=True):
                output.copy_(row.view(output.shape))

        return self._queue("all_gather", output_tensors, action)

    def reduce_scatter_single(self, outputTensor: Tensor, inputTensor: Tensor, opts: Any = None) -> MpiWork:  # noqa: N803
        return self.reduce_scatter_single_coalesced([outputTensor], [inputTensor], opts)

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> MpiWork:
        pairs = [(_only([shard]).view(-1), _only([bucket])) for shard, bucket in zip(outputs, inputs, strict=True)]
        reduction = self._reduction(opts)
        for shard, bucket in pairs:
            self._check_rows("reduce_scatter", bucket, shard)

        def action() -> None:
            for shard, bucket in pairs:
                self._transport.reduce_scatter(shard, bucket.view(self._size, -1), reduction)

        return self._queue("reduce_scatter", outputs, action)

    reduce_scatter_tensor_coalesced: Any = reduce_scatter_single_coalesced

    def reduce_scatter(
        self, output_tensors: list[Tensor], input_tensors: list[list[Tensor]], opts: Any = None
    ) -> MpiWork:
        shard, inputs, reduction = _only(output_tensors).view(-1), input_tensors[0], self._reduction(opts)
        self._check_list("reduce_scatter", inputs, shard)

        def action() -> None:
            rows = torch.stack([tensor.detach().reshape(-1) for tensor in inputs])
            self._transport.reduce_scatter(shard, rows, reduction)

        return self._queue("reduce_scatter", output_tensors, action)

    def gather(self, output_tensors: list[list[Tensor]], input_tensors: list[Tensor], opts: Any) -> MpiWork:
        mine, root = _only(input_tensors), opts.rootRank
        arrivals = [_only([tensor]) for tensor in output_tensors[0]] if self._rank == root else []
        if self._rank == root:
            self._check_list("gather", arrivals, mine)
        return self._exchange("gather", output_tensors, {root: mine}, dict(enumerate(arrivals)))

    def scatter(self, output_tensors: list[Tensor], input_tensors: list[list[Tensor]], opts: Any) -> MpiWork:
        mine, root = _only(output_tensors), opts.rootRank
        departures = [_only([tensor]) for tensor in input_tensors[0]] if self._rank == root else []
        if self._rank == root:
            self._check_list("scatter", departures, mine)
        return self._exchange("scatter", output_tensors, dict(enumerate(departures)), {root: mine})

    def alltoall(self, output_tensor: list[Tensor], input_tensor: list[Tensor], opts: Any = None) -> MpiWork:
        departures = {peer: _only([tensor]) for peer, tensor in enumerate(input_tensor)}
        arrivals = {peer: _only([tensor]) for peer, tensor in enumerate(output_tensor)}
        return self._exchange("all_to_all", output_tensor, departures, arrivals)

    def all_to_all_single(
        self, output: Tensor, input: Tensor, out_sizes: Sequence[int], in_sizes: Sequence[int], opts: Any = None
    ) -> MpiWork:
        arrivals = torch.split(_only([output]), list(out_sizes) or output.shape[0] // self._size)
        departures = torch.split(_only([input]), list(in_sizes) or input.shape[0] // self._size)
        return self._exchange("all_to_all", [output], dict(enumerate(departures)), dict(enumerate(arrivals)))

    alltoall_base: Any = all_to_all_single

    # --- Queueing and checks

    def _exchange(self, kind: str, result: Any, departures: dict[int, Tensor], arrivals: dict[int, Tensor]) -> MpiWork:
        return self._queue(kind, result, lambda: self._transport.exchange(departures, arrivals))

    def _queue(self, kind: str, result: Any, action: Callable[[], None]) -> MpiWork:
        self._check_open(kind)
        self._num_collectives += 1
        missing = functools.partial(self._attendance.missing, self._num_collectives)
        work = MpiWork(f"rank {self._rank} of {self._size}: {kind}", result, self._timeout, missing)
        self._threads.queue(Task(action, work))
        return work

    def _check_open(self, kind: str) -> None:
        if self._closed:
            raise RuntimeError(f"rank {self._rank} of {self._size}: {kind} was called after the group was destroyed")

    def _reduction(self, opts: Any) -> Reduction:
        operation = dist.ReduceOp.SUM if opts is None else opts.reduceOp
        for name, combine in COMBINES.items():
            if operation == getattr(dist.ReduceOp, name):
                return Reduction(combine, self._size if name == "AVG" else 1)
        raise NotImplementedError(f"expected one of {', '.join(COMBINES)}, got {operation}: not over MPI")

    def _check_rows(self, kind: str, whole: Tensor, row: Tensor) -> None:
        if whole.numel() != row.numel() * self._size or whole.dtype != row.dtype:
            raise ValueError(
                f"rank {self._rank}: {kind} expected {self._size} x {row.numel()} elements of {row.dtype}, got "
                f"{whole.numel()} of {whole.dtype}"
            )

    def _check_list(self, kind: str, tensors: Sequence[Tensor], mine: Tensor) -> None:
        sizes = [tensor.numel() for tensor in tensors]
        if sizes != [mine.numel()] * self._size or any(tensor.dtype != mine.dtype for tensor in tensors):
            raise ValueError(
                f"rank {self._rank}: {kind} expected {self._size} tensors of {mine.numel()} elements of {mine.dtype}, "
                f"got {sizes} elements of {', '.join(sorted({str(tensor.dtype) for tensor in tensors}))}"
            )


def _only(tensors: Sequence[Tensor]) -> Tensor:
    """Return the one tensor of a list, as memory that MPI can read and write."""
    (tensor,) = tensors
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.is_conj():
        raise ValueError(
            f"expected a contiguous CPU tensor, got one of shape {tuple(tensor.shape)} and strides {tensor.stride()} "
            f"on {tensor.device}: MPI carries plain memory; call .contiguous(), or use NCCL for tensors on GPUs"
        )
    return tensor.detach()


def register() -> None:
    """Make the backend known to torch.distributed, as "mpi4py". See [Note: the name]."""
    if BACKEND.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu"])


def _create(options: Any, _backend_options: object) -> MpiProcessGroup:
    """Make the group that torch asks for. The ranks of torch are those of COMM_WORLD."""
    world = MPI.COMM_WORLD
    ranks = list(options.global_ranks_in_group) or list(range(options.group_size))
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise RuntimeError(
            f"expected an MPI with MPI_THREAD_MULTIPLE, got level {MPI.Query_thread()} from "
            f"{MPI.Get_library_version().splitlines()[0]}: collectives run in a thread of their own"
        )
    if max(ranks) >= world.size or ranks[options.group_rank] != world.rank:
        raise RuntimeError(
            f"expected this process to be rank {ranks[options.group_rank]} of MPI_COMM_WORLD, got rank {world.rank} of "
            f'{world.size}: the backend "mpi" needs processes that were started by mpirun'
        )
    group = world.Get_group().Incl(ranks)
    # Groups with ranks in common may be made at the same time; the tag keeps them apart. 32767: see Transport.
    communicator = world.Create_group(group, tag=zlib.crc32(options.group_id.encode()) % 32767)
    group.Free()
    attendance = Attendance(options.store, options.group_rank, options.group_size, with_host=0 in ranks)
    return MpiProcessGroup(communicator, options.timeout, attendance)
