"""Every attention backend that vLLM 0.31 to 0.33 register, and what is claimed of its caches.

From `AttentionBackendEnum` in vllm/v1/attention/backends/registry.py of each. New in 0.33:
ROCM_FLASHMLA_SPARSE_DSV41, FLASH_ATTN_MLA_SPARSE_FA4, STEP5_DSA and ROCM_OCTAVE. What a later
version adds is entered here when somebody has read how it lays out a block.
"""

TOKEN_MAJOR = (
    "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend",
    "vllm.v1.attention.backends.flashinfer.FlashInferBackend",
    "vllm.v1.attention.backends.flex_attention.FlexAttentionBackend",
    "vllm.v1.attention.backends.triton_attn.TritonAttentionBackend",
    "vllm.v1.attention.backends.triton_flash_attn.TritonFlashAttentionBackend",
    "vllm.v1.attention.backends.triton_flashinfer.TritonFlashInferBackend",
)
MLA = (
    "vllm.v1.attention.backends.mla.cpu_mla.CPUMLABackend",
    "vllm.v1.attention.backends.mla.cutlass_mla.CutlassMLABackend",
    "vllm.v1.attention.backends.mla.flashattn_mla.FlashAttnMLABackend",
    "vllm.v1.attention.backends.mla.flashinfer_mla.FlashInferMLABackend",
    "vllm.v1.attention.backends.mla.flashmla.FlashMLABackend",
    "vllm.v1.attention.backends.mla.triton_mla.TritonMLABackend",
)
SLABS = ("vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend",)
OPAQUE = (
    "vllm.models.deepseek_v4.amd.rocm.DeepseekV4ROCMAiterMLASparseBackend",
    "vllm.models.deepseek_v4.nvidia.flashinfer_sparse.DeepseekV4FlashInferMLASparseBackend",
    "vllm.models.deepseek_v4.sparse_mla.DeepseekV4FlashMLABackend",
    "vllm.models.deepseek_v41.amd.rocm.DeepseekV41ROCMAiterMLASparseBackend",
    "vllm.models.deepseek_v41.nvidia.flashinfer_sparse.DeepseekV4FlashInferMLASparseBackend",
    "vllm.models.deepseek_v41.sparse_mla.DeepseekV4FlashMLABackend",
    "vllm.models.deepseek_v41.sparse_mla.FlashMLAMegaAttnBackend",
    "vllm.models.minimax_m3.common.sparse_attention.MiniMaxM3SparseBackend",
    "vllm.models.minimax_m3.nvidia.sparse_attention_msa.MiniMaxM3SparseCutlassBackend",
    "vllm.models.minimax_m3.nvidia.sparse_attention_msa.MiniMaxM3SparseTritonBackend",
    "vllm.models.step5.nvidia.sparse_attention.Step5DSAAttentionBackend",
    "vllm.v1.attention.backends.b12x.B12xPagedAttentionBackend",
    "vllm.v1.attention.backends.flash_attn_diffkv.FlashAttentionDiffKVBackend",
    "vllm.v1.attention.backends.hpc_attn.HpcAttentionBackend",
    "vllm.v1.attention.backends.mla.aiter_triton_mla.AiterTritonMLABackend",
    "vllm.v1.attention.backends.mla.amx_mla.AMXMLABackend",
    "vllm.v1.attention.backends.mla.flashattn_mla_sparse.FlashAttnMLASparseBackend",
    "vllm.v1.attention.backends.mla.flashattn_mla_sparse.FlashAttnMLASparseFA4Backend",
    "vllm.v1.attention.backends.mla.flashinfer_mla_sparse.FlashInferMLASparseSM120Backend",
    "vllm.v1.attention.backends.mla.flashinfer_mla_sparse.FlashInferMLASparseTRTLLMBackend",
    "vllm.v1.attention.backends.mla.flashinfer_mla_sparse_sm90.FlashInferMLASparseSM90Backend",
    "vllm.v1.attention.backends.mla.flashmla_sparse.FlashMLASparseBackend",
    "vllm.v1.attention.backends.mla.rocm_aiter_mla.AiterMLABackend",
    "vllm.v1.attention.backends.mla.rocm_aiter_mla_sparse.ROCMAiterMLASparseBackend",
    "vllm.v1.attention.backends.mla.tokenspeed_mla.TokenspeedMLABackend",
    "vllm.v1.attention.backends.mla.xpu_mla_sparse.XPUMLASparseBackend",
    "vllm.v1.attention.backends.no_attention.NoAttentionBackend",
    "vllm.v1.attention.backends.rocm_aiter_fa.AiterFlashAttentionBackend",
    "vllm.v1.attention.backends.rocm_aiter_unified_attn.RocmAiterUnifiedAttentionBackend",
    "vllm.v1.attention.backends.rocm_attn.RocmAttentionBackend",
    "vllm.v1.attention.backends.rocm_octave_attn.RocmOctaveAttentionBackend",
    "vllm.v1.attention.backends.rocm_segmented_attn.RocmSegmentedAttentionBackend",
    "vllm.v1.attention.backends.triton_attn_diffkv.TritonAttentionDiffKVBackend",
    "vllm.v1.attention.backends.turboquant_attn.TurboQuantAttentionBackend",
    "vllm.v1.attention.backends.ultraquant_attn.UltraQuantAttentionBackend",
)
