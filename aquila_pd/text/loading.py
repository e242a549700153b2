"""load(): model, tokenizer, engine, chat template and stop ids of a converted folder, checked against each other."""

import logging
from dataclasses import dataclass
from pathlib import Path

from ..formats.safetensors import INDEX, SINGLE, read_layout
from ..generation import Engine
from ..modeling import AquilaForCausalLM
from ..ops import threads as thread_count
from ..runtime import base
from ..tokenizer import AquilaTokenizer
from ..utils import cores
from ..utils.errors import CheckpointError, ConfigError, shown_value
from ..utils.files import read_object
from .prompts import ChatPrompts
from .text_stream import text_of

log = logging.getLogger("aquila_pd")

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TORCH_FILES = ("*.bin", "*.gguf", "*.pt", "*.pth")


@dataclass(frozen=True)
class Loaded:
    """A model with its engine and everything around it.

    prompts: None when the folder has no chat template and none was named. stop_ids: where the continuation of a plain
    text ends; an answer's ends are prompts.stop_ids and prompts.stop_strings.
    """

    name: str
    tokenizer: AquilaTokenizer
    model: AquilaForCausalLM
    engine: Engine
    prompts: ChatPrompts | None
    stop_ids: tuple[int, ...]

    def require_prompts(self) -> ChatPrompts:
        """The chat template, or a ConfigError that says how to name one."""
        if self.prompts is None:
            raise no_template(self.name)
        return self.prompts


def no_template(name: str) -> ConfigError:
    """The error for a folder that has no chat template."""
    return ConfigError(
        f"{name} has no chat template: it is a base model, or was converted without one.\n"
        "Name the one it was tuned with: --template NAME, or `aquila-pd convert --chat-template NAME` for good."
    )


def load(
    folder: Path | str,
    *,
    dtype: str | None = None,
    slots: int = 8,
    max_length: int | None = None,
    prefill_chunk: int = 512,
    prefix_reuse: bool = True,
    template: str | None = None,
    threads: int | None = None,
    needs_template: bool = False,
) -> Loaded:
    """Load a converted folder for generation. Sets PaddleNLP's log level to WARNING for the whole process.

    dtype: see AquilaForCausalLM.from_pretrained. slots, max_length, prefill_chunk, prefix_reuse: see Engine. template:
    a chat template's name in place of the folder's own. threads: of the mathematics; default is one for each core this
    process may use.
    needs_template: a folder without chat template is an error, before its weights are read.
    Raises CheckpointError for a folder that is not a converted one, with the command that makes it one; ConfigError,
    TokenizerError and GenerationError for what is in it, or for options that do not fit it.
    """
    folder = Path(folder)
    base.log_warnings_only()
    check_folder(folder)
    use_threads(threads)
    tokenizer = AquilaTokenizer.from_pretrained(str(folder))
    text_of(tokenizer)  # a tokenizer whose text cannot be streamed is noticed now, not at the first answer
    stop_ids = stop_ids_of(tokenizer, folder)
    has_template = template is not None or tokenizer.chat_template is not None
    if needs_template and not has_template:
        raise no_template(folder.resolve().name)
    prompts = ChatPrompts(tokenizer, template, eos_ids=stop_ids) if has_template else None
    model = AquilaForCausalLM.from_pretrained(str(folder), dtype=dtype, fused=True)
    check_vocabulary(tokenizer, model, folder)
    model.eval()
    engine = Engine(model, slots=slots, max_length=max_length, prefill_chunk=prefill_chunk, prefix_reuse=prefix_reuse)
    return Loaded(folder.resolve().name, tokenizer, model, engine, prompts, stop_ids)


def use_threads(threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise ConfigError(f"The number of threads is {threads}; it must be at least 1.")
    thread_count.use(threads or cores.count())


def check_folder(folder: Path) -> None:
    """Raise CheckpointError unless the folder holds our Paddle weights, judged by file and tensor names."""
    if folder.suffix == ".gguf" and folder.is_file():
        raise CheckpointError(f"{folder} is a GGUF file, not a folder that Paddle loads. {_how_to_convert(folder)}")
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}. Give the folder that `aquila-pd convert` has made.")
    if not any((folder / name).is_file() for name in (SINGLE, INDEX)):
        _check_other_files(folder)
        return
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} holds weights and no {CONFIG}. Fetch it from where the weights came from.")
    names = read_layout(folder)
    begin = next((name.split(".")[0] for name in names if name != "lm_head.weight"), "")
    if begin == "model":
        raise CheckpointError(f"{folder} holds a torch checkpoint, not yet converted. {_how_to_convert(folder)}")
    if begin == "llama":
        raise CheckpointError(
            f"{folder} was made for PaddleNLP's own LlamaForCausalLM (--architecture llama): load it with PaddleNLP.\n"
            "For these commands convert the torch checkpoint once more, without --architecture."
        )


def _check_other_files(folder: Path) -> None:
    """For a folder without safetensors: torch's other files are named; .pdparams is PaddleNLP's to load."""
    if any(next(folder.glob(pattern), None) for pattern in TORCH_FILES):
        raise CheckpointError(f"{folder} holds a torch checkpoint, not yet converted. {_how_to_convert(folder)}")
    if next(folder.glob("*.pdparams"), None) is None:
        raise CheckpointError(f"{folder} holds no weights: neither {SINGLE} nor {INDEX}. Is it the folder you meant?")


def _how_to_convert(source: Path) -> str:
    name = source.resolve().name
    return f"Convert it first:\n  aquila-pd convert --input {source} --output {name.removesuffix('.gguf')}-PD"


def check_vocabulary(tokenizer: AquilaTokenizer, model: AquilaForCausalLM, folder: Path) -> None:
    """Raise CheckpointError when the tokenizer has tokens that the model has no rows for."""
    if len(tokenizer) > model.config.vocab_size:
        raise CheckpointError(
            f"The tokenizer in {folder} has {len(tokenizer):,} tokens, the model {model.config.vocab_size:,} rows: "
            "they belong to different models.\nFetch the tokenizer's files from where the weights came from."
        )


def stop_ids_of(tokenizer: AquilaTokenizer, folder: Path) -> tuple[int, ...]:
    """Stop ids: the tokenizer's eos, and eos_token_id of config.json and generation_config.json.

    Of these only special tokens: published files are known to name ids out of LLaMA's vocabulary, which are ordinary
    words here.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    found = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for name in (CONFIG, GENERATION_CONFIG):
        named = _eos_in(folder / name)
        found += [i for i in named if i in special and i not in found]
        others = ", ".join(shown_value(i) for i in named if i not in special)
        if others:
            log.warning("eos_token_id in %s is %s, no special token of the tokenizer: not followed.", name, others)
    return tuple(found)


def _eos_in(file: Path) -> list:
    """eos_token_id of a JSON file in the folder as a list: empty, one id or several."""
    named = read_object(file, CheckpointError).get("eos_token_id") if file.is_file() else None
    return named if isinstance(named, list) else [] if named is None else [named]
