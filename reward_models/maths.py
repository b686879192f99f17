"""Mathematical answers in LaTeX or plain text, compared as expressions by math-verify (Apache-2.0):
`pip install 'unified-rl[maths]'`.

Some expressions keep a computer algebra system busy for ever, and math-verify's own time limit only works in a main
thread (elsewhere it fails, which made all rewards zero in more than one project). So the comparison runs in a child
process without that limit, and a child that is late is killed.
"""

import json
import select
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

CHILD = """
import json, sys
from math_verify import parse, verify
print("ready", flush=True)
for line in sys.stdin:
    truth, reply = json.loads(line)
    gold = parse(truth, parsing_timeout=None)
    found = parse(reply, parsing_timeout=None)
    right = verify(gold, found, timeout_seconds=None) if gold and found else False
    print(json.dumps([bool(gold), bool(right)]), flush=True)
"""
START_SECONDS = 120.0


class MathAnswer:
    """1.0 where the reply's answer equals the column `answer` (or `solution`), 0.0 where not, None where the truth
    cannot be read or the comparison took too long."""

    def __init__(self, seconds: float = 5.0) -> None:
        """Args:
        seconds: for one comparison.
        """
        self.seconds = seconds
        self._child: subprocess.Popen | None = None

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        answer: Sequence[str] | None = None,
        solution: Sequence[str] | None = None,
        **_: Any,
    ) -> list[float | None]:
        truths = answer if answer is not None else solution
        if truths is None:
            raise ValueError("the data need a column 'answer' or 'solution'")
        replies = [each if isinstance(each, str) else each[-1]["content"] for each in completions]
        return [self._compare(str(truth), reply) for truth, reply in zip(truths, replies, strict=True)]

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def _compare(self, truth: str, reply: str) -> float | None:
        if "\\" in truth and "$" not in truth:
            truth = f"${truth}$"  # LaTeX is only looked for between dollar signs
        if self._child is not None and self._child.poll() is not None:  # ended between two calls
            self.close()
        if self._child is None:
            command = [sys.executable, "-c", CHILD]
            self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            if self._line(START_SECONDS) != "ready":
                raise RuntimeError("math-verify does not start; is it installed? pip install 'unified-rl[maths]'")
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps([truth, reply]) + "\n")
        self._child.stdin.flush()
        line = self._line(self.seconds)
        if not line:
            self.close()
            return None
        readable, right = json.loads(line)
        return float(right) if readable else None

    def _line(self, seconds: float) -> str:
        """The child's next line; empty if it is late or gone."""
        assert self._child is not None and self._child.stdout is not None
        ready, _, _ = select.select([self._child.stdout], [], [], seconds)
        return self._child.stdout.readline().strip() if ready else ""
