"""The command line as a user meets it: exit codes, one error line, and answers before anything heavy is imported."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "diffusers", "deepspeed", "peft")
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID")
RECIPE = """\
policy: {model: model}
data: {prompts: prompts.txt, evaluation: prompts.txt}
rewards: [{name: shapes_graded}]
objective: {preset: flow_grpo}
evaluation: {num_prompts: 2}
prompts_per_step: 2
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a valid recipe (mine.yaml), its prompts and a model without weights."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model_index.json").write_text("{}")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    (tmp_path / "mine.yaml").write_text(RECIPE)
    return tmp_path


def run(folder: Path, *words: str, before: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *before, "-m", "unified_rl.cli", *words]
    variables = {name: value for name, value in os.environ.items() if name not in LAUNCHERS} | environment
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=60)


def imported(stderr: str) -> set[str]:
    """Top-level modules in the output of `-X importtime`."""
    lines = [line for line in stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


def test_help_imports_nothing_heavy(folder):
    result = run(folder, "--help", before=("-X", "importtime"))
    assert result.returncode == 0 and "train quickstart" in result.stdout
    assert not imported(result.stderr) & {*HEAVY, "pydantic", "yaml", "rich", "numpy", "PIL"}


def test_validate_explains_quickly_without_torch(folder):
    started = time.monotonic()
    result = run(folder, "validate", "mine.yaml", before=("-X", "importtime"))
    assert time.monotonic() - started < 10  # promised: 2 s; the machine that tests may be busy
    assert result.returncode == 0 and "2 prompts x 16 = 32 samples" in result.stdout
    assert "warning: data.evaluation: the same as data.prompts" in result.stderr
    assert "pydantic" in imported(result.stderr) and not imported(result.stderr) & set(HEAVY)


@pytest.mark.parametrize("kind", ["policies", "rewards", "objectives", "presets", "recipes"])
def test_lists(folder, kind):
    result = run(folder, "list", kind, before=("-X", "importtime"))
    assert result.returncode == 0 and result.stdout
    assert not imported(result.stderr) & set(HEAVY)


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("train", ["mine.yaml", "optimizer.lrr=1"], "optimizer.lrr: unknown key; did you mean 'lr'?"),
        ("validate", ["mine.yaml", "num_steps=many"], "num_steps: must be a valid integer"),
        ("train", ["nope.yaml"], "nope.yaml: no such recipe file"),
        (
            "validate",
            ["mine.yaml", "rewards.0.name=shapes_grade"],
            "no reward 'shapes_grade'; did you mean 'shapes_graded'?",
        ),
        (
            "train",
            ["mine.yaml", "group_size=1"],
            "group_size: 1 leaves global_std (objective.all) nothing to compare with",
        ),
        ("validate", ["mine.yaml", "data.prompts=empty_line.txt"], "empty_line.txt:2: "),
        ("train", ["mine.yaml", "data.prompts=latin.txt"], "latin.txt:2: not UTF-8"),
        (
            "validate",
            ["mine.yaml", "policy.sampling.noise_level=0"],
            "policy.sampling.noise_level: 0 makes every step determin",
        ),
        ("train", ["mine.yaml", "policy.model=absent"], "policy.model: no folder absent"),
        ("validate", ["mine.yaml", "--unknown"], "unknown argument --unknown"),
        ("train", [], "the following arguments are required: RECIPE"),
    ],
)
def test_wrong_recipes_exit_2_with_one_line_before_torch(folder, command, words, message):
    (folder / "empty_line.txt").write_text("a\n\nb\n")
    (folder / "latin.txt").write_bytes(b"a\nb\xe9\n")
    result = run(folder, command, *words, before=("-X", "importtime"))
    told = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    assert result.returncode == 2 and result.stdout == ""
    assert len(told) == 1 and told[0].startswith("error: ") and message in told[0]
    assert not imported(result.stderr) & set(HEAVY)
    assert not (folder / "runs").exists()


def test_unwritable_output_fails_before_torch(folder):
    result = run(folder, "train", "mine.yaml", "--output", "mine.yaml/run", before=("-X", "importtime"))
    assert result.returncode == 2 and "error: --output mine.yaml/run: not writable" in result.stderr
    assert "torch" not in imported(result.stderr)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "invalid choice: 'trian'"),
        ([], "the following arguments are required: COMMAND"),
        (["train", "mine.yaml", "-n", "0"], "a positive number is needed, not '0'"),
        (["report", "nowhere"], "nowhere: no such folder"),
        (["list", "reward"], "invalid choice: 'reward'"),
    ],
)
def test_wrong_arguments_exit_2_with_one_line(folder, words, message):
    result = run(folder, *words)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and message in result.stderr


STAND_IN = """
import sys, types
def record(kind):
    def call(*arguments, **keywords):
        print(kind, *arguments, *keywords.values(), sep='|')
        return 143
    return call
train = types.ModuleType('unified_rl.train')
train.train = lambda recipe, output, *, resume, allow, stop: record('train')(recipe.optimizer.lr, output, resume)
sys.modules['unified_rl.train'] = train
distributed = types.ModuleType('unified_rl.engine.distributed')
distributed.spawn = record('spawn')
sys.modules['unified_rl.engine.distributed'] = distributed
evaluate = types.ModuleType('unified_rl.evaluate')
evaluate.evaluate_command = record('evaluate')
sys.modules['unified_rl.evaluate'] = evaluate
from unified_rl.cli import main
sys.exit(main())
"""


def run_with_stand_ins(folder: Path, *words: str, **environment: str) -> str:
    """Standard output of a command whose trainer, evaluator and launcher only say how they were called."""
    variables = {name: value for name, value in os.environ.items() if name not in LAUNCHERS} | environment
    command = [sys.executable, "-c", STAND_IN, *words]
    result = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=60)
    assert result.returncode == 143, result.stderr
    return result.stdout.strip()


def test_train_takes_overrides_on_both_sides_of_options(folder):
    words = ["train", "mine.yaml", "optimizer.lr=0.5", "--output", "there", "optimizer.lr=0.25", "--resume", "never"]
    assert run_with_stand_ins(folder, *words) == "train|0.25|there|never"


def test_default_output_is_named_after_the_recipe(folder):
    assert run_with_stand_ins(folder, "train", "mine.yaml", "--local_rank=1") == "train|1e-05|runs/mine|auto"


def test_several_processes_are_started_once(folder):
    words = ["train", "mine.yaml", "-n", "2", "optimizer.lr=0.25"]
    expected = "spawn|2|['train', 'mine.yaml', 'optimizer.lr=0.25', '--output', 'runs/mine', '--resume', 'auto']"
    assert run_with_stand_ins(folder, *words) == expected
    assert run_with_stand_ins(folder, *words, RANK="0", WORLD_SIZE="2").startswith("train|0.25|")
    assert run_with_stand_ins(folder, *words, SLURM_PROCID="0", SLURM_STEP_ID="1").startswith("train|0.25|")
    assert run_with_stand_ins(folder, *words, SLURM_PROCID="0", SLURM_JOB_ID="1").startswith("spawn|2|")


def test_evaluate_hands_over_its_words(folder):
    assert run_with_stand_ins(folder, "evaluate", "runs/mine", "a.b=1") == "evaluate|runs/mine|['a.b=1']"


def test_interrupt_ends_quietly(folder):
    code = "import unified_rl.cli as cli\ndef stop(arguments): raise KeyboardInterrupt\n"
    code += "cli.COMMANDS['list'] = stop\nraise SystemExit(cli.main(['list', 'rewards']))"
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60)
    assert result.returncode == 130 and result.stderr == "interrupted\n"


def test_the_program_ends_without_taking_libraries_apart(folder):
    """Where torch was loaded; what was registered for the end is done, and what was said arrives."""
    code = (
        "import atexit, sys, types\nimport unified_rl.cli as cli\n"
        "class Library(types.ModuleType):\n    def __del__(self): print('taken apart')\n"
        "atexit.register(lambda: print('closed'))\n"
        "cli.COMMANDS['list'] = lambda arguments: 3\n"
        "sys.argv[1:] = ['list', 'rewards']\n{}cli.run()"
    )
    for loads, said in (("sys.modules['torch'] = Library('torch')\n", "closed\n"), ("", "closed\n")):
        command = [sys.executable, "-c", code.format(loads)]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
        assert (result.returncode, result.stdout) == (3, said), result.stderr
