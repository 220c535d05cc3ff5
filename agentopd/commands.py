"""What each command does, in terms of the layers below. Heavy imports happen inside, so that ``--help`` is quick."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.table import Column, Table

from agentopd.config import PRESETS, SUMMARIES, load_run_config, load_suite
from agentopd.console import before_after_table, eval_table, make_console, progress, retention_table
from agentopd.errors import InfraError, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from agentopd.evaluate import Script
    from agentopd.evaluation.metrics import EvalResult
    from agentopd.evaluation.retention import RetentionMatrix
    from agentopd.runs import Run
    from agentopd.sandboxing import BackendReport


@dataclass(frozen=True)
class ServeOptions:
    """What ``agentopd serve`` serves, and where."""

    model: str
    kind: str
    dtype: str
    host: str
    port: int
    top_k: int | None = None
    max_context: int | None = None
    kv_cache_gb: float | None = None


@dataclass(frozen=True)
class EvalOptions:
    """How ``agentopd eval`` samples and prints."""

    limit: int | None
    k: int
    temperature: float
    seed: int
    as_json: bool
    plain: bool


@dataclass(frozen=True)
class CompareOutput:
    """What ``agentopd compare`` prints, and whether it trains at all."""

    results_only: bool
    as_json: bool
    plain: bool


def train(path: Path, overrides: Sequence[str], allow_uncertified: Sequence[str], plain: bool) -> None:
    """``agentopd train``."""
    from agentopd.learner.runtime import waiting_for_ranks
    from agentopd.runs import Run

    config = load_run_config(path, overrides)
    with waiting_for_ranks():
        _train(Run.start(config, allow_uncertified), make_console(plain))


def resume(path: Path, plain: bool) -> None:
    """``agentopd resume``."""
    from agentopd.learner.runtime import waiting_for_ranks
    from agentopd.runs import Run

    console = make_console(plain)
    with waiting_for_ranks():
        run = Run.resume(path)
        if not run.restored:
            told = "no checkpoint yet: beginning again, with what was measured and stored before"
            console.print(told, soft_wrap=True)
        _train(run, console)


def _train(run: Run, console: Console) -> None:
    from agentopd.report import build_report
    from agentopd.tracking import full_disk
    from agentopd.train import train

    with full_disk(run.root):
        outcome = asyncio.run(train(run, console))
    if run.directory is None:
        return
    if outcome is None:
        console.print(f"stopped after step {run.step}, saved: agentopd resume {run.directory.path}", soft_wrap=True)
        return
    roles = {name: skill.config.role for name, skill in run.skills.items()}
    console.print(before_after_table(outcome.base, outcome.after, outcome.teacher, roles))
    with full_disk(run.root):
        console.print(f"report: {build_report(run.directory.path)}")


def evaluate(suite_path: Path, model: str | None, policy: str | None, options: EvalOptions) -> None:
    """``agentopd eval``."""
    from agentopd.evaluate import SCRIPTS

    if (model is None) == (policy is None):
        raise UserError("give either --model DIR or --policy gold|noop|starter")
    if policy is not None and policy not in SCRIPTS:
        raise UserError(f"unknown policy {policy!r}; policies: {', '.join(SCRIPTS)}")
    console = make_console(options.plain or options.as_json, stderr=options.as_json)
    result = asyncio.run(_evaluate(suite_path, model, policy, options, console))
    if options.as_json:
        print(json.dumps(result.to_json()))
    else:
        console.print(eval_table(result))


async def _evaluate(
    suite_path: Path, model: str | None, policy: Script | None, options: EvalOptions, console: Console
) -> EvalResult:
    from agentopd.build import Judge, build_policy, build_sandbox, load_skills
    from agentopd.config.run import EvalConfig, RolloutConfig, SandboxConfig
    from agentopd.evaluate import evaluate_model, evaluate_script, heldout_tasks, summarise
    from agentopd.rendering import HermesJSON

    skills = load_skills(load_suite(suite_path))
    student = build_policy(model, "auto", RolloutConfig()) if model is not None else None
    tasks = heldout_tasks(skills.values(), options.limit, options.seed)
    judge = Judge(skills.values(), build_sandbox(SandboxConfig(), skills.values()))
    try:
        await judge.start((name, found[0]) for name, found in tasks.items())
        with progress(console, "evaluating", sum(map(len, tasks.values())) * (options.k if student else 1)) as advance:
            if student is not None:
                config = EvalConfig(k=options.k, temperature=options.temperature, seed=options.seed)
                judged = await evaluate_model(student, skills, tasks, judge, config, advance)
                await student.engine.aclose()
            else:
                assert policy is not None  # checked by the caller
                judged = await evaluate_script(policy, skills, tasks, judge, HermesJSON(), advance)
    finally:
        await judge.sandbox.aclose()
    k = options.k if student else 1
    return summarise(judged, model or str(policy), k, seed=options.seed)


def retention(path: Path, out: Path | None, as_json: bool, plain: bool) -> None:
    """``agentopd retention RUN``."""
    from agentopd.report.collect import collect

    story = collect(path)
    matrix = story.retention()
    if matrix is None:
        raise UserError(f"run {str(path)!r} has no evaluation yet: let it run, or resume it")
    _show_retention(matrix, story.roles, out or path, as_json, plain)


def retention_of_models(
    models: Sequence[str], suite_path: Path, learned: Sequence[str], out: Path, options: EvalOptions
) -> None:
    """``agentopd retention --models``."""
    from agentopd.config.run import EvalConfig
    from agentopd.retention import learned_at, matrix_of, measure, stages_of

    suite = load_suite(suite_path)
    console = make_console(options.plain or options.as_json, stderr=options.as_json)
    config = EvalConfig(k=options.k, temperature=options.temperature, seed=options.seed)
    taught = learned_at(dict(_learned(text) for text in learned), models, suite)
    results = asyncio.run(measure(stages_of(models, suite), suite, options.limit, config, console))
    matrix = matrix_of(results, suite, taught)
    roles = {skill.name: skill.role for skill in suite.skills}
    _show_retention(matrix, roles, out, options.as_json, options.plain)


def _learned(text: str) -> tuple[str, int]:
    skill, _, index = text.partition("=")
    if not index.isdigit():
        raise UserError(f"--learned {text!r}: write SKILL=STAGE, where 0 is the first model")
    return skill, int(index)


def _show_retention(matrix: RetentionMatrix, roles: Mapping[str, str], out: Path, as_json: bool, plain: bool) -> None:
    """Print a matrix, leave it as JSON, CSV and a page, and exit with 1 where a declared tolerance is broken."""
    from agentopd.evaluation.export import write_retention_files
    from agentopd.report import write_retention_page

    files = [*write_retention_files(matrix, out), write_retention_page(matrix, out / "retention.html", roles)]
    if as_json:
        print(json.dumps(matrix.to_json()))
    else:
        console = make_console(plain)
        console.print(retention_table(matrix))
        console.print("written: " + ", ".join(map(str, files)), soft_wrap=True, markup=False)
        for skill in matrix.broken:
            change = matrix.by_skill[skill].change
            lost = -100 * change.mean if change else 0.0
            console.print(f"{skill} lost {lost:.1f} points; tolerated: {100 * (matrix.tolerated_drop or 0):g}")
    if matrix.broken:
        raise SystemExit(1)


def compare(path: Path, arms: str | None, seeds: int | None, jobs: int | None, out: CompareOutput) -> None:
    """``agentopd compare``."""
    from agentopd.compare import (
        comparison_table,
        everything,
        gather,
        left_out,
        make_plan,
        work,
        write_record,
        write_results,
    )

    plan = make_plan(path, arms.split(",") if arms else (), seeds)
    console = make_console(out.plain or out.as_json, stderr=out.as_json)

    def keep() -> None:
        write_record(plan, everything(plan))

    failures = [] if out.results_only else work(plan, console, jobs, after_each=keep)
    results = gather(plan)
    files = write_results(results, plan.out)
    if not out.results_only:
        keep()
    if out.as_json:
        print(results.model_dump_json())
    else:
        console.print(comparison_table(results))
        console.print("written: " + ", ".join(map(str, files)), soft_wrap=True, markup=False)
        if others := left_out(plan):
            console.print(
                f"{plan.record}: of another config, left out: {', '.join(others)}", soft_wrap=True, markup=False
            )
    if failures:
        raise InfraError(f"{len(failures)} of {results.planned} runs failed; {failures[0]}; logs: {plan.out / 'logs'}")


def report(path: Path) -> None:
    """``agentopd report``."""
    from agentopd.report import build_report

    print(build_report(path))


def verify(path: Path, as_json: bool, plain: bool) -> None:
    """``agentopd verify``."""
    from agentopd.reverify import Rejudged, rejudge

    if not path.exists():
        raise UserError(f"no episodes at {str(path)!r}: give a JSONL file, or a run's episodes folder")
    found: list[Rejudged] = asyncio.run(rejudge(path))
    changed = [item for item in found if item.differs]
    if as_json:
        print(json.dumps({"episodes": len(found), "changed": [item.episode_id for item in changed]}))
    else:
        console = make_console(plain)
        for item in changed:
            console.print(f"{item.episode_id}: stored {item.stored}, now {item.now}", markup=False)
        console.print(f"{len(found)} episodes judged again, {len(changed)} verdicts differ")
    if changed:
        raise SystemExit(1)


def presets_list(plain: bool) -> None:
    """``agentopd presets list``."""
    from agentopd.config.load import resolve_objective

    table = Table(Column("preset", no_wrap=True), "what it is", "needs", header_style="bold", pad_edge=False)
    for name in PRESETS:
        table.add_row(name, SUMMARIES[name], ", ".join(resolve_objective(name).inputs()))
    make_console(plain).print(table)


def presets_show(name: str) -> None:
    """``agentopd presets show``."""
    from agentopd.config import dump_toml
    from agentopd.config.load import resolve_objective
    from agentopd.config.presets import ORIGINS

    objective = resolve_objective(name)
    source, published, ours = ORIGINS[name]
    notes = {"needs": ", ".join(objective.inputs()), "source": source, "published": published, "ours": ours}
    print(f"# {SUMMARIES[name]}")
    for title, note in notes.items():
        print(f"# {title + ':':<11}{note}")
    print(dump_toml(objective), end="")


def micro_build(path: Path, overrides: Sequence[str], plain: bool) -> None:
    """``agentopd micro build``."""
    from agentopd.micro import build, load_recipe

    build(load_recipe(path, overrides), make_console(plain))


def sandbox_check(backends: Sequence[str], as_json: bool, plain: bool) -> None:
    """``agentopd sandbox check``."""
    from agentopd.sandboxing import ROWS, check_backends, present

    names = list(backends) or present()
    console = make_console(plain or as_json, stderr=as_json)
    with progress(console, "checking", len(names) * ROWS) as advance:
        reports = asyncio.run(check_backends(names, advance))
    if as_json:
        print(json.dumps({report.name: _sandbox_json(report) for report in reports}))
    else:
        console.print(_sandbox_matrix(reports))
        for report in reports:
            console.print(f"{report.name}: {_sandbox_summary(report)}", markup=False, soft_wrap=True)
    if any(report.failures or (report.absent and backends) for report in reports) or all(r.absent for r in reports):
        raise SystemExit(1)


def _sandbox_json(report: BackendReport) -> dict[str, object]:
    return {
        "capabilities": report.capabilities,
        "absent": report.absent,
        "findings": [vars(f) for f in report.findings],
    }


def _sandbox_matrix(reports: Sequence[BackendReport]) -> Table:
    here = [report for report in reports if not report.absent]
    table = Table("id", "program", "expected", *(report.name for report in here), header_style="bold", pad_edge=False)
    for row in zip(*(report.findings for report in here), strict=True):
        cells = [f"{found.status}" if found.ok else f"[bold red]FAILED[/] {found.status}" for found in row]
        table.add_row(row[0].id, row[0].title, row[0].expected, *cells)
    return table


def _sandbox_summary(report: BackendReport) -> str:
    if report.absent:
        return f"not here: {report.absent}"
    failed = "".join(f"\n  {found.id} {found.title}: {found.detail}" for found in report.failures)
    good = len(report.findings) - len(report.failures)
    return f"{good} of {len(report.findings)} as expected; in force: {', '.join(report.capabilities)}{failed}"


def sandbox_prune() -> None:
    """``agentopd sandbox prune``."""
    from agentopd.sandboxing import prune

    for name, gone in prune().items():
        print(f"{name}: {gone if isinstance(gone, str) else ', '.join(gone) or 'nothing to remove'}")


def serve(options: ServeOptions) -> None:
    """``agentopd serve``: until it is interrupted."""
    from agentopd.serving import serve_teacher
    from agentopd.teachers.vllm import Limits

    kinds: dict[str, Literal["hf", "vllm"]] = {"hf": "hf", "vllm": "vllm"}
    for name, value, known in (
        ("kind", options.kind, tuple(kinds)),
        ("dtype", options.dtype, ("auto", "bfloat16", "float32")),
    ):
        if value not in known:
            raise UserError(f"--{name} {value!r}: choose one of {', '.join(known)}")
    asked = {"--top-k": options.top_k, "--max-context": options.max_context, "--kv-cache-gb": options.kv_cache_gb}
    for flag, number in asked.items():
        if number is not None and options.kind != "vllm":
            raise UserError(f"{flag} {number:g} has no effect on --kind {options.kind}: drop it, or serve vllm")
        if number is not None and number <= 0:
            raise UserError(f"{flag} {number:g}: give more than 0")
    limits = Limits(options.top_k or 64, options.max_context, options.kv_cache_gb or 1.0)
    kind = kinds[options.kind]
    server = serve_teacher(options.model, kind, options.dtype, options.host, options.port, limits)
    print(f"serving {options.model} at {server.base_url}", flush=True)
    try:
        server.wait()
        if server.ended:
            raise InfraError(f"stopped, for a new process to take over: {server.ended}")
    except KeyboardInterrupt:
        print("stopping")
    finally:
        server.close()


def sandbox_image(source: str) -> None:
    """``agentopd sandbox image``."""
    from agentopd_sandboxes.docker import build_image

    print(build_image(source))


def doctor(path: Path, overrides: Sequence[str], plain: bool) -> None:
    """``agentopd doctor``."""
    from agentopd.doctor import diagnose

    console = make_console(plain)
    found = diagnose(load_run_config(path, overrides))
    for item in found:
        console.print(f"{item.level:4}  {item.check}: {item.detail}", markup=False, highlight=False, soft_wrap=True)
    if any(item.level == "fail" for item in found):
        raise SystemExit(2)
