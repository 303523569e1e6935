"""`--dry-run`: what a recipe takes, with the arithmetic; prompts are counted, not answered."""

import math
from typing import Any

from attending.draft import data
from attending.draft.recipe import DraftConfig
from attending.model.architecture import Architecture, parse_config
from attending.model.eagle_files import EagleConfig, eagle_config
from attending.model.files import read_config
from attending.sources import resolve
from attending.train.plan import GIB, flops
from attending.train.rows import require_even

MAPS = ("d2t", "t2d")


def operations(
    target: Architecture, draft: EagleConfig, config: DraftConfig, answers: float = 1.0
) -> tuple[float, float]:
    """Of a token: the target's pass forward, where it is looked at; the draft's there and back.

    `answers`: share of tokens that are an answer's. Only these are compared, and only their slots
    go on after the first step.
    """
    shapes, slots = draft.tensor_shapes(), 1 + (config.unroll - 1) * answers
    sizes = {name: math.prod(shape) for name, shape in shapes.items() if len(shape) == 2}
    features, head = sizes.pop("fc.weight"), sizes.pop("lm_head.weight")
    products = features + slots * sum(sizes.values()) + config.unroll * answers * head
    [spec] = draft.arch.layers
    attention = 6 * spec.num_heads * spec.head_dim * config.context * slots
    forward = flops(target, [config.context]) / config.context / 3
    return forward, 6.0 * products + attention


def estimate(config: DraftConfig) -> dict[str, Any]:
    """Memory and time, on the hardware that the recipe assumes."""
    require_even(config.batch, config.context, 1, "training a draft")
    shape, head, assumed = config.assumed.shape, config.head, config.assumed
    target = parse_config(shape) if shape else read_config(resolve(config.model).path)
    size = min(head.vocabulary, target.vocab_size)
    inner = head.intermediate_size
    draft = eagle_config(target, size, gated=head.gated, intermediate_size=inner)
    shapes = draft.tensor_shapes()
    own = sum(math.prod(shape) for name, shape in shapes.items() if name not in MAPS)
    questions = list(data.prompts(config))
    tokens = sum(min(one.sampling["max_tokens"], config.context) for one in questions)
    looks = 1 / max(1.0, config.epochs) if config.keep_features else 1.0
    look, own_steps = operations(target, draft, config)
    each = looks * look + own_steps
    kept = 6 * target.hidden_size + 12 + 6 * min(config.shares, target.vocab_size)
    rate = assumed.peak_tflops * 1e12 * assumed.share_of_peak
    micro = config.batch.micro_tokens
    spec = draft.arch.layers[0]
    memory = {
        "target_gib": 4 * target.num_parameters() / GIB,
        "draft_gib": 16 * own / GIB,
        "shares_gib": 4 * micro * size / GIB,
        "scores_gib": 8 * config.unroll * spec.num_heads * micro * config.context / GIB,
    }
    return {
        "draft_parameters": own,
        "written_mib": round(own * (2 if head.dtype == "bfloat16" else 4) / 2**20, 1),
        "prompts": len(questions),
        "answer_tokens_at_most": tokens,
        "kept_features_gib_of_full_answers": round(config.keep_features * tokens * kept / GIB, 2),
        "memory": {name: round(size, 3) for name, size in memory.items()}
        | {"fits": sum(memory.values()) <= assumed.memory_gib},
        "memory_arithmetic": (
            "target 4 B x parameters; draft 16 B x parameters (gradients, AdamW); the target's "
            "shares of the draft's tokens 4 B x micro_tokens x vocabulary; attention's scores 8 B "
            "x steps x heads x micro_tokens x context"
        ),
        "flops_per_token": each,
        "hours_of_full_answers": round(config.epochs * tokens * each / rate / 3600, 3),
        "time_arithmetic": (
            "epochs x answers of full length x FLOP per token / (assumed.peak_tflops x "
            "share_of_peak); prompts are rows, too, and are not in it nor among what is kept (6 B "
            "x hidden_size + 12 B + 6 B x shares a token); that the target writes its answers "
            "comes before"
        ),
        "assumed": assumed.model_dump(),
    }
