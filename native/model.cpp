#include "model.h"

#include <cmath>
#include <set>

namespace bedplate {
namespace {

constexpr std::int64_t kMostRanks = 4096;

// Where the next row of so many floats begins: at a cache line, and an odd number of lines on. A product
// writes the same columns of many rows, and lines that lie a power of two apart share few places of a cache.
std::int64_t stride_of(std::int64_t floats) {
    constexpr std::int64_t kLine = 16;
    return ((floats + kLine - 1) / kLine | 1) * kLine;
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

std::size_t bytes_of(const std::shared_ptr<const Branch>& branch) {
    if (branch == nullptr) return 0;
    std::size_t bytes = branch->narrow->bytes();
    for (const auto& back : branch->backs) bytes += back->bytes();
    return bytes;
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

std::size_t Model::bytes() const {
    std::set<const Matrix*> matrices{head.get()};
    std::size_t bytes = (embedding ? embedding->bytes() : 0) + norm.size() * 4;
    for (const auto& layer : layers) {
        bytes += (layer.attention_norm.size() + layer.mlp_norm.size()) * 4;
        for (const auto& place : layer.places) {
            for (const auto& weight : place.weights) matrices.insert(weight.get());
            bytes += bytes_of(place.correction);
        }
    }
    for (const auto* matrix : matrices) bytes += matrix->bytes();
    return bytes;
}

std::size_t Adapter::bytes() const {
    std::size_t bytes = 0;
    for (const auto& layer : layers)
        for (const auto& branch : layer.places) bytes += bytes_of(branch);
    return bytes;
}

}  // namespace bedplate
