# Writes from pages that another thread throws away meanwhile: what the hook finds of them is not what
# the file got. Prints how many writes there were.
import mmap, os, sys, threading

BYTES = 128 * 1024
path, writes = sys.argv[1], int(sys.argv[2])
buffer = mmap.mmap(-1, BYTES)
buffer.write(b"\xa5" * BYTES)
done = False


def throw_away():
    while not done:
        buffer.madvise(mmap.MADV_DONTNEED)


thread = threading.Thread(target=throw_away)
thread.start()
descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
for number in range(writes):
    os.pwrite(descriptor, buffer, number * BYTES)
done = True
thread.join()
print(writes)
