// Memory of the system's own, and how callers are told what does not fit.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <stdexcept>

namespace bedplate {

// What a caller gave does not fit: sizes, ids, a file's content. The text says what, in words.
class InvalidError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

inline void require(bool condition, const char* what) {
    if (!condition) throw InvalidError(what);
}

// Zeros, aligned to pages, with some bytes to spare behind the last, which kernels may read. Pages come when
// they are first written, so threads that fill a region clear it too, and all of them go back to the system
// at once.
class Region {
  public:
    // read_often: as a whole in each step. Huge pages then save most look-ups of addresses, where the system
    // has them.
    Region(std::size_t size, bool read_often) : size_(size + kSpare) {
        if (size > std::size_t(1) << 46) throw std::bad_alloc();
        void* data = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (data == MAP_FAILED) throw std::bad_alloc();
        data_ = static_cast<std::uint8_t*>(data);
#ifdef MADV_HUGEPAGE
        if (read_often) madvise(data_, size_, MADV_HUGEPAGE);
#endif
    }
    ~Region() { munmap(data_, size_); }
    Region(const Region&) = delete;
    Region& operator=(const Region&) = delete;

    std::uint8_t* data() const { return data_; }

  private:
    static constexpr std::size_t kSpare = 256;
    std::uint8_t* data_;
    std::size_t size_;
};

// `size` items of a plain type in a region of their own.
template <class T>
class Array {
  public:
    Array() = default;
    explicit Array(std::size_t size)
        : size_(size), region_(std::make_unique<const Region>(size * sizeof(T), false)) {}

    T* data() const { return region_ == nullptr ? nullptr : reinterpret_cast<T*>(region_->data()); }
    T& operator[](std::size_t i) const { return data()[i]; }
    std::size_t size() const { return size_; }

  private:
    std::size_t size_ = 0;
    std::unique_ptr<const Region> region_;
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
