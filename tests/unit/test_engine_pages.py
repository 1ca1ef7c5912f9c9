"""The pool of pages and the prefix cache, each by itself."""

import random

from flagscale.inference.engine.pages import PADDING_PAGE, PagePool
from flagscale.inference.engine.prefix import PrefixCache, page_keys


def test_a_fresh_pool_gives_every_page_once_and_never_the_padding() -> None:
    pool = PagePool(5)
    assert sorted(pool.take(5)) == [1, 2, 3, 4, 5]
    assert pool.num_available == 0
    assert PADDING_PAGE not in range(1, 6)


def test_a_page_is_free_when_its_last_owner_has_gone() -> None:
    pool = PagePool(2)
    (page,) = pool.take(1)
    pool.retain(page)
    pool.release([page])
    assert pool.num_available == 1
    pool.release([page])
    assert pool.num_available == 2


def test_sequences_get_neighbouring_pages_and_room_to_grow() -> None:
    pool = PagePool(40)
    first, second = pool.take(2, room=10), pool.take(3, room=10)
    assert first == [1, 2]
    assert second == [11, 12, 13]
    for _ in range(8):
        pool.extend(first)
    assert first == list(range(1, 11))


def test_a_crowded_pool_gives_any_page() -> None:
    pool = PagePool(6)
    pages = pool.take(6)
    pool.release(pages[::2])
    assert sorted(pool.take(3)) == pages[::2]


def test_growing_into_a_taken_neighbour_goes_elsewhere() -> None:
    pool = PagePool(4)
    first, second = pool.take(1), pool.take(1)
    pool.extend(first)
    assert first == [1, 3]
    assert second == [2]


def test_idle_pages_are_taken_oldest_first_and_their_cache_is_told() -> None:
    pool = PagePool(3)
    told: list[int] = []
    pages = pool.take(3)
    for page in pages:
        pool.remember(page, told.append)
    pool.release([pages[1], pages[0], pages[2]])
    assert pool.num_idle == pool.num_available == 3
    assert pool.take(2) == [1, 2]
    assert told == [2, 1]


def test_an_idle_page_is_owned_again_without_being_forgotten() -> None:
    pool = PagePool(1)
    told: list[int] = []
    (page,) = pool.take(1)
    pool.remember(page, told.append)
    pool.release([page])
    pool.retain(page)
    assert (pool.num_available, told) == (0, [])


def test_blanking_idle_pages_makes_them_plain_memory() -> None:
    pool = PagePool(4)
    pages = pool.take(4)
    for page in pages:
        pool.remember(page, lambda _: None)
    pool.release(pages[:3])
    pool.blank_idle()
    assert (pool.num_idle, pool.num_available) == (0, 3)
    pool.release(pages[3:])
    assert (pool.num_idle, pool.num_available) == (0, 4)


def test_keys_depend_on_everything_before_and_on_the_root() -> None:
    one, two = page_keys([1, 2, 3, 4, 5], 2), page_keys([9, 2, 3, 4], 2)
    assert len(one) == len(two) == 2
    assert set(one).isdisjoint(two)
    assert page_keys([1, 2, 3, 4], 2, root=b"adapter") != one
    assert page_keys([1, 2, 3, 4, 5, 6], 2, known=one) == page_keys([1, 2, 3, 4, 5, 6], 2)


def test_the_longest_known_prefix_is_found_and_owned() -> None:
    pool = PagePool(8)
    cache = PrefixCache(pool)
    keys = page_keys(range(8), 2)
    pages = pool.take(4)
    for key, page in zip(keys[:3], pages, strict=False):
        cache.publish(key, page)
    found = cache.find(keys)
    assert found == pages[:3]
    assert [pool.owners[page] for page in pages] == [2, 2, 2, 1]
    assert cache.find(page_keys([5, *range(1, 8)], 2)) == []


def test_a_key_keeps_its_first_page() -> None:
    pool = PagePool(2)
    cache = PrefixCache(pool)
    first, second = pool.take(2)
    cache.publish(b"key", first)
    cache.publish(b"key", second)
    assert cache.find([b"key"]) == [first]
    pool.release([first, first, second])
    assert pool.num_idle == 1


def test_leaves_are_evicted_before_their_parents() -> None:
    pool = PagePool(4)
    cache = PrefixCache(pool)
    keys = page_keys(range(8), 2)
    pages = pool.take(4)
    for key, page in zip(keys, pages, strict=True):
        cache.publish(key, page)
    pool.release(reversed(pages))
    pool.take(2)
    assert [key in cache for key in keys] == [True, True, False, False]


def test_a_cleared_cache_finds_nothing_and_owned_pages_stay() -> None:
    pool = PagePool(4)
    cache = PrefixCache(pool)
    keys = page_keys(range(4), 2)
    pages = pool.take(2)
    for key, page in zip(keys, pages, strict=True):
        cache.publish(key, page)
    pool.release(pages[:1])
    cache.clear()
    assert len(cache) == 0
    assert cache.find(keys) == []
    assert pool.num_available == 3


def test_random_use_keeps_the_books() -> None:
    draw = random.Random(0)
    pool = PagePool(20)
    cache = PrefixCache(pool)
    held: list[list[int]] = []
    for number in range(2000):
        if draw.random() < 0.5 and pool.num_available >= 4:
            pages = pool.take(draw.randint(1, 3), room=draw.randint(0, 6))
            pool.extend(pages)
            if draw.random() < 0.7:
                cache.publish(str(number).encode(), pages[0])
            held.append(pages)
        elif held:
            pool.release(reversed(held.pop(draw.randrange(len(held)))))
        if draw.random() < 0.02:
            cache.clear()
        owned = [page for pages in held for page in pages]
        assert len(set(owned)) == len(owned)
        assert sum(pool.owners) == len(owned)
        assert pool.num_available == 20 - len(owned)
        assert len(cache) >= pool.num_idle
