#include "program.h"

#include "method.h"
#include "operators.h"

namespace bedplate {

Program::Program(const std::string& path, const std::vector<std::string>& data_files,
                 std::shared_ptr<Activations> activations, PackedWeights packed_weights)
    : path_(path),
      packed_weights_(std::move(packed_weights)),
      activations_(std::move(activations)),
      kernels_(kernel_table()) {
    if (!data_files.empty()) data_ = std::make_unique<DataFiles>(data_files);
    file_ = std::make_unique<MappedFile>(path);
    using executorch::runtime::Program;
    program_ =
        taken(Program::load(file_.get(), Program::Verification::InternalConsistency), "cannot read " + path);
}

Program::~Program() = default;

std::vector<std::string> Program::method_names() const {
    std::vector<std::string> names;
    for (std::size_t i = 0; i < program_->num_methods(); ++i)
        names.emplace_back(*program_->get_method_name(i));
    return names;
}

std::unique_ptr<Method> Program::open(const std::string& method) const {
    return std::make_unique<Method>(*program_, method, data_.get(), activations_, kernels_, packed_weights_);
}

std::map<std::string, std::vector<Constant>> Program::constants() const {
    std::map<std::string, std::vector<Constant>> found;
    for (const std::string& name : method_names()) {
        const auto meta = program_->method_meta(name.c_str());
        check(meta.error(), "cannot read method " + name + " of " + path_);
        if (meta->num_inputs() == 0) found[name] = open(name)->constants();
    }
    return found;
}

Method& Program::loaded(const std::string& method) {
    auto& slot = methods_[method];
    if (slot == nullptr) {
        slot = open(method);
        file_->release();
        if (data_ != nullptr) data_->release();
        trim_heap();
    }
    return *slot;
}

void Program::load(const std::string& method) { loaded(method); }

std::size_t Program::kv_bytes(const std::string& method) { return loaded(method).kv_bytes(); }

Logits Program::step(const std::string& method, const std::int64_t* tokens, std::size_t count,
                     std::int64_t pos, KvCache& kv) {
    Logits logits = loaded(method).step(tokens, count, pos, kv);
    // Around each row of the embedding the system maps up to megabytes.
    if (data_ != nullptr) data_->release();
    return logits;
}

}  // namespace bedplate
