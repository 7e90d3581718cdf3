"""One call that confirms data, on a file of the volume: says "ready", then "answered" once it returned."""

import ctypes
import mmap
import os
import sys

call, path = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
BLOCK = b"\x5a" * 4096


def checked(result):
    if result != 0:
        raise OSError(ctypes.get_errno(), call)


def written(flags=0):
    fd = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o600)
    if not flags:
        os.pwrite(fd, BLOCK, 0)
    return fd


def direct(flags):
    buffer = mmap.mmap(-1, 4096)
    buffer.write(BLOCK)
    os.pwritev(written(os.O_DIRECT | flags), [buffer], 0)


def mapped(fd):
    os.ftruncate(fd, 4096)
    pages = mmap.mmap(fd, 4096)
    pages[:5] = b"store"
    pages.flush()


def ranged(fd, flags):
    at, length = ctypes.c_longlong(0), ctypes.c_longlong(0)
    checked(libc.sync_file_range(fd, at, length, flags))


CALLS = {
    "write": lambda: written(),
    "fsync": lambda: os.fsync(written()),
    "fdatasync": lambda: os.fdatasync(written()),
    "directory": lambda: (written(), os.fsync(os.open(os.path.dirname(path), os.O_RDONLY))),
    "sync": lambda: (written(), os.sync()),
    "syncfs": lambda: checked(libc.syncfs(written())),
    "range-waits": lambda: ranged(written(), 1 | 2 | 4),
    "range-starts": lambda: ranged(written(), 2),
    "o-sync": lambda: os.pwrite(written(os.O_SYNC), BLOCK, 0),
    "o-dsync": lambda: os.pwrite(written(os.O_DSYNC), BLOCK, 0),
    "rwf-dsync": lambda: os.pwritev(written(), [BLOCK], 0, os.RWF_DSYNC),
    "msync": lambda: mapped(written()),
    "o-direct": lambda: direct(0),
    "o-direct-dsync": lambda: direct(os.O_DSYNC),
}

print("ready", flush=True)
CALLS[call]()
print("answered", flush=True)
