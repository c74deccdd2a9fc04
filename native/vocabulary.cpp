// From tokens to the residual, and from the residual to logits.
#include <algorithm>
#include <limits>

#include "decoder.h"

namespace bedplate {

void Decoder::embed(int thread) {
    const Range some = residual(thread) == x_.data() ? mine(thread, rows()) : my_rows(thread);
    const float factor = model_.rules.embedding_scale;
    for (std::int64_t i = some.begin; i < some.end; ++i) {
        float* x = residual(thread) + i * model_.stride;
        read_token(row(i), x);
        if (row(i).adapter != nullptr) add_branches(thread, row(i), x);
        if (factor != 1) kernels_.scale(factor, 0, model_.dim, x);
    }
}

// Writes the row of a row's token.
void Decoder::read_token(const Row& row, float* x) const {
    if (row.adapter != nullptr) {
        const Adapter::Embedding& e = row.adapter->embedding;
        const auto found = std::lower_bound(e.ids.begin(), e.ids.end(), row.token);
        if (found != e.ids.end() && *found == row.token) return e.rows->read_row(found - e.ids.begin(), x);
        if (e.table != nullptr) return e.table->read_row(row.token, x);
        if (e.of_head) return row.adapter->head.linears.weights[0]->read_row(row.token, x);
    }
    if (model_.embedding != nullptr) return model_.embedding->read_row(row.token, x);
    model_.head.weights[0]->read_row(row.token, x);
}

// x += B · the token's row of A, of each branch.
void Decoder::add_branches(int thread, const Row& row, float* x) {
    float* const t = own_[static_cast<std::size_t>(thread)].scratch.data();
    for (const auto& [narrow, back, factor] : row.adapter->embedding.terms) {
        narrow->read_row(row.token, t);
        for (std::int64_t j = 0; j < narrow->columns(); ++j) t[j] *= factor * row.scale;
        kernels_.back(back->view(), t, 0, {0, 1}, {0, whole(model_.dim, kBlock)}, x, 0);
    }
}

// The rows with logits, each head's together: its weights are then read once. `places`: of them among all
// rows, in the caller's order.
void Decoder::prepare_logits(const std::vector<std::int64_t>& places) {
    const auto head_of = [&](std::int64_t place) -> const Linears* {
        const Adapter* adapter = row(place).adapter;
        return adapter == nullptr || !adapter->head.is_own() ? &model_.head : &adapter->head.linears;
    };
    std::vector<std::int64_t> order(places.size()), to(places.size());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<std::int64_t>(i);
    const auto place_of = [&](std::int64_t number) { return places[static_cast<std::size_t>(number)]; };
    std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
        const Linears *one = head_of(place_of(a)), *other = head_of(place_of(b));
        if (one != other) return std::less<const Linears*>()(one, other);
        return std::less<const Adapter*>()(row(place_of(a)).adapter, row(place_of(b)).adapter);
    });
    wanted_ = {};
    from_.clear();
    heads_.clear();
    for (std::size_t i = 0; i < order.size(); ++i) {
        const std::int64_t place = place_of(order[i]), at = static_cast<std::int64_t>(i);
        if (heads_.empty() || heads_.back().linears != head_of(place))
            heads_.push_back({kHead, 0, head_of(place), &wanted_, {at, at}});
        heads_.back().rows.end = at + 1;
        wanted_.add(row(place));
        from_.push_back(place);
    }
    swaps_.clear();
    for (std::size_t i = 0; i < order.size(); ++i)  // row i of what is computed is row order[i] of the caller
        while (order[i] != static_cast<std::int64_t>(i)) {
            const std::int64_t to = order[i];
            swaps_.emplace_back(static_cast<std::int64_t>(i), to);
            std::swap(order[i], order[static_cast<std::size_t>(to)]);
        }
}

void Decoder::head(int thread) {
    if (wanted_.rows.empty()) return;
    const Inputs inputs = head_in(thread);
    for (const Work& work : heads_) logits_of(thread, work, inputs);
    if (swaps_.empty()) return;
    team_.meet();
    const Range some = mine(thread, width_);
    for (const auto& [a, b] : swaps_)
        std::swap_ranges(logits_ + a * width_ + some.begin, logits_ + a * width_ + some.end,
                         logits_ + b * width_ + some.begin);
}

// The normed rows that have logits, as inputs.
Inputs Decoder::head_in(int thread) {
    const auto count = static_cast<std::int64_t>(wanted_.rows.size());
    const std::int64_t dim = model_.dim;
    InputRows& to = prepared(thread);
    const Inputs inputs = to.view(to.floats.data(), dim, count, dim);
    const Range some = alone() ? Range{0, count} : mine(thread, count);
    if (!model_.direct) meet_if_shared();  // rows that other threads have added to
    for (std::int64_t i = some.begin; i < some.end; ++i) {
        const auto at = static_cast<std::size_t>(i);
        const float* x = residual(thread) + from_[at] * model_.stride;
        const Adapter* adapter = wanted_.rows[at].adapter;
        float* const floats = to.floats.data() + i * dim;
        if (model_.norm.weight.empty())
            std::copy_n(x, dim, floats);
        else
            normalize(model_.norm, adapter == nullptr ? nullptr : &adapter->norm, x, floats);
        to.quantize(kernels_, inputs, i, {0, dim});
    }
    meet_if_shared();
    return inputs;
}

// This thread's columns of the logits of one head's rows.
void Decoder::logits_of(int thread, const Work& work, const Inputs& inputs) {
    const Range blocks = apply(thread, work, inputs, {logits_, width_, false})[0];
    const bool last = thread + 1 == threads();  // has what lies beyond the head, too
    const Range columns{blocks.begin * kBlock,
                        last ? width_ : std::min(blocks.end * kBlock, work.linears->weights[0]->rows())};
    if (columns.begin >= columns.end) return;
    const Rules& r = model_.rules;
    for (const Run& run : wanted_.runs) {
        const Range some = overlap(run.rows, work.rows);
        if (some.begin >= some.end) continue;
        if (run.adapter != nullptr) own_rows(thread, *run.adapter, some, inputs, columns);
        const std::int64_t vocab = run.adapter == nullptr ? model_.vocab : run.adapter->vocab;
        const std::int64_t end = std::clamp(vocab, columns.begin, columns.end);
        for (std::int64_t i = some.begin; i < some.end; ++i) {
            float* const logits = logits_ + i * width_;
            if ((r.logit_scale != 1 || r.logit_cap != 0) && columns.begin < end)
                kernels_.scale(r.logit_scale, r.logit_cap, end - columns.begin, logits + columns.begin);
            std::fill(logits + end, logits + columns.end, -std::numeric_limits<float>::infinity());
        }
    }
}

// The logits of tokens that have rows of their own in the head of an adapter, as far as they are among these
// columns.
void Decoder::own_rows(int thread, const Adapter& adapter, Range rows, const Inputs& inputs, Range columns) {
    const auto& ids = adapter.head.ids;
    const auto number_of = [&](std::int64_t token) {
        return std::lower_bound(ids.begin(), ids.end(), token) - ids.begin();
    };
    const Range numbers{number_of(columns.begin), number_of(columns.end)};
    if (numbers.begin == numbers.end) return;
    float* const out = own_[static_cast<std::size_t>(thread)].scratch.data();
    for (std::int64_t b = numbers.begin / kBlock; b < whole(numbers.end, kBlock); ++b) {
        Weights block = adapter.head.rows->view();
        block.rows -= b * kBlock;
        block.floats += b * kBlock * block.columns;
        kernels_.product(block, inputs, rows, {0, 1}, out, kBlock, false);
        const Range some = overlap(numbers, {b * kBlock, (b + 1) * kBlock});
        for (std::int64_t i = rows.begin; i < rows.end; ++i)
            for (std::int64_t j = some.begin; j < some.end; ++j)
                logits_[i * width_ + ids[static_cast<std::size_t>(j)]] = out[i * kBlock + j - b * kBlock];
    }
}

}  // namespace bedplate
