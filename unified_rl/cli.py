"""The command line: `unified-rl train | validate | evaluate | score | train-reward | serve | export | report | list`.

Exit codes: 0 done, 1 failed, 2 the user's recipe or arguments are wrong (one line on standard error), 143 stopped by
SIGTERM (after saving, if there was anything to save). Nothing heavy is imported before a command is known, so that
`--help` answers at once.
"""

import argparse
import atexit
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from unified_rl.recipe.schema import Recipe
    from unified_rl.stopping import StopSignal

DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130


class _Parser(argparse.ArgumentParser):
    """Errors are one line, as for a wrong recipe."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG, f"error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = _build_parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse fills `overrides` from one stretch of words only; those after an option are left over
    if "overrides" in arguments:
        arguments.overrides += [word for word in rest if "=" in word and not word.startswith("-")]
        rest = [word for word in rest if word not in arguments.overrides]
    if rest:
        parser.error(f"unknown argument {rest[0]}; see unified-rl {arguments.command} --help")
    from unified_rl.errors import ExploitedError, PeerError, RecipeError

    try:
        return COMMANDS[arguments.command](arguments)
    except RecipeError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return WRONG
    except Exception as error:
        from unified_rl.plain_text import clean, redact
        from unified_rl.rewards.types import RewardFailedError

        # Not Python's own way: user code puts keys and terminal sequences into its messages. A failed reward's process
        # has shown its own traceback.
        told = isinstance(error, ExploitedError | PeerError | RewardFailedError)
        lines = [] if told else traceback.format_exception(error)
        sys.stderr.write(clean(redact(f"{''.join(lines)}error: {type(error).__name__}: {error}\n")))
        return FAILED
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="unified-rl",
        description="Reinforcement learning for any diffusers pipeline and any transformers generator.",
        epilog="Start here: unified-rl train quickstart",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=_version())
    # The deepspeed launcher puts it before every other word; ranks come from the environment.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train as a recipe says", allow_abbrev=False)
    _add_recipe(train)
    _add_run(train)

    validate = commands.add_parser("validate", help="check a recipe and explain what it will do", allow_abbrev=False)
    _add_recipe(validate)
    validate.add_argument("--gpus", metavar="N", type=_positive, help="plan the memory and traffic of N GPUs")
    validate.add_argument("--gpu-memory", metavar="GIB", type=float, default=80.0, help="of one of them (default: 80)")

    evaluate = commands.add_parser(
        "evaluate", help="measure base against trained on held-out prompts", allow_abbrev=False
    )
    evaluate.add_argument("target", metavar="RUN|RECIPE", help="a run's folder, or a recipe (measures its base model)")
    _add_overrides(evaluate)

    score = commands.add_parser("score", help="try rewards on pictures or texts", allow_abbrev=False)
    score.add_argument(
        "--reward", metavar="NAME", dest="rewards", action="append", required=True, help="as in a recipe; repeatable"
    )
    score.add_argument(
        "files", metavar="FILE", nargs="+", type=Path, help="pictures, or .jsonl rows; see docs/rewards.md"
    )
    score.add_argument("--prompt", default="", help="what pictures were asked for")
    score.add_argument(
        "--arguments", metavar="YAML", default="{}", help="keyword arguments, as in a recipe: '{top: 3}'"
    )

    _add_train_reward(commands)
    _add_serve(commands)
    _add_export(commands)

    report = commands.add_parser("report", help="write a run's report.html, or compare runs", allow_abbrev=False)
    report.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="runs' folders; several are compared")
    report.add_argument(
        "--output", metavar="FILE", type=Path, default=Path("compare.html"), help="page of a comparison (%(default)s)"
    )

    listing = commands.add_parser("list", help="list what can be named in a recipe", allow_abbrev=False)
    listing.add_argument("kind", choices=("policies", "rewards", "objectives", "presets", "recipes"))
    return parser


def _add_train_reward(commands: "argparse._SubParsersAction[_Parser]") -> None:
    learn = commands.add_parser(
        "train-reward", help="fit a reward of your own on preferences or scores", allow_abbrev=False
    )
    learn.add_argument("data", metavar="DATA", type=Path, help="a .jsonl of pairs or scored samples; docs/rewards.md")
    learn.add_argument(
        "--encoder",
        metavar="NAME",
        required=True,
        help="frozen features: efficientnet-lite0, minilm, or the folder or hub name of a CLIP-like model, a picture "
        "encoder or a sentence encoder",
    )
    learn.add_argument("--revision", metavar="COMMIT", help="of the encoder, if it is taken from the hub")
    learn.add_argument("--output", metavar="DIR", type=Path, required=True, help="a new folder, which recipes can name")
    learn.add_argument(
        "--hidden", metavar="UNITS", type=_positive, default=0, help="of a hidden layer; default: linear"
    )
    learn.add_argument("--held-out", metavar="SHARE", type=float, default=0.2, help="measured on; default: 0.2")
    learn.add_argument("--without-prompt", action="store_true", help="judge samples whatever was asked for")
    learn.add_argument("--seed", type=int, default=0, help="of the split; default: 0")
    learn.add_argument("--device", default="cpu", help="of the encoder; default: cpu")


def _add_serve(commands: "argparse._SubParsersAction[_Parser]") -> None:
    serve = commands.add_parser("serve", help="serve rewards over HTTP", allow_abbrev=False)
    serve.add_argument(
        "--reward", metavar="NAME", dest="rewards", action="append", required=True, help="as in a recipe; repeatable"
    )
    serve.add_argument("--host", default="127.0.0.1", help="any other than loopback needs UNIFIED_RL_TOKEN to be set")
    serve.add_argument("--port", type=_positive, default=8000)


def _add_export(commands: "argparse._SubParsersAction[_Parser]") -> None:
    export = commands.add_parser(
        "export", help="write a run's weights for diffusers, transformers or peft", allow_abbrev=False
    )
    export.add_argument("run", metavar="RUN", type=Path, help="a run's folder")
    export.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    export.add_argument(
        "--format",
        choices=("peft", "diffusers", "transformers", "merged"),
        required=True,
        help="peft: the adapter; diffusers, transformers: their own format; merged: the whole model",
    )
    export.add_argument("--weights", choices=("trained", "ema"), default="trained", help="default: trained")
    export.add_argument(
        "--checkpoint",
        metavar="newest|best|STEP",
        default="newest",
        help="best: by guard.judge, else the exam's reward; default: newest",
    )


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument(
        "--tiny", action="store_true", help="swap in a tiny random twin of the model, to try the recipe on a laptop"
    )
    _add_overrides(parser)


def _add_run(train: argparse.ArgumentParser) -> None:
    train.add_argument("--output", metavar="DIR", type=Path, help="the run's folder (default: runs/<recipe name>)")
    train.add_argument(
        "--resume",
        metavar="auto|never|PATH",
        default="auto",
        help="auto: from the newest complete checkpoint in the output folder, if there is one (default)",
    )
    train.add_argument(
        "--allow-change",
        metavar="KEY",
        action="append",
        default=[],
        help="resume although this key of the recipe has changed; may be given several times",
    )
    train.add_argument(
        "-n", dest="processes", metavar="PROCESSES", type=_positive, default=1, help="processes to start"
    )
    # where a launcher of one's own adds it at the end
    train.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", metavar="a.b=value", nargs="*", help="keys of the recipe to change")


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"a positive number is needed, not {text!r}")
    return number


def _version() -> str:
    from unified_rl import __version__

    return f"unified-rl {__version__}"


def _checked_recipe(name: str, overrides: list[str], *, tiny: bool) -> "tuple[Recipe, list[str]]":
    """The recipe and the warnings about it, after every check that needs no model in memory."""
    from unified_rl.recipe.checks import check_recipe

    if tiny:
        from unified_rl.tiny.twin import tiny_recipe

        recipe, notes = tiny_recipe(name, overrides)
        return recipe, [f"--tiny: {note}" for note in notes] + check_recipe(recipe)
    from unified_rl.recipe.file import load_recipe

    recipe = load_recipe(name, overrides)
    return recipe, check_recipe(recipe)


def _train(arguments: argparse.Namespace) -> int:
    from unified_rl.stopping import Stopped, StopSignal

    stop = StopSignal()
    try:
        with stop.listening():
            return _train_until(arguments, stop)
    except Stopped:
        sys.stderr.write("stopped while starting: there was nothing to save\n")
        return stop.exit_code


def _train_until(arguments: argparse.Namespace, stop: "StopSignal") -> int:
    recipe, warnings = _checked_recipe(arguments.recipe, arguments.overrides, tiny=arguments.tiny)
    from unified_rl.run_folder.tracking import check_writable

    tiny = ["--tiny"] if arguments.tiny else []
    output: Path = arguments.output or Path("runs") / "-".join(
        [Path(arguments.recipe).stem, *(["tiny"] if tiny else [])]
    )
    check_writable(output)
    if arguments.processes > 1 and not _launched():
        from unified_rl.engine.distributed import spawn

        command = ["train", arguments.recipe, *tiny, *arguments.overrides, "--output", str(output)]
        allowed = [word for key in arguments.allow_change for word in ("--allow-change", key)]
        return spawn(arguments.processes, [*command, "--resume", arguments.resume, *allowed])
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        _write_warnings(warnings)
    from unified_rl.train import train

    return train(recipe, output, resume=arguments.resume, allow=arguments.allow_change, stop=stop)


def _launched() -> bool:
    """Whether torchrun, deepspeed, accelerate, srun or `spawn` started this process as one of several."""
    in_batch_script = "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" not in os.environ
    return "RANK" in os.environ or ("SLURM_PROCID" in os.environ and not in_batch_script)


def _validate(arguments: argparse.Namespace) -> int:
    recipe, warnings = _checked_recipe(arguments.recipe, arguments.overrides, tiny=arguments.tiny)
    from unified_rl.recipe.explain import explain

    sys.stdout.write(explain(recipe))
    if arguments.gpus:
        from unified_rl.planning.planner import explain_plan

        sys.stdout.write(f"\n{explain_plan(recipe, arguments.gpus, arguments.gpu_memory)}")
    sys.stdout.flush()
    _write_warnings(warnings)
    return DONE


def _write_warnings(warnings: list[str]) -> None:
    for warning in warnings:
        sys.stderr.write(f"warning: {warning}\n")


def _evaluate(arguments: argparse.Namespace) -> int:
    from unified_rl.evaluate import evaluate_command

    return evaluate_command(arguments.target, arguments.overrides)


def _score(arguments: argparse.Namespace) -> int:
    from unified_rl.rewards.score import score_command

    return score_command(arguments.rewards, arguments.files, prompt=arguments.prompt, arguments=arguments.arguments)


def _train_reward(arguments: argparse.Namespace) -> int:
    from unified_rl.rewards.fit import train_reward_command

    return train_reward_command(
        arguments.data,
        arguments.output,
        encoder=arguments.encoder,
        revision=arguments.revision,
        hidden=arguments.hidden,
        held_out=arguments.held_out,
        use_prompt=not arguments.without_prompt,
        seed=arguments.seed,
        device=arguments.device,
    )


def _serve(arguments: argparse.Namespace) -> int:
    from unified_rl.rewards.serve import serve_command

    return serve_command(arguments.rewards, host=arguments.host, port=arguments.port)


def _export(arguments: argparse.Namespace) -> int:
    from unified_rl.run_folder.export import export

    chosen = export(
        arguments.run,
        arguments.out,
        form=arguments.format,
        weights=arguments.weights,
        checkpoint=arguments.checkpoint,
    )
    sys.stdout.write(f"{chosen.name} -> {arguments.out}\n")
    return DONE


def _report(arguments: argparse.Namespace) -> int:
    if len(arguments.runs) > 1:
        from unified_rl.report.compare import write_comparison

        sys.stdout.write(f"{write_comparison(arguments.runs, arguments.output)}\n")
        return DONE
    from unified_rl.report.page import write_report

    sys.stdout.write(f"{write_report(arguments.runs[0])}\n")
    return DONE


def _list(arguments: argparse.Namespace) -> int:
    from unified_rl.recipe.explain import listing

    sys.stdout.write(listing(arguments.kind))
    return DONE


COMMANDS = {
    "train": _train,
    "validate": _validate,
    "evaluate": _evaluate,
    "score": _score,
    "train-reward": _train_reward,
    "serve": _serve,
    "export": _export,
    "report": _report,
    "list": _list,
}


def run() -> NoReturn:
    """The program: one command, then the end."""
    code = main()
    if "torch" not in sys.modules:
        sys.exit(code)
    # Python would take apart all that torch, transformers and diffusers have loaded: that takes seconds, which a
    # scheduler may not grant after SIGTERM, and hangs where a library's threads do. All is written and closed by now.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
