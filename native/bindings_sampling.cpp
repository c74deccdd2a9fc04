// The logits of a step, and what is chosen from them. It takes too little time to give up the GIL for.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "logits.h"
#include "memory.h"
#include "sampling.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace bedplate {

namespace {

using Floats = nb::ndarray<nb::numpy, float, nb::ndim<2>>;
using Words = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Whether they are of a row is checked here: a sampler is given what its caller says.
const float* row_of(const Logits& logits, std::size_t row) {
    require(row < logits.rows, "there is no such row");
    return logits.data.get() + row * logits.columns;
}

Mask mask_of(const std::optional<Words>& words) {
    // An array without elements may have no address.
    static const std::int32_t nothing = 0;
    if (!words) return {};
    return {words->size() == 0 ? &nothing : words->data(), words->size()};
}

auto log_probabilities_of(const Logits& logits, std::size_t row, Token chosen, std::int64_t top) {
    const auto columns = static_cast<std::int64_t>(logits.columns);
    require(0 <= chosen && chosen < columns && top >= 0, "a token is out of bounds");
    const LogProbabilities found = log_probabilities(row_of(logits, row), columns, chosen, top);
    return std::make_pair(found.chosen, found.top);
}

}  // namespace

void bind_sampling(nb::module_& m) {
    nb::class_<Logits>(m, "Logits")
        .def("log_probabilities", &log_probabilities_of, "row"_a, "chosen"_a, "top"_a)
        // numpy is imported when an array is asked for, not before.
        .def_prop_ro("array", [](nb::handle_t<Logits> self) {
            const auto& logits = nb::cast<const Logits&>(self);
            return Floats(logits.data.get(), {logits.rows, logits.columns}, self);
        });
    nb::class_<Sampler>(m, "Sampler")
        .def(
            nb::new_([](double temperature, std::int64_t top_k, double top_p, double min_p, double repetition,
                        double presence, double frequency, std::vector<std::pair<Token, double>> bias,
                        std::vector<Token> banned, std::vector<Token> ends, std::int64_t min_tokens,
                        std::uint64_t seed, const std::vector<Token>& prompt) {
                return Sampler({temperature, top_k, top_p, min_p, repetition, presence, frequency,
                                std::move(bias), std::move(banned), std::move(ends), min_tokens, seed},
                               prompt);
            }),
            nb::kw_only(), "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "repetition"_a, "presence"_a,
            "frequency"_a, "bias"_a, "banned"_a, "ends"_a, "min_tokens"_a, "seed"_a, "prompt"_a)
        .def(
            "choose",
            [](Sampler& self, const Logits& logits, std::size_t row, const std::optional<Words>& mask) {
                return self.choose(row_of(logits, row), static_cast<std::int64_t>(logits.columns),
                                   mask_of(mask));
            },
            "logits"_a, "row"_a = 0, "mask"_a.noconvert() = nb::none())
        .def(
            "chances",
            [](const Sampler& self, const Logits& logits, std::size_t row, const std::optional<Words>& mask) {
                return self.chances(row_of(logits, row), static_cast<std::int64_t>(logits.columns),
                                    mask_of(mask));
            },
            "logits"_a, "row"_a = 0, "mask"_a.noconvert() = nb::none());
}

}  // namespace bedplate
