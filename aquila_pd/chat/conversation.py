"""Conversation: chat history with a sliding window over its turns, saved as and loaded from JSON."""

import json
from pathlib import Path

from ..text.prompts import ChatPrompts
from ..utils.errors import ChatError, OutputError
from ..utils.files import read_object, write_text

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
KEPT_SHARE = 0.75  # of the room, once turns are left out: then the next turns begin like this one and read it no more


class Conversation:
    """A multi-turn conversation with one chat template.

    room: tokens a prompt may have. messages: all turns, oldest first, without the system's message. left_out: how many
    of the oldest turns the model is no longer given.
    """

    def __init__(self, prompts: ChatPrompts, *, room: int):
        self.prompts, self.room = prompts, room
        self.messages: list[dict] = []
        self.system: str | None = None
        self.left_out = 0
        self._start = 0  # the first message that the model is given

    def set_system(self, text: str | None) -> None:
        """What the system says from now on; None: what the template says by itself. Raises ChatError."""
        if text is not None:
            self.prompts.encode([message(SYSTEM, text), message(USER, "?")])
        self.system = text

    def ids(self, text: str) -> list[int]:
        """The prompt for the user's next text, without the oldest turns where there is no room. Raises ChatError."""
        asked = message(USER, text)
        given = [*self._system(), *self.messages[self._start :], asked]
        kept, dropped = self.prompts.fit(given, self.room)
        if dropped:
            least = len(self.prompts.encode([*self._system(), asked]))
            kept, dropped = self.prompts.fit(given, max(int(self.room * KEPT_SHARE), least))
        self._start += len(given) - len(kept)
        self.left_out += dropped
        return self.prompts.encode(kept)

    def add(self, text: str, answer: str) -> None:
        self.messages += [message(USER, text), message(ASSISTANT, answer)]

    def take_back(self) -> tuple[str, str] | None:
        """Remove the last turn and return it; None when there is none."""
        if not self.messages:
            return None
        text, answer = self.messages[-2:]
        del self.messages[-2:]
        return text["content"], answer["content"]

    def reset(self) -> None:
        """Forget all turns; what the system says stays."""
        self.messages, self.left_out, self._start = [], 0, 0

    def save(self, file: Path) -> None:
        """Write {"messages": [...]}. Raises OutputError when the file is there already, or cannot be written."""
        if file.exists():
            raise OutputError(f"{file} is there already. Give another name, or remove it first.")
        text = json.dumps({"messages": [*self._system(), *self.messages]}, indent=2, ensure_ascii=False)
        try:
            write_text(file, text + "\n")
        except (OSError, ValueError) as error:  # ValueError: no name of a file, it holds a NUL
            raise OutputError(f"{file} cannot be written: {getattr(error, 'strerror', None) or error}.") from error

    def load(self, file: Path) -> None:
        """Go on with the messages of a file that save() has written. Raises ChatError; then nothing has changed."""
        messages = read_object(file, ChatError).get("messages")
        if not isinstance(messages, list) or not messages:
            raise ChatError(
                f'{file} holds no messages. Expected {{"messages": [{{"role": ..., "content": ...}}, ...]}}.'
            )
        self.prompts.encode([*messages, message(USER, "?")])
        turns = messages[1:] if messages[0]["role"] == SYSTEM else messages
        if [m["role"] for m in turns] != [USER, ASSISTANT] * (len(turns) // 2):
            raise ChatError(f"{file} does not go from user to assistant and back, ending with an answer. Correct it.")
        self.reset()
        self.system = messages[0]["content"] if len(turns) < len(messages) else None
        self.messages = [message(m["role"], m["content"]) for m in turns]

    def _system(self) -> list[dict]:
        return [] if self.system is None else [message(SYSTEM, self.system)]


def message(role: str, content: str) -> dict:
    return {"role": role, "content": content}
