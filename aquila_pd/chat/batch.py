"""`aquila-pd generate DIR`: batch generation over prompts or JSONL rows, with continuous batching."""

import argparse
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

from ..generation import SamplingParams, Sequence
from ..text.answer import Answer
from ..text.loading import Loaded, load
from ..utils.command import run
from ..utils.console import visible
from ..utils.errors import GenerationError
from ..utils.progress import Bar, Timer
from ..utils.units import counted, duration
from .options import add_loading, add_sampling, loading_of, max_new_tokens, sampling_of
from .rows import Row, RowFile, check_output, encode_rows, in_order, result_of, rows_of_file, rows_of_prompts

TEXT = "Continue prompts, or answer them, many at a time."
NOTES = """\
A row of --file is {"prompt": TEXT} or {"messages": [{"role": ..., "content": ...}, ...]}; what else it holds is written
again beside its result: text, finish_reason (stop, length, error), tokens, prompt_tokens, and error where there is one.
A row that fails does not stop the others. When the run is interrupted, the rows that are finished are in
OUTPUT.partial. Status: 0 when every row has its text, 1 when one has not, 130 after Ctrl-C."""
AHEAD = 2  # times the slots: so many rows are with the engine


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="aquila-pd generate",
        description=TEXT,
        epilog=NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_loading(made)
    source = made.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times")
    source.add_argument("--file", type=Path, metavar="FILE.jsonl", help="prompts, one JSON object a line")
    made.add_argument(
        "--output", type=Path, metavar="FILE.jsonl", help="results (default: the terminal; text only for --prompt)"
    )
    made.add_argument("--overwrite", action="store_true", help="replace an earlier OUTPUT once this one is complete")
    made.add_argument("--chat", action="store_true", help="a prompt is what a user says (default: a text to continue)")
    made.add_argument("--slots", type=int, default=8, metavar="N", help="so many at once (default: 8)")
    add_sampling(made)
    made.add_argument("--seed", type=int, metavar="N", help="of the first row, N + 1 of the next (default: others)")
    return made


def main(argv: list[str] | None = None) -> int:
    """0 when every row has its text, 1 when one has not, else as utils.command.run() says."""
    args = parser().parse_args(argv)
    return run(lambda: _main(args))


def _main(args: argparse.Namespace) -> int:
    sampling_of(args)  # what has no meaning is said before minutes of loading
    if args.output is not None:
        check_output(args.output, overwrite=args.overwrite, source=args.file)
    rows = rows_of_file(args.file) if args.file is not None else rows_of_prompts(args.prompt)
    slots = min(args.slots, len(rows))
    needs_template = args.chat or any("messages" in row.given for row in rows)
    loaded = load(args.folder, slots=slots, needs_template=needs_template, **loading_of(args))
    encode_rows(rows, loaded, chat=args.chat)
    batch = Batch(loaded, args, slots=slots)
    if args.output is None and args.file is None:
        return batch.show(rows)
    return batch.write(rows, args.output)


class Batch:
    """Runs rows through the engine of a loaded model with this many slots."""

    def __init__(self, loaded: Loaded, args: argparse.Namespace, *, slots: int):
        self.loaded, self.args, self.slots = loaded, args, slots
        self.limit = max_new_tokens(args.max_new_tokens, loaded.engine)

    def show(self, rows: list[Row]) -> int:
        """Texts on stdout: of one row as it comes, of several each under its prompt. Returns the exit status."""
        alone, failed = len(rows) == 1, 0
        for row, result in zip(rows, in_order(self.finished(rows, say=_say if alone else None), {}), strict=True):
            _say("\n" if alone else f"==> {row.given['prompt']} <==\n{result['text']}\n")
            if "error" in result:
                failed += 1
                print(f"error: {row.where}: {result['error']}", file=sys.stderr)
        return 1 if failed else 0

    def write(self, rows: list[Row], output: Path | None) -> int:
        """Results as JSONL, in the order of the rows. Returns the exit status."""
        with_bar = output is not None or not sys.stdout.isatty()
        file, held, progress = RowFile(output), {}, Progress(len(rows), with_bar=with_bar)
        try:
            with closing(progress.watch(self.finished(rows))) as finished:
                for result in in_order(finished, held):
                    file.write(result)
            file.finish()
        except BaseException as error:
            with suppress(OSError):  # a full disk, which was the reason
                for number in sorted(held):
                    file.write(held[number])
            error.add_note(file.leave())
            raise
        progress.end()
        return 1 if progress.failed else 0

    def finished(self, rows: list[Row], *, say: Callable[[str], None] | None = None) -> Iterator[tuple[int, dict]]:
        """(number of the row, its result), as rows finish."""
        engine, waiting, running = self.loaded.engine, deque(enumerate(rows)), {}
        while waiting or running:
            while waiting and len(running) < AHEAD * self.slots:
                number, row = waiting.popleft()
                answer = self._answer(row, say)
                try:
                    (sequence,) = engine.add(row.ids, self._params(number, row), answer)
                except GenerationError as error:  # too long, empty: this row's alone
                    yield number, result_of(row, text="", finish_reason="error", tokens=0, error=error)
                else:
                    running[number] = (row, answer, sequence)
            engine.step()
            for number in [n for n, (_, _, sequence) in running.items() if sequence.finish_reason is not None]:
                yield number, _result(*running.pop(number))

    def _answer(self, row: Row, say: Callable[[str], None] | None) -> Answer:
        tokenizer = self.loaded.tokenizer
        if not row.chat:
            return Answer(tokenizer, say=say, follows=True)
        return Answer(tokenizer, say=say, stop=self.loaded.require_prompts().stop_strings, strip_start=True)

    def _params(self, number: int, row: Row) -> SamplingParams:
        seed = None if self.args.seed is None else self.args.seed + number
        stop_ids = self.loaded.require_prompts().stop_ids if row.chat else self.loaded.stop_ids
        return sampling_of(self.args, max_new_tokens=self.limit, seed=seed, stop_ids=stop_ids)


def _result(row: Row, answer: Answer, sequence: Sequence) -> dict:
    reason = "stop" if answer.stop_string is not None else sequence.finish_reason
    return result_of(row, text=answer.text, finish_reason=reason, tokens=len(sequence.tokens), error=sequence.error)


def _say(text: str) -> None:
    print(visible(text) if sys.stdout.isatty() else text, end="", flush=True)


class Progress:
    """Rows done and tokens per second on stderr: a bar on a terminal, lines elsewhere, and a summary at the end.

    with_bar: False where the results themselves go to the terminal.
    """

    def __init__(self, rows: int, *, with_bar: bool):
        self.rows, self.done, self.tokens, self.failed = rows, 0, 0, 0
        self._timer, self._bar = Timer(), Bar("rows", rows, draw=with_bar)

    def watch(self, finished: Iterator[tuple[int, dict]]) -> Iterator[tuple[int, dict]]:
        """The same results, counted. To be closed."""
        bar = self._bar
        try:
            bar.update(f"0 of {self.rows:,}")
            for number, result in finished:
                self.done += 1
                self.tokens += result["tokens"]
                self.failed += "error" in result
                bar.update(f"{self._words}, about {duration(self._left)} left", self.done)
                if not bar.is_drawn and self._timer.due():
                    print(f"  {self._words}", file=sys.stderr, flush=True)
                yield number, result
        finally:
            bar.close()

    @property
    def _words(self) -> str:
        return f"{self.done:,} of {self.rows:,} rows, {self.rate:.1f} tokens/s"

    @property
    def _left(self) -> float:
        return self._timer.seconds / self.done * (self.rows - self.done)

    @property
    def rate(self) -> float:
        return self.tokens / self._timer.seconds

    def end(self) -> None:
        failed = f", {self.failed:,} of them failed" if self.failed else ""
        tokens = f"{counted(self.tokens, 'token')}, {self.rate:.1f} tokens/s"
        print(f"{counted(self.rows, 'row')}{failed}; {tokens}", file=sys.stderr, flush=True)
