"""`export`: a result in another format, read back and compared before it counts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from autocompress.card import write_card
from autocompress.doctor import loading
from autocompress.errors import OutputError
from autocompress.exporters import find_exporter
from autocompress.exporters.depth import depth_facts, without_dropped
from autocompress.exporters.narrow import narrow_facts, narrowed
from autocompress.exporters.source import Source
from autocompress.files import sha256, write_json
from autocompress.folders import MANIFEST, MARK
from autocompress.machine import installed
from autocompress.progress import Progress, Silent
from autocompress.runtimes import Runtime, find_runtime
from autocompress.verification import verify

WHOLE = ("native", "plan")  # formats that can say that a sublayer is not there
PACKAGES = ("autocompress", "torch", "transformers", "compressed-tensors", "peft", "gguf")
KEPT = (  # of the source's manifest
    *("model", "space", "allocation", "effective_bits", "dense_bytes", "results"),
    *("calibration", "seed", "budgets", "settings", "total_bytes"),
)


def export(
    folder: str | Path,
    out: str | Path,
    *,
    format: str | None = None,
    runtime: str | None = None,
    check: bool = True,
    windows: int = 2,
    model: str | None = None,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a result in another format, read it back and compare.

    Args:
        folder: result of `autocompress search` or `build --plan`.
        out: new folder.
        format: name in `exporters`; None is the runtime's.
        runtime: what must load it, a name in `runtimes`; None is the one that was searched for.
        check: whether to read it back in a fresh process.
        windows: of text that are computed for that.
        model: the dense model; None is the recorded one.
        overwrite: replace a former export there.
        push_to_hub: Hub repository to upload to once it is checked; None uploads nothing.
        progress: told what happens.

    Returns:
        The content of the export's `autocompress.json`.

    Raises:
        OutputError: it exists, the disk refused, or what was read back differs: the files are then
            kept and marked as failed.
        AutocompressError: no result, or levels that the format or the runtime cannot take.
    """
    folder, out, shown = Path(folder), Path(out), progress or Silent()
    result = Source.open(folder)
    chosen, name = _target(result, format, runtime)
    exporter = find_exporter(name)
    check_new(out, overwrite)
    _check_upload(push_to_hub, check)
    source = _for_format(result, name)
    with _gone_if_interrupted(out):
        exporter_facts = _write(exporter, source, chosen, out, shown)
        facts = _facts(result, name, _structure(result, source) | exporter_facts, out)
        facts["verification"] = None
        write_json(out / MANIFEST, facts)
        facts["export"]["loads"] = {} if name in WHOLE else loading(out)
        if check and exporter.reader is not None:
            shown.say(f"reading it back with {exporter.reader}")
            facts["verification"] = _verified(
                *(source, out, exporter_facts, exporter.reader, windows, model)
            )
        write_card(facts, out)
        write_json(out / MANIFEST, facts)
    _refuse_failed(facts["verification"], out)
    if push_to_hub is not None:
        shown.say(f"uploading to {push_to_hub}")
        publish(out, push_to_hub)
    return facts


@contextmanager
def _gone_if_interrupted(out: Path) -> Iterator[None]:
    """An export that Ctrl-C ends leaves nothing: the same command begins it again."""
    try:
        yield
    except KeyboardInterrupt:
        shutil.rmtree(out, ignore_errors=True)
        raise


def _refuse_failed(found: dict[str, Any] | None, out: Path) -> None:
    if found and not found["passed"]:
        raise OutputError(
            f"'{out}' must be what was searched. Got, read back: {'; '.join(found['problems'])}. "
            f"Its files are kept; {MANIFEST} marks them as failed. Do not publish it."
        )


def _for_format(source: Source, format: str) -> Source:
    """What a format's exporter writes: without what is gone, where it has no word for that."""
    if format in WHOLE:
        return source
    left = without_dropped(narrowed(source))
    if format != "dense":
        left.must_be_whole(format)
    return left


def _structure(result: Source, source: Source) -> dict[str, Any]:
    """What an export says of sublayers and channels that are gone."""
    return narrow_facts(result, source) | depth_facts(source)


def _check_upload(repository: str | None, check: bool) -> None:
    """Refuse uploads that nobody read back."""
    if repository is not None and not check:
        raise OutputError(
            "what is published must be read back first. Got --push-to-hub with --no-check. "
            "Leave one out."
        )


def publish(out: Path, repository: str) -> None:
    """Upload a checked export to a Hub repository, made if there is none.

    Raises:
        OutputError: the Hub refused.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=out, ignore_patterns=[MARK])
    except Exception as error:  # of the network, the Hub, or the token
        raise OutputError(
            f"'{repository}' must take the upload. Got: {type(error).__name__}: {error}. "
            f"The export itself is whole: '{out}'."
        ) from error


def _target(source: Source, format: str | None, runtime: str | None) -> tuple[Runtime | None, str]:
    """Runtime and format, each from the other where one is missing.

    Raises:
        AutocompressError: unknown, neither is known, or they do not belong together.
    """
    if format is None and runtime is None:
        runtime = source.manifest["space"].get("runtime")
    chosen = None if runtime is None else find_runtime(runtime)
    if format is None and chosen is None:
        raise OutputError(
            "an export must name a format or a runtime. Got neither, and the search was for none. "
            "Add --format or --runtime; `autocompress runtimes` lists them."
        )
    if chosen is not None and format not in (None, chosen.format, "peft"):
        raise OutputError(
            f"runtime {chosen.name} must be written as {chosen.format}. Got --format {format}."
        )
    return chosen, format or (chosen.format if chosen else "")


def check_new(out: Path, overwrite: bool) -> None:
    """Check that an export may be written to `out`; touches nothing.

    Raises:
        OutputError: something is there.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"--out must be a folder. Got the file '{out}'. Choose another.")
    names = {entry.name for entry in out.iterdir()}
    if not names or (overwrite and MARK in names):
        return
    if MARK in names and MANIFEST not in names:
        raise OutputError(
            f"--out must be new or empty. Got '{out}', a half-written export of a run that was "
            "stopped. Add --overwrite to write it again."
        )
    hint = "Add --overwrite to replace it, or choose" if MARK in names else "Choose"
    raise OutputError(
        f"--out must be new or empty. Got '{out}', which holds {sorted(names)[0]}. {hint} another."
    )


def _write(
    exporter: Any, source: Source, runtime: Runtime | None, out: Path, shown: Progress
) -> dict[str, Any]:
    """The exporter's files in a marked folder; a refusal leaves what was there before."""
    draft = out.with_name(f".{out.name}.draft")
    shown.say(f"writing {out}")
    try:
        shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed
        draft.mkdir(parents=True)
        (draft / MARK).touch()
        facts: dict[str, Any] = exporter.write(source, runtime, draft)
        if out.exists():
            shutil.rmtree(out)
        draft.replace(out)
    except OSError as error:
        raise OutputError(f"'{out}' must be writable. Got: {error}. Choose another.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return facts


def _facts(source: Source, name: str, written: dict[str, Any], out: Path) -> dict[str, Any]:
    files = written["files"]
    return {
        "format": 1,
        **{key: source.manifest[key] for key in KEPT if key in source.manifest},
        "export": {"format": name, "from": str(source.folder.resolve()), **written},
        "file_bytes": sum((out / file).stat().st_size for file in files),
        "sha256": {file: sha256(out / file) for file in files},
        "versions": {package: installed(package) for package in PACKAGES if installed(package)},
    }


def _verified(
    source: Source, out: Path, facts: dict[str, Any], reader: str, windows: int, model: str | None
) -> dict[str, Any]:
    """What reading back found; a reader that fails is a finding, too."""
    try:
        return verify(source, out, facts, reader, windows, model)
    except OutputError as error:
        return {"passed": False, "problems": [str(error)], "reader": reader}
