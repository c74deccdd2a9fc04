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
#include <utility>
#include <vector>

#include "adapter.h"
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
    float scale;             // of the adapter's branches
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
    // meter: of its sessions' keys and values. InvalidError: the model's sizes do not fit each other.
    Decoder(Model model, int threads, std::shared_ptr<Meter> meter);

    const Model& model() const { return model_; }
    int threads() const { return team_.size(); }
    // Of the logits of its steps.
    const std::shared_ptr<Spare>& spare() const { return spare_; }
    const std::shared_ptr<Meter>& meter() const { return meter_; }
    const Kernels& kernels() const { return kernels_; }
    // Of sessions with an adapter; null: with the base.
    KvShape kv_shape(const Adapter* adapter, bool half, bool of_long) const {
        const std::size_t layers = adapter == nullptr ? model_.layers.size() : adapter->layers.size();
        return {static_cast<std::int64_t>(layers), model_.kv_heads, model_.head_dim, half, of_long};
    }
    // How many logits a row has.
    std::int64_t vocab(const Row& row) const {
        return row.adapter == nullptr ? model_.vocab : row.adapter->vocab;
    }

    // Computes rows, in the order of the sessions' positions, and writes logits [wanted rows, width], at most
    // `width` of a row, and -inf beyond what it has. Keys and values of each row's position are written;
    // those of the positions before it must be there, or be of this step. All rows have the same layers, one
    // after the other. InvalidError: they have not, or a row is out of bounds; nothing has changed then.
    void step(const std::vector<Row>& rows, std::int64_t width, float* logits);

  private:
    struct Run {  // rows of one adapter
        Range rows;
        const Adapter* adapter;
    };
    struct Batch {
        std::vector<Row> rows;  // by adapter
        std::vector<Run> runs;

        void add(const Row& row);
    };
    struct Part {  // what a branch adds to some rows
        const Branch* branch;
        Range rows;
        float* t;  // narrow values
        float factor;
        bool scaled;  // or neither by the factor nor by the rows' scales
    };
    struct Finish {  // what becomes of the outputs of a linear for some rows
        const Affine* affine;
        std::size_t linear;
        Range rows;
    };
    struct Work {  // products of the linears of a place, for some rows
        Place place;
        std::int64_t layer;  // the step's; of the head any
        const Linears* linears;
        const Batch* batch;
        Range rows;
    };
    struct Changes {
        std::vector<Part> parts;
        std::vector<Finish> finishes;
    };
    struct Own {  // memory of a thread
        InputRows inputs;
        Changes changes;
        Array<float> x;  // the residual of a single row
        Array<float> queries, states, weights;
        Array<float> scratch;  // narrow values of a token; logits of a block
    };
    struct Outputs {
        float* to;
        std::int64_t stride;
        bool add;
    };
    using Shares = std::array<Range, 3>;  // blocks of each linear of a place

    void check(const std::vector<Row>& rows) const;
    void prepare(const std::vector<Row>& rows);
    void prepare_logits(const std::vector<std::int64_t>& places);
    void make_room(std::int64_t last);

    std::int64_t rows() const { return static_cast<std::int64_t>(all_.rows.size()); }
    const Row& row(std::int64_t i) const { return all_.rows[static_cast<std::size_t>(i)]; }
    bool alone() const { return all_.rows.size() == 1; }
    // The room that the narrow values of a branch take in a row.
    static std::int64_t ranks_of(const Branch& branch) { return branch.narrow->blocks() * kBlock; }
    // The model's layer that stands at a place of the step's.
    const Layer& layer_of(std::int64_t index) const {
        return model_.layers[static_cast<std::size_t>(layers_[static_cast<std::size_t>(index)])];
    }
    // The norms that the adapter of a row has in a layer; null: none.
    const Norms* own(std::int64_t index, std::int64_t i) const {
        const Adapter* adapter = row(i).adapter;
        return adapter == nullptr ? nullptr : &adapter->layers[static_cast<std::size_t>(index)];
    }
    const Norm* own(std::int64_t index, std::int64_t i, Norm Norms::* which) const {
        const Norms* norms = own(index, i);
        return norms == nullptr ? nullptr : &(norms->*which);
    }
    Range mine(int thread, std::int64_t count) const;
    Range my_rows(int thread) const;
    Shares shares(int thread, const Linears& linears, Place place, std::int64_t narrow) const;
    InputRows& prepared(int thread);
    void meet_if_shared();

    void work(int thread);
    void embed(int thread);
    void read_token(const Row& row, float* x) const;
    void add_branches(int thread, const Row& row, float* x);
    void layer(int thread, std::int64_t index);
    float* residual(int thread);
    Outputs given();
    void add(int thread, std::int64_t index, Norm Norms::* which);
    const float* normalize(const Norm& norm, const Norm* own, const float* x, float* y) const;
    Inputs norm(int thread, std::int64_t index, Norm Norms::* which);
    Inputs mlp_in(int thread, std::int64_t layer, const Inputs& read);
    Work at(std::int64_t layer, Place place) const;
    const Changes& changes_of(int thread, const Work& work);
    Shares apply(int thread, const Work& work, const Inputs& inputs, const Outputs& out);
    void narrow(int thread, const Work& work, std::int64_t blocks, const Inputs& inputs);
    void set_aside(const Work& work, const Finish& finish, const Shares& blocks, const Outputs& out);
    void finish(const Work& work, const Finish& finish, const Shares& blocks, const Outputs& out);
    void head(int thread);
    Inputs head_in(int thread);
    void logits_of(int thread, const Work& work, const Inputs& inputs);
    void own_rows(int thread, const Adapter& adapter, Range rows, const Inputs& inputs, Range columns);

    Heads heads(std::int64_t row) const;
    void norm_whole(int thread, std::int64_t index);
    const std::vector<float>& head_norm(std::int64_t index, std::int64_t row,
                                        std::vector<float> Norms::* which) const;
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
    std::shared_ptr<Meter> meter_;
    Team team_;
    std::shared_ptr<Spare> spare_ = std::make_shared<Spare>();
    std::mutex mutex_;

    // Of the running step.
    Batch all_;
    std::vector<std::int64_t> layers_;  // of the model, in their order
    Batch wanted_;                      // rows with logits, by the head that they have
    std::vector<std::int64_t> from_;    // their places among all rows
    std::vector<Work> heads_;
    std::vector<std::pair<std::int64_t, std::int64_t>> swaps_;  // that bring logits into the caller's order
    std::int64_t width_ = 0;                                    // of a row of logits
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
