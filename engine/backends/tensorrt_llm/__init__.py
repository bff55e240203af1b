"""The TensorRT-LLM backend: one engine a pipeline, in a child process; a new shape is a new engine."""
