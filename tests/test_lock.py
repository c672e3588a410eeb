"""One folder, one run: of two that start at once the second is refused, and a killed one leaves nothing in the way."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from famseg.cli.evaluate import main as evaluate
from famseg.cli.predict import main as predict
from famseg.cli.train import main as train
from famseg.files.errors import DataError
from famseg.files.lock import locked
from tests.checkpoints import write_checkpoint


def other_process(body: Callable[[], None]) -> int:
    """Its id; it ends with 0, or 1 where the body raises DataError."""
    child = os.fork()
    if child == 0:
        try:
            body()
        except DataError:
            os._exit(1)
        os._exit(0)
    return child


def code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("there", [True, False])
def test_one_of_many_that_start_at_once_gets_the_folder(there: bool, tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    if there:
        out.mkdir(parents=True)
    start = time.monotonic() + 0.3

    def claim() -> None:
        while time.monotonic() < start:
            pass
        with locked(out):
            time.sleep(0.5)
            (out / "result").write_text("x")

    codes = [code(child) for child in [other_process(claim) for _ in range(8)]]
    assert sorted(codes) == [0] + 7 * [1]
    assert [path.name for path in out.iterdir()] == ["result"]


def test_a_killed_process_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def claim() -> None:
        with locked(out):
            (tmp_path / "locked").touch()
            time.sleep(60)

    child = other_process(claim)
    while not (tmp_path / "locked").exists():
        time.sleep(0.01)
    with pytest.raises(DataError, match=f"another run is at work in {out}"), locked(out):
        pass
    os.kill(child, signal.SIGKILL)
    assert code(child) == -signal.SIGKILL
    with locked(out):
        pass
    assert [path.name for path in out.iterdir()] == []


def test_without_locks_whoever_creates_the_file_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "out"):
        with pytest.raises(DataError, match=r"holds \.lock"), locked(tmp_path / "out"):
            pass
        with pytest.raises(DataError, match=r"holds \.lock"), locked(tmp_path / "out", fresh=False):
            pass
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_or_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("keep me")
    for path, words in (
        (tmp_path, "has files in it; choose another --out"),
        (tmp_path / "old", "is a file"),
        (tmp_path / "old" / "deeper", "cannot be written to"),
        (Path("/proc/out"), "cannot be written to"),
    ):
        with pytest.raises(DataError, match=words), locked(path):
            pass
    with locked(tmp_path, fresh=False):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_folder_that_a_failed_command_made_is_removed_again(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), locked(tmp_path / "a" / "b"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError), locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "result").touch()
        raise RuntimeError
    assert (tmp_path / "a" / "b" / "result").exists()


@pytest.mark.parametrize("command", ["train", "resume", "evaluate", "predict"])
def test_commands_keep_off_a_folder_in_use(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    with locked(out):
        if command == "resume":
            (out / "config.yaml").write_text("data: phantom:6\n")
            assert train(["--out", str(out), "--resume", "auto"]) == 2
        elif command == "train":
            assert train(["--out", str(out)]) == 2
        else:
            checkpoint = str(write_checkpoint(tmp_path / "best.ckpt"))
            arguments = [checkpoint] if command == "evaluate" else [checkpoint, "scan.png"]
            assert {"evaluate": evaluate, "predict": predict}[command]([*arguments, "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert "another run is at work in" in message and message.count("\n") == 1
