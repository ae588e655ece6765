"""The sandbox: what passes, what does not, and what the machine keeps of it; and code in answers."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from pmpd.eval.sandbox import run
from pmpd.eval.sandbox.extract import extract_code
from pmpd.eval.sandbox.run import Verdict, run_python

PROMPT = 'def double(x: int) -> int:\n    """Return twice a number."""\n'
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limits")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux does this")


@pytest.mark.parametrize(
    "program",
    [
        "",
        "x = 1\nassert x == 1",
        "import collections, dataclasses, datetime, decimal, functools, heapq, itertools, json, math, random, re",
        "import asyncio\nasync def f(): return 1\nassert asyncio.run(f()) == 1",
        "if __name__ == '__main__':\n    y = [1]\nassert y",
        "import atexit\natexit.register(lambda: 1 / 0)",
        "import threading\nlock = threading.Lock()",
    ],
)
def test_programs_that_reach_their_end_pass(program: str) -> None:
    assert run_python(program) == Verdict(True, "")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("def f(x): return x\n\nassert f(1) == 2", "AssertionError (line 3: assert f(1) == 2)"),
        ("def f(x):\n    return 1 / x\nf(0)", "ZeroDivisionError: division by zero (line 3: f(0))"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines (line 1: raise ValueError('two\\nlines'))"),
        ("def f(:", "SyntaxError: invalid syntax (<program>, line 1)"),
        ("raise OSError", "OSError (line 1: raise OSError)"),
        pytest.param("import signal\nsignal.raise_signal(40)", "its end was reached (signal 40)", marks=LINUX),
        ("x = '\0'", "source code string cannot contain null bytes"),
        ("import numpy", "ModuleNotFoundError: No module named 'numpy'"),
        ("import pmpd.eval", "ModuleNotFoundError: No module named 'pmpd'"),
        ("def f(): return f()\nf()", "RecursionError"),
        ("input()", "EOFError"),
        ("import sys\nassert sys.stdin.read()", "AssertionError"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("exit()", "NameError"),  # of the package site
        ("import os; os._exit(0)", "ended before its end was reached (exit code 0)"),
        pytest.param("import os; os.abort()", "its end was reached (signal 6)", marks=POSIX),
        # Whatever the program says, it has not seen the token.
        (
            'import os\nfor n in range(9):\n  try: os.write(n, b\'{"token": "", "reason": ""}\')\n  except OSError: 0',
            "ended before",
        ),
        ("import os\nfor n in range(9):\n  try: os.write(n, b'1')\n  except OSError: 0\nos._exit(0)", "ended before"),
    ],
)
def test_programs_that_do_not_reach_their_end_fail(program: str, reason: str) -> None:
    verdict = run_python(program)
    assert not verdict.passed
    assert reason in verdict.reason
    assert "\n" not in verdict.reason


def test_a_program_without_an_end_is_ended() -> None:
    begin = time.monotonic()
    assert run_python("while True: pass", seconds=1) == Verdict(False, "ran longer than 1 s")
    assert run_python("import time; time.sleep(60)", seconds=0.5) == Verdict(False, "ran longer than 0.5 s")
    assert (
        run_python("while True:\n  try: raise SystemExit\n  except BaseException: 0", seconds=0.5).reason[:3] == "ran"
    )
    assert time.monotonic() - begin < 30


@POSIX
def test_time_is_also_limited_by_the_system(tmp_path: Path) -> None:
    limits = "import resource\nassert resource.getrlimit(resource.RLIMIT_CPU) == (4, 4)"
    assert run_python(limits, seconds=2.5).passed
    core = "import resource\nassert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)"
    assert run_python(core).passed


@LINUX
def test_memory_is_limited() -> None:
    assert "MemoryError" in run_python("x = []\nwhile True: x.append(bytes(10**6))", memory_bytes=1 << 28).reason
    assert "MemoryError" in run_python("x = bytes(10**9)", memory_bytes=1 << 28).reason
    assert run_python("x = bytes(10**8)", memory_bytes=1 << 28).passed


def test_any_amount_of_output_is_thrown_away(capfd: pytest.CaptureFixture[str]) -> None:
    program = (
        "import os, sys\nfor stream in (sys.stdout, sys.stderr):\n  print('x' * 10**7, file=stream)\nos.write(1, b'y')"
    )
    assert run_python(program).passed
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True: os.fork()",
        "import os\nos.system('sleep 1000')",
        "import subprocess\nsubprocess.run(['sleep', '1000'])",
        "import subprocess\nsubprocess.check_output('sleep 1000', shell=True)",
        "import os\nos.execv('/bin/true', ['true'])",
        "import os\nos.kill(os.getppid(), 9)",
        "import os\nos.killpg(0, 9)",
        "import ctypes\nctypes.CDLL(None).fork()",
        "import socket\nsocket.create_connection(('127.0.0.1', 9))",
        "import urllib.request\nurllib.request.urlopen('http://localhost')",
        "import multiprocessing\nprocess = multiprocessing.Process(target=print)\nprocess.start()",
    ],
)
@POSIX
def test_processes_signals_and_network_are_refused(program: str) -> None:
    verdict = run_python(program, seconds=5)
    assert not verdict.passed
    assert "is refused in the sandbox" in verdict.reason


@POSIX
def test_what_a_program_has_started_ends_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the refusals of Python, which are the first line: only the process's group is left."""
    child = tmp_path / "child.py"
    text = run._CHILD.read_text(encoding="utf-8").replace("    sys.addaudithook(hook)", "    _ = hook")
    child.write_text(text.replace('("RLIMIT_NPROC", 0)', '("RLIMIT_NPROC", 4096)'), encoding="utf-8")
    monkeypatch.setattr(run, "_CHILD", child)
    lives = tmp_path / "lives"
    program = f"""
import os, time
os.fork()
while True:
    open({str(lives)!r}, "a").write(f"{{os.getpid()}}\\n")
    time.sleep(0.02)
"""
    assert run_python(program, seconds=2).reason == "ran longer than 2 s"
    written = lives.read_text(encoding="utf-8")
    assert len(set(written.split())) == 2
    time.sleep(0.5)
    assert lives.read_text(encoding="utf-8") == written


def test_nothing_listens_to_the_network_or_is_reached() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.1)
        program = f"import socket\nsocket.socket().connect(('127.0.0.1', {listener.getsockname()[1]}))"
        assert not run_python(program).passed
        with pytest.raises(TimeoutError):
            listener.accept()


@LINUX
def test_there_is_no_network_where_users_may_make_namespaces() -> None:
    tool = shutil.which("unshare")
    if tool is None or subprocess.run([tool, "-Urn", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this system lets its users make no namespaces")
    assert run_python("assert open('/proc/self/net/dev').read().count(':') <= 1").passed


def test_files_stay_in_a_folder_that_is_removed(tmp_path: Path) -> None:
    before = set(Path(tempfile.gettempdir()).glob("pmpd-sandbox-*"))
    inside = """
import os, tempfile
assert os.listdir() == []
open("a", "w").write("1")
os.mkdir("b")
os.rename("a", "b/c")
os.remove("b/c")
with tempfile.TemporaryFile() as file:
    file.write(b"1")
with tempfile.TemporaryDirectory() as folder:
    open(folder + "/d", "w").write("1")
"""
    assert run_python(inside) == Verdict(True)
    victim = tmp_path / "victim"
    victim.write_text("precious", encoding="utf-8")
    for change in (
        f"open({str(victim)!r}, 'w')",
        f"open({str(victim)!r}, 'a')",
        f"open({str(victim)!r}, 'r+')",
        f"import os\nos.remove({str(victim)!r})",
        f"import os\nos.rename({str(victim)!r}, 'mine')",
        f"import shutil\nshutil.rmtree({str(tmp_path)!r})",
        f"import os\nos.symlink({str(victim)!r}, 'link')\nopen('link', 'w')",
        f"import pathlib\npathlib.Path({str(tmp_path / 'new')!r}).touch()",
        f"import os\nopen(os.path.relpath({str(victim)!r}), 'w')",
    ):
        assert not run_python(change).passed
        assert [path.name for path in tmp_path.iterdir()] == ["victim"], change
        assert victim.read_text(encoding="utf-8") == "precious", change
    assert set(Path(tempfile.gettempdir()).glob("pmpd-sandbox-*")) <= before


@POSIX
def test_files_are_small() -> None:
    assert "File too large" in run_python("open('big', 'wb').write(bytes(2 << 20))").reason
    assert run_python("open('small', 'wb').write(bytes(1 << 19))").passed


def test_the_environment_is_almost_empty_and_hashes_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "token")
    assert run_python("import os\nassert 'SECRET' not in os.environ and len(os.environ) < 10").passed
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    value = subprocess.run(
        [sys.executable, "-c", "print(hash('x'))"],
        env={**os.environ, "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert run_python(f"assert hash('x') == {value}").passed


FUNCTION = "def double(x):\n    return 2 * x\n"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (f"Sure!\n\n```python\n{FUNCTION}```\nThis doubles.", FUNCTION),
        (f"```\n{FUNCTION}```", FUNCTION),
        (f"```python\n{FUNCTION}", FUNCTION),  # out of tokens
        (f"Use it so:\n```python\ndouble(2)\n```\nand\n```py\n{FUNCTION}```", FUNCTION),
        (f"```bash\ndef double(x)\n```\n```Python\n{FUNCTION}```", FUNCTION),
        (f"```python\n{FUNCTION}```\n```python\ndef double(x): return 0\n```", FUNCTION),
        ("```python\nprint(1)\n```", "print(1)\n"),
        ("1. So:\n   ```python\n   def double(x):\n       return 2 * x\n   ```", FUNCTION),
        (f"\nimport math\n\n{FUNCTION}", f"\nimport math\n\n{FUNCTION}"),
        ("    return 2 * x\n", PROMPT + "    return 2 * x\n"),
        ("    y = 2\n\n    return y * x\n\nprint(double(2))\n    x\n", PROMPT + "    y = 2\n\n    return y * x\n"),
        ("\n    return 2 * x\n# Test\nassert 1", PROMPT + "\n    return 2 * x"),
        ("I cannot do that.", PROMPT),
        ("", PROMPT),
        ("    return doubled(x)\n\ndef doubled(x):", PROMPT + "    return doubled(x)\n"),
    ],
)
def test_code_is_found_in_answers(answer: str, code: str) -> None:
    assert extract_code(answer, "double", PROMPT) == code


def test_a_prompt_may_end_within_a_line() -> None:
    assert extract_code("2 * x\nprint()", "f", "def f(x):\n    return ") == "def f(x):\n    return 2 * x"
