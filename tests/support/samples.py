"""What real pods and workers of older versions left in Redis: `tests/data/formats`. The files are never changed."""

import json
from pathlib import Path
from typing import Any

from persistence.redis.connection import Client

SAMPLES = Path(__file__).parents[1] / "data" / "formats"
FLUSHED = "session_of_format_1_flushed"
WAITING = "session_of_format_1_waiting"
REFUSED = "session_of_format_1_with_a_dead_letter"

Sample = dict[str, dict[str, Any]]


def load_sample(records: int = 1) -> Sample:
    """Every key that was stored, the records in that format."""
    sample: Sample = {}
    for number in range(1, records + 1):
        for file in sorted((SAMPLES / str(number)).glob("*.json")):
            sample |= json.loads(file.read_text())
    return sample


async def store_sample(client: Client, sample: Sample) -> None:
    """Puts the sample into Redis."""
    for key, stored in sample.items():
        value = stored["value"]
        match stored["type"]:
            case "hash":
                await client.hset(key, mapping=value)
            case "stream":
                for entry, fields in value.items():
                    await client.xadd(key, fields, id=entry)
            case "zset":
                await client.zadd(key, value)
            case "string":
                await client.set(key, value)
            case kind:
                raise AssertionError(kind)
        if stored["ttl"]:
            await client.expire(key, 300)
