// The module bedplate._oracle: a program as ExecuTorch itself loads and runs it, through
// `executorch::extension::Module`.
//
// Nothing of bedplate computes here, which is what makes it a witness.
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/backend/backend_options_map.h>
#include <executorch/runtime/backend/options.h>
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace nb = nanobind;
using namespace nb::literals;
using executorch::aten::ScalarType;
using executorch::extension::from_blob;
using executorch::extension::Module;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using ModelProgram = executorch::runtime::Program;

namespace {

constexpr int kOneWorkspace = 2;  // XNNPACK's scratch memory: one for all delegates of the process

using Logits = nb::ndarray<nb::numpy, float, nb::ndim<2>>;

// A failure of ExecuTorch. Its log says more, on stderr.
class OracleError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

void check(Error error, const std::string& doing) {
    if (error != Error::Ok) throw OracleError(doing + ": " + executorch::runtime::to_string(error));
}

// Runs `work` without the GIL, as the only one: XNNPACK's caches and ExecuTorch's threads belong to the
// process.
template <class Work>
auto alone(const Work& work) {
    static std::mutex turns;
    const nb::gil_scoped_release released;
    const std::lock_guard<std::mutex> turn(turns);
    return work();
}

// A tensor that a method takes.
struct Input {
    void* data;
    std::vector<executorch::aten::SizesType> sizes;
    ScalarType type;
};

class Program {
  public:
    // Reads the program and the indices of its data files. They are mapped, so that several programs have one
    // copy of what they do not pack. Methods share their memory, so they share keys and values too.
    Program(const std::string& path, const std::vector<std::string>& data_files, bool weight_cache)
        : path_(path), module_(path, data_files, Module::LoadMode::Mmap, nullptr, nullptr, nullptr, true) {
        executorch::runtime::BackendOptions<2> options;
        check(options.set_option("weight_cache_enabled", weight_cache), path);
        check(options.set_option("workspace_sharing_mode", kOneWorkspace), path);
        executorch::runtime::LoadBackendOptionsMap backends;
        check(backends.set_options("XnnpackBackend", options.view()), path);
        check(module_.load(backends, ModelProgram::Verification::InternalConsistency), "cannot read " + path);
    }

    // Keys of the constants that lie inside of the program.
    std::vector<std::string> keys() {
        const auto map = module_.program()->get_named_data_map();
        if (map.error() == Error::NotFound) return {};
        check(map.error(), "cannot read the constants of " + path_);
        const auto count = (*map)->get_num_keys();
        check(count.error(), "cannot read the constants of " + path_);
        std::vector<std::string> found;
        for (std::uint32_t i = 0; i < *count; ++i) found.emplace_back(*(*map)->get_key(i));
        return found;
    }

    std::vector<std::string> method_names() {
        const auto names = module_.method_names();
        check(names.error(), "cannot read " + path_);
        return {names->begin(), names->end()};
    }

    // What a method without inputs returns.
    std::int64_t constant(const std::string& method) {
        const auto values = constants(method);
        if (values.size() != 1) throw OracleError("method " + method + " of " + path_ + " returns no number");
        return values.front();
    }

    // What a method without inputs returns: whole numbers, and 0 or 1 for a truth.
    std::vector<std::int64_t> constants(const std::string& method) {
        const auto values = module_.execute(method);
        check(values.error(), "cannot run method " + method + " of " + path_);
        std::vector<std::int64_t> found;
        for (const auto& value : *values) {
            if (!value.isInt() && !value.isBool())
                throw OracleError("method " + method + " of " + path_ + " returns no numbers");
            found.push_back(value.isInt() ? value.toInt() : value.toBool());
        }
        return found;
    }

    // Finds each constant in the data files and packs weights.
    void load(const std::string& method) {
        check(module_.load_method(method), "cannot load method " + method + " of " + path_);
    }

    // Width of the logits that a method returns.
    std::int64_t columns(const std::string& method) {
        const std::string doing = "cannot read method " + method + " of " + path_;
        const auto meta = module_.method_meta(method);
        check(meta.error(), doing);
        const auto output = meta->output_tensor_meta(0);
        check(output.error(), doing);
        if (output->scalar_type() != ScalarType::Float || output->sizes().size() < 2)
            throw OracleError("method " + method + " of " + path_ + " returns no logits");
        return output->sizes()[output->sizes().size() - 1];
    }

    struct Rows {
        std::unique_ptr<float[]> data;
        std::size_t rows, columns;
    };

    // Runs tokens at positions `position` and those that follow.
    Rows run(const std::string& method, std::vector<std::int64_t> tokens, std::int64_t position) {
        const std::string doing = "cannot run method " + method + " of " + path_ + " on " +
                                  std::to_string(tokens.size()) + " tokens at position " +
                                  std::to_string(position);
        const auto count = static_cast<executorch::aten::SizesType>(tokens.size());
        const auto tokens_tensor = from_blob(tokens.data(), {1, count}, ScalarType::Long);
        const auto position_tensor = from_blob(&position, {1}, ScalarType::Long);
        const auto outputs = module_.execute(method, {EValue(*tokens_tensor), EValue(*position_tensor)});
        check(outputs.error(), doing);
        if (outputs->empty() || !outputs->front().isTensor())
            throw OracleError(doing + ": it returns no tensor");
        const auto& tensor = outputs->front().toTensor();
        if (tensor.scalar_type() != ScalarType::Float || tensor.dim() < 2 || tensor.numel() == 0)
            throw OracleError(doing + ": it returns no logits");
        const auto columns = static_cast<std::size_t>(tensor.size(tensor.dim() - 1));
        const auto size = static_cast<std::size_t>(tensor.numel());
        Rows logits{std::unique_ptr<float[]>(new float[size]), size / columns, columns};
        std::copy_n(tensor.const_data_ptr<float>(), size, logits.data.get());
        return logits;
    }

    std::vector<std::vector<std::int64_t>> input_shapes(const std::string& method) {
        const std::string doing = "cannot read method " + method + " of " + path_;
        const auto meta = module_.method_meta(method);
        check(meta.error(), doing);
        std::vector<std::vector<std::int64_t>> shapes;
        for (std::size_t i = 0; i < meta->num_inputs(); ++i) {
            const auto input = meta->input_tensor_meta(i);
            check(input.error(), doing);
            shapes.emplace_back(input->sizes().begin(), input->sizes().end());
        }
        return shapes;
    }

    struct Array {
        std::unique_ptr<float[]> data;
        std::vector<std::size_t> shape;
    };

    // Runs a method on tensors of fixed shapes.
    std::vector<Array> call(const std::string& method, const std::vector<Input>& inputs) {
        const std::string doing = "cannot run method " + method + " of " + path_;
        check_shapes(method, inputs);
        std::vector<executorch::extension::TensorPtr> tensors;
        std::vector<EValue> values;
        for (const auto& input : inputs) {
            tensors.push_back(from_blob(input.data, input.sizes, input.type));
            values.emplace_back(*tensors.back());
        }
        const auto outputs = module_.execute(method, values);
        check(outputs.error(), doing);
        std::vector<Array> found;
        for (const auto& output : *outputs) {
            if (!output.isTensor() || output.toTensor().scalar_type() != ScalarType::Float)
                throw OracleError(doing + ": it returns something else than floats");
            const auto& tensor = output.toTensor();
            const auto size = static_cast<std::size_t>(tensor.numel());
            found.push_back(
                {std::unique_ptr<float[]>(new float[size]), {tensor.sizes().begin(), tensor.sizes().end()}});
            std::copy_n(tensor.const_data_ptr<float>(), size, found.back().data.get());
        }
        return found;
    }

  private:
    // ExecuTorch itself lets shorter tensors pass where a delegate reads longer ones.
    void check_shapes(const std::string& method, const std::vector<Input>& inputs) {
        const auto meta = module_.method_meta(method);
        check(meta.error(), "cannot read method " + method + " of " + path_);
        if (meta->num_inputs() != inputs.size())
            throw OracleError("method " + method + " of " + path_ + " takes " +
                              std::to_string(meta->num_inputs()) + " tensors, not " +
                              std::to_string(inputs.size()));
        for (std::size_t i = 0; i < inputs.size(); ++i) {
            const auto wanted = meta->input_tensor_meta(i);
            check(wanted.error(), "cannot read method " + method + " of " + path_);
            const auto sizes = wanted->sizes();
            if (wanted->scalar_type() != inputs[i].type ||
                !std::equal(sizes.begin(), sizes.end(), inputs[i].sizes.begin(), inputs[i].sizes.end()))
                throw OracleError("method " + method + " of " + path_ + ": its input " + std::to_string(i) +
                                  " has another type or shape");
        }
    }

    std::string path_;
    Module module_;
};

// Loads and frees its program as the only one that computes.
struct Loaded {
    std::unique_ptr<Program> program;
    Loaded(const std::string& path, const std::vector<std::string>& data_files, bool weight_cache) {
        program = alone([&] { return std::make_unique<Program>(path, data_files, weight_cache); });
    }
    ~Loaded() {
        alone([&] { program.reset(); });
    }
};

Logits run(Loaded& self, const std::string& method, const std::vector<std::int64_t>& tokens,
           std::int64_t position) {
    auto logits = alone([&] { return self.program->run(method, tokens, position); });
    float* data = logits.data.release();
    const nb::capsule owner(data, [](void* memory) noexcept { delete[] static_cast<float*>(memory); });
    return Logits(data, {logits.rows, logits.columns}, owner);
}

using Tensor = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

Input input_of(const Tensor& array) {
    const bool whole = array.dtype() == nb::dtype<std::int64_t>();
    if (!whole && array.dtype() != nb::dtype<float>())
        throw OracleError("a program takes arrays of int64 or float32");
    Input input{const_cast<void*>(array.data()), {}, whole ? ScalarType::Long : ScalarType::Float};
    for (std::size_t i = 0; i < array.ndim(); ++i)
        input.sizes.push_back(static_cast<executorch::aten::SizesType>(array.shape(i)));
    return input;
}

nb::list call(Loaded& self, const std::string& method, const std::vector<Tensor>& arrays) {
    std::vector<Input> inputs;
    for (const auto& array : arrays) inputs.push_back(input_of(array));
    auto outputs = alone([&] { return self.program->call(method, inputs); });
    nb::list found;
    for (auto& output : outputs) {
        float* data = output.data.release();
        const nb::capsule owner(data, [](void* memory) noexcept { delete[] static_cast<float*>(memory); });
        found.append(
            nb::cast(nb::ndarray<nb::numpy, float>(data, output.shape.size(), output.shape.data(), owner)));
    }
    return found;
}

// A method of Program, called as the only one that computes.
template <class Result, class... Args>
auto in_turn(Result (Program::*method)(Args...)) {
    return [method](Loaded& self, Args... args) {
        return alone([&] { return (self.program.get()->*method)(args...); });
    };
}

}  // namespace

NB_MODULE(_oracle, m) {
    nb::exception<OracleError>(m, "OracleError", PyExc_RuntimeError);
    nb::class_<Loaded>(m, "Program")
        .def(nb::init<const std::string&, const std::vector<std::string>&, bool>(), "path"_a, "data_files"_a,
             "weight_cache"_a)
        .def("keys", in_turn(&Program::keys))
        .def("method_names", in_turn(&Program::method_names))
        .def("constant", in_turn(&Program::constant), "method"_a)
        .def("constants", in_turn(&Program::constants), "method"_a)
        .def("input_shapes", in_turn(&Program::input_shapes), "method"_a)
        .def("load", in_turn(&Program::load), "method"_a)
        .def("columns", in_turn(&Program::columns), "method"_a)
        .def("run", &run, "method"_a, "tokens"_a, "position"_a)
        .def("call", &call, "method"_a, "inputs"_a);
}
