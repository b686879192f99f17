"""The trainer. Read `run_loop` first: it is the whole of it.

    sample -> score -> advantages -> windows of (rows x steps) -> backward -> step -> log -> evaluate -> checkpoint

Nothing here knows what a step of a policy is (a token, a denoising step...), which objective is trained, or how many
processes there are.

A rollout's prompts, seeds and drawn steps are functions of the recipe's seed and the rollout's number, never of a
generator's state, so that a resumed run goes on as if it had not stopped. For the same reason checkpoints are written
between rollouts.
"""

import functools
import math
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from unified_rl.advantages import zero_std_fraction
from unified_rl.assemble import Parts, assemble
from unified_rl.data.recorded import RecordedSampler
from unified_rl.engine import distributed
from unified_rl.engine.watch import enter
from unified_rl.errors import PeerError
from unified_rl.evaluate import evaluate, group_diversity
from unified_rl.fitting import as_fitted, fitted_update
from unified_rl.guard import alarms, exploited
from unified_rl.methods import plan_windows
from unified_rl.metrics import Traffic, of_ranks, reward_metrics, slowest
from unified_rl.prepare import Prepared, prepare
from unified_rl.recall import recall
from unified_rl.recipe.schema import Recipe
from unified_rl.replay import ReplayCheck
from unified_rl.resample import replace_tied
from unified_rl.rewards.scoring import close_rewards
from unified_rl.rollout import Rollout, roll_out, shown
from unified_rl.run_folder.random_state import seed_all
from unified_rl.run_folder.resume import Position, resume
from unified_rl.run_folder.saving import Saver, end_exploited, is_due
from unified_rl.run_folder.tracking import open_run, read_jsonl
from unified_rl.stopping import UNASKED, Abandoned, StopSignal
from unified_rl.types import Prompt
from unified_rl.windows import Window

DONE = 0


def run_loop(parts: Parts, at: Position, stop: StopSignal) -> int:
    """Train from a position between two rollouts to the recipe's end; returns the exit code."""
    recipe, engine = parts.recipe, parts.engine
    step, index, held_out, skipped, reason = at.step, at.rollout, None, 0, ""
    saver, parts, traffic = Saver(parts, at.step), as_fitted(parts), Traffic(engine)
    while step < recipe.num_steps and not reason and not stop.requested():
        try:
            rollout, prepared, row = collect(parts, index, stop)
        except Abandoned:
            break
        traffic.end_rollout()
        before = step
        if parts.recorder is not None:
            with distributed.agreed("recording a rollout"):
                parts.recorder.write(index, rollout)
        for number in range(recipe.updates_per_rollout):
            windows = plan_update(parts, prepared, index, number)
            started = time.perf_counter()
            enter("update")
            replay = ReplayCheck(parts, rollout)
            probed = replay.ahead(windows, starts=index == at.rollout) if number == 0 else None
            told = number == 0 and replay.by_update
            replan = functools.partial(plan_update, prepared=prepared, index=index, number=number)
            changed, parts = fitted_update(parts, windows, replan, first_update=told, judge=replay.judge)
            changed = changed if probed is None else {**changed, "replay_gap": probed}
            parts.snapshots.tick("step")
            step += 1
            skipped = 0 if math.isfinite(changed["grad_norm"]) else skipped + 1
            check_finite(recipe, skipped, index)
            coefs = parts.memory.observe({**row, **changed} if number == 0 else changed)
            changed = {**changed, **coefs, **traffic.end_step()}
            log_step(parts, step, {**row, **changed}, time.perf_counter() - started, first=number == 0)
            exam_due = step % recipe.evaluation.every == 0 or step == recipe.num_steps
            spread = row.get("group_diversity")
            held_out, reason = examine(parts, step, spread) if parts.exam and exam_due else (None, "")
            if step == recipe.num_steps or reason or has_left(recipe, changed):
                break
        parts.snapshots.tick("rollout")
        index += 1
        if not parts.exam:
            parts.run.save_samples(step, shown(rollout, recipe.evaluation.num_saved))
        if is_due(recipe, before, step):
            saver.save(step, index, held_out)
    if step < recipe.num_steps:
        saver.save(step, index, held_out)
    saver.check_saved(step)
    if reason:
        return end_exploited(parts, step, reason)
    return stop.exit_code if step < recipe.num_steps else DONE


def collect(parts: Parts, index: int, stop: StopSignal = UNASKED) -> tuple[Rollout, list[Prepared], dict[str, float]]:
    """Rollout number `index`, judged and prepared for its updates, and what it adds to the metrics.

    Raises:
        Abandoned: if a stop was asked for before it was prepared.
    """
    recipe, engine = parts.recipe, parts.engine
    parts.policy.rollout = index
    enter("rollout")
    with distributed.agreed("reading prompts"):
        prompts = parts.sampler.rollout(index, rank=engine.rank, world_size=engine.world_size)
    known_bad = tell_skipped(parts) if recipe.data.on_bad_image == "skip" else {}
    rollout = draw(parts, prompts, stop)
    drawn = time.perf_counter()
    total = distributed.gather_rows(rollout.scores.total)
    breakdown = {name: distributed.gather_rows(values) for name, values in rollout.scores.breakdown.items()}
    # Rewards are reported as they were drawn: those of the groups that are kept would look better than they are.
    kept, redrawn = refill(parts, rollout, index, stop)
    refilled = time.perf_counter() - drawn
    prepared, known = prepare(parts.policy, recipe, parts.memory, kept, index)
    row = {
        "samples_seen": (index + 1) * recipe.samples_per_rollout,
        **reward_metrics(total, breakdown),
        "frac_reward_zero_std": zero_std_fraction(total, distributed.gather_rows(rollout.trajectory.group_ids)),
        **group_diversity(rollout),
        **rollout.scores.report,
        "time/rollout": rollout.seconds[0] + refilled,
        "time/reward": rollout.seconds[1],
        **slowest("rollout", rollout.seconds[0]),
        **slowest("reward", rollout.scores.report.get("time/reward_work", 0.0)),
        **redrawn,
        **known_bad,
        **known,
    }
    return kept, prepared, row


def tell_skipped(parts: Parts) -> dict[str, float]:
    """Count the rows that cannot be read or are refused, and write down those that are new; called by every process."""
    for why in parts.sampler.share_skipped():
        parts.run.log_event("warning", f"skipped: {why}")
        parts.console.log(f"warning: skipped: {why}")
    return {"num_bad_images": float(len(parts.sampler.skipped))}


def refill(parts: Parts, rollout: Rollout, index: int, stop: StopSignal) -> tuple[Rollout, dict[str, float]]:
    """Put other prompts in the place of groups that teach nothing, if the recipe asks for it."""
    recipe, engine = parts.recipe, parts.engine
    if not recipe.resample:
        return rollout, {}

    return replace_tied(
        rollout,
        rounds=recipe.resample,
        index=index,
        group_size=recipe.group_size,
        prompts_of=lambda number: parts.sampler.rollout(number, rank=engine.rank, world_size=engine.world_size),
        draw=lambda prompts: draw(parts, prompts, stop),
    )


def draw(parts: Parts, prompts: Sequence[Prompt], stop: StopSignal) -> Rollout:
    """Judged trajectories of the weights that draw this run's rollouts.

    Raises:
        Abandoned: if a stop was asked for.
    """
    recipe = parts.recipe
    if isinstance(parts.sampler, RecordedSampler):
        return recall(parts.policy, parts.rewards, parts.sampler, prompts, batch=recipe.engine.micro_batch)
    with parts.snapshots.use(recipe.rollout_weights):
        batch = recipe.engine.rollout_batch or recipe.engine.micro_batch
        return roll_out(
            parts.policy, parts.rewards, prompts, batch=batch, console=parts.console, before_each=stop.check
        )


def plan_update(parts: Parts, prepared: Sequence[Prepared], index: int, number: int) -> list[Window]:
    """The windows of optimiser step `number` that rollout `index` is trained for."""
    return [window for part in prepared for window in plan_windows(parts, part, index, number)]


def has_left(recipe: Recipe, changed: dict[str, float]) -> bool:
    """Whether the policy is as far from the rollout's as its objective allows (PPO's early stop)."""
    limits = [objective.stop_kl for objective in recipe.objective.values() if objective.stop_kl is not None]
    return bool(limits) and changed["update_kl"] > min(limits)


class DivergedError(RuntimeError):
    """Training has become impossible: no update has a finite gradient any more."""


def check_finite(recipe: Recipe, skipped: int, rollout: int) -> None:
    """
    Raises:
        DivergedError: if too many updates in a row were skipped.
    """
    if skipped >= recipe.optimizer.max_skipped:
        raise DivergedError(
            f"{skipped} updates in a row had no finite gradient, the last one of rollout {rollout}; the newest "
            "checkpoint is from before or among them. Lower optimizer.lr, or look at the rewards and at policy.dtype"
        )


def log_step(parts: Parts, step: int, row: dict[str, float], update_seconds: float, *, first: bool) -> None:
    """Write and show the metrics of one optimiser step; `first`: of its rollout."""
    recipe = parts.recipe
    for warning in parts.health.observe(row, new_rollout=first):
        parts.run.log_event("warning", f"step {step}: {warning}")
        parts.console.log(f"warning: {warning}")
    waits = [key for key in ("time/rollout", "time/reward", "time/anchor") if key in row]
    waited = sum(row[key] for key in waits) if first else 0.0
    if not first:
        row = {**row, **dict.fromkeys([*waits, "time/reward_work"], 0.0), "replay_gap": float("nan")}
    share = recipe.samples_per_rollout / recipe.updates_per_rollout
    complete: dict[str, float] = {
        "step": step,
        **row,
        "time/update": update_seconds,
        "time/total": waited + update_seconds,
        "samples_per_second": share / (waited / recipe.updates_per_rollout + update_seconds) if first else float("nan"),
    }
    ranks = of_ranks(complete)
    complete["memory/peak_mib"] = max(ranks["memory/peak_mib"])
    if parts.engine.world_size > 1:
        parts.run.log_ranks({"step": step, **ranks})
    parts.run.log_metrics(complete)
    parts.console.metrics(complete)


def examine(parts: Parts, step: int, spread: float | None = None) -> tuple[float, str]:
    """Evaluate on the held-out prompts; write the numbers, samples, and what is suspicious about them.

    Args:
        spread: how much the last rollout's samples of one prompt differ; held-out prompts, drawn once, cannot say.

    Returns:
        What the best checkpoint has most of, and why the recipe's guard ends the run ("": it goes on).
    """
    enter("evaluation")
    guard, reason = parts.recipe.guard, ""
    with parts.snapshots.use(parts.recipe.evaluation.weights):
        metrics, rollout = evaluate(parts.policy, parts.rewards, parts.exam, parts.recipe, parts.console)
    parts.run.log_evaluation({"step": step, **metrics, **({} if spread is None else {"stats/within_groups": spread})})
    if distributed.is_main():
        trained = [reward.name for reward in parts.rewards if reward.weight != 0]
        history = read_jsonl(parts.run.path / "eval.jsonl")
        first = next(iter(read_jsonl(parts.run.path / "metrics.jsonl")), {})  # drawn by the base model
        history[0] = {"stats/within_groups": first.get("group_diversity"), **history[0]}
        for alarm in alarms(history, trained):
            parts.run.log_event("warning", f"step {step}: {alarm}")
            parts.console.log(f"warning: {alarm}")
        reason = exploited(history, trained, guard)
    parts.run.save_samples(step, shown(rollout, parts.recipe.evaluation.num_saved))
    means = [f"{key.split('/')[1]} {value:.3f}" for key, value in metrics.items() if key.endswith("/mean")]
    parts.console.log(f"held-out at step {step}: {', '.join(means)}")
    held_out = metrics["reward" if guard.judge is None else f"rewards/{guard.judge}/mean"]
    return held_out, distributed.gather_objects([reason])[0]


def train(
    recipe: Recipe, output: Path, *, resume: str, allow: Sequence[str] = (), stop: StopSignal | None = None
) -> int:
    """Run a recipe in the folder `output`; returns the exit code (0 done, 143 stopped by SIGTERM after saving, 130 by
    Ctrl-C).

    Args:
        resume: "auto", "never", or the folder of a checkpoint.
        allow: keys of the recipe that may have changed since the checkpoint.
        stop: where signals were heard so far, by a caller that listens already.

    Raises:
        RecipeError: for what is wrong with the recipe, its data, rewards or model.
        Stopped: if a signal came while the run started.
    """
    stop = StopSignal() if stop is None else stop
    distributed.initialise(recipe.engine.timeout)
    if recipe.engine.threads is not None:
        torch.set_num_threads(recipe.engine.threads)
    with distributed.agreed("opening the run's folder"):
        run = open_run(output, distributed.rank())
    watch = distributed.watch()
    if watch is not None:
        watch.report = functools.partial(run.log_event, "error")
    try:
        with stop.listening():
            parts = assemble(recipe, run)
            seed_all(recipe.seed, distributed.rank())
            try:
                at = start(parts, resume, allow)
                stop.save_first()
                return run_loop(parts, at, stop)
            finally:
                close_rewards(parts.rewards)
    except Exception as error:
        lost = distributed.lost(error)
        run.log_event("error", f"{lost}\n{traceback.format_exc()}".lstrip())
        if watch is not None:
            watch.fail(f"{type(error).__name__}: {error}")
        if lost:
            raise PeerError(lost) from error
        raise
    finally:
        run.close()
        distributed.shutdown()


def start(parts: Parts, resume_from: str, allow: Sequence[str] = ()) -> Position:
    """Resume from a checkpoint or begin anew; returns where to go on from."""
    position = resume(parts, resume_from, allow)
    begins = position == Position(step=0, rollout=0)
    parts.run.truncate(-1 if begins else position.step)
    parts.health.recall([] if begins else read_jsonl(parts.run.path / "metrics.jsonl"))
    parts.run.write_recipe(parts.recipe)
    parts.run.follow(parts.recipe, position.step, parts.console.log)
    if parts.recorder is not None and distributed.is_main():
        parts.recorder.forget(position.rollout)
    if parts.exam and begins:
        examine(parts, 0)
    return position
