"""A double of TensorRT-LLM 1.2.1 as far as an adapter sees it: no GPU, no model, but every rule of the real API.

Put `tests/doubles` on PYTHONPATH. `trtllm_double.control.Switches` names the switches.
"""

from trtllm_double.control import control

control.on_import()
if control.switches().with_torch:
    import torch  # noqa: F401 - it comes with the package

from .disaggregated_params import DisaggregatedParams  # noqa: E402 - importing takes time, and may fail
from .llmapi import AsyncLLM, KvCacheConfig, TorchLlmArgs  # noqa: E402 - as above
from .llmapi.llm import LLM  # noqa: E402 - as above
from .mapping import Mapping  # noqa: E402 - as above
from .sampling_params import GuidedDecodingParams, LogitsProcessor, SamplingParams  # noqa: E402 - as above

__version__ = control.switches().version
__all__ = [
    "LLM",
    "AsyncLLM",
    "DisaggregatedParams",
    "GuidedDecodingParams",
    "KvCacheConfig",
    "LogitsProcessor",
    "Mapping",
    "SamplingParams",
    "TorchLlmArgs",
    "__version__",
]
