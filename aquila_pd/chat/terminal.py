"""`aquila-pd chat DIR`: an interactive multi-turn chat in a terminal, or line by line through a pipe."""

import argparse
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ..generation import Sequence
from ..text.answer import Answer
from ..text.answer import run as run_engine
from ..text.loading import Loaded, load
from ..utils.command import Stopped, run
from ..utils.console import Screen, is_text, prepare_input
from ..utils.errors import AquilaError, GenerationError
from ..utils.units import counted
from .conversation import Conversation
from .options import add_loading, add_sampling, loading_of, max_new_tokens, sampling_of

HELP = "Talk to the model of a converted folder. Type /help for what can be done besides."
COMMANDS = {
    "/system": "TEXT   what the system says from now on; without TEXT: show it",
    "/reset": "forget all turns",
    "/retry": "take the last answer back and ask for another",
    "/save": "FILE   write the conversation as JSON",
    "/load": "FILE   go on with a conversation written by /save",
    "/help": "this list",
    "/quit": "leave (or Ctrl-D)",
}
LEAVING = "Ctrl-D or /quit leaves; Ctrl-C stops an answer."
NOT_TEXT = (
    "This line holds bytes that are no text here: the terminal or the file has another encoding than "
    "{encoding}. It was not sent. Use UTF-8, for example with LANG=C.UTF-8."
)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="aquila-pd chat", description=HELP)
    add_loading(made)
    add_sampling(made)
    made.add_argument("--seed", type=int, metavar="N", help="the same inputs give the same answers (default: others)")
    made.add_argument("--system", metavar="TEXT", help="what the system says (default: what the template has)")
    made.add_argument("--load", type=Path, metavar="FILE", help="go on with a conversation written by /save")
    return made


def main(argv: list[str] | None = None) -> int:
    """0 when the user leaves, 1 when the chat could not begin, else as utils.command.run() says."""
    args = parser().parse_args(argv)
    return run(lambda: _main(args))


def _main(args: argparse.Namespace) -> None:
    sampling_of(args)  # what has no meaning is said before minutes of loading
    screen = Screen()
    prepare_input(screen.interactive)
    if screen.interactive:
        screen.note(f"Loading {args.folder} ...")
    loaded = load(args.folder, slots=1, needs_template=True, **loading_of(args))
    chat = Chat(loaded, screen, args)
    if screen.interactive:
        template, tokens = loaded.require_prompts().name, loaded.engine.max_length
        screen.note(f"{loaded.name}: chat template {template}, context of {tokens:,} tokens.")
        screen.note(f"/help lists commands. {LEAVING}")
    chat.talk()


class Chat:
    """The read-eval loop: each input line is a command or a user turn."""

    def __init__(self, loaded: Loaded, screen: Screen, args: argparse.Namespace):
        self.loaded, self.screen, self.args = loaded, screen, args
        self.max_new_tokens = max_new_tokens(args.max_new_tokens, loaded.engine)
        room = loaded.engine.max_length - self.max_new_tokens
        if room < 1:
            raise GenerationError(
                f"--max-new-tokens {self.max_new_tokens} leaves no room for a prompt: the model holds "
                f"{loaded.engine.max_length} tokens. Ask for fewer."
            )
        self.conversation = Conversation(loaded.require_prompts(), room=room)
        if args.load is not None:
            self.conversation.load(args.load)
        if args.system is not None:
            self.conversation.set_system(args.system)
        self._answers = 0  # asked for; each has its own seed
        self._failed: str | None = None  # the text whose answer failed, for /retry

    def talk(self) -> None:
        """The whole conversation; returns when the input has ended or the person leaves."""
        going_on = True
        while going_on:
            try:
                line = self.screen.ask("> ")
                if line is None and self.screen.interactive:
                    print()
                going_on = line is not None and self._take(line)
            except KeyboardInterrupt as error:
                if isinstance(error, Stopped):
                    raise
                print()
                self.screen.note(LEAVING)

    def _take(self, line: str) -> bool:
        """Do what a line asks; False when it asks to leave. Named errors are printed, and the chat goes on."""
        try:
            if not is_text(line):
                self.screen.note(NOT_TEXT.format(encoding=sys.stdin.encoding))
            elif line.startswith("/"):
                return self._command(*line.split(maxsplit=1))
            elif line.strip():
                self._turn(line.strip())
        except AquilaError as error:
            self.screen.end_line()
            self.screen.note(f"error: {error}")
        return True

    # -------------------------------------------------------------------------------------------------- commands

    def _command(self, word: str, rest: str = "") -> bool:
        """Carry a command out; False for /quit."""
        rest = rest.strip()
        if word not in COMMANDS:
            known = ", ".join(COMMANDS)
            self.screen.note(f"There is no {word}. Known: {known}. To send such a line, begin it with a space.")
        elif word in ("/save", "/load") and not rest:
            self.screen.note(f"{word} needs the name of a file.")
        else:
            actions: dict[str, Callable[[str], None]] = {
                "/system": self._system,
                "/reset": self._reset,
                "/retry": self._retry,
                "/save": self._save,
                "/load": self._load,
                "/help": self._help,
            }
            if word == "/quit":
                return False
            actions[word](rest)
        return True

    def _system(self, text: str) -> None:
        if text:
            self.conversation.set_system(text)
        said = self.conversation.system
        self.screen.note("The system says what the template has." if said is None else f"The system says: {said}")

    def _reset(self, rest: str) -> None:
        self.conversation.reset()
        self._failed = None
        self.screen.note("All turns are forgotten.")

    def _retry(self, rest: str) -> None:
        if self._failed is not None:
            self._turn(self._failed)
            return
        turn = self.conversation.take_back()
        if turn is None:
            self.screen.note("There is no answer to take back.")
            return
        kept = False
        try:
            kept = self._turn(turn[0])
        finally:
            if not kept:
                self.conversation.add(*turn)
                self._failed = None

    def _save(self, name: str) -> None:
        self.conversation.save(Path(name).expanduser())
        self.screen.note(f"Saved as {name}.")

    def _load(self, name: str) -> None:
        self.conversation.load(Path(name).expanduser())
        self.screen.note(f"{len(self.conversation.messages) // 2} turns loaded.")

    def _help(self, rest: str) -> None:
        for word, what in COMMANDS.items():
            self.screen.note(f"  {word:<8} {what}")

    # ----------------------------------------------------------------------------------------------------- answers

    def _turn(self, text: str) -> bool:
        """Ask the model and show its answer; True when the turn is kept. Raises AquilaError when there is no answer."""
        prompts, left_out = self.loaded.require_prompts(), self.conversation.left_out
        ids = self.conversation.ids(text)
        self._failed = text
        stop, clock = prompts.stop_strings, Clock()
        answer = Answer(self.loaded.tokenizer, say=self.screen.piece, stop=stop, strip_start=True)
        sequence, stopped = self._generate(ids, lambda event: clock.tick() or answer(event))
        self.screen.end_line()
        if sequence.error is not None and not stopped:
            raise sequence.error
        left_out = self.conversation.left_out - left_out
        self.screen.note(summary(sequence, clock, kept=bool(answer.text), stopped=stopped, left_out=left_out))
        if not answer.text:
            return False
        self._failed = None
        self.conversation.add(text, answer.text)
        return True

    def _generate(self, ids: list[int], listener: Callable) -> tuple[Sequence, bool]:
        """The sequence when it has ended, and whether Ctrl-C ended it."""
        engine, seed = self.loaded.engine, self.args.seed
        params = sampling_of(
            self.args,
            max_new_tokens=self.max_new_tokens,
            seed=None if seed is None else seed + self._answers,
            stop_ids=self.loaded.require_prompts().stop_ids,
        )
        self._answers += 1
        with Interrupts() as interrupts:
            (sequence,) = engine.add(ids, params, listener)
            try:
                run_engine(engine, [sequence], until=lambda: interrupts.asked)
            except KeyboardInterrupt as error:
                if isinstance(error, Stopped):
                    raise
        return sequence, interrupts.asked


class Interrupts:
    """SIGINT handler: the first Ctrl-C stops after the running step, a second one raises KeyboardInterrupt in it."""

    def __init__(self):
        self.asked = False

    def __enter__(self) -> "Interrupts":
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


class Clock:
    """Times of the first and the last token, for the latency and throughput in the summary."""

    def __init__(self):
        self.start = self.last = time.perf_counter()
        self.first: float | None = None

    def tick(self) -> None:
        self.last = time.perf_counter()
        if self.first is None:
            self.first = self.last


def summary(sequence: Sequence, clock: Clock, *, kept: bool, stopped: bool, left_out: int) -> str:
    """The line below an answer: tokens, tokens/s, time to first token, reused prompt tokens."""
    tokens = len(sequence.tokens)
    parts = [counted(tokens, "token")]
    if tokens > 1 and clock.last > clock.first:
        parts.append(f"{(tokens - 1) / (clock.last - clock.first):.1f} tokens/s")
    if clock.first is not None and tokens:
        parts.append(f"first after {clock.first - clock.start:.2f} s")
    parts.append(f"{sequence.reused:,} of {counted(len(sequence.prompt), 'prompt token')} reused")
    if left_out:
        parts.append(f"{counted(left_out, 'old turn')} left out")
    if stopped:
        parts.append("stopped by Ctrl-C")
    elif sequence.finish_reason == "length":
        parts.append("cut, see --max-new-tokens")
    if not kept:
        parts.append("no answer, the turn is not kept")
    return f"[{'; '.join(parts)}]"
