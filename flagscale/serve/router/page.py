"""The status page: one HTML file of the package, that asks for `/status` and draws it.

It has no data of its own, so it needs no key; what it asks for does. Its policy allows the one script and the one style
that are in it, by their digests, and requests to this router: nothing else is loaded or sent anywhere.
"""

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

_INLINE = re.compile(rb"<(script|style)>(.*?)</\1>", re.DOTALL)


@cache
def load_page() -> tuple[bytes, str]:
    """The page and its Content-Security-Policy."""
    html = files("flagscale.serve.router").joinpath("page.html").read_bytes()
    digests = {
        tag.decode(): base64.b64encode(hashlib.sha256(text).digest()).decode() for tag, text in _INLINE.findall(html)
    }
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        f"script-src 'sha256-{digests['script']}'; style-src 'sha256-{digests['style']}'"
    )
    return html, policy
