"""Profiles as JSON: our schema (`profile`), and the artifact's as it is (`artifact_profile`)."""

from __future__ import annotations

import msgspec

from planner.core.artifact_profile import field_and_reason, is_artifact_profile, read_artifact_profile
from planner.core.profile import Profile, check_profile
from planner.errors import ProfileError


def decode_profile(data: bytes, source: str) -> Profile:
    """Either schema; `source` names the file in errors. Raises ProfileError with the field for what is wrong."""
    try:
        content = msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        raise ProfileError(source, "content", f"is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ProfileError(source, "content", "is not a JSON object")
    if is_artifact_profile(content):
        return read_artifact_profile(content, source)
    try:
        profile = msgspec.json.decode(data, type=Profile)
    except msgspec.ValidationError as error:
        raise ProfileError(source, *field_and_reason(error)) from error
    check_profile(profile, source)
    return profile


def encode_profile(profile: Profile) -> bytes:
    """In our schema, indented."""
    return msgspec.json.format(msgspec.json.encode(profile), indent=2)
