"""What the processes of `tests.forks` have imported when they begin."""

import diffusers  # noqa: F401
import numpy  # noqa: F401
import peft  # noqa: F401
import pytest  # noqa: F401  # the main module of the tests, which multiprocessing imports everywhere
import transformers  # noqa: F401

import unified_rl.cli
import unified_rl.engine.deepspeed
import unified_rl.policies.causal_lm
import unified_rl.policies.diffusion
import unified_rl.train  # noqa: F401
