"""How a model under test is asked in a conversation, and what is kept of its reply."""

from typing import Any

from attending.endpoint import Endpoint, Reply
from attending.evaluate.recipe import SamplingConfig
from attending.evaluate.sample import Answer, Example


async def chat(
    endpoint: Endpoint, sampling: SamplingConfig, example: Example, repeat: int
) -> Answer:
    """The answer to the example's messages, after the system message if there is one."""
    system = [{"role": "system", "content": sampling.system}] if sampling.system else []
    asked = {"temperature": sampling.temperature, "max_tokens": sampling.max_tokens}
    asked |= {"top_p": sampling.top_p} if sampling.top_p is not None else {}
    asked |= {"seed": sampling.seed + repeat} if sampling.temperature else {}
    reply = await endpoint.chat([*system, *example.messages], **asked, **sampling.extra)
    thoughts = f"<think>\n{reply.reasoning}\n</think>\n\n" if reply.reasoning else ""
    return answered(example, repeat, reply, thoughts + reply.text)


def answered(example: Example, repeat: int, reply: Reply, text: str, **more: Any) -> Answer:
    """An answer with its reply's counts."""
    counts = reply.finish_reason, reply.input_tokens, reply.output_tokens
    return Answer(example.id, repeat, text, *counts, **more)
