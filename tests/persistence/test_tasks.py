"""Work side by side: bounded, in order, and nothing left behind."""

import asyncio
import gc

import pytest

from persistence.tasks import gather_bounded, retrieve


async def test_work_side_by_side_is_bounded_and_keeps_its_order() -> None:
    running = most = 0

    async def work(number: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(3):
            await asyncio.sleep(0)  # lets the others run
        running -= 1
        return number

    assert await gather_bounded((work(number) for number in range(100)), at_once=4) == list(range(100))
    assert most == 4


async def test_work_side_by_side_ends_before_its_error_is_raised() -> None:
    ended = []

    async def work(number: int) -> None:
        for _ in range(number):
            await asyncio.sleep(0)
        ended.append(number)
        if number == 0:
            raise ValueError("the first of all")

    with pytest.raises(ValueError, match="the first of all"):
        await gather_bounded((work(number) for number in range(5)), at_once=2)
    assert ended == [0, 1, 2, 3, 4]


# A coroutine that nobody awaits would warn, and a warning fails the test.
async def test_work_side_by_side_that_is_cancelled_leaves_nothing_behind() -> None:
    begun = asyncio.Event()

    async def work() -> None:
        begun.set()
        await asyncio.Event().wait()

    working = asyncio.ensure_future(gather_bounded((work() for _ in range(5)), at_once=1))  # noqa: RUF006
    await begun.wait()
    working.cancel()
    await asyncio.wait({working})
    assert working.cancelled()
    gc.collect()


async def test_the_error_of_an_abandoned_task_is_not_reported_as_never_retrieved() -> None:
    reported: list[dict[str, object]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: reported.append(context))

    async def fail() -> None:
        raise ValueError("nobody waits")

    try:
        for callbacks in ([retrieve], []):
            task = asyncio.create_task(fail())
            for callback in callbacks:
                task.add_done_callback(callback)
            await asyncio.wait({task})
            del task
            gc.collect()
            await asyncio.sleep(0)
            assert len(reported) == (0 if callbacks else 1), "control: without the callback asyncio reports it"
    finally:
        loop.set_exception_handler(None)
