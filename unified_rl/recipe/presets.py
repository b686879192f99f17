"""Objective presets: a name, its paper, and the keys of `objective` that it fills in; keys given in a recipe win."""

from typing import Any

from unified_rl.recipe.method_presets import METHOD_PRESETS

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
    "gspo_token": (
        "Zheng et al. 2025, Group Sequence Policy Optimization, arXiv 2507.18071, section 4.3",
        {"ratio": "sequence_token", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "sequence_mean"},
    ),
    "dapo": (
        "Yu et al. 2025, DAPO, arXiv 2503.14476 (its dynamic sampling is the recipe's `resample`)",
        {"advantage": "group_std", "clip_low": 0.2, "clip_high": 0.28, "aggregation": "token_mean"},
    ),
    "rloo": (
        "Ahmadian et al. 2024, Back to Basics, arXiv 2402.14740",
        {
            "advantage": "rloo",
            "ratio": "none",
            "loss": "reinforce",
            "aggregation": "sequence_sum",
            "kl": {"coef": 0.05, "estimator": "k1", "place": "reward"},
        },
    ),
    "reinforce++": (
        "Hu et al. 2025, REINFORCE++, arXiv 2501.03262 (KL and whitening a sample, not a token)",
        {
            "advantage": "batch_whitened",
            "aggregation": "token_mean",
            "kl": {"coef": 0.01, "estimator": "k1", "place": "reward"},
        },
    ),
    "reinforce++_baseline": (
        "Hu et al. 2025, REINFORCE++, arXiv 2501.03262 (whitening a sample, not a token)",
        {
            "advantage": "group_whitened",
            "aggregation": "token_mean",
            "kl": {"coef": 0.01, "estimator": "k2", "place": "loss"},
        },
    ),
    "ppo": (
        "Schulman et al. 2017, Proximal Policy Optimization, arXiv 1707.06347 (its epochs are the recipe's)",
        {
            "advantage": "gae",
            "loss": "clip",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "aggregation": "token_mean",
            "critic": {"gamma": 1.0, "gae_lambda": 0.95, "value_coef": 0.5, "value_clip": 0.2},
        },
    ),
    "gdpo": (
        "Liu et al. 2026, GDPO, arXiv 2601.05242",
        {"advantage": "gdpo", "aggregation": "token_mean"},
    ),
    "drpo": (
        "Tencent-Hunyuan/UniRL, algorithms/drpo.py; spo_adaptive_eps in verl",
        {"advantage": "group_std", "loss": "drpo", "penalty_range": 12.5, "aggregation": "token_mean"},
    ),
    "spo": (
        "Xie et al. 2024, Simple Policy Optimization, arXiv 2401.16025",
        {"advantage": "group_std", "loss": "spo", "penalty_range": 0.2, "aggregation": "token_mean"},
    ),
    "ddpo": (
        "Black et al. 2023, DDPO, arXiv 2305.13301",
        {
            "advantage": "prompt_std",
            "prompt_buffer": 32,
            "prompt_min_count": 16,
            "std_eps": 1e-6,
            "population_std": True,
            "advantage_clip": 5.0,
            "clip_low": 1e-4,
            "clip_high": 1e-4,
        },
    ),
    "dance_grpo": (
        "Xue et al. 2025, DanceGRPO, arXiv 2505.07818 (its sampler is not part of an objective)",
        {"advantage": "group_std", "std_eps": 1e-8, "advantage_clip": 5.0, "clip_low": 1e-4, "clip_high": 1e-4},
    ),
    "flow_grpo_fast": (
        "Liu et al. 2025, Flow-GRPO-Fast, arXiv 2505.05470 (public configurations)",
        {
            "advantage": "global_std",
            "advantage_clip": 5.0,
            "clip_low": 1e-5,
            "clip_high": 1e-5,
        },
    ),
    "mix_grpo": (
        "Li et al. 2025, MixGRPO, arXiv 2507.21802",
        {"advantage": "group_std", "std_eps": 1e-8, "advantage_clip": 5.0, "clip_low": 1e-4, "clip_high": 1e-4},
    ),
    "bicot_grpo": (
        "Jiang et al. 2025, T2I-R1, arXiv 2505.00703 (a text first, then the picture; a mean over steps for each)",
        {"advantage": "group_std", "aggregation": "token_mean", "kl": {"coef": 0.01, "estimator": "k3"}},
    ),
    "uni_grpo": (
        "Yang et al. 2025, UniGRPO of MMaDA, arXiv 2505.15809 (the weight of the divergence is ours)",
        {"advantage": "group_std", "aggregation": "token_mean", "kl": {"coef": 0.01, "estimator": "k3"}},
    ),
    "grpo_guard": (
        "Wang et al. 2025, GRPO-Guard, arXiv 2510.22319 (without its weight 1 / dt of a step, as in Flow-Factory)",
        {"advantage": "global_std", "advantage_clip": 5.0, "loss": "guard", "clip_low": 2e-6, "clip_high": 2e-6},
    ),
    "flow_dppo": (
        "Ping et al. 2026, Flow-DPPO, arXiv 2606.11025",
        {"advantage": "global_std", "advantage_clip": 5.0, "loss": "dppo", "max_divergence": 1e-5},
    ),
    **METHOD_PRESETS,
    "luspo": (
        "the clip loss of GSPO, each sequence weighted by its length, as in TRL 1.16 (loss_type luspo)",
        {"ratio": "sequence", "clip_low": 2e-3, "clip_high": 2.5e-3, "aggregation": "sequence_sum"},
    ),
    "vespo": (
        "VESPO, arXiv 2602.10693",
        {"ratio": "sequence_product", "loss": "vespo", "aggregation": "token_mean"},
    ),
    "trl_grpo": (
        "what GRPOTrainer of TRL 1.16 does by default: loss_type dapo, beta 0",
        {
            "advantage": "group_std",
            "loss": "clip",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "aggregation": "token_mean",
            "kl": {"coef": 0.0, "estimator": "k3"},
        },
    ),
    "trl_rloo": (
        "what RLOOTrainer of TRL 1.16 does by default: exact sequence ratio, clipped; KL in the reward",
        {
            "advantage": "rloo",
            "ratio": "sequence_product",
            "loss": "clip",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "aggregation": "sequence_mean",
            "kl": {"coef": 0.05, "estimator": "k1", "place": "reward"},
        },
    ),
    "verl_ppo": (
        "what verl does by default (adv_estimator gae): gamma and lambda 1, dual clip 3, value clip 0.5",
        {
            "advantage": "gae",
            "loss": "clip",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "dual_clip": 3.0,
            "aggregation": "token_mean",
            "critic": {
                "gamma": 1.0,
                "gae_lambda": 1.0,
                "whiten": True,
                "value_coef": 1.0,
                "value_clip": 0.5,
            },
        },
    ),
    "flow_grpo_code": (
        "what yifan123/flow_grpo computes without a KL: the std of all rewards is numpy's",
        {
            "advantage": "global_std",
            "population_std": True,
            "advantage_clip": 5.0,
            "clip_low": 1e-4,
            "clip_high": 1e-4,
            "kl": {"coef": 0.0},
        },
    ),
    "verl_grpo": (
        "what verl does by default with adv_estimator grpo: token-mean, dual clip 3",
        {
            "advantage": "group_std",
            "std_eps": 1e-6,
            "loss": "clip",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "dual_clip": 3.0,
            "aggregation": "token_mean",
            "kl": {"coef": 0.0, "estimator": "k3"},
        },
    ),
}
"""Name -> (paper, keys that it fills in)."""

SAMPLING_PRESETS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "flow_grpo_fast": (
        ("diffusion",),
        {"noise_place": "branch", "noise_steps": 2, "noise_range": [0, 5], "noise_level": 0.8},
    ),
    "mix_grpo": (
        ("diffusion",),
        {
            "noise_place": "window",
            "noise_steps": 4,
            "noise_shift": {"schedule": "progressive", "every": 25, "stride": 1},
            "noise_level": 0.7,
        },
    ),
    "bicot_grpo": (("image_tokens",), {"think": {}}),
    "uni_grpo": (("masked_diffusion", "masked_text"), {"estimator": "random_mask"}),
}
"""Of presets that are also about how a family samples: the families, and the keys of `policy.sampling`."""

RECIPE_PRESETS: dict[str, dict[str, Any]] = {
    "diffusion_nft": {
        "snapshots": {"old": {"decay": 0.5, "warmup": "linear", "slope": 0.001, "clock": "rollout"}},
        "rollout_weights": "old",
    },
}
"""Of presets that are also about the whole recipe: keys that they fill in beside the objective. `old_weights` of a
recipe that names other weights switches them off."""
