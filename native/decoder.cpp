#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "instruction_sets.h"

namespace bedplate {
namespace {

// What is there is lost if the memory grows.
template <class T>
void at_least(Array<T>& memory, std::int64_t size) {
    if (memory.size() < static_cast<std::size_t>(size)) memory = Array<T>(static_cast<std::size_t>(size));
}

std::int64_t side(std::int64_t rows) { return rows == 1 ? 1 : kSide; }

// A block of 8-bit weights takes as long as so many of 4 bits.
constexpr std::int64_t kNarrowCost = 2;

Range overlap(Range a, Range b) { return {std::max(a.begin, b.begin), std::min(a.end, b.end)}; }

}  // namespace

void InputRows::fit(std::int64_t rows, std::int64_t columns) {
    const std::int64_t groups = whole(rows, side(rows)) * side(rows) * whole(columns, kGroup);
    at_least(codes, groups * kGroup);
    at_least(this->groups, groups);
}

Inputs InputRows::view(const float* x, std::int64_t stride, std::int64_t rows, std::int64_t columns) const {
    return {x, stride, codes.data(), groups.data(), whole(columns, kGroup), side(rows)};
}

void InputRows::quantize(const Kernels& kernels, const Inputs& view, std::int64_t row, Range columns) {
    const std::int64_t place = view.place(row) + columns.begin / kGroup * view.side;
    kernels.quantize(view.floats + row * view.stride + columns.begin, columns.end - columns.begin, view.side,
                     codes.data() + place * kGroup, groups.data() + place);
}

Decoder::Decoder(Model model, int threads)
    : model_(std::move(model)),
      kernels_(current_kernels()),
      team_(threads),
      own_(static_cast<std::size_t>(threads)) {
    complete(model_);
}

void Decoder::step(const std::vector<Row>& rows, float* logits) {
    const std::lock_guard<std::mutex> lock(mutex_);
    check(rows);
    prepare(rows, logits);
    team_.run([this](int thread) { work(thread); });
}

void Decoder::check(const std::vector<Row>& rows) const {
    require(!rows.empty(), "a step of no rows");
    const KvShape shape = kv_shape(false);
    const Adapter* checked = nullptr;  // rows of one adapter mostly follow each other
    for (const Row& row : rows) {
        require(row.token >= 0 && row.token < model_.vocab, "a token is not in the vocabulary");
        require(row.position >= 0 && row.position < model_.max_positions, "a position is beyond the model's");
        require(row.kv != nullptr, "a row has no session");
        const KvShape& kv = row.kv->shape();
        require(kv.layers == shape.layers && kv.heads == shape.heads && kv.head_dim == shape.head_dim,
                "a session is of another model");
        if (row.adapter != nullptr && row.adapter != checked) bedplate::check(*row.adapter, model_);
        checked = row.adapter;
    }
}

void Decoder::prepare(const std::vector<Row>& rows, float* logits) {
    std::vector<std::int64_t> order(rows.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
        return std::less<const Adapter*>()(rows[static_cast<std::size_t>(a)].adapter,
                                           rows[static_cast<std::size_t>(b)].adapter);
    });
    rows_.clear();
    runs_.clear();
    wanted_.clear();
    std::vector<std::int64_t> place(rows.size());
    std::int64_t last = 0;
    for (const std::int64_t from : order) {
        const Row& row = rows[static_cast<std::size_t>(from)];
        const auto at = static_cast<std::int64_t>(rows_.size());
        if (runs_.empty() || runs_.back().adapter != row.adapter) runs_.push_back({{at, at}, row.adapter});
        runs_.back().rows.end = at + 1;
        place[static_cast<std::size_t>(from)] = at;
        rows_.push_back(row);
        last = std::max(last, row.position);
    }
    for (std::size_t i = 0; i < rows.size(); ++i)
        if (rows[i].wanted) wanted_.push_back(place[i]);
    for (const Row& row : rows_) row.kv->reserve(row.position + 1);
    logits_ = logits;
    make_room(last);

    const std::int64_t half = model_.head_dim / 2;
    for (auto position = static_cast<std::int64_t>(cos_.size()) / half; position <= last; ++position)
        for (const float frequency : model_.inverse_frequencies) {
            const float angle = static_cast<float>(position) * frequency;
            cos_.push_back(std::cos(angle));
            sin_.push_back(std::sin(angle));
        }
}

// For the rows of a step, of which the last position is `last`.
void Decoder::make_room(std::int64_t last) {
    const std::int64_t count = rows();
    std::int64_t columns = std::max(model_.dim, model_.heads * model_.head_dim), width = 0;
    ranks_ = 0;
    const auto ranks_of = [&](const std::shared_ptr<const Branch>& branch) {
        if (branch != nullptr) ranks_ = std::max(ranks_, branch->narrow->blocks() * kBlock);
    };
    for (std::size_t l = 0; l < model_.layers.size(); ++l)
        for (int p = 0; p < kPlaces; ++p) {
            width = std::max(width, model_.layers[l].places[p].width);
            ranks_of(model_.layers[l].places[p].correction);
            for (const Run& run : runs_)
                if (run.adapter != nullptr) ranks_of(run.adapter->layers[l].places[p]);
        }
    inputs_.fit(count, columns);
    hidden_.fit(count, model_.hidden);
    at_least(inputs_.floats, count * columns);
    for (auto& own : own_) {
        own.inputs.fit(1, columns);
        at_least(own.inputs.floats, columns);
    }
    at_least(corrected_, count * ranks_);
    at_least(adapted_, count * ranks_);
    at_least(x_, count * model_.stride);
    at_least(out_, count * width);

    most_blocks_ = last / kPositions + 1;
    split_ = count * model_.kv_heads < 2 * threads() && most_blocks_ > 1;
    const std::int64_t states = most_blocks_ * model_.heads * (2 + model_.head_dim);
    if (split_) at_least(states_, count * states);
    const std::int64_t group_width = model_.heads / model_.kv_heads * model_.head_dim;
    for (auto& own : own_) {
        at_least(own.queries, group_width);
        at_least(own.weights, most_blocks_);
        if (!split_) at_least(own.states, states / model_.kv_heads);
    }
    whole_groups_ = !split_ && group_width % kGroup == 0;
    std::vector<const Kv*> sessions;
    for (const Row& row : rows_) sessions.push_back(row.kv);
    std::sort(sessions.begin(), sessions.end(), std::less<const Kv*>());
    chained_ = std::adjacent_find(sessions.begin(), sessions.end()) != sessions.end();
}

// --- What every thread does

Range Decoder::mine(int thread, std::int64_t count) const {
    return {count * thread / threads(), count * (thread + 1) / threads()};
}

// A single row is prepared by each thread for itself: that takes less time than to wait for each other.
Range Decoder::my_rows(int thread) const { return alone() ? Range{0, 1} : mine(thread, rows()); }

InputRows& Decoder::prepared(int thread) {
    return alone() ? own_[static_cast<std::size_t>(thread)].inputs : inputs_;
}

void Decoder::meet_if_shared(int thread) {
    if (!alone()) team_.meet(thread);
}

// A thread's blocks of each linear of a place. `narrow`: blocks of narrow halves there, of which some threads
// read one more than others: those read less of the weights.
Decoder::Shares Decoder::shares(int thread, const Linears& linears, Place place, std::int64_t narrow) const {
    // Of gate and up a thread has the same blocks, and whole groups of what they come to.
    const bool pairs = place == kMlpIn;
    const std::int64_t blocks = pairs ? linears.weights[0]->blocks()
                                      : linears.firsts.back() / kBlock + linears.weights.back()->blocks();
    const std::int64_t unit = pairs ? kGroup / kBlock : 1, units = whole(blocks, unit), size = threads();
    const auto begin = [&](std::int64_t t) {
        const std::int64_t odd = narrow * t % size * kNarrowCost, cost = size * unit * (pairs ? 2 : 1);
        const std::int64_t more = std::min((odd + cost / 2) / cost, units / size / 2);
        return std::min((units * t / size + more) * unit, blocks);
    };
    const Range mine{begin(thread), begin(thread + 1)};
    Shares shares;
    for (std::size_t l = 0; l < linears.weights.size(); ++l) {
        const std::int64_t before = pairs ? 0 : linears.firsts[l] / kBlock;
        const Range some = overlap(mine, {before, before + linears.weights[l]->blocks()});
        shares[l] = {some.begin - before, std::max(some.begin, some.end) - before};
    }
    return shares;
}

void Decoder::work(int thread) {
    embed(thread);
    team_.meet(thread);
    for (std::size_t i = 0; i < model_.layers.size(); ++i) layer(thread, static_cast<std::int64_t>(i));
    head(thread);
}

void Decoder::embed(int thread) {
    const Range some = mine(thread, rows());
    for (std::int64_t i = some.begin; i < some.end; ++i) {
        float* x = x_.data() + i * model_.stride;
        if (model_.embedding != nullptr)
            model_.embedding->read_row(row(i).token, x);
        else
            model_.head->read_row(row(i).token, x);
    }
}

void Decoder::layer(int thread, std::int64_t index) {
    const Layer& layer = model_.layers[static_cast<std::size_t>(index)];
    const auto width = [&](Place place) { return layer.places[place].width; };

    apply(thread, index, kAttentionIn, norm(thread, layer.attention_norm),
          {out_.data(), width(kAttentionIn), false});
    team_.meet(thread);
    attend(thread, index);
    team_.meet(thread);
    apply(thread, index, kAttentionOut, attended(thread), {x_.data(), model_.stride, true});
    team_.meet(thread);

    const Shares blocks =
        apply(thread, index, kMlpIn, norm(thread, layer.mlp_norm), {out_.data(), width(kMlpIn), false});
    const Inputs hidden = gate(layer.places[kMlpIn], blocks[0]);
    team_.meet(thread);
    apply(thread, index, kMlpOut, hidden, {x_.data(), model_.stride, true});
    team_.meet(thread);
}

// The normed rows as inputs, all of them.
Inputs Decoder::norm(int thread, const std::vector<float>& weight) {
    InputRows& to = prepared(thread);
    const std::int64_t dim = model_.dim;
    const Inputs inputs = to.view(to.floats.data(), dim, rows(), dim);
    const Range some = my_rows(thread);
    for (std::int64_t i = some.begin; i < some.end; ++i) {
        kernels_.rms_norm(x_.data() + i * model_.stride, weight.data(), model_.norm_eps, dim,
                          to.floats.data() + i * dim);
        to.quantize(kernels_, inputs, i, {0, dim});
    }
    meet_if_shared(thread);
    return inputs;
}

// silu(gate) · up as inputs, all rows; this thread writes what the blocks come to that it has of both.
Inputs Decoder::gate(const Linears& mlp, Range blocks) {
    const Inputs inputs = hidden_.view(out_.data(), mlp.width, rows(), model_.hidden);
    const Range columns{blocks.begin * kBlock, std::min(blocks.end * kBlock, model_.hidden)};
    for (std::int64_t i = 0; i < rows() && columns.begin < columns.end; ++i) {
        float* gates = out_.data() + i * mlp.width + columns.begin;
        kernels_.gate(gates, gates + mlp.firsts[1], columns.end - columns.begin, gates);
        hidden_.quantize(kernels_, inputs, i, columns);
    }
    return inputs;
}

// What is added to the products of a place, in this order.
const std::vector<Decoder::Part>& Decoder::parts_of(int thread, std::int64_t layer, Place place) {
    const auto l = static_cast<std::size_t>(layer);
    auto& parts = own_[static_cast<std::size_t>(thread)].parts;
    parts.clear();
    if (const auto& correction = model_.layers[l].places[place].correction)
        parts.push_back({correction.get(), {0, rows()}, corrected_.data(), false});
    for (const Run& run : runs_)
        if (run.adapter != nullptr)
            if (const auto& branch = run.adapter->layers[l].places[place])
                parts.push_back({branch.get(), run.rows, adapted_.data(), true});
    return parts;
}

// out = or += W x + b + B D x + B A x of the place's linears, for this thread's blocks of each.
Decoder::Shares Decoder::apply(int thread, std::int64_t layer, Place place, const Inputs& inputs,
                               const Outputs& out) {
    const Linears& linears = model_.layers[static_cast<std::size_t>(layer)].places[place];
    const std::vector<Part>& parts = parts_of(thread, layer, place);
    std::int64_t narrow_blocks = 0;
    for (const Part& part : parts) narrow_blocks += part.branch->narrow->blocks();
    const Shares blocks = shares(thread, linears, place, narrow_blocks);

    // Narrow values come first: each thread has those of the others long before it is through with its
    // weights.
    if (!parts.empty()) narrow(thread, parts, narrow_blocks, inputs);
    const std::uint64_t arrivals = parts.empty() ? 0 : team_.arrive();
    for (std::size_t l = 0; l < linears.weights.size(); ++l)
        kernels_.product(linears.weights[l]->view(), inputs, {0, rows()}, blocks[l],
                         out.to + linears.firsts[l], out.stride, out.add);
    if (parts.empty()) return blocks;
    team_.wait(thread, arrivals);
    for (const Part& part : parts)
        for (const auto& back : part.branch->backs) {
            const auto l = static_cast<std::size_t>(back->linear());
            kernels_.back(back->view(), part.t + back->narrow(), ranks_, part.rows, blocks[l],
                          out.to + linears.firsts[l], out.stride);
        }
    return blocks;
}

// This thread's share of t = A x of each part, [rows, ranks_]: some of the rows if they are many, else some
// of the blocks.
void Decoder::narrow(int thread, const std::vector<Part>& parts, std::int64_t blocks, const Inputs& inputs) {
    std::int64_t before = 0;
    const Range mine_of_all = mine(thread, blocks);
    for (const Part& part : parts) {
        const Matrix& a = *part.branch->narrow;
        const std::int64_t count = part.rows.end - part.rows.begin;
        Range some = overlap({mine_of_all.begin - before, mine_of_all.end - before}, {0, a.blocks()});
        Range of_rows = part.rows;
        before += a.blocks();
        if (count >= threads() * kSide) {
            const Range sides = mine(thread, whole(count, kSide));
            some = {0, a.blocks()};
            of_rows = overlap(part.rows,
                              {part.rows.begin + sides.begin * kSide, part.rows.begin + sides.end * kSide});
        }
        if (some.begin >= some.end || of_rows.begin >= of_rows.end) continue;
        kernels_.product(a.view(), inputs, of_rows, some, part.t, ranks_, false);
        if (!part.scaled) continue;
        const std::int64_t end = std::min(some.end * kBlock, a.rows());
        for (std::int64_t i = of_rows.begin; i < of_rows.end; ++i)
            for (std::int64_t j = some.begin * kBlock; j < end; ++j) part.t[i * ranks_ + j] *= row(i).scale;
    }
}

// --- Attention

Heads Decoder::heads(std::int64_t i) const {
    return {model_.heads / model_.kv_heads, model_.head_dim,
            1.0f / std::sqrt(static_cast<float>(model_.head_dim)), row(i).kv->shape().half};
}

void Decoder::keep(std::int64_t layer, std::int64_t i, std::int64_t head) {
    const Linears& place = model_.layers[static_cast<std::size_t>(layer)].places[kAttentionIn];
    const std::int64_t dim = model_.head_dim, position = row(i).position, block = position / kPositions;
    float* out = out_.data() + i * place.width + head * dim;
    rotate(i, out + place.firsts[1]);
    kernels_.keep(heads(i), out + place.firsts[1], out + place.firsts[2], position % kPositions,
                  row(i).kv->keys(layer, head, block), row(i).kv->values(layer, head, block));
}

void Decoder::rotate(std::int64_t i, float* x) const {
    const std::int64_t at = row(i).position * (model_.head_dim / 2);
    kernels_.rotate(x, cos_.data() + at, sin_.data() + at, model_.head_dim);
}

void Decoder::attend(int thread, std::int64_t layer) {
    if (chained_) {
        const Range tasks = mine(thread, rows() * model_.kv_heads);
        for (std::int64_t task = tasks.begin; task < tasks.end; ++task)
            keep(layer, task / model_.kv_heads, task % model_.kv_heads);
        team_.meet(thread);
    }
    const std::int64_t parts = split_ ? most_blocks_ : 1;
    const Range tasks = mine(thread, rows() * model_.kv_heads * parts);
    for (std::int64_t pair = tasks.begin / parts; pair * parts < tasks.end; ++pair) {
        const Range all{0, row(pair / model_.kv_heads).position / kPositions + 1};
        const Range blocks =
            split_ ? overlap({tasks.begin - pair * parts, tasks.end - pair * parts}, all) : all;
        if (blocks.begin >= blocks.end) continue;
        const std::int64_t next = std::min((tasks.end - 1) / parts, pair + 1);
        attend(thread, layer, pair, blocks,
               row(next / model_.kv_heads).kv->keys(layer, next % model_.kv_heads, 0));
    }
}

// Attention of a row's kv head (`pair`) to some blocks of positions.
void Decoder::attend(int thread, std::int64_t layer, std::int64_t pair, Range blocks, const void* then) {
    const std::int64_t i = pair / model_.kv_heads, head = pair % model_.kv_heads, position = row(i).position;
    const Linears& place = model_.layers[static_cast<std::size_t>(layer)].places[kAttentionIn];
    const Heads shape = heads(i);
    const std::int64_t width = shape.group * shape.head_dim, floats = shape.group * (2 + shape.head_dim);
    Own& own = own_[static_cast<std::size_t>(thread)];
    Kv& kv = *row(i).kv;
    if (!chained_ && blocks.end == position / kPositions + 1) keep(layer, i, head);

    float* const q = own.queries.data();
    std::copy_n(out_.data() + i * place.width + head * width, width, q);
    for (std::int64_t g = 0; g < shape.group; ++g) rotate(i, q + g * shape.head_dim);
    float* const states = split_ ? states_.data() + pair * most_blocks_ * floats : own.states.data();
    for (std::int64_t block = blocks.begin; block < blocks.end; ++block)
        kernels_.attend(shape, q, kv.keys(layer, head, block), kv.values(layer, head, block),
                        std::min<std::int64_t>(kPositions, position + 1 - block * kPositions),
                        states + block * floats,
                        block + 1 < blocks.end ? kv.keys(layer, head, block + 1) : then);
    if (split_) return;
    kernels_.join(shape, states, blocks.end, own.weights.data(), inputs_.floats.data() + pair * width);
    if (!whole_groups_) return;
    const std::int64_t all = model_.heads * model_.head_dim;
    inputs_.quantize(kernels_, inputs_.view(inputs_.floats.data(), all, rows(), all), i,
                     {head * width, (head + 1) * width});
}

// What attention comes to as inputs, all rows.
Inputs Decoder::attended(int thread) {
    const std::int64_t width = model_.heads * model_.head_dim;
    if (whole_groups_) return inputs_.view(inputs_.floats.data(), width, rows(), width);
    InputRows& to = prepared(thread);
    Own& own = own_[static_cast<std::size_t>(thread)];
    const Inputs inputs = to.view(split_ ? to.floats.data() : inputs_.floats.data(), width, rows(), width);
    const Range some = my_rows(thread);
    for (std::int64_t i = some.begin; i < some.end; ++i) {
        const Heads shape = heads(i);
        for (std::int64_t head = 0; head < model_.kv_heads && split_; ++head) {
            const std::int64_t pair = i * model_.kv_heads + head;
            kernels_.join(shape, states_.data() + pair * most_blocks_ * shape.group * (2 + shape.head_dim),
                          row(i).position / kPositions + 1, own.weights.data(),
                          to.floats.data() + pair * shape.group * shape.head_dim);
        }
        to.quantize(kernels_, inputs, i, {0, width});
    }
    meet_if_shared(thread);
    return inputs;
}

// --- Logits

void Decoder::head(int thread) {
    const auto count = static_cast<std::int64_t>(wanted_.size());
    const std::int64_t dim = model_.dim;
    InputRows& to = prepared(thread);
    const Inputs inputs = to.view(to.floats.data(), dim, count, dim);
    const Range some = alone() ? Range{0, count} : mine(thread, count);
    for (std::int64_t i = some.begin; i < some.end; ++i) {
        kernels_.rms_norm(x_.data() + wanted_[static_cast<std::size_t>(i)] * model_.stride,
                          model_.norm.data(), model_.norm_eps, dim, to.floats.data() + i * dim);
        to.quantize(kernels_, inputs, i, {0, dim});
    }
    meet_if_shared(thread);
    kernels_.product(model_.head->view(), inputs, {0, count}, mine(thread, model_.head->blocks()), logits_,
                     model_.vocab, false);
}

}  // namespace bedplate
