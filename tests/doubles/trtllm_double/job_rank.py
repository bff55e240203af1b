"""One rank of a job that a launcher started: takes a GPU for the engine that asks for it, on a local socket.

argv: rank, socket. The engine says which lock file and how many bytes; the answer is `ready PID`, or what is wrong.
"""

import fcntl
import json
import os
import socket
import sys
from pathlib import Path


def main() -> int:
    path = sys.argv[2]
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path + ".new")
        server.listen()
        Path(path + ".new").rename(path)
        connection, _ = server.accept()
    with connection, connection.makefile("rw") as stream:
        lock_path, used_bytes = json.loads(stream.readline())
        handle = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.write("CUDA out of memory: the GPU is in use by another process\n")
            return 1
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"pid": os.getpid(), "used_bytes": used_bytes}).encode(), 0)
        stream.write(f"ready {os.getpid()}\n")
        stream.flush()
        return 0 if stream.readline().strip() == "stop" else 1


if __name__ == "__main__":
    sys.exit(main())
