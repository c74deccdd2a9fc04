// One tile of attention: some query rows of one kv head, or of several side by side, against a range of keys.
//
// Shapes: S positions, H query heads, K kv heads, G = H / K query heads a kv head, D head_dim.
// A row is a query of this kv head: row r stands for position r / G and head r % G of the group.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace bedplate {

struct AttentionTile {
    const float* q;     // position 0, first head of the group; [S, H, D] with `q_stride` floats a position
    const float* k;     // key 0 of the first kv head; `kv_stride` floats from key to key
    const float* v;     // likewise
    int64_t q_stride;   // H · D
    int64_t kv_stride;  // K · D
    int64_t head_dim;   // D
    int64_t group;      // G
    int64_t heads;      // kv heads, at most as many as TileKernel::heads says
    int64_t row_begin;  // rows [row_begin, row_end) of each, at most TileKernel::rows of all heads
    int64_t row_end;    //
    int64_t key_begin;  // keys [key_begin, key_end); row r sees those up to start_pos + r / G
    int64_t key_end;    //
    int64_t start_pos;  //
    float scale;        // factor of the scores, times log2(e): the softmax works in powers of two
};

// A tile kernel for one instruction set.
struct TileKernel {
    const char* name;
    int64_t rows;                                      // most rows a tile may have
    int64_t (*heads)(int64_t rows, int64_t kv_heads);  // kv heads that a tile of so many rows takes at once
    int64_t (*scratch_floats)(int64_t head_dim);       // floats of scratch that `run` wants
    // Writes, unnormalized, acc [heads, rows, D] = Σ 2^(score − max) v, and per row of each head `max` and
    // `sum` = Σ 2^(score − max). Of `max` and `sum`, TileKernel::rows floats are written, whatever the tile's
    // rows.
    void (*run)(const AttentionTile& tile, float* scratch, float* acc, float* max, float* sum);
};

}  // namespace bedplate
