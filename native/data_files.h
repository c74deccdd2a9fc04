// The data files of a program, joined: key → constant.
#pragma once

#include <executorch/extension/data_loader/mmap_data_loader.h>
#include <executorch/extension/flat_tensor/flat_tensor_data_map.h>
#include <executorch/extension/named_data_map/merged_data_map.h>

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "platform.h"

namespace bedplate {

// Throws NativeError.
std::unique_ptr<executorch::extension::MmapDataLoader> map_file(const std::string& path);

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

    Result<const executorch::runtime::TensorLayout> get_tensor_layout(std::string_view key) const override;
    Result<executorch::runtime::FreeableBuffer> get_data(std::string_view key) const override;
    executorch::runtime::Error load_data_into(std::string_view key, void* buffer,
                                              std::size_t size) const override;
    Result<std::uint32_t> get_num_keys() const override;
    Result<const char*> get_key(std::uint32_t index) const override;

  private:
    void note(executorch::runtime::Error error, std::string_view key) const;

    // In the order of their dependence: what comes later points into what comes before.
    std::vector<std::unique_ptr<executorch::extension::MmapDataLoader>> loaders_;
    std::vector<std::unique_ptr<executorch::extension::FlatTensorDataMap>> maps_;
    std::unique_ptr<executorch::extension::merged_data_map::MergedDataMap> merged_;
    mutable std::string missing_;
};

}  // namespace bedplate
