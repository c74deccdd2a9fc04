#include "data_files.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <new>

namespace bedplate {

using executorch::extension::FlatTensorDataMap;
using executorch::extension::merged_data_map::MergedDataMap;
using executorch::runtime::Error;
using executorch::runtime::FreeableBuffer;
using executorch::runtime::NamedDataMap;
using executorch::runtime::Result;
using executorch::runtime::TensorLayout;

namespace {

// Less is not worth a call of the system, which maps as much around whatever is read.
constexpr std::size_t kLarge = std::size_t{64} << 10;
constexpr std::align_val_t kAlignment{64};
constexpr std::size_t kPastTheEnd = 128;  // XNNPACK may read as much

// Pages that lie wholly within; the others may hold something that is still needed.
void give_back(void*, void* data, std::size_t size) {
    const std::uintptr_t page = page_size();
    const auto begin = (reinterpret_cast<std::uintptr_t>(data) + page - 1) / page * page;
    const auto end = (reinterpret_cast<std::uintptr_t>(data) + size) / page * page;
    if (size >= kLarge) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

FreeableBuffer copied(const FreeableBuffer& data) {
    void* copy = ::operator new(data.size() + kPastTheEnd, kAlignment);
    std::memcpy(copy, data.data(), data.size());
    return FreeableBuffer(copy, data.size(),
                          [](void*, void* memory, std::size_t) { ::operator delete(memory, kAlignment); });
}

[[noreturn]] void fail(const std::string& path) {
    throw NativeError("AccessFailed", "cannot open " + path + ": " + std::strerror(errno));
}

}  // namespace

MappedFile::MappedFile(const std::string& path) {
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    struct stat status{};
    if (file < 0) fail(path);
    if (fstat(file, &status) == 0) size_ = static_cast<std::size_t>(status.st_size);
    void* at = size_ == 0 ? nullptr : mmap(nullptr, size_, PROT_READ, MAP_SHARED, file, 0);
    const int error = errno;
    close(file);
    errno = error;
    if (at == MAP_FAILED) fail(path);
    data_ = static_cast<std::uint8_t*>(at);
}

MappedFile::~MappedFile() { munmap(data_, size_); }

void MappedFile::release() const { madvise(data_, size_, MADV_DONTNEED); }

Result<FreeableBuffer> MappedFile::load(std::size_t offset, std::size_t size, const SegmentInfo&) const {
    if (offset > size_ || size > size_ - offset) return Error::InvalidArgument;
    return FreeableBuffer(data_ + offset, size, give_back);
}

Error MappedFile::load_into(std::size_t offset, std::size_t size, const SegmentInfo&, void* buffer) const {
    if (offset > size_ || size > size_ - offset) return Error::InvalidArgument;
    std::memcpy(buffer, data_ + offset, size);
    return Error::Ok;
}

DataFiles::DataFiles(const std::vector<std::string>& paths) {
    std::vector<const NamedDataMap*> maps;
    for (const std::string& path : paths) {
        files_.push_back(std::make_unique<MappedFile>(path));
        maps_.push_back(taken(FlatTensorDataMap::load(files_.back().get()), "cannot read " + path));
        maps.push_back(maps_.back().get());
    }
    merged_ = taken(MergedDataMap::load({maps.data(), maps.size()}), "cannot join the data files");
}

void DataFiles::release() const {
    for (const auto& file : files_) file->release();
}

void DataFiles::note(Error error, std::string_view key) const {
    if (error == Error::NotFound) missing_ = key;
}

Result<const TensorLayout> DataFiles::get_tensor_layout(std::string_view key) const {
    const auto layout = merged_->get_tensor_layout(key);
    note(layout.error(), key);
    if (!layout.ok()) return layout.error();
    tensors_.emplace(key);
    return *layout;
}

Result<FreeableBuffer> DataFiles::get_data(std::string_view key) const {
    auto data = merged_->get_data(key);
    note(data.error(), key);
    // A norm, say: every step reads it, and the system would map megabytes of weights around it.
    if (data.ok() && data->size() < kLarge && tensors_.count(std::string(key)) > 0) return copied(*data);
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
