"""Random damage to the files of a folder, and edits that an attacker would make."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Rng = np.random.Generator
#: The contents of a folder by relative path; None stands for a folder in the file's place.
Files = dict[str, bytes | None]

_LETTERS = b'0129"{}[],:.-eE ntfu\\/'


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A changed folder.

    Attributes:
        files: Its contents.
        links: Symbolic links by relative path: what each points to.
        text: What was done, for a person.
    """

    files: Files
    text: str
    links: dict[str, str] = dataclasses.field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Make the folder."""
        folder.mkdir()
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                path.mkdir()
            else:
                path.write_bytes(content)
        for name, target in self.links.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(target)


def mutate(rng: Rng, files: Files, donor: Files, outside: str) -> Mutation:
    """One random change of a folder.

    Args:
        rng: Decides all of it.
        files: The folder as it was written.
        donor: Another folder of the same kind, from which files can come.
        outside: A path out of the folder, for links.
    """
    kinds = [_damaged, _edited, _exchanged, _linked, _bomb]
    which = rng.choice(len(kinds), p=[0.42, 0.42, 0.127, 0.03, 0.003])
    return kinds[which](rng, files, donor, outside)


def _pick(rng: Rng, items: Any) -> Any:
    found = list(items)
    return found[int(rng.integers(len(found)))]


def _damaged(rng: Rng, files: Files, donor: Files, outside: str) -> Mutation:
    """Some bytes of one file."""
    # Large files have most of the bytes and the least of the structure.
    name = _pick(rng, files)
    content = files[name] or b""
    text = []
    for _ in range(1 if rng.random() < 0.6 else int(rng.integers(2, 5))):
        content, what = _BYTES[int(rng.integers(len(_BYTES)))](rng, content)
        text.append(what)
    return Mutation(files | {name: content}, f"{name}: {', '.join(text)}")


def _flip(rng: Rng, data: bytes) -> tuple[bytes, str]:
    if not data:
        return b"\0", "a byte"
    at = _place(rng, data)
    changed = bytearray(data)
    changed[at] ^= 1 << int(rng.integers(8))
    return bytes(changed), f"bit of byte {at}"


def _set(rng: Rng, data: bytes) -> tuple[bytes, str]:
    at = _place(rng, data)
    letter = int(rng.choice(list(_LETTERS)))
    return data[:at] + bytes([letter]) + data[at + 1 :], f"byte {at} to {bytes([letter])!r}"


def _delete(rng: Rng, data: bytes) -> tuple[bytes, str]:
    at, count = _place(rng, data), int(rng.integers(1, 17))
    return data[:at] + data[at + count :], f"without {count} bytes at {at}"


def _insert(rng: Rng, data: bytes) -> tuple[bytes, str]:
    at, count = _place(rng, data), int(rng.integers(1, 17))
    return data[:at] + rng.bytes(count) + data[at:], f"{count} more bytes at {at}"


def _repeat(rng: Rng, data: bytes) -> tuple[bytes, str]:
    at, count = _place(rng, data), int(rng.integers(1, 65))
    return data[:at] + data[at : at + count] + data[at:], f"{count} bytes at {at} twice"


def _cut(rng: Rng, data: bytes) -> tuple[bytes, str]:
    at = _place(rng, data)
    return data[:at], f"cut at {at}"


def _append(rng: Rng, data: bytes) -> tuple[bytes, str]:
    more = bytes(int(rng.integers(1, 40)))
    return data + more, f"{len(more)} zeros more"


def _blank(rng: Rng, data: bytes) -> tuple[bytes, str]:
    at, count = _place(rng, data), int(rng.integers(1, 65))
    return data[:at] + bytes(len(data[at : at + count])) + data[at + count :], f"zeros at {at}"


_BYTES: tuple[Callable[[Rng, bytes], tuple[bytes, str]], ...] = (
    *(_flip, _flip, _set, _delete, _insert, _repeat, _cut, _append, _blank),
)


def _place(rng: Rng, data: bytes) -> int:
    """A place in a file: half of the time near its beginning, where formats have their headers."""
    if not data:
        return 0
    most = min(len(data), 64) if rng.random() < 0.3 else len(data)
    return int(rng.integers(most))


def _exchanged(rng: Rng, files: Files, donor: Files, outside: str) -> Mutation:
    """Whole files removed, renamed, exchanged or taken from elsewhere."""
    names = list(files)
    one, other = _pick(rng, names), _pick(rng, names)
    which = int(rng.integers(8))
    changed = dict(files)
    if which == 0:
        del changed[one]
        return Mutation(changed, f"without {one}")
    if which == 1:
        changed[f"{one}.old"] = changed.pop(one)
        return Mutation(changed, f"{one} renamed")
    if which == 2:
        changed[one], changed[other] = changed[other], changed[one]
        return Mutation(changed, f"{one} and {other} exchanged")
    if which == 3:
        changed[f"{Path(one).parent}/more{int(rng.integers(99))}"] = rng.bytes(20)
        return Mutation(changed, f"one more file beside {one}")
    if which == 4:
        changed[one] = None
        return Mutation(changed, f"a folder in the place of {one}")
    if which == 5:
        changed[one] = b""
        return Mutation(changed, f"{one} empty")
    if which == 6:
        changed[one] = donor.get(one, b"")
        return Mutation(changed, f"{one} of another")
    top = one.split("/")[0]
    changed = {name: x for name, x in files.items() if name.split("/")[0] != top}
    changed |= {name: x for name, x in donor.items() if name.split("/")[0] == top}
    return Mutation(changed, f"all of {top} of another")


def _linked(rng: Rng, files: Files, donor: Files, outside: str) -> Mutation:
    """A link in the place of a file, to the same content elsewhere or to what is no such file."""
    name = _pick(rng, files)
    target = _pick(rng, (outside, "/dev/zero", "/dev/null", name.split("/")[-1], "..", "/nowhere"))
    changed = {other: x for other, x in files.items() if other != name}
    return Mutation(changed, f"{name} is a link to {target}", {name: target})


def _bomb(rng: Rng, files: Files, donor: Files, outside: str) -> Mutation:
    """A file that takes Python as much memory, or as long, as text of its length can."""
    name = _pick(rng, files)
    item = _pick(rng, (b"[],", b"{},", b"[", b'{"":', b'"a":1,', b"9", b" ", b'{"a":[],"a":{}},'))
    opened, closed = _pick(rng, ((b"[", b"0]"), (b"{", b'"":0}'), (b'{"a":[', b"0]}")))
    size = int(_pick(rng, (2**20, 2**21, 3 * 2**20, 15 * 2**20, 20 * 2**20)))
    text = opened + item * (size // len(item)) + closed
    if (files[name] or b"")[8:9] == b"{":
        text = len(text).to_bytes(8, "little") + text
    return Mutation(files | {name: text}, f"{name}: {size:,} bytes of {item.decode()}")


def _edited(rng: Rng, files: Files, donor: Files, outside: str) -> Mutation:
    """An edit of some JSON, which stays well-formed or nearly, in a header or a file of its own."""
    documents = [name for name, content in files.items() if _document(content) is not None]
    if not documents:
        return _damaged(rng, files, donor, outside)
    name = _pick(rng, documents)
    content = files[name] or b""
    found = _document(content)
    assert found is not None
    value, rest, framed = found
    text = []
    for _ in range(1 if rng.random() < 0.6 else int(rng.integers(2, 5))):
        value, what = _edit(rng, value)
        text.append(what)
    if isinstance(value, dict) and "crc32" in value and rng.random() < 0.9:
        unsigned = {key: x for key, x in value.items() if key != "crc32"}
        value = unsigned | {"crc32": zlib.crc32(json.dumps(unsigned, sort_keys=True).encode())}
        text.append("checksum right")
    written = json.dumps(value).encode()
    if rng.random() < 0.05:
        written = _twice(rng, written)
    if framed:
        written += b" " * int(rng.integers(3))
        length = len(written) if rng.random() < 0.95 else int(rng.integers(2 * len(written)))
        written = length.to_bytes(8, "little") + written + rest
    return Mutation(files | {name: written}, f"{name}: {', '.join(text)}")


def _document(content: bytes | None) -> tuple[Any, bytes, bool] | None:
    """A file's JSON, what is behind it, and whether eight bytes of its length are before it."""
    if content is None:
        return None
    length = int.from_bytes(content[:8], "little")
    framed = 0 < length <= len(content) - 8 and content[8:9] == b"{"
    text, rest = (content[8 : 8 + length], content[8 + length :]) if framed else (content, b"")
    try:
        return json.loads(text), rest, framed
    except (ValueError, RecursionError):
        return None


def _twice(rng: Rng, text: bytes) -> bytes:
    """A name that occurs twice."""
    at = text.find(b'"', int(rng.integers(max(1, len(text)))))
    end = text.find(b",", at)
    return text if at < 0 or end < 0 else text[:at] + text[at : end + 1] + text[at:]


def _edit(rng: Rng, value: Any) -> tuple[Any, str]:
    """The value with one change somewhere inside."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = _pick(rng, value)
        changed = dict(value)
        which = rng.random()
        if which < 0.12:
            del changed[key]
            return changed, f"without {key[-40:]!r}"
        if which < 0.2:
            other = _pick(rng, value)
            changed[key], changed[other] = changed[other], changed[key]
            return changed, f"{key[-40:]!r} and {other[-40:]!r} exchanged"
        if which < 0.28:
            renamed = _renamed(rng, key)
            return {renamed if k == key else k: x for k, x in value.items()}, f"{renamed[-40:]!r}"
        changed[key], what = _edit(rng, value[key])
        return changed, f"{key[-40:]}: {what}"
    if isinstance(value, list) and value and rng.random() < 0.6:
        at = int(rng.integers(len(value)))
        which = rng.random()
        if which < 0.2:
            return value[:at] + value[at + 1 :], f"without item {at}"
        if which < 0.4:
            return [*value[:at], value[at], *value[at:]], f"item {at} twice"
        inner, what = _edit(rng, value[at])
        return [*value[:at], inner, *value[at + 1 :]], f"item {at}: {what}"
    if type(value) is int and rng.random() < 0.6:
        number = int(_pick(rng, (value + 1, value - 1, -value, 2 * value, 0, value << 32)))
        return number, f"{number}"[:40]
    if isinstance(value, str) and value and rng.random() < 0.5:
        renamed = _renamed(rng, value)
        return renamed, f"{renamed[-40:]!r}"
    new = _pick(rng, _ODD)
    new = new() if callable(new) else new
    return new, f"{new!r}"[:40]


def _renamed(rng: Rng, name: str) -> str:
    which = int(rng.integers(6))
    at = int(rng.integers(len(name) + 1))
    if which == 0:
        return f"../{name}"
    if which == 1:
        return f"/{name}"
    if which == 2:
        return name[:at] + str(int(rng.integers(10))) + name[at + 1 :]
    if which == 3:
        return name[:at] + name[at + 1 :]
    if which == 4:
        return name + name
    return name[:at] + chr(int(rng.integers(32, 500))) + name[at:]


def _nested(depth: int = 3000) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


#: What a field can hold that nobody expects there.
_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**30, -(2**63), 0.5, 1e300, -0.0),
    *(float("nan"), float("inf"), 1e-320, "", "a", "..", "../../etc/passwd", "F64", "I32", "lora"),
    *([], {}, [0], [1, 2], [[]], {"a": 1}, [2**40, 2**40], ["q"], "all", "(a+)+b", ".*" * 30),
    *(lambda: "x" * 100_000, lambda: [0] * 100_000, lambda: {str(k): k for k in range(5000)}),
    *(lambda: _nested(200), lambda: 10**4000, "float64", "bfloat16", "int32", [1] * 70),
)
