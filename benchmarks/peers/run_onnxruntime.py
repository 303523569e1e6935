"""ONNX Runtime GenAI: pip install onnxruntime-genai. MODEL is a folder of its model builder."""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime_genai
from measuring import Engine, Prompts, main


def load(model: str, threads: int, variant: str) -> Engine:
    config = onnxruntime_genai.Config(model)
    session = {"session_options": {"intra_op_num_threads": threads}}
    config.overlay(json.dumps({"model": {"decoder": session}}))
    loaded = onnxruntime_genai.Model(config)

    def generate(prompts: Prompts, new_tokens: int, sampled: bool) -> list[int]:
        length = len(prompts[0]) + new_tokens
        params = onnxruntime_genai.GeneratorParams(loaded)
        options = {"do_sample": True, "temperature": 0.7, "top_p": 0.9} if sampled else {}
        params.set_search_options(
            batch_size=len(prompts), max_length=length, min_length=length, **options
        )
        generator = onnxruntime_genai.Generator(loaded, params)
        generator.append_tokens(np.array(prompts, dtype=np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        return [len(generator.get_sequence(i)) - len(ids) for i, ids in enumerate(prompts)]

    bits = Path(model).name.removeprefix("onnx-")
    path = f"{bits} weights of the builder's defaults; float32 KV"
    return Engine(generate, f"onnxruntime-genai {version('onnxruntime-genai')}", path)


if __name__ == "__main__":
    main(load)
