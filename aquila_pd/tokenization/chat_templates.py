"""Chat templates as data: how a conversation becomes text, and which published model was tuned with which.

A template is rendered to pieces, which say what part of a text the model is to learn (is_target) and what part is
message content (is_content). `Template.jinja` says the same in the form that tokenizer_config.json carries for other
programs.

Message content can become neither a special token nor a forged turn:

- Special tokens. Contents are encoded as plain text, "</s>" in them included (chat_mixin.py does that; it is why
  pieces say what is content).
- Turn headers that are plain text themselves, such as "###Human:". Where contents hold one, also in other case, with
  white space inside or a full-width colon, a space goes behind its first character: "# ##Human:". That is all: text
  without such a header is not changed, and a Markdown title "### Title" stays as it is.

The Jinja text cannot do the second: a program that renders it by itself has to look at contents by itself.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from ..architecture.rope_scaling import scaling_type
from ..utils.errors import ChatError, ConfigError, report, shown_value

ROLES = ("system", "user", "assistant")


class Piece(NamedTuple):
    """A part of a rendered conversation.

    is_target: the model learns to write it: every answer with its closing separator, and nothing else.
    is_content: message content, in which nothing is a special token.
    """

    text: str
    is_target: bool
    is_content: bool


@dataclass(frozen=True)
class Turn:
    """Format of one role's message: header, content, end.

    begin: what stands between header and words and is the model's to write when it answers; after: what follows the
    end and is not the model's.
    """

    header: str
    end: str
    begin: str = ""
    after: str = ""

    def pieces(self, content: str, *, learned: bool) -> list[Piece]:
        """The turn in pieces; learned: the words are an answer."""
        scaffold = [
            Piece(self.header, False, False),
            Piece(self.begin, learned, False),
            Piece(content, learned, True),
            Piece(self.end, learned, False),
            Piece(self.after, False, False),
        ]
        return [piece for piece in scaffold if piece.text or piece.is_content]


@dataclass(frozen=True)
class Template:
    """A chat template: turns of each role, system message, stop strings.

    system: None where the model was tuned without system messages. default_system: the system message where none is
    given; None for none at all. strip: white space around contents goes.
    forgeable: a pattern of plain text that looks like a header. specials: the scaffolding's special tokens.
    stop_strings: texts at which an answer ends, some of them special tokens in some tokenizers.
    """

    name: str
    user: Turn
    assistant: Turn
    system: Turn | None = None
    default_system: str | None = None
    strip: bool = False
    forgeable: str = ""
    specials: tuple[str, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def render(self, messages: Sequence[Mapping], add_generation_prompt: bool = True) -> list[Piece]:
        """The text of a conversation in pieces; with add_generation_prompt it ends where the model goes on.

        messages: [{"role": "system", "user" or "assistant", "content": text}, ...]; a system message stands first and
        replaces the default one. Raises ChatError with all findings.
        """
        check_messages(messages, self)
        pieces = []
        if messages[0]["role"] != "system" and self.system and self.default_system is not None:
            said = self.system.header + self.system.begin + self.default_system + self.system.end + self.system.after
            pieces.append(Piece(said, False, False))
        for message in messages:
            role = message["role"]
            turn: Turn = getattr(self, role)
            pieces += turn.pieces(self.harmless(message["content"]), learned=role == "assistant")
        if add_generation_prompt:
            pieces.append(Piece(self.assistant.header, False, False))
        return pieces

    def harmless(self, content: str) -> str:
        """The words as they are written: stripped where the template does that, headers in them broken."""
        content = content.strip() if self.strip else content
        if not self.forgeable:
            return content
        return re.sub(self.forgeable, lambda found: f"{found[0][0]} {found[0][1:]}", content, flags=re.IGNORECASE)

    def jinja(self) -> str:
        """The template for tokenizer_config.json. One line of blocks, so that no setting of Jinja's changes it."""
        branches = [("message['role'] == 'user'", self.user), ("message['role'] == 'assistant'", self.assistant)]
        if self.system:
            branches.append(("message['role'] == 'system' and loop.first", self.system))
        cases = "".join(
            f"{{% {'elif' if i else 'if'} {condition} %}}{{{{ {self._said_by(turn)} }}}}"
            for i, (condition, turn) in enumerate(branches)
        )
        known = "user and assistant only" if not self.system else "user and assistant, and system in the first message"
        refused = f"{{{{ raise_exception('This model knows the roles {known}.') }}}}"
        return (
            f"{self._default_system_jinja()}{{% for message in messages %}}{cases}{{% else %}}{refused}{{% endif %}}"
            f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {quoted(self.assistant.header)} }}}}{{% endif %}}"
        )

    def _said_by(self, turn: Turn) -> str:
        """The Jinja expression of a turn."""
        content = f"message['content']{'.strip()' if self.strip else ''}"
        return " + ".join(
            [*map(quoted, filter(None, [turn.header + turn.begin])), content, quoted(turn.end + turn.after)]
        )

    def _default_system_jinja(self) -> str:
        if not self.system or self.default_system is None:
            return ""
        said = self.system.header + self.system.begin + self.default_system + self.system.end + self.system.after
        return f"{{% if messages[0]['role'] != 'system' %}}{{{{ {quoted(said)} }}}}{{% endif %}}"


def quoted(text: str) -> str:
    """A Jinja string. Line breaks stay line breaks."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def check_messages(messages: Sequence[Mapping], template: Template) -> None:
    """Raise ChatError, with all findings, for what a template cannot write."""
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise ChatError(
            f"A conversation is a list of messages, not {shown_value(messages)}.\n"
            'Write [{"role": "user", "content": "..."}].'
        )
    findings = [] if messages else ["it holds no message"]
    for number, message in enumerate(messages):
        findings += [f"message {number} {finding}" for finding in _wrong_with(message, number, template)]
    if findings:
        advice = 'A message is {"role": ..., "content": text}; roles are user and assistant'
        advice += ", and system in the first message." if template.system else "; this template knows no system."
        headline = f"The conversation cannot be written with the chat template {template.name}:"
        raise ChatError(report(headline, findings, advice))


def _wrong_with(message: object, number: int, template: Template) -> list[str]:
    if not isinstance(message, Mapping):
        return [f"is {shown_value(message)}, not an object with role and content"]
    role, content = message.get("role"), message.get("content")
    findings = []
    if role not in ROLES:
        findings.append(f"has the role {shown_value(role)}")
    elif role == "system" and not template.system:
        findings.append("is from the system, and the model was tuned without system messages")
    elif role == "system" and number:
        findings.append("is from the system and not the first")
    if not isinstance(content, str):
        findings.append(f"has the content {shown_value(content)}, not text")
    return findings


# ---------------------------------------------------------------------------------------------------- the templates

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions."
)
# The model writes the space in front of its answer: the prompt ends in "Assistant:".
HASHES = r"[#＃]{3}\s*(?:human|assistant)\s*[:：]"
PIECES = ("<|startofpiece|>", "<|endofpiece|>", "</s>")

TEMPLATES = {
    template.name: template
    for template in (
        Template(
            "aquila-chat",
            system=Turn("", "###"),
            default_system=SYSTEM,
            user=Turn("Human: ", "###"),
            assistant=Turn("Assistant:", "###", begin=" "),
            forgeable=HASHES,
            stop_strings=("###", "</s>", "[UNK]"),
        ),
        Template(
            "aquila",
            system=Turn("", "###"),
            default_system=SYSTEM,
            user=Turn("Human: ", "###"),
            assistant=Turn("Assistant:", "</s>", begin=" "),
            forgeable=rf"{HASHES}|[<＜]/s[>＞]\s*human\s*[:：]",
            specials=("</s>",),
            stop_strings=("</s>", "[UNK]"),
        ),
        Template(
            "aquila-legacy",
            system=Turn("", "\n\n"),
            default_system=SYSTEM,
            user=Turn("### Human: ", "\n"),
            assistant=Turn("### Assistant: ", "</s>"),
            forgeable=HASHES,
            specials=("</s>",),
            stop_strings=("</s>", "[UNK]"),
        ),
        Template(
            "aquila-v1",
            user=Turn("<|startofpiece|>", ""),
            assistant=Turn("<|endofpiece|>", "</s>"),
            specials=PIECES,
            stop_strings=("</s>", "<|endoftext|>"),
        ),
        Template(
            "aquila-v2",
            system=Turn("", "\n\n"),
            default_system=SYSTEM,
            user=Turn("<|startofpiece|>", ""),
            assistant=Turn("<|endofpiece|>", "</s>"),
            specials=PIECES,
            stop_strings=("</s>", "<|endoftext|>", "<|startofpiece|>", "<|endofpiece|>"),
        ),
        # of the Ziya-LLaMA-13B-v1 model card: "<human>:question\n<bot>:", turns joined by a line break
        Template(
            "ziya",
            user=Turn("<human>:", "\n"),
            assistant=Turn("<bot>:", "\n"),
            strip=True,
            forgeable=r"[<＜](?:human|bot)[>＞]\s*[:：]",
        ),
        Template(
            "chatml",
            system=Turn("<|im_start|>system\n", "<|im_end|>", after="\n"),
            user=Turn("<|im_start|>user\n", "<|im_end|>", after="\n"),
            assistant=Turn("<|im_start|>assistant\n", "<|im_end|>", after="\n"),
            specials=("<|im_start|>", "<|im_end|>"),
            stop_strings=("<|im_end|>",),
        ),
    )
}


def find_template(name: str) -> Template:
    """The template of this name. Raises ConfigError with all names, and the nearest."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    near = difflib.get_close_matches(str(name).lower(), TEMPLATES, n=1, cutoff=0.4)
    meant = f" Did you mean {near[0]}?" if near else ""
    raise ConfigError(f"No chat template is called {shown_value(name)}. Known: {', '.join(TEMPLATES)}.{meant}")


@cache
def _by_jinja() -> dict[str, Template]:
    return {template.jinja(): template for template in TEMPLATES.values()}


def template_of_jinja(text: object) -> Template | None:
    """The template whose Jinja text this is, word for word."""
    return _by_jinja().get(text) if isinstance(text, str) else None


# --------------------------------------------------------------------------------------- which model has which

# Names of folders, files and hub models, without their owner; the first pattern found in one decides. Chat models by
# the template they were tuned with; None: a base model, tuned with none, whatever its sizes are.
BY_NAME: tuple[tuple[str, str | None], ...] = (
    (r"ziya.*base", None),
    (r"ziya", "ziya"),
    (r"aquila-?2.*chat-?pd", "aquila-legacy"),
    (r"aquila-?chat-?2.*16k", "aquila"),
    (r"aquila-?chat-?2.*34b", "aquila-legacy"),
    (r"aquila-?chat-?2.*70b", "aquila-v2"),
    (r"aquila-?chat-?2.*7b", "aquila-v1"),
    (r"aquila-?chat-?7b", "aquila-chat"),
    (r"^(?!.*chat).*aquila-?2?-(?:7b|34b|70b)", None),
)
SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPE_7B = (4096, 11008, 32, 32, 32)
SHAPE_34B = (6144, 24576, 60, 48, 8)
SHAPE_70B = (8192, 28672, 80, 64, 8)
AQUILA_VOCABULARIES = range(100000, 145000)  # 100,008 rows; about 143,700 in the published Paddle release
ZIYA_VOCABULARY = 39424  # LLaMA's 32,000 tokens and Chinese ones; no other model has this many


def template_by_name(name: str) -> tuple[bool, Template | None]:
    """Whether the name of a folder, file or hub model says what it is, and its template; a base model has none."""
    name = name.rstrip("/").rsplit("/", 1)[-1].replace("_", "-")
    found = next((template for pattern, template in BY_NAME if re.search(pattern, name, re.IGNORECASE)), "")
    return found != "", TEMPLATES[found] if found else None


def template_by_sizes(fields: Mapping) -> Template | None:
    """The template of the only chat model that has these sizes. The 7B sizes fit several, and tiny models none.

    fields: the family's reading of config.json.
    A base model has the sizes of its chat model: a template is right or does no harm there.
    """
    if fields.get("vocab_size") == ZIYA_VOCABULARY:
        return TEMPLATES["ziya"]
    if fields.get("vocab_size") not in AQUILA_VOCABULARIES:
        return None
    shape = tuple(map(fields.get, SHAPE))
    if "multiple_of" in fields:  # FlagAI's own format: the first generation
        return TEMPLATES["aquila-chat"] if shape == SHAPE_7B else None
    if shape in (SHAPE_7B, SHAPE_34B) and scaling_type(fields) == "linear":
        return TEMPLATES["aquila"]
    return {SHAPE_34B: TEMPLATES["aquila-legacy"], SHAPE_70B: TEMPLATES["aquila-v2"]}.get(shape)
