"""The configuration classes of vLLM of which no field decides, of 0.31 to 0.33; see `table.py`."""

from __future__ import annotations

from collections.abc import Mapping

from kvstrata.offload.vllm_plugin.namespace.fields import (
    DERIVED,
    MEMORY,
    OUTPUT,
    PLACE,
    ROUNDING,
    SCHEDULING,
    TOPOLOGY,
    WATCHING,
)

# Configurations of their own among the fields, and their class.
INNER: Mapping[str, str] = {
    "ParallelConfig": ("eplb_config=EPLBConfig fault_tolerance_config=FaultToleranceConfig"),
    "OffloadConfig": "prefetch=PrefetchOffloadConfig uva=UVAOffloadConfig",
    "CompilationConfig": "dynamic_shapes_config=DynamicShapesConfig pass_config=PassConfig",
}
# The others, by reason.
LEFT_OUT: Mapping[str, Mapping[str, str]] = {
    "PoolerConfig": {
        OUTPUT: """
            dimensions enable_chunked_processing enable_flash_late_interaction logit_mean
            logit_sigma max_embed_len pooling_type returned_token_ids seq_pooling_type step_tag_id
            task tok_pooling_type use_activation
        """,
    },
    "ParallelConfig": {
        "the worker's code; weights that it may load: see `weights_fixed`": """
            sd_worker_cls worker_cls worker_extension_cls
        """,
        TOPOLOGY: """
            _allow_auto_resolve_cp_interleave_size _api_process_count _api_process_rank
            _coord_store_port _data_parallel_master_port_list all2all_backend
            assigned_physical_gpu_ids cp_kv_cache_interleave_size cpu_distributed_timeout_seconds
            data_parallel_backend data_parallel_external_lb data_parallel_hybrid_lb
            data_parallel_index data_parallel_master_ip data_parallel_master_port data_parallel_rank
            data_parallel_rank_local data_parallel_rpc_port data_parallel_size
            data_parallel_size_local dcp_comm_backend dcp_kv_cache_interleave_size dcp_q_replicate
            decode_context_parallel_size disable_custom_all_reduce
            disable_nccl_for_dp_synchronization distributed_executor_backend
            distributed_timeout_seconds dp_sync_interval elastic_ep_max_dp_size
            enable_batch_sharded_sampling enable_elastic_ep enable_ep_weight_filter enable_eplb
            enable_expert_parallel enable_fault_tolerance enable_hc_sp enable_shm_tensor_arena
            expert_placement_strategy is_moe_model master_addr master_port
            max_parallel_loading_workers nnodes node_rank numa_bind numa_bind_cpus numa_bind_nodes
            pipeline_parallel_size placement_group prefill_context_parallel_size rank
            ray_runtime_env ray_workers_use_nsight tensor_parallel_size world_size
        """,
        SCHEDULING: "dbo_decode_token_threshold dbo_prefill_token_threshold enable_dbo ubatch_size",
    },
    "EPLBConfig": {
        TOPOLOGY: """
            communicator enable_migration_batching log_balancedness log_balancedness_interval
            num_redundant_experts policy step_interval use_async window_size
        """,
    },
    "FaultToleranceConfig": {SCHEDULING: "engine_recovery_timeout_sec"},
    "SchedulerConfig": {
        SCHEDULING: """
            async_scheduling disable_chunked_mm_input disable_hybrid_kv_cache_manager
            enable_chunked_prefill long_prefill_token_threshold
            long_prefill_token_threshold_adaptive max_num_active_seqs max_num_batched_tokens
            max_num_queued_reqs max_num_queued_tokens max_num_scheduled_tokens max_num_seqs policy
            prefill_schedule_interval scheduler_cls scheduler_reserve_full_isl stream_interval
            watermark
        """,
        MEMORY: "encoder_cache_size max_num_encoder_input_tokens",
        DERIVED: "is_multimodal_model runner_type",
    },
    "DeviceConfig": {ROUNDING: "device device_type"},
    "OffloadConfig": {PLACE: "offload_backend"},
    "PrefetchOffloadConfig": {
        PLACE: "offload_group_size offload_num_in_group offload_params offload_prefetch_step",
    },
    "UVAOffloadConfig": {PLACE: "cpu_offload_gb cpu_offload_params"},
    "HiSparseConfig": {MEMORY: "device_buffer_size eager_host_mirror"},
    "AuxOutputConfig": {OUTPUT: "enable_return_routed_experts max_bytes"},
    "EngramConfig": {PLACE: "cpu_offload dp_shared_memory embedding_across_dp use_thp"},
    "IrOpPriorityConfig": {ROUNDING: "fused_add_rms_norm gelu_and_mul_sparse rms_norm"},
    "WatermarkConfig": {
        OUTPUT: """
            algorithm allow_target_only_watermarking alpha context_width deduplicate_contexts
            deduplicate_contexts_max_history key prf
        """,
    },
    "StructuredOutputsConfig": {
        OUTPUT: """
            backend disable_additional_properties disable_any_whitespace enable_in_reasoning
            reasoning_parser reasoning_parser_plugin
        """,
    },
    "ObservabilityConfig": {
        WATCHING: """
            collect_detailed_traces cudagraph_metrics custom_histogram_buckets
            enable_layerwise_nvtx_tracing enable_logging_iteration_details enable_mfu_metrics
            enable_mm_processor_stats jit_monitor_mode jit_monitor_verbose kv_cache_metrics
            kv_cache_metrics_sample otlp_traces_endpoint per_request_spec_decode_metrics
            show_hidden_metrics_for_version
        """,
    },
    "LoggingConfig": {WATCHING: "configure_logging formatter log_level pylogging_config_file"},
    "CompilationConfig": {
        ROUNDING: """
            backend cache_dir compilation_time compile_cache_save_format compile_mm_encoder
            compile_ranges_endpoints compile_sizes cudagraph_capture_sizes cudagraph_copy_inputs
            cudagraph_decoder_replay cudagraph_mm_encoder cudagraph_mode cudagraph_num_of_warmups
            cudagraph_specialize_lora custom_ops debug_dump_path
            decoder_replay_cudagraph_capture_sizes decoder_replay_trim_threshold disabled_custom_ops
            enabled_custom_ops encoder_compilation_time encoder_cudagraph_max_frames_per_batch
            encoder_cudagraph_max_vision_items_per_batch encoder_cudagraph_token_budgets
            fast_moe_cold_start inductor_compile_config inductor_passes ir_enable_torch_wrap
            local_cache_dir max_cudagraph_capture_size mode splitting_ops static_all_moe_layers
            static_forward_context traced_files use_inductor_graph_partition
        """,
    },
    "DynamicShapesConfig": {ROUNDING: "assume_32_bit_indexing evaluate_guards type"},
    "PassConfig": {
        ROUNDING: """
            eliminate_noops enable_qk_norm_rope_fusion enable_sp fi_allreduce_fusion_max_size_mb
            fuse_act_padding fuse_act_quant fuse_allreduce_rms fuse_attn_quant fuse_gemm_comms
            fuse_mla_dual_rms_norm fuse_norm_quant fuse_qk_norm_rope_kvcache fuse_rope_kvcache
            fuse_rope_kvcache_cat_mla rope_kvcache_fusion_max_token_num sp_min_token_num
        """,
    },
    "ProfilerConfig": {
        WATCHING: """
            active_iterations capture_torch_profiler delay_iterations detailed_trace_annotation
            ignore_frontend max_iterations profiler proton_backend proton_context proton_data
            proton_graph_attribution proton_hook proton_mode proton_output_format
            proton_profiler_dir torch_profiler_activities torch_profiler_dir
            torch_profiler_dump_cuda_time_total torch_profiler_record_shapes torch_profiler_use_gzip
            torch_profiler_with_flops torch_profiler_with_memory torch_profiler_with_stack
            wait_iterations warmup_iterations
        """,
    },
    "KVTransferConfig": {
        "how KV is moved and kept, not what it is; the chunk's tokens are in `pages`": """
            enable_permute_local_kv engine_id kv_buffer_device kv_buffer_size kv_connector
            kv_connector_extra_config kv_connector_module_path kv_ip kv_load_failure_policy
            kv_parallel_size kv_port kv_rank kv_role
        """,
    },
    "KVEventsConfig": {
        WATCHING: """
            buffer_steps enable_kv_cache_events endpoint hwm max_queue_size publisher
            replay_endpoint topic
        """,
    },
    "EncoderCacheManagerConfig": {PLACE: "encoder_cache_manager_cls manager_config"},
    "ReasoningConfig": {
        OUTPUT: """
            _enabled _natural_reasoning_end_token_ids _reasoning_end_token_ids
            _reasoning_start_token_ids reasoning_end_str reasoning_parser reasoning_start_str
        """,
    },
    "WeightTransferConfig": {"see `weights_fixed`": "backend"},
    "WatchdogConfig": {WATCHING: "check_interval dump_dir timeout"},
}
