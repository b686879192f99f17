"""What the processes of `tests.forks` have imported when they begin."""

import gc

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # every engine of DeepSpeed does, in seconds
import diffusers
import numpy  # noqa: F401
import peft  # noqa: F401
import pytest  # noqa: F401  # the main module of the tests, which multiprocessing imports everywhere
import sklearn.calibration  # rewards of digits do, in seconds
import sklearn.datasets
import sklearn.svm  # noqa: F401
import torch._dynamo  # noqa: F401  # every optimiser does
import transformers

import unified_rl.cli
import unified_rl.engine.deepspeed
import unified_rl.policies.action
import unified_rl.policies.causal_lm
import unified_rl.policies.diffusion
import unified_rl.policies.image_tokens
import unified_rl.policies.masked_diffusion
import unified_rl.train  # noqa: F401

# What the shipped checkpoints are made of, which both libraries import when it is asked for.
PIPELINES = ("AmusedPipeline", "StableDiffusion3InpaintPipeline", "StableDiffusion3Pipeline", "StableDiffusionPipeline")
MODELS = ("Idefics3ForConditionalGeneration", "Idefics3Processor", "JanusForConditionalGeneration", "JanusProcessor")
for library, names in ((diffusers, (*PIPELINES, "AutoencoderTiny")), (transformers, MODELS)):
    for name in names:
        getattr(library, name)

gc.collect()
gc.freeze()  # a collection in a process need not look at all that was imported
