"""What a run prints."""

from collections.abc import Iterator

from tests.chaos.options import Options
from tests.chaos.run import Outcome

SHOWN = 8
KINDS = {
    "lost": "answered, and not in Postgres with that text: lost afterwards, and with no master",
    "doubled": "in Postgres more than once",
    "foreign": "another session's secret in an answer, in Redis or in a row",
    "out_of_order": "gaps, repeats, wrong order, or a history that lacks something",
    "left_over": "outbox or pending list not empty, dead letters, wrong TTLs, a wrong counter",
    "unexpected": "answers and rows that no fault explains",
    "slow": "waits longer than promised",
}


def report(outcome: Outcome) -> str:
    """The table of a run, and each breach that it found."""
    return "\n".join(_lines(outcome))


def _lines(outcome: Outcome) -> Iterator[str]:
    options, ledger = outcome.options, outcome.ledger
    yield (
        f"{outcome.seconds:.0f} s, seed {options.seed}: {options.visitors} visitors, {options.pods} pods, "
        f"{options.workers} workers, lease {options.lease_s:g} s, {_redis(options)}"
    )
    yield ""
    yield f"{'':<22}{'':>6}{'':>9}   longest wait of sessions      refused     lost with   requests of the others"
    yield f"{'fault':<22}{'times':>6}{'answered':>9}{'hit':>13}{'others':>13}{'at most':>13}{'the master':>14}   turned away"
    for kind in outcome.seen:
        hit = f"{kind.hit_s:.1f} s" if kind.hit_s else "-"
        others = f"{kind.others_s:.1f} s" if kind.others_s else "-"
        turned = f"{kind.refused_s:.1f} s" if kind.refused_s else "-"
        gone = str(len(outcome.verdict.with_master.get(kind.name, ())) or "-")
        codes = ", ".join(f"{times} {code}" for code, times in kind.turned_away.most_common())
        waits = f"{hit:>13}{others:>13}{turned:>13}{gone:>14}"
        yield f"{kind.name:<22}{kind.times:>6}{kind.answered:>9}{waits}   {codes or '-'}"
    yield ""
    messages = [message for _, message in ledger.messages()]
    answered = sum(message.answer is not None for message in messages)
    doubtful = sum(message.answer is None and message.doubtful for message in messages)
    refused = len(messages) - answered - doubtful
    requests = answered + sum(len(message.failures) for message in messages)
    yield (
        f"{len(ledger.conversations)} sessions, {sum(one.ended for one in ledger.conversations)} ended, "
        f"{sum(one.erased for one in ledger.conversations)} erased; {len(messages)} messages: {answered} answered, "
        f"{refused} refused, {doubtful} given up without a word"
    )
    yield (
        f"{requests} requests, {ledger.cancelled} cut off by the visitor, "
        f"{ledger.resumed} streams resumed, {ledger.repeated} answers asked for again; "
        f"{outcome.foreign_replies} replies of Redis found not to belong to their call"
    )
    yield f"{outcome.restarts} processes ended by themselves while they started, and were started again"
    stalls_s = [stall.took_s for stall in ledger.disk_stalls.values()]
    if stalls_s:
        yield f"{len(stalls_s)} times Redis waited for its disk, {max(stalls_s):.1f} s at most: no wait above counts that"
    yield f"drained in {outcome.drain_s:.1f} s; {ledger.looks} looks at the TTLs and the counter of the outbox on the way"
    yield ""
    for name, found in outcome.verdict.kinds().items():
        yield f"{name.replace('_', ' '):<14}{len(found):>6}   {KINDS[name]}"
        for text in found[:SHOWN]:
            yield f"                       {text}"
        if len(found) > SHOWN:
            yield f"                       and {len(found) - SHOWN} more"
    lost = [what for found in outcome.verdict.with_master.values() for what in found]
    yield ""
    may = "which nothing may be here" if options.loses_nothing else "which only that master knew, and Postgres did not yet"
    yield f"{len(lost)} lost with the master: turns, ends, erasures, users and sessions {may}"
    for text in lost[:SHOWN]:
        yield f"                       {text}"
    if len(lost) > SHOWN:
        yield f"                       and {len(lost) - SHOWN} more"


def _redis(options: Options) -> str:
    """What kind of Redis it was."""
    words = [f"Redis {options.topology} with appendfsync {options.appendfsync}"]
    if options.min_replicas:
        words.append("min-replicas-to-write 1")
    if options.replicas:
        words.append(f"answers that {options.replicas} replicas have")
    return ", ".join(words)
