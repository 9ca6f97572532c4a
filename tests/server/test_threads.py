"""Long bodies wait for each other, short bodies do not wait for long ones."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

from dsv4.server.threads import LONG_BODY_BYTES, BodyThreads


def test_sixty_long_bodies_leave_a_thread_to_a_short_one() -> None:
    done, running, most = threading.Event(), 0, 0
    lock = threading.Lock()

    def work(body: bytes) -> int:
        nonlocal running, most
        if len(body) == 2:
            return 2
        with lock:
            running += 1
            most = max(most, running)
        done.wait(60)
        with lock:
            running -= 1
        return len(body)

    async def main() -> None:
        threads = BodyThreads(long_at_once=2)
        long = [asyncio.create_task(threads.run(work, bytes(LONG_BODY_BYTES))) for _ in range(60)]
        while running < 2:
            await asyncio.sleep(0.002)
        assert await asyncio.wait_for(threads.run(work, b"{}"), 30) == 2
        done.set()
        assert await asyncio.gather(*long) == [LONG_BODY_BYTES] * 60

    with ThreadPoolExecutor(1) as pool:  # other tests may leave an event loop running in this thread
        pool.submit(asyncio.run, main()).result()
    assert most == 2
