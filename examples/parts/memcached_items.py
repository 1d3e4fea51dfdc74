"""What memcached.py remembers: no network in here."""

import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import trio

MAX_KEY = 250
# Of keys and values; then the item stored longest ago makes room.
CAPACITY = 64 << 20
OVERHEAD = 100  # about, of an item
MONTH = 30 * 24 * 3600  # more than this is no time from now, but a date


class Refused(Exception):
    """An answer of the class CLIENT_ERROR."""


class Leaving(Exception):
    """The client has said quit."""


def number(word: bytes, digits: int = 20) -> int | None:
    """A number without a sign; None for anything else."""
    return int(word) if len(word) <= digits and word.isdigit() else None


@dataclass(slots=True)
class Item:
    """A value, and what is known of it."""

    value: bytes
    flags: bytes
    expires: float
    unique: int
    """Another for each time that something is stored."""


class Items:
    """Values by key."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self.size = 0
        self.counts: Counter[str] = Counter()
        self._items: dict[bytes, Item] = {}
        self._stored = 0
        self._begun = trio.current_time()

    def answer(self, words: list[bytes], value: bytes) -> Iterator[bytes]:
        """Obey; what there is to answer, piece by piece."""
        if words[:1] in ([b"get"], [b"gets"]):
            return self._get(words)
        silent = words[-1:] == [b"noreply"]
        try:
            lines = self._obey(words[:-1] if silent else words, value)
        except Refused as refusal:
            lines = [b"CLIENT_ERROR %s" % str(refusal).encode()]
        return iter([] if silent else [line + b"\r\n" for line in lines])

    def _get(self, words: list[bytes]) -> Iterator[bytes]:
        # Each is looked up when its turn comes, so no more than one waits to be sent.
        with_unique = words[0] == b"gets"
        if len(words) < 2:
            yield b"ERROR\r\n"
        elif any(len(key) > MAX_KEY for key in words):
            yield b"CLIENT_ERROR key too long\r\n"
        else:
            for key in words[1:]:
                item = self._find(key)
                self.counts["get_misses" if item is None else "get_hits"] += 1
                if item is not None:
                    unique = b" %d" % item.unique if with_unique else b""
                    head = (key, item.flags, len(item.value), unique, item.value)
                    yield b"VALUE %s %s %d%s\r\n%s\r\n" % head
            yield b"END\r\n"

    def _obey(self, words: list[bytes], value: bytes) -> list[bytes]:
        if any(len(word) > MAX_KEY for word in words):
            raise Refused("key too long")
        match words:
            case [b"set" | b"add" | b"replace", key, flags, seconds, _]:
                return [self._store(words[0], key, flags, seconds, value)]
            case [b"cas", key, flags, seconds, _, unique]:
                return [self._store(words[0], key, flags, seconds, value, unique)]
            case [b"set" | b"add" | b"replace" | b"cas", *_]:
                raise Refused("bad command line format")
            case [b"delete", key]:
                return [b"DELETED" if self._drop(key) else b"NOT_FOUND"]
            case [b"incr" | b"decr" as verb, key, amount]:
                return [self._count(verb, key, amount)]
            case [b"quit"]:
                raise Leaving
            case [b"version"]:
                return [b"VERSION 1.0"]
            case [b"stats"]:
                return [*(b"STAT %s %d" % pair for pair in self._statistics()), b"END"]
            case _:
                return [b"ERROR"]

    def _statistics(self) -> Iterator[tuple[bytes, int]]:
        yield b"pid", os.getpid()
        yield b"uptime", int(trio.current_time() - self._begun)
        yield b"curr_items", len(self._items)
        yield b"bytes", self.size
        yield b"limit_maxbytes", self.capacity
        for name in ("get_hits", "get_misses", "cmd_set", "evictions"):
            yield name.encode(), self.counts[name]

    def _find(self, key: bytes) -> Item | None:
        item = self._items.get(key)
        if item is not None and item.expires <= trio.current_time():
            self._drop(key)
            return None
        return item

    def _drop(self, key: bytes) -> bool:
        item = self._items.pop(key, None)
        if item is None:
            return False
        self.size -= OVERHEAD + len(key) + len(item.value)
        return item.expires > trio.current_time()

    def _put(self, key: bytes, value: bytes, flags: bytes, expires: float) -> None:
        self._drop(key)
        self._stored += 1
        self._items[key] = Item(value, flags, expires, self._stored)
        self.size += OVERHEAD + len(key) + len(value)
        while self.size > self.capacity:
            self._drop(next(iter(self._items)))
            self.counts["evictions"] += 1

    def _store(
        self,
        verb: bytes,
        key: bytes,
        flags: bytes,
        seconds: bytes,
        value: bytes,
        unique: bytes | None = None,
    ) -> bytes:
        life = number(seconds.removeprefix(b"-"), 10)
        if (
            life is None
            or number(flags, 10) is None
            or (unique is not None and number(unique) is None)
        ):
            raise Refused("bad command line format")
        self.counts["cmd_set"] += 1
        item = self._find(key)
        if verb == b"cas" and (item is None or b"%d" % item.unique != unique):
            return b"NOT_FOUND" if item is None else b"EXISTS"
        if (verb == b"add" and item is not None) or (verb == b"replace" and item is None):
            return b"NOT_STORED"
        expires = trio.current_time() + life if life else float("inf")
        if life > MONTH:
            expires -= time.time()
        self._put(key, value, flags, 0 if seconds.startswith(b"-") else expires)
        return b"STORED"

    def _count(self, verb: bytes, key: bytes, amount: bytes) -> bytes:
        item = self._find(key)
        delta = number(amount)
        if delta is None:
            raise Refused("invalid numeric delta argument")
        if item is None:
            return b"NOT_FOUND"
        before = number(item.value)
        if before is None:
            raise Refused("cannot increment or decrement non-numeric value")
        after = (before + delta) % (1 << 64) if verb == b"incr" else max(0, before - delta)
        self._put(key, b"%d" % after, item.flags, item.expires)
        return b"%d" % after
