// Steps of a model: rows of tokens in, logits out.
//
// A row is one token of one session; a step takes many, of any sessions, positions, adapters and scales. What
// a row comes to does not depend on what else is in the step, on how many threads compute it, or on how a
// session's tokens were cut into steps.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "kernels.h"
#include "kv.h"
#include "memory.h"
#include "model.h"
#include "team.h"

namespace bedplate {

struct Row {
    std::int64_t token, position;
    Kv* kv;
    const Adapter* adapter;  // null: the base
    float scale;             // of the adapter
    bool wanted;             // whether its logits are
};

// Memory of a step for some rows; grows as it is needed.
struct Workspace {
    void fit(std::int64_t rows, std::int64_t columns, std::int64_t ranks);
    // Where `rows` rows of x, whose codes stand here, are for kernels.
    Inputs inputs(const float* x, std::int64_t stride, std::int64_t rows, std::int64_t columns) const;

    Array<float> floats;       // inputs of linears, [rows, columns]
    Array<std::int8_t> codes;  // the same in groups
    Array<InputGroup> groups;
    Array<float> corrected, adapted;  // narrow values, [rows, ranks]
    Array<float> state;               // of one kv head's attention; of a thread's own
};

class Decoder {
  public:
    // InvalidError: the model's sizes do not fit each other.
    Decoder(Model model, int threads);

    const Model& model() const { return model_; }
    int threads() const { return team_.size(); }
    KvShape kv_shape(bool half) const {
        return {static_cast<std::int64_t>(model_.layers.size()), model_.kv_heads, model_.head_dim, half};
    }

    // Computes rows, in the order of the sessions' positions, and writes logits [wanted rows, vocab]. Keys
    // and values of each row's position are written; those of the positions before it must be there, or be of
    // this step. InvalidError: a row is out of bounds; nothing has changed then.
    void step(const std::vector<Row>& rows, float* logits);

  private:
    struct Run {  // rows of one adapter
        Range rows;
        const Adapter* adapter;
    };

    void check(const std::vector<Row>& rows) const;
    void prepare(const std::vector<Row>& rows, float* logits);
    void work(int thread);
    void embed(int thread);
    void layer(int thread, std::int64_t index);
    void rotate_and_keep(int thread, std::int64_t layer);
    void attend(int thread, std::int64_t layer);
    void collect(int thread);
    void head(int thread);

    bool alone() const { return rows_.size() == 1; }
    Workspace& space(int thread) { return alone() ? own_[static_cast<std::size_t>(thread)] : shared_; }
    Range mine(int thread, std::int64_t count) const;
    Range my_rows(int thread) const;
    void norm(int thread, const std::vector<float>& weight);
    void apply(int thread, const Linears& linears, Place place, std::int64_t layer, const float* x,
               std::int64_t stride, float* out, std::int64_t out_stride, bool add);
    void narrow(const Branch& branch, const Inputs& inputs, Range rows, float* t);
    void add_backs(const Branch& branch, std::size_t linear, const float* t, Range rows, Range blocks,
                   float* out, std::int64_t stride);
    Heads heads(const Row& row) const;
    float* state(std::int64_t row, std::int64_t head, std::int64_t block);

    Model model_;
    const Kernels& kernels_;
    Team team_;
    std::mutex mutex_;

    // Of the running step.
    std::vector<Row> rows_;  // by adapter
    std::vector<Run> runs_;
    std::vector<std::int64_t> wanted_;  // rows, in the caller's order
    float* logits_ = nullptr;
    Array<float> x_, out_;  // [rows, stride], [rows, width]
    Array<float> states_;   // of attention
    bool split_ = false;    // whether blocks of a head are states of their own
    std::int64_t most_blocks_ = 0;
    std::int64_t ranks_ = 0;  // narrow values that a row has room for: those of its adapter, which may differ
    Workspace shared_;
    std::vector<Workspace> own_;    // of each thread
    std::vector<float> cos_, sin_;  // [positions so far, head_dim / 2]
};

}  // namespace bedplate
