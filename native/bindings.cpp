// The module bedplate._native: conversions, ownership and the GIL; nothing is computed here.
//
// The GIL is given up before a Turn is taken, and nothing that has its turn asks for the GIL.
#include <executorch/runtime/platform/runtime.h>
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "attention.h"
#include "operators.h"
#include "program.h"
#include "workers.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace bedplate;

namespace {

using Heads = nb::ndarray<const float, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<nb::numpy, float, nb::ndim<2>>;
using Output = nb::ndarray<nb::numpy, float, nb::ndim<4>>;

// Runs `work` without the GIL, as the only one in the process that computes.
template <class Work>
auto alone(const Work& work) {
    nb::gil_scoped_release released;
    const Turn turn;
    return work();
}

// Hands a buffer to numpy, which frees it.
nb::capsule owner_of(std::unique_ptr<float[]> data) {
    return nb::capsule(data.release(), [](void* p) noexcept { delete[] static_cast<float*>(p); });
}

struct LoadedProgram {  // frees its program as the only one that computes
    std::unique_ptr<Program> program;
    ~LoadedProgram() {
        alone([&] {
            program.reset();
            trim_heap();
        });
    }
};

Logits step(LoadedProgram& self, const std::string& method, const std::vector<std::int64_t>& tokens,
            std::int64_t pos, KvCache& kv) {
    return alone([&] { return self.program->step(method, tokens.data(), tokens.size(), pos, kv); });
}

Output attend(const Heads& q, const Heads& k, const Heads& v, std::int64_t start_pos) {
    std::int32_t shapes[3][4];
    const Heads* arrays[] = {&q, &k, &v};
    for (int i = 0; i < 3; ++i)
        for (int d = 0; d < 4; ++d) shapes[i][d] = static_cast<std::int32_t>(arrays[i]->shape(d));
    std::unique_ptr<float[]> out(new float[q.size()]);
    alone([&] {
        check(call_custom_sdpa(q.data(), shapes[0], k.data(), shapes[1], v.data(), shapes[2], start_pos,
                               out.get()),
              "cannot compute attention");
    });
    float* data = out.get();
    return Output(data, {q.shape(0), q.shape(1), q.shape(2), q.shape(3)}, owner_of(std::move(out)));
}

void bind_memory(nb::module_& m) {
    nb::class_<Activations>(m, "Activations")
        .def(nb::init<>())
        .def_prop_ro("nbytes", [](const Activations& self) { return self.memory.size(); })
        .def_prop_ro("resident", [](const Activations& self) { return self.memory.resident(); });
    nb::class_<KvCache>(m, "KvCache")
        .def(nb::init<std::size_t>(), "nbytes"_a)
        .def("release", [](KvCache& self) { alone([&] { self.memory.release(); }); })
        .def_prop_ro("nbytes", [](const KvCache& self) { return self.memory.size(); })
        .def_prop_ro("resident", [](const KvCache& self) { return self.memory.resident(); });
}

// numpy is imported when an array is asked for, not before.
void bind_logits(nb::module_& m) {
    nb::class_<Logits>(m, "Logits")
        .def(
            "__init__",
            [](Logits* self, const Rows& values) {
                std::unique_ptr<float[]> data(new float[values.size()]);
                std::copy_n(values.data(), values.size(), data.get());
                new (self) Logits{std::move(data), values.shape(0), values.shape(1)};
            },
            "values"_a)
        .def("likeliest", &Logits::likeliest)
        .def_prop_ro("array", [](nb::handle_t<Logits> self) {
            const auto& logits = nb::cast<const Logits&>(self);
            return Matrix(logits.data.get(), {logits.rows, logits.columns}, self);
        });
}

void bind_program(nb::module_& m) {
    nb::class_<LoadedProgram>(m, "Program")
        .def(
            "__init__",
            [](LoadedProgram* self, const std::string& path, const std::vector<std::string>& data_files,
               std::shared_ptr<Activations> activations, bool weight_cache, std::string packed_cache) {
                auto program = alone([&] {
                    return std::make_unique<Program>(path, data_files, std::move(activations),
                                                     PackedWeights{weight_cache, std::move(packed_cache)});
                });
                new (self) LoadedProgram{std::move(program)};
            },
            "path"_a, "data_files"_a, "activations"_a, "weight_cache"_a, "packed_cache"_a = "")
        .def("method_names", [](LoadedProgram& self) { return self.program->method_names(); })
        .def("constants",
             [](LoadedProgram& self) { return alone([&] { return self.program->constants(); }); })
        .def(
            "load",
            [](LoadedProgram& self, const std::string& method) {
                alone([&] { self.program->load(method); });
            },
            "method"_a)
        .def(
            "kv_bytes",
            [](LoadedProgram& self, const std::string& method) {
                return alone([&] { return self.program->kv_bytes(method); });
            },
            "method"_a)
        .def("step", &step, "method"_a, "tokens"_a, "pos"_a, "kv"_a);
}

}  // namespace

NB_MODULE(_native, m) {
    executorch::runtime::runtime_init();
    static nb::object native_error =
        nb::borrow(PyErr_NewException("bedplate._native.NativeError", nullptr, nullptr));
    m.attr("NativeError") = native_error;
    nb::register_exception_translator([](const std::exception_ptr& thrown, void*) {
        try {
            std::rethrow_exception(thrown);
        } catch (const NativeError& error) {  // args: (name of the error code, text)
            PyErr_SetObject(native_error.ptr(), nb::make_tuple(error.code(), error.what()).ptr());
        }
    });
    bind_memory(m);
    bind_logits(m);
    bind_program(m);
    m.attr("EXECUTORCH_VERSION") = BEDPLATE_EXECUTORCH_VERSION;
    m.def("attention", &attend, "q"_a, "k"_a, "v"_a, "start_pos"_a);
    m.def("instruction_sets", &instruction_sets);
    m.def("instruction_set", &instruction_set);
    m.def("use_instruction_set", &use_instruction_set, "name"_a);
    m.def("threads", [] { return alone([] { return threads(); }); });
    m.def("set_threads", [](std::uint32_t count) { alone([&] { set_threads(count); }); }, "count"_a);
}
