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

void Turns::reach(const std::vector<float>& frequencies, float scale, std::int64_t positions) {
    const auto half = static_cast<std::int64_t>(frequencies.size());
    for (auto position = static_cast<std::int64_t>(cos.size()) / half; position < positions; ++position)
        for (const float frequency : frequencies) {
            const float angle = static_cast<float>(position) * frequency;
            cos.push_back(frequency == 0 ? 1.0f : std::cos(angle) * scale);
            sin.push_back(frequency == 0 ? 0.0f : std::sin(angle) * scale);
        }
}

Decoder::Decoder(Model model, int threads)
    : model_(std::move(model)),
      kernels_(current_kernels()),
      team_(threads),
      own_(static_cast<std::size_t>(threads)) {
    complete(model_);
    turns_.resize(model_.ropes.size());
}

void Decoder::step(const std::vector<Row>& rows, float* logits) {
    const std::lock_guard<std::mutex> lock(mutex_);
    check(rows);
    prepare(rows, logits);
    team_.run([this](int thread) { work(thread); });
}

void Decoder::check(const std::vector<Row>& rows) const {
    require(!rows.empty(), "a step of no rows");
    const KvShape shape = kv_shape(false, false);
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
    std::array<std::int64_t, 2> turned{};  // positions of texts that are not long, and of long ones
    for (const std::int64_t from : order) {
        const Row& row = rows[static_cast<std::size_t>(from)];
        const auto at = static_cast<std::int64_t>(rows_.size());
        if (runs_.empty() || runs_.back().adapter != row.adapter) runs_.push_back({{at, at}, row.adapter});
        runs_.back().rows.end = at + 1;
        place[static_cast<std::size_t>(from)] = at;
        rows_.push_back(row);
        last = std::max(last, row.position);
        std::int64_t& positions = turned[row.kv->shape().of_long];
        positions = std::max(positions, row.position + 1);
    }
    for (std::size_t i = 0; i < rows.size(); ++i)
        if (rows[i].wanted) wanted_.push_back(place[i]);
    for (const Row& row : rows_) row.kv->reserve(row.position + 1);
    logits_ = logits;
    make_room(last);

    for (std::size_t i = 0; i < turns_.size(); ++i) {
        const Rope& rope = model_.ropes[i];
        turns_[i][0].reach(rope.frequencies, rope.scale, turned[0]);
        turns_[i][1].reach(rope.of_long, rope.scale, turned[1]);
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
        if (!model_.direct && alone()) at_least(own.x, model_.stride);
    }
    at_least(corrected_, count * ranks_);
    at_least(adapted_, count * ranks_);
    at_least(x_, count * model_.stride);
    at_least(out_, count * width);
    if (!model_.direct) at_least(given_, count * model_.stride);
    if (model_.rules.parallel) at_least(mlp_, count * width);

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
    const Range some = residual(thread) == x_.data() ? mine(thread, rows()) : my_rows(thread);
    const float factor = model_.rules.embedding_scale;
    for (std::int64_t i = some.begin; i < some.end; ++i) {
        float* x = residual(thread) + i * model_.stride;
        if (model_.embedding != nullptr)
            model_.embedding->read_row(row(i).token, x);
        else
            model_.head->read_row(row(i).token, x);
        if (factor != 1) kernels_.scale(factor, 0, model_.dim, x);
    }
}

void Decoder::layer(int thread, std::int64_t index) {
    const Layer& layer = model_.layers[static_cast<std::size_t>(index)];
    Inputs read = norm(thread, layer.attention_norm), hidden{};
    apply(thread, index, kAttentionIn, read, {out_.data(), layer.places[kAttentionIn].width, false});
    team_.meet(thread);
    if (model_.rules.parallel) {  // before attention takes the place of what both read
        hidden = mlp_in(thread, index, read);
        team_.meet(thread);
    }
    norm_whole(thread, layer);
    attend(thread, index);
    team_.meet(thread);
    apply(thread, index, kAttentionOut, attended(thread, index), given());
    team_.meet(thread);
    add(thread, layer.attention_output_norm);

    if (!model_.rules.parallel) hidden = mlp_in(thread, index, norm(thread, layer.mlp_norm));
    team_.meet(thread);  // what attention gave is read, and may be written over
    apply(thread, index, kMlpOut, hidden, given());
    team_.meet(thread);
    add(thread, layer.mlp_output_norm);
}

// The residual that a thread reads: of a single row each has its own, if they do more than add to it.
float* Decoder::residual(int thread) {
    return alone() && !model_.direct ? own_[static_cast<std::size_t>(thread)].x.data() : x_.data();
}

// Where attention and the MLP write what they give.
Decoder::Outputs Decoder::given() {
    return {model_.direct ? x_.data() : given_.data(), model_.stride, model_.direct};
}

// x += residual_scale · norm(what was given), unless it is there already.
void Decoder::add(int thread, const Norm& norm) {
    if (model_.direct) return;
    float* const normed = own_[static_cast<std::size_t>(thread)].inputs.floats.data();
    const Range some = my_rows(thread);
    for (std::int64_t i = some.begin; i < some.end; ++i) {
        const float* y = given_.data() + i * model_.stride;
        if (!norm.weight.empty()) y = normalize(norm, y, normed);
        kernels_.add(y, model_.rules.residual_scale, model_.dim, residual(thread) + i * model_.stride);
    }
}

// Writes the norm of x to y, and returns y.
const float* Decoder::normalize(const Norm& norm, const float* x, float* y) const {
    const float eps = model_.rules.norm_eps;
    if (model_.rules.layer_norm)
        kernels_.layer_norm(x, norm.weight.data(), norm.bias.empty() ? nullptr : norm.bias.data(), eps,
                            model_.dim, y);
    else
        kernels_.rms_norm(x, norm.weight.data(), eps, model_.dim, y);
    return y;
}

// The normed rows as inputs, all of them; a norm without weights leaves the residual as it is.
Inputs Decoder::norm(int thread, const Norm& norm) {
    InputRows& to = prepared(thread);
    const std::int64_t dim = model_.dim;
    float* const x = residual(thread);
    const bool as_is = norm.weight.empty();
    const Inputs inputs = to.view(as_is ? x : to.floats.data(), as_is ? model_.stride : dim, rows(), dim);
    const Range some = my_rows(thread);
    for (std::int64_t i = some.begin; i < some.end; ++i) {
        if (!as_is) normalize(norm, x + i * model_.stride, to.floats.data() + i * dim);
        to.quantize(kernels_, inputs, i, {0, dim});
    }
    meet_if_shared(thread);
    return inputs;
}

// activation(gate) · up as inputs, all rows. A thread has the same blocks of both.
Inputs Decoder::mlp_in(int thread, std::int64_t index, const Inputs& read) {
    const Linears& mlp = model_.layers[static_cast<std::size_t>(index)].places[kMlpIn];
    float* const out = (model_.rules.parallel ? mlp_ : out_).data();
    const Range blocks = apply(thread, index, kMlpIn, read, {out, mlp.width, false})[0];
    const Inputs inputs = hidden_.view(out, mlp.width, rows(), model_.hidden);
    const Range columns{blocks.begin * kBlock, std::min(blocks.end * kBlock, model_.hidden)};
    for (std::int64_t i = 0; i < rows() && columns.begin < columns.end; ++i) {
        float* x = out + i * mlp.width + columns.begin;
        kernels_.activate(model_.rules.activation, model_.rules.gated ? x + mlp.firsts[1] : nullptr,
                          columns.end - columns.begin, x);
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

// --- Logits

void Decoder::head(int thread) {
    const auto count = static_cast<std::int64_t>(wanted_.size());
    const std::int64_t dim = model_.dim;
    InputRows& to = prepared(thread);
    const Inputs inputs = to.view(to.floats.data(), dim, count, dim);
    const Range some = alone() ? Range{0, count} : mine(thread, count);
    if (!model_.direct) meet_if_shared(thread);  // rows that other threads have added to
    for (std::int64_t i = some.begin; i < some.end; ++i) {
        const float* x = residual(thread) + wanted_[static_cast<std::size_t>(i)] * model_.stride;
        float* const floats = to.floats.data() + i * dim;
        if (model_.norm.weight.empty())
            std::copy_n(x, dim, floats);
        else
            normalize(model_.norm, x, floats);
        to.quantize(kernels_, inputs, i, {0, dim});
    }
    meet_if_shared(thread);
    const Range blocks = mine(thread, model_.head->blocks());
    kernels_.product(model_.head->view(), inputs, {0, count}, blocks, logits_, model_.vocab, false);

    const Rules& r = model_.rules;
    if (r.logit_scale == 1 && r.logit_cap == 0) return;
    const Range columns{blocks.begin * kBlock, std::min(blocks.end * kBlock, model_.vocab)};
    for (std::int64_t i = 0; i < count && columns.begin < columns.end; ++i)
        kernels_.scale(r.logit_scale, r.logit_cap, columns.end - columns.begin,
                       logits_ + i * model_.vocab + columns.begin);
}

}  // namespace bedplate
