"""Any endpoint, or a model of this machine, as a model of lm-evaluation-harness.

    python -m attending.evaluate.lm_eval_model run --model attending --model_args model=default ...

Its tasks then run as they are. A text's first token is given, not predicted, where the server puts
none before it; texts longer than the context are refused, not cut.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from attending import endpoint as endpoints
from attending.endpoint import Endpoint, EndpointOptions, Reply
from attending.errors import UsageError
from attending.evaluate.tasks.likelihood import following, score

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ModuleNotFoundError:
    raise UsageError(
        "this needs lm-evaluation-harness: pip install -e '.[harness]' in the clone"
    ) from None

T = TypeVar("T")
GIVEN = {"batch_size", "max_batch_size", "device"}  # to every model
TAKEN = {"until", "max_gen_toks", "do_sample"}
MAX_STOPS = 4  # that hosted endpoints take; the answer is cut at all of them


class Chat(str):
    """A conversation as JSON, which the endpoint's own template renders."""

    __slots__ = ()


@register_model("attending")
class AttendingLM(LM):
    """`model` is what `attending.endpoint.open` takes; it is opened for each kind of request."""

    def __init__(self, model: str, model_id: str = "", max_gen_toks: int = 256, **how: Any) -> None:
        """`how`: fields of `EndpointOptions`; batch size and device are not used."""
        super().__init__()
        self._name, self._id, self._most = model, model_id, max_gen_toks
        own = {key: value for key, value in how.items() if key not in GIVEN}
        self._options = EndpointOptions.build(own)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Sums of log-probabilities (nats), and whether greedy decoding would write the same."""
        counted: dict[str, asyncio.Future[tuple[dict[str, float], Reply]]] = {}

        async def one(endpoint: Endpoint, context: str, ending: str) -> tuple[float, bool]:
            if isinstance(context, Chat):
                raise UsageError("log-likelihoods have no chat: leave out --apply_chat_template")
            prompt, text = context.rstrip(), context + ending  # tokens begin with their spaces
            if prompt and prompt not in counted:
                counted[prompt] = asyncio.ensure_future(following(endpoint, prompt))
            tokens = (await counted[prompt])[1].input_tokens if prompt else 0
            found = await score(endpoint, text, prompt, tokens)
            return found.total, found.is_greedy

        return self._run("loglikelihood", requests, one)

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Sums of log-probabilities (nats) of whole texts."""

        async def one(endpoint: Endpoint, text: str) -> float:
            return (await score(endpoint, text)).total

        return self._run("loglikelihood_rolling", requests, one)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Written answers, each cut before the first of its stops."""

        async def one(endpoint: Endpoint, context: str, given: dict[str, Any]) -> str:
            until = given.get("until") or []
            stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
            left = {key: value for key, value in given.items() if key not in TAKEN}
            how = {"temperature": 0.0, "max_tokens": given.get("max_gen_toks", self._most)} | left
            how |= {} if given.get("do_sample", True) else {"temperature": 0.0}
            how |= {"stop": stops[:MAX_STOPS]} if stops else {}
            ask: Any = endpoint.chat if isinstance(context, Chat) else endpoint.complete
            asked = json.loads(context) if isinstance(context, Chat) else context
            text: str = (await ask(asked, **how)).text
            for stop in stops:
                text = text.partition(stop)[0]
            return text

        return self._run("generate_until", requests, one)

    def apply_chat_template(self, chat_history: list[Any], **_: Any) -> str:
        """The conversation as it is."""
        return Chat(json.dumps(chat_history))

    @property
    def tokenizer_name(self) -> str:
        """Whose chat template it is."""
        return self._name

    def _run(self, kind: str, requests: Sequence[Any], one: Callable[..., Awaitable[T]]) -> list[T]:
        async def run() -> list[T]:
            opened = endpoints.open(self._name, model_id=self._id, options=self._options)
            async with opened as endpoint:
                return await asyncio.gather(*(one(endpoint, *each.args) for each in requests))

        found = asyncio.run(run())
        for each, value in zip(requests, found, strict=True):
            self.cache_hook.add_partial(kind, each.args, value)
        return found


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
