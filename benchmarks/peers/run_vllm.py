"""vLLM on a CPU, offline. MODEL is a Hugging Face folder; VARIANT is the type that computes."""

import vllm
from measuring import Engine, Prompts, main


def load(model: str, threads: int, variant: str) -> Engine:
    engine = vllm.LLM(
        model,
        dtype=variant,
        max_model_len=2048,
        enable_prefix_caching=False,
        disable_log_stats=True,
        skip_tokenizer_init=True,
    )

    def generate(prompts: Prompts, new_tokens: int, sampled: bool) -> list[int]:
        options = {"temperature": 0.7, "top_p": 0.9} if sampled else {"temperature": 0.0}
        params = vllm.SamplingParams(
            max_tokens=new_tokens, ignore_eos=True, detokenize=False, **options
        )
        texts = [{"prompt_token_ids": ids} for ids in prompts]
        found = engine.generate(texts, params, use_tqdm=False)
        return [len(result.outputs[0].token_ids) for result in found]

    path = f"{variant}, or the checkpoint's own quantisation"
    return Engine(generate, f"vllm {vllm.__version__}", path)


if __name__ == "__main__":
    main(load)
