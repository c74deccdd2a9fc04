// Steps of a model: rows of tokens in, logits out.
//
// A row is one token of one session; a step takes many, of any sessions, positions, adapters and scales. What
// a row comes to does not depend on what else is in the step, on how many threads compute it, or on how a
// session's tokens were cut into steps.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <mutex>
#include <vector>

#include "kernels.h"
#include "kv.h"
#include "logits.h"
#include "memory.h"
#include "model.h"
#include "team.h"

namespace bedplate {

inline Range overlap(Range a, Range b) { return {std::max(a.begin, b.begin), std::min(a.end, b.end)}; }

struct Row {
    std::int64_t token, position;
    Kv* kv;
    const Adapter* adapter;  // null: the base
    float scale;             // of the adapter
    bool wanted;             // whether its logits are
};

// Rows of inputs of linears; memory grows as it is needed.
struct InputRows {
    // For the codes of so many rows.
    void fit(std::int64_t rows, std::int64_t columns);
    // `rows` rows of x, whose codes stand here, as kernels take them.
    Inputs view(const float* x, std::int64_t stride, std::int64_t rows, std::int64_t columns) const;
    // Writes the codes of some columns of a row, from a multiple of kGroup on.
    void quantize(const Kernels& kernels, const Inputs& view, std::int64_t row, Range columns);

    Array<float> floats;  // [rows, columns], if nothing else holds them
    Array<std::int8_t> codes;
    Array<InputGroup> groups;
};

// How far the pairs of a head turn at each position so far: [positions, head_dim / 2].
struct Turns {
    void reach(const std::vector<float>& frequencies, float scale, std::int64_t positions);

    std::vector<float> cos, sin;
};

class Decoder {
  public:
    // InvalidError: the model's sizes do not fit each other.
    Decoder(Model model, int threads);

    const Model& model() const { return model_; }
    int threads() const { return team_.size(); }
    // Of the logits of its steps.
    const std::shared_ptr<Spare>& spare() const { return spare_; }
    KvShape kv_shape(bool half, bool of_long) const {
        return {static_cast<std::int64_t>(model_.layers.size()), model_.kv_heads, model_.head_dim, half,
                of_long};
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
    struct Part {  // what a branch adds to some rows
        const Branch* branch;
        Range rows;
        float* t;  // narrow values
        bool scaled;
    };
    struct Own {  // memory of a thread
        InputRows inputs;
        std::vector<Part> parts;
        Array<float> x;  // the residual of a single row
        Array<float> queries, states, weights;
    };
    struct Outputs {
        float* to;
        std::int64_t stride;
        bool add;
    };
    using Shares = std::array<Range, 3>;  // blocks of each linear of a place

    void check(const std::vector<Row>& rows) const;
    void prepare(const std::vector<Row>& rows, float* logits);
    void make_room(std::int64_t last);

    std::int64_t rows() const { return static_cast<std::int64_t>(rows_.size()); }
    const Row& row(std::int64_t i) const { return rows_[static_cast<std::size_t>(i)]; }
    bool alone() const { return rows_.size() == 1; }
    Range mine(int thread, std::int64_t count) const;
    Range my_rows(int thread) const;
    Shares shares(int thread, const Linears& linears, Place place, std::int64_t narrow) const;
    InputRows& prepared(int thread);
    void meet_if_shared(int thread);

    void work(int thread);
    void embed(int thread);
    void layer(int thread, std::int64_t index);
    float* residual(int thread);
    Outputs given();
    void add(int thread, const Norm& norm);
    const float* normalize(const Norm& norm, const float* x, float* y) const;
    Inputs norm(int thread, const Norm& norm);
    Inputs mlp_in(int thread, std::int64_t layer, const Inputs& read);
    const std::vector<Part>& parts_of(int thread, std::int64_t layer, Place place);
    Shares apply(int thread, std::int64_t layer, Place place, const Inputs& inputs, const Outputs& out);
    void narrow(int thread, const std::vector<Part>& parts, std::int64_t blocks, const Inputs& inputs);
    void head(int thread);

    Heads heads(std::int64_t row) const;
    void norm_whole(int thread, const Layer& layer);
    bool of_heads(const Layer& layer) const;
    void prepare_head(const Layer& layer, const std::vector<float>& weight, std::int64_t row, float* x) const;
    Range seen(std::int64_t layer, std::int64_t row) const;
    static Range blocks_of(Range positions);
    void keep(std::int64_t layer, std::int64_t row, std::int64_t head);
    void attend(int thread, std::int64_t layer);
    void attend(int thread, std::int64_t layer, std::int64_t pair, Range blocks, const void* then);
    void join(int thread, std::int64_t layer, std::int64_t pair, const float* states, float* floats);
    Inputs attended(int thread, std::int64_t layer);

    Model model_;
    const Kernels& kernels_;
    Team team_;
    std::shared_ptr<Spare> spare_ = std::make_shared<Spare>();
    std::mutex mutex_;

    // Of the running step.
    std::vector<Row> rows_;  // by adapter
    std::vector<Run> runs_;
    std::vector<std::int64_t> wanted_;  // rows, in the caller's order
    float* logits_ = nullptr;
    std::int64_t most_blocks_ = 0;  // of positions
    bool chained_ = false;          // whether rows attend to others of the step
    bool split_ = false;            // whether blocks of one head are attended to by several threads
    bool whole_groups_ = false;     // whether what one head comes to is whole groups of inputs
    std::int64_t ranks_ = 0;        // narrow values that a row has room for
    Array<float> x_, out_;          // the residual [rows, stride]; outputs of linears [rows, width]
    Array<float> given_,
        mlp_;  // what is to be added to the residual; outputs of the MLP's beside attention's
    InputRows inputs_, hidden_;                // of all linears but the last of a layer; of the last
    Array<float> corrected_, adapted_;         // narrow values, [rows, ranks]
    Array<float> states_;                      // of attention, [rows, kv heads, blocks], if it is split
    std::vector<Own> own_;                     // of each thread
    std::vector<std::array<Turns, 2>> turns_;  // of each rotary embedding, and of its long texts
};

}  // namespace bedplate
