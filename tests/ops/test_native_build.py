"""Where compiled code comes from: compilers, caches, processes."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from hqlt import delta_rule
from hqlt.ops import native
from hqlt.ops.backend import Call, Kernel
from hqlt.ops.delta import DELTA_RULE
from hqlt.ops.native import build
from hqlt.ops.window import WINDOW_ATTENTION
from tests.helpers import assert_close

BUILT = build.library(torch.float32)
needs_code = pytest.mark.skipif(BUILT.code is None or BUILT.path is None, reason=f"{BUILT.reason}")
CALL = Call(device="cpu", dtype=torch.float32, length=40, key_dim=8, value_dim=8)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing is loaded, and the cache is empty."""
    monkeypatch.setenv("HQLT_CACHE", str(tmp_path / "cache of mine"))
    monkeypatch.delenv("CC", raising=False)
    for cached in (build.library, native._function):
        cached.cache_clear()
    yield tmp_path / "cache of mine"
    for cached in (build.library, native._function):
        cached.cache_clear()


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, then: str) -> Path:
    """A compiler of another make: it says its version, and for the rest is a shell script."""
    path = folder / "my compiler"
    path.write_text(
        f'#!/bin/sh\necho "$@" >> "{folder}/calls"\n'
        'case "$*" in *--version*) echo "stand-in 1.0"; exit;; esac\n'
        'while [ "$1" != "-o" ]; do shift; done; target="$2"\n' + then
    )
    path.chmod(0o755)
    monkeypatch.setenv("CC", str(path))
    return path


def copying() -> str:
    """What was compiled before, instead of seconds of work."""
    return f'cp "{BUILT.path}" "$target"\n'


def chosen(call: Call = CALL, backend: str = "auto", op=DELTA_RULE) -> str:
    found = op.choose(backend, call)
    return found.name if isinstance(found, Kernel) else found


@needs_code
def test_it_is_built_once_for_each_compiler_and_option(fresh, tmp_path, monkeypatch):
    path = stand_in(tmp_path, monkeypatch, copying())
    first = build.library(torch.float32)
    assert first.path is not None
    assert first.path.parent == fresh
    build.library.cache_clear()
    assert build.library(torch.float32).path == first.path
    (tmp_path / "plain").symlink_to(path)
    monkeypatch.setenv("CC", f"{tmp_path}/plain -m64")
    build.library.cache_clear()
    assert build.library(torch.float32).path != first.path
    builds = [line for line in (tmp_path / "calls").read_text().splitlines() if "-o" in line.split()]
    assert len(builds) == 2
    assert "-m64 -O2" in builds[1]
    assert len(list(fresh.iterdir())) == 2


@needs_code
def test_builds_at_once_do_not_meet(fresh, tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, "sleep 0.3\n" + copying())
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(build.library, [torch.float32] * 4))
    assert len({x.path for x in found}) == 1
    assert all(x.code is not None and x.reason is None for x in found)
    assert list(fresh.iterdir()) == [found[0].path]


@needs_code
@pytest.mark.parametrize("broken", ["file", "library", "home"])
def test_a_cache_that_cannot_be_used_costs_a_build(broken, fresh, tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, copying())
    if broken == "file":  # as a folder that nobody may write to
        fresh.write_text("")
    elif broken == "library":
        fresh.mkdir()
        (fresh / build._name(build.compiler(), torch.float32)).write_bytes(b"of another system")
    else:
        monkeypatch.delenv("HQLT_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
    found = build.library(torch.float32)
    assert found.code is not None
    assert "compiled anew in each process, since the cache folder cannot be used" in found.reason
    assert not found.path.exists()
    assert chosen() == "native"


def test_no_compiler(fresh, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert chosen() == "chunked"
    with pytest.raises(
        ValueError, match=r"backend='native' cannot run the delta rule here; .*install gcc or clang, or name"
    ):
        chosen(backend="native")
    monkeypatch.setenv("CC", "a compiler that is not there")
    build.library.cache_clear()
    assert chosen() == "chunked"


def test_it_can_be_forbidden(fresh, monkeypatch):
    monkeypatch.setenv("HQLT_NATIVE", "0")
    assert chosen() == "chunked"
    assert not native.runs_rows(torch.randn(2, 3, 8), (), torch.float32)
    with pytest.raises(ValueError, match="HQLT_NATIVE=0 forbids it"):
        chosen(backend="native")
    assert not fresh.exists()


@pytest.mark.parametrize(
    "says", ['echo "x.c:1: error: no header" >&2; echo "compilation terminated." >&2; exit 1', "exec sleep 60"]
)
def test_a_compiler_that_fails_is_warned_of_once(says, fresh, tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, says)
    monkeypatch.setattr(build, "SECONDS", 0.5)
    reason = "error: no header" if "error" in says else "timed out"
    x, beta = torch.randn(1, 40, 1, 8), torch.rand(1, 40, 1)
    begun = time.monotonic()
    with pytest.warns(
        RuntimeWarning, match=rf"slower forms run on this CPU.*cannot build it: .*{reason}.*HQLT_NATIVE=0"
    ):
        read, _ = delta_rule(x, x, x, beta)
    assert torch.equal(delta_rule(x, x, x, beta)[0], read)  # a second warning would be an error
    assert time.monotonic() - begun < 30
    assert list(fresh.iterdir()) == []
    with pytest.raises(ValueError, match=reason):
        chosen(backend="native")


@needs_code
@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork")
def test_threads_of_a_child():
    """A child has none of its parent's threads; pools in threads of its own share one."""
    code = """if True:
        import os, torch, hqlt
        from concurrent.futures import ThreadPoolExecutor
        from hqlt.ops import native
        native.THREAD_WORK = 1
        torch.set_num_threads(2)
        x = torch.randn(4, 20, 2, 8)
        run = lambda: hqlt.window_attention(x, x, x, window=5, backend="native")
        expected = run()
        def check():
            with ThreadPoolExecutor(3) as pool:
                return all(torch.equal(y, expected) for y in pool.map(lambda _: run(), range(20)))
        assert check()
        child = os.fork()
        if child == 0:
            torch.set_num_threads(2)  # threads that are torch's first in a child trip over its pool, which is made anew
            os._exit(7 if check() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


@needs_code
def test_auto_takes_it_for_small_heads_and_windows():
    for dtype in (torch.float32, torch.float64):
        assert chosen(CALL._replace(dtype=dtype)) == "native"
    assert chosen(CALL._replace(dtype=torch.bfloat16)) == "chunked"
    for change in ({"key_dim": 33}, {"value_dim": 64}, {"period": 8}):
        assert chosen(CALL._replace(**change)) == "chunked"
        small = "period" not in change
        assert chosen(CALL._replace(**change), "native") == ("native" if small else "chunked")
    assert chosen(CALL._replace(key_dim=65), "native") == "chunked"
    assert chosen(CALL._replace(length=1), "native") == "reference"
    attention = {  # head, queries, window, past
        (16, 100, 64, False): "native", (16, 100, 65, False): "chunked", (17, 100, 32, False): "native",
        (17, 100, 33, False): "chunked", (33, 100, 8, False): "chunked", (8, 100, None, False): "chunked",
        (32, 32, 100, False): "native", (32, 32, None, False): "native", (32, 40, 32, True): "native",
        (32, 32, 100, True): "chunked", (32, 32, None, True): "chunked",
    }  # fmt: skip
    for (head, length, window, past), name in attention.items():
        call = CALL._replace(key_dim=8, value_dim=head, length=length, window=window, past=past)
        assert chosen(call, op=WINDOW_ATTENTION) == name
        assert chosen(call, "native", WINDOW_ATTENTION) == "native"


def test_another_device_has_none():
    with pytest.raises(ValueError, match="it is for a CPU, not cuda"):
        chosen(CALL._replace(device="cuda"), "native")


@needs_code
def test_the_compiler_of_this_machine_makes_the_other_precision(fresh):
    """The one build that is not copied."""
    assert build.library(torch.float64).reason is None
    x = torch.randn(1, 20, 1, 8).double()
    assert_close(
        *(delta_rule(x, x, x, x[..., 0] / 8, backend=backend)[0] for backend in ("native", "reference")), 1e-12
    )


def test_every_source_counts_for_the_name():
    folder = Path(build.__file__).parent
    assert {path.name for path in folder.iterdir() if path.suffix in (".c", ".h")} == set(build.SOURCES)
