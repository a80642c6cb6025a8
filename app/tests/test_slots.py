from __future__ import annotations

import asyncio

import pytest

from nox_api.slots import QueueFullError, Slots


async def hold(slots: Slots, order: list[str], name: str, release: asyncio.Event) -> None:
    async with slots.one():
        order.append(name)
        await release.wait()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_first_come_first_served() -> None:
    async def scenario() -> None:
        slots, order, release = Slots(1, 2), list[str](), asyncio.Event()
        tasks = []
        for name in "abc":
            tasks.append(asyncio.ensure_future(hold(slots, order, name, release)))
            await settle()
        assert (slots.used, slots.queued, order) == (1, 2, ["a"])
        with pytest.raises(QueueFullError) as caught:
            async with slots.one():
                pass
        assert caught.value.retry_after >= 1
        release.set()
        await asyncio.gather(*tasks)
        assert (slots.used, slots.queued, order) == (0, 0, ["a", "b", "c"])

    asyncio.run(scenario())


def test_who_leaves_the_queue_frees_a_place() -> None:
    async def scenario() -> None:
        slots, order, release = Slots(1, 1), list[str](), asyncio.Event()
        first = asyncio.ensure_future(hold(slots, order, "a", release))
        await settle()
        second = asyncio.ensure_future(hold(slots, order, "b", release))
        await settle()
        second.cancel()
        await settle()
        assert slots.queued == 0
        release.set()
        await first
        assert slots.used == 0

    asyncio.run(scenario())


def test_a_slot_given_at_the_moment_of_leaving_is_passed_on() -> None:
    async def scenario() -> None:
        slots, order, release = Slots(1, 2), list[str](), asyncio.Event()
        async with slots.one():
            second = asyncio.ensure_future(hold(slots, order, "b", release))
            third = asyncio.ensure_future(hold(slots, order, "c", release))
            await settle()
        second.cancel()  # it was given the slot, and has not woken yet
        release.set()
        await third
        assert order == ["c"] and slots.used == 0

    asyncio.run(scenario())


def test_resize_lets_more_in() -> None:
    async def scenario() -> None:
        slots, order, release = Slots(1, 1), list[str](), asyncio.Event()
        tasks = [asyncio.ensure_future(hold(slots, order, name, release)) for name in "ab"]
        await settle()
        slots.resize(2, 1)
        await settle()
        assert order == ["a", "b"]
        release.set()
        await asyncio.gather(*tasks)

    asyncio.run(scenario())


def test_retry_after_grows_with_what_runs_take() -> None:
    slots = Slots(1, 1)
    before = slots.retry_after()
    slots._usual = 12.0
    assert before == 1 and slots.retry_after() == 12
