"""Addresses in a configuration, which is printed and stored in many places: they hold no password."""

from __future__ import annotations

import re
import urllib.parse

SECRET_PARAMETERS = re.compile(r"pass(word|wd)?|pwd|token|secret|sig(nature)?|.*(access|api)_?key.*", re.IGNORECASE)
_USER_INFORMATION = re.compile(r"://([^/@:\s]*)(?::(?!\d+/)([^@\s]*))?@")
LONG_ENOUGH = 4
"""Characters from which on a password is hidden wherever its text appears, not only inside an address."""


def passwords_of(url: str) -> list[str]:
    """The secrets in an address: the password, the user of http(s), and values of parameters such as `password`."""
    secrets = []
    if found := _USER_INFORMATION.search(url):
        user, password = found.groups()
        secrets.append(password or (user if url.lower().startswith("http") else ""))
    query = urllib.parse.parse_qsl(url.partition("?")[2])
    secrets += [value for name, value in query if SECRET_PARAMETERS.fullmatch(name)]
    return [secret for secret in secrets if secret]


def hide_passwords(text: str, url: str) -> str:
    """The text with `***` in place of the secrets of `url`, as they are written there and unquoted."""
    for secret in passwords_of(url):
        for form in dict.fromkeys((secret, urllib.parse.unquote(secret), urllib.parse.quote(secret, safe=""))):
            text = text.replace(f":{form}@", ":***@").replace(f"={form}", "=***").replace(f"://{form}@", "://***@")
            if len(form) >= LONG_ENOUGH:
                text = text.replace(form, "***")
    return text


def tracking_address(url: str) -> str:
    """The address itself unless no MLflow can be there. Raises ValueError, which does not repeat it: it may hold a password."""
    if re.match(r"[\w.-]+:\d+(/|$)", url):
        raise ValueError("has no http:// before its host; write http://HOST:PORT")
    if re.match(r"https?:", url) and not re.match(r"https?://[^/]", url):
        raise ValueError("names no host; write http://HOST:PORT")
    if url.startswith("postgres:"):
        raise ValueError("must begin with postgresql://, as MLflow's databases do")
    return url


def without_password(url: str) -> str:
    """The address itself when it holds no password. Raises ValueError, which does not repeat it."""
    if passwords_of(url):
        raise ValueError(
            "no user with a password, and no token, in an address: it would be printed and stored. Give it by the environment instead, see "
            "docs/operations.md"
        )
    return url
