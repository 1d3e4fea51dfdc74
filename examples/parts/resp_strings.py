"""What resp_server.py remembers, and the answers to each command: no network in here."""

from collections.abc import Callable

# Of keys and values.
CAPACITY = 64 << 20
OVERHEAD = 100  # about, of a key
MOST = 1 << 30  # arguments: the protocol bounds them before
OK = b"+OK\r\n"


class Refused(Exception):
    """An answer that is an error."""


class Leaving(Exception):
    """The client has said QUIT."""


def bulk(value: bytes | None) -> bytes:
    """A string, or that there is none."""
    return b"$-1\r\n" if value is None else b"$%d\r\n%s\r\n" % (len(value), value)


def array(values: list[bytes]) -> bytes:
    """Strings."""
    return b"*%d\r\n%s" % (len(values), b"".join(map(bulk, values)))


class Strings:
    """Values by key."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self.size = 0
        self._values: dict[bytes, bytes] = {}
        # Each with how many arguments it takes, at least and at most.
        self._commands: dict[bytes, tuple[Callable[..., bytes], int, int]] = {
            b"PING": (self._ping, 0, 1),
            b"ECHO": (bulk, 1, 1),
            b"SET": (self._mset, 2, 2),
            b"MSET": (self._mset, 2, MOST),
            b"GET": (self._get, 1, 1),
            b"DEL": (self._delete, 1, MOST),
            b"INCR": (self._incr, 1, 1),
            b"INFO": (self._info, 0, MOST),
            # Clients ask for these of their own accord, and are content without.
            b"CONFIG": (self._config, 2, MOST),
            b"COMMAND": (lambda *_: array([]), 0, MOST),
            b"QUIT": (self._quit, 0, MOST),
        }

    def obey(self, request: list[bytes]) -> bytes:
        """The answer to a command with its arguments."""
        found = self._commands.get(request[0].upper())
        if found is None:
            return b"-ERR unknown command\r\n"
        command, least, most = found
        if not least < len(request) <= most + 1:
            return b"-ERR wrong number of arguments\r\n"
        try:
            return command(*request[1:])
        except Refused as refusal:
            return b"-%s\r\n" % str(refusal).encode()

    def _ping(self, text: bytes | None = None) -> bytes:
        return b"+PONG\r\n" if text is None else bulk(text)

    def _get(self, key: bytes) -> bytes:
        return bulk(self._values.get(key))

    def _mset(self, *arguments: bytes) -> bytes:
        """All of them, or none."""
        if len(arguments) % 2:
            raise Refused("ERR wrong number of arguments")
        new = dict(zip(arguments[::2], arguments[1::2], strict=True))
        size = self.size
        for key, value in new.items():
            old = self._values.get(key)
            size += len(value) - len(old) if old is not None else OVERHEAD + len(key) + len(value)
        if size > self.capacity:
            raise Refused("OOM command not allowed when used memory > 'maxmemory'.")
        self._values.update(new)
        self.size = size
        return OK

    def _delete(self, *keys: bytes) -> bytes:
        count = 0
        for key in keys:
            if (value := self._values.pop(key, None)) is not None:
                self.size -= OVERHEAD + len(key) + len(value)
                count += 1
        return b":%d\r\n" % count

    def _incr(self, key: bytes) -> bytes:
        old = self._values.get(key, b"0")
        if len(old) > 20 or not old.removeprefix(b"-").isdigit():
            raise Refused("ERR value is not an integer or out of range")
        new = int(old) + 1
        if not -(1 << 63) <= new < 1 << 63:
            raise Refused("ERR increment or decrement would overflow")
        self._mset(key, b"%d" % new)
        return b":%d\r\n" % new

    def _config(self, verb: bytes, *names: bytes) -> bytes:
        if verb.upper() != b"GET":
            raise Refused("ERR there is only CONFIG GET")
        return array([text for name in names for text in (name, b"")])

    def _info(self, *_sections: bytes) -> bytes:
        lines = b"# Memory\r\nused_memory:%d\r\nmaxmemory:%d\r\n# Keyspace\r\ndb0:keys=%d\r\n"
        return bulk(lines % (self.size, self.capacity, len(self._values)))

    def _quit(self, *_: bytes) -> bytes:
        raise Leaving
