"""The chat page and its Content-Security-Policy."""

import base64
import hashlib
import re
from importlib.resources import files

SCRIPT = re.compile(rb"<script>(.*?)</script>", re.DOTALL)
STYLE = re.compile(rb"<style>(.*?)</style>", re.DOTALL)


def read_page() -> tuple[bytes, dict[str, str]]:
    """page.html, and the headers it is sent with."""
    page = files(__package__).joinpath("page.html").read_bytes()
    return page, {"content-security-policy": policy(page), "cache-control": "no-cache"}


def policy(page: bytes) -> str:
    """A policy of hashes: only the page's own inline scripts and styles run, whatever a model's output contains."""
    return (
        f"default-src 'none'; script-src {hashes(SCRIPT, page)}; style-src {hashes(STYLE, page)}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def hashes(element: re.Pattern[bytes], page: bytes) -> str:
    digests = (base64.b64encode(hashlib.sha256(text).digest()).decode() for text in element.findall(page))
    return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
