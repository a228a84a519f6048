"""How the device that holds a model is read best: measured the first time it is met, and remembered."""

from __future__ import annotations

import datetime
import hashlib
import logging
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from gguf_pager import cache, kernel
from gguf_pager.disk import bandwidth
from gguf_pager.disk.bandwidth import Findings, Io, Way
from gguf_pager.errors import PagerError, printable
from gguf_pager.files import ModelFiles
from gguf_pager.model.layout import Layout
from gguf_pager.pager import DEFAULT_PIECE_BYTES, DEFAULT_READERS, Options

log = logging.getLogger("gguf_pager")

LEAST_EXPERT_BYTES = 1 << 30
"""Smaller models are not measured with: all of their experts are read in less time than the measuring takes."""

_VERSION = 2
"""Of what is remembered. Anything else that is found there is as good as nothing."""

# ---- which device ---------------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Device:
    """A disk or a remote file system: its name for people, and what it is known by after a reboot."""

    name: str
    identity: str

    @property
    def cache_name(self) -> str:
        """Where cache.py keeps what is remembered. A file each: processes that meet two devices at once lose neither."""
        return f"devices/{hashlib.sha256(os.fsencode(self.identity)).hexdigest()[:16]}.json"


def identify(path: Path, blocks: Path = Path("/sys/dev/block")) -> Device | None:
    """Return the device that holds a file; None if that cannot be told.

    A disk is known by what its maker or the volume manager has numbered it with, its model and its size, and by the type
    of the file system on it; names such as sda and the numbers in st_dev change. Where there is no such number, and for
    what is no disk (network, overlay), by what is mounted where. `blocks` is the kernel's table of disks.
    """
    try:
        where = path.resolve(strict=True)
        mount = max((mount for mount in psutil.disk_partitions(all=True) if where.is_relative_to(mount.mountpoint)),
                    key=lambda mount: len(mount.mountpoint))  # of equal ones max takes the first, which lies below the last
        number = where.stat().st_dev
    except (OSError, ValueError, RuntimeError):
        return None
    disk = _disk(blocks, number) or _disk(blocks, _special_number(mount.device))
    if disk is None:
        return Device(f"{mount.device} ({mount.fstype})", f"{mount.fstype} {mount.device} {mount.mountpoint}")
    numbers = [_read(disk / name) for name in ("wwid", "device/wwid", "device/serial", "serial", "dm/uuid", "md/uuid")]
    known = [number for number in numbers if number] or [mount.device, mount.mountpoint]
    model = _read(disk / "device/model")
    name = f"{disk.name}, {model}" if model else disk.name
    return Device(f"{name} ({mount.fstype})", " ".join([mount.fstype, model, _read(disk / "size"), *known]))


def _disk(blocks: Path, number: int) -> Path | None:
    node = (blocks / f"{os.major(number)}:{os.minor(number)}").resolve()
    return next((folder for folder in (node, node.parent) if (folder / "queue").is_dir()), None)  # of a partition: its disk


def _special_number(device: str) -> int:
    """Files of btrfs and ZFS have a st_dev that no disk has; the first may be mounted from one."""
    try:
        return os.stat(device).st_rdev
    except OSError:
        return 0


def _read(path: Path) -> str:
    try:
        return kernel.read_text(path).strip("\0 \n")
    except OSError:
        return ""


# ---- what is remembered ---------------------------------------------------------------------------------------------

def recall(device: Device) -> Findings | None:
    """Return what is remembered of a device; None if nothing is, or nothing that makes sense."""
    value = cache.read_json(device.cache_name)
    try:
        if value["version"] != _VERSION or value["identity"] != device.identity:
            return None
        findings = Findings(datetime.date.fromisoformat(value["date"]).isoformat(), *(
            _recall_way(io, value[io]) for io in ("direct", "buffered")))
    except (KeyError, TypeError, ValueError, PagerError):
        return None
    return findings if findings.direct or findings.buffered else None


def best_rate(path: Path) -> float | None:
    """Return the bytes per second that were measured of the device a file lies on; None where it was not."""
    here = identify(path)
    findings = recall(here) if here else None
    return max(way[1] for way in (findings.direct, findings.buffered) if way) if findings else None


def _recall_way(io: Io, value: Any) -> tuple[Way, float] | None:
    if value is None:
        return None
    way, rate = Way(io, value["n_readers"], value["piece_bytes"]), value["bytes_per_s"]
    if not all(type(number) is int for number in (way.n_readers, way.piece_bytes)) or (
            type(rate) not in (int, float) or not 0 < rate < 1e15):
        raise ValueError
    if way.n_readers > bandwidth.MOST_READERS or way.piece_bytes > bandwidth.MOST_PIECE_BYTES:
        raise ValueError  # no measurement of ours finds that
    Options(n_readers=way.n_readers, piece_bytes=way.piece_bytes)  # raises if they would not do
    return way, float(rate)


def remember(device: Device, findings: Findings | None) -> bool:
    """Keep what was found, or that nothing was yet. Return whether that was possible."""
    value = {"version": _VERSION, "device": device.name, "identity": device.identity}
    if findings is not None:
        value |= {"date": findings.date} | {
            io: found and {name: number for name, number in asdict(found[0]).items() if name != "io"} | {
                "bytes_per_s": round(found[1])}
            for io, found in (("direct", findings.direct), ("buffered", findings.buffered))}
    cache.write_json(device.cache_name, value)
    return bool(cache.read_json(device.cache_name) == value)


def meet(device: Device, layout: Layout, files: ModelFiles | None = None) -> Findings | None:
    """Measure a device and remember it. None, with the reason in the log, where nothing can be remembered or read.

    What cannot be remembered is not measured: it would be done for every model that is opened.
    """
    if not remember(device, None):
        log.info("%s is not measured, because %s cannot be written: set GGUF_PAGER_CACHE", printable(device.name),
                 printable(cache.cache_folder() or "the cache folder"))
        return None
    begun = time.monotonic()
    try:
        findings = bandwidth.measure(layout, files)
    except (PagerError, OSError) as error:
        log.info("%s could not be measured: %s", printable(device.name), error)
        return None
    remember(device, findings)
    log.info("%s, measured in %.1f s: %s", printable(device.name), time.monotonic() - begun, findings)
    return findings


def fill(layout: Layout, options: Options, files: ModelFiles | None = None) -> Options:
    """Return options with what they leave open as measured for the device that holds the model, or else the defaults.

    A device that is not known is measured if all three of io, n_readers and piece_bytes are left open and the model's
    experts are LEAST_EXPERT_BYTES or more. `files` are the model's, where it is open already.
    """
    usual = replace(options, n_readers=options.n_readers or DEFAULT_READERS,
                    piece_bytes=options.piece_bytes or DEFAULT_PIECE_BYTES)
    is_open = options.n_readers is None and options.piece_bytes is None
    if not is_open and options.io != "auto":
        return usual
    device = identify(Path(files[0].reopen_path) if files else layout.paths[0])
    findings = recall(device) if device else None
    if findings is None and device and is_open and options.io == "auto" and layout.expert_bytes >= LEAST_EXPERT_BYTES:
        findings = meet(device, layout, files)
    if findings is None:
        return usual
    io = findings.io if options.io == "auto" else options.io
    way = findings.best(io)
    if way is None:
        return usual
    if options.io == "auto" and io == "buffered":
        usual = replace(usual, io="buffered")
    return replace(usual, n_readers=way.n_readers, piece_bytes=way.piece_bytes) if is_open else usual
