// The two operators that bedplate brings: llama::update_cache.out and llama::custom_sdpa.out, under the names
// and with the arguments that ExecuTorch's LLM programs use, for what such programs ask of them here:
// float32, one sequence, causal, no mask, no dropout.
#pragma once

#include <executorch/runtime/kernel/operator_registry.h>

#include <cstdint>
#include <vector>

namespace bedplate {

// Every kernel of the process with our two in front of others of their name.
//
// Handed to Program::load_method rather than to the process-wide registry: there a second kernel of one name
// aborts the process, and importing ExecuTorch's own custom_ops (which needs torch) brings just that.
std::vector<executorch::runtime::Kernel> kernel_table();

// llama::custom_sdpa.out as a program would call it. Shapes: q, out [1, S, H, D]; k, v [1, C, K, D].
executorch::runtime::Error call_custom_sdpa(const float* q, const std::int32_t (&q_shape)[4], const float* k,
                                            const std::int32_t (&k_shape)[4], const float* v,
                                            const std::int32_t (&v_shape)[4], std::int64_t start_pos,
                                            float* out);

}  // namespace bedplate
