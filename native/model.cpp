#include "model.h"

#include <cmath>
#include <numeric>
#include <set>

namespace bedplate {
namespace {

// Where the next row of so many floats begins: at a cache line, and an odd number of lines on. A product
// writes the same columns of many rows, and lines that lie a power of two apart share few places of a cache.
std::int64_t stride_of(std::int64_t floats) {
    constexpr std::int64_t kLine = 16;
    return (whole(floats, kLine) | 1) * kLine;
}

}  // namespace

void check(const Branch& branch, const Linears& linears) {
    require(branch.narrow != nullptr && branch.narrow->columns() == linears.columns,
            "a branch takes another input than its linears");
    require(branch.narrow->rows() <= kMostRanks, "a branch is too wide");
    for (const auto& back : branch.backs) {
        require(back != nullptr && back->linear() >= 0 &&
                    back->linear() < static_cast<std::int64_t>(linears.weights.size()),
                "a branch belongs to a linear that is not there");
        const auto& weight = *linears.weights[static_cast<std::size_t>(back->linear())];
        require(back->view().rows == weight.rows(), "a branch has other outputs than its linear");
        require(back->view().rank <= branch.narrow->rows() &&
                    back->narrow() <= branch.narrow->rows() - back->view().rank,
                "a branch takes narrow values that are not there");
    }
}

void lay_out(Linears& linears, const std::vector<std::int64_t>& rows, std::int64_t columns) {
    require(linears.weights.size() == rows.size(), "a layer lacks a linear");
    linears.columns = columns;
    linears.width = 0;
    linears.firsts.clear();
    for (std::size_t i = 0; i < rows.size(); ++i) {
        require(linears.weights[i] != nullptr && linears.weights[i]->rows() == rows[i] &&
                    linears.weights[i]->columns() == columns,
                "a linear has another shape than the model says");
        linears.firsts.push_back(linears.width);
        linears.width += linears.weights[i]->blocks() * kBlock;
    }
    linears.width = stride_of(linears.width);
    if (linears.correction != nullptr) check(*linears.correction, linears);
}

void collect(const Branch& branch, Readables& all) {
    all.push_back(branch.narrow.get());
    for (const auto& back : branch.backs) all.push_back(back.get());
}

std::size_t bytes_of(const Readables& all) {
    const std::set<const Readable*> different(all.begin(), all.end());
    return std::accumulate(different.begin(), different.end(), std::size_t(0),
                           [](std::size_t sum, const Readable* one) { return sum + one->bytes(); });
}

std::size_t Norms::floats() const {
    std::size_t count = q_norm.size() + k_norm.size();
    for (const auto norm : kAll) count += (this->*norm).weight.size() + (this->*norm).bias.size();
    return count;
}

namespace {

bool is_factor(float x) { return std::isfinite(x) && x > 0; }

void check_rules(const Rules& r) {
    require(is_factor(r.norm_eps), "the norm's eps is no positive number");
    for (const float factor : {r.embedding_scale, r.residual_scale, r.attention_scale, r.logit_scale})
        require(is_factor(factor), "a factor is no positive number");
    for (const float number : {r.score_cap, r.logit_cap, r.query_growth})
        require(number == 0 || is_factor(number), "a cap or a growth is no positive number");
    require(r.growth_positions >= 1, "queries grow in no positions");
}

void check_norm(const Norm& norm, const Model& m) {
    const auto dim = static_cast<std::size_t>(m.dim);
    require((norm.weight.empty() || norm.weight.size() == dim) &&
                (norm.bias.empty() || (m.rules.layer_norm && norm.bias.size() == norm.weight.size())),
            "a norm does not fit the model");
}

void check_ropes(const Model& m) {
    for (const Rope& rope : m.ropes) {
        require(rope.frequencies.size() == static_cast<std::size_t>(m.head_dim / 2),
                "the frequencies do not fit head_dim");
        require(is_factor(rope.scale), "a rotary embedding has a scale that is no positive number");
        require(rope.of_long.size() == rope.frequencies.size(),
                "the frequencies of long texts do not fit head_dim");
        for (const auto* frequencies : {&rope.frequencies, &rope.of_long})
            for (const float frequency : *frequencies)
                require(std::isfinite(frequency), "a frequency is no number");
    }
}

void check_attention(const Layer& layer, const Model& m) {
    require(layer.rope == kNoRope || (layer.rope >= 0 && layer.rope < static_cast<int>(m.ropes.size())),
            "a layer has a rotary embedding that is not there");
    require(layer.window >= 0, "a layer has a window of less than nothing");
    const auto q = layer.q_norm.size(), k = layer.k_norm.size();
    const auto head = static_cast<std::size_t>(m.head_dim);
    require((q == 0 && k == 0) || (q == head && k == head) ||
                (q == head * static_cast<std::size_t>(m.heads) &&
                 k == head * static_cast<std::size_t>(m.kv_heads)),
            "the norms of queries and keys do not fit the heads");
}

// In the order in which a step reads them.
Readables all_of(const Model& model) {
    Readables all;
    if (model.embedding != nullptr) all.push_back(model.embedding.get());
    for (const auto& layer : model.layers)
        for (const auto& place : layer.places) {
            for (const auto& weight : place.weights)
                if (weight != nullptr) all.push_back(weight.get());
            if (place.correction != nullptr) collect(*place.correction, all);
        }
    for (const auto& weight : model.head.weights)
        if (weight != nullptr) all.push_back(weight.get());
    return all;
}

}  // namespace

void complete(Model& m) {
    for (const std::int64_t size :
         {m.dim, m.heads, m.kv_heads, m.head_dim, m.hidden, m.vocab, m.max_positions})
        require(size >= 1 && size <= kMostTokens, "a dimension of the model is out of bounds");
    m.stride = stride_of(m.dim);
    require(m.heads % m.kv_heads == 0, "the heads are no multiple of the kv heads");
    require(m.head_dim % 2 == 0 && m.head_dim <= 4096, "head_dim is odd or too large");
    check_rules(m.rules);
    for (Rope& rope : m.ropes)
        if (rope.of_long.empty()) rope.of_long = rope.frequencies;
    check_ropes(m);
    check_norm(m.norm, m);
    lay_out(m.head, {m.vocab}, m.dim);
    require(m.embedding == nullptr || (m.embedding->rows() == m.vocab && m.embedding->columns() == m.dim),
            "the embedding does not fit the model");
    require(m.embedding != nullptr || m.head.weights[0]->view().coding != Coding::kFour,
            "a head of 4 bits does not serve as embedding");
    require(!m.layers.empty(), "a model of no layers");
    m.direct = m.rules.residual_scale == 1;
    const std::int64_t q = m.heads * m.head_dim, kv = m.kv_heads * m.head_dim;
    const std::vector<std::int64_t> mlp(m.rules.gated ? 2 : 1, m.hidden);
    for (auto& layer : m.layers) {
        for (const auto norm : Norms::kAll) check_norm(layer.*norm, m);
        check_attention(layer, m);
        m.direct &= layer.attention_output_norm.weight.empty() && layer.mlp_output_norm.weight.empty();
        lay_out(layer.places[kAttentionIn], {q, kv, kv}, m.dim);
        lay_out(layer.places[kAttentionOut], {m.dim}, q);
        lay_out(layer.places[kMlpIn], mlp, m.dim);
        lay_out(layer.places[kMlpOut], {m.dim}, m.hidden);
    }
}

void read(const Model& model, int threads) { read_all(all_of(model), threads); }

std::size_t Model::bytes() const {
    std::size_t floats = norm.weight.size() + norm.bias.size();
    for (const auto& layer : layers) floats += layer.floats();
    return bytes_of(all_of(*this)) + floats * sizeof(float);
}

}  // namespace bedplate
