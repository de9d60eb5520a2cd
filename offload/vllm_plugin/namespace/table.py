"""Which fields of vLLM's configuration classes decide K and V, and why the others do not.

Every field of every class that VllmConfig leads to is here, for vLLM 0.31 to 0.33; a test holds
the table against each. A field *decides* if it reaches the computation of K and V beyond rounding,
or gives tokens, images or other inputs their identity. What is left out has its reason. A field
that is not here counts as deciding; a few do on a condition (`rule.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

from kvstrata.offload.vllm_plugin.namespace.fields import (
    DERIVED,
    DRAFTED,
    FORM,
    FRONTEND,
    MEMORY,
    OUTPUT,
    PLACE,
    ROUNDING,
    SCHEDULING,
    TOPOLOGY,
    Fields,
    fields,
)
from kvstrata.offload.vllm_plugin.namespace.left_out import INNER, LEFT_OUT

TABLE: Mapping[str, Fields] = {
    "VllmConfig": fields(
        deciding="additional_config",
        inner="""
            model_config=ModelConfig cache_config=CacheConfig parallel_config=ParallelConfig
            scheduler_config=SchedulerConfig device_config=DeviceConfig load_config=LoadConfig
            offload_config=OffloadConfig attention_config=AttentionConfig
            aux_output_config=AuxOutputConfig engram_config=EngramConfig mamba_config=MambaConfig
            kernel_config=KernelConfig lora_config=LoRAConfig speculative_config=SpeculativeConfig
            watermark_config=WatermarkConfig diffusion_config=DiffusionConfig
            structured_outputs_config=StructuredOutputsConfig
            observability_config=ObservabilityConfig logging_config=LoggingConfig
            compilation_config=CompilationConfig profiler_config=ProfilerConfig
            kv_transfer_config=KVTransferConfig kv_events_config=KVEventsConfig
            ec_transfer_config=ECTransferConfig ec_manager_config=EncoderCacheManagerConfig
            reasoning_config=ReasoningConfig weight_transfer_config=WeightTransferConfig
            watchdog_config=WatchdogConfig
        """,
        left_out={
            "another one at every start": "instance_id",
            "made from quantization, quantization_config, hf_config and the checkpoint's files": (
                "quant_config"
            ),
            ROUNDING: "optimization_level performance_mode",
            SCHEDULING: "shutdown_timeout",
        },
    ),
    "ModelConfig": fields(
        deciding="""
            code_revision convert disable_sliding_window dtype hf_config hf_text_config
            model_class_overrides model_impl quantization quantization_config runner
        """,
        inner="multimodal_config=MultiModalConfig pooler_config=PoolerConfig",
        left_out={
            "the weights' fingerprint is of their content": "model model_weights revision",
            "its effect is in hf_config": "config_format hf_config_path hf_overrides",
            "of dummy weights, whose fingerprint has it": "seed",
            "a name for users": "served_model_name",
            "Python files of the checkpoint count where it allows them": "trust_remote_code",
            "refuses or allows; what is allowed counts": "allow_deprecated_quantization",
            "keys of such blocks have the SHA-256 of the embeddings": "enable_prompt_embeds",
            "the draft's max_model_len is in its own configuration": "spec_target_max_model_len",
            "of the output layer alone": "word_embeddings_untied_by_checkpoint",
            "a configuration inside of another": "is_submodel_config",
            "has no effect": "disable_cascade_attn",
            "see `weights_fixed`": """
                enable_sleep_mode sleep_mode_backend sleep_mode_offload_cudagraph
                sleep_preserve_parameter_names
            """,
            PLACE: "allowed_local_media_path allowed_media_domains hf_token",
            FRONTEND: """
                io_processor_plugin renderer_num_workers skip_tokenizer_init tokenizer
                tokenizer_mode tokenizer_revision
            """,
            OUTPUT: """
                enable_trace_replay generation_config logits_processors logprobs_mode max_logprobs
                return_sampling_mask use_fp64_gumbel
            """,
            ROUNDING: "enforce_eager",
            MEMORY: "enable_cumem_allocator enable_nccl_comm_suspend",
        },
    ),
    "MultiModalConfig": fields(
        deciding="""
            language_model_only media_io_kwargs mm_device_do_normalize mm_encoder_attn_dtype
            mm_encoder_fp8_scale_path mm_encoder_only mm_hasher_algorithm mm_processor_kwargs
            video_pruning_method video_pruning_rate
        """,
        left_out={
            "embeddings are named by their content": "enable_mm_embeds",
            "an embedding that is left out is named by what the request says of it": (
                "allow_missing_mm_embeddings"
            ),
            "how much is accepted, and what memory is measured with": "limit_per_prompt",
            "without it and prefix caching images have no names: refused": "mm_processor_cache_gb",
            "what is written for later starts": (
                "mm_encoder_fp8_scale_save_path mm_encoder_fp8_scale_save_margin"
            ),
            FRONTEND: "interleave_mm_strings",
            ROUNDING: "mm_encoder_attn_backend",
            TOPOLOGY: "mm_encoder_tp_mode",
            MEMORY: """
                mm_ipc_gpu_memory_gb mm_processor_cache_type mm_shm_cache_max_object_size_mb
                mm_tensor_ipc skip_mm_profiling
            """,
        },
    ),
    "CacheConfig": fields(
        deciding="""
            cache_dtype kv_cache_dtype_skip_layers kv_sharing_fast_prefill mamba_cache_dtype
            mamba_cache_mode mamba_ssm_cache_dtype replayssm_buffer_len sliding_window
            swa_bounded_replay use_kda_recoverssm use_replayssm
        """,
        left_out={
            "in the namespace as `hash_algorithm`": "prefix_caching_hash_algo",
            "in the namespace as `tokens_per_hash`": "hash_block_size prefix_match_unit",
            "without it and a processor cache images have no names: refused": (
                "enable_prefix_caching"
            ),
            FORM: """
                _block_size_resolved block_size effective_attention_block_size is_attention_free
                kv_cache_layout mamba_block_size mamba_page_size_padded skip_page_size_padded
                user_specified_block_size user_specified_mamba_block_size
            """,
            SCHEDULING: """
                cache_hit_alignment_tokens enable_mamba_shared_prefix_checkpoint
                prefix_cache_retention_interval
            """,
            MEMORY: """
                gpu_memory_utilization kv_cache_max_concurrency kv_cache_memory_bytes
                kv_cache_size_tokens kv_offloading_backend kv_offloading_size num_cpu_blocks
                num_gpu_blocks num_gpu_blocks_override simple_cpu_offload_num_blocks
            """,
        },
    ),
    "LoadConfig": fields(
        deciding="ignore_patterns load_format model_loader_extra_config",
        left_out={
            PLACE: "device download_dir pt_load_map_location",
            "how fast weights are read; that they are torchao's is in the quantisation": """
                safetensors_load_strategy safetensors_prefetch_block_size
                safetensors_prefetch_num_threads use_tqdm_on_load
            """,
        },
    ),
    "AttentionConfig": fields(
        deciding="""
            disable_flashinfer_q_quantization indexer_kv_dtype indexer_sparse_logits use_non_causal
            use_prefill_query_quantization
        """,
        inner="hisparse_config=HiSparseConfig",
        left_out={
            "rounding alone; where it changes the form of content, the content order says so": """
                flash_attn_max_num_splits_for_cuda_graph flash_attn_version flex_attn_block_m
                flex_attn_block_n flex_attn_kv_block_size flex_attn_q_block_size
                minimax_m3_msa_decode_backend sparse_mla_force_mqa tokenspeed_mla_min_split_kv
                tq_max_kv_splits_for_cuda_graph trtllm_ragged_backend
            """,
            TOPOLOGY: "indexer_tp_shard_min_rows minimax_m3_indexer_cp",
            MEMORY: "sparse_mla_prefill_workspace_factor",
        },
    ),
    "MambaConfig": fields(
        deciding="enable_stochastic_rounding stochastic_rounding_philox_rounds",
        left_out={ROUNDING: "backend ssu_algorithm"},
    ),
    "KernelConfig": fields(
        inner="ir_op_priority=IrOpPriorityConfig",
        left_out={
            ROUNDING: """
                enable_cutedsl_warmup enable_flashinfer_autotune enable_jit_warmup
                enable_rocm_segmented_attn_autotune monokernel sparse_indexer_topk_backend
            """,
        },
    ),
    "LoRAConfig": fields(
        deciding="""
            enable_mixed_moe_lora_format enable_moe_shared_loras enable_tower_connector_lora
            lora_dtype target_modules
        """,
        left_out={
            "the adapter of a request is in its keys": "default_mm_loras",
            TOPOLOGY: "fully_sharded_loras",
            MEMORY: "max_cpu_loras max_lora_cls_labels max_lora_rank max_loras",
            ROUNDING: "specialize_active_lora",
        },
    ),
    "SpeculativeConfig": fields(
        deciding="""
            index_share_for_mtp_iteration kv_cache_dtype method parallel_drafting quantization
        """,
        inner="draft_load_config=LoadConfig draft_model_config=ModelConfig",
        left_out={
            "`draft_weights` is of their content": "model revision",
            "of the draft's model configuration": "code_revision max_model_len",
            "the target's, which is the model's": "target_model_config target_parallel_config",
            TOPOLOGY: "draft_parallel_config draft_tensor_parallel_size tensor_parallel_size",
            ROUNDING: "attention_backend enforce_eager moe_backend",
            SCHEDULING: """
                disable_eagle_block_drop disable_lookahead_block_hashes disable_padded_drafter_batch
            """,
            DRAFTED: """
                draft_lm_head_quantization draft_sample_method dspark_draft_topk
                enable_adaptive_verification fly_entropy_threshold fly_entropy_top_k fly_window_size
                num_speculative_tokens num_speculative_tokens_per_batch_size prompt_lookup_max
                prompt_lookup_min rejection_sample_method suffix_decoding_max_cached_requests
                suffix_decoding_max_spec_factor suffix_decoding_max_tree_depth
                suffix_decoding_min_token_prob synthetic_acceptance_length
                synthetic_acceptance_rates use_heterogeneous_vocab use_local_argmax_reduction
                xpress_topc
            """,
        },
    ),
    "DiffusionConfig": fields(deciding="canvas_length max_denoising_steps"),
    "ECTransferConfig": fields(
        deciding="ec_connector ec_connector_module_path ec_role",  # who encodes images
        left_out={
            DERIVED: "mm_encoder_output_widths",
            PLACE: """
                ec_buffer_device ec_buffer_size ec_connector_extra_config ec_ip ec_parallel_size
                ec_port ec_rank engine_id
            """,
        },
    ),
    **{
        name: fields(left_out=reasons, inner=INNER.get(name, ""))
        for name, reasons in LEFT_OUT.items()
    },
}
