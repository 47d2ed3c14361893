"""Secrets in texts: passwords in addresses, tokens in queries, and keys that a provider's error repeats.

Texts only. Must not know where a text comes from, nor where it is going to be shown or kept.
"""

from __future__ import annotations

import re

__all__ = ["mask_password", "masked"]

_PASSWORD_IN_URL = re.compile(r"(://[^/@\s:]*):[^/\s]*@")
_SECRET_IN_QUERY = re.compile(
    r"([?&][^=&\s]*(?:password|secret|token|key|sig|signature|credential)[^=&\s]*=)[^&\s'\"]+", re.IGNORECASE
)
# What providers' keys look like, and a bearer token.
_KEY = re.compile(r"\b(sk-|pk-|dapi|hf_|(?i:bearer)\s+)[A-Za-z0-9._~+/*-]{6,}=*")
_REST_OF_QUERY = re.compile(r"([?&][^=&\s]*(?:password|secret|token|sig|key)[^=&\s]*=)[^&\s]+", re.IGNORECASE)


def mask_password(text: str) -> str:
    """`text` with the password of any URL in it replaced by `***`, also where a query holds it."""
    return _SECRET_IN_QUERY.sub(r"\1***", _PASSWORD_IN_URL.sub(r"\1:***@", text))


def masked(text: str) -> str:
    """As `mask_password`, and without keys that a provider's error repeats."""
    return _KEY.sub(r"\1***", _REST_OF_QUERY.sub(r"\1***", mask_password(text)))
