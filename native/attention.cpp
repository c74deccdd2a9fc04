// Attention of a step's rows to the keys and values of their sessions.
#include <algorithm>
#include <cmath>

#include "decoder.h"

namespace bedplate {

Heads Decoder::heads(std::int64_t i) const {
    const Rules& r = model_.rules;
    float scale = r.attention_scale;
    if (r.query_growth != 0)
        scale *= 1 + r.query_growth * std::log1p(static_cast<float>(row(i).position / r.growth_positions));
    return {model_.heads / model_.kv_heads, model_.head_dim, scale, r.score_cap, row(i).kv->shape().half};
}

// Queries and keys that are normed all heads together.
void Decoder::norm_whole(int thread, std::int64_t index) {
    const Layer& layer = layer_of(index);
    const std::int64_t q = model_.heads * model_.head_dim;
    if (layer.q_norm.size() != static_cast<std::size_t>(q) || of_heads(layer)) return;
    const Linears& place = layer.places[kAttentionIn];
    const Range some = mine(thread, rows());
    for (std::int64_t i = some.begin; i < some.end; ++i) {
        float* const out = out_.data() + i * place.width;
        const float eps = model_.rules.norm_eps;
        kernels_.rms_norm(out, head_norm(index, i, &Norms::q_norm).data(), eps, q, out);
        float* const key = out + place.firsts[1];
        kernels_.rms_norm(key, head_norm(index, i, &Norms::k_norm).data(), eps,
                          model_.kv_heads * model_.head_dim, key);
    }
    team_.meet();
}

// The weights of a norm of a row's queries or keys: its adapter's, or the model's.
const std::vector<float>& Decoder::head_norm(std::int64_t index, std::int64_t i,
                                             std::vector<float> Norms::* which) const {
    const Norms* norms = own(index, i);
    return norms == nullptr || (norms->*which).empty() ? layer_of(index).*which : norms->*which;
}

// Whether each head's queries and keys are normed on their own.
bool Decoder::of_heads(const Layer& layer) const {
    return layer.q_norm.size() == static_cast<std::size_t>(model_.head_dim);
}

// Norms and turns a head of a row's queries or keys, `weight` being that of the norm.
void Decoder::prepare_head(const Layer& layer, const std::vector<float>& weight, std::int64_t i,
                           float* x) const {
    const std::int64_t dim = model_.head_dim;
    if (of_heads(layer)) kernels_.rms_norm(x, weight.data(), model_.rules.norm_eps, dim, x);
    if (layer.rope == kNoRope) return;
    const Turns& turns = turns_[static_cast<std::size_t>(layer.rope)][row(i).kv->shape().of_long];
    const std::int64_t at = row(i).position * (dim / 2);
    kernels_.rotate(x, turns.cos.data() + at, turns.sin.data() + at, dim);
}

void Decoder::keep(std::int64_t index, std::int64_t i, std::int64_t head) {
    const Layer& layer = layer_of(index);
    const Linears& place = layer.places[kAttentionIn];
    const std::int64_t position = row(i).position, block = position / kPositions;
    float* out = out_.data() + i * place.width + head * model_.head_dim;
    prepare_head(layer, head_norm(index, i, &Norms::k_norm), i, out + place.firsts[1]);
    kernels_.keep(heads(i), out + place.firsts[1], out + place.firsts[2], position % kPositions,
                  row(i).kv->keys(index, head, block), row(i).kv->values(index, head, block));
}

// The positions that a row sees.
Range Decoder::seen(std::int64_t layer, std::int64_t i) const {
    const std::int64_t end = row(i).position + 1, window = layer_of(layer).window;
    return {window == 0 ? 0 : std::max<std::int64_t>(0, end - window), end};
}

// The blocks of positions that hold these.
Range Decoder::blocks_of(Range positions) {
    return {positions.begin / kPositions, whole(positions.end, kPositions)};
}

void Decoder::attend(int thread, std::int64_t layer) {
    if (chained_) {
        const Range tasks = mine(thread, rows() * model_.kv_heads);
        for (std::int64_t task = tasks.begin; task < tasks.end; ++task)
            keep(layer, task / model_.kv_heads, task % model_.kv_heads);
        team_.meet();
    }
    const std::int64_t parts = split_ ? most_blocks_ : 1;
    const Range tasks = mine(thread, rows() * model_.kv_heads * parts);
    for (std::int64_t pair = tasks.begin / parts; pair * parts < tasks.end; ++pair) {
        const Range all = blocks_of(seen(layer, pair / model_.kv_heads));
        const Range blocks =
            split_ ? overlap({tasks.begin - pair * parts, tasks.end - pair * parts}, all) : all;
        if (blocks.begin >= blocks.end) continue;
        const std::int64_t next = std::min((tasks.end - 1) / parts, pair + 1), i = next / model_.kv_heads;
        attend(thread, layer, pair, blocks,
               row(i).kv->keys(layer, next % model_.kv_heads, blocks_of(seen(layer, i)).begin));
    }
}

// Attention of a row's kv head (`pair`) to some blocks of positions.
void Decoder::attend(int thread, std::int64_t index, std::int64_t pair, Range blocks, const void* then) {
    const Layer& layer = layer_of(index);
    const std::int64_t i = pair / model_.kv_heads, head = pair % model_.kv_heads;
    const Heads shape = heads(i);
    const Range positions = seen(index, i);
    const std::int64_t width = shape.group * shape.head_dim, floats = shape.group * (2 + shape.head_dim);
    Own& own = own_[static_cast<std::size_t>(thread)];
    Kv& kv = *row(i).kv;
    if (!chained_ && blocks.end == whole(positions.end, kPositions)) keep(index, i, head);

    float* const q = own.queries.data();
    std::copy_n(out_.data() + i * layer.places[kAttentionIn].width + head * width, width, q);
    const auto& weight = head_norm(index, i, &Norms::q_norm);
    for (std::int64_t g = 0; g < shape.group; ++g) prepare_head(layer, weight, i, q + g * shape.head_dim);
    float* const states = split_ ? states_.data() + pair * most_blocks_ * floats : own.states.data();
    for (std::int64_t block = blocks.begin; block < blocks.end; ++block) {
        const std::int64_t first = block * kPositions;
        const Range some = overlap({positions.begin - first, positions.end - first}, {0, kPositions});
        kernels_.attend(shape, q, kv.keys(index, head, block), kv.values(index, head, block), some,
                        states + block * floats,
                        block + 1 < blocks.end ? kv.keys(index, head, block + 1) : then);
    }
    if (split_) return;
    join(thread, index, pair, states, inputs_.floats.data());
    if (!whole_groups_) return;
    const std::int64_t all = model_.heads * model_.head_dim;
    inputs_.quantize(kernels_, inputs_.view(inputs_.floats.data(), all, rows(), all), i,
                     {head * width, (head + 1) * width});
}

// What the states of a row's kv head come to, into its place in floats [rows, heads · head_dim].
void Decoder::join(int thread, std::int64_t layer, std::int64_t pair, const float* states, float* floats) {
    const Heads shape = heads(pair / model_.kv_heads);
    const Range blocks = blocks_of(seen(layer, pair / model_.kv_heads));
    kernels_.join(shape, states + blocks.begin * shape.group * (2 + shape.head_dim),
                  blocks.end - blocks.begin, own_[static_cast<std::size_t>(thread)].weights.data(),
                  floats + pair * shape.group * shape.head_dim);
}

// What attention comes to as inputs, all rows.
Inputs Decoder::attended(int thread, std::int64_t layer) {
    const std::int64_t width = model_.heads * model_.head_dim;
    if (whole_groups_) return inputs_.view(inputs_.floats.data(), width, rows(), width);
    InputRows& to = prepared(thread);
    const Inputs inputs = to.view(split_ ? to.floats.data() : inputs_.floats.data(), width, rows(), width);
    const std::int64_t states = most_blocks_ * (width + 2 * model_.heads) / model_.kv_heads;
    const Range some = my_rows(thread);
    for (std::int64_t i = some.begin; i < some.end; ++i) {
        for (std::int64_t pair = i * model_.kv_heads; pair < (i + 1) * model_.kv_heads && split_; ++pair)
            join(thread, layer, pair, states_.data() + pair * states, to.floats.data());
        to.quantize(kernels_, inputs, i, {0, width});
    }
    meet_if_shared();
    return inputs;
}

}  // namespace bedplate
