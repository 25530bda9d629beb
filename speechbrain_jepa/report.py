"""The report of a pretraining run: report.html, one page in its output folder.

python -m speechbrain_jepa.report results/quickstart/1234

train.py writes it at the end of a run. The command writes it again, also of a run that is not
finished, from what is in the folder.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

from speechbrain.utils.logger import get_logger

from speechbrain_jepa.description import COMMAND_FILE
from speechbrain_jepa.evaluation.pictures import curve, draw_curves
from speechbrain_jepa.evaluation.quick_probe import ProbeTable
from speechbrain_jepa.evaluation.quickstart import draw_strategies, join, probe_run
from speechbrain_jepa.monitors import CollapseAlarm, MetricsTable
from speechbrain_jepa.pages import asset, escaped, picture, write_page

logger = get_logger(__name__)

MONITORS = ("embedding_rank", "embedding_deviation", "target_deviation")


def report_run(hparams: dict, pretrained: Path) -> Path | None:
    """The report at the end of a run, which is finished without it: an error is a warning, and what
    could not be made is left out.

    Arguments
    ---------
    hparams : dict
        Of the pretraining recipe. With `online_probe_csv`, its label sets are probed, unless the
        encoder was probed since it was exported.
    pretrained : Path
        The exported encoder.

    Returns
    -------
    Path or None
        The page, if it could be written.
    """
    output = Path(hparams["output_folder"])
    probe, labelled = output / "probe.csv", hparams.get("online_probe_csv")
    if not (output / "masks.png").exists():
        _tried("masks", draw_strategies, hparams, output / "masks.png")
    is_probed = probe.exists() and _time(probe) >= _time(pretrained / "config.json")
    if labelled is not None and not is_probed:
        _tried("probe", probe_run, hparams, pretrained, labelled)
    page = _tried("report", write_report, output)
    if page is not None:
        logger.info(f"Report: {page}")
    return page


def _tried(what: str, make: Callable[..., Any], *arguments) -> Any:
    """What `make` gives; if that fails, None and a warning: the encoder is exported already."""
    try:
        return make(*arguments)
    except Exception as error:
        logger.warning(f"No {what}: {type(error).__name__}: {error}. The run itself is complete")
        return None


def _time(path: Path) -> int:
    return path.stat().st_mtime_ns


def write_report(output_folder) -> Path:
    """Write report.html from what a run left.

    Arguments
    ---------
    output_folder : str or Path
        Of a pretraining run, finished or not: its metrics.csv, and as far as they are there
        pretrained/config.json (else encoder_config.json), masks.png, probe.csv, hyperparams.yaml
        and command.txt.

    Returns
    -------
    Path

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no metrics.csv, or no loss in it.
    """
    output = Path(output_folder)
    metrics = output / "metrics.csv"
    if not metrics.exists():
        raise FileNotFoundError(f"{metrics}: not there, so {output} is no pretraining run")
    rows = MetricsTable(metrics, ["step"]).read()
    config = _config(output)
    probe = _probe(output / "probe.csv")
    body = [
        f"<main><h1>{escaped(output.resolve().name)}</h1>",
        f'<p class="faint">Pretraining run in <code>{escaped(str(output))}</code></p>',
        _tiles(rows, config, probe),
        _collapse(rows),
        "<h2>Curves</h2>",
        picture(draw_curves(rows, output / "curves.png"), "loss, effective rank, rates by step"),
        "<p>Rank and deviations are of the validation clips, compared at the same patch: where "
        "they fall and stay low, the encoder forgets the sound. The loss does not show it.</p>",
        _masks(output / "masks.png"),
        _probe_section(probe),
        _online_probe(rows),
        _commands(output),
        _settings(output, config),
        "</main>",
    ]
    title = f"{output.resolve().name}: report"
    return write_page(output / "report.html", title, "\n".join(body), asset("report.css"))


def _config(output: Path) -> dict:
    for path in (output / "pretrained" / "config.json", output / "encoder_config.json"):
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
    return {}


def _probe(path: Path) -> ProbeTable | None:
    if not path.exists():
        return None
    return join([path])


def _tiles(rows: list[dict], config: dict, probe: ProbeTable | None) -> str:
    steps = int(rows[-1]["step"]) if rows else 0
    tiles = [("optimiser steps", f"{steps:,}")]
    batch = config.get("training", {}).get("global_batch")
    if batch:
        tiles.append(("clips seen", f"{steps * batch:,}"))
    speeds = curve(rows, "train_clips_per_second")[1]
    if len(speeds):
        tiles.append(("clips a second, median", f"{median(speeds):.1f}"))
    for name, label, form in (
        ("valid_loss", "validation loss", ".3f"),
        ("valid_embedding_rank", "effective rank", ".0f"),
    ):
        values = curve(rows, name)[1]
        if len(values):
            tiles.append((f"{label}, first → last", f"{values[0]:{form}} → {values[-1]:{form}}"))
    if probe is not None:
        average = probe.with_average["average"].groupby(level=0).mean()
        pair = f"{average['trained']:.1f} / {average['untrained']:.1f}"
        tiles.append(("probe, trained / untrained, %", pair))
    cells = (
        f'<div class="tile"><b>{escaped(value)}</b> <span>{escaped(label)}</span></div>'
        for label, value in tiles
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def _collapse(rows: list[dict]) -> str:
    """What the alarm of the run says of its last validation."""
    alarm, fallen = CollapseAlarm(), []
    for row in rows:
        values = {
            name: float(row[f"valid_{name}"]) for name in MONITORS if row.get(f"valid_{name}")
        }
        if values:
            fallen = alarm.check(values)
    if not fallen:
        return ""
    return f'<p class="warning">Collapse? At the end {escaped("; ".join(fallen))}.</p>'


def _masks(path: Path) -> str:
    if not path.exists():
        return ""
    return f"<h2>Masks</h2>{picture(path, 'context and target patches of one spectrogram')}"


def _probe_section(probe: ProbeTable | None) -> str:
    head = "<h2>Linear probe</h2>"
    if probe is None:
        return (
            f"{head}<p>No labelled set was given. With <code>--online_probe_csv labelled.csv</code>"
            " (file, split, label) the encoder is probed here beside untrained ones and log-mel "
            "statistics.</p>"
        )
    groups = probe.with_average.groupby(level=0, sort=False)
    mean, deviation, count = groups.mean(), groups.std(), groups.size()
    lines = []
    for features in mean.index:
        cells = (
            f"{m:.1f}" if d != d else f"{m:.1f} ± {d:.1f}"
            for m, d in zip(mean.loc[features], deviation.loc[features])
        )
        number = f' <span class="faint">({count[features]})</span>' if count[features] > 1 else ""
        kind = ' class="trained"' if features == "trained" else ""
        lines.append(f"<tr{kind}><td>{escaped(features)}{number}</td>{_right(cells)}</tr>")
    return (
        f"{head}<p>Test accuracy in % of a logistic regression on frozen features; in brackets the "
        "number of seeds.</p>"
        f"<table><tr><th></th>{_right(mean.columns, 'th')}</tr>{''.join(lines)}</table>"
        f"<p>{escaped(probe.verdict())}</p>"
    )


def _right(cells: Iterable[str], tag: str = "td") -> str:
    return "".join(f'<{tag} class="right">{escaped(str(cell))}</{tag}>' for cell in cells)


def _online_probe(rows: list[dict]) -> str:
    """First, best and last accuracy of each label set that was probed while training."""
    lines = []
    for name in rows[0] if rows else ():
        steps, values = curve(rows, name)
        if name.endswith("_accuracy") and len(values):
            best = int(values.argmax())
            cells = (
                f"{values[0]:.1f}",
                f"{values[best]:.1f}",
                f"{steps[best]:.0f}",
                f"{values[-1]:.1f}",
            )
            label = name.removeprefix("valid_").removesuffix("_accuracy")
            lines.append(f"<tr><td>{escaped(label)}</td>{_right(cells)}</tr>")
    if not lines:
        return ""
    head = _right(("at the start", "best", "at step", "at the end"), "th")
    return f"<h2>Online probe</h2><table><tr><th></th>{head}</tr>{''.join(lines)}</table>"


def _commands(output: Path) -> str:
    command = output / COMMAND_FILE
    parts = []
    if command.exists():
        text = command.read_text(encoding="utf-8", errors="surrogateescape").strip()
        parts.append(f'<h2>The command that repeats it</h2><pre id="command">{escaped(text)}</pre>')
    if (output / "pretrained").exists():
        encoder = escaped(str(output / "pretrained"))
        parts.append(
            "<h2>Look and listen</h2>"
            f"<pre>python -m speechbrain_jepa.embed {encoder} my_audio/ --out my_audio.npz\n"
            "python -m speechbrain_jepa.explore my_audio.npz --out page.html\n"
            "python -m speechbrain_jepa.similar query.wav my_audio.npz -k 10</pre>"
        )
    return "\n".join(parts)


def _settings(output: Path, config: dict) -> str:
    tables = []
    for section, values in config.items():
        if isinstance(values, dict) and values:
            cells = (
                f"<tr><td>{escaped(name)}</td><td>{escaped(value)}</td></tr>"
                for name, value in _flat(values)
            )
            head = f'<tr><th colspan="2">{escaped(section)}</th></tr>'
            tables.append(f"<table>{head}{''.join(cells)}</table>")
    text = f'<h2>Settings</h2><div class="settings">{"".join(tables)}</div>' if tables else ""
    recipe = output / "hyperparams.yaml"
    if recipe.exists():
        lines = escaped(recipe.read_text(encoding="utf-8", errors="surrogateescape"))
        text += f"<details><summary>the whole recipe</summary><pre>{lines}</pre></details>"
    return text


def _flat(values: dict, prefix: str = "") -> Iterable[tuple[str, str]]:
    """Names and values of nested settings, a line each."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", "none" if value is None else str(value)


def main(arguments=None) -> None:
    """The command line: `arguments` is a list of str, default the process' own."""
    parser = argparse.ArgumentParser(
        prog="python -m speechbrain_jepa.report",
        description="Write report.html of a pretraining run, finished or not.",
    )
    parser.add_argument("run", help="its output folder")
    options = parser.parse_args(arguments)
    try:
        print(write_report(options.run))
    except (OSError, ValueError) as error:
        raise SystemExit(f"report: {error}") from error


if __name__ == "__main__":
    main()
