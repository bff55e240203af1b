"""Random events over many streams: a seeded schedule, so that a failure can be run again."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from tests.e2e.stack import Prompt, Session, Stack, Traffic
from tests.tiny_model import make_tiny_model

NUM_EVENTS = 20
NUM_STREAMS = 8
MIN_ANSWERS = 40
SEED = 20231127


# Two pipelines of two stages where the fleet can supply them: an event changes one shape and spares another.
TARGETS = ("--pipelines", "2", "--stages", "2", "--tensor", "1")


async def test_random_events(tmp_path: Path) -> None:
    choose = random.Random(SEED)
    model = make_tiny_model(tmp_path / "tiny", max_len=4096)
    options = ("--reduction", "fixed", "--dtype", "float32", "--instances", "4", *TARGETS)
    stack = Stack(tmp_path / "state", model, *options, environ={"SPOTSERVE_ENGINE_KV_TRANSFER": "always"}).start()
    prompts = [
        Prompt(
            ids=tuple(choose.randrange(3, 250) for _ in range(choose.randrange(2, 60))),
            max_tokens=choose.randrange(20, 120),
            temperature=choose.choice([0.0, 1.0]),
            seed=choose.randrange(1 << 30),
        )
        for _ in range(NUM_STREAMS)
    ]
    try:
        async with Session(stack) as session:
            await session.quiet(4)
            expected = [answer.ids for answer in await asyncio.gather(*map(session.stream, prompts))]
            async with Traffic(session, prompts, expected) as traffic:
                for _ in range(NUM_EVENTS):
                    await _random_event(session, choose)
                    await asyncio.sleep(choose.uniform(0.0, 1.5))  # Part of the schedule, not a wait.
                await session.until(lambda: len(traffic.answers) >= MIN_ANSWERS, f"{MIN_ANSWERS} answers")
                if not await session.ready_instances():
                    await session.add()
            await session.settled()
    finally:
        stack.stop()


async def _random_event(session: Session, choose: random.Random) -> None:
    """Preempt, kill or add; never more than five instances, and an addition when nothing is left."""
    ready = await session.ready_instances()
    num_alive = await session.num_alive()
    kind = choose.choice(["preempt", "preempt", "kill", "add", "add"])
    if num_alive <= 1 or (kind == "add" and num_alive < 5):
        await session.add()
    elif ready and kind == "kill":
        await session.kill(choose.choice(ready))
    elif ready:
        await session.preempt(choose.choice(ready), choose.choice([0.5, 2.0, 4.0]))
