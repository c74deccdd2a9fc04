// Causal grouped-query attention over a KV cache, on ExecuTorch's thread pool.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace bedplate {

struct AttentionShape {
    std::int64_t positions;  // S
    std::int64_t heads;      // H, a multiple of kv_heads
    std::int64_t kv_heads;   // K
    std::int64_t head_dim;   // D
    std::int64_t start_pos;  // keys 0 … start_pos + S - 1 are in the cache already
};

// out, q: [S, H, D]; k, v: [at least start_pos + S, K, D]; all float32 and contiguous.
// The sums are cut the same way on any number of threads, and so give the same bits.
void attention(const AttentionShape& shape, const float* q, const float* k, const float* v, float* out);

// Names of the instruction sets that this CPU can run, best first, and which of them is in use.
std::vector<std::string> instruction_sets();
std::string instruction_set();
// Throws std::invalid_argument for a name that is not among them.
void use_instruction_set(const std::string& name);

}  // namespace bedplate
