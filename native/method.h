// A method of a loaded program, with the memory it runs in.
#pragma once

#include <executorch/extension/memory_allocator/malloc_memory_allocator.h>
#include <executorch/runtime/executor/program.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "data_files.h"
#include "platform.h"
#include "program.h"

namespace bedplate {

class Method {
  public:
    // `kernels` must outlive the method. Throws NativeError.
    Method(const executorch::runtime::Program& program, const std::string& name, const DataFiles* data,
           std::shared_ptr<Activations> activations, const std::vector<executorch::runtime::Kernel>& kernels,
           const PackedWeights& packed_weights);

    std::size_t kv_bytes() const { return kv_bytes_; }
    Logits step(const std::int64_t* tokens, std::size_t count, std::int64_t pos, KvCache& kv);
    std::vector<Constant> constants();

  private:
    void plan_memory(const executorch::runtime::MethodMeta& meta);
    void find_caches(const executorch::runtime::MethodMeta& meta);
    void place_output(const executorch::runtime::MethodMeta& meta);
    void point_at(KvCache& kv);
    Logits copy_output();

    struct Cache {
        executorch::aten::Tensor tensor;
        std::size_t offset;  // in the conversation's memory
    };

    std::string name_;
    std::shared_ptr<Activations> activations_;
    std::vector<std::unique_ptr<Mapping>>
        own_memory_;                   // planned buffers beyond the first; never touched for KV
    std::unique_ptr<Mapping> output_;  // of programs that leave the output to the caller
    std::vector<executorch::runtime::Span<std::uint8_t>> spans_;
    std::optional<executorch::runtime::HierarchicalAllocator> planned_;
    executorch::extension::MallocMemoryAllocator method_allocator_, temp_allocator_;
    std::optional<executorch::runtime::MemoryManager> manager_;
    std::optional<executorch::runtime::Method> method_;
    std::vector<Cache> caches_;
    std::size_t kv_bytes_ = 0;
};

}  // namespace bedplate
