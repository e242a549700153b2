"""A forked process does what an interpreter started for the same arguments does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fork_server import DEVNULL, PIPE, ForkServer

PROGRAMS = {
    "arguments and input": ["-c", "import sys; print(sys.argv, input()); print('e', file=sys.stderr)", "a", "b c"],
    "path": ["-c", "import sys; print(sys.path[:2], sys.stdin.isatty(), __name__, len(globals()) < 15)"],
    "folder and environment": ["-c", "import os; print(os.getcwd(), sorted(os.environ))"],
    "module": ["-m", "json.tool", "--indent", "1"],
    "status": ["-c", "import sys; print('last words', end=''); sys.exit(300 + 7)"],
    "message": ["-c", "import sys; sys.exit('sorry')"],
    "exit handlers": ["-c", "import atexit; atexit.register(print, 'bye'); raise SystemExit"],
    "status in an exit handler": ["-c", "import atexit, os; atexit.register(os._exit, 9)"],
    "threads": ["-c", "import threading as t, time; t.Thread(target=lambda: (time.sleep(0.05), print(1))).start()"],
    "killed": ["-c", "import os; os.kill(os.getpid(), 9)"],
    "terminated": ["-c", "import os; os.kill(os.getpid(), 15)"],
    "full": ["-c", "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1); print('lost')"],
}


@pytest.fixture(scope="module")
def server():
    made = ForkServer(["json.tool"])
    yield made
    made.close()


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_forked_process_is_like_a_started_one(server, tmp_path, name):
    options = {"cwd": tmp_path, "env": {"PYTHONPATH": "/x", "LC_ALL": "C.UTF-8"}, "input": '{"é": 1}\n'}
    forked = server.run(PROGRAMS[name], **options)
    started = subprocess.run([sys.executable, *PROGRAMS[name]], capture_output=True, text=True, **options)
    assert (forked.returncode, forked.stdout) == (started.returncode, started.stdout)
    assert forked.stderr.splitlines()[-1:] == started.stderr.splitlines()[-1:]


def test_a_script_runs_with_its_own_folder_on_the_path(server, tmp_path):
    (tmp_path / "neighbour.py").write_text("word = 'found'")
    (tmp_path / "script.py").write_text("import neighbour, sys; print(neighbour.word, sys.argv[1:], __name__)")
    assert server.run([tmp_path / "script.py", "a"]).stdout == "found ['a'] __main__\n"


@pytest.mark.parametrize("code", ["1 / 0", "raise KeyboardInterrupt"])
def test_an_error_ends_it_as_an_interpreter_ends(server, code):
    forked = server.run(["-c", code])
    started = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert forked.returncode == started.returncode
    assert forked.stderr.splitlines()[-1] == started.stderr.splitlines()[-1]


def test_processes_run_at_once_and_are_stopped_one_by_one(server):
    waiting = ["-c", "print('here', flush=True); input()"]
    first, second = (server.start(waiting, stdin=PIPE, stdout=PIPE) for _ in range(2))
    assert first.stdout.readline() == second.stdout.readline() == "here\n"
    assert first.poll() is second.poll() is None and first.pid != second.pid
    with pytest.raises(subprocess.TimeoutExpired):
        first.wait(0.01)
    first.terminate()
    assert first.wait(20) == -signal.SIGTERM
    second.stdin.write("\n")
    second.stdin.close()
    assert second.wait(20) == 0 and second.stdout.read() == ""


def test_nothing_of_the_server_or_of_another_process_is_open_in_it(server, tmp_path):
    other = server.start(["-c", "input()"], stdin=PIPE)
    code = "import os; print(sorted(os.listdir('/proc/self/fd')))"
    with (tmp_path / "out").open("w") as out:
        assert server.start(["-c", code], stdout=out, stderr=DEVNULL).wait(20) == 0
    assert (tmp_path / "out").read_text() == "['0', '1', '2', '3']\n"  # 3: of listdir itself
    other.kill()
    other.wait(20)


def test_a_session_of_its_own(server):
    code = "import os; print(os.getpid() == os.getsid(0))"
    assert [server.run(["-c", code], start_new_session=new).stdout for new in (True, False)] == ["True\n", "False\n"]


def test_a_server_that_cannot_start_says_so():
    broken = ForkServer(["no_such_module"])
    with pytest.raises(RuntimeError, match="the fork server ended"):
        broken.run(["-c", "pass"])
    broken.close()


def test_it_ends_with_the_process_that_made_it():
    made = "from fork_server import ForkServer; made = ForkServer([])"
    code = f"import os; {made}; print(made._process.pid, flush=True); os._exit(0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    server = int(done.stdout)
    assert done.returncode == 0
    for _ in range(2000):
        if not _alive(server):
            return
        time.sleep(0.01)
    raise AssertionError("the server goes on")


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _environment() -> dict[str, str]:
    from paths import IMPORTED

    return {**os.environ, "PYTHONPATH": os.pathsep.join(IMPORTED)}
