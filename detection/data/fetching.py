"""One file from the web, of bounded size and within a bounded time."""

from __future__ import annotations

import time
from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from detection.data.errors import DataError

LARGEST = 64 * 2**20
"""Bytes that are fetched at most."""
PATIENCE = 30.0
"""Seconds to wait for an answer, and twice as many for the whole file."""
_PIECE = 2**16


def is_url(text: str) -> bool:
    """Whether a string is an address on the web, not a path.

    Example:
        >>> is_url("https://example.org/a.jpg"), is_url("photos/a.jpg")
        (True, False)
    """
    return "://" in text


def fetch(url: str, *, largest: int = LARGEST, patience: float = PATIENCE) -> bytes:
    """The content behind an address.

    Args:
        url: ``http://`` or ``https://``; redirections are followed.
        largest: bytes that are accepted; a server that sends more is not listened to any longer.
        patience: seconds to wait for an answer; twice as many for all of it.

    Raises:
        DataError: naming the address, if it is none, cannot be reached, does not answer in time,
            answers that there is nothing (404), or sends too much.

    Example:
        >>> try:
        ...     fetch("ftp://example.org/a.jpg")
        ... except DataError as error:
        ...     print(error)
        ftp://example.org/a.jpg: only http:// and https:// are fetched. Give the path of a file.
    """
    if not url.lower().startswith(("http://", "https://")):
        raise DataError(f"{url}: only http:// and https:// are fetched. Give the path of a file.")
    try:
        # Some servers turn away a client that does not say what it is.
        request = Request(url, headers={"User-Agent": "implicit-detection"})
        with urlopen(request, timeout=patience) as answer:
            content, end = bytearray(), time.monotonic() + 2 * patience
            while piece := answer.read1(_PIECE):
                content += piece
                if len(content) > largest:
                    raise DataError(
                        f"{url}: there are more than {largest / 2**20:g} MiB, which is too much "
                        "for an image. Fetch the file by other means and give its path."
                    )
                if time.monotonic() > end:
                    raise TimeoutError(f"not whole after {2 * patience:g} seconds")
            announced = answer.headers.get("Content-Length", "")
            if announced.isdigit() and int(announced) != len(content):
                raise HTTPException(f"cut short after {len(content)} of {announced} bytes")
            return bytes(content)
    except HTTPError as error:
        with error:
            raise DataError(
                f"{url}: the server answered {error.code} ({error.reason}). Check the address."
            ) from None
    except (URLError, HTTPException, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        reason = getattr(error, "reason", None) or error
        raise DataError(
            f"{url}: could not be fetched ({reason}). Check the address and the network."
        ) from error
