"""Two threads, each with a file on a volume of its own, write and fsync; the rounds of the slower one are noted."""

import os
import threading
import time

rounds = [0, 0]


def write(at, path):
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    while True:
        os.pwrite(fd, rounds[at].to_bytes(8, "little") * 512, 0)
        os.fsync(fd)
        rounds[at] += 1


for at, path in enumerate(["/srv/vol0/two", "/srv/vol1/two"]):
    threading.Thread(target=write, args=(at, path), daemon=True).start()
with open("/host/rounds", "a") as log:
    while True:
        time.sleep(0.1)
        log.write(f"{min(rounds)}\n")
        log.flush()
