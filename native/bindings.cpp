// The module bedplate._native: conversions, ownership and the GIL; nothing is computed here.
//
// Whatever a step uses is held by shared pointers while it runs, so Python may forget it meanwhile.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <pthread.h>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <algorithm>

#include "bindings.h"
#include "decoder.h"
#include "instruction_sets.h"
#include "logits.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace bedplate;

namespace {

// file, offset, size: see bedplate::Source
using Range = std::tuple<int, std::int64_t, std::int64_t>;
// rows, columns, bits, group, codes, scales: see bedplate::Constants
using Part = std::tuple<std::int64_t, std::int64_t, int, std::int64_t, Range, Range>;
// rank, group, unit, codes, scales: see bedplate::Offsets
using OffsetPart = std::tuple<std::int64_t, std::int64_t, float, Range, Range>;
// weight and bias of a norm
using NormPart = std::tuple<std::optional<Range>, std::optional<Range>>;
// weights and correction of one place of a layer
using PlacePart = std::tuple<std::vector<std::shared_ptr<Matrix>>, std::shared_ptr<Branch>>;
// factor and shift of a linear's outputs
using AffinePart = std::tuple<std::optional<Range>, std::optional<Range>>;
// branch, and factor and shift of each linear, of an adapter at one place
using ChangePart = std::tuple<std::shared_ptr<Branch>, std::vector<AffinePart>>;
// frequencies, those of long texts, scale
using RopePart = std::tuple<std::vector<float>, std::vector<float>, float>;
// token, position, session, adapter, scale, whether its logits are wanted
using RowPart =
    std::tuple<std::int64_t, std::int64_t, std::shared_ptr<Kv>, std::shared_ptr<Adapter>, float, bool>;

Source source(const Range& range) {
    const auto [file, offset, size] = range;
    require(offset >= 0 && size >= 0, "a range of a file is out of bounds");
    return {file, offset, size};
}

Constants constants(const Part& part) {
    const auto& [rows, columns, bits, group, codes, scales] = part;
    return {rows, columns, bits, group, source(codes), source(scales)};
}

std::vector<float> floats(const Range& range) {
    const Source from = source(range);
    require(from.size % 4 == 0, "bytes that are no float32 numbers");
    std::vector<float> values(static_cast<std::size_t>(from.size / 4));
    from.read(0, from.size, values.data());
    return values;
}

std::vector<float> floats(const std::optional<Range>& range) {
    return range ? floats(*range) : std::vector<float>();
}

Norm norm(const NormPart& part) {
    const auto& [weight, bias] = part;
    return {floats(weight), floats(bias)};
}

Activation activation_of(const std::string& name) {
    if (name == "silu") return Activation::kSilu;
    if (name == "gelu_tanh") return Activation::kGelu;
    require(name == "relu2", "an activation that is not known");
    return Activation::kRelu2;
}

std::shared_ptr<Matrix> make_matrix(const std::vector<Part>& parts,
                                    const std::optional<OffsetPart>& offset_part,
                                    const std::optional<Range>& bias_part) {
    std::vector<Constants> all;
    for (const auto& part : parts) all.push_back(constants(part));
    std::optional<Offsets> offsets;
    if (offset_part) {
        const auto& [rank, group, unit, codes, scales] = *offset_part;
        offsets = Offsets{rank, group, unit, source(codes), source(scales)};
    }
    std::optional<Source> bias;
    if (bias_part) bias = source(*bias_part);
    return std::make_shared<Matrix>(std::move(all), offsets, bias);
}

void fill_places(Layer& layer, const std::vector<PlacePart>& places) {
    require(places.size() == kPlaces, "a layer has four places");
    for (std::size_t i = 0; i < places.size(); ++i) {
        const auto& [weights, correction] = places[i];
        layer.places[i].weights.assign(weights.begin(), weights.end());
        layer.places[i].correction = correction;
    }
}

bedplate::Range positions(std::int64_t begin, std::int64_t end) {
    require(begin >= 0 && begin <= end && end <= kMostTokens, "positions are out of bounds");
    return {begin, end};
}

void require_threads(int threads) { require(threads >= 1 && threads <= 1024, "threads must be 1 to 1024"); }

std::vector<std::int64_t> ids(const std::optional<Range>& range) {
    if (!range) return {};
    const Source from = source(*range);
    require(from.size % 8 == 0, "bytes that are no int64 numbers");
    std::vector<std::int64_t> values(static_cast<std::size_t>(from.size / 8));
    from.read(0, from.size, values.data());
    return values;
}

// What is not there is 1 or 0 everywhere.
Affine affine(const AffinePart& part) {
    Affine made{floats(std::get<0>(part)), floats(std::get<1>(part))};
    if (made.factor.empty()) made.factor.assign(made.shift.size(), 1);
    if (made.shift.empty()) made.shift.assign(made.factor.size(), 0);
    return made;
}

Change change(const ChangePart& part) {
    const auto& [branch, affines] = part;
    Change made;
    if (branch != nullptr) made.terms.push_back({branch, 1});
    for (const auto& one : affines) made.affines.push_back(affine(one));
    return made;
}

void fill_norms(Norms& norms, const std::vector<NormPart>& parts,
                const std::vector<std::optional<Range>>& of_heads) {
    require(parts.size() == 4 && of_heads.size() == 2, "a layer has four norms, and two of heads");
    for (std::size_t i = 0; i < parts.size(); ++i) norms.*Norms::kAll[i] = norm(parts[i]);
    norms.q_norm = floats(of_heads[0]);
    norms.k_norm = floats(of_heads[1]);
}

std::shared_ptr<Adapter::OfLayer> make_layer_of_adapter(std::int64_t base, const std::vector<NormPart>& norms,
                                                        const std::vector<std::optional<Range>>& head_norms,
                                                        const std::vector<ChangePart>& places) {
    auto layer = std::make_shared<Adapter::OfLayer>();
    layer->base = base;
    fill_norms(*layer, norms, head_norms);
    require(places.size() == kPlaces, "a layer has four places");
    for (std::size_t i = 0; i < places.size(); ++i) layer->places[i] = change(places[i]);
    return layer;
}

std::shared_ptr<Adapter::Embedding> make_embedding(std::shared_ptr<Table> table, bool of_head,
                                                   std::shared_ptr<Table> narrow,
                                                   std::shared_ptr<BackMatrix> back,
                                                   const std::optional<Range>& tokens,
                                                   std::shared_ptr<Table> rows) {
    auto made = std::make_shared<Adapter::Embedding>(
        Adapter::Embedding{std::move(table), of_head, {}, ids(tokens), std::move(rows)});
    if (narrow != nullptr || back != nullptr) made->terms.push_back({std::move(narrow), std::move(back), 1});
    return made;
}

std::shared_ptr<Adapter::Head> make_head(std::shared_ptr<Matrix> matrix, const ChangePart& part,
                                         const std::optional<Range>& tokens, std::shared_ptr<Matrix> rows) {
    auto head = std::make_shared<Adapter::Head>();
    if (matrix != nullptr) head->linears.weights = {std::move(matrix)};
    head->change = change(part);
    head->ids = ids(tokens);
    head->rows = std::move(rows);
    return head;
}

std::shared_ptr<Adapter> make_adapter(std::int64_t vocab,
                                      const std::vector<std::shared_ptr<Adapter::OfLayer>>& layers,
                                      const NormPart& last, const Adapter::Embedding& embedding,
                                      const Adapter::Head& head, int readers) {
    require_threads(readers);
    auto adapter = std::make_shared<Adapter>();
    adapter->vocab = vocab;
    for (const auto& layer : layers) {
        require(layer != nullptr, "a layer that is none");
        adapter->layers.push_back(*layer);
    }
    adapter->norm = norm(last);
    adapter->embedding = embedding;
    adapter->head = head;
    const nb::gil_scoped_release released;
    complete(*adapter);
    read(*adapter, readers);
    return adapter;
}

std::shared_ptr<Adapter> make_sum(const std::vector<std::tuple<std::shared_ptr<Adapter>, float>>& parts) {
    std::vector<Weighted> weighted;
    for (const auto& [adapter, factor] : parts) weighted.push_back({adapter, factor});
    return sum_of(weighted);
}

Logits step(Decoder& self, const std::vector<RowPart>& parts) {
    std::vector<Row> rows;
    std::size_t wanted = 0;
    std::int64_t width = self.model().vocab;
    for (const auto& [token, position, kv, adapter, scale, is_wanted] : parts) {
        rows.push_back({token, position, kv.get(), adapter.get(), scale, is_wanted});
        wanted += is_wanted;
        if (is_wanted) width = std::max(width, self.vocab(rows.back()));
    }
    const auto columns = static_cast<std::size_t>(width);
    const nb::gil_scoped_release released;
    Logits logits(self.spare(), wanted, columns);
    self.step(rows, width, logits.data.get());
    return logits;
}

void bind_weights(nb::module_& m) {
    nb::class_<Matrix>(m, "Matrix")
        .def(nb::new_(&make_matrix), "parts"_a, "offsets"_a = nb::none(), "bias"_a = nb::none())
        .def_prop_ro("nbytes", &Matrix::bytes);
    m.def(
        "unit_of_groups",
        [](const Part& part, std::int64_t groups) { return unit_of_groups(constants(part), groups); },
        "part"_a, "groups"_a);
    nb::class_<BackMatrix>(m, "BackMatrix")
        .def(nb::new_([](const Part& part, std::int64_t column, std::int64_t rank, std::int64_t linear,
                         std::int64_t narrow) {
                 return std::make_shared<BackMatrix>(constants(part), column, rank, linear, narrow);
             }),
             "part"_a, "column"_a, "rank"_a, "linear"_a, "narrow"_a);
    nb::class_<Table>(m, "Table")
        .def(nb::new_([](const Part& part) { return std::make_shared<Table>(constants(part)); }), "part"_a);
    nb::class_<Branch>(m, "Branch")
        .def(nb::new_(
                 [](std::shared_ptr<Matrix> narrow, const std::vector<std::shared_ptr<BackMatrix>>& backs) {
                     require(narrow != nullptr, "a branch without its narrow half");
                     for (const auto& back : backs)
                         require(back != nullptr, "a branch without one of its wide halves");
                     return std::make_shared<Branch>(Branch{std::move(narrow), {backs.begin(), backs.end()}});
                 }),
             "narrow"_a, "backs"_a);
    nb::class_<Layer>(m, "Layer")
        .def(nb::new_([](const std::vector<NormPart>& norms,
                         const std::vector<std::optional<Range>>& head_norms, int rope, std::int64_t window,
                         const std::vector<PlacePart>& places) {
                 auto layer = std::make_shared<Layer>();
                 fill_norms(*layer, norms, head_norms);
                 layer->rope = rope;
                 layer->window = window;
                 fill_places(*layer, places);
                 return layer;
             }),
             "norms"_a, "head_norms"_a, "rope"_a, "window"_a, "places"_a);
    nb::class_<Rules>(m, "Rules")
        .def(nb::new_([](bool layer_norm, float norm_eps, bool parallel, const std::string& activation,
                         bool gated, float embedding_scale, float residual_scale, float attention_scale,
                         float logit_scale, float score_cap, float logit_cap, float query_growth,
                         std::int64_t growth_positions) {
                 return std::make_shared<Rules>(Rules{layer_norm, norm_eps, parallel,
                                                      activation_of(activation), gated, embedding_scale,
                                                      residual_scale, attention_scale, logit_scale, score_cap,
                                                      logit_cap, query_growth, growth_positions});
             }),
             nb::kw_only(), "layer_norm"_a, "norm_eps"_a, "parallel"_a, "activation"_a, "gated"_a,
             "embedding_scale"_a, "residual_scale"_a, "attention_scale"_a, "logit_scale"_a, "score_cap"_a,
             "logit_cap"_a, "query_growth"_a, "growth_positions"_a);
}

void bind_adapter(nb::module_& m) {
    const nb::tuple nothing = nb::make_tuple(nb::none(), nb::list());
    nb::class_<Adapter::OfLayer>(m, "AdapterLayer")
        .def(nb::new_(&make_layer_of_adapter), nb::kw_only(), "base"_a, "norms"_a, "head_norms"_a,
             "places"_a);
    nb::class_<Adapter::Embedding>(m, "AdapterEmbedding")
        .def(nb::new_(&make_embedding), nb::kw_only(), "table"_a = nb::none(), "of_head"_a = false,
             "narrow"_a = nb::none(), "back"_a = nb::none(), "ids"_a = nb::none(), "rows"_a = nb::none());
    nb::class_<Adapter::Head>(m, "AdapterHead")
        .def(nb::new_(&make_head), nb::kw_only(), "matrix"_a = nb::none(), "change"_a = nothing,
             "ids"_a = nb::none(), "rows"_a = nb::none());
    nb::class_<Adapter>(m, "Adapter", nb::is_weak_referenceable())
        .def(nb::new_(&make_adapter), nb::kw_only(), "vocab"_a, "layers"_a, "norm"_a, "embedding"_a, "head"_a,
             "readers"_a)
        .def_static("sum", &make_sum, "parts"_a)
        .def_prop_ro("nbytes", &Adapter::bytes);
}

// Each call comes with the GIL, so that no two touch a Kv or count who holds a block at once.
void bind_kv(nb::module_& m) {
    nb::class_<Meter>(m, "Meter")
        .def(nb::new_([] { return std::make_shared<Meter>(); }))
        .def_prop_ro("nbytes", [](const Meter& self) { return self.bytes.load(); });
    nb::class_<KvBlock>(m, "KvBlock")
        .def_prop_ro("nbytes", [](const KvBlock& self) { return self.shape().block_bytes(); })
        // Python holds it once, however many names it has there.
        .def_prop_ro("is_shared", [](const KvBlock& self) { return self.weak_from_this().use_count() > 1; })
        .def_prop_ro("data",
                     [](const KvBlock& self) { return nb::bytes(self.data(), self.shape().block_bytes()); });
    nb::class_<Kv>(m, "Kv")
        .def_prop_ro("nbytes", &Kv::bytes)
        .def_prop_ro("block_nbytes", [](const Kv& self) { return self.shape().block_bytes(); })
        .def_prop_ro("positions", &Kv::positions)
        .def(
            "growth",
            [](const Kv& self, std::int64_t begin, std::int64_t end) {
                return self.growth(positions(begin, end));
            },
            "begin"_a, "end"_a)
        .def(
            "reserve",
            [](Kv& self, std::int64_t begin, std::int64_t end) { self.reserve(positions(begin, end)); },
            "begin"_a, "end"_a)
        .def(
            "write",
            [](Kv& self, std::int64_t end, const nb::bytes& data) {
                const std::int64_t block = (positions(1, end).end - 1) / kPositions;
                require(data.size() == self.shape().block_bytes(),
                        "a block of keys and values has another size");
                self.reserve({block * kPositions, end});
                std::copy_n(static_cast<const std::uint8_t*>(data.data()), data.size(),
                            static_cast<std::uint8_t*>(self.keys(0, 0, block)));
                self.hold(end);
            },
            "end"_a, "data"_a)
        .def("fork", &Kv::fork, "positions"_a)
        .def("block", &Kv::block, "index"_a);
}

void bind_decoder(nb::module_& m) {
    nb::class_<Decoder>(m, "Decoder")
        .def(nb::new_([](std::int64_t dim, std::int64_t heads, std::int64_t kv_heads, std::int64_t head_dim,
                         std::int64_t hidden, std::int64_t vocab, std::int64_t max_positions,
                         const Rules& rules, const std::vector<RopePart>& ropes,
                         std::shared_ptr<Table> embedding, std::shared_ptr<Matrix> head, const NormPart& last,
                         const std::vector<std::shared_ptr<Layer>>& layers, int threads, int readers,
                         std::shared_ptr<Meter> meter) {
                 Model model{dim,   heads,         kv_heads, head_dim, hidden,
                             vocab, max_positions, rules,    {},       std::move(embedding),
                             {},    norm(last),    {}};
                 model.head.weights = {std::move(head)};
                 for (const auto& [frequencies, of_long, scale] : ropes)
                     model.ropes.push_back({frequencies, of_long, scale});
                 for (const auto& layer : layers) {
                     require(layer != nullptr, "a layer that is none");
                     model.layers.push_back(*layer);
                 }
                 require_threads(threads);
                 require_threads(readers);
                 if (meter == nullptr) meter = std::make_shared<Meter>();
                 const nb::gil_scoped_release released;
                 read(model, readers);
                 return std::make_shared<Decoder>(std::move(model), threads, std::move(meter));
             }),
             nb::kw_only(), "dim"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "hidden"_a, "vocab"_a,
             "max_positions"_a, "rules"_a, "ropes"_a, "embedding"_a.none(), "head"_a, "norm"_a, "layers"_a,
             "threads"_a, "readers"_a, "meter"_a.none() = nb::none())
        .def(
            "kv",
            [](const Decoder& self, bool half, const Adapter* adapter, bool of_long,
               std::vector<std::shared_ptr<KvBlock>> blocks, std::int64_t count) {
                for (const auto& block : blocks) require(block != nullptr, "a block that is none");
                return std::make_shared<Kv>(self.kv_shape(adapter, half, of_long), self.meter(),
                                            std::move(blocks), positions(0, count).end);
            },
            "half"_a, "adapter"_a.none() = nb::none(), "of_long"_a = false, "blocks"_a = nb::list(),
            "positions"_a = 0)
        .def(
            "check", [](const Decoder& self, const Adapter& adapter) { check(adapter, self.model()); },
            "adapter"_a)
        .def("step", &step, "rows"_a)
        .def_prop_ro("threads", &Decoder::threads)
        .def_prop_ro("instruction_set", [](const Decoder& self) { return std::string(self.kernels().name); })
        .def_prop_ro("nbytes", [](const Decoder& self) { return self.model().bytes(); });
}

}  // namespace

NB_MODULE(_native, m) {
    static nb::object native_error =
        nb::borrow(PyErr_NewException("bedplate._native.NativeError", PyExc_ValueError, nullptr));
    m.attr("NativeError") = native_error;
    nb::register_exception_translator([](const std::exception_ptr& thrown, void*) {
        try {
            std::rethrow_exception(thrown);
        } catch (const InvalidError& error) {
            PyErr_SetString(native_error.ptr(), error.what());
        }
    });
    // What other threads held when a process was forked is held there for ever: that is no leak.
    pthread_atfork(nullptr, nullptr, [] { nb::set_leak_warnings(false); });
    bind_weights(m);
    bind_adapter(m);
    bind_kv(m);
    bind_decoder(m);
    bind_packing(m);
    bind_sampling(m);
    m.def("return_memory", [] {
#ifdef __GLIBC__
        malloc_trim(0);
#endif
    });
    m.def("instruction_sets", &instruction_sets);
    m.def("instruction_set", [] { return std::string(current_kernels().name); });
    m.def("use_instruction_set", &use_instruction_set, "name"_a);
}
