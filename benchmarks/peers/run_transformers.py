"""transformers: pip install torch transformers. MODEL is a Hugging Face folder."""

import torch
import transformers
from measuring import Engine, Prompts, main


def load(model: str, threads: int, variant: str) -> Engine:
    torch.set_num_threads(threads)
    decoder = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    @torch.inference_mode()
    def generate(prompts: Prompts, new_tokens: int, sampled: bool) -> list[int]:
        ids = torch.tensor(prompts)
        options = {"do_sample": False}
        if sampled:
            options = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}
        out = decoder.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=0,
            **options,
        )
        return [out.shape[1] - ids.shape[1]] * len(out)

    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return Engine(generate, versions, "float32 weights, activations and KV")


if __name__ == "__main__":
    main(load)
