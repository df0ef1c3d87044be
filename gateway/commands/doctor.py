"""`gateway doctor`: what is wrong with the stores, and what to do about it."""

import argparse
from collections.abc import AsyncIterator, Iterator, Sequence

import msgspec

from gateway.app import Stores
from gateway.commands.environment import STORES, CommandError, command_settings, open_stores
from gateway.settings import Settings
from persistence.checkup import Finding, check_epochs, check_outbox, check_postgres, check_redis
from persistence.postgres.migrate import load_migrations


async def doctor(options: argparse.Namespace) -> None:
    """Prints the findings. Raises CommandError when one is wrong."""
    settings = command_settings(*STORES)
    async with open_stores(settings) as stores:
        findings = [finding async for finding in examine(stores, settings)]
    wrong = sum(finding.level == "wrong" for finding in findings)
    if options.json:
        print(msgspec.json.format(msgspec.json.encode({"healthy": not wrong, "findings": findings})).decode())
    else:
        print("\n".join(table(findings)))
    if wrong:
        raise CommandError(f"{wrong} {'check' if wrong == 1 else 'checks'} failed")


async def examine(stores: Stores, settings: Settings) -> AsyncIterator[Finding]:
    """Every check; what needs Redis is left out when Redis cannot be used."""
    of_redis = [finding async for finding in check_redis(stores.client, stores.keys, settings.redis_replicas)]
    for finding in of_redis:
        yield finding
    if of_redis[0].level == "ok":
        async for finding in check_epochs(stores.epochs, stores.scripts, stores.keys.partitions):
            yield finding
        async for finding in check_outbox(stores.outbox):
            yield finding
    async for finding in check_postgres(stores.postgres, len(load_migrations())):
        yield finding


def table(findings: Sequence[Finding]) -> Iterator[str]:
    """A line for each finding: level, subject, what was found, and the remedy."""
    width = max(len(finding.about) for finding in findings)
    for finding in findings:
        remedy = f" -> {finding.remedy}" if finding.remedy else ""
        yield f"{finding.level:<5}  {finding.about:<{width}}  {finding.text}{remedy}"
