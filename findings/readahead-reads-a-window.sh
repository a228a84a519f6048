#!/usr/bin/env bash
# Linux (seen on 6.18): readahead(2), posix_fadvise and madvise WILLNEED of a large file read a few megabytes of it, and say nothing.
. "$(dirname "${BASH_SOURCE[0]}")/environment.bash"
python3 - <<'END'
import ctypes
import mmap
import os
import sys
import time
from pathlib import Path

MIB = 1 << 20
libc = ctypes.CDLL(None, use_errno=True)
device = os.stat(".").st_dev
node = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
queue = next((folder / "queue" for folder in (node, node.parent) if (folder / "queue").is_dir()), None)
if queue is None:
    sys.exit("The folder for temporary files is on no block device: set TMPDIR to one that is.")
window = max(int((queue / name).read_text()) for name in ("read_ahead_kb", "max_sectors_kb")) * 1024
size = max(64 * MIB, 4 * window)
with open("file", "wb") as file:
    for _ in range(size // MIB):
        file.write(os.urandom(MIB))
    os.fsync(file.fileno())


def cached_bytes(file: int) -> int:
    with mmap.mmap(file, size, flags=mmap.MAP_PRIVATE) as window:
        pages, view = (ctypes.c_ubyte * (size // mmap.PAGESIZE))(), (ctypes.c_char * size).from_buffer(window)
        failed = libc.mincore(ctypes.byref(view), ctypes.c_size_t(size), pages)
        del view
    assert not failed
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


def advise(file: int) -> None:
    mmap.mmap(file, size, prot=mmap.PROT_READ).madvise(mmap.MADV_WILLNEED)


asks = {
    "readahead(2)": lambda file: libc.readahead(file, ctypes.c_int64(0), ctypes.c_size_t(size)),
    "posix_fadvise WILLNEED": lambda file: os.posix_fadvise(file, 0, size, os.POSIX_FADV_WILLNEED),
    "madvise WILLNEED": advise,
}
print(f"a file of {size // MIB} MiB on a device with a read-ahead of {(queue / 'read_ahead_kb').read_text().strip()} KiB:")
for name, ask in asks.items():
    file = os.open("file", os.O_RDWR)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    assert cached_bytes(file) < MIB, "the file does not leave the page cache"
    code = ask(file)
    time.sleep(2)
    found = cached_bytes(file)
    print(f"{name} of all of it returns {code or 0}, and two seconds later {found / MIB:.1f} MiB are in the page cache")
    assert not code and 0 < found <= window < size, "this has changed"
    os.close(file)
print("expected all of it: there is room, and none of the calls says that it reads less than it was asked for")
END
