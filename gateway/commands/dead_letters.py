"""`gateway dead`: records that Postgres refused."""

import argparse

from gateway.access.audit import audited, command_line_operator
from gateway.app import Stores
from gateway.commands.environment import open_stores
from persistence.model.codec import is_fact
from persistence.model.ids import masked
from persistence.redis.outbox import DeadLetter


async def dead_letters(options: argparse.Namespace) -> None:
    """Lists the dead letters; with `--retry` puts each back on the outbox."""
    async with open_stores() as stores:
        letters, unreachable = await stores.outbox.find_dead_letters()
        for letter in letters:
            retried = options.retry and await _retry(stores, letter)
            fact = letter.fact if is_fact(letter.fact) else "unreadable"
            print(f"{letter.entry}  {fact:<12} {letter.died_at}  {'retried' if retried else letter.reason}")
    if not letters:
        print("no dead letters")
    if unreachable:
        print(f"{unreachable} of {stores.keys.partitions} partitions cannot be reached: theirs are missing here")


async def _retry(stores: Stores, letter: DeadLetter) -> bool:
    operator, session = command_line_operator(), masked(letter.session_id)
    with audited("dead_letter_retried", operator, entry=letter.entry, partition=letter.partition, session=session) as facts:
        queued = await stores.outbox.retry_dead(letter)
        facts["queued"] = queued
    return queued
