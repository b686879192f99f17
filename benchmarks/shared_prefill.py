"""CPU seconds of a rollout with each prompt computed once, against the model's own `generate` of duplicated prompts
(every row seen by the tower and prefilled), on a small Idefics3.

    python benchmarks/shared_prefill.py [--prompts 2] [--group-size 16] [--new-tokens 16] [--rounds 3]

The model has random weights (9 M parameters), one picture of 128 px a prompt (64 picture tokens). No row ends early in
either path. Prints one JSON object: median seconds of each path, the speed-up, and the largest log-prob difference.
"""

import argparse
import copy
import json
import statistics
import time
from typing import Any

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor, PreTrainedTokenizerFast
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from unified_rl.policies.causal_lm import CausalLMPolicy
from unified_rl.recipe.policy import PolicyBlock, TextSampling
from unified_rl.types import Prompt

VOCABULARY = 300
SIDE = 128
SPECIAL = ["<pad>", "<unk>", "<bos>", "<eos>", "<image>", "<fake_token_around_image>", "<global-img>"]


def make_model() -> Any:
    config = Idefics3Config(
        image_token_id=SPECIAL.index("<image>"),
        scale_factor=2,
        vision_config={
            **{"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 6, "num_attention_heads": 4},
            **{"image_size": SIDE, "patch_size": 8},
        },
        text_config={
            **{"model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512},
            **{"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4},
            **{"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3},
        },
    )
    torch.manual_seed(0)
    return Idefics3ForConditionalGeneration(config)


def make_processor() -> Idefics3Processor:
    words = [*SPECIAL, *(chr(0x4E00 + index) for index in range(VOCABULARY - len(SPECIAL)))]
    engine = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    engine.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=engine,
        **{"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"},
        extra_special_tokens=SPECIAL[4:],
    )
    pictures = Idefics3ImageProcessorPil(
        size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=False
    )
    return Idefics3Processor(pictures, tokenizer, image_seq_len=(SIDE // 8 // 2) ** 2)


def make_prompts(num: int, group_size: int) -> list[Prompt]:
    """Groups with pictures never seen before: those of an earlier round would be found in a policy's memory."""
    text = "<image>" + "".join(chr(0x4E00 + index) for index in range(20))
    prompts = []
    for group in range(num):
        image = Image.effect_noise((SIDE, SIDE), 60).convert("RGB")
        prompts += [
            Prompt(text=text, images=(image,), columns={}, group_id=group, seed=100 * group + member)
            for member in range(group_size)
        ]
    return prompts


def timed(policy: CausalLMPolicy, prompts: list[Prompt], share: bool) -> tuple[float, torch.Tensor]:
    """CPU seconds of one rollout (on one thread), and its log-probs."""
    policy.shares_prefill = share
    started = time.process_time()
    trajectory = policy.sample(prompts)
    return time.process_time() - started, trajectory.segments["text"].rollout_log_probs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sampling = TextSampling(max_new_tokens=arguments.new_tokens, chat_template=False)
    model = make_model()
    policies = []
    for train in (None, ["."]):  # a tower that is trained is never remembered, and sees each of the duplicates
        block = PolicyBlock(model="-", family="causal_lm", sampling=sampling, train=train)
        policies.append(CausalLMPolicy(copy.deepcopy(model), make_processor(), block))
        policies[-1]._words.ends = [VOCABULARY]  # beyond the vocabulary: no row ends, all decode equally many tokens
        policies[-1].module.generation_config.eos_token_id = [VOCABULARY]
    pairs = []
    for _ in range(arguments.rounds):
        prompts = make_prompts(arguments.prompts, arguments.group_size)
        pairs.append((timed(policies[0], prompts, True), timed(policies[1], prompts, False)))
    shared = statistics.median(one[0] for one, _ in pairs)
    plain = statistics.median(one[0] for _, one in pairs)
    gap = max(float((ours[1] - theirs[1]).abs().max()) for ours, theirs in pairs)
    row = {"shared_s": round(shared, 3), "plain_s": round(plain, 3), "speed_up": round(plain / shared, 2), "gap": gap}
    print(json.dumps({**vars(arguments), **row}))


if __name__ == "__main__":
    main()
