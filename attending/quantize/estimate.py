"""`--dry-run`: what a recipe takes, with the arithmetic; only the model's configuration is read."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from attending.model.architecture import Architecture, parse_config
from attending.model.files import read_config
from attending.model.quantized import require_float, stored_shapes
from attending.model.scoring import CHUNK, CPU_CHUNK
from attending.quantize.distill import watched
from attending.quantize.recipe import QuantizeConfig
from attending.quantize.rotate import rotated
from attending.quantize.stream import HEAD, Shapes, matched, stage_of
from attending.sources import resolve
from attending.train.plan import GIB, flops, kept_per_token

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
STORED = {".scales": 2, ".weight_scale": 2, ".s_group": 2, ".weight_shape": 8}  # others: 4 bytes
SHARD = 5_000_000_000  # of a file that is written, in memory for a moment
HESSIANS = 8  # K^2 float32 at once: the sum, its mean, in order, damped, flipped, factor, eye, root
SOLVED = 17  # bytes a weight: what is left (4), targets (4 + 4), integers (1), the result (4)
FITTED = 48  # bytes a weight: offset and eight intermediates (4 each), gradients, three candidates
LEARNT = 24  # bytes a scale: itself, its factor, gradient, two moments, the update
ROUNDED = 24  # bytes a weight of plain rounding: quotients, integers, the result


class Memory(NamedTuple):
    """Bytes at the peak of each phase; the largest sum is what is needed."""

    activations: int
    """Both streams' inputs of a block."""
    block: int
    """Its weights in float32."""
    rounding: int
    """What the method needs, of the widest layer or, for signed rounding, of the block."""
    passes: int
    """What a forward pass, or forward and backward, of one batch keeps."""
    distillation: int
    """The model in integers, what its scales take, inputs and the teacher's states, a step."""
    gate: int
    """Both heads, hidden states, a chunk's logits."""
    writing: int
    """A shard of the folder."""

    @property
    def total(self) -> int:
        """The largest phase."""
        return max(sum(self[:4]), self.distillation, self.block + self.gate, self.writing)


def estimate(config: QuantizeConfig) -> dict[str, Any]:
    """Memory, time and size, on the hardware that the recipe assumes."""
    shape, assumed = config.assumed.shape, config.assumed
    arch = parse_config(shape) if shape else read_config(resolve(config.model).path)
    require_float(arch, config.model)
    arch = rotated(arch) if config.rotate else arch
    layers = matched(arch, config.layers, config.head, config.scheme, config.form)
    need, work = memory(arch, config, layers), operations(arch, config, layers)
    size = output_bytes(arch, config, layers)
    seconds = work / (assumed.devices * assumed.peak_tflops * 1e12 * assumed.share_of_peak)
    gib = {f"{name}_gib": round(value / GIB, 3) for name, value in need._asdict().items()}
    return {
        "parameters": arch.num_parameters(),
        "layers": len(layers),
        "memory": {
            **gib,
            "total_gib": round(need.total / GIB, 3),
            "fits": need.total / GIB <= assumed.memory_gib,
            "arithmetic": (
                "the largest of rounding (activations + block + rounding + passes), distillation, "
                "gate and writing; activations: 2 x samples x length x hidden x 4 B; rounding: "
                f"{HESSIANS} x inputs^2 x 4 B and {SOLVED} B a weight of the widest layer (GPTQ), "
                f"{FITTED} B a weight of the block (signed); distillation: the integers, "
                f"{LEARNT} B a scale, and a step's activations and weights. The process itself "
                "(some 0.3 GiB of torch) and files that the system caches are not counted"
            ),
        },
        "time": {
            "hours": round(seconds / 3600, 3),
            "arithmetic": (
                f"{work / 1e12:,.1f} TFLOP of products: two passes of the calibration text through "
                "all blocks, the method's own, two of the evaluation text; replies, the gate's "
                "suite and writing are not counted"
            ),
            "assumed": assumed.model_dump(),
        },
        "output": {
            "gib": round(size / GIB, 3),
            "bits_a_parameter": round(8 * size / arch.num_parameters(), 3),
        },
    }


def memory(arch: Architecture, config: QuantizeConfig, layers: Shapes) -> Memory:
    """Of one process; see `Memory`."""
    told = config.calibration
    kept = max(kept_per_token(arch, index) for index in range(len(arch.layers)))
    passes = 4 * kept * min(config.batch, told.samples) * told.length
    rounding = max(ROUNDED * math.prod(shape) for shape in layers.values())
    if solved := _solved(config, layers):
        rounding = max(
            4 * HESSIANS * k * k + SOLVED * n * k + (4 * n * k if name == HEAD else 0)
            for name, (n, k) in solved.items()
        )
    if config.by_signs:
        fitted = FITTED * max(_by_block(arch, layers))
        rounding = max(rounding, fitted) if solved else fitted
        batch = min(config.signed.batch, told.samples)
        passes = max(passes, 2 * 4 * kept * batch * told.length)
    chunk = CPU_CHUNK if config.device == "cpu" else CHUNK
    hidden = told.evaluation * told.length * arch.hidden_size
    return Memory(
        activations=2 * 4 * told.samples * told.length * arch.hidden_size,
        block=4 * max(_by_block(arch, arch.tensor_shapes())),
        rounding=rounding,
        passes=passes,
        distillation=_distillation(arch, config, layers),
        gate=4
        * (2 * hidden + 2 * arch.vocab_size * arch.hidden_size + 6 * chunk * arch.vocab_size),
        writing=min(SHARD, output_bytes(arch, config, layers)),
    )


def _distillation(arch: Architecture, config: QuantizeConfig, layers: Shapes) -> int:
    """Bytes; without `recompute` every block's activations and weights are there at once."""
    told, how = config.calibration, config.distill
    if not how.epochs:
        return 0
    tokens = min(how.batch, told.samples) * told.length
    inner = {name: shape for name, shape in layers.items() if name != HEAD}
    weights, widest = (one(map(math.prod, inner.values())) for one in (sum, max))
    scales = sum(n * (k // config.group if config.group > 0 else 1) for n, k in inner.values())
    every = _by_block(arch, arch.tensor_shapes())
    width = WIDTHS[arch.dtype if config.floats == "stored" else config.floats]
    kept = [4 * tokens * kept_per_token(arch, index) + 4 * size for index, size in enumerate(every)]
    inputs = 4 * len(kept) * tokens * arch.hidden_size
    heads = 2 if config.head or config.floats != "stored" else 1
    chunk = CPU_CHUNK if config.device == "cpu" else CHUNK
    return (
        weights * (2 if config.bits == 8 and not config.symmetric else 1)
        + width * (sum(every) - weights)
        + LEARNT * scales
        + 2 * 4 * told.samples * told.length * arch.hidden_size
        + 4 * arch.vocab_size * (heads * arch.hidden_size + 6 * chunk)
        + 8 * widest
        + (max(kept) + inputs if how.recompute else sum(kept))
    )


def operations(arch: Architecture, config: QuantizeConfig, layers: Shapes) -> float:
    """FLOP of all products."""
    told, length = config.calibration, config.calibration.length
    head = 2.0 * arch.vocab_size * arch.hidden_size
    through = flops(arch, [length]) / 3 - head * length  # of a sample, the blocks alone
    total = 2 * told.samples * through + 2 * told.evaluation * (through + head * length)
    if config.by_gptq:
        total += 2.5 * told.samples * through  # up to each stage's inputs
    solved = _solved(config, layers)
    inputs = {n.rpartition(".")[0] + str(stage_of(n)): k for n, (_, k) in solved.items()}
    total += sum(2.0 * told.samples * length * k * k for k in inputs.values())
    total += sum(k**3 + 1.0 * n * k * k for n, k in solved.values())
    if config.by_signs:
        batch = min(config.signed.batch, told.samples)
        compared = min(config.signed.compared, told.samples)
        total += through * (3 * config.signed.steps * batch + 3 * compared)
    how, kept = config.distill, watched(told.samples)
    if how.epochs:
        seen = how.steps(told.samples) * min(how.batch, told.samples - kept)
        total += seen * (through * (4 if how.recompute else 3) + 3 * head * length)
        total += 2 * kept * (through + 2 * head * length)
    return total


def output_bytes(arch: Architecture, config: QuantizeConfig, layers: Shapes) -> int:
    """Of the folder's tensors."""
    dtype = arch.dtype if config.floats == "stored" else config.floats
    total = 0
    for name, shape in arch.tensor_shapes().items():
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None:
            total += WIDTHS[dtype] * math.prod(shape)
            continue
        parts = stored_shapes(config.form, config.scheme, *layer)
        parts |= {".g_idx": layer[1:]} if config.form == "gptq" else {}
        total += sum(STORED.get(part, 4) * math.prod(stored) for part, stored in parts.items())
    return total


def _solved(config: QuantizeConfig, layers: Shapes) -> Shapes:
    """What GPTQ rounds: all by its methods; of others but plain rounding, the head."""
    if config.method == "plain":
        return {}
    return {name: shape for name, shape in layers.items() if config.by_gptq or name == HEAD}


def _by_block(arch: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> list[int]:
    """Weights of each block among some tensors."""
    sizes = [0] * len(arch.layers)
    for name, shape in shapes.items():
        if name.startswith("model.layers."):
            sizes[int(name.split(".")[2])] += math.prod(shape)
    return sizes
