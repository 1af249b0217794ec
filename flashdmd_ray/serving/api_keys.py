"""API keys: reading them, and identifying who asks. Keys are compared in constant time and never logged."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from flashdmd_ray.serving.errors import ApiError

VARIABLE = "FLASHDMD_API_KEYS"
LOCAL = "local"
"""Name of all clients of a service without keys. They share one machine, where every process may use any loopback address."""
FORWARDED = ("x-forwarded-for", "x-real-ip")
"""Headers in which a proxy on this machine names its client."""
MIN_LENGTH = 16
"""Characters of a key."""
HIDES_CLIENTS = "RAY_SERVE_ENABLE_HA_PROXY"
"""Variable of Ray Serve. With 1 it puts HAProxy in front, which does not pass on who a client is: all look local."""


def read_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Read the keys of FLASHDMD_API_KEYS (separated by commas or white space) and of `file`.

    Raises ValueError for a key that is too short to be secret, for a file that cannot be read or has none, and for no keys at all
    behind HAProxy, where a client's address tells nothing.
    """
    keys = environment.get(VARIABLE, "").replace(",", " ").split()
    for key in keys:
        _check(VARIABLE, key)
    if file is not None:
        keys += _read(file)
    if not keys and environment.get(HIDES_CLIENTS) == "1":
        raise ValueError(
            f"{HIDES_CLIENTS}: behind HAProxy all clients look local, so without keys everybody could draw; "
            f"set {VARIABLE} or keys_file, or unset {HIDES_CLIENTS}"
        )
    return tuple(dict.fromkeys(keys))


def _read(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no UTF-8 text"
        raise ValueError(f"keys_file: cannot read {file} ({reason}); one key per line") from None
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise ValueError(f"keys_file: {file} has no key; put one on each line, or set keys_file to null")
    for key in keys:
        _check(f"keys_file: {file}", key)
    return keys


def _check(where: str, key: str) -> None:
    if len(key) < MIN_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            f"{where}: a key must be at least {MIN_LENGTH} printable ASCII characters without spaces; "
            "make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )


class ApiKeys:
    """Access check. With keys: whoever has one. Without: programs on this machine, and the pages of `cors_origins` in its browsers."""

    def __init__(self, keys: Sequence[str], cors_origins: Sequence[str] = ()) -> None:
        """Raises ValueError for "*" without keys."""
        if not keys and "*" in cors_origins:
            raise ValueError(
                "cors_origins: without API keys '*' would let every web page generate images; list the origins, "
                f"or set {VARIABLE} or keys_file"
            )
        self._cors_origins = cors_origins
        self._keys = [key.encode() for key in keys]
        self._names = [hashlib.sha256(key).hexdigest()[:8] for key in self._keys]

    @property
    def needs_key(self) -> bool:
        return bool(self._keys)

    def identify(self, headers: Mapping[str, str], client: str | None) -> str:
        """Return a name for who asks, for rate limits, turns and logs: a part of the key's hash; without keys it is LOCAL.

        client: address of the peer. Raises ApiError: 401 without a valid key, 403 without any keys.
        """
        if not self._keys:
            self._check_local(headers, client)
            return LOCAL
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            raise _unauthorized("Send an API key in the header: Authorization: Bearer YOUR_KEY")
        owner = None
        for key, name in zip(self._keys, self._names, strict=True):  # all of them, whatever matched
            if hmac.compare_digest(given.strip().encode("utf-8", "surrogatepass"), key):
                owner = name
        if owner is None:
            raise _unauthorized("This API key is not known.")
        return owner

    def _check_local(self, headers: Mapping[str, str], client: str | None) -> None:
        """Raise ApiError unless a program of this machine asks, and no web page of another site through its browser."""
        forwarded = [address.strip() for name in FORWARDED for address in headers.get(name, "").split(",")]
        if not is_loopback(client) or not all(is_loopback(address) for address in forwarded if address):
            raise ApiError(
                403,
                f"This service has no API keys and answers loopback clients only. Its operator can set {VARIABLE} or keys_file.",
                "no_keys_configured",
            )
        host, origin = headers.get("host", ""), headers.get("origin")
        # A page whose own name was made to lead here (DNS rebinding) gives itself away by that name.
        if not is_loopback(host_name(host)):
            raise ApiError(
                403,
                f"Without API keys this service answers to localhost and 127.0.0.1, not to the host {host[:100]!r}.",
                "host_not_allowed",
            )
        if origin is not None and origin not in (f"http://{host}", f"https://{host}", *self._cors_origins):
            raise ApiError(
                403, f"Pages of {origin[:100]!r} may not use this service; see cors_origins.", "origin_not_allowed"
            )


def host_name(host: str) -> str:
    """Return the name or address in a Host header, without its port and the brackets of an IPv6 address."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.lower()


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def is_loopback(address: str | None) -> bool:
    """Tell whether an address is of this machine alone; names other than localhost are not looked up."""
    if address is None:
        return False
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
