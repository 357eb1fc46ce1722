"""What the dashboard shows of a run beside its trials: plots and a note."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autocompress.core import Allocation, Trial
from autocompress.errors import StudyError
from autocompress.report.facts import layer_grid
from autocompress.runs import Front, Study, cost_loss, front_of

Entry = dict[str, Any]


def front_plot(run: Study) -> Any:
    """Every trial on validation windows, with standard errors, and their front."""
    from plotly import graph_objects

    figure = graph_objects.Figure(layout={"title": "Front on validation windows"})
    found = _front(run)
    if found is not None:
        rest = [trial for trial in run.validated() if trial not in found.trials]
        for name, trials, line in (
            ("beaten, unproven", rest, {}),
            ("front", found.trials, {"shape": "hv"}),
        ):
            points = cost_loss(run, run.table("bits"), trials)
            figure.add_scatter(
                x=points[:, 0],
                y=points[:, 1],
                error_y={"array": [trial.stderr for trial in trials]},
                name=name,
                mode="lines+markers" if line else "markers",
                line=line,
                text=[_told(run, trial) for trial in trials],
            )
    figure.update_xaxes(title="effective bits")
    figure.update_yaxes(title="KL, nats/token", type="log")
    return figure


def allocation_plot(run: Study) -> Any:
    """Levels by block and type: the incumbent, and every point of the front, to choose from."""
    from plotly import graph_objects

    chosen = selected(run)
    figure = graph_objects.Figure(layout={"title": "Effective bits of every layer"})
    for number, trial in enumerate(chosen.values()):
        grid = layer_grid(_entries(run, trial.allocation))
        cells = [[grid.blocks[block].get(kind) for kind in grid.kinds] for block in grid.blocks]
        figure.add_heatmap(
            x=list(grid.kinds),
            y=[f"block {block}" for block in grid.blocks],
            z=[[None if it is None else it["bits"] / it["weights"] for it in row] for row in cells],
            text=[["" if it is None else it["level"] for it in row] for row in cells],
            texttemplate="%{text}",
            colorscale="YlGnBu",
            visible=number == 0,
            zmin=1,
            zmax=9,
        )
    places = range(len(chosen))
    buttons = [
        {"label": label, "method": "update", "args": [{"visible": [i == n for i in places]}]}
        for n, label in enumerate(chosen)
    ]
    figure.update_layout(updatemenus=[{"buttons": buttons, "x": 0, "y": 1.15, "xanchor": "left"}])
    figure.update_yaxes(autorange="reversed")
    return figure


def loss_plot(run: Study) -> Any:
    """Loss on search windows over the tokens spent, strategy by strategy, and the best so far."""
    from plotly import graph_objects

    figure = graph_objects.Figure(layout={"title": "Loss over tokens, by who proposed"})
    trials: dict[str, list[tuple[int, Trial]]] = {}
    for trial, spent in zip(run.evaluations.trials, run.evaluations.spent_until, strict=True):
        if trial.fidelity.split == "search" and trial.fidelity.every == 1:
            trials.setdefault(trial.origin, []).append((spent, trial))
    for origin, rows in trials.items():
        figure.add_scatter(
            x=[spent for spent, _ in rows],
            y=[trial.loss for _, trial in rows],
            name=origin,
            mode="markers",
            text=[f"{trial.fidelity.tokens:,} tokens, {_told(run, trial)}" for _, trial in rows],
        )
    figure.update_xaxes(title="tokens spent")
    figure.update_yaxes(title="KL, nats/token", type="log")
    return figure


def selected(run: Study) -> dict[str, Trial]:
    """The incumbent and the points of the front, by what they are called."""
    chosen: dict[str, Trial] = {}
    search = [trial for trial in run.evaluations.trials if trial.fidelity.split == "search"]
    if search:
        most = max(trial.fidelity.tokens for trial in search)
        last = [trial for trial in search if trial.fidelity.tokens == most]
        chosen["incumbent"] = min(last, key=lambda trial: trial.loss)
    found = _front(run)
    for number, trial in enumerate(() if found is None else found.trials, 1):
        chosen[f"point {number}: {_told(run, trial)}"] = trial
    return chosen


def note(run: Study) -> str:
    """The run's facts in Markdown."""
    settings: Mapping[str, Any] = run.record["settings"]
    aim = settings.get("pareto") or " and ".join(settings.get("budgets", ()))
    found, spent = _front(run), run.evaluations.spent
    rows = {
        "Model": run.record["model"]["name"],
        "Search space": f"{run.space.name}, {len(run.space.layers)} layers",
        "Last search": f"{aim}, strategy {settings.get('strategy')}, seed {settings.get('seed')}",
        "Trials": f"{len(run.evaluations.trials):,}",
        "Tokens spent": f"{spent.total():,} ({', '.join(f'{k} {v:,}' for k, v in spent.items())})",
        "Run folder": str(run.path),
    }
    if found is not None:
        cost, loss = found.reference
        rows["Hypervolume"] = f"{found.hypervolume:.4g} to ({cost:.4g} bits, {loss:.4g} nats/token)"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        f"| | |\n|---|---|\n{table}\n\nLosses compare only among trials of one split and number of "
        "tokens (user attributes); the plots below keep them apart."
    )


def _front(run: Study) -> Front | None:
    try:
        return front_of(run)
    except StudyError:  # no search has come to its validation windows
        return None


def _told(run: Study, trial: Trial) -> str:
    bits = trial.costs[[table.name for table in run.costs].index("bits")]
    return f"{bits / run.space.weights:.3f} bits, {trial.origin}"


def _entries(run: Study, allocation: Allocation) -> list[Entry]:
    return [
        {
            "layer": layer.name,
            "level": str(level),
            "weights": layer.weights,
            "bits": layer.storage_bits(level),
        }
        for layer, level in zip(run.space.layers, allocation.levels, strict=True)
    ]
