"""Mounts a folder read-only behind a latency and a bandwidth, as a network disk has them. Needs root and /dev/fuse.

    python benchmarks/slow_disk.py FOLDER MOUNT_POINT --latency-ms 5 --mb-per-s 400

Every read takes its bytes' share of the bandwidth, one after the other, and then the latency; any number of reads wait
at once. Kernel read-ahead, page cache and mmap work as on any file system. It runs until its standard input ends, then
unmounts. The requests read so far and their bytes are the extended attribute `user.reads` of any file.

It speaks the kernel's FUSE protocol (include/uapi/linux/fuse.h, version 7.31) itself, as far as reading needs it.
"""

import argparse
import ctypes
import errno
import heapq
import os
import signal
import struct
import sys
import threading
import time
from pathlib import Path

LOOKUP, FORGET, GETATTR, OPEN, READ, RELEASE, GETXATTR, FLUSH, INIT = 1, 2, 3, 14, 15, 18, 22, 25, 26
INTERRUPT, BATCH_FORGET = 36, 42
UNANSWERED = (FORGET, INTERRUPT, BATCH_FORGET)
ASYNC_READ, MAX_PAGES = 1 << 0, 1 << 22  # of INIT's flags
KEEP_CACHE = 1 << 1  # of OPEN's flags: the page cache outlives the file descriptor
IN, OUT = struct.Struct("<IIQQIIII"), struct.Struct("<IiQ")  # headers
ATTRIBUTES = struct.Struct("<6Q10I")
LARGEST = 1 << 17  # bytes of a read, the kernel's default read-ahead
WAITING = 64  # reads that the kernel sends before it waits for an answer
VALID = 1 << 20  # seconds for which the kernel may cache names and attributes
XATTR = b"user.reads"


class SlowDisk:
    def __init__(self, folder: Path, connection: int, latency: float, rate: float):
        self.connection, self.latency, self.rate = connection, latency, rate
        self.paths = {1: folder}  # by node
        self.nodes = {folder: 1}
        self.files: dict[int, int] = {}  # descriptor by node
        self.due: list[tuple[float, int, int, int, int]] = []  # (time, request, descriptor, offset, size)
        self.changed = threading.Condition()
        self.free = 0.0  # when the last transfer ends
        self.reads = self.bytes = 0

    def answer(self, request: int, data: bytes = b"", error: int = 0) -> None:
        os.write(self.connection, OUT.pack(OUT.size + len(data), -error, request) + data)

    def serve(self) -> None:
        threading.Thread(target=self.send, daemon=True).start()
        while True:
            try:
                message = os.read(self.connection, 1 << 20)
            except OSError as gone:
                if gone.errno == errno.ENODEV:  # unmounted
                    return
                continue
            _, code, request, node, *_ = IN.unpack_from(message)
            if code not in UNANSWERED:
                try:
                    self.handle(code, request, node, message[IN.size :])
                except OSError as error:
                    self.answer(request, error=error.errno or errno.EIO)

    def handle(self, code: int, request: int, node: int, body: bytes) -> None:
        if code == INIT:
            values = (7, 31, LARGEST, ASYNC_READ | MAX_PAGES, WAITING, WAITING, LARGEST, 1, LARGEST // 4096, 0, 0)
            self.answer(request, struct.pack("<4I2H2I2HI28x", *values))
        elif code == LOOKUP:
            path = self.paths[node] / os.fsdecode(body.rstrip(b"\0"))
            status = path.lstat()
            found = self.nodes.setdefault(path, len(self.nodes) + 1)
            self.paths[found] = path
            self.answer(request, struct.pack("<4Q2I", found, 0, VALID, VALID, 0, 0) + attributes(found, status))
        elif code == GETATTR:
            self.answer(request, struct.pack("<QII", VALID, 0, 0) + attributes(node, self.paths[node].lstat()))
        elif code == OPEN:
            if node not in self.files:
                self.files[node] = os.open(self.paths[node], os.O_RDONLY)
            self.answer(request, struct.pack("<QII", 0, KEEP_CACHE, 0))
        elif code == READ:
            _, offset, size = struct.unpack_from("<QQI", body)
            self.read(request, self.files[node], offset, size)
        elif code in (RELEASE, FLUSH):
            self.answer(request)
        elif code == GETXATTR and body[8:].rstrip(b"\0") == XATTR:
            value = f"{self.reads} {self.bytes}".encode()
            room = struct.unpack_from("<I", body)[0]
            self.answer(request, value if room else struct.pack("<II", len(value), 0))
        else:
            self.answer(request, error=errno.ENODATA if code == GETXATTR else errno.ENOSYS)

    def read(self, request: int, file: int, offset: int, size: int) -> None:
        self.reads, self.bytes = self.reads + 1, self.bytes + size
        with self.changed:
            self.free = max(self.free, time.monotonic()) + size / self.rate
            heapq.heappush(self.due, (self.free + self.latency, request, file, offset, size))
            self.changed.notify()

    def send(self) -> None:
        while True:
            with self.changed:
                while not self.due or (wait := self.due[0][0] - time.monotonic()) > 0:
                    self.changed.wait(wait if self.due else None)
                _, request, file, offset, size = heapq.heappop(self.due)
            self.answer(request, os.pread(file, size, offset))


def attributes(node: int, status: os.stat_result) -> bytes:
    times = [int(at) for at in (status.st_atime, status.st_mtime, status.st_ctime)]
    owner = (status.st_mode, status.st_nlink, status.st_uid, status.st_gid)
    return ATTRIBUTES.pack(node, status.st_size, status.st_blocks, *times, 0, 0, 0, *owner, 0, 4096, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("mount_point", type=Path)
    parser.add_argument("--latency-ms", type=float, default=5)
    parser.add_argument("--mb-per-s", type=float, default=400)
    given = parser.parse_args()
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        connection = os.open("/dev/fuse", os.O_RDWR)
    except OSError as error:
        sys.exit(f"cannot open /dev/fuse: {error.strerror}")
    options = f"fd={connection},rootmode=40000,user_id=0,group_id=0,max_read={LARGEST}".encode()
    if libc.mount(b"slow", os.fsencode(given.mount_point), b"fuse.slow", 1, options):  # 1: read-only
        sys.exit(f"cannot mount a FUSE file system: {os.strerror(ctypes.get_errno())}")
    disk = SlowDisk(given.folder.resolve(), connection, given.latency_ms / 1e3, given.mb_per_s * 1e6)
    server = threading.Thread(target=disk.serve, daemon=True)
    server.start()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        print("mounted", flush=True)
        sys.stdin.read()
    finally:
        libc.umount2(os.fsencode(given.mount_point), 2)  # 2: detach, although files may be open


if __name__ == "__main__":
    main()
