"""One block's linear layers, rounded by a recipe's method."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from attending.errors import UsageError
from attending.model.decoder import Block
from attending.model.quantized import Layer, Quantized, stored_shapes
from attending.quantize import signed
from attending.quantize.export import pack_layer
from attending.quantize.gptq import Hessian, Solved, solve
from attending.quantize.grid import Quantised, Steps
from attending.quantize.recipe import QuantizeConfig
from attending.quantize.signed import Start
from attending.quantize.stream import STAGES, Stream

Told = Callable[[int], object]
"""Given steps done of a block's."""


class _ReachedError(Exception):
    """The inputs were seen; what follows in the block need not run."""


def of_block(
    config: QuantizeConfig,
    stream: Stream,
    block: Block,
    names: Sequence[str],
    inputs: Tensor,
    targets: Tensor,
    tell: Told,
) -> dict[str, Quantised]:
    """Round some of a block's linear layers; GPTQ leaves the block's own weights rounded.

    Args:
        config: How.
        stream: That the block is of.
        block: Filled.
        names: Of the layers within it.
        inputs: [S, L, D], what the rounded blocks before give.
        targets: [S, L, D], what the block gives in full precision on the float ones' outputs.
        tell: Called with the steps done.

    Raises:
        UsageError: A Hessian has no factor, or an output is not finite.
    """
    grid, search = config.grid, config.search
    modules: dict[str, nn.Linear] = {name: _linear(block, name) for name in names}
    if not (config.by_gptq or config.by_signs):
        return {n: grid.plain(m.weight, None, search) for n, m in modules.items()}
    starts: dict[str, Start] = {}
    if config.by_gptq:
        found, starts = _by_gptq(config, stream, block, modules, inputs)
        if not config.by_signs:
            return found
    told = config.signed.replace(range_rate=0.0) if starts else config.signed
    return signed.fit(
        block,
        stream.forward(block),
        inputs.to(stream.device),
        targets.to(stream.device),
        names,
        grid,
        told,
        seed=config.seed,
        starts=starts,
        search=search,
        progress=lambda step, _: tell(step),
    ).layers


def of_head(config: QuantizeConfig, weight: Tensor, hidden: Tensor) -> Quantised:
    """The output head [V, D] on what it reads [S, L, D]; by GPTQ unless the method is plain."""
    if config.method == "plain":
        return config.grid.plain(weight, None, config.search)
    hessian = Hessian(weight.shape[1], device=weight.device)
    for part in hidden:
        hessian.add(part.to(weight.device))
    return _solve(config, "lm_head", weight, hessian.matrix()).quantised


def pack(config: QuantizeConfig, name: str, found: Quantised) -> dict[str, Tensor]:
    """What is written of a layer, by full name."""
    middle, scheme = 1 << config.bits - 1, config.scheme
    values, scales, zeros, groups = (part.cpu().numpy() for part in found)
    in_order = np.array_equal(groups, np.arange(len(groups)) // (len(groups) // scales.shape[1]))
    layer = Quantized(
        config.bits,
        config.group,
        (values.astype(np.int16) - middle).astype(np.int8),
        scales.astype(np.float16),
        None if scheme.symmetric else (zeros - middle).astype(np.int8),
        None if in_order else groups.astype(np.int32),
    )
    return pack_layer(name, layer, config.form)


def read(
    config: QuantizeConfig, name: str, shape: tuple[int, int], parts: Mapping[str, Tensor]
) -> Tensor:
    """The weight [N, K] that any reader of the folder makes of what is written."""
    return torch.from_numpy(unpack(config, name, shape, parts).dequantise())


def unpack(
    config: QuantizeConfig, name: str, shape: tuple[int, int], parts: Mapping[str, Tensor]
) -> Quantized:
    """What is written of a layer [N, K], read again."""
    shapes = stored_shapes(config.form, config.scheme, *shape)
    named = {name + part: size for part, size in shapes.items()}
    arrays = {part: parts[part].numpy() for part in named}
    return Layer(name, config.form, config.scheme, shape, named).read(arrays)


def _by_gptq(
    config: QuantizeConfig,
    stream: Stream,
    block: Block,
    modules: Mapping[str, nn.Linear],
    inputs: Tensor,
) -> tuple[dict[str, Quantised], dict[str, Start]]:
    """Stage by stage: each one's inputs come from the rounded layers before it.

    Starts, for signed rounding to go on from, only where it will.
    """
    found: dict[str, Quantised] = {}
    starts: dict[str, Start] = {}
    for stage in STAGES:
        chosen = {n: m for n, m in modules.items() if n.rpartition(".")[2] in stage}
        if not chosen:
            continue
        hessian = _hessian(stream, block, next(iter(chosen.values())), inputs)
        for name, module in chosen.items():
            found[name], targets = _solve(config, name, module.weight, hessian)
            if config.by_signs:
                starts[name] = Start(targets, Steps(found[name].scales, found[name].zeros))
            module.weight = nn.Parameter(found[name].weight(), requires_grad=False)
    return found, starts


@torch.no_grad()
def _hessian(stream: Stream, block: Block, module: nn.Linear, inputs: Tensor) -> Tensor:
    """Of what a layer of the block reads; what comes behind it is not computed."""
    hessian = Hessian(module.in_features, device=stream.device)

    def add(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        hessian.add(given[0])
        raise _ReachedError

    hook, forward = module.register_forward_pre_hook(add), stream.forward(block)
    try:
        for part in torch.split(inputs, stream.batch):
            try:
                forward(part.to(stream.device))
            except _ReachedError:
                continue
    finally:
        hook.remove()
    return hessian.matrix()


def _solve(config: QuantizeConfig, name: str, weight: Tensor, hessian: Tensor) -> Solved:
    try:
        return solve(
            weight,
            hessian,
            config.grid,
            act_order=config.act_order,
            static_groups=config.static_groups,
            damping=config.damping,
            search=config.search,
        )
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None


def _linear(block: Block, name: str) -> nn.Linear:
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module
