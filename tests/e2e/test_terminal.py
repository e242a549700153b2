"""`aquila-pd chat`: through a pipe line by line, and in a real pseudo-terminal with a person's keys."""

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from chat_factory import tiny_chat_folder
from fork_server import PIPE, warm
from paths import ROOT

from aquila_pd.chat import terminal
from aquila_pd.chat.conversation import Conversation
from aquila_pd.generation import Engine, sampler
from aquila_pd.text.loading import load
from aquila_pd.utils.console import visible
from aquila_pd.utils.errors import ChatError, OutputError

PATIENCE = 600  # seconds until a process that hangs is given up; a busy machine takes minutes to start one
OPTIONS = ["--threads", "1", "--seed", "3", "--max-new-tokens", "12"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_chat_folder(tmp_path_factory.mktemp("terminal") / "AquilaChat2-tiny", "aquila-v2")


@pytest.fixture
def chat(folder, monkeypatch, capsys):
    """chat(lines, *options) -> (status, stdout, stderr) of a run with these lines as its input."""

    def run(lines: str | bytes, *options: str) -> tuple[int, str, str]:
        data = lines if isinstance(lines, bytes) else lines.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        status = terminal.main([str(folder), *OPTIONS, *options])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def says(monkeypatch):
    """says(text, ...): the model gives these answers, one after the other, and then eos."""

    def script(tokenizer, *answers: str) -> None:
        left = [[*tokenizer.encode(text)["input_ids"], tokenizer.eos_token_id] for text in answers]

        def choose(logits, sequence):
            ids = left[0]
            token = ids[len(sequence.tokens)]
            if token == ids[-1]:
                left.pop(0)
            return token

        monkeypatch.setattr(sampler, "choose", choose)

    return script


@pytest.fixture(scope="module")
def tokenizer(folder):
    from aquila_pd.tokenizer import AquilaTokenizer

    return AquilaTokenizer.from_pretrained(str(folder))


def test_lines_through_a_pipe_are_answered_plainly(chat, says, tokenizer):
    says(tokenizer, " 你好！🙂", "Bye.")
    status, out, err = chat("Hello\n\n你是谁？\n")
    assert (status, out) == (0, "你好！🙂\nBye.\n")
    notes = err.splitlines()
    assert len(notes) == 2 and all(re.fullmatch(r"\[\d+ tokens; .* prompt tokens reused\]", note) for note in notes)
    assert "\x1b" not in out + err and "> " not in out


def test_the_next_turn_reads_only_what_is_new(chat):
    _, _, err = chat("The quick brown fox jumps over the lazy dog, please.\nmore\n")
    reused = [int(n) for n in re.findall(r"(\d+) of \d+ prompt tokens reused", err)]
    assert reused[0] == 0 and reused[1] > 20


def test_the_same_seed_and_lines_give_the_same_chat_and_each_answer_its_own(chat):
    first, again, other = (chat("Hello\n/reset\nHello\n", "--seed", seed)[1] for seed in ("1", "1", "2"))
    assert first == again != other
    answers = chat("Hello\n/retry\n", "--seed", "1")[1]
    assert answers != 2 * answers[: len(answers) // 2], "another try is another answer"


# ------------------------------------------------------------------------------------------------- commands


def test_saved_and_loaded_it_is_the_same_conversation(chat, says, tokenizer, tmp_path):
    says(tokenizer, "one", "two", "three")
    file = tmp_path / "chat.json"
    status, _, err = chat(f"/system Be kind.\nfirst\nsecond\n/retry\n/save {file}\n/quit\nnever read\n")
    assert status == 0 and f"Saved as {file}." in err
    messages = json.loads(file.read_text())["messages"]
    assert [(m["role"], m["content"]) for m in messages] == [
        ("system", "Be kind."),
        ("user", "first"),
        ("assistant", "one"),
        ("user", "second"),
        ("assistant", "three"),
    ]
    again = tmp_path / "again.json"
    chat(f"/save {again}\n", "--load", str(file))
    assert json.loads(again.read_text()) == json.loads(file.read_text())
    third = tmp_path / "third.json"
    _, _, err = chat(f"/load {file}\n/reset\n/save {third}\n")
    assert "2 turns loaded." in err
    assert json.loads(third.read_text())["messages"] == messages[:1]


def test_a_file_is_never_overwritten(chat, tmp_path):
    file = tmp_path / "chat.json"
    file.write_text("mine")
    status, _, err = chat(f"Hello\n/save {file}\n/save\n/save {tmp_path}/none/there.json\n")
    assert status == 0 and "is there already" in err and file.read_text() == "mine"
    assert "/save needs the name of a file." in err


def test_unknown_commands_are_named_with_the_known_ones(chat, says, tokenizer):
    says(tokenizer, "yes")
    _, out, err = chat("/bogus x\n/help\n/retry\n /etc is a folder?\n")
    assert "There is no /bogus. Known: /system, /reset, /retry, /save, /load, /help, /quit." in err
    assert all(f"  {word} " in err for word in terminal.COMMANDS)
    assert "There is no answer to take back." in err
    assert out == "yes\n"  # with a space in front, it is a message


def test_what_the_system_says_reaches_the_model(chat, monkeypatch, tokenizer):
    seen, add = [], Engine.add
    monkeypatch.setattr(Engine, "add", lambda self, ids, *rest: seen.append(ids) or add(self, ids, *rest))
    _, _, err = chat("/system\nHello\n/system Answer in verse.\nHello\n/system\n", "--system", "Be brief.")
    assert err.splitlines()[0] == "The system says: Be brief."
    assert tokenizer.decode(seen[0]).startswith("Be brief.")
    assert tokenizer.decode(seen[1]).startswith("Answer in verse.")


def test_a_template_without_system_says_so(folder, chat):
    status, _, err = chat("/system Be kind.\nHello\n", "--template", "aquila-v1")
    assert status == 0 and "error: " in err and "system" in err
    status, out, err = chat("Hello\n", "--template", "aquila-v1", "--system", "Be kind.")
    assert (status, out) == (1, "") and "error: " in err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "not a JSON object"),
        ('{"messages": []}', "holds no messages"),
        ('{"messages": [{"role": "user", "content": "q"}]}', "ending with an answer"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "ending with an answer"),
        ('{"messages": ["text"]}', "message 0"),
        ("{", "not JSON"),
    ],
)
def test_a_file_that_is_no_conversation_changes_nothing(chat, tmp_path, content, words):
    file = tmp_path / "bad.json"
    file.write_text(content)
    status, _, err = chat(f"/load {file}\n")
    assert status == 0 and words in err
    assert chat("Hello\n", "--load", str(file))[0] == 1


# ----------------------------------------------------------------------------------------- when things go wrong


def test_logits_that_are_no_numbers_are_one_line_and_the_chat_goes_on(chat, says, tokenizer, monkeypatch):
    says(tokenizer, "good", "fine")
    finite, calls = sampler.finite, []
    monkeypatch.setattr(sampler, "finite", lambda logits: calls.append(1) or (len(calls) != 2 and finite(logits)))
    status, out, err = chat("Hello\n/retry\n/save /nowhere/x\n")
    assert status == 0
    assert [line for line in err.splitlines() if "NaN or infinite" in line] == [err.splitlines()[0]]
    assert out.endswith("\ngood\n"), "/retry asks once more what has failed"


def test_a_retry_that_fails_keeps_the_answer_there_was(chat, says, tokenizer, monkeypatch, tmp_path):
    says(tokenizer, "good", "better")
    finite, calls = sampler.finite, []
    monkeypatch.setattr(sampler, "finite", lambda logits: calls.append(1) or (len(calls) != 6 and finite(logits)))
    files = [tmp_path / "failed.json", tmp_path / "retried.json"]
    _, out, err = chat(f"Hello\n/retry\n/save {files[0]}\n/retry\n/save {files[1]}\n")
    assert "NaN or infinite" in err
    said = [[m["content"] for m in json.loads(file.read_text())["messages"]] for file in files]
    assert said == [["Hello", "good"], ["Hello", "better"]], out


def test_bytes_that_are_no_text_are_said_and_not_sent(chat, says, tokenizer):
    says(tokenizer, "fine")
    status, out, err = chat(b"caf\xe9\nHello\n")
    assert (status, out) == (0, "fine\n")
    assert "bytes that are no text" in err and "utf-8" in err


def test_a_message_too_long_is_said_and_the_chat_goes_on(chat, says, tokenizer):
    says(tokenizer, "fine")
    status, out, err = chat("word " * 200 + "\nHello\n")
    assert (status, out) == (0, "fine\n") and "fit" in err
    status, _, err = chat("Hello\n", "--max-new-tokens", "256")
    assert status == 1 and "leaves no room for a prompt" in err


def test_parameters_without_meaning_are_said_before_anything_is_loaded(chat, monkeypatch):
    monkeypatch.setattr(terminal, "load", lambda *args, **options: pytest.fail("loaded"))
    status, _, err = chat("", "--temperature", "-1", "--top-p", "7")
    assert status == 1 and "temperature: it is -1" in err and "top_p: it is 7" in err


def test_old_turns_that_do_not_fit_are_left_out_and_counted(chat, tmp_path):
    file = tmp_path / "chat.json"
    lines = "".join(f"question {i} with a few words to make it longer\n" for i in range(8))
    _, _, err = chat(f"{lines}/save {file}\n")
    left_out = [int(n) for n in re.findall(r"(\d+) old turns? left out", err)]
    assert left_out and sum(left_out) < 8
    assert len(json.loads(file.read_text())["messages"]) == 16, "the conversation stays complete"
    # once turns are left out there is room for a while, and the next turn begins like the one before
    assert len(left_out) < len(re.findall("reused", err[err.index("left out") :]))


def test_a_model_cannot_steer_the_terminal():
    evil = "a\x1b[2J\x07\x9b1mb\r\x08c\x7f\u202ed\ud800\n\té你🙂👨‍👩‍👧"
    assert visible(evil) == "a␛[2J␇\\x9b1mb␍␈c␡\\u202ed\\ud800\n\té你🙂👨‍👩‍👧"


def test_a_closed_pipe_ends_the_program_quietly(folder):
    command = ["-m", "aquila_pd.cli", "chat", folder, *OPTIONS]
    done = warm().start(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, cwd=ROOT)
    done.stdout.close()
    done.stdin.write("Hello\n")
    done.stdin.close()
    assert done.wait(600) == 141
    with done.stderr:
        assert "Traceback" not in done.stderr.read()


# -------------------------------------------------------------------------------------------------------- Ctrl-C


@pytest.fixture
def press(monkeypatch):
    """press(*steps): Ctrl-C during these steps of the engine."""

    def set_up(*steps: int) -> None:
        step, count = Engine.step, []

        def pressed(self):
            count.append(1)
            if len(count) in steps:
                os.kill(os.getpid(), signal.SIGINT)
            return step(self)

        monkeypatch.setattr(Engine, "step", pressed)

    return set_up


def test_ctrl_c_stops_the_answer_and_keeps_what_came(chat, says, press, tokenizer, tmp_path):
    says(tokenizer, "abcdefgh", "fine")
    press(4)
    file = tmp_path / "chat.json"
    status, out, err = chat(f"Hello\nagain\n/save {file}\n")
    assert status == 0 and "stopped by Ctrl-C" in err.splitlines()[0]
    assert [m["content"] for m in json.loads(file.read_text())["messages"]][:3] == [
        "Hello",
        out.splitlines()[0],
        "again",
    ]
    assert "abcdefgh".startswith(out.splitlines()[0]) and 0 < len(out.splitlines()[0]) < 8
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_does_not_wait_for_the_step(chat, says, tokenizer, monkeypatch):
    says(tokenizer, "abcdefgh", "fine")
    step, count = Engine.step, []

    def endless(self):
        count.append(1)
        if len(count) == 3:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
            count.append("slept to the end")
        return step(self)

    monkeypatch.setattr(Engine, "step", endless)
    status, _, err = chat("Hello\n/retry\n")
    assert "slept to the end" not in count
    assert status == 0 and "stopped by Ctrl-C" in err


def test_ctrl_c_before_the_first_token_keeps_no_turn(chat, press, monkeypatch, tmp_path):
    press(1)
    monkeypatch.setattr(sampler, "choose", lambda logits, sequence: 0)  # a special token: no text
    file = tmp_path / "chat.json"
    _, out, err = chat(f"Hello\n/save {file}\n")
    assert out == "" and "no answer, the turn is not kept" in err
    assert json.loads(file.read_text())["messages"] == []


# -------------------------------------------------------------------------------------------- a real terminal


class Terminal:
    """`aquila-pd chat` in a pseudo-terminal; what it shows is read as it comes."""

    def __init__(self, *arguments: str):
        self.master, slave = os.openpty()
        termios.tcsetwinsize(slave, (40, 400))  # so wide that readline moves no cursor for a long path
        command = [sys.executable, "-m", "aquila_pd.cli", "chat", *arguments]
        environment = {**os.environ, "TERM": "xterm", "LANG": "C.UTF-8", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
            preexec_fn=_control,
        )
        os.close(slave)
        self.shown = b""

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def wait_for(self, pattern: str, *, seconds: float = PATIENCE) -> str:
        """What was shown until the pattern appeared, which is taken away."""
        end = time.monotonic() + seconds
        while True:
            text = re.sub(
                r"\x1b\[\?2004[hl]\r?", "", self.shown.decode("utf-8", "replace")
            )  # may be pasted into, or not
            found = re.search(pattern, text)
            if found:
                self.shown = text[found.end() :].encode()
                return text[: found.end()]
            assert time.monotonic() < end, f"{pattern!r} did not appear in:\n{text}"
            if select.select([self.master], [], [], 0.2)[0]:
                self.shown += os.read(self.master, 65536)

    def interrupt(self, pattern: str) -> str:
        """Ctrl-C at the prompt, which shows a moment before readline waits; a signal in between is seen with the next
        key, here a backspace where nothing is to be deleted."""
        self.type("\x03")
        try:
            return self.wait_for(pattern, seconds=2)
        except AssertionError:
            self.type("\x7f")
            return self.wait_for(pattern)

    def close(self) -> int:
        status = self.process.wait(PATIENCE)
        os.close(self.master)
        return status


def _control() -> None:
    """The pseudo-terminal becomes the process's own, so that Ctrl-C typed there reaches it as a signal."""
    import fcntl

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_whole_conversation_in_a_terminal(tmp_path):
    folder = tiny_chat_folder(tmp_path / "chat", "aquila-v1", max_position_embeddings=8192)
    screen = Terminal(str(folder), "--threads", "1", "--temperature", "0", "--max-new-tokens", "6000")
    everything = screen.wait_for(r"/help lists commands\..*\n> ")
    assert "chat template aquila-v1, context of 8,192 tokens" in everything

    everything += screen.interrupt(r"Ctrl-D or /quit leaves; Ctrl-C stops an answer\.[^>]*> ")

    screen.type("你好，please\n")
    everything += screen.wait_for(r"你好，please\r\n[^\r]{20}")  # it streams: there is text, and no end
    assert "tokens/s" not in everything
    screen.type("\x03")
    everything += screen.wait_for(r"\x1b\[2m\[[^\n]*; stopped by Ctrl-C\]\x1b\[0m\r\n> ")

    screen.type(f"/save {tmp_path}/chat.json\n")
    everything += screen.wait_for(r"Saved as .*\n> ")
    messages = json.loads((tmp_path / "chat.json").read_text())["messages"]
    assert messages[0]["content"] == "你好，please" and len(messages) == 2 and len(messages[1]["content"]) > 20

    # what the model said, control characters among it, moved nothing on the screen
    assert re.search("[\u2400-\u2421]", everything), repr(everything[-400:])
    assert set(re.findall(r"\x1b.{0,3}", everything)) <= {"\x1b[2m", "\x1b[0m"}

    screen.type("\x1b[200~first line\nsecond line\x1b[201~\n")  # pasted: one message
    everything += screen.wait_for(r"second line\r\n[^\r]{20}")
    screen.type("\x03")
    everything += screen.wait_for(r"stopped by Ctrl-C\]\x1b\[0m\r\n> ")
    screen.type(f"/save {tmp_path}/pasted.json\n")
    everything += screen.wait_for(r"Saved as .*\n> ")
    messages = json.loads((tmp_path / "pasted.json").read_text())["messages"]
    assert len(messages) == 4 and messages[2]["content"] == "first line\nsecond line"

    screen.type("/quiz\n")
    everything += screen.wait_for(r"There is no /quiz\.[^>]*> ")
    screen.type("\x04")  # Ctrl-D
    assert screen.close() == 0
    assert "Traceback" not in everything


# --------------------------------------------------------------------------------------------- the conversation


def test_what_cannot_be_written_raises_named_errors(folder, tmp_path):
    conversation = Conversation(load(folder, threads=1, slots=1).prompts, room=100)
    conversation.add("q", "a")
    with pytest.raises(OutputError):
        conversation.save(tmp_path)
    with pytest.raises(ChatError):
        conversation.ids("word " * 200)
    assert conversation.take_back() == ("q", "a") and conversation.take_back() is None
