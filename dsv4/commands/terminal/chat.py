"""`dsv4 chat`: talk to a model in the terminal. Replies stream, thinking in a dim panel; Ctrl-C stops a reply."""

from __future__ import annotations

import contextlib
import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from dsv4.commands.options import EFFORTS
from dsv4.commands.terminal.chat_session import ChatSession
from dsv4.engine.errors import EngineError
from dsv4.engine.llm import LLM
from dsv4.kernels import backends
from dsv4.model_folder import resolve_model
from dsv4.text import keep_foreign_bytes

HELP = """/think          switch thinking on or off
/effort LEVEL   low, high or max: how much to think
/reset          forget the conversation
/exit           leave (so does Ctrl-D)
Ctrl-C stops a reply."""
TAIL_LINES = 12  # of thinking shown while it runs; once it ends all of it is shown


def chat(
    model: str | None,
    *,
    thinking: bool,
    effort: str | None,
    max_tokens: int,
    temperature: float | None,
    top_p: float,
    seed: int | None,
    **engine_options: Any,
) -> None:
    """Reads questions and commands until the input ends. `engine_options`: keywords of LLM."""
    console = Console()
    backends.native_module()  # resolved before loading, so that a fallback warning is printed first
    folder = resolve_model(model, engine_options.pop("revision", None))  # before the spinner: it shows progress bars
    with console.status("loading the model"):
        llm = LLM(folder, max_num_seqs=1, **engine_options)
        session = ChatSession(
            llm,
            thinking=thinking,
            effort=effort,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
    console.print(f"[bold]{llm.name}[/] is here. /help lists the commands.")
    # Line editing and history for input(), where the platform has it.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # pyright: ignore[reportUnusedImport]
    keep_foreign_bytes(sys.stdin)
    run(session, console)


def run(session: ChatSession, console: Console) -> None:
    """Input loop: one command or question per line. Ctrl-C at the prompt exits, during a reply it stops the reply."""
    while True:
        try:
            line = console.input("\n[bold cyan]you>[/] ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line == "/exit":
            return
        if line.startswith("/"):
            console.print(command(session, line), style="dim", markup=False)
        elif line:
            reply(session, console, line)


def command(session: ChatSession, line: str) -> str:
    """Runs a slash command; returns the message to print."""
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    if name == "/think":
        session.thinking = not session.thinking
        return f"thinking is {'on' if session.thinking else 'off'}"
    if name == "/effort":
        if argument not in EFFORTS:
            return f"/effort {argument}: one of {', '.join(EFFORTS)} is needed"
        session.effort = argument
        return f"effort is {argument}"
    if name == "/reset":
        session.reset()
        return "the conversation is forgotten"
    return HELP if name == "/help" else f"{name} is not a command\n{HELP}"


def reply(session: ChatSession, console: Console, question: str) -> None:
    """Streams one reply; prints the reason if the question does not fit or the engine fails."""
    started = time.monotonic()
    note = ""
    pieces = session.ask(question)
    try:
        with ReplyView(console) as view:
            for kind, text in pieces:
                if kind == "thinking":
                    view.think(text)
                else:
                    view.say(text)
    except KeyboardInterrupt:
        note = ", stopped"
    except (ValueError, EngineError) as error:
        console.print(str(error), style="red", markup=False)
        return
    finally:
        pieces.close()
    seconds = max(time.monotonic() - started, 1e-9)
    console.print(
        f"{session.num_tokens} tokens, {session.num_tokens / seconds:.0f} tokens/s{note}", style="dim", highlight=False
    )


class ReplyView:
    """One reply on the screen: a thinking panel that shows the latest lines, then the streamed answer."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._thinking = ""
        self._started = time.monotonic()
        self._live: Live | None = None
        self._answered = False

    def __enter__(self) -> ReplyView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_thinking()
        if self._answered:
            self._console.print()

    def think(self, text: str) -> None:
        self._thinking += text
        if self._live is None:
            self._live = Live(self._panel(), console=self._console, refresh_per_second=8)
            self._live.start()
        self._live.update(self._panel(TAIL_LINES))

    def say(self, text: str) -> None:
        self._end_thinking()
        self._answered = True
        self._console.print(text, end="", markup=False, highlight=False, soft_wrap=True)

    def _end_thinking(self) -> None:
        if self._live is not None:
            self._live.update(self._panel())
            self._live.stop()
            if not self._console.is_terminal:
                self._console.line()  # outside a terminal rich does not end the panel's last line
            self._live = None

    def _panel(self, tail: int | None = None) -> Panel:
        lines = self._thinking.splitlines()
        shown = "\n".join(lines[-tail:] if tail else lines)
        title = f"thinking, {time.monotonic() - self._started:.1f} s"
        return Panel(Text(shown, style="dim"), title=title, title_align="left", border_style="dim")
