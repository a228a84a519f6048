"""The C core. Private: pager.py, probe.py and engine.py are its only users. Errors are OSError with the errno."""

from collections.abc import Callable, Sequence
from typing import ParamSpec, Self, TypeAlias, TypeVar

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")

_Slice: TypeAlias = tuple[str, int, tuple[int, int, int], int, int, int, int, int, int]
"""name, ggml type, ne, file, offset_bytes, slice_bytes, data_at, region_at, region_bytes"""
_Layer: TypeAlias = tuple[int, int, int, Sequence[_Slice]]
"""n_experts, n_used, shape class, slices"""
_Table: TypeAlias = tuple[str, int, tuple[int, int], int, int, int]
"""name, ggml type, ne, file, offset_bytes, row_bytes"""
_Counters: TypeAlias = tuple[int, int, int, int, int, int, int, int, int, int, int, int, int, int]
"""hits, misses, bytes_read, bytes_wasted, stall_ns, stall_bytes, evictions, left_alone, visits, tokens, foreseen, in_vain, sight (gp_sight),
resident"""
_Failure: TypeAlias = tuple[int, int, int]
"""errno, file (of the model's paths, then of each mirror's), offset_bytes"""
_Ggml: TypeAlias = tuple[int, int, int, int, int, int, int, int, int, int, tuple[int, ...], tuple[int, ...], int, int, int, int,
                         int, int, tuple[int, ...]]
"""op_none, op_mul_mat_id, op_argsort, op_top_k, op_view, op_reshape, op_custom, op_add_id, op_get_rows; flag_compute; the operations that work row by
row (row_ops of gp_ggml); op_mul, op_add, op_repeat, op_norm, op_rms_norm; type_i32, type_f32; the addresses of ggml_backend_buffer_is_host, ggml_get_type_traits_cpu, ggml_blck_size, ggml_type_size; those of the functions in gp_graphs"""

class OpenError(OSError):
    """A pager could not be opened for want of "memory", a "thread" or a "file", or of "sense" in what it was given."""

    lack: str
    file: int
    """Of the model's paths, then of each mirror's."""

class Pager:
    """Slots, files and reader threads of one model."""

    def __new__(
        cls,
        *,
        paths: Sequence[str],
        mirrors: Sequence[tuple[Sequence[str], bool]],
        layers: Sequence[_Layer],
        classes: Sequence[tuple[int, int]],
        tables: Sequence[_Table],
        policy: str,
        direct: bool,
        read_ahead: bool,
        look_ahead: int,
        offset_align: int,
        memory_align: int,
        n_readers: int,
        piece_bytes: int,
    ) -> Self:
        """`classes` are (stride_bytes, n_slots), `mirrors` (paths, direct), 7 at most."""
    def close(self) -> None: ...
    def is_present(self) -> bool:
        """Return whether the arena's memory is there."""
    def wait_present(self) -> None:
        """Wait until the arena's memory is there; one thread at a time."""
    def counters(self) -> list[_Counters]: ...
    def copies(self) -> list[int]:
        """Return the bytes read from the model's own files and from each mirror."""
    def rows(self) -> tuple[int, int, int]:
        """Return how many rows of tables were read, their bytes, and how many look-ups were left to llama.cpp."""
    def reads_in_background(self) -> bool:
        """Return whether the system reads the model's own files in the background, without reader threads."""
    def resident(self, layer: int, /) -> bytes:
        """Return a byte per expert: 0 not in a slot, 1 in one, 2 pinned."""
    def chosen(self, layer: int, /) -> list[int]:
        """Return how many tokens have chosen each expert."""
    def pin(self, layer: int, experts: Sequence[int], /) -> _Failure | None:
        """Return what a read failed with, if one did."""
    def unpin_all(self) -> None: ...
    def shrink(self, shape_class: int, n_slots: int, /) -> None:
        """Leave a class so many of its slots and give back the memory of the others; EBUSY: they are in use."""
    def warm_up(self, experts: Sequence[tuple[int, int, float]], /) -> None:
        """Read (layer, expert, share of tokens that choose it) in the background, in this order, into free slots."""

    def compare_with(self, compare: Callable[[int, int, int, int], int], /) -> None:
        """What tells a touched file from a changed one: called with (file, offset, address, bytes) of what was read, it returns 0
        if the file holds that and what it did when it was opened, else an errno. What it raises, `Tap.take_exception` returns,
        or `pin` raises. It is not known to the garbage collector: it must not refer to the pager."""
    def accept(self, times: Sequence[tuple[int, int]], /) -> None:
        """Take over when each file (of all copies) was modified and changed, in ns: the bytes are the same."""

class Tap:
    """The graph hook of one context. Callbacks are addresses of C functions, 0 for none."""

    def __new__(
        cls, *, ggml: _Ggml, max_ids: int, batch_bytes: int, row_bytes: int, next_eval: int, next_eval_data: int,
        next_abort: int, next_abort_data: int
    ) -> Self: ...
    def attach(self, pager: Pager, /) -> None: ...
    def addresses(self) -> tuple[int, int, int]:
        """Return the addresses of the eval callback, the abort callback, and the data both take."""
    def chain_abort(self, next_abort: int, next_abort_data: int, /) -> None: ...
    def idle(self) -> None: ...
    def count_kinds(self) -> tuple[int, int]:
        """Return how many kinds of matrices are multiplied here, and how many are left to ggml for other bits."""
    def count_ffns(self) -> tuple[int, int]:
        """Return how many shapes of feed-forwards are computed an expert at a time, and how many gave other bits so."""
    def take_failure(self) -> _Failure | None: ...
    def watch(self) -> None:
        """Until take_exception, in the main thread: run the handlers of signals while it decodes; end the decode if one raises.

        What was left of an earlier decode is forgotten.
        """
    def is_handling(self) -> bool:
        """Return whether such a handler is running."""
    def take_exception(self) -> BaseException | None:
        """Return what one has raised, or a comparison of `Pager.compare_with` in this thread."""
    def close(self) -> None: ...

class Mutex:
    """A lock that is taken and given back around a call, in C: no exception of a signal handler leaves it held."""

    def call(self, function: Callable[_Parameters, _Result], /, *args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        """Call a function once nobody else is in one; at once, if this thread is in one already."""
    def is_mine(self) -> bool:
        """Return whether this thread is in a call."""

def file_alignment(path: str, /) -> tuple[int, int]:
    """Return the alignment of direct reads in the file and in memory; ENOTSUP where there are none."""

def memory_lock(address: int, n_bytes: int, /) -> None:
    """Keep pages in RAM: those that are there, and others as they come."""
def lazy_load_begin(library: str, /) -> None: ...
def lazy_load_end() -> list[tuple[int, int, int, int, int]]:
    """Return what libllama has mapped in this thread meanwhile, and not unmapped: address, bytes, device, inode, offset."""
def policy_exists(name: str, /) -> bool: ...
def read_tensor(address: int, /) -> dict[str, int | str | tuple[int, ...]]: ...
