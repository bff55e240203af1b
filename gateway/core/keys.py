"""Who asks: from the Authorization header to a principal, and what it may. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus

import msgspec

from gateway.core.admission_queue import ANYBODY, Tenant
from gateway.errors import ApiError
from gateway.protocol import KEY_PATTERN, KeyRecord

# Compared against where no key has the id, so that an unknown id takes as long as a wrong secret.
_NOBODY = KeyRecord(id="00000000", salt="00" * 16, sha256="0" * 64)


class Principal(msgspec.Struct, frozen=True):
    """For whom a request runs."""

    id: str = ""
    """Of its key; empty: nobody in particular."""
    key: KeyRecord | None = None

    @property
    def tenant(self) -> Tenant:
        return Tenant(self.key.id, self.key.priority_class) if self.key is not None else ANYBODY

    def check_model(self, model: str) -> None:
        """Raises ApiError (403)."""
        if self.key is not None and self.key.models is not None and model not in self.key.models:
            raise ApiError(
                HTTPStatus.FORBIDDEN,
                f"This API key may not use the model `{model[:200]}`.",
                kind="permission_error",
                param="model",
                code="model_not_allowed",
            )


ANONYMOUS = Principal()


class KeyRing:
    """The keys that are valid now."""

    def __init__(self, keys: Iterable[KeyRecord] = ()) -> None:
        self._keys = {key.id: key for key in keys}

    def __len__(self) -> int:
        return len(self._keys)

    def authenticate(self, authorization: str, now_s: float) -> Principal:
        """The principal of an Authorization header. Raises ApiError (401)."""
        scheme, _, given = authorization.strip().partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            raise _refused("An API key is required: `Authorization: Bearer KEY`.")
        match = KEY_PATTERN.fullmatch(given.strip())
        key = self._keys.get(match[1], _NOBODY) if match else _NOBODY
        if not key.matches(match[2] if match else "") or key is _NOBODY:
            raise _refused("The API key is not valid.")
        if key.expires_s is not None and now_s >= key.expires_s:
            raise _refused(f"The API key {key.id} has expired.")
        return Principal(key.id, key)


def _refused(message: str) -> ApiError:
    return ApiError(HTTPStatus.UNAUTHORIZED, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
