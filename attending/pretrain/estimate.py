"""`--dry-run`: what a recipe takes, with the arithmetic; nothing is read but the recipe."""

from typing import Any

from attending.model.architecture import Architecture, parse_config
from attending.model.scoring import CHUNK
from attending.pretrain.recipe import PretrainConfig
from attending.pretrain.setup import check_rows
from attending.train.plan import GIB, flops, memory

DAY = 86_400


def estimate(config: PretrainConfig) -> dict[str, Any]:
    """Memory of a rank and time, on the hardware that the recipe assumes."""
    arch, assumed = parse_config(config.model), config.assumed
    check_rows(config, assumed.devices)
    half = config.compute.precision == "bfloat16"
    need = memory(
        arch,
        config.batch.micro_tokens,
        assumed.devices,
        half=half,
        recompute=config.compute.recompute,
    )
    rate = assumed.devices * assumed.peak_tflops * 1e12 * assumed.share_of_peak
    rows, seconds = [], 0.0
    for stage, phase in zip(config.stages, config.phases, strict=True):
        tokens = phase.steps * config.batch.tokens
        per_token = flops(arch, [stage.context]) / stage.context
        seconds += tokens * per_token / rate
        rows.append(
            {
                "name": stage.name,
                "steps": phase.steps,
                "tokens": tokens,
                "rows_per_step": config.rows_at(stage),
                "flops_per_token": per_token,
                "days": round(tokens * per_token / rate / DAY, 4),
            }
        )
    gib = {f"{name}_gib": round(size / GIB, 3) for name, size in need._asdict().items()}
    per_pass = config.batch.micro_tokens * assumed.devices
    return {
        "parameters": arch.num_parameters(),
        "stages": rows,
        "steps": config.num_steps,
        "warmup_steps": config.warmup_steps,
        "passes_per_step_and_rank": config.batch.tokens / per_pass,
        "memory_per_rank": {
            **gib,
            "total_gib": round(need.total / GIB, 3),
            "fits": need.total / GIB <= assumed.memory_gib,
            "arithmetic": _memory_text(arch, config),
        },
        "time": {
            "days": round(seconds / DAY, 4),
            "hours": round(seconds / 3600, 3),
            "arithmetic": (
                f"tokens x FLOP per token / ({assumed.devices} devices x {assumed.peak_tflops} "
                f"TFLOP/s x {assumed.share_of_peak} of it); each row as one document: shorter ones "
                "take less attention"
            ),
            "assumed": assumed.model_dump(),
        },
    }


def _memory_text(arch: Architecture, config: PretrainConfig) -> str:
    ranks, tokens = config.assumed.devices, config.batch.micro_tokens
    kept = "the blocks' inputs and one block's" if config.compute.recompute else "what blocks keep"
    return (
        f"weights 4 B, gradients 4 B and AdamW 8 B x {arch.num_parameters():,} parameters / "
        f"{ranks} ranks; gathered: two blocks and the head's unit whole, and gradients; "
        f"activations: {kept} of {tokens:,} tokens; head: copies of its weight, {CHUNK:,} tokens' "
        "logits"
    )
