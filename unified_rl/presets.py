"""Objective presets: a name, its paper, and the keys of `objective` that it fills in; keys given in a recipe win."""

from typing import Any

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": (
        "Shao et al. 2024, DeepSeekMath, arXiv 2402.03300",
        {"advantage": "group_std", "aggregation": "sequence_mean", "kl": {"coef": 0.04, "estimator": "k3"}},
    ),
    "dr_grpo": (
        "Liu et al. 2025, Understanding R1-Zero-Like Training, arXiv 2503.20783",
        {"advantage": "group_mean", "aggregation": "constant"},
    ),
    "gspo": (
        "Zheng et al. 2025, Group Sequence Policy Optimization, arXiv 2507.18071",
        {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "sequence_mean"},
    ),
    "cispo": (
        "MiniMax 2025, MiniMax-M1, arXiv 2506.13585",
        {"loss": "cispo", "clip_high": 5.0, "aggregation": "token_mean"},
    ),
    "sapo": (
        "Gao et al. 2025, Soft Adaptive Policy Optimization, arXiv 2511.20347",
        {"loss": "sapo", "aggregation": "sequence_mean"},
    ),
    "flow_grpo": (
        "Liu et al. 2025, Flow-GRPO, arXiv 2505.05470",
        {
            "advantage": "global_std",
            "advantage_clip": 5.0,
            "clip_low": 1e-4,
            "clip_high": 1e-4,
            # The authors' 0.04 is on a divergence without dt; with the exact one, 10 steps want a tenth of it.
            "kl": {"coef": 0.004, "estimator": "gaussian"},
        },
    ),
}
"""Name -> (paper, keys that it fills in)."""
