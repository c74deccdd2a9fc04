#include "data_files.h"

namespace bedplate {

using executorch::extension::FlatTensorDataMap;
using executorch::extension::MmapDataLoader;
using executorch::extension::merged_data_map::MergedDataMap;
using executorch::runtime::Error;
using executorch::runtime::FreeableBuffer;
using executorch::runtime::NamedDataMap;
using executorch::runtime::Result;
using executorch::runtime::TensorLayout;

std::unique_ptr<MmapDataLoader> map_file(const std::string& path) {
    return taken(MmapDataLoader::from(path.c_str(), MmapDataLoader::MlockConfig::NoMlock),
                 "cannot open " + path);
}

DataFiles::DataFiles(const std::vector<std::string>& paths) {
    std::vector<const NamedDataMap*> maps;
    for (const std::string& path : paths) {
        loaders_.push_back(map_file(path));
        maps_.push_back(taken(FlatTensorDataMap::load(loaders_.back().get()), "cannot read " + path));
        maps.push_back(maps_.back().get());
    }
    merged_ = taken(MergedDataMap::load({maps.data(), maps.size()}), "cannot join the data files");
}

void DataFiles::note(Error error, std::string_view key) const {
    if (error == Error::NotFound) missing_ = key;
}

Result<const TensorLayout> DataFiles::get_tensor_layout(std::string_view key) const {
    const auto layout = merged_->get_tensor_layout(key);
    note(layout.error(), key);
    if (!layout.ok()) return layout.error();
    return *layout;
}

Result<FreeableBuffer> DataFiles::get_data(std::string_view key) const {
    auto data = merged_->get_data(key);
    note(data.error(), key);
    return data;
}

Error DataFiles::load_data_into(std::string_view key, void* buffer, std::size_t size) const {
    const Error error = merged_->load_data_into(key, buffer, size);
    note(error, key);
    return error;
}

Result<std::uint32_t> DataFiles::get_num_keys() const { return merged_->get_num_keys(); }

Result<const char*> DataFiles::get_key(std::uint32_t index) const { return merged_->get_key(index); }

}  // namespace bedplate
