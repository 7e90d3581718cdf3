"""What programs do below a protected directory, outside of it and across its border.

The first argument names the function; it says on standard error what is not as it should be, and then fails.
Nothing here asks the volume for durability but what `gate` runs.
"""

import ctypes
import errno
import mmap
import os
import runpy
import subprocess
import sys
import time

libc = ctypes.CDLL(None, use_errno=True)
HERE, FOLLOW = -100, 0x400
NOREPLACE, EXCHANGE = 1, 2
KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE = 1, 2, 8
PAGE = 4096
BLOCK = 512
LEVELS = 100
# A file that has a name on both sides, for which nothing is protected.
CROSSED = "crossed"
# One that has two names inside.
TWICE = ("twice", "before/below/twice")
# What an fsync and its like of a file outside must not wait for.
OUTSIDE_CALLS = (
    "fsync",
    "fdatasync",
    "directory",
    "range-waits",
    "o-sync",
    "o-dsync",
    "rwf-dsync",
    "msync",
    "o-direct-dsync",
)


def checked(result, what):
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def renameat2(old, new, flags):
    checked(libc.renameat2(HERE, old.encode(), HERE, new.encode(), flags), old)


def link_open_file(fd, new):
    """By the system call itself: `os.link` would link the entry of /proc, to which EXDEV is the answer anyway."""
    checked(libc.linkat(HERE, f"/proc/self/fd/{fd}".encode(), HERE, new.encode(), FOLLOW), new)


def fallocate(fd, mode, at, length):
    at, length = ctypes.c_longlong(at), ctypes.c_longlong(length)
    checked(libc.fallocate(fd, mode, at, length), "fallocate")


def put(path, tag, count=1, at=0, flags=0):
    """Opens a file and writes so many blocks, one call each."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o644)
    for number in range(count):
        write_block(fd, tag, number, at)
    return fd


def write_block(fd, tag, number=0, at=0):
    block = f"{tag} {number:06} ".encode().ljust(BLOCK, b".")
    assert os.pwrite(fd, block, at + number * BLOCK) == BLOCK


def content(path):
    with open(path, "rb") as file:
        return file.read()


def unnamed_file(top):
    fd = os.open(top, os.O_TMPFILE | os.O_RDWR, 0o600)
    write_block(fd, "without a name")
    return fd


def prepare(mount, kept):
    """What is there before the protection; the directory appears with all of it at once."""
    outside, unready = f"{mount}/outside", f"{mount}/unready"
    os.mkdir(outside)
    os.makedirs(f"{unready}/before/below")
    put(f"{unready}/before/below/file", "before", 100)
    put(f"{unready}/by-handle", "before", 100)
    put(f"{unready}/{TWICE[0]}", "before", 100)
    os.link(f"{unready}/{TWICE[0]}", f"{unready}/{TWICE[1]}")
    put(f"{unready}/{CROSSED}", "before", 100)
    os.link(f"{unready}/{CROSSED}", f"{outside}/{CROSSED}")
    hold(f"{outside}/held", f"{unready}/held")
    os.rename(unready, kept)


def hold(outside, inside):
    """A process keeps a file open by a name outside that it has no longer, and writes it when it is told to, while
    its name inside is not in memory."""
    fd = put(outside, "before", 100)
    os.link(outside, inside)
    os.unlink(outside)
    if os.fork() != 0:
        return
    os.setsid()
    for stream in range(3):
        os.dup2(os.open("/dev/null", os.O_RDWR), stream)
    while not os.path.exists("/run/held-go"):
        time.sleep(0.05)
    forget()
    for number in range(50):
        write_block(fd, "held", number)
    open("/run/held-done", "w").close()
    os._exit(0)


def write(path, tag, count):
    put(path, tag, int(count))


def forget():
    """Takes all names that nobody uses out of the kernel's memory."""
    for _ in range(2):
        with open("/proc/sys/vm/drop_caches", "w") as file:
            file.write("2\n")


def write_forgotten(path, tag, count):
    """Writes a file while no other name of it is in memory."""
    forget()
    put(path, tag, int(count))


class FileHandle(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_uint), ("type", ctypes.c_int), ("handle", ctypes.c_ubyte * 128)]


def write_by_handle(mount, path, tag, count):
    """Writes a file that was opened by its handle while no name of it is in memory; prints its path as the kernel
    knows it then."""
    handle, mount_id = FileHandle(bytes=128), ctypes.c_int()
    got = libc.name_to_handle_at(
        HERE, path.encode(), ctypes.byref(handle), ctypes.byref(mount_id), 0
    )
    checked(got, path)
    forget()
    mounted = os.open(mount, os.O_RDONLY | os.O_DIRECTORY)
    fd = checked(libc.open_by_handle_at(mounted, ctypes.byref(handle), os.O_RDWR), path)
    for number in range(int(count)):
        write_block(fd, tag, number)
    print(os.readlink(f"/proc/self/fd/{fd}"))


def work(top, writes):
    """Changes of every kind, in a new directory."""
    os.mkdir(top)
    put(f"{top}/plain", "plain", int(writes))
    deep(top)
    names(top)
    moved_while_open(top)
    attributes(top)
    sizes(top)
    mapped(top)
    written = unnamed_file(top)
    link_open_file(written, f"{top}/got-a-name")
    write_block(written, "with a name", 1)
    unnamed_file(top)


def work_unprotected(top, writes):
    """The same, and what would end the protection below a protected directory."""
    work(top, writes)
    pages = mmap.mmap(-1, PAGE)
    pages.write(b"D" * PAGE)
    direct = os.open(f"{top}/direct", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o644)
    assert os.pwritev(direct, [pages], 0) == PAGE
    fd = put(f"{top}/collapsed", "collapsed", 4 * PAGE // BLOCK)
    try:
        fallocate(fd, COLLAPSE_RANGE, PAGE, PAGE)
    except OSError as error:
        # A btrfs cannot.
        assert error.errno == errno.EOPNOTSUPP, error


def deep(top):
    path = f"{top}/deep"
    os.mkdir(path)
    for level in range(LEVELS):
        path += f"/{level:03}"
        os.mkdir(path)
    put(f"{path}/file", "at the bottom", 20)
    os.rename(f"{path}/file", f"{path}/bottom")
    os.chmod(f"{path}/bottom", 0o640)
    os.rename(f"{path}/bottom", f"{top}/from-the-bottom")
    put(f"{path}/file", "at the bottom again", 20)


def names(top):
    for name in ("one", "two", "three", "left", "right", "gone"):
        put(f"{top}/{name}", name)
    os.rename(f"{top}/one", f"{top}/renamed")
    os.rename(f"{top}/two", f"{top}/renamed")
    os.link(f"{top}/three", f"{top}/linked")
    put(f"{top}/linked", "through another name", at=PAGE)
    os.symlink("three", f"{top}/symlink")
    os.symlink("s" * 1000, f"{top}/long-symlink")
    os.mkfifo(f"{top}/fifo")
    renameat2(f"{top}/left", f"{top}/right", EXCHANGE)
    put(f"{top}/left", "after the exchange", at=PAGE)
    os.mkdir(f"{top}/directory")
    renameat2(f"{top}/directory", f"{top}/right", EXCHANGE)
    put(f"{top}/right/file", "in what was exchanged")
    renameat2(f"{top}/renamed", f"{top}/renamed-again", NOREPLACE)
    os.unlink(f"{top}/gone")
    os.mkdir(f"{top}/emptied")
    os.rmdir(f"{top}/emptied")
    unlinked = put(f"{top}/unlinked", "unlinked")
    os.unlink(f"{top}/unlinked")
    write_block(unlinked, "without a name", 1)


def moved_while_open(top):
    os.makedirs(f"{top}/house/room")
    fd = put(f"{top}/house/room/file", "before its directory moves")
    os.rename(f"{top}/house", f"{top}/new-house")
    write_block(fd, "through the old descriptor", 1)
    os.rename(f"{top}/new-house/room", f"{top}/deep/000/room")
    write_block(fd, "through the old descriptor", 2)


def attributes(top):
    put(f"{top}/attributes", "attributes")
    os.mkdir(f"{top}/attributed")
    for path in (f"{top}/attributes", f"{top}/attributed"):
        os.chmod(path, 0o751)
        os.chown(path, 1000, 1000)
        os.setxattr(path, "user.kept", b"value of " + path.encode())
        os.setxattr(path, "user.removed", b"value")
        os.removexattr(path, "user.removed")
        os.utime(path, ns=(10**18, 10**18 + 7))


def sizes(top):
    fd = put(f"{top}/shorter", "shorter", 40)
    os.ftruncate(fd, 5000)
    put(f"{top}/longer", "longer", 2)
    os.truncate(f"{top}/longer", 100_000)
    fd = put(f"{top}/hole", "hole", 4 * PAGE // BLOCK)
    fallocate(fd, KEEP_SIZE | PUNCH_HOLE, PAGE, PAGE)
    fd = os.open(f"{top}/appended", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in range(10):
        os.write(fd, f"line {number}\n".encode())
    fd = os.open(f"{top}/sent", os.O_WRONLY | os.O_CREAT, 0o644)
    plain = os.open(f"{top}/plain", os.O_RDONLY)
    assert os.sendfile(fd, plain, 0, 3 * PAGE) == 3 * PAGE


def mapped(top):
    fd = put(f"{top}/mapped", "mapped", 3 * PAGE // BLOCK)
    pages = mmap.mmap(fd, 3 * PAGE)
    pages[10:16] = b"stored"
    pages[2 * PAGE : 2 * PAGE + 6] = b"stored"
    pages.close()


def furnish(top):
    os.makedirs(f"{top}/directory/below")
    os.mkdir(f"{top}/empty")
    put(f"{top}/file", top)
    put(f"{top}/directory/below/file", top)
    os.symlink("file", f"{top}/symlink")
    os.mkfifo(f"{top}/fifo")


def listing(top):
    found = []
    for directory, directories, files in os.walk(top):
        for name in directories + files:
            path = f"{directory}/{name}"
            info = os.lstat(path)
            found.append((path, info.st_ino, info.st_nlink, info.st_mode, info.st_size))
    return sorted(found)


def crossings(here, there):
    """What must be refused."""

    def rename(old, new):
        return lambda: os.rename(f"{here}/{old}", f"{there}/{new}")

    def exchange(old, new):
        return lambda: renameat2(f"{here}/{old}", f"{there}/{new}", EXCHANGE)

    yield "rename a file", rename("file", "new")
    yield "rename a file over another", rename("file", "file")
    yield "rename a file below", rename("directory/below/file", "directory/below/new")
    yield "rename a symlink", rename("symlink", "new")
    yield "rename a fifo", rename("fifo", "new")
    yield "rename a directory", rename("directory", "new")
    yield "rename a directory over another", rename("directory", "empty")
    yield "rename without replacing", lambda: renameat2(f"{here}/file", f"{there}/new", NOREPLACE)
    yield "exchange files", exchange("file", "file")
    yield "exchange directories", exchange("directory", "empty")
    yield "exchange a file and a directory", exchange("file", "directory")
    yield "exchange a directory and a file", exchange("directory", "file")
    yield "link a file", lambda: os.link(f"{here}/file", f"{there}/new")
    yield "link a symlink", lambda: os.link(
        f"{here}/symlink", f"{there}/new", follow_symlinks=False
    )
    yield "link what has no name", lambda: link_open_file(unnamed_file(here), f"{there}/new")


def border(kept, outside):
    """Nothing crosses it but by a copy. Prints how many calls were refused."""
    mount, away = os.path.dirname(kept), f"{os.path.dirname(kept)}/away"
    inner, outer = f"{kept}/border", f"{outside}/border"
    for top in (inner, outer):
        furnish(top)
    os.mkdir(f"{outside}/empty")
    calls = [(f"in: {what}", call) for what, call in crossings(outer, inner)]
    calls += [(f"out: {what}", call) for what, call in crossings(inner, outer)]
    calls += [
        ("out: rename to the top", lambda: os.rename(f"{inner}/file", f"{mount}/new")),
        ("out: link to the top", lambda: os.link(f"{inner}/file", f"{mount}/new")),
    ]
    # As if something were mounted there.
    busy = [
        ("rename the top", lambda: os.rename(kept, away)),
        ("exchange the top", lambda: renameat2(kept, outside, EXCHANGE)),
        ("rename over the top", lambda: os.rename(f"{outside}/empty", kept)),
        ("remove the top", lambda: os.rmdir(kept)),
    ]
    before = listing(inner), listing(outer)
    wrong = []
    for what, call in calls + busy:
        try:
            call()
            wrong.append(f"{what}: done")
        except OSError as error:
            if error.errno != (errno.EXDEV if (what, call) in calls else errno.EBUSY):
                wrong.append(f"{what}: {error}")
    if (listing(inner), listing(outer)) != before or os.path.lexists(f"{mount}/new") or os.path.lexists(away):
        wrong.append(f"names changed: {before} became {listing(inner)}, {listing(outer)}")
    if wrong:
        sys.exit("\n".join(wrong))
    move(outer, inner)
    move(inner, outer)
    print(len(calls + busy))


def move(here, there):
    """mv(1) falls back to a copy."""
    os.mkdir(f"{here}/tree")
    for path in ("moving", "tree/one", "tree/two"):
        put(f"{here}/{path}", f"moved from {here}", 100)
    expected = content(f"{here}/moving"), content(f"{here}/tree/two")
    subprocess.run(["mv", f"{here}/moving", f"{here}/tree", there], check=True)
    found = content(f"{there}/moving"), content(f"{there}/tree/two")
    assert found == expected, "a moved file has other bytes"
    assert sorted(os.listdir(f"{there}/tree")) == ["one", "two"], "a moved tree has other names"
    left = [name for name in ("moving", "tree") if os.path.exists(f"{here}/{name}")]
    assert not left, f"mv left {left} in {here}"
    # The next move, the other way, finds the names free.
    for name in ("moving", "tree"):
        os.rename(f"{there}/{name}", f"{there}/{name}-arrived")


def gate(kept, outside, go, answered):
    """Processes that each make one call which confirms data, once `go` is there; then each makes a file in
    `answered`."""
    calls = [("outside", call, outside) for call in OUTSIDE_CALLS]
    # Whatever it is called with, it confirms all of the volume.
    calls += [("inside", "fsync", kept), ("inside", "syncfs", outside)]
    for side, call, top in calls:
        if os.fork() == 0:
            while not os.path.exists(go):
                time.sleep(0.02)
            sys.argv = ["gate_calls.py", call, f"{top}/call-{call}"]
            runpy.run_path("/host/gate_calls.py")
            open(f"{answered}/{side}-{call}", "w").close()
            os._exit(0)
    print(f"{len(OUTSIDE_CALLS)} outside", flush=True)
    for _ in calls:
        os.wait()


globals()[sys.argv[1]](*sys.argv[2:])
