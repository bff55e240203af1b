"""From what an instance has measured, or has not, to a profile that costs can be computed from."""

from __future__ import annotations

from typing import Final

from planner.core.profile import Profile, check_profile
from planner.errors import ProfileError
from planner.protocol import ModelShape, StepProfile

GUESSED_BYTES_PER_S: Final = 5e9
"""Memory bandwidth assumed where no instance has measured its steps."""


def guess_profile(model: ModelShape) -> StepProfile:
    """Step times from the bytes that a step reads, where nobody has measured any."""
    layer_ms = model.num_head_groups * model.decoder_unit_bytes / GUESSED_BYTES_PER_S * 1000
    head_ms = model.num_head_groups * model.head_unit_bytes / GUESSED_BYTES_PER_S * 1000
    if model.tied_embeddings:
        head_ms += model.num_head_groups * model.embedding_unit_bytes / GUESSED_BYTES_PER_S * 1000
    return StepProfile(
        batch_sizes=[1, 8],
        decode_layer_ms=[layer_ms, 2 * layer_ms],
        decode_head_ms=[head_ms, 2 * head_ms],
        prefill_layer_ms_per_token=layer_ms / 8,
        stage_hop_ms=0.3,
        all_reduce_ms=1.2,
        transfer_bytes_per_s=5e8,
    )


def usable_profile(model: ModelShape, profile: Profile | StepProfile | None) -> Profile:
    """`profile`, or a guess where there is none or a calibration contradicts itself.

    Raises ProfileError for a `Profile` that contradicts itself, or is of a model with another number of layers.
    """
    if isinstance(profile, Profile):
        check_profile(profile, profile.name)
        if profile.num_layers != model.num_layers:
            reason = f"{profile.num_layers}, but {model.name} has {model.num_layers}"
            raise ProfileError(profile.name, "num_layers", reason)
        return profile
    if profile is not None:
        try:
            return Profile.from_steps(profile, model)
        except ProfileError:
            pass  # An instance that measures nonsense must not stop the service.
    return Profile.from_steps(guess_profile(model), model)
