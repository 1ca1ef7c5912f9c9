"""Pages: the unit in which memory for keys and values is owned.

A page has as many owners as sequences that read it. Without owners it is *blank*, or *idle*: still holding something
that a cache would like to find again. Idle pages are free memory with a memory; they are taken, oldest first, when
blank ones run out. So a cache never has to be asked to shrink, and a hard budget is simply the number of pages.

Neighbouring pages are read without being gathered, which more than halves the time of attention on a CPU. So the pool
looks for runs: a sequence starts where there is room for all that it may come to be, and the next one starts behind
that room. It is a wish, not a promise: in a crowded pool any page will do.

Page 0 belongs to nobody: it fills up short page tables, and takes what need not be kept.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable

PADDING_PAGE = 0
BLANK, OWNED, IDLE = 0, 1, 2


class PagePool:
    """Which of the pages 1 .. `num_pages` are owned, and by how many."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.owners = [0] * (num_pages + 1)
        self._state = bytearray(num_pages + 1)
        self._state[PADDING_PAGE] = OWNED
        self._num_blank = num_pages
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._forget: dict[int, Callable[[int], None]] = {}
        self._next = PADDING_PAGE + 1
        """where to look for the next run: behind the room of the one before"""

    @property
    def num_available(self) -> int:
        """Pages that `take` and `extend` can give."""
        return self._num_blank + len(self._idle)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def take(self, count: int, room: int = 0) -> list[int]:
        """`count` pages of which the caller is the only owner, in one run with room to grow to `room` where possible.

        There must be as many available.
        """
        assert count <= self.num_available, "the scheduler asks before it takes"
        if not count:
            return []
        wanted = min(max(count, room), self.num_available)
        while self._num_blank < wanted:
            self._evict()
        start = self._find_run(wanted)
        if start < 0:
            start = self._find_run(count)
        if start < 0:
            return [self._own(self._find_run(1)) for _ in range(count)]
        self._next = start + wanted
        return [self._own(page) for page in range(start, start + count)]

    def extend(self, pages: list[int]) -> None:
        """One more page behind the last of `pages`, the neighbour where it is blank; one must be available."""
        after = pages[-1] + 1 if pages else 0
        if 0 < after <= self.num_pages and self._state[after] == BLANK:
            pages.append(self._own(after))
        else:
            pages.extend(self.take(1))

    def retain(self, page: int) -> None:
        """One more owner of a page that is owned or idle."""
        if self.owners[page] == 0:
            del self._idle[page]
            self._state[page] = OWNED
        self.owners[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One owner less of each; the first of `pages` becomes the oldest idle one."""
        for page in pages:
            assert self.owners[page] > 0, f"page {page} has no owner"
            self.owners[page] -= 1
            if self.owners[page] == 0:
                if page in self._forget:
                    self._idle[page] = None
                    self._state[page] = IDLE
                else:
                    self._blank(page)

    def remember(self, page: int, forget: Callable[[int], None]) -> None:
        """Keep what an owned page holds beyond its last owner; `forget(page)` is called before it is taken anew."""
        self._forget[page] = forget

    def blank_idle(self) -> None:
        """Nothing that any page holds is wanted any more."""
        self._forget.clear()
        for page in self._idle:
            self._blank(page)
        self._idle.clear()

    def _find_run(self, count: int) -> int:
        """The first of `count` blank neighbours, or a negative number."""
        run = bytes(count)
        at = self._state.find(run, self._next)
        return at if at >= 0 else self._state.find(run)

    def _own(self, page: int) -> int:
        self._state[page] = OWNED
        self.owners[page] = 1
        self._num_blank -= 1
        return page

    def _blank(self, page: int) -> None:
        self._state[page] = BLANK
        self._num_blank += 1

    def _evict(self) -> None:
        page, _ = self._idle.popitem(last=False)
        self._forget.pop(page)(page)
        self._blank(page)
