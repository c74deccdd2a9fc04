#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>

#include "attention_tile.h"
#include "workers.h"

namespace bedplate {

namespace baseline {
extern const TileKernel kernel;
}
#if defined(__x86_64__)
namespace avx2 {
extern const TileKernel kernel;
}
namespace avx512 {
extern const TileKernel kernel;
}
#endif

namespace {

constexpr std::int64_t kKeySplit = 128;              // keys a task, when all rows fit one tile
constexpr std::int64_t kSerialProducts = 64 * 1024;  // fewer multiplications are done sooner than handed out

std::vector<const TileKernel*> kernels() {
    std::vector<const TileKernel*> found;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) found.push_back(&avx512::kernel);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2::kernel);
#endif
    found.push_back(&baseline::kernel);
    return found;
}

std::atomic<const TileKernel*>& active() {
    static std::atomic<const TileKernel*> kernel = kernels().front();
    return kernel;
}

// At least `floats`, aligned to a cache line, the caller's thread's own until its next call.
float* scratch(std::int64_t floats) {
    constexpr std::size_t kAlign = 64 / sizeof(float);
    thread_local std::vector<float> buffer;
    if (buffer.size() < static_cast<std::size_t>(floats) + kAlign) buffer.resize(floats + kAlign);
    const auto misaligned = reinterpret_cast<std::uintptr_t>(buffer.data()) / sizeof(float) % kAlign;
    return buffer.data() + (kAlign - misaligned) % kAlign;
}

// How the work is cut: splits of the keys × tiles of rows × groups of kv heads. Heads come last, for a thread
// takes tasks in a row: a cache line or page that the heads of one key share is then fetched once.
struct Plan {
    const TileKernel* kernel;
    std::int64_t rows, tiles, heads, groups, keys, splits, tasks;

    explicit Plan(const AttentionShape& s) : kernel(active()) {
        rows = s.positions * (s.heads / s.kv_heads);
        tiles = (rows + kernel->rows - 1) / kernel->rows;
        heads = kernel->heads(rows, s.kv_heads);
        groups = (s.kv_heads + heads - 1) / heads;
        keys = s.start_pos + s.positions;
        splits = tiles == 1 ? (keys + kKeySplit - 1) / kKeySplit : 1;
        tasks = groups * tiles * splits;
    }
    // A task's result, when it is to be merged with others: acc [heads, rows, D], max, sum.
    std::int64_t partial_floats(const AttentionShape& s) const {
        return heads * rows * s.head_dim + 2 * kernel->rows;
    }
};

AttentionTile tile_of(const AttentionShape& s, const Plan& plan, std::int64_t task, const float* q,
                      const float* k, const float* v) {
    const std::int64_t head = task % plan.groups * plan.heads, row_tile = task / plan.groups % plan.tiles;
    const std::int64_t split = task / plan.groups / plan.tiles, group = s.heads / s.kv_heads;
    AttentionTile tile{};
    tile.heads = std::min(plan.heads, s.kv_heads - head);
    tile.q = q + head * group * s.head_dim;
    tile.k = k + head * s.head_dim;
    tile.v = v + head * s.head_dim;
    tile.q_stride = s.heads * s.head_dim;
    tile.kv_stride = s.kv_heads * s.head_dim;
    tile.head_dim = s.head_dim;
    tile.group = group;
    tile.row_begin = row_tile * plan.kernel->rows;
    tile.row_end = std::min(plan.rows, tile.row_begin + plan.kernel->rows);
    const std::int64_t visible = s.start_pos + (tile.row_end - 1) / group + 1;
    tile.key_begin = plan.splits == 1 ? 0 : split * kKeySplit;
    tile.key_end = plan.splits == 1 ? visible : std::min(visible, tile.key_begin + kKeySplit);
    tile.start_pos = s.start_pos;
    tile.scale = 1.4426950408889634f / std::sqrt(static_cast<float>(s.head_dim));
    return tile;
}

// Row `index` of [heads, rows] of a tile, whose first kv head is `head`.
float* out_row(const AttentionShape& s, const AttentionTile& tile, std::int64_t head, std::int64_t index,
               float* out) {
    const std::int64_t rows = tile.row_end - tile.row_begin, row = tile.row_begin + index % rows;
    const std::int64_t position = row / tile.group,
                       q_head = (head + index / rows) * tile.group + row % tile.group;
    return out + position * tile.q_stride + q_head * s.head_dim;
}

std::int64_t rows_of(const AttentionTile& tile) { return tile.heads * (tile.row_end - tile.row_begin); }

void run_whole(const AttentionShape& s, const Plan& plan, const AttentionTile& tile, std::int64_t head,
               float* out) {
    const std::int64_t depth = s.head_dim, work = plan.kernel->scratch_floats(depth);
    float* space = scratch(work + plan.kernel->rows * (depth + 2));
    float *acc = space + work, *max = acc + plan.kernel->rows * depth, *sum = max + plan.kernel->rows;
    plan.kernel->run(tile, space, acc, max, sum);
    for (std::int64_t r = 0; r < rows_of(tile); ++r) {
        float* to = out_row(s, tile, head, r, out);
        const float inverse = 1.0f / sum[r];
        for (std::int64_t d = 0; d < depth; ++d) to[d] = acc[r * depth + d] * inverse;
    }
}

// The splits of one group of kv heads, of `partials` [splits, groups, partial_floats], into its rows of
// `out`.
void merge(const AttentionShape& s, const Plan& plan, const AttentionTile& tile, std::int64_t head,
           const float* partials, float* out) {
    const std::int64_t depth = s.head_dim, stride = plan.groups * plan.partial_floats(s);
    const std::int64_t at_max = plan.heads * plan.rows * depth, at_sum = at_max + plan.kernel->rows;
    for (std::int64_t r = 0; r < rows_of(tile); ++r) {
        float top = partials[at_max + r], total = 0;
        for (std::int64_t i = 1; i < plan.splits; ++i) top = std::max(top, partials[i * stride + at_max + r]);
        float* to = out_row(s, tile, head, r, out);
        std::fill_n(to, depth, 0.0f);
        for (std::int64_t i = 0; i < plan.splits; ++i) {
            const float* part = partials + i * stride;
            const float weight = std::exp2(part[at_max + r] - top);
            total += part[at_sum + r] * weight;
            for (std::int64_t d = 0; d < depth; ++d) to[d] += part[r * depth + d] * weight;
        }
        for (std::int64_t d = 0; d < depth; ++d) to[d] /= total;
    }
}

}  // namespace

void attention(const AttentionShape& s, const float* q, const float* k, const float* v, float* out) {
    const Plan plan(s);
    const bool whole = plan.splits == 1;
    std::vector<float> partials(whole ? 0 : plan.tasks * plan.partial_floats(s));
    const auto task = [&](std::size_t index) {
        const AttentionTile tile = tile_of(s, plan, index, q, k, v);
        if (whole) return run_whole(s, plan, tile, index % plan.groups * plan.heads, out);
        float* acc = partials.data() + index * plan.partial_floats(s);
        float *max = acc + plan.heads * plan.rows * s.head_dim, *sum = max + plan.kernel->rows;
        plan.kernel->run(tile, scratch(plan.kernel->scratch_floats(s.head_dim)), acc, max, sum);
    };
    const bool serial = s.kv_heads * plan.rows * plan.keys * s.head_dim < kSerialProducts;
    if (serial)
        for (std::int64_t i = 0; i < plan.tasks; ++i) task(i);
    else
        run_on_pool(task, plan.tasks);
    if (whole) return;
    for (std::int64_t group = 0; group < plan.groups; ++group) {
        const AttentionTile tile = tile_of(s, plan, group, q, k, v);
        merge(s, plan, tile, group * plan.heads, partials.data() + group * plan.partial_floats(s), out);
    }
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const TileKernel* kernel : kernels()) names.emplace_back(kernel->name);
    return names;
}

std::string instruction_set() { return active().load()->name; }

void use_instruction_set(const std::string& name) {
    for (const TileKernel* kernel : kernels())
        if (name == kernel->name) {
            active() = kernel;
            return;
        }
    throw std::invalid_argument("this CPU has no instruction set named '" + name + "'");
}

}  // namespace bedplate
