"""The commands of ``parallax-core``: study, compare, info."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from parallax_core.distributed.peer_name import PeerName

UsageError = typer.BadParameter.__base__
Abort = typer.Abort


class InputError(Exception):
    """What the user can correct, as one line that begins with the argument at fault."""


class Engine(StrEnum):
    """Where the points of a study are evaluated."""

    ray = "ray"
    local = "local"


class Device(StrEnum):
    """What a study of speed measures."""

    auto = "auto"
    gpu = "gpu"
    cpu = "cpu"


_EngineOption = Annotated[
    Engine,
    typer.Option(
        help="ray: actors, on the cluster RAY_ADDRESS names or on a local Ray it starts; local: here."
    ),
]
_OutputOption = Annotated[
    Path, typer.Option(metavar="DIR", help="Folder of the report; its files are replaced, others kept.")
]
_SeedOption = Annotated[
    int | None,
    typer.Option(min=0, metavar="S", help="Seed of the study, instead of the configuration's."),
]
_ConfigOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="YAML grid; a report's config.yaml runs that study again."),
]


app = typer.Typer(
    help="Attention as regression at test time: softmax, local linear (LLA) and Parallax attention.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
study_app = typer.Typer(help="Run a study and write its report.", no_args_is_help=True)
app.add_typer(study_app, name="study")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"parallax-core {importlib.metadata.version('parallax-core')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")
    ] = False,
) -> None: ...


@study_app.command("regression")
def study_regression(
    output: _OutputOption = Path("study-report"),
    engine: _EngineOption = Engine.ray,
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Ray actors, one CPU each.  [default: every CPU]")
    ] = None,
    seed: _SeedOption = None,
    config: _ConfigOption = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Safetensors file with tensors NAME.q, NAME.k, NAME.v of shape (B, L, H, D).  "
            "[default: the sample that ships]",
        ),
    ] = None,
) -> None:
    """Measure softmax, LLA, Parallax, global ridge and linear attention as regression estimators.

    Four experiments: error against the number of keys; squared bias and variance against the bandwidth; the
    exponent with which bias vanishes, beside the theory; leave-one-out prediction of the values of real
    attention heads. The folder receives report.html, summary.md, rows.parquet and config.yaml.

    Examples:

    - everything, on all CPUs: `parallax-core study regression --output report`

    - without Ray: `parallax-core study regression --engine local`

    - your own attention heads: `parallax-core study regression --data heads.safetensors`
    """
    _check_engine(engine, workers)
    from parallax_core.distributed.config import load_config
    from parallax_core.distributed.findings import find
    from parallax_core.distributed.grid import points
    from parallax_core.distributed.report import write_report
    from parallax_core.distributed.study import run_regression

    settings = _read_config(load_config, config, seed=seed)
    if data is not None and settings.real is None:
        raise InputError(f"--data: the configuration has no part 'real' that would read {data}")
    sample = _read_data("--data", data) if settings.real else None
    try:
        points(settings, sample)
    except ValueError as error:
        raise InputError(f"--config: real.{error}") from error

    def run(progress):
        return run_regression(settings, sample, engine=engine.value, workers=workers, progress=progress)

    def report(study, folder, provenance):
        findings = find(settings, study.rows)
        write_report(study, findings, folder, provenance)
        return findings

    actors = f"{workers} workers" if workers else "a worker on every CPU"
    _print_findings(_study("regression study", output, engine, actors, run, report))
    _print_page(output)


@study_app.command("decode")
def study_decode(
    output: _OutputOption = Path("decode-report"),
    engine: _EngineOption = Engine.local,
    workers: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Ray actors, a GPU or a whole node each.  [default: all]"),
    ] = None,
    device: Annotated[
        Device,
        typer.Option(help="What is measured. auto: a GPU where this machine has one."),
    ] = Device.auto,
    seed: _SeedOption = None,
    config: _ConfigOption = None,
    fa3: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="vLLM's FlashAttention-3 library, _vllm_fa3_C.abi3.so."),
    ] = None,
    peer: Annotated[
        list[PeerName] | None,
        typer.Option(
            help="A library to time beside; again for another.  [default: as the configuration says]"
        ),
    ] = None,
    host_cost: Annotated[
        bool | None,
        typer.Option(
            "--host-cost/--no-host-cost",
            help="Also time, on a GPU, the call in Python to its launch.  "
            "[default: as the configuration says]",
        ),
    ] = None,
) -> None:
    """Time decoding against key-value caches, beside the attention libraries that are installed.

    For each operation, size, dtype, page size and kind of cache: microseconds a call, bytes per second as a
    fraction of a plain read, the error against float64, and the same for the peers, in turns in one run. On a
    GPU: FlashAttention-2 of PyTorch, FlashAttention-3 of vLLM (--fa3), Parallax of fla-core. On the CPU: SDPA
    of PyTorch. The folder receives report.html, summary.md, rows.parquet and config.yaml.

    Examples:

    - this machine: `parallax-core study decode --output report`

    - with FlashAttention-3: `parallax-core study decode --fa3 vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so`

    - beside two libraries alone: `parallax-core study decode --peer fa2 --peer fla`

    - the GPUs of a cluster: `parallax-core study decode --engine ray --device gpu`
    """
    _check_engine(engine, workers)
    where = _device(device, engine)
    if host_cost and where == "cpu":
        raise InputError("--host-cost: expected with a GPU, whose launches return before the work is done")
    if fa3 is not None:
        if where == "cpu":
            raise InputError(f"--fa3: expected with a GPU, got {fa3} with the CPU")
        if engine is Engine.local and not fa3.expanduser().is_file():
            raise InputError(f"--fa3: no file {fa3}")
    from parallax_core.distributed.decode_config import decode_points, load_decode_config
    from parallax_core.distributed.decode_findings import find_decode
    from parallax_core.distributed.decode_report import write_decode_report
    from parallax_core.distributed.study import run_decode

    library = None if fa3 is None else str(fa3.expanduser().absolute())
    settings = _read_config(
        load_decode_config, config, seed=seed, fa3=library, host_cost=host_cost, peers=peer or None
    )
    with _input("--config", ValueError):
        decode_points(settings, where)

    def run(progress):
        return run_decode(settings, where, engine=engine.value, workers=workers, progress=progress)

    def report(study, folder, provenance):
        findings = find_decode(study.rows)
        write_decode_report(study, findings, folder, provenance)
        return findings

    actors = f"{workers or 'all'} {'GPUs' if where == 'gpu' else 'nodes'}"
    _print_decode_findings(_study("decode study", output, engine, actors, run, report))
    _print_page(output)


@app.command()
def compare(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]", help="Safetensors file with NAME.q, NAME.k, NAME.v.  [default: the sample]"
        ),
    ] = None,
    layer: Annotated[
        str | None, typer.Option(metavar="NAME", help="One layer of the file.  [default: every layer]")
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(metavar="0,3,...", help="Numbers of the key heads.  [default: four, evenly spaced]"),
    ] = None,
    ridge: Annotated[
        float, typer.Option(min=0, help="Ridge of LLA and of global ridge, in squared key units.")
    ] = 0.1,
    causal: Annotated[
        bool | None,
        typer.Option(
            "--causal/--bidirectional", help="Mask of the outputs compared.  [default: as the file says]"
        ),
    ] = None,
    fit: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="RIDGE",
            help="Also fit a probe linear in the query to LLA's output, with this ridge.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the comparison as a figure: .svg, .pdf or .png."),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the numbers as JSON."),
    ] = None,
) -> None:
    """Put estimators side by side on the queries, keys and values of a file.

    For each layer: the error with which each estimator predicts every value from the other keys and values,
    as a fraction of the values' variance (leave one out, bidirectional); how far the estimators' outputs are
    from each other, as a fraction of the larger norm; over the rows, the effective number of neighbours, and
    the effective rank and condition of the covariance of the keys; with --fit, how far the fitted probe is
    from the solved one.

    Example: `parallax-core compare heads.safetensors --heads 0,3 --plot compare.svg --json compare.json`
    """
    from parallax_core.compare import compare as compare_arrays

    sample = _read_data("FILE", file)
    chosen_heads = sample.spread(4) if heads is None else _head_numbers(heads)
    if layer is not None and layer not in sample.layers:
        raise InputError(f"--layer: expected one of {', '.join(sample.layers)}, got {layer!r}")
    layers = list(sample.layers) if layer is None else [layer]
    if causal is None:
        causal = sample.metadata.get("causal", "true").lower() != "false"
    if plot is not None:
        _check_plot(plot)
    if json_file is not None:
        _check_folder("--json", json_file)
    results = {}
    with _progress("comparing") as progress:
        for done, name in enumerate(layers, 1):
            selected = _select(sample, name, chosen_heads)
            fitted = {} if fit is None else {"x": selected.q, "probe_ridge": fit}
            try:
                results[name] = compare_arrays(*selected[:3], ridge=ridge, causal=causal, **fitted)
            except ValueError as error:  # which begins with the name of the argument
                raise InputError(f"{name}: {error}") from error
            progress(done, len(layers))
    for name, result in results.items():
        _print_comparison(f"{name}, heads {', '.join(map(str, chosen_heads))}", result)
    if plot is not None:
        from parallax_core.comparison_figure import save_comparison

        save_comparison(results, plot.expanduser())
        print(f"Figure: {plot.expanduser().absolute()}")
    if json_file is not None:
        summary = {
            "source": sample.source,
            "heads": list(chosen_heads),
            "ridge": ridge,
            "causal": causal,
            "probe_ridge": fit,
            "layers": {name: result.to_dict() for name, result in results.items()},
        }
        with _input("--json", OSError):
            json_file.expanduser().write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
        print(f"JSON: {json_file.expanduser().absolute()}")


@app.command()
def info() -> None:
    """Show which backends and packages are found, and how to get those that are missing."""
    from parallax_core import __version__, cuda_kernels
    from parallax_core.cpu import threads

    table = Table(box=box.SIMPLE_HEAD, title=f"parallax-core {__version__}", title_justify="left")
    for heading in ("", "found", "what it is for, or why it is missing"):
        table.add_column(heading, overflow="fold")
    python = f"Python {sys.version.split()[0]}"
    numba = importlib.metadata.version("numba")
    table.add_row(
        "CPU", "yes", f"{python}, Numba {numba}, {threads.get_num_threads()} threads; float64 to bfloat16"
    )
    reason = cuda_kernels.availability()
    table.add_row("CUDA", "no" if reason else "yes", escape(reason or "NVIDIA GPUs"))
    for package, extra, purpose in (
        ("ray", "ray", "studies on many processes or machines"),
        ("matplotlib", "cli", "reports and figures"),
        ("torch", "torch", "differentiable attention on PyTorch tensors"),
        ("jax", "jax", "differentiable attention on JAX arrays"),
    ):
        found = importlib.util.find_spec(package) is not None
        version = importlib.metadata.version(package) if found else "no"
        how = "" if found else f": pip install 'parallax-core[{extra}]'"
        table.add_row(package, version, escape(purpose + how))
    Console().print(table)


@contextmanager
def _input(argument: str, *errors: type[Exception]) -> Iterator[None]:
    """Name the argument that an exception of these types comes from."""
    try:
        yield
    except errors as error:
        raise InputError(f"{argument}: {error}") from error


def _check_engine(engine: Engine, workers: int | None) -> None:
    if workers is not None and engine is Engine.local:
        raise InputError(f"--workers: expected with --engine ray only, got {workers} with --engine local")
    if engine is Engine.ray and importlib.util.find_spec("ray") is None:
        raise InputError(
            "--engine: Ray is not installed: pip install 'parallax-core[ray]', or choose --engine local"
        )


def _device(device: Device, engine: Engine) -> str:
    """``gpu`` or ``cpu``; a GPU that is asked for by name may be a cluster's alone."""
    if device is Device.cpu or (device is Device.gpu and engine is Engine.ray):
        return device.value
    from parallax_core import cuda_kernels

    reason = cuda_kernels.availability()
    if reason is not None and device is Device.gpu:
        raise InputError(f"--device: {reason}")
    return "cpu" if reason is not None else "gpu"


def _read_config(load: Callable, path: Path | None, **instead: object):
    """A configuration, with the values that options give instead of its own; None gives none."""
    with _input(f"--config {path}" if path else "--config", ValueError, OSError):
        settings = load(path)
    return settings.model_copy(update={name: value for name, value in instead.items() if value is not None})


def _study(title: str, output: Path, engine: Engine, actors: str, run: Callable, report: Callable):
    """Run a study and write its folder, all of it or nothing.

    run: from what takes progress to the study. report: from the study, the folder and the provenance to the
    findings, which are returned.
    """
    from parallax_core.distributed.output import output_folder
    from parallax_core.distributed.report_files import Provenance

    with ExitStack() as stack:
        with _input("--output", OSError):
            folder = stack.enter_context(output_folder(output))
        began = time.perf_counter()
        with _progress(title) as progress:
            try:
                study = run(progress)
            except ValueError as error:  # which begins with the name of the argument
                raise InputError(f"--{error}") from error
        seconds = time.perf_counter() - began
        where = "this process" if engine is Engine.local else f"Ray, {actors}"
        command = shlex.join(["parallax-core", *sys.argv[1:]])
        return report(study, folder, Provenance(command, where, seconds))


def _print_page(output: Path) -> None:
    from parallax_core.distributed.report_files import PAGE

    print(f"Report: {output.expanduser().absolute() / PAGE}")


def _read_data(argument: str, path: Path | None):
    from parallax_core import data

    with _input(argument, ValueError, OSError):
        return data.load_sample() if path is None else data.load(path)


def _head_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--heads: expected numbers separated by commas, got {text!r}") from error


def _select(sample, layer: str, heads: tuple[int, ...]):
    try:
        return sample.select(layer, heads)
    except ValueError as error:  # which begins with the name of the argument
        raise InputError(f"--{error}") from error


def _check_plot(path: Path) -> None:
    if path.suffix not in (".svg", ".pdf", ".png"):
        raise InputError(f"--plot: expected a name ending in .svg, .pdf or .png, got {path}")
    _check_folder("--plot", path)


def _check_folder(argument: str, path: Path) -> None:
    if not path.expanduser().absolute().parent.is_dir():
        raise InputError(f"{argument}: expected an existing folder, got {path.parent}")


@contextmanager
def _progress(title: str) -> Iterator[Callable[..., None]]:
    """A bar on a terminal; in a log, a line each tenth of the way."""
    console = Console(stderr=True)
    if not console.is_terminal:
        tenths = 0

        def log(done: int, total: int, *_: object) -> None:
            nonlocal tenths
            if 10 * done // total > tenths:
                tenths = 10 * done // total
                print(f"{title}: {done} of {total}", file=sys.stderr, flush=True)

        yield log
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TextColumn("[dim]{task.fields[last]}"), console=console) as bar:
        task = bar.add_task(title, total=None, last="starting")

        def advance(done: int, total: int, point: object = None) -> None:
            last = point.brief if point is not None else ""
            bar.update(task, completed=done, total=total, last=last)

        yield advance


def _print_findings(findings) -> None:
    console = Console()
    if findings.exponents:
        table = Table("bias falls as h^p", "p", "95 % interval", "theory", box=box.SIMPLE_HEAD)
        for curve in findings.exponents:
            p = curve.exponent
            table.add_row(
                f"{curve.estimator}, {curve.where}",
                f"{p.estimate:.3f}",
                f"{p.low:.3f} to {p.high:.3f}",
                f"{curve.theory}",
            )
        console.print(table)
    if findings.real:
        layers = list(dict.fromkeys(result.layer for result in findings.real))
        table = Table("leave-one-out error / variance", *layers, box=box.SIMPLE_HEAD)
        for estimator in dict.fromkeys(result.estimator for result in findings.real):
            errors = {r.layer: r.error.estimate for r in findings.real if r.estimator == estimator}
            table.add_row(estimator, *(f"{errors[layer]:.3f}" for layer in layers))
        console.print(table)


def _print_decode_findings(findings) -> None:
    from parallax_core.distributed.decode_figures import OPERATION, sizes
    from parallax_core.distributed.decode_findings import peer_of
    from parallax_core.distributed.decode_report import error, microseconds, ratio

    console = Console()
    names = [peer.name for peer in findings.peers]
    headings = "B×H×L×D", "cache", "µs", "read", "error", *names, "ratio"
    for (operation, dtype), places in findings.groups.items():
        table = Table(
            title=f"{OPERATION[operation]}, {dtype}",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            collapse_padding=True,
            pad_edge=False,
        )
        for heading in headings:
            table.add_column(heading, justify="left" if heading in headings[:2] else "right", no_wrap=True)
        for place in places:
            row = findings.rows[place]
            peers = (peer_of(row, name) for name in names)
            table.add_row(
                sizes(row),
                row["cache"],
                microseconds(row["us"]),
                ratio(row["fraction"]),
                error(row["error"]),
                *(microseconds(None if peer is None else peer["us"]) for peer in peers),
                ratio(findings.ratios[place]["softmax"]),
            )
        console.print(table)
    console.print("µs: medians; read: bytes/s over those of a plain read; ratio: fastest softmax peer / ours")
    means = Table("fastest peer's time / ours", "mean", "least", "ours faster", box=box.SIMPLE_HEAD)
    for result in findings.comparisons:
        means.add_row(
            f"{OPERATION[result.operation]} {result.dtype}, {result.cache}: {', '.join(result.peers)}",
            ratio(result.ratio),
            ratio(result.least),
            f"{result.won} of {result.rows}",
        )
    if findings.comparisons:
        console.print(means)
    if findings.own.host_us is not None:
        costs = {"ours": findings.own.host_us} | {peer.name: peer.host_us for peer in findings.peers}
        listed = ", ".join(f"{name} {microseconds(us)}" for name, us in costs.items())
        console.print(f"µs from a call in Python to its launch: {listed}")
    for peer in findings.peers:
        if peer.absent:
            console.print(escape(f"{peer.name}: no numbers in some rows: {'; '.join(peer.absent)}"))


_ROW_MEASURES = {
    "effective_neighbours": "effective neighbours",
    "effective_rank": "effective rank of C_kk",
    "condition": "condition of C_kk",
    "ridge_condition": "condition of C_kk + ridge I",
}


def _print_comparison(title: str, result) -> None:
    from parallax_core.compare import QUANTILES

    console = Console()
    console.print(f"\n[bold]{title}[/bold]")
    errors = Table("leave-one-out error / variance", "", "", box=box.SIMPLE_HEAD)
    for name, error in zip(result.estimators, result.leave_one_out):
        measured = error == error
        bar = "█" * round(30 * min(error, 1.0)) + (" →" if error > 1 else "") if measured else ""
        errors.add_row(name, f"{error:.3f}" if measured else "-", bar)
    console.print(errors)
    # Numbers head the columns: the names of six of them would not fit on a line.
    numbers = range(1, len(result.estimators) + 1)
    differences = Table("difference of outputs / norm", *map(str, numbers), box=box.SIMPLE_HEAD)
    for i, name in enumerate(result.estimators):
        row = ("" if i == j else f"{value:.3f}" for j, value in enumerate(result.difference[i]))
        differences.add_row(f"{i + 1} {name}", *row)
    console.print(differences)
    spread = Table("over the rows", *(f"{at:.0%}" for at in QUANTILES), box=box.SIMPLE_HEAD)
    for name, words in _ROW_MEASURES.items():
        spread.add_row(words, *(f"{value:.4g}".replace("inf", "∞") for value in result.quantiles(name)))
    console.print(spread)
    if result.probe_distance:
        probes = Table("distance from the solved probe / its norm", "in C_kk", "plain", box=box.SIMPLE_HEAD)
        for name, far in result.probe_distance.items():
            probes.add_row(name, f"{far.in_C_kk:.3f}", f"{far.euclidean:.3f}")
        console.print(probes)
    if result.fit is not None:
        scores = ", ".join(f"{score:.3f}" for score in result.fit.score)
        console.print(f"Part of softmax's distance to LLA that the fit removes where held out: {scores}")
