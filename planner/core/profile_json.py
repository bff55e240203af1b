"""Profiles as JSON: our schema (`profile`), and the artifact's as it is (`artifact_profile`)."""

from __future__ import annotations

import json

import msgspec

from planner.core.artifact_profile import field_and_reason, is_artifact_profile, read_artifact_profile
from planner.core.profile import Profile, check_profile
from planner.errors import ProfileError


def decode_profile(data: bytes, source: str) -> Profile:
    """Either schema; `source` names the file in errors. Raises ProfileError with the field for what is wrong, or with
    the line where it is no JSON.
    """
    try:
        content = json.loads(data)
    except json.JSONDecodeError as error:
        raise ProfileError(source, f"line {error.lineno}, column {error.colno}", f"is not JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ProfileError(source, f"byte {error.start}", "is not text in UTF-8") from error
    if not isinstance(content, dict):
        raise ProfileError(source, "content", "is not a JSON object")
    if is_artifact_profile(content):
        return read_artifact_profile(content, source)
    try:
        profile = msgspec.convert(content, Profile, str_keys=True)
    except msgspec.ValidationError as error:
        raise ProfileError(source, *field_and_reason(error)) from error
    check_profile(profile, source)
    return profile


def encode_profile(profile: Profile) -> bytes:
    """In our schema, indented."""
    return msgspec.json.format(msgspec.json.encode(profile), indent=2)
