"""The command line: arguments in, three lines of calls out.

Exit codes: 0 done, 1 the run failed, 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from agentopd.errors import AgentOPDError, UserError
from agentopd.memory import keep_freed_memory

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Teach a small agent new skills without making it forget: verifier-calibrated on-policy distillation.",
)
envs_app = typer.Typer(no_args_is_help=True, help="See, make, prove and play environments.")
presets_app = typer.Typer(no_args_is_help=True, help="See what each named objective composes.")
micro_app = typer.Typer(no_args_is_help=True, help="The micro world that ships with AgentOPD.")
app.add_typer(envs_app, name="envs")
app.add_typer(presets_app, name="presets")
app.add_typer(micro_app, name="micro")
sandbox_app = typer.Typer(no_args_is_help=True, help="Check the sandboxes of this machine, and clean up after them.")
app.add_typer(sandbox_app, name="sandbox")

INTERRUPTED = 130

Plain = Annotated[bool, typer.Option("--plain", help="No colour, no redrawing: for logs.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Source = Annotated[Optional[str], typer.Option("--source", help="A task source; default: the first.")]  # noqa: UP045
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads the annotation at run time
    typer.Option("--set", metavar="KEY=VALUE", help="Override a config key, as in --set learner.lr=1e-4."),
]


@app.callback()
def root(
    local_rank: Annotated[Optional[int], typer.Option("--local_rank", hidden=True)] = None,  # noqa: UP045
) -> None:
    """Take what DeepSpeed's launcher writes before the arguments of whatever it starts; it sets LOCAL_RANK too."""
    if local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))


@app.command()
def train(
    config: Path,
    overrides: Overrides = None,
    allow_uncertified: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--allow-uncertified", metavar="NAME", help="Train on this skill without a certificate."),
    ] = None,
    plain: Plain = False,
) -> None:
    """Train on a suite of tasks: one TOML file, one run directory, a table and report.html at the end."""
    from agentopd import commands

    commands.train(config, overrides or [], allow_uncertified or [], plain)


@app.command()
def resume(run: Path, plain: Plain = False) -> None:
    """Continue a run exactly where it stopped."""
    from agentopd import commands

    commands.resume(run, plain)


@app.command("eval")
def evaluate(
    suite: Annotated[Path, typer.Option("--suite", help="A suite file.")],
    model: Annotated[Optional[str], typer.Option("--model", help="A directory, hub id or shipped model.")] = None,  # noqa: UP045
    policy: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--policy", help="Instead of a model: gold, noop or starter."),
    ] = None,
    limit: Annotated[Optional[int], typer.Option("--limit", min=1, help="Tasks per skill. Default: all.")] = None,  # noqa: UP045
    k: Annotated[int, typer.Option("--k", min=1, help="Attempts per task.")] = 1,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed")] = 1234,
    as_json: Json = False,
    plain: Plain = False,
) -> None:
    """Measure a model, or a fixed script, on a suite: avg@k and pass@k with 95 % intervals."""
    from agentopd import commands

    commands.evaluate(suite, model, policy, commands.EvalOptions(limit, k, temperature, seed, as_json, plain))


@app.command()
def retention(
    run: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="A run directory; with --models, further models."),
    ] = None,
    models: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--models", help="Instead of a run: models in order, the start first, as in --models A B C."),
    ] = None,
    suite: Annotated[Optional[Path], typer.Option("--suite", help="With --models: a suite file.")] = None,  # noqa: UP045
    learned: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--learned", metavar="SKILL=STAGE", help="With --models: which stage taught a skill; 0 is A."),
    ] = None,
    out: Annotated[Optional[Path], typer.Option("--out", help="Folder for JSON, CSV and page.")] = None,  # noqa: UP045
    limit: Annotated[Optional[int], typer.Option("--limit", min=1, help="With --models: tasks per skill.")] = None,  # noqa: UP045
    k: Annotated[int, typer.Option("--k", min=1, help="With --models: attempts per task.")] = 1,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="With --models; 0 is greedy.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="With --models.")] = 1234,
    as_json: Json = False,
    plain: Plain = False,
) -> None:
    """The stage x skill matrix of a run or of models; exit code 1 where the suite's tolerated drop is exceeded."""
    from agentopd import commands

    names = run or []
    if not models and (len(names) != 1 or suite or learned or limit):
        raise UserError("give one run directory, or --models A B C --suite FILE")
    if not models:
        commands.retention(Path(names[0]), out, as_json, plain)
    elif suite is None:
        raise UserError("--models needs the suite to measure them on: --suite FILE")
    else:
        options = commands.EvalOptions(limit, k, temperature, seed, as_json, plain)
        commands.retention_of_models([*models, *names], suite, learned or [], out or Path("runs/retention"), options)


@app.command()
def compare(
    config: Path,
    arms: Annotated[Optional[str], typer.Option("--arms", help="Only these, comma-separated.")] = None,  # noqa: UP045
    seeds: Annotated[Optional[int], typer.Option("--seeds", min=1, help="Only the first so many seeds.")] = None,  # noqa: UP045
    jobs: Annotated[Optional[int], typer.Option("--jobs", min=1, help="Runs at once.")] = None,  # noqa: UP045
    results_only: Annotated[bool, typer.Option("--results", help="Train nothing; tabulate what is there.")] = False,
    as_json: Json = False,
    plain: Plain = False,
) -> None:
    """Arms x seeds on one task stream, with paired tests; start it again to continue where it stopped."""
    from agentopd import commands

    commands.compare(config, arms, seeds, jobs, commands.CompareOutput(results_only, as_json, plain))


@app.command()
def report(run: Path) -> None:
    """Rebuild a run's report.html, also of an interrupted run."""
    from agentopd import commands

    commands.report(run)


@app.command()
def verify(episodes: Path, as_json: Json = False, plain: Plain = False) -> None:
    """Judge stored episodes again, without a model; exit code 1 if a verdict differs."""
    from agentopd import commands

    commands.verify(episodes, as_json, plain)


@app.command()
def doctor(config: Path, overrides: Overrides = None, plain: Plain = False) -> None:
    """Check what a run needs before it starts, one line each; exit code 2 if it cannot succeed."""
    from agentopd import commands

    commands.doctor(config, overrides or [], plain)


@envs_app.command("list")
def envs_list(plain: Plain = False) -> None:
    """Every installed environment: where it comes from, its sources, and whether it is certified."""
    from agentopd import env_commands

    env_commands.envs_list(plain)


@envs_app.command("describe")
def envs_describe(name: str, source: Source = None) -> None:
    """One environment: sources, tools, limits, certificate, and an example task."""
    from agentopd import env_commands

    env_commands.envs_describe(name, source)


@envs_app.command("new")
def envs_new(name: str, into: Annotated[Path, typer.Option("--into", help="Parent folder.")] = Path()) -> None:
    """A package of your own: an environment, right and wrong solutions, a test and a suite."""
    from agentopd import env_commands

    env_commands.envs_new(name, into)


@envs_app.command("validate")
def envs_validate(
    name: Annotated[Optional[str], typer.Argument(help="A registered name, or file.py:Class.")] = None,  # noqa: UP045
    every: Annotated[bool, typer.Option("--all", help="Every installed environment and source.")] = False,
    source: Source = None,
    suite: Annotated[Optional[Path], typer.Option("--suite", help="As this suite or run file uses them.")] = None,  # noqa: UP045
    into: Annotated[Optional[Path], typer.Option("--into", help="Keep certificates here, not in the cache.")] = None,  # noqa: UP045
    as_json: Json = False,
    plain: Plain = False,
) -> None:
    """Prove, without a model, that an environment can be trained on; exit code 1 if it cannot."""
    from agentopd import env_commands

    env_commands.envs_validate(env_commands.What(name, every, source, suite), into, as_json, plain)


@envs_app.command("play")
def envs_play(
    name: str,
    source: Source = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    plain: Plain = False,
) -> None:
    """Act by hand: type calls as in change(by=3), or an answer; the verdict comes at the end."""
    from agentopd import env_commands

    env_commands.envs_play(name, source, seed, plain)


@presets_app.command("list")
def presets_list(plain: Plain = False) -> None:
    """Every preset, one line each."""
    from agentopd import commands

    commands.presets_list(plain)


@presets_app.command("show")
def presets_show(name: str) -> None:
    """The blocks a preset composes, fully resolved."""
    from agentopd import commands

    commands.presets_show(name)


@micro_app.command("build")
def micro_build(config: Path, overrides: Overrides = None, plain: Plain = False) -> None:
    """Train tokenizer, student and teacher from nothing, by a recipe; resumes where it stopped."""
    from agentopd import commands

    commands.micro_build(config, overrides or [], plain)


@sandbox_app.command("check")
def sandbox_check(
    backends: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--backend", help="Only this one; may be repeated. Default: every one that is here."),
    ] = None,
    as_json: Json = False,
    plain: Plain = False,
) -> None:
    """Run the suite of hostile and honest programs on every backend; exit code 1 if one does not hold."""
    from agentopd import commands

    commands.sandbox_check(backends or [], as_json, plain)


@app.command()
def serve(
    model: str,
    kind: Annotated[str, typer.Option("--kind", help="hf, or vllm where it is installed.")] = "hf",
    dtype: Annotated[str, typer.Option("--dtype", help="auto, bfloat16 or float32.")] = "auto",
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0 takes a free one.")] = 8100,
    top_k: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--top-k", help="vllm: most ids a token. Default: 64."),
    ] = None,
    max_context: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--max-context", help="vllm: tokens of an episode. Default: the most that the model takes."),
    ] = None,
    kv_cache_gb: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--kv-cache-gb", help="vllm: memory for keys and values. Default: 1."),
    ] = None,
) -> None:
    """Serve a teacher to runs on other machines, for `kind = "served"`. Keep it on a private network."""
    from agentopd import commands

    commands.serve(commands.ServeOptions(model, kind, dtype, host, port, top_k, max_context, kv_cache_gb))


@sandbox_app.command("prune")
def sandbox_prune() -> None:
    """Remove what runs that were killed left behind."""
    from agentopd import commands

    commands.sandbox_prune()


@sandbox_app.command("image")
def sandbox_image(
    source: Annotated[str, typer.Option("--source", help="auto, registry or local.")] = "auto",
) -> None:
    """Build the Docker image, from a registry's Python or from this machine's own."""
    from agentopd import commands

    commands.sandbox_image(source)


def main() -> None:
    """Entry point: run a command, and turn errors into one line and an exit code."""
    keep_freed_memory()
    try:
        code = app(standalone_mode=False)
    except AgentOPDError as error:
        from agentopd.console import make_console, print_error

        print_error(make_console(stderr=True), error)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except typer.Abort:
        sys.exit(1)
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "format_message"):  # click's usage errors
            print(f"error: {error.format_message()}", file=sys.stderr)
            sys.exit(2)
        raise
    if code:  # typer returns what a command exited with: 130 after Ctrl-C
        if code == INTERRUPTED:
            print("interrupted", file=sys.stderr)
        sys.exit(code)


if __name__ == "__main__":
    main()
