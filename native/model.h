// A model as data: what its layers are, and their weights.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "matrix.h"

namespace bedplate {

// y += B (A x), a narrow value between: an adapter's branch, or what a correction gives back.
struct Branch {
    std::shared_ptr<Matrix> narrow;                  // A
    std::vector<std::shared_ptr<BackMatrix>> backs;  // B of linears of the place
};

// The places of a layer whose linears share one input; and the head, which is no layer's.
enum Place : int { kAttentionIn, kAttentionOut, kMlpIn, kMlpOut, kPlaces, kHead = kPlaces };

struct Linears {
    std::vector<std::shared_ptr<Matrix>> weights;
    std::shared_ptr<const Branch> correction;  // null: none
    std::vector<std::int64_t> firsts;          // where the outputs of each begin in a row, at whole blocks
    std::int64_t width = 0;                    // floats from a row of outputs to the next
    std::int64_t columns = 0;
};

// Weights of a norm, and what is added after; without weights it changes nothing.
struct Norm {
    std::vector<float> weight, bias;
};

// A rotary embedding: cos(position · frequency) · scale, and sin likewise, of the pairs (i, i + head_dim / 2)
// of a head; a pair of frequency 0 stays as it is.
struct Rope {
    std::vector<float> frequencies;
    std::vector<float> of_long;  // of a long text, for all its positions; empty: the same
    float scale;
};

constexpr int kNoRope = -1;

// The norms of a layer.
struct Norms {
    Norm attention_norm, attention_output_norm, mlp_norm, mlp_output_norm;
    std::vector<float> q_norm, k_norm;  // of each head or of all together, before they turn; empty: none

    static constexpr Norm Norms::* kAll[] = {&Norms::attention_norm, &Norms::attention_output_norm,
                                             &Norms::mlp_norm, &Norms::mlp_output_norm};
    std::size_t floats() const;
};

// With x the residual: x += residual_scale · attention_output_norm(attention(attention_norm(x))), and the
// same of the MLP.
struct Layer : Norms {
    int rope = kNoRope;       // of the model's
    std::int64_t window = 0;  // keys that a query sees, its own included; 0: all
    Linears places[kPlaces];
};

// What is computed around the linears.
struct Rules {
    bool layer_norm = false;  // or RMS norm
    float norm_eps = 0;
    bool parallel = false;  // the MLP reads what attention reads
    Activation activation = Activation::kSilu;
    bool gated = true;  // down(activation(gate) · up), or down(activation(up))
    float embedding_scale = 1, residual_scale = 1, attention_scale = 1, logit_scale = 1;
    float score_cap = 0, logit_cap = 0;  // 0: none
    // Queries at a position times 1 + growth · log(1 + floor(position / growth_positions)).
    float query_growth = 0;
    std::int64_t growth_positions = 1;
};

struct Model {
    std::int64_t dim, heads, kv_heads, head_dim, hidden, vocab, max_positions;
    Rules rules;
    std::vector<Rope> ropes;
    std::shared_ptr<Table> embedding;  // null: rows of the head
    Linears head;                      // one
    Norm norm;
    std::vector<Layer> layers;
    std::int64_t stride = 0;  // floats from a row of the residual to the next
    bool direct = false;      // what layers give is added to the residual as it is

    std::size_t bytes() const;
};

// Reads the weights on so many threads. InvalidError: a file ends too early.
void read(const Model& model, int threads);

// Lays out the outputs of each place, and checks that all sizes fit each other. InvalidError: they do not.
void complete(Model& model);

// --- What models and adapters have in common

constexpr std::int64_t kMostRanks = 4096;      // narrow values of a branch
constexpr std::int64_t kMostTokens = 1 << 24;  // or anything else that a model has many of

// The outputs of linears of so many rows each, at whole blocks. InvalidError: their shapes are others.
void lay_out(Linears& linears, const std::vector<std::int64_t>& rows, std::int64_t columns);
// InvalidError: a branch does not fit the linears.
void check(const Branch& branch, const Linears& linears);

using Readables = std::vector<Readable*>;

void collect(const Branch& branch, Readables& all);
// Of the memory that all take, each counted once.
std::size_t bytes_of(const Readables& all);

}  // namespace bedplate
