"""Behind the doubles of `tensorrt_llm` and `pynvml`: switches, journal, GPUs and worker processes."""
