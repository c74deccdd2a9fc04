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

// The places of a layer whose linears share one input.
enum Place : int { kAttentionIn, kAttentionOut, kMlpIn, kMlpOut, kPlaces };

struct Linears {
    std::vector<std::shared_ptr<Matrix>> weights;
    std::shared_ptr<const Branch> correction;  // null: none
    std::vector<std::int64_t> firsts;          // where the outputs of each begin in a row, at whole blocks
    std::int64_t width = 0;                    // floats from a row of outputs to the next
    std::int64_t columns = 0;
};

struct Layer {
    std::vector<float> attention_norm, mlp_norm;
    Linears places[kPlaces];
};

struct Model {
    std::int64_t dim, heads, kv_heads, head_dim, hidden, vocab, max_positions;
    float norm_eps;
    std::vector<float> inverse_frequencies;  // of rotary embedding, [head_dim / 2]
    std::shared_ptr<Table> embedding;        // null: rows of the head
    std::shared_ptr<Matrix> head;
    std::vector<float> norm;
    std::vector<Layer> layers;
    std::int64_t stride = 0;  // floats from a row of the residual to the next

    std::size_t bytes() const;
};

// A LoRA adapter: branches of each layer's places; null: none there.
struct Adapter {
    struct OfLayer {
        std::shared_ptr<const Branch> places[kPlaces];
    };
    std::vector<OfLayer> layers;

    std::size_t bytes() const;
};

// Reads the weights on so many threads. InvalidError: a file ends too early.
void read(const Model& model, int threads);
void read(const Adapter& adapter, int threads);

// Lays out the outputs of each place, and checks that all sizes fit each other. InvalidError: they do not.
void complete(Model& model);
// InvalidError: a branch does not fit the model.
void check(const Adapter& adapter, const Model& model);

}  // namespace bedplate
