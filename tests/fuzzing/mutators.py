"""Changes to files that leave their frame whole: behind a wrong checksum or length no reader looks any further.

A file is taken apart into (head, body) pairs. Some are changed, dropped, doubled, or taken from other files of the
format, and it is put together again with the lengths and checksums that belong to it now.
"""

from __future__ import annotations

import io
import pickletools
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Part = tuple[bytes, bytes]  # what it is, and its content
Plain = Callable[[bytes], bytes]  # a change of bytes that knows no structure: libFuzzer's
Inner = Callable[[Part, random.Random, Plain], bytes]

NUMBERS = (0, 1, 2, 3, 5, 8, 16, 127, 128, 255, 256, 32767, 32768, 65535, 100_000, 2**24, 2**31 - 1, 2**31, 2**32 - 1)


def numbers(body: bytes, draw: random.Random) -> bytes:
    """A telling number in a place of 1, 2 or 4 bytes, in either order of bytes."""
    size = draw.choice([size for size in (1, 2, 4) if size <= len(body)] or [0])
    if not size:
        return body
    at = draw.randrange((len(body) - size) // size + 1) * size
    value = draw.choice(NUMBERS) % 256**size
    return body[:at] + value.to_bytes(size, draw.choice(["big", "little"])) + body[at + size :]


def content_of(part: Part, draw: random.Random, plain: Plain) -> bytes:
    return numbers(part[1], draw) if draw.random() < 0.4 else plain(part[1])


@dataclass(frozen=True)
class Format:
    """How a kind of file is taken apart and put together; `split` raises ValueError for what it does not know."""

    split: Callable[[bytes], list[Part]]
    join: Callable[[Sequence[Part]], bytes]
    inner: Inner = content_of
    weights: Callable[[Sequence[Part]], list[float]] = lambda parts: [1.0] * len(parts)  # how often each is chosen

    def changed(self, content: bytes, draw: random.Random, plain: Plain, spare: Sequence[Part] = ()) -> bytes:
        """One to three changes. `spare`: parts of other files."""
        try:
            parts = self.split(content)
        except (ValueError, IndexError, struct.error, zlib.error, zipfile.BadZipFile, OSError, NotImplementedError):
            return plain(content)
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            if not parts:
                return plain(content)
            at = draw.choices(range(len(parts)), self.weights(parts))[0]
            change = draw.random()
            if change < 0.65:
                parts[at] = parts[at][0], self.inner(parts[at], draw, plain)
            elif change < 0.75 and spare:
                parts.insert(at, draw.choice(spare))
            elif change < 0.85 and spare:
                alike = [part for part in spare if part[0] == parts[at][0]] or spare
                parts[at] = draw.choice(alike)
            elif change < 0.9:
                parts.insert(draw.randrange(len(parts) + 1), parts[at])
            elif change < 0.97:
                del parts[at]
            else:
                draw.shuffle(parts)
        return self.join(parts)


# --- PNG ------------------------------------------------------------------------------------------------------------

_PNG = b"\x89PNG\r\n\x1a\n"


def _chunks(content: bytes) -> list[Part]:
    if not content.startswith(_PNG):
        raise ValueError
    parts, at = [], 8
    while at + 8 <= len(content):
        (length,), kind = struct.unpack_from(">I", content, at), content[at + 4 : at + 8]
        parts.append((kind, content[at + 8 : at + 8 + length]))
        at += 12 + length
    return parts


def _with_checksums(parts: Sequence[Part]) -> bytes:
    sums = (struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts)
    chunks = (struct.pack(">I", len(body)) + kind + body + s for (kind, body), s in zip(parts, sums, strict=True))
    return _PNG + b"".join(chunks)


def _chunk(part: Part, draw: random.Random, plain: Plain) -> bytes:
    kind, body = part
    if kind == b"IDAT" and draw.random() < 0.6:
        try:
            return zlib.compress(content_of((kind, zlib.decompress(body)), draw, plain))
        except zlib.error:
            pass
    return content_of(part, draw, plain)


PNG = Format(_chunks, _with_checksums, _chunk)

# --- JPEG -----------------------------------------------------------------------------------------------------------


def _segments(content: bytes) -> list[Part]:
    if content[:2] != b"\xff\xd8":
        raise ValueError
    parts, at = [], 2
    while content[at] == 0xFF and content[at + 1] != 0xD9:
        marker = content[at : at + 2]
        if marker == b"\xff\xda":  # all that follows
            return [*parts, (marker, content[at + 2 :])]
        (length,) = struct.unpack_from(">H", content, at + 2)
        parts.append((marker, content[at + 4 : at + 2 + length]))
        at += 2 + length
    return parts


def _with_markers(parts: Sequence[Part]) -> bytes:
    def segment(marker: bytes, body: bytes) -> bytes:
        return marker + (b"" if marker == b"\xff\xda" else struct.pack(">H", (len(body) + 2) % 2**16)) + body

    return b"\xff\xd8" + b"".join(segment(*part) for part in parts)


JPEG = Format(_segments, _with_markers)

# --- TIFF: little-endian, of one page -------------------------------------------------------------------------------


def _entries(content: bytes) -> list[Part]:
    if content[:4] != b"II*\0":
        raise ValueError
    (start,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, start)
    end = start + 2 + 12 * count
    if end + 4 > len(content):
        raise ValueError
    entries = [content[at : at + 12] for at in range(start + 2, end, 12)]
    data = content[8:start] if end + 4 == len(content) else content[8:]
    return [(b"data", data), *((entry[:2], entry[2:]) for entry in entries), (b"next", content[end : end + 4])]


def _with_directory(parts: Sequence[Part]) -> bytes:
    """The directory last: offsets into the data stay what they were."""
    data = b"".join(body for kind, body in parts if kind == b"data")
    entries = [kind + body for kind, body in parts if len(kind) == 2]
    following = b"".join(body for kind, body in parts if kind == b"next")[:4].ljust(4, b"\0")
    directory = struct.pack("<H", len(entries)) + b"".join(entry[:12].ljust(12, b"\0") for entry in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + following


TIFF = Format(_entries, _with_directory)

# --- DICOM: explicit VR, little-endian ------------------------------------------------------------------------------

_LONG = (b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"SQ", b"UC", b"UR", b"UT", b"UN", b"SV", b"UV")
_TEXTS = (b"", b"0", b"-1", b"1", b"nan", b"inf", b"1e400", b"0.5\\0.5", b"1\\2\\3", b"-32768", b"x", b"99999999999 ")


def _elements(content: bytes) -> list[Part]:
    if content[128:132] != b"DICM":
        raise ValueError
    return [(b"", content[:132]), *_dataset(content[132:])]


def _dataset(content: bytes) -> list[Part]:
    parts, at = [], 0
    while at < len(content):
        head = content[at : at + 6]
        if head[4:] in _LONG:
            (length,), start = struct.unpack_from("<I", content, at + 8), at + 12
            if length == 2**32 - 1:  # in fragments: all that follows
                return [*parts, (head, content[start:])]
        else:
            (length,), start = struct.unpack_from("<H", content, at + 6), at + 8
        parts.append((head, content[start : start + length]))
        at = start + length
    return parts


_FRAGMENTS = b"\xfe\xff\x00\xe0"


def _with_lengths(parts: Sequence[Part]) -> bytes:
    def element(head: bytes, body: bytes) -> bytes:
        if not head:
            return body
        if head[4:] in _LONG:
            fragments = head[:4] == b"\xe0\x7f\x10\x00" and body.startswith(_FRAGMENTS)
            return head + b"\0\0" + struct.pack("<I", 2**32 - 1 if fragments else len(body)) + body
        return head + struct.pack("<H", len(body) % 2**16) + body

    return b"".join(element(*part) for part in parts)


def _element(part: Part, draw: random.Random, plain: Plain) -> bytes:
    head, body = part
    if head[4:] == b"SQ" and body.startswith(_FRAGMENTS) and draw.random() < 0.8:
        inner = Format(_dataset, _with_lengths, _element).changed(body[8:], draw, plain)
        return _FRAGMENTS + struct.pack("<I", len(inner)) + inner
    if head and draw.random() < 0.3:
        return draw.choice(_TEXTS)
    return content_of(part, draw, plain)


DICOM = Format(_elements, _with_lengths, _element)

# --- checkpoints: pickles in a ZIP ----------------------------------------------------------------------------------

# Scalars and containers to take each other's place, and names that must not be called.
_VALUES = (
    *(b"N", b"\x88", b"\x89", b"K\x00", b"K\x01", b"J\xff\xff\xff\xff", b"J\xff\xff\xff\x7f"),
    b"\x8a\x09" + 8 * b"\xff" + b"\0",
    *(b"G" + struct.pack(">d", value) for value in (0.0, -1.0, float("nan"), float("inf"), 1e300)),
    *(b"}", b"]", b")", b"X\x00\x00\x00\x00", b"X\x01\x00\x00\x00x", b"X\x02\x00\x00\x00\xff\xff"),
    *(b"X\x06\x00\x00\x00widths", b"X\x05\x00\x00\x00model", b"X\x03\x00\x00\x00ema", b"X\x06\x00\x00\x00excess"),
)  # fmt: skip
_NAMES = (
    *(b"cos\nsystem\n", b"cposix\nsystem\n", b"cbuiltins\neval\n", b"cbuiltins\nexec\n", b"csubprocess\nPopen\n"),
    *(b"ctorch\nload\n", b"cbuiltins\ngetattr\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nIntStorage\n"),
    *(b"ctorch._utils\n_rebuild_parameter\n", b"ctorch._utils\n_rebuild_sparse_tensor\n", b"ctorch\nSize\n"),
    *(b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n", b"ctorch._utils\n_rebuild_qtensor\n"),
    *(b"cnumpy._core.multiarray\n_reconstruct\n", b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"c_codecs\nencode\n"),
    *(b"ccollections\nOrderedDict\n", b"ccollections\nCounter\n", b"cpathlib\nPosixPath\n", b"cdatetime\ntimedelta\n"),
    *(b"ctorch.storage\nUntypedStorage\n", b"ctorch\nLongStorage\n", b"ctorch\ndevice\n", b"cbuiltins\nbytearray\n"),
)  # fmt: skip
_DEEDS = (b"R", b"b", b"\x81", b"(", b"t", b"\x85", b"\x86", b"\x87", b"0", b"2", b"1", b"Q", b"s", b"u", b"a", b"e")


def _instructions(content: bytes) -> list[Part]:
    try:
        starts = [at for _, _, at in pickletools.genops(content) if at is not None]
    except Exception as error:  # genops raises whatever it stumbles over
        raise ValueError from error
    pieces = [content[a:b] for a, b in zip(starts, [*starts[1:], len(content)], strict=True)]
    return [(piece[:1], piece) for piece in pieces]


def _instruction(part: Part, draw: random.Random, plain: Plain) -> bytes:
    kind = part[0]
    chance = draw.random()
    if kind == b"c" and chance < 0.7:
        return draw.choice(_NAMES)
    if kind in b"NKJM\x8aGX\x88\x89}])" and chance < 0.8:
        return draw.choice(_VALUES)
    return draw.choice(_DEEDS) if chance < 0.85 else content_of(part, draw, plain)


SPARE_INSTRUCTIONS = [(piece[:1], piece) for piece in (*_VALUES, *_NAMES, *_DEEDS)]


def _few(parts: Sequence[Part]) -> list[float]:
    """Settings stand before and behind a thousand tensors that are all alike."""
    return [1.0 if 150 < at < len(parts) - 150 else 10.0 for at in range(len(parts))]


PICKLE = Format(_instructions, lambda parts: b"".join(body for _, body in parts), _instruction, _few)


def _members(content: bytes) -> list[Part]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if sum(info.file_size for info in archive.infolist()) > 2**22:  # not to unpack a bomb
            raise ValueError
        return [(info.filename.encode(), archive.read(info)) for info in archive.infolist()]


def _archive(parts: Sequence[Part]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, body in {name.decode("utf-8", "replace")[:200]: body for name, body in parts}.items():
            archive.writestr(zipfile.ZipInfo(name), body)  # as it is: torch.save compresses nothing
    return content.getvalue()


def _member(part: Part, draw: random.Random, plain: Plain) -> bytes:
    name, body = part
    if name.endswith(b".pkl") and draw.random() < 0.9:
        return PICKLE.changed(body, draw, plain, SPARE_INSTRUCTIONS)
    return content_of(part, draw, plain)


def _pickles(parts: Sequence[Part]) -> list[float]:
    return [30.0 if name.endswith(b".pkl") else 1.0 for name, _ in parts]


CHECKPOINT = Format(_members, _archive, _member, _pickles)

# --- text -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """Lines of cells; `words` take the place of cells, and so do cells of other lines."""

    separators: bytes
    words: Sequence[bytes] = field(default=())

    def changed(self, content: bytes, draw: random.Random, plain: Plain, spare: Sequence[Part] = ()) -> bytes:
        lines = content.split(b"\n")
        for _ in range(draw.choice((1, 1, 2, 3))):
            at = draw.randrange(len(lines))
            change = draw.random()
            if change < 0.6:
                lines[at] = self._line(lines[at], draw, plain)
            elif change < 0.7:
                lines.insert(at, draw.choice([*lines, *(body for _, body in spare)]))
            elif change < 0.8 and len(lines) > 1:
                del lines[at]
            elif change < 0.85:
                draw.shuffle(lines)
            elif change < 0.95:
                lines[at] = plain(lines[at])
            else:
                return plain(content)
        return b"\n".join(lines)

    def _line(self, line: bytes, draw: random.Random, plain: Plain) -> bytes:
        places = [i for i, sign in enumerate(line) if sign in self.separators]
        bounds = [-1, *places, len(line)]
        cells = [at for at in range(len(bounds) - 1) if bounds[at + 1] - bounds[at] > 1]
        at = draw.choice(cells) if cells and draw.random() < 0.8 else draw.randrange(len(bounds) - 1)
        before, cell, after = line[: bounds[at] + 1], line[bounds[at] + 1 : bounds[at + 1]], line[bounds[at + 1] :]
        return before + (draw.choice(self.words) if self.words and draw.random() < 0.7 else plain(cell)) + after
