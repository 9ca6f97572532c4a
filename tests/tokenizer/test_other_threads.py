"""Other Python threads run while a long text is tokenized: one request must not freeze all others."""

import threading
import time

from dsv4.config import nano_path
from dsv4.tokenizer import Tokenizer


class Heartbeat:
    """A thread that wakes every few milliseconds; `longest_pause`: longest time between two wakes, in seconds."""

    def __enter__(self) -> "Heartbeat":
        self.longest_pause = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(0.002):
            now = time.monotonic()
            self.longest_pause, last = max(self.longest_pause, now - last), now


def test_a_heartbeat_goes_on_while_a_long_text_is_tokenized() -> None:
    tokenizer = Tokenizer.from_pretrained(nano_path())
    text = "The cat sat on the mat, 12 + 30 = 42.\n" * 20_000
    for work in (tokenizer.encode, lambda text: tokenizer.encode_rendered(text, [])):
        tries = list[tuple[float, float]]()
        while len(tries) < 5 and not any(pause < seconds / 3 for pause, seconds in tries):  # a machine may pause too
            with Heartbeat() as heart:
                started = time.monotonic()
                work(text)
                seconds = time.monotonic() - started
            tries.append((heart.longest_pause, seconds))
        assert any(pause < seconds / 3 for pause, seconds in tries), f"(pause, seconds) of each try: {tries}"
