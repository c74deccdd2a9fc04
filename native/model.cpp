#include "model.h"

#include <cmath>
#include <numeric>
#include <set>

namespace bedplate {
namespace {

constexpr std::int64_t kMostRanks = 4096;

// Where the next row of so many floats begins: at a cache line, and an odd number of lines on. A product
// writes the same columns of many rows, and lines that lie a power of two apart share few places of a cache.
std::int64_t stride_of(std::int64_t floats) {
    constexpr std::int64_t kLine = 16;
    return (whole(floats, kLine) | 1) * kLine;
}

void check_branch(const Branch& branch, const Linears& linears) {
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
    if (linears.correction != nullptr) check_branch(*linears.correction, linears);
}

using All = std::vector<Readable*>;

void collect(const std::shared_ptr<const Branch>& branch, All& all) {
    if (branch == nullptr) return;
    all.push_back(branch->narrow.get());
    for (const auto& back : branch->backs) all.push_back(back.get());
}

// In the order in which a step reads them.
All all_of(const Model& model) {
    All all;
    if (model.embedding != nullptr) all.push_back(model.embedding.get());
    for (const auto& layer : model.layers)
        for (const auto& place : layer.places) {
            for (const auto& weight : place.weights)
                if (weight != nullptr) all.push_back(weight.get());
            collect(place.correction, all);
        }
    if (model.head != nullptr) all.push_back(model.head.get());
    return all;
}

All all_of(const Adapter& adapter) {
    All all;
    for (const auto& layer : adapter.layers)
        for (const auto& branch : layer.places) collect(branch, all);
    return all;
}

std::size_t bytes_of(const All& all) {
    const std::set<const Readable*> different(all.begin(), all.end());
    return std::accumulate(different.begin(), different.end(), std::size_t(0),
                           [](std::size_t sum, const Readable* one) { return sum + one->bytes(); });
}

}  // namespace

void complete(Model& m) {
    constexpr std::int64_t kMost = 1 << 24;
    for (const std::int64_t size :
         {m.dim, m.heads, m.kv_heads, m.head_dim, m.hidden, m.vocab, m.max_positions})
        require(size >= 1 && size <= kMost, "a dimension of the model is out of bounds");
    m.stride = stride_of(m.dim);
    require(m.heads % m.kv_heads == 0, "the heads are no multiple of the kv heads");
    require(m.head_dim % 2 == 0 && m.head_dim <= 4096, "head_dim is odd or too large");
    require(m.inverse_frequencies.size() == static_cast<std::size_t>(m.head_dim / 2),
            "the frequencies do not fit head_dim");
    require(m.norm_eps > 0 && std::isfinite(m.norm_eps), "the norm's eps is no positive number");
    require(m.norm.size() == static_cast<std::size_t>(m.dim), "the last norm does not fit the model");
    require(m.head != nullptr && m.head->rows() == m.vocab && m.head->columns() == m.dim,
            "the head does not fit the model");
    require(m.embedding == nullptr || (m.embedding->rows() == m.vocab && m.embedding->columns() == m.dim),
            "the embedding does not fit the model");
    require(m.embedding != nullptr || m.head->view().coding != Coding::kFour,
            "a head of 4 bits does not serve as embedding");
    require(!m.layers.empty(), "a model of no layers");
    const std::int64_t q = m.heads * m.head_dim, kv = m.kv_heads * m.head_dim;
    for (auto& layer : m.layers) {
        require(layer.attention_norm.size() == m.norm.size() && layer.mlp_norm.size() == m.norm.size(),
                "a norm does not fit the model");
        lay_out(layer.places[kAttentionIn], {q, kv, kv}, m.dim);
        lay_out(layer.places[kAttentionOut], {m.dim}, q);
        lay_out(layer.places[kMlpIn], {m.hidden, m.hidden}, m.dim);
        lay_out(layer.places[kMlpOut], {m.dim}, m.hidden);
    }
}

void check(const Adapter& adapter, const Model& model) {
    require(adapter.layers.size() == model.layers.size(), "the adapter has another number of layers");
    for (std::size_t i = 0; i < adapter.layers.size(); ++i)
        for (int place = 0; place < kPlaces; ++place)
            if (const auto& branch = adapter.layers[i].places[place])
                check_branch(*branch, model.layers[i].places[place]);
}

void read(const Model& model, int threads) { read_all(all_of(model), threads); }

void read(const Adapter& adapter, int threads) { read_all(all_of(adapter), threads); }

std::size_t Model::bytes() const {
    std::size_t bytes = bytes_of(all_of(*this)) + norm.size() * 4;
    for (const auto& layer : layers) bytes += (layer.attention_norm.size() + layer.mlp_norm.size()) * 4;
    return bytes;
}

std::size_t Adapter::bytes() const { return bytes_of(all_of(*this)); }

}  // namespace bedplate
