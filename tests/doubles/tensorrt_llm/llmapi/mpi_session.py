from __future__ import annotations

import os


class MpiCommSession:
    """Ranks that were started before (by mpirun): the job's size is what it is."""

    def __init__(self, comm: object = None, n_workers: int = 1) -> None:
        self.comm = comm
        rank, size = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0")), int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))
        if rank != 0:
            raise RuntimeError(f"only rank 0 can start multi-node session, got {rank}")
        if n_workers != size:
            raise ValueError(f"n_workers must be equal to the number of processes in MPI, got {n_workers} vs {size}")
        self.n_workers = n_workers
