#include "adapter.h"

#include <algorithm>
#include <cmath>
#include <iterator>

namespace bedplate {
namespace {

constexpr std::size_t kMostLayers = 4096;

// Tokens that have rows of their own, and how many rows there are.
void check_ids(const std::vector<std::int64_t>& ids, std::int64_t rows, std::int64_t vocab) {
    require(static_cast<std::int64_t>(ids.size()) == rows, "there are not as many rows as tokens have");
    for (std::size_t i = 0; i < ids.size(); ++i)
        require(ids[i] >= 0 && ids[i] < vocab && (i == 0 || ids[i - 1] < ids[i]),
                "tokens with rows of their own do not ascend, or are not in the vocabulary");
}

// Whether all tokens from number `first` on have rows of their own; ids are below vocab, and ascend.
bool have_all(const std::vector<std::int64_t>& ids, std::int64_t first, std::int64_t vocab) {
    return ids.end() - std::lower_bound(ids.begin(), ids.end(), first) == vocab - first;
}

void check_change(const Change& change, const Linears& linears) {
    for (const Term& term : change.terms) check(*term.branch, linears);
    require(change.affines.empty() || change.affines.size() == linears.weights.size(),
            "factors and shifts are not of the linears that are there");
    for (std::size_t i = 0; i < change.affines.size(); ++i) {
        const auto& [factor, shift] = change.affines[i];
        const auto rows = static_cast<std::size_t>(linears.weights[i]->rows());
        require(factor.size() == shift.size() && (factor.empty() || factor.size() == rows),
                "factors or shifts do not fit their linear");
    }
}

// Weights in place of those of the model.
void check_own(const std::vector<float>& own, const std::vector<float>& of_model) {
    require(own.empty() || own.size() == of_model.size(), "a norm of an adapter does not fit the model's");
}

void check_own(const Norm& own, const Norm& of_model) {
    check_own(own.weight, of_model.weight);
    check_own(own.bias, of_model.bias);
}

void check_layer(const Adapter::OfLayer& layer, const Model& m) {
    require(layer.base >= 0 && layer.base < static_cast<std::int64_t>(m.layers.size()),
            "the adapter uses a layer that the model has not");
    const Layer& base = m.layers[static_cast<std::size_t>(layer.base)];
    for (const auto norm : Norms::kAll) check_own(layer.*norm, base.*norm);
    check_own(layer.q_norm, base.q_norm);
    check_own(layer.k_norm, base.k_norm);
    for (int place = 0; place < kPlaces; ++place) check_change(layer.places[place], base.places[place]);
}

void check_embedding(const Adapter& a, const Model& m) {
    const Adapter::Embedding& e = a.embedding;
    require(e.table == nullptr || (e.table->rows() == a.vocab && e.table->columns() == m.dim),
            "the adapter's embedding does not fit the model");
    for (const auto& term : e.terms)
        require(term.narrow->rows() == a.vocab && term.narrow->columns() <= kMostRanks &&
                    term.back->view().rank == term.narrow->columns() && term.back->view().rows == m.dim,
                "the branch at the embedding does not fit the model");
    require(e.rows == nullptr || e.rows->columns() == m.dim, "rows of the embedding do not fit the model");
    require(e.has_table() || have_all(e.ids, m.vocab, a.vocab), "a token has no row in the embedding");
}

void check_head(const Adapter& a, const Model& m) {
    const Adapter::Head& h = a.head;
    const Linears& linears = h.is_own() ? h.linears : m.head;
    if (h.is_own())
        require(h.linears.weights[0]->rows() == a.vocab && h.linears.columns == m.dim,
                "the adapter's head does not fit the model");
    check_change(h.change, linears);
    require(h.rows == nullptr || h.rows->columns() == m.dim, "rows of the head do not fit the model");
    require(h.is_own() || have_all(h.ids, m.vocab, a.vocab), "a token has no row in the head");
}

void collect(const std::vector<Term>& terms, Readables& all) {
    for (const Term& term : terms) collect(*term.branch, all);
}

Readables all_of(const Adapter& a) {
    Readables all{a.embedding.table.get(), a.embedding.rows.get()};
    for (const auto& term : a.embedding.terms) all.insert(all.end(), {term.narrow.get(), term.back.get()});
    for (const auto& layer : a.layers)
        for (const auto& place : layer.places) collect(place.terms, all);
    for (const auto& weight : a.head.linears.weights) all.push_back(weight.get());
    collect(a.head.change.terms, all);
    all.push_back(a.head.rows.get());
    all.erase(std::remove(all.begin(), all.end(), nullptr), all.end());
    return all;
}

std::size_t floats_of(const Change& change) {
    std::size_t count = 0;
    for (const auto& affine : change.affines) count += affine.factor.size() + affine.shift.size();
    return count;
}

bool is_own(const Norm& norm) { return !norm.weight.empty() || !norm.bias.empty(); }

bool has_branches_alone(const Adapter& a) {
    const auto no_affine = [](const Change& change) { return floats_of(change) == 0; };
    const Adapter::Embedding& e = a.embedding;
    const Adapter::Head& h = a.head;
    if (is_own(a.norm) || e.has_table() || !e.ids.empty() || h.is_own() || !h.ids.empty()) return false;
    return no_affine(h.change) &&
           std::all_of(a.layers.begin(), a.layers.end(), [&](const Adapter::OfLayer& layer) {
               return layer.floats() == 0 &&
                      std::all_of(std::begin(layer.places), std::end(layer.places), no_affine);
           });
}

// Adds those of another adapter, times `factor`.
template <class T>
void append(std::vector<T>& terms, const std::vector<T>& more, float factor) {
    for (T term : more) {
        term.factor *= factor;
        terms.push_back(std::move(term));
    }
}

}  // namespace

std::shared_ptr<Adapter> sum_of(const std::vector<Weighted>& parts) {
    require(!parts.empty(), "a sum of no adapters");
    auto sum = std::make_shared<Adapter>();
    for (const auto& [adapter, factor] : parts) {
        require(adapter != nullptr, "an adapter that is none");
        require(has_branches_alone(*adapter), "an adapter of a sum has more than branches");
        require(std::isfinite(factor), "a factor of an adapter is no number");
        if (sum->parts.empty()) {
            sum->vocab = adapter->vocab;
            sum->layers.resize(adapter->layers.size());
            for (std::size_t l = 0; l < sum->layers.size(); ++l)
                sum->layers[l].base = adapter->layers[l].base;
        }
        require(sum->vocab == adapter->vocab && sum->layers.size() == adapter->layers.size(),
                "adapters of a sum have other tokens or other layers");
        for (std::size_t l = 0; l < sum->layers.size(); ++l) {
            require(sum->layers[l].base == adapter->layers[l].base,
                    "adapters of a sum have other tokens or other layers");
            for (int place = 0; place < kPlaces; ++place)
                append(sum->layers[l].places[place].terms, adapter->layers[l].places[place].terms, factor);
        }
        append(sum->embedding.terms, adapter->embedding.terms, factor);
        append(sum->head.change.terms, adapter->head.change.terms, factor);
        sum->parts.push_back(adapter);
    }
    complete(*sum);
    return sum;
}

void complete(Adapter& a) {
    require(!a.layers.empty() && a.layers.size() <= kMostLayers,
            "the adapter has no layers, or far too many");
    require(a.vocab >= 1 && a.vocab <= kMostTokens, "the adapter's vocabulary is out of bounds");
    Adapter::Embedding& e = a.embedding;
    Adapter::Head& h = a.head;
    if (h.is_own()) lay_out(h.linears, {h.linears.weights[0]->rows()}, h.linears.weights[0]->columns());
    require(!e.of_head ||
                (e.table == nullptr && h.is_own() && h.linears.weights[0]->view().coding != Coding::kFour),
            "the adapter's head does not serve as embedding");
    for (const auto& term : e.terms)
        require(term.narrow != nullptr && term.back != nullptr, "the branch at the embedding lacks a half");
    check_ids(e.ids, e.rows == nullptr ? 0 : e.rows->rows(), a.vocab);
    check_ids(h.ids, h.rows == nullptr ? 0 : h.rows->rows(), a.vocab);
    require(h.rows == nullptr || h.rows->view().coding == Coding::kFloat,
            "rows of the head are no float32 numbers");
}

void check(const Adapter& a, const Model& m) {
    require(a.vocab >= m.vocab, "the adapter has fewer tokens than the model");
    for (const auto& layer : a.layers) check_layer(layer, m);
    check_own(a.norm, m.norm);
    check_embedding(a, m);
    check_head(a, m);
}

void read(const Adapter& adapter, int threads) { read_all(all_of(adapter), threads); }

std::size_t Adapter::bytes() const {
    std::size_t floats = norm.weight.size() + norm.bias.size() + floats_of(head.change);
    for (const auto& layer : layers) {
        floats += layer.floats();
        for (const auto& place : layer.places) floats += floats_of(place);
    }
    const std::size_t ids = embedding.ids.size() + head.ids.size();
    return bytes_of(all_of(*this)) + floats * sizeof(float) + ids * sizeof(std::int64_t);
}

}  // namespace bedplate
