// Memory that kernels read: aligned to cache lines, with some bytes to spare behind the last, which they may
// read.
#pragma once

#include <cstddef>
#include <cstring>
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

// `size` items of a plain type; zeros at first.
template <class T>
class Array {
  public:
    Array() = default;
    explicit Array(std::size_t size) : size_(size) {
        if (size == 0) return;
        if (size > (std::size_t(1) << 46) / sizeof(T)) throw std::bad_alloc();
        const std::size_t bytes = (size * sizeof(T) + kSpare + kLine - 1) / kLine * kLine;
        data_.reset(static_cast<T*>(std::aligned_alloc(kLine, bytes)));
        if (!data_) throw std::bad_alloc();
        std::memset(static_cast<void*>(data_.get()), 0, bytes);
    }
    T* data() { return data_.get(); }
    const T* data() const { return data_.get(); }
    T& operator[](std::size_t i) { return data_.get()[i]; }
    const T& operator[](std::size_t i) const { return data_.get()[i]; }
    std::size_t size() const { return size_; }
    std::size_t bytes() const { return size_ * sizeof(T); }
    bool empty() const { return size_ == 0; }

  private:
    static constexpr std::size_t kLine = 64, kSpare = 256;
    struct Free {
        void operator()(T* data) const { std::free(data); }
    };
    std::unique_ptr<T, Free> data_;
    std::size_t size_ = 0;
};

}  // namespace bedplate
