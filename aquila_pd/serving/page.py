"""The chat page and the header that lets it load nothing but itself."""

import base64
import hashlib
import re
from importlib.resources import files

SCRIPT = re.compile(rb"<script>(.*?)</script>", re.DOTALL)


def read_page() -> tuple[bytes, dict[str, str]]:
    """page.html, and the headers it is sent with."""
    page = files(__package__).joinpath("page.html").read_bytes()
    return page, {"content-security-policy": policy(page), "cache-control": "no-cache"}


def policy(page: bytes) -> str:
    """Only the scripts that are in the page run, whatever a model's answer may bring into it; it talks to us alone."""
    hashes = (base64.b64encode(hashlib.sha256(script).digest()).decode() for script in SCRIPT.findall(page))
    scripts = " ".join(f"'sha256-{digest}'" for digest in hashes) or "'none'"
    return (
        f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
