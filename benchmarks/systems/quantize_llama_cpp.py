"""llama.cpp: quantize_llama_cpp.py IN.gguf OUT.gguf: linears in Q4_0, embedding and head in Q8_0."""

import sys

import llama_cpp


def main(source: str, out: str) -> None:
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    settings.pure = True
    settings.token_embedding_type = settings.output_tensor_type = llama_cpp.GGML_TYPE_Q8_0
    if llama_cpp.llama_model_quantize(source.encode(), out.encode(), settings):
        raise SystemExit(f"llama.cpp cannot quantize {source}")


if __name__ == "__main__":
    main(*sys.argv[1:])
