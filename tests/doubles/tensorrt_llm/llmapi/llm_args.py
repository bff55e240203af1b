"""Arguments of `LLM`: pydantic models that refuse what they do not know, with the defaults of 1.2.1."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from trtllm_double import gpus
from trtllm_double.control import control

AllReduceStrategy = Literal[
    "AUTO", "NCCL", "UB", "MINLATENCY", "ONESHOT", "TWOSHOT", "LOWPRECISION", "MNNVL", "NCCL_SYMMETRIC"
]


class StrictBaseModel(BaseModel):
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())


class CapacitySchedulerPolicy(StrEnum):
    MAX_UTILIZATION = "MAX_UTILIZATION"
    GUARANTEED_NO_EVICT = "GUARANTEED_NO_EVICT"
    STATIC_BATCH = "STATIC_BATCH"


class ContextChunkingPolicy(StrEnum):
    FIRST_COME_FIRST_SERVED = "FIRST_COME_FIRST_SERVED"
    EQUAL_PROGRESS = "EQUAL_PROGRESS"


class LoadFormat(StrEnum):
    AUTO = "AUTO"
    DUMMY = "DUMMY"
    VISION_ONLY = "VISION_ONLY"


class SamplerType(StrEnum):
    TRTLLMSampler = "TRTLLMSampler"
    TorchSampler = "TorchSampler"
    auto = "auto"


class _Opaque(StrictBaseModel):
    """A config that no adapter of ours gives: only its class is there."""


class LoraConfig(_Opaque): ...


class PeftCacheConfig(_Opaque): ...


class SparseAttentionConfig(_Opaque): ...


class SpeculativeConfig(_Opaque): ...


class AttentionDpConfig(_Opaque): ...


class MoeConfig(_Opaque): ...


class Nvfp4GemmConfig(_Opaque): ...


class DynamicBatchConfig(StrictBaseModel):
    enable_batch_size_tuning: bool
    enable_max_num_tokens_tuning: bool
    dynamic_batch_moving_average_window: int


class KvCacheConfig(StrictBaseModel):
    enable_block_reuse: bool = True
    max_tokens: int | None = None
    max_attention_window: list[int] | None = Field(default=None, min_length=1)
    sink_token_length: int | None = None
    free_gpu_memory_fraction: float | None = 0.9
    host_cache_size: int | None = None
    onboard_blocks: bool = True
    cross_kv_cache_fraction: float | None = None
    secondary_offload_min_priority: int | None = None
    event_buffer_max_size: int = 0
    attention_dp_events_gather_period_ms: int = 5
    enable_partial_reuse: bool = True
    copy_on_partial_reuse: bool = True
    use_uvm: bool = False
    max_gpu_total_bytes: int = Field(default=0, ge=0)
    dtype: str = "auto"
    mamba_ssm_cache_dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    tokens_per_block: int = 32

    @field_validator("free_gpu_memory_fraction")
    @classmethod
    def _fraction(cls, value: float | None) -> float | None:
        if value is not None and not 0 <= value <= 1:
            raise ValueError("kv_cache_config.free_gpu_memory_fraction must be a float between 0 and 1")
        return value


class SchedulerConfig(StrictBaseModel):
    capacity_scheduler_policy: CapacitySchedulerPolicy = CapacitySchedulerPolicy.GUARANTEED_NO_EVICT
    context_chunking_policy: ContextChunkingPolicy | None = None
    dynamic_batch_config: DynamicBatchConfig | None = None


class CacheTransceiverConfig(StrictBaseModel):
    backend: Literal["DEFAULT", "UCX", "NIXL", "MOONCAKE", "MPI"] | None = None
    max_tokens_in_buffer: int | None = None
    kv_transfer_timeout_ms: int | None = Field(default=None, gt=0)
    kv_transfer_sender_future_timeout_ms: int | None = Field(default=1000, gt=0)


class TorchCompileConfig(StrictBaseModel):
    enable_fullgraph: bool = True
    enable_inductor: bool = False
    enable_piecewise_cuda_graph: bool = False
    capture_num_tokens: list[int] | None = None
    enable_userbuffers: bool = True
    max_num_streams: int = Field(default=1, ge=1)


class CudaGraphConfig(StrictBaseModel):
    batch_sizes: list[int] | None = None
    max_batch_size: int = Field(default=0, ge=0)
    enable_padding: bool = False


class KvCacheConnectorConfig(StrictBaseModel):
    connector_module: str
    connector_scheduler_class: str
    connector_worker_class: str


class RayPlacementConfig(StrictBaseModel):
    defer_workers_init: bool = False
    placement_groups: list[Any] | None = None
    placement_bundle_indices: list[list[int]] | None = None
    per_worker_gpu_share: float | None = None


class BaseLlmArgs(StrictBaseModel):
    model_config = ConfigDict(
        extra="forbid", arbitrary_types_allowed=True, protected_namespaces=(), validate_by_name=True
    )

    model: str | Path
    tokenizer: Any = None
    tokenizer_mode: Literal["auto", "slow"] = "auto"
    custom_tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    tensor_parallel_size: int = 1
    dtype: str = "auto"
    revision: str | None = None
    tokenizer_revision: str | None = None
    pipeline_parallel_size: int = 1
    context_parallel_size: int = 1
    gpus_per_node: int | None = None
    moe_cluster_parallel_size: int | None = None
    moe_tensor_parallel_size: int | None = None
    moe_expert_parallel_size: int | None = None
    enable_attention_dp: bool = False
    enable_lm_head_tp_in_adp: bool = False
    pp_partition: list[int] | None = None
    cp_config: dict[str, Any] | None = Field(default_factory=dict)
    load_format: Literal["auto", "dummy"] = "auto"
    fail_fast_on_attention_window_too_large: bool = False
    enable_lora: bool = False
    lora_config: LoraConfig | None = None
    kv_cache_config: KvCacheConfig = Field(default_factory=KvCacheConfig)
    enable_chunked_prefill: bool = False
    guided_decoding_backend: Literal["xgrammar", "llguidance"] | None = None
    batched_logits_processor: object | None = None
    iter_stats_max_iterations: int | None = None
    request_stats_max_iterations: int | None = None
    peft_cache_config: PeftCacheConfig | None = None
    scheduler_config: SchedulerConfig = Field(default_factory=SchedulerConfig)
    cache_transceiver_config: CacheTransceiverConfig | None = None
    sparse_attention_config: SparseAttentionConfig | None = None
    speculative_config: SpeculativeConfig | None = None
    max_batch_size: int | None = None
    max_input_len: int | None = None
    max_seq_len: int | None = None
    max_beam_width: int | None = None
    max_num_tokens: int | None = 8192
    gather_generation_logits: bool = False
    num_postprocess_workers: int = 0
    postprocess_tokenizer_dir: str | None = None
    reasoning_parser: str | None = None
    decoding_config: object | None = None
    mpi_session: object | None = Field(default=None, alias="_mpi_session", exclude=True)
    otlp_traces_endpoint: str | None = None
    backend: str | None = None
    return_perf_metrics: bool = False
    orchestrator_type: Literal["rpc", "ray"] | None = None
    env_overrides: dict[str, str] | None = None

    @field_validator("dtype")
    @classmethod
    def _dtype(cls, value: str) -> str:
        if not gpus.visible():
            raise RuntimeError("Found no NVIDIA driver on your system.")  # torch.cuda.get_device_properties(0)
        if value not in ("auto", "float16", "bfloat16", "float32", "half"):
            raise ValueError(f"dtype {value} is not supported")
        return value

    @field_validator("gpus_per_node")
    @classmethod
    def _gpus_per_node(cls, value: int | None) -> int:
        return value if value is not None else len(gpus.visible())

    @property
    def world_size(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.context_parallel_size


class TorchLlmArgs(BaseLlmArgs):
    garbage_collection_gen0_threshold: int = 20000
    cuda_graph_config: CudaGraphConfig | None = Field(default_factory=CudaGraphConfig)
    attention_dp_config: AttentionDpConfig | None = None
    disable_overlap_scheduler: bool = False
    moe_config: MoeConfig = Field(default_factory=MoeConfig)
    nvfp4_gemm_config: Nvfp4GemmConfig = Field(default_factory=Nvfp4GemmConfig)
    attn_backend: str = "TRTLLM"
    sampler_type: str | SamplerType = SamplerType.auto
    sampler_force_async_worker: bool = False
    enable_iter_perf_stats: bool = False
    enable_iter_req_stats: bool = False
    print_iter_log: bool = False
    perf_metrics_max_requests: int = 0
    batch_wait_timeout_ms: float = 0
    batch_wait_timeout_iters: int = 0
    batch_wait_max_tokens_ratio: float = 0
    torch_compile_config: TorchCompileConfig | None = None
    enable_autotuner: bool = True
    enable_layerwise_nvtx_marker: bool = False
    load_format: str | LoadFormat = LoadFormat.AUTO  # type: ignore[assignment] # wider than the base class, as there
    enable_min_latency: bool = False
    stream_interval: int = Field(default=1, gt=0)
    force_dynamic_quantization: bool = False
    allreduce_strategy: AllReduceStrategy | None = "AUTO"
    checkpoint_loader: object | None = None
    checkpoint_format: str | None = None
    kv_connector_config: KvCacheConnectorConfig | None = None
    mm_encoder_only: bool = False
    ray_worker_extension_cls: str | None = None
    ray_placement_config: RayPlacementConfig | None = Field(default=None, exclude=True)
    enable_sleep: bool = False
    disable_flashinfer_sampling: bool = False
    max_stats_len: int = 1000

    @field_validator("load_format", mode="before")
    @classmethod
    def _load_format(cls, value: object) -> object:
        if isinstance(value, str) and not isinstance(value, LoadFormat):
            if value.upper() not in LoadFormat.__members__:
                raise ValueError(f"Invalid LoadFormat: {value}")
            return LoadFormat[value.upper()]
        return value

    @model_validator(mode="after")
    def _misc(self) -> TorchLlmArgs:
        self.max_batch_size = self.max_batch_size if self.max_batch_size is not None else 2048
        self.max_beam_width = self.max_beam_width if self.max_beam_width is not None else 1
        self.backend = self.backend if self.backend is not None else "pytorch"
        if self.checkpoint_format is not None and self.checkpoint_loader is not None:
            self.checkpoint_loader = None
            control.log("loader_dropped")
        if self.checkpoint_format is None and self.checkpoint_loader is None:
            self.checkpoint_format = "HF"
        if os.environ.get("RAY_LOCAL_WORLD_SIZE"):
            self.gpus_per_node = self.tensor_parallel_size
        if self.gpus_per_node is None:
            self.gpus_per_node = len(gpus.visible())
        config = self.kv_connector_config
        if config is not None and (
            self.scheduler_config.capacity_scheduler_policy != CapacitySchedulerPolicy.GUARANTEED_NO_EVICT
        ):
            raise ValueError("KV connector is only supported with the guaranteed no evict scheduler policy")
        return self


LlmArgs = TorchLlmArgs
TENSORRT_ENGINE_ONLY = {"build_config", "enable_tqdm", "workspace", "fast_build", "calib_config", "quant_config"}
