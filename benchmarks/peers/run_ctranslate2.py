"""CTranslate2: pip install ctranslate2. MODEL is a folder of ct2-transformers-converter."""

import json
from pathlib import Path

import ctranslate2
from measuring import Engine, Prompts, main


def load(model: str, threads: int, variant: str) -> Engine:
    generator = ctranslate2.Generator(model, intra_threads=threads, compute_type=variant)
    words = json.loads((Path(model) / "vocabulary.json").read_text("utf-8"))

    def generate(prompts: Prompts, new_tokens: int, sampled: bool) -> list[int]:
        options = {"sampling_topk": 0, "sampling_topp": 0.9, "sampling_temperature": 0.7}
        results = generator.generate_batch(
            [[words[i] for i in ids] for ids in prompts],
            max_length=new_tokens,
            min_length=new_tokens,
            include_prompt_in_result=False,
            **(options if sampled else {}),
        )
        return [len(result.sequences_ids[0]) for result in results]

    path = f"{generator.compute_type}: weights by row, activations by token; float32 KV"
    return Engine(generate, f"ctranslate2 {ctranslate2.__version__}", path)


if __name__ == "__main__":
    main(load)
