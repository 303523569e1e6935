"""How a model under test is asked in a conversation."""

from attending.endpoint import Endpoint
from attending.evaluate.recipe import SamplingConfig
from attending.evaluate.sample import Answer, Example


async def chat(
    endpoint: Endpoint, sampling: SamplingConfig, example: Example, repeat: int
) -> Answer:
    """The answer to the example's messages, after the system message if there is one."""
    system = [{"role": "system", "content": sampling.system}] if sampling.system else []
    more = {} if sampling.top_p is None else {"top_p": sampling.top_p}
    reply = await endpoint.chat(
        [*system, *example.messages],
        temperature=sampling.temperature,
        max_tokens=sampling.max_tokens,
        seed=sampling.seed + repeat,
        **more,
        **sampling.extra,
    )
    usage = reply.finish_reason, reply.input_tokens, reply.output_tokens
    return Answer(example.id, repeat, reply.text, *usage)
