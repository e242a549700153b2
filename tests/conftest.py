"""What every test stands on: shared data, a fixed environment, fixed seeds, no network; and the order of files."""

import os
import random
import signal
import socket
import sys
from pathlib import Path

import pytest
from hypothesis import settings

TESTS = Path(__file__).resolve().parent
for folder in (TESTS / "support", TESTS, TESTS.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import seconds  # noqa: E402  which the lines above make importable, as the next
from effort import THOROUGH  # noqa: E402
from paths import SHARED  # noqa: E402

SEED = 20231121
LOOPBACK = ("127.0.0.1", "::1", "localhost")

# What these folders hold takes long as a whole; `make check` leaves it to `make test`.
SLOW_FOLDERS = ("e2e", "robustness")

# Before numpy, torch or paddle: they read these once. One thread: the models are tiny, and OpenMP threads that wait
# for each other on a busy machine are several times slower than one.
for name, value in {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": os.environ.get("AQUILA_PD_TEST_GPU", ""),  # "0": let the tests see the first GPU
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "GLOG_minloglevel": "2",
}.items():
    os.environ.setdefault(name, value)

# A shell's background jobs ignore Ctrl-C, those of nohup a closed terminal, and processes that tests start would too.
for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, default)

from aquila_pd.runtime.mkl import prefer_fast_kernels  # noqa: E402  the environment above comes first

prefer_fast_kernels()


# The same tries every time, on a machine of any speed; a test says only how many it wants.
settings.register_profile("quick", derandomize=True, database=None, deadline=None)
settings.register_profile("thorough", settings.get_profile("quick"), max_examples=1000)
settings.load_profile("thorough" if THOROUGH else "quick")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-seconds", action="store_true", help=f"write {seconds.FILE.name}, the order of files")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("record_seconds") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(seconds.Recorder())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.relative_to(TESTS).parts[0] in SLOW_FOLDERS:
            item.add_marker(pytest.mark.slow)
    if hasattr(config, "workerinput"):
        seconds.sort_slowest_first(items)


@pytest.fixture
def shared() -> Path:
    """The shared data folder; the test is skipped, and says so, when it is not there."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder of shared data (goldens, tokenizer, templates) at {SHARED}: this test did not run")
    return SHARED


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    """Every test starts from the same random state in each library that is loaded; a test that needs none pays none."""
    random.seed(SEED)
    loaded = sys.modules
    if "numpy" in loaded:
        loaded["numpy"].random.seed(SEED)
    if hasattr(loaded.get("torch"), "manual_seed"):
        loaded["torch"].manual_seed(SEED)
    if hasattr(loaded.get("paddle"), "seed"):
        loaded["paddle"].seed(SEED)
    if "paddlenlp.utils.log" in loaded:
        loaded["paddlenlp.utils.log"].logger.set_level("WARNING")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection to another machine fails at once, with the reason; this machine and Unix sockets stay open."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOOPBACK:
            raise OSError(f"tests stay off the network; something asked for {address[0]}:{address[1]}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
