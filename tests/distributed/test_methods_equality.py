"""Methods that are no policy gradients, on one process and on two that cut a group in half."""

import json
from pathlib import Path

import methods_worker
import torch

from tests import forks

CASES = [
    ("text", {"preset": "dpo"}),
    ("text", {"preset": "best_of_n", "aggregation": "sequence_mean"}),
    ("picture", {"preset": "diffusion_dpo", "pair_coef": 5.0, "kl": {"coef": 0.1, "estimator": "prediction"}}),
    ("picture", {"preset": "dgpo", "pair_coef": 2.0, "train_steps": 1}),
    ("picture", {"preset": "diffusion_nft", "train_steps": 2}),
    ("picture", {"preset": "awm", "beside": "policy_gradient", "beside_coef": 0.5, "kl": {"coef": 0.0}}),
]


def gradients(folder: Path, num_processes: int) -> list[torch.Tensor]:
    ends = forks.run_together(num_processes, methods_worker.main, folder, CASES, log=folder / f"log_{num_processes}")
    assert not any(end.returncode for end in ends), ends[-1].stderr[-3000:]
    return [torch.tensor(row) for row in json.loads((folder / f"gradients_{num_processes}.json").read_text())]


def test_processes_do_not_change_an_update(tmp_path: Path):
    for (_, objective), one, two in zip(CASES, gradients(tmp_path, 1), gradients(tmp_path, 2), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-7, msg=str(objective))
        assert one.abs().max() > 1e-3
