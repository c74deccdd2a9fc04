#include "method.h"

#include <executorch/runtime/backend/backend_options_map.h>
#include <executorch/runtime/backend/options.h>
#include <executorch/runtime/core/exec_aten/util/tensor_util.h>

#include <algorithm>
#include <cstring>
#include <string_view>

#include "workers.h"

namespace bedplate {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::aten::TensorImpl;
using executorch::runtime::BackendOptions;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::LoadBackendOptionsMap;
using executorch::runtime::MethodMeta;

namespace {

constexpr std::size_t kCacheAlign = 64;
constexpr int kGlobalWorkspace = 2;  // XNNPACK's scratch: one for every delegate of the process

bool ends_with(std::string_view text, std::string_view end) {
    return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

}  // namespace

Method::Method(const executorch::runtime::Program& program, const std::string& name, const DataFiles* data,
               std::shared_ptr<Activations> activations,
               const std::vector<executorch::runtime::Kernel>& kernels, const PackedWeights& packed_weights)
    : name_(name), activations_(std::move(activations)) {
    const std::string doing = "cannot load method " + name;
    const auto meta = program.method_meta(name.c_str());
    check(meta.error(), doing);
    plan_memory(*meta);
    BackendOptions<3> options;
    check(options.set_option("weight_cache_enabled", packed_weights.shared), doing);
    if (!packed_weights.file.empty()) {
        if (packed_weights.file.size() >= executorch::runtime::kMaxOptionValueLength)
            throw NativeError("InvalidArgument",
                              doing + ": ExecuTorch takes no path as long as " + packed_weights.file);
        check(options.set_option("packed_cache_path", packed_weights.file.c_str()), doing);
    }
    check(options.set_option("workspace_sharing_mode", kGlobalWorkspace), doing);
    LoadBackendOptionsMap backends;
    check(backends.set_options("XnnpackBackend", options.view()), doing);
    auto method = program.load_method(name.c_str(), &*manager_, nullptr, data, &backends,
                                      {kernels.data(), kernels.size()});
    check(method.error(), data == nullptr || data->missing().empty()
                              ? doing
                              : doing + " (no data file holds the constant " + data->missing() + ")");
    method_.emplace(std::move(*method));
    find_caches(*meta);
    place_output(*meta);
}

void Method::plan_memory(const MethodMeta& meta) {
    for (std::size_t i = 0; i < meta.num_memory_planned_buffers(); ++i) {
        const std::size_t bytes = static_cast<std::size_t>(*meta.memory_planned_buffer_size(i));
        if (i == 0) {
            activations_->memory.grow(bytes);
            spans_.emplace_back(activations_->memory.data(), bytes);
        } else {
            own_memory_.push_back(std::make_unique<Mapping>(bytes));
            own_memory_.back()->grow(bytes);
            spans_.emplace_back(own_memory_.back()->data(), bytes);
        }
    }
    planned_.emplace(
        executorch::runtime::Span<executorch::runtime::Span<std::uint8_t>>(spans_.data(), spans_.size()));
    manager_.emplace(&method_allocator_, &*planned_, &temp_allocator_);
}

// Named tensors are the caches and the constants of data files, so the name decides; sorted by it, so that
// every method and program of one shape lays a conversation's memory out alike.
void Method::find_caches(const MethodMeta& meta) {
    std::vector<std::string> names;
    for (std::size_t i = 0; i < meta.num_attributes(); ++i) {
        const auto info = meta.attribute_tensor_meta(i);
        check(info.error(), "cannot read the named tensors of method " + name_);
        if (ends_with(info->name(), ".k_cache") || ends_with(info->name(), ".v_cache"))
            names.emplace_back(info->name());
    }
    std::sort(names.begin(), names.end());
    for (const std::string& cache : names) {
        auto tensor = method_->get_attribute(cache.c_str());
        check(tensor.error(), "cannot find " + cache + " in method " + name_);
        caches_.push_back({*tensor, kv_bytes_});
        kv_bytes_ += (tensor->nbytes() + kCacheAlign - 1) / kCacheAlign * kCacheAlign;
    }
}

void Method::place_output(const MethodMeta& meta) {
    if (meta.num_inputs() == 0) return;
    const auto info = meta.output_tensor_meta(0);
    check(info.error(), "cannot read the output of method " + name_);
    if (info->is_memory_planned()) return;
    output_ = std::make_unique<Mapping>(info->nbytes());
    output_->grow(info->nbytes());
    check(method_->set_output_data_ptr(output_->data(), output_->size(), 0),
          "cannot place the output of " + name_);
}

void Method::point_at(KvCache& kv) {
    if (kv.memory.size() < kv_bytes_)
        throw NativeError("InvalidArgument", "the KV cache has " + std::to_string(kv.memory.size()) +
                                                 " bytes, method " + name_ + " takes " +
                                                 std::to_string(kv_bytes_));
    for (const Cache& cache : caches_)
        check(executorch::runtime::internal::set_tensor_data(cache.tensor, kv.memory.data() + cache.offset,
                                                             cache.tensor.nbytes()),
              "cannot place the KV cache of method " + name_);
}

Logits Method::step(const std::int64_t* tokens, std::size_t count, std::int64_t pos, KvCache& kv) {
    const std::string doing = "cannot run method " + name_ + " on " + std::to_string(count) +
                              " tokens at position " + std::to_string(pos);
    point_at(kv);
    std::int32_t token_shape[] = {1, static_cast<std::int32_t>(count)}, pos_shape[] = {1};
    std::uint8_t order[] = {0, 1};
    std::int32_t token_strides[] = {token_shape[1], 1}, pos_strides[] = {1};
    TensorImpl token_impl(ScalarType::Long, 2, token_shape, const_cast<std::int64_t*>(tokens), order,
                          token_strides);
    TensorImpl pos_impl(ScalarType::Long, 1, pos_shape, &pos, order, pos_strides);
    check(method_->set_input(EValue(Tensor(&token_impl)), 0), doing);
    check(method_->set_input(EValue(Tensor(&pos_impl)), 1), doing);
    const Awake awake;
    check(method_->execute(), doing);
    return copy_output();
}

Logits Method::copy_output() {
    const EValue& value = method_->get_output(0);
    if (!value.isTensor() || value.toTensor().scalar_type() != ScalarType::Float ||
        value.toTensor().dim() < 2)
        throw NativeError("InvalidProgram", "method " + name_ + " returns no float32 tensor of logits");
    const Tensor& tensor = value.toTensor();
    const auto columns = static_cast<std::size_t>(tensor.size(tensor.dim() - 1));
    Logits logits{std::unique_ptr<float[]>(new float[tensor.numel()]), tensor.numel() / columns, columns};
    std::memcpy(logits.data.get(), tensor.const_data_ptr<float>(), tensor.nbytes());
    return logits;
}

std::vector<Constant> Method::constants() {
    check(method_->execute(), "cannot run method " + name_);
    std::vector<Constant> found;
    for (std::size_t i = 0; i < method_->outputs_size(); ++i) {
        const EValue& value = method_->get_output(i);
        if (value.isInt()) found.emplace_back(value.toInt());
        if (value.isBool()) found.emplace_back(value.toBool());
        if (value.isDouble()) found.emplace_back(value.toDouble());
    }
    return found;
}

}  // namespace bedplate
