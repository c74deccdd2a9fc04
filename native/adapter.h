// A LoRA adapter as data: what it adds to a model's products, and what it has in place of the model's
// weights.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "model.h"

namespace bedplate {

// What the outputs of a linear become: factor · y + shift. Both empty: they stay.
struct Affine {
    std::vector<float> factor, shift;
};

// A branch, and what it is multiplied by beside the scale of a row.
struct Term {
    std::shared_ptr<const Branch> branch;
    float factor;
};

// What an adapter changes at linears of one input.
struct Change {
    std::vector<Term> terms;      // one after the other; of a sum of adapters, several
    std::vector<Affine> affines;  // of each linear, after the branches; empty: of none
};

// What an adapter has of its own; the rest it takes from the model.
struct Adapter {
    // Norms: weights, and biases, that are empty are the model's.
    struct OfLayer : Norms {
        std::int64_t base = 0;  // the layer of the model whose weights it uses
        Change places[kPlaces];
    };

    // x = embedding_scale · (row of the token + Σ factor · B · the token's row of A)
    struct Embedding {
        struct Term {
            std::shared_ptr<Table> narrow;  // A [vocab, rank]
            std::shared_ptr<BackMatrix> back;
            float factor;
        };

        std::shared_ptr<Table> table;  // null: the model's
        bool of_head = false;          // rows of its own head
        std::vector<Term> terms;
        std::vector<std::int64_t> ids;  // tokens that have rows of their own, ascending
        std::shared_ptr<Table> rows;    // these, float32; null: none

        bool has_table() const { return table != nullptr || of_head; }
    };

    struct Head {
        Linears linears;  // one; none: the model's
        Change change;
        std::vector<std::int64_t> ids;  // tokens whose logits are rows of their own · x, ascending
        std::shared_ptr<Matrix> rows;   // these, float32; null: none

        bool is_own() const { return !linears.weights.empty(); }
    };

    std::int64_t vocab = 0;  // tokens: those of the model, and maybe more
    std::vector<OfLayer> layers;
    Norm norm;
    Embedding embedding;
    Head head;
    std::vector<std::shared_ptr<const Adapter>> parts;  // whose branches it has, if it is a sum

    std::size_t bytes() const;
};

// Reads the weights on so many threads. InvalidError: a file ends too early.
void read(const Adapter& adapter, int threads);

// Lays out its head. InvalidError: what it has does not fit together.
void complete(Adapter& adapter);
// InvalidError: an adapter that is complete does not fit the model.
void check(const Adapter& adapter, const Model& model);

struct Weighted {
    std::shared_ptr<const Adapter> adapter;
    float factor;
};

// What complete adapters add, each times its factor, in this order; it has no weights of its own.
// InvalidError: one has more than branches, or they have other layers or other tokens.
std::shared_ptr<Adapter> sum_of(const std::vector<Weighted>& parts);

}  // namespace bedplate
