// What is computed, once for each instruction set: plain numbers and pointers go in, none of these allocates
// or throws.
//
// One row, one result: a kernel computes each row of inputs by the same operations in the same order,
// whatever other rows, how many of them, and which part of the outputs it is asked for.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace bedplate {

constexpr int kBlock = 16;       // rows of weights that lie side by side
constexpr int kGroup = 32;       // columns that share a scale of the inputs
constexpr int kSide = 16;        // rows of inputs that lie side by side, in a step of several
constexpr int kMassBlock = 128;  // logits whose weights are summed as one

constexpr int64_t kFourBytes = 256, kEightBytes = 512;  // codes of a block's group

enum class Coding : uint8_t { kFloat, kFour, kEight };

// Weights [rows, columns] as `Matrix` lays them out, in blocks of 16 rows and groups of 32 columns; what is
// beyond rows and columns is zero.
//
//   y[r] = row_scale[r] · Σ_g x_scale[g] · scale[r, g] · Σ_i code[r, g, i] · x[g, i]
//        + offset_scale[r] · Σ_g offset[r, g] · x_scale[g] · Σ_i x[g, i]  +  bias[r]
//
// and for floats  y[r] = Σ_c w[r, c] · x[c] + bias[r].
struct Weights {
    Coding coding;
    int64_t rows, columns;
    const uint8_t* codes;          // kFour: [blocks, groups, 256]; kEight: [blocks, groups, 512]
    const float* floats;           // kFloat: [blocks, columns, 16]
    const uint16_t* group_scales;  // bfloat16 [blocks, groups, 16]; null: 1
    const float* row_scales;       // [blocks, 16]; null: 1
    const int8_t* offsets;         // [blocks, groups, 16]; null: none
    const float* offset_scales;    // [blocks, 16]
    const float* bias;             // [blocks, 16]; null: none
};

// 32 columns of a row of inputs: scale, what the columns come to in all (scale · the sum of their codes), and
// minus eight times the sum of their codes: with it begin the sums of products, for codes of weights are
// eight too large (see lanes.h).
struct InputGroup {
    float scale, sum;
    int32_t start;
};

// Rows of inputs. Their codes stand in groups of 32 columns, and in each 8 of them first the even columns,
// then the odd. The groups of `side` rows lie side by side: a row alone, or kSide.
struct Inputs {
    const float* floats;       // [rows, stride]
    int64_t stride;            //
    const int8_t* codes;       // [rows / side, n_groups, side, 32], within ±127
    const InputGroup* groups;  // [rows / side, n_groups, side]
    int64_t n_groups, side;    //

    // Where the first group of a row is, counted in groups; the next ones follow `side` apart. Never a
    // function of its own: the linker could keep the copy of an instruction set that this CPU has not.
    __attribute__((always_inline)) int64_t place(int64_t row) const {
        return row / side * side * n_groups + row % side;
    }
};

// The wide half of a low-rank branch: y[r] = scale[r] · Σ_j w[r, j] · t[j].
struct Back {
    int64_t rows, rank;
    const int8_t* codes;  // [blocks, rank, 16]; null: floats
    const float* floats;  // likewise
    const float* scales;  // [blocks, 16], beside codes
};

// A range of a thread: of rows of inputs, and of blocks of outputs.
struct Range {
    int64_t begin, end;
};

// 64 positions of one kv head: keys in 4 parts of [head_dim, 16 positions], values [64, head_dim].
constexpr int kPositions = 64;
constexpr int kPart = 16;

struct Heads {
    int64_t group;     // query heads that read one kv head, side by side
    int64_t head_dim;  // a multiple of 2
    float scale;       // of scores
    float cap;         // a score s becomes cap · tanh(s / cap); 0: it stays
    bool half;         // float16 in KV memory, or float32
};

// gelu by its tanh formula, and relu(x)².
enum class Activation : uint8_t { kSilu, kGelu, kRelu2 };

// Logits to draw from. A weight is 2^((value - top) · scale): 1 for the highest.
struct Candidates {
    const float* values;
    int64_t count;
    const float* maxima;  // of each block of kMassBlock values
    float top, scale;
};

// A group of each of 16 rows of weights that are to be quantized.
struct Groups {
    const float* values;      // [count, 16]: those of a column side by side
    const float* importance;  // [count]
    int64_t count;
};

struct Kernels {
    const char* name;
    // One row of `columns` floats in groups that are `side` apart, the last one filled up with zeros.
    void (*quantize)(const float* x, int64_t columns, int64_t side, int8_t* codes, InputGroup* groups);
    // out[row, r] = y[r], or += with `add`, for rows of inputs and blocks of weights; `out` has `stride`
    // floats a row.
    void (*product)(const Weights&, const Inputs&, Range rows, Range blocks, float* out, int64_t stride,
                    bool add);
    // out[row, r] += y[r], of t [rows, t_stride].
    void (*back)(const Back&, const float* t, int64_t t_stride, Range rows, Range blocks, float* out,
                 int64_t stride);
    // y = x / sqrt(mean(x²) + eps) · weight; y may be x.
    void (*rms_norm)(const float* x, const float* weight, float eps, int64_t count, float* y);
    // The same of x - mean(x), plus bias; null: none.
    void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int64_t count,
                       float* y);
    // x[i] · cos[i] + rotate_half(x)[i] · sin[i], in place, of one head; tables of head_dim / 2.
    void (*rotate)(float* x, const float* cos, const float* sin, int64_t head_dim);
    // x = activation(x) · up; up null: 1.
    void (*activate)(Activation, const float* up, int64_t count, float* x);
    // x += scale · y.
    void (*add)(const float* y, float scale, int64_t count, float* x);
    // x *= scale, and then cap · tanh(x / cap); 0: no cap.
    void (*scale)(float scale, float cap, int64_t count, float* x);
    // x = factor · x + shift, and then plus `onto`; null: 0.
    void (*affine)(const float* factor, const float* shift, const float* onto, int64_t count, float* x);
    // Writes a position's key and value of one kv head into its block.
    void (*keep)(const Heads&, const float* key, const float* value, int64_t position, void* keys,
                 void* values);
    // Attention of a group's queries [group, head_dim] to some positions of a block. A state holds, for each
    // query, the largest score, the sum of weights and the weighted sum of values: [group, 2 + head_dim].
    // What stands at `then` is read next.
    void (*attend)(const Heads&, const float* q, const void* keys, const void* values, Range positions,
                   float* state, const void* then);
    // out [group, head_dim] = what the states of `count` blocks come to; `weights` has room for `count`.
    void (*join)(const Heads&, const float* states, int64_t count, float* weights, float* out);
    // The highest value of each block of kMassBlock. Returns whether all are numbers.
    bool (*maxima)(const float* values, int64_t count, float* found);
    // What the weights of each block come to, of values that are no lower than `least`.
    void (*masses)(const Candidates&, Range blocks, float least, float* sums);
    // The kMassBlock weights of a block; 0 beyond the last value.
    void (*weights)(const Candidates&, int64_t block, float* found);
    // 4-bit codes [count, 16] of groups, and the scales (bfloat16) and offsets [16] of the least squared
    // error, weighted by importance: values ≈ scale · codes + offset.
    void (*cover_groups)(const Groups&, int8_t* codes, float* scales, float* offsets);
    // Σ x².
    double (*square)(const float* x, int64_t count);
};

}  // namespace bedplate
