"""A file system that fails as it is told: the kernel's FUSE, spoken to directly, in a process of its own. Needs root.

The folder it shows is flat. What goes wrong is written to a control file, one wish a line, and looked up at every read:

    errno NUMBER FIRST END     reads of these bytes fail
    hang FIRST END             reads of these bytes wait until the wish is gone
    end AT                     files end there, whatever their size says
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _STATFS, _RELEASE = 1, 2, 3, 14, 15, 17, 18
_FLUSH, _INIT, _OPENDIR, _RELEASEDIR, _ACCESS, _INTERRUPT, _BATCH_FORGET = 25, 26, 27, 29, 34, 36, 42
_DIRECT_IO = 1  # FOPEN_DIRECT_IO of <linux/fuse.h>
_ROOT = 1
_MNT_DETACH = 2


def reason_to_skip() -> str | None:
    """Return why there can be no such file system here."""
    if os.geteuid() != 0:
        return "only root may mount"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        return f"/dev/fuse: {error.strerror}"
    return None


class FuseDisk:
    """`folder` is where the files appear; `wish` tells what goes wrong from now on."""

    def __init__(self, folder: Path, control: Path) -> None:
        self.folder, self._control = folder, control
        self.wish()

    def is_hanging(self) -> bool:
        """Return whether a read has come that waits."""
        return self._control.with_suffix(".hanging").exists()

    def wish(self, *lines: str) -> None:
        other = self._control.with_suffix(".new")
        other.write_text("\n".join(lines))
        other.replace(self._control)


@contextlib.contextmanager
def fuse_disk(source: Path, work: Path, *, direct_io: bool = False) -> Iterator[FuseDisk]:
    """Show the files of `source` in a new folder below `work`."""
    folder, control = work / "fuse", work / "control"
    folder.mkdir()
    disk = FuseDisk(folder, control)
    server = subprocess.Popen([sys.executable, __file__, str(source), str(folder), str(control), str(int(direct_io))],
                              stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None and server.stdout.readline() == b"mounted\n"
        yield disk
    finally:
        disk.wish()
        ctypes.CDLL(None).umount2(os.fsencode(folder), _MNT_DETACH)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(5)
        server.send_signal(signal.SIGKILL)
        server.wait()


class _Server:
    def __init__(self, source: Path, control: Path, direct_io: bool) -> None:
        self._paths = sorted(source.iterdir())
        self._files = [os.open(path, os.O_RDONLY) for path in self._paths]
        self._control, self._flags = control, _DIRECT_IO if direct_io else 0

    def serve(self, device: int) -> None:
        while True:
            try:
                request = os.read(device, 1 << 20)
            except OSError as error:
                if error.errno == errno.ENODEV:  # unmounted
                    return
                if error.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                    continue
                raise
            _, operation, unique, node = struct.unpack_from("<IIQQ", request)
            if operation in (_FORGET, _BATCH_FORGET, _INTERRUPT):
                continue
            arguments = (device, operation, unique, node, request[40:])
            if operation == _READ:  # which may hang, and others go on
                threading.Thread(target=self._reply, args=arguments, daemon=True).start()
            else:
                self._reply(*arguments)

    def _reply(self, device: int, operation: int, unique: int, node: int, body: bytes) -> None:
        try:
            answer, number = self._answer(operation, node, body), 0
        except OSError as error:
            answer, number = b"", error.errno or errno.EIO
        with contextlib.suppress(OSError):  # whoever asked may be gone
            os.write(device, struct.pack("<IiQ", 16 + len(answer), -number, unique) + answer)

    def _answer(self, operation: int, node: int, body: bytes) -> bytes:
        if operation == _INIT:
            return struct.pack("<IIIIHHIIHHI28x", 7, 31, 1 << 17, 0, 16, 12, 1 << 17, 1, 32, 0, 0)
        if operation == _LOOKUP:
            name = os.fsdecode(body.rstrip(b"\0"))
            for index, path in enumerate(self._paths):
                if path.name == name:
                    return struct.pack("<QQQQII", index + 2, 0, 0, 0, 0, 0) + self._attributes(index + 2)
            raise OSError(errno.ENOENT, name)
        if operation == _GETATTR:
            return struct.pack("<QII", 0, 0, 0) + self._attributes(node)
        if operation in (_OPEN, _OPENDIR):
            return struct.pack("<QII", 0, self._flags, 0)
        if operation == _READ:
            _, offset, size = struct.unpack_from("<QQI", body)
            return self._read(node, offset, size)
        if operation == _STATFS:
            return struct.pack("<QQQQQIIII24x", 1 << 20, 0, 0, 1000, 1000, 4096, 255, 4096, 0)
        if operation in (_RELEASE, _RELEASEDIR, _FLUSH, _ACCESS):
            return b""
        raise OSError(errno.ENOSYS, "")

    def _attributes(self, node: int) -> bytes:
        if node == _ROOT:
            size, mode, seconds = 0, stat.S_IFDIR | 0o755, 0
        else:
            status = os.fstat(self._files[node - 2])
            size, mode, seconds = status.st_size, stat.S_IFREG | 0o644, int(status.st_mtime)
        return struct.pack("<QQQQQQIIIIIIIIII", node, size, -(-size // 512), seconds, seconds, seconds, 0, 0, 0, mode, 1,
                           0, 0, 0, 4096, 0)

    def _read(self, node: int, offset: int, size: int) -> bytes:
        end = 1 << 62
        is_hanging = True
        while is_hanging:
            is_hanging = False
            for kind, *numbers in (line.split() for line in self._control.read_text().splitlines()):
                values = [int(number) for number in numbers]
                touches = len(values) > 1 and offset < values[-1] and offset + size > values[-2]
                if kind == "end":
                    end = values[0]
                elif kind == "errno" and touches:
                    raise OSError(values[0], "as wished")
                elif kind == "hang" and touches:
                    is_hanging = True
            if is_hanging:
                self._control.with_suffix(".hanging").touch()
                time.sleep(0.02)
        return os.pread(self._files[node - 2], max(0, min(size, end - offset)), offset)


def main() -> None:
    source, folder, control, direct_io = sys.argv[1:]
    device = os.open("/dev/fuse", os.O_RDWR)
    server = _Server(Path(source), Path(control), direct_io == "1")
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"gguf_pager-test", os.fsencode(folder), b"fuse", 0, options.encode()) != 0:
        sys.exit(f"mount: {os.strerror(ctypes.get_errno())}")
    print("mounted", flush=True)
    server.serve(device)


if __name__ == "__main__":
    main()
