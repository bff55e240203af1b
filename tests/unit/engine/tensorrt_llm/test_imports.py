from __future__ import annotations

import subprocess
import sys

CHECK = """
import sys
import engine.backends.tensorrt_llm.backend, engine.backends.tensorrt_llm.child, engine.backends.tensorrt_llm.llm
sys.exit(any(name.partition(".")[0] in ("tensorrt_llm", "mpi4py", "pynvml") for name in sys.modules))
"""


def test_the_rank_does_not_import_tensorrt_llm() -> None:
    assert subprocess.run([sys.executable, "-c", CHECK], timeout=60).returncode == 0
