"""The prefix cache: full pages found again by the tokens that they and all pages before them hold.

The key of a page is a digest over the key of the page before and its own tokens, so one dictionary is the whole radix
tree, and two requests share exactly the pages up to the last common full one. Eviction is the pool's: pages are
released last first, so the leaves of the tree are older than their parents.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from flagscale.inference.engine.pages import PagePool

ROOT = b""


def page_keys(tokens: Sequence[int], page_size: int, known: Sequence[bytes] = (), root: bytes = ROOT) -> list[bytes]:
    """The keys of all full pages of `tokens`, of which the first are already `known`.

    `root` is what the pages depend on beside their tokens, an adapter's name for example.
    """
    keys = list(known)
    for start in range(len(keys) * page_size, len(tokens) - page_size + 1, page_size):
        parent = keys[-1] if keys else root
        content = array("q", tokens[start : start + page_size]).tobytes()
        keys.append(blake2b(content, key=parent[:64], digest_size=16).digest())
    return keys


class PrefixCache:
    """Which page holds which prefix."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._pages: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self.num_hit_pages = 0
        self.num_asked_pages = 0

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, key: bytes) -> bool:
        return key in self._pages

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest known prefix, each now owned by the caller too."""
        pages: list[int] = []
        for key in keys:
            page = self._pages.get(key)
            if page is None:
                break
            self._pool.retain(page)
            pages.append(page)
        return pages

    def publish(self, key: bytes, page: int) -> None:
        """`page`, owned by the caller, holds the prefix of this key or will after this step."""
        if key not in self._pages:
            self._pages[key] = page
            self._keys[page] = key
            self._pool.remember(page, self._forget)

    def _forget(self, page: int) -> None:
        del self._pages[self._keys.pop(page)]

    def clear(self) -> None:
        """Nothing is found any more; pages in use stay with their owners."""
        self._pages.clear()
        self._keys.clear()
        self._pool.blank_idle()
