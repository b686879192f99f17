"""Presets of what is no policy gradient; part of `presets.PRESETS`."""

from typing import Any

METHOD_PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": (
        "supervised fine-tuning on recorded samples (data.rollouts)",
        {"method": "sft", "advantage": "uniform"},
    ),
    "best_of_n": (
        "supervised fine-tuning on the best of each group (Dong et al. 2023, RAFT, arXiv 2304.06767)",
        {"method": "sft", "advantage": "best"},
    ),
    "rwr": (
        "Lee et al. 2023, reward-weighted regression, arXiv 2302.12192 (weights of mean 1 in a group)",
        {"method": "sft", "advantage": "exponential", "temperature": 1.0},
    ),
    "diffusion_nft": (
        "Zheng et al. 2025, DiffusionNFT, arXiv 2509.16117 (the old policy follows by 0.001 x rollout, up to a half)",
        {
            "method": "nft",
            "old_weights": "old",
            "advantage": "global_std",
            "advantage_clip": 5.0,
            "mix_coef": 1.0,
            "kl": {"coef": 1e-4, "estimator": "prediction"},
        },
    ),
    "awm": (
        "Xue et al. 2025, Advantage Weighted Matching, arXiv 2509.25050 (without its second divergence, from an EMA)",
        {
            "method": "awm",
            "advantage": "global_std",
            "advantage_clip": 5.0,
            "error_weight": "ghuber",
            "clip_low": 1.0,
            "clip_high": 1.0,
            # The authors' 0.003 is beside advantages that they divide by their clip of 5.
            "kl": {"coef": 0.015, "estimator": "prediction"},
        },
    ),
    "dgpo": (
        "Luo et al. 2025, DGPO, arXiv 2510.08425",
        {
            "method": "dgpo",
            "advantage": "group_std",
            "advantage_clip": 5.0,
            "pair_coef": 100.0,
            "clip_low": 1e-3,
            "clip_high": 1e-3,
            "kl": {"coef": 1e-3, "estimator": "prediction"},
        },
    ),
    "dpo": (
        "Rafailov et al. 2023, DPO, arXiv 2305.18290; online: best against worst of a group",
        {"method": "dpo", "advantage": "best_worst", "pair_coef": 0.1, "pair_form": "sigmoid"},
    ),
    "diffusion_dpo": (
        "Wallace et al. 2023, Diffusion-DPO, arXiv 2311.12908 (beta 2000 on errors that are means over dims)",
        {"method": "dpo", "advantage": "best_worst", "pair_coef": 2000.0, "pair_form": "sigmoid"},
    ),
    "refl": (
        "Xu et al. 2023, ReFL of ImageReward, arXiv 2304.05977 (without its pre-training loss)",
        {"method": "reward_gradient", "reward_gradient": {"kind": "clean_prediction", "steps": [1, 10]}},
    ),
    "draft": (
        "Clark et al. 2023, DRaFT-K, arXiv 2309.17400 (K is reward_gradient.steps)",
        {"method": "reward_gradient", "reward_gradient": {"kind": "last_steps", "steps": [1, 1]}},
    ),
    "draft_lv": (
        "Clark et al. 2023, DRaFT-LV, arXiv 2309.17400, section 3.2",
        {"method": "reward_gradient", "reward_gradient": {"kind": "renoised", "copies": 2}},
    ),
    "alignprop": (
        "Prabhudesai et al. 2023, AlignProp, arXiv 2310.03739 (random truncation; 5 to 15 of 50 steps there)",
        {"method": "reward_gradient", "reward_gradient": {"kind": "last_steps", "steps": [1, 10]}},
    ),
}
"""Name -> (paper, keys that it fills in)."""
