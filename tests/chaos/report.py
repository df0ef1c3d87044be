"""What a run prints."""

from collections.abc import Iterator

from tests.chaos.run import Outcome

SHOWN = 8
KINDS = {
    "lost": "answered, and not in Postgres with that text",
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
        f"{options.workers} workers, lease {options.lease_s:g} s, Redis with appendfsync {options.appendfsync}"
    )
    yield ""
    yield f"{'':<22}{'':>6}{'':>9}   longest wait of sessions   requests of the others"
    yield f"{'fault':<22}{'times':>6}{'answered':>9}{'hit':>13}{'others':>13}     that were turned away"
    for kind in outcome.seen:
        hit = f"{kind.hit_s:.1f} s" if kind.hit_s else "-"
        others = f"{kind.others_s:.1f} s" if kind.others_s else "-"
        codes = ", ".join(f"{times} {code}" for code, times in kind.turned_away.most_common())
        yield f"{kind.name:<22}{kind.times:>6}{kind.answered:>9}{hit:>13}{others:>13}     {codes or '-'}"
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
    for name, found in vars(outcome.verdict).items():
        yield f"{name.replace('_', ' '):<14}{len(found):>6}   {KINDS[name]}"
        for text in found[:SHOWN]:
            yield f"                       {text}"
        if len(found) > SHOWN:
            yield f"                       and {len(found) - SHOWN} more"
