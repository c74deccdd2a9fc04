#include "operators.h"

#include <executorch/runtime/core/exec_aten/util/dim_order_util.h>
#include <executorch/runtime/core/exec_aten/util/tensor_util.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>
#include <executorch/runtime/platform/log.h>

#include <cinttypes>
#include <cstring>

#include "attention.h"

namespace bedplate {
namespace {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::Kernel;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::Span;

constexpr char kUpdateCache[] = "llama::update_cache.out";
constexpr char kCustomSdpa[] = "llama::custom_sdpa.out";

// Fails the operator: logs what and returns from it.
#define REQUIRE(condition, error, message, ...)    \
    do {                                           \
        if (!(condition)) {                        \
            ET_LOG(Error, message, ##__VA_ARGS__); \
            return context.fail(Error::error);     \
        }                                          \
    } while (false)

bool is_float_4d(const EValue& value) {
    if (!value.isTensor()) return false;
    const Tensor& t = value.toTensor();
    return t.dim() == 4 && t.size(0) == 1 && t.scalar_type() == ScalarType::Float &&
           executorch::runtime::is_contiguous_dim_order(t.dim_order().data(), t.dim());
}

// (value [1, S, K, D], cache [1, C, K, D], start_pos, *, out): cache[:, start_pos : start_pos + S] = value.
// `out` is a dummy of the exporter's: the write itself is the result.
void update_cache(KernelRuntimeContext& context, Span<EValue*> args) {
    REQUIRE(args.size() >= 4, InvalidProgram, "update_cache takes 4 arguments, not %zu", args.size());
    REQUIRE(is_float_4d(*args[0]) && is_float_4d(*args[1]), InvalidArgument,
            "update_cache: value and cache must be contiguous float32 tensors [1, S, heads, head_dim]");
    REQUIRE(args[2]->isInt(), InvalidArgument, "update_cache: start_pos must be an integer");
    const Tensor &value = args[0]->toTensor(), &cache = args[1]->toTensor();
    const std::int64_t start = args[2]->toInt();
    REQUIRE(value.size(2) == cache.size(2) && value.size(3) == cache.size(3), InvalidArgument,
            "update_cache: value has %d heads of %d, cache %d of %d", int(value.size(2)), int(value.size(3)),
            int(cache.size(2)), int(cache.size(3)));
    REQUIRE(start >= 0 && start <= cache.size(1) - value.size(1), InvalidArgument,
            "update_cache: positions %" PRId64 " + %d exceed the context of %d", start, int(value.size(1)),
            int(cache.size(1)));
    const std::int64_t row = cache.size(2) * cache.size(3);
    REQUIRE(value.const_data_ptr() != nullptr && cache.const_data_ptr() != nullptr, InvalidState,
            "update_cache: a tensor has no memory");
    std::memcpy(cache.mutable_data_ptr<float>() + start * row, value.const_data_ptr<float>(), value.nbytes());
}

// (q [1, S, H, D], k and v [1, C, K, D], start_pos, mask, dropout, is_causal, scale, *, out [1, S, H, D]).
void custom_sdpa(KernelRuntimeContext& context, Span<EValue*> args) {
    REQUIRE(args.size() >= 9, InvalidProgram, "custom_sdpa takes 9 arguments, not %zu", args.size());
    REQUIRE(is_float_4d(*args[0]) && is_float_4d(*args[1]) && is_float_4d(*args[2]) && args[8]->isTensor(),
            InvalidArgument,
            "custom_sdpa: q, k and v must be contiguous float32 tensors [1, S, heads, head_dim]");
    REQUIRE(args[3]->isInt(), InvalidArgument, "custom_sdpa: start_pos must be an integer");
    REQUIRE(args[4]->isNone() && args[7]->isNone() && args[6]->isBool() && args[6]->toBool(), NotSupported,
            "custom_sdpa: only causal attention without a mask and with the usual scale is done");
    const Tensor &q = args[0]->toTensor(), &k = args[1]->toTensor(), &v = args[2]->toTensor();
    Tensor& out = args[8]->toTensor();
    const AttentionShape shape{q.size(1), q.size(2), k.size(2), q.size(3), args[3]->toInt()};
    REQUIRE(k.sizes() == v.sizes() && k.size(3) == shape.head_dim, InvalidArgument,
            "custom_sdpa: k and v must have one shape, and the head_dim %" PRId64 " of q", shape.head_dim);
    REQUIRE(shape.kv_heads > 0 && shape.heads > 0 && shape.heads % shape.kv_heads == 0, InvalidArgument,
            "custom_sdpa: %" PRId64 " query heads cannot share %" PRId64 " kv heads", shape.heads,
            shape.kv_heads);
    REQUIRE(shape.head_dim > 0 && shape.positions > 0 && shape.start_pos >= 0 &&
                shape.start_pos <= k.size(1) - shape.positions,
            InvalidArgument, "custom_sdpa: positions %" PRId64 " + %" PRId64 " exceed the context of %d",
            shape.start_pos, shape.positions, int(k.size(1)));
    REQUIRE(out.scalar_type() == ScalarType::Float, InvalidArgument, "custom_sdpa: out must be float32");
    const Error resized = executorch::runtime::resize_tensor(out, q.sizes());
    REQUIRE(resized == Error::Ok, InvalidArgument, "custom_sdpa: out cannot take the shape of q");
    attention(shape, q.const_data_ptr<float>(), k.const_data_ptr<float>(), v.const_data_ptr<float>(),
              out.mutable_data_ptr<float>());
}

}  // namespace

std::vector<Kernel> kernel_table() {
    std::vector<Kernel> table{Kernel(kUpdateCache, update_cache), Kernel(kCustomSdpa, custom_sdpa)};
    for (const Kernel& kernel : executorch::runtime::get_registered_kernels())
        if (std::strcmp(kernel.name_, kUpdateCache) != 0 && std::strcmp(kernel.name_, kCustomSdpa) != 0)
            table.push_back(kernel);
    return table;
}

Error call_custom_sdpa(const float* q, const std::int32_t (&q_shape)[4], const float* k,
                       const std::int32_t (&k_shape)[4], const float* v, const std::int32_t (&v_shape)[4],
                       std::int64_t start_pos, float* out) {
    using executorch::aten::TensorImpl;
    std::uint8_t order[4] = {0, 1, 2, 3};
    std::int32_t shapes[4][4], strides[4][4];
    const std::int32_t* given[4] = {q_shape, k_shape, v_shape, q_shape};
    for (int i = 0; i < 4; ++i) {
        std::memcpy(shapes[i], given[i], sizeof shapes[i]);
        strides[i][3] = 1;
        for (int d = 2; d >= 0; --d) strides[i][d] = strides[i][d + 1] * shapes[i][d + 1];
    }
    const auto impl = [&](int i, const float* data) {
        return TensorImpl(ScalarType::Float, 4, shapes[i], const_cast<float*>(data), order, strides[i]);
    };
    TensorImpl q_impl = impl(0, q), k_impl = impl(1, k), v_impl = impl(2, v), out_impl = impl(3, out);
    EValue values[] = {Tensor(&q_impl), Tensor(&k_impl), Tensor(&v_impl), EValue(start_pos), EValue(),
                       EValue(0.0),     EValue(true),    EValue(),        Tensor(&out_impl)};
    EValue* args[9];
    for (int i = 0; i < 9; ++i) args[i] = &values[i];
    KernelRuntimeContext context;
    custom_sdpa(context, Span<EValue*>(args, 9));
    return context.failure_state();
}

}  // namespace bedplate
