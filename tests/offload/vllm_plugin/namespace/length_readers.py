"""What of vLLM reads `max_model_len` besides `length.READERS`, and why it reaches no K and no V."""

# Models of vLLM that read it, and what for: nothing that reaches K or V.
_PROFILING = "size of the inputs that memory is measured with"
_BUFFERS = "sizes of buffers, and bounds that kernels are chosen by"
_CACHE = "rows of a table of RoPE, whose values do not depend on their number"
HARMLESS = {
    **dict.fromkeys(
        (
            "cohere_compass",
            "deepseek_ocr",
            "deepseek_vl2",
            "ernie45_vl",
            "gemma3_mm",
            "gemma4_mm",
            "glm4_1v",
            "idefics3",
            "internvl",
            "kimi_k25",
            "kimi_vl",
            "lfm2_vl",
            "minicpmv",
            "qwen2_5_vl",
            "qwen2_vl",
            "qwen3_vl",
            "step3_vl",
            "voxtral",
            "voxtral_realtime",
        ),
        _PROFILING,
    ),
    **dict.fromkeys(
        (
            "deepseek_v2",
            "deepseek_v32",
            "deepseek_v4",
            "deepseek_v41",
            "glm5next",
            "hy_v4",
            "inkling",
            "kimi_k3",
            "minimax_m3",
        ),
        _BUFFERS,
    ),
    **dict.fromkeys(("embedding_gemma2", "minimax_m2", "muse_spark", "plamo3"), _CACHE),
    "colpali": "a comment",
    "config": "NomicBert's (bert_with_rope), and the default of the length itself",
}
# Layers that models share, outside of their own modules.
LAYERS = {
    "attention": _BUFFERS,
    "indexer_topk": _BUFFERS,
    "quantization": _BUFFERS,
    "rocm_paged_mxfp4_indexer": _BUFFERS,
    "sparse_attn_indexer": _BUFFERS,
    "rotary_embedding": "LongRoPE's choice of factors: by its kind",
}
