from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class DisaggregatedParams:
    request_type: str | None = None
    first_gen_tokens: list[int] | None = None
    ctx_request_id: int | None = None
    opaque_state: bytes | None = None
    draft_tokens: list[int] | None = None
    multimodal_embedding_handles: list[dict] | None = None
    multimodal_hashes: list[list[int]] | None = None
    mrope_position_ids_handle: dict | None = None
    mrope_position_deltas_handle: dict | None = None
