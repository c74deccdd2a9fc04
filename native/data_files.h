// The data files of a program, joined: key → constant.
#pragma once

#include <executorch/extension/flat_tensor/flat_tensor_data_map.h>
#include <executorch/extension/named_data_map/merged_data_map.h>
#include <executorch/runtime/core/data_loader.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "platform.h"

namespace bedplate {

// A file, mapped as a whole and read where it lies.
//
// ExecuTorch's own loader maps every constant by itself, which takes a fifth of an adapter's load. Pages of
// what a delegate has packed are given back at once: they do not add to what is resident.
class MappedFile final : public executorch::runtime::DataLoader {
  public:
    explicit MappedFile(const std::string& path);  // throws NativeError
    ~MappedFile() override;
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;

    void release() const;  // gives all pages back; they are read again when they are asked for
    executorch::runtime::Result<executorch::runtime::FreeableBuffer> load(std::size_t offset,
                                                                          std::size_t size,
                                                                          const SegmentInfo&) const override;
    executorch::runtime::Error load_into(std::size_t offset, std::size_t size, const SegmentInfo& segment,
                                         void* buffer) const override;
    executorch::runtime::Result<std::size_t> size() const override { return size_; }

  private:
    std::uint8_t* data_ = nullptr;
    std::size_t size_ = 0;
};

// The value of a Result, or NativeError("`doing`: …").
template <class T>
std::unique_ptr<T> taken(executorch::runtime::Result<T> result, const std::string& doing) {
    check(result.error(), doing);
    return std::make_unique<T>(std::move(*result));
}

class DataFiles final : public executorch::runtime::NamedDataMap {
    template <class T>
    using Result = executorch::runtime::Result<T>;

  public:
    // Throws NativeError if a file cannot be opened or is no data file, or two hold one key.
    explicit DataFiles(const std::vector<std::string>& paths);

    // The last key that was asked for and is in no file; ExecuTorch's own errors do not name it.
    const std::string& missing() const { return missing_; }
    void release() const;  // gives back the pages of all files

    Result<const executorch::runtime::TensorLayout> get_tensor_layout(std::string_view key) const override;
    Result<executorch::runtime::FreeableBuffer> get_data(std::string_view key) const override;
    executorch::runtime::Error load_data_into(std::string_view key, void* buffer,
                                              std::size_t size) const override;
    Result<std::uint32_t> get_num_keys() const override;
    Result<const char*> get_key(std::uint32_t index) const override;

  private:
    void note(executorch::runtime::Error error, std::string_view key) const;

    // In the order of their dependence: what comes later points into what comes before.
    std::vector<std::unique_ptr<MappedFile>> files_;
    std::vector<std::unique_ptr<executorch::extension::FlatTensorDataMap>> maps_;
    std::unique_ptr<executorch::extension::merged_data_map::MergedDataMap> merged_;
    mutable std::string missing_;
    mutable std::unordered_set<std::string> tensors_;  // keys that a program asked for the layout of
};

}  // namespace bedplate
