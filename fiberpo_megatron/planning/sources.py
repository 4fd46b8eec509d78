"""This module names where every constant of the model of time comes from; docs/planning.md (Constants) is made from it.

A `document` is public and was read: `where` points into it, and `figure` gives what stands there and how the value
follows. A range in the document is given as such. A `measurement` was made with this project. A `fit` is determined by
the published steps that `figure` names, with a pull to a middle that is known from elsewhere; how well such constants
predict a source that they have not seen is in the page's table of sources left out. `derived` constants follow from
others, or were counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Source:
    """This is the source of one constant."""

    kind: Literal["document", "measurement", "fit", "derived"]
    where: str
    """The document, with address and place; or what was measured, fitted or counted, and on what."""
    figure: str
    """What stands there, and how the value follows from it."""


_BOOK = "ml-engineering (github.com/stas00/ml-engineering, 744d01e)"
_NCCL = "NCCL (github.com/NVIDIA/nccl, 5067397), src/graph/tuning.cc"
_RECIPES = "NeMo-RL (github.com/NVIDIA-NeMo/RL, 7ea279a)"
_LEDGER = "published.json, by tools/ledger_tables.py --refit"

SOURCES: Mapping[str, Source] = {
    "matmul_efficiency": Source(
        "document",
        f"{_BOOK}, compute/accelerator/README.md, Maximum Achievable Matmul FLOPS, BF16",
        "The best shape of each GPU reaches 0.87 (A100), 0.80 (H100), 0.78 (B200), 0.73 (GB200), 0.60 (MI325X) and "
        "0.51 (MI300X) of its specification. A model's shapes are not the best ones: 0.70 lies below NVIDIA's.",
    ),
    "expert_matmul_efficiency": Source(
        "document",
        "DeepGEMM (github.com/deepseek-ai/DeepGEMM, 8002b76 of 2025-03-25), README.md, Grouped GEMMs for MoE models",
        "In FP8 on H800 (1979 TFLOPS) 1214 to 1346 TFLOPS with 4096 and more rows an expert, and 815 to 1233 with "
        "256 to 1024: 0.41 to 0.68, and 0.55 is the middle.",
    ),
    "attention_efficiency": Source(
        "document",
        "FlashAttention-3 (arXiv 2407.08608), figures of forward and backward speed, H100, head size 128, no mask",
        "Forward 467, 625 and 638 TFLOPS at 512, 2048 and 4096 tokens, backward 316, 501 and 542. Backward has 2.5 "
        "times the operations, so that both together reach 0.35, 0.54 and 0.57 of 989; a causal mask costs some of "
        "it.",
    ),
    "memory_efficiency": Source(
        "document",
        "QuACK (github.com/Dao-AILab/quack, c8ec317), AI/hadamard_roofline_analysis.md and "
        "media/2025-07-10-membound-sol.md",
        "On H100 a copy reaches 0.90 of 3350 GB/s, a good softmax 0.90, a bfloat16 Hadamard product 0.76, and the "
        "kernels that torch.compile makes of softmax some 0.6. The trainer's are fused ones and plain ones.",
    ),
    "prefill_efficiency": Source(
        "document",
        "SGLang team, Deploying DeepSeek with PD Disaggregation and Large-scale Expert Parallelism on 96 H100 GPUs "
        "(lmsys.org/blog/2025-05-05-large-scale-ep)",
        "52,300 prompt tokens a second on 8 GPUs are 2 x 37e9 x 52,300 / 8 = 484 TFLOPS of a GPU, 0.49 of 989, "
        "attention left out. The products were in FP8, so that this is the upper end for bfloat16.",
    ),
    "decode_memory_efficiency": Source(
        "document",
        "gpt-fast (github.com/pytorch-labs/gpt-fast, 32971d3), README.md, Benchmarks; FlashMLA "
        "(github.com/deepseek-ai/FlashMLA, 9241ae3), README.md",
        "Whole decoding steps of a 7B and an 8B model read 1397 and 1411 GB/s of 2039 on A100 (0.69), latencies "
        "included, which the model counts apart. Attention over a latent cache reads up to 3000 of 3350 GB/s on "
        "H800 (0.90).",
    ),
    "expert_memory_efficiency": Source(
        "fit",
        _LEDGER,
        "The middle is 0.62: each expert's weights are read for few rows, less well than a whole matrix. All points "
        "with CUDA graphs determine it, np-235b-1off most (a tenth less makes its step 6 % longer), then "
        "np-30b-1off.",
    ),
    "nvlink_efficiency": Source(
        "document",
        f"{_BOOK}, network/README.md; DeepEP (github.com/deepseek-ai/DeepEP, 004d6f9 of 2025-06-27), README.md",
        "Of 450 GB/s on 8 H200, rings of NCCL reach 0.80 to 0.82 at 16 GiB (all-gather, reduce-scatter, "
        "all-reduce), and all-reduce 0.49 at 16 MiB, 0.61 at 32 and 0.77 at 64. DeepEP's dispatch on H800: 153 of "
        "200 GB/s (0.77). Messages of a layer have some ten to a hundred MB.",
    ),
    "network_efficiency": Source(
        "document",
        f"{_BOOK}, network/README.md, So what should you expect; DeepEP (as above)",
        "An adapter of 50 GB/s carries 36.5 to 37 GB/s in NCCL's all-reduce over 4 nodes of B200 with EFA (0.73 to "
        "0.74, time inside the nodes included), and 43 GB/s in DeepEP's dispatch over 2 nodes with InfiniBand "
        "(0.86).",
    ),
    "small_message_efficiency": Source(
        "document",
        "sgl-project/sglang#2904, description: all-reduces of vLLM and SGLang on 8 H100, without graphs",
        "vLLM's takes 24.1, 30.4 and 45.0 us for 256, 512 and 1024 KB, beyond 10.1 us for 512 bytes; SGLang's 16.7, "
        "22.1 and 33.8 beyond 5.9. Two times 7/8 of the size over 450 GB/s and these times make 0.07 to 0.12 and "
        "0.09 to 0.15.",
    ),
    "small_network_efficiency": Source(
        "document",
        f"{_NCCL}, lines 327 and 332",
        "NCCL's own model gives its low-latency protocol half of the bandwidth in a ring and 1/3.8 in a tree.",
    ),
    "nvlink_latency_us": Source(
        "document",
        "sgl-project/sglang#2904, description",
        "vLLM's all-reduce takes 9.3 to 10.1 us for up to 4 KB over 8 H100, SGLang's 5.7 to 5.9. NCCL's takes 40 us "
        "(32 KiB on 8 H200, ml-engineering, network/README.md), but engines do not use it inside a domain.",
    ),
    "network_latency_us": Source(
        "fit",
        _LEDGER,
        f"The middle is 15. {_NCCL} counts 5 to 14 us for a hop of a tree, by protocol. Engines over several hosts "
        "determine it: np-235b-sync and the points of DeepSeek-V3 (a tenth more makes np-dsv3-1off's step 2 % "
        "longer).",
    ),
    "train_kernel_us": Source(
        "document",
        "jiahuanglin.xyz/all_lessons/gpu_kernel_serving/18_pytorch_to_kernel.html",
        "A PyTorch operator costs the CPU 5 to 25 us on its way to a kernel, 1 to 3 of them in the driver; an "
        "operator of Transformer Engine starts several kernels. No step of the ledger depends on it.",
    ),
    "decode_kernel_us": Source(
        "fit",
        _LEDGER,
        "The middle is 4: small kernels from a graph take 3 to 5 us. All points with graphs determine it, "
        "va-35b-sync (a tenth more makes its step 3 % longer) and np-235b-1off most.",
    ),
    "eager_kernel_us": Source(
        "fit",
        _LEDGER,
        "The middle is 40. vf-30b-sync alone determines it, the one point whose generation has no graphs and is not "
        "hidden; without that source it stays at the middle.",
    ),
    "graph_limit": Source(
        "document",
        "vLLM, vllm/config/compilation.py, max_cudagraph_capture_size; SGLang 0.5.23, srt/arg_groups/memory_hook.py",
        "vLLM captures up to min(2 max_num_seqs, 512). SGLang captures up to 512 on engines of 4 and more GPUs of "
        "60 to 160 GB and on all larger GPUs, and up to 256 on engines of fewer. A config's argument has precedence.",
    ),
    "engine_step_ms": Source(
        "document",
        "vllm-project/vllm#6854, description; NVIDIA/TensorRT-LLM#13957, description",
        "The gaps on the GPU between steps are some 4 ms in vLLM's traces of 2024, and 0.58 ms in TensorRT-LLM of "
        "2026; 2 is between them, and what grows with the batch is `engine_request_us`.",
    ),
    "engine_request_us": Source(
        "fit",
        _LEDGER,
        "The middle is 30: vllm-project/vllm#6854 has 5 to 13 ms of idle GPU a step, with batches of up to 256. The "
        "30B points determine it (a tenth more makes np-30b-1off's step 2 % longer).",
    ),
    "engine_host_ms": Source(
        "fit",
        _LEDGER,
        "The middle is 2: some messages over TCP, one host after another. Engines of 2 and 4 hosts determine it, "
        "the points of DeepSeek-V3 (a tenth more makes np-dsv3-1off's step 1.5 % longer) and np-235b-sync.",
    ),
    "engine_reserved_gb": Source(
        "document",
        "vllm-project/vllm#10511, comment of 2024-12-14: memory profile of Llama 3 8B on H100",
        "Outside of weights and cache 1.79 + 1.26 GiB on one GPU and 3.58 + 1.26 GiB on each of two (3.3e9 and "
        "5.2e9 bytes), before graphs.",
    ),
    "pageable_copy_efficiency": Source(
        "fit",
        _LEDGER,
        "The middle is 0.10, 4 to 8 GB/s of 64. Colocated points determine it, those of DeepSeek-V3 most (a tenth "
        "less makes their steps 4 to 5 % longer). microsoft/DeepSpeed#5301 found pinned copies 4 to 5 times as fast "
        "as pageable ones on 8 GPUs, here they are 12 times as fast: other costs of these turns are in the constant.",
    ),
    "pinned_copy_efficiency": Source(
        "document",
        "Tutorial to NVIDIA's nvbandwidth (dev.smart-guide.co.kr, "
        "nvidia-nvbandwidth-measure-gpu-interconnect-performance); nvbandwidth (github.com/NVIDIA/nvbandwidth, "
        "66746a3), README.md",
        "One GPU copies at 55.6 of 64 GB/s over PCIe 5 (0.87), and at 26.0 of 32 over PCIe 4 (0.81), alone; at 18.6 "
        "(0.58) where copies go in both directions. All GPUs of a host copy at once: 0.75 lies between.",
    ),
    "wake_s": Source(
        "document",
        "vLLM, Zero-Reload Model Switching with Sleep Mode (blog.vllm.ai/2025/10/26/sleep-mode.html)",
        "Waking takes 0.1 to 6 s with weights in host memory, 0.8 to 2.6 s without; 3 is the middle of the first.",
    ),
    "trajectory_ms": Source(
        "measurement",
        "calibration.controller.time_trajectories on one core of a busy 2-core AMD EPYC (load 3.5), 2026-11-26",
        "Joining, sending and packing a trajectory takes 0.12 ms with 128 tokens, 0.77 ms with 2,248 and 2.46 ms "
        "with 8,392 (medians of 5). 2 ms are those of some 6,700 tokens; a costly verifier comes on top.",
    ),
    "storage_gb_per_s": Source(
        "document",
        "The Llama 3 Herd of Models (arXiv 2407.21783), storage; in the summary ai-papers.xuzou.cn/papers/llama3_2024",
        "2 TB/s sustained and 7 TB/s at the peak, for the 2,048 hosts of 16,384 GPUs: 1.0 to 3.4 GB/s for a host, 2 "
        "in the middle. It varies more than any other constant: measure yours.",
    ),
    "reserved_gb": Source(
        "document",
        f"{_BOOK}, training/performance/README.md, Additional GPU memory usage",
        "0.5 to 2 GiB for CUDA and its kernels, 1 to 2 GiB for torch.distributed: at most 4.3e9 bytes, fragments on "
        "top.",
    ),
    "expert_imbalance": Source(
        "derived",
        "`expert_spread`, by drawing 20,000 times 8 ranks with 16 experts each",
        "The busiest rank has 1.20 times its share at a spread of 0.5, 1.25 at 0.6, 1.28 at 0.65.",
    ),
    "expert_spread": Source(
        "document",
        "sgl-project/sglang#5524, comment of 2025-05-13; Diagnosing Overhead in Dispatch Operations (arXiv "
        "2605.20982), abstract",
        "The counts of 16 experts of DeepSeek-V3 on one GPU have a spread of 0.59 (standard error 0.11). Five "
        "checkpoints have Gini coefficients of 0.105 to 0.38 in the paper, which are spreads of 0.19 to 0.70.",
    ),
    "length_spread": Source(
        "document",
        "Azure LLM inference trace 2023 (github.com/Azure/AzurePublicDataset, b469a11), "
        "data/AzureLLMInferenceTrace_conv.csv",
        "19,366 answers have a 99th percentile of 4.66 times the median and a standard deviation of 0.77 times the "
        "mean, which are spreads of 0.66 and 0.68; the trace of code has a longer tail (1.27). Measure yours.",
    ),
    "draft_acceptance": Source(
        "document",
        "DeepSeek-V3 (arXiv 2412.19437), section 5.4.3",
        "The second token is accepted with a probability of 0.85 to 0.90. A policy that moves away from what its "
        "prediction layer has learned has less: 0.8.",
    ),
    "prompt_tokens": Source(
        "document",
        "verl-project/verl#3479, table of results; published.json",
        "A mathematical prompt has 84 to 237 tokens, 139 on average; the ledger's runs are taken to have 150 and "
        "200. It stands only for a config, which does not know its data: set it.",
    ),
    "response_share": Source(
        "document",
        "published.json: NeMo-RL's performance summary and verl's docs/advance/v1_async_trainer.md",
        "Mean responses are 0.77 (30B), 0.69 (235B), 0.40 (DeepSeek-V3) and 0.39 (35B) of the longest; 0.5 is "
        "between them. It stands only for a config: set it.",
    ),
}
"""These are the sources of all constants of `Assumptions` except those of `Overheads`, which only a calibration
measures."""

COUNTS: Mapping[str, Source] = {
    "decoding._KERNELS_ATTENTION": Source(
        "derived",
        "SGLang 0.5.23, srt/models/qwen3_moe.py",
        "Norm with residual, queries to values, norms of queries and keys, rotary embedding, writing of the cache, "
        "attention and its reduction, output.",
    ),
    "decoding._KERNELS_LATENT": Source(
        "derived",
        "SGLang 0.5.23, srt/models/deepseek_v2.py",
        "As above with two projections down and two norms for one, and the two products that absorb the latent.",
    ),
    "decoding._KERNELS_DENSE": Source(
        "derived", "SGLang 0.5.23, srt/models/qwen3.py", "Norm with residual, gate and up, activation, down."
    ),
    "decoding._KERNELS_EXPERTS": Source(
        "derived",
        "SGLang 0.5.23, srt/models/qwen3_moe.py",
        "Norm with residual, router, choice, two for the order of tokens, two products, activation, sum.",
    ),
    "decoding._GRAPH_STEP": Source(
        "document",
        "vLLM, vllm/config/compilation.py, max_cudagraph_capture_size; SGLang 0.5.23, "
        "srt/arg_groups/cuda_graph_hook.py",
        "Both capture multiples of 8 up to 256, and of 16 beyond (SGLang smaller steps below 64).",
    ),
    "decoding._SAMPLING_PASSES": Source(
        "derived",
        "SGLang 0.5.23, srt/layers/sampler.py",
        "Temperature and softmax read and write a row, the draw and the log-probs read it.",
    ),
    "training._KERNELS_DENSE": Source(
        "derived",
        "megatron-core 0.16.1, core/transformer/transformer_layer.py, with Transformer Engine's modules",
        "A count to about a third. No step of the ledger depends on it.",
    ),
    "training._KERNELS_EXPERTS": Source(
        "derived",
        "megatron-core 0.16.1, core/transformer/moe/moe_layer.py and token_dispatcher.py",
        "As above, with router, permutations, the exchange and its sizes, and grouped products.",
    ),
    "published._UNSTATED_MEAN": Source(
        "derived",
        "the range of a mean response that no source states",
        "It widens a prediction, and none of ours has it.",
    ),
    "published._COLOCATED_SHARE": Source(
        "document",
        f"{_RECIPES}, examples/configs/grpo_math_1B.yaml, from which the recipes inherit",
        "gpu_memory_utilization is 0.6; recipes for larger models have 0.3 to 0.7.",
    ),
    "published._SEPARATE_SHARE": Source(
        "document",
        f"{_RECIPES}, examples/configs/recipes/llm/performance/*-async-*.yaml",
        "gpu_memory_utilization is 0.8 in nine of twelve recipes with engines of their own, 0.7 to 0.88 in the others.",
    ),
    "published._LEAST_CACHE_SHARE": Source(
        "derived", "the least that a published run needs for its cache", "It matters where a share is not stated."
    ),
}
"""These are the sources of the numbers that the model of time has in its modules beside `Assumptions`."""
