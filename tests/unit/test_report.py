"""The report of fabricated runs: what it shows, and that nothing in a run can break out of the page."""

import math
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from PIL import Image

from unified_rl.errors import RecipeError
from unified_rl.recipe.file import load_recipe
from unified_rl.report.charts import Series, line_chart, tick_labels, ticks
from unified_rl.report.compare import flat, group_runs, read_run, write_comparison
from unified_rl.report.page import write_report
from unified_rl.run_folder.tracking import RunFolder

ATTACK = '<script>alert(1)</script><img src=x onerror="alert(2)">'
NUM_STEPS = 30


class _Page(HTMLParser):
    """Collects elements and every address that a browser would ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


def make_samples(quality: float, *, pictures: bool = True, prompt: str = "a red square") -> list[dict]:
    rows = []
    for index in range(8):
        level = min(1.0, quality + 0.05 * index)
        image = Image.new("RGB", (32, 32), "black")
        image.paste((235, 45, 45), (8, 8, 8 + int(20 * level), 24))
        rows.append(
            {
                "prompt": f"{prompt} {index}",
                "text": None if pictures else f"<answer>{'red' if level > 0.5 else 'blue'}</answer>",
                "images": [image] if pictures else [],
                "rewards": {"shapes_graded": level, "shapes_strict": math.nan},
                "seed": index,
                "condition_images": [] if pictures else [image],
            }
        )
    return rows


def metrics_row(step: int) -> dict:
    return {
        "step": step,
        "samples_seen": step * 128,
        "loss": 0.01 * math.sin(step),
        "reward": 0.4 + 0.015 * step,
        "reward_std": 0.2,
        "rewards/shapes_graded/mean": 0.4 + 0.015 * step,
        "rewards/shapes_strict/mean": 0.1 + 0.02 * step,
        "kl": 0.0,
        "entropy": math.nan if step == 3 else 1.0 / step,
        "clip_fraction/low": 0.05,
        "clip_fraction/high": 0.08,
        "replay_gap": 3e-7 if step % 2 else math.nan,
        "grad_norm": 1.0 / step,
        "lr": 3e-4,
        "time/rollout": 1.2 if step % 2 else 0.0,
        "time/reward": 0.1 if step % 2 else 0.0,
        "time/update": 2.1,
        "time/total": 3.4,
    }


def make_run(path: Path, *, pictures: bool = True, prompt: str = "a red square", recipe: str = "") -> RunFolder:
    run = RunFolder(path)
    recipe += "num_steps: 60\nrewards:\n- {name: shapes_graded, weight: 1.0}\n- {name: shapes_strict, weight: 0.0}\n"
    (path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    for step in range(1, NUM_STEPS + 1):
        run.log_metrics(metrics_row(step))
    for step in (0, 10, 20, 30):
        graded, strict = 0.4 + 0.015 * step, 0.1 + 0.02 * step
        means = {"rewards/shapes_graded/mean": graded, "rewards/shapes_strict/mean": strict}
        run.log_evaluation({"step": step, "reward": graded, **means, "num_samples": 128})
        run.save_samples(step, make_samples(0.1 + 0.02 * step, pictures=pictures, prompt=prompt))
    return run


def test_report_shows_numbers_curves_pictures(tmp_path):
    run = make_run(tmp_path / "drawing")
    run.log_event("warning", "3 samples were excluded")
    text = write_report(run.path).read_text(encoding="utf-8")
    page = _Page(text)
    assert "30 of 60 optimiser steps, 3,840 samples" in text
    assert "0.400 &rarr;</span> 0.850" in text and "+0.450" in text  # the base's and the newest held-out reward
    assert "shapes_graded, held out</div>" in text and "shapes_strict, held out, not trained on</div>" in text
    assert text.count("<figure>") >= 12
    assert page.tags.count("img") == 2 * 8 + 4 + 4
    assert 'class="pixel"' in text
    assert "3 samples were excluded" in text
    assert "Always zero in this run: KL from the reference" in text
    assert 'class="band s0"' in text


def test_warnings_stand_at_the_top_and_statistics_are_drawn(tmp_path):
    run = make_run(tmp_path / "run")
    assert 'class="alarm"' not in write_report(run.path).read_text(encoding="utf-8")
    run.log_event("info", "resumed")
    run.log_event("warning", "step 10: the share of edges went from 0.1 to 0.6")
    run.log_event("error", "Traceback (most recent call last):\n  File x\nValueError: no such word")
    for step, edges in ((0, 0.1), (10, 0.6)):
        run.log_evaluation({"step": step, "reward": 0.5, "stats/edges": edges, "num_samples": 4})
    text = write_report(run.path).read_text(encoding="utf-8")
    before = text.split("<h2>Held-out prompts")[0]
    assert "ValueError: no such word" in before and "error and 1 more: events" in before and "resumed" not in before
    looks = text.split("<h2>What samples look like</h2>")[1].split("</section>")[0]
    assert looks.count("<figure>") == 1 and "<h3>The share of edges</h3>" in looks


def test_samples_of_training_lack_held_out_rewards(tmp_path):
    """Without an exam those of the rollout are kept, and rewards that are only held out were not asked."""
    recipe = "num_steps: 60\nrewards:\n- {name: judge, weight: 0.0}\n- {name: 'mine.py:shapes_graded', weight: -1.0}\n"
    run = make_run(tmp_path / "run")
    (run.path / "recipe.yaml").write_text(recipe)
    text = write_report(run.path).read_text(encoding="utf-8")
    best = text.split("<h3>Best of step 30</h3>")[1].split("<h3>")[0]
    assert "a red square 0" in best and "a red square 7" not in best, "by the weights of their names"


def test_labels_beside_an_axis_are_short():
    assert tick_labels([0.0, 0.5, 1.0]) == (["0", "0.5", "1"], "")
    labels, unit = tick_labels([0.0076215, 0.0076220, 0.0076225])
    assert (labels, unit) == (["7.6215", "7.622", "7.6225"], "\u00d7 1e-3")
    flat = line_chart([Series(label="ratio", points=[(1.0, 1.0), (2.0, 1.0 - 6e-7)])])
    heights = [float(part.split()[1]) for part in flat.split('class="line s0" d="M')[1].split('"')[0].split("L")]
    assert abs(heights[0] - heights[1]) < 0.2, "rounding is no movement"


def test_what_a_rollout_measures_once_is_one_line(tmp_path):
    text = write_report(make_run(tmp_path / "run").path).read_text(encoding="utf-8")
    for title in ("Replay gap", "Seconds"):
        path = text.split(f"<h3>{title}</h3>")[1].split('class="line s0" d="')[1].split('"')[0]
        assert path.count("M") == 1 and path.count("L") == NUM_STEPS / 2 - 1


def test_report_asks_for_nothing_and_runs_nothing(tmp_path):
    run = make_run(tmp_path / ATTACK.replace("/", ""), prompt=ATTACK)
    run.log_event("error", ATTACK)
    (run.path / "recipe.yaml").write_text(f"num_steps: 3\nname: '{ATTACK}'\n", encoding="utf-8")
    (run.path / "samples/step_000030/samples.jsonl").write_text(
        (run.path / "samples/step_000030/samples.jsonl").read_text().replace("000_0.png", "<svg onload=alert(3)>.png")
    )
    text = write_report(run.path).read_text(encoding="utf-8")
    page = _Page(text)
    assert "script" not in page.tags and not page.handlers
    asked = [address for address in page.addresses if address != "#events"]
    assert asked and all(address.startswith("data:image/png;base64,") for address in asked)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "default-src &#x27;none&#x27;" in text or "default-src 'none'" in text


def test_pictures_outside_the_samples_folder_are_not_read(tmp_path):
    run = make_run(tmp_path / "run")
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    file = run.path / "samples/step_000030/samples.jsonl"
    file.write_text(file.read_text().replace("000_0.png", "../../../secret.png"))
    assert "secret.png cannot be read" in write_report(run.path).read_text(encoding="utf-8")


def test_secrets_do_not_reach_the_report(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf-value-of-the-token")
    run = make_run(tmp_path / "run")
    recipe = "num_steps: 3\nrewards:\n- {name: a, weight: 1, arguments: {api_key: 'abc123', max_tokens: 7}}\n"
    (run.path / "recipe.yaml").write_text(recipe + "- {name: b, weight: 0}\n", encoding="utf-8")
    run.log_event("error", "401 from https://user:hunter2@host, header Authorization: Bearer abcdefgh1234")
    run.log_event("error", "sent hf-value-of-the-token")
    text = write_report(run.path).read_text(encoding="utf-8") + (run.path / "events.jsonl").read_text()
    for secret in ("abc123", "hunter2", "abcdefgh1234", "hf-value-of-the-token"):
        assert secret not in text
    assert "max_tokens: 7" in text


def test_text_completions_are_a_table_with_their_picture(tmp_path):
    run = make_run(tmp_path / "answers", pictures=False)
    text = write_report(run.path).read_text(encoding="utf-8")
    assert "&lt;answer&gt;blue&lt;/answer&gt;" in text and "<table>" in text
    assert "img" in _Page(text).tags


def test_missing_pieces_are_named(tmp_path):
    run = RunFolder(tmp_path / "young")
    run.log_metrics({"step": 1, "reward": 0.5})
    text = write_report(run.path).read_text(encoding="utf-8")
    for told in ("No evaluation yet", "No samples were saved yet", "No recipe.yaml", "1 optimiser steps"):
        assert told in text


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_no_run_is_the_users_error(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match=name):
        write_report(tmp_path / name)


def test_long_lines_are_averaged_and_gaps_break_them():
    points = [(float(step), None if 3000 <= step < 6000 else float(step)) for step in range(9000)]
    svg = line_chart([Series(label="a", points=points)])
    path = svg.split('class="line s0" d="')[1].split('"')[0]
    assert path.count("M") == 2 and path.count("L") < 300


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-2, 2, [-2, -1, 0, 1, 2]),
        (0.0003, 0.0005, [0.0003, 0.00035, 0.0004, 0.00045, 0.0005]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_runs_of_one_recipe_are_one_line_with_a_band(tmp_path):
    for seed, lr in ((0, 1), (1, 1), (0, 2)):
        make_run(tmp_path / f"run{lr}{seed}", recipe=f"seed: {seed}\noptimizer: {{lr: {lr}, decay: none}}\n")
    evaluations = tmp_path / "run11/eval.jsonl"
    rows = evaluations.read_text().replace('"reward": 0.85', '"reward": 0.65')  # of the last step, 30
    evaluations.write_text(rows)
    folders = [tmp_path / name for name in ("run10", "run20", "run11")]
    groups = group_runs([read_run(folder) for folder in folders])
    assert [(group.label, [run.seed for run in group.runs]) for group in groups] == [("lr=1", [0, 1]), ("lr=2", [0])]
    page = write_comparison(folders, tmp_path / "compare.html").read_text()
    assert _Page(page).handlers == [] and "script" not in _Page(page).tags
    assert page.count('class="band s0"') == 3, "one chart a reward, a band where there are two seeds"
    assert "lr=1 at 3840: 0.75" in page and "lr=2 at 3840: 0.85" in page  # means over seeds, at 30 x 128 samples
    assert "+0.350</span> &plusmn; 0.141" in page  # gains 0.45 and 0.25: mean 0.35, standard deviation 0.2 / sqrt(2)
    assert all(address.startswith("data:") for address in _Page(page).addresses) and "a red square 0" in page


def test_one_seed_each_is_no_count_and_no_gain_is_not_bad(tmp_path):
    for lr in (1, 2):
        run = make_run(tmp_path / f"run{lr}", recipe=f"seed: 0\noptimizer: {{lr: {lr}, decay: none}}\n")
        run.log_evaluation({"step": 30, "reward": 0.4, "rewards/shapes_graded/mean": 0.4, "num_samples": 128})
    page = write_comparison([tmp_path / "run1", tmp_path / "run2"], tmp_path / "page.html").read_text(encoding="utf-8")
    assert '<th class="number">seed</th>' in page and "seeds</th>" not in page
    assert '<span class="soft">+0.000</span>' in page


def test_what_cannot_be_compared_is_the_users_error(tmp_path):
    make_run(tmp_path / "run", recipe="seed: 0\n")
    with pytest.raises(RecipeError, match="not a run's folder"):
        write_comparison([tmp_path / "run", tmp_path], tmp_path / "compare.html")
    (tmp_path / "run/eval.jsonl").unlink()
    with pytest.raises(RecipeError, match="no evaluation"):
        write_comparison([tmp_path / "run"], tmp_path / "compare.html")


def test_a_key_that_a_run_did_not_know_yet_has_its_default(tmp_path):
    recipe = load_recipe("quickstart").model_dump(mode="json")
    for seed in (0, 1):
        make_run(tmp_path / str(seed))
        (tmp_path / str(seed) / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "seed": seed}))
        recipe.pop("resample", None)
    (group,) = group_runs([read_run(tmp_path / "0"), read_run(tmp_path / "1")])
    assert [run.seed for run in group.runs] == [0, 1]


def test_recipes_are_compared_leaf_by_leaf():
    assert flat({"a": [{"b": 1}, 2], "c": {}, "d": None}) == {"a.0.b": 1, "a.1": 2, "c": {}, "d": None}
