"""`aquila-pd serve DIR`: command-line options, model loading, server start."""

import argparse
import ipaddress
import os
import socket
import sys
from functools import partial
from pathlib import Path

from ..text.engine_options import add_engine, count, engine_of
from ..utils.command import run
from ..utils.errors import ConfigError
from .settings import Settings

KEY_VARIABLE = "AQUILA_PD_API_KEY"
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def size(text: str) -> int:
    """ "4M" -> 4194304."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in UNITS and text[-1:] else (text, "")
    if not number.isdecimal() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write bytes, or a number with K, M or G")
    return int(number) * UNITS[unit]


def port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; 0 to 65535")
    return int(text)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is no time in seconds")
    return value


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="aquila-pd serve",
        description="Serve a converted model to OpenAI's clients and to a browser. docs/serving.md has the details.",
    )
    made.add_argument("folder", type=Path, metavar="DIR", help="converted model")
    made.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    made.add_argument("--port", type=port, default=8000, help="0 takes a free one and says which (default: 8000)")
    made.add_argument("--name", help="of the model, for its clients (default: the folder's name)")
    made.add_argument("--template", help="name of a chat template in place of the folder's own")
    made.add_argument("--dtype", help="of the weights in memory (default: float32 on a CPU, else as stored)")
    made.add_argument("--threads", type=count, help="of the mathematics (default: the cores there are)")
    made.add_argument("--slots", type=count, default=8, help="answers generated at once (default: 8)")
    made.add_argument("--max-length", type=count, help="tokens of prompt and answer (default: the model's context)")
    add_engine(made)
    made.add_argument("--max-queue", type=count, default=64, help="answers that wait for a slot (default: 64)")
    made.add_argument("--max-body", type=size, default=size("4M"), help="of a request, such as 512K (default: 4M)")
    made.add_argument(
        "--request-timeout", type=seconds, default=600, help="seconds for a whole request, waiting too (default: 600)"
    )
    made.add_argument(
        "--shutdown-grace", type=seconds, default=30, help="seconds for running answers on SIGTERM (default: 30)"
    )
    made.add_argument(
        "--api-key", help=f"that clients have to send; better in the variable {KEY_VARIABLE}, which ps does not show"
    )
    made.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name clients call this server by, beside localhost and addresses; may be repeated; "
        "not needed with an API key",
    )
    made.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a web page's origin, such as https://example.org, that may use this server; may be repeated "
        "(default: none but its own page)",
    )
    made.add_argument("--log-file", type=Path, help="for the log (default: stderr)")
    return made


def settings_of(args: argparse.Namespace, environment: dict[str, str]) -> Settings:
    """Raises ConfigError for an empty API key: it would look like a lock and be none."""
    key = args.api_key if args.api_key is not None else environment.get(KEY_VARIABLE)
    if key is not None and (not key.strip() or not key.isascii()):
        raise ConfigError(f"The API key (--api-key, {KEY_VARIABLE}) is empty or not ASCII. Set another, or none.")
    named = () if is_address(args.host) else (args.host.lower(),)
    return Settings(
        name=args.name or args.folder.resolve().name,
        slots=args.slots,
        max_queue=args.max_queue,
        max_body=args.max_body,
        request_timeout=args.request_timeout,
        shutdown_grace=args.shutdown_grace,
        api_key=key,
        cors_origins=tuple(args.cors_origin),
        hosts=(*named, socket.gethostname().lower(), *(name.lower() for name in args.allow_host)),
    )


def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def warn_if_open(host: str, settings: Settings) -> None:
    if settings.api_key is None and not is_loopback(host):
        print(
            f"WARNING: on {host} everybody who reaches this machine can use the model: there is no API key.\n"
            f"WARNING: set {KEY_VARIABLE} to one, or leave --host at 127.0.0.1.",
            file=sys.stderr,
            flush=True,
        )


def main(argv: list[str] | None = None) -> int:
    """0 after graceful shutdown (SIGTERM, Ctrl-C), 1 for an error the user can fix, 2 for wrong arguments."""
    args = parser().parse_args(argv)
    return run(lambda: start(args))


def start(args: argparse.Namespace) -> None:
    settings = settings_of(args, dict(os.environ))
    warn_if_open(args.host, settings)
    from .server import listen, serve  # FastAPI and uvicorn load only now: --help costs nothing

    bound = listen(args.host, args.port)  # before the model, which may take minutes
    from ..text.loading import load, use_threads
    from .app import make_app
    from .log import Log
    from .service import Service

    log = Log(args.log_file)
    loaded = load(
        args.folder,
        dtype=args.dtype,
        slots=args.slots,
        max_length=args.max_length,
        template=args.template,
        threads=args.threads,
        **engine_of(args),
    )
    # OpenMP counts for each thread by itself, so the engine's is told too
    service = Service(loaded, settings, log, prepare=partial(use_threads, args.threads))
    serve(make_app(service), service, bound, say=lambda line: print(line, flush=True))
