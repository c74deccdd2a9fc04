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

Range overlap(Range a, Range b) { return {std::max(a.begin, b.begin), std::min(a.end, b.end)}; }

}  // namespace

void Workspace::fit(std::int64_t rows, std::int64_t columns, std::int64_t ranks) {
    const std::int64_t groups = whole(rows, side(rows)) * side(rows) * whole(columns, kGroup);
    at_least(floats, rows * columns);
    at_least(codes, groups * kGroup);
    at_least(this->groups, groups);
    at_least(corrected, rows * ranks);
    at_least(adapted, rows * ranks);
}

Inputs Workspace::inputs(const float* x, std::int64_t stride, std::int64_t rows, std::int64_t columns) const {
    return {x, stride, codes.data(), this->groups.data(), whole(columns, kGroup), side(rows)};
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
    const auto count = static_cast<std::int64_t>(rows.size());
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

    std::int64_t columns = std::max(model_.dim, model_.heads * model_.head_dim), width = 0;
    ranks_ = 0;
    const auto ranks_of = [&](const std::shared_ptr<const Branch>& branch) {
        if (branch != nullptr) ranks_ = std::max(ranks_, branch->narrow->blocks() * kBlock);
    };
    for (std::size_t l = 0; l < model_.layers.size(); ++l)
        for (int p = 0; p < kPlaces; ++p) {
            columns = std::max(columns, model_.layers[l].places[p].columns);
            width = std::max(width, model_.layers[l].places[p].width);
            ranks_of(model_.layers[l].places[p].correction);
            for (const Run& run : runs_)
                if (run.adapter != nullptr) ranks_of(run.adapter->layers[l].places[p]);
        }
    if (alone())
        for (auto& own : own_) own.fit(1, columns, ranks_);
    else
        shared_.fit(count, columns, ranks_);
    for (auto& own : own_) at_least(own.state, model_.heads / model_.kv_heads * (2 + model_.head_dim));
    at_least(x_, count * model_.stride);
    at_least(out_, count * width);

    most_blocks_ = last / kPositions + 1;
    split_ = count * model_.kv_heads < 2 * threads() && most_blocks_ > 1;
    const std::int64_t states = split_ ? most_blocks_ : 1;
    at_least(states_, (count * states + threads()) * model_.heads * (2 + model_.head_dim));

    const std::int64_t half = model_.head_dim / 2;
    for (auto position = static_cast<std::int64_t>(cos_.size()) / half; position <= last; ++position)
        for (const float frequency : model_.inverse_frequencies) {
            const float angle = static_cast<float>(position) * frequency;
            cos_.push_back(std::cos(angle));
            sin_.push_back(std::sin(angle));
        }
}

// --- What every thread does

Range Decoder::mine(int thread, std::int64_t count) const {
    return {count * thread / threads(), count * (thread + 1) / threads()};
}

// A single row is prepared by each thread for itself: that takes less time than to wait for each other.
Range Decoder::my_rows(int thread) const {
    return alone() ? Range{0, 1} : mine(thread, static_cast<std::int64_t>(rows_.size()));
}

void Decoder::work(int thread) {
    embed(thread);
    team_.meet();
    for (std::size_t i = 0; i < model_.layers.size(); ++i) layer(thread, static_cast<std::int64_t>(i));
    head(thread);
}

void Decoder::embed(int thread) {
    const Range rows = mine(thread, static_cast<std::int64_t>(rows_.size()));
    for (std::int64_t i = rows.begin; i < rows.end; ++i) {
        const std::int64_t token = rows_[static_cast<std::size_t>(i)].token;
        float* x = x_.data() + i * model_.stride;
        if (model_.embedding != nullptr)
            model_.embedding->read_row(token, x);
        else
            model_.head->read_row(token, x);
    }
}

void Decoder::layer(int thread, std::int64_t index) {
    const Layer& layer = model_.layers[static_cast<std::size_t>(index)];
    const Array<float>& inputs = space(thread).floats;
    const std::int64_t dim = model_.dim, q = model_.heads * model_.head_dim;

    norm(thread, layer.attention_norm);
    const Linears& attention = layer.places[kAttentionIn];
    apply(thread, attention, kAttentionIn, index, inputs.data(), dim, out_.data(), attention.width, false);
    team_.meet();
    rotate_and_keep(thread, index);
    team_.meet();
    attend(thread, index);
    team_.meet();
    collect(thread);
    apply(thread, layer.places[kAttentionOut], kAttentionOut, index, inputs.data(), q, x_.data(),
          model_.stride, true);
    team_.meet();

    norm(thread, layer.mlp_norm);
    const Linears& mlp = layer.places[kMlpIn];
    apply(thread, mlp, kMlpIn, index, inputs.data(), dim, out_.data(), mlp.width, false);
    const Range blocks =
        mine(thread, mlp.weights[0]->blocks());  // of gate and of up: what apply gave this thread
    const std::int64_t begin = blocks.begin * kBlock, end = std::min(blocks.end * kBlock, model_.hidden);
    for (std::size_t i = 0; i < rows_.size(); ++i) {
        float* gate = out_.data() + static_cast<std::int64_t>(i) * mlp.width;
        if (begin < end) kernels_.gate(gate + begin, gate + mlp.firsts[1] + begin, end - begin, gate + begin);
    }
    team_.meet();
    apply(thread, layer.places[kMlpOut], kMlpOut, index, out_.data(), mlp.width, x_.data(), model_.stride,
          true);
    team_.meet();
}

void Decoder::norm(int thread, const std::vector<float>& weight) {
    const Range rows = my_rows(thread);
    for (std::int64_t i = rows.begin; i < rows.end; ++i)
        kernels_.rms_norm(x_.data() + i * model_.stride, weight.data(), model_.norm_eps, model_.dim,
                          space(thread).floats.data() + i * model_.dim);
}

// out = or += W x + b + B D x + B A x of the place's linears, for this thread's blocks of each. `x` is ready
// for the rows that this thread prepares.
void Decoder::apply(int thread, const Linears& linears, Place place, std::int64_t layer, const float* x,
                    std::int64_t stride, float* out, std::int64_t out_stride, bool add) {
    Workspace& own = space(thread);
    const Range rows = my_rows(thread), all{0, static_cast<std::int64_t>(rows_.size())};
    const Inputs inputs = own.inputs(x, stride, all.end, linears.columns);
    const auto branch_of = [&](const Run& run) -> const Branch* {
        return run.adapter == nullptr
                   ? nullptr
                   : run.adapter->layers[static_cast<std::size_t>(layer)].places[place].get();
    };

    for (std::int64_t i = rows.begin; i < rows.end; ++i)
        kernels_.quantize(x + i * stride, linears.columns, inputs.side,
                          own.codes.data() + inputs.place(i) * kGroup, own.groups.data() + inputs.place(i));
    if (linears.correction != nullptr) narrow(*linears.correction, inputs, rows, own.corrected.data());
    for (const Run& run : runs_) {
        const Branch* branch = branch_of(run);
        const Range some = overlap(rows, run.rows);
        if (branch == nullptr || some.begin >= some.end) continue;
        narrow(*branch, inputs, some, own.adapted.data());
        for (std::int64_t i = some.begin; i < some.end; ++i)
            for (std::int64_t j = 0; j < branch->narrow->rows(); ++j)
                own.adapted[static_cast<std::size_t>(i * ranks_ + j)] *=
                    rows_[static_cast<std::size_t>(i)].scale;
    }
    if (!alone()) team_.meet();

    for (std::size_t l = 0; l < linears.weights.size(); ++l) {
        const Matrix& weight = *linears.weights[l];
        const Range blocks = mine(thread, weight.blocks());
        float* to = out + linears.firsts[l];
        kernels_.product(weight.view(), inputs, all, blocks, to, out_stride, add);
        if (linears.correction != nullptr)
            add_backs(*linears.correction, l, own.corrected.data(), all, blocks, to, out_stride);
        for (const Run& run : runs_)
            if (const Branch* branch = branch_of(run))
                add_backs(*branch, l, own.adapted.data(), run.rows, blocks, to, out_stride);
    }
}

// t [rows, ranks_] = A x.
void Decoder::narrow(const Branch& branch, const Inputs& inputs, Range rows, float* t) {
    kernels_.product(branch.narrow->view(), inputs, rows, {0, branch.narrow->blocks()}, t, ranks_, false);
}

void Decoder::add_backs(const Branch& branch, std::size_t linear, const float* t, Range rows, Range blocks,
                        float* out, std::int64_t stride) {
    for (const auto& back : branch.backs)
        if (back->linear() == static_cast<std::int64_t>(linear))
            kernels_.back(back->view(), t + back->narrow(), ranks_, rows, blocks, out, stride);
}

// --- Attention

void Decoder::rotate_and_keep(int thread, std::int64_t index) {
    const Linears& place = model_.layers[static_cast<std::size_t>(index)].places[kAttentionIn];
    const std::int64_t dim = model_.head_dim, half = dim / 2, group = model_.heads / model_.kv_heads;
    const Range tasks = mine(thread, static_cast<std::int64_t>(rows_.size()) * model_.kv_heads);
    for (std::int64_t task = tasks.begin; task < tasks.end; ++task) {
        const std::int64_t i = task / model_.kv_heads, head = task % model_.kv_heads;
        const Row& row = rows_[static_cast<std::size_t>(i)];
        const float *cos = cos_.data() + row.position * half, *sin = sin_.data() + row.position * half;
        float* out = out_.data() + i * place.width;
        for (std::int64_t g = 0; g < group; ++g)
            kernels_.rotate(out + (head * group + g) * dim, cos, sin, dim);
        float* key = out + place.firsts[1] + head * dim;
        kernels_.rotate(key, cos, sin, dim);
        const std::int64_t block = row.position / kPositions;
        kernels_.keep(heads(row), key, out + place.firsts[2] + head * dim, row.position % kPositions,
                      row.kv->keys(index, head, block), row.kv->values(index, head, block));
    }
}

Heads Decoder::heads(const Row& row) const {
    return {model_.heads / model_.kv_heads, model_.head_dim,
            1.0f / std::sqrt(static_cast<float>(model_.head_dim)), row.kv->shape().half};
}

// The states of a row's kv head: one, or one for each block where few rows leave threads without work.
float* Decoder::state(std::int64_t row, std::int64_t head, std::int64_t block) {
    const std::int64_t blocks = split_ ? most_blocks_ : 1;
    const std::int64_t floats = model_.heads / model_.kv_heads * (2 + model_.head_dim);
    return states_.data() + ((row * model_.kv_heads + head) * blocks + block) * floats;
}

void Decoder::attend(int thread, std::int64_t index) {
    const Linears& place = model_.layers[static_cast<std::size_t>(index)].places[kAttentionIn];
    const auto count = static_cast<std::int64_t>(rows_.size());
    const std::int64_t group = model_.heads / model_.kv_heads, states = split_ ? most_blocks_ : 1;
    const Range tasks = mine(thread, count * model_.kv_heads * states);
    float* next = state(count, 0, 0) + thread * group * (2 + model_.head_dim);
    for (std::int64_t task = tasks.begin; task < tasks.end; ++task) {
        const std::int64_t i = task / states / model_.kv_heads, head = task / states % model_.kv_heads;
        const Row& row = rows_[static_cast<std::size_t>(i)];
        const float* q = out_.data() + i * place.width + head * group * model_.head_dim;
        const std::int64_t last = row.position / kPositions, first = split_ ? task % states : 0;
        for (std::int64_t block = first; block <= (split_ ? std::min(first, last) : last); ++block) {
            const std::int64_t positions =
                std::min<std::int64_t>(kPositions, row.position + 1 - block * kPositions);
            float* to = split_ || block == 0 ? state(i, head, first) : next;
            kernels_.attend(heads(row), q, row.kv->keys(index, head, block),
                            row.kv->values(index, head, block), positions, to);
            if (to == next) kernels_.join(heads(row), next, state(i, head, 0));
        }
    }
}

void Decoder::collect(int thread) {
    const Range rows = my_rows(thread);
    const std::int64_t group = model_.heads / model_.kv_heads, floats = group * (2 + model_.head_dim);
    float* joined = own_[static_cast<std::size_t>(thread)].state.data();
    for (std::int64_t i = rows.begin; i < rows.end; ++i)
        for (std::int64_t head = 0; head < model_.kv_heads; ++head) {
            const Row& row = rows_[static_cast<std::size_t>(i)];
            std::copy_n(state(i, head, 0), floats, joined);
            for (std::int64_t block = 1; split_ && block <= row.position / kPositions; ++block)
                kernels_.join(heads(row), state(i, head, block), joined);
            kernels_.finish(
                heads(row), joined,
                space(thread).floats.data() + (i * model_.kv_heads + head) * group * model_.head_dim);
        }
}

// --- Logits

void Decoder::head(int thread) {
    const auto count = static_cast<std::int64_t>(wanted_.size());
    const Matrix& head = *model_.head;
    const std::int64_t dim = model_.dim;
    Workspace& own = space(thread);
    const Inputs inputs = own.inputs(own.floats.data(), dim, count, dim);
    const Range rows = alone() ? Range{0, count} : mine(thread, count);
    for (std::int64_t i = rows.begin; i < rows.end; ++i) {
        float* normed = own.floats.data() + i * dim;
        kernels_.rms_norm(x_.data() + wanted_[static_cast<std::size_t>(i)] * model_.stride,
                          model_.norm.data(), model_.norm_eps, dim, normed);
        kernels_.quantize(normed, dim, inputs.side, own.codes.data() + inputs.place(i) * kGroup,
                          own.groups.data() + inputs.place(i));
    }
    if (!alone()) team_.meet();
    kernels_.product(head.view(), inputs, {0, count}, mine(thread, head.blocks()), logits_, model_.vocab,
                     false);
}

}  // namespace bedplate
