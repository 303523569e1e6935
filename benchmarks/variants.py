"""The default model's GGUF in another type, for engines that read it: Q4_0 or Q8_0.

    python benchmarks/variants.py FROM.gguf TO.gguf Q8_0

What is a matrix of Q4_1 becomes the new type; norms and the 8-bit embedding stay as they are.
"""

import sys
from pathlib import Path

import gguf

FILE_TYPES = {"Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0, "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
DERIVED = ("GGUF.", "general.architecture", "general.file_type")


def write(source: Path, target: Path, kind: str) -> None:
    """Rewrite `source` with its Q4_1 matrices requantised; the file appears when it is whole."""
    reader = gguf.GGUFReader(source)
    wanted = gguf.GGMLQuantizationType[kind]
    draft = target.with_suffix(".tmp")
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(draft, architecture)
    writer.add_file_type(FILE_TYPES[kind])
    for name, field in reader.fields.items():
        if not name.startswith(DERIVED):
            part = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=part)
    for tensor in reader.tensors:
        data, stored = tensor.data, tensor.tensor_type
        if stored == gguf.GGMLQuantizationType.Q4_1:
            data = gguf.quants.quantize(gguf.quants.dequantize(data, stored), wanted)
            stored = wanted
        writer.add_tensor(tensor.name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    draft.rename(target)


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
