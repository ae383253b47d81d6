"""Whatever happens to a preparation, the next call makes of the folder what one call makes."""

import errno
import multiprocessing
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import hqlt.data.prepare
import hqlt.data.writing
from hqlt.data import TokenShards
from hqlt.data.prepare import Preparation, prepare
from hqlt.data.writing import Job
from hqlt.training import Interrupted
from tests.data.corpora import content, documents, prepared, write_jsonl, write_texts

TEXTS = documents(150)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "texts.jsonl", TEXTS)


@contextmanager
def stopped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All shards are written, but no manifest."""

    def manifest(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hqlt.data.prepare, "_manifest", manifest)
        yield


def wanted(source: Path, **options: object) -> Preparation:
    return Preparation(**{"sources": (str(source),), "tokenizer": "bpe:300", "unit_bytes": 1000, **options})


def test_killed_at_any_moment(tmp_path, source):
    generator = random.Random(0)
    preparation = wanted(source, limit_tokens=6000)
    reference = tmp_path / "reference"
    prepare(preparation, reference, 1)
    # Children of a server that has imported everything start within milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hqlt.data.prepare", "tokenizers"])
    warm = context.Process(target=prepare, args=(preparation, tmp_path / "warm", 1))
    warm.start()
    warm.join()
    assert content(tmp_path / "warm") == content(reference)
    begun = time.monotonic()
    shutil.rmtree(tmp_path / "warm")
    prepare(preparation, tmp_path / "warm", 1)
    whole = time.monotonic() - begun
    kills = 0
    for _ in range(2):
        output, longest = tmp_path / "output", whole / 3
        while True:
            process = context.Process(target=prepare, args=(preparation, output, 1))
            process.start()
            process.join(generator.uniform(0, longest))
            process.kill()
            process.join()
            if process.exitcode == 0:
                break
            kills += 1
            longest *= 1.1
            assert process.exitcode == -signal.SIGKILL
            if not (output / "manifest.json").exists():
                with pytest.raises(FileNotFoundError):
                    TokenShards.open(output)
        assert content(output) == content(reference)
        shutil.rmtree(output)
    assert kills > 5


RUN = """
import sys
from pathlib import Path
from hqlt.data.prepare import Preparation, prepare
if __name__ == "__main__":
    prepare(Preparation(sources=(sys.argv[1],), tokenizer="bytes", unit_bytes=1000), Path(sys.argv[2]), 2)
"""


def test_killed_with_its_workers_and_resumed_by_others(tmp_path, source):
    """Two workers, killed, then two others, then one: what one worker makes."""
    reference, output, script = (
        prepared(source, tmp_path / "reference", unit_bytes=1000),
        tmp_path / "o",
        tmp_path / "r",
    )
    script.write_text(RUN)
    for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 1)):
        process = subprocess.Popen([sys.executable, str(script), str(source), str(output)], stderr=subprocess.PIPE)
        before = len(list(output.glob("*.tokens")))
        while len(list(output.glob("*.tokens"))) < before + 2:
            time.sleep(0.001)
        process.send_signal(number)
        said = process.communicate()[1].decode()
        assert process.returncode == status, said
        if number == signal.SIGTERM:
            assert "Interrupted: stopped; finished shards are kept" in said
            assert not list(output.glob(".*.tokens.*"))
    assert before >= 2
    assert not (output / "manifest.json").exists()
    assert content(prepared(source, output, unit_bytes=1000)) == content(reference)


def test_two_workers_make_what_one_makes(tmp_path, source):
    one = prepared(source, tmp_path / "one", unit_bytes=1000, limit_tokens=4001)
    two = prepared(source, tmp_path / "two", workers=2, unit_bytes=1000, limit_tokens=4001)
    assert content(one) == content(two)


def test_an_error_in_a_worker_is_that_of_the_command(tmp_path, source):
    with source.open("a") as file:
        file.write('{"txt": "b"}\n')
    with pytest.raises(ValueError, match=r"texts\.jsonl:151 has no field 'text'"):
        prepared(source, tmp_path / "tokens", workers=2, unit_bytes=1000)
    assert not list((tmp_path / "tokens").glob(".*.tokens.*"))


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_a_request_to_stop_keeps_what_is_finished(tmp_path, source, tokenizer, monkeypatch):
    run = Job.run

    def requested(job: Job, number: int, *arguments: object) -> object:
        if number == 3:
            signal.raise_signal(signal.SIGINT)
        return run(job, number, *arguments)

    monkeypatch.setattr(Job, "run", requested)
    for _ in range(2):
        with pytest.raises(Interrupted, match="run the same command"):
            prepared(source, tmp_path / "tokens", tokenizer=tokenizer, unit_bytes=1000)
        assert len(list((tmp_path / "tokens").glob("*.tokens"))) == 3
    monkeypatch.undo()
    finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "tokens").glob("*.tokens")}
    whole = prepared(source, tmp_path / "tokens", tokenizer=tokenizer, unit_bytes=1000)
    assert all((whole / name).stat().st_mtime_ns == time for name, time in finished.items())
    assert content(whole) == content(prepared(source, tmp_path / "other", tokenizer=tokenizer, unit_bytes=1000))


def test_a_request_to_stop_is_heard_while_a_bpe_is_trained(tmp_path, source, monkeypatch):
    pieces = hqlt.data.prepare.pieces

    def requested(*arguments: object) -> object:
        signal.raise_signal(signal.SIGTERM)
        return pieces(*arguments)

    monkeypatch.setattr(hqlt.data.prepare, "pieces", requested)
    with pytest.raises(Interrupted):
        prepare(wanted(source), tmp_path / "tokens", 1)
    monkeypatch.undo()
    prepare(wanted(source), tmp_path / "tokens", 1)
    prepare(wanted(source), tmp_path / "other", 1)
    assert content(tmp_path / "tokens") == content(tmp_path / "other")


class Full:
    """A disk on which so many writes succeed, the last of them in part."""

    def __init__(self, writes: int) -> None:
        self.left = writes

    def wrap(self, file: object) -> "FullFile":
        return FullFile(file, self)


class FullFile:
    def __init__(self, file: object, disk: Full) -> None:
        self._file, self._disk = file, disk

    def write(self, content: memoryview) -> int:
        self._disk.left -= 1
        if self._disk.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._file.write(content[: len(content) // 2] if not self._disk.left else content)


@pytest.mark.parametrize("writes", [0, 1, 2, 7, 8])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, source, writes, monkeypatch):
    sink, disk = hqlt.data.writing._Sink, Full(writes)
    monkeypatch.setattr(hqlt.data.writing, "_Sink", lambda file, path: sink(disk.wrap(file), path))
    output = tmp_path / "tokens"
    with pytest.raises(OSError, match=r"No space left on device.*run the same command.*tokens") as error:
        prepared(source, output, unit_bytes=1000)
    assert error.value.errno == errno.ENOSPC
    monkeypatch.undo()
    whole, left = content(prepared(source, tmp_path / "whole", unit_bytes=1000)), content(output)
    assert all(whole[name] == left[name] for name in left if not name.startswith(".progress"))
    assert sum(name.endswith(".tokens") for name in left) == writes // 2 - (writes > 0 and writes % 2 == 0)
    assert content(prepared(source, output, unit_bytes=1000)) == whole


def test_a_folder_of_other_settings_is_refused(tmp_path, source, monkeypatch):
    other = write_jsonl(tmp_path / "other.jsonl", TEXTS[:-1])
    begun, complete = tmp_path / "begun", prepared(source, tmp_path / "complete", unit_bytes=1000)
    with stopped(monkeypatch), pytest.raises(KeyboardInterrupt):
        prepared(source, begun, unit_bytes=1000)
    for folder in (begun, complete):
        for chosen, options, message in (
            (source, {"tokenizer": "bpe:300"}, "tokenizer='bytes' instead of 'bpe:300'"),
            (source, {"start": "none"}, r"start=\[0\] instead of \[\]"),
            (source, {"unit_bytes": 500}, "unit_bytes=1000 instead of 500"),
            (source, {"limit_tokens": 5}, "limit_tokens=None instead of 5"),
            (source, {"replace_invalid": True}, "replace_invalid=False"),
            (other, {}, "sources"),
        ):
            with pytest.raises(ValueError, match=f"begun with other settings .*{message}"):
                prepared(chosen, folder, **{"unit_bytes": 1000, **options})
    assert content(prepared(source, complete, unit_bytes=1000)) == content(prepared(source, begun, unit_bytes=1000))


def test_a_folder_of_something_else_is_refused(tmp_path, source):
    with pytest.raises(FileExistsError, match="holds something else"):
        prepared(source, write_texts(tmp_path / "texts", ["a"]))
    with pytest.raises(FileExistsError, match="holds something else"):
        prepared(source, source)


def test_two_preparations_of_a_folder_at_once_are_refused(tmp_path, source, monkeypatch):
    run = Job.run

    def again(*arguments: object) -> object:
        monkeypatch.undo()
        with pytest.raises(BlockingIOError, match="another process works in"):
            prepared(source, tmp_path / "tokens", unit_bytes=1000)
        return run(*arguments)

    monkeypatch.setattr(Job, "run", again)
    prepared(source, tmp_path / "tokens", unit_bytes=1000)


def test_sources_that_change_meanwhile_are_an_error(tmp_path, source, monkeypatch):
    run = Job.run

    def touched(*arguments: object) -> object:
        source.touch()
        return run(*arguments)

    monkeypatch.setattr(Job, "run", touched)
    with pytest.raises(ValueError, match="the sources have changed"):
        prepared(source, tmp_path / "tokens", unit_bytes=10**6)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="times of change of the sources"):
        prepared(source, tmp_path / "tokens", unit_bytes=10**6)


def test_a_finished_shard_that_was_lost_is_made_again(tmp_path, source, monkeypatch):
    whole = content(prepared(source, tmp_path / "whole", unit_bytes=1000))
    output = tmp_path / "tokens"
    with stopped(monkeypatch), pytest.raises(KeyboardInterrupt):
        prepared(source, output, unit_bytes=1000)
    (output / "00001.tokens").unlink()
    (output / "00003.documents").write_bytes(b"")
    (output / ".00002.tokens.abc").write_bytes(b"half")
    assert content(prepared(source, output, unit_bytes=1000)) == whole
