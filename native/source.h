// Constants as they lie in files, and the memory that weights are made in.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <new>

#include "memory.h"

namespace bedplate {

// A range of an open file. It is read, not mapped: if a mapped file is cut short, the process ends.
struct Source {
    int file;
    std::int64_t offset, size;

    // Reads `count` bytes from byte `at` of the range on, which it must have. InvalidError: the file ends
    // before, or cannot be read.
    void read(std::int64_t at, std::int64_t count, void* to) const {
        auto* out = static_cast<std::uint8_t*>(to);
        while (count > 0) {
            const ssize_t got = pread(file, out, static_cast<std::size_t>(count), offset + at);
            if (got < 0 && errno == EINTR) continue;
            require(got > 0, "the file ends too early, or cannot be read");
            out += got;
            at += got;
            count -= got;
        }
    }
};

// Memory of zeros that goes back to the system as a whole. Pages come as they are first written, so the
// threads that fill it also clear it.
class Region {
  public:
    explicit Region(std::size_t size) : size_(size + kSpare) {
        if (size > std::size_t(1) << 46) throw std::bad_alloc();
        void* data = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (data == MAP_FAILED) throw std::bad_alloc();
        data_ = static_cast<std::uint8_t*>(data);
#ifdef MADV_HUGEPAGE
        madvise(data_, size_, MADV_HUGEPAGE);  // fewer pages to clear and to look up; only a hint
#endif
    }
    ~Region() { munmap(data_, size_); }
    Region(const Region&) = delete;
    Region& operator=(const Region&) = delete;

    std::uint8_t* data() const { return data_; }

  private:
    static constexpr std::size_t kSpare = 256;  // that kernels may read behind the last
    std::uint8_t* data_;
    std::size_t size_;
};

// Hands out pieces of memory, each aligned to cache lines; without memory it only counts.
class Pieces {
  public:
    explicit Pieces(std::uint8_t* data) : data_(data) {}
    template <class T>
    T* take(std::int64_t count) {
        constexpr std::size_t kLine = 64;
        T* const piece = data_ == nullptr ? nullptr : reinterpret_cast<T*>(data_ + used_);
        used_ += (static_cast<std::size_t>(count) * sizeof(T) + kLine - 1) / kLine * kLine;
        return piece;
    }
    std::size_t used() const { return used_; }

  private:
    std::uint8_t* data_;
    std::size_t used_ = 0;
};

}  // namespace bedplate
