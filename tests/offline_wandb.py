"""What an offline run of wandb holds."""

import json
import struct
import time
from pathlib import Path


def wandb_records(run_dir: Path) -> list:
    """The records of a folder's newest offline run, which wandb may finish writing a moment after `finish`."""
    from wandb.proto.wandb_internal_pb2 import Record

    until = time.monotonic() + 60
    while True:
        paths = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
        data = paths[-1].read_bytes() if paths else b""
        found = [Record.FromString(content) for content in record_contents(data)]
        if any(record.HasField("exit") for record in found) or time.monotonic() > until:
            return found
        time.sleep(0.1)


def history(records: list) -> list[dict]:
    rows = [record.history for record in records if record.HasField("history")]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item} for row in rows]


def record_contents(data: bytes) -> list[bytes]:
    """What a log file of LevelDB's format holds: blocks of 32 KiB, records in parts of a type and a length."""
    contents, place, part = [], 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, last
            contents.append(part)
            part = b""
    return contents
