"""A part: what one rank says of the file it wrote, left beside it for the first rank to collect."""

from __future__ import annotations

import json
from dataclasses import asdict

from sharded_adamax.checkpoint.manifest import Chunk, Record, StoredFile
from sharded_adamax.checkpoint.writing import Written


def name(rank: int) -> str:
    """Return the file name of a rank's part."""
    return f"__{rank}.part"


def to_json(written: Written) -> bytes:
    """Return the bytes of a part file."""
    return json.dumps(asdict(written), separators=(",", ":")).encode()


def parse(data: bytes) -> Written:
    """Return what `to_json` was given."""
    body = json.loads(data)
    chunks = [
        (tensor, Chunk(tuple(chunk["offsets"]), tuple(chunk["sizes"]), Record(**chunk["record"])))
        for tensor, chunk in body["chunks"]
    ]
    values = [(value, Record(**record)) for value, record in body["values"]]
    return Written(body["file"], StoredFile(**body["stored"]), chunks, values)
