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

// The model's layers that rows go through.
std::vector<std::int64_t> layers_of(const Adapter* adapter, const Model& model) {
    std::vector<std::int64_t> layers(adapter == nullptr ? model.layers.size() : adapter->layers.size());
    if (adapter == nullptr) std::iota(layers.begin(), layers.end(), 0);
    for (std::size_t i = 0; adapter != nullptr && i < layers.size(); ++i) layers[i] = adapter->layers[i].base;
    return layers;
}

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

Decoder::Decoder(Model model, int threads, std::shared_ptr<Meter> meter)
    : model_(std::move(model)),
      kernels_(current_kernels()),
      meter_(std::move(meter)),
      team_(threads),
      own_(static_cast<std::size_t>(threads)) {
    complete(model_);
    turns_.resize(model_.ropes.size());
}

void Decoder::step(const std::vector<Row>& rows, std::int64_t width, float* logits) {
    team_.check_process();  // before it waits for a lock that nobody may give up
    const std::lock_guard<std::mutex> lock(mutex_);
    width_ = width;
    check(rows);
    logits_ = logits;
    prepare(rows);
    team_.run([this](int thread) { work(thread); });
}

void Decoder::check(const std::vector<Row>& rows) const {
    require(!rows.empty(), "a step of no rows");
    const auto like = layers_of(rows[0].adapter, model_);
    const Adapter* checked = nullptr;  // rows of one adapter mostly follow each other
    for (const Row& row : rows) {
        if (row.adapter != nullptr && row.adapter != checked) bedplate::check(*row.adapter, model_);
        if (row.adapter != checked)
            require(layers_of(row.adapter, model_) == like, "rows of one step have other layers");
        checked = row.adapter;
        require(row.token >= 0 && row.token < vocab(row), "a token is not in the vocabulary");
        require(row.position >= 0 && row.position < model_.max_positions, "a position is beyond the model's");
        require(row.kv != nullptr, "a row has no session");
        const KvShape &kv = row.kv->shape(), shape = kv_shape(row.adapter, kv.half, kv.of_long);
        require(kv.layers == shape.layers && kv.heads == shape.heads && kv.head_dim == shape.head_dim,
                "a session is of another model, or another adapter's");
        require(!row.wanted || vocab(row) <= width_, "a row has more logits than there is room for");
    }
}

void Decoder::Batch::add(const Row& row) {
    const auto at = static_cast<std::int64_t>(rows.size());
    if (runs.empty() || runs.back().adapter != row.adapter) runs.push_back({{at, at}, row.adapter});
    runs.back().rows.end = at + 1;
    rows.push_back(row);
}

void Decoder::prepare(const std::vector<Row>& rows) {
    std::vector<std::int64_t> order(rows.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
        return std::less<const Adapter*>()(rows[static_cast<std::size_t>(a)].adapter,
                                           rows[static_cast<std::size_t>(b)].adapter);
    });
    all_ = {};
    layers_ = layers_of(rows[0].adapter, model_);
    std::vector<std::int64_t> places(rows.size()), wanted;
    std::int64_t last = 0;
    std::array<std::int64_t, 2> turned{};  // positions of texts that are not long, and of long ones
    for (const std::int64_t from : order) {
        const Row& row = rows[static_cast<std::size_t>(from)];
        places[static_cast<std::size_t>(from)] = this->rows();
        all_.add(row);
        last = std::max(last, row.position);
        std::int64_t& positions = turned[row.kv->shape().of_long];
        positions = std::max(positions, row.position + 1);
    }
    for (std::size_t i = 0; i < rows.size(); ++i)
        if (rows[i].wanted) wanted.push_back(places[i]);
    prepare_logits(wanted);
    for (const Row& row : all_.rows) row.kv->reserve({row.position, row.position + 1});
    make_room(last);
    for (const Row& row : all_.rows) row.kv->hold(row.position + 1);

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
    bool aside = !model_.direct;
    const auto change_of = [&](const Change& change, Place place) {
        std::int64_t ranks = 0;
        for (const Term& term : change.terms) ranks += ranks_of(*term.branch);
        ranks_ = std::max(ranks_, ranks);
        aside |= (place == kAttentionOut || place == kMlpOut) && !change.affines.empty();
    };
    for (std::size_t l = 0; l < layers_.size(); ++l)
        for (int p = 0; p < kPlaces; ++p) {
            const Linears& linears = layer_of(static_cast<std::int64_t>(l)).places[p];
            width = std::max(width, linears.width);
            if (linears.correction != nullptr) ranks_ = std::max(ranks_, ranks_of(*linears.correction));
            for (const Run& run : all_.runs)
                if (run.adapter != nullptr)
                    change_of(run.adapter->layers[l].places[p], static_cast<Place>(p));
        }
    std::int64_t scratch = 0;
    for (const Run& run : all_.runs) {
        if (run.adapter == nullptr) continue;
        change_of(run.adapter->head.change, kHead);
        for (const auto& term : run.adapter->embedding.terms)
            scratch = std::max(scratch, term.narrow->columns());
        if (run.adapter->head.rows != nullptr) scratch = std::max(scratch, count * kBlock);
    }
    inputs_.fit(count, columns);
    hidden_.fit(count, model_.hidden);
    at_least(inputs_.floats, count * columns);
    for (auto& own : own_) {
        own.inputs.fit(1, columns);
        at_least(own.inputs.floats, columns);
        at_least(own.scratch, scratch);
        if (!model_.direct && alone()) at_least(own.x, model_.stride);
    }
    at_least(corrected_, count * ranks_);
    at_least(adapted_, count * ranks_);
    at_least(x_, count * model_.stride);
    at_least(out_, count * width);
    if (aside) at_least(given_, count * model_.stride);
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
    for (const Row& row : all_.rows) sessions.push_back(row.kv);
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

void Decoder::meet_if_shared() {
    if (!alone()) team_.meet();
}

void Decoder::work(int thread) {
    embed(thread);
    team_.meet();
    for (std::size_t i = 0; i < layers_.size(); ++i) layer(thread, static_cast<std::int64_t>(i));
    head(thread);
}

void Decoder::layer(int thread, std::int64_t index) {
    Inputs read = norm(thread, index, &Norms::attention_norm), hidden{};
    const Work in = at(index, kAttentionIn);
    apply(thread, in, read, {out_.data(), in.linears->width, false});
    team_.meet();
    if (model_.rules.parallel) {  // before attention takes the place of what both read
        hidden = mlp_in(thread, index, read);
        team_.meet();
    }
    norm_whole(thread, index);
    attend(thread, index);
    team_.meet();
    apply(thread, at(index, kAttentionOut), attended(thread, index), given());
    team_.meet();
    add(thread, index, &Norms::attention_output_norm);

    if (!model_.rules.parallel) hidden = mlp_in(thread, index, norm(thread, index, &Norms::mlp_norm));
    team_.meet();  // what attention gave is read, and may be written over
    apply(thread, at(index, kMlpOut), hidden, given());
    team_.meet();
    add(thread, index, &Norms::mlp_output_norm);
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
void Decoder::add(int thread, std::int64_t index, Norm Norms::* which) {
    if (model_.direct) return;
    const Norm& norm = layer_of(index).*which;
    float* const normed = own_[static_cast<std::size_t>(thread)].inputs.floats.data();
    const Range some = my_rows(thread);
    for (std::int64_t i = some.begin; i < some.end; ++i) {
        const float* y = given_.data() + i * model_.stride;
        if (!norm.weight.empty()) y = normalize(norm, own(index, i, which), y, normed);
        kernels_.add(y, model_.rules.residual_scale, model_.dim, residual(thread) + i * model_.stride);
    }
}

// Writes the norm of x to y, and returns y. own: in place of its weight and bias; null, or empty: none.
const float* Decoder::normalize(const Norm& norm, const Norm* own, const float* x, float* y) const {
    const float eps = model_.rules.norm_eps;
    const auto& weight = own == nullptr || own->weight.empty() ? norm.weight : own->weight;
    const auto& bias = own == nullptr || own->bias.empty() ? norm.bias : own->bias;
    if (model_.rules.layer_norm)
        kernels_.layer_norm(x, weight.data(), bias.empty() ? nullptr : bias.data(), eps, model_.dim, y);
    else
        kernels_.rms_norm(x, weight.data(), eps, model_.dim, y);
    return y;
}

// The normed rows as inputs, all of them; a norm without weights leaves the residual as it is.
Inputs Decoder::norm(int thread, std::int64_t index, Norm Norms::* which) {
    const Norm& norm = layer_of(index).*which;
    InputRows& to = prepared(thread);
    const std::int64_t dim = model_.dim;
    float* const x = residual(thread);
    const bool as_is = norm.weight.empty();
    const Inputs inputs = to.view(as_is ? x : to.floats.data(), as_is ? model_.stride : dim, rows(), dim);
    const Range some = my_rows(thread);
    for (std::int64_t i = some.begin; i < some.end; ++i) {
        if (!as_is) normalize(norm, own(index, i, which), x + i * model_.stride, to.floats.data() + i * dim);
        to.quantize(kernels_, inputs, i, {0, dim});
    }
    meet_if_shared();
    return inputs;
}

// activation(gate) · up as inputs, all rows. A thread has the same blocks of both.
Inputs Decoder::mlp_in(int thread, std::int64_t index, const Inputs& read) {
    const Work work = at(index, kMlpIn);
    const Linears& mlp = *work.linears;
    float* const out = (model_.rules.parallel ? mlp_ : out_).data();
    const Range blocks = apply(thread, work, read, {out, mlp.width, false})[0];
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

}  // namespace bedplate
