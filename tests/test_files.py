"""Files are written whole or not at all, and one process at a time holds a lock."""

import errno
import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from autocompress.errors import OutputError, StudyError
from autocompress.files import exclusive, fingerprint, sha256, write_atomically, write_json

MESSAGE = "one at a time. Got two."


def names(folder):
    """Everything in a folder, drafts too."""
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_with_its_folder(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"

    def write(draft):
        assert draft.parent == path.parent
        assert not path.exists()
        draft.write_text("text")

    write_atomically(path, write)
    assert path.read_text() == "text"
    assert names(path.parent) == ["a.txt"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write(draft):
        draft.write_text("half of the new te")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        OutputError, match=r"No space left on device.*nothing half-written"
    ) as error:
        write_atomically(path, write)
    assert str(path) in str(error.value)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, StudyError])
def test_other_errors_pass_unchanged_and_leave_no_file(tmp_path, error):
    def write(draft):
        draft.write_text("half")
        raise error("stop")

    with pytest.raises(error, match="stop"):
        write_atomically(tmp_path / "a.txt", write)
    assert names(tmp_path) == []


def test_a_full_disk_under_safetensors_is_an_output_error(tmp_path):
    """A real one: the process may not write files of more than 64 kB."""
    code = """if True:
        import resource, signal, sys
        from pathlib import Path
        import torch
        from safetensors.torch import save_file
        from autocompress.errors import OutputError
        from autocompress.files import write_atomically
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        try:
            write_atomically(Path(sys.argv[1]), lambda d: save_file({"a": torch.ones(10**6)}, d))
        except OutputError as error:
            print("refused:", error)
    """
    path = tmp_path / "a.safetensors"
    run = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert run.stdout.startswith("refused:"), run.stderr
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="must be writable"):
        write_json(tmp_path / "file" / "a.json", {})


def test_json_is_strict_and_readable(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, 2.5, None], "é": "‖"})
    assert json.loads(path.read_text()) == {"a": [1, 2.5, None], "é": "‖"}
    assert path.read_text().endswith("}\n")
    for value in (math.nan, math.inf, object()):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, {"a": value})
    assert json.loads(path.read_text())["a"] == [1, 2.5, None]
    assert names(tmp_path) == ["a.json"]


def test_digests_tell_contents_apart(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a").startswith("ba7816bf8f01cfea")
    save_file({"a": torch.zeros(2)}, tmp_path / "b")
    assert sha256(tmp_path / "b") != sha256(tmp_path / "a")
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint([1, 2]) != fingerprint([2, 1])
    assert len(fingerprint("x")) == 32


def test_a_second_holder_is_refused_until_the_first_is_done(tmp_path):
    lock = tmp_path / "new" / "lock"
    with exclusive(lock, StudyError, MESSAGE):
        with pytest.raises(StudyError, match=MESSAGE), exclusive(lock, StudyError, MESSAGE):
            pytest.fail("two hold the lock")
    with exclusive(lock, StudyError, MESSAGE):
        pass


def test_a_lock_is_free_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), exclusive(tmp_path / "lock", StudyError, MESSAGE):
        raise ZeroDivisionError
    with exclusive(tmp_path / "lock", StudyError, MESSAGE):
        pass


def test_another_process_is_refused_and_its_death_frees_the_lock(tmp_path):
    code = """if True:
        import sys, time
        from pathlib import Path
        from autocompress.errors import StudyError
        from autocompress.files import exclusive
        with exclusive(Path(sys.argv[1]), StudyError, "mine"):
            print("held", flush=True)
            time.sleep(60)
    """
    lock = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", code, lock], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(StudyError, match=MESSAGE), exclusive(lock, StudyError, MESSAGE):
            pytest.fail("two hold the lock")
        other.kill()
    with exclusive(lock, StudyError, MESSAGE):
        pass
