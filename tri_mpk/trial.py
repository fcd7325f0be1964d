"""The trial of `verify`: what `tri-mpk verify --self-check` counts and times."""

from __future__ import annotations

import time
from collections import defaultdict

from tqdm.auto import tqdm

from tri_mpk.scheduler import schedule, verify
from tri_mpk.scheduler.examples import NUM_WORKERS, large_graphs
from tri_mpk.scheduler.garbage import without_garbage_collection
from tri_mpk.scheduler.self_check import Tally, self_check

ALL = "all"
# beside the kinds of damage, a row each: what to call it, what fraction of the cases, and options of `self_check`
EXTRA = (
    ("pools", 16, {"dynamic": True}),
    ("values", 4, {"values": True}),
    ("values, one at a time", 4, {"values": True, "apart": True}),
)


def run_trial(num_cases: int, seed: int, num_tasks: int, progress: bool) -> dict[str, object]:
    """Judge random schedules and time large ones. `kinds`: counts per kind of damage, their sum last."""
    started = time.perf_counter()
    tallies: dict[str, Tally] = defaultdict(Tally)
    disagreements = []
    for judgement in tqdm(self_check(num_cases, seed), "cases", num_cases, leave=False, disable=not progress):
        for kind in (judgement.case.mutation, ALL):
            tallies[kind].add(judgement)
        if not judgement.agree:
            disagreements.append(f"seed {seed}, {judgement}")
    extra = [(what, _judge_all(num_cases // part, seed, options, progress)) for what, part, options in EXTRA]
    seconds = time.perf_counter() - started
    total = tallies.pop(ALL)
    rows = [_row(kind, tally) for kind, tally in tallies.items()] + [_row(ALL, total)] * bool(num_cases)
    rows += [_row(what, tally) for what, (tally, _) in extra if tally.cases]
    disagreements += [text for _, (_, texts) in extra for text in texts]
    errors = sorted({error for tally in (total, *(tally for _, (tally, _) in extra)) for error in tally.rejected})
    return {
        "seed": seed,
        "kinds": rows,
        "errors": errors,
        "disagreements": disagreements,
        "seconds": round(seconds, 2),
        "large": time_large_graphs(num_tasks) if num_tasks else [],
    }


def _judge_all(num_cases: int, seed: int, options: dict[str, bool], progress: bool) -> tuple[Tally, list[str]]:
    tally, disagreements = Tally(), []
    judgements = self_check(num_cases, seed, **options)
    for judgement in tqdm(judgements, ", ".join(options), num_cases, leave=False, disable=not progress):
        tally.add(judgement)
        if not judgement.agree:
            disagreements.append(f"seed {seed}, {', '.join(options)}, {judgement}")
    return tally, disagreements


def _row(kind: str, tally: Tally) -> dict[str, object]:
    return {
        "what": kind.replace("_", " "),
        "cases": tally.cases,
        "safe": tally.safe,
        "accepted": tally.accepted,
        "unsafe": tally.cases - tally.safe,
        "rejected": tally.cases - tally.accepted,
        **tally.rejected,
        "disagreements": tally.disagreements,
        "states": tally.states,
    }


@without_garbage_collection()
def time_large_graphs(num_tasks: int) -> list[dict[str, object]]:
    """Seconds that `verify` takes for schedules of `num_tasks` tasks or a few more, on the workers of an H100."""
    rows = []
    for what, graph, events in large_graphs(num_tasks):
        report = verify(graph, events, schedule(graph, events, NUM_WORKERS))
        rows.append(
            {
                "what": what,
                "tasks": report.num_tasks,
                "events": report.num_events,
                "pairs": report.num_pairs,
                "seconds": round(report.seconds, 2),
            }
        )
    return rows
