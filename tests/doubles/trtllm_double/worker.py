"""A worker process: holds one GPU from its start until it ends. Standard library only, so that it starts at once.

argv: lock file, bytes used, seconds to linger once the parent is gone. Says `ready`, or what is wrong.
"""

import fcntl
import json
import os
import sys
import time


def main() -> int:
    path, used_bytes, linger_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("CUDA out of memory: the GPU is in use by another process", flush=True)
        return 1
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps({"pid": os.getpid(), "used_bytes": used_bytes}).encode(), 0)
    print("ready", flush=True)
    word = sys.stdin.readline()
    if word.strip() != "stop":
        time.sleep(linger_s)  # The parent was killed.
    return 0


if __name__ == "__main__":
    sys.exit(main())
