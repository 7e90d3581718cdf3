"""Goes on with one call that makes data durable, and notes each number that was answered.

Usage: gate_nfs.py KIND PATH LOG FROM [COUNT]
"""

import os
import sys

kind, path, log, first = sys.argv[1:5]
first = int(first)
count = int(sys.argv[5]) if len(sys.argv) > 5 else 1 << 62
BLOCK = 4096


def block(number):
    return f"{number}\n".encode().ljust(BLOCK, b".")


def file(flags=0):
    return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o600)


def write_and_fsync(fd, number):
    os.pwrite(fd, block(number), 0)
    os.fsync(fd)


def write(fd, number):
    os.pwrite(fd, block(number), 0)


def make_directory(_, number):
    os.mkdir(f"{path}/{number}")


opened, step = {
    "fsync": (file, write_and_fsync),
    "o-sync": (lambda: file(os.O_SYNC), write),
    "plain": (file, write),
    "mkdir": (lambda: os.makedirs(path, exist_ok=True), make_directory),
}[kind]

descriptor = opened()
with open(log, "a") as answered:
    for number in range(first, first + count):
        step(descriptor, number)
        print(number, file=answered, flush=True)
