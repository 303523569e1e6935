"""OpenVINO GenAI: pip install openvino-genai. MODEL is a GGUF; VARIANT `batching` or nothing."""

import numpy as np
import openvino
import openvino_genai
from measuring import Engine, Prompts, main


def load(model: str, threads: int, variant: str) -> Engine:
    properties = {"INFERENCE_NUM_THREADS": threads}
    if variant == "batching":
        limits = openvino_genai.SchedulerConfig()
        limits.max_num_batched_tokens = 512
        batching = openvino_genai.ContinuousBatchingPipeline(model, limits, "CPU", properties)
    else:
        pipeline = openvino_genai.LLMPipeline(model, "CPU", **properties)

    def generate(prompts: Prompts, new_tokens: int, sampled: bool) -> list[int]:
        options = openvino_genai.GenerationConfig()
        options.max_new_tokens = options.min_new_tokens = new_tokens
        options.ignore_eos = True
        options.do_sample = sampled
        if sampled:
            options.temperature, options.top_p = 0.7, 0.9
        if variant == "batching":
            tensors = [openvino.Tensor(np.array([ids], dtype=np.int64)) for ids in prompts]
            results = batching.generate(tensors, [options] * len(tensors))
            return [len(result.m_generation_ids[0]) for result in results]
        ids = np.array(prompts, dtype=np.int64)
        tensors = openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids))
        found = pipeline.generate(openvino_genai.TokenizedInputs(*tensors), options)
        return [len(ids) for ids in found.tokens]

    path = "as stored; 8-bit dynamic activations and 8-bit KV are its defaults"
    return Engine(generate, f"openvino-genai {openvino_genai.get_version()}", path)


if __name__ == "__main__":
    main(load)
