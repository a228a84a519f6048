"""Whatever serves malloc, what it has handed out is known or found out, and a budget holds: real allocators, preloaded."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import make_trace_model
import pytest

from gguf_pager.memory import allocator

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="preloads Linux's libraries")

MIB = 1 << 20
BUDGET_BYTES, TOLERANCE = 268 * MIB, 1.03
LEAST_ARENA_BYTES = 24 * MIB
"""Of what is left, 62 to 79 MiB here: under mimalloc the address space is counted, which it takes 32 MiB at a time."""

PACKAGES = {"libjemalloc.so.2": "libjemalloc2", "libmimalloc.so.2": "libmimalloc2.0", "libtcmalloc_minimal.so.4": "libtcmalloc-minimal4"}
"""Debian's, by what the loader calls them."""

BY_MMAP_ALONE = """
#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
/* Small blocks come from chunks, by powers of two, and go back to a list; large ones have a mapping each. In front of a block
   lies where its mapping begins (NULL: it is a small one) and how long it is. */
typedef struct { char *begin; size_t bytes, wanted, level; } head;
static char *chunk, *chunk_end;
static void *lists[20];
static volatile char lock;
static head *head_of(void *p) { return (head *) ((char *) p - sizeof(head)); }
static char *map(size_t bytes) {
    char *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}
static void *take_small(size_t n) {
    size_t level = 6;
    while (((size_t) 1 << level) < n + sizeof(head)) level++;
    while (__atomic_test_and_set(&lock, __ATOMIC_ACQUIRE)) { }
    void *block = lists[level];
    if (block) {
        lists[level] = *(void **) block;
    } else {
        if (chunk_end - chunk < (ptrdiff_t) 1 << level) { chunk = map(1 << 20); chunk_end = chunk ? chunk + (1 << 20) : NULL; }
        if (chunk) { block = chunk + sizeof(head); chunk += (size_t) 1 << level; }
    }
    __atomic_clear(&lock, __ATOMIC_RELEASE);
    if (block) *head_of(block) = (head) { NULL, 0, n, level };
    return block;
}
static void *take(size_t align, size_t n) {
    if (align <= 16 && n <= 32768) return take_small(n);
    const size_t page = 4096, room = align > page ? align : page, bytes = (n + room + 2 * page) / page * page;
    char *p = map(bytes);
    if (!p) { errno = ENOMEM; return NULL; }
    char *block = (char *) (((uintptr_t) p + page + room - 1) / room * room);
    *head_of(block) = (head) { p, bytes, n, 0 };
    return block;
}
static void give(void *p) {
    if (!p) return;
    const head h = *head_of(p);
    if (h.begin) { munmap(h.begin, h.bytes); return; }
    while (__atomic_test_and_set(&lock, __ATOMIC_ACQUIRE)) { }
    *(void **) p = lists[h.level]; lists[h.level] = p;
    __atomic_clear(&lock, __ATOMIC_RELEASE);
}
void *malloc(size_t n) { return take(16, n); }
void *calloc(size_t n, size_t each) { void *p = take(16, n * each); return p ? memset(p, 0, n * each) : p; }
void free(void *p) { give(p); }
void *realloc(void *p, size_t n) {
    void *q = take(16, n);
    if (q && p) { memcpy(q, p, head_of(p)->wanted < n ? head_of(p)->wanted : n); give(p); }
    return q;
}
int posix_memalign(void **p, size_t align, size_t n) { return (*p = take(align, n)) ? 0 : ENOMEM; }
void *aligned_alloc(size_t align, size_t n) { return take(align, n); }
void *memalign(size_t align, size_t n) { return take(align, n); }
size_t malloc_usable_size(void *p) { return p ? head_of(p)->wanted : 0; }
"""

FIND = "from gguf_pager.memory import allocator; found = allocator.find_allocator(); print(found.name if found else None)"

OPEN = """
import json, sys
from pathlib import Path
from gguf_pager import Llama
peaks = []
for turn in range(2):  # the second finds memory that the first has freed
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    llm = Llama(sys.argv[1], budget=int(sys.argv[2]), n_ctx=4096, n_batch=1024, n_ubatch=1024, n_threads=1, n_threads_batch=1,
                verbose=False)
    first = int(llm.metadata["gguf_pager.trace.first_token"])
    llm.eval([first + i % 256 for i in range(1024)])
    llm.pager.wait_present()
    peaks.append(int(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)) * 1024)
    arena = llm.pager.arena_bytes
    llm.close()
print(json.dumps([peaks, arena]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model with 220 MB of experts whose context takes 116 MiB for batches of 1,024."""
    path = tmp_path_factory.mktemp("allocator") / "wide.gguf"
    make_trace_model.make(path, "tiny", experts=128, n_ff=1024)
    yield path
    path.unlink()


@pytest.fixture(scope="module", params=(*PACKAGES, "by mmap alone"))
def preloaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A library that takes malloc's place."""
    name = str(request.param)
    if name in PACKAGES:
        # Not by loading it: some find no room for their thread-local variables in a process that runs.
        tried = subprocess.run(["true"], env=os.environ | {"LD_PRELOAD": name}, capture_output=True, text=True, check=False)
        if "cannot be preloaded" in tried.stderr:
            pytest.skip(f"needs {name}: apt-get install {PACKAGES[name]}")
        return name
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("mmap")
    (folder / "take.c").write_text(BY_MMAP_ALONE)
    subprocess.run([compiler, "-O1", "-fno-builtin", "-shared", "-fPIC", "-o", folder / "take.so", folder / "take.c"], check=True,
                   timeout=60)
    return str(folder / "take.so")


def run(preloaded: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", *arguments], capture_output=True, text=True, timeout=120, check=False,
                          env=os.environ | {"LD_PRELOAD": preloaded}, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


def test_word_is_taken_of_who_counts_what_malloc_gives(preloaded: str) -> None:
    names = {"libjemalloc.so.2": "jemalloc", "libtcmalloc_minimal.so.4": "tcmalloc"}
    assert run(preloaded, FIND) == names.get(preloaded, "None"), "mallinfo2 is there and says nothing"


def test_process_keeps_to_its_budget(preloaded: str, model: Path) -> None:
    peaks, arena = json.loads(run(preloaded, OPEN, str(model), str(BUDGET_BYTES)))
    assert max(peaks) <= BUDGET_BYTES * TOLERANCE
    assert arena > LEAST_ARENA_BYTES, "the budget is used, not wasted"


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_glibc_is_believed_after_it_was_tried() -> None:
    assert run("", FIND) == "glibc"


def test_count_that_does_not_move_is_not_believed() -> None:
    assert not allocator._sees_what_malloc_gives(allocator.Allocator("still", lambda: 0, lambda: None))
    grown = iter(range(0, 1 << 50, 1 << 40))
    assert not allocator._sees_what_malloc_gives(allocator.Allocator("ever more", lambda: next(grown), lambda: None))
