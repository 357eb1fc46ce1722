"""The commands. Each imports what it needs when it runs: `--help` answers at once."""

from __future__ import annotations

import json
import signal
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from autocompress import (
    eval_command,
    export_commands,
    front_commands,
    profile_command,
    run_commands,
)
from autocompress.errors import AutocompressError
from autocompress.interrupt import interrupt
from autocompress.worker_options import with_workers

if TYPE_CHECKING:
    from autocompress.config import StudyConfig
    from autocompress.progress import Progress
    from autocompress.result import FrontResult, Result

app = typer.Typer(
    name="autocompress",
    help="Find the best non-uniform compression of a language model for a budget.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str | None,
    typer.Option(help="Folder, GGUF file or Hub id; default SmolLM2-135M-Instruct."),
]
Space = Annotated[
    str | None,
    typer.Option(help="Built-in search space or TOML file; default quant-2-8 or the runtime's."),
]
Runtime = Annotated[str | None, typer.Option(help="What must load the result; see `runtimes`.")]
Pin = Annotated[
    list[str] | None, typer.Option(help="'pattern=level', such as '*.layers.0.*=dense'; repeat.")
]
Text = Annotated[
    str | None,
    typer.Option(help="Text, jsonl, parquet, datasets folder or Hub id; default built-in text."),
]
Run = Annotated[
    Path | None,
    typer.Option(help="Folder of database, study and settings; default OUT.run."),
]
Seed = Annotated[int, typer.Option(help="Of windows, gradients and strategies.")]
Prefix = Annotated[
    str | None, typer.Option(help="Level whose weights make the calibration activations.")
]
Method = Annotated[str, typer.Option(help="gptq or rtn.")]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16 or float32.")]
Budget = Annotated[
    list[str] | None,
    typer.Option(
        help="Limit: 3.5bits, 80MB, 50% of parameters, 12ms, 80tokens/s, 2x or 0.05KL; several."
    ),
]
Minimize = Annotated[
    str | None, typer.Option(help="Under a limit on KL: bytes (the default) or latency.")
]
Strategy = Annotated[
    str, typer.Option(help="auto, ilp, refinement, evolution, uniform, …; see docs.")
]
Pareto = Annotated[
    str | None, typer.Option(help="A whole front in place of a budget: 'bits=2.5..6'.")
]
Effort = Annotated[str, typer.Option(help="quick, normal or thorough: tokens to spend.")]
Tokens = Annotated[int | None, typer.Option(help="To spend, in place of an effort.")]
SensitivityTokens = Annotated[
    int | None, typer.Option(help="That the first gradients see; default by effort.")
]
Storage = Annotated[str | None, typer.Option(help="Optuna storage URL; default journal.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, nothing else, on standard output.")]
Config = Annotated[Path | None, typer.Option(help="TOML file with these settings; flags win.")]


UsageError: Any = typer.BadParameter.__base__  # click's, wherever typer keeps it
INTERRUPTED = 130  # what shells expect after Ctrl-C


def main() -> None:
    """Entry point: one line per error, exit code 2 for wrong input, 130 for Ctrl-C."""
    warnings.showwarning = _show_warning
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell may ignore it
        signal.signal(signal.SIGINT, interrupt)
    try:
        code = app(args=sys.argv[1:] or ["--help"], standalone_mode=False)
    except AutocompressError as error:
        _fail(str(error))
    except UsageError as error:
        command = error.ctx.command_path if error.ctx else "autocompress"
        _fail(f"{error.format_message().rstrip('.')}. See '{command} --help'.")
    if code == INTERRUPTED:  # typer swallows KeyboardInterrupt
        print("interrupted: run the same command again to go on from here", file=sys.stderr)
    sys.exit(code)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """On one line, without the place in the code that issued it."""
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


@app.command()
@with_workers
def search(
    context: typer.Context,
    budget: Budget = None,
    minimize: Minimize = None,
    out: Annotated[Path, typer.Option(help="Folder of the packed model.")] = Path("compressed"),
    model: Model = None,
    space: Space = None,
    runtime: Runtime = None,
    pin: Pin = None,
    calibration: Text = None,
    strategy: Strategy = "auto",
    generations: Annotated[int | None, typer.Option(help="Of evolution, at most.")] = None,
    offspring: Annotated[int | None, typer.Option(help="Per generation.")] = None,
    effort: Effort = "normal",
    tokens: Tokens = None,
    sensitivity_tokens: SensitivityTokens = None,
    seed: Seed = 0,
    run: Run = None,
    prefix: Prefix = None,
    method: Method = "gptq",
    dtype: Dtype = "auto",
    target: profile_command.Target = "cpu",
    threads: profile_command.Threads = None,
    batch: profile_command.Batch = 1,
    prompt: profile_command.Prompt = 128,
    decode: profile_command.Decode = 1.0,
    activations: profile_command.Activations = "int8",
    storage: Storage = None,
    pareto: Pareto = None,
    points: Annotated[int, typer.Option(help="Models of the front.")] = 6,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Search the best allocation within the budgets and write the packed model."""
    from autocompress.pipeline import run_front, run_search

    settings = _settings(context, config)
    go: Any = run_search if settings.pareto is None else run_front
    _show(go(settings, _progress()), as_json)


def _show(result: Result | FrontResult, as_json: bool) -> None:
    """A search's result; the exit code says whether Ctrl-C ended it."""
    if as_json:
        _print_json(result.facts)
    else:
        from autocompress.show import front_table, result_table

        show = front_table if "points" in result.facts else result_table
        show(result.facts, result.path)
    if result.facts["stopped"]:
        raise typer.Exit(INTERRUPTED)


@app.command()
@with_workers
def build(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="The run folder is OUT.run.")] = Path("compressed"),
    model: Model = None,
    space: Space = None,
    runtime: Runtime = None,
    pin: Pin = None,
    calibration: Text = None,
    run: Run = None,
    prefix: Prefix = None,
    method: Method = "gptq",
    dtype: Dtype = "auto",
    config: Config = None,
    plan: export_commands.Plan = None,
    as_json: Json = False,
) -> None:
    """Build the level database only, or with --plan the model that a plan describes."""
    if plan is not None:
        export_commands.build_plan(plan, out, run, model, as_json)
        return
    from autocompress.pipeline import build_database

    settings = _settings(context, config)
    database = build_database(settings, progress=_progress())
    facts: dict[str, Any] = {
        "path": str(database.path),
        "modules": len(database.entries),
        "entries": sum(map(len, database.entries.values())),
        "bytes": database.bytes(),
        "identity": database.identity,
    }
    if as_json:
        _print_json(facts)
    else:
        typer.echo(f"{facts['entries']} entries, {facts['bytes'] / 1e6:.0f} MB: {database.path}")


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="Result, export, any model folder or GGUF file.")],
    as_json: Json = False,
) -> None:
    """Show layers, levels, bits, bytes and scores of a result, or what any model folder holds."""
    from autocompress.output import describe
    from autocompress.show import show

    facts = describe(folder)
    if as_json:
        _print_json(facts)
    else:
        show(facts, folder)


@app.command()
def spaces(as_json: Json = False) -> None:
    """List the built-in search spaces."""
    from autocompress.spaces import list_spaces

    rows = [
        {
            "name": space.name,
            "levels": list(map(str, space.levels)),
            "scope": list(space.scope),
            "tie": space.tie if isinstance(space.tie, str) else list(map(list, space.tie)),
            "description": space.description,
        }
        for space in list_spaces()
    ]
    if as_json:
        _print_json(rows)
    else:
        from autocompress.show import space_table

        space_table(rows)


app.command(name="eval")(eval_command.evaluate)
app.command()(profile_command.profile)
app.command()(front_commands.front)
app.command()(front_commands.compare)
app.command()(front_commands.dashboard)
app.command()(run_commands.generate)
app.command()(run_commands.bench)
app.command()(export_commands.export)
app.command()(export_commands.runtimes)
app.command()(export_commands.doctor)
app.command()(export_commands.dequantize)

FIELDS = {
    "pin": "pins",
    "budget": "budgets",
    "tokens": "spend",
}  # flag -> field of StudyConfig, where they differ


def _settings(context: typer.Context, file: Path | None) -> StudyConfig:
    """The configuration: defaults, what the run folder remembers, the TOML file, given flags."""
    from dataclasses import fields

    from autocompress.config import StudyConfig, read_file
    from autocompress.run_record import recalled

    known = {field.name for field in fields(StudyConfig)}
    given: dict[str, Any] = {}
    for name, value in context.params.items():
        field = FIELDS.get(name, name)
        source = context.get_parameter_source(name)
        if field in known and value is not None and source is not None and source.name != "DEFAULT":
            given[field] = tuple(value) if isinstance(value, list) else value
    settings = {} if file is None else read_file(file)
    return StudyConfig(**recalled({**settings, **given}))


def _progress() -> Progress:
    from autocompress.progress import terminal_progress

    return terminal_progress()


def _print_json(content: object) -> None:
    typer.echo(json.dumps(content, indent=1))
